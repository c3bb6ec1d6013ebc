"""A GPU that holds no numbers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eugen.kernels import feature_map as kernel


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which there is a GPU as far as shapes and devices go: its tensors hold no numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "cc")
    kernel.lack.cache_clear()
    yield FakeTensorMode()
    kernel.lack.cache_clear()
