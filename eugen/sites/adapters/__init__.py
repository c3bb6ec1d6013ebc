"""One family of models a file; types are named, so that nothing heavy is imported.

A file gives `ADAPTERS`, from a type's qualified name to its adapter, and `RECOGNISED`, adapters that look at
modules of any type and know theirs by structure, and `CLOSED`, types that are not searched at all.
"""

from __future__ import annotations

import importlib
import pkgutil

from eugen.sites.parts import Adapter

BY_NAME: dict[str, Adapter] = {}
BY_STRUCTURE: list[Adapter] = []
NOT_SEARCHED: set[str] = set()
for _found in pkgutil.iter_modules(__path__):
    _family = importlib.import_module(f"{__name__}.{_found.name}")
    BY_NAME.update(_family.ADAPTERS)
    BY_STRUCTURE.extend(_family.RECOGNISED)
    NOT_SEARCHED.update(_family.CLOSED)
