"""params.yaml, validated: what runs, with which sizes, budgets and seeds.

Tasks' own sections are validated by the tasks; `stages.validate` checks everything at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
)

from stages import rows
from stages.deployment import Precision
from stages.faults import ParamsError, Section, allow, check_name, validate
from stages.recipe import Precision as TrainingPrecision
from stages.recipe import TrainingRecipe
from stages.rows import Method

PARAMS_FILE = Path("params.yaml")


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("each value may occur once: a repeated one would count as a further measurement")
    return values


Budgets = Annotated[list[Annotated[float, Field(gt=0, le=1)]], AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_distinct)]
Rates = Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_distinct)]


class RunSettings(Section):
    """What all stages share."""

    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    threads: PositiveInt = 1
    """CPU threads of each stage's process."""
    timing_threads: PositiveInt = 2
    """CPU threads of the profile stage, which runs alone."""
    provisional: bool = False


class TransferSettings(Section):
    """Layer-wise transfer, the same for every method."""

    budgets: Budgets = Field(min_length=1)
    seeds: Seeds = Field(min_length=1)
    calibration_tokens: PositiveInt
    refine_steps: int = Field(default=0, ge=0)
    blocks: PositiveInt | None = None
    """How many blocks are replaced, the last ones; None for all."""


class FinetuneSettings(Section):
    """End-to-end fine-tuning, the same for every method; the validation part chooses the learning rate."""

    budgets: Budgets = Field(default_factory=list)
    seeds: Seeds = Field(default_factory=list)
    steps: int = Field(ge=0)
    batch_size: PositiveInt
    micro_batch: PositiveInt | None = None
    """As in the recipe of training; None: the whole batch."""
    precision: TrainingPrecision = "float32"
    learning_rates: list[PositiveFloat] = Field(min_length=1)

    def recipe(self, learning_rate: float, seed: int) -> TrainingRecipe:
        """The training that this is."""
        return TrainingRecipe(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            learning_rate=learning_rate,
            warmup=0.2,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            seed=seed,
            precision=self.precision,
            evaluate_every=-(-self.steps // 2),
        )


class ProfileSettings(Section):
    """Whole-model latency beside the dense network's."""

    batches: list[PositiveInt] = Field(min_length=1)
    pairs: int = Field(ge=10)
    """Of a comparison, over all placements; rounded up to an even number in each."""
    placements: int = Field(default=12, ge=3)
    """How often both networks are copied to fresh memory (docs/profiling.md)."""
    seconds: PositiveFloat = 6.0
    """Time limit of one comparison; 2 pairs of each placement are measured whatever they take."""
    precisions: Annotated[list[Precision], AfterValidator(_distinct)] = Field(["float32"], min_length=1)
    """In each, both networks are timed and the method's quality is judged; the report's figures are of the
    first."""


class TaskSettings(Section):
    """A task's section; each task narrows `data` and `baseline` to its own."""

    data: Section
    baseline: Section
    transfer: TransferSettings
    finetune: FinetuneSettings
    profile: ProfileSettings


class ScratchVariant(Section):
    """One comparison of rows trained from scratch: how it differs from the others."""

    sizes: dict[str, Any] = Field(default_factory=dict)
    """Keys of the task's `baseline`, for another size of network."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe, for example more steps."""
    blocks: PositiveInt | None = None
    """How many blocks are replaced, the last ones; None for all."""
    budgets: Budgets | None = None
    seeds: Seeds | None = None
    learning_rates: Rates | None = None
    rows: list[str] | None = None
    """The rows that take part; None for all."""


class ScratchSettings(Section):
    """Rows trained from scratch on one task. Every rate is tried with the first seed; the validation part
    chooses, and the other seeds follow at that rate.
    """

    budgets: Budgets = Field(min_length=1)
    seeds: Seeds = Field(min_length=1)
    learning_rates: Rates
    variants: dict[str, ScratchVariant] = Field(min_length=1)
    timing_pairs: int = Field(default=20, ge=10)
    """Training steps of row and dense network that are timed side by side."""


@dataclasses.dataclass(frozen=True)
class Params:
    """All of params.yaml. `tasks` are validated by each task's own settings (`stages.tasks`)."""

    profile: str
    run: RunSettings
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, Method]
    scratch_rows: dict[str, Method] = dataclasses.field(default_factory=dict)
    scratch_tasks: dict[str, ScratchSettings] = dataclasses.field(default_factory=dict)
    """What is trained from scratch: every row on every task of these."""

    def method(self, name: str) -> Method:
        """One row by name."""
        if name not in self.methods:
            raise ParamsError(f"unknown method {name!r}: params.yaml has {', '.join(self.methods)}")
        return self.methods[name]


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and validate everything but the tasks' own sections.

    Raises:
        ParamsError: the file is missing, no YAML, or holds an unknown or wrong key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} is missing: copy a profile, for example `cp params/cpu.yaml {path}`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold the keys profile, run, tasks, methods and scratch")
    allow(raw, ("profile", "run", "tasks", "methods", "scratch"), where="", required=True)
    methods = {name: rows.parse(name, fields, "methods") for name, fields in _mapping(raw, "methods").items()}
    run = validate(RunSettings, raw["run"], "run")
    tasks = _mapping(raw, "tasks")
    for name in tasks:
        check_name(name, "tasks")
    scratch_rows, scratch_tasks = _scratch(raw["scratch"], tasks)
    return Params(str(raw["profile"]), run, tasks, methods, scratch_rows, scratch_tasks)


def _scratch(value: Any, tasks: dict[str, Any]) -> tuple[dict[str, Method], dict[str, ScratchSettings]]:
    """Rows and tasks of the section `scratch`; either may be empty."""
    if not isinstance(value, dict):
        raise ParamsError(
            f"scratch = {value!r}: must be a mapping of rows and tasks, both of which may be {{}}"
        )
    allow(value, ("rows", "tasks"), where="scratch.", required=True)
    for key in ("rows", "tasks"):
        if not isinstance(value[key], dict):
            raise ParamsError(f"scratch.{key} = {value[key]!r}: must be a mapping, {{}} for none")
    known = {name: rows.parse(name, fields, "scratch.rows") for name, fields in value["rows"].items()}
    trained = {}
    for name, section in value["tasks"].items():
        where = f"scratch.tasks.{name}"
        if name not in tasks:
            raise ParamsError(f"{where}: there is no such task under `tasks`, which has {', '.join(tasks)}")
        trained[name] = validate(ScratchSettings, section, where)
        for variant, settings in trained[name].variants.items():
            check_name(variant, f"{where}.variants")
            for row in settings.rows or []:
                if row not in known:
                    fault = f"{where}.variants.{variant}.rows = {row!r}: unknown row"
                    raise ParamsError(f"{fault}, scratch.rows has {', '.join(known)}")
    return known, trained


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw[key]
    if not (isinstance(value, dict) and value):
        raise ParamsError(f"{key} = {value!r}: must be a mapping with at least one entry")
    return value
