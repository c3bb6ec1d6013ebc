"""The command line: options and their help; each command's work is in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eugen.cli.errors import reported

app = typer.Typer(
    name="eugen",
    help="Cheaper feed-forward blocks for a trained model, fitted without backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SPEC = "timm:NAME, hf:FOLDER or package.module:function; options in brackets, as timm:NAME(img_size=32)"
Model = Annotated[str, typer.Argument(metavar="SOURCE", help=SPEC)]
Weights = Annotated[Path | None, typer.Option(help="A file of the original's weights: .safetensors or .pth.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; torch's choice by default.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
@reported
def compress(
    source: Model,
    data: Annotated[
        Path,
        typer.Option(help="Text (an example a line), a folder of images, .npy or .safetensors of inputs."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; must not be there yet.")],
    budget: Annotated[
        float | None, typer.Option(help="Target: this fraction of the blocks' multiply-accumulates, 0.3.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Target: this fraction of the blocks' parameters, 0.3.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Target: the whole model this much faster, measured here, 1.5.")
    ] = None,
    row: Annotated[
        str, typer.Option(help="A row of `eugen layers` for all blocks; auto chooses for each block.")
    ] = "auto",
    level: Annotated[str, typer.Option(help="Effort: fast, standard or best.")] = "standard",
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples a batch; 64 sentences or 32 of anything else.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer texts are cut.")] = 128,
    debug: Debug = False,
) -> None:
    """Make a model cheaper and write it to a folder, with what it costs and how near it is to the original.

    Ctrl-C keeps finished blocks in OUT.partial; the same command goes on from there.
    """
    from eugen.cli import compressing

    _use_threads(threads)
    request = compressing.Request(
        source=source,
        data=data,
        target=_target(budget, params, speedup),
        row=compressing.row_of(row),
        level=compressing.level_named(level),
        out=out,
        weights=weights,
        seed=seed,
        device=device,
        batch=batch,
        max_tokens=max_tokens,
    )
    compressing.run(request)


@app.command()
@reported
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `eugen compress` wrote.")],
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="The original, where its place has changed.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data, where their place has changed.")] = None,
    weights: Weights = None,
    threads: Threads = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Measure quality and speed beside the original again.

    Exit code 1 where the quality or the multiply-accumulates are not the recorded ones.
    """
    from eugen.cli import verifying

    _use_threads(threads)
    verifying.run(folder, source, data, weights, device)


@app.command()
@reported
def inspect(
    source: Model,
    example: Annotated[
        str | None, typer.Option(help="Shape of one input, 3x224x224, or ids:TOKENS:VOCABULARY.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show a model's feed-forward blocks, and what budgets would buy; no weights are needed."""
    from eugen.cli import inspecting

    inspecting.inspect(source, example)


@app.command()
@reported
def layers(debug: Debug = False) -> None:
    """List the rows: the methods that can take a block's place."""
    from eugen.cli import inspecting

    inspecting.list_layers()


def _target(budget: float | None, params: float | None, speedup: float | None):
    from eugen.search.target import Target

    given = {"--budget": budget, "--params": params, "--speedup": speedup}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        said = "none is given" if not named else f"{' and '.join(named)} are given"
        raise ValueError(f"give exactly one target, --budget, --params or --speedup: {said}")
    return Target(macs=budget, parameters=params, speedup=speedup)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
