"""What a graph needs beside its addresses, on a CUDA that is made of stand-ins."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from eugen.timing import Clock, placed
from eugen.timing import clock as clock_module


@pytest.fixture
def graphs(monkeypatch) -> list[MagicMock]:
    """Graphs that replay nothing, in the order of their capture."""
    made: list[MagicMock] = []

    def graph() -> MagicMock:
        made.append(MagicMock())
        return made[-1]

    def context(*_: object, **__: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    names = {"device": context, "stream": context, "graph": context, "CUDAGraph": graph}
    names |= {"Stream": MagicMock, "current_stream": MagicMock}
    cuda = types.SimpleNamespace(**names)
    monkeypatch.setattr(clock_module.torch, "cuda", cuda)
    return made


def test_weights_and_inputs_of_a_captured_call_live_as_long_as_its_replay(graphs):
    """torch frees unused memory at the next capture: a replay would read what is no longer there."""
    model, seen = nn.Linear(4, 4), []

    def call(copied: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen[:] = [weakref.ref(copied.weight), weakref.ref(x)]
        return copied(x)

    replay = Clock("cuda", cuda_graph=True).prepare(placed(model, torch.ones(2, 4), call)())
    gc.collect()
    assert all(held() is not None for held in seen)
    replay()
    assert graphs[0].replay.call_count == 1
    del replay
    gc.collect()
    assert all(held() is None for held in seen)
