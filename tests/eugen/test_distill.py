"""Distillation of a whole network: it learns, chooses on validation data alone, and may decline."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from eugen.compression.distill import distill
from tests.eugen.blocks import generator
from tests.eugen.models import chain, vectors


def call(model, batch):
    return model(batch)


def nearby(model: nn.Module, size: float = 0.1) -> nn.Module:
    """The model, its weights disturbed."""
    other, seeded = copy.deepcopy(model), generator(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=seeded))
    return other


def error(student, teacher, batches):
    """Mean over batches of ‖student − teacher‖² / ‖teacher‖², in float64."""
    with torch.no_grad():
        pairs = [(teacher(batch).double(), student(batch).double()) for batch in batches]
        return sum(float((y - given).norm() ** 2 / y.norm() ** 2) for y, given in pairs) / len(pairs)


def run(student, teacher, rates, *, steps=40, batches=None, validation=None, **options):
    data = vectors(6, 40)
    return distill(
        student,
        teacher,
        data[:4] if batches is None else batches,
        validation=data[4:] if validation is None else validation,
        steps=steps,
        call=call,
        learning_rates=rates,
        **options,
    )


def test_it_comes_nearer_to_the_teacher_and_leaves_the_student_given():
    teacher = chain()
    student = nearby(teacher)
    before = copy.deepcopy(student.state_dict())
    found = run(student, teacher, [1e-3])
    held_out = vectors(8, 40)[6:]
    assert error(found.model, teacher, held_out) < 0.5 * error(student, teacher, held_out)
    assert found.before == pytest.approx(error(student, teacher, vectors(6, 40)[4:]), rel=1e-4)
    assert found.after == pytest.approx(error(found.model, teacher, vectors(6, 40)[4:]), rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))


def test_the_learning_rate_is_chosen_on_the_validation_part():
    teacher = chain()
    student = nearby(teacher)
    lines: list[str] = []
    assert run(student, teacher, [1e-9, 1e-3, 1e3], progress=lines.append).learning_rate == 1e-3
    assert len(lines) == 3


def test_what_does_not_help_the_validation_part_is_not_kept():
    teacher = chain()
    student = nearby(teacher, 0.01)
    noisy = [batch * 50 for batch in vectors(2, 40)]
    found = run(student, teacher, [0.3], batches=noisy, steps=10)
    assert found.model is student
    assert found.learning_rate is None and found.after == found.before


def test_a_network_that_diverges_is_not_kept():
    teacher = chain()
    found = run(nearby(teacher), teacher, [math.inf], steps=4)
    assert found.learning_rate is None


def test_frozen_weights_stay_frozen_and_modes_stay():
    teacher = chain()
    student = nearby(teacher)
    student[0].requires_grad_(False)
    student.train()
    found = run(student, teacher, [1e-3], steps=10)
    assert found.learning_rate is not None
    assert [p.requires_grad for p in found.model.parameters()] == [
        p.requires_grad for p in student.parameters()
    ]
    assert found.model.training and student.training


def test_the_same_seed_gives_the_same_network():
    teacher = chain()
    student = nearby(teacher)
    one, two, other = (run(student, teacher, [1e-3], steps=6, seed=seed).model for seed in (1, 1, 2))
    x = vectors(1, 5)[0]
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), other(x))


def test_data_to_choose_by_are_needed():
    teacher = chain()
    with pytest.raises(ValueError, match="give both"):
        run(teacher, teacher, [1e-3], validation=[])
