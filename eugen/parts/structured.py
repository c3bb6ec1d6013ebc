"""Block-diagonal matrices and the closed-form fit of the maps that are built on them.

A map is `y_l = Σ_k U_lk V_lk x_k` over blocks x_k of the input: low rank in every pair (l, k) of an output
and an input block. The rows V_k of all l are one block-diagonal factor. With as many output blocks as
input blocks this is Monarch (arXiv 2204.00595, Section 3); with one output block it is BlockDense.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.ffn import TokenStream, new_linear
from eugen.layers.low_rank_aware import moment_root
from eugen.least_squares import Moments
from eugen.shapes import Float

SWEEPS = 5
"""Passes over the input blocks: each lowers the error, the first five by most of what ten would."""


class BlockDiagonal(nn.Module):
    """`y_k = W_k x_k + b_k` for equal blocks of the input, as one batched product.

    A width that the blocks do not divide is padded: with zeros before, cut after. The padding is paid for.

    Shapes:
        weight: `[blocks, out_block, in_block]`.
        bias: `[out_features]`, where there is one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        *,
        like: Tensor,
        generator: torch.Generator,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        in_block, out_block = -(-in_features // blocks), -(-out_features // blocks)
        start = new_linear(in_block, blocks * out_block, like=like, generator=generator, bias=bias)
        self.weight = nn.Parameter(start.weight.detach().view(blocks, out_block, in_block))
        self.bias = nn.Parameter(start.bias.detach()[:out_features].clone()) if bias else None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        blocks, out_block, in_block = self.weight.shape
        if blocks * in_block > self.in_features:
            x = F.pad(x, (0, blocks * in_block - self.in_features))
        pieces = x.reshape(math.prod(x.shape[:-1]), blocks, in_block).transpose(0, 1)
        y = torch.bmm(pieces, self.weight.mT).transpose(0, 1).reshape(*x.shape[:-1], blocks * out_block)
        if blocks * out_block > self.out_features:
            y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    @property
    def macs_per_token(self) -> int:
        return self.weight.numel()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks={len(self.weight)}"

    @torch.no_grad()
    def fit(self, data: TokenStream, inputs: Callable[[Tensor], Tensor]) -> None:
        """Solve every block, and the bias, by ridge for these data, in place.

        Args:
            inputs: what comes before this factor, `[T, d]` to `[T, in_features]`.
        """
        blocks, out_block, in_block = self.weight.shape
        moments = [Moments() for _ in range(min(blocks, -(-self.out_features // out_block)))]
        for x, y, weight in data:
            features = inputs(x)
            for index, moment in enumerate(moments):
                targets = y[:, index * out_block : (index + 1) * out_block]
                moment.add(features[:, index * in_block : (index + 1) * in_block], targets, weight)
        self.weight.zero_()
        for index, moment in enumerate(moments):
            weight, bias = moment.solve()
            self.weight[index, : weight.shape[0], : weight.shape[1]] = weight.to(self.weight.dtype)
            if self.bias is not None:
                self.bias[index * out_block : (index + 1) * out_block] = bias.to(self.bias.dtype)


@torch.no_grad()
def pair_factors(
    weight: Float[Tensor, "d_out d_in"],
    ranks: Tensor,
    moment: Float[Tensor, "d_in d_in"],
    *,
    sweeps: int = SWEEPS,
) -> tuple[Float[Tensor, "l k j r"], Float[Tensor, "l k r i"]]:
    """Factors of `W ≈ (U_lk V_lk)_lk` with these ranks; what is beyond a pair's rank is 0.

    It starts at Monarch's projection (arXiv 2204.00595, Theorem 1), a truncated SVD of every pair, each under
    its own inputs' metric. Then the error of the outputs, `tr (W − UV) M (W − UV)ᵀ`, falls by one input block
    after the other: with all others fixed, the best `U_lk V_lk` is again a truncated SVD (Eckart-Young).

    Args:
        ranks: of each pair of an output block l and an input block k, `[l, k]`, integers.
        moment: M, the second moment of the inputs, float64.
        sweeps: passes over the input blocks after the start.
    """
    n_out, n_in = ranks.shape
    weight = weight.detach().double()
    j, i, r = -(-weight.shape[0] // n_out), -(-weight.shape[1] // n_in), int(ranks.max())
    pad_in, pad_out = n_in * i - weight.shape[1], n_out * j - weight.shape[0]
    left_over = F.pad(weight, (0, pad_in, 0, pad_out)).clone()
    moment = F.pad(moment, (0, pad_in, 0, pad_in)).clone()
    own = moment.view(n_in, i, n_in, i).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    roots = moment_root(own)
    own.copy_(roots @ roots.mT)  # the roots are slightly ridged: let both speak of one metric
    used = torch.arange(r, device=weight.device) < ranks.to(weight.device)[..., None]
    u, v = weight.new_zeros(n_out, n_in, j, r), weight.new_zeros(n_out, n_in, r, i)
    rank = min(r, i, j)
    for turn in range(n_in * (1 + sweeps)):
        k = turn % n_in
        columns = slice(k * i, (k + 1) * i)
        left_over[:, columns] += (u[:, k] @ v[:, k]).reshape(-1, i)
        if turn < n_in:  # from the start that finds a member of the class at once
            shaped = left_over[:, columns] @ roots[k]
        else:
            shaped = left_over @ moment[:, columns]
            shaped = torch.linalg.solve_triangular(roots[k].T, shaped, upper=True, left=False)
        u[:, k, :, :rank], v[:, k, :rank] = _best_pairs(shaped.view(n_out, j, i), roots[k], used[:, k, :rank])
        left_over[:, columns] -= (u[:, k] @ v[:, k]).reshape(-1, i)
    return u, v


def _best_pairs(
    shaped: Float[Tensor, "l j i"], root: Float[Tensor, "i i"], used: Float[Tensor, "l r"]
) -> tuple[Float[Tensor, "l j r"], Float[Tensor, "l r i"]]:
    """Truncated SVDs of `shaped = W L` as factors of W, under the metric of `root` L; unused ranks are 0."""
    left, values, right = torch.linalg.svd(shaped, full_matrices=False)
    rank = used.shape[-1]
    size = values[:, :rank].sqrt() * used
    right = torch.linalg.solve_triangular(root, right[:, :rank], upper=False, left=False)
    return left[..., :rank] * size[:, None], right * size[..., None]
