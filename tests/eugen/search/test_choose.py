"""The whole search: where the budget goes, that the target is kept, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from timm.layers import Mlp, SwiGLU
from torch import nn

from eugen import (
    DenseConfig,
    FFNLayer,
    LinearConfig,
    LowRankAwareConfig,
    Plan,
    PruneConfig,
    find_ffns,
    replace,
)
from eugen.cost import count_macs
from eugen.search import Target, Unreachable, choose
from eugen.search.calibration import divided
from tests.eugen.blocks import stream, tokens
from tests.eugen.models import bert, call_bert, chain, sentences, vectors
from tests.eugen.search.networks import Pooled, Twice, parallel
from tests.tolerances import relative_rms

FEW = [PruneConfig(), LinearConfig()]


def ratios(plan: Plan) -> list[float]:
    return [block["macs_ratio"] for block in plan.figures["blocks"].values()]


@pytest.mark.parametrize("scales", [(1.0, 10.0), (10.0, 1.0)])
@pytest.mark.parametrize("target", [Target(macs=0.3), Target(parameters=0.4)])
def test_the_block_that_matters_more_gets_more(scales, target):
    plan = choose(parallel(*scales), vectors(8), target=target)
    little, much = ratios(plan)[scales.index(1.0)], ratios(plan)[scales.index(10.0)]
    assert much > 1.5 * little


def test_the_plan_is_better_than_the_same_budget_everywhere():
    model, unseen = parallel(1.0, 6.0, 0.3), tokens(2000, 12, seed=77)
    plan = choose(model, vectors(8), target=Target(macs=0.4), candidates=[PruneConfig()])

    def error(config):
        return relative_rms(replace(model, config, calibration=vectors(8)).model(unseen), model(unseen))

    assert error(plan.blocks) < 0.8 * error(PruneConfig(budget=0.4))


def test_methods_are_judged_by_what_refinement_leaves(monkeypatch):
    """A method that refinement would make perfect is chosen, though its closed form is the worst."""
    model, batches = parallel(1.0, 1.0), vectors(8)
    target = Target(macs=0.3)

    def perfect(self, layer, dense, data, **_):
        return DenseConfig().fit(dense, (), generator=torch.Generator())

    names = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(LowRankAwareConfig, "refine", perfect)
        candidates = [PruneConfig(), LowRankAwareConfig()]
        for steps in (0, 3):
            plan = choose(model, batches, target=target, candidates=candidates, refine_steps=steps)
            names.append({config.name for config in plan.blocks.values()})
    assert names[0] == names[1] == names[2] == {"prune"}
    assert names[3] == {"low_rank_aware"}


def test_what_is_far_behind_on_one_block_is_not_looked_at_on_the_others():
    model, batches = parallel(1.0, 1.0, 1.0), vectors(8)
    figures = choose(model, batches, target=Target(macs=0.4)).figures["blocks"]
    first, looked_at, last = ({row["candidate"] for row in b["alternatives"]} for b in figures.values())
    assert first == last < looked_at
    seen = list(figures.values())[1]["alternatives"]
    for name in looked_at - first:
        for row in (row for row in seen if row["candidate"] == name):
            no_dearer = [other for other in seen if other["macs_ratio"] <= row["macs_ratio"]]
            assert row["local_error"] > 1.2 * min(other["local_error"] for other in no_dearer)


def test_candidates_that_are_given_are_looked_at_everywhere():
    given = [PruneConfig(), LowRankAwareConfig()]
    plan = choose(parallel(1.0, 1.0), vectors(8), target=Target(macs=0.5), candidates=given)
    for block in plan.figures["blocks"].values():
        assert {row["candidate"] for row in block["alternatives"]} == {"prune", "low_rank_aware", "dense"}


def test_only_the_blocks_asked_for_are_replaced():
    model = parallel(1.0, 1.0, 1.0)
    names = [site.name for site in find_ffns(model)]
    plan = choose(model, vectors(8), target=Target(macs=0.3), where=lambda site: site.index >= 1)
    assert set(plan.blocks) == set(names[1:]) == set(plan.figures["blocks"])
    assert plan.figures["predicted"]["macs_ratio"] <= 0.3


def macs_of(model: nn.Module, batch: torch.Tensor) -> int:
    return count_macs(lambda: model(batch))


@pytest.mark.parametrize("value", [0.15, 0.5, 1.0])
def test_the_built_model_keeps_a_target_of_macs(value):
    """Counted by torch, not by the layers; blocks that see fewer tokens weigh less."""
    batch = vectors(1, 160)[0]
    for model in (parallel(1.0, 3.0), Pooled().eval()):
        plan = choose(model, vectors(8), target=Target(macs=value), candidates=FEW)
        ratio = macs_of(replace(model, plan.blocks).model, batch) / macs_of(model, batch)
        assert ratio <= value + 1e-9
        assert ratio == pytest.approx(plan.figures["predicted"]["macs_ratio"], rel=0.02)
        assert ratio > 0.7 * value


@pytest.mark.parametrize("value", [0.2, 0.6])
def test_the_built_model_keeps_a_target_of_parameters(value):
    model = parallel(1.0, 3.0)
    plan = choose(model, vectors(8), target=Target(parameters=value), candidates=FEW)
    new = replace(model, plan.blocks).model
    count, dense = (sum(p.numel() for p in m.parameters()) for m in (new, model))
    assert count / dense == pytest.approx(plan.figures["predicted"]["params_ratio"])
    assert 0.7 * value < count / dense <= value


def test_effects_are_those_measured_by_hand():
    model, batches = parallel(1.0, 2.0), vectors(9)
    plan = choose(model, batches, target=Target(macs=0.5), candidates=FEW)
    held_out, fitted = batches[7], [*batches[:7], batches[8]]
    for site in find_ffns(model):
        rows = plan.figures["blocks"][site.name]["alternatives"]
        measured = [row for row in rows if row["measured"] and row["candidate"] != "dense"]
        assert len(measured) == 4  # the map, and three sizes of the other
        for row in measured:
            config = PruneConfig(budget=row["budget"]) if row["candidate"] == "prune" else LinearConfig()
            data = stream(site.dense, torch.cat(fitted), chunk=150)
            layer = config.fit(site.dense, data, generator=torch.Generator())
            with torch.no_grad():
                change = model.scales[site.index] * (layer(held_out) - site.dense(held_out))
                effect = float(change.square().sum() / model(held_out).square().sum())
                left = site.dense(held_out) - site.dense(held_out).mean(0)
                error = float((layer(held_out) - site.dense(held_out)).square().sum() / left.square().sum())
            assert row["output_effect"] == pytest.approx(effect, rel=1e-3)
            assert row["local_error"] == pytest.approx(error, rel=1e-3)


def test_figures_say_what_was_chosen_and_what_it_cost():
    model, batches, lines = parallel(1.0, 3.0), vectors(8), []
    plan = choose(model, batches, target=Target(macs=0.4), progress=lines.append)
    blocks = plan.figures["blocks"]
    assert list(blocks) == [site.name for site in find_ffns(model)] and len(lines) == 3
    assert plan.figures["target"] == {"macs": 0.4}
    total = sum(block["output_effect"] for block in blocks.values())
    assert plan.figures["predicted"]["output_error"] == pytest.approx(total)
    for name, block in blocks.items():
        chosen = {key: value for key, value in block.items() if key != "alternatives"}
        assert chosen in block["alternatives"]
        assert (name in plan.blocks) == (block["candidate"] != "dense")
    layers_tried = sum(row["measured"] for b in blocks.values() for row in b["alternatives"][:-1])
    assert plan.figures["forward_passes"] == {"fitted batches": 7, "held-out batches": 2 + layers_tried}
    assert Plan.from_json(plan.to_json()) == plan


def test_the_same_call_gives_the_same_plan_and_leaves_the_model_as_it_was():
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    plans = [
        choose(model, sentences(8), target=Target(macs=0.4), call=call_bert, seed=3).figures for _ in range(2)
    ]
    first, second = (json.dumps({k: v for k, v in p.items() if k != "seconds"}) for p in plans)
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and len(find_ffns(model)) == 2


def test_the_model_may_be_the_block():
    model = Mlp(12, 48).eval()
    plan = choose(model, vectors(8), target=Target(macs=0.4), candidates=FEW)
    assert list(plan.blocks) == [""]
    assert isinstance(replace(model, plan.blocks).model, FFNLayer)


def test_with_everything_allowed_all_stays_dense_and_can_be_built():
    plan = choose(parallel(1.0, 2.0), vectors(4), target=Target(macs=1), candidates=FEW)
    assert {config.name for config in plan.blocks.values()} == {"dense"}
    assert replace(parallel(1.0, 2.0), plan.blocks).sites[0].macs_ratio == 1


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (list(range(20)), [7, 15]),
        (list(range(8)), [7]),
        (list(range(5)), [4]),
        (list(range(2)), [1]),
    ],
)
def test_one_batch_in_eight_judges(batches, expected):
    fitted, held_out = divided(batches)
    assert held_out == expected and sorted([*fitted, *held_out]) == batches


def test_a_single_batch_is_cut_inside():
    batch = {"ids": torch.arange(20)[:, None], "scale": torch.ones(3), "flag": True}
    (fitted,), (held_out,) = divided([batch])
    assert torch.equal(torch.cat([fitted["ids"], held_out["ids"]]), batch["ids"])
    assert len(held_out["ids"]) == 2 and torch.equal(held_out["scale"], batch["scale"])
    plan = choose(chain(12, 48).eval(), [tokens(900, 12)], target=Target(macs=0.4), candidates=FEW)
    assert plan.figures["predicted"]["output_error"] > 0


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration data are empty"),
        ([torch.ones(1, 12)], "one batch of one sample"),
        ([torch.full((40, 12), torch.nan)] * 3, "NaN or infinity at block"),
    ],
)
def test_calibration_that_does_not_serve(calibration, message):
    with pytest.raises(ValueError, match=message):
        choose(parallel(1.0, 2.0), calibration, target=Target(macs=0.5))


def test_a_target_out_of_reach_names_the_best():
    model, options = parallel(1.0, 2.0), {"calibration": vectors(4), "candidates": FEW}
    with pytest.raises(
        Unreachable, match=r"macs=0\.001 is out of reach: the best reachable is 0\.04167"
    ) as found:
        choose(model, target=Target(macs=0.001), **options)
    assert found.value.best == pytest.approx(2 / 48)  # a twentieth of 48 neurons
    plan = choose(model, target=Target(macs=found.value.best), **options)
    assert plan.figures["predicted"]["macs_ratio"] == pytest.approx(found.value.best)


def test_no_candidate_takes_any_block():
    model = nn.Sequential(SwiGLU(12, 48), nn.LayerNorm(12)).eval()
    with pytest.raises(ValueError, match="no candidate takes a block of this model: 0 would stay dense"):
        choose(model, vectors(4), target=Target(macs=0.5), candidates=[LowRankAwareConfig()])
    plan = choose(model, vectors(8), target=Target(macs=0.5))
    assert set(plan.blocks) == {"0"}


def test_replaced_and_shared_blocks():
    model = parallel(1.0, 2.0)
    first = find_ffns(model)[0].name
    with pytest.raises(ValueError, match="2 modules .* replaced already"):
        choose(replace(model, PruneConfig(budget=0.5)).model, vectors(4), target=Target(macs=0.5))
    partly = replace(model, {first: PruneConfig(budget=0.5)}).model
    plan = choose(partly, vectors(4), target=Target(macs=0.5), candidates=FEW)
    assert list(plan.figures["blocks"]) == [find_ffns(model)[1].name]
    with pytest.raises(ValueError, match="ran twice in one forward pass"):
        choose(Twice().eval(), vectors(4), target=Target(macs=0.5))


def test_an_output_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"output \(str\) holds no floating-point tensor"):
        choose(chain(12, 48), vectors(4), target=Target(macs=0.5), call=lambda m, b: str(m(b).shape))
    with pytest.raises(ValueError, match="is 0 or not finite"):
        choose(chain(12, 48), vectors(4), target=Target(macs=0.5), call=lambda m, b: 0 * m(b))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "given was nothing"),
        ({"macs": 0.5, "speedup": 2.0}, r"given was macs=0\.5, speedup=2\.0"),
        ({"macs": 0.0}, r"macs=0\.0 must be in"),
        ({"parameters": 1.2}, r"parameters=1\.2 must be in"),
        ({"speedup": 1.0}, r"speedup=1\.0 must be above 1"),
        ({"speedup": float("nan")}, "speedup=nan must be above 1"),
    ],
)
def test_targets_outside_their_range(given, message):
    with pytest.raises(ValueError, match=message):
        Target(**given)
