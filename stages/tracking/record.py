"""The record of a cell: what one (task, method) pair of the matrix measured.

A cell writes exactly one `CellRecord` as JSON. Everything a person reads later
(results.csv, the report, the README table, MLflow's metrics) is derived from it.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from stages.tracking.whole_file import write_json

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of everything written to disk: unknown keys and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Environment(Record):
    """What a number depends on besides the parameters."""

    commit: str
    """Git commit of the code, `unknown` outside a repository."""
    dirty: bool
    """True if a source file differs from the commit; params.yaml and dvc.lock do not count."""
    versions: dict[str, str]
    """Python and the packages that compute: torch, timm, transformers, …"""
    processor: str
    cores: PositiveInt
    memory_gb: PositiveFloat
    accelerator: str | None = None
    fingerprint: str
    """Short hash of processor, cores, memory and accelerator: the same on equal hosts."""


class SeedResult(Record):
    """One seed at one budget: the dense network's quality beside the method's."""

    seed: NonNegativeInt
    budget: float = Field(gt=0, le=1)
    quality_dense: float
    quality_transfer_only: float
    quality_finetuned: float | None = None
    """None where this seed or budget was not fine-tuned."""
    quality_closed_form: float | None = None
    """Transfer in closed form alone, where `quality_transfer_only` is after local refinement too."""
    validation_transfer_only: float | None = None
    """Quality on the validation part: what may choose between rows."""
    validation_finetuned: float | None = None
    learning_rate: NonNegativeFloat | None = None
    """The learning rate that won on the validation part; 0 if not fine-tuning at all was best."""
    extra_transfer_only: dict[str, float] = {}
    """Further quality measures by name, after transfer alone."""
    extra_finetuned: dict[str, float] = {}
    fit_r2: list[float] = []
    """Held-out (weighted) R² of each replaced block, front to back."""
    num_features: list[PositiveInt] = []
    """Features of each replaced block, front to back."""
    transfer_seconds: NonNegativeFloat
    finetune_seconds: NonNegativeFloat = 0.0


class Omission(Record):
    """A budget at which a cell could not be made, and why."""

    budget: float = Field(gt=0, le=1)
    reason: str


class Cost(Record):
    """Exact cost of the whole model and of its feed-forward blocks at one budget."""

    budget: float = Field(gt=0, le=1)
    params: PositiveInt
    params_dense: PositiveInt
    ffn_params: PositiveInt
    ffn_params_dense: PositiveInt
    macs: PositiveInt
    """Whole model, one example of the profiled shape."""
    macs_dense: PositiveInt
    ffn_macs: PositiveInt
    """All replaced blocks, one token."""
    ffn_macs_dense: PositiveInt
    weight_bytes: PositiveInt
    weight_bytes_dense: PositiveInt


class Latency(Record):
    """Interleaved, paired whole-model latencies: sample i of both lists ran side by side."""

    budget: float = Field(gt=0, le=1)
    device: str
    dtype: str
    """Precision of both networks (`stages.deployment.Precision`)."""
    batch: PositiveInt
    threads: PositiveInt
    placements: PositiveInt = 1
    """In how many places in memory both were timed; the samples stand placement by placement."""
    dense_ms: list[float]
    method_ms: list[float]
    speedup: PositiveFloat
    """Dense / method: mean over placements of their medians; of one placement the median over pairs."""
    speedup_low: PositiveFloat
    speedup_high: PositiveFloat
    """95 % interval, Student's over placements; of one placement the bootstrap's over pairs."""
    speedup_limit: PositiveFloat
    """The same ratio if time followed MACs."""
    least_ms_dense: PositiveFloat | None = None
    least_ms_method: PositiveFloat | None = None
    """The roofline's: products and bytes at the rates of this device (docs/profiling.md)."""
    binds: Literal["MACs", "bytes"] | None = None
    """What sets the method's least time."""
    peak_bytes_dense: PositiveInt
    peak_bytes_method: PositiveInt
    reserved_bytes_dense: PositiveInt | None = None
    reserved_bytes_method: PositiveInt | None = None
    """What CUDA's allocator held."""
    joules_dense: PositiveFloat | None = None
    joules_method: PositiveFloat | None = None
    """Of one call, idle power included; None without a meter."""
    energy_meter: str | None = None

    @property
    def limit_share(self) -> float | None:
        """The roofline's least time over the median latency; None in records that lack it."""
        return None if self.least_ms_method is None else self.least_ms_method / median(self.method_ms)


class PrecisionQuality(Record):
    """Quality of the first seed's network, after its last stage, in one precision."""

    budget: float = Field(gt=0, le=1)
    dtype: str
    quality: float


class CellRecord(Record):
    """Everything one (task, method) cell measured."""

    schema_version: int = SCHEMA_VERSION
    task: str
    method: str
    profile: str
    provisional: bool
    """Set by the profile (smoke sizes), by a dirty tree, or by a single seed."""
    quality_name: str
    higher_is_better: bool
    params: dict[str, Any]
    """The cell's parameters: its task section and its method section, as validated."""
    dense_metrics: dict[str, float]
    """The dense network's own quality measures."""
    seeds: list[SeedResult]
    costs: list[Cost]
    latencies: list[Latency]
    precisions: list[PrecisionQuality] = []
    train_seconds_dense: NonNegativeFloat
    environment: Environment
    data_sha256: dict[str, str]
    weights_sha256: dict[str, str]
    stage_overhead_seconds: dict[str, float] = {}
    """Import, tracking and start-up by stage: wall time that was not the stage's own work."""
    omitted: list[Omission] = []
    """Budgets that buy nothing of this method on the task's blocks."""


class NotApplicable(Record):
    """In place of a cell's record: the method has no meaning for the task."""

    schema_version: int = SCHEMA_VERSION
    task: str
    method: str
    profile: str
    not_applicable: str = Field(min_length=1)
    """Why."""


class CurvePoint(Record):
    """Where a training stood."""

    step: NonNegativeInt
    seconds: NonNegativeFloat
    """Training alone, from its start."""
    train_loss: float
    """Mean since the last point."""
    validation: float
    """Quality on the validation part."""


class ScratchRun(Record):
    """One training from scratch."""

    variant: str
    budget: float = Field(gt=0, le=1)
    seed: NonNegativeInt
    learning_rate: PositiveFloat
    chosen: bool
    """Whether the rate is the one the row is compared at; the other rates ran with the first seed alone."""
    validation: float | None
    """Quality on the validation part, which chose the rate; None if the training diverged."""
    quality: float | None
    """On the test part."""
    extra: dict[str, float] = {}
    diverged: bool = False
    curve: list[CurvePoint] = []
    seconds: NonNegativeFloat


class ScratchCost(Record):
    """What a row costs at one budget of a variant, and how fast it trains beside the dense network."""

    variant: str
    budget: float = Field(gt=0, le=1)
    blocks: PositiveInt
    blocks_replaced: PositiveInt
    steps: PositiveInt
    batch_size: PositiveInt
    params: PositiveInt
    params_dense: PositiveInt
    macs: PositiveInt
    """Forward, whole model, one example."""
    macs_dense: PositiveInt
    ffn_macs: PositiveInt
    """Replaced blocks, one token."""
    ffn_macs_dense: PositiveInt
    step_ms_dense: list[float]
    step_ms: list[float]
    """Training steps (forward, backward, optimiser); sample i of both lists ran side by side."""
    training_speedup: PositiveFloat
    """Median over pairs of dense / row."""
    training_speedup_low: PositiveFloat
    training_speedup_high: PositiveFloat
    """Bootstrap 95 % interval of the median."""


class ScratchRecord(Record):
    """Everything that one row, trained from scratch on one task, measured."""

    schema_version: int = SCHEMA_VERSION
    task: str
    row: str
    profile: str
    provisional: bool
    quality_name: str
    higher_is_better: bool
    params: dict[str, Any]
    """The task's section, its section of `scratch.tasks`, and the row."""
    runs: list[ScratchRun]
    costs: list[ScratchCost]
    environment: Environment
    data_sha256: dict[str, str]
    omitted: list[Omission] = []
    not_applicable: str | None = None
    """Why the row has no meaning for the task; it has no runs then."""


class Failure(Record):
    """Why a cell has no record. Removed when the cell's stage starts again."""

    stage: str
    task: str
    method: str | None
    error: str
    traceback: str
    time: str


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all."""
    write_json(path, record.model_dump(mode="json"))
