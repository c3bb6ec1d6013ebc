"""The record of a profile: plain dataclasses that refuse what cannot be, as JSON; samples as parquet."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eugen.timing.energy import Energy
from eugen.timing.latency import PairedLatency
from eugen.timing.memory import Memory
from eugen.timing.placements import PlacedLatency
from eugen.timing.roofline import Rates

FORMAT = 1
"""Of the record; `Profile.read` refuses another."""
TIMED, REFUSED, FAILED, CUT = "timed", "refused", "failed", "cut"
"""What became of a row; `cut`: time was up before it began."""


@dataclass(frozen=True)
class Environment:
    """Code and machine; None where the system does not tell."""

    device: str
    driver: str | None
    cores: int
    threads: int
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    load_before: float | None
    load_after: float | None = None


@dataclass(frozen=True)
class Measured:
    """A row that was timed against the dense model.

    Attributes:
        speedup, low, high: dense / row and its interval over placements (`PlacedLatency.speedup`).
        scatter: standard deviation of the placements' log ratios.
        dense_ms, row_ms: medians over all samples.
        samples: every pair of every placement.
        macs, weight_bytes, io_bytes, activation_bytes: `eugen.cost.CallCost`.
        macs_limit: dense MACs / row MACs, the speed-up if time followed products alone.
        limit_ms, binds: the roofline's least time on this device, and its side.
        of_limit: limit_ms / row_ms.
        check_error: the largest error of the form that was timed, relative RMS.
        config: of the layer.
        trace: file with the row's trace.
    """

    speedup: float
    low: float
    high: float
    scatter: float
    dense_ms: float
    row_ms: float
    samples: PlacedLatency
    macs: dict[str, int]
    weight_bytes: int
    io_bytes: int
    activation_bytes: int
    macs_limit: float | None
    limit_ms: float
    binds: str
    of_limit: float
    memory: Memory
    energy: Energy
    check_error: float
    config: str
    trace: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.speedup <= self.high < math.inf:
            raise ValueError(
                f"speedup={self.speedup} [{self.low}, {self.high}] must be positive, finite, ordered"
            )
        every = (*self.samples.base_ms, *self.samples.other_ms)
        if not all(0 < ms < math.inf for ms in every):
            raise ValueError("samples must be positive and finite milliseconds")


@dataclass(frozen=True)
class Row:
    """One row under one condition: its measurement, or why there is none."""

    row: str
    call: str
    batch: int
    scope: str
    part: str
    status: str
    reason: str | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if self.status not in (TIMED, REFUSED, FAILED, CUT):
            raise ValueError(f"status={self.status!r} must be {TIMED}, {REFUSED}, {FAILED} or {CUT}")
        if (self.measured is None) == (self.status == TIMED) or (self.reason is None) == (
            self.status != TIMED
        ):
            raise ValueError(f"row {self.row!r}: {self.status} must come with its measurement or its reason")

    @property
    def condition(self) -> tuple[str, int, str]:
        """Rows with the same one are compared with each other."""
        return self.call, self.batch, self.part


@dataclass(frozen=True)
class Profile:
    """A whole run: one model, one device, one dtype."""

    model: str
    device: str
    dtype: str
    settings: dict[str, Any]
    environment: Environment
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    wall_seconds: float = 0.0
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """JSON, whole or not at all; NaN is refused."""
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    def write_samples(self, path: Path) -> None:
        """Every pair as a line of a parquet table; needs pyarrow.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
        """
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(self.samples()), path)

    def samples(self) -> list[dict[str, Any]]:
        """Every pair of every timed row, with the row's name and condition."""
        return [
            {"row": row.row, "call": row.call, "batch": row.batch, "scope": row.scope, "part": row.part}
            | {"placement": index, "pair": pair, "dense_ms": dense, "row_ms": own}
            for row in self.rows
            if row.measured
            for index, placed in enumerate(row.measured.samples.placements)
            for pair, (dense, own) in enumerate(zip(placed.base_ms, placed.other_ms, strict=True))
        ]

    @classmethod
    def read(cls, path: Path) -> Profile:
        """A record as it was written.

        Raises:
            ValueError: another format, or contents that no profile has.
        """
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, found: Any) -> Profile:
        """A record from what its JSON holds.

        Raises:
            ValueError: another format, or contents that no profile has.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            form = found.get("format") if isinstance(found, dict) else None
            raise ValueError(f"format {form!r} is not {FORMAT}: profile anew")
        try:
            parts = {
                "environment": Environment(**found["environment"]),
                "rates": Rates(**found["rates"]),
                "rows": [_row(row) for row in found["rows"]],
            }
            return cls(**{**found, **parts})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no record of a profile ({error})") from error

    def ended(self, rows: list[Row], rates: Rates, load: float | None, seconds: float) -> Profile:
        """This profile with its results."""
        after = replace(self.environment, load_after=load)
        return replace(self, rows=rows, rates=rates, environment=after, wall_seconds=round(seconds, 1))


def _row(found: dict[str, Any]) -> Row:
    inner = found["measured"]
    if inner is None:
        return Row(**found)
    placements = [PairedLatency(**placement) for placement in inner["samples"]["placements"]]
    typed = {
        "samples": PlacedLatency(placements),
        "memory": Memory(**inner["memory"]),
        "energy": Energy(**inner["energy"]),
    }
    return Row(**{**found, "measured": Measured(**{**inner, **typed})})


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
