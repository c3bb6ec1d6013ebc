"""Random maps in every form, and how far rounding may take one from its definition in float64.

The kernel's tests and `python -m benchmarks.gpu_check` hold it to the same bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eugen.kernels.feature_map import naive

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
        random, p = torch.Generator().manual_seed(self.seed), self.groups * self.m
        x = torch.randn(self.tokens, self.d, generator=random)
        weight = torch.randn(p, self.d, generator=random) * 0.3 / self.d**0.5
        bias, norm = torch.randn(2, p, generator=random) * 0.3
        slots = (bias if self.bias else None, norm / self.d**0.5 if self.norm else None)
        parts = (x, weight, *slots)
        return tuple(None if part is None else part.to(device, self.dtype) for part in parts)  # pyright: ignore


def wide(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The same numbers in float64 on the CPU."""
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


def excess(case: Case, actual: Tensor, tensors: tuple[Tensor | None, ...]) -> float:
    """The largest error of a feature over what rounding allows: 1 or less is right, NaN is not.

    Raises:
        ArithmeticError: another dtype or shape than the definition's.
    """
    expected = naive.feature_map(*wide(tensors), *case.form)  # pyright: ignore
    if (actual.dtype, actual.shape) != (case.dtype, expected.shape):
        raise ArithmeticError(
            f"{actual.dtype} {tuple(actual.shape)} is not {case.dtype} {tuple(expected.shape)}"
        )
    off = (actual.detach().cpu().double() - expected).abs() / rounding_allows(case, tensors)
    return float(off.max())


def check(case: Case, actual: Tensor, tensors: tuple[Tensor | None, ...]) -> float:
    """The features are those of the definition, each within what rounding allows; returns `excess`.

    Raises:
        ArithmeticError: they are not.
    """
    found = excess(case, actual, tensors)
    if not found <= 1:  # NaN fails, too
        raise ArithmeticError(f"{case}: {found:.3g} times the allowed error")
    return found


def small_cases() -> list[Case]:
    """Every form, dtypes, activations and slots in turn, at odd sizes; then the smallest and a whole step."""
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    slots = itertools.cycle(((True, True), (True, False), (False, True), (False, False)))
    activations = itertools.cycle(naive.ACTIVATIONS)
    found = []
    for order, sharing in itertools.product((1, 2, 3), ("independent", "shared", "powers")):
        for lowest in range(1, order + 1):
            form = {"order": order, "lowest": lowest, "sharing": sharing, "activation": next(activations)}
            bias, norm = next(slots)
            found.append(Case(**form, bias=bias, norm=norm, dtype=next(dtypes)))
    return [*found, Case(tokens=1, d=1, m=1), Case(tokens=65, d=128, m=33), Case(tokens=70, d=140, m=40)]


def large_cases() -> list[Case]:
    """Of transformers: 30 % of a block of width 768 or 1024, a tile more or less than whole ones."""
    halves = [Case(tokens=4093, d=768, m=368, dtype=t) for t in (torch.bfloat16, torch.float16)]
    wider = Case(tokens=4096, d=1024, m=488, dtype=torch.bfloat16)
    return [*halves, wider, Case(tokens=4093, d=768, m=368)]


def run(case: Case, operator: Callable[..., Tensor], device: str) -> float:
    """`check` of an operator on these inputs."""
    tensors = case.tensors(device)
    return check(case, operator(*tensors, *case.form), tensors)
