"""The rank-adaptive basis-update and Galerkin (BUG) integrator of dynamical low-rank training.

Algorithm 1 of arXiv 2205.13571, after arXiv 2104.05247. Every matrix is `W = U S Vᵀ` with orthonormal U
and V. A step takes two gradients: one for the bases, by which both grow to twice their rank (K- and L-step),
and one for S between the larger bases (S-step). A truncated SVD of S then sets the new rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from eugen import parallel
from eugen.parts.int8_linear import WeightOnlyInt8Linear
from eugen.refine import PEAK_LEARNING_RATE, LocalLoss
from eugen.shapes import Float

PEAK_STEP = 0.05
"""Largest change of a matrix in one step, relative to its norm."""
DECAY = (0.9, 0.999)
"""Of the running means of the gradient and of its squared norm: Adam's."""


class BugMatrix:
    """One matrix while it is integrated: `W L = U S Vᵀ` in coordinates that whiten its inputs.

    With `L Lᵀ = E[x xᵀ]` a singular value of `W L` is the part of the output that it carries, and the
    gradient is well conditioned.

    Args:
        v, u: the factors, `W = u.weight @ v.weight`.
        root: L `[in, in]`, lower triangular.
    """

    def __init__(self, v: nn.Linear, u: nn.Linear, root: Tensor) -> None:
        wide = torch.promote_types(u.weight.dtype, torch.float32)
        self.root = root.to(wide)
        self.u, left = torch.linalg.qr(u.weight.detach().to(wide))
        self.v, right = torch.linalg.qr(self.root.T @ v.weight.detach().to(wide).T)
        self.s = left @ right.T
        self.bias = u.bias.detach().to(wide).requires_grad_()
        self.cost = u.out_features + v.in_features
        self._mean = (self.u, torch.zeros_like(self.s), self.v)
        self._square, self._steps = 0.0, 0

    @property
    def rank(self) -> int:
        return len(self.s)

    def input_side(self, v: Float[Tensor, "d_in r"]) -> Float[Tensor, "d_in r"]:
        """`L⁻ᵀ V`: the factor that acts on inputs that are not whitened."""
        return torch.linalg.solve_triangular(self.root.T, v, upper=True)

    def tangent(self) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
        """`K = U S` and `L = V Sᵀ`, and `x ↦ W x + b` of which they get `∇W V` and `∇Wᵀ U` as gradients."""
        k, l = (self.u @ self.s).requires_grad_(), (self.v @ self.s.T).requires_grad_()
        v, w = self.input_side(self.v), self.u @ self.s
        return [k, l], lambda x: x @ v @ (k - w).T + x @ self.input_side(l) @ self.u.T + self.bias

    def augment(self, k: Float[Tensor, "d_out r"], l: Float[Tensor, "d_in r"]) -> None:
        """K- and L-step: the bases of `[U | K − εk]` and `[V | L − εl]`, the same for every step size ε."""
        u, v = torch.linalg.qr(torch.cat([self.u, k], 1)).Q, torch.linalg.qr(torch.cat([self.v, l], 1)).Q
        self.s = ((u.T @ self.u) @ self.s @ (self.v.T @ v)).requires_grad_()
        self.u, self.v = u, v

    def galerkin(self) -> Callable[[Tensor], Tensor]:
        """`x ↦ W x + b` of which S gets its gradient."""
        v = self.input_side(self.v)
        return lambda x: x @ v @ self.s.T @ self.u.T + self.bias

    @torch.no_grad()
    def step(self, gradient: Float[Tensor, "r q"], size: float) -> None:
        """The S-step: Adam's, with one second moment for the matrix, so that no basis is preferred.

        The mean gradient is carried over from the bases of the step before.
        """
        u, mean, v = self._mean
        mean = DECAY[0] * (self.u.T @ u) @ mean @ (v.T @ self.v) + (1 - DECAY[0]) * gradient
        self._square = DECAY[1] * self._square + (1 - DECAY[1]) * float(gradient.square().sum())
        self._steps += 1
        self._mean = (self.u, mean, self.v)
        first, second = mean / (1 - DECAY[0] ** self._steps), self._square / (1 - DECAY[1] ** self._steps)
        self.s = self.s - size * self.s.norm() / (math.sqrt(second) + 1e-12) * first

    @torch.no_grad()
    def diagonalise(self) -> None:
        """Turn the bases to singular vectors: S becomes diagonal, largest first."""
        left, values, right = torch.linalg.svd(self.s, full_matrices=False)
        self.u, self.s, self.v = self.u @ left, values.diag(), self.v @ right.T

    def truncate(self, rank: int) -> None:
        """Keep the first singular values."""
        self.u, self.s, self.v = self.u[:, :rank], self.s[:rank, :rank], self.v[:, :rank]

    @torch.no_grad()
    def write(self, v: nn.Linear, u: nn.Linear) -> None:
        """Back into two linear maps, which take this rank; S goes into both."""
        set_rank(v, u, rank=self.rank)
        root = self.s.diagonal().sqrt()
        v.weight.copy_((self.input_side(self.v) * root).T)
        u.weight.copy_(self.u * root)
        u.bias.copy_(self.bias)


def adapt_ranks(matrices: Sequence[BugMatrix], tolerance: float, allowed: int) -> None:
    """Truncate all matrices after an S-step.

    First what is within the tolerance, then, until the budget is kept, what carries the least of its
    matrix's output per MAC. One rank always stays.

    Args:
        tolerance: norm of the singular values that are cut, relative to that of all of a matrix.
        allowed: MACs of all matrices together, enough for one rank of each.
    """
    shares, ranks = [], []
    for matrix in matrices:
        matrix.diagonalise()
        energy = matrix.s.diagonal().double().square()
        tails = (energy / energy.sum().clamp(min=1e-300)).flip(0).cumsum(0).flip(0)
        ranks.append(max(1, int((tails > tolerance**2).sum())))
        shares.append((energy / energy.sum().clamp(min=1e-300) / matrix.cost).tolist())
    assert sum(matrix.cost for matrix in matrices) <= allowed, "the budget buys no rank"
    while sum(r * matrix.cost for r, matrix in zip(ranks, matrices, strict=True)) > allowed:
        last = [share[r - 1] if r > 1 else math.inf for share, r in zip(shares, ranks, strict=True)]
        ranks[last.index(min(last))] -= 1
    for matrix, rank in zip(matrices, ranks, strict=True):
        matrix.truncate(rank)


@torch.enable_grad()
def integrate(
    matrices: Sequence[BugMatrix],
    act: nn.Module,
    loss: LocalLoss,
    *,
    steps: int,
    tolerance: float,
    allowed: int,
) -> None:
    """So many steps of the integrator, in place: two gradients each, on one batch."""
    vectors = [matrix.bias for matrix in matrices] + list(act.parameters())
    optimiser = torch.optim.Adam(vectors, lr=PEAK_LEARNING_RATE)
    schedule = OneCycleLR(optimiser, max_lr=PEAK_LEARNING_RATE, total_steps=max(2, steps))

    def network(maps: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        up, down = maps[0], maps[1] if len(maps) > 1 else nn.Identity()
        return lambda x: down(act(up(x.to(matrices[0].s.dtype))))

    for _ in range(steps):
        rows, size = loss.draw(), PEAK_STEP * float(schedule.get_last_lr()[0]) / PEAK_LEARNING_RATE
        factors, maps = zip(*(matrix.tangent() for matrix in matrices), strict=True)
        gradients = torch.autograd.grad(loss(network(maps), rows), [f for pair in factors for f in pair])
        gradients = parallel.total(*gradients)
        for index, matrix in enumerate(matrices):
            matrix.augment(*gradients[2 * index : 2 * index + 2])
        inner = [matrix.s for matrix in matrices]
        value = loss(network([matrix.galerkin() for matrix in matrices]), rows)
        slopes = parallel.total(*torch.autograd.grad(value, inner + vectors))
        for matrix, slope in zip(matrices, slopes, strict=False):
            matrix.step(slope, size)
        for vector, slope in zip(vectors, slopes[len(inner) :], strict=True):
            vector.grad = slope
        optimiser.step()
        schedule.step()
        adapt_ranks(matrices, tolerance, allowed)


@torch.no_grad()
def set_rank(v: nn.Linear | WeightOnlyInt8Linear, u: nn.Linear | WeightOnlyInt8Linear, *, rank: int) -> None:
    """Make room for another rank in two linear maps, quantised or not; the weights are then to be set."""
    if v.out_features == rank:
        return
    v.out_features = u.in_features = rank
    for linear in (v, u):
        shape = (linear.out_features, linear.in_features)
        if isinstance(linear, WeightOnlyInt8Linear):
            linear.quantised = linear.quantised.new_empty(shape)
            linear.scale = nn.Parameter(linear.scale.new_empty(shape[0]), linear.scale.requires_grad)
        else:
            linear.weight = nn.Parameter(linear.weight.new_empty(shape), linear.weight.requires_grad)
