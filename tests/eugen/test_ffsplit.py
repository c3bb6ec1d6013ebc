"""FFSplit: which neurons stay, what the rest is fitted to, and the readout that both share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import eugen
from eugen import DenseConfig, EUGenConfig, LinearConfig, LowRankConfig, PruneConfig
from eugen.bundle import bundle
from eugen.cost import count_macs
from eugen.layers.bf16 import Bf16Config
from eugen.layers.ffsplit import FFSplitConfig, SplitFFN, part_of
from eugen.layers.int8 import Int8Config
from tests.eugen.blocks import block, generator, stream, tokens
from tests.eugen.test_recovery import assert_within_ridge
from tests.tolerances import assert_close, relative_rms

D, H = 60, 240
INNER = [LowRankConfig(), PruneConfig(), LinearConfig(), EUGenConfig(), EUGenConfig(merge=False)]


def fitted(config: FFSplitConfig, dense: eugen.DenseFFN, count: int = 3000) -> eugen.FFNLayer:
    x = tokens(count, D, dtype=dense.up.weight.dtype)
    return config.fit(dense, stream(dense, x), generator=generator())


def mostly_linear(kept: int) -> tuple[eugen.DenseFFN, torch.Tensor]:
    """A ReLU block in which all but a few neurons, which weigh the most, are active at every token."""
    dense, x = block(act=nn.ReLU(), dtype=torch.float64), tokens(3000, dtype=torch.float64)
    with torch.no_grad():
        neurons = torch.randperm(H, generator=generator(4))[:kept]
        lowest = dense.up(x).amin(0)
        lowest[neurons] = 0
        dense.up.bias.sub_(lowest.clamp(max=0))
        dense.down.weight[:, neurons] *= 10
    return dense, neurons


def test_the_heavy_neurons_are_those_that_move_the_output_most():
    dense = block()
    layer = fitted(FFSplitConfig(budget=0.5, heavy=0.1), dense)
    with torch.no_grad():
        hidden = dense.features(tokens(3000))
        scores = hidden.var(0) * dense.down.weight.square().sum(0)
    strongest = scores.argsort(descending=True)[: H // 10]
    assert isinstance(layer, SplitFFN)
    assert torch.equal(layer.heavy.up.weight, dense.up.weight[strongest])
    assert torch.equal(layer.heavy.up.bias, dense.up.bias[strongest])


def test_a_block_of_a_few_curved_neurons_and_a_linear_rest_is_found_again():
    dense, neurons = mostly_linear(H // 10)
    layer = fitted(FFSplitConfig(of=LinearConfig(), heavy=0.1), dense)
    x = tokens(3000, dtype=torch.float64)
    others = torch.ones(H, dtype=torch.bool)
    others[neurons] = False
    with torch.no_grad():
        features = torch.cat([dense.features(x)[:, neurons], x], dim=1)
        linear = dense.down.weight[:, others] @ dense.up.weight[others]
    weight = torch.cat([dense.down.weight[:, neurons], linear], dim=1)
    assert_within_ridge(layer, dense, x, features=features, weight=weight)
    fewer = fitted(FFSplitConfig(of=LinearConfig(), heavy=0.05), dense)
    with torch.no_grad():
        assert relative_rms(fewer(x), dense(x)) > 10 * relative_rms(layer(x), dense(x))


class Spy(PruneConfig):
    """Keeps what it is fitted to."""

    def fit(self, dense, data, **options):
        seen.append((dense, list(data)))
        return super().fit(dense, data, **options)


seen: list = []


def test_the_other_row_is_fitted_to_what_the_other_neurons_contribute():
    dense = block(dtype=torch.float64)
    seen.clear()
    layer = fitted(FFSplitConfig(of=Spy(), budget=0.5, heavy=0.1), dense)
    ((rest, chunks),) = seen
    assert rest.hidden_features == H - layer.heavy.hidden_features
    for x, y, _ in chunks:  # the rest's part of the output, the output's bias with it
        assert_close(y, rest(x))


@pytest.mark.parametrize("of", INNER, ids=lambda of: f"{of.name} {getattr(of, 'merge', '')}")
def test_the_joint_readout_is_the_best_for_both_parts(of):
    """No readout of the same features does better, least of all that of the parts one after the other."""
    dense = block(dtype=torch.float64)
    config = FFSplitConfig(of=of, budget=0.7)
    layer = fitted(config, dense)
    assert isinstance(layer, SplitFFN)
    x = tokens(3000, dtype=torch.float64)
    with torch.no_grad():
        y, features = dense(x), layer.features(x)
        assert_close(layer(x), layer.readout(features))
        best = torch.linalg.lstsq(features - features.mean(0), y - y.mean(0)).residuals.sum()
        best = best if best.numel() and best > 0 else (y - layer(x)).square().sum()
        heavy, rest = layer.heavy, layer.rest
        kept = [int((dense.up.weight == row).all(1).nonzero()) for row in heavy.up.weight]
        heavy_alone = part_of(dense, torch.tensor(kept), bias=False)
        target = y - heavy_alone(x)
        rest.fit_readout([(x, target, None)])
        apart = (heavy_alone(x) + rest(x) - y).square().sum()
        joint = (fitted(config, dense)(x) - y).square().sum()
    assert joint < apart
    assert joint <= 1.05 * best


@pytest.mark.parametrize("of", [Int8Config(), Bf16Config(), Int8Config(of=PruneConfig())], ids=str)
def test_a_rest_without_readout_is_added_to_and_the_heavy_part_makes_up_for_it(of):
    """The paper's own use with quantisation: heavy neurons keep their precision."""
    dense = block()
    budget = None if of.only_budget else 0.7
    layer = fitted(FFSplitConfig(of=of, budget=budget, heavy=0.2), dense)
    assert isinstance(layer, SplitFFN) and layer.readout is None
    x = tokens(3000)
    with torch.no_grad():
        assert torch.equal(layer.features(x), layer.reference(x))
        error = relative_rms(layer(x), dense(x))
        if of.only_budget:
            assert error < relative_rms(of.fit(dense, [], generator=generator())(x), dense(x))
        plain = part_of(dense, torch.arange(48), bias=False)
        layer.heavy.set_readout(plain.down.weight, plain.down.bias)
        worse = relative_rms(layer(x), dense(x))
        layer.fit_readout(stream(dense, x))
        assert relative_rms(layer(x), dense(x)) < worse


def test_budgets():
    dense = block()
    for heavy in (0.05, 0.1, 0.2):
        layer = FFSplitConfig(budget=0.3, heavy=heavy).build(dense, generator=generator())
        assert layer.heavy.hidden_features == round(heavy * H)
        one_rank_less = 2 * (D + 0.95 * H)
        assert 0.3 * dense.macs_per_token - one_rank_less < layer.macs_per_token <= 0.3 * dense.macs_per_token
    with pytest.raises(eugen.BudgetTooSmall, match="'ffsplit' with heavy=0.5.*the least is 0.51"):
        FFSplitConfig(budget=0.3, heavy=0.5).build(dense, generator=generator())
    for options, message in [
        ({"heavy": 0.0}, "heavy=0.0 must be in"),
        ({"heavy": 1.0}, "heavy=1.0 must be in"),
        ({"budget": 0.3, "of": PruneConfig(budget=0.2)}, "give one of them"),
        ({"budget": 0.3, "of": DenseConfig()}, "of='dense' has one size only, budget=1"),
    ]:
        with pytest.raises(ValueError, match=message):
            FFSplitConfig(**options)
    assert FFSplitConfig(of=Int8Config()).only_budget == 1


def test_sizes_of_the_inner_row_are_taken_as_they_are():
    layer = fitted(FFSplitConfig(of=LowRankConfig(rank=5), heavy=0.1), block())
    assert layer.rest.v1.out_features == 5 and layer.num_features == H // 10 + 5
    half = fitted(FFSplitConfig(of=PruneConfig(budget=0.5), heavy=0.1), block())
    assert half.rest.hidden_features == (H - H // 10) // 2


@pytest.mark.parametrize("form", [{"gated": True}, {"bias": False}], ids=str)
def test_other_forms(form):
    dense = block(**form)
    layer, x = fitted(FFSplitConfig(of=PruneConfig(), budget=0.9), dense), tokens(500, seed=7)
    assert count_macs(lambda: layer(x)) == 500 * layer.macs_per_token <= 0.9 * 500 * dense.macs_per_token
    assert relative_rms(layer(x), dense(x)) < 0.5
    with pytest.raises(eugen.UnsuitableBlock, match="'ffsplit'"):
        FFSplitConfig(of=LowRankConfig(rank=2)).build(block(whole=False), generator=generator())


def test_the_refused_form_of_the_inner_row_is_named_with_both():
    with pytest.raises(eugen.UnsuitableBlock, match="'ffsplit'.*'low_rank'"):
        FFSplitConfig(budget=0.5).build(block(gated=True), generator=generator())


def test_a_block_of_too_few_neurons_for_a_heavy_one_is_the_inner_row():
    dense = block(D, 9)
    layer = fitted(FFSplitConfig(of=PruneConfig(), budget=0.5, heavy=0.1), dense, 300)
    expected = PruneConfig(budget=0.5).fit(dense, stream(dense, tokens(300)), generator=generator())
    assert_close(layer(tokens(9)), expected(tokens(9)))


def test_merging_changes_nothing():
    layer = fitted(FFSplitConfig(of=EUGenConfig(merge=False, num_features=20), heavy=0.1), block())
    merged = layer.merged()
    assert merged.macs_per_token < layer.macs_per_token and merged.merged() is merged
    assert_close(merged(tokens(63)), layer(tokens(63)))
    assert_close(merged.readout.weight, layer.readout.weight)


@pytest.mark.parametrize("widths", [(64, 256, 8, 64), (64, 128, 128, 128, 64)], ids=str)
def test_a_bundled_stack_keeps_the_budget(widths):
    """Its MACs are those of all its layers, more or fewer than its first layer and an output matrix have."""
    maps = [m for n, to in itertools.pairwise(widths) for m in (nn.Linear(n, to), nn.ReLU())][:-1]
    layer = bundle(nn.Sequential(*maps), FFSplitConfig(budget=0.7), [tokens(600, 64)])
    assert layer.macs_per_token <= 0.7 * sum(n * to for n, to in itertools.pairwise(widths))
