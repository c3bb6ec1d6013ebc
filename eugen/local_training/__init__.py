"""Training of a whole network without backpropagation through it; one rule a file, found by scanning.

The network is a chain of units and a linear head. Each unit learns from its own input, its own output
and the labels: no gradient crosses from one unit to another, and the trained network is the same network
as ever, used by one ordinary forward pass.
"""

from __future__ import annotations

import importlib
import pkgutil

from eugen.local_training.rule import LocalRule, Passes

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LocalRule", "Passes", "rules"]


def rules() -> dict[str, type[LocalRule]]:
    """Every registered rule: name → class."""
    return dict(sorted(LocalRule.registry.items()))
