"""The page in headless Chromium: phone and desktop, light and dark."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from stages.report import build
from stages.reporting.inputs import Inputs
from stages.reporting.pictures import Picture

from . import factory, trained
from .conftest import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = "a_method_with_a_name_far_longer_than_any_phone_is_wide_" * 3

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


def _png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 120, 160)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with figures, failures and a name that is too long."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copy(REPOSITORY / "reports" / "template.html", folder)
    records = [r for r in factory.all_cells(provisional=True) if r.method != "snnk"]
    records.append(factory.cell("embedding", LONG, layer={"layer": "eugen"}))
    failures = [factory.failure("vision", "snnk"), factory.failure("vision", LONG)]
    failures[1] = failures[1].model_copy(update={"error": "x" * 400})
    records += [factory.kernel_cell(method) for method in ("dense", "low_rank", "eugen")]
    none = [factory.not_applicable("kernel", method) for method in ("linear", LONG)]
    scratch = [trained.diverging(record, 4e-3) for record in trained.all_scratch(task="vision")]
    scratch.append(trained.scratch_record(LONG, task="vision", layer={"layer": "eugen"}))
    lost = [factory.failure("vision", LONG, stage="scratch")]
    names = ("truth", LONG, *(f"network{i}" for i in range(6)))
    pictures = [Picture("vision", "view", name, f"{name}: quality 1.0", _png()) for name in names]
    params, study = factory.params(profile="cpu"), factory.params()
    build(Inputs(params, records, failures, study, none, scratch, lost, pictures), folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all tests."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """The opened page, all that it logged and all that it asked for."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(params=[(375, "light"), (375, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def opened(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Opened]:
    """The report at one width in one colour scheme."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = Opened(context.new_page())
    opened.page.on("console", lambda message: opened.messages.append(message.text))
    opened.page.on("pageerror", lambda error: opened.messages.append(str(error)))
    opened.page.on("request", lambda asked: opened.requests.append(asked.url))
    opened.page.goto(report.as_uri())
    yield opened
    context.close()


@pytest.fixture
def page(opened: Opened) -> Page:
    """The page alone."""
    return opened.page


def test_nothing_is_asked_and_nothing_complains(opened: Opened, report: Path):
    assert opened.messages == []
    assert [url for url in opened.requests if url != report.as_uri() and not url.startswith("data:")] == []


def test_the_page_never_scrolls_sideways(page: Page):
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = page.evaluate(
        """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre')
           && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.className)"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_every_section_is_there_and_every_link_lands(page: Page):
    sections = ("headline", "task-1", "task-2", "task-3", "rows", "failures", "omissions", "conditions")
    for name in (*sections, "glossary", "provisional"):
        assert page.locator(f"#{name}").is_visible(), name
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
    missing = [target for target in targets if page.locator(f"#{target}").count() != 1]
    assert missing == []


def test_figures_are_drawn_named_and_fit(page: Page):
    boxes = page.evaluate(
        """[...document.querySelectorAll('figure:not(.pictures)')].map(f => {
            const svg = f.querySelector('svg').getBoundingClientRect(), frame = f.querySelector('[role=img]');
            const fits = f.matches('.wide') ? frame.getBoundingClientRect().right <= innerWidth
                : svg.right <= innerWidth;
            return [svg.width, fits, frame.ariaLabel.length > 20];
        })"""
    )
    assert len(boxes) == 10 + 9 + 7  # of two tasks; fronts, budgets, six settings, speed; from scratch
    assert all(width > 250 and fits and named for width, fits, named in boxes)


def test_panels_side_by_side_fill_the_page_and_scroll_in_their_frame_on_a_phone(page: Page):
    boxes = page.evaluate(
        """[...document.querySelectorAll('figure.wide')].map(f => {
            const frame = f.querySelector('.scroll');
            const svg = frame.querySelector('svg').getBoundingClientRect();
            const small = [...frame.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);
            return [f.clientWidth, svg.width, frame.scrollWidth > frame.clientWidth, Math.min(...small)];
        })"""
    )
    assert len(boxes) == 3
    for room, width, scrolls, text in boxes:
        assert width >= 800 and width <= max(room, 820) + 1
        assert scrolls == (room < 800)
        assert text >= 9, "legible"


def test_pictures_are_shown_side_by_side_at_one_size(page: Page):
    boxes = page.evaluate(
        """[...document.querySelectorAll('.pictures img')].map(i => {
            const box = i.getBoundingClientRect();
            const seen = i.complete && i.naturalWidth > 0;
            return [seen, Math.round(box.top), Math.round(box.width), i.alt.length];
        })"""
    )
    assert len(boxes) == 8 and all(loaded and words > 5 for loaded, _, _, words in boxes)
    assert len({width for _, _, width, _ in boxes}) == 1
    assert boxes[0][1] == boxes[1][1]  # two beside each other even on a phone


def test_axis_text_takes_the_pages_ink(page: Page):
    ink = page.evaluate("getComputedStyle(document.body).color")
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill)"
    )
    assert set(drawn) == {ink}


def test_tables_scroll_inside_their_own_frame(page: Page):
    frames = page.evaluate(
        """[...document.querySelectorAll('.scroll')].map(s =>
            [s.scrollWidth > s.clientWidth, getComputedStyle(s).overflowX, s.tabIndex])"""
    )
    assert any(wider for wider, _, _ in frames)
    assert all((overflow, tab) == ("auto", 0) for _, overflow, tab in frames)
