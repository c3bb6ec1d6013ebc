"""Parameters, MACs and bytes against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import eugen
from eugen import Bf16Config, EUGenConfig, LinearConfig, replace
from eugen.cost import call_cost, count_macs, model_cost
from eugen.features import SHARING
from tests.eugen.blocks import block, generator, tokens
from tests.eugen.models import bert, call_bert, chain, images, sentences, vectors, vit


def plain(model, batch):
    return model(batch)


def test_vit_by_hand():
    d, h, depth, batch, classes = 32, 128, 2, 12, 7
    patches = (16 // 8) ** 2
    seen = patches + 1
    macs = batch * (
        patches * 3 * 8 * 8 * d  # patch embedding
        + depth * (seen * (4 * d * d + 2 * d * h) + 2 * seen * seen * d)  # projections, block, attention
        + d * classes
    )
    linear = {"patches": 3 * 64 * d + d, "head": d * classes + classes}
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * h + h) + (h * d + d) + 2 * 2 * d
    params = sum(linear.values()) + depth * block + 2 * d + seen * d + d  # last norm, positions, class token
    cost = model_cost(vit().eval(), images()[0], plain)
    assert (cost.params, cost.macs, cost.weight_bytes) == (params, macs, 4 * params)
    assert cost.ffn_params == depth * (2 * d * h + h + d)
    assert cost.ffn_macs == depth * 2 * d * h


def test_bert_by_hand():
    d, h, depth, batch, length = 32, 64, 2, 8, 9
    macs = batch * (
        depth * (length * (4 * d * d + 2 * d * h) + 2 * length * length * d) + d * d
    )  # and pooler
    cost = model_cost(bert().eval(), sentences()[0], call_bert)
    assert cost.macs == macs
    assert cost.ffn_macs == depth * 2 * d * h
    layer = 4 * (d * d + d) + (d * h + h) + (h * d + d) + 2 * 2 * d
    embeddings = (50 + 512 + 2) * d + 2 * d
    buffers = 2 * 512  # position and token type numbers
    assert cost.params == embeddings + depth * layer + d * d + d + buffers
    assert cost.weight_bytes == 4 * (cost.params - buffers) + 8 * buffers


@pytest.mark.parametrize("config", [EUGenConfig(budget=0.3), LinearConfig(budget=0.3)])
def test_a_replaced_model_saves_what_its_blocks_save(config):
    model, batch = vit().eval(), images()[0]
    result = eugen.replace(model, config)
    before, after = model_cost(model, batch, plain), model_cost(result.model, batch, plain)
    seen = len(batch) * 5
    assert before.macs - after.macs == seen * (before.ffn_macs - after.ffn_macs)
    assert before.params - after.params == before.ffn_params - after.ffn_params
    assert after.ffn_macs / before.ffn_macs == pytest.approx(
        sum(site.macs_ratio for site in result.sites) / len(result.sites)
    )


def test_shared_weights_count_once():
    linear = nn.Linear(12, 12)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    cost = model_cost(model, vectors()[0], plain)
    assert cost.params == 12 * 12 + 12
    assert cost.macs == len(vectors()[0]) * 2 * 12 * 12
    assert model_cost(model.bfloat16(), vectors()[0].bfloat16(), plain).weight_bytes == 2 * cost.params


def test_buffers_are_weights():
    fixed = eugen.replace(chain(), EUGenConfig(budget=0.6, trainable=False)).model
    free = eugen.replace(chain(), EUGenConfig(budget=0.6)).model
    costs = [model_cost(m, vectors()[0], plain) for m in (fixed, free)]
    assert costs[0] == costs[1]


def test_counting_takes_no_gradients():
    modes = []
    x = torch.zeros(3, 4, requires_grad=True)

    def function():
        modes.append(torch.is_grad_enabled())
        return x @ torch.zeros(4, 5)

    assert count_macs(function) == 3 * 4 * 5
    assert modes == [False]


def test_a_layer_inside_another_is_counted_once():
    batch = torch.zeros(3, 12)
    model = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12))
    inner = EUGenConfig(budget=0.5)
    models = [replace(model, config).model for config in (inner, Bf16Config(of=inner))]
    costs = [model_cost(each, batch, plain) for each in models]
    assert costs[0].ffn_macs == costs[1].ffn_macs
    assert costs[0].ffn_params == costs[1].ffn_params


@pytest.mark.parametrize("sharing", SHARING)
def test_products_inside_the_fused_operator_count_as_those_outside(sharing):
    dense, x = block(24, 96), tokens(5, 24)
    config = EUGenConfig(num_features=7, order=3, sharing=sharing, direct_linear=sharing == "shared")
    found = []
    for kernel in ("fused", "composed"):
        layer = dataclasses.replace(config, kernel=kernel).build(dense, generator=generator()).eval().merged()
        assert layer.map.fused == (kernel == "fused")
        assert count_macs(lambda layer=layer: layer(x)) == 5 * layer.macs_per_token
        cost = call_cost(lambda layer=layer: layer(x), layer)
        found.append((cost.macs, cost.weight_bytes, cost.io_bytes))
    assert found[0] == found[1]
