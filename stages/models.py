"""Trained networks on disk: the dense baseline whole, everything derived from it as what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import eugen
from eugen import FFNLayer, LayerConfig
from eugen.plan import config_data, config_from_data
from stages.tasks import BASELINE, Task

TRANSFERRED, FINETUNED = Path("artifacts/transfer"), Path("artifacts/finetune")
"""What the stages of those names leave, by task and method."""
DENSE_FILE = "dense.safetensors"
RECORD_FILE = "record.json"


def dense_model(task: Task) -> nn.Module:
    """The trained dense network of a task, in evaluation mode."""
    model = task.build()
    model.load_state_dict(load_file(BASELINE / task.name / DENSE_FILE))
    return model.eval()


def student_model(
    dense: nn.Module, config: LayerConfig | Mapping[str, LayerConfig], changed: dict[str, Tensor]
) -> nn.Module:
    """The dense network with its blocks replaced and the stored changes loaded.

    Args:
        config: one for all blocks, or one for each replaced block by its name.
    """
    student = eugen.replace(dense, config).model
    state = student.state_dict()
    unknown = sorted(set(changed) - set(state))
    if unknown:
        raise ValueError(
            f"stored tensor {unknown[0]} is not part of the model: it belongs to another configuration"
        )
    student.load_state_dict({**state, **changed})
    return student.eval()


def plan_data(result: eugen.Replacement, config: LayerConfig | Mapping[str, LayerConfig]) -> dict[str, Any]:
    """Which layer stands in each replaced block, as a transfer's record keeps it."""
    per_block = config if isinstance(config, Mapping) else {site.name: config for site in result.sites}
    return {name: config_data(layer) for name, layer in per_block.items()}


def transferred_plan(task: str, method: str, seed: int, budget: float) -> dict[str, LayerConfig]:
    """Which layer the transfer of a unit put into each block."""
    units = read_json(TRANSFERRED / task / method / RECORD_FILE)["units"]
    (unit,) = [unit for unit in units if (unit["seed"], unit["budget"]) == (seed, budget)]
    return {name: config_from_data(data) for name, data in unit["plan"].items()}


def changed_tensors(student: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """The replaced blocks' tensors, and those that the dense network lacks or has with other values."""
    known = dense.state_dict()
    # A block is stored whole, tensors that are as they were too: `student_model` draws it anew.
    blocks = tuple(
        f"{path}." if path else "" for path, module in student.named_modules() if isinstance(module, FFNLayer)
    )
    return {
        name: tensor
        for name, tensor in student.state_dict().items()
        if (blocks and name.startswith(blocks))
        or name not in known
        or known[name].shape != tensor.shape
        or not torch.equal(known[name], tensor)
    }


def unit_name(seed: int, budget: float) -> str:
    """Stem of the files of one seed at one budget."""
    return f"seed{seed}-budget{budget:g}"


def read_json(path: Path) -> Any:
    """Plain data of an earlier stage.

    Raises:
        FileNotFoundError: names the stage that writes the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it, `dvc repro`")
    return json.loads(path.read_text(encoding="utf-8"))
