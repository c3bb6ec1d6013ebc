"""The library stands on torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHERS = [
    "timm",
    "transformers",
    "pandas",
    "mlflow",
    "pydantic",
    "sklearn",
    "scipy",
    "prefect",
    "dvc",
    "triton",
]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_import_loads_torch_and_nothing_of_the_suite():
    loaded = json.loads(run("import eugen, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "torch" in loaded
    assert not set(OTHERS) & set(loaded)
    assert not [name for name in loaded if name.split(".")[0] in ("stages", "flows")]


def test_works_where_only_torch_is_installed():
    """Neither jaxtyping nor NumPy nor any of the suite: blocks are found, fitted and refined all the same."""
    absent = json.dumps([*OTHERS, "jaxtyping", "numpy"])
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import eugen, torch
from torch import nn
model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
batches = list(torch.randn(4, 100, 6))
result = eugen.replace(model, eugen.EUGenConfig(budget=0.6), calibration=batches, refine_steps=2)
print(len(result.sites), result.sites[0].fit_r2 > 0)
"""
    assert run(code).split() == ["1", "True"]
