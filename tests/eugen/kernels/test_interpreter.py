"""The kernel without a GPU: its tests in Triton's interpreter, and its compilation for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", exc_type=ImportError)

from triton import compile as compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[3]
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""What one program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


def test_the_kernels_tests_pass_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "tests/eugen/kernels/test_fused.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def compiled(capability: int, dtype: str, config: Any, form: dict[str, Any], *, aligned: bool) -> Any:
    """The kernel as machine code for a GPU; `aligned` says that all sizes are multiples of 16."""
    from eugen.kernels.feature_map import fused

    kernel = fused.feature_map_kernel
    constants = form | config.kwargs | {"PRECISION": "ieee", "WHOLE_STEPS": aligned, "WIDEN": False}
    types = {
        name: "constexpr" if name in constants else f"*{dtype}" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or (aligned and name not in constants)
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(kernel, types, constants, multiples)
    return compile_for(source, target=GPUTarget("cuda", capability, 32), options=options)


CASES = [
    (90, "bf16", {"ORDER": 2, "LOWEST": 1, "GROUPS": 3, "OWN": 1, "NEXT": 1}, True),
    (90, "fp16", {"ORDER": 3, "LOWEST": 1, "GROUPS": 6, "OWN": 1, "NEXT": 1}, True),
    (90, "bf16", {"ORDER": 3, "LOWEST": 2, "GROUPS": 1, "OWN": 0, "NEXT": 0}, False),
    (89, "bf16", {"ORDER": 2, "LOWEST": 2, "GROUPS": 2, "OWN": 1, "NEXT": 1}, True),
    (80, "fp32", {"ORDER": 3, "LOWEST": 1, "GROUPS": 3, "OWN": 0, "NEXT": 1}, False),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="unset TRITON_INTERPRET to compile")
@pytest.mark.parametrize(("capability", "dtype", "form", "aligned"), CASES)
def test_it_compiles_for_gpus_within_their_memory(capability, dtype, form, aligned, tmp_path, monkeypatch):
    from eugen.kernels.feature_map import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size = 4 if dtype == "fp32" else 2
    tiles = fused.tiles(form["GROUPS"], size, 368, SHARED_BYTES[capability])
    assert len(tiles) > 1, "autotuning has nothing to choose from"
    form = form | {"BIAS": True, "NORM": True, "ACTIVATION": "gelu"}
    # The largest stands for the others: each takes a second or more.
    made = compiled(capability, dtype, tiles[-1], form, aligned=aligned)
    assert made.metadata.shared <= SHARED_BYTES[capability]
    tokens = tiles[-1].kwargs["TOKENS"]
    assert tokens != tiles[-1].kwargs["FEATURES"], "a token's place could not be told from a feature's"
    places = re.findall(rf"tt\.addptr .*<{tokens}x1x!tt\.ptr<.*<{tokens}x1x(i\d+)>", made.asm["ttir"])
    assert places == ["i64", "i64"], "x and the features may have more numbers than 32 bits count"
    if size == 2:  # the products run on tensor cores
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in made.asm["ptx"]


@pytest.mark.parametrize("m", [1, 7, 48, 368, 3000])
@pytest.mark.parametrize("groups", [1, 2, 3, 6, 10])
def test_there_is_a_tile_for_every_size(groups, m):
    from eugen.kernels.feature_map import fused

    for shared in (*SHARED_BYTES.values(), 48 * 1024):
        for size in (2, 4):
            for config in fused.tiles(groups, size, m, shared):
                tokens, features, step = (config.kwargs[key] for key in ("TOKENS", "FEATURES", "STEP"))
                staged = config.num_stages * step * size * (tokens + groups * features)
                assert staged <= shared or len(fused.tiles(groups, size, m, shared)) == 1
                assert min(tokens, features, step) >= 16, "tensor cores take no less"
                assert 64 % step == 0, "a step that divides d is read without a mask"


@pytest.mark.parametrize("triton", ["import triton", "sys.modules['triton'] = None"])
def test_a_layer_on_the_cpu_needs_no_triton(triton):
    """By default it does not even load it; where it is absent, the operator composes."""
    code = f"""
import sys, torch, eugen
from torch import nn
dense = eugen.DenseFFN(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
make = lambda **kernel: eugen.EUGenConfig(num_features=4, **kernel).build(dense, generator=torch.Generator())
x = torch.randn(3, 6)
y = make()(x)
loaded = "triton" in sys.modules
{triton}
print(loaded, torch.allclose(make(kernel="fused")(x), make(kernel="composed")(x), atol=1e-5))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr
