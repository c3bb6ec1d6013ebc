"""Rows of a profile: which layer stands in the place of the dense blocks, and how the model runs.

`dense` is the model itself (beside its own copy: the control), any name of `eugen.layers()` a layer,
`int8_of_eugen` a layer around another one, `compile` and `compile_of_…` what torch.compile makes of it.
A name may have options: `eugen(sharing=powers)`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import eugen
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.surgery import put
from eugen.timing.spec import parse, split

CONTROL, COMPILE, OF = "dense", "compile", "_of_"
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5}
COARSEST = 3e-2
"""Relative RMS of a block's fast path beside its definition; a dtype that is not listed is half precision."""


@dataclass(frozen=True)
class RowName:
    """A parsed row; `layer` is what stands behind `compile_of_`."""

    name: str
    layer: str
    compiled: bool


def parse_rows(text: str) -> list[RowName]:
    """The control, then every row of the text in its order.

    Raises:
        ValueError: a name that no layer has, or one around another that holds none.
    """
    rows = []
    for name in split(text):
        head, held, inner = name.partition(OF)
        compiled = head == COMPILE
        rows.append(RowName(name, (inner if held else CONTROL) if compiled else name, compiled))
        _kinds(rows[-1].layer)
    return [RowName(CONTROL, CONTROL, False), *(row for row in rows if row.name != CONTROL)]


def available() -> list[str]:
    """Every name that `parse_rows` knows without options; any of them goes behind `compile_of_` too."""
    holders = [name for name, kind in eugen.layers().items() if _holds(kind)]
    inner = [name for name in eugen.layers() if name not in (CONTROL, *holders)]
    around = [f"{name}{OF}{within}" for name in holders for within in inner]
    return [CONTROL, *(n for n in eugen.layers() if n != CONTROL), *around, COMPILE, f"{COMPILE}{OF}eugen"]


def config_of(layer: str, budget: float) -> LayerConfig:
    """The layer's configuration at this budget, or at the only one that it has.

    Raises:
        ValueError: an option or a budget that the configuration refuses.
    """
    config: LayerConfig | None = None
    for kind, options in reversed(_kinds(layer)):
        try:
            config = kind(**options) if config is None else kind(**options, of=config)  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise ValueError(f"row {layer!r}: {error}") from error
    assert config is not None
    fixed = config.budget is not None or config.only_budget is not None
    return config if fixed else dataclasses.replace(config, budget=budget)


def build(layer: str, dense: nn.Module, budget: float, inputs: dict[str, Tensor]) -> tuple[nn.Module, float]:
    """The model with this layer in every block, merged as it is deployed, and its largest error.

    Args:
        dense: model on its device, in its dtype; left as it was.
        inputs: of each block by its name; what the check runs on.

    Raises:
        ValueError: a block that the layer does not take.
        ArithmeticError: a fast path that is not its definition, or not finite.
    """
    if layer == CONTROL:
        return copy.deepcopy(dense), 0.0
    replaced = eugen.replace(dense, config_of(layer, budget))
    model, worst = replaced.model, 0.0
    with torch.no_grad():
        for site in replaced.sites:
            merged = site.layer.eval().merged()
            worst = max(worst, check(merged, site.layer, inputs[site.name]))
            model = put(model, site.name, merged)
    return model, worst


def check(fast: FFNLayer, layer: FFNLayer, x: Tensor) -> float:
    """Relative RMS error of the form that is timed against the definition of the layer as it was built."""
    dtypes = (x.dtype, fast.precision)
    allowed = max(TOLERANCES.get(dtype, COARSEST) for dtype in dtypes)
    return compare_outputs(fast(x), layer.reference(x), allowed)


def compare_outputs(actual: Tensor, expected: Tensor, allowed: float) -> float:
    """Relative RMS error, refused by an ArithmeticError beyond what is allowed or if not finite."""
    scale = torch.linalg.vector_norm(expected.double())
    error = float(torch.linalg.vector_norm(actual.double() - expected.double()) / scale)
    if not error <= allowed:  # NaN fails too
        raise ArithmeticError(f"result is {error:.1e} off its reference, {allowed:.0e} is allowed: not timed")
    return error


def _kinds(layer: str) -> list[tuple[type[LayerConfig], dict]]:
    """Configurations from the outermost to the innermost, with their options."""
    found = []
    for part in layer.split(OF):
        name, options = parse(part)
        if name not in eugen.layers():
            known = ", ".join(available())
            raise ValueError(
                f"no row is called {part!r} (in {layer!r}): use {known}, or {COMPILE}{OF} one of them"
            )
        found.append((eugen.layers()[name], options))
    for kind, _ in found[:-1]:
        if not _holds(kind):
            raise ValueError(f"row {layer!r}: {kind.name!r} holds no other layer")
    return found


def _holds(kind: type[LayerConfig]) -> bool:
    return any(field.name == "of" for field in dataclasses.fields(kind))
