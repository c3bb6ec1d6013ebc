"""`eugen inspect` and `eugen layers`: what is in a model, what a budget buys, which rows there are."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import typer
from torch import nn

from eugen.cli.data import call, shape_of
from eugen.cli.sources import Source, image_size, open_source
from eugen.cli.tables import aligned, amount
from eugen.compression.tokens import tokens_through
from eugen.config import BudgetTooSmall, LayerConfig, UnsuitableBlock
from eugen.cost import count_macs
from eugen.ffn import DenseFFN
from eugen.layers import layers
from eugen.sites import FFNSite, find_ffns
from eugen.sites.faults import nothing_found
from eugen.timing.subjects import example_of

BUDGETS = (0.1, 0.3, 0.5)
TOKENS = 128


def inspect(spec: str, example: str | None) -> None:
    """Print the blocks of a model, and what budgets would buy."""
    source = open_source(spec, structure=True)
    sites = find_ffns(source.model)
    if not sites:
        raise ValueError(nothing_found(source.model))
    batch = _example(source, example)
    try:
        tokens = tokens_through(source.model, sites, batch, call)
        whole = count_macs(lambda: call(source.model, batch))
    except Exception as error:
        raise ValueError(
            f"--example: {shape_of(batch)} does not fit, {spec} takes {source.takes}: {error}"
        ) from error
    ffn = sum(site.dense.macs_per_token * tokens[site.name] for site in sites)
    parameters = sum(p.numel() for p in source.model.parameters())
    part = sum(site.dense.num_parameters() for site in sites) / parameters
    typer.echo(aligned(_block_rows(sites, tokens, whole), left=4))
    typer.echo(
        f"\n{len(sites)} block{'' if len(sites) == 1 else 's'}: {ffn / whole:.0%} of {amount(whole)} MACs "
        f"({shape_of(batch)}), {part:.0%} of {amount(parameters)} parameters"
    )
    bounds = ", ".join(f"{b:g} → {whole / (whole - ffn + b * ffn):.2f}×" for b in BUDGETS)
    typer.echo(f"speed-up of the whole model if time followed MACs, by budget: {bounds}\n")
    typer.echo(aligned(_budget_rows(sites)))
    typer.echo("\nfeatures (neurons, rank) of a block, and its parameters over the dense block's")


def list_layers() -> None:
    """Print the rows by name, with the first line of what their file says."""
    rows = [["row", "gated", "what it is"]]
    up, down, gate = (nn.Linear(64, 64, device="meta") for _ in range(3))
    gated = DenseFFN(up, nn.SiLU(), down, gate)
    for name, config in layers().items():
        rows.append([name, "yes" if _takes(config, gated) else "no", first_line(config)])
    typer.echo(aligned(rows, left=3))
    typer.echo("\ngated: whether the row takes gated blocks (SwiGLU); `auto` chooses a row for each block")


def _takes(config: type[LayerConfig], dense: DenseFFN) -> bool:
    """Whether a row can take this form of block."""
    only = config().only_budget
    try:
        config(budget=0.9 if only is None else only).build(dense, generator=torch.Generator())
    except UnsuitableBlock:
        return False
    return True


def first_line(config: type[LayerConfig]) -> str:
    """The first sentence of the row's file."""
    text = sys.modules[config.__module__].__doc__ or config.__doc__ or ""
    return text.strip().split("\n")[0]


def _example(source: Source, given: str | None) -> Any:
    """A batch of one: of the shape given, or of the model's own."""
    if given is not None:
        return example_of(given, option="--example")(1)
    if source.kind == "timm":
        return torch.zeros(1, *image_size(source.model))
    config = getattr(source.model, "config", None)
    if getattr(config, "vocab_size", None) is not None:
        longest = getattr(config, "max_position_embeddings", None) or TOKENS
        return torch.zeros(1, min(TOKENS, longest), dtype=torch.int64)
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        return torch.zeros(1, getattr(config, "num_channels", 3), side, side)
    first = next((m for m in source.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features)
    raise ValueError(f"{source.spec} does not tell its inputs: give --example, as 3x224x224 or ids:128:30522")


def _block_rows(sites: list[FFNSite], tokens: dict[str, int], whole: int) -> list[list[str]]:
    rows = [
        ["block", "in → hidden → out", "gated", "activation", "MACs/token", "parameters", "share of MACs"]
    ]
    for site in sites:
        dense = site.dense
        rows.append(
            [
                site.name or "(the model itself)",
                _shape(dense),
                "no" if dense.gate is None else "yes",
                _activation(dense.act),
                amount(dense.macs_per_token),
                amount(dense.num_parameters()),
                f"{dense.macs_per_token * tokens[site.name] / whole:.1%}",
            ]
        )
    return rows


def _shape(dense: DenseFFN) -> str:
    out = "" if dense.down is None else f" → {dense.out_features}"
    return f"{dense.in_features} → {dense.hidden_features}{out}"


def _activation(act: nn.Module) -> str:
    function = getattr(act, "function", None)
    return getattr(function, "__name__", type(function).__name__) if function else type(act).__name__


def _budget_rows(sites: list[FFNSite]) -> list[list[str]]:
    """A line for each row and each shape of block: what the budgets buy."""
    shapes = {(_shape(site.dense), site.dense.gate is not None): site.dense for site in sites}
    rows = [["row", *(f"budget {budget:g}" for budget in BUDGETS)]]
    for (shape, gated), dense in shapes.items():
        meta = copy.deepcopy(dense).to("meta")
        if len(shapes) > 1:
            rows.append([f"{shape}{', gated' if gated else ''}:", *("" for _ in BUDGETS)])
        for name, config in layers().items():
            if config().only_budget is None:
                rows.append([name, *(_try(config, meta, budget) for budget in BUDGETS)])
    return rows


def _try(config: type[LayerConfig], dense: DenseFFN, budget: float) -> str:
    """What a budget buys in words, or why it buys nothing."""
    try:
        layer = config(budget=budget).build(dense, generator=torch.Generator())
    except BudgetTooSmall as error:
        return f"least {error.least:g}"
    except ValueError:
        return "–"
    return f"{layer.num_features} ({layer.num_parameters() / dense.num_parameters():.0%})"
