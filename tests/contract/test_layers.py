"""What every registered layer owes, whatever its method. Nothing here names one."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import nn

import eugen
from eugen.cost import count_macs
from tests.contract.cases import NAMES, config_of, every_layer, fitted
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

TOKENS = 63


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def dense() -> eugen.DenseFFN:
    return block()


@pytest.fixture(scope="module", params=[(n, b) for n in NAMES for b in (True, False)], ids=str)
def case(request):
    """A fitted layer and its dense block, with and without biases."""
    name, bias = request.param
    dense = block(bias=bias)
    return dense, fitted(name, dense)


def test_macs_are_those_that_torch_counts(case):
    _, layer = case
    x = tokens(TOKENS)
    for mode in (layer, layer.merged()):
        assert count_macs(lambda mode=mode: mode(x)) == TOKENS * mode.macs_per_token


def test_shape_and_stored_weights(case):
    dense, layer = case
    assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
    assert layer(tokens(TOKENS)).shape == (TOKENS, dense.out_features)
    assert layer.num_parameters() == sum(t.numel() for t in layer.state_dict().values())


def test_the_fit_says_more_than_the_mean(case):
    dense, layer = case
    x = tokens(500, seed=7)
    assert relative_rms(layer(x), dense(x)) < relative_rms(dense(x).mean(0).expand(500, -1), dense(x))


def test_forward_agrees_with_the_definition(case):
    _, layer = case
    x = tokens(TOKENS)
    assert_close(layer(x), layer.reference(x), precision=layer.precision)
    with torch.no_grad():  # a path of its own in layers that are faster without gradients
        assert_close(layer(x), layer.reference(x), precision=layer.precision)


def test_outputs_and_gradients_agree_with_float64(case):
    _, layer = case
    reference = copy.deepcopy(layer).double()
    x = tokens(TOKENS).requires_grad_()
    wide = x.detach().double().requires_grad_()
    direction = tokens(TOKENS, layer.out_features, seed=5)
    y, expected = layer(x), reference.reference(wide)
    assert_close(y, expected, "output", precision=layer.precision)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    wide_parameters = [p for p in reference.parameters() if p.requires_grad]
    ours = torch.autograd.grad((y * direction).sum(), [x, *parameters])
    theirs = torch.autograd.grad((expected * direction).sum(), [wide, *wide_parameters])
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, "gradient", precision=layer.precision)


def test_bfloat16(case):
    _, layer = case
    x = tokens(TOKENS)
    low = copy.deepcopy(layer).bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # The same numbers, computed exactly: a token whose choice of experts is near a tie may choose otherwise
    # after rounding.
    assert_close(y, low.float()(x.bfloat16().float()), precision=layer.precision)


def test_any_number_of_tokens_and_dimensions(case):
    _, layer = case
    x = tokens(24)
    flat, d, out = layer(x), layer.in_features, layer.out_features
    for shape in [(24,), (4, 6), (2, 3, 4)]:
        assert_close(layer(x.view(*shape, d)), flat.view(*shape, out), precision=layer.precision)
        assert_close(layer.reference(x.view(*shape, d)), flat.view(*shape, out), precision=layer.precision)
    assert_close(layer(x[0]), flat[0], precision=layer.precision)
    assert_close(layer.reference(x[0]), flat[0], precision=layer.precision)
    for shape in [(0, d), (3, 0, d)]:
        assert layer(torch.empty(shape)).shape == (*shape[:-1], out)
        assert layer.reference(torch.empty(shape)).shape == (*shape[:-1], out)


def test_inputs_need_not_be_contiguous(case):
    _, layer = case
    x = tokens(24)
    for strided in (x.T.contiguous().T, x.repeat_interleave(2, 0)[::2], x[:1].expand(24, -1)):
        assert_close(layer(strided), layer(strided.clone(memory_format=torch.contiguous_format)))
    swapped = x.view(4, 6, -1).transpose(0, 1)
    assert_close(layer(swapped), layer(swapped.contiguous()))


def test_training_moves_the_loss_down(case):
    dense, layer = case
    layer, x = copy.deepcopy(layer).train(), tokens(TOKENS, seed=11)
    target = dense(x).detach() + 1
    parameters = [p for p in layer.parameters() if p.requires_grad]
    before = (layer(x) - target).square().mean()
    gradients = torch.autograd.grad(before, parameters)
    square = sum(g.square().sum() for g in gradients)
    with torch.no_grad():  # one gradient step that would lower a linear loss by a hundredth
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(0.01 * before / square * gradient)
    assert (layer(x) - target).square().mean() < before


def test_a_copy_is_equal_and_its_own(case):
    dense, layer = case
    x = tokens(TOKENS)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert not storages(twin) & storages(layer)
    assert not storages(layer) & storages(dense), "training the layer would change the dense block"


@every_layer
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_into_a_freshly_built_layer(name, bias):
    dense = block(bias=bias)
    layer, x = fitted(name, dense), tokens(TOKENS)
    fresh = config_of(name).build(dense, generator=generator(1))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@every_layer
def test_compile_and_export(name, dense):
    layer, x = fitted(name, dense), tokens(TOKENS)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x), precision=layer.precision)
    compiled(x).sum().backward()
    tokens_of_any_number = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens_of_any_number},))
    assert_close(program.module()(tokens(17)), layer(tokens(17)), precision=layer.precision)


@every_layer
def test_onnx_runtime_agrees(name, dense, tmp_path):
    layer, file = fitted(name, dense), tmp_path / "layer.onnx"
    tokens_of_any_number = torch.export.Dim("tokens", min=2)
    torch.onnx.export(
        layer, (tokens(TOKENS),), file, dynamic_shapes=({0: tokens_of_any_number},), verbose=False
    )
    session = onnxruntime.InferenceSession(file)
    x = tokens(17)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), layer(x), precision=layer.precision)


@every_layer
def test_meta_device_builds_the_same_shapes(name, dense):
    real = config_of(name).build(dense, generator=generator())
    meta = config_of(name).build(copy.deepcopy(dense).to("meta"), generator=generator())
    shapes = {key: (value.shape, value.dtype) for key, value in real.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in meta.state_dict().items()}
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert meta(torch.empty(3, 60, device="meta")).shape == (3, 60)
    assert meta.macs_per_token == real.macs_per_token


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_take_the_dtype_of_the_block(name, dtype):
    layer = fitted(name, block(dtype=dtype), count=300)
    stored = {t.dtype for t in layer.state_dict().values() if t.is_floating_point()}
    assert stored <= {dtype, layer.precision}
    assert torch.isfinite(layer(tokens(9, dtype=dtype))).all()


@every_layer
def test_seeds_decide_and_global_state_stays(name, dense):
    before, weights = torch.get_rng_state(), copy.deepcopy(dense)
    data = stream(dense, tokens(300))
    config = config_of(name)
    one, again, other = (config.build(dense, generator=generator(seed)) for seed in (3, 3, 4))
    assert same_state(one, again)
    assert not same_state(one, other)
    fit, refit = (config.fit(dense, data, generator=generator(3)) for _ in range(2))
    assert same_state(fit, refit)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(dense, weights)


@every_layer
def test_tokens_without_weight_do_not_count(name, dense):
    x, ones = tokens(1500), torch.ones(1500)
    clean = [(x, dense(x).detach(), ones)]
    noise = (tokens(63, seed=3), tokens(63, seed=4) * 10, torch.zeros(63))
    config = config_of(name)
    expected = config.fit(dense, clean, generator=generator())
    layer = config.fit(dense, [*clean, noise], generator=generator())
    # Rescaled inputs (63 more of them) are other random features; they may only differ as the sample does.
    quality = [relative_rms(lay(x), dense(x)) for lay in (layer, expected)]
    assert quality[0] == pytest.approx(quality[1], rel=0.02, abs=1e-5)


@every_layer
def test_more_budget_less_error(name, dense):
    x = tokens(1000, seed=8)
    small, middle, large = (fitted(name, dense, budget=b, count=4000) for b in (0.15, 0.3, 0.6))
    for less, more in ((small, middle), (middle, large)):
        if less.macs_per_token == more.macs_per_token:
            continue  # one size for every budget
        assert relative_rms(more(x), dense(x)) < relative_rms(less(x), dense(x))


@every_layer
def test_calibration_that_cannot_be_used(name, dense):
    x = tokens(TOKENS)
    spoilt = x.clone()
    spoilt[5, 7] = torch.nan
    if not config_of(name).needs_calibration:
        return
    for data in ([], [(spoilt, dense(spoilt).detach(), None)]):
        with pytest.raises(ValueError, match="empty|NaN|not finite"):
            config_of(name).fit(dense, data, generator=generator())
