"""How a cell's record is put together from what the stages left. The numbers are made up."""

from __future__ import annotations

import dataclasses
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages import params, profile, timings
from stages.data.verify import sha256_file
from stages.models import RECORD_FILE, unit_name
from stages.params import Params
from stages.tracking.record import PrecisionQuality
from stages.tracking.whole_file import write_json
from tests.reporting import factory

ROOT = Path(__file__).resolve().parents[2]
STUDY = params.load(ROOT / "params/study.yaml")
BASE = {"quality": {"top1": 0.97, "top5": 0.99}, "data_sha256": {"mnist": "ab"}}
UNITS = [unit_name(seed, budget) for seed in range(3) for budget in (0.3, 0.15)]
QUALITIES = {"float32": 0.8, "int8": 0.7}
TIMES = {
    "prepare": {"overhead": 2.0},
    "baseline": {"overhead": 3.0, "train": 80.0},
    "transfer": {"overhead": 4.0} | dict.fromkeys(UNITS, 2.5),
    "finetune": {"overhead": 5.0},
}


def moved(seed: int, budget: float, quality: float = 0.8) -> dict[str, Any]:
    """What transfer says of one unit."""
    return {
        "seed": seed,
        "budget": budget,
        "quality": quality,
        "validation": quality + 0.01,
        "closed_form": quality - 0.02,
        "extra": {"top5": 0.95},
        "fit_r2": [0.9, 0.8],
        "macs_ratio": [budget, budget],
        "num_features": [64, 64],
    }


def tuned(seed: int, budget: float, quality: float = 0.9) -> dict[str, Any]:
    """What fine-tuning says of one unit."""
    return {
        "seed": seed,
        "budget": budget,
        "quality": quality,
        "validation": quality + 0.02,
        "extra": {"top5": 0.97},
        "learning_rate": 3e-4,
        "trials": {"0": 0.8, "0.0003": 0.9},
    }


def test_transfer_and_fine_tuning_of_a_unit_stand_side_by_side():
    units = [moved(0, 0.3, 0.80), moved(1, 0.3, 0.81), moved(0, 0.15, 0.70)]
    results = profile.seed_results(BASE, units, [tuned(1, 0.3, 0.91), tuned(0, 0.3, 0.90)], TIMES, "top1")
    assert [(r.seed, r.budget) for r in results] == [(0, 0.3), (1, 0.3), (0, 0.15)]
    assert [r.quality_transfer_only for r in results] == [0.80, 0.81, 0.70]
    assert [r.quality_finetuned for r in results] == [0.90, 0.91, None]
    assert {r.quality_dense for r in results} == {0.97}
    assert [r.quality_closed_form for r in results] == pytest.approx([0.78, 0.79, 0.68])
    assert [r.validation_transfer_only for r in results] == pytest.approx([0.81, 0.82, 0.71])
    assert [r.validation_finetuned for r in results] == [pytest.approx(0.92), pytest.approx(0.93), None]


def test_what_was_not_fine_tuned_says_so():
    (result,) = profile.seed_results(BASE, [moved(0, 0.15)], [tuned(0, 0.3), tuned(1, 0.15)], TIMES, "top1")
    assert result.quality_finetuned is None and result.learning_rate is None
    assert result.extra_finetuned == {} and result.finetune_seconds == 0
    assert result.extra_transfer_only == {"top5": 0.95} and result.fit_r2 == [0.9, 0.8]


def test_flat_metrics_are_means_over_the_seeds_of_a_budget():
    units = [moved(0, 0.3, 0.80), moved(1, 0.3, 0.84), moved(0, 0.15, 0.70), moved(1, 0.15, 0.60)]
    seeds = profile.seed_results(BASE, units, [tuned(0, 0.3, 0.90), tuned(1, 0.3, 0.92)], TIMES, "top1")
    rng = random.Random(0)
    costs = [factory.cost(0.3), factory.cost(0.15)]
    latencies = [factory.latency(rng, "eugen", b, batch) for b in (0.3, 0.15) for batch in (1, 64)]
    cell = factory.cell("vision", "eugen", quality_name="top1", seeds=seeds, costs=costs, latencies=latencies)
    flat = profile.flat_metrics(cell)
    assert {name: flat.pop(name) for name in list(flat) if "top1" in name} == pytest.approx(
        {"top1_transfer_only": 0.82, "top1": 0.91, "b0.15.top1_transfer_only": 0.65}
    )
    prefix = {0.3: "", 0.15: "b0.15."}
    ratios = {f"{prefix[c.budget]}ffn_macs_ratio": c.ffn_macs / c.ffn_macs_dense for c in costs}
    ratios |= {f"{prefix[c.budget]}params_ratio": c.params / c.params_dense for c in costs}
    times = {}
    for lat in latencies:
        key = f"{prefix[lat.budget]}batch{lat.batch}."
        times[f"{key}speedup"] = lat.speedup
        times[f"{key}ms"] = statistics.median(lat.method_ms)
        times[f"{key}peak_memory_mb"] = lat.peak_bytes_method / 1e6
    assert flat == ratios | times


def test_flat_metrics_of_a_second_precision_have_names_of_their_own():
    lower = {"dtype": "int8", "least_ms_method": 2.0, "joules_method": 0.5, "method_ms": [4.0, 8.0, 5.0]}
    first = factory.latency(random.Random(0), "eugen", 0.3, 1)
    qualities = [PrecisionQuality(budget=0.3, dtype=name, quality=q) for name, q in QUALITIES.items()]
    cell = factory.cell(
        "vision",
        "eugen",
        costs=[factory.cost(0.3)],
        latencies=[first, first.model_copy(update=lower)],
        precisions=qualities,
    )
    flat = profile.flat_metrics(cell)
    assert flat["batch1.ms"] == statistics.median(first.method_ms)
    assert (flat["int8.batch1.ms"], flat["int8.batch1.limit_share"]) == (5.0, 0.4)
    assert flat["int8.batch1.energy_mj"] == 500.0 and "batch1.energy_mj" not in flat
    assert flat["int8.top-1"] == 0.7 and flat["top-1"] != 0.8, "the plain name is the mean over seeds"


class Cell:
    """One method of the vision task on disk, before its profile stage ends."""

    def __init__(self, method: str, seeds: list[int], tuned_seeds: list[int], budgets: list[float]) -> None:
        self.method = STUDY.method(method)
        units = [moved(seed, budget) for budget in budgets for seed in seeds]
        self.omitted = [{"budget": 0.01, "reason": "too small"}]
        later = [tuned(seed, budgets[0]) for seed in tuned_seeds]
        base = Path("artifacts/baseline/vision")
        write_json(base / RECORD_FILE, BASE)
        (base / "dense.safetensors").write_text("dense")
        for folder, stage_units in ((profile.TRANSFERRED, units), (profile.FINETUNED, later)):
            place = folder / "vision" / method
            made = {"units": stage_units, "omitted": self.omitted, "not_applicable": None}
            write_json(place / RECORD_FILE, made if folder == profile.TRANSFERRED else {"units": stage_units})
            for unit in stage_units:
                path = place / f"{unit_name(unit['seed'], unit['budget'])}.safetensors"
                path.write_text(f"{folder} {path.stem}")
        for stage, seconds in TIMES.items():
            timings.write(stage, "vision", method if stage in ("transfer", "finetune") else None, **seconds)
        self.costs = [factory.cost(budget) for budget in budgets]

    def record(self, settings: Params = STUDY):
        task: Any = SimpleNamespace(
            name="vision",
            quality_name="top1",
            higher_is_better=True,
            settings=SimpleNamespace(model_dump=lambda: settings.tasks["vision"]),
        )
        return profile.assemble(settings, task, self.method, self.costs, [], [], 6.0)


@pytest.fixture(autouse=True)
def clean_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write in, which counts as a clean checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile.environment, "environment", factory.environment)


def test_a_record_holds_what_every_stage_left():
    record = Cell("eugen", [0, 1, 2], [0, 1, 2], [0.3, 0.15]).record()
    assert (record.task, record.method, record.profile) == ("vision", "eugen", "study")
    assert record.dense_metrics == BASE["quality"] and record.train_seconds_dense == 80.0
    assert len(record.seeds) == 6 and len([s for s in record.seeds if s.quality_finetuned]) == 3
    assert record.params["method"] == {"layer": "eugen", "order": 2, "projection": "orthogonal"}
    assert record.params["task"] == STUDY.tasks["vision"]
    assert {seed.transfer_seconds for seed in record.seeds} == {2.5}
    overhead = {"prepare": 2.0, "baseline": 3.0, "transfer": 4.0, "finetune": 5.0, "profile": 6.0}
    assert record.stage_overhead_seconds == overhead
    assert record.data_sha256 == {"mnist": "ab"}
    assert [(omission.budget, omission.reason) for omission in record.omitted] == [(0.01, "too small")]
    assert {tuple(seed.num_features) for seed in record.seeds} == {(64, 64)}


def test_every_weight_file_is_in_the_record_by_its_hash():
    record = Cell("eugen", [0, 1], [0], [0.3]).record()
    places = {
        "dense": Path("artifacts/baseline/vision/dense.safetensors"),
        "transfer.seed0-budget0.3": profile.TRANSFERRED / "vision/eugen/seed0-budget0.3.safetensors",
        "transfer.seed1-budget0.3": profile.TRANSFERRED / "vision/eugen/seed1-budget0.3.safetensors",
        "finetune.seed0-budget0.3": profile.FINETUNED / "vision/eugen/seed0-budget0.3.safetensors",
    }
    assert record.weights_sha256 == {name: sha256_file(path) for name, path in places.items()}


@pytest.mark.parametrize(
    ("seeds", "tuned_seeds", "budgets", "provisional"),
    [
        ([0, 1, 2], [0, 1, 2], [0.3], False),
        ([0, 1, 2], [0, 1], [0.3, 0.15], False),
        ([0, 1, 2], [0], [0.3], True),  # the quality that is shown rests on one seed
        ([0, 1, 2], [], [0.3, 0.15], False),  # no fine-tuning at all: transfer is what is shown
        ([0], [], [0.3], True),
        ([0], [], [0.3, 0.15], True),  # two budgets of one seed are no two seeds
        ([0], [0], [0.3], True),
    ],
)
def test_a_single_seed_is_provisional(seeds, tuned_seeds, budgets, provisional):
    assert Cell("eugen", seeds, tuned_seeds, budgets).record().provisional is provisional


def test_a_dirty_tree_is_provisional(monkeypatch):
    cell = Cell("eugen", [0, 1], [0, 1], [0.3])
    assert not cell.record().provisional
    monkeypatch.setattr(profile.environment, "environment", lambda: factory.environment(dirty=True))
    assert cell.record().provisional


def test_a_profile_may_be_provisional_as_a_whole():
    run = STUDY.run.model_copy(update={"provisional": True})
    assert Cell("eugen", [0, 1], [0, 1], [0.3]).record(dataclasses.replace(STUDY, run=run)).provisional


def test_a_stage_that_has_not_run_is_named():
    cell = Cell("eugen", [0, 1], [0, 1], [0.3])
    (profile.FINETUNED / "vision/eugen" / RECORD_FILE).unlink()
    with pytest.raises(
        FileNotFoundError, match="artifacts/finetune/vision/eugen/record.json is missing: run"
    ):
        cell.record()
