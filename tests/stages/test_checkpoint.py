"""Progress that survives a kill and a full disk: whole or not at all, and only for equal work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from stages import checkpoint
from stages.checkpoint import Progress, save_tensors
from stages.tracking import record

PARAMS = {"run": {"threads": 1}, "transfer": {"seeds": [0, 1]}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one stage whose dependencies are a file, a folder and another cell's file."""
    deps = ["verb.py", "data/${item.task}", "artifacts/${item.task}/${item.method}.bin"]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"transfer": {"deps": deps}}}))
    files = ("verb.py", "data/vision/images", "data/vision/deep/labels", "artifacts/vision/eugen.bin")
    for name in (
        *files,
        "data/embedding/text",
        "artifacts/vision/prune.bin",
        "data/vision/__pycache__/x.pyc",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def progress(**change: Any) -> Progress:
    return Progress("transfer", **({"task": "vision", "method": "eugen", "params": PARAMS} | change))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_unit_comes_back_as_it_was(project):
    values, tensors = {"seed": 0, "quality": 0.9}, {"weight": torch.randn(3, 2)}
    progress().store("seed0", values, tensors)
    found = progress().load("seed0")
    assert found is not None and found[0] == values
    assert torch.equal(found[1]["weight"], tensors["weight"])
    assert progress().load("seed1") is None


def test_the_key_is_the_work_not_its_place_or_time(project):
    key = progress().folder
    assert progress(params={"transfer": {"seeds": [0, 1]}, "run": {"threads": 1}}).folder == key
    os.utime("verb.py", (0, 0))
    for other in ("data/embedding/text", "artifacts/vision/prune.bin", "data/vision/__pycache__/x.pyc"):
        Path(other).write_text("changed")
    assert progress().folder == key


@pytest.mark.parametrize("name", ["verb.py", "data/vision/deep/labels", "artifacts/vision/eugen.bin"])
def test_other_contents_of_a_dependency_are_other_work(project, name):
    progress().store("seed0", {}, {})
    Path(name).write_text("changed")
    assert progress().load("seed0") is None


def test_other_parameters_and_files_are_other_work(project):
    progress().store("seed0", {}, {})
    assert progress(params=PARAMS | {"run": {"threads": 2}}).load("seed0") is None
    Path("data/vision/more").write_text("")
    assert progress().load("seed0") is None
    Path("data/vision/more").unlink()
    assert progress().load("seed0") is not None


def test_success_forgets_the_progress(project):
    kept = progress(params={})
    done = progress()
    done.store("seed0", {}, {})
    done.clear()
    assert not done.folder.exists() and kept.folder.exists()


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(tensors: dict[str, Tensor], path: Path) -> None:
    """What is left of a write for which the disk had no room."""
    path.write_bytes(b"half")
    no_space()


FULL_DISK: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "writing": lambda patch: patch.setattr(checkpoint, "save_file", half_written),
    "flushing": lambda patch: patch.setattr(os, "fsync", no_space),
    "renaming": lambda patch: patch.setattr(os, "replace", no_space),
}


@pytest.mark.parametrize("moment", ["writing", "flushing", "renaming"])
def test_a_full_disk_leaves_no_half_unit(project, monkeypatch, moment):
    kept = progress()
    kept.store("seed0", {"quality": 0.5}, {"weight": torch.zeros(2)})
    with monkeypatch.context() as patch:
        FULL_DISK[moment](patch)
        with pytest.raises(OSError, match="No space left"):
            kept.store("seed1", {"quality": 0.6}, {"weight": torch.ones(2)})
    assert kept.load("seed1") is None, "the values say that a unit is whole: they come last"
    assert {name for name in files_in(kept.folder) if name.startswith(".")} == set()
    found = kept.load("seed0")
    assert found is not None and found[0] == {"quality": 0.5}
    kept.store("seed1", {"quality": 0.6}, {"weight": torch.ones(2)})
    found = kept.load("seed1")
    assert found is not None and torch.equal(found[1]["weight"], torch.ones(2))


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch, moment):
    save_tensors(tmp_path / "w.safetensors", {"weight": torch.zeros(2)})
    before = (tmp_path / "w.safetensors").read_bytes()
    FULL_DISK[moment](monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(tmp_path / "w.safetensors", {"weight": torch.ones(2)})
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert files_in(tmp_path) == {"w.safetensors"}


@pytest.mark.parametrize("moment", ["flushing", "renaming"])
def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch, moment):
    record.write_json(tmp_path / "record.json", {"quality": 0.5})
    FULL_DISK[moment](monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        record.write_json(tmp_path / "record.json", {"quality": 0.6})
    assert (tmp_path / "record.json").read_text() == '{\n "quality": 0.5\n}\n'
    assert files_in(tmp_path) == {"record.json"}


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    tied = torch.arange(6.0)
    save_tensors(tmp_path / "w.safetensors", {"a": tied, "b": tied, "c": tied.view(2, 3).T})
    found = checkpoint.load_file(tmp_path / "w.safetensors")
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied.view(2, 3).T)
