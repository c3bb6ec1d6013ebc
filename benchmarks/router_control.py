"""Is a conditional EUGen's gate more than a table of tokens? `python -m benchmarks.router_control --help`.

One block after another of a text encoder, a folder of transformers, in closed form on the dense network's
inputs. Experts of equal sizes are chosen in four ways: by the nearest centre to the block's input, as the row
`eugen_experts` does; by the token's id alone, each id having the expert that its inputs in the calibration
lines are nearest to most often; by the id at random; and not at all (`prune` of equal features). Judged by
held-out R², in the metric of the norm that follows, on other lines and on other text (`--other`), which shows
what a shift of domain costs each.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import FORMAT, ROOT, environment, load, table, write_json
from eugen import EUGenExpertsConfig, FFNSite, PruneConfig, find_ffns
from eugen.capture import capturing, evaluating
from eugen.ffn import DenseFFN, FFNLayer
from eugen.least_squares import fit_quality
from eugen.transfer import output_weight

Chunk = tuple[Tensor, Tensor, None]
MAX_TOKENS, BATCH, HELD_OUT = 32, 64, 5
"""Tokens of a line, lines of a batch, and every so many lines are judged on."""
FAR = 1e4
"""A label's place in the inputs: so far from the others that it alone decides the nearest centre."""
VOCABULARY = 2**17
"""Token ids are below this."""
MULTIPLIER = 2654435761
"""Knuth's, for a hash of token ids."""


def main(arguments: list[str] | None = None) -> int:
    """Compare the gates on every block, print the means, write the record."""
    options = _parse(arguments)
    before = environment()
    model, encode = _opened(options.model)
    lines = encode(options.data)
    fitted = [ids for index, ids in enumerate(lines) if index % HELD_OUT]
    held_out = {"held-out lines": [ids for index, ids in enumerate(lines) if index % HELD_OUT == 0]}
    if options.other is not None:
        held_out["other text"] = encode(options.other)
    results = []
    for site in find_ffns(model):
        train = observed(model, site, fitted)
        tests = {name: observed(model, site, part) for name, part in held_out.items()}
        results += compared(site, train, tests, options.budget, output_weight(site, model))
        print(*table(("block", "gate", *tests), [_cells(r, tests) for r in results[-4:]])[2:], sep="\n")
    means = [_mean(results, gate) for gate in dict.fromkeys(result["gate"] for result in results)]
    record = {
        "format": FORMAT,
        "benchmark": "router_control",
        "environment": {**before, "load_end": load()},
        "settings": {
            "model": Path(options.model).name,
            "data": Path(options.data).name,
            "other": None if options.other is None else Path(options.other).name,
            "budget": options.budget,
            "lines": len(lines),
        },
        "results": results,
        "means": means,
    }
    write_json(options.out, record)
    print("", *table(("block", "gate", *held_out), [_cells(mean, held_out) for mean in means]), sep="\n")
    return 0


def observed(model: nn.Module, site: FFNSite, lines: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The block's inputs `[T, d]` and their token ids `[T]`, batch by batch."""
    found = []
    with torch.no_grad(), evaluating(model):
        for batch in batches(lines):
            with capturing(model, [site], stop=True) as seen:
                model(batch)
            found.append((seen[site.name, "input"], batch.flatten()))
    return found


def batches(lines: Sequence[Tensor]) -> list[Tensor]:
    """Lines of equal length together, so that nothing is padded."""
    by_length: dict[int, list[Tensor]] = {}
    for ids in lines:
        by_length.setdefault(len(ids), []).append(ids)
    return [torch.stack(g[i : i + BATCH]) for g in by_length.values() for i in range(0, len(g), BATCH)]


def compared(
    site: FFNSite,
    train: list[tuple[Tensor, Tensor]],
    tests: dict[str, list[tuple[Tensor, Tensor]]],
    budget: float,
    importance: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Each gate's R² on the tests, all with the same shared features, width and number of experts.

    Args:
        importance: of each output dimension, in the fit's metric and in R².
    """
    dense = site.dense
    shared, width = EUGenExpertsConfig(budget=budget).sizes_for(dense)
    config = EUGenExpertsConfig(shared=shared, width=width)
    targets = _targets(dense, train)
    plain = _fitted(config, dense, targets, importance)
    table_of = by_majority(plain.route, train, config.experts)
    gates: dict[str, Callable[[Tensor], Tensor]] = {
        "token id": lambda ids: table_of[ids],
        "token id at random": lambda ids: by_chance(ids, config.experts),
    }
    pruned = _fitted(PruneConfig(hidden_features=shared + width), dense, targets, importance)
    unlabelled = partial(_targets, dense)
    layers: dict[str, tuple[FFNLayer, Callable[[list[tuple[Tensor, Tensor]]], list[Chunk]]]] = {
        "nearest centre": (plain, unlabelled),
        "none": (pruned, unlabelled),
    }
    wide = widened(dense, config.experts)
    for name, gate in gates.items():
        labelled = partial(with_labels, dense, gate=gate, experts=config.experts)
        layers[name] = _fitted(config, wide, labelled(train), importance), labelled
    return [
        {
            "block": site.name,
            "gate": name,
            "r2": {test: fit_quality(layer, chunks(part), importance) for test, part in tests.items()},
            "known ids": {test: _known(train, part) for test, part in tests.items()},
        }
        for name, (layer, chunks) in layers.items()
    ]


def by_majority(
    route: Callable[[Tensor], tuple[Tensor, Any]], train: list[tuple[Tensor, Tensor]], experts: int
) -> Tensor:
    """The expert that most inputs of a token id are nearest to, by id; by chance for ids not seen."""
    ids = torch.cat([ids for _, ids in train])
    nearest = torch.cat([route(x)[0].flatten() for x, _ in train])
    votes = torch.zeros(VOCABULARY, experts).index_put_((ids, nearest), torch.ones(len(ids)), accumulate=True)
    everyone = torch.arange(len(votes))
    return torch.where(votes.sum(1) > 0, votes.argmax(1), by_chance(everyone, experts))


def by_chance(ids: Tensor, experts: int) -> Tensor:
    """An expert by a hash of the id."""
    return (ids * MULTIPLIER % 2**32) * experts // 2**32


def widened(dense: DenseFFN, experts: int) -> DenseFFN:
    """The block with inputs more that it does not read."""
    wide = copy.deepcopy(dense)
    for linear in (wide.up, wide.gate):
        if linear is not None:
            linear.weight = nn.Parameter(nn.functional.pad(linear.weight.detach(), (0, experts)))
            linear.in_features += experts
    wide.in_features += experts
    return wide


def with_labels(
    dense: DenseFFN, part: list[tuple[Tensor, Tensor]], gate: Callable[[Tensor], Tensor], experts: int
) -> list[Chunk]:
    """Inputs with their expert marked in inputs of its own, and targets, which do not depend on it."""
    targets = (y for _, y, _ in _targets(dense, part))
    marks = (FAR * nn.functional.one_hot(gate(ids), experts).to(x.dtype) for x, ids in part)
    return [(torch.cat([x, mark], 1), y, None) for (x, _), mark, y in zip(part, marks, targets, strict=True)]


@torch.no_grad()
def _targets(dense: DenseFFN, part: list[tuple[Tensor, Tensor]]) -> list[Chunk]:
    return [(x, dense(x), None) for x, _ in part]


def _fitted(config: Any, dense: DenseFFN, chunks: list[Chunk], importance: Tensor | None) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return config.fit(dense, chunks, generator=generator, output_weight=importance).eval()


def _known(train: list[tuple[Tensor, Tensor]], part: list[tuple[Tensor, Tensor]]) -> float:
    """The share of tokens whose id was in the calibration lines."""
    seen = torch.cat([ids for _, ids in train]).unique()
    return float(torch.isin(torch.cat([ids for _, ids in part]), seen).double().mean())


def _mean(results: list[dict[str, Any]], gate: str) -> dict[str, Any]:
    own = [result["r2"] for result in results if result["gate"] == gate]
    return {
        "block": "mean",
        "gate": gate,
        "r2": {name: sum(r2[name] for r2 in own) / len(own) for name in own[0]},
    }


def _opened(folder: str) -> tuple[nn.Module, Callable[[str], list[Tensor]]]:
    """The encoder of a folder, and what makes token ids of the distinct lines of a file."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def encode(path: str) -> list[Tensor]:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        distinct = dict.fromkeys(tuple(found.ids) for found in tokenizer.encode_batch(lines))
        if len(distinct) < HELD_OUT:
            raise SystemExit(f"{path} holds {len(distinct)} different lines: give at least {HELD_OUT}")
        return [torch.tensor(ids) for ids in distinct if ids]

    return model, encode


def _cells(result: dict[str, Any], tests: Any) -> list[str]:
    return [result["block"], result["gate"], *(f"{result['r2'][name]:.4f}" for name in tests)]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_control", description=__doc__)
    parser.add_argument("model", metavar="FOLDER", help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", required=True, help="text, a line an example")
    parser.add_argument("--other", help="text of another kind")
    parser.add_argument("--budget", type=float, default=0.3)
    default = ROOT / "reports" / "benchmarks" / "router-control.json"
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default.relative_to(ROOT)}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
