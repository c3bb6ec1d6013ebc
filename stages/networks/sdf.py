"""The network of iSDF (arXiv 2204.02296): a point's signed distance from its positional encoding.

    γ(x) = [x, sin(2^j D x), cos(2^j D x)]_j,   h_0 = γ(x),   h_i = softplus(W_i h_{i-1} + b_i), y = w·h_L + c

The layer after the middle sees γ(x) again beside its input. D are the 21 directions of the icosahedron's
corners and edge midpoints, one of each opposite two. As in iSDF the softplus has β = 100, close to a ReLU but
smooth. Other than there, weights start as torch's linear maps do: so do the blocks that take their place, and
dense networks learn faster from it.

What `eugen.find_ffns` finds and surgery replaces:

- `pair`: two hidden layers, `W_2 softplus(W_1 h + b_1) + b_2`, a block with `width` neurons. The softplus
  after it stays. All hidden layers are in pairs: only `w` is never replaced.
- `layer`: a hidden layer with its softplus, the feed-forward layer of the EUGens papers. All are sites.

Both settings make the same function.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eugen
from eugen.shapes import Float

BETA = 100.0
"""Sharpness of the softplus."""

Block = Literal["pair", "layer"]


class HiddenLayer(nn.Module):
    """`softplus(W x + b)`: a feed-forward layer without an output matrix."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        # Not named as in any replacement: a stored student holds what the dense network has not, by name.
        self.affine, self.act = nn.Linear(in_features, width), nn.Softplus(beta=BETA)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.act(self.affine(x))


def _parts(module: nn.Module) -> eugen.FFNParts:
    assert isinstance(module, HiddenLayer)
    return eugen.FFNParts(dense=eugen.DenseFFN(module.affine, module.act), slot="", output="")


eugen.register_site(HiddenLayer, _parts)


class Encoding(nn.Module):
    """γ(x): `[*, 3]` to `[*, 3 + 42 frequencies]`.

    The frequencies along each direction are 1, 2, 4, … radians a unit.
    """

    directions: Tensor
    scales: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        directions = icosahedral_directions().float()
        # Constants, no part of a checkpoint.
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("scales", 2.0 ** torch.arange(frequencies), persistent=False)
        self.out_features = 3 + 2 * directions.shape[1] * frequencies

    def forward(self, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch e"]:
        phases = ((x @ self.directions).unsqueeze(-1) * self.scales).flatten(-2)
        return torch.cat([x, phases.sin(), phases.cos()], dim=-1)


class SDFNetwork(nn.Module):
    """Points `[*, 3]` to signed distances `[*]`.

    Args:
        width: neurons of a hidden layer.
        layers: hidden layers, an even number; layer `2 (layers // 4)`, counted from 0, sees the encoding
            again (of two layers none does).
        frequencies: of the encoding.
        block: what counts as one feed-forward block.
    """

    def __init__(self, width: int, layers: int, frequencies: int, block: Block = "pair") -> None:
        super().__init__()
        if layers < 2 or layers % 2:
            raise ValueError(f"layers={layers} must be a positive even number: the hidden layers form pairs")
        self.encoding = Encoding(frequencies)
        encoded, per_block = self.encoding.out_features, 2 if block == "pair" else 1
        self.skip = 2 * (layers // 4) // per_block
        blocks: list[nn.Module] = []
        for index in range(layers // per_block):
            inputs = encoded if index == 0 else width + (encoded if index == self.skip else 0)
            blocks.append(pair(inputs, width) if block == "pair" else HiddenLayer(inputs, width))
        self.blocks, self.out = nn.ModuleList(blocks), nn.Linear(width, 1)

    def forward(self, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
        encoded = hidden = self.encoding(x)
        for index, block in enumerate(self.blocks):
            if index and index == self.skip:
                hidden = torch.cat([hidden, encoded], dim=-1)
            hidden = block(hidden)
        return self.out(hidden).squeeze(-1)


def pair(in_features: int, width: int) -> nn.Sequential:
    """Two hidden layers; the first three modules are the block that `eugen.find_ffns` finds."""
    first, second = nn.Linear(in_features, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.Softplus(beta=BETA), second, nn.Softplus(beta=BETA))


def icosahedral_directions() -> Float[Tensor, "3 21"]:
    """Unit vectors to an icosahedron's corners and edge midpoints, one of each opposite two; float64."""
    golden = (1 + 5**0.5) / 2
    corners = torch.tensor(
        [[0, one, two] for one in (1, -1) for two in (golden, -golden)], dtype=torch.float64
    )
    corners = torch.cat([corners.roll(shift, dims=1) for shift in range(3)])
    edges = (torch.cdist(corners, corners) - 2).abs() < 1e-6
    start, end = edges.triu().nonzero(as_tuple=True)
    directions = F.normalize(torch.cat([corners, corners[start] + corners[end]]), dim=1)
    # Of opposite two the one whose first coordinate other than zero is positive.
    first = (directions.abs() > 1e-6).int().argmax(dim=1, keepdim=True)
    return directions[directions.gather(1, first).squeeze(1) > 0].T.contiguous()
