"""What the stages make of a row that has no meaning for a task, and of a budget that buys nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import eugen
from stages import baseline, finetune, prepare, profile, transfer
from stages.tracking.record import CellRecord, NotApplicable

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "dense": {"layer": "dense"},
    "eugen": {"layer": "eugen"},
    "teacher": {"layer": "eugen", "projection": "teacher", "sharing": "powers", "direct_linear": True},
    "whole": {"layer": "eugen", "merge": False},
    "auto": {"layer": "auto"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells of the synthetic task at smoke size, each stage as DVC would run it."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("dvc.yaml", "eugen", "stages"):  # progress is keyed by the files that dvc.yaml names
        (folder / name).symlink_to(ROOT / name)
    chosen = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    chosen["tasks"] = {"kernel": chosen["tasks"]["kernel"]}
    tuned = {"budgets": [0.05, 0.3], "seeds": [0, 1], "steps": 1}
    chosen["tasks"]["kernel"]["finetune"] |= tuned
    chosen["methods"], chosen["scratch"] = METHODS, {"rows": {}, "tasks": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EUGEN_TRACKING", "off")
        prepare.prepare("kernel")
        baseline.baseline("kernel")
        for method in METHODS:
            for stage in (transfer.transfer, finetune.finetune, profile.profile):
                stage("kernel", method)
    return folder


def cell(folder: Path, method: str) -> dict[str, Any]:
    return json.loads((folder / f"results/cells/kernel-{method}.json").read_text())


def weights(folder: Path, stage: str, method: str) -> list[str]:
    return sorted(
        path.stem for path in (folder / "artifacts" / stage / "kernel" / method).glob("*.safetensors")
    )


def test_a_budget_that_buys_nothing_is_left_out_with_its_reason(folder):
    record = CellRecord.model_validate(cell(folder, "eugen"))
    (omission,) = record.omitted
    assert omission.budget == 0.05 and "the least is 0.079" in omission.reason
    assert {seed.budget for seed in record.seeds} == {0.3} == {cost.budget for cost in record.costs}
    made = ["seed0-budget0.3", "seed1-budget0.3"]
    assert weights(folder, "transfer", "eugen") == made == weights(folder, "finetune", "eugen")
    # m of two orders: 0.3 d^2 over (3 + 2) d
    assert {tuple(seed.num_features) for seed in record.seeds} == {(2 * int(0.3 * 64**2 / (5 * 64)),) * 6}
    assert all(seed.quality_finetuned is not None for seed in record.seeds)


def test_a_choice_for_each_block_is_recorded_and_restored(folder):
    """What fine-tuning and profiling load is the plan that transfer wrote, block by block."""
    record = CellRecord.model_validate(cell(folder, "auto"))
    made = json.loads((folder / "artifacts/transfer/kernel/auto/record.json").read_text())
    plans = [unit["plan"] for unit in made["units"] if unit["budget"] == 0.3]
    assert len(plans) == 2 and all(len(plan) == 6 for plan in plans)
    assert {layer["layer"] for plan in plans for layer in plan.values()} <= set(eugen.layers())
    (cost,) = [cost for cost in record.costs if cost.budget == 0.3]
    assert cost.ffn_macs <= 0.3 * cost.ffn_macs_dense
    assert record.params["method"] == {"layer": "auto", "target": "macs"}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("teacher", r"no budget of the task is enough: .*budget=0.3 is too small for 'eugen'"),
        ("whole", r"layer 'eugen' replaces whole blocks; this one has no output matrix"),
    ],
)
def test_a_row_that_does_not_apply_is_no_failure_and_no_number(folder, method, reason):
    record = NotApplicable.model_validate(cell(folder, method))
    assert (record.task, record.method, record.profile) == ("kernel", method, "smoke")
    assert re.search(reason, record.not_applicable)
    assert weights(folder, "transfer", method) == [] == weights(folder, "finetune", method)
    assert json.loads((folder / f"results/metrics/kernel-{method}.json").read_text()) == {}
    assert not (folder / "results/failures").exists()


def test_a_row_that_applies_everywhere_has_nothing_left_out(folder):
    assert cell(folder, "dense")["omitted"] == []
