"""The tables of docs/transfer.md: what each row keeps and gains, stage by stage, and what the levels take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.reporting import text
from stages.reporting.inputs import DENSE, ReportError
from stages.reporting.intervals import (
    best_first,
    budgets,
    closed_form_scores,
    final_scores,
    mean_interval,
    nearest,
    scores,
)
from stages.reporting.markdown import table
from stages.reporting.study import by_budget, quotable
from stages.reporting.table import cost_at, is_provisional, latencies_at
from stages.tracking.record import CellRecord

TASKS = ("embedding", "vision")
LEVELS = Path("reports/benchmarks/transfer-levels.json")


def advice(root: Path, records: Sequence[CellRecord]) -> dict[str, str]:
    """The page's tables by the names of their markers."""
    made = {task: row_table(records, task) for task in TASKS} | {"levels": level_table(root)}
    made["budgets"] = budget_table(records)
    return {name: "\n".join(lines) for name, lines in made.items()}


def budget_table(records: Sequence[CellRecord]) -> list[str]:
    """What rows keep at several budgets, of the tasks that were swept."""
    lines: list[str] = []
    for task in TASKS:
        found = by_budget(quotable([r for r in records if r.task == task and r.method != DENSE]))
        lines += [f"`{task}`. {found[0]}", *found[1:], ""] if found else []
    return lines or ["No result at several budgets is committed yet."]


def row_table(records: Sequence[CellRecord], task: str) -> list[str]:
    """A task's quotable rows at one budget, best first; a column that no row has is left out."""
    own = [r for r in records if r.task == task and r.method != DENSE]
    swept = sorted({b for r in own for b in budgets(r) if b < 1 and not is_provisional(r, b)})
    if not swept:
        return ["No result is committed yet."]
    budget = nearest(swept)
    here = [r for r in own if budget in budgets(r) and not is_provisional(r, budget)]
    ranked = best_first(
        [(mean_interval(list(final_scores(r, budget).values())), r) for r in here], here[0].higher_is_better
    )
    rows = [record for _, record in ranked]
    columns: dict[str, Callable[[CellRecord], str]] = {
        "closed form": lambda r: _mean(closed_form_scores(r, budget).values()),
        "refined": lambda r: _mean(scores(r, budget, "transfer").values()),
        "fine-tuned": lambda r: _mean(scores(r, budget, "finetuned").values()),
    }
    for name in sorted({name for r in rows for name in _extra(r, budget)}):
        columns[name.replace("_", " ")] = lambda r, name=name: _mean(_extra(r, budget).get(name, []))
    columns["MACs"] = lambda r: _ratio(r, budget, "ffn_macs", "ffn_macs_dense")
    columns["parameters"] = lambda r: _ratio(r, budget, "ffn_params", "ffn_params_dense")
    columns["faster"] = lambda r: ", ".join(f"{x.speedup:.2f}×" for x in latencies_at(r, budget)) or text.NONE
    cells = {name: [made(record) for record in rows] for name, made in columns.items()}
    kept = {name: own for name, own in cells.items() if any(cell != text.NONE for cell in own)}
    names = [record.method for record in rows]
    return table(["row", *kept], [list(line) for line in zip(names, *kept.values(), strict=True)])


def level_table(root: Path) -> list[str]:
    """What `eugen compress` took at each level, by the record of `benchmarks.transfer_levels`.

    Raises:
        ReportError: the record is missing or not readable.
    """
    path = root / LEVELS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        return table(
            ["level", "row", "seconds", "of which choose", "tokens", "cosine", "faster"],
            [_level(result) for result in results],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: {error!r}; `python -m benchmarks.transfer_levels` writes it") from error


def _level(result: dict[str, Any]) -> list[str]:
    quality, latency = result["quality"], result["latency"]
    return [
        result["level"],
        result["row"],
        f"{result['seconds']:.0f}",
        f"{result['choice_seconds']:.0f}" if result["choice_seconds"] else text.NONE,
        str(result["tokens"]),
        f"{quality[quality['main']]:.4f}",
        text.speedup(latency["speedup"], latency["speedup_low"], latency["speedup_high"]),
    ]


def _mean(values: Any) -> str:
    return text.quality(mean_interval(list(values)))


def _extra(record: CellRecord, budget: float) -> dict[str, list[float]]:
    """Further figures of the network as its row ends: fine-tuned where it was."""
    found: dict[str, list[float]] = {}
    for seed in record.seeds:
        if seed.budget == budget:
            for name, value in (seed.extra_finetuned or seed.extra_transfer_only).items():
                found.setdefault(name, []).append(value)
    return found


def _ratio(record: CellRecord, budget: float, ours: str, dense: str) -> str:
    cost = cost_at(record, budget)
    return text.NONE if cost is None else f"{getattr(cost, ours) / getattr(cost, dense):.0%}"
