"""Markdown tables whose cells cannot break out of them."""

from __future__ import annotations


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines]


def escape(cell: str) -> str:
    """A cell's text with everything that HTML or the table would act on made harmless."""
    flat = " ".join(cell.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
