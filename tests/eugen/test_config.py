"""Options that cannot be: the message names the argument, its value and what is allowed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import eugen
from eugen import EUGenConfig, NarrowConfig
from eugen.features import ACTIVATIONS, PROJECTIONS
from eugen.layers.eugen import SHARING
from tests.contract.cases import unless_refused
from tests.eugen.blocks import block, generator, stream, tokens


@pytest.mark.parametrize("name", list(eugen.layers()))
@pytest.mark.parametrize("budget", [0, -0.1, 1.001, 30, float("nan")])
def test_budgets_outside_their_range(name, budget):
    with pytest.raises(ValueError, match=re.escape(f"budget={budget}")):
        eugen.layers()[name](budget=budget)


@pytest.mark.parametrize("name", list(eugen.layers()))
def test_configurations_are_frozen_and_comparable(name):
    config = eugen.layers()[name]()
    assert config == type(config)()
    assert hash(config) == hash(type(config)())
    with pytest.raises(AttributeError):
        config.budget = 0.5


@pytest.mark.parametrize(
    ("field", "allowed"),
    [("projection", PROJECTIONS), ("sharing", SHARING), ("activation", tuple(ACTIVATIONS))],
)
def test_unknown_words_list_the_known_ones(field, allowed):
    with pytest.raises(ValueError, match=f"{field}='nonsense'") as raised:
        EUGenConfig(**{field: "nonsense"})
    assert all(word in str(raised.value) for word in allowed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_order": 3}, ["min_order=3", "order=2"]),
        ({"min_order": 0}, ["min_order=0", "1"]),
        ({"order": 0}, ["order=0"]),
        ({"direct_linear": True, "order": 1}, ["direct_linear=True", "order=1", "LinearConfig"]),
        ({"projection": "learned", "trainable": False}, ["projection='learned'", "trainable=True"]),
        ({"num_features": 0}, ["num_features=0", "at least 1"]),
        ({"num_features": -3}, ["num_features=-3", "at least 1"]),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        EUGenConfig(**options)


SIZED = [
    (name, field)
    for name, config in eugen.layers().items()
    for field in config.__dataclass_fields__
    if field in ("num_features", "hidden_features", "rank")
]


@pytest.mark.parametrize(("name", "field"), SIZED)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_named(name, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        eugen.layers()[name](**{field: value}).build(block(), generator=generator())


@pytest.mark.parametrize(("name", "field"), SIZED)
def test_neither_budget_nor_size(name, field):
    with pytest.raises(ValueError, match=f"budget= or an explicit {field}="):
        eugen.layers()[name]().build(block(), generator=generator())


@pytest.mark.parametrize(("name", "field"), SIZED)
def test_a_size_beyond_the_budget_is_refused(name, field):
    """A layer never costs more than the budget that was given with it."""
    dense = block()
    for size in (5, 100):
        config = eugen.layers()[name]
        layer = unless_refused(
            lambda size=size, config=config: config(budget=0.3, **{field: size}).build(
                dense, generator=generator()
            ),
            "budget=0.3",
            f"{field}={size}",
        )
        assert (layer is None) == (size == 100)
        assert layer is None or layer.macs_per_token <= 0.3 * dense.macs_per_token


@pytest.mark.parametrize("projection", ["teacher", "learned", "cauchy"])
def test_snnk_rows_are_random(projection):
    with pytest.raises(ValueError, match=f"projection='{projection}'.*gaussian, rademacher, orthogonal"):
        eugen.SNNKConfig(budget=0.3, projection=projection).build(block(), generator=generator())


@pytest.mark.parametrize(
    ("hidden", "budget", "expected"),
    [(3072, 0.3, 920), (1000, 0.401, 400), (1000, 0.399, 392), (100, 0.99, 99), (4, 0.75, 3)],
)
def test_large_sizes_are_multiples_of_eight(hidden, budget, expected):
    """Unless that gives away more than 2 %."""
    dense = block(16, hidden)
    assert NarrowConfig(budget=budget).build(dense, generator=generator()).hidden_features == expected
    exact = NarrowConfig(hidden_features=expected - 1 if expected > 3 else expected)
    assert exact.build(dense, generator=generator()).hidden_features == exact.hidden_features


def test_the_dense_block_has_one_budget():
    assert eugen.DenseConfig(budget=1) != eugen.DenseConfig()
    with pytest.raises(ValueError, match=r"budget=0.5.*'narrow'"):
        eugen.DenseConfig(budget=0.5)


def test_more_teacher_rows_than_neurons_stop_before_any_work():
    config = EUGenConfig(num_features=100, projection="teacher")  # three groups: 300 rows of 240
    with pytest.raises(ValueError, match="300 rows.*240 neurons"):
        config.build(block().to("meta"), generator=generator())


def test_a_budget_that_teacher_rows_cannot_use_up_is_kept():
    dense = block()
    config = EUGenConfig(budget=1, projection="teacher")
    layer = config.fit(dense, stream(dense, tokens(1000)), generator=generator())
    assert layer.macs_per_token <= dense.macs_per_token


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr(eugen.LayerConfig, "registry", dict(eugen.LayerConfig.registry))
    with pytest.raises(ValueError, match="'linear' is taken by LinearConfig"):
        type("Other", (eugen.LayerConfig,), {}, name="linear")


def test_parts_of_a_block_must_fit_together():
    with pytest.raises(ValueError, match="down.in_features=5 must equal up.out_features=4"):
        eugen.DenseFFN(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"gate must have up's shape \(4, 3\), not \(3, 4\)"):
        eugen.DenseFFN(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(4, 3))


@pytest.mark.parametrize("options", [{"whole": False}, {"gated": True}])
def test_what_is_not_merged_needs_a_plain_block(options):
    with pytest.raises(ValueError, match="'eugen'"):
        EUGenConfig(num_features=8, merge=False).build(block(**options), generator=torch.Generator())


def test_an_activation_with_a_weight_for_each_neuron_cannot_be_taken_over():
    dense = eugen.DenseFFN(nn.Linear(8, 32), nn.PReLU(32), nn.Linear(32, 8))
    with pytest.raises(ValueError, match="a weight for each neuron"):
        NarrowConfig(budget=0.5).build(dense, generator=generator())
