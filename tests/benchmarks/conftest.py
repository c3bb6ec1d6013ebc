"""A record as a GPU would leave it, with every goal met."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.gpu_check.record import FORMAT, PARTS, validate
from eugen.timing import (
    Energy,
    Environment,
    Measured,
    Memory,
    PairedLatency,
    PlacedLatency,
    Profile,
    Rates,
    Row,
)
from eugen.timing.profiler import Settings

MACHINE = Environment("NVIDIA H200", "580", 16, 8, {"torch": "2.14.1"}, "c" * 40, False, 0.1, 0.1)


def row(name: str, batch: int, speedup: float, megabytes: int) -> Row:
    samples = PlacedLatency([PairedLatency([speedup] * 2, [1.0] * 2)] * 3)
    measured = Measured(
        speedup=speedup,
        low=0.95 * speedup,
        high=1.05 * speedup,
        scatter=0.01,
        dense_ms=speedup,
        row_ms=1.0,
        samples=samples,
        macs={"bfloat16": 10},
        weight_bytes=10,
        io_bytes=10,
        activation_bytes=10,
        macs_limit=2.0,
        limit_ms=0.5,
        binds="MACs",
        of_limit=0.5,
        memory=Memory(megabytes * 10**6, None, None),
        energy=Energy(None, None, "not asked for"),
        check_error=0.0,
        config="",
    )
    return Row(name, "forward", batch, "model", "model", "timed", measured=measured)


def profile(model: str, dtype: str, rows: list[Row], **settings) -> dict:
    said = asdict(Settings(device="cuda", dtype=dtype, **settings))
    return asdict(Profile(model, "cuda", dtype, said, MACHINE, Rates(1e12, {dtype: 1e14}), rows))


def form(d: int, tokens: int, **changes) -> dict:
    found = {"dtype": "bfloat16", "cuda_graph": True, "calls": 10, "status": "timed", "binds": "MACs"}
    numbers = {"speedup": 1.5, "low": 1.4, "high": 1.6, "composed_ms": 0.03, "fused_ms": 0.02}
    limits = {"limit_ms": 0.018, "of_limit": 0.9, "check_error": 1e-3}
    return {"tokens": tokens, "d": d} | found | numbers | limits | changes


@pytest.fixture
def measured() -> dict:
    """One whole record; ViT-B's rows are the first profile's, dense then eugen, batch 64 then 256."""
    rows = [row(n, b, s, mb) for n, s, mb in (("dense", 1.0, 1000), ("eugen", 2.0, 600)) for b in (64, 256)]
    parts = {"status": "done", "budget_seconds": 100, "seconds": 50.0, "cut": [], "failed": []}
    record = {
        "format": FORMAT,
        "benchmark": "gpu_check",
        "quick": False,
        "device": "cuda",
        "date": "2026-11-21",
        "environment": {
            "accelerator": "NVIDIA H200",
            "processor": "AMD EPYC",
            "versions": {"torch": "2.14.1"},
            "commit": "c" * 40,
            "dirty": False,
            "kernel_lacks": None,
        },
        "budget_seconds": 500.0,
        "wall_seconds": 400.0,
        "parts": [{"part": name} | parts for name in PARTS],
        "kernels": [{"case": "Case()", "status": "passed", "of_allowed": 0.4}],
        "tests": [{"case": "pytest", "status": "passed", "of_allowed": None, "said": "9 passed"}],
        "forms": [form(d, tokens) for d in (768, 1024) for tokens in (4096, 16384)],
        "layers": [],
        "models": [profile("timm:vit_base_patch16_224", "bfloat16", rows)],
    }
    validate(record)
    return record
