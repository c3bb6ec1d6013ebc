"""What an interrupted compression keeps beside its output folder: the plan and the finished blocks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from eugen.compression.saved import file_hash
from eugen.plan import Plan
from eugen.surgery import FittedBlock

SOURCE = Path(__file__).resolve().parents[1]
KEPT = {".safetensors", ".json", ".tmp"}


def partial_root(out: Path) -> Path:
    """The folder beside `out` that holds unfinished work."""
    place = out.resolve()
    return place.parent / f"{place.name}.partial"


def key_of(settings: Mapping[str, Any]) -> str:
    """A hash of everything that determines the result: settings, and the library's own code."""
    code = {str(path.relative_to(SOURCE)): file_hash(path) for path in sorted(SOURCE.rglob("*.py"))}
    text = json.dumps([settings, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class FinishedBlocks(MutableMapping[str, FittedBlock]):
    """Finished blocks by name, each a file that is written whole or not at all.

    Args:
        folder: of one key; made with the first block. A file that cannot be read counts as not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, name: str, block: FittedBlock) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        state = {key: _own(tensor) for key, tensor in block.state.items()}
        save_file(
            state, path.with_suffix(".tmp"), metadata={"name": name, "fit_r2": json.dumps(block.fit_r2)}
        )
        os.replace(path.with_suffix(".tmp"), path)

    def __getitem__(self, name: str) -> FittedBlock:
        found = _read(self._path(name))
        if found is None:
            raise KeyError(name)
        return found[1]

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        paths = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        return iter([found[0] for path in paths if (found := _read(path)) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"

    def write_plan(self, plan: Plan) -> None:
        """Keep the plan, so that a choice by measurement is not made anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.folder / "plan.tmp"
        made.write_text(plan.to_json(), encoding="utf-8")
        os.replace(made, self.folder / "plan.json")

    def read_plan(self) -> Plan | None:
        """The plan kept, None if there is none."""
        try:
            return Plan.from_json((self.folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def forget(self) -> None:
        """Delete what is kept, and the folder above if nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()


def discard(out: Path) -> None:
    """Delete the unfinished work of an output folder, whatever its settings were, and nothing else."""
    root = partial_root(out)
    for folder in root.glob("*"):
        if re.fullmatch("[0-9a-f]{16}", folder.name) and all(f.suffix in KEPT for f in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        root.rmdir()


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _read(path: Path) -> tuple[str, FittedBlock] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            data = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        return data["name"], FittedBlock(state, json.loads(data["fit_r2"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
