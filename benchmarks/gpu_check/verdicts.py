"""The goals on a GPU, each answered from a record by one number: met, not met or not measured.

Plain Python, so that the ledger reads it without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
FUSED, OF_LIMIT, WHOLE_MODEL, MEMORY = 1.3, 0.8, 1.5, 0.3
WIDTHS, BATCHES = (768, 1024), (64, 256)
TOKENS = (4096, 16384)
"""Of the fused block's goals; all of them must be measured."""
HALF, VIT, EUGEN, DENSE = "bfloat16", "timm:vit_base_patch16_224", "eugen", "dense"


@dataclass(frozen=True)
class Verdict:
    """A goal and what a record says of it.

    Attributes:
        what: the quantity; goal: its least value.
        measured: its value, None if the record has none.
        low: the lower end of its interval, where it has one.
    """

    what: str
    goal: float
    measured: float | None = None
    low: float | None = None

    @property
    def verdict(self) -> str:
        """Met where the whole interval reaches the goal."""
        if self.measured is None:
            return NOT_MEASURED
        return MET if (self.measured if self.low is None else self.low) >= self.goal else NOT_MET

    @property
    def said(self) -> str:
        """The measured value in words."""
        if self.measured is None:
            return "–"
        return f"{self.measured:.2f}" + ("" if self.low is None else f", at least {self.low:.2f}")


def verdicts(record: dict[str, Any] | None) -> list[Verdict]:
    """Every goal in its order; without a record, or with one of another device, all are not measured."""
    usable = record is not None and record["device"].startswith("cuda") and not record["quick"]
    forms = _forms(record["forms"]) if usable and record else []
    rows = _rows(record["models"]) if usable and record else {}
    found = []
    for d in WIDTHS:
        place = f"fused EUGen block, bf16, d={d}, {min(TOKENS)} tokens or more"
        of_width = [form for form in forms if form["d"] == d]
        if {form["tokens"] for form in of_width} != set(TOKENS):
            of_width = []  # the worst of several is not known while one is cut, or broke
        found += [_worst(f"{place}: times as fast as composed", FUSED, of_width), _share(place, of_width)]
    for batch in BATCHES:
        place = f"ViT-B/16, 30 % of the FFN MACs, bf16, batch {batch}"
        found += _whole(place, rows.get((DENSE, batch)), rows.get((EUGEN, batch)))
    return found


def _forms(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that the goals are about: without launches, which are Python's and not the operator's."""
    return [
        result
        for result in results
        if result["status"] == "timed"
        and result["cuda_graph"]
        and result["dtype"] == HALF
        and result["tokens"] in TOKENS
    ]


def _worst(what: str, goal: float, forms: list[dict[str, Any]]) -> Verdict:
    if not forms:
        return Verdict(what, goal)
    worst = min(forms, key=lambda form: form["low"])
    return Verdict(what, goal, worst["speedup"], worst["low"])


def _share(place: str, forms: list[dict[str, Any]]) -> Verdict:
    shares = [form["of_limit"] for form in forms]
    return Verdict(f"{place}: share of the roofline", OF_LIMIT, min(shares, default=None))


def _rows(profiles: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Measurements of ViT-B by row and batch, as it runs without graphs; void conditions are left out."""
    found = {}
    for profile in profiles:
        settings = profile["settings"]
        usual = settings["budget"] == 0.3 and not settings["cuda_graph"] and not settings["cold"]
        if profile["model"] != VIT or profile["dtype"] != HALF or not usual:
            continue
        for row in profile["rows"]:
            if row["measured"] and row["call"] == "forward" and row["scope"] == "model":
                # Only the first unit has the rows of the goals; a later one may repeat the control.
                found.setdefault((row["row"], row["batch"]), row["measured"])
    return found


def _whole(place: str, dense: dict[str, Any] | None, own: dict[str, Any] | None) -> list[Verdict]:
    speed, memory = f"{place}: times as fast as dense", f"{place}: less peak memory"
    if dense is None or own is None or not dense["low"] <= 1 <= dense["high"]:
        return [Verdict(speed, WHOLE_MODEL), Verdict(memory, MEMORY)]
    before, after = (measured["memory"]["allocated"] for measured in (dense, own))
    saved = None if before is None or after is None else 1 - after / before
    return [Verdict(speed, WHOLE_MODEL, own["speedup"], own["low"]), Verdict(memory, MEMORY, saved)]
