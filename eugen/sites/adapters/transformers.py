"""transformers: MLPs by their parts' names, checked on two tokens; residual streams by the layer's type.

Hundreds of models there copy a dozen MLPs under new class names, so an MLP is known by its parts. Some use
the same names for another order of work: what a module gives for two random tokens decides.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from eugen.ffn import DenseFFN
from eugen.sites.parts import (
    Adapter,
    FFNParts,
    as_module,
    halves,
    linear_of,
    qualified_name,
    says_the_same,
    scaled,
)

_PLAIN = (
    ("fc1", "activation_fn", "fc2"),
    ("fc1", "activation", "fc2"),
    ("fc1", "act", "fc2"),
    ("lin1", "activation", "lin2"),
    ("lin1", "act", "lin2"),
    ("c_fc", "act", "c_proj"),
    ("fc_in", "act", "fc_out"),
    ("dense_h_to_4h", "act", "dense_4h_to_h"),
    ("linear_fc1", "act_fn", "linear_fc2"),
    ("intermediate_dense", "intermediate_act_fn", "output_dense"),
    ("wi", "act", "wo"),
    ("up_proj", "act_fn", "down_proj"),
)
_GATED = (("gate_proj", "up_proj", "act_fn", "down_proj"), ("wi_0", "wi_1", "act", "wo"))
_PACKED = (("gate_up_proj", "activation_fn", "down_proj"), ("Wi", "act", "Wo"))
"""The first half of the packed neurons is the gate."""


def _dense(module: nn.Module) -> DenseFFN | None:
    """The block that an MLP's parts make, whatever the order of work in it."""
    for gate_name, up_name, act_name, down_name in _GATED:
        gate, up, down = (_linear(module, name) for name in (gate_name, up_name, down_name))
        act = as_module(getattr(module, act_name, None))
        if gate is not None and up is not None and down is not None and act is not None:
            return _block(up, act, down, gate)
    for up_name, act_name, down_name in (*_PLAIN, *_PACKED):
        up, act, down = (getattr(module, name, None) for name in (up_name, act_name, down_name))
        up, act, down = _linear(module, up_name), as_module(act), _linear(module, down_name)
        if up is None or act is None or down is None:
            continue
        if up.out_features == 2 * down.in_features and (up_name, act_name, down_name) in _PACKED:
            gate, up = halves(up)
            return _block(up, act, down, gate)
        return _block(up, act, down)
    return None


def _block(up: nn.Linear, act: nn.Module, down: nn.Linear, gate: nn.Linear | None = None) -> DenseFFN | None:
    return DenseFFN(up, act, down, gate) if up.out_features == down.in_features else None


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """A linear map, or the one that a `Conv1D` (GPT-2: weights `[in, out]`) is."""
    found: Any = getattr(module, name, None)
    if isinstance(found, nn.Linear):
        return found
    if qualified_name(type(found)) == "transformers.pytorch_utils.Conv1D":
        return linear_of(found.weight.T, found.bias)
    return None


def _mlp(module: nn.Module) -> FFNParts | None:
    """A module of transformers that is one block."""
    # `transformers_modules` holds the code that comes with a checkpoint.
    if type(module).__module__.split(".")[0] not in ("transformers", "transformers_modules"):
        return None
    dense = _dense(module)
    if dense is None or not says_the_same(module, dense):
        return None
    return FFNParts(dense=dense, slot="", output="")


def _layer(module: nn.Module, mlp: str, *, stream: str, norm: str | None = None) -> FFNParts | None:
    """A residual layer around an MLP: pre-norm, or post-norm where `norm` is named."""
    found = _mlp(getattr(module, mlp))
    return None if found is None else FFNParts(found.dense, slot=mlp, output=mlp, stream=stream, norm=norm)


def _dinov2_layer(module: Any) -> FFNParts | None:
    """`x + drop_path(layer_scale2(mlp(norm2(x))))`; the layer scale goes into the block."""
    found = _mlp(module.mlp)
    if found is None:
        return None
    dense = scaled(found.dense, module.layer_scale2.lambda1)
    scale = "layer_scale2"
    return FFNParts(dense, slot="mlp", bypass=(scale,), output=scale, stream="norm2")


def _albert_layer(module: Any) -> FFNParts | None:
    """ALBERT's layer, which runs at every depth: surgery works, transfer says that it is shared."""
    up, act, down = module.ffn, as_module(module.activation), module.ffn_output
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)) or act is None:
        return None
    return FFNParts(
        dense=DenseFFN(up, act, down),
        slot="ffn",
        bypass=("activation", "ffn_output"),
        output="ffn_output",
        stream="ffn",
        norm="full_layer_layer_norm",
    )


def _bert_pair(module: nn.Module) -> FFNParts | None:
    """`intermediate` (dense, activation) and `output` (dense, dropout, LayerNorm of the sum), as in BERT."""
    first, second = getattr(module, "intermediate", None), getattr(module, "output", None)
    up, act = getattr(first, "dense", None), as_module(getattr(first, "intermediate_act_fn", None))
    down, norm = getattr(second, "dense", None), getattr(second, "LayerNorm", None)
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and isinstance(norm, nn.LayerNorm)):
        return None
    if act is None:
        return None
    return FFNParts(
        dense=DenseFFN(up, act, down),
        slot="intermediate",
        bypass=("output.dense",),
        output="output.dense",
        stream="intermediate",
        norm="output.LayerNorm",
    )


def _types(text: str) -> list[str]:
    """Qualified names of `family.Class family.Class …`."""
    return [
        f"transformers.models.{f}.modeling_{f}.{c}" for f, c in (word.split(".") for word in text.split())
    ]


_LLAMA = _types(
    "llama.LlamaDecoderLayer mistral.MistralDecoderLayer ministral.MinistralDecoderLayer "
    "qwen2.Qwen2DecoderLayer qwen2_vl.Qwen2VLDecoderLayer qwen2_5_vl.Qwen2_5_VLDecoderLayer "
    "qwen3.Qwen3DecoderLayer qwen3_vl.Qwen3VLTextDecoderLayer gemma.GemmaDecoderLayer glm.GlmDecoderLayer "
    "olmo.OlmoDecoderLayer nemotron.NemotronDecoderLayer helium.HeliumDecoderLayer "
    "ernie4_5.Ernie4_5DecoderLayer seed_oss.SeedOssDecoderLayer gpt_neox.GPTNeoXLayer"
)
_GPT2 = _types("gpt2.GPT2Block decision_transformer.DecisionTransformerGPT2Block gpt_bigcode.GPTBigCodeBlock")
_VIT = _types(
    "vit.ViTLayer deit.DeiTLayer vit_mae.ViTMAELayer vit_msn.ViTMSNLayer ijepa.IJepaLayer vivit.VivitLayer "
    "audio_spectrogram_transformer.ASTLayer"
)
_CLIP = _types(
    "clip.CLIPEncoderLayer altclip.AltCLIPEncoderLayer chinese_clip.ChineseCLIPVisionLayer "
    "metaclip_2.MetaClip2EncoderLayer siglip.SiglipEncoderLayer siglip2.Siglip2EncoderLayer "
    "owlvit.OwlViTEncoderLayer owlv2.Owlv2EncoderLayer clipseg.CLIPSegEncoderLayer"
)
_T5 = _types("t5.T5LayerFF mt5.MT5LayerFF umt5.UMT5LayerFF longt5.LongT5LayerFF udop.UdopLayerFF")
_DINOV2 = _types(
    "dinov2.Dinov2Layer dinov2_with_registers.Dinov2WithRegistersLayer dinov3_vit.DINOv3ViTLayer"
)
_DISTILBERT = _types("distilbert.TransformerBlock")
_ALBERT = _types("albert.AlbertLayer")

ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys(_LLAMA, partial(_layer, mlp="mlp", stream="post_attention_layernorm")),
    **dict.fromkeys(_GPT2, partial(_layer, mlp="mlp", stream="ln_2")),
    **dict.fromkeys(_VIT, partial(_layer, mlp="mlp", stream="layernorm_after")),
    **dict.fromkeys(_CLIP, partial(_layer, mlp="mlp", stream="layer_norm2")),
    **dict.fromkeys(_T5, partial(_layer, mlp="DenseReluDense", stream="layer_norm")),
    **dict.fromkeys(_DISTILBERT, partial(_layer, mlp="ffn", stream="ffn", norm="output_layer_norm")),
    **dict.fromkeys(_DINOV2, _dinov2_layer),
    **dict.fromkeys(_ALBERT, _albert_layer),
}
RECOGNISED: list[Adapter] = [_bert_pair, _mlp]
CLOSED: tuple[str, ...] = ("transformers.models.swinv2.modeling_swinv2.Swinv2SelfAttention",)
