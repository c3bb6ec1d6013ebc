"""BlockShuffle (arXiv 2406.16450, Section 3.2), which is Monarch (arXiv 2204.00595).

Each matrix becomes two block-diagonal factors with a fixed shuffle between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.ffn import DenseFFN, FFNLayer, TokenStream, copy_activation
from eugen.layers.low_rank_aware import second_moment
from eugen.parts.structured import BlockDiagonal, pair_factors
from eugen.self_guided import SelfGuidedConfig
from eugen.shapes import Float


class ShuffleMap(nn.Module):
    """`R P L x + c`: block-diagonal L and R, and P deals the entries between them round the blocks."""

    def __init__(self, first: BlockDiagonal, second: BlockDiagonal) -> None:
        super().__init__()
        self.first, self.second = first, second

    def between(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch m"]:
        """What the second factor reads: entry f of the first one's output goes to block f mod b."""
        blocks = len(self.second.weight)
        return self.first(x).unflatten(-1, (-1, blocks)).transpose(-1, -2).flatten(-2)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.second(self.between(x))

    @property
    def macs_per_token(self) -> int:
        return self.first.macs_per_token + self.second.macs_per_token

    @torch.no_grad()
    def project(self, full: nn.Linear, moment: Float[Tensor, "d_in d_in"]) -> None:
        """Take the nearest matrix of this form, measured under the second moment of the inputs."""
        blocks, width, _ = self.first.weight.shape
        block, row = torch.meshgrid(torch.arange(blocks), torch.arange(width), indexing="ij")
        place = block * width + row
        to, nth = place % blocks, row // blocks
        ranks = torch.zeros(blocks, blocks, dtype=torch.int64)
        ranks.index_put_((to, block), torch.ones_like(to), accumulate=True)
        u, v = pair_factors(full.weight, ranks, moment)
        self.first.weight.copy_(v[to, block, nth])
        self.second.weight[to, :, place // blocks] = u[to, block, :, nth].to(self.second.weight.dtype)
        if self.second.bias is not None:
            self.second.bias.copy_(torch.zeros(()) if full.bias is None else full.bias)


class BlockShuffleFFN(FFNLayer):
    """`y = M2 act(M1 x)` with two `ShuffleMap`s; for a single layer `y = act(M1 x)`.

    The last linear map is block-diagonal: there is no dense readout, and `fit_readout` solves the blocks.
    """

    readout = None

    def __init__(self, up: ShuffleMap, act: nn.Module, down: ShuffleMap | None) -> None:
        super().__init__()
        self.up, self.act, self.down = up, act, down
        self.in_features, self.out_features = up.first.in_features, (down or up).second.out_features

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch h"]:
        """The neurons behind the first map."""
        return self.act(self.up(x))

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.hidden(x) if self.down is None else self.down(self.hidden(x))

    @property
    def macs_per_token(self) -> int:
        return self.up.macs_per_token + (0 if self.down is None else self.down.macs_per_token)

    @property
    def num_features(self) -> int:
        """Inner width of the narrower map."""
        return min(part.first.out_features for part in (self.up, self.down) if part is not None)

    def fit_readout(self, data: TokenStream) -> None:
        """Solve each block of the last factor in closed form (ridge) for these data, in place."""
        down = self.down
        if down is not None:
            down.second.fit(data, lambda x: down.between(self.hidden(x)))


@dataclass(frozen=True, kw_only=True)
class BlockShuffleConfig(SelfGuidedConfig, name="block_shuffle"):
    """Both matrices projected in closed form, the last factor then solved by least squares.

    A map of n to m features with b blocks of inner width s costs (n + m)·s MACs, and more where b does not
    divide n or m. The paper's inner width b·s is min(n, m).

    Args:
        blocks: b; None takes that with which the budget buys the paper's inner width.
        width: s, the inner width of each block; None derives it from `budget`.
    """

    blocks: int | None = None
    width: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> BlockShuffleFFN:
        self.require_ungated(dense)
        d, h, like = dense.in_features, dense.hidden_features, dense.up.weight
        maps = [(d, h)] if dense.down is None else [(d, h), (h, dense.out_features)]
        blocks = self._blocks(dense, maps)
        per_width = sum(blocks * (-(-n // blocks) + -(-m // blocks)) for n, m in maps)
        width = self.size_for(dense, per_width, unit="width", given=self.width)

        def shuffle_map(n: int, m: int) -> ShuffleMap:
            inner = blocks * min(width, n, m)
            options = {"like": like, "generator": generator}
            return ShuffleMap(
                BlockDiagonal(n, inner, blocks, **options),
                BlockDiagonal(inner, m, blocks, bias=True, **options),
            )

        up = shuffle_map(*maps[0])
        down = None if dense.down is None else shuffle_map(*maps[1])
        return BlockShuffleFFN(up, copy_activation(dense.act), down)

    def _blocks(self, dense: DenseFFN, maps: list[tuple[int, int]]) -> int:
        if self.blocks is not None:
            if self.blocks < 1:
                raise ValueError(f"blocks={self.blocks} must be at least 1")
            return self.blocks
        narrowest, per_width = min(min(sizes) for sizes in maps), sum(n + m for n, m in maps)
        width = self.width or max(1, int((self.budget or 1) * dense.macs_per_token + 1e-9) // per_width)
        # No more blocks than inner entries of one, or a pair of blocks would not be connected.
        return max(1, min(round(narrowest / width), width, narrowest))

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> BlockShuffleFFN:
        layer = self.build(dense, generator=generator)
        layer.up.project(dense.up, second_moment(data, lambda x: x))
        if dense.down is not None and layer.down is not None:
            layer.down.project(dense.down, second_moment(data, layer.hidden))
        layer.fit_readout(data)
        return layer
