"""What is compared: a few networks that show most of the library. Runs inside the workers.

A worker's eugen may be an older one, so only what users call is called: `layers`, `replace`, and of the
new layers `merged` and `macs_per_token`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import eugen

WIDTH, DEPTH, HEADS = 256, 2, 4
TEACHER_WIDTH, CALIBRATION_TOKENS, HELD_OUT_TOKENS = 48, 2048, 2048
QUALITY = "relative error of the closed form"
UNIVARIATE = {"order": 1, "projection": "teacher", "activation": "univariate", "norm_slot": False}


@dataclass(frozen=True)
class Case:
    """A layer in the place of every feed-forward block of a network.

    Attributes:
        layer, options: its registered name, and its configuration.
        tokens: inputs of one call.
        whole: in a small pre-norm transformer; else the block alone, width → 4·width → width.
        fitted: whether its closed form is compared, too; a copy of the block has nothing to fit.
    """

    name: str
    layer: str
    tokens: int
    options: dict[str, Any] = field(default_factory=lambda: {"budget": 0.3})
    whole: bool = False
    fitted: bool = True

    def config(self) -> Any:
        """Its configuration in this process's eugen."""
        return eugen.layers()[self.layer](**self.options)


CASES = {
    case.name: case
    for case in (
        Case("dense-128", "dense", 128, {}, fitted=False),
        Case("eugen-1", "eugen", 1),
        Case("eugen-128", "eugen", 128),
        Case("univariate-128", "eugen", 128, {"budget": 0.3, **UNIVARIATE}),
        Case("low_rank_aware-128", "low_rank_aware", 128),
        Case("int8-128", "int8", 128, {}),
        Case("transformer-eugen-128", "eugen", 128, whole=True),
    )
}


class Block(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = _ffn(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


def _ffn(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def build(case: Case) -> tuple[nn.Module, Tensor, dict[str, int]]:
    """The network as it would be deployed, its input, and what is counted of it.

    Returns:
        model, example, and `macs` of all replaced blocks for one call, `parameters` and `bytes` (buffers
        included) of the network.

    Raises:
        Exception: whatever this process's eugen has against the case.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH))) if case.whole else _ffn(WIDTH)
        example = torch.randn(*((1,) if case.whole else ()), case.tokens, WIDTH)
    replaced = eugen.replace(dense.eval().requires_grad_(False), case.config())
    model, macs = replaced.model, 0
    for site in replaced.sites:
        layer = site.layer.merged()
        macs += case.tokens * layer.macs_per_token
        parent, _, name = site.name.rpartition(".")
        if name:
            setattr(model.get_submodule(parent), name, layer)
        else:
            model = layer
    model = model.eval().requires_grad_(False)
    stored = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    counted = {
        "macs": macs,
        "parameters": sum(t.numel() for t in stored),
        "bytes": sum(t.numel() * t.element_size() for t in stored),
    }
    return model, example, counted


def closed_form_error(case: Case, seed: int) -> float:
    """Relative RMS error of the layer fitted to a fixed dense block, on inputs that it was not fitted to.

    Args:
        seed: draws the inputs of the fit and the layer's own randomness.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = _ffn(TEACHER_WIDTH).eval().requires_grad_(False)
    held_out = _inputs(HELD_OUT_TOKENS, 1000)
    calibration = [_inputs(CALIBRATION_TOKENS, seed)]
    fitted = eugen.replace(teacher, case.config(), calibration=calibration, seed=seed).model.eval()
    with torch.no_grad():
        expected = teacher(held_out).double()
        error = fitted(held_out).double() - expected
    return float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(expected - expected.mean(0)))


def _inputs(tokens: int, seed: int) -> Tensor:
    """Inputs with few strong directions and many weak ones, as activations have them: error is in reach."""
    generator = torch.Generator().manual_seed(seed)
    scales = 3 * torch.arange(1, TEACHER_WIDTH + 1) ** -1.5
    return torch.randn(tokens, TEACHER_WIDTH, generator=generator) * scales
