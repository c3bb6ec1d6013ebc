"""Old objects of a real DVC project go; what the present lock or a younger run needs stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from flows.dvc import clean
from flows.dvc.clean import CannotClean
from tests.flows.toy import ROOT, STAGES, Toy

DAY = 86400
STALE = 5  # two verbs of two methods, and the report


def command(toy: Toy, *arguments: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "flows.dvc.clean", "--project", str(toy.folder), *arguments]
    done = subprocess.run(words, cwd=ROOT, env=toy.env, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def age(path: Path, days: float) -> None:
    """Everything below `path` as if it had been made that long ago."""
    then = time.time() - days * DAY
    for file in [path, *path.rglob("*")]:
        os.utime(file, (then, then), follow_symlinks=False)


def write(toy: Toy, version: int) -> None:
    """Another version of one verb: it, what follows and the report are stale."""
    (toy.folder / "stages/finetune.py").write_text(f"# version {version}\n")


def cached(toy: Toy) -> set[str]:
    cache = toy.folder / ".dvc/cache"
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def total(toy: Toy) -> int:
    return sum((toy.folder / ".dvc/cache" / name).stat().st_size for name in cached(toy))


def test_only_what_neither_the_lock_nor_a_younger_run_needs_goes(finished: Toy):
    age(finished.folder / ".dvc/cache", 60)
    first = cached(finished)
    write(finished, 3)
    assert finished.dvc("repro", "-q").returncode == 0
    young = cached(finished) - first
    write(finished, 4)
    assert finished.dvc("repro", "-q").returncode == 0
    finished.calls()
    age(finished.folder / ".dvc/cache/files", 60)  # what a younger run only uses again is old itself

    before, size = cached(finished), total(finished)
    code, said = command(finished, "--older", "30d")
    assert code == 0 and "would go" in said and "nothing was deleted" in said
    assert cached(finished) == before, "a dry run"
    code, said = command(finished, "--older", "30d", "--apply")
    assert code == 0, said
    gone = before - cached(finished)
    assert len([name for name in gone if name.startswith("runs/")]) == STALE, "those of the first version"
    assert gone <= first and young <= cached(finished)
    told = sum(float(line.rsplit(", ", 2)[1].split()[0]) for line in said.splitlines() if " MB" in line)
    assert told == pytest.approx((size - total(finished)) / 1e6, abs=0.2)

    assert finished.dvc("status", "-q").returncode == 0
    write(finished, 3)
    assert finished.dvc("repro", "-q").returncode == 0 and finished.calls() == [], "a younger run came back"


def test_when_all_is_old_the_present_outputs_can_still_be_restored(finished: Toy):
    age(finished.folder / ".dvc/cache", 60)
    outputs, before = finished.outputs(), cached(finished)
    code, said = command(finished, "--older", "0h", "--apply")
    assert code == 0 and cached(finished) == before, said
    shutil.rmtree(finished.folder / "artifacts/transfer/vision/eugen")
    (finished.folder / "dvc.lock").unlink()
    assert finished.dvc("repro", "-q").returncode == 0 and finished.calls() == []
    assert finished.outputs() == outputs
    (finished.folder / "dvc.lock").unlink()
    assert len(clean.find(finished.folder, time.time() + DAY)[0].paths) == STAGES, "nothing holds them now"


def test_leftovers_go_when_they_are_old(fresh: Toy):
    for name, days in {"progress/old": 60, "progress/new": 0, "traces/old": 60, "outbox/run": 60}.items():
        folder = fresh.folder / ".work" / name
        folder.mkdir(parents=True)
        (folder / "content").write_text("x" * 1000)
        age(folder, days)
    assert command(fresh, "--older", "30d", "--apply")[0] == 0
    left = {path.parent.name + "/" + path.name for path in (fresh.folder / ".work").glob("*/*")}
    assert left == {"progress/new", "outbox/run"}, "an undelivered run is no leftover"


def test_it_refuses_while_a_benchmark_holds_the_clone(fresh: Toy):
    (fresh.folder / ".work").mkdir()
    with FileLock(fresh.folder / ".work/bench.lock"):
        code, said = command(fresh, "--older", "30d", "--apply")
    assert code == 1 and "a benchmark works in this clone" in said


def test_a_cache_elsewhere_stays_and_the_rest_is_cleaned(finished: Toy, tmp_path: Path):
    shared = tmp_path / "shared"
    shutil.move(finished.folder / ".dvc/cache", shared)
    finished.dvc("config", "cache.dir", str(shared))
    left = finished.folder / ".work/progress/old"
    left.mkdir(parents=True)
    (finished.folder / "stages/tracking").mkdir()
    (finished.folder / "stages/tracking/clean.py").touch()  # that of this clone is found and called
    for path in (left, shared):
        age(path, 60)
    objects = list(shared.rglob("*"))
    assert objects
    (finished.folder / "dvc.lock").unlink()
    code, said = command(finished, "--older", "30d", "--apply")
    assert code == 0 and "others may need" in said and "runs in MLflow: none" in said, said
    assert not left.exists() and all(path.exists() for path in objects)
    assert "objects in DVC's cache:" not in said


def test_it_refuses_what_it_cannot_judge(finished: Toy):
    (finished.folder / "dvc.lock").write_text("<<<<<<< HEAD\n")
    with pytest.raises(CannotClean, match="dvc.lock cannot be read"):
        clean.find(finished.folder, time.time())


@pytest.mark.parametrize("older", ["", "30", "d", "-1d", "1.5d", "30 d", "1m"])
def test_an_age_is_a_number_and_a_unit(older: str):
    with pytest.raises(ValueError, match="30d"):
        clean.seconds(older)
    assert (clean.seconds("2h"), clean.seconds("3d"), clean.seconds("1w")) == (7200, 3 * DAY, 7 * DAY)
