"""Where the model comes from: `timm:NAME`, `hf:FOLDER` or `package.module:function`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eugen.cli.errors import unknown
from eugen.timing.spec import parse

KINDS = ("timm", "hf")
HF_FILES = ("config.json", "model.safetensors")
OPTIONS = "as in timm:vit_tiny_patch16_224(img_size=32)"


@dataclass(frozen=True)
class Source:
    """A dense model, and how it was named.

    Attributes:
        kind: `timm`, `hf` or `function`.
        folder: of an `hf` model, else None.
        code: lines of Python that make an instance, for the model card.
    """

    spec: str
    kind: str
    model: nn.Module
    folder: Path | None
    code: str

    @property
    def takes(self) -> str:
        """The model's inputs in words, for messages."""
        config = getattr(self.model, "config", None)
        vocabulary = getattr(config, "vocab_size", None)
        if self.kind == "hf" and vocabulary is not None:
            longest = getattr(config, "max_position_embeddings", None)
            most = "" if longest is None else f", at most {longest} tokens"
            return f"token ids [batch, tokens] below {vocabulary}{most}"
        if self.kind == "timm":
            return f"images [batch, {', '.join(map(str, image_size(self.model)))}]"
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                return f"{module.in_features} features (its first layer is Linear)"
            if isinstance(module, nn.Conv2d):
                return f"{module.in_channels} channels (its first layer is Conv2d)"
        return f"what {type(self.model).__name__}.forward takes"


def open_source(spec: str, weights: Path | None = None, *, structure: bool = False) -> Source:
    """The model of a name, in evaluation mode.

    Args:
        weights: a file of weights (`.safetensors`, `.pth`, `.pt`, `.bin`) in place of the model's own.
        structure: the weights do not matter: nothing is fetched or read.

    Raises:
        ValueError: a name that leads nowhere, or weights that are not there or another model's.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise ValueError(f"SOURCE {spec!r} must be timm:NAME, hf:FOLDER or package.module:function")
    opened: Callable[..., Source] = {"timm": _timm, "hf": _hf}.get(kind, _function)
    with torch.random.fork_rng(devices=[]):  # what a function draws is the same each time
        torch.manual_seed(0)
        source = opened(spec, rest, weights, structure)
    if weights is not None and not structure:
        _load_weights(source.model, weights)
    source.model.eval()
    return source


def image_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width of a timm model's images."""
    embed = getattr(model, "patch_embed", None)
    size, channels = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "in_channels", 3)
    if size is not None:
        return (channels, *size)
    return tuple(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224)))


def _timm(spec: str, rest: str, weights: Path | None, structure: bool) -> Source:
    timm = _package("timm", "vision")
    name, options = parse(rest)
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise unknown("timm model", name, known)
    fetch = options.pop("pretrained", True) and weights is None and not structure
    try:
        model = timm.create_model(name, pretrained=fetch, **options)
    except TypeError as error:
        raise ValueError(f"SOURCE {spec!r}: {error}; options are the model's own, {OPTIONS}") from None
    except Exception as error:
        if not fetch:
            raise
        raise ValueError(
            f"SOURCE {spec!r}: its pre-trained weights are not on this machine and could not be fetched "
            f"({type(error).__name__}): give them with --weights FILE.safetensors"
        ) from error
    words = "".join(f", {key}={value!r}" for key, value in options.items())
    code = f"import eugen, timm\nmodel = timm.create_model({name!r}{words})"
    return Source(spec, "timm", model, None, code)


def _hf(spec: str, rest: str, weights: Path | None, structure: bool) -> Source:
    folder = Path(rest).expanduser()
    if weights is not None:
        raise ValueError(f"--weights {weights}: hf:FOLDER has its own weights; leave it out")
    if not folder.is_dir():
        raise ValueError(f"SOURCE {spec!r}: {folder} is no folder on this machine; nothing is fetched")
    missing = [name for name in HF_FILES if not (folder / name).is_file()]
    if missing and not (structure and missing == ["model.safetensors"]):
        raise ValueError(f"SOURCE {spec!r}: {folder} lacks {' and '.join(missing)}")
    transformers = _package("transformers", "text")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        # The class with the head that the weights were saved with, where the folder names it.
        named = next((n for n in names if hasattr(transformers, n)), None)
        if structure:
            model = (
                getattr(transformers, named)(config) if named else transformers.AutoModel.from_config(config)
            )
        else:
            loader = getattr(transformers, named) if named else transformers.AutoModel
            model = loader.from_pretrained(folder, local_files_only=True)
            if any(weight.dtype is torch.float16 for weight in model.parameters()):
                model = model.float()  # fits and refinement need its range
    except Exception as error:
        raise ValueError(f"SOURCE {spec!r}: transformers cannot load {folder}: {error}") from error
    made = f"config = transformers.AutoConfig.from_pretrained({str(folder)!r})"
    code = f"import eugen, transformers\n{made}\nmodel = transformers.{type(model).__name__}(config)"
    return Source(spec, "hf", model, folder, code)


def _function(spec: str, rest: str, weights: Path | None, structure: bool) -> Source:
    package = spec.partition(":")[0]
    name, options = parse(rest)
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; the command's script does not
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if get_close_matches(package.lower(), KINDS):
            raise unknown("kind of SOURCE", package.lower(), KINDS) from None
        kinds = "timm:NAME, hf:FOLDER or package.module:function"
        raise ValueError(f"SOURCE {spec!r}: {error}; it must be {kinds}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise unknown(f"function of {package}", name, [n for n in dir(module) if not n.startswith("_")])
    try:
        model = function(**options)
    except TypeError as error:
        raise ValueError(f"SOURCE {spec!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"SOURCE {spec!r} made {type(model).__name__}, no torch.nn.Module")
    words = ", ".join(f"{key}={value!r}" for key, value in options.items())
    code = f"import eugen\nfrom {package} import {name}\nmodel = {name}({words})"
    return Source(spec, "function", model, None, code)


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install 'eugen[{extra}]'") from None


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights.

    Raises:
        ValueError: it is not there, no file of weights, or another model's.
    """
    if not path.is_file():
        raise ValueError(f"--weights {path} is no file")
    try:
        state = _read(path)
    except Exception as error:
        raise ValueError(f"--weights {path} cannot be read: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(
            f"--weights {path} are not of {type(model).__name__}: {' '.join(lines)[:300]}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not any(isinstance(v, Tensor | dict) for v in found.values()):
        raise ValueError("it holds no state dict")
    return found
