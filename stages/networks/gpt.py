"""A decoder as GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tied embeddings.

GPT-2 124M is `GPT(vocabulary=50257, context=1024, width=768, depth=12, heads=12)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eugen

DEVIATION, OF_WIDTH = 0.02, 768
"""GPT-2's weights at the start, and its width. Other widths keep the variance of what a layer puts out: with
0.02 the attention of a narrow network takes long to begin to learn."""


class Attention(nn.Module):
    """Causal self-attention of several heads, `[batch, tokens, width]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [batch, tokens, 3 · heads · size] to three of [batch, heads, tokens, size].
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """`x + attention(norm1(x))`, then `x + ffn(norm2(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def _parts(module: nn.Module) -> eugen.FFNParts | None:
    """The block's feed-forward part, and the residual stream that it is added to."""
    assert isinstance(module, Block)
    if not isinstance(module.ffn, nn.Sequential):
        return None  # already replaced
    up, act, down = module.ffn
    assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    return eugen.FFNParts(dense=eugen.DenseFFN(up, act, down), slot="ffn", output="ffn", stream="norm2")


eugen.register_site(Block, _parts)


class GPT(nn.Module):
    """Token ids `[batch, tokens]` to logits of the next token, `[batch, tokens, vocabulary]`.

    Args:
        vocabulary: number of token ids.
        context: most tokens of a sequence.
        width: of the residual stream; a multiple of `heads`.
        depth: number of blocks.
        heads: of each attention.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "depth": depth, "heads": heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}: each head gets width / heads")
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self._initialise(DEVIATION * math.sqrt(OF_WIDTH / width), 1 / math.sqrt(2 * depth))

    @torch.no_grad()
    def _initialise(self, deviation: float, residual: float) -> None:
        """As GPT-2, from the global generator; what writes into the stream is smaller by `residual`."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_stream = name.endswith(("attention.out", "ffn.2"))
                nn.init.normal_(module.weight, std=deviation * (residual if into_stream else 1))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        count = ids.shape[-1]
        if count > self.context:
            raise ValueError(f"ids of {count} tokens do not fit context={self.context}: cut the sequences")
        x = self.tokens(ids) + self.positions.weight[:count]
        for block in self.blocks:
            x = block(x)
        # The embedding is the head too.
        return F.linear(self.norm(x), self.tokens.weight)
