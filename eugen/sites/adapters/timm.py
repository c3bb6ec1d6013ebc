"""timm: ViT, DeiT, DINOv2, EVA, Swin, Mixer, ConvNeXt and whatever else is built of timm's MLPs.

Not taken: MLPs of 1×1 convolutions (`use_conv`, `ConvMlp`; a layer works on the last axis, a convolution on
the second), neurons that are normalised or gated across tokens (`GlobalResponseNormMlp`, `GatedMlp`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from eugen.ffn import DenseFFN
from eugen.sites.parts import Adapter, FFNParts, halves, qualified_name, scaled


def _mlp(module: Any) -> FFNParts | None:
    """`Mlp`, unless it is convolutional or normalises its neurons."""
    if not (_linear(module, "fc1", "fc2") and isinstance(module.act, nn.Module)):
        return None
    return FFNParts(dense=DenseFFN(module.fc1, module.act, module.fc2), slot="", output="")


def _glu(module: Any) -> FFNParts | None:
    """`GluMlp`: gate and neurons in one matrix, in the order that `gate_last` says."""
    if not _linear(module, "fc1", "fc2"):
        return None
    first, second = halves(module.fc1)
    gate, up = (second, first) if module.gate_last else (first, second)
    return FFNParts(dense=DenseFFN(up, module.act, module.fc2, gate), slot="", output="")


def _swiglu(module: Any) -> FFNParts | None:
    """`SwiGLU`: gate and neurons in matrices of their own."""
    if not _linear(module, "fc1_g", "fc1_x", "fc2"):
        return None
    return FFNParts(dense=DenseFFN(module.fc1_x, module.act, module.fc2, module.fc1_g), slot="", output="")


def _linear(module: Any, *names: str) -> bool:
    plain = all(isinstance(getattr(module, name), nn.Linear) for name in names)
    return plain and isinstance(module.norm, nn.Identity)


_MLPS: dict[str, Adapter] = {
    "timm.layers.mlp.Mlp": _mlp,
    "timm.layers.mlp.GluMlp": _glu,
    "timm.layers.mlp.SwiGLU": _swiglu,
}


def _child(block: Any, name: str) -> DenseFFN | None:
    """The block that a child is, if it is one."""
    child = getattr(block, name)
    adapter = _MLPS.get(qualified_name(type(child)))
    parts = adapter(child) if adapter is not None else None
    return parts.dense if isinstance(parts, FFNParts) else None


def _vit_block(module: Any) -> FFNParts | None:
    """`x + drop_path(ls2(mlp(norm2(x))))`; the layer scale goes into the block."""
    dense = _child(module, "mlp")
    if dense is None:
        return None
    if isinstance(module.ls2, nn.Identity):
        return FFNParts(dense=dense, slot="mlp", output="mlp", stream="norm2")
    if type(module.ls2).__name__ != "LayerScale":
        return FFNParts(dense=dense, slot="mlp", output="mlp")
    dense = scaled(dense, module.ls2.gamma)
    return FFNParts(dense=dense, slot="mlp", bypass=("ls2",), output="ls2", stream="norm2")


def _eva_block(module: Any) -> FFNParts | None:
    """`x + drop_path2(gamma_2 * mlp(norm2(x)))`; a layer scale goes into the block."""
    dense = _child(module, "mlp")
    if dense is None:
        return None
    if module.gamma_2 is None:
        return FFNParts(dense=dense, slot="mlp", output="mlp", stream="norm2")
    return FFNParts(
        dense=scaled(dense, module.gamma_2),
        slot="mlp",
        output="drop_path2",  # the identity in evaluation mode: what it gets is the scaled output
        stream="norm2",
        settings=(("gamma_2", None),),
    )


def _pre_norm(module: Any) -> FFNParts | None:
    """`x + drop_path2(mlp(norm2(x)))`."""
    dense = _child(module, "mlp")
    return None if dense is None else FFNParts(dense=dense, slot="mlp", output="mlp", stream="norm2")


def _post_norm(module: Any) -> FFNParts | None:
    """`x + drop_path2(norm2(mlp(x)))`: the norm sees the block's output, the stream what the norm gives."""
    dense = _child(module, "mlp")
    norm = "norm2" if isinstance(module.norm2, nn.LayerNorm) else None
    return None if dense is None else FFNParts(dense=dense, slot="mlp", output="mlp", norm=norm)


def _mixer_block(module: Any) -> list[FFNParts]:
    """Two blocks: across tokens, on transposed activations and so without stream, and across channels."""
    found = []
    for name, stream in (("mlp_tokens", None), ("mlp_channels", "norm2")):
        dense = _child(module, name)
        if dense is not None:
            found.append(FFNParts(dense=dense, slot=name, output=name, stream=stream))
    return found


ADAPTERS: dict[str, Adapter] = {
    **_MLPS,
    "timm.models.vision_transformer.Block": _vit_block,
    "timm.models.vision_transformer.ResPostBlock": _post_norm,
    "timm.models.eva.EvaBlock": _eva_block,
    "timm.models.eva.EvaBlockPostNorm": _post_norm,
    "timm.models.swin_transformer.SwinTransformerBlock": _pre_norm,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _post_norm,
    "timm.models.mlp_mixer.MixerBlock": _mixer_block,
}
RECOGNISED: list[Adapter] = []
CLOSED: tuple[str, ...] = (
    # Small chains that make the table of position biases out of constant coordinates, not blocks of tokens.
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
)
