"""What a plan says about itself, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eugen.search.sensitivity import Option
from eugen.search.target import Target
from eugen.sites import FFNSite


@dataclass(frozen=True)
class Chosen:
    """A block, its options, and which of them was chosen."""

    site: FFNSite
    options: list[Option]
    index: int

    @property
    def option(self) -> Option:
        return self.options[self.index]


def figures(
    target: Target, chosen: list[Chosen], weights: dict[str, float], speedup: float | None
) -> dict[str, Any]:
    """`target`, `predicted` and `blocks`, by block the choice and the table of its alternatives.

    Args:
        weights: tokens that each block sees, relative to the one that sees most.
        speedup: what the cost model expects; None where no time was measured.
    """
    macs = sum(each.option.sized.macs * weights[each.site.name] for each in chosen)
    dense_macs = sum(each.site.dense.macs_per_token * weights[each.site.name] for each in chosen)
    parameters = sum(each.option.sized.parameters for each in chosen)
    dense_parameters = sum(each.site.dense.num_parameters() for each in chosen)
    predicted = {
        "macs_ratio": macs / dense_macs,
        "params_ratio": parameters / dense_parameters,
        "speedup": speedup,
        "output_error": sum(each.option.output_effect for each in chosen),
    }
    blocks = {each.site.name: _block(each) for each in chosen}
    return {"target": {target.kind: target.value}, "predicted": predicted, "blocks": blocks}


def _block(chosen: Chosen) -> dict[str, Any]:
    row = _row(chosen.option, chosen.site)
    return row | {"alternatives": [_row(option, chosen.site) for option in chosen.options]}


def _row(option: Option, site: FFNSite) -> dict[str, Any]:
    return {
        "candidate": option.sized.candidate,
        "budget": option.sized.budget,
        "macs_ratio": option.sized.macs / site.dense.macs_per_token,
        "params_ratio": option.sized.parameters / site.dense.num_parameters(),
        "local_error": option.local_error,
        "output_effect": option.output_effect,
        "measured": option.measured,
    }
