"""Budgets are kept, or refused with the least one; blocks of any form are taken, or refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import eugen
from eugen.cost import count_macs
from tests.contract.cases import KINDS, config_of, every_layer, fitted, unless_refused
from tests.eugen.blocks import block, generator, tokens


@every_layer
@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(50, 1000).map(lambda thousandths: thousandths / 1000),
    d=st.integers(1, 80),
    h=st.integers(1, 300),
    out=st.integers(1, 80),
    bias=st.booleans(),
)
@example(budget=0.05, d=60, h=240, out=60, bias=True)
@example(budget=0.5, d=63, h=64, out=4, bias=True)
def test_the_budget_is_kept_or_the_least_one_named(name, budget, d, h, out, bias):
    dense = block(1, 1, bias=bias)
    dense = eugen.DenseFFN(
        nn.Linear(d, h, bias=bias, device="meta"), dense.act, nn.Linear(h, out, bias=bias, device="meta")
    )
    config = config_of(name, budget)
    limit = 1 if config.budget is None else budget
    try:
        layer = config.build(dense, generator=generator())
    except ValueError as error:
        least = float(re.search(r"the least is ([\d.]+)", str(error))[1])
        assert least > budget
        if least <= 1:
            KINDS[name](budget=least).build(dense, generator=generator())
        return
    assert layer.macs_per_token <= limit * dense.macs_per_token + 1e-9  # 0.29 * 100 is 28.999…
    assert layer(torch.empty(3, d, device="meta")).shape == (3, out)


@every_layer
@pytest.mark.parametrize("shape", [(63, 64, 4), (7, 64, 63), (60, 12, 60)])
def test_blocks_of_odd_shapes_can_be_fitted(name, shape):
    dense = block(*shape)
    layer = unless_refused(
        lambda: fitted(name, dense, budget=0.9, count=300), "too small", repr(config_of(name).name)
    )
    assert layer is None or layer(tokens(9, shape[0])).shape == (9, shape[2])


@every_layer
@pytest.mark.parametrize("form", [{"gated": True}, {"whole": False}], ids=["gated", "without output matrix"])
def test_other_forms_of_blocks_are_fitted_or_refused_by_name(name, form):
    dense = block(20, 80, **form)
    layer = unless_refused(lambda: fitted(name, dense, budget=0.6, count=300), repr(config_of(name).name))
    x = tokens(5, 20)
    for each in (dense, layer) if layer is not None else (dense,):
        assert each.macs_per_token <= dense.macs_per_token
        assert count_macs(lambda each=each: each(x)) == len(x) * each.macs_per_token
        assert each(x).shape == dense(x).shape
