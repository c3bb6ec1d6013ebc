"""EUGen against its formula, written out factor by factor in float64, in every form that it has."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eugen import DenseFFN, EUGenConfig, LinearConfig, LowRankConfig, NarrowConfig, SNNKConfig
from eugen.features import ACTIVATIONS, PROJECTIONS, RANDOM_PROJECTIONS, Rows, random_rows
from eugen.layers.eugen import SHARING, EUGen
from tests.eugen.blocks import block, generator, stream, tokens
from tests.eugen.test_features import assert_mean
from tests.tolerances import assert_close, relative_rms


def naive(layer: EUGen, x: torch.Tensor) -> torch.Tensor:
    """y = W2 (A Φ(concat_i Π_j G_j^i x⁺) + c) + b2 in float64, from the stored weights alone."""
    config = layer.config
    g = torch.zeros(len(layer.weight), x.shape[1] + 2, dtype=torch.float64)
    g[:, :-2] = layer.weight.double()
    if layer.bias is not None:
        g[:, -2] = layer.bias.double()
    if layer.norm is not None:
        g[:, -1] = layer.norm.double()
    x = x.double()
    plus = torch.cat([x, torch.ones(len(x), 1), x.square().sum(1, keepdim=True).sqrt()], dim=1)
    lowest = config.min_order if not config.direct_linear else max(2, config.min_order)
    m = len(g) // config.groups
    blocks = [g[start : start + m] for start in range(0, len(g), m)]
    used, parts = 0, [x] if config.direct_linear else []
    for order in range(lowest, config.order + 1):
        feature = torch.ones(len(x), m, dtype=torch.float64)
        for factor in range(order):
            which = {"independent": used + factor, "shared": factor, "powers": 0}[config.sharing]
            feature = feature * (plus @ blocks[which].T)
        used += order
        parts.append(ACTIVATIONS[config.activation]()(feature))
    y = torch.cat(parts, dim=1) @ layer.readout.weight.double().T + layer.readout.bias.double()
    if layer.down is not None:
        y = y @ layer.down.weight.double().T
        y = y if layer.down.bias is None else y + layer.down.bias.double()
    return y


FORMS = [
    {"order": order, "min_order": lowest, "sharing": sharing, "direct_linear": direct, "merge": merge}
    for order, lowest, sharing, direct, merge in itertools.product(
        (1, 2, 3), (1, 2), SHARING, (False, True), (True, False)
    )
    if lowest <= order and not (direct and order == 1)
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_outputs_and_gradients_are_those_of_the_formula(form):
    dense, x = block(10, 24, bias=form["merge"]), tokens(63, 10).requires_grad_()
    for bias_slot, norm_slot in itertools.product((True, False), repeat=2):
        slots = {"bias_slot": bias_slot, "norm_slot": norm_slot}
        layer = EUGenConfig(num_features=7, **form, **slots).build(dense, generator=generator())
        exact = copy.deepcopy(layer).double()
        wide = x.detach().double().requires_grad_()
        y, expected = layer(x), naive(exact, wide)
        assert_close(y, expected, "output")
        assert_close(layer.features(x).detach(), exact.features(wide).detach(), "features")
        mine = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        theirs = torch.autograd.grad(expected.square().sum(), [wide, *exact.parameters()])
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other, "gradient")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_act_on_the_features(activation):
    layer = EUGenConfig(num_features=7, activation=activation).build(block(10, 24), generator=generator())
    assert_close(layer(tokens(63, 10)), naive(layer, tokens(63, 10)))


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    projection=st.sampled_from(PROJECTIONS),
    trainable=st.booleans(),
    shape=st.tuples(st.integers(2, 20), st.integers(20, 60), st.integers(1, 20)),
    count=st.integers(60, 130),
)
def test_any_fitted_form(form, projection, trainable, shape, count):
    dense = block(*shape)
    options = {"projection": projection, "trainable": trainable or projection == "learned"}
    layer_config = EUGenConfig(num_features=2, **form, **options)
    x = tokens(count, shape[0])
    layer = layer_config.fit(dense, stream(dense, x, 33), generator=generator())
    assert_close(layer(x), naive(layer, x))
    fresh = layer_config.build(dense, generator=generator(5))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    for each in (layer, layer.merged()):
        with FlopCounterMode(display=False) as counter:
            each(x)
        assert counter.get_total_flops() == 2 * count * each.macs_per_token


@pytest.mark.parametrize("form", [f for f in FORMS if not f["merge"]], ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merging_changes_nothing(form, dtype, allowed):
    dense = block(10, 24, dtype=dtype, bias=form["sharing"] != "shared")
    x = tokens(63, 10, dtype=dtype)
    layer = EUGenConfig(num_features=7, **form).fit(dense, stream(dense, x), generator=generator())
    merged = layer.merged()
    assert merged.down is None and layer.down is not None
    assert relative_rms(merged(x), layer(x)) <= allowed
    assert merged.macs_per_token < layer.macs_per_token
    assert merged.merged() is merged


def test_a_merged_layer_shares_no_weights():
    dense = block(10, 24)
    layer = EUGenConfig(num_features=7, merge=False).build(dense, generator=generator())
    before = copy.deepcopy(layer.state_dict())
    merged = layer.merged()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_not_merged_keeps_the_output_matrix_and_fits_as_well():
    dense = block(20, 60)
    x = tokens(2000, 20)
    layer = EUGenConfig(num_features=20, merge=False).fit(dense, stream(dense, x), generator=generator())
    assert torch.equal(layer.down.weight, dense.down.weight)
    merged = EUGenConfig(num_features=20).fit(dense, stream(dense, x), generator=generator())
    assert_close(layer(x), merged(x))


@pytest.mark.parametrize(("trainable", "kind"), [(True, "_parameters"), (False, "_buffers")])
def test_projections_are_parameters_or_buffers(trainable, kind):
    layer = EUGenConfig(num_features=7, trainable=trainable).build(block(10, 24), generator=generator())
    assert {"weight", "bias", "norm"} <= set(getattr(layer, kind))
    assert {"weight", "bias", "norm"} <= set(layer.state_dict())


def test_a_token_of_zeros_has_finite_gradients():
    layer = EUGenConfig(num_features=7, order=3).build(block(10, 24), generator=generator())
    x = torch.zeros(3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def special(**options) -> EUGen:
    """An untrained layer of 12 inputs and outputs whose rows and readout a test may set."""
    options = {"order": 1, "bias_slot": False, "norm_slot": False} | options
    return EUGenConfig(**options).build(block(12, 30), generator=generator())


@torch.no_grad()
def assign(layer: EUGen, weight, bias=None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def test_order_one_of_all_inputs_is_the_linear_map():
    dense, x = block(12, 30), tokens(300, 12)
    full = LinearConfig().fit(dense, stream(dense, x), generator=generator())
    layer = special(num_features=12)
    assign(layer, torch.eye(12))
    layer.set_readout(full.readout.weight, full.readout.bias)
    assert_close(layer(x), full(x))


def test_order_one_is_low_rank():
    dense = block(12, 30, act=nn.Identity())
    low = LowRankConfig(rank=5).build(dense, generator=generator())
    layer = special(num_features=5)
    assign(layer, low.v1.weight)
    weight = low.readout.weight @ low.v2.weight @ low.u1.weight
    layer.set_readout(weight, low.readout.weight @ low.v2.weight @ low.u1.bias + low.readout.bias)
    assert_close(layer(tokens(63, 12)), low(tokens(63, 12)))


def test_order_one_with_relu_is_snnk():
    snnk = SNNKConfig(num_features=9).build(block(12, 30), generator=generator())
    layer = special(num_features=9, bias_slot=True, activation="relu")
    assign(layer, snnk.projection.weight, snnk.projection.bias)
    layer.set_readout(snnk.readout.weight / 3, snnk.readout.bias)
    assert_close(layer(tokens(63, 12)), snnk(tokens(63, 12)))


def test_order_one_with_the_activation_is_a_narrower_block():
    narrow = NarrowConfig(hidden_features=9).build(block(12, 30), generator=generator())
    layer = special(num_features=9, bias_slot=True, activation="gelu")
    assign(layer, narrow.up.weight, narrow.up.bias)
    layer.set_readout(narrow.down.weight, narrow.down.bias)
    assert_close(layer(tokens(63, 12)), narrow(tokens(63, 12)))


@pytest.mark.parametrize("kind", RANDOM_PROJECTIONS)
def test_the_estimator_of_theorem_3_1_is_unbiased(kind):
    """A = ψ(w) on the layer's own features estimates Σ a_i (w·x + b)^i; only A carries signs and scales."""
    a, d, m = (0.4, 1.0, -0.7), 5, 3
    w, x = (torch.randn(d, generator=generator(s), dtype=torch.float64) / d**0.5 for s in (1, 2))
    b, seeded, estimates = 0.3, generator(), []
    weights = torch.cat([w, torch.tensor([b, 0.0], dtype=torch.float64)])
    config = EUGenConfig(num_features=m, order=2)
    readout = nn.Linear(2 * m, 1, dtype=torch.float64)
    for _ in range(2000):
        g = torch.cat([random_rows(kind, m, d + 2, generator=seeded) for _ in range(3)]).double()
        layer = EUGen(config, Rows(g[:, :d], g[:, d], g[:, d + 1]), readout, down=None)
        first, left, right = (g @ weights).split(m)
        psi = torch.cat([a[1] * first, a[2] * left * right]) / m
        layer.set_readout(psi[None], torch.tensor([a[0]], dtype=torch.float64))
        estimates.append(layer(x).detach())
    z = torch.dot(w, x) + b
    assert_mean(torch.stack(estimates), a[0] + a[1] * z + a[2] * z**2)


def test_gated_and_single_layers_are_replaced_whole():
    for dense in (block(10, 24, gated=True), DenseFFN(nn.Linear(10, 24), nn.GELU())):
        x = tokens(500, 10)
        layer = EUGenConfig(num_features=12).fit(dense, stream(dense, x), generator=generator())
        assert layer(x).shape == dense(x).shape
        assert_close(layer(x), naive(layer, x))
