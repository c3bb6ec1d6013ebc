"""A plan: which layer takes each block's place, as data that can be written down and read again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from eugen.config import LayerConfig
from eugen.layers import layers

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What `replace` takes as `config`, with what is known about it.

    Attributes:
        blocks: the configuration of each replaced block by its path; blocks not named stay dense.
        figures: predicted and measured values by name, for people and reports.
    """

    blocks: Mapping[str, LayerConfig]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as text; `from_json` gives an equal plan."""
        blocks = {name: config_data(config) for name, config in self.blocks.items()}
        data = {"format": FORMAT, "blocks": blocks, "figures": plain(self.figures)}
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of a text.

        Raises:
            ValueError: it is no plan, of another format, or names a layer or a field that does not exist.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a plan: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a plan of format {FORMAT}")
        blocks = {name: config_from_data(section) for name, section in data["blocks"].items()}
        return cls(blocks, data["figures"])


def plain(value: Any) -> Any:
    """Values of JSON, which knows no NaN and no infinity: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def config_data(config: LayerConfig) -> dict[str, Any]:
    """A configuration as plain values: its layer's name and the fields that differ from their defaults."""
    data: dict[str, Any] = {"layer": config.name}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if value != default:
            data[each.name] = config_data(value) if isinstance(value, LayerConfig) else value
    return data


def config_from_data(data: Mapping[str, Any]) -> LayerConfig:
    """The configuration of `config_data`.

    Raises:
        ValueError: an unknown layer or field, or a value that the configuration refuses.
    """
    fields, known = dict(data), layers()
    name = fields.pop("layer", None)
    if name not in [*known]:
        raise ValueError(f"layer={name!r} is unknown: use one of {', '.join(known)}")
    types = get_type_hints(known[name])
    allowed = [each.name for each in dataclasses.fields(known[name])]
    for key, value in fields.items():
        if key not in allowed:
            raise ValueError(f"layer {name!r} has no field {key!r}: it has {', '.join(allowed)}")
        if types[key] is LayerConfig:
            fields[key] = config_from_data(value)
    return known[name](**fields)
