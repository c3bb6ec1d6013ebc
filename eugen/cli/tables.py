"""Tables as plain text and as Markdown, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = {
    "cosine": "cosine of outputs",
    "pooled_cosine": "cosine of the mean over tokens",
    "relative_error": "relative error of outputs",
    "top1_agreement": "same first choice",
    "kl": "KL divergence, nats a token",
    "perplexity_dense": "perplexity, original",
    "perplexity": "perplexity, compressed",
}
KINDS = {
    "language": "logits over a vocabulary",
    "classes": "logits of classes",
    "features": "features (no logits)",
}


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of even width under a head; the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def amount(value: float) -> str:
    """A count with three digits: `512`, `38.4 k`, `1.20 M`, `3.01 G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):#.3g} {unit}".replace(". ", " ")
    return f"{value:.0f}"


def results(measured: dict[str, Any]) -> list[list[str]]:
    """The measured table: what, original, compressed, and how they compare."""
    cost, latency, quality = measured["cost"], measured["latency"], measured["quality"]
    rows = [["", "original", "compressed", "compared"]]
    for name, label in (("macs", "MACs of the batch"), ("parameters", "parameters")):
        dense, ours = cost["dense"][name], cost["compressed"][name]
        rows.append([label, amount(dense), amount(ours), f"{ours / dense:.1%}"])
    spread = f"{latency['speedup_low']:.2f}–{latency['speedup_high']:.2f}"
    rows.append(
        [
            "latency",
            f"{latency['dense_ms']:.2f} ms",
            f"{latency['compressed_ms']:.2f} ms",
            f"{latency['speedup']:.2f}× faster (95 % {spread})",
        ]
    )
    if "perplexity" in quality:
        ours, dense = quality["perplexity"], quality["perplexity_dense"]
        rows.append(["perplexity", f"{dense:.2f}", f"{ours:.2f}", f"{ours - dense:+.2f}"])
    for name, label in NAMES.items():
        if name in quality and not name.startswith("perplexity"):
            rows.append([label, "", "", f"{quality[name]:.4f}"])
    return rows
