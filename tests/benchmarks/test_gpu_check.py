"""`make gpu-check` at toy sizes on a CPU: what it records, cuts, refuses and concludes. No time is judged."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eugen
from benchmarks import layers
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import blocks, models, record, tables
from benchmarks.gpu_check.budget import Outcome, Part, TimeUp, run_parts
from benchmarks.gpu_check.models import Unit
from benchmarks.kernel_cases import small_cases
from benchmarks.rows import rows
from eugen.timing import Profile
from eugen.timing.rows import parse_rows

ROOT = Path(__file__).resolve().parents[2]
NOW = float("inf")


def nothing(outcome: Outcome, deadline: float) -> None:
    """A part without work."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command with parts of the test's own, the others empty: its status and the record."""

    def ran(*arguments: str, **parts) -> tuple[int, dict]:
        own = [Part(name, 10, parts.get(name, nothing)) for name in record.PARTS]
        monkeypatch.setattr(command, "quick_parts", lambda device: own)
        out = tmp_path / "check.json"
        status = command.main(["--device", "cpu", "--quick", "--threads", "1", "--out", str(out), *arguments])
        return status, record.read(out)

    return ran


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_end_to_end_at_toy_size(tmp_path, capsys):
    pytest.importorskip("timm")
    out = tmp_path / "check.json"
    arguments = ["--device", "cpu", "--quick", "--threads", "1", "--out", str(out)]
    assert command.main(arguments) == 0, capsys.readouterr().out
    found, page, printed = record.read(out), out.with_suffix(".md").read_text(), capsys.readouterr().out
    assert all(part["status"] == "done" for part in found["parts"]), found["parts"]
    assert [k["status"] for k in found["kernels"]] == ["passed"] * len(small_cases())
    assert found["tests"][0]["status"] == "passed"
    assert " passed" in found["tests"][0]["said"]
    assert {r["row"] for r in found["layers"]} == {row.name for row in rows(0.3)}
    vit, gpt, nerf, compiled = found["models"]
    timed = {row["row"] for row in vit["rows"] if row["status"] == "timed"}
    assert {"dense", "eugen", "prune", "int8_of_eugen", "eugen(kernel=fused)", "fff", "moe"} <= timed
    assert {row["row"] for row in vit["rows"]} == {"dense", *models.eager_rows()}
    assert {row["call"] for row in gpt["rows"]} == {"prefill", "decode"}
    assert "RadianceField" in nerf["model"]
    assert compiled["rows"][-1]["row"] == "compile_of_eugen"
    assert compiled["rows"][-1]["measured"]["check_error"] < 1e-4
    for profile in found["models"]:
        assert all(row["status"] in ("timed", "refused") for row in profile["rows"])
        assert all(row["measured"]["memory"] for row in profile["rows"] if row["measured"])
    assert page.count("not measured") == 8
    assert page.endswith(printed[printed.index("## Goals") : printed.index(str(out))].strip() + "\n")


def test_what_was_found_before_time_ran_out_is_written_and_the_rest_is_named(run):
    def endless(outcome: Outcome, deadline: float) -> None:
        outcome.results.append({"case": "one", "status": "passed", "of_allowed": 0.1})
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # what a row's own handler does
                pytest.fail("time up was taken for a fault")

    status, found = run("--seconds", "0.3", kernels=endless)
    assert status == 0
    assert found["kernels"] == [{"case": "one", "status": "passed", "of_allowed": 0.1}]
    assert [part["status"] for part in found["parts"]] == ["cut"] * 5
    assert [part["cut"] for part in found["parts"]] == [["stopped: time was up"], *[["not begun"]] * 4]


def test_a_request_to_end_is_time_up_and_handlers_are_put_back():
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGALRM)]
    waiting = signal.setitimer(signal.ITIMER_REAL, 100)

    def asked(outcome: Outcome, deadline: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    outcomes = run_parts([Part("a", 1, nothing), Part("b", 1, asked), Part("c", 1, nothing)], 60)
    assert [o.status for o in outcomes.values()] == ["done", "cut", "cut"]
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.setitimer(signal.ITIMER_REAL, *waiting)[0] == pytest.approx(100, abs=15)


def test_a_part_that_breaks_fails_the_command_and_hides_no_other(run, capsys):
    def broken(outcome: Outcome, deadline: float) -> None:
        raise RuntimeError("out of paint")

    status, found = run(kernels=broken)
    assert status == 1
    assert [part["status"] for part in found["parts"]] == ["failed", *["done"] * 4]
    assert "- kernels: RuntimeError: out of paint" in capsys.readouterr().out


def test_time_that_a_part_leaves_goes_to_the_next():
    ends = []
    parts = [Part(name, 5, lambda _, end: ends.append(end - time.perf_counter())) for name in "abc"]
    run_parts(parts, 12)
    assert ends == pytest.approx([5, 10, 12], abs=0.5)


def test_fused_and_composed_are_the_same_layer_in_both_forms(monkeypatch):
    """As if the kernel ran here: the operator is called by one side alone, and both have one limit."""
    monkeypatch.setattr(blocks, "lack", lambda *_: None)
    seen = []
    real = blocks.compare_models

    def watched(base, other, **options):
        for make in (base, other):
            with torch.no_grad(), torch.profiler.profile() as trace:
                make()()
            seen.append(sum(e.count for e in trace.key_averages() if e.key == "eugen::feature_map"))
        return real(base, other, **options)

    monkeypatch.setattr(blocks, "compare_models", watched)
    outcome, shape = Outcome(), blocks.Shape(7, 48, "float32")
    effort = blocks.Effort(placements=3, pairs=2, seconds=0.0)
    blocks.compare_forms(outcome, NOW, [shape], "cpu", effort)
    (result,) = outcome.results
    assert result["status"] == "timed", result
    assert seen == [0, blocks.CALLS]
    assert result["of_limit"] == pytest.approx(result["limit_ms"] / result["fused_ms"])
    assert result["low"] <= result["speedup"] <= result["high"]
    monkeypatch.undo()
    blocks.compare_forms(outcome, NOW, [shape], "cpu", effort)
    assert outcome.results[1]["status"] == "refused"
    assert "on cpu, not on an NVIDIA GPU" in outcome.results[1]["reason"]
    assert outcome.failed == []


def test_rows_of_the_kernel_have_a_meaning_only_where_it_runs(monkeypatch):
    condition = layers.Condition(tokens=2, d=32, dtype="float32", device="cpu")
    chosen = rows(0.3, ["eugen_fused", "eugen_composed"])
    found = layers.measure_all(condition, chosen, 0)
    assert [r["status"] for r in found] == ["timed", "refused", "refused"]
    assert "the fused kernel does not run here" in found[1]["reason"]
    monkeypatch.setattr(layers, "lack", lambda *_: None)
    found = layers.measure_all(condition, chosen, 0)
    assert [r["status"] for r in found] == ["timed"] * 3
    assert [("kernel='fused'" in r["config"], "kernel='composed'" in r["config"]) for r in found[1:]] == [
        (True, False),
        (False, True),
    ]
    late = layers.measure_all(condition, chosen, 0, deadline=0.0)
    assert [r["status"] for r in late] == ["timed", "cut", "cut"]
    assert len(tables.sections(late)) > 3


def test_every_row_is_asked_for_in_both_dtypes_on_each_model():
    units = models.full_units()
    for unit in units:
        parse_rows(",".join(unit.rows))  # refuses unknown names
    for model, batches in ((models.VIT, {1, 64, 256}), (models.GPT, {8}), (models.NERF, {4096})):
        for dtype in ("bfloat16", "float32"):
            of = [
                u
                for u in units
                if (u.model, u.dtype) == (model, dtype) and list(u.rows) == models.eager_rows()
            ]
            assert {batch for unit in of for batch in unit.batches} == batches
        assert any(u.rows == models.COMPILED for u in units if u.model == model)
    assert {*eugen.layers(), "int8_of_eugen", "bf16_of_eugen"} - {"dense"} <= set(models.eager_rows())
    assert {call for u in units if u.model == models.GPT for call in u.calls} == {"prefill", "decode"}
    assert len({unit.name for unit in units}) == len(units)


def test_the_parts_fit_into_nine_minutes():
    parts = command.full_parts("cpu")
    assert tuple(part.name for part in parts) == record.PARTS
    assert sum(part.seconds for part in parts) <= command.SECONDS < 9 * 60 - 30


def test_the_models_have_the_papers_sizes():
    for spec, given, size in ((models.GPT, models.IDS, 124.4e6), (models.NERF, models.RAYS, 2 * 0.59e6)):
        subject = models.load(spec, given)
        count = sum(p.numel() for p in subject.model.parameters())
        assert count == pytest.approx(size, rel=0.02)
        assert len(eugen.find_ffns(subject.model)) == (12 if spec == models.GPT else 6)


def test_units_that_break_end_late_or_are_stopped_are_named(monkeypatch):
    tiny = {"placements": 3, "pairs": 2, "seconds": 0.0, "energy_seconds": 0.0}
    bad = Unit("mlp(colour=1)", None, "float32", ("eugen",), 10, settings=tiny)
    good = Unit("mlp(width=16,depth=1)", None, "float32", ("eugen", "low_rank"), 60, settings=tiny)
    outcome, real, said = Outcome(), models.profile_model, []

    def slow(subject, rows, settings, progress):
        assert 0 < settings.total_seconds <= 70

        def stopped(profile):
            progress(profile)
            if profile.rows[-1].row == "eugen":
                raise TimeUp

        return real(subject, rows, settings, stopped)

    monkeypatch.setattr(models, "profile_model", slow)
    with pytest.raises(TimeUp):
        models.profile_units(outcome, NOW, [bad, good, good], "cpu", said.append)
    assert "colour" in outcome.failed[0]
    assert [line.partition(": ")[2] for line in outcome.cut] == ["stopped", "not begun"]
    (measured,) = outcome.results
    assert [row.row for row in Profile.of(measured).rows] == ["dense", "eugen"], "what was measured stays"
    assert len(said) == 2
    late = Outcome()
    models.profile_units(late, 0.0, [good], "cpu", print)
    assert late.cut == [f"{good.name}: not begun"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "format 2"),
        (("quick",), "yes", "quick='yes'"),
        (("surprise",), 1, "surprise"),
        (("parts", 0, "part"), "colours", "colours"),
        (("kernels", 0, "status"), "fine", "status 'fine'"),
        (("forms", 0, "low"), 3.0, "is not around it"),
        (("models", 0), {"format": 9}, "format 9 is not 1"),
    ],
)
def test_a_record_that_is_none_is_refused_by_name(path, value, message, measured, tmp_path):
    inner = measured
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(measured))
    with pytest.raises(ValueError, match=r"broken\.json: no record of `make gpu-check`") as fault:
        record.read(file)
    assert message in str(fault.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --quick"),
        (["--device", "tpu"], "needs an NVIDIA GPU; try --device cpu --quick"),
        (["--device", "cpu", "--quick", "--seconds", "900"], "at most 500"),
        (["--device", "cpu", "--quick", "--out", "x.md"], "must end in .json"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_starts_where_only_torch_is_installed():
    absent = ["numpy", "pandas", "pydantic", "typer", "scipy", "jaxtyping", "pytest", "timm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "import benchmarks.gpu_check.__main__ as m; from benchmarks.gpu_check import models\n"
    code += "[models.load(u.model, u.given) for u in models.quick_units()[1:3]]; m.full_parts('cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_toy_sizes_never_go_where_records_are_committed():
    assert command._parse(["--device", "cpu", "--quick"]).out.parent == record.QUICK_FOLDER
    assert copy.copy(record.FOLDER) == Path("reports", "gpu")
