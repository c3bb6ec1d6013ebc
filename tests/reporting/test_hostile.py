"""Names and messages made to break out of the page: the real stage, then a real browser."""

from __future__ import annotations

import csv

import pytest

from stages.reporting import markdown

from . import factory
from .conftest import Run
from .test_browser import CHROMIUM, browser
from .test_report import verb

__all__ = ["browser"]

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "</style><img src=x onerror=alert(2)>",
    '"onmouseover="alert(3)" x="',
    "'><svg onload=alert(4)>",
    "</script></svg></title><iframe src=javascript:alert(5)>",
    "a | b || `c` [d](javascript:alert(6)) {{ 7 * 7 }} {% raw %}",
]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_no_name_and_no_message_runs_in_the_page(run: Run, browser):
    kept = {name: factory.METHODS[name] for name in ("dense", "eugen")}
    params = factory.params(methods=kept | {name: {"layer": "eugen"} for name in [*HOSTILE, "lost"]})
    params["tasks"] |= dict.fromkeys(HOSTILE[:2], params["tasks"]["vision"])
    run.params(params)
    records = [record for record in factory.all_cells() if record.method in kept]
    for name in HOSTILE:
        odd = factory.environment(commit=name, processor=name, versions={name: name})
        change = {"method": name, "environment": odd}
        records.append(factory.cell("vision", "eugen").model_copy(update=change))
    dense = factory.cell("vision", "dense").model_copy(update={"task": SCRIPT, "quality_name": HOSTILE[1]})
    run.cells([*records, dense])
    for task in ("vision", "embedding"):
        note = factory.failure(task, "lost")
        run.fail(note.model_copy(update={"error": " ".join(HOSTILE), "traceback": "\n".join(HOSTILE)}))
    done = verb(run)
    assert done.returncode == 0, done.stderr
    seen: list[str] = []
    page = browser.new_page()
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto((run.root / "reports/report.html").as_uri())
    for tag in ("script", "iframe", "img[src=x]", "svg[onload]", "[onmouseover]", "[onerror]"):
        assert page.locator(tag).count() == 0, tag
    page.mouse.move(200, 200)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.locator("body").text_content() or ""
    assert [name for name in HOSTILE if name not in text] == [], "shown as they are written"
    assert seen == []
    for figure in (run.root / "reports/figures").glob("*.svg"):
        page.goto(figure.as_uri())
        assert page.evaluate("document.querySelectorAll('script, iframe, [onload], [onerror]').length") == 0
    assert seen == []
    with (run.root / "reports/results.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} >= set(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_markdown_cell_keeps_to_itself(name: str):
    line = markdown.table(["method"], [[name]])[-1]
    assert "<" not in line and line.replace("\\|", "").count("|") == 2
