"""Which layers are measured: every registered one, and variants that a default does not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import eugen
from eugen.config import LayerConfig

CONTROL = "dense"
"""The block against a copy of itself: whatever it shows beside 1 is the measurement's own."""


@dataclass(frozen=True)
class Row:
    """A named layer. `config` may refuse by a ValueError."""

    name: str
    config: Callable[[], LayerConfig]
    merge: bool = True
    """Measured after `merged()`, as it would be deployed."""
    needs_kernel: bool = False
    """Has a meaning only where EUGen's fused kernel runs."""


def rows(budget: float, names: list[str] | None = None) -> list[Row]:
    """The control, every registered layer at this budget, then the variants.

    Args:
        names: only these, the control always with them.

    Raises:
        ValueError: a name that no row has.
    """
    registered = [Row(name, _of_registry(name, budget)) for name in eugen.layers() if name != CONTROL]
    found = {row.name: row for row in [*registered, *_variants(budget), *_composed(budget)]}
    chosen = list(found) if names is None else [name for name in names if name != CONTROL]
    unknown = [name for name in chosen if name not in found]
    if unknown:
        raise ValueError(f"no row is called {', '.join(unknown)}: use {', '.join([CONTROL, *found])}")
    return [Row(CONTROL, eugen.DenseConfig), *(found[name] for name in chosen)]


def _of_registry(name: str, budget: float) -> Callable[[], LayerConfig]:
    """The layer at this budget; one that has a single size and refuses any other is taken at that."""

    def config() -> LayerConfig:
        kind = eugen.layers()[name]
        alone = kind()
        return alone if alone.only_budget is not None else kind(budget=budget)

    return config


def _variants(budget: float) -> list[Row]:
    """EUGens whose cost differs in kind: fewer products, no norm, one projection, kept output matrix;
    and both ways to compute its features on a GPU.
    """

    def variant(name: str, **options: Any) -> Row:
        return Row(name, lambda: eugen.EUGenConfig(**{"budget": budget, **options}))

    # Where the kernel does not run, both are the row `eugen`.
    kernels = [
        dataclasses.replace(variant(f"eugen_{kernel}", kernel=kernel), needs_kernel=True)
        for kernel in ("fused", "composed")
    ]
    unmerged = variant("eugen_unmerged", budget=(1 + budget) / 2, merge=False)
    return [
        variant("eugen_no_norm", norm_slot=False),
        variant("eugen_shared", sharing="shared"),
        variant("eugen_powers", sharing="powers", direct_linear=True, projection="teacher"),
        # The output matrix stays and is half of the block's MACs: the budget is of the other half.
        dataclasses.replace(unmerged, merge=False),
        *kernels,
    ]


def _composed(budget: float) -> list[Row]:
    """EUGen inside every layer that holds another one: its configuration has a field `of`."""

    def around(kind: type[LayerConfig]) -> Callable[[], LayerConfig]:
        return lambda: kind(budget=budget, of=eugen.EUGenConfig())  # pyright: ignore[reportCallIssue]

    return [
        Row(f"{name}_of_eugen", around(kind))
        for name, kind in eugen.layers().items()
        if any(field.name == "of" for field in dataclasses.fields(kind))
    ]
