"""Layer-local rules: they learn, no gradient crosses a unit, and they say what they cannot take."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.layers.narrow import NarrowConfig
from eugen.local_training import LocalRule, rules
from eugen.local_training.forward_forward import ForwardForward
from eugen.local_training.forward_projection import ForwardProjection
from eugen.local_training.mono_forward import MonoForward
from eugen.local_training.rule import solve_head
from eugen.surgery import replace

CLASSES, FEATURES, WIDTH = 4, 24, 32
RULES = sorted(rules())
QUICK = {name: rule() for name, rule in rules().items()} | {
    "forward_forward": ForwardForward(learning_rate=2e-3)
}
"""Rules for a few hundred steps."""


class Unit(nn.Module):
    """`relu(down(relu(up(norm(x)))))`, a block of the kind that the suite replaces."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm(x)).relu()


def network(seed: int = 0, width: int = WIDTH) -> tuple[list[nn.Module], nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())
        return [stem, Unit(), Unit(width)], nn.Linear(width, CLASSES)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every class is two opposite clouds, so that no linear classifier is better than chance."""
    centres = 2 * torch.eye(FEATURES)[-CLASSES:]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    return sign * centres[labels] + 0.4 * torch.randn(count, FEATURES, generator=generator), labels


def passes(count: int, batches: int = 16) -> list[list[tuple[Tensor, Tensor]]]:
    data = [examples(64, seed) for seed in range(count * batches)]
    return [data[i * batches : (i + 1) * batches] for i in range(count)]


def accuracy(units: list[nn.Module], head: nn.Linear) -> float:
    x, labels = examples(2000, 10**6)
    with torch.no_grad():
        return float((nn.Sequential(*units, head)(x).argmax(-1) == labels).double().mean())


def trained(
    rule: LocalRule, units: list[nn.Module], head: nn.Linear, count: int = 2, seed: int = 0
) -> tuple[list[nn.Module], nn.Linear]:
    rule.train(units, head, passes(count), generator=torch.Generator().manual_seed(seed))
    return units, head


def weights(*modules: nn.Module) -> list[Tensor]:
    return [t for module in modules for t in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


def test_mono_forward_s_units_learn_and_not_only_the_head():
    """Three outputs of the last unit tell a closed-form head more than random ones do."""

    def read(units: list[nn.Module]) -> float:
        head = network(width=3)[1]
        with torch.no_grad():
            outputs = [(nn.Sequential(*units)(x), labels) for x, labels in passes(1)[0]]
        solve_head(head, outputs, ridge=1e-3)
        return accuracy(units, head)

    random = read(network(width=3)[0])
    assert read(trained(MonoForward(), *network(width=3), count=8)[0]) > random + 0.1


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


def test_mono_forward_s_head_is_the_last_projection():
    """One unit, one step: the projection and the unit move by Adam on the local cross-entropy alone."""
    units, head = network(width=WIDTH)
    unit, data = units[0], [[examples(64, 0)]]
    start = copy.deepcopy(unit)
    MonoForward(learning_rate=1e-2).train([unit], head, data, generator=torch.Generator().manual_seed(3))
    bound = 1 / math.sqrt(WIDTH)
    matrix = torch.empty(CLASSES, WIDTH).uniform_(-bound, bound, generator=torch.Generator().manual_seed(3))
    matrix.requires_grad_()
    x, labels = data[0][0]
    F.cross_entropy(start(x) @ matrix.T, labels).backward()
    assert matrix.grad is not None
    # Adam's first step is the learning rate against the gradient's sign; the rate begins at peak / 100.
    torch.testing.assert_close(head.weight, matrix - 1e-4 * matrix.grad.sign(), rtol=0, atol=2e-6)
    assert torch.equal(head.bias, torch.zeros(CLASSES))
    for moved, was in zip(unit.parameters(), start.parameters(), strict=True):
        assert was.grad is not None
        clear = was.grad.abs() > 1e-5
        torch.testing.assert_close((moved - was)[clear], -1e-4 * was.grad.sign()[clear], rtol=0, atol=2e-6)


def test_forward_forward_gives_right_labels_more_goodness_than_wrong_ones():
    rule = QUICK["forward_forward"]
    assert isinstance(rule, ForwardForward)
    x, labels = examples(1000, 10**6)

    def rate(units: list[nn.Module]) -> list[float]:
        """How often the right label has more goodness than the next one, unit by unit."""
        right, wrong = (rule.overlay(x, (labels + shift) % CLASSES, CLASSES) for shift in (0, 1))
        rates = []
        for unit in units:
            right, wrong = unit(right), unit(wrong)
            rates.append(float((right.square().sum(-1) > wrong.square().sum(-1)).double().mean()))
        return rates

    with torch.no_grad():
        assert all(0.3 < before < 0.7 for before in rate(network()[0]))
        # The stem, a single linear map, cannot tell a cloud from its opposite whatever its label.
        assert all(after > 0.8 for after in rate(trained(rule, *network(), count=8)[0])[1:])


def test_an_input_without_a_label_is_the_mean_of_all_labelled_ones():
    x = examples(5, 0)[0].view(5, 2, FEATURES // 2)
    rule = ForwardForward(label_strength=2.0)
    labelled = torch.stack([rule.overlay(x, torch.full((5,), c), CLASSES) for c in range(CLASSES)])
    torch.testing.assert_close(labelled.mean(0), x)
    assert torch.equal(labelled.flatten(2)[..., CLASSES:], x.flatten(1)[:, CLASSES:].expand(CLASSES, 5, -1))
    spread = labelled.flatten(2)[..., :CLASSES].amax(0) - labelled.flatten(2)[..., :CLASSES].amin(0)
    torch.testing.assert_close(spread, (2 * x.abs().max()).expand_as(spread))


def reference_ridge(a: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression by least squares on extended rows, inputs standardised, float64."""
    mean, deviation = a.mean(0), a.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    rows = torch.cat([(a - mean) / deviation, math.sqrt(ridge * len(a)) * torch.eye(a.shape[1]).double()])
    right = F.pad(target - target.mean(0), (0, 0, 0, a.shape[1]))
    weight = (torch.linalg.lstsq(rows, right, driver="gelsd").solution / deviation[:, None]).T
    return weight, target.mean(0) - weight @ mean


def test_forward_projection_is_its_formula():
    units, head = network()
    units, head = [unit.double() for unit in units], head.double()
    data = [[(x.double(), labels) for x, labels in one] for one in passes(2)]
    ForwardProjection(ridge=0.2, head_ridge=0.1).train(
        units, head, data, generator=torch.Generator().manual_seed(4)
    )
    generator = torch.Generator().manual_seed(4)
    a, labels = (torch.cat(part) for part in zip(*data[0], strict=True))
    one_hot = F.one_hot(labels).double()

    def expected(linear: nn.Linear, a: Tensor) -> Tensor:
        q = torch.randn(linear.in_features, linear.out_features, generator=generator).double()
        u = torch.randn(CLASSES, linear.out_features, generator=generator).double()
        weight, bias = reference_ridge(a, (a @ q).sign() + (one_hot @ u).sign(), 0.2)
        torch.testing.assert_close(linear.weight, weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(linear.bias, bias, rtol=1e-6, atol=1e-6)
        return (a @ weight.T + bias).relu()

    with torch.no_grad():
        a = expected(units[0][0], a)
        for unit in units[1:]:
            a = expected(unit.ffn[2], expected(unit.ffn[0], unit.norm(a)))
        weight, bias = reference_ridge(a, one_hot, 0.1)
    torch.testing.assert_close(head.weight, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.bias, bias, rtol=1e-6, atol=1e-6)


def test_forward_projection_uses_so_many_passes_as_it_is_told():
    results = []
    for count in (1, 3, 3):
        data = passes(3)
        if len(results) == 2:
            data[2] = data[1]
        units, head = network()
        ForwardProjection(passes=count).train(units, head, data, generator=torch.Generator())
        results.append(weights(*units, head))
    assert not same(results[0], results[1]) and not same(results[1], results[2])


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


def test_forward_forward_takes_no_unit_that_sees_the_length_of_its_input():
    units, head = network()
    units[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    with pytest.raises(ValueError, match="unit 1 does not normalise .*LayerNorm"):
        trained(ForwardForward(), units, head)


def test_forward_forward_needs_room_for_the_label_and_a_wrong_one():
    with pytest.raises(ValueError, match="3 features has no room for 4 labels"):
        ForwardForward().overlay(torch.zeros(2, 3), torch.tensor([0, 1]), CLASSES)
    with pytest.raises(ValueError, match="head.out_features=1 must be at least 2"):
        ForwardForward().train(
            network()[0],
            nn.Linear(WIDTH, 1),
            [[(torch.ones(2, FEATURES), torch.tensor([0, 0]))]],
            generator=torch.Generator(),
        )


def test_forward_projection_takes_no_weights_outside_linear_maps():
    units, head = network()
    units[1] = nn.Sequential(nn.LayerNorm(WIDTH), nn.Bilinear(3, 3, 3))
    with pytest.raises(ValueError, match="unit 1 has other weights in 1: use layer 'dense' or 'narrow'"):
        trained(ForwardProjection(), units, head)
