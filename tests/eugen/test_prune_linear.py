"""Pruned neurons beside a linear path: who keeps what, the path's directions, sizes."""

from __future__ import annotations

import pytest
import torch

from eugen import PruneConfig, PruneLinearConfig
from eugen.layers.prune_linear import best_directions
from eugen.least_squares import fit_quality
from tests.eugen.blocks import block, generator, stream, tokens

both_forms = pytest.mark.parametrize("gated", [False, True])


def partly_linear(d=60, h=240, rank=8):
    """A block most of whose neurons work far in GELU's linear part and use few directions."""
    dense = block(d, h)
    with torch.no_grad():
        flat = torch.arange(h) >= 40
        mix = torch.randn(int(flat.sum()), rank, generator=generator(5))
        dense.up.weight[flat] = 0.1 * mix @ torch.randn(rank, d, generator=generator(6))
        dense.up.bias[flat] = 30
    return dense


def test_what_is_linear_takes_the_path():
    dense = partly_linear()
    data, held_out = stream(dense, tokens(4000)), stream(dense, tokens(2000, seed=8))
    ours = PruneLinearConfig(budget=0.25, linear_share=0.2).fit(dense, data, generator=generator())
    pruned = PruneConfig(budget=0.25).fit(dense, data, generator=generator())
    assert ours.macs_per_token <= pruned.macs_per_token
    assert 1 - fit_quality(ours, held_out) < 0.2 * (1 - fit_quality(pruned, held_out))


def test_directions_are_the_best_of_their_number():
    """Against reduced-rank regression by the singular vectors of the fitted values, without neurons."""
    dense, x = block(), tokens(4000)
    y = dense(x).detach()
    gamma = torch.rand(60, generator=generator(1)) + 0.1
    layer = PruneLinearConfig(budget=0.3).build(dense, generator=generator())
    with torch.no_grad():
        layer.up.weight.zero_()
    ours = best_directions(layer, [(x, y, None)], gamma)[:5].float()
    centred, target = x.double(), (y - y.mean(0)).double() * gamma.double().sqrt()
    centred = torch.cat([centred, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    fitted = centred @ torch.linalg.lstsq(centred, target).solution

    def explained(features):
        features = torch.cat([features.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        return (features @ torch.linalg.lstsq(features, target).solution).square().sum()

    best = torch.linalg.svdvals(fitted - fitted.mean(0))[:5].square().sum()
    assert explained(x @ ours.T) > 0.97 * best
    principal = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:5]
    assert explained(x @ principal.T) < 0.9 * best


@both_forms
@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.9])
def test_sizes_share_the_budget(gated, budget, share):
    dense = block(96, 384, gated=gated)
    layer = PruneLinearConfig(budget=budget, linear_share=share).build(dense, generator=generator())
    assert layer.macs_per_token <= budget * dense.macs_per_token
    assert layer.up.out_features <= dense.hidden_features
    path = layer.path.out_features * (dense.in_features + dense.out_features)
    assert path <= max(share * budget * dense.macs_per_token, 192)
    if layer.up.out_features < dense.hidden_features:
        assert layer.macs_per_token >= budget * dense.macs_per_token - 8 * dense.macs_per_neuron


@both_forms
def test_neurons_are_the_teacher_s(gated):
    dense = block(gated=gated)
    layer = PruneLinearConfig(budget=0.3).fit(dense, stream(dense, tokens(2000)), generator=generator())
    assert (layer.up.weight[:, None] == dense.up.weight).all(-1).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_share": 0}, r"linear_share=0 must be in \(0, 1\)"),
        ({"linear_share": 1}, r"linear_share=1 must be in \(0, 1\)"),
        ({"budget": 0.001}, "budget=0.001 is too small"),
        ({"budget": None}, "needs budget="),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PruneLinearConfig(**{"budget": 0.3} | options).build(block(), generator=generator())
