"""The model card of an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eugen.cli.tables import KINDS, markdown, results
from eugen.plan import Plan, config_data

CARD = """\
# {title}

`{source}` with {blocks} of its feed-forward blocks replaced by cheaper ones: eugen {version},
level `{level}`, seed {seed}.

{table}

Quality is agreement with the original, without labels, on {examples} held-out examples of `{data}` that
neither fitted nor chose anything; the outputs are {kind}. Latency: both models interleaved in one process,
a batch of {batch}, {device}, {threads} threads, torch {torch}. MACs are those of
all matrix products of that batch.

## Load

```python
{code}
model = eugen.load({folder!r}, model).eval()
```

The result is the model that was measured, to the bit. `eugen verify {folder}` measures all of it again.

## Blocks

{plan}

## Files

`model.safetensors`: all weights; `plan.json`: the configuration of each block; `config.json`: source, data,
settings, versions, hashes and everything measured.
"""


def card(folder: Path, config: dict[str, Any], plan: Plan, code: str, fit: dict[str, float | None]) -> str:
    """The text of `README.md`.

    Args:
        code: lines that make an instance of the original.
        fit: held-out R² of each block, None where nothing was fitted.
    """
    quality, conditions = config["quality"], config["conditions"]
    return CARD.format(
        title=folder.resolve().name,
        source=config["source"],
        blocks=len(plan.blocks),
        version=config["versions"]["eugen"],
        level=config["level"],
        seed=config["seed"],
        table=markdown(results(config)),
        examples=quality["examples"],
        data=Path(config["data"]["path"]).name,
        kind=KINDS[quality["kind"]],
        batch=conditions["batch"],
        device=conditions["device"],
        threads=conditions["threads"],
        torch=conditions["versions"]["torch"],
        code=code,
        folder=str(folder),
        plan=markdown(_blocks(plan, fit)),
    )


def _blocks(plan: Plan, fit: dict[str, float | None]) -> list[list[str]]:
    rows = [["block", "layer", "settings", "held-out R²"]]
    for name, block in plan.blocks.items():
        data = config_data(block)
        layer = str(data.pop("layer"))
        settings = ", ".join(f"{key} {value}" for key, value in data.items())
        r2 = fit.get(name)
        rows.append([f"`{name or '(the model itself)'}`", layer, settings, "" if r2 is None else f"{r2:.4f}"])
    return rows
