"""The readout computed from weights in its other forms: what it estimates, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from eugen import DenseFFN, EUGenConfig
from eugen.polynomials import Polynomial, pre_activation_polynomial
from tests.eugen.blocks import block, generator, tokens
from tests.eugen.test_features import assert_mean
from tests.eugen.test_theory import WIDE, D, draw, neuron
from tests.tolerances import assert_close


def test_a_direct_linear_part_is_exact():
    dense, x = neuron((0.3, -0.7, 0.6))
    linear = EUGenConfig(from_weights=True, num_features=WIDE, direct_linear=True)
    layer = linear.build(dense, generator=generator())
    z = dense.up(x).detach()
    assert_close(layer.readout.weight[:, :D] @ x + layer.readout.bias, 0.3 - 0.7 * z)
    features = torch.cat(layer.map(x[None])[1:])[0]
    assert_mean((WIDE * features * layer.readout.weight[0, D:]).detach()[:, None], 0.6 * z**2)


def test_an_activation_is_replaced_by_its_polynomial():
    """The mean is then the polynomial's value, and the output matrix acts on it."""
    dense = block(D, 6, 2, dtype=torch.float64)
    x = tokens(1, D, dtype=torch.float64)[0]
    config = EUGenConfig(from_weights=True, num_features=WIDE)
    layer = config.build(dense, generator=generator())
    fit = pre_activation_polynomial(dense, 2, None, generator=generator())
    assert layer.polynomial_error == fit.error
    expected = dense.down(Polynomial(fit.coefficients)(dense.up(x))).detach()
    features = torch.cat(layer.map(x[None])).view(2, 1, WIDE)
    terms = WIDE * features * layer.readout.weight.view(2, 2, WIDE).transpose(0, 1)
    assert_mean((terms.sum(0).T + layer.readout.bias).detach(), expected)


def test_relu_on_both_sides_is_the_arc_cosine_kernel():
    """E[relu(g·u) relu(g·v)] = ‖u‖‖v‖ (sin θ + (π − θ) cos θ)/2π, whatever the neuron's activation."""
    dense, x = neuron((0.0, 1.0), towards=0.3)
    terms, constant = draw(
        dense, x, 150_000, projection="gaussian", activation="relu", weight_activation="relu"
    )
    u = torch.cat([dense.up.weight.detach()[0], dense.up.bias.detach(), torch.zeros(1)])
    v = torch.cat([x, torch.ones(1), x.norm()[None]])
    size = u.norm() * v.norm()
    angle = torch.acos(u.dot(v) / size)
    kernel = size * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    assert constant == 0
    assert_mean(terms[0][:, None], kernel)


def test_exp_on_both_sides_is_the_exponential_kernel():
    """E[exp(g·u) exp(g·v)] = exp(‖u + v‖²/2)."""
    dense, x = neuron((0.0, 1.0), b=0.0)
    options = {"activation": "exp", "weight_activation": "exp", "norm_slot": False, "bias_slot": False}
    dense.up.bias = None
    with torch.no_grad():
        dense.up.weight.mul_(0.4)
    terms, _ = draw(dense, 0.4 * x, 150_000, projection="gaussian", **options)
    assert_mean(terms[0][:, None], ((dense.up.weight[0] + 0.4 * x).square().sum() / 2).exp().detach())


REFUSED = [
    ({"sharing": "powers"}, "sharing='powers' with from_weights=True is biased"),
    ({"projection": "teacher"}, "projection='teacher' with from_weights=True is biased"),
    ({"bias_slot": False}, "bias_slot=False with from_weights=True leaves out the block's bias"),
    ({"min_order": 2}, "min_order=2 leaves out order 1, whose coefficient is 0.7"),
    ({"order": 1}, "order=1 is below the degree 2"),
    ({"activation": "rbf", "order": 1, "norm_slot": False}, "activation='rbf' has no features of weights"),
    ({"activation": "rbf", "from_weights": False}, "activation='rbf' needs order=1"),
    ({"weight_activation": "relu", "from_weights": False}, "weight_activation='relu'.*from_weights=True"),
    ({"weight_activation": "rbf"}, "weight_activation='rbf' is unknown"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_would_be_biased_is_refused(options, words):
    dense, _ = neuron((0.2, 0.7, -0.9))
    with pytest.raises(ValueError, match=words):
        EUGenConfig(**{"from_weights": True, "num_features": 5} | options).build(dense, generator=generator())


def test_gated_blocks_have_no_readout_from_weights():
    config = EUGenConfig(from_weights=True, num_features=5)
    with pytest.raises(ValueError, match="'eugen'.*gated"):
        config.build(block(5, 7, gated=True), generator=generator())


def test_an_order_that_the_polynomial_lacks_may_be_left_out_on_the_meta_device_too():
    config = EUGenConfig(num_features=8, order=2, min_order=2, from_weights=True)
    dense = DenseFFN(nn.Linear(5, 7), Polynomial([0.0, 0.0, 1.0]))
    real = config.build(dense, generator=generator())
    meta = config.build(copy.deepcopy(dense).to("meta"), generator=generator())
    assert {k: v.shape for k, v in real.state_dict().items()} == {
        k: v.shape for k, v in meta.state_dict().items()
    }
