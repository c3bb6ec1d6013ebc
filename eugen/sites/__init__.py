"""Where a model's feed-forward blocks are.

An adapter looks at one module and says whether it holds a block. Adapters are registered for a
module type (`register_site`), or know their modules by structure; `adapters/` has those of the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from eugen.ffn import DenseFFN, FFNLayer
from eugen.sites.adapters import BY_NAME, BY_STRUCTURE, NOT_SEARCHED
from eugen.sites.parts import Adapter, FFNParts, join, qualified_name

__all__ = ["Adapter", "FFNParts", "FFNSite", "find_ffns", "register_site"]


@dataclass(frozen=True)
class FFNSite:
    """One block of a model; paths are relative to the model, "" is the model itself."""

    name: str
    index: int
    """Position in the order of `named_modules`, counted over all blocks of the model."""
    dense: DenseFFN
    output: str
    bypass: tuple[str, ...]
    stream: str | None
    norm: str | None
    settings: tuple[tuple[str, Any], ...] = ()


_ADAPTERS: dict[str, Adapter] = dict(BY_NAME)


def register_site(module_type: type[nn.Module], adapter: Adapter) -> None:
    """Teach `find_ffns` a module type: `adapter(module)` returns its `FFNParts` (or a list of them), or None.

    A later registration for the same type replaces the earlier one; subclasses are covered too. What an
    adapter makes of a module whose block was replaced already does not count.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ValueError(f"module_type={module_type!r} must be a subclass of torch.nn.Module")
    _ADAPTERS[qualified_name(module_type)] = adapter


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """Every feed-forward block of the model, in the order of `model.named_modules()`.

    Blocks inside a block that was found are not searched. Layers put in by `replace` are no blocks.
    """
    sites: list[FFNSite] = []
    taken: list[str] = []
    for path, module in model.named_modules():
        if any(path == t or path.startswith(f"{t}.") or t == "" for t in taken):
            continue
        if isinstance(module, FFNLayer) or qualified_name(type(module)) in NOT_SEARCHED:
            taken.append(path)
            continue
        parts = [
            part
            for part in _adapt(module)
            if join(path, part.slot) not in taken
            and not isinstance(module.get_submodule(part.slot), FFNLayer)
        ]
        if parts:
            sites.extend([_site(path, part, len(sites) + i) for i, part in enumerate(parts)])
            # Only the slots are closed: a residual block's other children may hold blocks of their own.
            taken.extend(join(path, p) for part in parts for p in (part.slot, *part.bypass))
    return sites


def _adapt(module: nn.Module) -> list[FFNParts]:
    named = (_ADAPTERS.get(qualified_name(base)) for base in type(module).__mro__)
    for adapter in (*named, *BY_STRUCTURE):
        found = None if adapter is None else _ask(adapter, module)
        if found:
            return found if isinstance(found, list) else [found]
    return []


def _ask(adapter: Adapter, module: nn.Module) -> FFNParts | list[FFNParts] | None:
    try:
        return adapter(module)
    except AttributeError:
        # The block's parts are gone where a layer stands in its place already.
        if any(isinstance(part, FFNLayer) for part in module.modules()):
            return None
        raise


def _site(path: str, parts: FFNParts, index: int) -> FFNSite:
    parts = parts.within(path)
    return FFNSite(
        name=parts.slot,
        index=index,
        dense=parts.dense,
        output=parts.output,
        bypass=parts.bypass,
        stream=parts.stream,
        norm=parts.norm,
        settings=parts.settings,
    )
