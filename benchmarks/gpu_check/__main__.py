"""Check EUGen's kernel on this GPU and measure blocks and whole models on it, in nine minutes at most.

Writes one record and a page beside it, whole or not at all, also when time runs out: what was left out
stands in them. Ends with status 1 if a check failed. `--quick` tries all of it at toy sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import blocks, kernels, models
from benchmarks.gpu_check.blocks import Effort, Shape
from benchmarks.gpu_check.budget import Part, run_parts
from benchmarks.gpu_check.record import FOLDER, FORMAT, QUICK_FOLDER, failures, validate
from benchmarks.gpu_check.tables import closing, markdown
from benchmarks.gpu_check.verdicts import TOKENS, WIDTHS
from benchmarks.kernel_cases import large_cases, small_cases
from benchmarks.machine import environment, load, machine_name, write, write_json
from eugen.kernels.feature_map import lack
from eugen.timing.clock import is_here

SECONDS = 500.0
"""Of all parts together; the start and the last call that is under way make it nine minutes at most."""
PACKAGES = ("timm", "triton")


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, write the record, print what matters. Returns 1 if a check failed."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.cuda.set_device(options.device)  # kernels of Triton start on the current one
    begin, before = time.perf_counter(), _environment(options.device)
    parts = quick_parts(options.device) if options.quick else full_parts(options.device)
    outcomes = run_parts(parts, options.seconds)
    record = {
        "format": FORMAT,
        "benchmark": "gpu_check",
        "quick": options.quick,
        "device": options.device,
        "date": options.date,
        "environment": before | {"threads": options.threads, "load_end": load()},
        "budget_seconds": options.seconds,
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "parts": [
            {
                "part": part.name,
                "status": outcomes[part.name].status,
                "budget_seconds": part.seconds,
                "seconds": outcomes[part.name].seconds,
                "cut": outcomes[part.name].cut,
                "failed": outcomes[part.name].failed,
            }
            for part in parts
        ],
        **{part.name: outcomes[part.name].results for part in parts},
    }
    validate(record)
    write_json(options.out, record)
    write(options.out.with_suffix(".md"), markdown(record))
    print(*closing(record), "", f"{options.out} and {options.out.with_suffix('.md')}", sep="\n")
    return int(bool(failures(record)))


def full_parts(device: str) -> list[Part]:
    """On a GPU. Their seconds are for one of the H100's kind; what a part leaves goes to the next."""
    forms = [Shape(t, d, dtype) for dtype in ("bfloat16", "float32") for d in WIDTHS for t in TOKENS]
    shapes = [
        Shape(t, d, dtype)
        for dtype in ("bfloat16", "float32")
        for t, d in ((4096, 768), (4096, 1024), (1, 768))
    ]
    cases = [*small_cases(), *large_cases()]
    return [
        Part("kernels", 50, partial(kernels.check_cases, cases=cases, device=device)),
        Part("tests", 70, kernels.run_tests),
        Part("forms", 40, partial(blocks.compare_forms, shapes=forms, device=device, effort=Effort())),
        Part("layers", 60, partial(blocks.measure_rows, shapes=shapes, device=device, seconds=0.3)),
        Part(
            "models", 280, partial(models.profile_units, units=models.full_units(), device=device, say=_say)
        ),
    ]


def quick_parts(device: str) -> list[Part]:
    """The same at toy sizes, on any machine."""
    forms, shapes = [Shape(64, 64, "float32")], [Shape(5, 48, "bfloat16")]
    effort = Effort(placements=3, pairs=2, seconds=0.0)

    def tests(outcome: kernels.Outcome, deadline: float) -> None:
        kernels.run_tests(outcome, deadline, "-k", "every_fixed_activation or no_token_gives")

    return [
        Part("kernels", 100, partial(kernels.check_cases, cases=small_cases(), device=device)),
        Part("tests", 150, tests),
        Part("forms", 30, partial(blocks.compare_forms, shapes=forms, device=device, effort=effort)),
        Part("layers", 60, partial(blocks.measure_rows, shapes=shapes, device=device, seconds=0.0)),
        Part(
            "models", 160, partial(models.profile_units, units=models.quick_units(), device=device, say=_say)
        ),
    ]


def _environment(device: str) -> dict[str, Any]:
    found = environment(device)
    for name in PACKAGES:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"kernel_lacks": lack(torch.device(device), torch.bfloat16)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--device", default="cuda", help="cuda (default); cpu to try the command with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; the record is no result")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all parts together ({SECONDS:g})"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help=f"record; {FOLDER}/<device>-<date>.json")
    options = parser.parse_args(arguments)
    if not is_here(options.device):
        parser.error(
            f"--device {options.device} is not here: this needs an NVIDIA GPU; try --device cpu --quick"
        )
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: full sizes would take hours")
    if not 0 < options.seconds <= SECONDS:
        parser.error(f"--seconds {options.seconds:g} must be above 0 and at most {SECONDS:g}")
    if options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    options.date = datetime.now(UTC).date().isoformat()
    name = f"{machine_name(options.device)}-{options.date}.json"
    options.out = options.out or (QUICK_FOLDER if options.quick else FOLDER) / name
    return options


if __name__ == "__main__":
    sys.exit(main())
