"""What fine-tuning asks of the blocks that it trains."""

from __future__ import annotations

import torch
from torch import nn

from eugen import FFFConfig, NarrowConfig, replace
from stages.models import changed_tensors
from stages.training import auxiliary_loss


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.LayerNorm(8))


def test_what_the_blocks_ask_for_is_part_of_the_loss():
    model = replace(network(), FFFConfig(depth=2, leaf_features=4, hardening=1.0)).model.train()
    model(torch.ones(5, 8))
    asked = model[0].auxiliary_loss()
    assert asked is not None and asked > 0
    assert auxiliary_loss(model) == asked
    assert auxiliary_loss(replace(network(), NarrowConfig(budget=0.5)).model.train()) == 0


def test_a_replaced_block_is_stored_whole():
    """Also a tensor that has name and values of the dense network's: the student's build draws it anew."""
    dense = network()
    student = replace(dense, NarrowConfig(budget=0.5)).model
    student[0].register_buffer("weight", dense[0].weight.detach().clone())
    assert "0.weight" in changed_tensors(student, dense)
    assert "3.weight" not in changed_tensors(student, dense)
