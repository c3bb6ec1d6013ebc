"""Calibration data cut in two, and what the dense network shows of its blocks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from eugen.capture import capturing, evaluating
from eugen.ffn import DenseFFN
from eugen.least_squares import HELD_OUT
from eugen.sites import FFNSite
from eugen.sites.faults import did_not_run
from eugen.transfer import require_finite, wide

Chunk = tuple[Tensor, Tensor, "Tensor | None"]
Call = Callable[[nn.Module, Any], Any]
CHUNK = 2048
"""Tokens that are multiplied at a time, or a few more."""


def divided(calibration: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to fit to, and one in eight, evenly taken, to judge by; a single batch is cut inside.

    Raises:
        ValueError: there is no batch, or a single one of a single sample.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError("the calibration data are empty: give at least one batch of model inputs")
    if len(batches) == 1:
        return _cut(batches[0])
    last = HELD_OUT - 1 if len(batches) >= HELD_OUT else len(batches) - 1
    held_out = [batch for i, batch in enumerate(batches) if i % HELD_OUT == last]
    return [batch for i, batch in enumerate(batches) if i % HELD_OUT != last], held_out


def _cut(batch: Any) -> tuple[list[Any], list[Any]]:
    """The first samples and the last eighth; samples are counted along the first tensor's first axis."""
    leaves, shape = tree_flatten(batch)
    samples = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if samples < 2:
        raise ValueError(
            "calibration is one batch of one sample, and some are held out to judge by: give at least two"
        )
    cut = samples - max(1, samples // HELD_OUT)

    def part(rows: slice) -> list[Any]:
        taken = [
            leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples else leaf
            for leaf in leaves
        ]
        return [tree_unflatten(taken, shape)]

    return part(slice(None, cut)), part(slice(cut, None))


@dataclass
class Inputs:
    """A block's inputs in the dense network, and its tokens' weights; targets are computed when wanted."""

    dense: DenseFFN
    chunks: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(x) for x, _ in self.chunks)

    @torch.no_grad()
    def stream(self, most: int | None = None) -> list[Chunk]:
        """Chunks `(x, target, weight)` of about `CHUNK` tokens.

        With `most`, every so-manieth token so that no more are left.
        """
        stride = 1 if most is None else -(-self.tokens // most)
        thinned = [(x[::stride], None if w is None else w[::stride]) for x, w in self.chunks]
        with evaluating(self.dense):
            return [(x, self.dense(x), w) for x, w in _joined(thinned)]


def _joined(chunks: list[tuple[Tensor, Tensor | None]]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Neighbours put together until they have `CHUNK` tokens: each chunk costs a pass over a Gram matrix."""
    begun: list[tuple[Tensor, Tensor | None]] = []
    for index, chunk in enumerate(chunks):
        begun.append(chunk)
        if index + 1 == len(chunks) or sum(len(x) for x, _ in begun) >= CHUNK:
            weights = [w for _, w in begun if w is not None]
            yield torch.cat([x for x, _ in begun]), torch.cat(weights) if weights else None
            begun = []


@torch.no_grad()
def observe(model: nn.Module, sites: list[FFNSite], batches: list[Any], call: Call) -> dict[str, Inputs]:
    """Each block's inputs in one pass of the dense network over the batches.

    Raises:
        ValueError: a block did not run or ran twice, or its activations hold NaN or infinity.
    """
    seen_inputs = {site.name: Inputs(site.dense) for site in sites}
    for batch in batches:
        with evaluating(model), capturing(model, sites) as seen:
            call(model, batch)
        for site in sites:
            output, stream = seen.get((site.name, "output")), seen.get((site.name, "stream"))
            if output is None:
                raise ValueError(did_not_run(site))
            require_finite(output, site)
            weight = None
            if site.norm is not None:
                want = wide(output) if stream is None else wide(stream) + output
                weight = 1 / want.var(-1, correction=0).clamp(min=1e-12)
            seen_inputs[site.name].chunks.append((seen[site.name, "input"], weight))
    return seen_inputs


def first_tensor(result: Any) -> Tensor:
    """The first floating-point tensor of a model's output.

    Raises:
        ValueError: there is none.
    """
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach()
    raise ValueError(
        f"the model's output ({type(result).__name__}) holds no floating-point tensor to compare by: "
        "give call=, which returns one"
    )


@contextmanager
def as_dense_ran(model: nn.Module):
    """In evaluation mode and past torch's fused encoder, as `observe` ran the dense network."""
    with evaluating(model), capturing(model, []):
        yield
