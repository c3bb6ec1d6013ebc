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

from eugen import EUGenConfig
from eugen.features import ACTIVATIONS, PROJECTIONS, SHARING
from eugen.layers.eugen import EUGen
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms


def naive(layer: EUGen, x: torch.Tensor) -> torch.Tensor:
    """y = W2 (A Φ(concat_i Π_j G_j^i x⁺) + c) + b2 in float64, from the stored weights alone."""
    config = layer.config
    projection, x = layer.map.projection, x.double()
    g = torch.zeros(projection.out_features, x.shape[1] + 2, dtype=torch.float64)
    g[:, :-2] = projection.weight.double()
    if projection.bias is not None:
        g[:, -2] = projection.bias.double()
    if layer.map.norm is not None:
        g[:, -1] = layer.map.norm.double()
    norm = x.square().sum(1, keepdim=True).sqrt()
    plus = torch.cat([x, torch.ones(len(x), 1), norm], dim=1)
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
        if config.activation == "rbf":
            feature = feature - (norm / layer.map.input_rms.double()) ** 2
        feature = layer.map.acts[order - lowest](feature)
        if layer.map.gate is not None:
            gate = layer.map.gate[order - lowest].double()
            feature = feature * (1 + gate * (norm / layer.map.input_rms.double() - 1))
        parts.append(feature)
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
@pytest.mark.parametrize("gated", [False, True])
def test_activations_and_norm_gates_act_on_the_features(activation, gated):
    form = {"order": 1, "norm_slot": False} if activation == "rbf" else {"order": 2}
    config = EUGenConfig(num_features=7, activation=activation, norm_gate=gated, **form)
    layer, x = config.build(block(10, 24), generator=generator()), tokens(63, 10)
    with torch.no_grad():
        for name, parameter in layer.map.named_parameters():
            if name.startswith(("gate", "acts")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(4)))
    assert_close(layer(x), naive(layer, x))


def test_a_new_norm_gate_is_open():
    dense, x = block(10, 24), tokens(63, 10)
    gated, plain = (
        EUGenConfig(num_features=7, norm_gate=gate).build(dense, generator=generator())
        for gate in (True, False)
    )
    assert_close(gated(x), plain(x))
    assert gated.num_parameters() == plain.num_parameters() + 14 + 1  # k·m gates, and ‖x‖'s unit


def test_rbf_features_are_gaussians_around_their_centres():
    dense, x = block(10, 24, dtype=torch.float64), tokens(500, 10, dtype=torch.float64)
    config = EUGenConfig(num_features=7, order=1, activation="rbf", norm_slot=False)
    layer = config.fit(dense, stream(dense, x), generator=generator())
    r = float(layer.map.input_rms)
    assert r == pytest.approx(float(x.square().sum(1).mean().sqrt()))
    centres = layer.map.projection.weight * r**2 / 2
    assert_close(layer.features(x), torch.exp(-(torch.cdist(x, centres) ** 2) / r**2), "features")


def test_a_learned_part_beats_the_same_fixed_part():
    """Refinement moves gates and univariate functions: on the tokens it sees, the error falls."""
    dense, x = block(10, 40), tokens(1000, 10)
    for option in ({"norm_gate": True}, {"activation": "univariate"}):
        config = EUGenConfig(num_features=5, trainable=False, **option)
        layer = config.fit(dense, stream(dense, x), generator=generator())
        refined = config.refine(layer, dense, stream(dense, x), steps=60, generator=generator())
        assert relative_rms(refined(x), dense(x)) < relative_rms(layer(x), dense(x))
        rows = layer.map.projection.weight
        assert torch.equal(refined.map.projection.weight, rows)


POLYNOMIAL = {"from_weights": True, "order": 3, "num_features": 5}
VARIANTS = {
    "rbf": {"activation": "rbf", "order": 1, "norm_slot": False, "budget": 0.5},
    "univariate gated": {"activation": "univariate", "norm_gate": True, "trainable": False, "budget": 0.5},
    "exp": {"activation": "exp", "order": 1, "budget": 0.5},
    "shared": {"sharing": "shared", "order": 3, "budget": 0.5},
    "product": {"min_order": 2, "projection": "learned", "budget": 0.5},
    "weights": POLYNOMIAL,
    "weights kept": POLYNOMIAL | {"merge": False, "sharing": "shared", "projection": "orthogonal_chi"},
    "weights budget": POLYNOMIAL | {"num_features": None, "budget": 0.9},
    "kernel": POLYNOMIAL | {"activation": "relu", "weight_activation": "relu"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_a_whole_layer(options):
    """Stored, copied, counted, compiled, exported, lowered and built on no device, like the default."""
    dense, x = block(20, 80), tokens(63, 20)
    config = EUGenConfig(**options)
    layer = config.fit(dense, stream(dense, tokens(900, 20)), generator=generator())
    fresh = config.build(dense, generator=generator(5))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.num_parameters() == sum(t.numel() for t in layer.state_dict().values())
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * len(x) * layer.macs_per_token
    if config.budget is not None:
        assert layer.macs_per_token <= config.budget * dense.macs_per_token
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("t", min=2)},))
    assert_close(program.module()(x[:17]), layer(x[:17]))
    assert_close(layer(x), copy.deepcopy(layer).double().reference(x.double()))
    assert_close(layer(x), layer.reference(x))
    assert_close(copy.deepcopy(layer).bfloat16().features(x.bfloat16()), layer.features(x))
    meta = config.build(copy.deepcopy(dense).to("meta"), generator=generator())
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (layer, meta)]
    assert shapes[0] == shapes[1]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


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


@pytest.mark.parametrize("trainable", [True, False])
def test_projections_are_stored_and_train_only_where_asked(trainable):
    config = EUGenConfig(num_features=7, trainable=trainable)
    layer = config.build(block(10, 24), generator=generator())
    rows = {"map.projection.weight", "map.projection.bias", "map.norm"}
    assert rows <= set(layer.state_dict())
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"readout.weight", "readout.bias"} | (rows if trainable else set())


def test_a_token_of_zeros_has_finite_gradients():
    layer = EUGenConfig(num_features=7, order=3).build(block(10, 24), generator=generator())
    x = torch.zeros(3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gated_and_single_layers_are_replaced_whole(projection):
    for dense in (block(10, 24, gated=True), block(10, 24, whole=False)):
        x = tokens(500, 10)
        config = EUGenConfig(num_features=8, projection=projection)
        layer = config.fit(dense, stream(dense, x), generator=generator())
        assert layer(x).shape == dense(x).shape
        assert_close(layer(x), naive(layer, x))


def test_a_bilinear_gated_block_is_a_product_of_teacher_rows():
    """act = identity: gate and up rows as the two factors of order 2 hold the block exactly."""
    dense, x = block(10, 12, act=nn.Identity(), gated=True, dtype=torch.float64), tokens(63, 10)
    config = EUGenConfig(num_features=12, min_order=2, projection="teacher", norm_slot=False)
    layer = config.fit(dense, stream(dense, x.double()), generator=generator())
    order = [int(j) for j in torch.cdist(layer.map.projection.weight[:12], dense.gate.weight).argmin(1)]
    assert sorted(order) == list(range(12))
    layer.set_readout(dense.down.weight[:, order], dense.down.bias)
    assert_close(layer(x.double()), dense(x.double()), precision=torch.float32)  # rows are drawn in float32
    for count in (11, 12):
        fitted = EUGenConfig(num_features=count, min_order=2, projection="teacher").fit(
            dense, stream(dense, tokens(2000, 10, dtype=torch.float64)), generator=generator()
        )
        error = relative_rms(fitted(x.double()), dense(x.double()))
        assert (error < 0.01) == (count == 12)


def test_a_rank_deficient_output_matrix_is_not_inverted_into_noise():
    """Not merged, A = W2⁺·weight: directions that W2 has by rounding alone must not blow A up."""
    dense = block(32, 128, 32)
    with torch.no_grad():
        left, right = torch.randn(32, 12, generator=generator()), torch.randn(12, 128, generator=generator(1))
        dense.down.weight.copy_(left @ right / 40)
    x = tokens(2000, 32)
    noisy = [(x, dense(x).detach() + 0.05 * torch.randn(2000, 32, generator=generator(2)), None)]
    layer = EUGenConfig(budget=0.8, merge=False).fit(dense, noisy, generator=generator())
    assert layer.readout.weight.abs().max() < 100
