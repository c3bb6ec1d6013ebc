"""Pictures that a task's networks made, beside the truth.

The profile stage leaves them in results/pictures/<task>/<method>/budget<b>/<name>.png, the truth in the dense
row's folder `truth`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.reporting import text
from stages.reporting.faults import ReportError
from stages.reporting.intervals import Interval, budgets, final_scores, mean_interval, nearest
from stages.tracking.record import CellRecord

TRUTH, DENSE = "truth", "dense"
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """One picture: what it shows, who made it, and the bytes of its PNG file."""

    task: str
    name: str
    network: str
    caption: str
    """The network and its quality."""
    png: bytes

    @property
    def uri(self) -> str:
        """The picture itself, so that the page needs no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def read_pictures(folder: Path, records: Sequence[CellRecord]) -> list[Picture]:
    """The truth, the dense network's and each record's pictures at the budget nearest to 0.3.

    Raises:
        ReportError: a file is no PNG; the message names it.
    """
    found = []
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        for network, place, caption in _networks(folder / task, own):
            for path in sorted(place.glob("*.png")):
                found.append(Picture(task, path.stem, network, caption, _png(path, task)))
    return found


def _networks(folder: Path, records: Sequence[CellRecord]) -> list[tuple[str, Path, str]]:
    """Name, folder and caption of the truth, which a dense row leaves, of dense, and of the others."""
    quality = records[0].quality_name
    truths = [folder / record.method / TRUTH for record in records]
    said = [(TRUTH, truth, TRUTH) for truth in truths if truth.is_dir()][:1]
    for record in sorted(records, key=lambda record: record.method != DENSE):
        if not budgets(record):
            continue
        budget = nearest(budgets(record))
        mean = mean_interval(list(final_scores(record, budget).values()))
        name = DENSE if record.method == DENSE else f"{record.method}, budget {budget:g}"
        caption = f"{name}: {quality} {text.quality(mean)}{_count(mean)}"
        said.append((record.method, folder / record.method / f"budget{budget:g}", caption))
    return said


def _count(interval: Interval | None) -> str:
    return f" (n={interval.n})" if interval else ""


def _png(path: Path, task: str) -> bytes:
    content = path.read_bytes()
    if not content.startswith(PNG):
        cure = f"delete it and run `dvc repro --force` for the profile stages of task {task}"
        raise ReportError(f"{path}: not a PNG file; {cure}")
    return content


def by_name(pictures: Sequence[Picture], task: str) -> list[list[Picture]]:
    """A task's pictures, those of one name together: the truth first, then dense, then the others."""
    found: dict[str, list[Picture]] = {}
    for picture in (picture for picture in pictures if picture.task == task):
        found.setdefault(picture.name, []).append(picture)
    return [found[name] for name in sorted(found)]
