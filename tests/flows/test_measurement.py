"""The measurement as a child, its base and its mirror, with stubs in place of the programs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.clone import WrongParameters
from flows.regression.flow import mirror, resolve, state_of
from flows.regression.measurement import CODES, measure
from flows.regression.verdict_page import headline, page
from tests.flows.toy import gone, place_program, wait_for
from tests.regressions import case, record

BASELINE = "stages/tracking/baseline.py"
STUB = Path(__file__).with_name("regression_stub.py")
Behave = Callable[..., None]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    place_program(tmp_path, "benchmarks/regression.py", STUB.read_text())
    return tmp_path


@pytest.fixture
def behave(project: Path) -> Behave:
    return lambda **behaviour: (project / "behaviour.json").write_text(json.dumps(behaviour)) and None


def test_lines_are_said_and_the_record_is_returned(project: Path, behave: Behave):
    said: list[str] = []
    behave(code=1, record=(left := record(case(ratio=1.1, verdict="fail"))))
    found = measure(project, ["--base", "v0.1"], said.append, "run")
    assert said == ["case toy: 300 pairs"]
    assert found == left | {"file": "results/regressions/20260102T030405-2222222.json"}


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"code": 1, "say": "ImportError: no eugen"}, "ended with code 1 and left no record: ImportError"),
        ({"code": 0}, "ended with code 0 and left no record"),
        ({"code": 0, "record": record(case(ratio=1.1, verdict="fail"))}, "says fail, but .* with code 0"),
        ({"code": 1, "record": ["no", "record"]}, "is no record"),
        ({"code": 0, "record": record(verdict="splendid")}, "is no record"),
    ],
)
def test_a_measurement_that_broke_is_void(
    project: Path, behave: Behave, behaviour: dict[str, Any], reason: str
):
    behave(**behaviour)
    found = measure(project, ["--base", "v0.1"], print, "run")
    assert found["verdict"] == "void" and found["file"] is None
    assert re.search(reason, found["reason"]), found["reason"]
    assert headline(found).startswith("regression void: ") and page(found).startswith("# Void\n")


def test_an_old_record_is_not_taken_for_a_new_one(project: Path, behave: Behave):
    behave(code=0, record=record())
    assert measure(project, [], print, "run")["verdict"] == "pass"
    assert measure(project, [], print, "run")["verdict"] == "pass", "written again within a second"
    behave(code=0)
    assert measure(project, [], print, "run")["verdict"] == "void"


def test_a_measurement_that_hangs_is_killed_with_what_it_started(
    project: Path, behave: Behave, monkeypatch: pytest.MonkeyPatch
):
    mark = project / "hanging"

    class OnceItHangs(threading.Timer):
        """The time is over as soon as the stub hangs: on a loaded machine nobody knows when."""

        def run(self) -> None:
            wait_for(mark.exists, "hanging measurement")
            self.function()

    monkeypatch.setattr(threading, "Timer", OnceItHangs)
    behave(hang=True)
    found = measure(project, [], print, "run", timeout_s=4)
    assert found["verdict"] == "void" and "killed after 4 s" in found["reason"]
    pids = [int(pid) for pid in mark.read_text().split()]
    wait_for(lambda: all(map(gone, pids)), "end of the measurement and its child", 10)


def test_the_base_is_the_alias_else_the_commit_before(project: Path):
    assert resolve(project, None) == "HEAD~1" and resolve(project, "v0.1") == "v0.1"
    aliases = {"@baseline": "a" * 40, "@release": "b" * 40}
    source = (
        f"import sys\nfound = {aliases}.get(sys.argv[2])\nprint(found or '')\nsys.exit(0 if found else 3)"
    )
    place_program(project, BASELINE, source)
    assert resolve(project, None) == "a" * 40 and resolve(project, "@release") == "b" * 40
    with pytest.raises(WrongParameters, match="@nobody"):  # what was asked for has no stand-in
        resolve(project, "@nobody")
    place_program(project, BASELINE, "import sys; print('not set', file=sys.stderr); sys.exit(3)")
    assert resolve(project, None) == "HEAD~1"
    place_program(project, BASELINE, "import sys; print('out of reach', file=sys.stderr); sys.exit(1)")
    with pytest.raises(WrongParameters, match="out of reach"):  # it may be set there
        resolve(project, None)


def test_mlflow_gets_the_record_unless_tracking_is_off(project: Path, monkeypatch: pytest.MonkeyPatch):
    source = "import pathlib, sys\npathlib.Path('sent').write_text(sys.argv[1])\nsys.exit(1)"
    place_program(project, "stages/tracking/regression.py", source)
    monkeypatch.delenv("EUGEN_TRACKING", raising=False)
    mirror(project, record() | {"file": "results/regressions/a.json"}, "run")  # its failure raises nothing
    sent = project / "sent"
    assert sent.read_text() == "results/regressions/a.json"
    sent.unlink()
    mirror(project, {"file": None}, "run")
    monkeypatch.setenv("EUGEN_TRACKING", "off")
    mirror(project, record() | {"file": "results/regressions/a.json"}, "run")
    assert not sent.exists()


def test_only_a_pass_looks_like_one():
    states = {verdict: state_of(record(verdict=verdict)) for verdict in CODES}
    assert {verdict for verdict, state in states.items() if state.is_completed()} == {"pass"}
    assert len({state.name for state in states.values()}) == len(states) == len(set(CODES.values()))


def test_a_page_shows_what_changed_exactly_and_what_was_not_measured():
    grown = case("grown", verdict="fail", exact={"macs": [100, 120], "bytes": [5, 5]}, latency=None)
    text = page(record(grown, case("other"), candidate={"ref": "HEAD", "commit": "3" * 40, "dirty": True}))
    assert "macs 100 → 120" in text and "bytes 5" not in text
    assert "3333333 with uncommitted changes against v0.1 (1111111)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[:1] + rows[2:]}) == 1, "every row has every column"
    assert "1.000 [0.990, 1.010]" in text


def test_foreign_text_is_neither_markup_nor_a_column():
    hostile = "<script>alert(1)</script> | `x` **y** [z](http://evil)\n# Pass"
    bad = case(
        hostile, reason=hostile, exact={hostile: [1, 2]}, quality=case()["quality"] | {"name": hostile}
    )
    text = page(
        record(bad, reason=hostile, base={"ref": hostile, "commit": "1" * 40}, versions={hostile: "1"})
    )
    assert not any(sign in text for sign in ("<script", "](", "`x`", "**y", "\n# Pass"))
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3
    (row,) = [line for line in text.splitlines() if line.startswith("| &lt;script")]
    assert row.count("|") == 9
