"""The operator's guide as one script; too long for every run: make test ARGS="-m operations"."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.operations
@pytest.mark.timeout(3600)
def test_what_the_operators_guide_promises_survives():
    done = subprocess.run(
        ["bash", str(Path(__file__).with_name("operations.sh"))], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
