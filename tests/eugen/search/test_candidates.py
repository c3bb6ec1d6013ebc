"""Which sizes of which methods are looked at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eugen import (
    DenseConfig,
    EUGenConfig,
    FFSplitConfig,
    Int8Config,
    LinearConfig,
    LowRankConfig,
    NarrowConfig,
    PruneConfig,
)
from eugen.search.candidates import candidates_for, defaults, kept, sizes
from tests.eugen.blocks import block, generator

BLOCKS = {
    "plain": block(16, 64),
    "another activation": block(16, 64, act=nn.SiLU()),
    "gated": block(16, 48, gated=True, act=nn.SiLU()),
    "single layer": block(16, 64, whole=False),
}


@pytest.mark.parametrize("dense", BLOCKS.values(), ids=BLOCKS)
def test_every_size_is_built_at_the_cost_that_is_said(dense):
    found = sizes(dense, defaults(dense))
    for name, own in found.items():
        assert [each.macs for each in own] == sorted({each.macs for each in own}), name
        for each in own:
            layer = each.config.build(dense, generator=generator())
            assert (layer.macs_per_token, layer.num_parameters()) == (each.macs, each.parameters)
            assert each.macs <= each.budget * dense.macs_per_token + 1e-6
            assert each.candidate == name
    assert kept(dense).macs == dense.macs_per_token


@pytest.mark.parametrize(
    ("name", "absent", "present"),
    [
        ("plain", {"eugen_product", "eugen_univariate"}, {"prune + linear", "low_rank_aware"}),
        ("another activation", {"eugen_product"}, {"eugen_univariate"}),
        ("gated", {"low_rank_aware", "prune + low_rank_aware"}, {"eugen_product", "prune + linear"}),
        ("single layer", {"prune + linear", "prune + low_rank_aware"}, {"prune", "linear"}),
    ],
)
def test_what_suits_the_form_of_the_block(name, absent, present):
    found = set(sizes(BLOCKS[name], defaults(BLOCKS[name])))
    assert present <= found and not absent & found


def test_a_block_too_small_for_a_budget_is_offered_larger_ones_only():
    dense = block(4, 8)
    assert min(each.macs for each in sizes(dense, {"prune": PruneConfig()})["prune"]) == dense.macs_per_neuron


def test_given_candidates_get_names_of_their_own_and_sizes():
    given = [PruneConfig(), NarrowConfig(), PruneConfig(hidden_features=9), FFSplitConfig(of=LowRankConfig())]
    found = sizes(block(16, 64), candidates_for(block(16, 64), given))
    assert set(found) == {"prune", "narrow", "prune 2", "ffsplit(low_rank)"}
    assert [each.config for each in found["prune 2"]] == [PruneConfig(hidden_features=9)]
    assert len(found["prune"]) > 8


def test_a_budget_in_a_candidate_is_refused():
    with pytest.raises(ValueError, match=r"'prune' has budget=0\.3: leave it out"):
        candidates_for(block(16, 64), [LinearConfig(), PruneConfig(budget=0.3)])


def test_the_same_macs_in_another_precision_are_an_option():
    found = sizes(block(16, 64), candidates_for(block(16, 64), [DenseConfig(), Int8Config(of=DenseConfig())]))
    assert set(found) == {"int8(dense)"}


def test_an_impossible_candidate_says_why():
    config = EUGenConfig(num_features=500, order=1, projection="teacher")
    with pytest.raises(ValueError, match="500"):
        sizes(block(16, 64), {"eugen": config})


def test_the_block_is_left_as_it_was():
    dense = block(16, 64)
    before = copy.deepcopy(dense.state_dict())
    sizes(dense, defaults(dense))
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
