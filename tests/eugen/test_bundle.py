"""A stack of layers becomes one: least squares to its outputs or to targets."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import eugen
from eugen import DenseFFN, EUGenConfig, LinearConfig, NarrowConfig, PruneConfig, SNNKConfig, UnsuitableBlock
from eugen.bundle import bundle, merge_linear
from eugen.least_squares import RIDGE, RIDGE_FEW_TOKENS
from tests.contract.cases import config_of, every_layer, unless_refused
from tests.eugen.blocks import block, generator, linear, tokens
from tests.eugen.test_recovery import assert_within_ridge
from tests.tolerances import assert_close, relative_rms

D, OUT = 20, 7


def maps(
    *widths: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 3
) -> list[nn.Linear]:
    seeded = generator(seed)
    pairs = pairwise(widths)
    return [linear(n_in, n_out, bias=bias, dtype=dtype, seeded=seeded) for n_in, n_out in pairs]


def network(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three feed-forward layers, with what a trained network has between them."""
    first, second, third = maps(D, 50, 40, OUT, dtype=dtype)
    return nn.Sequential(first, nn.GELU(), nn.Sequential(nn.Dropout(0.5), second, nn.Tanh()), third)


def batches(count: int = 5, size: int = 400, *, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list(tokens(count * size, D, dtype=dtype).split(size))


def test_a_stack_of_linear_maps_is_one_linear_map():
    stack, data = nn.Sequential(*maps(D, 50, 40, OUT)), batches()
    layer, x = bundle(stack, LinearConfig(), data), torch.cat(data)
    product = merge_linear(merge_linear(stack[0], stack[1]), stack[2])
    truth = DenseFFN(nn.Linear(D, D).double(), nn.Identity(), product)
    with torch.no_grad():
        truth.up.weight.copy_(torch.eye(D))
        truth.up.bias.zero_()
    assert_within_ridge(layer, truth, x)
    assert relative_rms(layer(x), stack(x)) < 1e-3


def test_a_stack_of_its_own_class_is_found_again():
    """One layer of neurons and linear maps after it: pruning nothing, only the readout is to be found."""
    first, *rest = maps(D, 50, 40, OUT)
    stack, data = nn.Sequential(first, nn.GELU(), *rest), batches()
    truth = DenseFFN(first, nn.GELU(), merge_linear(*rest))
    assert_within_ridge(bundle(stack, PruneConfig(hidden_features=50), data), truth, torch.cat(data))


@every_layer
def test_every_layer_bundles_a_network_within_its_budget_or_refuses(name):
    stack, data = network(), batches()
    config = config_of(name, 0.3)
    layer = unless_refused(lambda: bundle(stack, config, data), repr(config.name))
    if layer is None:
        return
    x = tokens(500, D, seed=9, dtype=torch.float64)
    expected = stack.eval()(x)
    assert layer.eval()(x).shape == (500, OUT)
    assert layer.macs_per_token <= 0.3 * (D * 50 + 50 * 40 + 40 * OUT)
    assert relative_rms(layer(x), expected) < relative_rms(expected.mean(0).expand(500, -1), expected)


@pytest.mark.parametrize(
    "config",
    [
        EUGenConfig(budget=0.3, projection="teacher", sharing="powers"),
        SNNKConfig(budget=0.3, features="urf"),
        NarrowConfig(budget=0.3),
        PruneConfig(budget=0.3),
    ],
    ids=lambda config: config.name,
)
def test_bundling_is_decided_by_the_seed_and_leaves_everything_as_it_was(config):
    stack, data = network(), batches()
    before, state = copy.deepcopy(stack.state_dict()), torch.get_rng_state()
    one, again = (bundle(stack, config, data, seed=5) for _ in range(2))
    assert all(torch.equal(one.state_dict()[k], v) for k, v in again.state_dict().items())
    if config.name in ("snnk", "narrow"):  # the others take their rows from the first layer
        other = bundle(stack, config, data, seed=6).state_dict()
        assert any(not torch.equal(value, other[key]) for key, value in one.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in stack.state_dict().items())
    assert stack.training and all(module.training for module in stack.modules())
    assert one.training
    stored = {p.data_ptr() for p in stack.parameters()}
    assert not stored & {p.data_ptr() for p in one.parameters()}


def test_dropout_is_off_while_the_stack_is_asked():
    stack, data = network(), batches()
    noisy, calm = (bundle(stack.train(mode), LinearConfig(), data) for mode in (True, False))
    assert noisy.training and not calm.training
    assert torch.equal(noisy.readout.weight, calm.readout.weight)


def test_rows_of_the_teacher_are_the_first_layers_strongest():
    """Scored with the output matrix that is the best on the first layer's neurons."""
    first, second, third = maps(D, 50, 40, OUT)
    with torch.no_grad():
        second.weight[:, ::2].zero_()  # neurons that say nothing to what follows
    stack = nn.Sequential(first, nn.GELU(), second, third)
    layer = bundle(stack, PruneConfig(hidden_features=25), batches())
    assert {tuple(row) for row in layer.up.weight.tolist()} == {tuple(r) for r in first.weight[1::2].tolist()}


def test_blocks_chain_into_one_layer():
    blocks, data = [block(D, 50, dtype=torch.float64, seed=s) for s in (1, 2)], batches()
    layer = bundle(blocks, SNNKConfig(budget=0.5, features="urf"), data)
    x = tokens(300, D, seed=9, dtype=torch.float64)
    expected = blocks[1](blocks[0](x))
    assert relative_rms(layer(x), expected) < relative_rms(expected.mean(0).expand(300, -1), expected)
    assert layer.projection.out_features == 0.5 * (2 * 2 * D * 50) // (D + 2 * D), (
        "of the MACs of both blocks"
    )


def test_a_gated_first_block_is_seen_as_gated():
    blocks, data = [block(D, 50, gated=True, dtype=torch.float64), *maps(D, OUT)], batches()
    assert bundle(blocks, NarrowConfig(budget=0.5), data).gate is not None
    with pytest.raises(UnsuitableBlock, match="'low_rank' does not take gated blocks"):
        bundle(blocks, eugen.LowRankConfig(budget=0.5), data)


def explicit(layer, data, targets):
    """Features and targets of all tokens in float64, centred, the features of unit variance."""
    with torch.no_grad():
        features = torch.cat([layer.features(x) for x in data]).numpy()
    values = torch.cat(targets).detach().numpy()
    mean, deviation = features.mean(0), features.std(0)
    deviation[deviation == 0] = 1  # ReLUs that no token reaches
    return (features - mean) / deviation, values - values.mean(0), values.mean(0)


def labelled(size: int = 400) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and one-hot classes that no network gave."""
    data = batches(5, size)
    classes = [
        (x[:, :OUT] + torch.randn(len(x), OUT, generator=generator(i))).argmax(1) for i, x in enumerate(data)
    ]
    return data, [nn.functional.one_hot(c, OUT).double() for c in classes]


@pytest.mark.parametrize(("size", "ridge"), [(400, RIDGE), (20, RIDGE_FEW_TOKENS)])
def test_the_optimum_for_targets_is_that_of_the_normal_equations(size, ridge):
    data, targets = labelled(size)
    config = SNNKConfig(num_features=60)
    layer = bundle(network(), config, list(zip(data, targets, strict=True)), targets=True)
    features, values, mean = explicit(layer, data, targets)
    rows, count = features.shape
    augmented = np.concatenate([features / rows**0.5, ridge**0.5 * np.eye(count)])
    wanted = np.concatenate([values / rows**0.5, np.zeros((count, OUT))])
    weight = np.linalg.lstsq(augmented, wanted, rcond=None)[0]
    assert relative_rms(layer(torch.cat(data)), torch.from_numpy(features @ weight + mean)) < 1e-9


def test_gradient_descent_on_the_readout_ends_in_the_same_minimum():
    data, targets = labelled()
    config = SNNKConfig(num_features=12, features="urf", frequency_scale=1.0)
    layer = bundle(network(), config, list(zip(data, targets, strict=True)), targets=True)
    features, values, mean = (torch.from_numpy(a) for a in explicit(layer, data, targets))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (values - features @ weight).square().sum(1).mean() + RIDGE * weight.square().sum()

    deviation = torch.cat([layer.features(x) for x in data]).detach().std(0, correction=0)
    solved = loss(layer.readout.weight.detach().T * deviation[:, None]).item()
    weight = torch.zeros(features.shape[1], OUT, dtype=torch.float64, requires_grad=True)
    start = loss(weight).item()
    optimiser = torch.optim.LBFGS([weight], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0)

    def step():
        optimiser.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    optimiser.step(step)
    descended = loss(weight).item()
    assert solved <= descended * (1 + 1e-12)
    assert descended - solved < 1e-6 * (start - solved)
    fitted_mean = layer(torch.cat(data)).mean(0)
    assert_close(fitted_mean, mean)


def test_targets_are_fitted_better_by_targets_than_by_the_network():
    data, targets = labelled()
    x, y = torch.cat(data), torch.cat(targets)
    config = SNNKConfig(num_features=40)
    own = bundle(network(), config, list(zip(data, targets, strict=True)), targets=True)
    of_the_network = bundle(network(), config, data)
    assert relative_rms(own(x), y) < relative_rms(of_the_network(x), y)
    assert torch.equal(own.projection.weight, of_the_network.projection.weight)


def test_chunks_and_shapes_of_batches_change_nothing():
    stack, data = network(), batches()
    whole = bundle(stack, SNNKConfig(num_features=12), [torch.cat(data)])
    parts = bundle(stack, SNNKConfig(num_features=12), [x.view(4, -1, D) for x in data])
    assert relative_rms(parts(data[0]), whole(data[0])) < 1e-9
    single = bundle(stack, SNNKConfig(num_features=12), [x.float() for x in data])
    assert single.readout.weight.dtype == torch.float64, "the stack's dtype counts"
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.cat, labelled())), 100)
    assert bundle(stack, LinearConfig(), loader, targets=True)(data[0]).shape == (400, OUT)


def test_a_bundle_is_saved_and_compiled():
    stack, data = network(dtype=torch.float32), batches(dtype=torch.float32)
    config = SNNKConfig(budget=0.3, features="urf")
    layer = bundle(stack, config, data)
    fresh = bundle(stack, config, data[:1], seed=8)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(data[0]), layer(data[0]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(data[0]), layer(data[0]))


def test_a_budget_that_buys_nothing_is_refused_before_any_work():
    def never():
        raise AssertionError("read")
        yield

    class Unread:
        __iter__ = staticmethod(never)

    with pytest.raises(ValueError, match="budget=0.001 is too small for 'snnk'.*the least is"):
        bundle(network(), SNNKConfig(budget=0.001), Unread())


X = torch.zeros(3, D, dtype=torch.float64)
SPOILT = torch.full((3, D), torch.nan)


@pytest.mark.parametrize(
    ("stack", "data", "options", "message"),
    [
        ([], [X], {}, "stack is empty"),
        (nn.Sequential(), [X], {}, "stack is empty"),
        (
            [nn.Linear(D, 9), nn.ReLU(), nn.Linear(8, 4)],
            [X],
            {},
            "layer 2 of the stack, Linear.*input of 9 feat",
        ),
        (
            [nn.LayerNorm(D), nn.Linear(D, 9)],
            [X],
            {},
            "begins with LayerNorm and must begin with nn.Linear or Den",
        ),
        ([nn.Linear(D, 9), nn.Unflatten(1, (3, 3))], [X], {}, "layer 1 of the stack, Unflatten.*one tensor"),
        (network(), iter([X]), {}, "iterator that can be read only once"),
        (network(), [], {}, "data are empty"),
        (network(), [X, X[:, :5]], {}, r"inputs of calibration batch 1 have the shape \(3, 5\).*must be 20"),
        (network(), [{"x": X}], {}, "batch 0 is a dict and must be a tensor of inputs"),
        (network(), [(X, X)], {}, "batch 0 is a tuple .*pairs .*need targets=True"),
        (network(), [X], {"targets": True}, r"batch 0 is a Tensor and must be a pair .*\(inputs, targets\)"),
        (network(), [(X, X[:, 0].long())], {"targets": True}, "targets of .* are torch.int64: .*one_hot"),
        (network(), [(X, X[:, :3])], {"targets": True}, r"targets of .*\(3, 3\): the last size must be 7"),
        (network(), [(X, X[:2, :7])], {"targets": True}, "batch 0 has 3 inputs and 2 targets"),
        (network(), [X.long()], {}, "inputs of calibration batch 0 are torch.int64"),
        (network(), [SPOILT], {}, "inputs of calibration batch 0 hold NaN"),
        (network(), [(X, SPOILT[:, :7])], {"targets": True}, "targets of calibration batch 0 hold NaN"),
    ],
)
def test_what_cannot_be_bundled(stack, data, options, message):
    with pytest.raises(ValueError, match=message):
        bundle(stack, LinearConfig(), data, **options)


def test_a_stack_whose_outputs_are_not_finite():
    stack = network()
    with torch.no_grad():
        stack[0].weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="stack's outputs of calibration batch 0 hold NaN"):
        bundle(stack, LinearConfig(), batches())


def test_a_norm_without_weights_is_no_activation():
    stack = nn.Sequential(
        nn.Linear(D, 64), nn.LayerNorm(64, elementwise_affine=False), nn.ReLU(), nn.Linear(64, OUT)
    )
    layer = bundle(stack, NarrowConfig(budget=0.5), [x.float() for x in batches()])
    assert isinstance(layer.act, nn.Identity)
