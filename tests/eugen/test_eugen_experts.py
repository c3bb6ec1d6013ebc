"""Conditional EUGens: the nearest centre chooses, the strongest features of each region, sizes, gains."""

from __future__ import annotations

import copy

import pytest
import torch

from eugen import EUGenExpertsConfig, PruneConfig
from eugen.layers.eugen_experts import EXTRA, feature_scores
from eugen.least_squares import fit_quality
from eugen.parts.clusters import token_clusters
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close

both_forms = pytest.mark.parametrize("gated", [False, True])


def regions(count=3000, groups=4, d=60, seed=3):
    """Tokens around a few far centres, and which centre each belongs to."""
    generated = generator(seed)
    group = torch.randint(groups, (count,), generator=generated)
    centres = 6 * torch.randn(groups, d, generator=generator(99))
    return centres[group] + torch.randn(count, d, generator=generated), group


def fit(dense, x, **options):
    options = {"budget": 0.3, "experts": 4} | options
    return EUGenExpertsConfig(**options).fit(dense, stream(dense, x), generator=generator())


@both_forms
def test_a_token_is_given_the_shared_features_and_those_of_its_nearest_centre(gated):
    layer, (x, _) = fit(block(gated=gated), regions()[0]), regions(63, seed=4)
    wide, rows = copy.deepcopy(layer).double(), torch.arange(layer.up.out_features)
    centres, expected = wide.router.weight, []
    for token in x.double():
        nearest = int((centres - token).square().sum(1).argmin())
        used = (rows >= layer.routed) | (rows // layer.width == nearest)
        hidden = wide.up.weight[used] @ token + wide.up.bias[used]
        if wide.gate is None:
            hidden = wide.act(hidden)
        else:
            hidden = wide.act(wide.gate.weight[used] @ token + wide.gate.bias[used]) * hidden
        expected.append(wide.readout.weight[:, used] @ hidden + wide.readout.bias)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(layer(x), torch.stack(expected))
            assert_close(layer(x[:1]), expected[0][None])
            assert_close(wide(x.double()), torch.stack(expected))


def test_planted_regions_are_found():
    x, group = regions()
    centres = token_clusters([(x, x, None)], 4, most=1000, generator=generator())
    found = torch.cdist(x, centres).argmin(1)
    for one in range(4):
        assert found[group == one].unique().numel() == 1
    assert found.unique().numel() == 4


def test_scores_are_those_of_each_region_s_own_tokens():
    dense, (x, _) = block(), regions(2000)
    centres, gamma, weight = x[:4].clone(), torch.rand(60, generator=generator(1)), torch.rand(2000)
    weight[500:600] = 0
    overall, own = feature_scores(
        dense, [(x[:900], x, weight[:900]), (x[900:], x, weight[900:])], centres, gamma
    )
    nearest, hidden = torch.cdist(x, centres).argmin(1), dense.features(x).double()
    columns = (dense.down.weight.square() * gamma[:, None]).sum(0).double()

    def variance(chosen):
        share = weight[chosen].double() / weight[chosen].double().sum()
        mean = share @ hidden[chosen]
        return share @ (hidden[chosen] - mean).square()

    assert_close(overall, variance(torch.ones(2000, dtype=torch.bool)) * columns, precision=torch.float32)
    for one in range(4):
        assert_close(own[one], variance(nearest == one) * columns, precision=torch.float32)


@both_forms
def test_features_are_the_teacher_s_and_each_expert_has_a_constant(gated):
    dense, (x, _) = block(gated=gated), regions()
    layer = fit(dense, x)
    features = layer.width * layer.experts
    neurons = layer.neurons(lambda linear: linear(x))
    assert neurons[:, 0 : features : layer.width].std(0).max() == 0
    assert (neurons[:, 0 : features : layer.width].abs() > 0.1).all()
    rows = (layer.up.weight[:, None] == dense.up.weight).all(-1)
    taken = rows.any(1)
    assert taken.sum() == features - layer.experts + layer.up.out_features - layer.routed
    overall, own = feature_scores(dense, stream(dense, x), layer.router.weight)
    shared = rows[layer.routed :].nonzero()[:, 1]
    assert set(shared.tolist()) == set(overall.topk(len(shared)).indices.tolist())
    own[:, shared] = -1
    for one in range(layer.experts):
        mine = rows[one * layer.width : (one + 1) * layer.width].nonzero()[:, 1]
        assert set(mine.tolist()) == set(own[one].topk(layer.width - 1).indices.tolist())


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_what_a_token_pays_and_what_is_stored(budget, experts):
    dense = block(d=96, h=384)
    layer = EUGenExpertsConfig(budget=budget, experts=experts).build(dense, generator=generator())
    assert layer.macs_per_token <= budget * dense.macs_per_token
    features = layer.up.out_features / dense.hidden_features
    assert features <= budget + EXTRA + 1e-9
    few = EUGenExpertsConfig(budget=budget, experts=experts, parameters=budget + 0.05)
    assert few.build(dense, generator=generator()).up.out_features < layer.up.out_features


def test_regions_of_their_own_are_worth_more_than_features_for_all():
    dense, (x, _), (test, _) = block(), regions(6000), regions(2000, seed=8)
    held_out = stream(dense, test)
    ours = fit(dense, x)
    pruned = PruneConfig(budget=0.3).fit(dense, stream(dense, x), generator=generator())
    assert ours.macs_per_token <= pruned.macs_per_token * 1.02
    assert 1 - fit_quality(ours, held_out) < 0.8 * (1 - fit_quality(pruned, held_out))


def test_refinement_leaves_the_centres_and_helps():
    dense, (x, _) = block(), regions()
    config, data = EUGenExpertsConfig(budget=0.3, experts=4), stream(dense, x)
    layer = config.fit(dense, data, generator=generator())
    refined = config.refine(layer, dense, data, steps=60, generator=generator())
    assert torch.equal(refined.router.weight, layer.router.weight)
    held_out = stream(dense, regions(2000, seed=8)[0])
    assert fit_quality(refined, held_out) > fit_quality(layer, held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts=1 must be at least 2"),
        ({"parameters": 0}, r"parameters=0 must be in \(0, 2\]"),
        ({"shared": 8}, "give both or neither"),
        ({"shared": 8, "width": 0}, "width=0 at least 1"),
        ({"shared": 200, "width": 40}, "beyond budget=0.3"),
        ({"budget": 0.01}, "budget=0.01 is too small"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        fit(block(), tokens(100), **options)


def test_fewer_tokens_than_centres_are_refused():
    with pytest.raises(ValueError, match="3 tokens are too few for 4 clusters"):
        fit(block(), tokens(3))
