"""Pictures of a task stand side by side in the page, each with its network's quality."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from stages.reporting.inputs import Inputs, ReportError, read_run
from stages.reporting.page import render
from stages.reporting.pictures import by_name

from . import factory
from .conftest import REPOSITORY, Run


def paint(run: Run, network: str, name: str, level: int, task: str = "vision") -> Path:
    path = run.root / "results" / "pictures" / task / Path(network) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)
    return path


def page(inputs: Inputs) -> str:
    return render(inputs, [], REPOSITORY / "reports" / "template.html")


@pytest.fixture
def painted(run: Run) -> Run:
    run.cells(factory.all_cells())
    for level, network in enumerate(
        ("eugen/budget0.3", "eugen/budget0.15", "retired/budget0.3", "dense/budget1", "dense/truth")
    ):
        for name in ("view-1", "view-0"):
            paint(run, network, name, 40 * level)
    return run


def test_pictures_stand_by_name_truth_first(painted: Run):
    found = by_name(read_run(painted.root).pictures, "vision")
    assert [[picture.network for picture in row] for row in found] == 2 * [["truth", "dense", "eugen"]]
    assert [row[0].name for row in found] == ["view-0", "view-1"]


def test_each_picture_is_in_the_page_with_its_quality_and_in_words(painted: Run):
    html = page(read_run(painted.root))
    record = factory.cell("vision", "eugen")
    assert len(re.findall(r"<img ", html)) == 6
    uris = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    source = painted.root / "results" / "pictures" / "vision" / "dense" / "truth" / "view-0.png"
    assert base64.b64decode(uris[0]) == source.read_bytes()
    tuned = [s.quality_finetuned for s in record.seeds if s.quality_finetuned is not None]
    mean = sum(tuned) / len(tuned)
    assert f'alt="view-0 by eugen, budget 0.3: top-1 {mean:.4f} ±' in html
    assert 'alt="view-1 by dense: top-1 0.9700 ±' in html


def test_without_pictures_there_is_no_such_part(run: Run):
    run.cells(factory.all_cells())
    assert "<h3>Pictures" not in page(read_run(run.root))


def test_a_broken_picture_is_named(painted: Run):
    paint(painted, "dense/budget1", "view-0", 1).write_bytes(b"<svg/>")
    with pytest.raises(ReportError, match=r"pictures/vision/dense/budget1/view-0\.png: not a PNG file"):
        read_run(painted.root)
