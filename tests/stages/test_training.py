"""The training loop against a naive one, cut into micro-batches, over two processes, killed and resumed."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

import eugen
from stages.training import Diverged, rate, train
from tests.stages.toy_task import RECIPE, Toy

ROOT = Path(__file__).resolve().parents[2]


def recipe(**change: Any):
    return RECIPE.model_copy(update=change)


def trained(task: Toy | None = None, checkpoint: Path | None = None, **change: Any):
    task = task or Toy()
    model = task.fresh(recipe(**change).seed)
    return model, train(task, model, recipe(**change), checkpoint=checkpoint)


def same(one: nn.Module, other: nn.Module) -> bool:
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def test_training_is_adamw_on_the_drawn_batches():
    task, expected = Toy(), []
    model = task.fresh(3)
    generator = torch.Generator().manual_seed(3)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(12):
        for group in optimiser.param_groups:  # one step of warm-up (a tenth of 12), then half a cosine
            group["lr"] = 1e-2 if step == 0 else 1e-2 * (1 + math.cos(math.pi * (step - 1) / 11)) / 2
        loss = task.loss(model, 8, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        expected.append(float(loss.detach()))
    result, curve = trained()
    for name, value in result.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name
    assert [point.step for point in curve] == [4, 8, 12]
    for number, point in enumerate(curve):
        assert point.train_loss == pytest.approx(sum(expected[4 * number : 4 * number + 4]) / 4, rel=1e-5)
    assert curve[-1].validation == task.evaluate(result, "validation")["mse"]
    assert [point.seconds for point in curve] == sorted(point.seconds for point in curve)


def test_the_rate_rises_to_the_highest_and_falls_to_zero():
    rates = [rate(recipe(steps=100, warmup=0.1), done) for done in range(101)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_make_the_whole_batch(micro):
    whole, part = trained()[0], trained(micro_batch=micro)[0]
    for name, value in part.state_dict().items():
        assert torch.allclose(value, whole.state_dict()[name], atol=1e-5), name


def test_the_seed_decides_everything_and_the_global_generator_nothing():
    torch.manual_seed(0)
    first = trained(Toy(dropout=0.3))[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert same(trained(Toy(dropout=0.3))[0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(trained(Toy(dropout=0.3), seed=4)[0], first)


def test_a_resumed_training_has_the_curve_and_weights_of_an_undisturbed_one(tmp_path, monkeypatch):
    undisturbed, curve = trained(Toy(dropout=0.3))
    path = tmp_path / "checkpoint.pt"

    class Killed(Exception):
        pass

    task, calls = Toy(dropout=0.3), []
    draw = task.draw

    def dying(size: int, generator: torch.Generator):
        calls.append(size)
        if len(calls) == 7:
            raise Killed
        return draw(size, generator)

    monkeypatch.setattr(task, "draw", dying)
    with pytest.raises(Killed):
        trained(task, path)
    resumed, later = trained(Toy(dropout=0.3), path)
    assert same(resumed, undisturbed)
    assert [(p.step, p.train_loss, p.validation) for p in later] == [
        (p.step, p.train_loss, p.validation) for p in curve
    ]
    again, _ = trained(Toy(dropout=0.3), path)
    assert same(again, undisturbed), "a finished training is not repeated"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    task, save = Toy(), torch.save

    def half_written(_: Any, target: BinaryIO) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def second_fails(content: Any, target: BinaryIO) -> None:
        (half_written if path.exists() else save)(content, target)

    monkeypatch.setattr(torch, "save", second_fails)
    with pytest.raises(OSError, match="No space left"):
        trained(task, path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(torch, "save", save)
    assert same(trained(checkpoint=path)[0], trained()[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 0.5}, "recipe.learning_rate is 0.01 and not 0.5"), ({"seed": 9}, "recipe.seed")],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, change, named):
    path = tmp_path / "checkpoint.pt"
    trained(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"checkpoint.pt is of another configuration, {named}.*delete it"):
        trained(checkpoint=path, **change)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_network_or_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained(checkpoint=path)
    task = Toy()
    narrow = eugen.replace(task.fresh(3), eugen.NarrowConfig(budget=0.5)).model
    with pytest.raises(ValueError, match="of another configuration"):
        train(task, narrow, RECIPE, checkpoint=path)
    other = task.fresh(3)
    other[1][1] = nn.ReLU()  # the same tensors, another function
    with pytest.raises(ValueError, match="of another configuration, modules is"):
        train(task, other, RECIPE, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        trained(checkpoint=path)


def test_a_loss_that_is_not_finite_ends_the_training(monkeypatch):
    task = Toy()
    monkeypatch.setattr(
        task, "batch_loss", lambda model, batch: Toy.batch_loss(task, model, batch) * math.nan
    )
    with pytest.raises(Diverged, match="loss nan, .* between steps 0 and 4, lr 0.01"):
        trained(task)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from stages import distributed
from stages.training import train
from tests.stages.toy_task import RECIPE, Toy
torch.set_num_threads(1)
with distributed.group("cpu") as place:
    task = Toy()
    model = task.fresh(3)
    log = []
    recipe = RECIPE.model_copy(update=json.loads(sys.argv[2]))
    curve = train(task, model, recipe, log=lambda *point: log.append(point))
    assert place.world == 2 and bool(log) == place.first
    values = {name: value.tolist() for name, value in model.state_dict().items()}
    text = json.dumps([[p.train_loss, p.validation] for p in curve] + [values])
    Path(sys.argv[1]).with_suffix(f".{place.rank}").write_text(text)
"""


def torchrun(folder: Path, **change: Any) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*command, str(folder / "script.py"), str(folder / "out"), json.dumps(change)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 2])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, micro):
    done = torchrun(tmp_path, micro_batch=micro)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first[-1] == second[-1], "both processes hold the same weights"
    model, curve = trained()
    for (loss, validation), point in zip(first[:-1], curve, strict=True):
        assert loss == pytest.approx(point.train_loss, rel=1e-5)
        assert validation == pytest.approx(point.validation, rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, torch.tensor(first[-1][name]), atol=1e-5), name


@pytest.mark.slow
def test_processes_that_cannot_share_a_batch_equally_say_so(tmp_path):
    done = torchrun(tmp_path, batch_size=7)
    assert done.returncode != 0
    assert "batch_size=7 cannot be shared by 2 processes: use a multiple" in done.stderr
