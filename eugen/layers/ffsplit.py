"""FFSplit: a block's heavy hitters stay dense, the rest of its neurons are compressed (arXiv 2401.04044).

y = W2_H act(W1_H x + b1_H) + f(x) + c: H are the neurons that matter most to the output (section 3.1), f is
another row of the suite, fitted to what the other neurons contribute.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from eugen import least_squares
from eugen.config import BudgetTooSmall, LayerConfig, UnsuitableBlock
from eugen.ffn import DenseFFN, FFNLayer, TokenStream
from eugen.layers.dense import new_block
from eugen.layers.low_rank import LowRankConfig
from eugen.parts.neurons import neuron_scores, strongest
from eugen.shapes import Float

Chunk = tuple[Tensor, Tensor, "Tensor | None"]


class SplitFFN(FFNLayer):
    """`heavy(x) + rest(x)`. Where the rest ends in a readout, that and the heavy neurons' are one map."""

    def __init__(self, heavy: DenseFFN, rest: FFNLayer) -> None:
        super().__init__()
        self.heavy, self.rest = heavy, rest
        self.in_features, self.out_features = heavy.in_features, heavy.out_features

    @property
    def readout(self) -> nn.Linear | None:
        """Both parts' output matrices side by side, a copy to read; None where the rest has none."""
        down, last = self.heavy.down, self.rest.merged().readout
        if last is None or down is None:
            return None
        joint = nn.Linear(down.in_features + last.in_features, self.out_features, device="meta")
        joint.weight = nn.Parameter(torch.cat([down.weight, last.weight], dim=1).detach())
        joint.bias = nn.Parameter((down.bias if last.bias is None else down.bias + last.bias).detach())
        return joint

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        if self.rest.readout is None:
            return self.reference(x)
        return torch.cat([self.heavy.features(x), self.rest.features(x)], dim=-1)

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.heavy.reference(x) + self.rest.reference(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.heavy(x) + self.rest(x)

    @property
    def macs_per_token(self) -> int:
        return self.heavy.macs_per_token + self.rest.macs_per_token

    @property
    def num_features(self) -> int:
        return self.heavy.num_features + self.rest.num_features

    def merged(self) -> SplitFFN:
        rest = self.rest.merged()
        return self if rest is self.rest else SplitFFN(self.heavy, rest)

    @torch.no_grad()
    def fit_readout(self, data: TokenStream) -> None:
        """One ridge for both parts; where the rest has no readout, for the heavy neurons beside it."""
        if self.rest.readout is None:
            beside = ((self.heavy.features(x), y - self.rest(x), w) for x, y, w in data)
            self.heavy.set_readout(*least_squares.ridge(beside))
        else:
            self.set_readout(*least_squares.ridge((self.features(x), y, w) for x, y, w in data))

    @torch.no_grad()
    def set_readout(self, weight: Float[Tensor, "d_out f"], bias: Float[Tensor, " d_out"]) -> None:
        hidden = self.heavy.hidden_features
        self.heavy.set_readout(weight[:, :hidden], torch.zeros_like(bias))
        self.rest.set_readout(weight[:, hidden:], bias)


class _Remainder:
    """A stream of what a block leaves of the targets."""

    def __init__(self, data: TokenStream, block: FFNLayer) -> None:
        self.data, self.block = data, block

    @torch.no_grad()
    def __iter__(self) -> Iterator[Chunk]:
        for x, y, weight in self.data:
            yield x, y - self.block(x), weight


@dataclass(frozen=True, kw_only=True)
class FFSplitConfig(LayerConfig, name="ffsplit"):
    """The heavy neurons of `prune`'s score; the others by any row, with what the budget leaves; one readout.

    Args:
        of: the row for the other neurons; sizes and a budget that it names itself are relative to these.
        heavy: share of the neurons kept as they are, in (0, 1), rounded down.

    Raises:
        ValueError: a share outside (0, 1), or a budget that `of` contradicts.
    """

    of: LayerConfig = field(default_factory=LowRankConfig)
    heavy: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.heavy < 1:
            raise ValueError(f"heavy={self.heavy} must be in (0, 1): a share of the neurons")
        if self.budget is not None and self.of.budget is not None:
            raise ValueError(f"budget={self.budget} and of.budget={self.of.budget}: give one of them")
        if self.only_budget is not None and self.budget not in (None, self.only_budget):
            raise ValueError(
                f"budget={self.budget}: of={self.of.name!r} has one size only, budget={self.only_budget}"
            )

    @property
    def only_budget(self) -> float | None:
        return self.of.only_budget

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> FFNLayer:
        self.require_down(dense)
        count = math.floor(self.heavy * dense.hidden_features)
        rest = part_of(dense, torch.arange(count, dense.hidden_features))
        inner = self._inner(dense, rest).build(rest, generator=generator)
        return SplitFFN(new_block(dense, count, generator=generator), inner) if count else inner

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFNLayer:
        """As built: a block of so few neurons that the share is less than one is the other row's alone."""
        self.require_down(dense)
        count = math.floor(self.heavy * dense.hidden_features)
        ranked = strongest(neuron_scores(dense, data, output_weight), dense.hidden_features)
        rest = part_of(dense, ranked[count:].sort().values)
        inner = self._inner(dense, rest)
        if not count:
            return inner.fit(rest, data, generator=generator, output_weight=output_weight)
        heavy = part_of(dense, ranked[:count], bias=False)
        others = _Remainder(data, heavy)
        layer = SplitFFN(heavy, inner.fit(rest, others, generator=generator, output_weight=output_weight))
        layer.fit_readout(data)
        return layer

    def _inner(self, dense: DenseFFN, rest: DenseFFN) -> LayerConfig:
        """The other row's configuration, with the budget that the heavy neurons leave.

        Raises:
            BudgetTooSmall: they leave too little.
            UnsuitableBlock: the row does not take this form of block.
        """
        inner, count = self.of, dense.hidden_features - rest.hidden_features
        # Not the difference of both blocks' MACs: those of a bundled stack are more than its first layer's.
        heavy_macs = count * dense.macs_per_neuron
        if self.budget is not None and self.only_budget is None:
            left = (self.budget * dense.macs_per_token - heavy_macs) / rest.macs_per_token
            inner = replace(inner, budget=min(1.0, max(left, 1e-9)))  # with nothing left, it names its least
        try:
            inner.build(copy.deepcopy(rest).to("meta"), generator=torch.Generator())
        except UnsuitableBlock as error:
            raise UnsuitableBlock(f"layer {self.name!r}: {error}") from error
        except BudgetTooSmall as error:
            least = (heavy_macs + error.least * rest.macs_per_token) / dense.macs_per_token
            row = f"{self.name!r} with heavy={self.heavy} and of={inner.name!r}"
            raise BudgetTooSmall(self.budget, row, least) from error
        return inner


@torch.no_grad()
def part_of(dense: DenseFFN, neurons: Tensor, *, bias: bool = True) -> DenseFFN:
    """A block of some of the neurons, with weights of its own.

    Args:
        bias: with the output matrix's bias, 0 where there is none; else 0.
    """
    part = new_block(dense, len(neurons), generator=torch.Generator())
    for own, full in ((part.up, dense.up), (part.gate, dense.gate)):
        if own is not None and full is not None:
            own.weight.copy_(full.weight[neurons])
            own.bias.zero_() if full.bias is None else own.bias.copy_(full.bias[neurons])
    if part.down is not None and dense.down is not None:
        part.down.weight.copy_(dense.down.weight[:, neurons])
        keep = bias and dense.down.bias is not None
        part.down.bias.copy_(dense.down.bias) if keep else part.down.bias.zero_()
    return part
