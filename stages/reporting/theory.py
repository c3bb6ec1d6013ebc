"""The ledger's answer to the paper's theorems, from the record of `python -m benchmarks.estimator`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from stages.reporting import text
from stages.reporting.findings import Finding
from stages.reporting.inputs import read_record
from stages.tracking.record import CellRecord, Record

ESTIMATOR = Path("reports", "benchmarks", "estimator.json")
"""Stages run in the repository root."""
COMMAND = "`python -m benchmarks.estimator`"
LEAST_DRAWS = 20_000
ROUNDING = 1e-6
"""A relative bias below this is the rounding of rows drawn in float32."""
PLAIN = "orthogonal"
"""Rows of length √d, the library's own; others are named beside them."""


class Bias(Record):
    """Relative bias of one polynomial's estimate under one kind of rows."""

    projection: str
    degree: PositiveInt
    sign: Literal["positive", "negative"]
    exact: float
    relative_bias: float
    low: float
    high: float
    z: float
    draws: PositiveInt


class Variance(Record):
    """A measured variance beside the theorem's."""

    projection: str
    order: PositiveInt
    cosine: float
    m: PositiveInt
    variance: PositiveFloat
    relative_error: PositiveFloat
    closed_form: float = Field(ge=0)


class Slope(Record):
    """Slope of log variance on log m."""

    projection: str
    order: PositiveInt
    cosine: float
    slope: float
    low: float
    high: float


class Ratio(Record):
    """Variance of orthogonal rows over that of Gaussian ones."""

    projection: str
    order: PositiveInt
    cosine: float
    m: PositiveInt
    ratio: float
    low: float
    high: float
    closed_form: float = Field(ge=0)


class Concentration(Record):
    """Failures against m: rate of the fall, and whether it steepens."""

    projection: str
    order: PositiveInt
    threshold: PositiveFloat
    m: list[PositiveInt]
    failures: list[NonNegativeInt]
    rate: float
    rate_low: float
    curvature: float
    curvature_high: float


class Settings(Record):
    """How much was drawn, of what."""

    draws: PositiveInt
    seed: int
    width: PositiveInt
    confidence: float
    cosines: list[float]


class Machine(Record):
    """Where and with which code."""

    commit: str
    dirty: bool
    versions: dict[str, str]
    processor: str
    cores: PositiveInt
    accelerator: str | None
    load: float | None
    threads: PositiveInt


class EstimatorRecord(Record):
    """The whole record; the intervals of a section hold together with the confidence of the settings."""

    format: Literal[1]
    benchmark: Literal["estimator"]
    environment: Machine
    settings: Settings
    bias: list[Bias] = Field(min_length=1)
    variance: list[Variance] = Field(min_length=1)
    slope: list[Slope] = Field(min_length=1)
    ratio: list[Ratio] = Field(min_length=1)
    concentration: list[Concentration] = Field(min_length=1)
    wall_seconds: PositiveFloat


class _Bounded(Protocol):
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def theorems(records: list[CellRecord]) -> list[Finding]:
    """Unbiased, 1/m, concentration, orthogonal rows. The cells' records say nothing of it.

    Raises:
        ReportError: the record is there, but not valid.
    """
    if not ESTIMATOR.is_file():
        return [Finding(text.NONE, f"run {COMMAND}", "open")]
    record = read_record(ESTIMATOR, EstimatorRecord, f"run {COMMAND} again")
    if record.environment.dirty or record.settings.draws < LEAST_DRAWS:
        cure = f"run {COMMAND} from a clean commit with {LEAST_DRAWS:,} draws or more"
        return [Finding(text.NONE, f"the record is provisional: {cure}", "open")]
    return [_unbiased(record), _falls_with_m(record), _concentrates(record), *_orthogonal(record)]


def _unbiased(record: EstimatorRecord) -> Finding:
    held = [b for b in record.bias if _covers(b, 0) or max(abs(b.low), abs(b.high)) < ROUNDING]
    widest = 100 * max(b.high - b.low for b in record.bias) / 2
    largest = max(abs(b.z) for b in record.bias)
    ours = (
        f"{_of(held, record.bias)} intervals of the bias cover 0; the widest is ±{text.number(widest, 2)} % "
        f"of the value, the largest |z| {text.number(largest, 2)}"
    )
    degrees = text.listing(sorted({str(b.degree) for b in record.bias}))
    where = (
        f"layer computed from weights, degrees {degrees}, coefficients of both signs, {_kinds(record.bias)}"
    )
    return Finding(ours, f"{where}; {_drawn(record)}", _all(held, record.bias))


def _falls_with_m(record: EstimatorRecord) -> Finding:
    held = [s for s in record.slope if _covers(s, -1)]
    slopes = [s.slope for s in record.slope]
    ours = (
        f"slopes of log variance on log m from {_signed(min(slopes))} to "
        f"{_signed(max(slopes))}; {_of(held, record.slope)} intervals cover −1"
    )
    sizes = sorted({v.m for v in record.variance})
    where = f"m = {sizes[0]} to {sizes[-1]}, {_orders(record.slope)}, {_kinds(record.slope)}"
    whole = "orthogonal rows in whole blocks"
    return Finding(ours, f"{where}, {whole}; {_drawn(record)}", _all(held, record.slope))


def _concentrates(record: EstimatorRecord) -> Finding:
    held = [c for c in record.concentration if c.rate_low > 0 and c.curvature_high < 0]
    rates = [c.rate for c in record.concentration]
    ours = (
        f"failure probability falls by a factor e^−{text.number(min(rates), 2)} to "
        f"e^−{text.number(max(rates), 2)} for each feature added, and faster than any power of m in "
        f"{_of(held, record.concentration)} cases"
    )
    sizes = record.concentration[0].m
    where = f"m = {sizes[0]} to {sizes[-1]}, {_orders(record.concentration)}, {_kinds(record.concentration)}"
    return Finding(ours, f"{where}; {_drawn(record)}", _all(held, record.concentration))


def _orthogonal(record: EstimatorRecord) -> list[Finding]:
    """One finding a verdict; orders that share it stand together."""
    plain = [r for r in record.ratio if r.projection == PLAIN]
    by_verdict: dict[Literal["reproduced", "not reproduced"], list[str]] = {}
    for order in sorted({r.order for r in plain}):
        group = [r for r in plain if r.order == order]
        below = [r for r in group if r.high < 1]
        ends = [text.number(round(end(r.ratio for r in group), 4), 2) for end in (min, max)]
        said = f"order {order}: {ends[0]} to {ends[1]} of the variance of Gaussian rows, "
        by_verdict.setdefault(_all(below, group), []).append(f"{said}{_of(below, group)} intervals below 1")
    sizes = text.listing([str(m) for m in sorted({r.m for r in plain})])
    cosines = text.listing([f"{cosine:g}" for cosine in record.settings.cosines])
    width = record.settings.width
    where = f"rows of length √{width}, m = {sizes}, cosine of w and x {cosines}{_other_rows(record)}"
    return [
        Finding("; ".join(said), f"{where}; {_drawn(record)}", verdict)
        for verdict, said in by_verdict.items()
    ]


def _other_rows(record: EstimatorRecord) -> str:
    """What orthogonal rows of random length do, which papers use as well."""
    ratios = [r.closed_form for r in record.ratio if r.projection != PLAIN]
    if not ratios:
        return ""
    ends = text.number(min(ratios), 2), text.number(max(ratios), 3)
    return f"; with χ-distributed lengths {ends[0]} to {ends[1]} by closed form"


def _covers(interval: _Bounded, value: float) -> bool:
    return interval.low <= value <= interval.high


def _all(held: Sequence[Record], of: Sequence[Record]) -> Literal["reproduced", "not reproduced"]:
    return "reproduced" if len(held) == len(of) else "not reproduced"


def _of(held: Sequence[Record], of: Sequence[Record]) -> str:
    return f"{len(held)} of {len(of)}"


def _kinds(results: Sequence[Bias | Slope | Concentration]) -> str:
    return f"{text.listing(list(dict.fromkeys(r.projection for r in results)))} rows"


def _orders(results: Sequence[Slope | Concentration]) -> str:
    return f"orders {text.listing(sorted({str(r.order) for r in results}))}"


def _drawn(record: EstimatorRecord) -> str:
    settings = record.settings
    return (
        f"float64, width {settings.width}, {settings.draws:,} draws each, intervals of one line hold "
        f"together with {100 * settings.confidence:g} %"
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
