"""A narrower gated block (GEGLU, SwiGLU; arXiv 2002.05202), freshly initialised.

y = W2 (act(Wg x + bg) ⊙ (W1 x + b1)) + b2: a product of two learned projections, and so the control
for every EUGen of order 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eugen.config import LayerConfig
from eugen.features import FIXED_ACTIVATIONS
from eugen.ffn import DenseFFN, copy_activation, new_linear


@dataclass(frozen=True, kw_only=True)
class NarrowGatedConfig(LayerConfig, name="narrow_gated"):
    """A narrower gated block for a block of any form. Transfer solves its output matrix.

    Args:
        hidden_features: number of neurons h', 2d + out MACs each; None derives it from `budget`.
        act: the gate's activation, such as `gelu` (GEGLU) or `silu` (SwiGLU); None takes the block's own.

    Raises:
        ValueError: an unknown activation.
    """

    hidden_features: int | None = None
    act: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act is not None and self.act not in FIXED_ACTIVATIONS:
            raise ValueError(
                f"act={self.act!r} is unknown: use one of {', '.join(FIXED_ACTIVATIONS)}, "
                "or None for the block's own"
            )

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> DenseFFN:
        d, out = dense.in_features, dense.out_features
        hidden = self.size_for(dense, 2 * d + out, unit="hidden_features", given=self.hidden_features)

        def linear(in_features: int, out_features: int) -> torch.nn.Linear:
            return new_linear(in_features, out_features, like=dense.up.weight, generator=generator)

        return DenseFFN(
            up=linear(d, hidden),
            act=copy_activation(dense.act) if self.act is None else FIXED_ACTIVATIONS[self.act](),
            down=linear(hidden, out),
            gate=linear(d, hidden),
        )
