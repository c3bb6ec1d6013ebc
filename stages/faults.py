"""Sections of params.yaml, and their faults in its own words: key, value and what is allowed."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

S = TypeVar("S", bound=BaseModel)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Section(BaseModel):
    """Base of every section: an unknown key is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ParamsError(ValueError):
    """A fault in params.yaml: names the key, its value and what is allowed."""


def validate(model: type[S], value: Any, where: str) -> S:
    """A section as its pydantic model, with faults told in params.yaml's own words."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ParamsError(_faults(error, where, model)) from None


def check_name(name: Any, where: str) -> None:
    """Refuse a name that could lead out of a folder or say something to the shell: names become both."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ParamsError(
            f"{where}: the name {name!r} must be of letters, digits, '_', '-' and '.', at most 100, "
            "and begin with none of the last two"
        )


def allow(value: dict[str, Any], allowed: tuple[str, ...], *, where: str, required: bool = False) -> None:
    """Refuse unknown keys and, if `required`, missing ones."""
    for key in value:
        if key not in allowed:
            raise ParamsError(f"{where}{key} = {value[key]!r}: unknown key, allowed are {', '.join(allowed)}")
    missing = [key for key in allowed if required and key not in value]
    if missing:
        raise ParamsError(f"{where}{missing[0]} is missing")


def check_type(wanted: Any, value: Any, where: str) -> None:
    """Refuse a value that is not of the wanted type."""
    try:
        TypeAdapter(wanted).validate_python(value, strict=True)
    except ValidationError as error:
        raise ParamsError(_faults(error, where)) from None


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
    found: Any = model
    for part in path:
        if isinstance(found, type) and issubclass(found, BaseModel):
            found = found.model_fields[str(part)].annotation
        else:  # an entry of a mapping of sections
            found = get_args(found)[-1]
    return list(found.model_fields)
