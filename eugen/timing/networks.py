"""Networks of plain torch to try the profiler on; their weights are random."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(width: int = 256, depth: int = 2) -> nn.Sequential:
    """Blocks Linear, GELU, Linear with four times the width between, `[batch, width]` to the same."""
    blocks = [(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)]
    return nn.Sequential(*(module for block in blocks for module in block))


class Block(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = mlp(width, depth=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


def transformer(width: int = 256, depth: int = 4, heads: int = 4) -> nn.Sequential:
    """An encoder without embeddings, `[batch, tokens, width]` to the same."""
    return nn.Sequential(*(Block(width, heads) for _ in range(depth)))
