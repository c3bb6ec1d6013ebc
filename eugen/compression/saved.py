"""A compressed model as a folder: its weights, its plan, and what is known about it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eugen.compression.compress import Compressed
from eugen.plan import Plan, plain
from eugen.surgery import replace

FORMAT = 1
WEIGHTS, PLAN, CONFIG, CARD = "model.safetensors", "plan.json", "config.json", "README.md"


def save(
    folder: str | Path,
    model: nn.Module | Compressed,
    plan: Plan | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write `model.safetensors`, `plan.json`, `config.json` and, with `card`, `README.md`.

    The folder appears whole or not at all. Needs safetensors.

    Args:
        folder: must not be there, or be empty.
        model: what `compress` or `replace` made.
        plan: of the model; a `Compressed` has its own.
        config: what else is to be known; values of JSON.
        card: text of the model card.

    Raises:
        ValueError: something is in the folder, or there is no plan.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()  # what a link leads to; a link itself cannot be replaced by a folder
    if isinstance(model, Compressed):
        model, plan = model.model, model.plan if plan is None else plan
    if plan is None:
        raise ValueError("plan= is needed beside a bare module: the configuration of each replaced block")
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tensors, tied = _distinct(model)
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
        (made / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
        files = {name: file_hash(made / name) for name in (WEIGHTS, PLAN)}
        data = {"format": FORMAT, "class": type(model).__name__, "tied": tied, "files": files}
        text = json.dumps(plain(data | dict(config or {})), indent=2, ensure_ascii=False, allow_nan=False)
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (made / CARD).write_text(card, encoding="utf-8")
        made.chmod(0o755)  # a temporary folder is its maker's alone
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The compressed model of a folder, exactly as it was saved; needs safetensors.

    Args:
        model: an instance of the dense architecture; its weights do not matter, and it stays as it was.
            Device and mode (training or evaluation) of the result are its own, dtypes the saved ones.

    Raises:
        ValueError: a file is missing, damaged or of a newer format, or the model is another architecture.
    """
    folder = Path(folder)
    config, plan, tensors = read_config(folder), read_plan(folder), _read_weights(folder)
    tensors |= {name: tensors[first] for name, first in config["tied"].items()}
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the model is on the meta device: first give it memory, model.to_empty(device='cpu')"
        )
    try:
        loaded = replace(model, plan.blocks).model
    except ValueError as error:
        raise ValueError(f"{_another(folder, config, model)}: {error}") from None
    _fill(loaded, tensors, _another(folder, config, model))
    return loaded


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, once its files are what they were when they were written.

    Raises:
        ValueError: there is none, it is of a newer format, or a file is missing or changed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}: give a folder that eugen.save or `eugen compress` wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version, files = config["format"], config["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not eugen's ({error!r}): write the folder anew") from None
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version}, this eugen reads {FORMAT}: install a newer eugen")
    for name, wanted in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: write or copy the folder anew")
        if file_hash(folder / name) != wanted:
            raise ValueError(
                f"{folder / name} is not what was written, its SHA-256 differs: it is damaged or edited; "
                "write or copy the folder anew"
            )
    return config


def read_plan(folder: Path) -> Plan:
    """`plan.json` of a folder.

    Raises:
        ValueError: it is none.
    """
    try:
        return Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / PLAN}: {error}") from None


def require_free(folder: Path) -> None:
    """Raise ValueError where something would be overwritten, or no folder can be put in that place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: name another folder, or delete it")
    place = folder.resolve()
    if place == Path.cwd() or place.is_mount():
        what = "mounted" if place.is_mount() else "the folder you are in"
        raise ValueError(f"{folder} is {what}, and is written whole in one go: name a new folder inside it")
    above = next(each for each in place.parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be made: {above} is no folder that you may write to")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, dtypes, shapes and values.

    Raises:
        ValueError: the state holds something else than tensors.
    """
    return values_hash(_tensors_of(model))


def values_hash(values: Mapping[str, Tensor | str]) -> str:
    """SHA-256 of named tensors and texts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(values.items()):
        if isinstance(tensor, str):
            digest.update(f"{name} {tensor}\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            # As they lie in memory; `numpy()` would ask for a package more and knows no bfloat16.
            digest.update(ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()))
    return digest.hexdigest()


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ValueError(
            f"the model's {other} is no tensor but {type(state[other]).__name__}, which is not saved: "
            "compress the model before it is quantised"
        )
    return state


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor of the state once, in memory of its own, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in _tensors_of(model).items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], another: str) -> None:
    """Give the model this state, dtypes included.

    Raises:
        ValueError: names or shapes are not the model's, or it ties what was not tied.
    """
    own = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name in own and own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(f"{another}: {' '.join(lines)[:400]}") from None
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.cpu(), tensors[name]) and not tensors[name].isnan().any():
            raise ValueError(
                f"{another}: its {name} shares memory with another weight, the saved one did not"
            )


def _another(folder: Path, config: Mapping[str, Any], model: nn.Module) -> str:
    return (
        f"the model ({type(model).__name__}) is not the architecture that {folder} was made from "
        f"({config.get('class', 'unknown')})"
    )
