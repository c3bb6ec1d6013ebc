"""Whole models: every row in bf16 and f32, the conditions that goals are about first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import eugen
from benchmarks.gpu_check.budget import NOT_BEGUN, Outcome, TimeUp
from eugen.timing import Profile, Settings, Subject, profile_model
from eugen.timing.profiler import line_of
from eugen.timing.record import CUT, FAILED
from eugen.timing.rows import CONTROL, parse_rows
from eugen.timing.subjects import load

VIT = "timm:vit_base_patch16_224"
GPT = "stages.networks.gpt:GPT(vocabulary=50257,context=1024,width=768,depth=12,heads=12)"
NERF = (
    "stages.networks.nerf:RadianceField(near=2.0,far=6.0,samples=64,fine_samples=128,background=1.0,"
    "encoding=positional,width=256,depth=8,skip=5,position_frequencies=10,direction_frequencies=4)"
)
IDS, RAYS = "ids:1024:50257", "7"
VARIANTS = (
    "eugen",
    "eugen(kernel=composed)",
    "eugen(kernel=fused)",
    "eugen(sharing=shared)",
    "eugen(norm_slot=False)",
    "eugen(sharing=powers,direct_linear=True,projection=teacher)",
)
FIRST = ("prune", "narrow", "low_rank", "int8", "int8_of_eugen", "bf16", "bf16_of_eugen")
"""What EUGen is compared with most; other layers follow in the order of their names."""
COMPILED = ("compile", "compile_of_eugen", "compile_of_int8_of_eugen")
CAPTURED = ("eugen", "eugen(kernel=composed)", "eugen(kernel=fused)", "prune", "narrow", "low_rank", "linear")
"""Rows that ask the device nothing on their way, as a graph's capture needs it."""


@dataclass(frozen=True)
class Unit:
    """One call of `profile_model`.

    Attributes:
        seconds: its share of the time; what it leaves goes to the next one.
        settings: further ones of `Settings`.
    """

    model: str
    given: str | None
    dtype: str
    rows: Sequence[str]
    seconds: float
    batches: tuple[int, ...] = (1,)
    calls: tuple[str, ...] = ("forward",)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        graph = ", CUDA graphs" if self.settings.get("cuda_graph") else ""
        sizes = "/".join(map(str, self.batches))
        last = self.rows[-1] if len(self.rows) < len(eager_rows()) else "all rows"
        return f"{self.model.split('(')[0]} {'/'.join(self.calls)} {self.dtype} batch {sizes}{graph} … {last}"


def eager_rows() -> list[str]:
    """Every registered layer, EUGen in its variants and inside each layer that holds another one."""
    holders = [
        name for name, kind in eugen.layers().items() if any(f.name == "of" for f in dataclasses.fields(kind))
    ]
    known = [*(n for n in eugen.layers() if n != CONTROL), *(f"{holder}_of_eugen" for holder in holders)]
    return list(dict.fromkeys([*VARIANTS, *FIRST, *known]))


def full_units() -> list[Unit]:
    """On a GPU; the seconds are for one of the H100's kind."""
    half, single, every = "bfloat16", "float32", eager_rows()
    short = {"energy_seconds": 0.0}
    graphs = {"energy_seconds": 0.0, "cuda_graph": True}
    language = {"batches": (8,), "calls": ("prefill", "decode")}
    return [
        Unit(VIT, None, half, every, 110, batches=(64, 1, 256)),
        Unit(GPT, IDS, half, every, 45, **language),
        Unit(NERF, RAYS, half, every, 25, batches=(4096,)),
        Unit(VIT, None, half, COMPILED, 40, batches=(64,), settings=short),
        Unit(VIT, None, single, every, 50, batches=(64, 1), settings=short),
        Unit(GPT, IDS, single, every, 35, **language, settings=short),
        Unit(NERF, RAYS, single, every, 25, batches=(4096,), settings=short),
        Unit(VIT, None, half, CAPTURED, 10, settings=graphs),
        Unit(GPT, IDS, half, CAPTURED, 10, calls=("decode",), settings=graphs),
        Unit(GPT, IDS, half, COMPILED, 20, batches=(8,), calls=("prefill",), settings=short),
        Unit(NERF, RAYS, half, COMPILED, 20, batches=(4096,), settings=short),
        Unit(VIT, None, single, every, 30, batches=(256,), settings=short),
    ]


def quick_units() -> list[Unit]:
    """The same kinds of model at toy size, to try the command."""
    vit = "timm:vit_tiny_patch16_224(img_size=32,embed_dim=32,depth=1,num_heads=2)"
    gpt = "stages.networks.gpt:GPT(vocabulary=64,context=16,width=32,depth=1,heads=2)"
    nerf = NERF.replace("samples=64", "samples=4").replace("samples=128", "samples=4").replace("256", "16")
    tiny: dict[str, Any] = {"placements": 3, "pairs": 2, "seconds": 0.0, "energy_seconds": 0.0}
    few = ("eugen", "prune", "int8_of_eugen")
    return [
        Unit(vit, "3x32x32", "bfloat16", eager_rows(), 150, batches=(1, 2), settings=tiny),
        Unit(gpt, "ids:16:64", "float32", few, 100, calls=("prefill", "decode"), settings=tiny),
        Unit(nerf, RAYS, "float32", few, 100, batches=(4,), settings=tiny),
        Unit("mlp(width=16,depth=1)", None, "float32", ("compile_of_eugen",), 150, settings=tiny),
    ]


def profile_units(
    outcome: Outcome, deadline: float, units: Sequence[Unit], device: str, say: Callable[[str], None]
) -> None:
    """Profile one after the other; a model that cannot be built hides no other."""
    end, subjects = time.perf_counter(), dict[str, Subject]()
    for index, unit in enumerate(units):
        end += unit.seconds
        left = min(end, deadline) - time.perf_counter()
        if left <= 0:
            outcome.cut.append(f"{unit.name}: {NOT_BEGUN}")
            continue
        outcome.cut.append(f"{unit.name}: stopped")  # what stands there if it is
        try:
            cut = _profile(outcome, unit, subjects, _settings(unit, device, left), say)
        except TimeUp:
            outcome.cut += [f"{following.name}: {NOT_BEGUN}" for following in units[index + 1 :]]
            raise
        except Exception as failure:
            outcome.failed.append(f"{unit.name}: {type(failure).__name__}: {failure}")
            cut = []
        outcome.cut[-1:] = cut
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _profile(
    outcome: Outcome, unit: Unit, subjects: dict[str, Subject], settings: Settings, say: Callable[[str], None]
) -> list[str]:
    """Profile a unit and name its cut rows. Rows that were measured stay, also where it is stopped."""
    latest: list[Profile] = []

    def keep(profile: Profile) -> None:
        latest[:] = [profile]
        say(line_of(profile.rows[-1]))

    try:
        if unit.model not in subjects:
            subjects[unit.model] = load(unit.model, unit.given)
        profile_model(subjects[unit.model], parse_rows(",".join(unit.rows)), settings, keep)
        return [f"{unit.name}, {name}" for profile in latest for name in _with(profile, CUT)]
    finally:
        for profile in latest:
            outcome.results.append(asdict(profile))
            outcome.failed += [f"{unit.name}, {name}" for name in _with(profile, FAILED)]


def _settings(unit: Unit, device: str, left: float) -> Settings:
    given = {"placements": 4, "pairs": 8, "seconds": 1.0, "energy_seconds": 0.5} | unit.settings
    return Settings(
        device=device,
        dtype=unit.dtype,
        batches=unit.batches,
        calls=unit.calls,
        total_seconds=left,
        **given,
    )


def _with(profile: Profile, status: str) -> list[str]:
    return [
        f"{row.row} at {row.call} batch {row.batch}: {row.reason}"
        for row in profile.rows
        if row.status == status
    ]
