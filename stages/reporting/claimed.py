"""Which row answers for EUGen: declared by its name, never picked by a result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CLAIMED = "eugen_product"
"""The row that stands for EUGen against a gated block, wherever one row must: both multiply two projections.

Of several EUGen rows the best has had the trials of all of them, on whatever part it is picked, and the
gated block the trials of one. So one row is compared; the others are ablations, and are told as such.
"""
ORDER = 2
"""The papers' order, and the configuration's default: without `CLAIMED` the first row of it answers."""


def claimed(rows: Iterable[tuple[str, dict[str, Any]]]) -> str | None:
    """The declared row's name among (name, own parameters) in the order of the records; None without one."""
    family = {name: section for name, section in rows if section.get("layer", name) == "eugen"}
    ordered = [name for name, section in family.items() if section.get("order", ORDER) == ORDER]
    return CLAIMED if CLAIMED in family else next(iter(ordered), None)
