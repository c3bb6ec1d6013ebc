"""Small dense blocks, and inputs like those of a trained network: correlated, off centre, ‖x‖² ≈ d."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eugen import DenseFFN

Chunks = list[tuple[Tensor, Tensor, Tensor | None]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(n_in: int, n_out: int, *, bias: bool, dtype: torch.dtype, seeded: torch.Generator) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=seeded) * 1.5 / n_in**0.5)
        if bias:
            layer.bias.copy_(torch.randn(n_out, generator=seeded) * 0.3)
    return layer.to(dtype)


def block(
    d: int = 60,
    h: int = 240,
    out: int | None = None,
    *,
    act: nn.Module | None = None,
    bias: bool = True,
    gated: bool = False,
    whole: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DenseFFN:
    """A dense block; `whole=False` leaves out its output matrix."""
    seeded = generator(seed)
    options = {"bias": bias, "dtype": dtype, "seeded": seeded}
    up, down = linear(d, h, **options), linear(h, d if out is None else out, **options)
    gate = linear(d, h, **options) if gated else None
    return DenseFFN(up, act or nn.GELU(), down if whole else None, gate)


def tokens(count: int, d: int = 60, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same distribution for every seed: directions of falling weight around a common mean."""
    fixed = generator(99)
    mix = torch.randn(d, d, generator=fixed) * (1 + torch.arange(d)).pow(-0.5)
    mean = 0.5 * torch.randn(d, generator=fixed)
    mix = mix * ((d - mean.square().sum()) / mix.square().sum()).sqrt()
    return (torch.randn(count, d, generator=generator(seed)) @ mix.T + mean).to(dtype)


@torch.no_grad()
def stream(dense: nn.Module, x: Tensor, chunk: int = 630) -> Chunks:
    """The block's inputs and outputs, cut into chunks."""
    return [(part, dense(part), None) for part in x.split(chunk)]
