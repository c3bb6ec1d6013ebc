"""Activation-aware low rank (ASVD / SVD-LLM, arXiv 2402.06004): whiten by the inputs, truncate, unwhiten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eugen import parallel
from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, TokenStream
from eugen.layers.low_rank import LowRankConfig, LowRankFFN, set_factors
from eugen.shapes import Float


@dataclass(frozen=True, kw_only=True)
class LowRankAwareConfig(LayerConfig, name="low_rank_aware"):
    """SVD of `W L` with `L Lᵀ = E[x xᵀ]`, so that the error of the output, not of the weights, is least.

    Args:
        rank: r of both pairs of factors; None derives it from `budget`.
    """

    rank: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> LowRankFFN:
        self.require_ungated(dense)
        return LowRankConfig(budget=self.budget, rank=self.rank).build(dense, generator=generator)

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> LowRankFFN:
        layer = self.build(dense, generator=generator)
        set_factors(layer.v1, layer.u1, dense.up, whitening=moment_root(second_moment(data, lambda x: x)))
        if dense.down is not None and layer.v2 is not None and layer.readout is not None:
            whitening = moment_root(second_moment(data, layer.hidden))
            set_factors(layer.v2, layer.readout, dense.down, whitening=whitening)
        layer.fit_readout(data)
        return layer


@torch.no_grad()
def second_moment(data: TokenStream, of: Callable[[Tensor], Tensor]) -> Float[Tensor, "n n"]:
    """Weighted second moment of `of(x)`, float64.

    Raises:
        ValueError: the stream is empty.
    """
    moment, total = None, 0.0
    for x, _, weight in data:
        values = of(x)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        weighted = values if weight is None else values * weight.to(values.dtype)[:, None]
        chunk = (values.T @ weighted).double()
        moment = chunk if moment is None else moment + chunk
        total += len(x) if weight is None else float(weight.double().sum())
    if moment is None:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    moment, weights = parallel.total(moment, torch.tensor(total, dtype=torch.float64))
    return moment / weights.to(moment.device)


def moment_root(moment: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Lower Cholesky factors of second moments, slightly ridged; the identity where all values are 0.

    Raises:
        ValueError: no ridge makes one positive definite.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean()
    ridge = 1e-6 * torch.where(mean == 0, 1e6, mean)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    for _ in range(12):
        root, failed = torch.linalg.cholesky_ex(moment + ridge * identity)
        if not failed.any():
            return root
        ridge = ridge * 10
    raise ValueError("the inputs' second moment is not positive definite: check the calibration data for NaN")
