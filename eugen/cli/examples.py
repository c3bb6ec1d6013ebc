"""What a file or folder of `--data` holds, as examples of a model's inputs: lines, images or arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eugen.cli.arrays import read_arrays
from eugen.cli.sources import Source, image_size
from eugen.compression.saved import file_hash, values_hash

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
NO_TEXT = {".npz", ".pt", ".pth", ".bin", ".pkl", ".zip", ".gz", ".parquet", ".h5", *IMAGES}
KINDS = "a text file (one example a line), a folder of images, or .npy or .safetensors of inputs"


class Examples(NamedTuple):
    """What a file holds: examples of certain lengths, and how to make a batch of some of them.

    `content` is equal for equal examples. `outermost` are those with the least and the largest whole number,
    which index something in the model.
    """

    kind: str
    lengths: list[int]
    make: Callable[[list[int]], Any]
    content: Callable[[int], Hashable]
    outermost: list[int] = []  # noqa: RUF012, never changed


def read_examples(path: Path, source: Source, max_tokens: int) -> Examples:
    """What a file or folder holds for this model.

    Raises:
        ValueError: nothing is there, or it is of another kind than the model takes.
    """
    if not path.exists():
        raise ValueError(f"--data {path} is not there: give {KINDS}")
    if path.is_dir():
        return _images(path, source)
    if path.suffix in (".npy", ".safetensors"):
        return _inputs(path, source)
    if path.suffix in NO_TEXT:
        raise ValueError(f"--data {path} is not read: give {KINDS}")
    return _text(path, source, max_tokens)


def _text(path: Path, source: Source, max_tokens: int) -> Examples:
    """Lines as token ids, without empty ones."""
    if source.folder is None or not (source.folder / "tokenizer.json").is_file():
        raise ValueError(
            f"--data {path} is text, and {source.spec} has no tokenizer.json; it takes {source.takes}"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    config = getattr(source.model, "config", None)
    tokenizer.no_padding()
    tokenizer.enable_truncation(
        min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path} is no text in UTF-8 ({error.reason}): give {KINDS}") from None
    encoded = tokenizer.encode_batch([line.strip() for line in lines if line.strip()])
    ids = [each.ids for each in encoded if each.ids]
    largest, vocabulary = max(map(max, ids), default=0), getattr(config, "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"--data {path}: {source.folder / 'tokenizer.json'} gives the token {largest}; {source.spec} "
            f"takes {source.takes}: the tokenizer is another model's"
        )
    return Examples(
        "text",
        [len(row) for row in ids],
        lambda rows: torch.tensor([ids[row] for row in rows]),
        lambda row: tuple(ids[row]),
    )


def image_files(path: Path) -> list[Path]:
    """A folder's images, sorted."""
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)


def _images(path: Path, source: Source) -> Examples:
    """Images as the model's own evaluation makes them; decoded when they are read."""
    if source.kind != "timm":
        raise ValueError(
            f"--data {path}: only timm models tell how images are prepared, {source.spec} is none; give "
            "prepared inputs as .safetensors or .npy"
        )
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    files, size = image_files(path), image_size(source.model)
    if not files:
        raise ValueError(f"--data {path} holds no image ({', '.join(sorted(IMAGES))})")
    prepare: Any = create_transform(**resolve_data_config({"input_size": size}, model=source.model))

    def make(rows: list[int]) -> Tensor:
        return torch.stack([decoded(files[row]) for row in rows])

    def decoded(file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return prepare(image.convert("L" if size[0] == 1 else "RGB"))
        except (OSError, SyntaxError) as error:  # PIL says SyntaxError of a broken PNG
            raise ValueError(f"{file} is no image that can be read: {error}") from None

    return Examples("images", [1] * len(files), make, lambda row: file_hash(files[row]))


def _inputs(path: Path, source: Source) -> Examples:
    """Inputs as they are; numbers of floating point in the model's dtype, others as int64."""
    arrays = read_arrays(path)
    dtype = next((p.dtype for p in source.model.parameters() if p.is_floating_point()), torch.float32)
    arrays = {n: a.to(dtype if a.is_floating_point() else torch.int64) for n, a in arrays.items()}
    for name, array in arrays.items():
        if array.is_floating_point() and not bool(array.isfinite().all()):
            raise ValueError(f"--data {path}: {name or 'the array'} holds NaN or infinity")
    if len(arrays) == 1:
        [array] = arrays.values()
        return Examples(
            "inputs", [1] * len(array), lambda rows: array[rows], _content(arrays), _outermost([array])
        )
    parameters = inspect.signature(source.model.forward).parameters
    strange = [name for name in arrays if name not in parameters]
    if strange:
        raise ValueError(
            f"--data {path} holds {', '.join(arrays)}; {source.spec} takes {', '.join(parameters)}: "
            f"{strange[0]!r} is none of them"
        )
    count = len(next(iter(arrays.values())))
    return Examples(
        "inputs",
        [1] * count,
        lambda rows: {name: array[rows] for name, array in arrays.items()},
        _content(arrays),
        _outermost(arrays.values()),
    )


def _content(arrays: dict[str, Tensor]) -> Callable[[int], Hashable]:
    """An example's hash, over all arrays."""
    return lambda row: values_hash({name: array[row] for name, array in arrays.items()})


def _outermost(arrays: Iterable[Tensor]) -> list[int]:
    """The examples with the least and the largest values of the arrays of whole numbers."""
    whole = [a.reshape(len(a), -1) for a in arrays if not a.is_floating_point() and a.numel()]
    return sorted({int(f(a) // a.shape[1]) for a in whole for f in (torch.argmin, torch.argmax)})
