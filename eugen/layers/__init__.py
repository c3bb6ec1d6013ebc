"""One method a file. Every module of this package is imported once and registers its configuration."""

from __future__ import annotations

import importlib
import pkgutil

from eugen.config import LayerConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def layers() -> dict[str, type[LayerConfig]]:
    """Every registered method: name → configuration class."""
    return dict(sorted(LayerConfig.registry.items()))
