"""A network in each precision that it may be deployed in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eugen
from eugen.parts.int8_linear import Int8Linear, WeightOnlyInt8Linear
from stages.deployment import between_float32, deployed, floating
from tests.eugen.models import images, vit
from tests.tolerances import relative_rms


def student(config: eugen.LayerConfig) -> nn.Module:
    return eugen.replace(vit(), config).model


def last(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images()[0])


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 0.03), ("float16", 0.01)])
def test_a_cast_network_takes_and_returns_float32(precision, allowed):
    model = student(eugen.EUGenConfig(budget=0.5))
    cast = deployed(model, precision, "cpu")
    assert {p.dtype for p in cast.parameters()} == {floating(precision)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the network given stays as it was"
    result, expected = last(between_float32(cast, precision)), last(model)
    assert result.dtype == torch.float32
    assert 0 < relative_rms(result, expected) < allowed


@pytest.mark.parametrize(
    ("precision", "kind"), [("int8", Int8Linear), ("int8_weight_only", WeightOnlyInt8Linear)]
)
@pytest.mark.parametrize("config", [eugen.DenseConfig(), eugen.EUGenConfig(budget=0.5)])
def test_every_linear_map_is_quantised(precision, kind, config):
    model = student(config)
    quantised = deployed(model, precision, "cpu")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name, module in quantised.named_modules() if isinstance(module, kind)]
    assert len(found) == len(linear) > 2 * 2 and any("attn" in name for name in found)
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == len(linear)
    assert floating(precision) == torch.float32
    assert 0 < relative_rms(last(quantised), last(model)) < 0.03


def test_float32_is_the_network_itself_merged():
    model = student(eugen.EUGenConfig(budget=0.6, merge=False))
    merged = deployed(model, "float32", "cpu")
    assert relative_rms(last(merged), last(model)) < 1e-5
    downs = [[m.down for m in network.modules() if hasattr(m, "down")] for network in (merged, model)]
    assert downs[0] == [None, None] and None not in downs[1]


def test_a_block_that_cannot_be_quantised_is_named():
    model = student(eugen.FFFConfig(budget=0.5))
    with pytest.raises(eugen.UnsuitableBlock, match=r"block blocks\.0\.mlp.*bf16"):
        deployed(model, "int8", "cpu")
