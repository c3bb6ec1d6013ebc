"""Markdown tables whose cells cannot break out of them."""

from __future__ import annotations

LONG = 10
"""Rows of a table that are shown at once."""


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines]


def folded(summary: str, lines: list[str]) -> list[str]:
    """Lines that are shown when asked for."""
    return [f"<details><summary>{escape(summary)}</summary>", "", *lines, "", "</details>"]


def shortened(lines: list[str]) -> list[str]:
    """A table whose rows beyond the first `LONG` are folded."""
    head, rows = lines[:2], lines[2:]
    if len(rows) <= LONG + 1:  # folding one row saves nothing
        return lines
    return [*head, *rows[:LONG], "", *folded(f"{len(rows) - LONG} more rows", [*head, *rows[LONG:]])]


def escape(cell: str) -> str:
    """A cell's text with everything that HTML or the table would act on made harmless."""
    flat = " ".join(cell.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
