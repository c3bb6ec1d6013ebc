"""Binary trees of hyperplanes: the way of a token down to a leaf, and trees grown from data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eugen import parallel
from eugen.ffn import TokenStream
from eugen.shapes import Float

SHARPNESS = 8.0
"""Deviation of a grown node's decision before its sigmoid: few tokens are undecided."""


def descend(
    x: Float[Tensor, "t d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], depth: int
) -> tuple[Tensor, Tensor | None]:
    """Each row's leaf (or node of the level `depth`), `[t]`, by `depth` gathered products.

    Nodes stand in level order; a row goes right where `weight[node]·x + bias[node] > 0`. The second
    result is the soft share of the way taken, where gradients are wanted. Half precision is widened:
    a sum rounded to 8 bits would send rows near a hyperplane elsewhere.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    narrow, x, weight, bias = x.dtype, x.to(wide), weight.to(wide), bias.to(wide)
    node = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    share = None
    for level in range(depth):
        # All rows meet the same first node: nothing to gather.
        product = x @ weight[:1].T if level == 0 else torch.bmm(x.unsqueeze(1), weight[node].unsqueeze(2))
        z = product.reshape(-1) + bias[node]
        if torch.is_grad_enabled():
            step = torch.sigmoid(z.abs())
            share = step if share is None else share * step
        node = 2 * node + 1 + (z > 0)
    return node - (2**depth - 1), None if share is None else share.to(narrow)


def mixture(
    x: Float[Tensor, "t d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], depth: int
) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t n"]]:
    """Soft shares of the leaves, which sum to 1, and each node's share of right turns."""
    right = torch.sigmoid(F.linear(x, weight, bias))
    shares = x.new_ones(x.shape[0], 1)
    for level in range(depth):
        turn = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
        shares = torch.stack([shares * (1 - turn), shares * turn], dim=-1).flatten(1)
    return shares, right


def hardening_loss(right: Float[Tensor, "t n"]) -> Tensor:
    """Mean entropy of the nodes' decisions, in nats: 0 once every decision is certain."""
    p = right.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()).sum() / max(1, p.numel())


def balance_loss(shares: Float[Tensor, "t e"]) -> Tensor:
    """`E Σ_e (mean share of leaf e)²`: 1, its least, where all leaves are used alike."""
    tokens, leaves = shares.shape
    return leaves * (shares.sum(0) / max(1, tokens)).square().sum()


def descend_one(
    x: Float[Tensor, "1 d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], depth: int
) -> int:
    """`descend` of a single row, read off node by node; float32 or wider."""
    node = 0
    for _ in range(depth):
        z = F.linear(x, weight[node : node + 1], bias[node : node + 1])
        node = 2 * node + (2 if z.item() > 0 else 1)
    return node - (2**depth - 1)


@torch.no_grad()
def grow_tree(data: TokenStream, depth: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Weights and biases of a tree whose leaves hold equally many tokens.

    Each node splits its tokens at their median along their first principal direction.

    Raises:
        ValueError: no tokens of any weight, or inputs that are not finite.
    """
    weights, biases = [], []
    for level in range(depth):
        above = (torch.cat(weights), torch.cat(biases)) if level else None
        count, mean, direction, deviation = _principal_directions(data, above, level)
        middle = _medians(data, above, level, direction)
        scale = (SHARPNESS / deviation)[:, None]
        # A node that no token reaches splits where its mean would be.
        middle = torch.where(count > 0, middle, (mean * direction).sum(1))
        weights.append(direction * scale)
        biases.append(-middle * scale[:, 0])
    return torch.cat(weights), torch.cat(biases)


def _members(x: Tensor, above: tuple[Tensor, Tensor] | None, level: int) -> Tensor:
    """Which node of the level each row reaches, float64 so that every pass agrees."""
    if above is None:
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return descend(x.double(), *above, level)[0]


def _token_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ones(len(x), dtype=torch.float64, device=x.device) if weight is None else weight.double()


def _principal_directions(
    data: TokenStream, above: tuple[Tensor, Tensor] | None, level: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per node: weight of its tokens, their mean, first principal direction and deviation along it."""
    nodes = 2**level
    count = total = square = torch.zeros((), dtype=torch.float64)
    for x, _, weight in data:
        wide = x.double()
        member = F.one_hot(_members(x, above, level), nodes).double().T * _token_weight(x, weight)
        count, total = count + member.sum(1), total + member @ wide
        square = square + torch.stack([wide.T @ (wide * row[:, None]) for row in member])
    count, total, square = parallel.total(count, total, square)
    if count.ndim == 0 or not count.sum() > 0:
        raise ValueError("the calibration stream is empty, or its token weights sum to 0 or NaN")
    if not torch.isfinite(square).all():
        raise ValueError("the calibration inputs hold NaN or infinity: check the data and the model")
    least = count.clamp(min=torch.finfo(torch.float64).tiny)
    mean = total / least[:, None]
    covariance = square / least[:, None, None] - mean[:, :, None] * mean[:, None, :]
    values, vectors = torch.linalg.eigh(covariance)
    direction = vectors[:, :, -1]
    # The sign of an eigenvector is free: the largest entry is positive.
    largest = direction.gather(1, direction.abs().argmax(1, keepdim=True))
    deviation = values[:, -1].clamp(min=1e-12).sqrt()
    return count, mean, direction * largest.sign(), deviation


def _medians(
    data: TokenStream, above: tuple[Tensor, Tensor] | None, level: int, direction: Tensor
) -> Float[Tensor, " n"]:
    """Per node the weighted median of its tokens along its direction, between two tokens."""
    members, places, weights = [], [], []
    for x, _, weight in data:
        member = _members(x, above, level)
        members.append(member)
        places.append((x.double() * direction[member]).sum(1))
        weights.append(_token_weight(x, weight))
    member, place, weight = (parallel.gathered(torch.cat(parts)) for parts in (members, places, weights))
    medians = []
    for node in range(len(direction)):
        own = (member == node) & (weight > 0)
        ordered, order = place[own].sort()
        if len(ordered) == 0:
            medians.append(place.new_zeros(()))
            continue
        passed = weight[own][order].cumsum(0)
        below = int(torch.searchsorted(passed, passed[-1:] / 2))
        above_it = min(below + 1, len(ordered) - 1)
        medians.append((ordered[below] + ordered[above_it]) / 2)
    return torch.stack(medians)
