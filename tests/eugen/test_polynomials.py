"""Polynomials in the place of activations: exact where they can be, and their error where they cannot."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from eugen import DenseFFN, EUGenConfig
from eugen.polynomials import (
    Polynomial,
    assumed_pre_activations,
    bernstein,
    calibrated_pre_activations,
    fit_polynomial,
    pre_activation_polynomial,
)
from tests.eugen.blocks import block, generator, linear, stream, tokens
from tests.tolerances import assert_close, relative_rms

ACTS = [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Tanh()]
every_act = pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
POINTS = 4000


def normal(count: int = POINTS) -> torch.Tensor:
    """Quantiles of N(0, 1)."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@pytest.mark.parametrize("coefficients", [[2.5], [0.5, -1], [0.3, 0, -2, 0.7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_polynomial_is_the_sum_of_its_terms(coefficients, dtype):
    z = tokens(5, 4, dtype=dtype)
    y = Polynomial(coefficients)(z)
    assert y.dtype == dtype
    assert_close(y, torch.from_numpy(np.polynomial.polynomial.polyval(z.double().numpy(), coefficients)))


def test_coefficients_are_state():
    act = Polynomial([1.0, 2.0])
    assert act.state_dict()["coefficients"].tolist() == [1.0, 2.0]
    other = Polynomial([0.0, 0.0])
    other.load_state_dict(act.state_dict())
    assert torch.equal(other(torch.ones(1)), torch.tensor([3.0]))


@pytest.mark.parametrize("bad", [[], [math.nan], [1, math.inf]])
def test_coefficients_that_are_none(bad):
    with pytest.raises(ValueError, match="coefficients=.*finite"):
        Polynomial(bad)


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_a_polynomial_is_found_again(shift):
    """Also far off centre, where plain powers of the samples would be badly conditioned."""
    true = (0.3, -1.2, 0.5, 0.25)
    samples = 0.7 * normal() + shift
    for degree in (3, 5):
        fit = fit_polynomial(Polynomial(true), degree, samples)
        assert len(fit.coefficients) == degree + 1
        assert_close(
            Polynomial(fit.coefficients)(samples), Polynomial(true)(samples), precision=torch.float32
        )
        assert fit.error < 1e-9
    assert fit_polynomial(Polynomial(true), 2, samples).error > 1e-3 / (1 + shift**3)


def test_relu_under_normal_inputs_has_hermite_coefficients():
    """E.g. of degree 2: relu ≈ 1/√2π + z/2 + (z² − 1)/(2√2π)."""
    fit = fit_polynomial(nn.ReLU(), 2, normal(200_000))
    half = 1 / (2 * math.sqrt(2 * math.pi))
    assert fit.coefficients == pytest.approx((half, 0.5, half), abs=1e-3)
    size, captured = 0.5, 1 / (2 * math.pi) + 1 / 4 + 1 / (4 * math.pi)
    assert fit.error == pytest.approx(math.sqrt(1 - captured / size), abs=1e-3)


@every_act
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_least_squares_and_says_its_error(act, weighted):
    """The residual is orthogonal to every power under the samples: the normal equations."""
    z = 1.3 * normal() + 0.4
    weights = torch.rand(len(z), generator=generator(), dtype=torch.float64) if weighted else None
    previous = 1.0
    for degree in (1, 2, 3, 4, 6):
        fit = fit_polynomial(act, degree, z.view(2, -1), None if weights is None else weights.view(2, -1))
        residual = act(z) - Polynomial(fit.coefficients)(z)
        share = torch.ones_like(z) if weights is None else weights
        powers = torch.stack([z**i for i in range(degree + 1)])
        slope = (powers * residual * share).sum(1).abs() / (powers * share).norm(dim=1)
        assert (slope < 1e-8 * residual.norm()).all()
        error = ((share * residual**2).sum() / (share * act(z) ** 2).sum()).sqrt()
        assert fit.error == pytest.approx(float(error), rel=1e-9)
        assert fit.error <= previous + 1e-12
        previous = fit.error
    assert previous < 0.2


def test_samples_that_cannot_be_fitted():
    z = normal(50)
    for arguments, words in (
        ((nn.ReLU(), -1, z), "degree=-1"),
        ((nn.ReLU(), 5, z[:5]), "5 entries.*at least 6"),
        ((nn.ReLU(), 2, z / 0), "NaN or are not finite"),
        ((nn.ReLU(), 2, z, z), "negative"),
        ((nn.ReLU(), 2, z, z[:3]), "3 entries for 50 samples"),
        ((torch.log, 2, z), "activation is NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            fit_polynomial(*arguments)


@every_act
@pytest.mark.parametrize(("low", "high"), [(-3.0, 3.0), (-1.0, 4.0)])
def test_bernstein_converges_at_its_rate(act, low, high):
    """|B_n f − f| ≤ L (high − low)/(2√n): E|u − k/n| ≤ 1/(2√n), and all five have a slope of L ≤ 1.13."""
    z = torch.linspace(low, high, 301, dtype=torch.float64)
    errors = []
    for degree in (1, 2, 4, 8, 12):
        error = (Polynomial(bernstein(act, degree, low, high))(z) - act(z)).abs()
        assert error.max() <= 1.13 * (high - low) / (2 * math.sqrt(degree))
        assert error[0] < 1e-9 and error[-1] < 1e-9  # the ends are interpolated
        errors.append(float(error.max()))
    assert errors == sorted(errors, reverse=True)


def test_bernstein_in_closed_form():
    """Straight lines are kept, and B_n z² = z² + u(1−u)(high−low)²/n."""
    z = torch.linspace(-2, 3, 101, dtype=torch.float64)
    u = (z + 2) / 5
    assert_close(Polynomial(bernstein(lambda v: 3 * v - 1, 7, -2, 3))(z), 3 * z - 1)
    for degree in (1, 2, 5, 9):
        square = Polynomial(bernstein(torch.square, degree, -2, 3))(z)
        assert_close(square, z**2 + u * (1 - u) * 25 / degree, precision=torch.float32)
    with pytest.raises(ValueError, match="degree=0"):
        bernstein(torch.square, 0, -2, 3)
    with pytest.raises(ValueError, match="low=3 must be below high=-2"):
        bernstein(torch.square, 2, 3, -2)


@pytest.mark.parametrize("bias", [True, False])
def test_without_data_pre_activations_are_those_of_normalised_inputs(bias):
    up = linear(50, 20, bias=bias, dtype=torch.float64, seeded=generator())
    assumed = assumed_pre_activations(up)
    x = torch.randn(20_000, 50, generator=generator(1), dtype=torch.float64)
    z = up(x * (50**0.5 / x.norm(dim=1, keepdim=True)))
    spread = z.std(0)
    assert (assumed.mean(0) - z.mean(0)).abs().max() < 0.05 * spread.max()
    assert relative_rms(assumed.std(0), spread) < 0.05


def test_with_data_pre_activations_are_those_of_the_tokens():
    up = linear(10, 6, bias=True, dtype=torch.float32, seeded=generator())
    x = tokens(300, 10)
    weight = torch.rand(300, generator=generator())
    data = list(zip(x.split(37), x.split(37), weight.split(37), strict=True))
    samples, shares = calibrated_pre_activations(up, data, generator())
    samples, order = samples.view(300, 6).sum(1).sort()
    expected, tokens_order = up(x).double().sum(1).sort()
    assert_close(samples, expected, precision=torch.float32)
    assert_close(shares.view(300, 6)[order, 0], weight[tokens_order], precision=torch.float32)
    big = [(tokens(1000, 10), None, None), (tokens(64, 10, seed=2), None, None), (x[:0], None, None)]
    _, shares = calibrated_pre_activations(up, big, generator())
    assert shares[: -64 * 6].sum() / shares[-64 * 6 :].sum() == pytest.approx(1000 / 64)
    with pytest.raises(ValueError, match="empty"):
        calibrated_pre_activations(up, [], generator())


@every_act
def test_a_layer_is_fitted_where_its_pre_activations_are(act):
    """Calibrated coefficients err less on the tokens than those of assumed inputs, and say how much."""
    dense = block(20, 60, act=act, whole=False)
    dense.up.bias.data += 1  # a common shift of the inputs, which no assumption knows
    x = 0.5 * tokens(3000, 20)
    data = stream(dense, x)
    z = dense.up(x).detach().double()
    errors = []
    for source in (None, data):
        fit = pre_activation_polynomial(dense, 3, source, generator=generator())
        errors.append(relative_rms(Polynomial(fit.coefficients)(z), act(z)))
    assert errors[1] < errors[0]
    assert fit.error == pytest.approx(errors[1], rel=0.15)  # it is that of some of the tokens
    config = EUGenConfig(order=3, num_features=4, from_weights=True)
    assert config.fit(dense, data, generator=generator()).polynomial_error == pytest.approx(
        errors[1], rel=0.15
    )


def test_a_polynomial_activation_is_taken_as_it_is():
    dense = DenseFFN(nn.Linear(5, 7), Polynomial([0.1, 0.0, 2.0, 0.0]))
    assert pre_activation_polynomial(dense, 3, None, generator=generator()).coefficients == (0.1, 0, 2, 0)
    assert pre_activation_polynomial(dense, 2, None, generator=generator()).coefficients == (0.1, 0, 2)
    with pytest.raises(ValueError, match="order=1 is below the degree 2"):
        pre_activation_polynomial(dense, 1, None, generator=generator())
    config = EUGenConfig(order=2, num_features=4, from_weights=True)
    assert config.build(dense, generator=generator()).polynomial_error == 0
    assert EUGenConfig(num_features=4).build(dense, generator=generator()).polynomial_error is None
    meta = copy.deepcopy(dense).to("meta")
    assert config.build(meta, generator=generator()).readout.weight.is_meta


def test_samples_are_left_as_they_were_and_weights_of_an_activation_count():
    samples = torch.linspace(-2, 2, 50, dtype=torch.float64)
    before = samples.clone()
    fit_polynomial(nn.ReLU(inplace=True), 2, samples)
    assert torch.equal(samples, before)
    leaky = fit_polynomial(nn.PReLU(init=1.0), 2, samples)  # float32 weights, float64 samples
    assert leaky.coefficients == pytest.approx((0, 1, 0), abs=1e-9)
