"""torch's own modules: chains of linear maps and activations, and the transformer layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from eugen.ffn import DenseFFN
from eugen.sites.parts import Adapter, FFNParts, as_module


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


def _transformer_layer(module: Any, norm: str) -> FFNParts | None:
    """`linear2(dropout(activation(linear1(x))))`, before or behind the norm with this name."""
    up, act, down = module.linear1, as_module(module.activation), module.linear2
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)) or act is None:
        return None
    return FFNParts(
        dense=DenseFFN(up, act, down),
        slot="linear1",
        bypass=("activation", "dropout", "linear2"),
        output="linear2",
        stream=norm if module.norm_first else "linear1",
        norm=None if module.norm_first else norm,
    )


def _encoder_layer(module: Any) -> FFNParts | None:
    """The fused path reads the weights of `linear1`; 0 says that the activation is none that it knows."""
    parts = _transformer_layer(module, "norm2")
    return None if parts is None else replace(parts, settings=(("activation_relu_or_gelu", 0),))


def _decoder_layer(module: Any) -> FFNParts | None:
    return _transformer_layer(module, "norm3")


def _encoder(module: Any) -> list[FFNParts]:
    """Its layers, seen from above: with a padding mask it packs tokens for the fused path of all of them."""
    found = []
    for index, layer in enumerate(module.layers):
        parts = _encoder_layer(layer) if isinstance(layer, nn.TransformerEncoderLayer) else None
        if parts is not None:
            parts = parts.within(f"layers.{index}")
            found.append(replace(parts, settings=(*parts.settings, ("use_nested_tensor", False))))
    return found


ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.container.Sequential": _sequential,
    "torch.nn.modules.transformer.TransformerEncoder": _encoder,
    "torch.nn.modules.transformer.TransformerEncoderLayer": _encoder_layer,
    "torch.nn.modules.transformer.TransformerDecoderLayer": _decoder_layer,
}
RECOGNISED: list[Adapter] = []
CLOSED: tuple[str, ...] = ()
