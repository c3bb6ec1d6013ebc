"""The benchmark of the layers at toy sizes: what it records, refuses and calls void. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import eugen
from benchmarks import layers, machine
from benchmarks.rows import CONTROL, Row, rows
from eugen.cost import count_macs
from eugen.layers.linear import LinearConfig, LinearLayer
from eugen.timing import PairedLatency
from tests.eugen.blocks import block, generator, tokens
from tests.tolerances import RELATIVE_RMS

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shapes", "1x32,5x48", "--seconds", "0", "--threads", "1"]


def run(out: Path, *arguments: str) -> dict:
    assert layers.main([*TINY, "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_one_run_measures_every_row_under_every_condition(tmp_path, capsys):
    record = run(tmp_path / "layers.json")
    page = capsys.readouterr().out
    assert (tmp_path / "layers.md").read_text() in page
    names = [row.name for row in rows(0.3)]
    assert {CONTROL, *eugen.layers()} <= set(names)
    for dtype in ("float32", "bfloat16"):
        for count, d in ((1, 32), (5, 48)):
            where = {"dtype": dtype, "tokens": count, "d": d}
            found = [r for r in record["results"] if where.items() <= r.items()]
            assert [r["row"] for r in found] == names
            assert f"## {dtype}, {count} × {d}" in page
    for result in record["results"]:
        if result["status"] == "timed":
            assert 0 < result["low"] <= result["speedup"] <= result["high"]
            assert result["of_limit"] == pytest.approx(result["speedup"] / result["limit_macs"])
            assert result["dense_ms"]["n"] == result["row_ms"]["n"] >= 10
        else:
            assert result["status"] == "refused", result
            assert result["reason"] in page.replace("\\|", "|")
    found = record["environment"]
    assert found["versions"]["torch"] == torch.__version__
    assert (found["threads"], found["device"]) == (1, "cpu")


def test_limits_follow_from_counted_products_and_stored_bytes(tmp_path):
    record = run(tmp_path / "layers.json", "--rows", "prune,eugen", "--dtype", "float32")
    dense = block(48, 192)
    x = tokens(1, 48)
    for name in ("prune", "eugen"):
        layer = eugen.layers()[name](budget=0.3).build(dense, generator=generator())
        (result,) = [r for r in record["results"] if r["row"] == name and r["d"] == 48]
        macs = count_macs(lambda: dense(x)), count_macs(lambda layer=layer: layer(x))
        stored = [sum(4 * t.numel() for t in (*m.parameters(), *m.buffers())) for m in (dense, layer)]
        assert result["limit_macs"] == pytest.approx(macs[0] / macs[1])
        assert result["weight_bytes"] == stored[1]
        rates = result["rates"]
        times = [
            max(5 * m / rates["macs_per_s"], b / rates["bytes_per_s"])
            for m, b in zip(macs, stored, strict=True)
        ]
        assert result["limit_roofline"] == pytest.approx(times[0] / times[1])
        assert (result["binds"] == "bytes") == (times[1] > 5 * macs[1] / rates["macs_per_s"])


@pytest.mark.parametrize(("ratio", "void"), [(1.0, False), (1.2, True), (0.8, True)])
def test_a_control_that_misses_one_voids_its_condition(monkeypatch, ratio, void):
    """Samples of a known ratio: spread alone does not void, a shifted control does, for every row."""
    noise = (0.01 * torch.randn(40, generator=generator(), dtype=torch.float64)).exp()
    latency = PairedLatency((ratio * noise).tolist(), [1.0] * 40)
    monkeypatch.setattr(layers, "compare", lambda *_, **__: latency)
    condition = layers.Condition(tokens=2, d=32, dtype="float32", device="cpu")
    results = layers.measure_all(condition, rows(0.3, ["prune"]), seconds=0)
    assert [r["row"] for r in results] == [CONTROL, "prune"]
    assert [r["void"] for r in results] == [void, void]
    assert results[0]["speedup"] == pytest.approx(ratio, rel=0.01)


def test_more_conditions_widen_the_controls_interval(monkeypatch):
    latency = PairedLatency(torch.linspace(0.5, 1.5, 40).tolist(), [1.0] * 40)
    monkeypatch.setattr(layers, "compare", lambda *_, **__: latency)
    condition = layers.Condition(tokens=2, d=32, dtype="float32", device="cpu")
    one, many = (layers.measure_all(condition, rows(0.3, []), 0, conditions=n)[0] for n in (1, 8))
    assert (one["confidence"], many["confidence"]) == (0.95, pytest.approx(1 - 0.05 / 8))
    assert many["low"] < one["low"] < one["high"] < many["high"]


class WrongLayer(LinearLayer):
    """Fast, but not what it is defined to be."""

    factor = 1.001

    def forward(self, x):
        return self.factor * super().forward(x)


class NotFinite(WrongLayer):
    factor = float("nan")


@dataclass(frozen=True, kw_only=True)
class Broken(LinearConfig):
    """A row whose layer is of the given class."""

    kind: type[LinearLayer] = WrongLayer

    def build(self, dense, *, generator):
        return self.kind(super().build(dense, generator=generator).readout)


@pytest.mark.parametrize("kind", [WrongLayer, NotFinite])
def test_a_row_that_fails_its_check_is_listed_not_timed(tmp_path, monkeypatch, capsys, kind):
    chosen = [*rows(0.3, ["linear"]), Row("broken", lambda: Broken(kind=kind))]
    monkeypatch.setattr(layers, "rows", lambda *_: chosen)
    out = tmp_path / "layers.json"
    assert layers.main([*TINY, "--dtype", "float32", "--out", str(out)]) == 1
    found = {r["row"]: r for r in json.loads(out.read_text())["results"]}
    assert found["linear"]["status"] == found[CONTROL]["status"] == "timed"
    assert found["broken"]["status"] == "failed"
    assert "speedup" not in found["broken"]
    assert "off its reference" in found["broken"]["reason"]
    assert "- broken: failed: ArithmeticError: forward is" in capsys.readouterr().out


def test_the_measured_form_is_checked_against_the_unmerged_definition():
    """A merge that loses the output matrix's bias is found, although both its own paths agree."""
    dense = block(48, 192)
    layer = eugen.EUGenConfig(budget=0.65, merge=False).build(dense, generator=generator()).eval()
    x = tokens(5, 48)
    with torch.no_grad():
        merged = layer.merged()
        assert layers.check(merged, layer, x) < 1e-5
        merged.readout.bias -= dense.down.bias
        with pytest.raises(ArithmeticError, match="off its reference"):
            layers.check(merged, layer, x)


def test_a_budget_too_small_is_a_refusal_with_its_reason(tmp_path):
    record = run(tmp_path / "layers.json", "--rows", "prune,linear", "--budget", "0.001")
    found = {r["row"]: r for r in record["results"]}
    assert found["prune"]["status"] == found["linear"]["status"] == "refused"
    assert "budget=0.001 is too small for 'prune'" in found["prune"]["reason"]


def test_layers_that_hold_another_one_are_measured_around_eugen(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Around(eugen.LayerConfig):
        of: eugen.LayerConfig | None = None

    registry = dict(eugen.LayerConfig.registry) | {"around": Around}
    monkeypatch.setattr(eugen.LayerConfig, "registry", registry)
    found = {row.name: row for row in rows(0.25)}
    assert found["around_of_eugen"].config() == Around(budget=0.25, of=eugen.EUGenConfig())
    assert "prune_of_eugen" not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "prune,prone"], "no row is called prone: use dense, "),
        (["--dtype", "float16"], "--dtype float16 is unknown: use float32, bfloat16"),
        (["--shapes", "1-384"], "'1-384' must be tokens x width, as in 1x384,128x768"),
        (["--shapes", "0x384"], "tokens and width must be at least 1"),
        (["--budget", "30"], "--budget 30.0 must be in (0, 1]"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--seconds", "inf"], "--seconds finite"),
        (["--device", "tpu"], "--device tpu is not here: use cpu, or cuda"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(layers, "measure_all", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        layers.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_tolerances_are_those_of_the_tests():
    coarsest = layers.TOLERANCES[torch.bfloat16]
    for dtype, tolerance in RELATIVE_RMS.items():
        if dtype != torch.float64:
            assert layers.TOLERANCES.get(dtype, coarsest) == tolerance, dtype


def test_both_commands_start_where_only_torch_is_installed():
    absent = ["numpy", "pandas", "pydantic", "typer", "scipy", "psutil", "jaxtyping", "stages", "flows"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "import benchmarks.estimator, benchmarks.layers as b\n"
    code += "b._rates(b.dense_block(b.Condition(1, 8, 'float32', 'cpu'), b.torch.Generator()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_records_name_code_and_machine_wherever_they_are_made(tmp_path, monkeypatch):
    here = machine.environment()
    monkeypatch.chdir(tmp_path)
    there = machine.environment()
    assert there["commit"] == here["commit"]
    assert len(here["commit"]) == 40
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    outside = machine.environment()
    assert (outside["commit"], outside["dirty"]) == ("unknown", True)


def test_a_broken_write_leaves_the_old_record(tmp_path):
    path = tmp_path / "record.json"
    machine.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        machine.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]
