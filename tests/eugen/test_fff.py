"""FFF: one leaf a token, soft and hard agree where decisions are certain, losses mean what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eugen.layers.fff import FFFConfig
from eugen.parts.tree import balance_loss, descend, descend_one, grow_tree, hardening_loss, mixture
from eugen.refine import refine
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

OPTIONS = [{}, {"depth": 1}, {"depth": 3}, {"master_features": 20}, {"master_features": 19, "depth": 3}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def fit(dense=None, *, count=2000, budget=0.3, **options):
    dense = block() if dense is None else dense
    data = stream(dense, tokens(count, dense.in_features, dtype=dense.up.weight.dtype))
    return FFFConfig(budget=budget, **options).fit(dense, data, generator=generator())


def by_hand(layer, x):
    """Walks down the tree and computes the leaf, token by token, in float64."""
    layer, out = copy.deepcopy(layer).double(), []
    for token in x.double():
        node = 0
        while node < len(layer.node_weight):
            right = layer.node_weight[node] @ token + layer.node_bias[node] > 0
            node = 2 * node + (2 if right else 1)
        leaf = node - len(layer.node_weight)
        rows = torch.arange(leaf * layer.width, (leaf + 1) * layer.width)
        rows = torch.cat([rows, torch.arange(layer.routed, layer.up.out_features)])
        hidden = layer.up.weight[rows] @ token + layer.up.bias[rows]
        if layer.gate is not None:
            hidden = layer.act(layer.gate.weight[rows] @ token + layer.gate.bias[rows]) * hidden
        else:
            hidden = layer.act(hidden)
        out.append(layer.readout.weight[:, rows] @ hidden + layer.leaf_bias[leaf])
    return torch.stack(out)


@every_option
@pytest.mark.parametrize("gated", [False, True])
def test_evaluation_descends_to_one_leaf(options, gated):
    layer, x = fit(block(gated=gated), **options), tokens(63, seed=4)
    expected = by_hand(layer, x)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(layer(x), expected)
            assert_close(layer(x[:1]), expected[:1])
            assert_close(layer.double()(x.double()), expected)
            layer.float()


@every_option
def test_hard_and_soft_agree_where_decisions_are_certain(options):
    layer, x = fit(**options), tokens(63, seed=4)
    with torch.no_grad():
        gap = relative_rms(copy.deepcopy(layer).train()(x), layer(x))
        layer.node_weight.mul_(1e6)
        layer.node_bias.mul_(1e6)
        hard, soft = layer(x), layer.train()(x)
    assert gap > 1e-3, "decisions were certain before"
    assert_close(soft, hard)
    assert float(layer.auxiliary_loss()) < 1e-3


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_shares_are_a_partition(depth):
    seeded = generator(depth)
    weight, bias = torch.randn(2**depth - 1, 9, generator=seeded), torch.randn(2**depth - 1, generator=seeded)
    x = torch.randn(200, 9, generator=seeded)
    shares, right = mixture(x, weight, bias, depth)
    assert_close(shares.sum(1), torch.ones(200))
    assert right.shape == (200, 2**depth - 1)
    leaf, way = descend(x, weight.requires_grad_(), bias, depth)
    # Each decision of the way is the likelier one, and the way's share is that leaf's share.
    assert_close(way, shares.gather(1, leaf[:, None])[:, 0])
    assert [descend_one(row[None], weight.detach(), bias, depth) for row in x] == leaf.tolist()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_grown_trees_are_balanced_by_token_weight(depth):
    x, leaves = tokens(1600), 2**depth
    weights = torch.randint(0, 4, (1600,), generator=generator(2)).float()
    data = [(x[:700], x[:700], weights[:700]), (x[700:], x[700:], weights[700:])]
    leaf, _ = descend(x.double(), *grow_tree(data, depth), depth)
    used = torch.zeros(leaves).index_add(0, leaf, weights)
    # Each median is off by at most the one token it falls on, at every level.
    assert (used - weights.sum() / leaves).abs().max() <= depth * weights.max()


def test_the_first_split_is_across_the_widest_direction():
    x = torch.randn(500, 8, generator=generator()) * torch.tensor([1.0, 1, 9, 1, 1, 1, 1, 1]) + 3
    weight, _ = grow_tree([(x, x, None)], 1)
    assert weight[0].abs().argmax() == 2
    assert weight[0, 2].abs() > 10 * weight[0, [0, 1, 3, 4, 5, 6, 7]].abs().max()


def test_tokens_all_alike_can_be_fitted():
    dense = block()
    x = tokens(1).expand(300, -1)
    layer = FFFConfig(budget=0.3).fit(dense, stream(dense, x), generator=generator())
    assert_close(layer(x), dense(x), precision=torch.bfloat16)


def test_hardening_falls_as_decisions_harden():
    z = torch.randn(100, 7, generator=generator())
    losses = [float(hardening_loss(torch.sigmoid(scale * z))) for scale in (0, 0.5, 1, 2, 8, 1000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item())
    assert losses[-1] < 1e-2
    assert float(hardening_loss(torch.ones(0, 7))) == 0


def test_balance_is_least_for_uniform_use():
    uniform = torch.full((64, 8), 1 / 8)
    assert float(balance_loss(uniform)) == pytest.approx(1)
    # Certain decisions count alike where every leaf has its turn; one leaf for all costs the most.
    assert float(balance_loss(torch.eye(8).repeat(8, 1))) == pytest.approx(1)
    assert float(balance_loss(torch.eye(8)[:1].repeat(64, 1))) == pytest.approx(8)
    seeded = generator()
    for _ in range(20):
        assert float(balance_loss(torch.rand(64, 8, generator=seeded).pow(4).softmax(1))) > 1


@pytest.mark.parametrize(("loss", "unit"), [("hardening", 1.0), ("balance", 1.0)])
def test_training_lowers_the_loss_that_is_asked_for(loss, unit):
    layer = fit(**{"hardening": 0.0, "balance": 0.0, loss: unit}).train()
    with torch.no_grad():
        layer.node_weight.mul_(0.1)
        layer.node_bias.add_(1)  # undecided, and one side preferred
    x = tokens(500, seed=6)
    optimiser = torch.optim.SGD([layer.node_weight, layer.node_bias], lr=0.05)
    values = []
    for _ in range(20):
        layer(x)
        auxiliary = layer.auxiliary_loss()
        values.append(auxiliary.item())
        optimiser.zero_grad()
        auxiliary.backward()
        optimiser.step()
    assert values[-1] < values[0]


def test_evaluation_trains_the_nodes_straight_through():
    layer, x = fit(), tokens(63, seed=4)
    gradient = torch.autograd.grad(layer(x).square().sum(), [layer.node_weight, layer.node_bias])
    assert all(g.abs().max() > 0 for g in gradient)


def test_refinement_beats_the_closed_form_and_hardens():
    dense, unseen = block(), tokens(1000, seed=8)
    data = stream(dense, tokens(3000))
    config = FFFConfig(budget=0.3)
    layer = config.fit(dense, data, generator=generator())
    refined = config.refine(layer, dense, data, steps=60, generator=generator())
    assert not refined.training
    with torch.no_grad():
        assert relative_rms(refined(unseen), dense(unseen)) < relative_rms(layer(unseen), dense(unseen))
        right = mixture(unseen, refined.node_weight, refined.node_bias, refined.depth)[1]
        unhardened = FFFConfig(budget=0.3, hardening=0.0)
        layer = unhardened.fit(dense, data, generator=generator())
        loose = unhardened.refine(layer, dense, data, steps=60, generator=generator())
        assert hardening_loss(right) < hardening_loss(
            mixture(unseen, loose.node_weight, loose.node_bias, loose.depth)[1]
        )
    assert refine(layer, data, steps=2, generator=generator()).auxiliary_loss() is None


def test_a_layer_in_training_can_be_copied():
    layer = fit().train()
    layer(tokens(9))
    assert layer.auxiliary_loss() is not None
    assert copy.deepcopy(layer).auxiliary_loss() is None


@every_option
@pytest.mark.parametrize("gated", [False, True])
def test_macs_are_those_of_the_way_down_and_of_one_leaf(options, gated):
    d, out, dense = 60, 60, block(gated=gated)
    layer = FFFConfig(budget=0.3, **options).build(dense, generator=generator())
    neurons = layer.width + options.get("master_features", 0)
    assert layer.macs_per_token == layer.depth * d + neurons * ((2 if gated else 1) * d + out)
    assert layer.experts == 2**layer.depth
    assert layer.macs_per_token <= 0.3 * dense.macs_per_token


def test_the_depth_chosen_keeps_the_number_of_neurons():
    for budget in (0.05, 0.15, 0.3, 0.6, 1):
        layer = FFFConfig(budget=budget).build(block(64, 1024), generator=generator())
        assert layer.depth == 1 or layer.routed <= 1.25 * 1024
        assert layer.depth == 5 or layer.depth < 1.25 * 1024 / layer.width
    wide = FFFConfig(budget=0.1, max_neurons=2).build(block(64, 1024), generator=generator())
    assert wide.routed > 1.25 * 1024


def test_leaves_hold_neurons_of_the_block_that_matter_there():
    """Half of the neurons are on only where the first input is positive: each half goes to its own leaf."""
    dense = block(8, 16, act=nn.ReLU(), bias=True)
    with torch.no_grad():
        dense.up.weight.mul_(0.1)
        dense.up.weight[:8, 0], dense.up.weight[8:, 0] = 1, -1
        dense.up.bias.zero_()
    x = torch.randn(2000, 8, generator=generator()) * torch.tensor([5.0, 1, 1, 1, 1, 1, 1, 1])
    layer = FFFConfig(depth=1, leaf_features=8).fit(dense, stream(dense, x), generator=generator())
    signs = layer.up.weight[:, 0].sign().view(2, 8)
    assert torch.equal(signs[0], signs[0, :1].expand(8))
    assert torch.equal(signs[0], -signs[1])
    with torch.no_grad():
        assert relative_rms(layer(x), dense(x)) < 1e-2


@pytest.mark.parametrize(
    "options", [{"depth": 0}, {"master_features": -1}, {"hardening": -1}, {"balance": -1}]
)
def test_impossible_options_are_refused(options):
    (field,) = options
    with pytest.raises(ValueError, match=field):
        FFFConfig(budget=0.3, **options)


def test_a_master_leaf_of_all_neurons_is_refused():
    with pytest.raises(ValueError, match="master_features=240"):
        FFFConfig(master_features=240, leaf_features=1).build(block(), generator=generator())
