"""`compress`: the target is met, no more calibration is read than the level asks for, `best` distils."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import eugen
from eugen import EUGenConfig, Level, LinearConfig, LowRankConfig, PruneConfig, Target, find_ffns
from eugen.compression.compress import carry_out, level_of, plan_for
from eugen.compression.tokens import enough, tokens_through
from eugen.ffn import FFNLayer
from eugen.search import Unreachable
from eugen.timing import PairedLatency, PlacedLatency
from tests.eugen.models import chain, images, vectors, vit

QUICK = Level("quick", tokens_per_feature=4, refine_steps=0)


def two_blocks():
    return nn.Sequential(chain(12, 48), chain(12, 48, act=nn.Tanh)).eval()


def compress(target, row=None, **options):
    row = PruneConfig() if row is None else row
    return eugen.compress(two_blocks(), vectors(), **{"target": target, "row": row, "level": QUICK} | options)


@pytest.mark.parametrize("row", [PruneConfig(), LowRankConfig(), EUGenConfig()])
@pytest.mark.parametrize("wanted", [0.3, 0.55])
def test_a_fraction_of_macs_is_kept_and_used(row, wanted):
    done = compress(Target(macs=wanted), row)
    macs = sum(site.layer.macs_per_token for site in done.sites)
    dense = sum(site.dense.macs_per_token for site in find_ffns(two_blocks()))
    assert 0.6 * wanted < macs / dense <= wanted
    figures = done.plan.figures
    assert figures["ffn_macs_per_token"] == figures["replaced_macs_per_token"] == macs
    assert figures["macs_per_token_ratio"] == macs / dense
    assert figures["target"] == {"macs": wanted}
    assert done.model(vectors()[0]).isfinite().all()


@pytest.mark.parametrize("row", [PruneConfig(), LowRankConfig()])
def test_a_fraction_of_parameters_is_kept_and_used(row):
    wanted = 0.5
    done = compress(Target(parameters=wanted), row)
    dense = sum(site.dense.num_parameters() for site in find_ffns(two_blocks()))
    assert sum(site.layer.num_parameters() for site in done.sites) <= wanted * dense
    config = next(iter(done.plan.blocks.values()))
    # The least larger budget that buys another unit is too much.
    more = dataclasses.replace(config, budget=round(config.budget + 0.001, 3))
    larger = eugen.replace(two_blocks(), more)
    assert sum(site.layer.num_parameters() for site in larger.sites) > wanted * dense


def simulated(monkeypatch, overhead):
    """A clock on which a model takes as long as its blocks' MACs, and something beside."""
    import eugen.timing

    def compare(base, other, **_):
        ms = [sum(m.macs_per_token for m in blocks(model)) + overhead for model in (base, other)]
        return PlacedLatency([PairedLatency([ms[0]] * 2, [ms[1]] * 2)] * 3)

    def blocks(model):
        replaced = [module for module in model.modules() if isinstance(module, FFNLayer)]
        return replaced or [site.dense for site in find_ffns(model)]

    monkeypatch.setattr(eugen.timing, "compare_models", compare)
    monkeypatch.setattr(eugen.timing, "placed", lambda model, example, call: model)
    return lambda model: sum(m.macs_per_token for m in blocks(model)) + overhead


def test_a_speedup_is_met_by_the_largest_blocks_that_do(monkeypatch):
    milliseconds = simulated(monkeypatch, 1000.0)
    lines: list[str] = []
    done = compress(Target(speedup=1.4), progress=lines.append)
    reached = milliseconds(two_blocks()) / milliseconds(done.model)
    assert 1.4 <= reached < 1.6
    assert sum("×" in line for line in lines) == 6


def test_a_speedup_out_of_reach_names_the_best(monkeypatch):
    simulated(monkeypatch, 10_000.0)
    with pytest.raises(Unreachable, match=r"speedup=1.4 is out of reach: the best .* is 1\.\d+.*'prune'"):
        compress(Target(speedup=1.4))


def test_parameters_out_of_reach_name_the_best():
    with pytest.raises(Unreachable, match=r"parameters=0.01 is out of reach.*'prune'"):
        compress(Target(parameters=0.01))


def test_a_plan_may_leave_blocks_dense():
    model = two_blocks()
    name = find_ffns(model)[1].name
    done = carry_out(model, vectors(), eugen.Plan({name: PruneConfig(hidden_features=24)}), level=QUICK)
    figures = done.plan.figures
    assert figures["replaced_macs_per_token"] == 2 * 12 * 24
    assert figures["ffn_macs_per_token"] == 2 * 12 * 24 + 2 * 12 * 48


class Counting(list):
    """Batches that remember how often each was read."""

    def __init__(self, batches):
        super().__init__(batches)
        self.read = [0] * len(batches)

    def __iter__(self):
        for index in range(len(self)):
            self.read[index] += 1
            yield self[index]


def test_no_more_is_read_than_the_level_asks_for():
    batches = Counting(vectors(6, 20))
    level = Level("some", tokens_per_feature=2, refine_steps=0)
    taken, said = enough(two_blocks(), {"0.0": PruneConfig(hidden_features=24)}, batches, level, call, None)
    assert said == {"calibration_tokens": 60, "calibration_tokens_wanted": 48}
    assert len(taken) == 3 and batches.read == [1, 1, 1, 0, 0, 0]


def call(model, batch):
    return model(batch)


def test_too_few_tokens_say_how_many_are_needed():
    with pytest.raises(ValueError, match="20 tokens, too few for 24 features: give at least 48, better 96"):
        eugen.compress(two_blocks(), vectors(1, 20), target=Target(macs=0.5), row=PruneConfig(), level=QUICK)


class Pooled(nn.Module):
    """A wide block on every token, a narrow one on the mean of each example's, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.idle = chain(12, 48), chain(12, 16), chain(12, 16)

    def forward(self, x):
        return self.narrow(self.wide(x).mean(1))


def test_each_block_needs_its_own_tokens_only():
    level, half = Level("some", tokens_per_feature=20, refine_steps=0), PruneConfig(budget=0.5)
    batches = list(torch.randn(40, 8, 50, 12))
    taken, said = enough(Pooled(), {"wide.0": half, "narrow.0": half}, batches, level, call, None)
    assert len(taken) == 8 * 20 // 8 and said == {
        "calibration_tokens": 160,
        "calibration_tokens_wanted": 160,
    }
    few = "give block narrow.0 8 tokens, too few for 8 features: give at least 16"
    with pytest.raises(ValueError, match=few):
        enough(Pooled(), {"wide.0": half, "narrow.0": half}, batches[:1], level, call, None)
    with pytest.raises(ValueError, match="block idle.0 did not run"):
        enough(Pooled(), {"wide.0": half, "idle.0": half}, batches, level, call, None)


def test_a_row_whose_size_no_target_can_choose_is_refused():
    narrow = nn.Sequential(chain(24, 8), chain(24, 8))
    for target in (Target(parameters=0.9), Target(speedup=1.1)):
        with pytest.raises(ValueError, match="least layer of 'linear' costs 1.5 times a block"):
            plan_for(narrow, vectors(d=24), target=target, row=LinearConfig())
        with pytest.raises(ValueError, match="leave it out of PruneConfig"):
            plan_for(two_blocks(), vectors(), target=target, row=PruneConfig(hidden_features=8))


def test_less_than_the_level_asks_for_is_said():
    lines: list[str] = []
    compress(Target(macs=0.5), level=Level("much", 100, 0), progress=lines.append)
    assert "600 tokens in 4 batches; the level asks for 2400" in lines[0]


def test_tokens_are_those_that_pass_each_block():
    model = vit()
    counted = tokens_through(model, find_ffns(model), images(1, 3)[0], call)
    assert set(counted.values()) == {3 * (2 * 2 + 1)}  # 16 px in patches of 8, and the class token
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).train()
    encoder.layers[1].eval()
    with torch.no_grad():
        counted = tokens_through(encoder, find_ffns(encoder), torch.randn(3, 5, 16), call)
    assert set(counted.values()) == {15}
    assert encoder.training and not encoder.layers[1].training


def test_distillation_brings_the_network_nearer_and_the_layers_are_its_own():
    model, batches = two_blocks(), vectors(8, 60)
    plan = plan_for(model, batches, target=Target(macs=0.4), row=PruneConfig())
    alone = carry_out(model, batches, plan, level=QUICK)
    best = carry_out(model, batches, plan, level=dataclasses.replace(QUICK, distill_steps=60))
    held_out = vectors(10, 60)[9]
    wanted = model(held_out)

    def error(done):
        with torch.no_grad():
            return float((done.model(held_out) - wanted).norm())

    assert error(best) < error(alone)
    assert all(site.layer is best.model.get_submodule(site.name) for site in best.sites)
    said = best.measured["distillation"]
    assert said["validation_loss_after"] < said["validation_loss_before"]


def test_distillation_needs_a_batch_to_choose_by():
    level = dataclasses.replace(QUICK, distill_steps=1)
    with pytest.raises(ValueError, match="give two batches, or validation="):
        eugen.compress(two_blocks(), vectors(1, 300), target=Target(macs=0.4), row=PruneConfig(), level=level)


def test_bad_input_is_refused_before_any_work():
    with pytest.raises(ValueError, match="level='slow' is unknown: use one of fast, standard, best"):
        compress(Target(macs=0.5), level="slow")
    assert level_of("fast").name == "fast"
    with pytest.raises(ValueError, match="calibration data are empty"):
        eugen.compress(two_blocks(), [], target=Target(macs=0.5), row=PruneConfig())
    with pytest.raises(ValueError, match="no feed-forward block found"):
        eugen.compress(nn.Linear(3, 3), vectors(), target=Target(macs=0.5), row=PruneConfig())
    with pytest.raises(eugen.BudgetTooSmall):
        compress(Target(macs=0.001))
