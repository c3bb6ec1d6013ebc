"""Rows of the suite: a registered layer, the fields of its configuration, and how it is trained."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import eugen
from eugen import LayerConfig
from eugen.local_training import LocalRule, rules
from stages.faults import ParamsError, allow, check_name, check_type

AUTO = "auto"
"""In the place of a layer: `eugen.search` chooses one for each block."""
AUTO_TARGETS = ("macs", "time")
"""What its budget means: a fraction of the blocks' MACs, or the measured time that `prune` takes with it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the suite: a registered layer and its configuration, or a choice for each block."""

    name: str
    layer: str
    fields: dict[str, Any]
    """As in params.yaml; a layer inside a layer (`of`) is a mapping like the row's own."""
    training: LocalRule | None = None
    """How the whole network learns from scratch; None where blocks take over the trained network's work."""

    @property
    def target(self) -> str | None:
        """One of `AUTO_TARGETS` where a layer is chosen for each block, else None."""
        return self.fields["target"] if self.layer == AUTO else None

    @property
    def section(self) -> dict[str, Any]:
        """The row in full, as a record keeps it."""
        if self.training is None:
            return {"layer": self.layer, **self.fields}
        training = {"rule": self.training.name, **dataclasses.asdict(self.training)}
        return {"layer": self.layer, **self.fields, "training": training}

    def config(self, budget: float | None) -> LayerConfig:
        """The layer's configuration at a budget.

        Raises:
            ParamsError: the row has none, it chooses one for each block.
        """
        if self.layer == AUTO:
            raise ParamsError(f"row {self.name!r} chooses a layer for each block of a trained network")
        return _config(self.layer, self.fields, budget)

    def budgets(self, wanted: list[float]) -> list[float]:
        """The budgets to run: those wanted, or the one that the layer has (the dense block costs 1)."""
        only = None if self.layer == AUTO else self.config(None).only_budget
        return wanted if only is None else [only]


def parse(name: str, fields: Any, section: str) -> Method:
    """A row of params.yaml; `section` is where it stands there."""
    where = f"{section}.{name}"
    check_name(name, section)
    fields = {"layer": name} if fields is None else fields
    fields = {"layer": name, **fields} if isinstance(fields, dict) else fields
    if isinstance(fields, dict) and fields.get("layer") == AUTO:
        return _auto(name, where, fields)
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


def _auto(name: str, where: str, fields: dict[str, Any]) -> Method:
    """A row that chooses for each block."""
    allow(fields, ("layer", "target"), where=f"{where}.")
    target = fields.get("target", AUTO_TARGETS[0])
    if target not in AUTO_TARGETS:
        raise ParamsError(f"{where}.target = {target!r}: must be one of {', '.join(AUTO_TARGETS)}")
    return Method(name, AUTO, {"target": target})


def _training(where: str, value: Any) -> LocalRule:
    """A layer-local rule by its name, or a mapping of its name and its hyperparameters."""
    fields = {"rule": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise ParamsError(f"{where} = {value!r}: must be a rule or a mapping such as {{rule: mono_forward}}")
    fields = dict(fields)
    rule, known = fields.pop("rule", None), rules()
    if rule not in [*known]:
        raise ParamsError(f"{where}.rule = {rule!r}: unknown rule, use one of {', '.join(known)}")
    allow(fields, tuple(f.name for f in dataclasses.fields(known[rule])), where=f"{where}.")
    types = get_type_hints(known[rule])
    for key, field in fields.items():
        check_type(types[key], field, f"{where}.{key}")
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
    allow(fields, allowed, where=f"{where}.")
    types = get_type_hints(known[layer])
    for key, value in fields.items():
        if types[key] is LayerConfig:
            inner, checked = _layer(f"{where}.{key}", value)
            fields[key] = {"layer": inner, **checked}
            continue
        check_type(types[key], value, f"{where}.{key}")
    return layer, fields


def _config(layer: str, fields: dict[str, Any], budget: float | None) -> LayerConfig:
    inner = {key: dict(value) for key, value in fields.items() if isinstance(value, dict)}
    made = {key: _config(value.pop("layer"), value, None) for key, value in inner.items()}
    return eugen.layers()[layer](budget=budget, **{**fields, **made})
