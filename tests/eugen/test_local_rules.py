"""Each layer-local rule is its formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.local_training.forward_forward import ForwardForward
from eugen.local_training.forward_projection import ForwardProjection
from eugen.local_training.mono_forward import MonoForward
from eugen.local_training.rule import solve_head
from tests.eugen.units import (
    CLASSES,
    FEATURES,
    QUICK,
    WIDTH,
    accuracy,
    examples,
    network,
    passes,
    same,
    trained,
    weights,
)


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
