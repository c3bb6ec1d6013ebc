"""Plans: one configuration for each block, written down and read again."""

from __future__ import annotations

import json

import pytest
import torch

import eugen
from eugen import EUGenConfig, FFSplitConfig, Int8Config, LowRankConfig, Plan, PruneConfig, find_ffns, replace
from eugen.plan import config_data, config_from_data
from tests.eugen.models import chain, vectors

CONFIGS = {
    "sizes": PruneConfig(hidden_features=24),
    "options": EUGenConfig(budget=0.3, order=1, projection="teacher", norm_slot=False),
    "a layer in a layer": Int8Config(budget=0.4, of=FFSplitConfig(of=LowRankConfig(), heavy=0.2)),
    "a layer that is not the default": FFSplitConfig(budget=0.5, of=PruneConfig()),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_plan_is_read_as_it_was_written(config):
    plan = Plan({"a.b": config}, {"macs_ratio": 0.3})
    assert Plan.from_json(plan.to_json()) == plan


def test_every_layer_can_be_written_down():
    for name, config in eugen.layers().items():
        made = config()
        assert config_from_data(config_data(made)) == made, name
        assert config_data(made) == {"layer": name}


def written(**section):
    return json.dumps({"format": 1, "blocks": {"a": section}, "figures": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan"),
        ("[]", "not a plan of format 1"),
        ('{"format": 2}', "not a plan of format 1"),
        (written(layer="magic"), "'magic' is unknown: use one of"),
        (written(layer="prune", wide=3), "no field 'wide'"),
        (written(layer="prune", budget=3), "budget=3 must be"),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def two_blocks():
    return torch.nn.Sequential(chain(12, 48), chain(12, 48, act=torch.nn.Tanh)).eval()


def test_each_block_gets_its_own_layer_and_the_others_stay():
    model = two_blocks()
    names = [site.name for site in find_ffns(model)]
    result = replace(model, {names[1]: PruneConfig(hidden_features=16)}, calibration=vectors())
    assert [site.name for site in result.sites] == [names[1]]
    assert [site.name for site in find_ffns(result.model)] == [names[0]]
    both = replace(model, {names[1]: LowRankConfig(budget=0.5), names[0]: PruneConfig(budget=0.5)})
    assert [site.layer.num_features for site in both.sites] != [24, 24]
    assert [site.name for site in both.sites] == names


@pytest.mark.parametrize("plan", [{}, {"nowhere": PruneConfig(budget=0.5)}])
def test_a_plan_of_another_model_is_refused(plan):
    with pytest.raises(ValueError, match=r"its blocks are 0\.0, 1\.0"):
        replace(two_blocks(), plan)


class Interrupted(dict):
    """Keeps one block, then stops the work."""

    def __setitem__(self, name, block):
        super().__setitem__(name, block)
        raise KeyboardInterrupt


@pytest.mark.parametrize("config", [PruneConfig(budget=0.4), EUGenConfig(budget=0.4)])
def test_an_interrupted_transfer_goes_on_where_it_was(config):
    model, options = two_blocks(), {"calibration": vectors(), "refine_steps": 5, "seed": 4}
    whole, lines = replace(model, config, **options), []
    finished = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        replace(model, config, **options, finished=finished)
    assert len(finished) == 1
    resumed = replace(model, config, **options, finished=dict(finished), progress=lines.append)
    assert len(lines) == 1
    assert [site.fit_r2 for site in resumed.sites] == [site.fit_r2 for site in whole.sites]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_block_is_fitted_alike_whatever_else_is_replaced():
    wider = two_blocks()
    config, options = EUGenConfig(budget=0.4), {"calibration": vectors(), "seed": 4}
    alone = replace(wider, {"0.0": config}, **options).sites[0].layer
    both = replace(wider, config, **options).sites[0].layer
    assert torch.equal(alone.readout.weight, both.readout.weight)
    other = replace(wider, config, **options).sites[1].layer
    assert not torch.equal(both.map.projection.weight, other.map.projection.weight)
