"""The command at toy size: what it records and refuses. No time is judged."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from eugen.config import LayerConfig
from eugen.timing import Profile, Rates, profiler
from eugen.timing import __main__ as command
from eugen.timing.__main__ import main
from eugen.timing.clock import is_here
from eugen.timing.rows import parse_rows
from eugen.timing.self_check import Coverage, least_covered
from eugen.timing.subjects import load

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--threads", "1", "--placements", "3", "--pairs", "2", "--seconds", "0", "--energy-seconds", "0"]
TINY = [*QUICK, "--model", "mlp(width=16)"]


def test_one_run_from_end_to_end(tmp_path, capsys):
    out, traces = tmp_path / "record.json", tmp_path / "traces"
    layers = "narrow,compile,eugen,int8_of_eugen,fff,eugen(num_features=100000)"
    options = ["--layers", layers, "--batch", "1,3", "--scope", "model,ffn", "--budget", "0.5"]
    assert main([*TINY, *options, "--out", str(out), "--trace", str(traces)]) == 0
    record, page = Profile.read(out), capsys.readouterr().out
    assert out.with_suffix(".md").read_text() in page
    names = ["dense", "narrow", "compile", "eugen", "int8_of_eugen", "fff", "eugen(num_features=100000)"]
    assert [row.row for row in record.rows] == [name for name in names for _ in range(4)]
    for row in record.rows:
        assert (row.call, row.batch in (1, 3), row.part) == ("forward", True, row.scope)
        if row.row == names[-1]:
            assert row.status == "refused" and "num_features=100000" in str(row.reason)
            continue
        m = row.measured
        assert row.status == "timed" and m is not None, row.reason
        assert [len(p.base_ms) for p in m.samples.placements] == [2, 2, 2]
        assert m.of_limit == pytest.approx(m.limit_ms / m.row_ms)
        assert m.energy.reason == "not asked for"
        assert m.trace and json.loads(gzip.decompress(Path(m.trace).read_bytes()))["traceEvents"]
    assert len(list(traces.iterdir())) == 6 * 4
    by = {(row.row, row.batch, row.scope): row.measured for row in record.rows if row.measured}
    dense, eugen, compiled = (by[name, 3, "model"] for name in ("dense", "eugen", "compile"))
    assert dense.macs == compiled.macs == {"float32": 3 * 2 * 2 * 16 * 64}
    assert eugen.macs_limit == dense.macs["float32"] / eugen.macs["float32"] >= 2
    assert dense.weight_bytes == 2 * 4 * (2 * 16 * 64 + 16 + 64) > eugen.weight_bytes
    assert compiled.memory.allocated is None and dense.memory.allocated > dense.weight_bytes
    assert record.environment.versions["torch"] == torch.__version__
    assert (record.environment.threads, record.dtype, record.device) == (1, "float32", "cpu")


def test_a_row_that_breaks_is_listed_and_hides_no_other(tmp_path, monkeypatch, capsys):
    kind = LayerConfig.registry["low_rank"]

    def broken(self, dense, *, generator):
        raise RuntimeError("out of paint")

    monkeypatch.setattr(kind, "build", broken)
    out = tmp_path / "record.json"
    assert main([*TINY, "--layers", "low_rank,narrow", "--out", str(out)]) == 1
    found = {row.row: (row.status, row.reason) for row in Profile.read(out).rows}
    assert found["low_rank"] == ("failed", "RuntimeError: out of paint")
    assert found["narrow"] == ("timed", None) == found["dense"]
    assert "out of paint" in capsys.readouterr().out


@pytest.mark.parametrize("end", [0.0, 2.5, 3.5])
def test_rows_not_begun_in_time_are_cut_and_the_control_never_is(monkeypatch, end):
    """The clock moves with each measurement: time is up before, between and after a row's batches."""
    monkeypatch.setattr(profiler, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(profiler, "measure_rates", lambda *_: Rates(1e9, {"float32": 1e9}))
    now, real = [0.0], profiler._Bench._measure

    def measured(self, *arguments):
        now[0] += 1
        return real(self, *arguments)

    monkeypatch.setattr(profiler._Bench, "_measure", measured)
    quick = {"placements": 3, "pairs": 2, "seconds": 0.0, "energy_seconds": 0.0}
    settings = profiler.Settings(batches=(1, 3), total_seconds=end, **quick)
    found = profiler.profile_model(load("mlp(width=16)"), parse_rows("narrow,prune"), settings).rows
    assert [(row.row, row.batch) for row in found] == [
        (name, batch) for name in ("dense", "narrow", "prune") for batch in (1, 3)
    ]
    timed = max(2, math.ceil(end))
    assert [row.status for row in found] == ["timed"] * timed + ["cut"] * (6 - timed)
    assert all("were up" in str(row.reason) for row in found[timed:])


def test_a_device_too_small_for_a_row_is_no_fault_of_the_row(monkeypatch, tmp_path):
    def full(self, dense, *, generator):
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    monkeypatch.setattr(LayerConfig.registry["low_rank"], "build", full)
    out = tmp_path / "record.json"
    assert main([*TINY, "--layers", "low_rank", "--out", str(out)]) == 0
    last = Profile.read(out).rows[-1]
    assert (last.status, last.reason) == ("refused", "tried to allocate 40 GiB")


def test_a_compiled_row_must_give_what_the_eager_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda x: 1.01 * model(x))
    out = tmp_path / "record.json"
    assert main([*TINY, "--layers", "compile,narrow", "--out", str(out)]) == 1
    found = {row.row: row for row in Profile.read(out).rows}
    assert found["compile"].status == "failed" and "off its reference" in str(found["compile"].reason)
    assert found["narrow"].status == "timed"


def test_language_model_prefills_and_decodes(tmp_path):
    gpt = "stages.networks.gpt:GPT(vocabulary=50,context=12,width=16,depth=2,heads=2)"
    out = tmp_path / "record.json"
    options = ["--model", gpt, "--input", "ids:12:50", "--calls", "prefill,decode", "--scope", "ffn"]
    assert main([*QUICK, *options, "--layers", "narrow", "--dtype", "bfloat16", "--out", str(out)]) == 0
    macs = {(row.row, row.call): row.measured.macs for row in Profile.read(out).rows if row.measured}
    assert macs["dense", "decode"] == {"bfloat16": 2 * 2 * 16 * 64}
    assert macs["dense", "prefill"] == {"bfloat16": 12 * 2 * 2 * 16 * 64}


class OfBatch(nn.Module):
    """Takes a dictionary, as models of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, batch: dict) -> torch.Tensor:
        return self.net(batch["x"]) * batch["kept"]


def of_batch() -> tuple[nn.Module, object]:
    return OfBatch(), lambda batch: {
        "x": torch.ones(batch, 8),
        "kept": torch.ones(batch, 1, dtype=torch.int64),
    }


def test_inputs_of_several_tensors_get_the_dtype_of_the_model(tmp_path, capsys):
    out = tmp_path / "record.json"
    model = [*QUICK, "--model", f"{__name__}:of_batch", "--dtype", "bfloat16"]
    assert main([*model, "--layers", "narrow", "--out", str(out)]) == 0
    assert [row.status for row in Profile.read(out).rows] == ["timed", "timed"]
    assert main([*model, "--self-check", "1"]) in (0, 1)


def test_the_table_is_printed_whatever_becomes_of_its_files(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main([*TINY, "--layers", "narrow", "--out", str(tmp_path / "file" / "record.json")])
    assert "| narrow " in capsys.readouterr().out


def test_samples_are_refused_before_any_work_where_pyarrow_is_not(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([*TINY, "--samples", "samples.parquet"])
    assert "needs pyarrow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "here"),
    [("cpu", True), ("cuda", True), ("cuda:1", True), ("cuda:2", False), ("cuda:x", False), ("cpu:0", False)],
)
def test_devices_that_torch_sees(monkeypatch, device, here):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert is_here(device) is here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert is_here(device) is (device == "cpu")


def test_self_check_counts(capsys):
    assert main([*TINY, "--self-check", "2", "--confidence", "0.9999"]) in (0, 1)
    found = capsys.readouterr()
    assert "of 2 intervals cover 1" in found.out and len(found.err.splitlines()) == 2


def test_coverage_by_hand():
    over, under, wide = (1.1, 1.05, 1.2), (0.9, 0.8, 0.95), (1.0, 0.5, 2.0)
    found = Coverage([over, wide, under, over], [wide, wide, over, wide], 0.95)
    assert (found.covered, found.covered_unplaced, found.agreements) == (1, 3, (1, 2))


@pytest.mark.parametrize(
    ("repetitions", "confidence"), [(1, 0.95), (6, 0.95), (40, 0.95), (40, 0.5), (100, 0.99)]
)
def test_fewest_that_must_cover(repetitions, confidence):
    least = least_covered(repetitions, confidence)
    assert stats.binom.cdf(least - 1, repetitions, confidence) <= 0.05
    assert stats.binom.cdf(least, repetitions, confidence) > 0.05


def test_list_names_what_there_is(capsys):
    assert main(["--list"]) == 0
    assert "int8_of_eugen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "nothing"], "no row is called 'nothing'"),
        (["--model", "nothing"], "--model 'nothing' must be"),
        (["--calls", "decode"], "ids:TOKENS:VOCABULARY"),
        (["--calls", "sing"], "--calls sing is unknown"),
        (["--scope", "all"], "--scope all is unknown"),
        (["--pairs", "7"], "--pairs 7 must be even"),
        (["--placements", "2"], "--placements 2 must be at least 3"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--batch", "x"], "--batch"),
        (["--budget", "1.5"], "--budget 1.5 must be in (0, 1]"),
        (["--confidence", "1"], "--confidence 1.0 must be"),
        (["--threads", "0"], "--threads 0 must be"),
        (["--device", "tpu"], "--device tpu is not here"),
        (["--device", "cuda:99"], "--device cuda:99 is not here"),
        (["--seconds", "nan"], "--seconds nan must be finite"),
        (["--energy-seconds", "-1"], "--energy-seconds -1.0 must be finite, at least 0"),
        (["--cuda-graph"], "--cuda-graph needs --device cuda"),
        (["--out", "record.txt"], "must end in .json"),
        (["--self-check", "0"], "--self-check 0 must be"),
    ],
)
def test_wrong_options_stop_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_runs_where_only_torch_is_installed(tmp_path):
    absent = [
        "numpy",
        "pandas",
        "pydantic",
        "typer",
        "scipy",
        "psutil",
        "jaxtyping",
        "pyarrow",
        "timm",
        "stages",
    ]
    command = [*TINY, "--layers", "eugen", "--out", str(tmp_path / "record.json")]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += f"from eugen.timing.__main__ import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    helped = subprocess.run(
        [sys.executable, "-m", "eugen.timing", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert helped.returncode == 0
    for word in ("examples:", "prefill", "--cuda-graph", "--l2-cold", "--self-check 40", "perfetto"):
        assert word in helped.stdout
