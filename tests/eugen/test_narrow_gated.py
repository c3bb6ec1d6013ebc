"""The gated control against its formula, and the activations that it may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eugen.layers.narrow_gated import NarrowGatedConfig
from tests.eugen.blocks import block, generator, tokens
from tests.tolerances import assert_close


@pytest.mark.parametrize(
    ("act", "function"),
    [(None, torch.tanh), ("gelu", nn.functional.gelu), ("silu", lambda z: z * torch.sigmoid(z))],
)
@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_gated_block_of_the_formula(act, function, gated):
    dense = block(10, 24, act=nn.Tanh(), gated=gated)
    layer = NarrowGatedConfig(hidden_features=7, act=act).build(dense, generator=generator())
    x, state = tokens(63, 10).double(), {k: v.double() for k, v in layer.state_dict().items()}
    gate = function(x @ state["gate.weight"].T + state["gate.bias"])
    hidden = gate * (x @ state["up.weight"].T + state["up.bias"])
    assert_close(layer(x.float()), hidden @ state["down.weight"].T + state["down.bias"])
    assert layer.macs_per_token == 3 * 10 * 7


def test_the_budget_buys_fewer_neurons_than_those_of_a_plain_block():
    layer = NarrowGatedConfig(budget=0.3).build(block(60, 240), generator=generator())
    assert layer.hidden_features == 0.3 * 240 * 2 // 3


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="act='square' is unknown: use one of .*gelu.*silu"):
        NarrowGatedConfig(act="square")
