"""MoE: equal experts of the block's own neurons, the largest scores choose, and all active are the block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eugen.layers.moe import MoEConfig, strong_neurons
from eugen.parts.neurons import output_sizes
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

CASES = [
    {"variant": "moefication"},
    {"variant": "moefication", "experts": 7},
    {"variant": "cmoe"},
    {"variant": "cmoe", "experts": 8, "shared_experts": 0},
    {"variant": "cmoe", "experts": 11, "shared_experts": 1},
]
every_case = pytest.mark.parametrize("options", CASES, ids=str)
both_forms = pytest.mark.parametrize("gated", [False, True])


def fit(dense=None, *, count=2000, **options):
    dense = block() if dense is None else dense
    options = {"budget": 0.4} | options
    data = stream(dense, tokens(count, dense.in_features, dtype=dense.up.weight.dtype))
    return MoEConfig(**options).fit(dense, data, generator=generator())


def by_hand(layer, x):
    """Scores, the best experts and their neurons, token by token, in float64."""
    layer, out = copy.deepcopy(layer).double(), []
    for token in x.double():
        scores = layer.router.weight @ token + layer.router.bias
        if layer.router_gate is not None:
            gate = layer.act(layer.router_gate.weight @ token + layer.router_gate.bias)
            scores = (gate * scores).abs()
        y = layer.readout.bias
        best = scores.argsort()[-layer.active :].tolist()
        groups = [torch.arange(e * layer.width, (e + 1) * layer.width) for e in best]
        for rows in [*groups, torch.arange(layer.routed, layer.up.out_features)]:
            hidden = layer.up.weight[rows] @ token + layer.up.bias[rows]
            if layer.gate is None:
                hidden = layer.act(hidden)
            else:
                hidden = layer.act(layer.gate.weight[rows] @ token + layer.gate.bias[rows]) * hidden
            y = y + layer.readout.weight[:, rows] @ hidden
        out.append(y)
    return torch.stack(out)


@every_case
@both_forms
def test_evaluation_uses_the_best_scored_experts(options, gated):
    layer, x = fit(block(gated=gated), **options), tokens(63, seed=4)
    expected = by_hand(layer, x)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(layer(x), expected)
            assert_close(layer(x[:1]), expected[:1])
            assert_close(copy.deepcopy(layer).train()(x), expected)
            assert_close(copy.deepcopy(layer).double()(x.double()), expected)


@every_case
@both_forms
def test_experts_are_equal_parts_of_the_block(options, gated):
    dense = block(gated=gated)
    layer = fit(dense, **options)
    for own, whole in ((layer.up, dense.up), (layer.gate, dense.gate)):
        if own is None or whole is None:
            continue
        rows = torch.cat([own.weight, own.bias[:, None]], dim=1)
        wanted = torch.cat([whole.weight, whole.bias[:, None]], dim=1)
        matches = (rows[:, None] == wanted).all(-1)
        padding = (rows == 0).all(-1)
        # Every neuron of the block stands in one place, every other place is empty.
        assert torch.equal(matches.sum(0), torch.ones(dense.hidden_features))
        assert torch.equal(matches.sum(1) + padding.long(), torch.ones(len(rows)))
    assert layer.up.out_features - dense.hidden_features < layer.experts + layer.width
    assert layer.up.out_features % layer.width == 0


@every_case
@both_forms
def test_all_experts_together_are_the_block(options, gated):
    dense = block(gated=gated, dtype=torch.float64)
    layer = fit(dense, **{**options, "budget": None, "active_experts": 400})
    assert layer.active == layer.experts
    x = tokens(500, seed=5, dtype=torch.float64)
    refit = copy.deepcopy(dense)
    refit.fit_readout(stream(dense, tokens(2000, dtype=torch.float64)))
    with torch.no_grad():
        assert_close(layer(x), refit(x), precision=torch.float32)


@every_case
@both_forms
def test_macs_are_those_of_the_active_neurons_and_the_router(options, gated):
    dense = block(gated=gated)
    layer = MoEConfig(budget=0.4, **options).build(dense, generator=generator())
    neurons = layer.active * layer.width + layer.up.out_features - layer.routed
    router = layer.experts * 60 * (2 if gated and options["variant"] == "cmoe" else 1)
    assert layer.macs_per_token == neurons * (3 if gated else 2) * 60 + router
    assert layer.macs_per_token <= 0.4 * dense.macs_per_token


def test_every_active_count_is_possible_and_more_is_better():
    dense, x = block(), tokens(1000, seed=8)
    errors = []
    for active in (1, 3, 6, 10, 15):
        layer = fit(dense, budget=None, active_experts=active, shared_experts=0)
        assert layer.route(x)[0].shape == (1000, active)
        assert layer.route(x)[0].sort(dim=1).values.diff(dim=1).gt(0).all(), "an expert twice"
        with torch.no_grad():
            errors.append(relative_rms(layer(x), dense(x)))
    assert errors == sorted(errors, reverse=True)


@both_forms
@pytest.mark.parametrize("variant", ["moefication", "cmoe"])
def test_the_router_is_trained_straight_through(variant, gated):
    layer, x = fit(block(gated=gated), variant=variant), tokens(63, seed=4)
    target = layer(x).detach() + 1
    routers = [p for name, p in layer.named_parameters() if name.startswith("router")]
    assert len(routers) == (4 if gated and variant == "cmoe" else 2)
    for mode in (True, False):
        loss = (layer.train(mode)(x) - target).square().mean()
        gradients = torch.autograd.grad(loss, routers)
        assert all(g.abs().max() > 0 for g in gradients)


def experts_by_feature(groups=8, per=4, d=12, *, gated=False):
    """Neurons that are on for one group of tokens only, shuffled; group g of tokens has input g large."""
    seeded = generator(1)
    dense = block(d, groups * per, act=nn.ReLU(), gated=gated)
    order = torch.randperm(groups * per, generator=seeded)
    owner = torch.empty(groups * per, dtype=torch.int64)
    owner[order] = torch.arange(groups).repeat_interleave(per)
    with torch.no_grad():
        chooser = dense.up if dense.gate is None else dense.gate
        chooser.weight.mul_(0.1)
        chooser.weight[torch.arange(groups * per), owner] = 3
        chooser.bias.fill_(-4)
    group = torch.randint(groups, (2000,), generator=seeded)
    x = torch.randn(2000, d, generator=seeded) * 0.2
    x[torch.arange(2000), group] += 3
    return dense, x, owner, group


@both_forms
@pytest.mark.parametrize("variant", ["moefication", "cmoe"])
def test_experts_that_are_there_are_found(variant, gated):
    dense, x, owner, group = experts_by_feature(gated=gated)
    config = MoEConfig(
        variant=variant, experts=8, active_experts=1, shared_experts=0 if variant == "cmoe" else None
    )
    found = []
    for seed in range(6):  # k-means from one start may join two groups
        layer = config.fit(dense, stream(dense, x), generator=generator(seed))
        with torch.no_grad():
            found.append((relative_rms(layer(x), dense(x)), seed, layer))
    error, _, layer = min(found, key=lambda result: result[:2])
    assert error < 1e-2
    rows = (layer.up.weight[:, None] == dense.up.weight).all(-1).float().argmax(1)
    owners = owner[rows].view(8, 4)
    assert (owners == owners[:, :1]).all()
    sent = owners[layer.route(x)[0][:, 0], 0]
    assert (sent == group).float().mean() > 0.99


def test_shared_neurons_are_those_most_often_strong():
    dense = block()
    data = stream(dense, tokens(2000))
    layer = MoEConfig(variant="cmoe", experts=8, active_experts=8, shared_experts=2).fit(
        dense, data, generator=generator()
    )
    rate = strong_neurons(dense, data, output_sizes(dense.down, None).float()).float().mean(0)
    rows = (layer.up.weight[:, None] == dense.up.weight).all(-1).float().argmax(1)
    assert rate[rows[layer.routed :]].min() >= rate[rows[: layer.routed]].max()


def test_strong_neurons_are_so_many_for_each_token_and_weightless_tokens_are_not_asked():
    dense, x = block(), tokens(100)
    weight = torch.ones(100)
    weight[40:] = 0
    markers = strong_neurons(dense, [(x, dense(x), weight)], output_sizes(dense.down, None).float())
    assert markers.shape == (40, 240)
    assert torch.equal(markers.sum(1), torch.full((40,), 240 // 8))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"variant": "topk"}, "variant='topk'"),
        ({"experts": 0}, "experts=0"),
        ({"shared_experts": -1}, "shared_experts=-1"),
        ({"active_experts": 2, "shared_experts": 2}, "shared_experts=2"),
        ({"variant": "moefication", "shared_experts": 1}, "shared_experts"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        MoEConfig(**({"budget": 0.5} | options)).build(block(), generator=generator())
