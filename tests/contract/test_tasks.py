"""What every task owes the six verbs, on its real data at smoke size. Nothing here names one.

The archives come from EUGEN_DATA_DIR, from data/.downloads, or from the registry.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eugen
from stages import params, prepare
from stages.checkpoint import save_tensors
from stages.data.verify import DataError, sha256_file
from stages.faults import Section
from stages.models import DENSE_FILE, changed_tensors, dense_model, student_model
from stages.tasks import BASELINE, DATA, DataSource, Task, open_task, task_names

ROOT = Path(__file__).resolve().parents[2]
SMOKE = params.load(ROOT / "params/smoke.yaml")
ARCHIVES = (ROOT / (os.environ.get("EUGEN_DATA_DIR") or "data/.downloads")).resolve()
PARTS = ("validation", "test")


@dataclass
class Workshop:
    """A task with its data prepared and its dense network trained, in a folder of its own."""

    task: Task
    folder: Path
    sources: dict[str, DataSource]
    dense: nn.Module
    curve: list[tuple[str, float, int]]
    quality: dict[str, dict[str, float]]


def build(name: str, folder: Path) -> Workshop:
    """Do what the stages prepare and baseline do."""
    task = open_task(SMOKE, name)
    out = BASELINE / name
    for needed in (DATA / name, out):
        needed.mkdir(parents=True)
    sources = task.prepare(DATA / name)
    curve: list[tuple[str, float, int]] = []
    dense = task.train_dense(out, folder / "checkpoint.pt", lambda *point: curve.append(point))
    save_tensors(out / DENSE_FILE, dense.state_dict())
    quality = {part: task.evaluate(dense, part) for part in PARTS}
    return Workshop(task, folder, sources, dense, curve, quality)


@pytest.fixture(scope="session")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workshop]:
    """Each task's workshop, built when first asked for."""
    built: dict[str, Workshop] = {}

    def workshop(name: str) -> Workshop:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("EUGEN_DATA_DIR", str(ARCHIVES))
                built[name] = build(name, folder)
        return built[name]

    return workshop


@pytest.fixture(params=task_names())
def shop(request, workshops, monkeypatch) -> Workshop:
    """A workshop to look at, as the current folder."""
    found = workshops(request.param)
    monkeypatch.chdir(found.folder)
    monkeypatch.setenv("EUGEN_DATA_DIR", str(ARCHIVES))
    return found


def sizes_of_calls(shop: Workshop, batches: list) -> list[int]:
    """Tokens that reach the first feed-forward block with each batch."""
    site = eugen.find_ffns(shop.dense)[0]
    seen: list[int] = []
    hook = shop.dense.get_submodule(site.name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel() // site.dense.in_features)
    )
    with torch.no_grad():
        for batch in batches:
            shop.task.call(shop.dense, batch)
    hook.remove()
    return seen


def equal(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_a_task_is_named_by_its_file(shop):
    assert type(shop.task).__module__ == f"stages.tasks.{shop.task.name}"
    assert shop.task.quality_name.isidentifier()


def test_prepared_data_are_described_and_the_same_again(shop, tmp_path):
    for source in shop.sources.values():
        assert re.fullmatch("[0-9a-f]{64}", source.sha256) and source.rows > 0
    assert shop.task.prepare(tmp_path) == shop.sources
    folders = (tmp_path, shop.folder / DATA / shop.task.name)
    first, second = ({p.name: sha256_file(p) for p in folder.iterdir()} for folder in folders)
    assert first == second


def with_another_value(section: Section) -> list[Section]:
    """The section with one value at a time replaced by one that it did not have, be that allowed or not."""
    changed: list[Section] = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        others = with_another_value(value) if isinstance(value, Section) else [f"not {value}"]
        changed += [section.model_copy(update={key: other}) for other in others]
    return changed


def test_another_value_of_any_data_setting_changes_the_manifest(shop):
    def manifest(data: Section) -> str:
        changed = shop.task.settings.model_copy(update={"data": data})
        task = type(shop.task)(changed, shop.task.folder)
        return json.dumps(prepare.manifest(task, shop.sources), sort_keys=True)

    data = shop.task.settings.data
    assert set(json.loads(manifest(data))["data"]) == set(type(data).model_fields)  # defaults too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, on what has the wrong type
        found = [manifest(other) for other in with_another_value(data)]
    assert len({manifest(data), *found}) == 1 + len(found) >= 1 + len(type(data).model_fields)


def test_pictures_are_written_into_a_folder_that_does_not_exist(shop, tmp_path):
    truth = shop.task.truth_pictures(tmp_path / "truth/deeper")
    made = shop.task.pictures(shop.dense, tmp_path / "eugen/budget0.3")
    assert [path.name for path in made] == [path.name for path in truth]
    assert all(path.is_file() for path in (*made, *truth))
    assert {path.parent for path in made} <= {tmp_path / "eugen/budget0.3"}


def test_an_altered_archive_is_an_error_that_names_it(shop, tmp_path, monkeypatch):
    altered, target = tmp_path / "altered", tmp_path / "target"
    for folder in (altered, target):
        folder.mkdir()
    if shop.task.computed:  # then there is no archive that it could read
        monkeypatch.setenv("EUGEN_DATA_DIR", str(altered))
        assert shop.task.prepare(target) == shop.sources and list(altered.iterdir()) == []
        return
    for archive in (path for path in ARCHIVES.iterdir() if path.is_file()):
        (altered / archive.name).write_bytes(b"altered")
    monkeypatch.setenv("EUGEN_DATA_DIR", str(altered))
    with pytest.raises(DataError, match="data set .* is altered or incomplete .*delete it and run again"):
        shop.task.prepare(target)
    assert list(target.iterdir()) == []


def test_the_baseline_says_how_it_went(shop):
    assert shop.curve
    assert all(math.isfinite(value) for _, value, _ in shop.curve)
    assert not shop.dense.training


def test_a_baseline_that_was_saved_is_the_same_network(shop):
    loaded = dense_model(shop.task)
    assert changed_tensors(loaded, shop.dense) == {}
    assert shop.task.evaluate(loaded, "test") == shop.quality["test"]


def test_training_goes_on_from_its_checkpoint(shop, tmp_path):
    again = shop.task.train_dense(tmp_path, shop.folder / "checkpoint.pt", lambda *_: None)
    assert changed_tensors(again, shop.dense) == {}


def test_training_again_gives_the_same_network(shop, tmp_path):
    torch.manual_seed(17)  # what others draw from the global generator must not matter
    again = shop.task.train_dense(tmp_path, tmp_path / "checkpoint.pt", lambda *_: None)
    assert changed_tensors(again, shop.dense) == {}


def test_quality_is_finite_and_holds_the_measure_that_counts(shop):
    for quality in shop.quality.values():
        assert shop.task.quality_name in quality
        assert all(math.isfinite(value) for value in quality.values())


def test_dense_blocks_put_in_by_surgery_change_nothing(shop):
    batches = shop.task.calibration(0, 256)
    result = eugen.replace(
        shop.dense, eugen.DenseConfig(budget=1.0), calibration=batches, call=shop.task.call, refine_steps=2
    )
    assert result.sites
    assert shop.task.evaluate(result.model, "validation") == shop.quality["validation"]
    stored = student_model(
        shop.dense, eugen.DenseConfig(budget=1.0), changed_tensors(result.model, shop.dense)
    )
    assert shop.task.evaluate(stored, "test") == shop.quality["test"]


def test_quality_falls_with_the_network(shop):
    ruined = eugen.replace(shop.dense, eugen.NarrowConfig(budget=0.05)).model
    name = shop.task.quality_name
    fine, bad = shop.quality["validation"][name], shop.task.evaluate(ruined, "validation")[name]
    assert (bad < fine) if shop.task.higher_is_better else (bad > fine)


@pytest.mark.parametrize("wanted", [1, 300, 1024])
def test_calibration_holds_the_tokens_asked_for(shop, wanted):
    batches = shop.task.calibration(0, wanted)
    sizes = sizes_of_calls(shop, batches)
    assert wanted <= sum(sizes) < wanted + max(sizes)


def test_calibration_is_chosen_by_its_seed(shop):
    first, again, other = (shop.task.calibration(seed, 512) for seed in (3, 3, 4))
    assert equal(first, again) and not equal(first, other)


def test_the_loss_is_finite_drawn_by_the_generator_and_has_a_gradient(shop):
    def loss(seed: int) -> Tensor:
        return shop.task.loss(model, 4, torch.Generator().manual_seed(seed))

    model = student_model(shop.dense, eugen.EUGenConfig(budget=0.3), {})
    assert loss(0).shape == () and torch.isfinite(loss(0))
    assert torch.equal(loss(0), loss(0)) and not torch.equal(loss(0), loss(1))
    loss(0).backward()
    blocks = [p for n, p in model.named_parameters() if n not in dict(shop.dense.named_parameters())]
    assert blocks
    for parameter in blocks:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("batch", [1, 3, 300])
def test_an_example_has_the_batch_asked_for_and_the_model_takes_it(shop, batch):
    example = shop.task.example(batch)
    assert example.shape[0] == batch
    assert torch.equal(example, shop.task.example(batch))
    if batch < 300:
        with torch.no_grad():
            assert shop.task.call(shop.dense, example).shape[0] == batch


def test_a_fault_in_the_task_s_section_names_the_key():
    for name in task_names():
        broken = params.Params(
            "x", SMOKE.run, {name: {**SMOKE.tasks[name], "data": {"bogus": 1}}}, SMOKE.methods
        )
        with pytest.raises(params.ParamsError, match=f"tasks.{name}.data.bogus = 1: unknown key, allowed"):
            open_task(broken, name)
