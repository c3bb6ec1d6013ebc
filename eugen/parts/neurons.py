"""A trained block's neurons: how much each matters on a stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.ffn import DenseFFN, TokenStream
from eugen.shapes import Float

ROWS_AT_ONCE = 1024
"""Tokens whose neurons are in memory in float64 at a time."""


def in_pieces(data: TokenStream) -> Iterator[tuple[Float[Tensor, "t d_in"], Float[Tensor, " t"]]]:
    """A stream's inputs and their weights, float64, so few at a time that their neurons fit into memory."""
    for x, _, weight in data:
        tokens = x.new_ones(len(x)) if weight is None else weight
        yield from zip(x.split(ROWS_AT_ONCE), tokens.double().split(ROWS_AT_ONCE), strict=True)


@torch.no_grad()
def neuron_scores(
    dense: DenseFFN,
    data: TokenStream,
    output_weight: Float[Tensor, " d_out"] | None = None,
    *,
    beside: nn.Linear | None = None,
) -> Float[Tensor, " h"]:
    """Importance of each hidden neuron: `var(h_j)·‖γ∘W2[:, j]‖²` (`var(h_j)` without an output matrix).

    Args:
        beside: a linear map from x to the neurons; its values do not count.
    """
    total = torch.zeros(dense.hidden_features, dtype=torch.float64, device=dense.up.weight.device)
    count, square = total.new_zeros(()), torch.zeros_like(total)
    for rows, token in in_pieces(data):
        hidden = dense.features(rows) if beside is None else dense.features(rows) - beside(rows)
        hidden = hidden.double()
        count += token.sum()
        total += token @ hidden
        square += token @ hidden.square_()
    count, total, square = parallel.total(count, total, square)
    if not count:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    variance = square / count - (total / count).square()
    return variance if dense.down is None else variance * output_sizes(dense.down, output_weight).square()


def output_sizes(down: nn.Linear, output_weight: Float[Tensor, " d_out"] | None) -> Float[Tensor, " h"]:
    """`‖γ∘W2[:, j]‖`, float64: what one unit of each neuron changes in the output."""
    columns = down.weight.double().square()
    if output_weight is not None:
        columns = columns * output_weight.double()[:, None]
    return columns.sum(0).sqrt()


def strongest(scores: Float[Tensor, " h"], count: int) -> Tensor:
    """Indices of the `count` largest scores, strongest first.

    Raises:
        ValueError: there are fewer than `count`.
    """
    if count > len(scores):
        raise ValueError(f"{count} rows asked for, the dense layer has only {len(scores)} neurons")
    return scores.topk(count).indices
