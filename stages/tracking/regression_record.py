"""The record of a regression measurement, as `python -m benchmarks.regression` leaves it.

`results/regressions/<time>-<commit>.json`; the program that writes it stands on torch alone, so what it wrote
is checked here. Keys that a later version adds are ignored; what it changes has another `schema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

FOLDER = Path("results/regressions")
Verdict = Literal["pass", "fail", "inconclusive", "void"]
Sha1 = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class RecordFault(ValueError):
    """A file is no record that this code reads. The message names file, fault and cure."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class Base(_Part):
    """What is compared to: the ref as it was asked for, and its commit."""

    ref: str
    commit: Sha1


class Candidate(Base):
    """What is judged."""

    dirty: bool


class Host(_Part):
    """The machine; absolute times of two fingerprints are never compared."""

    fingerprint: Name
    processor: str
    cores: PositiveInt
    memory_gb: PositiveFloat
    accelerator: str | None = None


class Ratio(_Part):
    """Median of the paired ratios of times, and its 99 % interval."""

    pairs: NonNegativeInt
    ratio: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat


class Latency(Ratio):
    """Candidate over base: above 1 the candidate is slower."""

    base_ms: PositiveFloat
    candidate_ms: PositiveFloat
    confirmed: bool | None = None
    """Whether a second measurement agreed with the alarm of the first; None where there was none."""
    log_ratios: list[float] = []


class Quality(_Part):
    """Candidate minus base, paired over seeds, with its interval."""

    name: str
    better: Literal["higher", "lower"]
    seeds: list[int]
    base: list[float]
    candidate: list[float]
    difference: float
    low: float
    high: float


class Case(_Part):
    """One network that both sides ran; what was not measured is None."""

    name: Name
    verdict: Verdict
    reason: str
    exact: dict[str, tuple[int | None, int | None]] = {}
    """MACs, parameters, bytes: base, candidate."""
    latency: Latency | None = None
    control: Ratio | None = None
    """A second process of the base over the first: 1, if the measurement can be trusted."""
    quality: Quality | None = None


class Regression(_Part):
    """One comparison of a candidate with its base on one machine."""

    version: Literal[1] = Field(alias="schema")
    time: AwareDatetime
    seconds: NonNegativeFloat
    base: Base
    candidate: Candidate
    host: Host
    versions: dict[str, str] = {}
    injected: NonNegativeFloat = 0.0
    """Share by which the candidate was slowed down on purpose; such a run tests the alarm, not the code."""
    verdict: Verdict
    reason: str
    cases: list[Case]

    @property
    def is_drill(self) -> bool:
        """Whether a slow-down was injected: never counted as a result."""
        return self.injected > 0


def read(path: Path) -> Regression:
    """Read one record. Raises `RecordFault`."""
    try:
        return Regression.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecordFault(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the file"
        cure = "delete it, or read it with the version that wrote it"
        raise RecordFault(
            f"{path}: no regression record of schema 1 ({where}: {fault['msg']}); {cure}"
        ) from None


def read_all(folder: Path) -> tuple[list[Regression], list[str]]:
    """All records of a folder, newest first, and a sentence on each file that is none."""
    records, faults = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read(path))
        except RecordFault as error:
            faults.append(str(error))
    return sorted(records, key=lambda record: record.time, reverse=True), faults
