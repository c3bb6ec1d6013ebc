"""What every layer-local rule owes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.layers.narrow import NarrowConfig
from eugen.local_training import LocalRule, rules
from eugen.surgery import replace
from tests.eugen.units import (
    CLASSES,
    FEATURES,
    QUICK,
    WIDTH,
    accuracy,
    examples,
    network,
    same,
    trained,
    weights,
)

RULES = sorted(rules())


def test_the_rules_are_found_by_name():
    assert RULES == ["forward_forward", "forward_projection", "mono_forward"]
    for name, rule in rules().items():
        assert rule.name == name
    with pytest.raises(ValueError, match="'mono_forward' is taken by MonoForward"):

        class Other(LocalRule, name="mono_forward"): ...


def test_the_test_s_data_are_beyond_a_linear_classifier():
    x, labels = examples(4000, 0)
    solution = torch.linalg.lstsq(F.pad(x, (0, 1), value=1), F.one_hot(labels).float()).solution
    x, labels = examples(2000, 10**6)
    found = (F.pad(x, (0, 1), value=1) @ solution).argmax(-1)
    assert (found == labels).double().mean() < 2 / CLASSES


@pytest.mark.parametrize("name", RULES)
def test_a_rule_comes_nearer_to_perfect_than_to_chance(name):
    assert accuracy(*trained(QUICK[name], *network(), count=8)) > (1 + 1 / CLASSES) / 2


@pytest.mark.parametrize("name", RULES)
def test_a_later_unit_does_not_matter_to_an_earlier_one(name):
    units, head = network()
    trained(rules()[name](), units, head)
    others, _ = network()
    others[2] = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.Tanh())
    trained(rules()[name](), others, nn.Linear(7, CLASSES))
    assert same(weights(*units[:2]), weights(*others[:2]))
    assert not same(weights(units[0]), weights(network()[0][0]))


class Wall(torch.autograd.Function):
    """Lets values through, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *_):
        raise AssertionError("a gradient came out of a unit's input")


class Walled(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(Wall.apply(x))


def test_the_wall_stops_backpropagation():
    units, head = network()
    with pytest.raises(AssertionError, match="came out"):
        head(nn.Sequential(*map(Walled, units))(examples(8, 0)[0])).sum().backward()


@pytest.mark.parametrize("name", RULES)
def test_no_gradient_crosses_a_unit_and_none_is_left(name):
    units, head = network()
    trained(rules()[name](), [Walled(unit) for unit in units], head)
    assert all(p.grad is None for module in (*units, head) for p in module.parameters())


@pytest.mark.parametrize("name", RULES)
def test_the_generator_decides_and_the_global_one_is_left_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = weights(*trained(rules()[name](), *network(), seed=1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert same(first, weights(*trained(rules()[name](), *network(), seed=1)[0]))
    assert not same(first, weights(*trained(rules()[name](), *network(), seed=2)[0]))


@pytest.mark.parametrize("name", RULES)
def test_narrower_blocks_learn_too(name):
    units, head = network()
    model = replace(nn.Sequential(*units), NarrowConfig(budget=0.3)).model
    assert accuracy(*trained(QUICK[name], list(model), head, count=8)) > 2 / CLASSES


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("units", "data", "message"),
    [
        (0, [[examples(8, 0)]], "units is empty"),
        (3, [], "training data are empty"),
        (3, [[]], "pass 0 of the training data is empty"),
        (3, [[(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))]], "batch is empty or uneven"),
        (3, [[(torch.zeros(3, FEATURES), torch.zeros(2, dtype=torch.int64))]], "batch is empty or uneven: 3"),
        (3, [[(torch.full((2, FEATURES), math.nan), torch.tensor([0, 1]))]], "hold NaN or infinity"),
        (3, [[(torch.zeros(2, FEATURES), torch.tensor([0, 9]))]], "labels from 0 to 9: .* are 0 to 3"),
    ],
    ids=["units", "passes", "pass", "batch", "uneven", "nan", "label"],
)
def test_what_cannot_be_learned_from_is_told(name, units, data, message):
    found, head = network()
    with pytest.raises(ValueError, match=message):
        rules()[name]().train(found[:units], head, data, generator=torch.Generator())


@pytest.mark.parametrize("name", RULES)
def test_a_hyperparameter_that_is_no_positive_number_is_told(name):
    for field in dataclasses.asdict(rules()[name]()):
        for value in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{field}={value} must be a finite number above 0"):
                rules()[name](**{field: value})


@pytest.mark.parametrize("name", ["mono_forward", "forward_forward"])
def test_a_loss_that_is_not_finite_stops_the_training(name):
    units, head = network()
    with pytest.raises(FloatingPointError, match="use a smaller learning_rate"):
        trained(rules()[name](learning_rate=1e30), units, head)
