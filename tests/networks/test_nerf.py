"""Radiance fields against closed forms, numerical integrals and a second, slow implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eugen
from stages.networks import nerf
from tests.tolerances import assert_close

NEAR, FAR = 2.0, 6.0
SIZES = {"width": 16, "depth": 8, "skip": 5, "position_frequencies": 4, "direction_frequencies": 2}


def field(samples: int = 12, fine_samples: int = 0, **changes) -> nerf.RadianceField:
    torch.manual_seed(3)
    fixed = {"near": NEAR, "far": FAR, "background": 1.0, "encoding": "positional"}
    return nerf.RadianceField(samples=samples, fine_samples=fine_samples, **{**fixed, **SIZES, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rays(count: int = 9) -> Tensor:
    rays = torch.randn(count, nerf.RAY, generator=generator(5))
    rays[:, 6] = 0.01
    return rays


class Medium(nn.Module):
    """The same density and colour everywhere; keeps what it was asked."""

    def __init__(self, density: float, colour: list[float]) -> None:
        super().__init__()
        self.density, self.colour = density, torch.tensor(colour)
        self.places = torch.empty(0)

    def forward(self, places: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        self.places = places
        return torch.full(places.shape[:2], self.density), self.colour.expand(*places.shape[:2], 3)


def encoded_slowly(x: list[float], frequencies: int) -> list[float]:
    found = list(x)
    for function in (math.sin, math.cos):
        for octave in range(frequencies):
            found += [function(2**octave * value) for value in x]
    return found


def test_positional_encoding_is_what_the_formula_says():
    x = torch.randn(5, 3, 3, dtype=torch.float64, generator=generator())
    expected = [encoded_slowly(row, 7) for row in x.reshape(-1, 3).tolist()]
    assert_close(nerf.encode(x, frequencies=7), torch.tensor(expected, dtype=torch.float64).view(5, 3, -1))


def test_with_variances_it_is_the_expectation_over_a_gaussian():
    mean = torch.randn(4, 3, dtype=torch.float64, generator=generator())
    variance = 0.05 * torch.rand(4, 3, dtype=torch.float64, generator=generator(1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    places = mean[..., None] + variance.sqrt()[..., None] * torch.from_numpy(nodes)
    at_nodes = nerf.encode(places.transpose(-1, -2), frequencies=5)
    expected = (at_nodes * torch.from_numpy(weights / weights.sum())[:, None]).sum(-2)
    assert_close(nerf.encode(mean, variance, frequencies=5), expected)


def test_frustums_have_the_moments_of_their_points():
    """The points of a cone between two depths, by quadrature that is exact for these polynomials."""
    origin, direction = np.array([0.3, -0.2, 1.0]), np.array([0.5, 0.7, -1.0])
    start, end, radius = 1.5, 2.5, 0.2
    nodes, weights = np.polynomial.legendre.leggauss(8)
    t, rho = (start + end) / 2 + (end - start) / 2 * nodes, (nodes + 1) / 2
    phi = np.arange(8) * math.pi / 4
    across = np.linalg.svd(direction[None])[2][1:]
    t, rho, phi = np.meshgrid(t, rho, phi, indexing="ij")
    turn = np.cos(phi)[..., None] * across[0] + np.sin(phi)[..., None] * across[1]
    points = origin + t[..., None] * direction + (radius * t * rho)[..., None] * turn
    volume = (weights[:, None, None] * weights[:, None]) * t**2 * rho
    share = (volume / volume.sum())[..., None]
    mean = (share * points).sum((0, 1, 2))
    variance = (share * (points - mean) ** 2).sum((0, 1, 2))
    given = [torch.from_numpy(np.array([v])) for v in (origin, direction, [radius], [start, end])]
    found = nerf.frustums(*given)
    assert_close(found[0][0, 0], torch.from_numpy(mean))
    assert_close(found[1][0, 0], torch.from_numpy(variance))


def test_a_thin_cone_is_encoded_as_its_axis():
    rays, edges = some_rays().double(), torch.linspace(2, 6, 9).double().expand(9, -1)
    points = rays[:, None, :3] + ((edges[:, 1:] + edges[:, :-1]) / 2)[..., None] * rays[:, None, 3:6]
    plain = nerf.encode(points, frequencies=6)
    errors = []
    for thinness in (1e-2, 1e-3):
        # Cone and intervals shrink together around the same middles.
        short = torch.stack([edges[:, :-1], edges[:, 1:]], dim=-1)
        short = short.mean(-1, keepdim=True) + thinness * (short - short.mean(-1, keepdim=True))
        each = [
            nerf.frustums(rays[:, :3], rays[:, 3:6], thinness * rays[:, 6:], short[:, i]) for i in range(8)
        ]
        found = [torch.cat(parts, dim=1) for parts in zip(*each, strict=True)]
        errors.append(float((nerf.encode(found[0], found[1], frequencies=6) - plain).abs().max()))
    assert errors[1] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)  # the error is quadratic in the size


def test_weights_are_shares_and_an_opaque_interval_hides_what_is_behind():
    density = torch.rand(50, 20, generator=generator()) * 30
    lengths = torch.rand(50, 20, generator=generator(1))
    weights = nerf.opacities(density, lengths)
    assert (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-6).all()
    assert (nerf.opacities(density[:, :2] / 100, lengths[:, :2]).sum(-1) < 1).all()
    density[:, 7] = 1e9
    weights = nerf.opacities(density, lengths)
    assert_close(weights.sum(-1), torch.ones(50), precision=torch.float32)
    assert (weights[:, 8:] == 0).all()


def test_weights_agree_with_the_product_form():
    density, lengths = (torch.rand(6, 9, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    alphas = 1 - torch.exp(-density * lengths)
    expected = torch.zeros(6, 9, dtype=torch.float64)
    for ray in range(6):
        light = 1.0
        for i in range(9):
            expected[ray, i] = light * alphas[ray, i]
            light *= 1 - alphas[ray, i]
    assert_close(nerf.opacities(density, lengths), expected)


@pytest.mark.parametrize("encoding", ["positional", "integrated"])
@pytest.mark.parametrize("background", [0.0, 1.0])
def test_a_homogeneous_medium_dims_by_the_exponential_law(encoding, background):
    model = field(fine_samples=7, encoding=encoding, background=background)
    colour = [0.2, 0.5, 0.9]
    model.coarse, model.fine = Medium(0.4, colour), Medium(0.15, colour)
    rays = some_rays()
    jitter = torch.rand(len(rays), 11 + 7, generator=generator())
    for given in (None, jitter):
        for density, found in zip((0.4, 0.15), model(rays, given).unbind(1), strict=True):
            path = (FAR - NEAR) * rays[:, 3:6].norm(dim=-1, keepdim=True)
            light = torch.exp(-density * path)
            expected = (1 - light) * torch.tensor(colour) + light * background
            assert_close(found, expected, precision=torch.float32)


def test_even_edges_stay_in_order_and_cover_the_ray_whatever_the_jitter():
    jitter = torch.rand(200, 11, generator=generator()).round()  # the extremes
    moved = nerf.even_edges(200, 12, NEAR, FAR, jitter, jitter.device)
    assert (moved.diff(dim=-1) >= -1e-6).all()
    assert (moved[:, 0] == NEAR).all() and (moved[:, -1] == FAR).all()
    still = nerf.even_edges(200, 12, NEAR, FAR, None, jitter.device)
    assert_close(nerf.even_edges(200, 12, NEAR, FAR, torch.full_like(jitter, 0.5), jitter.device), still)
    assert float((moved - still).abs().max()) == pytest.approx((FAR - NEAR) / 24, rel=1e-5)


@pytest.mark.parametrize("jittered", [False, True])
def test_importance_samples_invert_the_distribution(jittered):
    edges = torch.rand(6, 11, dtype=torch.float64, generator=generator()).sort(dim=-1).values
    weights = torch.rand(6, 10, dtype=torch.float64, generator=generator(1))
    weights[2, 3:7] = 0
    jitter = torch.rand(6, 33, dtype=torch.float64, generator=generator(2)) if jittered else None
    found = nerf.importance_edges(edges, weights, 33, jitter)
    offsets = np.full((6, 33), 0.5) if jitter is None else jitter.numpy()
    for ray in range(6):
        masses = weights[ray].numpy() + nerf.FLOOR
        cumulated = np.concatenate([[0], np.cumsum(masses)]) / masses.sum()
        expected = np.interp((np.arange(33) + offsets[ray]) / 33, cumulated, edges[ray].numpy())
        assert_close(found[ray], torch.from_numpy(expected), precision=torch.float32)


def test_the_fine_pass_looks_where_the_coarse_one_found_something():
    edges = torch.linspace(2, 6, 9).expand(1, -1)
    weights = torch.tensor([[0, 0, 0, 0, 0, 1.0, 0, 0]])
    found = nerf.importance_edges(edges, weights, 64, None)
    assert ((found > 4.5) & (found < 5)).float().mean() > 0.98


def test_the_second_pass_sends_no_gradient_into_the_first():
    model = field(fine_samples=5)
    model(some_rays())[:, 1].sum().backward()
    assert all((weight.grad == 0).all() for weight in model.coarse.parameters())
    assert all((weight.grad != 0).any() for weight in model.fine.parameters())


def test_given_edges_free_the_second_pass_from_the_first():
    model, rays = field(fine_samples=5), some_rays()
    edges = model.fine_edges(rays)
    assert edges.shape == (len(rays), 12 + 1 + 5) and (edges.diff(dim=-1) >= 0).all()
    before, given = model(rays)[:, 1], model(rays, fine_edges=edges)[:, 1]
    assert torch.equal(before, given)
    with torch.no_grad():
        model.coarse.density.weight.mul_(300)
    assert torch.equal(model(rays, fine_edges=edges)[:, 1], given)
    assert not torch.allclose(model(rays)[:, 1], given)


def test_what_a_ray_shows_does_not_depend_on_its_neighbours():
    model, rays = field(fine_samples=5), some_rays()
    one_by_one = torch.cat([model(ray[None]) for ray in rays])
    assert_close(model(rays), one_by_one, precision=torch.float32)


def test_places_are_in_the_middle_of_their_intervals():
    model, rays = field(samples=4), some_rays(1)
    model.coarse = medium = Medium(1.0, [0, 0, 0])
    model(rays)
    depths = torch.tensor([2.5, 3.5, 4.5, 5.5])
    assert_close(medium.places[0, :, :3], rays[:, :3] + depths[:, None] * rays[:, 3:6])


def slow_mlp(model: nerf.RadianceMLP, place: np.ndarray, direction: np.ndarray) -> tuple[float, np.ndarray]:
    """One place, in float64, as the paper's figure 7 draws it."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    h = np.maximum(linear("first", place), 0)
    for layer in range(4):
        h = np.maximum(linear(f"before.{2 * layer}", h), 0)
    h = np.concatenate([place, h])
    for layer in range(3):
        h = np.maximum(linear(f"after.{2 * layer}", h), 0)
    density = np.log1p(np.exp(linear("density", h)[0] - 1))
    both = np.concatenate([linear("feature", h), direction])
    matrix = np.concatenate([weights["mix.weight"], weights["turn.weight"]], axis=1)
    turned = np.maximum(matrix @ both + weights["mix.bias"], 0)
    return float(density), 1 / (1 + np.exp(-linear("colour", turned)))


def test_the_network_is_the_paper_s():
    model = field().coarse
    places, directions = (
        torch.randn(2, 3, 27, generator=generator()),
        torch.randn(2, 15, generator=generator(1)),
    )
    densities, colours = model(places, directions)
    for ray in range(2):
        for sample in range(3):
            density, colour = slow_mlp(model, places[ray, sample].numpy(), directions[ray].numpy())
            assert_close(densities[ray, sample], torch.tensor(density), precision=torch.float32)
            assert_close(colours[ray, sample], torch.from_numpy(colour), precision=torch.float32)


def test_at_full_size_it_has_the_paper_s_weights_and_three_blocks_a_network():
    with torch.device("meta"):
        model = field(64, 128, width=256, position_frequencies=10, direction_frequencies=4)
    layers = [(63, 256), *[(256, 256)] * 4, (256 + 63, 256), *[(256, 256)] * 2]
    heads = [(256, 1), (256, 256), (256 + 27, 128), (128, 3)]
    expected = sum(inputs * outputs + outputs for inputs, outputs in layers + heads)
    assert sum(weight.numel() for weight in model.coarse.parameters()) == expected
    sites = eugen.find_ffns(model)
    found = [(site.dense.in_features, site.dense.hidden_features, site.dense.out_features) for site in sites]
    assert found == [(256, 256, 256), (256, 256, 256), (319, 256, 256)] * 2
    assert [site.name.split(".")[0] for site in sites] == ["coarse"] * 3 + ["fine"] * 3


@pytest.mark.parametrize(
    ("depth", "skip", "blocks"), [(1, None, 0), (5, 3, 2), (7, 5, 3), (8, None, 3), (2, 1, 0), (4, 2, 1)]
)
def test_layers_are_taken_in_pairs_on_both_sides_of_the_joint(depth, skip, blocks):
    model = field(depth=depth, skip=skip)
    linears = [m for chain in (model.coarse.before, model.coarse.after) for m in chain[::2]]
    assert len(linears) == depth - 1
    assert len(eugen.find_ffns(model)) == blocks
    assert model(some_rays()).shape == (9, 1, 3)


@pytest.mark.parametrize("skip", [0, 8, 9])
def test_the_encoding_joins_inside_the_network(skip):
    with pytest.raises(ValueError, match=f"skip={skip} must be at least 1 and below depth=8"):
        field(skip=skip)


@pytest.mark.parametrize("encoding", ["positional", "integrated"])
def test_every_weight_learns(encoding):
    model = field(fine_samples=4, encoding=encoding)
    jitter = torch.rand(9, 11 + 4, generator=generator())
    model(some_rays(), jitter).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_in_half_precision_places_keep_theirs():
    model, rays = field(fine_samples=4), some_rays()
    expected = model(rays)
    found = model.to(torch.bfloat16)(rays)
    assert found.dtype == torch.float32
    assert_close(found, expected, precision=torch.bfloat16)
    rounded = rays.to(torch.bfloat16)
    assert torch.equal(model(rounded), model(rounded.float()))
