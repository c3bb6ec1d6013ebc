"""Dynamical low-rank training (DLRT, arXiv 2205.13571): low rank that adapts while it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eugen.ffn import DenseFFN, FFNLayer
from eugen.layers.low_rank import LowRankFFN
from eugen.layers.low_rank_aware import LowRankAwareConfig, moment_root, second_moment
from eugen.parts.bug_integrator import BugMatrix, integrate, set_rank
from eugen.refine import LocalLoss


class AdaptiveLowRankFFN(LowRankFFN):
    """A low-rank block that takes the ranks of the state dict that it loads."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, v, u in (("v1", self.v1, self.u1), ("v2", self.v2, self.readout)):
            stored = state_dict.get(f"{prefix}{name}.weight", state_dict.get(f"{prefix}{name}.quantised"))
            if v is not None and u is not None and stored is not None:
                set_rank(v, u, rank=len(stored))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@dataclass(frozen=True, kw_only=True)
class DLRTConfig(LowRankAwareConfig, name="dlrt"):
    """`low_rank_aware` in closed form; refinement then adapts the rank of each matrix within the budget.

    Without refinement it is `low_rank_aware`. A step of refinement costs two gradients.

    Args:
        rank: r of both pairs of factors before refinement; None derives it from `budget`. Without a
            budget, refinement keeps to the MACs of this rank.
        tolerance: norm of what a step may cut from a matrix, relative to its own, under its inputs'
            second moment.
    """

    tolerance: float = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must be in [0, 1)")

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> AdaptiveLowRankFFN:
        low = super().build(dense, generator=generator)
        return AdaptiveLowRankFFN(low.v1, low.u1, low.act, low.v2, low.readout)

    def refine(
        self,
        layer: FFNLayer,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFNLayer:
        assert isinstance(layer, AdaptiveLowRankFFN)
        refined = copy.deepcopy(layer)
        allowed = layer.macs_per_token
        if self.budget is not None:
            allowed = math.floor(self.budget * dense.macs_per_token + 1e-9)
        pairs = [(refined.v1, refined.u1)]
        matrices = [BugMatrix(*pairs[0], moment_root(second_moment(data, lambda x: x)))]
        if refined.v2 is not None and refined.readout is not None:
            pairs.append((refined.v2, refined.readout))
            matrices.append(BugMatrix(*pairs[1], moment_root(second_moment(data, refined.hidden))))
        loss = LocalLoss(data, generator=generator, output_weight=output_weight)
        integrate(matrices, refined.act, loss, steps=steps, tolerance=self.tolerance, allowed=allowed)
        for matrix, pair in zip(matrices, pairs, strict=True):
            matrix.write(*pair)
        refined.fit_readout(data)
        return refined
