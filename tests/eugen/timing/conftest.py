"""A clock that stands still until a timed function says how long it took."""

from __future__ import annotations

import types

import pytest
import torch

from eugen.timing import clock as clock_module
from eugen.timing import energy, latency


class FakeTime:
    """Seconds are those that the timed functions say they took."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float):
        """A function that takes these times in turn."""

        def run() -> None:
            assert not torch.is_grad_enabled()
            self.now += seconds[self.calls.count(name) % len(seconds)]
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    for module in (clock_module, latency, energy):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=fake.perf_counter))
    return fake
