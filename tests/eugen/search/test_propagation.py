"""From local errors to effects on the output."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.isotonic import isotonic_regression

from eugen.search.propagation import EffectMap, interpolate, rising
from tests.eugen.blocks import generator


@pytest.mark.parametrize("seed", range(5))
def test_rising_is_isotonic_regression(seed):
    values = torch.randn(30, generator=generator(seed)).double()
    assert rising(values.tolist()) == pytest.approx(isotonic_regression(values.numpy()).tolist())


def test_what_was_measured_comes_back():
    measured = {"a": [(0.5, 0.2), (0.1, 0.05)], "b": [(0.4, 0.01), (0.2, 0.02)], "c": [(0.3, 0.3)]}
    effect_of = EffectMap(measured)
    for method, points in measured.items():
        for error, effect in points:
            assert effect_of(method, error) == pytest.approx(effect)


def test_in_between_it_is_monotone_and_beyond_proportional():
    effect_of = EffectMap({"a": [(0.1, 0.01), (0.2, 0.03), (0.6, 0.05)]})
    effects = [effect_of("a", 0.02 * i) for i in range(1, 50)]
    assert effects == sorted(effects)
    assert effect_of("a", 0.01) == pytest.approx(0.001)
    assert effect_of("a", 1.2) == pytest.approx(0.1)
    assert effect_of("another", 0.2) == pytest.approx(0.03)
    assert effect_of("a", math.sqrt(0.1 * 0.2)) == pytest.approx(math.sqrt(0.01 * 0.03))


def test_an_exact_layer_has_next_to_no_effect():
    assert EffectMap({"a": [(0.0, 0.0)]})("a", 0.0) < 1e-9


def test_interpolation_at_equal_places():
    assert interpolate(1.0, [1.0, 1.0, 2.0], [3.0, 5.0, 7.0]) == 3.0
    assert interpolate(1.5, [1.0, 1.0, 2.0], [3.0, 5.0, 7.0]) == 6.0
