"""The section on regressions: what judges, what is a drill, what is no record, and nobody's markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stages.reporting import regressions
from stages.reporting.inputs import Inputs, read_run
from stages.reporting.page import render
from stages.reporting.regression_trends import figures
from stages.tracking.regression_record import Regression
from tests.regressions import case, record

from . import factory
from .conftest import REPOSITORY, Run

HOSTILE = "<script>alert('x')</script>&\"|"


def parsed(*records: dict[str, Any]) -> list[Regression]:
    """Records as the report reads them, newest first."""
    found = [Regression.model_validate_json(json.dumps(each)) for each in records]
    return sorted(found, key=lambda each: each.time, reverse=True)


def on(day: int, *cases: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A record of one night."""
    return record(*cases, time=f"2026-01-{day:02d}T02:00:00+00:00", **change)


def host(fingerprint: str) -> dict[str, Any]:
    return record()["host"] | {"fingerprint": fingerprint}


def inputs(*records: dict[str, Any]) -> Inputs:
    return Inputs(factory.params(), [], regressions=parsed(*records))


def page(given: Inputs, drawn: bool = False) -> str:
    return render(given, figures(given) if drawn else [], REPOSITORY / "reports" / "template.html")


def leave(root: Path, name: str, content: object) -> None:
    path = root / "results" / "regressions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_no_section_without_records():
    html = page(inputs())
    assert "egression" not in html.split("<body>")[1]


def test_the_newest_verdict_stands_first_with_its_interval_and_commits():
    slow = case("eugen block", 1.1, "fail")
    found = regressions.section(inputs(on(1), on(2, slow), on(1, host=host("other"))))
    assert found is not None
    rows = found["verdicts"].rows
    assert [row[0] for row in rows] == ["2026-01-02 02:00", "2026-01-01 02:00", "2026-01-01 02:00"]
    assert rows[0][1:4] == ["1111111 → 2222222", "fail", "fail 1.100 [1.089, 1.111]"]
    assert (
        "fail, 2026-01-02 02:00 UTC" in found["sentences"][0] and "+10.0 % in time" in found["sentences"][0]
    )
    assert [len(table.rows) for table in found["latest"]] == [1, 1], "one table a machine, of its last run"
    assert "3 comparisons: 2 pass and 1 fail." in found["sentences"]


def test_times_of_any_zone_are_shown_in_utc():
    found = regressions.verdicts(parsed(record(time="2026-01-02T00:30:00+02:00")))
    assert found.rows[0][0] == "2026-01-01 22:30"


def test_a_drill_is_marked_and_counted_nowhere():
    given = inputs(on(1), on(2, case(ratio=1.1, verdict="fail"), injected=0.1))
    found = regressions.section(given)
    assert found is not None
    assert found["verdicts"].rows[0][2] == "fail, drill +10 %"
    assert "1 comparison: 1 pass." in found["sentences"]
    assert "1 drill with a slow-down on purpose, counted nowhere." in found["sentences"]
    assert "pass, 2026-01-01" in found["sentences"][0]
    assert all("1.100" not in figure.alt for figure in figures(given))
    only = regressions.section(inputs(on(2, injected=0.1)))
    assert only is not None and only["latest"] == [] and figures(inputs(on(2, injected=0.1))) == []


def test_every_machine_has_its_own_trend():
    given = inputs(on(1), on(2), on(3, host=host("other")), on(4, case("eugen block", verdict="void")))
    drawn = figures(given)
    names = [figure.name for figure in drawn]
    assert names == [
        "regressions-ratio-abcdef012345",
        "regressions-times-abcdef012345",
        "regressions-ratio-other",  # one run is no trend
    ]
    first = json.loads(drawn[0].spec)
    (points,) = first["datasets"].values()
    assert sorted(point["moment"] for point in points) == ["2026-01-01 02:00", "2026-01-02 02:00"]
    assert "a trend only" in drawn[1].caption


def test_what_was_not_measured_is_a_dash():
    bare = case("bare", verdict="fail", latency=None, control=None, quality=None, exact={"macs": [1, 2]})
    table = regressions.latest(parsed(on(1, bare))[0])
    assert table.rows == [["bare", "fail", *["–"] * 6, "macs 1 → 2", bare["reason"]]]
    assert figures(inputs(on(1, bare))) == []


def test_a_broken_or_future_file_is_named_and_breaks_nothing(run: Run):
    run.cells(factory.all_cells()[:2])
    leave(run.root, "good.json", on(1))
    leave(run.root, "broken.json", "{")
    leave(run.root, "future.json", on(2, schema=2))
    html = page(read_run(run.root))
    notes = html.split('id="regressions"')[1]
    assert "broken.json" in notes and "future.json" in notes and "2026-01-01 02:00" in notes
    assert "2026-01-02" not in notes


def test_hostile_names_are_escaped_in_tables_and_figures():
    bad = case(HOSTILE, reason=HOSTILE)
    hostile = on(1, bad, host=host("abc") | {"processor": HOSTILE}, base={"ref": HOSTILE, "commit": "1" * 40})
    given = inputs(hostile, on(2, bad, host=host("abc")))
    given.regression_faults.append(HOSTILE)
    html = page(given, drawn=True)
    assert "&lt;script&gt;alert" in html and not re.search(r"<script", html, re.IGNORECASE)
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert all(target.startswith(("#", "data:,")) for target in loads)
    assert {f.name for f in figures(given)} == {"regressions-ratio-abc", "regressions-times-abc"}
