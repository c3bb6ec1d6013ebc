"""A record of `benchmarks.layers` as text: one table a condition, then what was not measured."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from benchmarks.machine import table
from benchmarks.rows import CONTROL

COLUMNS = ("row", "speed-up", "MAC limit", "of limit", "roofline", "binds", "dense ms", "row ms", "n")


def markdown(record: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join(["# Latency of the layers", "", *_head(record), "", *sections(record["results"])])


def sections(results: list[dict[str, Any]], *, level: int = 2) -> list[str]:
    """The lines of every condition's table, each under a heading of this level."""
    lines = []
    for (dtype, tokens, d), found in groupby(
        results, key=lambda result: (result["dtype"], result["tokens"], result["d"])
    ):
        lines += [f"{'#' * level} {dtype}, {tokens} × {d}", "", *_condition(list(found)), ""]
    return lines


def _head(record: dict[str, Any]) -> list[str]:
    found, settings = record["environment"], record["settings"]
    machine = found["accelerator"] or f"{found['processor']}, {found['threads']} threads"
    dirty = ", with uncommitted changes" if found["dirty"] else ""
    return [
        f"{machine}, {found['device']}; torch {found['versions']['torch']}, "
        f"Python {found['versions']['python']}; commit {found['commit'][:12]}{dirty}; "
        f"load {found['load']} before and {found['load_end']} after; {record['wall_seconds']:.0f} s.",
        "",
        f"Dense block d → 4d → d with GELU against each row at {100 * settings['budget']:g} % of its MACs "
        "(where the row has a size of its own, at that). Median ratio of interleaved pairs with its 95 % "
        "bootstrap interval; times are medians and depend on the machine's load.",
    ]


def _condition(results: list[dict[str, Any]]) -> list[str]:
    timed = [result for result in results if result["status"] == "timed"]
    lines = table(COLUMNS, [_row(result) for result in timed])
    if results[0]["void"]:
        lines = ["**Void:** the control (the block against its own copy) does not cover 1.", "", *lines]
    absent = [
        f"- {result['row']}: {result['status']}: {' '.join(result['reason'].split())}"
        for result in results
        if result["status"] != "timed"
    ]
    return [*lines, "", "Not measured:", "", *absent] if absent else lines


def _row(result: dict[str, Any]) -> list[str]:
    name = f"{CONTROL} (control)" if result["row"] == CONTROL else result["row"]
    return [
        name,
        f"{result['speedup']:.2f} [{result['low']:.2f}, {result['high']:.2f}]",
        f"{result['limit_macs']:.2f}",
        f"{result['of_limit']:.2f}",
        f"{result['limit_roofline']:.2f}",
        result["binds"],
        f"{result['dense_ms']['median']:.3f}",
        f"{result['row_ms']['median']:.3f}",
        str(result["row_ms"]["n"]),
    ]
