"""Experts whose groups are multiplied one by one: any routing, dtype and width, against the masked form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eugen.cost import count_macs
from eugen.parts import experts as room
from eugen.parts.experts import ExpertFFN
from eugen.parts.grouped import takes_loop
from tests.eugen.blocks import generator, tokens
from tests.tolerances import assert_close

EXPERTS = 5
ROUTINGS = {
    "one expert": lambda scores: scores.index_fill(1, torch.tensor([0, 1, 3, 4]), -9),
    "uneven": lambda scores: scores + torch.tensor([3.0, 0, 0, 0, -9]),
    "even": lambda scores: scores,
}


class Planned(ExpertFFN):
    """Experts chosen by scores that a test gives, with factors of its own."""

    scores: torch.Tensor
    count = 1
    factors = False

    @property
    def active(self):
        return self.count

    @property
    def routing_macs(self):
        return 0

    def route(self, x):
        chosen = self.scores[: len(x)].topk(self.active, dim=1).indices
        return chosen, (chosen + 0.5).to(x.dtype) if self.factors else None


def planned(*, routing="uneven", active=1, shared=8, width=12, bias=True, gated=False, factors=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = EXPERTS * width + shared
        up, gate = (nn.Linear(20, rows, bias=bias) for _ in range(2))
        readout = nn.Linear(rows, 24, bias=bias)
    layer = Planned(up, nn.GELU(), readout, gate if gated else None, experts=EXPERTS, width=width)
    layer.scores = ROUTINGS[routing](torch.randn(200, EXPERTS, generator=generator()))
    layer.count, layer.factors = active, factors
    return layer.eval()


def reads(layer, monkeypatch):
    """The sizes that `group` read, call by call."""
    seen, group = [], room.group

    def watched(*args, **options):
        groups = group(*args, **options)
        seen.append(groups.sizes)
        return groups

    monkeypatch.setattr(room, "group", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        *({"routing": routing, "active": active} for routing in ROUTINGS for active in (1, 2)),
        {"active": 2, "factors": True, "gated": True},
        {"factors": True},
        {"bias": False},
        {"bias": False, "shared": 0},
        {"shared": 3, "width": 7, "gated": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_expert_multiplies_its_own_rows(options, dtype, monkeypatch):
    layer = planned(**options)
    seen = reads(layer, monkeypatch)
    x = tokens(130, 20)
    exact = copy.deepcopy(layer).double().reference(x.double())
    layer = layer.to(dtype)
    with torch.no_grad():
        for rows in (130, 3, 2):
            assert_close(layer(x[:rows].to(dtype)), exact[:rows], precision=dtype)
        assert layer(x[:0].to(dtype)).shape == (0, 24)
    assert [sum(sizes) for sizes in seen] == [rows * layer.active for rows in (130, 3, 2, 0)]


def test_no_more_is_multiplied_than_is_used():
    x = tokens(130, 20)
    for routing in ROUTINGS:
        layer = planned(routing=routing, active=2)
        assert count_macs(lambda layer=layer: layer(x)) == 130 * layer.macs_per_token


def test_gradients_autocast_other_dtypes_and_compiled_graphs_read_no_sizes(monkeypatch):
    layer, x = planned(width=8), tokens(130, 20)
    seen, exact = reads(layer, monkeypatch), layer.reference(x)
    weight = torch.zeros(16, 8, 20)
    assert_close(layer(x), exact)
    assert not takes_loop(x, weight)
    with torch.no_grad():
        assert takes_loop(x, weight)
        assert not takes_loop(x.bfloat16(), weight)
        assert not takes_loop(x, torch.zeros(17, 8, 20))
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes_loop(x, weight)
        torch.compiler.reset()
        monkeypatch.undo()
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), exact)
    assert seen == [None]
