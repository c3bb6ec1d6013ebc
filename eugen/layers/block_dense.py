"""BlockDense (arXiv 2406.16450, Section 3.2): a block-diagonal factor, then a dense low-rank one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.ffn import DenseFFN, FFNLayer, TokenStream, copy_activation, new_linear
from eugen.layers.low_rank_aware import second_moment
from eugen.parts.structured import BlockDiagonal, pair_factors
from eugen.self_guided import SelfGuidedConfig
from eugen.shapes import Float

BLOCKS = 2
"""Where the budget buys a rank with as many: more blocks of the same cost fit worse in closed form."""


class BlockDenseFFN(FFNLayer):
    """`y = V2 B2 act(V1 B1 x + b1) + b2`, B block-diagonal; for a single layer `y = act(V1 B1 x + b1)`."""

    def __init__(
        self,
        b1: BlockDiagonal,
        v1: nn.Linear,
        act: nn.Module,
        b2: BlockDiagonal | None,
        v2: nn.Linear | None,
    ) -> None:
        super().__init__()
        self.b1, self.v1, self.act, self.b2, self.readout = b1, v1, act, b2, v2
        self.in_features, self.out_features = b1.in_features, (v2 or v1).out_features

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch h"]:
        """The neurons behind the first pair of factors."""
        return self.act(self.v1(self.b1(x)))

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch r"]:
        hidden = self.hidden(x)
        return hidden if self.b2 is None else self.b2(hidden)

    @property
    def macs_per_token(self) -> int:
        factors = (self.b1, self.v1, self.b2, self.readout)
        return sum(factor.weight.numel() for factor in factors if factor is not None)


@dataclass(frozen=True, kw_only=True)
class BlockDenseConfig(SelfGuidedConfig, name="block_dense"):
    """Both matrices fitted in closed form; the last factor is solved by least squares, as in every row.

    A map of n to m features with b blocks of rank ρ costs (n + b·m)·ρ MACs, and more where b does not
    divide n. One block is `low_rank_aware`.

    Args:
        blocks: b; None takes 2, or 1 where the budget buys no rank with 2.
        rank: ρ of each block of both maps; None derives it from `budget`, of which a rest may buy one
            map one more.
    """

    blocks: int | None = None
    rank: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> BlockDenseFFN:
        self.require_ungated(dense)
        d, h, like = dense.in_features, dense.hidden_features, dense.up.weight
        maps = [(d, h)] if dense.down is None else [(d, h), (h, dense.out_features)]
        blocks = self._blocks(dense, maps)
        ranks = self._ranks(dense, maps, blocks)

        def factors(n: int, m: int, rank: int) -> tuple[BlockDiagonal, nn.Linear]:
            inner = blocks * min(rank, -(-n // blocks), m)
            return (
                BlockDiagonal(n, inner, blocks, like=like, generator=generator),
                new_linear(inner, m, like=like, generator=generator),
            )

        first = factors(*maps[0], ranks[0])
        second = (None, None) if dense.down is None else factors(*maps[1], ranks[1])
        return BlockDenseFFN(*first, copy_activation(dense.act), *second)

    def _blocks(self, dense: DenseFFN, maps: list[tuple[int, int]]) -> int:
        if self.blocks is not None:
            if self.blocks < 1:
                raise ValueError(f"blocks={self.blocks} must be at least 1")
            return self.blocks
        allowed = (self.budget or 1) * dense.macs_per_token
        narrowest = min(n for n, _ in maps)
        return BLOCKS if narrowest >= BLOCKS and sum(_costs(maps, BLOCKS)) <= allowed else 1

    def _ranks(self, dense: DenseFFN, maps: list[tuple[int, int]], blocks: int) -> list[int]:
        """ρ of each map; the first that can takes one more for what is left of the budget."""
        costs = _costs(maps, blocks)
        rank = self.size_for(dense, sum(costs), unit="rank", given=self.rank)
        ranks = [rank] * len(maps)
        if self.rank is None and self.budget is not None:
            rest = self.budget * dense.macs_per_token - rank * sum(costs)
            for index, cost in enumerate(costs):
                if cost <= rest:
                    ranks[index] += 1
                    break
        return ranks

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> BlockDenseFFN:
        layer = self.build(dense, generator=generator)
        set_block_factors(layer.b1, layer.v1, dense.up, second_moment(data, lambda x: x))
        if dense.down is not None and layer.b2 is not None and layer.readout is not None:
            set_block_factors(layer.b2, layer.readout, dense.down, second_moment(data, layer.hidden))
        layer.fit_readout(data)
        return layer


def _costs(maps: list[tuple[int, int]], blocks: int) -> list[int]:
    """MACs of each map per rank of its blocks."""
    return [blocks * (-(-n // blocks) + m) for n, m in maps]


@torch.no_grad()
def set_block_factors(
    b: BlockDiagonal, v: nn.Linear, full: nn.Linear, moment: Float[Tensor, "d_in d_in"]
) -> None:
    """The nearest pair of factors to `full`, measured under the second moment of the inputs."""
    blocks, rank, _ = b.weight.shape
    left, right = pair_factors(full.weight, torch.full((1, blocks), rank), moment)
    b.weight.copy_(right[0])
    v.weight.copy_(left[0].permute(1, 0, 2).flatten(1))
    v.bias.copy_(torch.zeros(()) if full.bias is None else full.bias)
