"""`eugen compress`: from a model and data to a folder."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from eugen.cli.card import card
from eugen.cli.data import SPLIT_SEED, Data, call, open_data
from eugen.cli.errors import unknown
from eugen.cli.measure import measure
from eugen.cli.partial import FinishedBlocks, discard, key_of, partial_root
from eugen.cli.progress import Progress, say
from eugen.cli.sources import Source, open_source
from eugen.cli.tables import aligned, results
from eugen.compression.compress import Compressed, carry_out, plan_for
from eugen.compression.levels import LEVELS, Level
from eugen.compression.saved import file_hash, require_free, save, state_hash, values_hash
from eugen.config import LayerConfig
from eugen.layers import layers
from eugen.plan import Plan, config_data
from eugen.search.target import Target
from eugen.sites import find_ffns
from eugen.sites.faults import check_weights, nothing_found
from eugen.timing.clock import is_here
from eugen.timing.spec import parse

AUTO = "auto"
PACKAGES = ("eugen", "torch", "timm", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked as far as it can be without opening anything."""

    source: str
    data: Path
    target: Target
    row: LayerConfig | None
    level: Level
    out: Path
    weights: Path | None
    seed: int
    device: str
    batch: int | None
    max_tokens: int

    def settings(self, source: Source, data: Data) -> dict[str, Any]:
        """Everything that determines the result, as values of JSON."""
        return {
            "source": self.source,
            "weights_sha256": state_hash(source.model),
            "behaviour_sha256": behaviour_hash(source, data.example),
            "data_sha256": data.sha256,
            "target": dataclasses.asdict(self.target),
            "row": AUTO if self.row is None else config_data(self.row),
            "level": dataclasses.asdict(self.level),
            "seed": self.seed,
            "split_seed": SPLIT_SEED,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "batch": self.batch,
            "max_tokens": self.max_tokens,
            "versions": versions(),
        }


def behaviour_hash(source: Source, example: Any) -> str:
    """SHA-256 of what the model's code makes of its weights, an output, and of its tokenizer."""
    with torch.no_grad():
        found = tree_leaves(call(source.model, example))
    outputs = (leaf for leaf in found if isinstance(leaf, Tensor))
    values: dict[str, Tensor | str] = {f"output {i}": tensor for i, tensor in enumerate(outputs)}
    for name in ("config.json", "tokenizer.json"):
        if source.folder is not None and (source.folder / name).is_file():
            values[name] = file_hash(source.folder / name)
    return values_hash(values)


def row_of(text: str) -> LayerConfig | None:
    """The configuration of a row's name, with options in brackets, a row's name among them; None for `auto`.

    Raises:
        ValueError: an unknown row or option.
    """
    name, options = parse(text)
    if name == AUTO and not options:
        return None
    known = layers()
    if name not in known:
        raise unknown("row", name, [AUTO, *known])
    fields = [each.name for each in dataclasses.fields(known[name]) if each.name != "budget"]
    for option in options:
        if option not in fields:
            raise unknown(f"option of row {name}", option, fields)
    types = get_type_hints(known[name])
    for option in options:
        if types[option] is LayerConfig and (inner := row_of(str(options[option]))) is not None:
            options[option] = inner
    return known[name](**options)


def level_named(name: str) -> Level:
    """The level of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in LEVELS:
        raise unknown("level", name, LEVELS)
    return LEVELS[name]


def require_device(device: str) -> None:
    """Raise ValueError where this machine has no such device."""
    if not is_here(device):
        raise ValueError(f"--device {device}: this machine has no such device; use cpu, cuda or cuda:0")


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a part in the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return {"eugen": "unknown", **found}


def run(request: Request) -> None:
    """Compress, measure, write the folder and print the table."""
    require_free(request.out)
    require_device(request.device)
    source = _source_of(request)
    data = open_data(
        request.data,
        source,
        batch=request.batch,
        max_tokens=request.max_tokens,
        device=request.device,
    )
    say(
        f"{request.source}: {data.calibration.examples} examples to calibrate, {data.validation.examples} to "
        f"choose, {data.test.examples} to report on"
    )
    settings = request.settings(source, data)
    finished = FinishedBlocks(partial_root(request.out) / key_of(settings))
    try:
        done = _compressed(request, source, data, finished)
        config = _measured(request, source, data, settings, done)
    except KeyboardInterrupt:
        if kept := len(finished):
            say(f"{kept} finished blocks are kept in {partial_root(request.out)}; run the same command again")
        raise
    except Exception:
        if not len(finished):
            finished.forget()
        raise
    quality, speed = config["quality"], config["latency"]
    plan = Plan(
        done.plan.blocks,
        {**done.plan.figures, quality["main"]: quality[quality["main"]], "speedup": speed["speedup"]},
    )
    text = card(request.out, config, plan, source.code, done.measured["fit_r2"])
    save(request.out, done.model, plan, config=config, card=text)
    discard(request.out)
    typer.echo(aligned(results(config)))
    typer.echo(f"\nwritten to {request.out}; `eugen verify {request.out}` measures it again")


def _source_of(request: Request) -> Source:
    """The model, once its blocks can be taken."""
    source = open_source(request.source, request.weights)
    sites = find_ffns(source.model)
    if not sites:
        raise ValueError(nothing_found(source.model))
    check_weights(source.model, sites, fitted=True, refined=request.level.refine_steps > 0)
    source.model.to(request.device)
    return source


def _compressed(request: Request, source: Source, data: Data, finished: FinishedBlocks) -> Compressed:
    """The plan, kept or new, carried out; finished blocks are taken as they are."""
    plan, resumed = finished.read_plan(), len(finished)
    if plan is None:
        plan = plan_for(
            source.model,
            data.calibration,
            target=request.target,
            row=request.row,
            level=request.level,
            call=call,
            example=data.example,
            seed=request.seed,
            progress=say,
        )
        finished.write_plan(plan)
    elif resumed:
        say(f"resuming: {resumed} of {len(plan.blocks)} blocks were finished before")
    return carry_out(
        source.model,
        data.calibration,
        plan,
        level=request.level,
        call=call,
        validation=data.validation,
        seed=request.seed,
        progress=Progress(resumed, len(plan.blocks)),
        finished=finished,
    )


def _measured(
    request: Request, source: Source, data: Data, settings: dict[str, Any], done: Compressed
) -> dict[str, Any]:
    """`config.json`: where everything came from, and what was measured."""
    say("measuring quality and speed beside the original")
    measured = measure(source.model, done.model, data.test, data.example, request.device)
    target = {name: value for name, value in settings["target"].items() if value is not None}
    return {
        "source": request.source,
        "weights": None if request.weights is None else str(request.weights.resolve()),
        "weights_sha256": settings["weights_sha256"],
        "target": target,
        "row": settings["row"],
        "level": request.level.name,
        "seed": request.seed,
        "versions": settings["versions"],
        "data": {
            "path": str(request.data.resolve()),
            "sha256": data.sha256,
            "kind": data.kind,
            "batch": request.batch,
            "max_tokens": request.max_tokens,
            "split_seed": SPLIT_SEED,
            "calibration": data.calibration.examples,
            "validation": data.validation.examples,
            "test": data.test.examples,
        },
        **measured,
        "work": done.measured,
    }
