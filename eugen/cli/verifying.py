"""`eugen verify`: whether a folder is what its own records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from torch import nn

from eugen.cli.compressing import require_device
from eugen.cli.data import Data, data_hash, open_data
from eugen.cli.errors import FAILED
from eugen.cli.measure import differences, measure
from eugen.cli.progress import say
from eugen.cli.sources import Source, open_source
from eugen.cli.tables import aligned, results
from eugen.compression.saved import load, read_config, read_plan, state_hash
from eugen.ffn import FFNLayer
from eugen.plan import Plan


def run(folder: Path, source: str | None, data: Path | None, weights: Path | None, device: str) -> None:
    """Rebuild both models, measure again and compare with the records; exit code 1 where they differ.

    Raises:
        ValueError: a file, the original's weights or the data are not those of the records.
    """
    require_device(device)
    config, plan = read_config(folder), read_plan(folder)
    if "quality" not in config or "data" not in config:
        raise ValueError(
            f"{folder} has no record of its quality: `eugen compress` writes one, eugen.save alone none"
        )
    original = _original(folder, config, source, weights)
    compressed = load(folder, original.model).eval().to(device)
    original.model.to(device)
    held_out = _held_out(folder, config, original, data, device)
    say("measuring quality and speed beside the original")
    found = measure(original.model, compressed, held_out.test, held_out.example, device)
    typer.echo(aligned(results(found)))
    wrong = differences(config["quality"], found["quality"])
    wrong += _other_macs(compressed, plan)
    if found["cost"]["compressed"]["macs"] != config["cost"]["compressed"]["macs"]:
        was, now = config["cost"]["compressed"]["macs"], found["cost"]["compressed"]["macs"]
        wrong.append(f"MACs of the batch were {was} and are {now}")
    before = config["latency"]
    typer.echo(
        f"\nrecorded speed-up {before['speedup']:.2f}× ({config['conditions']['device']}, "
        f"{config['conditions']['threads']} threads)"
    )
    for line in wrong:
        typer.echo(f"differs: {line}", err=True)
    if wrong:
        raise typer.Exit(FAILED)
    typer.echo(f"{folder} is what its records say")


def _original(folder: Path, config: dict[str, Any], spec: str | None, weights: Path | None) -> Source:
    if weights is None and spec is None and config["weights"] is not None:
        weights = Path(config["weights"])
    source = open_source(spec or config["source"], weights)
    if state_hash(source.model) != config["weights_sha256"]:
        raise ValueError(
            f"{spec or config['source']} has other weights than the model that {folder} was made from: "
            "give the original as SOURCE (and --weights)"
        )
    return source


def _held_out(folder: Path, config: dict[str, Any], source: Source, path: Path | None, device: str) -> Data:
    recorded = config["data"]
    path = path or Path(recorded["path"])
    if not path.exists():
        raise ValueError(f"the data of {folder} are not at {path} any more: give their place with --data")
    if data_hash(path) != recorded["sha256"]:
        raise ValueError(f"{path} is not what {folder} was made with (another SHA-256): give the same data")
    return open_data(path, source, batch=recorded["batch"], max_tokens=recorded["max_tokens"], device=device)


def _other_macs(model: nn.Module, plan: Plan) -> list[str]:
    """The plan's MACs of one token where the layers have others."""
    recorded = plan.figures.get("replaced_macs_per_token")
    layers = [module for name in plan.blocks if isinstance(module := model.get_submodule(name), FFNLayer)]
    now = sum(layer.macs_per_token for layer in layers)
    if recorded == now:
        return []
    return [f"the plan says {recorded} MACs of one token in the replaced blocks, the layers have {now}"]
