"""Every registered layer at one budget, unfitted and fitted, and options that change its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import eugen
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from tests.eugen.blocks import generator, stream, tokens

BUDGET = 0.3
KINDS: dict[str, Callable[..., LayerConfig]] = {
    **eugen.layers(),
    "int8 weight-only": partial(eugen.Int8Config, weight_only=True),
}
NAMES = list(KINDS)
every_layer = pytest.mark.parametrize("name", NAMES)


def config_of(name: str, budget: float = BUDGET) -> LayerConfig:
    """The layer at this budget; a layer that has one size only refuses and is taken at that."""
    try:
        return KINDS[name](budget=budget)
    except ValueError:
        return KINDS[name]()


def fitted(name: str, dense: eugen.DenseFFN, *, budget: float = BUDGET, count: int = 2000) -> FFNLayer:
    """The layer after its closed form, in evaluation mode."""
    data = stream(dense, tokens(count, dense.in_features, dtype=dense.up.weight.dtype))
    return config_of(name, budget).fit(dense, data, generator=generator()).eval()


def unless_refused(attempt: Callable[[], Any], *words: str) -> Any:
    """What the attempt gives, or None where it is refused with a message that holds the words."""
    try:
        return attempt()
    except ValueError as error:
        message = str(error)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    return None
