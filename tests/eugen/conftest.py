"""Adapters registered in a test are forgotten after it."""

from __future__ import annotations

import pytest

from eugen import sites


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_ADAPTERS", dict(sites._ADAPTERS))
