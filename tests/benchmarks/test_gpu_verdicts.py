"""Goals on a GPU follow from a record's numbers, and the ledger says of them what the record says."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.gpu_check import tables
from benchmarks.gpu_check.record import FOLDER
from benchmarks.gpu_check.verdicts import verdicts
from stages.reporting import gpu
from stages.reporting.inputs import ReportError
from stages.reporting.ledger import ledger
from tests.benchmarks.conftest import form, profile, row

VIT = "timm:vit_base_patch16_224"


def said(record: dict | None) -> list[str]:
    return [verdict.verdict for verdict in verdicts(record)]


def test_a_record_that_meets_every_goal(measured):
    found = verdicts(measured)
    assert [v.verdict for v in found] == ["met"] * 8
    assert [(v.goal, v.measured, v.low) for v in found[:2]] == [(1.3, 1.5, 1.4), (0.8, 0.9, None)]
    assert [(v.goal, v.measured, v.low) for v in found[4:6]] == [(1.5, 2.0, 1.9), (0.3, 0.4, None)]
    assert "d=768" in found[0].what
    assert "d=1024" in found[2].what
    assert ["batch 64" in v.what for v in found[4:]] == [True, True, False, False]
    page = tables.markdown(measured)
    assert page.count("| met ") == 8
    assert "## Cut" not in page
    assert "## Failed" not in page


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda r: r["forms"][1].update(speedup=1.35, low=1.29), [0]),  # the interval, and the worst size
        (lambda r: r["forms"][3].update(of_limit=0.79), [3]),
        (lambda r: r["models"][0]["rows"][2]["measured"].update(speedup=1.55, low=1.49), [4]),
        (lambda r: r["models"][0]["rows"][2]["measured"]["memory"].update(allocated=701 * 10**6), [5]),
        (lambda r: r["models"][0]["rows"][1]["measured"]["memory"].update(allocated=800 * 10**6), [7]),
    ],
)
def test_one_number_below_its_goal_misses_that_one_alone(measured, change, missed):
    change(measured)
    assert said(measured) == ["not met" if i in missed else "met" for i in range(8)]


@pytest.mark.parametrize(
    ("change", "open_"),
    [
        (lambda r: r.update(quick=True), range(8)),
        (lambda r: r.update(device="cpu"), range(8)),
        (lambda r: r.update(forms=[]), range(4)),
        (lambda r: [f.update(cuda_graph=False) for f in r["forms"]], range(4)),
        (lambda r: [f.update(dtype="float32") for f in r["forms"]], range(4)),
        (lambda r: [f.update(tokens=2048) for f in r["forms"]], range(4)),
        (lambda r: [f.update(status="failed") for f in r["forms"][:2]], range(2)),
        (lambda r: r["forms"][1].update(status="failed"), range(2)),  # the other size answers nothing alone
        (lambda r: r["forms"].pop(), range(2, 4)),
        (lambda r: r.update(models=[]), range(4, 8)),
        (lambda r: r["models"][0].update(dtype="float32"), range(4, 8)),
        (lambda r: r["models"][0].update(model="timm:vit_tiny_patch16_224"), range(4, 8)),
        (lambda r: r["models"][0]["settings"].update(cuda_graph=True), range(4, 8)),
        (lambda r: r["models"][0]["settings"].update(budget=0.5), range(4, 8)),
        (lambda r: r["models"][0]["rows"][0]["measured"].update(low=1.01), range(4, 6)),  # void
        (lambda r: r["models"][0]["rows"][3].update(measured=None, status="cut"), range(6, 8)),
        (lambda r: r["models"][0]["rows"][3]["measured"]["memory"].update(allocated=None), [7]),
    ],
)
def test_what_no_number_answers_is_not_measured(measured, change, open_):
    change(measured)
    assert said(measured) == ["not measured" if i in open_ else "met" for i in range(8)]


def test_a_later_profile_does_not_take_the_place_of_the_first(measured):
    again = profile(VIT, "bfloat16", [row("dense", 64, 1.3, 1), row("eugen", 64, 1.0, 1)])
    measured["models"].append(again)
    assert said(measured) == ["met"] * 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    return FOLDER


def rows_of(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_without_a_record_every_goal_is_open_with_its_command(folder):
    found = rows_of(gpu.goals())
    assert len(found) == 8
    assert {tuple(cells[2:]) for cells in found} == {("–", "needs a GPU: `make gpu-check`", "open")}
    text = ledger([])
    assert "## Goals on a GPU" in text
    assert text.count("needs a GPU: `make gpu-check`") == 8


def test_the_ledger_quotes_the_last_record_of_each_gpu(folder, measured):
    old, other = copy.deepcopy(measured), copy.deepcopy(measured)
    old["date"], old["forms"] = "2026-01-01", [form(768, 4096, speedup=1.1, low=1.0)]
    other["environment"]["accelerator"] = "NVIDIA A100"
    other["models"] = []
    quick = copy.deepcopy(measured) | {"quick": True, "date": "2027-01-01"}
    for name, record in {"z-old": old, "a-new": measured, "other": other, "quick": quick}.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    found = rows_of(gpu.goals())
    by = {name: [cells[-1] for cells in found if name in cells[3]] for name in ("H200", "A100")}
    assert by == {"H200": ["met"] * 8, "A100": ["met"] * 4 + ["open"] * 4}
    assert any("2026-11-21, cccccccccc" in cells[3] and "1.50, at least 1.40" in cells[2] for cells in found)


def test_numbers_of_uncommitted_code_do_not_count(folder, measured):
    measured["environment"]["dirty"] = True
    (folder / "x.json").write_text(json.dumps(measured))
    found = rows_of(gpu.goals())
    assert {(cells[2], cells[4]) for cells in found} == {("–", "open")}
    assert all("from a clean commit" in cells[3] for cells in found)


def test_a_broken_record_is_an_error_with_its_cure(folder):
    (folder / "x.json").write_text("{")
    with pytest.raises(ReportError, match=r"x\.json: no record of .*restore it with `git checkout"):
        gpu.goals()
