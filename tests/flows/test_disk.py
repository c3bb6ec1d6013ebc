"""Real disks that are full or read-only: named before any work, and a run goes on once they give way."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flows.dvc.runner import DvcRunner, StageFailed
from flows.machine.disk import LEAST_FREE_MB, DiskRefuses, cache_folder, check_disks
from stages.checkpoint import save, save_tensors
from stages.training import State
from tests.flows.toy import Toy

STAGE = "transfer@vision-eugen"
LARGE_MB = LEAST_FREE_MB + 16
"""What a stage writes to a disk that has more than the least free space, and less than this."""


def mounted(*arguments: str) -> None:
    """Run `mount`; skip the test where that is not permitted."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[None]:
    """A disk of its own at `folder`, with what was there."""
    kept = folder.with_name(f"{folder.name}.kept")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, kept)
    mounted("-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder))
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder on a read-only mount of itself."""
    mounted("--bind", str(folder), str(folder))
    try:
        mounted("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def make_stale(toy: Toy) -> None:
    with (toy.folder / "stages" / "transfer.py").open("a") as source:
        source.write("# changed\n")


def test_a_full_disk_is_named_before_any_work(finished: Toy):
    make_stale(finished)
    cache = finished.folder / ".dvc" / "cache"
    with small_disk(cache, LEAST_FREE_MB + 8):
        filler = cache / "filler"
        filler.write_bytes(b"x" * 16 * 2**20)
        code, output = finished.bench("--engine", "dvc")
        assert code == 1 and finished.calls() == [], output
        assert f"the disk that holds {cache}" in output
        assert f"at least {LEAST_FREE_MB} MB are needed" in output and "MB are free" in output
        assert "Traceback" not in output
        filler.unlink()
        code, output = finished.bench("--engine", "dvc")
        assert code == 0 and STAGE in finished.calls(), output


@pytest.mark.parametrize("place", [".dvc/cache", "artifacts/transfer"])
def test_a_disk_that_fills_up_within_a_stage_fails_it_with_the_reason_and_a_rerun_goes_on(
    finished: Toy, place: str
):
    make_stale(finished)
    finished.behave(**{STAGE: {"megabytes": LARGE_MB}})
    with small_disk(finished.folder / place, LARGE_MB - 4):
        runner = DvcRunner(finished.folder, "test-run")
        with pytest.raises(StageFailed, match=r"full|No space left on device") as failed:
            runner.run_stage(STAGE, timeout_s=60, say=print)
        assert "MB" in failed.value.reason and str(finished.folder) in failed.value.reason
        assert not failed.value.worth_a_retry, "a second try finds the same disk"
        left = finished.folder / place
        mounted("-o", f"remount,size={3 * LARGE_MB}m", str(left))
        assert runner.run_stage(STAGE, timeout_s=60, say=print) == "run"
        made = finished.folder / "artifacts/transfer/vision/eugen/large"
        assert made.stat().st_size == LARGE_MB * 2**20
        assert STAGE not in runner.look().stale
        assert not list(left.rglob(".*.part")) and not list(left.rglob(".*.tmp"))


def test_a_read_only_cache_is_named_before_any_work(finished: Toy):
    make_stale(finished)
    cache = finished.folder / ".dvc" / "cache"
    with read_only(cache):
        code, output = finished.bench("--engine", "dvc")
        assert code == 1 and finished.calls() == [], output
        assert f"{cache} cannot be written (Read-only file system)" in output and "Traceback" not in output
    code, output = finished.bench("--engine", "dvc")
    assert code == 0 and STAGE in finished.calls(), output


def test_the_cache_is_where_dvc_was_told(tmp_path: Path):
    (tmp_path / ".dvc").mkdir()
    assert cache_folder(tmp_path).resolve() == tmp_path / ".dvc/cache"
    (tmp_path / ".dvc" / "config").write_text("[cache]\n    dir = ../../shared\n")
    assert cache_folder(tmp_path).resolve() == tmp_path.parent / "shared"
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = /elsewhere/cache\n")
    assert cache_folder(tmp_path) == Path("/elsewhere/cache")


def test_the_check_leaves_nothing_and_names_a_folder_that_refuses(tmp_path: Path):
    check_disks(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskRefuses, match="/proc cannot be written"):
        check_disks(Path("/proc"))


def test_weights_and_checkpoints_on_a_full_disk_say_what_they_need(tmp_path: Path):
    tensors = {"weight": torch.zeros(2**20)}
    with small_disk(tmp_path / "disk", 1):
        with pytest.raises(OSError, match=r"4\.2 MB are needed, 1\.0 MB are free"):
            save_tensors(tmp_path / "disk" / "w.safetensors", tensors)
        layer = torch.nn.Linear(1024, 1024)
        optimiser = torch.optim.SGD(layer.parameters())
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser)
        training = State(optimiser, schedule, torch.Generator(), [])
        with pytest.raises(OSError, match=r"disk that holds .* is full"):
            save(tmp_path / "disk" / "c.pt", {}, layer, training)
        assert list((tmp_path / "disk").iterdir()) == []
