"""What each of several real processes does in `test_parallel`, with torch alone: they start sooner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from eugen import PruneConfig, parallel, replace
from eugen.config import LayerConfig
from eugen.least_squares import ErrorMeter, Moments
from tests.eugen.blocks import block, generator, tokens

WORLD = 2
NORMS = ("pre", "post")
"""Before a block, which then has a residual stream, or after it, which gives its tokens weights."""


def join(rank: int, folder: str) -> None:
    """Become one of `WORLD` processes that meet in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )


def work(rank: int, folder: str, configs: dict[str, LayerConfig]) -> None:
    """Everything that is compared, in one start of the processes: starting costs most."""
    join(rank, folder)
    found: dict[str, Any] = {"operations": operations(rank), "moments": sums(shard(chunks(), rank))}
    for name, config in configs.items():
        for norm in NORMS:
            found[f"{name} {norm}"] = fitted(norm, config, rank)
    found["errors"] = errors(rank)
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def shard(items: list, rank: int) -> list:
    """Uneven parts: the first process has more."""
    cut = len(items) - len(items) // (WORLD + 1)
    return items[:cut] if rank == 0 else items[cut:]


def operations(rank: int) -> dict[str, Any]:
    """Every operation of `eugen.parallel` on what differs between the processes."""
    own = torch.arange(3.0 - rank) + 10 * rank
    with parallel.using(parallel.resolve("world")):
        seeded = generator(rank)
        first = parallel.from_first(
            torch.tensor([0.1, -0.0, torch.nan]) * (1 + rank), torch.tensor(rank == 0)
        )
        parallel.draw_alike(seeded)
        return {
            "total": parallel.total(torch.tensor([1, 10]) * (rank + 1))[0],
            "numbers": parallel.total_of(rank, 0.25),
            "gathered": parallel.gathered(own),
            "bools": parallel.gathered(own > 1),
            "place": parallel.place(3 - rank),
            "first": first,
            "drawn": torch.randn(2, generator=seeded),
        }


def chunks() -> list[tuple[Tensor, ...]]:
    """Features, targets and weights, far from zero."""
    dense, x = block(12, 48), tokens(600, 12) + 5
    weight = torch.rand(600, generator=generator(4))
    with torch.no_grad():
        return list(zip(dense.features(x).split(100), x.split(100), weight.split(100), strict=True))


def sums(data: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    """All that `Moments` and `ErrorMeter` know of a stream."""
    group = parallel.resolve("world") if distributed.is_initialized() else None
    with parallel.using(group):
        moments, meter = Moments(), ErrorMeter()
        for features, target, weight in data:
            moments.add(features, target, weight)
            meter.add(features[:, :12], target, weight)
        return {"totals": moments.totals(), "solution": moments.solve(), "r2": meter.r2()}


def encoder(norm: str) -> nn.Module:
    """Two transformer layers with weights as if trained."""
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, batch_first=True, norm_first=norm == "pre", activation="gelu"
    )
    model, seeded = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), generator(21)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=seeded)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.double().eval()


def batches(count: int) -> list[Tensor]:
    """Sequences of vectors."""
    return list(torch.randn(count, 8, 9, 32, generator=generator(31)).double())


def fitted(norm: str, config: LayerConfig, rank: int | None, steps: int = 6) -> dict[str, Any]:
    """The layers of a transfer of all batches by one process, or of this process's part by all.

    In float64, where steps of Adam do not blow up a difference in rounding.
    """
    data = batches(6)
    options = {"refine_steps": steps, "group": None if rank is None else "world", "memory_limit": 20_000}
    own = data if rank is None else shard(data, rank)
    with mock.patch("eugen.layers.moe.MARKED_TOKENS", 50):  # fewer than there are, so that some are left out
        result = replace(encoder(norm), config, calibration=own, **options)
    return {
        "r2": [site.fit_r2 for site in result.sites],
        "state": [site.layer.state_dict() for site in result.sites],
    }


def errors(rank: int) -> dict[str, str]:
    """What each process says where only one is wrong, or where they disagree."""
    good, said = batches(2), {}
    spoilt = [good[0], good[1] * torch.nan]
    cases: dict[str, dict[str, Any]] = {
        "NaN in one": {"calibration": spoilt if rank else good},
        "nothing for one": {"calibration": [] if rank else good},
        "other seeds": {"calibration": good, "seed": rank},
    }
    for name, options in cases.items():
        try:
            replace(encoder("pre"), PruneConfig(budget=0.4), group="world", **options)
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said | {"pid": str(os.getpid())}
