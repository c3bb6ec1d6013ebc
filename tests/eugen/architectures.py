"""Real architectures at toy sizes with random weights: a line each, for everything that surgery promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from eugen.sites import Adapter
from stages.networks.nerf import RadianceMLP
from tests.eugen.blocks import generator
from tests.eugen.models import Residual, chain, residual_parts, residuals, spread

WIDTH, NEURONS = 32, 48


@dataclass(frozen=True)
class Architecture:
    """A model, what `find_ffns` must find in it, and what the original can do.

    Attributes:
        shapes: (in, hidden, out) of the blocks; fewer entries than blocks repeat.
        stream, norm: as `FFNSite` has them, relative to the block's parent; a tuple repeats like the shapes.
        gated: whether the blocks have a gate.
        beside: the module whose output is added together with the block's, where work is parallel.
        adapter: a type and its adapter, to be registered first.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    blocks: int = 2
    shapes: tuple[tuple[int, int, int], ...] = ((WIDTH, NEURONS, WIDTH),)
    stream: str | tuple[str | None, ...] | None = None
    norm: str | None = None
    gated: bool = False
    beside: str | None = None
    call: Callable[[nn.Module, Any], Tensor] = field(default=lambda model, batch: model(batch))
    adapter: tuple[type[nn.Module], Adapter] | None = None


def words(seed: int, batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=generator(seed))


def pictures(seed: int, size: int = 16) -> Tensor:
    return torch.randn(3, 3, size, size, generator=generator(seed))


def large_pictures(seed: int) -> Tensor:
    return pictures(seed, 32)


def activations(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(3, 9, width, generator=generator(seed))


def hidden(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)[0]


def encode_decode(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, decoder_input_ids=batch)[0]


def decode(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, use_cache=False)[0]


def hf(name: str, *, images: bool = False, **options: Any) -> Callable[[], nn.Module]:
    """`<name>Model` of `<name>Config`: two layers of two heads, 32 wide, 48 neurons."""
    common = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"intermediate_size": NEURONS, "image_size": 16, "patch_size": 8} if images else {}
    common |= (
        {} if images else {"intermediate_size": NEURONS, "vocab_size": 50, "max_position_embeddings": 40}
    )

    def build() -> nn.Module:
        # transformers makes some weights by its own rules on loading only: spread() draws all of them.
        config = getattr(transformers, f"{name}Config")(**common | options)
        config._attn_implementation = "eager"
        return spread(getattr(transformers, f"{name}Model")(config)).eval()

    return build


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: spread(timm.create_model(name, num_classes=5, **options)).eval()


def torch_encoder(**options: Any) -> nn.Module:
    options = {"dropout": 0.1, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(WIDTH, 2, NEURONS, **options)
    return spread(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))).eval()


def torch_decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, NEURONS, dropout=0.1, batch_first=True, **options)
    return spread(nn.TransformerDecoder(layer, 2)).eval()


def attend(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, batch.flip(1))


def nerf(**options: Any) -> nn.Module:
    return spread(RadianceMLP(15, 9, width=WIDTH, **options)).eval()


def rays(seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(20, 15 * 5 + 9, generator=generator(seed))
    return drawn[:, : 15 * 5].reshape(20, 5, 15), drawn[:, 15 * 5 :]


def render(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    density, colour = model(*batch)
    return torch.cat([density[..., None], colour], dim=-1)


TEXT, IMAGES = words, pictures
LLAMA = {"stream": "post_attention_layernorm", "gated": True, "call": decode}
SWIGLU = {"swiglu_mlp": True, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
VIT = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "mlp_ratio": 1.5}

ARCHITECTURES: dict[str, Architecture] = {
    # transformers, post-norm
    "bert": Architecture(hf("Bert"), TEXT, stream="intermediate", norm="output.LayerNorm", call=hidden),
    "roberta": Architecture(hf("Roberta"), TEXT, stream="intermediate", norm="output.LayerNorm", call=hidden),
    "distilbert": Architecture(
        hf("DistilBert", dim=WIDTH, hidden_dim=NEURONS, n_heads=2, n_layers=2),
        TEXT,
        stream="ffn",
        norm="output_layer_norm",
        call=hidden,
    ),
    # transformers, decoders
    "gpt2": Architecture(
        hf("GPT2", n_embd=WIDTH, n_inner=NEURONS, n_layer=2, n_head=2), TEXT, stream="ln_2", call=decode
    ),
    "gpt_neox": Architecture(
        hf("GPTNeoX"), TEXT, stream="post_attention_layernorm", beside="post_attention_dropout", call=decode
    ),
    "gpt_neox sequential": Architecture(
        hf("GPTNeoX", use_parallel_residual=False), TEXT, stream="post_attention_layernorm", call=decode
    ),
    "llama": Architecture(hf("Llama", num_key_value_heads=2), TEXT, **LLAMA),
    "mistral": Architecture(hf("Mistral", num_key_value_heads=2), TEXT, **LLAMA),
    "qwen2": Architecture(hf("Qwen2", num_key_value_heads=2), TEXT, **LLAMA),
    "qwen3": Architecture(hf("Qwen3", num_key_value_heads=2, head_dim=16), TEXT, **LLAMA),
    "phi3": Architecture(hf("Phi3", num_key_value_heads=2, pad_token_id=0), TEXT, gated=True, call=decode),
    "t5": Architecture(
        hf("T5", d_model=WIDTH, d_ff=NEURONS, num_decoder_layers=1, num_heads=2, d_kv=16),
        TEXT,
        blocks=3,
        stream="layer_norm",
        call=encode_decode,
    ),
    "t5 gated": Architecture(
        hf(
            "T5",
            d_model=WIDTH,
            d_ff=NEURONS,
            num_decoder_layers=1,
            num_heads=2,
            d_kv=16,
            feed_forward_proj="gated-gelu",
        ),
        TEXT,
        blocks=3,
        stream="layer_norm",
        gated=True,
        call=encode_decode,
    ),
    # transformers, images
    "hf vit": Architecture(hf("ViT", images=True), IMAGES, stream="layernorm_after", call=hidden),
    "dinov2": Architecture(
        hf("Dinov2", images=True, mlp_ratio=2, layerscale_value=0.3),
        IMAGES,
        shapes=((WIDTH, 2 * WIDTH, WIDTH),),
        stream="norm2",
        call=hidden,
    ),
    "dinov2 swiglu": Architecture(
        hf("Dinov2", images=True, mlp_ratio=2, use_swiglu_ffn=True),
        IMAGES,
        stream="norm2",
        gated=True,
        call=hidden,
    ),
    "clip text": Architecture(hf("CLIPText", eos_token_id=2), TEXT, stream="layer_norm2", call=hidden),
    "clip vision": Architecture(hf("CLIPVision", images=True), IMAGES, stream="layer_norm2", call=hidden),
    # timm
    "timm vit": Architecture(of_timm("vit_tiny_patch16_224", **VIT), IMAGES, stream="norm2"),
    "timm deit": Architecture(of_timm("deit_tiny_distilled_patch16_224", **VIT), IMAGES, stream="norm2"),
    "timm deit3": Architecture(
        of_timm("deit3_small_patch16_224", **VIT, init_values=0.2), IMAGES, stream="norm2"
    ),
    "timm dinov2": Architecture(
        of_timm("vit_giant_patch14_dinov2", **VIT | {"mlp_ratio": 3.0}), IMAGES, stream="norm2", gated=True
    ),
    "timm eva": Architecture(
        of_timm("eva02_tiny_patch14_224", **SWIGLU, mlp_ratio=1.5, scale_mlp=False),
        IMAGES,
        stream="norm2",
        gated=True,
    ),
    "timm eva split": Architecture(
        of_timm("eva02_tiny_patch14_224", **SWIGLU, mlp_ratio=1.5, swiglu_align_to=8, init_values=0.3),
        IMAGES,
        stream="norm2",
        gated=True,
    ),
    "timm swin": Architecture(
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            window_size=4,
        ),
        large_pictures,
        shapes=((16, 64, 16), (32, 128, 32)),
        stream="norm2",
    ),
    "timm swin v2": Architecture(
        of_timm(
            "swinv2_tiny_window8_256",
            img_size=32,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            window_size=4,
        ),
        large_pictures,
        shapes=((16, 64, 16), (32, 128, 32)),
        norm="norm2",
    ),
    "timm convnext": Architecture(
        lambda: spread(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)).eval(),
        large_pictures,
        blocks=4,
        shapes=((8, 32, 8),),
    ),
    "timm mixer": Architecture(
        lambda: spread(
            MlpMixer(img_size=16, patch_size=8, num_blocks=2, embed_dim=WIDTH, num_classes=5)
        ).eval(),
        IMAGES,
        blocks=4,
        shapes=((4, 16, 4), (WIDTH, 128, WIDTH)),
        stream=(None, "norm2"),
    ),
    # torch
    "mlp": Architecture(
        lambda: chain(WIDTH, NEURONS, 4).eval(), activations, shapes=((32, 48, 48), (48, 48, 32))
    ),
    "nerf": Architecture(
        lambda: nerf(depth=5, skip=None), rays, shapes=((WIDTH, WIDTH, WIDTH),), call=render
    ),
    "nerf, joined": Architecture(
        lambda: nerf(depth=5, skip=3),
        rays,
        shapes=((WIDTH, WIDTH, WIDTH), (WIDTH + 15, WIDTH, WIDTH)),
        call=render,
    ),
    "own class": Architecture(
        lambda: residuals(2, WIDTH, NEURONS).eval(),
        activations,
        stream="norm",
        adapter=(Residual, residual_parts),
    ),
    "encoder": Architecture(torch_encoder, activations, stream="linear1", norm="norm2"),
    "encoder pre-norm": Architecture(lambda: torch_encoder(norm_first=True), activations, stream="norm2"),
    "encoder, own gelu": Architecture(
        lambda: torch_encoder(activation=nn.GELU()), activations, stream="linear1", norm="norm2"
    ),
    "decoder": Architecture(torch_decoder, activations, stream="linear1", norm="norm3", call=attend),
    "decoder pre-norm": Architecture(
        lambda: torch_decoder(norm_first=True), activations, stream="norm3", call=attend
    ),
}
