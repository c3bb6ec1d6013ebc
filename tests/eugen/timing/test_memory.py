"""Peak memory against sizes known beforehand."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import nn

from eugen.timing import memory, peak_bytes, peak_memory

WEIGHT_BYTES = (10 * 10 + 10) * 4


def test_peak_is_the_most_that_lives_at_one_time():
    model = nn.Linear(10, 10)

    def function() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000 at once
        del first
        third = second * 2  # 8000 again
        del second, third
        torch.zeros(1500)  # 6000

    assert peak_bytes(function, model) == WEIGHT_BYTES + 8000


def test_views_and_writes_in_place_cost_nothing():
    def function() -> None:
        x = torch.zeros(30, 40)  # 4800 bytes
        y = x.view(40, 30)
        del x
        y.add_(1).mul_(2)
        z = y.t()[3:]
        del y
        z.sum()  # 4 bytes more

    assert peak_bytes(function, nn.Linear(10, 10)) == WEIGHT_BYTES + 4800 + 4


def test_weights_count_once_and_activations_beside_them():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(inplace=True))
    model.append(model[0])
    x = torch.zeros(7, 10)
    output = 7 * 10 * 4
    assert peak_bytes(lambda: model(x), model) == WEIGHT_BYTES + 2 * output


def test_repeated_calls_count_the_same():
    model = nn.Sequential(nn.Linear(10, 50), nn.GELU(), nn.Linear(50, 10))
    x = torch.zeros(7, 10)
    assert len({peak_bytes(lambda: model(x), model) for _ in range(3)}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak can be reset on Linux only")
def test_resident_peak_is_of_this_call_alone():
    model, large = nn.Linear(10, 10), 200 * 2**20

    def touches_new_pages() -> None:  # a tensor may get memory that is free inside the process already
        with mmap.mmap(-1, large) as pages:
            for offset in range(0, large, mmap.PAGESIZE):
                pages[offset] = 1

    peak_memory(touches_new_pages, model)
    small = peak_memory(lambda: None, model).rss
    again = peak_memory(touches_new_pages, model).rss
    assert small is not None and again is not None
    assert again - small > 0.8 * large


def test_what_cannot_be_told_is_none(monkeypatch):
    model = nn.Linear(10, 10)
    assert peak_memory(lambda: None, model).allocated == WEIGHT_BYTES
    assert peak_memory(lambda: None, model).reserved is None
    assert peak_memory(lambda: None, model, counted=False).allocated is None
    monkeypatch.setattr(memory, "_reset_rss_peak", lambda: False)
    assert peak_memory(lambda: None, model).rss is None
