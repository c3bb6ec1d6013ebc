"""Errors during a regression run: a library's become a verdict, anything else an exit code of its own."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime

import pytest

from benchmarks.machine import ROOT
from benchmarks.regression import __main__ as command_line
from benchmarks.regression import compare, record, verdict
from benchmarks.regression.sampling import Limits
from benchmarks.regression.worktree import candidate
from tests.benchmarks.test_regression import edit, new_clone

ONE_CALL = """        if self.out_features == 256:
            type(self).calls += 1
            if self.calls > 1:
                raise ValueError('out of calls')
"""


@pytest.mark.parametrize("side", ["base", "candidate"])
def test_a_layer_that_cannot_be_called_is_a_verdict(tmp_path, monkeypatch, side):
    """Fits are narrower and run. Of the network that is timed, a process can make one call: the first case
    fails in a later one, the second in its first; the third is measured as ever."""
    shutil.copytree(ROOT / "eugen", tmp_path / "eugen", ignore=shutil.ignore_patterns("__pycache__"))
    line = "        y = linear_of_parts(self.readout, self.map(x.reshape(-1, self.in_features)))\n"
    layer = tmp_path / "eugen/layers/eugen.py"
    edit(layer, line, ONE_CALL + line)
    edit(layer, "    def merged(self) -> EUGen:", "    calls = 0\n\n    def merged(self) -> EUGen:")
    monkeypatch.setattr(compare, "SEEDS", (0, 1))
    trees = compare.Trees(**{"base": ROOT, "candidate": ROOT} | {side: tmp_path})
    names = ["eugen-1", "univariate-128", "dense-128"]
    *refused, dense = compare.compare(trees, names, Limits(16, 0.2), lambda _: None)
    for found in refused:
        assert "ValueError: out of calls" in found["reason"] and found["latency"] is found["control"] is None
        if side == "base":
            assert found["verdict"] == found["noise_free"] == "pass" and "new: nothing" in found["reason"]
        else:
            assert found["verdict"] == found["noise_free"] == "fail"
            assert "the candidate cannot" in found["reason"]
    assert refused[0]["exact"]["macs"] and refused[0]["quality"], "what was found before is kept"
    assert refused[1]["exact"] is refused[1]["quality"] is None
    assert dense["latency"]["pairs"] > 0


def test_an_error_that_nobody_foresaw_is_no_fail(tmp_path, monkeypatch, capsys):
    """Of saving: the table is printed all the same. Of anything else: named, with its traceback."""
    project = tmp_path / "clone"
    project.mkdir()
    new_clone(project, {"eugen/x.py": "1"})
    revision = candidate(project)
    monkeypatch.setattr(
        command_line,
        "run",
        lambda *_: record.make(
            base=revision,
            candidate=revision,
            injected=0.0,
            settings={},
            begun=datetime.now(UTC),
            judged=verdict.Finding(verdict.PASS, "no worse"),
            cases=[],
        ),
    )
    (tmp_path / "full").write_text("no folder")
    arguments = ["--base", "HEAD", "--project", str(project)]
    assert command_line.main([*arguments, "--out", str(tmp_path / "full")]) == 5
    out, err = capsys.readouterr()
    assert "PASS: no worse" in out and "Traceback" in err
    assert err.splitlines()[-1].startswith("ended by an error, not by a verdict: ") and "full" in err
    monkeypatch.setattr(command_line, "run", lambda *_: {}["key"])
    assert command_line.main(arguments) == 5
    assert capsys.readouterr().err.splitlines()[-1].endswith("KeyError: 'key'")
