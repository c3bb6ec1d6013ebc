"""Universal random features from the weights alone: unbiased, with a variance that falls as 1/m."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eugen import DenseFFN, SNNKConfig
from eugen.layers.snnk import (
    Cosine,
    FourierActivation,
    FourierSNNK,
    Gaussian,
    Sine,
)
from tests.eugen.blocks import block, generator, stream
from tests.eugen.test_features import assert_mean
from tests.tolerances import assert_close

DRAWS = 20_000


class Sech(FourierActivation):
    """1/cosh z, its own transform up to scale: ξ has the density sech(πξ/2)/2."""

    def forward(self, z):
        return 1 / z.cosh()

    def spectrum(self, count, *, generator):
        uniform = torch.rand(count, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        one = torch.ones(count, dtype=torch.float64)
        return 2 / math.pi * torch.log(torch.tan(math.pi / 2 * uniform)), one, 0 * one


class Wave(FourierActivation):
    """cos 2z + sin 2z/2: negative frequencies too, both halves of the spectrum."""

    def forward(self, z):
        return (2 * z).cos() + (2 * z).sin() / 2

    def spectrum(self, count, *, generator):
        sign = torch.randint(0, 2, (count,), generator=generator).double().mul_(2).sub_(1)
        return 2 * sign, torch.ones_like(sign), sign / 2


ACTIVATIONS = [Cosine(), Sine(), Gaussian(), Sech(), Wave()]


def names(value):
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)


def small_block(act, *, bias=True, whole=False) -> DenseFFN:
    """Rows and inputs of small norm, where the variance of the estimate is finite and small."""
    dense = block(4, 3, 2, act=act, bias=bias, whole=whole, dtype=torch.float64)
    with torch.no_grad():
        dense.up.weight.mul_(0.3)
    return dense


def inputs(count: int = 3) -> torch.Tensor:
    x = torch.randn(count, 4, generator=generator(5), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) * torch.linspace(0.5, 1.5, count, dtype=torch.float64)[:, None]


def samples(layer: FourierSNNK, x: torch.Tensor) -> torch.Tensor:
    """What each row alone estimates, `[m, tokens, outputs]`, without the constant."""
    m = layer.projection.out_features
    terms = layer.features(x)[None] * layer.readout.weight[:, None]  # [outputs, tokens, 2m]
    return m * (terms[..., :m] + terms[..., m:]).movedim(-1, 0).transpose(1, 2).detach()


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal_chi"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=names)
def test_the_estimate_from_weights_is_unbiased(act, projection):
    dense, x = small_block(act), inputs()
    config = SNNKConfig(num_features=DRAWS, features="urf", from_weights=True, projection=projection)
    each = samples(config.build(dense, generator=generator()), x)
    if projection == "orthogonal_chi":  # rows of one block depend on each other: blocks do not
        each = each.unflatten(0, (-1, dense.in_features)).mean(1)
    assert_mean(each, dense(x))
    error = each.std(0) / math.sqrt(len(each))
    assert error.max() < dense(x).square().mean().sqrt() / 10, "the interval says nothing"


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_matrix_is_folded_in(bias):
    dense, x = small_block(Gaussian(), bias=bias, whole=True), inputs()
    config = SNNKConfig(num_features=DRAWS, features="urf", from_weights=True)
    layer = config.build(dense, generator=generator())
    constant = 0 if dense.down.bias is None else dense.down.bias.detach()
    assert_mean(samples(layer, x) + constant, dense(x))
    assert_close(layer(x), samples(layer, x).mean(0) + constant)


def test_calibration_tells_the_estimate_the_size_of_the_inputs():
    """Unbiased for inputs of any size, and best where both sides' sizes are those that it was told."""
    dense, x = small_block(Gaussian()), inputs() * 2
    config = SNNKConfig(num_features=DRAWS, features="urf", from_weights=True)
    spread = []
    for factor in (1.0, 0.05, 20.0):
        told = stream(dense, x * factor)
        each = samples(config.fit(dense, told, generator=generator()), x)
        spread.append(float(each.std(0).median()))
        if factor == 1.0:
            assert_mean(each, dense(x))
    assert spread[0] < min(spread[1:])


def test_the_variance_falls_as_one_over_m():
    """By the slope over three sizes, each from 500 layers, of an estimate without heavy tails."""
    dense, x, seeded = small_block(Cosine()), inputs(1), generator()
    sizes, variances = (4, 32, 256), []
    for m in sizes:
        config = SNNKConfig(num_features=m, features="urf", from_weights=True)
        errors = [(config.build(dense, generator=seeded)(x) - dense(x)).detach() for _ in range(500)]
        variances.append(torch.stack(errors).square().mean())
    steps = torch.tensor([sizes, variances]).log()
    steps = steps - steps.mean(1, keepdim=True)
    assert float((steps[0] * steps[1]).sum() / steps[0].square().sum()) == pytest.approx(-1, abs=0.1)


def test_weights_of_zero_give_the_constant():
    dense, x = small_block(Gaussian()), inputs()
    with torch.no_grad():
        dense.up.weight.zero_()
    config = SNNKConfig(num_features=DRAWS, features="urf", from_weights=True)
    assert_mean(samples(config.build(dense, generator=generator()), x), dense(x))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"act": nn.GELU()}, "needs an activation with a Fourier transform, not GELU.*Gaussian"),
        ({"act": Gaussian(), "gated": True}, "'snnk'.*gated"),
    ],
)
def test_blocks_without_an_unbiased_estimate(form, message):
    config = SNNKConfig(num_features=3, features="urf", from_weights=True)
    for dense in (block(5, 9, **form), block(5, 9, **form, whole=False)):
        with pytest.raises(ValueError, match=message):
            config.build(dense, generator=generator())
