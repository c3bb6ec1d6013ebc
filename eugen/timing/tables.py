"""A profile as Markdown tables that read as plain text too: one for each condition."""

from __future__ import annotations

from collections.abc import Sequence

from eugen.timing.record import Measured, Profile, Row
from eugen.timing.rows import CONTROL

COLUMNS = (
    "row",
    "speed-up",
    "MAC limit",
    "ms",
    "limit ms",
    "of limit",
    "binds",
    "weights MB",
    "peak MB",
    "reserved MB",
    "RSS MB",
    "mJ",
)


def markdown(profile: Profile) -> str:
    """The machine, then each condition's rows, then those that were not timed."""
    here = profile.environment
    rates = ", ".join(f"{rate / 1e9:.0f} GMAC/s {name}" for name, rate in profile.rates.macs_per_s.items())
    lines = [
        f"# {profile.model}, {profile.device}, {profile.dtype}",
        "",
        f"{here.device}, {here.threads} threads, torch {here.versions['torch']}, "
        f"load {here.load_before} to {here.load_after}, commit {(here.commit or 'unknown')[:10]}"
        + (" with changes" if here.dirty else ""),
        "",
        f"Measured on the spot: {profile.rates.bytes_per_s / 1e9:.1f} GB/s copied, {rates}.",
    ]
    for condition in dict.fromkeys(row.condition for row in profile.rows):
        lines += _section([row for row in profile.rows if row.condition == condition])
    return "\n".join(lines) + "\n"


def is_void(rows: Sequence[Row]) -> bool:
    """Whether the model beside its own copy shows a difference, or could not be timed."""
    control = next((row.measured for row in rows if row.row == CONTROL), None)
    return control is None or not control.low <= 1 <= control.high


def _section(rows: list[Row]) -> list[str]:
    call, batch, part = rows[0].condition
    timed = [_cells(row.row, row.measured) for row in rows if row.measured]
    lines = ["", f"## {part}, {call}, batch {batch}", ""]
    if is_void(rows):
        lines += ["**Void**: the dense model beside its own copy is not covered by 1, or was not timed.", ""]
    lines += table(COLUMNS, timed)
    missing = [f"- `{row.row}` {row.status}: {row.reason}" for row in rows if row.measured is None]
    energy = {row.measured.energy.reason for row in rows if row.measured and row.measured.energy.reason}
    notes = [*missing, *(f"- energy: {reason}" for reason in sorted(energy))]
    return [*lines, "", *notes] if notes else lines


def _cells(name: str, m: Measured) -> list[str]:
    joules = m.energy.joules_per_call
    return [
        f"{name} (control)" if name == CONTROL else name,
        f"{m.speedup:.2f} [{m.low:.2f}, {m.high:.2f}]",
        "–" if m.macs_limit is None else f"{m.macs_limit:.2f}",
        f"{m.row_ms:.3g}",
        f"{m.limit_ms:.3g}",
        f"{m.of_limit:.2f}",
        m.binds,
        _megabytes(m.weight_bytes),
        _megabytes(m.memory.allocated),
        _megabytes(m.memory.reserved),
        _megabytes(m.memory.rss),
        "–" if joules is None else f"{1e3 * joules:.3g}",
    ]


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns stand under each other as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]
