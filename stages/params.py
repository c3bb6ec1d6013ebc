"""params.yaml, validated: what runs, with which sizes, budgets and seeds.

Tasks' own sections are validated by the tasks; `stages.validate` checks everything at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

import eugen
from eugen import LayerConfig
from eugen.local_training import LocalRule, rules

PARAMS_FILE = Path("params.yaml")

S = TypeVar("S", bound=BaseModel)


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("each value may occur once: a repeated one would count as a further measurement")
    return values


Budgets = Annotated[list[Annotated[float, Field(gt=0, le=1)]], AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_distinct)]


class ParamsError(ValueError):
    """A fault in params.yaml: names the key, its value and what is allowed."""


class Section(BaseModel):
    """Base of every section: an unknown key is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class FinetuneSettings(Section):
    """End-to-end fine-tuning, the same for every method; the validation part chooses the learning rate."""

    budgets: Budgets = []
    seeds: Seeds = []
    steps: int = Field(ge=0)
    batch_size: PositiveInt
    learning_rates: list[PositiveFloat] = Field(min_length=1)


class ProfileSettings(Section):
    """Whole-model latency beside the dense network's."""

    batches: list[PositiveInt] = Field(min_length=1)
    pairs: int = Field(ge=10)
    seconds: PositiveFloat = 6.0
    """Time limit of one comparison; at least 10 pairs are measured whatever they take."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TaskSettings(Section):
    """A task's section; each task narrows `data` and `baseline` to its own."""

    data: Section
    baseline: Section
    transfer: TransferSettings
    finetune: FinetuneSettings
    profile: ProfileSettings


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the suite: a registered layer and the fields of its configuration."""

    name: str
    layer: str
    fields: dict[str, Any]
    """As in params.yaml; a layer inside a layer (`of`) is a mapping like the row's own."""
    training: LocalRule | None = None
    """How the whole network learns from scratch; None where blocks take over the trained network's work."""

    @property
    def section(self) -> dict[str, Any]:
        """The row in full, as a record keeps it."""
        if self.training is None:
            return {"layer": self.layer, **self.fields}
        training = {"rule": self.training.name, **dataclasses.asdict(self.training)}
        return {"layer": self.layer, **self.fields, "training": training}

    def config(self, budget: float | None) -> LayerConfig:
        """The layer's configuration at a budget."""
        return _config(self.layer, self.fields, budget)

    def budgets(self, wanted: list[float]) -> list[float]:
        """The budgets to run: those wanted, or the one that the layer has (the dense block costs 1)."""
        only = self.config(None).only_budget
        return wanted if only is None else [only]


@dataclasses.dataclass(frozen=True)
class Params:
    """All of params.yaml. `tasks` are validated by each task's own settings (`stages.tasks`)."""

    profile: str
    run: RunSettings
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, Method]

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
        raise ParamsError(f"{path} must hold the keys profile, run, tasks and methods")
    _allow(raw, ("profile", "run", "tasks", "methods"), where="", required=True)
    methods = {name: _method(name, fields) for name, fields in _mapping(raw, "methods").items()}
    run = validate(RunSettings, raw["run"], "run")
    return Params(str(raw["profile"]), run, _mapping(raw, "tasks"), methods)


def validate(model: type[S], value: Any, where: str) -> S:
    """A section as its pydantic model, with faults told in params.yaml's own words."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ParamsError(_faults(error, where, model)) from None


def _method(name: str, fields: Any) -> Method:
    where = f"methods.{name}"
    fields = {"layer": name} if fields is None else fields
    fields = {"layer": name, **fields} if isinstance(fields, dict) else fields
    training = None
    if isinstance(fields, dict) and "training" in fields:
        training = _training(f"{where}.training", fields["training"])
        fields = {key: value for key, value in fields.items() if key != "training"}
    layer, checked = _layer(where, fields)
    try:
        _config(layer, checked, None)
    except ValueError as error:
        raise ParamsError(f"{where}: {error}") from None
    return Method(name, layer, checked, training)


def _training(where: str, value: Any) -> LocalRule:
    """A layer-local rule by its name, or a mapping of its name and its hyperparameters."""
    fields = {"rule": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise ParamsError(f"{where} = {value!r}: must be a rule or a mapping such as {{rule: mono_forward}}")
    fields = dict(fields)
    rule, known = fields.pop("rule", None), rules()
    if rule not in [*known]:
        raise ParamsError(f"{where}.rule = {rule!r}: unknown rule, use one of {', '.join(known)}")
    _allow(fields, tuple(f.name for f in dataclasses.fields(known[rule])), where=f"{where}.")
    types = get_type_hints(known[rule])
    for key, field in fields.items():
        _check_type(types[key], field, f"{where}.{key}")
    try:
        return known[rule](**fields)
    except ValueError as error:
        raise ParamsError(f"{where}: {error}") from None


def _layer(where: str, fields: Any) -> tuple[str, dict[str, Any]]:
    """A layer's name and its fields, checked against its configuration's, layers inside it too."""
    if not isinstance(fields, dict):
        raise ParamsError(f"{where} = {fields!r}: must be a mapping such as {{layer: eugen, order: 2}}")
    fields = dict(fields)
    layer = fields.pop("layer", None)
    known = eugen.layers()
    if layer not in [*known]:  # a list: the value may be anything, hashable or not
        raise ParamsError(f"{where}.layer = {layer!r}: unknown layer, use one of {', '.join(known)}")
    allowed = tuple(f.name for f in dataclasses.fields(known[layer]) if f.name != "budget")
    _allow(fields, allowed, where=f"{where}.")
    types = get_type_hints(known[layer])
    for key, value in fields.items():
        if types[key] is LayerConfig:
            inner, checked = _layer(f"{where}.{key}", value)
            fields[key] = {"layer": inner, **checked}
            continue
        _check_type(types[key], value, f"{where}.{key}")
    return layer, fields


def _check_type(wanted: Any, value: Any, where: str) -> None:
    try:
        TypeAdapter(wanted).validate_python(value, strict=True)
    except ValidationError as error:
        raise ParamsError(_faults(error, where)) from None


def _config(layer: str, fields: dict[str, Any], budget: float | None) -> LayerConfig:
    inner = {key: dict(value) for key, value in fields.items() if isinstance(value, dict)}
    made = {key: _config(value.pop("layer"), value, None) for key, value in inner.items()}
    return eugen.layers()[layer](budget=budget, **{**fields, **made})


def _allow(value: dict[str, Any], allowed: tuple[str, ...], *, where: str, required: bool = False) -> None:
    for key in value:
        if key not in allowed:
            raise ParamsError(f"{where}{key} = {value[key]!r}: unknown key, allowed are {', '.join(allowed)}")
    missing = [key for key in allowed if required and key not in value]
    if missing:
        raise ParamsError(f"{where}{missing[0]} is missing")


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw[key]
    if not (isinstance(value, dict) and value):
        raise ParamsError(f"{key} = {value!r}: must be a mapping with at least one entry")
    return value


def _faults(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    lines = []
    for fault in error.errors():
        key = ".".join([where, *map(str, fault["loc"])])
        if fault["type"] == "missing":
            lines.append(f"{key} is missing")
        elif model and fault["type"] == "extra_forbidden":
            allowed = ", ".join(_fields(model, fault["loc"][:-1]))
            lines.append(f"{key} = {fault['input']!r}: unknown key, allowed are {allowed}")
        else:
            lines.append(f"{key} = {fault['input']!r}: {fault['msg']}")
    return "; ".join(lines)


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that `path` leads to from the section `model`."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
