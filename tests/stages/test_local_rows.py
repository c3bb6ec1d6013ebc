"""Rows that train a network layer by layer: from scratch, by the seed, and never fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import eugen
from eugen.local_training import rules
from stages import params
from stages.finetune import budgets_to_tune
from stages.models import RECORD_FILE, TRANSFERRED, changed_tensors, student_model
from stages.params import Method
from stages.tasks import DoesNotApply, Task, open_task, task_names
from stages.tracking.whole_file import write_json
from stages.transfer import train_locally

ROOT = Path(__file__).resolve().parents[2]
SMOKE = params.load(ROOT / "params/smoke.yaml")
RULE = rules()["mono_forward"]()


@pytest.fixture
def task(tmp_path, monkeypatch) -> Task:
    """The perceptron's task on random images."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/vision_mlp"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, count in {"train": 256, "validation": 16, "test": 16}.items():
        tensors[f"{part}.images"] = torch.randint(
            256, (count, 28, 28), generator=generator, dtype=torch.uint8
        )
        tensors[f"{part}.labels"] = torch.randint(10, (count,), generator=generator)
    save_file(tensors, folder / "images.safetensors")
    return open_task(SMOKE, "vision_mlp")


def test_the_units_and_the_head_are_the_network(task):
    model, batch = task.build(), task.example(3)
    units, head = task.local_units(model)
    torch.testing.assert_close(nn.Sequential(*units, head)(batch), task.call(model, batch))
    covered = {id(p) for module in (*units, head) for p in module.parameters()}
    assert covered == {id(p) for p in model.parameters()}


def test_local_rows_get_as_many_passes_as_the_dense_network(task):
    data = task.local_data(0)
    baseline = task.settings.baseline.model_dump()
    assert len(data) == baseline["epochs"]
    assert sum(len(labels) for _, labels in data[0]) == 256
    first, again, other = data[0][0][0], task.local_data(0)[0][0][0], task.local_data(1)[0][0][0]
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "config", [eugen.DenseConfig(), eugen.NarrowConfig(budget=0.3)], ids=["dense", "narrow"]
)
def test_a_local_row_is_trained_from_scratch_by_its_seed(task, config):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    result = train_locally(task, config, RULE, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    dense = task.build()
    changed = changed_tensors(result.model, dense)
    again = train_locally(task, config, RULE, seed=2).model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), again.parameters(), strict=True))
    other = train_locally(task, config, RULE, seed=4).model
    assert not torch.equal(next(result.model.parameters()), next(other.parameters()))
    stored = student_model(dense, config, changed)
    assert task.evaluate(stored, "test") == task.evaluate(result.model, "test")
    assert all(site.fit_r2 is None for site in result.sites) and not result.model.training


def test_a_local_row_ignores_the_trained_network(task):
    """The blocks that surgery copies from come from a fresh network, of which nothing survives untrained."""
    stem = train_locally(task, eugen.DenseConfig(), RULE, seed=2).model.get_parameter("stem.1.weight")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        start = task.build().get_parameter("stem.1.weight")
    assert not torch.equal(stem, start)
    # Adam moves a weight by about its rate a step: the result is near its own start and no other network's.
    assert (stem - start).norm() < 0.5 * (stem - task.build().get_parameter("stem.1.weight")).norm()


@pytest.mark.parametrize("name", [name for name in task_names() if name != "vision_mlp"])
def test_a_task_without_a_chain_says_that_the_row_does_not_apply(name):
    other = open_task(SMOKE, name)
    with pytest.raises(DoesNotApply, match=f"task '{name}' has no chain of units"):
        other.local_units(nn.Identity())
    with pytest.raises(DoesNotApply, match=f"task '{name}' has no labelled examples"):
        other.local_data(0)


def test_a_local_row_is_never_fine_tuned(task):
    made = {"units": [], "omitted": [], "not_applicable": None}
    write_json(TRANSFERRED / task.name / "row" / RECORD_FILE, made)
    assert budgets_to_tune(task, Method("row", "narrow", {})) == [0.3]
    assert budgets_to_tune(task, Method("row", "narrow", {}, RULE)) == []
