"""Small models with feed-forward blocks, and batches for them."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from eugen import DenseFFN, FFNParts
from tests.eugen.blocks import block, generator, tokens


def spread(model: nn.Module) -> nn.Module:
    """Weights and biases as if trained: far from the tiny or constant values of an initialiser."""
    seeded = generator(21)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=seeded)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            is_norm = parameter.ndim == 1 and "orm" in name and name.endswith("weight")
            parameter.copy_(noise * scale + (1.0 if is_norm else 0.0))
    return model


def vit(depth: int = 2, **options) -> VisionTransformer:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    return spread(VisionTransformer(**shape, depth=depth, **options))


def images(batches: int = 4, size: int = 12) -> list[Tensor]:
    return list(torch.randn(batches, size, 3, 16, 16, generator=generator(31)))


def bert(layers: int = 2, **options) -> BertModel:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return spread(BertModel(BertConfig(**shape, num_hidden_layers=layers, **options)))


def sentences(batches: int = 4, size: int = 8, length: int = 9) -> list[Tensor]:
    return list(torch.randint(0, 50, (batches, size, length), generator=generator(32)))


def call_bert(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch).last_hidden_state


def chain(d: int = 12, h: int = 40, linears: int = 2, *, act: type[nn.Module] = nn.GELU, **options):
    """Linear, activation, Linear, … as in a NeRF; the model is the chain itself."""
    widths = [d, *[h] * (linears - 1), d]
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        modules += [nn.Linear(n_in, n_out), act(**options)]
    return spread(nn.Sequential(*modules[:-1]))


def vectors(batches: int = 4, size: int = 150, d: int = 12) -> list[Tensor]:
    return list(tokens(batches * size, d).split(size))


class Residual(nn.Module):
    """x + ffn(norm(x))."""

    def __init__(self, d: int, h: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.ffn = block(d, h, seed=seed)
        # Found through `register_site` only: a DenseFFN in itself counts as replaced already.
        self.ffn = nn.Sequential(
            OrderedDict(up=self.ffn.up, act=self.ffn.act, dropout=nn.Dropout(0.5), down=self.ffn.down)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def residual_parts(module: Residual, **changes) -> FFNParts:
    dense = DenseFFN(module.ffn.up, module.ffn.act, module.ffn.down)
    return FFNParts(**{"dense": dense, "slot": "ffn", "output": "ffn", "stream": "norm"} | changes)


def residuals(depth: int = 2, d: int = 12, h: int = 40) -> nn.Sequential:
    return nn.Sequential(*(Residual(d, h, seed) for seed in range(depth)))
