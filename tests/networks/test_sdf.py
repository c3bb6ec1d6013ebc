"""iSDF's network against its formulas in float64, written a second time with plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import eugen
from stages.networks import sdf

BLOCKS = ("pair", "layer")


def network(block: sdf.Block = "pair", *, width: int = 12, layers: int = 4, frequencies: int = 2):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return sdf.SDFNetwork(width, layers, frequencies, block).double()


def points(count: int) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def encoded(x: np.ndarray, frequencies: int) -> np.ndarray:
    phases = [
        2.0**j * float(d @ x) for d in sdf.icosahedral_directions().T.numpy() for j in range(frequencies)
    ]
    return np.array([*x, *map(math.sin, phases), *map(math.cos, phases)])


def linears(model: sdf.SDFNetwork) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases, input to output."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear)]
    *hidden, out = sorted(found, key=lambda m: m.out_features == 1)
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (*hidden, out)]


def by_hand(model: sdf.SDFNetwork, x: np.ndarray, frequencies: int) -> float:
    code = encoded(x, frequencies)
    *hidden, (last, constant) = linears(model)
    h = code
    for number, (weight, bias) in enumerate(hidden):
        if number == len(hidden) // 2:  # for a multiple of four layers
            h = np.concatenate([h, code])
        h = np.logaddexp(0, 100 * (weight @ h + bias)) / 100
    return float(last[0] @ h + constant[0])


def test_directions_are_those_to_corners_and_edge_midpoints_of_an_icosahedron():
    directions = sdf.icosahedral_directions().T.numpy()
    assert directions.shape == (21, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    # The group of the icosahedron leaves no direction special: Σ d dᵀ = n/3 · I, for each of the two kinds.
    corners = np.array([d for d in directions if np.isclose(np.abs(d), 0).sum() == 1 and _is_corner(d)])
    assert len(corners) == 6
    np.testing.assert_allclose(corners.T @ corners, 2 * np.eye(3), atol=1e-12)
    np.testing.assert_allclose(directions.T @ directions, 7 * np.eye(3), atol=1e-12)
    # Neighbours are 31.7° (corner to midpoint) or 36° (midpoint to midpoint) apart; none is there twice.
    for one, other in itertools.combinations(directions, 2):
        assert math.degrees(math.acos(min(1.0, abs(float(one @ other))))) > 31.7


def _is_corner(direction: np.ndarray) -> bool:
    """Coordinates 0, 1 and the golden ratio, up to scale."""
    small, middle, large = sorted(np.abs(direction))
    return bool(np.isclose(small, 0) and np.isclose(large / max(middle, 1e-9), (1 + 5**0.5) / 2))


@pytest.mark.parametrize("frequencies", [1, 3])
def test_the_encoding_is_sines_and_cosines_along_the_directions(frequencies):
    encoding = sdf.Encoding(frequencies).double()
    x = points(7)
    assert encoding(x).shape == (7, encoding.out_features)
    for row, point in zip(encoding(x).numpy(), x.numpy(), strict=True):
        # The directions are kept in float32.
        np.testing.assert_allclose(row, encoded(point, frequencies), atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("layers", [4, 8])
def test_the_network_is_its_formula(block, layers):
    model = network(block, layers=layers)
    x = points(9)
    found = model(x)
    assert found.shape == (9,)
    expected = [by_hand(model, point, 2) for point in x.numpy()]
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)
    assert model(x.reshape(3, 3, 3)).shape == (3, 3)


@pytest.mark.parametrize("block", BLOCKS)
def test_its_gradient_is_that_of_the_formula(block):
    model, x, step = network(block), points(5).requires_grad_(), 1e-5
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    for point, found in zip(x.detach().numpy(), slope.numpy(), strict=True):
        for axis in np.eye(3):
            up, down = (by_hand(model, point + sign * step * axis, 2) for sign in (1, -1))
            assert found @ axis == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)


def test_softplus_is_sharp_but_smooth():
    acts = [m for m in network().modules() if isinstance(m, nn.Softplus)]
    assert len(acts) == 4 and all(act.beta == 100 for act in acts)


@pytest.mark.parametrize(
    ("block", "layers", "shapes"),
    [
        ("pair", 2, [(87, 12, 12)]),
        ("pair", 4, [(87, 12, 12), (99, 12, 12)]),
        ("pair", 6, [(87, 12, 12), (99, 12, 12), (12, 12, 12)]),
        ("pair", 8, [(87, 12, 12), (12, 12, 12), (99, 12, 12), (12, 12, 12)]),
        ("layer", 4, [(87, 12, None), (12, 12, None), (99, 12, None), (12, 12, None)]),
        ("layer", 2, [(87, 12, None), (12, 12, None)]),
    ],
)
def test_every_hidden_layer_is_in_a_block_that_is_found(block, layers, shapes):
    sites = eugen.find_ffns(network(block, layers=layers))
    found = [
        (s.dense.in_features, s.dense.hidden_features, s.dense.down and s.dense.down.out_features)
        for s in sites
    ]
    assert found == shapes


@pytest.mark.parametrize("layers", [2, 4, 6, 8])
def test_both_kinds_of_block_are_the_same_function(layers):
    pair, layer = network("pair", layers=layers), network("layer", layers=layers)
    own = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    for mine, its in zip(own, [m for m in pair.modules() if isinstance(m, nn.Linear)], strict=True):
        mine.load_state_dict(its.state_dict())
    assert torch.equal(pair(points(20)), layer(points(20)))


@pytest.mark.parametrize("block", BLOCKS)
def test_surgery_leaves_only_the_last_linear_map(block):
    model = network(block, width=24)
    result = eugen.replace(model, eugen.EUGenConfig(budget=0.3))
    assert len(result.sites) == len(model.blocks)
    kept = {name for name, _ in result.model.named_parameters()} & {
        name for name, _ in model.named_parameters()
    }
    assert kept == {"out.weight", "out.bias"}


@pytest.mark.parametrize("layers", [0, 3])
def test_an_odd_number_of_layers_is_an_error(layers):
    with pytest.raises(ValueError, match=f"layers={layers} must be a positive even number"):
        network(layers=layers)


def test_constants_are_no_part_of_a_checkpoint():
    assert not [name for name in network().state_dict() if name.startswith("encoding")]
