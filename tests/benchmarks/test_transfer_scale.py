"""The record of transfer at scale: small cases end to end, peaks of the cases' own processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import transfer_scale


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_cases_are_measured_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    ballast = bytearray(700 * 2**20)  # this process's own memory must not count
    ballast[::4096] = b"x" * len(ballast[::4096])
    out = tmp_path / "record.json"
    small = ["--tokens", "400", "--depth", "1", "--threads", "1", "--rows", "eugen", "--out", str(out)]
    assert transfer_scale.main(small) == 0
    record = json.loads(out.read_text())
    assert [(r["part"], r["row"]) for r in record["results"]] == [("block", "eugen"), ("network", "prune")]
    for result in record["results"]:
        assert 50e6 < result["peak_bytes"] < 1e9
        assert 0 < result["seconds"] < result["process_seconds"]
        assert result["met"]
    assert "goals met" in capsys.readouterr().out


def test_a_missed_goal_is_a_failure(tmp_path, monkeypatch):
    result = {"part": "block", "row": "prune", "seconds": 26.0, "peak_bytes": None, "r2": 0.5, "met": False}
    monkeypatch.setattr(transfer_scale, "_in_child", lambda *_: result)
    assert transfer_scale.main(["--network", "--rows", "prune", "--out", str(tmp_path / "r.json")]) == 1


@pytest.mark.parametrize("wrong", [["--tokens", "3"], ["--depth", "0"], ["--rows", "magic"]])
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit) as caught:
        transfer_scale.main(wrong)
    assert caught.value.code == 2
