"""Progress that survives a kill: training checkpoints and finished units of a stage.

Everything lives under `.work/progress/<key>/`, where the key is a hash of the stage's parameters
and dependencies; the folder goes when the stage has succeeded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stages.data.verify import sha256_file
from stages.tracking.record import CurvePoint
from stages.tracking.whole_file import remove_whole, whole, write_json

PROGRESS = Path(".work/progress")


class Training(Protocol):
    """What a training is made of besides its network."""

    optimiser: Optimizer
    schedule: LRScheduler
    generator: torch.Generator
    curve: list[CurvePoint]


class Progress:
    """The folder of one stage's finished units.

    Args:
        stage, task, method: which stage of dvc.yaml; its dependencies there become part of the key.
        params: the parameters that the result depends on.
    """

    def __init__(self, stage: str, *, task: str, method: str | None = None, params: Any) -> None:
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
        for path in _dependencies(stage, task, method):
            digest.update(path.as_posix().encode())
            digest.update(sha256_file(path).encode())
        name = "-".join(part for part in (stage, task, method) if part)
        self.folder = PROGRESS / f"{name}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, unit: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A finished unit: its values and its tensors, or None."""
        values, tensors = self.folder / f"{unit}.json", self.folder / f"{unit}.safetensors"
        if not (values.exists() and tensors.exists()):
            return None
        return json.loads(values.read_text(encoding="utf-8")), load_file(tensors)

    def store(self, unit: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep a unit. The values are written last: they say that the unit is whole."""
        save_tensors(self.folder / f"{unit}.safetensors", tensors)
        write_json(self.folder / f"{unit}.json", values)

    def clear(self) -> None:
        """Forget everything, at once: the stage has succeeded."""
        remove_whole(self.folder)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors whole or not at all; tensors that share memory are copied apart."""
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with whole(path, sum(tensor.nbytes for tensor in apart.values())) as part:
        save_file(apart, part)


def save(path: Path, identity: dict[str, str], model: nn.Module, state: Training) -> None:
    """Write a training checkpoint, whole or not at all; `identity` says what it belongs to."""
    content = {
        "identity": identity,
        "curve": [point.model_dump() for point in state.curve],
        "model": model.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "schedule": state.schedule.state_dict(),
        "generator": state.generator.get_state(),
    }
    with whole(path) as part, part.open("wb") as file:  # torch's own writer hides why a disk refused
        torch.save(content, file)


def resume(path: Path, identity: dict[str, str], model: nn.Module, state: Training) -> list[CurvePoint]:
    """Restore a checkpoint in place, if there is one; returns the curve so far.

    Raises:
        ValueError: the file is no checkpoint, or one of another configuration.
    """
    if not path.exists():
        return []
    cure = "delete it, or restore the parameters that it was made with"
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        known = content["identity"]
    except Exception as error:  # whatever a file that is no checkpoint makes torch raise
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}): {cure}") from error
    for name in [*identity, *known]:
        here, there = identity.get(name, "absent"), known.get(name, "absent")
        if here != there:
            raise ValueError(f"{path} is of another configuration, {name} is {there} and not {here}: {cure}")
    model.load_state_dict(content["model"])
    state.optimiser.load_state_dict(content["optimiser"])
    state.schedule.load_state_dict(content["schedule"])
    state.generator.set_state(content["generator"])
    return [CurvePoint(**point) for point in content["curve"]]


def _dependencies(stage: str, task: str, method: str | None) -> list[Path]:
    """The files that dvc.yaml names as the stage's dependencies, folders unfolded."""
    text = Path("dvc.yaml").read_text(encoding="utf-8")
    text = text.replace("${item.task}", task).replace("${item.method}", method or "")
    files: list[Path] = []
    for name in yaml.safe_load(text)["stages"][stage]["deps"]:
        path = Path(name)
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [p for p in found if "__pycache__" not in p.parts]
    return files
