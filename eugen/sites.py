"""Where a model's feed-forward blocks are.

An adapter looks at one module and says whether it holds a block. Adapters are registered for a
module type (`register_site`); pairs of modules in the manner of BERT are recognised by structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from eugen.ffn import DenseFFN, FFNLayer


@dataclass(frozen=True)
class FFNParts:
    """What an adapter found in one module; paths are relative to it, "" is the module itself.

    Attributes:
        dense: the block, made of the model's own modules.
        slot: the module that the new layer takes the place of; its input is the block's input.
        bypass: modules that become the identity, because the new layer does their work.
        output: the module whose output is the block's output (before surgery).
        stream: the module whose input is the residual stream that the block's output is added to;
            None where the block has no residual connection or it is unknown.
        norm: the LayerNorm that follows the residual addition at once (post-norm), if there is one.
    """

    dense: DenseFFN
    slot: str
    output: str
    bypass: tuple[str, ...] = ()
    stream: str | None = None
    norm: str | None = None


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


Adapter = Callable[[nn.Module], "FFNParts | list[FFNParts] | None"]
_ADAPTERS: dict[str, Adapter] = {}


def register_site(module_type: type[nn.Module], adapter: Adapter) -> None:
    """Teach `find_ffns` a module type: `adapter(module)` returns its `FFNParts` (or a list of them), or None.

    A later registration for the same type replaces the earlier one; subclasses are covered too.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ValueError(f"module_type={module_type!r} must be a subclass of torch.nn.Module")
    _ADAPTERS[_qualified_name(module_type)] = adapter


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """Every feed-forward block of the model, in the order of `model.named_modules()`.

    Blocks inside a block that was found are not searched. Layers put in by `replace` are no blocks.
    """
    sites: list[FFNSite] = []
    taken: list[str] = []
    for path, module in model.named_modules():
        if any(path == t or path.startswith(f"{t}.") or t == "" for t in taken):
            continue
        if isinstance(module, FFNLayer):
            taken.append(path)
            continue
        parts = _adapt(module)
        if parts:
            sites.extend([_site(path, part, len(sites) + i) for i, part in enumerate(parts)])
            # Only the slots are closed: a residual block's other children may hold blocks of their own.
            taken.extend(_join(path, p) for part in parts for p in (part.slot, *part.bypass))
    return sites


def _adapt(module: nn.Module) -> list[FFNParts]:
    for base in type(module).__mro__:
        adapter = _ADAPTERS.get(_qualified_name(base))
        if adapter is not None:
            found = adapter(module)
            if found:
                return found if isinstance(found, list) else [found]
    pair = _bert_pair(module)
    return [pair] if pair else []


def _site(path: str, parts: FFNParts, index: int) -> FFNSite:
    def absolute(relative: str | None) -> str | None:
        return None if relative is None else _join(path, relative)

    return FFNSite(
        name=_join(path, parts.slot),
        index=index,
        dense=parts.dense,
        output=_join(path, parts.output),
        bypass=tuple(_join(path, p) for p in parts.bypass),
        stream=absolute(parts.stream),
        norm=absolute(parts.norm),
    )


def _join(path: str, relative: str) -> str:
    return ".".join(p for p in (path, relative) if p)


def _qualified_name(module_type: type) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


# --- adapters that come with the library; types are named, so that nothing heavy is imported ---


def _timm_mlp(module: nn.Module) -> FFNParts | None:
    """timm's `Mlp`, unless it is convolutional or normalises its neurons."""
    up, act, down = module.fc1, module.act, module.fc2
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and isinstance(act, nn.Module)):
        return None
    if not isinstance(module.norm, nn.Identity):
        return None
    return FFNParts(dense=DenseFFN(up, act, down), slot="", output="")


def _timm_block(module: nn.Module) -> FFNParts | None:
    """timm's pre-norm transformer block: `x + drop_path(ls2(mlp(norm2(x))))`."""
    mlp = module.mlp
    if not isinstance(mlp, nn.Module) or _qualified_name(type(mlp)) != "timm.layers.mlp.Mlp":
        return None
    parts = _timm_mlp(mlp)
    if parts is None:
        return None
    # A layer scale stands between the block's output and the stream: then the stream is not its target.
    stream = "norm2" if isinstance(module.ls2, nn.Identity) else None
    return FFNParts(dense=parts.dense, slot="mlp", output="mlp", stream=stream)


def _sequential(module: nn.Module) -> list[FFNParts]:
    """Disjoint triples Linear, activation, Linear of a chain, front to back."""
    children, found, i = list(module.named_children()), [], 0
    while i + 2 < len(children):
        (name, up), (act_name, act), (down_name, down) = children[i : i + 3]
        if (
            isinstance(up, nn.Linear)
            and isinstance(down, nn.Linear)
            and _is_activation(act)
            and up.out_features == down.in_features
        ):
            dense = DenseFFN(up, act, down)
            found.append(FFNParts(dense=dense, slot=name, bypass=(act_name, down_name), output=down_name))
            i += 3
        else:
            i += 1
    return found


_NOT_ELEMENTWISE = (nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.MultiheadAttention)


def _is_activation(module: nn.Module) -> bool:
    named = type(module).__module__ == "torch.nn.modules.activation"
    return named and not any(module.parameters()) and not isinstance(module, _NOT_ELEMENTWISE)


def _bert_pair(module: nn.Module) -> FFNParts | None:
    """`intermediate` (dense, activation) and `output` (dense, dropout, LayerNorm of the sum), as in BERT."""
    first, second = getattr(module, "intermediate", None), getattr(module, "output", None)
    up, act = getattr(first, "dense", None), getattr(first, "intermediate_act_fn", None)
    down, norm = getattr(second, "dense", None), getattr(second, "LayerNorm", None)
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and isinstance(norm, nn.LayerNorm)):
        return None
    if not callable(act):
        return None
    act = act if isinstance(act, nn.Module) else _Function(act)
    return FFNParts(
        dense=DenseFFN(up, act, down),
        slot="intermediate",
        bypass=("output.dense",),
        output="output.dense",
        stream="intermediate",
        norm="output.LayerNorm",
    )


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


_ADAPTERS.update(
    {
        "timm.models.vision_transformer.Block": _timm_block,
        "timm.layers.mlp.Mlp": _timm_mlp,
        "torch.nn.modules.container.Sequential": _sequential,
    }
)
