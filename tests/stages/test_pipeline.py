"""The real stages under the real DVC, in a clone of their own: one task, two methods, smoke size.

Mnist's archive comes from EUGEN_DATA_DIR, from data/.downloads, or from the registry.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flows.dvc.repair import repair_rwlock
from stages.tracking.record import CellRecord, ScratchRecord
from tests.stages.clone import Clone, git

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = (ROOT / (os.environ.get("EUGEN_DATA_DIR") or "data/.downloads")).resolve()
CELLS = ("vision-dense", "vision-eugen")
# Enough units, each long enough, that one is finished while others are not.
TRANSFER = {"budgets": [0.3], "seeds": [0, 1, 2, 3], "calibration_tokens": 4096, "refine_steps": 20}
SCRATCH_EPOCHS = 4
SCRATCH = {
    "rows": {"narrow": {"layer": "narrow"}},
    "tasks": {
        "vision": {
            "budgets": [0.3],
            "seeds": [0, 1],
            "learning_rates": [2e-3],
            "timing_pairs": 10,
            "variants": {"base": {"sizes": {"epochs": SCRATCH_EPOCHS}}},
        }
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The files of this checkout as a commit of their own, its small benchmark run by `dvc repro`."""
    folder = tmp_path_factory.mktemp("pipeline") / "clone"
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():  # an entry may have been deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "the checkout under test")
    clone = Clone(folder, environment(tmp_path_factory.mktemp("dvc")))
    params = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    params["tasks"] = {"vision": params["tasks"]["vision"] | {"transfer": TRANSFER}}
    params["methods"] = {name: params["methods"][name] for name in ("dense", "eugen")}
    params["scratch"] = SCRATCH
    clone.write_params(params)
    clone.run("dvc", "repro")
    return clone


def environment(site_cache: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EUGEN_", "DVC_"))}
    return keep | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONUNBUFFERED": "1",
        "DVC_SITE_CACHE_DIR": str(site_cache),
        "EUGEN_DATA_DIR": str(ARCHIVES),
        "EUGEN_TRACKING": "off",
    }


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "clone", symlinks=True)
    return Clone(tmp_path / "clone", finished.env)


def test_every_cell_has_its_record_and_the_report_its_rows(finished):
    records = {}
    for path in (finished.folder / "results/cells").iterdir():
        records[path.stem] = CellRecord.model_validate_json(path.read_bytes())
    assert sorted(records) == sorted(CELLS)
    trained = finished.folder / "results/scratch/vision-narrow.json"
    assert [run.seed for run in ScratchRecord.model_validate_json(trained.read_bytes()).runs] == [0, 1]
    assert not (finished.folder / "results/failures").exists()
    for record in records.values():
        assert record.provisional and not record.environment.dirty
        assert record.environment.commit == git(finished.folder, "rev-parse", "HEAD").strip()
        assert [seed.seed for seed in record.seeds] == TRANSFER["seeds"]
        assert [seed.seed for seed in record.seeds if seed.quality_finetuned is not None] == [0]
        assert record.latencies and all(len(lat.dense_ms) >= 2 * lat.placements for lat in record.latencies)
    dense = records["vision-dense"]
    assert {seed.quality_transfer_only for seed in dense.seeds} == {dense.dense_metrics["top1"]}
    assert records["vision-eugen"].costs[0].ffn_macs <= 0.3 * dense.costs[0].ffn_macs
    rows = (finished.folder / "reports/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(CELLS), "a row for each precision"
    assert "eugen" in (finished.folder / "reports/report.html").read_text()


def test_a_run_leaves_the_clone_as_it_was(finished):
    changed = {line.split()[-1] for line in git(finished.folder, "status", "--porcelain").splitlines()}
    assert changed <= {"params.yaml", "dvc.lock"}
    kept = {path.name.split("-")[0] for path in (finished.folder / ".work").rglob("progress/*")}
    assert kept <= {"scratch"}, "finished trainings serve other variants; other stages leave nothing"


def test_dvc_shows_metrics_parameters_and_plots(finished, tmp_path):
    metrics = json.loads(finished.run("dvc", "metrics", "show", "--json"))[""]["data"]
    assert {Path(name).stem for name in metrics} == set(CELLS)
    for shown in metrics.values():
        assert any(name.endswith("speedup") for name in json.dumps(shown["data"]).split('"'))
    changes = json.loads(finished.run("dvc", "params", "diff", "--json"))["params.yaml"]
    steps = changes["tasks.vision.transfer.refine_steps"]
    assert steps["new"] == TRANSFER["refine_steps"] != steps["old"]
    finished.run("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    assert "speed-up" in (tmp_path / "plots/index.html").read_text()


def test_a_second_run_does_nothing_and_a_new_method_is_the_only_work(clone):
    before = clone.outputs()
    assert "up to date" in clone.run("dvc", "repro").splitlines()[-1]
    assert clone.outputs() == before
    params = clone.params()
    params["methods"]["prune"] = {"layer": "prune"}
    clone.write_params(params)
    cells = {f"{verb}@vision-prune" for verb in ("transfer", "finetune", "profile")}
    assert cells <= set(clone.stale()) <= cells | {"report"}


def test_a_killed_transfer_is_taken_up_where_it_was(clone):
    done = clone.folder / "artifacts/transfer/vision/eugen"
    expected = {path.name: path.read_bytes() for path in done.iterdir()}
    # By force: DVC has the results of the first run in its cache and would bring them back.
    stage = ("dvc", "repro", "--single-item", "--force", "--no-run-cache", "transfer@vision-eugen")

    def kept() -> set[str]:
        return {path.stem for path in clone.folder.glob(".work/progress/transfer-vision-eugen-*/*.json")}

    clone.kill(stage, kept, "first unit of the transfer")
    units = {f"seed{seed}-budget0.3" for seed in TRANSFER["seeds"]}
    finished_units = kept()
    assert finished_units < units, "the kill came when everything was done"
    assert "seed0-budget0.3" in finished_units
    repair_rwlock(clone.folder, print)  # as `make bench` does first: the kill may have hit DVC in it
    said = clone.run(*stage)
    begun = {line.split(",")[0] for line in said.splitlines() if "budget0.3, " in line}
    assert begun == units - finished_units, "finished units are not done again"
    check_equal_transfer(done, expected)
    assert kept() == set() and clone.inhabitants() == []
    assert [path for path in done.parent.rglob(".*") if path.is_file()] == []


def test_a_killed_training_goes_on_from_its_checkpoint_with_the_same_curve(clone):
    written = clone.folder / "results/scratch/vision-narrow.json"
    expected = untimed_runs(written)
    assert len(expected) == 2 and all(len(run["curve"]) == SCRATCH_EPOCHS for run in expected)
    stage = ("dvc", "repro", "--single-item", "--force", "--no-run-cache", "scratch@vision-narrow")
    shutil.rmtree(clone.folder / ".work/progress")  # else the finished trainings would serve again

    def checkpoints() -> list[Path]:
        return list(clone.folder.glob(".work/progress/scratch-vision-narrow-*/*.pt"))

    clone.kill(stage, checkpoints, "first checkpoint of the training")
    (left,) = checkpoints()
    done = torch.load(left, weights_only=True)["curve"][-1]["step"]
    assert done < expected[0]["curve"][-1]["step"], "the kill came when everything was done"
    repair_rwlock(clone.folder, print)
    clone.run(*stage)
    assert untimed_runs(written) == expected
    assert checkpoints() == [] and clone.inhabitants() == []


def untimed_runs(path: Path) -> list[dict[str, Any]]:
    """The trainings of a record without the time that they took."""
    runs = json.loads(path.read_text())["runs"]
    for run in runs:
        run.pop("seconds")
        for point in run["curve"]:
            point.pop("seconds")
    return runs


def check_equal_transfer(folder: Path, expected: dict[str, bytes]) -> None:
    """The same weights, bit by bit, and the same numbers but for the time that they took."""
    assert {path.name for path in folder.iterdir()} == set(expected)

    def untimed(text: bytes) -> list[dict[str, Any]]:
        return [{k: v for k, v in unit.items() if k != "seconds"} for unit in json.loads(text)["units"]]

    assert untimed((folder / "record.json").read_bytes()) == untimed(expected["record.json"])
    for path in folder.glob("*.safetensors"):
        original = folder.parent / "original.safetensors"
        original.write_bytes(expected[path.name])
        ours, theirs = load_file(path), load_file(original)
        original.unlink()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_altered_data_are_noticed_and_brought_back(clone):
    path = clone.folder / "data/vision/images.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    stale = clone.stale()
    assert {"changed outs": {"data/vision": "modified"}} in stale["prepare@vision"]
    assert {"changed deps": {"data/vision": "modified"}} in stale["baseline@vision"]
    clone.run("dvc", "repro", "prepare@vision")
    assert path.read_bytes() == original
    assert clone.stale() == {}


def test_a_tracking_server_that_is_down_holds_up_nothing_and_loses_nothing(clone):
    def waiting() -> list[Path]:
        return list(clone.folder.glob(".work/outbox/*/end.json"))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    stage = ("stages.prepare", "--task", "vision")
    said = clone.run(*stage, EUGEN_TRACKING="on", MLFLOW_TRACKING_URI=nowhere)
    assert f"server {nowhere} unreachable" in said
    assert "work goes on" in said and "kept in .work/outbox, uploaded by the next run" in said
    assert (clone.folder / "data/vision/manifest.json").exists() and len(waiting()) == 1
    assert "unreachable" not in clone.run(*stage, EUGEN_TRACKING="on")
    assert waiting() == []
    with sqlite3.connect(clone.folder / "mlflow.db") as database:
        runs = database.execute(
            "select status from runs join tags using (run_uuid) where key = 'stage' and value = 'prepare'"
        ).fetchall()
    assert runs == [("FINISHED",), ("FINISHED",)]
