"""One block's candidates: fitted in closed form, judged by their own error, and put into the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.least_squares import fit_quality
from eugen.search.calibration import Chunk, Inputs
from eugen.search.candidates import Sized
from eugen.search.nested import NestedFits, nests, solves_alone
from eugen.sites import FFNSite
from eugen.surgery import block_generator

if TYPE_CHECKING:
    from eugen.search.sensitivity import Sensitivity

FITTED_BUDGETS = (0.1, 0.3, 0.6)
"""Near these the output's change is measured; methods without nested sizes are fitted there only."""
MEASURED_BUDGET = (0.3,)
"""Near this one the output's change is measured of a method without nested sizes."""
FITTED_TOKENS = 16384
"""At most so many tokens are fitted to."""


@dataclass
class Seen:
    """Measured so far for one size: its local error, and the effect if the network was run."""

    sized: Sized
    local_error: float
    effect: float | None = None


class BlockStudy:
    """The work on one block."""

    def __init__(
        self, site: FFNSite, gamma: Tensor | None, held_out: list[Chunk], whole: Sensitivity
    ) -> None:
        self.site, self.gamma, self.held_out, self.whole = site, gamma, held_out, whole
        self.inputs: Inputs = whole.fitted[site.name]
        self.change = whole.change.alone(site)
        self._nested: NestedFits | None = None
        self._thinned: list[Chunk] | None = None

    def measure(self, own: list[Sized]) -> list[Seen | None]:
        """One method at its sizes: fitted where it is cheap, the network run at a few of them."""
        fitted, measured = _nearest(own, FITTED_BUDGETS), _nearest(own, MEASURED_BUDGET)
        seen: list[Seen | None] = [None] * len(own)
        for index, each in enumerate(own):
            everywhere = solves_alone(each.config)
            if index not in fitted and not everywhere:
                continue
            layer = self._fit(each.config)
            error = self._local_error(layer)
            if not math.isfinite(error):
                continue
            seen[index] = Seen(each, error)
            if index in (fitted if everywhere else measured):
                effect = self.change(layer)
                self.whole.passes["held-out batches"] += len(self.whole.change.batches)
                seen[index] = Seen(each, error, effect if math.isfinite(effect) else None)
        return seen

    def _fit(self, config: LayerConfig) -> FFNLayer:
        if nests(config):
            if self._nested is None:
                self._nested = NestedFits(self.site.dense, self._thin(), self.gamma)
            return self._nested.fit(config)
        data = self._thin()
        generator = block_generator(self.whole.seed, self.site)
        with torch.no_grad():
            return config.fit(self.site.dense, data, generator=generator, output_weight=self.gamma)

    def remaining(self, own: list[Sized]) -> float:
        """The share of a method's error at about the middle size that refinement leaves."""
        (middle,) = _nearest(own, MEASURED_BUDGET)
        config = own[middle].config
        layer = self._fit(config)
        before = self._local_error(layer)
        if not (math.isfinite(before) and before > 0 and any(p.requires_grad for p in layer.parameters())):
            return 1.0
        refined = config.refine(
            layer,
            self.site.dense,
            self._thin(),
            steps=self.whole.refine_steps,
            generator=block_generator(self.whole.seed, self.site),
            output_weight=self.gamma,
        )
        after = self._local_error(refined)
        return min(1.0, after / before) if math.isfinite(after) else 1.0

    def _thin(self) -> list[Chunk]:
        if self._thinned is None:
            self._thinned = self.inputs.stream(FITTED_TOKENS)
        return self._thinned

    def _local_error(self, layer: FFNLayer) -> float:
        """1 − R²; 0 for a block whose outputs do not vary, which any layer with a bias gives."""
        layer.eval()
        r2 = fit_quality(layer, self.held_out, self.gamma)
        return 0.0 if math.isnan(r2) else max(0.0, 1 - r2)


def _nearest(own: list[Sized], budgets: Sequence[float]) -> set[int]:
    """The sizes closest to these budgets in ratio."""
    return {min(range(len(own)), key=lambda i: abs(math.log(own[i].budget / b))) for b in budgets}
