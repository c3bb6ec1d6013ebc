"""A fit finds a member of its own class again.

The ridge bounds the error: its optimum costs no more than the truth does, so the mean squared error
is at most ridge · Σ (weight · deviation)², with the true weights and the features' deviations.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eugen
from eugen import DenseFFN, EUGenConfig, LinearConfig, LowRankAwareConfig, LowRankConfig, PruneConfig
from eugen.least_squares import RIDGE
from tests.contract.cases import config_of
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import RELATIVE_RMS, relative_rms

D, H = 60, 240


def assert_within_ridge(layer, truth, x, *, features=None, weight=None) -> None:
    """Squared error on the tokens of the fit, against the bound by the true readout."""
    with torch.no_grad():
        deviation = (truth.features(x) if features is None else features).std(0, correction=0)
        weight = truth.readout.weight if weight is None else weight
        bound = RIDGE * (weight * deviation).square().sum()
        error = (layer(x) - truth(x)).square().sum(-1).mean()
    assert error <= bound
    assert bound < truth(x).var(0).sum() / 10, "the bound says nothing"


@pytest.mark.parametrize("name", list(eugen.layers()))
def test_every_layer_recovers_what_it_was_fitted_to(name):
    """The same seed draws the same features; the targets are their image under a known readout."""
    dense = block(dtype=torch.float64)
    x = tokens(3000, D, dtype=torch.float64)
    config = config_of(name)
    truth = config.fit(dense, stream(dense, x), generator=generator()).eval()
    layer = config.fit(dense, stream(truth, x), generator=generator()).eval()
    if truth.readout is None:  # solved in a way of its own, or fitted to the weights alone
        assert relative_rms(layer(x), truth(x)) <= max(RIDGE**0.5, RELATIVE_RMS[layer.precision])
    else:
        assert_within_ridge(layer, truth, x)


def test_linear_of_a_linear_block():
    dense = block(D, H, act=nn.Identity(), dtype=torch.float64)
    x = tokens(3000, D, dtype=torch.float64)
    layer = LinearConfig().fit(dense, stream(dense, x), generator=generator())
    assert_within_ridge(layer, dense, x, features=x, weight=dense.down.weight @ dense.up.weight)


@pytest.mark.parametrize("config", [PruneConfig(budget=1), PruneConfig(budget=0.3)])
def test_prune_keeps_every_neuron_that_counts(config):
    dense = block(dtype=torch.float64)
    kept = round(config.budget * H)
    with torch.no_grad():
        dense.down.weight[:, torch.randperm(H, generator=generator())[kept:]] = 0
    x = tokens(3000, D, dtype=torch.float64)
    assert_within_ridge(config.fit(dense, stream(dense, x), generator=generator()), dense, x)


@pytest.mark.parametrize("config", [LowRankConfig(rank=7), LowRankAwareConfig(rank=7)])
def test_low_rank_of_matrices_that_have_the_rank(config):
    dense = block(dtype=torch.float64)
    with torch.no_grad():
        for linear in (dense.up, dense.down):
            left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight.copy_(left[:, :7] * values[:7] @ right[:7])
    x = tokens(3000, D, dtype=torch.float64)
    layer = config.fit(dense, stream(dense, x), generator=generator())
    with torch.no_grad():
        # The factors are exact up to the readout, whatever the basis: the bound is that of their features.
        features = layer.features(x)
        weight = torch.linalg.lstsq(features - features.mean(0), dense(x) - dense(x).mean(0)).solution.T
    assert_within_ridge(layer, dense, x, features=features, weight=weight)


class Squares(nn.Module):
    """z ↦ z + z²: with rows of the teacher, a linear path and squares, EUGen's class holds the block."""

    def forward(self, z):
        return z + z.square()


def test_eugen_of_a_quadratic_block():
    dense = block(20, 12, act=Squares(), dtype=torch.float64)
    x = tokens(3000, 20, dtype=torch.float64)
    config = EUGenConfig(
        num_features=12, projection="teacher", sharing="powers", direct_linear=True, norm_slot=False
    )
    layer = config.fit(dense, stream(dense, x), generator=generator())
    with torch.no_grad():
        squares = dense.up(x).square()
        features = torch.cat([x, squares], dim=1)
        weight = torch.cat([dense.down.weight @ dense.up.weight, dense.down.weight], dim=1)
    assert_within_ridge(layer, dense, x, features=features, weight=weight)
    with torch.no_grad():
        assert relative_rms(layer(x), dense(x)) < 1e-2
    fewer = EUGenConfig(num_features=11, projection="teacher", sharing="powers", direct_linear=True)
    part = fewer.fit(dense, stream(dense, x), generator=generator())
    assert relative_rms(part(x), dense(x)) > relative_rms(layer(x), dense(x))


def test_aware_factors_beat_blind_ones_where_inputs_are_correlated():
    """Of the first matrix alone, whose output error the whitened truncation minimises (Eckart-Young)."""
    dense = block(dtype=torch.float64)
    x = tokens(3000, D, dtype=torch.float64)
    errors = {}
    for config in (LowRankConfig(rank=7), LowRankAwareConfig(rank=7)):
        layer = config.fit(dense, stream(dense, x), generator=generator())
        errors[config.name] = relative_rms(layer.u1(layer.v1(x)) - layer.u1.bias, dense.up(x) - dense.up.bias)
    with torch.no_grad():
        values = torch.linalg.svdvals(dense.up(x) - dense.up.bias)
    best = float(values[7:].square().sum().sqrt() / values.square().sum().sqrt())
    assert errors["low_rank_aware"] == pytest.approx(best, rel=1e-3)
    assert errors["low_rank"] > errors["low_rank_aware"]


def test_one_teacher_layer_without_output_matrix():
    dense = DenseFFN(nn.Linear(D, 30), nn.Identity()).double()
    x = tokens(3000, D, dtype=torch.float64)
    layer = LinearConfig().fit(dense, stream(dense, x), generator=generator())
    assert_within_ridge(layer, dense, x, features=x, weight=dense.up.weight)
