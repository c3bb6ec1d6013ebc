"""`map_layers`: every replaced block in another form, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eugen
from eugen import EUGenConfig, FFNLayer, replace
from tests.eugen.models import chain, images, vit


def test_map_layers_changes_every_layer_and_leaves_the_model_alone():
    model = replace(vit().eval(), EUGenConfig(budget=0.5)).model
    seen: list[FFNLayer] = []

    def quantised(layer: FFNLayer) -> FFNLayer:
        seen.append(layer)
        return eugen.Bf16Config().wrap(layer)

    changed = eugen.map_layers(model, quantised)
    layers = [name for name, module in model.named_modules() if isinstance(module, FFNLayer)]
    assert len(seen) == len(layers) == 2
    assert all(type(changed.get_submodule(name)).__name__ == "Bf16FFN" for name in layers)
    assert all(type(model.get_submodule(name)).__name__ == "EUGen" for name in layers)
    again = eugen.map_layers(changed, lambda layer: layer)
    with torch.no_grad():
        assert torch.equal(again(images()[0]), changed(images()[0]))
    assert not changed.training and len(seen) == 2, "the layer inside another one is not changed by itself"


def test_map_layers_of_a_model_that_is_one_layer_and_of_shared_layers():
    model = replace(chain(), EUGenConfig(budget=0.5)).model
    layer = next(module for module in model.modules() if isinstance(module, FFNLayer))
    assert type(eugen.map_layers(layer, eugen.Bf16Config().wrap)).__name__ == "Bf16FFN"
    shared = nn.ModuleList([layer, nn.Sequential(layer)])
    first, second = eugen.map_layers(shared, eugen.Bf16Config().wrap)
    assert first is second[0]


def test_map_layers_names_the_block_that_is_refused():
    model = replace(vit(), eugen.FFFConfig(budget=0.5)).model
    with pytest.raises(eugen.UnsuitableBlock, match=r"^block blocks\.0\.mlp: "):
        eugen.map_layers(model, eugen.Int8Config().wrap)
