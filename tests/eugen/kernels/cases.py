"""Random maps in every form, and how far rounding may take one from its definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eugen.kernels.feature_map import naive
from tests.eugen.blocks import generator

SLOPES = {"gelu": 1.13, "silu": 1.1}
"""Largest |Φ'| where it is above 1; exp is treated apart."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. Projections are about 0.5: exponentials of products stay in half precision's range."""

    tokens: int = 63
    d: int = 60
    m: int = 7
    order: int = 2
    lowest: int = 1
    sharing: str = "independent"
    activation: str = "identity"
    bias: bool = True
    norm: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def form(self) -> tuple[int, int, str, str]:
        return self.order, self.lowest, self.sharing, self.activation

    @property
    def groups(self) -> int:
        return {"powers": 1, "shared": self.order}.get(self.sharing, sum(range(self.lowest, self.order + 1)))

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, weight, bias, norm."""
        random, p = generator(self.seed), self.groups * self.m
        x = torch.randn(self.tokens, self.d, generator=random)
        weight = torch.randn(p, self.d, generator=random) * 0.3 / self.d**0.5
        bias, norm = torch.randn(2, p, generator=random) * 0.3
        slots = (bias if self.bias else None, norm / self.d**0.5 if self.norm else None)
        parts = (x, weight, *slots)
        return tuple(None if part is None else part.to(device, self.dtype) for part in parts)  # pyright: ignore


def wide(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]


def rounding_allows(case: Case, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The largest error of each feature: sums in float32, one rounding to the result's dtype.

    A sum of n products is off by n ε of the sum of their sizes, a product of a and b by
    |a| δb + |b| δa + δa δb + ε|ab|, Φ by its slope. Tensor cores cut instead of rounding, so ε is a whole
    unit in the last place, not a half.
    """
    x, weight, bias, norm = wide(tensors)
    assert x is not None
    assert weight is not None
    eps = torch.finfo(torch.float32).eps
    length = x.square().sum(1, keepdim=True).sqrt()
    size = x.abs() @ weight.abs().T
    size = size if bias is None else size + bias.abs()
    size = size if norm is None else size + length * norm.abs()
    values = naive.projections(x, weight, bias, norm).chunk(case.groups, -1)
    errors = ((case.d + 4) * eps * size).chunk(case.groups, -1)
    parts = []
    for chain in naive.chains(case.order, case.lowest, case.sharing):
        p, error = values[chain[0]], errors[chain[0]]
        for group in chain[1:]:
            q, other = values[group], errors[group]
            error = p.abs() * other + q.abs() * error + error * other + eps * (p * q).abs()
            p = p * q
        f = naive.ACTIVATIONS[case.activation](p)
        error = f * error.expm1() if case.activation == "exp" else SLOPES.get(case.activation, 1) * error
        if case.activation not in ("identity", "relu"):  # hardware's own exponentials and logarithms
            error = error + 8 * eps * (1 + p.abs()) * (1 + f.abs())
        info = torch.finfo(case.dtype)
        parts.append(error + info.eps * (f.abs() + error) + info.smallest_normal * info.eps)
    return torch.cat(parts, dim=-1)


def check(case: Case, actual: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """The features are those of the definition, each within what rounding allows."""
    expected = naive.feature_map(*wide(tensors), *case.form)  # pyright: ignore
    assert actual.dtype == case.dtype
    assert actual.shape == expected.shape
    excess = (actual.detach().cpu().double() - expected).abs() / rounding_allows(case, tensors)
    assert excess.max() <= 1, f"{case}: {excess.max():.3g} times the allowed error"  # NaN fails, too
