"""The page and its figures: honest words, escaped names, nothing from outside."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from stages.report import build
from stages.reporting import verdicts
from stages.reporting.drawing import COLOURS
from stages.reporting.figures import figures
from stages.reporting.inputs import Inputs, read_run
from stages.reporting.page import render
from stages.tracking.record import CellRecord

from . import factory
from .conftest import REPOSITORY, Run

HOSTILE = "<script>alert('x')</script>&\"|"


def page(inputs: Inputs, drawn: bool = False) -> str:
    """The page; without figures unless a test is about them, for they take a second."""
    return render(inputs, figures(inputs) if drawn else [], REPOSITORY / "reports" / "template.html")


def one_seed(record: CellRecord) -> CellRecord:
    """The record with its first seed alone."""
    return record.model_copy(update={"seeds": [s for s in record.seeds if s.seed == 0]})


def headline(records: list[CellRecord]) -> str:
    """The sentences of the embedding task."""
    return " ".join(verdicts.headline(Inputs(factory.params(), records), "embedding"))


def test_hostile_names_are_escaped_everywhere(run: Run):
    methods = {"dense": {"layer": "dense"}, HOSTILE: {"layer": "eugen"}}
    run.params({**factory.params(methods), "note": HOSTILE})
    records = [factory.cell("embedding", m, layer=layer) for m, layer in methods.items()]
    failure = factory.failure("vision", HOSTILE).model_copy(update={"error": HOSTILE, "traceback": HOSTILE})
    inputs = Inputs(factory.params(methods), records, [failure])
    build(inputs, run.root / "reports")
    html = (run.root / "reports" / "report.html").read_text()
    assert "&lt;script&gt;alert" in html
    assert not re.search(r"<script", html, re.IGNORECASE)
    for svg in (run.root / "reports" / "figures").glob("*.svg"):
        assert "<script" not in svg.read_text()


def test_page_asks_nothing_of_the_network(run: Run):
    html = page(Inputs(factory.params(), factory.all_cells()), drawn=True)
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert {target[:1] for target in loads} <= {"#", "d"}
    assert all(target.startswith(("#", "data:,")) for target in loads)
    assert "@import" not in html


def test_all_failed_still_renders(run: Run):
    inputs = read_run(run.root)
    assert inputs.records == []
    build(inputs, run.root / "reports")
    html = (run.root / "reports" / "report.html").read_text()
    assert "No cell finished" in html
    assert "vision / eugen_teacher" in html
    assert (run.root / "reports" / "figures").is_dir()
    assert len((run.root / "reports" / "results.csv").read_text().splitlines()) == 1


def test_one_seed_never_says_better():
    said = headline([one_seed(record) for record in factory.all_cells()])
    assert "no difference shown" in said
    assert "better than" not in said
    assert "worse than" not in said


def test_a_clear_difference_is_said_with_its_interval():
    said = headline(factory.all_cells())
    assert re.search(r"eugen_teacher[^:]*: .*better than narrow \(n=3\)", said)
    assert re.search(r"worse than the dense network by [\d.]+ \[[\d.]+, [\d.]+\] \(n=3\)", said)


def test_lower_is_better_turns_the_verdict():
    records = [record.model_copy(update={"higher_is_better": False}) for record in factory.all_cells()]
    said = headline(records)
    assert re.search(r"eugen_teacher: .*worse than narrow \(n=3\)", said)
    assert re.search(r"best mean \S+ ± \S+ \(n=3\) by narrow", said)


def test_control_that_misses_one_is_reported():
    dense = factory.cell("embedding", "dense")
    biased = [x.model_copy(update={"speedup": 1.1, "speedup_low": 1.05}) for x in dense.latencies]
    records = [dense.model_copy(update={"latencies": biased}), factory.cell("embedding", "prune")]
    assert [passed for passed, _ in verdicts.control(records)] == [False, False]
    assert "does not cover 1" in page(Inputs(factory.params(), records))
    assert all(passed for passed, _ in verdicts.control(factory.all_cells()[:8]))


def test_a_task_without_dense_says_that_it_lacks_a_control():
    ((passed, sentence),) = verdicts.control([factory.cell("embedding", "prune")])
    assert not passed
    assert "no A/A control" in sentence


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([one_seed(factory.cell("embedding", "prune"))], "rest on a single seed"),
        ([factory.cell("embedding", "prune", environment=factory.environment(dirty=True))], "not committed"),
    ],
)
def test_provisional_banner(records: list[CellRecord], reason: str):
    html = page(Inputs(factory.params(), records))
    assert 'id="provisional"' in html
    assert reason in html


def test_no_banner_when_nothing_is_provisional():
    assert 'id="provisional"' not in page(Inputs(factory.params(), factory.all_cells()))


def test_study_is_described_by_its_parameters():
    params = factory.params(profile="cpu")
    study = factory.params(profile="study")
    study["tasks"]["vision"]["transfer"]["seeds"] = [0, 1, 2, 3, 4]
    html = page(Inputs(params, [], [], study))
    assert "tasks.vision.transfer.seeds" in html
    assert "[0, 1, 2, 3, 4]" in html


def test_an_untimed_row_is_shown_with_dashes():
    timed, bare = factory.cell("embedding", "dense"), factory.cell("embedding", "prune", latencies=[])
    html = page(Inputs(factory.params(), [timed, bare]), drawn=True)
    assert "<td>–</td><td>–</td><td>–</td>" in html
    assert not re.search(r">(nan|None|&lt;NA&gt;)<", html)


def test_mixed_machines_are_said():
    other = factory.environment(fingerprint="zzz", processor="Another CPU")
    records = [factory.cell("embedding", "dense"), factory.cell("embedding", "prune", environment=other)]
    html = page(Inputs(factory.params(), records))
    assert "2 kinds of machine" in html
    assert "Another CPU" in html


def test_figures_are_sound_and_repeatable():
    inputs = Inputs(factory.params(), [r for r in factory.all_cells() if r.task == "embedding"])
    first, second = figures(inputs), figures(inputs)
    assert [(f.name, f.spec, f.svg) for f in first] == [(f.name, f.spec, f.svg) for f in second]
    assert [f.name for f in first] == [
        "embedding-fronts-cpu-float32",
        "embedding-speed-cpu-float32-batch1",
        "embedding-speed-cpu-float32-batch32",
        "embedding-fit-budget0.3",
    ]
    for figure in first:
        assert ElementTree.fromstring(figure.svg).tag.endswith("svg")
        assert "$schema" in json.loads(figure.spec)
        assert figure.alt


def test_ids_are_unique_in_the_page():
    html = page(Inputs(factory.params(), factory.all_cells()), drawn=True)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_old_figures_go(run: Run):
    run.cells(factory.all_cells())
    stale = run.root / "reports" / "figures" / "gone.svg"
    stale.parent.mkdir()
    stale.write_text("<svg/>")
    build(Inputs(factory.params(), [factory.cell("embedding", "prune")]), run.root / "reports")
    assert not stale.exists()


def _luminance(colour: str) -> float:
    channels = [int(a + b, 16) / 255 for a, b in list(pairwise(colour.lstrip("#")))[::2]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_paper(theme: int):
    """WCAG: 4.5 for text, 3 for marks."""
    css = (REPOSITORY / "reports" / "template.html").read_text()
    named = {
        name: re.findall(rf"--{name}: (#[0-9a-f]{{6}})", css)[theme]
        for name in ("paper", "ink", "quiet", "link")
    }
    assert min(_contrast(named["paper"], named[text]) for text in ("ink", "quiet", "link")) >= 4.5
    assert min(_contrast(named["paper"], colour) for colour in COLOURS) >= 3
