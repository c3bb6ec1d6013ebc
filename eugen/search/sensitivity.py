"""What each option of each block costs the network's output.

A block's error is measured locally at every size where one Gram matrix and a solve serve, at three sizes
where a method takes more, and between these by its ratio to a method of all sizes: errors fall the faster the
larger the layer, so a line between two sizes would promise too much. The output's change is measured by
putting a layer alone into the dense network, at three sizes of the former and one of the latter, and
interpolated from the local error.

One block is looked at first, with all methods. A default one that is far behind the others there at every
size is not looked at elsewhere. Layers that will be refined are judged as refined ones: each method's layer
of about the middle size is refined on that block, and the share of its error that remains counts at all sizes
in all blocks. Without this the choice would go by closed forms, whose order is another one.

Passes of the network: one over the fitted batches, one over the held-out ones, and for each layer put in one
over `JUDGING_TOKENS` of their tokens (`Sensitivity.passes` counts batches).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from eugen.config import LayerConfig
from eugen.search.block import BlockStudy, Seen
from eugen.search.calibration import Call, divided, observe
from eugen.search.candidates import Sized, candidates_for, kept, sizes
from eugen.search.propagation import EffectMap, OutputChange, interpolate, log_of
from eugen.sites import FFNSite
from eugen.transfer import output_weight

FAR = 1.2
"""So many times the least error for about the same MACs, or fewer, is far behind."""
ABOUT = 1.1
"""Sizes are about the same up to this ratio: a budget buys a whole number of features."""
REFINED_STEPS = 100
"""At most so many steps of refinement show what it is worth to a method."""
JUDGING_TOKENS = 1024
"""The output's change is measured on the fewest held-out batches that have so many tokens."""


@dataclass(frozen=True)
class Option:
    """One choice for a block.

    Attributes:
        local_error: 1 − R² on held-out tokens, in the metric of the norm that follows.
        output_effect: relative squared change of the network's output if only this block is replaced.
        measured: whether the effect was measured; else it follows from the local error.
    """

    sized: Sized
    local_error: float
    output_effect: float
    measured: bool


class Sensitivity:
    """Everything that is measured on the dense network once.

    Args:
        given: candidates, or None for the default ones.
        refine_steps: of the transfer that the choice is for.

    Raises:
        ValueError: what `divided`, `observe` and `OutputChange` refuse.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[FFNSite],
        calibration: Sequence[Any],
        call: Call,
        *,
        given: Sequence[LayerConfig] | None,
        refine_steps: int = 0,
        seed: int,
    ) -> None:
        self.model, self.given, self.seed = model, given, seed
        self.refine_steps = min(refine_steps, REFINED_STEPS)
        self.remaining: dict[str, float] = {}
        """What refinement leaves of each candidate's error, by its name; 1 where it was not tried."""
        self.left_out: set[str] = set()
        """Candidates that are looked at in no further block."""
        self._measured: dict[str, dict[str, list[Seen]]] = {}
        fitted, held_out = divided(calibration)
        self.fitted = observe(model, sites, fitted, call)
        self.held_out = observe(model, sites, held_out, call)
        tokens = max(inputs.tokens for inputs in self.held_out.values())
        self.change = OutputChange(model, _evenly(held_out, JUDGING_TOKENS / tokens), call)
        judging = len(held_out) + len(self.change.batches)
        self.passes = {"fitted batches": len(fitted), "held-out batches": judging}

    @property
    def token_weights(self) -> dict[str, float]:
        """Tokens that each block sees, relative to the one that sees most."""
        tokens = {name: inputs.tokens for name, inputs in self.fitted.items()}
        return {name: count / max(tokens.values()) for name, count in tokens.items()}

    def look(self, site: FFNSite) -> None:
        """Leave out what is far behind on this block; see what refinement leaves of the others' errors."""
        work, found, seen = self._measure(site)
        left_out = set() if self.given is not None else far_behind(seen, {})
        if self.refine_steps:
            tried = {name: own for name, own in found.items() if name not in left_out}
            self.remaining = {name: work.remaining(own) for name, own in tried.items()}
        if self.given is None:
            self.left_out = left_out | far_behind(seen, self.remaining)
        self._measured[site.name] = seen

    def _measure(self, site: FFNSite) -> tuple[BlockStudy, dict[str, list[Sized]], dict[str, list[Seen]]]:
        """The work on a block, its candidates, and what was measured of them."""
        work = BlockStudy(site, output_weight(site, self.model), self.held_out[site.name].stream(), self)
        found = sizes(site.dense, candidates_for(site.dense, self.given))
        found = {name: own for name, own in found.items() if name not in self.left_out}
        measured = self._measured_sizes(work, found)
        reference = max((own for own in measured.values() if None not in own), key=len, default=[])
        curve = [(math.log(each.sized.macs), log_of(each.local_error)) for each in reference if each]
        seen = {name: _interpolated(found[name], own, curve) for name, own in measured.items()}
        return work, {name: found[name] for name in seen}, seen

    def _measured_sizes(
        self, work: BlockStudy, found: dict[str, list[Sized]]
    ) -> dict[str, list[Seen | None]]:
        """Every candidate's sizes; a default one that cannot be fitted here is left out with a warning.

        Raises:
            ValueError: a candidate that was given, or all of them, cannot be fitted.
        """
        measured: dict[str, list[Seen | None]] = {}
        failed: list[ValueError] = []
        for name, own in found.items():
            try:
                measured[name] = work.measure(own)
            except ValueError as error:
                if self.given is not None:
                    raise
                failed.append(error)
                warnings.warn(f"{name} is no candidate for block {work.site.name}: {error}", stacklevel=2)
        if failed and not measured:
            raise failed[0]
        return measured

    def options(self, site: FFNSite) -> list[Option]:
        """What may take this block's place: all sizes of all candidates, and the block itself last."""
        whole = Option(kept(site.dense), 0.0, 0.0, measured=True)
        seen = self._measured.pop(site.name, None)
        if seen is None:
            _, _, seen = self._measure(site)
        if not seen:
            return [whole]
        points = {
            name: [(each.local_error, each.effect) for each in own if each.effect is not None]
            for name, own in seen.items()
        }
        effect_of = EffectMap(points)
        return [
            option
            for name, own in seen.items()
            for option in _options(name, own, effect_of, self.remaining.get(name, 1.0))
        ] + [whole]


def far_behind(seen: dict[str, list[Seen]], remaining: Mapping[str, float]) -> set[str]:
    """Candidates with `FAR` times the error, at every size, of another of about as many MACs or fewer."""
    errors = {
        name: [(each.sized.macs, remaining.get(name, 1.0) * each.local_error) for each in own]
        for name, own in seen.items()
    }

    def least(macs: int) -> float:
        return min(error for own in errors.values() for size, error in own if size <= ABOUT * macs)

    return {name for name, own in errors.items() if all(error > FAR * least(macs) for macs, error in own)}


def _evenly(batches: list[Any], share: float) -> list[Any]:
    """At least one batch and this share of them, taken at equal distances: they may be sorted by length."""
    count = min(len(batches), max(1, math.ceil(share * len(batches))))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


def _interpolated(
    own: list[Sized], measured: list[Seen | None], curve: list[tuple[float, float]]
) -> list[Seen]:
    """Sizes between those that were fitted; an error never rises with the size.

    Args:
        curve: log MACs and log error of a method at all its sizes; the ratio to it is what is interpolated,
            log ratio over log size. Empty for none.
    """
    known = [each for each in measured if each is not None]
    if not known:
        return []

    def reference(place: float) -> float:
        return interpolate(place, [at for at, _ in curve], [error for _, error in curve]) if curve else 0.0

    places = [math.log(each.sized.macs) for each in known]
    errors = [log_of(each.local_error) for each in known]
    ratios = [min(errors[: i + 1]) - reference(place) for i, place in enumerate(places)]
    found = []
    for sized, each in zip(own, measured, strict=True):
        place = math.log(sized.macs)
        if each is not None:
            found.append(each)
        elif places[0] < place < places[-1]:
            ratio = interpolate(place, places, ratios)
            found.append(Seen(sized, math.exp(reference(place) + ratio)))
    return found


def _options(name: str, own: list[Seen], effect_of: EffectMap, remaining: float) -> list[Option]:
    """Effects of all sizes, of which refinement leaves a share; a larger size never counts as the worse."""
    found, least = [], math.inf
    for each in own:
        measured = each.effect is not None
        least = min(least, each.effect if each.effect is not None else effect_of(name, each.local_error))
        found.append(Option(each.sized, remaining * each.local_error, remaining * least, measured))
    return found
