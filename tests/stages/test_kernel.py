"""The synthetic study against its formulas, computed here a second time."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eugen
from stages import params
from stages.models import changed_tensors, student_model
from stages.tasks import DATA, open_task
from stages.tasks import kernel as study

ROOT = Path(__file__).resolve().parents[2]
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z + z.abs()) / 2,
    "softplus": lambda z: torch.log1p(torch.exp(z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> study.Kernel:
    """The task at smoke size, prepared in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    opened = open_task(params.load(ROOT / "params/smoke.yaml"), "kernel")
    assert isinstance(opened, study.Kernel)
    (tmp_path / DATA / "kernel").mkdir(parents=True)
    opened.prepare(opened.folder)
    return opened


def dense(task: study.Kernel) -> nn.Module:
    return task.train_dense(Path(), Path("checkpoint.pt"), lambda *_: None)


class Fixed(nn.Module):
    """Gives what it was made with, whatever it is asked."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs, self.given = outputs, 0

    def forward(self, x: Tensor) -> Tensor:
        self.given += len(x)
        return self.outputs[self.given - len(x) : self.given]


def by_hand(task: study.Kernel, part: str) -> dict[str, Tensor]:
    """`act(W x + b)` of every setting in float64, each from its own weights and inputs."""
    weights = {name: tensor.double() for name, tensor in dense(task).state_dict().items()}
    found = {}
    for name, act in FORMULAS.items():
        for column, inputs in enumerate(("gaussian", "power_law")):
            layer = f"layers.{name}_{inputs}.affine"
            z = task._data[part][:, column].double() @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
            found[f"{name}.{inputs}"] = act(z)
    return found


def test_the_targets_and_their_error_are_what_the_formula_says(task):
    targets = by_hand(task, "test")
    noise = torch.randn(
        6, *targets["relu.gaussian"].shape, generator=torch.Generator().manual_seed(5)
    ).double()
    expected = {}
    for scale, (name, target) in zip(range(1, 7), targets.items(), strict=True):
        error = 0.01 * scale * noise[scale - 1]
        spread = ((target - target.mean(0)) ** 2).sum()
        expected[f"relative_mse.{name}"] = float((error**2).sum() / spread)
        targets[name] = target + error
    measured = task.evaluate(Fixed(torch.stack(list(targets.values()), dim=1)), "test")
    assert measured.pop("relative_mse") == pytest.approx(sum(expected.values()) / 6, rel=1e-9)
    assert measured == pytest.approx(expected, rel=1e-9)


def test_the_mean_of_the_targets_alone_has_error_one(task):
    targets = torch.stack(list(by_hand(task, "test").values()), dim=1)
    measured = task.evaluate(Fixed(targets.mean(0).expand_as(targets)), "test")
    assert list(measured.values()) == pytest.approx([1] * 7, rel=1e-9)


def test_the_dense_network_errs_by_rounding_alone(task):
    assert task.evaluate(dense(task), "test")["relative_mse"] < 1e-12


def test_a_linear_map_replaces_a_layer_without_activation_exactly(task, monkeypatch):
    monkeypatch.setattr(study, "ACTIVATIONS", {"identity": nn.Identity})
    calibration = task.calibration(0, 1024)
    result = eugen.replace(dense(task), eugen.LinearConfig(budget=1.0), calibration=calibration)
    assert len(result.sites) == len(study.INPUTS)
    ridge = 1e-3  # the largest that least squares may take; float32 adds less
    assert task.evaluate(result.model, "test")["relative_mse"] < ridge**2


def test_each_setting_is_a_block_of_its_own_that_no_other_touches(task):
    whole = dense(task)
    sites = eugen.find_ffns(whole)
    assert [site.dense.down for site in sites] == [None] * 6
    calibration = task.calibration(0, 512)
    before = task.evaluate(whole, "test")
    for site in sites:
        changed = eugen.replace(
            whole,
            eugen.PruneConfig(budget=0.3),
            calibration=calibration,
            where=lambda other, name=site.name: other.name == name,
        )
        after = task.evaluate(changed.model, "test")
        touched = [name for name in before if after[name] != before[name]]
        setting = site.name.removeprefix("layers.").replace("_", ".", 1)
        assert touched == ["relative_mse", f"relative_mse.{setting}"]


def test_power_law_inputs_have_their_spectrum_and_the_others_scale(task):
    mixing = task._data["mixing"].double()
    spectrum = torch.linalg.eigvalsh(mixing.T @ mixing).flip(0)
    width, decay = len(mixing), task.settings.data.decay
    wanted = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    assert torch.allclose(spectrum, wanted * width / wanted.sum(), rtol=1e-4)
    drawn = torch.cat(task.calibration(0, 20_000)).double()
    moments = [float(x.square().sum(-1).mean()) / width for x in drawn.unbind(1)]
    assert moments == pytest.approx([1, 1], abs=0.05)
    covariance = torch.linalg.eigvalsh(drawn[:, 1].T @ drawn[:, 1] / len(drawn)).flip(0)
    assert torch.allclose(covariance, spectrum, rtol=0.15)
    assert drawn[:, 1].square().mean(0).std() < 0.5, "the spectrum lies along the axes"


def test_no_draw_is_the_beginning_of_a_stream_that_rows_draw_from(task):
    """A transfer of seed s draws features from a generator of seed s."""
    drawn = [*dense(task).state_dict().values(), task.calibration(0, 64)[0], task._data["test"]]
    for seed in range(10):
        stream = torch.randn(64, generator=torch.Generator().manual_seed(seed)).double()
        for tensor in drawn:
            head = tensor.flatten()[:64].double()
            assert torch.corrcoef(torch.stack([head, stream]))[0, 1].abs() < 0.7


def test_a_stored_row_with_the_dense_layer_s_own_form_is_restored(task):
    whole = dense(task)
    result = eugen.replace(whole, eugen.DenseConfig(budget=1.0), calibration=task.calibration(0, 64))
    stored = student_model(whole, eugen.DenseConfig(budget=1.0), changed_tensors(result.model, whole))
    assert task.evaluate(stored, "test") == task.evaluate(whole, "test")


def test_nothing_heavy_is_imported():
    code = "import sys, stages.tasks.kernel; print([m for m in ('timm', 'transformers') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
