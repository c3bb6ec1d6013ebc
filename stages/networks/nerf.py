"""Neural radiance fields (NeRF, Mildenhall et al. 2020, arXiv 2003.08934): rays to colours, end to end.

A ray is cut into intervals. An MLP gives density and colour of each, and alpha compositing its colour. A
second network looks again where the first one found something (coarse and fine pass of the paper). Intervals
stand in the place of the paper's points: a point is the middle of one, and the last one ends at `far`.
`integrated` encoding gives the MLP whole conical frustums instead (Mip-NeRF, arXiv 2103.13415).

**Which layers may be replaced.** Of the `depth` layers `ReLU(W x + b)` of an MLP the first one, which takes
the encoding, stays. The others are two chains, up to where the encoding joins again and behind it;
`eugen.find_ffns` takes each chain's layers in pairs, `Linear, ReLU, Linear` a block with hidden size `width`
whose output still passes its ReLU, and leaves an odd last one. With 8 layers, joined after the 5th: layers
2–3, 4–5 and 6–7. The heads for density and colour stay.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Encoding = Literal["positional", "integrated"]
RAY = 7
"""Columns of a ray: origin, direction (one long along the camera's axis), radius of its cone at depth 1."""
DENSITY_SHIFT = 1.0
"""Density is softplus(z − 1), as in Mip-NeRF: a ReLU's gradient may vanish everywhere at the start."""
FLOOR = 1e-5
"""Added to each interval's weight, so that the fine pass looks everywhere now and then."""


class RadianceMLP(nn.Module):
    """Density and colour of encoded places, seen from encoded directions.

    Args:
        places, directions: sizes of the encodings.
        width, depth: of the layers before the heads.
        skip: the encoding of the place joins again after so many layers; None for never.

    Raises:
        ValueError: `skip` is not between 1 and `depth − 1`.
    """

    def __init__(self, places: int, directions: int, *, width: int, depth: int, skip: int | None) -> None:
        super().__init__()
        if skip is not None and not 0 < skip < depth:
            raise ValueError(f"skip={skip} must be at least 1 and below depth={depth}, or None")
        self.joined = skip is not None
        before = depth if skip is None else skip
        self.first = nn.Linear(places, width)
        self.before = _chain([width] * before)
        self.after = _chain([width + places, *[width] * (depth - before)]) if self.joined else _chain([])
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        # One linear map of feature and direction, in two parts: the direction's is the same along a ray.
        self.mix = nn.Linear(width, width // 2)
        self.turn = nn.Linear(directions, width // 2, bias=False)
        self.colour = nn.Linear(width // 2, 3)

    def forward(self, places: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Densities `[n, intervals]` and RGB `[n, intervals, 3]` in 0..1, both float32.

        Args:
            places: `[n, intervals, encoding]`.
            directions: `[n, encoding]`.
        """
        dtype = self.first.weight.dtype
        places, directions = places.to(dtype), directions.to(dtype)
        h = self.before(F.relu(self.first(places)))
        if self.joined:
            h = self.after(torch.cat([places, h], dim=-1))
        density = F.softplus(self.density(h).squeeze(-1).float() - DENSITY_SHIFT)
        turned = F.relu(self.mix(self.feature(h)) + self.turn(directions).unsqueeze(-2))
        return density, torch.sigmoid(self.colour(turned).float())


class RadianceField(nn.Module):
    """Colours of rays.

    Args:
        near, far: depths between which the scene lies.
        samples: intervals of the coarse pass.
        fine_samples: further edges of intervals, drawn for the fine pass; 0 leaves that pass out.
        background: its grey value, 0 or 1.
        width, depth, skip: see `RadianceMLP`.
        position_frequencies, direction_frequencies: octaves of the encodings.
    """

    def __init__(
        self,
        *,
        near: float,
        far: float,
        samples: int,
        fine_samples: int,
        background: float,
        encoding: Encoding,
        width: int,
        depth: int,
        skip: int | None,
        position_frequencies: int,
        direction_frequencies: int,
    ) -> None:
        super().__init__()
        self.near, self.far, self.samples, self.fine_samples = near, far, samples, fine_samples
        self.background, self.encoding = background, encoding
        self.frequencies = position_frequencies, direction_frequencies
        sizes = [3 * (1 + 2 * count) for count in self.frequencies]
        self.coarse = RadianceMLP(*sizes, width=width, depth=depth, skip=skip)
        self.fine = RadianceMLP(*sizes, width=width, depth=depth, skip=skip) if fine_samples else None

    def forward(self, rays: Tensor, jitter: Tensor | None = None, fine_edges: Tensor | None = None) -> Tensor:
        """RGB of each pass, `[n, 1 or 2, 3]`; the last one is the rendered colour.

        Args:
            rays: `[n, 7]`, see `RAY`.
            jitter: uniform in 0..1, `[n, samples − 1 + fine_samples]`, moves the edges; None for even ones.
            fine_edges: `[n, samples + 1 + fine_samples]`, the fine pass's intervals, in the place of those
                that the coarse pass finds. They make the fine network's inputs the same whatever the coarse
                one is, as calibration needs it.
        """
        rays = rays.float()
        moves = (None, None) if jitter is None else jitter.split([self.samples - 1, self.fine_samples], 1)
        edges = even_edges(len(rays), self.samples, self.near, self.far, moves[0], rays.device)
        weights, colour = self._render(self.coarse, rays, edges)
        if self.fine is None:
            return colour.unsqueeze(1)
        if fine_edges is None:
            fine_edges = self.refine(edges, weights, moves[1])
        _, finer = self._render(self.fine, rays, fine_edges.float())
        return torch.stack([colour, finer], dim=1)

    @torch.no_grad()
    def fine_edges(self, rays: Tensor) -> Tensor:
        """The fine pass's intervals that the coarse pass finds, `[n, samples + 1 + fine_samples]`."""
        edges = even_edges(len(rays), self.samples, self.near, self.far, None, rays.device)
        weights, _ = self._render(self.coarse, rays, edges)
        return self.refine(edges, weights, None)

    def refine(self, edges: Tensor, weights: Tensor, jitter: Tensor | None) -> Tensor:
        """The edges, sorted, together with new ones in proportion to the weights; has no gradient."""
        drawn = importance_edges(edges, weights.detach(), self.fine_samples, jitter)
        return torch.cat([edges, drawn], dim=-1).sort(dim=-1).values

    def _render(self, network: RadianceMLP, rays: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        origins, directions, radii = rays[:, :3], rays[:, 3:6], rays[:, 6:]
        lengths = directions.norm(dim=-1, keepdim=True)
        octaves, turns = self.frequencies
        if self.encoding == "integrated":
            places = encode(*frustums(origins, directions, radii, edges), frequencies=octaves)
        else:
            middles = (edges[:, :-1] + edges[:, 1:]) / 2
            points = origins[:, None] + middles[..., None] * directions[:, None]
            places = encode(points, frequencies=octaves)
        density, colours = network(places, encode(directions / lengths, frequencies=turns))
        weights = opacities(density, edges.diff(dim=-1) * lengths)
        return weights, composite(weights, colours, self.background)


def encode(x: Tensor, variance: Tensor | None = None, *, frequencies: int) -> Tensor:
    """Positional encoding, equation 4 of NeRF: `x`, then `sin(2^l x)` and `cos(2^l x)`, `[..., 3(1 + 2L)]`.

    Frequencies have no factor π, as in the authors' programs. With variances, `[..., 3]`, it is the
    expectation over a Gaussian with the mean `x`: equations 13–14 of Mip-NeRF.
    """
    scales = 2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device)
    angles = (x.unsqueeze(-2) * scales[:, None]).flatten(-2)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    if variance is not None:
        damped = torch.exp(-0.5 * (variance.unsqueeze(-2) * scales[:, None] ** 2).flatten(-2))
        waves = waves * torch.cat([damped, damped], dim=-1)
    return torch.cat([x, waves], dim=-1)


def frustums(origins: Tensor, directions: Tensor, radii: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the points of each conical frustum, `[n, intervals, 3]`: Mip-NeRF, eq. 7, 8, 16.

    Args:
        origins, directions: `[n, 3]`; radii: `[n, 1]`, of the cone at ray parameter 1.
        edges: `[n, intervals + 1]`.
    """
    middle, half = (edges[:, 1:] + edges[:, :-1]) / 2, (edges[:, 1:] - edges[:, :-1]) / 2
    square = 3 * middle**2 + half**2
    mean = middle + 2 * middle * half**2 / square
    along = half**2 / 3 - 4 / 15 * half**4 * (12 * middle**2 - half**2) / square**2
    across = radii**2 * (middle**2 / 4 + 5 / 12 * half**2 - 4 / 15 * half**4 / square)
    squared = directions**2
    off_axis = 1 - squared / squared.sum(dim=-1, keepdim=True)
    points = origins[:, None] + mean[..., None] * directions[:, None]
    return points, along[..., None] * squared[:, None] + across[..., None] * off_axis[:, None]


def even_edges(
    count: int, samples: int, near: float, far: float, jitter: Tensor | None, device: torch.device
) -> Tensor:
    """Edges of `samples` intervals, `[count, samples + 1]`; jitter moves inner ones by up to half a step."""
    edges = torch.linspace(near, far, samples + 1, device=device).expand(count, -1)
    if jitter is None:
        return edges
    return edges + F.pad((jitter - 0.5) * (far - near) / samples, (1, 1))


def importance_edges(edges: Tensor, weights: Tensor, count: int, jitter: Tensor | None) -> Tensor:
    """`count` depths a ray, distributed as the weights say: inverse of the piecewise linear distribution.

    Args:
        edges: `[n, intervals + 1]`, ascending; weights: `[n, intervals]`, not negative.
        jitter: `[n, count]` uniform in 0..1, one for each of `count` equal strata; None for their middles.
    """
    offset = torch.full((1, 1), 0.5, device=edges.device) if jitter is None else jitter
    share = ((torch.arange(count, device=edges.device) + offset) / count).expand(len(edges), -1)
    masses = F.pad((weights + FLOOR).cumsum(dim=-1), (1, 0))
    masses = masses / masses[:, -1:]
    upper = torch.searchsorted(masses, share.contiguous(), right=True).clamp(1, weights.shape[-1])
    low, high = masses.gather(1, upper - 1), masses.gather(1, upper)
    start, end = edges.gather(1, upper - 1), edges.gather(1, upper)
    return start + (share - low) / (high - low).clamp(min=1e-12) * (end - start)


def opacities(density: Tensor, lengths: Tensor) -> Tensor:
    """Share of the light that each interval adds, `[n, intervals]`: equation 3 of NeRF.

    Args:
        density: per unit of length, `[n, intervals]`; lengths: of the intervals, the same shape.
    """
    thickness = density * lengths
    before = F.pad(thickness.cumsum(dim=-1)[:, :-1], (1, 0))
    return torch.exp(-before) * -torch.expm1(-thickness)


def composite(weights: Tensor, colours: Tensor, background: float) -> Tensor:
    """The colour of each ray, `[n, 3]`, in front of a grey background."""
    return (weights[..., None] * colours).sum(dim=-2) + background * (1 - weights.sum(dim=-1, keepdim=True))


def cone_radius(angle: float, width: int) -> float:
    """Radius at depth 1 of a pixel's cone, 2/√12 of the pixel's width: Mip-NeRF, section 3.1.

    Args:
        angle: horizontal field of view, radians; width: pixels.
    """
    return 2 * math.tan(angle / 2) / width * 2 / math.sqrt(12)


def _chain(sizes: list[int]) -> nn.Sequential:
    """Layers `ReLU(W x + b)` from each size to the next."""
    return nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
