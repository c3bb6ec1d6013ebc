"""Records: what they refuse, and that nothing is lost on the way through a file."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest

from eugen.timing import (
    Energy,
    Environment,
    Measured,
    Memory,
    PairedLatency,
    PlacedLatency,
    Profile,
    Rates,
    Row,
)
from eugen.timing import environment as machine
from eugen.timing.tables import is_void, markdown


def test_an_installed_copy_does_not_take_the_commit_of_the_folder_around_it(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    source = tmp_path / "eugen" / "timing" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody else's")
    monkeypatch.setattr(machine, "SOURCE", tmp_path)
    monkeypatch.setattr(machine, "__file__", str(source))
    found = machine.environment("cpu")
    assert (found.commit, found.dirty) == (None, None)
    git("add", ".")
    found = machine.environment("cpu")
    assert (len(found.commit or ""), found.dirty) == (40, True)


SAMPLES = PlacedLatency([PairedLatency([4.0, 4.0], [2.0, 2.0]), PairedLatency([6.0, 6.0], [2.0, 4.0])])


def measured(**changes) -> Measured:
    values = {
        "speedup": 2.0,
        "low": 1.9,
        "high": 2.1,
        "scatter": 0.02,
        "dense_ms": 5.0,
        "row_ms": 2.0,
        "samples": SAMPLES,
        "macs": {"float32": 10},
        "weight_bytes": 4_000_000,
        "io_bytes": 8,
        "activation_bytes": 16,
        "macs_limit": 3.0,
        "limit_ms": 1.0,
        "binds": "bytes",
        "of_limit": 0.5,
        "memory": Memory(5_000_000, None, 7_000_000),
        "energy": Energy(None, None, "no RAPL package"),
        "check_error": 1e-7,
        "config": "EUGenConfig()",
    }
    return Measured(**{**values, **changes})


def row(name: str = "eugen", **changes) -> Row:
    values = {"status": "timed", "measured": measured(), "reason": None} | changes
    return Row(name, "forward", 1, "model", "model", **values)


def profile(*rows: Row) -> Profile:
    environment = Environment("a processor", None, 2, 1, {"torch": "2"}, "0123456789abcdef", False, 0.1)
    rates = Rates(2e10, {"float32": 5e10})
    started = Profile("mlp", "cpu", "float32", {"budget": 0.3}, environment, rates)
    return started.ended(list(rows), rates, 0.5, 1.26)


DENSE = row("dense", measured=measured(speedup=1.0, low=0.9, high=1.1))
LOST = row("moe", status="failed", measured=None, reason="RuntimeError: a | b")


def test_a_record_comes_back_as_it_was(tmp_path):
    written = profile(DENSE, row(), LOST)
    written.write(tmp_path / "deep" / "record.json")
    assert Profile.read(tmp_path / "deep" / "record.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record.json"], "a temporary file is left"
    assert written.environment.load_after == 0.5 and written.wall_seconds == 1.3


@pytest.mark.parametrize(
    "change",
    [
        {"low": 2.05},
        {"high": 1.95},
        {"low": 0.0},
        {"speedup": float("nan")},
        {"high": float("inf")},
        {"samples": PlacedLatency([PairedLatency([1.0, -1.0], [1.0, 1.0])])},
        {"samples": PlacedLatency([PairedLatency([1.0, 1.0], [float("nan"), 1.0])])},
    ],
    ids=str,
)
def test_impossible_measurements_are_refused(change):
    with pytest.raises(ValueError, match=r"speedup=|samples"):
        measured(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "skipped"},
        {"measured": None},
        {"status": "failed", "measured": None},
        {"status": "failed", "reason": "why"},
        {"reason": "why"},
    ],
    ids=str,
)
def test_a_row_has_a_measurement_or_a_reason(change):
    with pytest.raises(ValueError, match="status=|must come with"):
        row(**change)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "record.json"
    profile(row()).write(path)
    found = json.loads(path.read_text())
    for change, message in (
        ({"format": 99}, "99"),
        ({"rates": {}}, "no record"),
        ({"extra": 1}, "no record"),
    ):
        path.write_text(json.dumps({**found, **change}))
        with pytest.raises(ValueError, match=message):
            Profile.read(path)


def test_samples_are_one_line_for_each_pair(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    written = profile(DENSE, row(), LOST)
    lines = written.samples()
    assert len(lines) == 2 * 4
    assert lines[-1] == {
        "row": "eugen",
        "call": "forward",
        "batch": 1,
        "scope": "model",
        "part": "model",
        "placement": 1,
        "pair": 1,
        "dense_ms": 6.0,
        "row_ms": 4.0,
    }
    written.write_samples(tmp_path / "new" / "samples.parquet")
    assert parquet.read_table(tmp_path / "new" / "samples.parquet").to_pylist() == lines


def test_the_page_shows_every_row_its_limit_and_what_is_missing():
    page = markdown(profile(DENSE, row(), LOST))
    line = next(line for line in page.splitlines() if line.startswith("| eugen"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "eugen",
        "2.00 [1.90, 2.10]",
        "3.00",
        "2",
        "1",
        "0.50",
        "bytes",
        "4.0",
        "5.0",
        "–",
        "7.0",
        "–",
    ]
    assert "- `moe` failed: RuntimeError: a | b" in page
    assert "energy: no RAPL package" in page
    assert "dense (control)" in page and "Void" not in page


def test_without_a_control_that_covers_one_a_condition_is_void():
    off = replace(DENSE, measured=measured(speedup=1.2, low=1.1, high=1.3))
    assert not is_void([DENSE, row()])
    assert is_void([off, row()]) and is_void([row()])
    assert is_void([row("dense", status="failed", measured=None, reason="why"), row()])
    assert "Void" in markdown(profile(off, row()))
