"""results.csv: the columns of the architecture page, one row per key, each column as it is defined."""

from __future__ import annotations

import io
from statistics import fmean

import pandas as pd
import pytest

from stages.reporting.table import energy_ratio, results, to_csv

from . import factory

COLUMNS = [
    "task",
    "method",
    "budget",
    "seeds",
    "quality_name",
    "higher_is_better",
    "quality",
    "quality_ci95",
    "quality_dense",
    "quality_transfer_only",
    "params_ratio",
    "macs_ratio",
    "device",
    "dtype",
    "batch",
    "speedup",
    "speedup_ci95",
    "speedup_limit",
    "peak_memory_ratio",
    "energy_ratio",
    "limit_share",
    "quality_in_dtype",
    "transfer_seconds",
    "finetune_seconds",
    "provisional",
]


def test_columns_and_keys():
    frame = results(factory.all_cells())
    assert list(frame.columns) == COLUMNS
    key = ["task", "method", "budget", "device", "dtype", "batch"]
    assert not frame.duplicated(key).any()
    assert len(frame) == 2 * (1 + 7) + 2 * (1 + 7 * 2)


def test_csv_reads_back():
    frame = results(factory.all_cells())
    back = pd.read_csv(io.StringIO(to_csv(frame)))
    pd.testing.assert_frame_equal(back, frame, check_dtype=False, rtol=1e-8)


def test_quality_is_fine_tuned_where_fine_tuned():
    record = factory.cell("vision", "prune")
    frame = results([record]).set_index(["budget", "batch"])
    tuned = [s.quality_finetuned for s in record.seeds if s.budget == 0.3 and s.quality_finetuned is not None]
    alone = [s.quality_transfer_only for s in record.seeds if s.budget == 0.15]
    assert frame.loc[(0.3, 1), "quality"] == pytest.approx(fmean(tuned))
    assert frame.loc[(0.15, 1), "quality"] == frame.loc[(0.15, 1), "quality_transfer_only"]
    assert frame.loc[(0.15, 1), "quality"] == pytest.approx(fmean(alone))
    assert pd.isna(frame.loc[(0.15, 1), "finetune_seconds"])


def test_a_single_fine_tuned_seed_has_no_interval_and_is_provisional():
    record = factory.cell("embedding", "prune")
    seeds = [s if s.seed == 1 else s.model_copy(update={"quality_finetuned": None}) for s in record.seeds]
    row = results([record.model_copy(update={"seeds": seeds})]).to_dict("records")[0]
    assert row["seeds"] == 1
    assert pd.isna(row["quality_ci95"])
    assert row["provisional"]
    assert row["quality"] == seeds[1].quality_finetuned
    assert row["quality_transfer_only"] == pytest.approx(fmean(s.quality_transfer_only for s in seeds))


@pytest.mark.parametrize(
    "change",
    [{"provisional": True}, {"environment": factory.environment(dirty=True)}],
    ids=["profile", "dirty"],
)
def test_provisional_comes_from_profile_and_tree(change: dict):
    assert results([factory.cell("vision", "prune", **change)])["provisional"].all()
    assert not results([factory.cell("vision", "prune")])["provisional"].any()


def test_speed_and_cost_columns():
    record = factory.cell("embedding", "eugen")
    latency = record.latencies[1]
    row = results([record]).set_index("batch").loc[latency.batch]
    assert row["speedup"] == latency.speedup
    assert row["speedup_ci95"] == pytest.approx((latency.speedup_high - latency.speedup_low) / 2)
    assert row["peak_memory_ratio"] == latency.peak_bytes_method / latency.peak_bytes_dense
    assert pd.isna(row["energy_ratio"])
    metered = latency.model_copy(update={"joules_dense": 0.5, "joules_method": 0.2})
    assert energy_ratio(metered) == pytest.approx(0.4)
    assert row["macs_ratio"] == record.costs[0].macs / record.costs[0].macs_dense


def test_an_untimed_budget_keeps_its_row():
    frame = results([factory.cell("vision", "prune", latencies=[], costs=[])])
    assert frame["budget"].tolist() == [0.15, 0.3]
    assert frame[["device", "speedup", "params_ratio"]].isna().to_numpy().all()


def test_no_records_still_have_columns():
    assert to_csv(results([])).strip() == ",".join(COLUMNS)
