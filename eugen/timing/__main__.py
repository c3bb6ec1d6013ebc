"""Time a model's layers against the dense model: latency, memory, energy, limits.

Every row runs in this process beside the dense model of the same dtype, interleaved, in several placements in
memory. The dense model beside its own copy is the control: its interval must cover 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import torch

from eugen.timing.clock import Clock, is_here
from eugen.timing.placements import LEAST_PAIRS, LEAST_PLACEMENTS, PLACEMENTS
from eugen.timing.profiler import Settings, line_of, profile_model
from eugen.timing.record import FAILED, write_whole
from eugen.timing.rows import available, parse_rows
from eugen.timing.self_check import self_check
from eugen.timing.subjects import BUILT_IN, CALLS, SCOPES, Subject, load, moved
from eugen.timing.tables import markdown

DTYPES = ("float32", "bfloat16", "float16")
EXAMPLES = """examples:
  python -m eugen.timing                                                    a small MLP, to see what comes out
  python -m eugen.timing --model timm:vit_base_patch16_224 --batch 1,64 --dtype bfloat16 --device cuda \\
      --layers narrow,prune,low_rank,eugen,int8,int8_of_eugen,compile,compile_of_eugen --cuda-graph
  python -m eugen.timing --model 'package.module:Network(width=768,depth=12)' --input ids:1024:50257 \\
      --calls prefill,decode --scope model,ffn --layers eugen --out gpt.json --trace traces
  python -m eugen.timing --layers 'eugen(sharing=powers),eugen(order=3)' --scope layer
  python -m eugen.timing --self-check 40                                    does a copy's interval cover 1?

calls:  forward  the inputs as they are: images, rays (rendering), ids
        prefill  token ids of the whole context at once
        decode   one token of each sequence and no context: what the blocks cost at one token. Networks here
                 have no cache, so its reading is not in it; give a model with a cache of its own as `forward`
scopes: model    the whole call        ffn  all feed-forward blocks, on the inputs that they get in a forward
        layer    each block by itself
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write records. Returns 1 if a row failed, or the self-check."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        print("models:", ", ".join([*BUILT_IN, "timm:NAME", "package.module:factory"]))
        print("layers:", ", ".join(available()))
        return 0
    _check(parser, options)
    if options.device != "cpu":
        torch.cuda.set_device(options.device)  # kernels of Triton start on the current one
    torch.set_num_threads(options.threads)
    try:
        subject, rows = load(options.model, options.input), parse_rows(options.layers)
        for call in options.calls:
            subject.inputs(call, 1)
    except ValueError as error:
        parser.error(str(error))
    if options.self_check is not None:
        return _self_check(subject, options)
    profile = profile_model(subject, rows, _settings(options), lambda so_far: _say(line_of(so_far.rows[-1])))
    text = markdown(profile)
    print(text)  # first: no file that cannot be written takes it away
    if options.out:
        profile.write(options.out)
        write_whole(options.out.with_suffix(".md"), text)
    if options.samples:
        profile.write_samples(options.samples)
    return int(any(row.status == FAILED for row in profile.rows))


def _self_check(subject: Subject, options: argparse.Namespace) -> int:
    dtype = getattr(torch, options.dtype)
    example = moved(subject.inputs(options.calls[0], options.batch[0]), options.device, dtype)
    found = self_check(
        subject.model.to(options.device, dtype),
        example,
        repetitions=options.self_check,
        placements=options.placements,
        pairs=options.pairs,
        seconds=options.seconds,
        confidence=options.confidence,
        clock=Clock(options.device, cold=options.l2_cold, cuda_graph=options.cuda_graph),
        progress=_say,
    )
    agreeing, compared = found.agreements
    total = len(found.speedups)
    print(
        f"{found.covered} of {total} intervals cover 1; at {found.confidence:.0%} at least {found.least} must"
    )
    print(f"{found.covered_unplaced} of {total} would without placements (pairs of the first one alone)")
    print(f"{agreeing} of {compared} successive repetitions agree within their intervals")
    return int(found.covered < found.least)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        budget=options.budget,
        device=options.device,
        dtype=options.dtype,
        batches=tuple(options.batch),
        calls=tuple(options.calls),
        scopes=tuple(options.scope),
        placements=options.placements,
        pairs=options.pairs,
        seconds=options.seconds,
        confidence=options.confidence,
        cold=options.l2_cold,
        cuda_graph=options.cuda_graph,
        energy_seconds=options.energy_seconds,
        trace=options.trace,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eugen.timing",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="mlp",
        help="mlp, transformer, timm:NAME or package.module:factory(option=value, …)",
    )
    add(
        "--input",
        help="shape of one example, 3x224x224, or ids:TOKENS:VOCABULARY; the model's own if it has one",
    )
    add("--layers", default="narrow,prune,low_rank,fff,int8,bf16,compile,eugen,int8_of_eugen,bf16_of_eugen")
    add("--list", action="store_true", help="name the models and layers that are known, and end")
    add("--budget", type=float, default=0.3, help="fraction of the dense blocks' MACs (0.3)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="of the dense model and every row")
    add("--batch", type=_numbers, default=[1], help="sizes, 1,8,64")
    add("--calls", type=_words, default=["forward"], help="forward,prefill,decode, see below")
    add("--scope", type=_words, default=["model"], help="model,ffn,layer, see below")
    add("--placements", type=int, default=PLACEMENTS, help=f"places in memory for each row ({PLACEMENTS})")
    add("--pairs", type=int, default=20, help="in each placement, an even number (20)")
    add("--seconds", type=float, default=10.0, help="at most, for the pairs of one row and condition (10)")
    add("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--cuda-graph", action="store_true", help="time the replay of a captured graph, without launches")
    add("--l2-cold", action="store_true", help="flush the last cache before every call")
    add("--energy-seconds", type=float, default=1.0, help="repeat so long for the energy (1; 0 for none)")
    add("--out", type=Path, help="record as JSON, and a table of the same name with .md")
    add("--samples", type=Path, help="every pair as parquet; needs pyarrow")
    add("--trace", type=Path, help="folder for a trace of each row, for ui.perfetto.dev")
    add("--self-check", type=int, metavar="N", help="compare the model with its copy N times and count")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    _check_measurement(parser, options)
    for name, known in (("calls", CALLS), ("scope", SCOPES)):
        unknown = [word for word in getattr(options, name) if word not in known]
        if unknown:
            parser.error(f"--{name} {','.join(unknown)} is unknown: use {', '.join(known)}")
    if min(options.batch) < 1:
        parser.error(f"--batch {min(options.batch)} must be at least 1")
    if not 0 < options.budget <= 1:
        parser.error(f"--budget {options.budget} must be in (0, 1]: a fraction of the dense blocks' MACs")
    if not is_here(options.device):
        parser.error(f"--device {options.device} is not here: use cpu, or cuda where torch sees one")
    if options.cuda_graph and not options.device.startswith("cuda"):
        parser.error("--cuda-graph needs --device cuda")
    if options.out and options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    if options.samples and importlib.util.find_spec("pyarrow") is None:
        parser.error(
            f"--samples {options.samples} needs pyarrow: install it, or take --out, which has every pair"
        )


def _check_measurement(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, least in (("placements", LEAST_PLACEMENTS), ("pairs", LEAST_PAIRS), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    if options.self_check is not None and options.self_check < 1:
        parser.error(f"--self-check {options.self_check} must be at least 1")
    for name in ("seconds", "energy_seconds"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be finite, at least 0")
    if options.pairs % 2:
        parser.error(f"--pairs {options.pairs} must be even: as many of either order")
    if not 0 < options.confidence < 1:
        parser.error(f"--confidence {options.confidence} must be between 0 and 1")


if __name__ == "__main__":
    sys.exit(main())
