"""What the crash benchmark would notice: each of its checks on something that was broken on purpose."""

from __future__ import annotations

import copy
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.crash import kill, verdict
from benchmarks.crash.scratch import PARAMS, VERBS, Running, inhabitants, until
from stages import params
from stages.tasks import open_task

ROOT = Path(__file__).resolve().parents[2]


def test_thirty_trials_reach_every_verb_and_every_victim_and_can_be_repeated():
    drawn = [kill.draw(number, 0) for number in range(30)]
    assert {aim.victim for aim in drawn} == set(kill.VICTIMS)
    assert {aim.moment for aim in drawn} == set(kill.MOMENTS) > set(VERBS)
    assert drawn == [kill.draw(number, 0) for number in range(30)]
    assert drawn != [kill.draw(number, 1) for number in range(30)]
    assert len({(aim.victim, aim.moment) for aim in drawn}) == 30
    assert all(0 <= aim.part < 1 for aim in drawn)


def test_the_small_benchmark_has_valid_parameters(tmp_path: Path):
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    settings = params.load(tmp_path / "params.yaml")
    assert open_task(settings, "vision").settings.profile.pairs == 10
    assert settings.scratch_tasks.keys() == {"vision"}


def test_times_may_differ_and_nothing_else():
    record = json.loads((ROOT / "reports/records/kernel/eugen.json").read_text())
    slower = copy.deepcopy(record)
    slower["latencies"][0]["method_ms"] = [9.0]
    slower["latencies"][0]["speedup"] = 0.1
    slower["latencies"][0]["peak_bytes_method"] += 1
    slower["train_seconds_dense"] = 1e6
    slower["seeds"][0]["transfer_seconds"] = 1e6
    slower["stage_overhead_seconds"] = {"transfer": 1e6}
    assert list(verdict.differences(verdict.untimed(slower), verdict.untimed(record))) == []
    changes: list[Callable[[dict], object]] = [
        lambda r: r["seeds"][0].update(quality_transfer_only=0.5),
        lambda r: r["costs"][0].update(macs=1),
        lambda r: r["weights_sha256"].update(dense="0" * 64),
        lambda r: r["latencies"].pop(),
        lambda r: r.pop("dense_metrics"),
    ]
    for change in changes:
        other = copy.deepcopy(record)
        change(other)
        assert list(verdict.differences(verdict.untimed(other), verdict.untimed(record)))


def test_files_that_are_missing_new_or_changed_are_differences(tmp_path: Path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        (folder / "data/vision").mkdir(parents=True)
        (folder / "data/vision/images").write_bytes(b"images")
        (folder / "results").mkdir()
        (folder / "results/x.json").write_text('{"quality": 1, "seconds": 2}')
    here, there = map(verdict.results, folders)
    assert list(verdict.differences(here, there)) == []
    (folders[0] / "data/vision/images").write_bytes(b"Images")
    (folders[0] / "results/y.json").write_text("{}")
    (folders[1] / "results/z.json").write_text("{}")
    found = list(verdict.differences(*map(verdict.results, folders)))
    assert len(found) == 3 and {"images", "y.json", "z.json"} == {
        line.split("/")[-1].split()[0].strip(":") for line in found
    }


@pytest.mark.parametrize("name", ["r.json", "t.csv", "w.safetensors", "t.parquet", "report.html", "f.svg"])
def test_a_half_written_record_is_found(tmp_path: Path, name: str):
    path = tmp_path / "results" / name
    path.parent.mkdir()
    save_file({"weight": torch.zeros(9)}, tmp_path / "whole")
    whole = {
        "r.json": b'{"quality": 0.9}',
        "t.csv": b"a,b\n1,2\n",
        "w.safetensors": (tmp_path / "whole").read_bytes(),
        "t.parquet": b"PAR1....PAR1",
        "report.html": b"<html></html>\n",
        "f.svg": b"<svg></svg>",
    }[name]
    path.write_bytes(whole)
    assert verdict.broken(tmp_path) == []
    path.write_bytes(whole[:-3])
    assert [f"results/{name}" in line for line in verdict.broken(tmp_path)] == [True]


@pytest.mark.parametrize(
    "name",
    [
        "results/cells/.vision-eugen.json.4711.part",
        "data/.vision.partial",
        "data/.fetching-4711-abcd",
        ".dvc/cache/files/md5/f5/.JGkCFjg4reCuVxUeBQYp8Q.tmp",
        ".work/mlflow.db.draft",
        ".work/outbox/transfer-vision-eugen-20260101T000000-abcd",
        ".work/progress/transfer-vision-eugen-abcd",
    ],
)
def test_what_a_kill_left_behind_is_found(tmp_path: Path, name: str):
    for usual in (".work/progress/scratch-vision-narrow-abcd", ".work/locks/mlflow.lock", "results/x.json"):
        (tmp_path / usual).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / usual).touch()
    assert verdict.leftovers(tmp_path) == []
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert verdict.leftovers(tmp_path) == [f"{name} was left behind"]


def test_a_process_that_is_left_is_found(tmp_path: Path):
    folder = tmp_path / "clone"
    folder.mkdir()
    assert verdict.orphans(folder) == []
    left = subprocess.Popen(["sleep", "60"], cwd=folder)
    try:
        assert [process.pid for process in inhabitants(folder)] == [left.pid]
    finally:
        left.kill()
        left.wait()
    assert verdict.orphans(folder) == []


def test_runs_that_are_left_alive_are_found(tmp_path: Path):
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("create table runs (run_uuid, status)")
    database.execute("create table tags (run_uuid, key, value)")
    rows = [("a", "FINISHED", "prepare"), ("b", "RUNNING", "report"), ("c", "KILLED", "report")]
    for run, status, stage in rows:
        database.execute("insert into runs values (?, ?)", (run, status))
        for key, value in (("stage", stage), ("mlflow.runName", f"vision {stage}")):
            database.execute("insert into tags values (?, ?, ?)", (run, key, value))
    database.commit()
    found = verdict.tracked(tmp_path / "mlflow.db", {"prepare", "report"})
    assert len(found) == 2 and "left RUNNING" in found[0] and "no finished run of report" in found[1]
    assert verdict.unfinished([("bold-cat", "RUNNING"), ("x", "COMPLETED"), ("y", "CRASHED")]) == [
        "Prefect's run bold-cat is left RUNNING"
    ]


def test_the_moment_is_awaited_and_the_victim_killed(tmp_path: Path):
    lines = "import time\nprint('transfer@vision-eugen  started', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", lines],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = Running(process)
    aim = kill.Aim("flow", "transfer", 0.5)
    killed, second = kill.strike(aim, tmp_path, running, (r"transfer\S*  started$", 0.4), {})
    assert running.wait() == -9 and len(killed) == 1 and second >= 0.2
    assert running.at_work() == [] or running.at_work() == ["transfer@vision-eugen"]
    assert until(lambda: not psutil.pid_exists(process.pid), 5)
