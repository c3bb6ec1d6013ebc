"""The record of levels and rows: the real command on a small network, and what it says of a failure."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from benchmarks import transfer_levels
from tests.eugen.blocks import tokens

NETWORK = "tests.eugen.models:chain"


@pytest.mark.slow
def test_a_level_and_a_row_are_measured_by_the_command(tmp_path, capsys):
    save_file({"x": tokens(2000, 12)}, tmp_path / "x.safetensors")
    inputs = str(tmp_path / "x.safetensors")
    words = [NETWORK, "--data", inputs, "--levels", "fast", "--rows", "auto", "--budget", "0.5"]
    out = tmp_path / "record.json"
    assert transfer_levels.main([*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["settings"] == {"model": NETWORK, "data": "x.safetensors", "budget": 0.5}
    (result,) = record["results"]
    assert (result["level"], result["row"]) == ("fast", "auto")
    assert 0 < result["choice_seconds"] < result["seconds"]
    assert 0 < result["transfer_seconds"] < result["seconds"]
    assert result["macs"] == pytest.approx(0.5, abs=0.1)
    assert capsys.readouterr().out.count("| fast") == 1


def test_other_levels_and_rows_stay_in_the_record(tmp_path, monkeypatch):
    def measure(level, row, options):
        quality = {"main": "cosine", "cosine": len(seen)}
        latency = {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
        seen.append((level, row))
        found = {"level": level, "row": row, "seconds": 1.0, "choice_seconds": 0.0, "tokens": 1}
        return found | {"quality": quality, "parameters": 1.0, "latency": latency}

    def record(*words):
        transfer_levels.main([NETWORK, "--data", "x.npy", *words, "--out", str(tmp_path / "record.json")])
        results = json.loads((tmp_path / "record.json").read_text())["results"]
        assert all(result["environment"]["cores"] for result in results)
        return [(result["level"], result["row"], result["quality"]["cosine"]) for result in results]

    seen = []
    monkeypatch.setattr(transfer_levels, "measure", measure)
    assert record("--levels", "best", "fast", "--rows", "auto") == [("fast", "auto", 1), ("best", "auto", 0)]
    assert record("--levels", "fast", "--rows", "auto", "prune") == [
        ("fast", "prune", 3),
        ("fast", "auto", 2),
        ("best", "auto", 0),
    ]
    assert record("--levels", "fast", "--rows", "prune", "--budget", "0.2") == [("fast", "prune", 4)]


def test_a_failed_command_is_named(tmp_path):
    words = [NETWORK, "--data", str(tmp_path / "missing.npy"), "--levels", "fast", "--rows", "prune"]
    with pytest.raises(SystemExit, match="level fast, row prune: the command ended with status 2"):
        transfer_levels.main([*words, "--out", str(tmp_path / "record.json")])
    assert not (tmp_path / "record.json").exists()
