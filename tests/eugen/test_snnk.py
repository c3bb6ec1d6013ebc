"""SNNK layers: ReLU and universal random features, fitted."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from eugen import SNNKConfig, least_squares
from eugen.cost import count_macs
from eugen.layers.snnk import (
    FREQUENCY_SCALES,
    FourierSNNK,
    Gaussian,
    preactivation_rms,
)
from eugen.least_squares import HELD_OUT, fit_quality
from tests.eugen.blocks import block, generator, stream, tokens
from tests.eugen.test_snnk_estimate import inputs, small_block
from tests.tolerances import assert_close, relative_rms


def naive(layer: FourierSNNK, x: torch.Tensor) -> torch.Tensor:
    """y = A [e ∘ (cos, or 1 − cos) ; e ∘ sin] / √m + c, entry by entry from the stored weights."""
    rows, m = layer.projection.weight.double(), layer.projection.out_features
    angle = x.double() @ rows.T
    if layer.growth is None:
        even, odd = 1 - angle.cos(), angle.sin()
    else:
        size = torch.exp(layer.growth.double() * (x.double() ** 2).sum(1)[:, None])
        even, odd = size * angle.cos(), size * angle.sin()
    readout = layer.readout.weight.double()
    return (even @ readout[:, :m].T + odd @ readout[:, m:].T) / math.sqrt(m) + layer.readout.bias.double()


FORMS = [
    pytest.param({}, id="fitted"),
    pytest.param({"projection": "orthogonal"}, id="orthogonal"),
    pytest.param({"frequency_scale": 0.7}, id="scale given"),
    pytest.param({"from_weights": True}, id="from weights"),
]


@pytest.mark.parametrize("options", FORMS)
def test_the_layer_is_its_formula(options):
    dense, x = small_block(Gaussian(), whole=True), inputs(63).requires_grad_()
    config = SNNKConfig(num_features=9, features="urf", **options)
    layer = config.fit(dense, stream(dense, x.detach()), generator=generator())
    ours, theirs = layer(x), naive(layer, x)
    assert_close(ours, theirs)
    assert_close(layer.reference(x), theirs)
    wanted = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), wanted),
        torch.autograd.grad(theirs.square().sum(), wanted),
        strict=True,
    ):
        assert_close(one, other, "gradient")


@pytest.mark.parametrize("options", FORMS)
def test_the_layer_is_saved_compiled_and_counted(options):
    dense, x = small_block(Gaussian(), whole=True).float(), inputs(17).float()
    config = SNNKConfig(num_features=9, features="urf", **options)
    layer = config.fit(dense, stream(dense, x), generator=generator())
    fresh = config.build(dense, generator=generator(3))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    assert count_macs(lambda: layer(x)) == 17 * layer.macs_per_token
    assert layer.macs_per_token == 9 * (4 + 2 * 2), "a row is one product and two features"
    meta = config.build(copy.deepcopy(dense).to("meta"), generator=generator())
    assert meta(torch.empty(3, 4, device="meta")).shape == (3, 2)
    assert layer(x.view(1, 17, 4)).shape == (1, 17, 2)
    assert layer(x[:0]).shape == (0, 2)


@pytest.mark.parametrize(("features", "cost"), [("relu", 60 + 60), ("urf", 60 + 2 * 60)])
def test_the_budget_buys_rows(features, cost):
    dense = block()
    layer = SNNKConfig(budget=0.3, features=features).build(dense, generator=generator())
    assert layer.projection.out_features == math.floor(0.3 * dense.macs_per_token / cost)


def test_the_readout_is_the_ridge_on_cosines_and_sines():
    dense = block(20, 60, dtype=torch.float64)
    x = tokens(2000, 20, dtype=torch.float64)
    config = SNNKConfig(num_features=15, features="urf", frequency_scale=0.5)
    layer = config.fit(dense, stream(dense, x), generator=generator())
    angle = (x @ layer.projection.weight.T).detach()
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    weight, bias = least_squares.ridge([(waves, dense(x).detach(), None)])
    assert relative_rms(layer(x), waves @ weight.T + bias) < 1e-9


def test_cosines_of_small_angles_keep_their_digits():
    """cos of 1e-3 is 1 − 5e-7: in float32 nothing but rounding would be left of it."""
    dense = block(20, 60)
    layer = SNNKConfig(num_features=15, features="urf", frequency_scale=1e-3).build(
        dense, generator=generator()
    )
    x = tokens(50, 20)
    assert relative_rms(layer.features(x), copy.deepcopy(layer).double().features(x.double())) < 1e-6


def test_the_spread_of_the_angles_is_that_of_the_preactivations():
    dense = block(20, 60, dtype=torch.float64)
    x = 3 * tokens(200, 20, dtype=torch.float64)
    config = SNNKConfig(num_features=600, features="urf", frequency_scale=0.5)
    rows = config.fit(dense, stream(dense, x), generator=generator()).projection.weight.detach()
    expected = 0.5 * dense.up(x).detach().square().mean().sqrt()
    assert float((x @ rows.T).square().mean().sqrt()) == pytest.approx(float(expected), rel=0.1)


def test_scaled_inputs_and_rows_change_nothing():
    dense, x = block(20, 60, dtype=torch.float64, bias=False), tokens(1000, 20, dtype=torch.float64)
    scaled = copy.deepcopy(dense)
    with torch.no_grad():
        scaled.up.weight.div_(7)
    config = SNNKConfig(num_features=15, features="urf")
    one = config.fit(dense, stream(dense, x), generator=generator())
    other = config.fit(scaled, stream(scaled, 7 * x), generator=generator())
    assert relative_rms(other(7 * x), one(x)) < 1e-6, "rows are drawn in float32"


def rough(x: torch.Tensor) -> torch.Tensor:
    """A smooth and a fast output of a single input direction."""
    direction = torch.ones(x.shape[1], dtype=x.dtype) / x.shape[1] ** 0.5
    z = x @ direction
    return torch.stack([z, (4 * z).cos()], dim=1)


def best_scale(dense, data, weight, *, held_out: bool = True) -> float:
    """By fits of one scale each to the start of every chunk, judged on its end, or on what they saw."""
    qualities = {}
    for scale in FREQUENCY_SCALES:
        config = SNNKConfig(num_features=20, features="urf", frequency_scale=scale)
        layer = config.fit(dense, data, generator=generator())
        layer.fit_readout([[t[: len(t) - len(t) // HELD_OUT] for t in chunk] for chunk in data])
        rest = [[t[len(t) - len(t) // HELD_OUT :] for t in chunk] for chunk in data]
        qualities[scale] = fit_quality(layer, rest if held_out else data, weight)
    return max(qualities, key=lambda scale: qualities[scale])


def test_the_scale_is_the_best_on_held_out_tokens():
    dense = block(2, 30, 2, dtype=torch.float64)
    x = tokens(2000, 2, dtype=torch.float64)
    data = [(part, rough(part), torch.linspace(0.1, 1, len(part)).double()) for part in x.split(333)]
    found = []
    for importance in (None, [1.0, 0.0], [0.0, 1.0]):
        weight = None if importance is None else torch.tensor(importance, dtype=torch.float64)
        found.append(best_scale(dense, data, weight))
        chosen, expected = (
            SNNKConfig(num_features=20, features="urf", frequency_scale=scale).fit(
                dense, data, generator=generator(), output_weight=weight
            )
            for scale in (None, found[-1])
        )
        assert torch.equal(chosen.projection.weight, expected.projection.weight)
        assert torch.equal(chosen.readout.weight, expected.readout.weight), "the last fit takes every token"
    assert found[1] < found[2], "a smooth output wants lower frequencies than a fast one"


def test_the_scale_does_not_follow_noise():
    """Few tokens of a straight line and noise: fast features fit best what they have seen."""
    dense, x = block(2, 30, 1, dtype=torch.float64), tokens(400, 2, dtype=torch.float64)
    noise = torch.randn(400, 1, generator=generator(4), dtype=torch.float64)
    data = [(x, x[:, :1] + noise, torch.ones(400).double())]
    chosen = SNNKConfig(num_features=20, features="urf").fit(dense, data, generator=generator())
    best = best_scale(dense, data, None)
    config = SNNKConfig(num_features=20, features="urf", frequency_scale=best)
    expected = config.fit(dense, data, generator=generator())
    assert torch.equal(chosen.projection.weight, expected.projection.weight)
    assert best < best_scale(dense, data, None, held_out=False)


def test_one_token_chunks_hold_nothing_out():
    dense, x = block(5, 9), tokens(60, 5)
    config = SNNKConfig(num_features=3, features="urf")
    layer = config.fit(dense, stream(dense, x, 1), generator=generator())
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("gated", [True, False])
def test_preactivations_are_what_the_activation_is_given(gated):
    dense, x = block(20, 33, gated=gated), tokens(100, 20)
    given = (dense.gate if gated else dense.up)(x).detach().double()
    found = preactivation_rms(dense, stream(dense, x, 33))
    assert found == pytest.approx(float(given.square().mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "fourier"}, "features='fourier'.*relu, urf"),
        ({"from_weights": True}, "from_weights=True belong to features='urf'"),
        ({"frequency_scale": 1.0}, "frequency_scale= and .* belong to features='urf'"),
        ({"features": "urf", "from_weights": True, "frequency_scale": 1.0}, "leave frequency_scale=None"),
        (
            {"features": "urf", "from_weights": True, "projection": "orthogonal"},
            "'orthogonal_chi', not 'orth",
        ),
        ({"features": "urf", "frequency_scale": 0.0}, "frequency_scale=0.0 must be positive"),
        ({"features": "urf", "frequency_scale": math.nan}, "frequency_scale=nan must be positive"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SNNKConfig(num_features=3, **options)
