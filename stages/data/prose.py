"""Running text out of Markdown: what a sentence encoder may read."""

from __future__ import annotations

import re

_NOT_PROSE = re.compile(r"\s*(#|[-*+]\s|\||>|<|\d+\.\s|    )")
"""Headings, lists, tables, quotations, HTML and indented code."""


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs of a page, without its front matter, code, lists and tables; links are their text."""
    page = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    page = re.sub(r"```.*?```", "\n\n", page, flags=re.DOTALL)
    found = [part for part in re.split(r"\n\s*\n", page) if part.strip() and not _NOT_PROSE.match(part)]
    linked = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", part) for part in found]
    return [re.sub(r"\s+", " ", re.sub(r"[`*]", "", part)).strip() for part in linked]
