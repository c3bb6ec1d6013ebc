"""Products and bytes against counts by hand, and the limit that follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import eugen
from eugen.cost import CallCost, call_cost, count_macs, model_cost
from eugen.timing import Rates, roofline
from tests.eugen.models import bert, call_bert, chain, images, sentences, vit

N, D, H = 7, 12, 40
BLOCK = D * H + H + H * D + D
"""Weights of `chain(D, H)`."""


def test_a_block_by_hand():
    model, x = chain(D, H), torch.randn(N, D)
    cost = call_cost(lambda: model(x), model)
    inputs, hidden = N * D, N * H
    assert cost.macs == {"float32": 2 * N * D * H}
    assert cost.weight_bytes == 4 * BLOCK
    assert cost.io_bytes == 4 * 2 * inputs
    # Three operators: x to h, h to act(h), act(h) to y.
    assert cost.activation_bytes == 4 * (inputs + hidden + hidden + hidden + hidden + inputs)
    model, x = model.bfloat16(), x.bfloat16()
    half = call_cost(lambda: model(x), model)
    assert half.macs == {"bfloat16": 2 * N * D * H}
    assert (half.weight_bytes, half.io_bytes) == (2 * BLOCK, 2 * 2 * inputs)


@pytest.mark.parametrize("make", [lambda: (vit(), images()[0], None), lambda: (bert(), sentences()[0], 1)])
def test_products_are_those_of_the_other_counter(make):
    model, batch, is_bert = make()
    model = model.eval()
    call = (lambda: call_bert(model, batch)) if is_bert else (lambda: model(batch))
    assert call_cost(call, model).macs == {"float32": count_macs(call)}


def test_bytes_are_multiplied_as_bytes():
    int8 = eugen.replace(chain(16, 64), eugen.Int8Config()).model
    x = torch.randn(N, 16)
    cost, dense = call_cost(lambda: int8(x), int8), call_cost(lambda: chain(16, 64)(x), chain(16, 64))
    assert sum(cost.macs.values()) == sum(dense.macs.values())
    if torch.cpu._is_vnni_supported():
        assert set(cost.macs) == {"int8"}
        assert cost.weight_bytes == 2 * 16 * 64 + 2 * 4 * (16 + 64)  # and a scale and a bias for each output


def test_of_a_table_the_looked_up_rows_are_read():
    table, ids = nn.Embedding(1000, 8), torch.tensor([[1, 5, 5]])
    cost = call_cost(lambda: table(ids), table)
    assert cost.weight_bytes == 3 * 8 * 4
    assert cost.io_bytes == 3 * 8 + 3 * 8 * 4
    tied = call_cost(lambda: F.linear(table(ids), table.weight), table)
    assert tied.weight_bytes == 1000 * 8 * 4, "the head reads it all, and that is the most"


def test_tied_weights_are_read_once_and_halves_add_up():
    model, x = nn.Linear(D, D, bias=False), torch.randn(N, D)
    assert call_cost(lambda: model(model(x)), model).weight_bytes == 4 * D * D
    halves = call_cost(lambda: x[:, :5] @ model.weight[:, :5].T + x[:, 5:] @ model.weight[:, 5:].T, model)
    assert halves.weight_bytes == 4 * D * D
    one = call_cost(lambda: x[:, :5] @ model.weight[:, :5].T, model)
    assert one.weight_bytes == 4 * D * 5


def test_views_are_free_and_repeated_elements_are_stored_once():
    model, x = nn.Linear(D, D), torch.randn(N, D)
    seen = call_cost(lambda: x.view(D, N).t()[1:].unsqueeze(0), model)
    assert (seen.activation_bytes, seen.weight_bytes, seen.macs) == (0, 0, {})
    row = torch.randn(1, D)
    spread = call_cost(lambda: row.expand(100, D) * 2, model)
    assert spread.activation_bytes == 4 * (D + 100 * D)
    inplace = call_cost(lambda: torch.zeros(N, D).add_(x), model)
    assert inplace.activation_bytes == 4 * (N * D + 3 * N * D)
    assert inplace.io_bytes == 4 * 2 * N * D


def test_what_is_made_inside_is_no_input():
    """A freed tensor's memory may come back as another's: it must not pass as an input, nor the reverse."""
    model, x = nn.Linear(D, D), torch.randn(N, D)

    def call() -> torch.Tensor:
        y = x
        for _ in range(5):
            y = (y + 1).relu()
        return y

    assert call_cost(call, model).io_bytes == 4 * 2 * N * D


def test_weights_that_a_call_reads_are_those_that_the_model_stores():
    model = vit().eval()
    cost = call_cost(lambda: model(images()[0]), model)
    assert cost.weight_bytes == model_cost(model, images()[0], lambda m, x: m(x)).weight_bytes


COST = CallCost(macs={"float32": 600, "int8": 400}, weight_bytes=30, io_bytes=10, activation_bytes=10**6)


def test_the_slower_side_binds():
    both = {"float32": 100.0, "int8": 200.0}
    assert (Rates(10.0, both).limit(COST).ms, Rates(10.0, both).limit(COST).binds) == (8000.0, "MACs")
    assert (Rates(4.0, both).limit(COST).ms, Rates(4.0, both).limit(COST).binds) == (10000.0, "bytes")


def test_only_missing_rates_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(roofline, "gemm_rate", lambda device, dtype: asked.append((device, dtype)) or 5.0)
    rates = Rates(1.0, {"float32": 2.0}).knowing(["float32", "int8"], "cpu")
    assert rates == Rates(1.0, {"float32": 2.0, "int8": 5.0})
    assert asked == [("cpu", "int8")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_products_are_of_numbers_as_models_have_them(monkeypatch, dtype):
    seen = []

    def product(left: torch.Tensor, right: torch.Tensor) -> None:
        seen.extend((left, right))

    monkeypatch.setattr(roofline, "CPU_SIZE", 32)
    monkeypatch.setattr(roofline, "_best_seconds", lambda call, device: call() or 1.0)
    monkeypatch.setattr(torch, "_int_mm" if dtype == "int8" else "mm", product)
    assert roofline.gemm_rate("cpu", dtype) == 32**3
    left, right = seen
    assert left.dtype == right.dtype == getattr(torch, dtype)
    assert min(len(left.unique()), len(right.unique())) > 100
    assert not torch.equal(left, right.T)


def test_rates_are_of_the_best_run(monkeypatch):
    times = iter([900.0, 900.0, 7.0, 4.0, 5.0, 9.0, 5.0, 6.0, 8.0] * 3)

    class Sequence:
        def __init__(self, device: str) -> None:
            self.device = device

        def milliseconds(self, call) -> float:
            call()
            return next(times)

    monkeypatch.setattr(roofline, "Clock", Sequence)
    monkeypatch.setattr(
        roofline, "warm_up", lambda call, clock: (clock.milliseconds(call), clock.milliseconds(call))
    )
    monkeypatch.setattr(roofline, "last_cache_bytes", lambda device: 1)
    assert roofline.gemm_rate("cpu", "float32") == pytest.approx(roofline.CPU_SIZE**3 / 4e-3)
    assert roofline.copy_rate("cpu") == pytest.approx(2 * roofline.LEAST_COPY / 4e-3)
    assert roofline.gemm_rate("cpu", "int8") == pytest.approx(roofline.CPU_SIZE**3 / 4e-3)
