"""The data of `--data`: examples of a model's inputs, split into parts and batched without padding."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eugen.cli.arrays import read_arrays
from eugen.cli.sources import Source, image_size
from eugen.compression.saved import file_hash

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
NO_TEXT = {".npz", ".pt", ".pth", ".bin", ".pkl", ".zip", ".gz", ".parquet", ".h5", *IMAGES}
KINDS = "a text file (one example a line), a folder of images, or .npy or .safetensors of inputs"
SPLIT_SEED, LEAST_EXAMPLES = 0, 10
PART, MOST_VALIDATION, MOST_TEST = 10, 512, 2048
"""A tenth of the examples chooses and another tenth is reported on, but no more than these."""


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


class Batches(Sequence[Any]):
    """Batches that are made when they are read, the same each time."""

    def __init__(self, groups: list[list[int]], make: Callable[[list[int]], Any]) -> None:
        self.groups, self._make = groups, make

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Batches(self.groups[index], self._make)
        return self._make(self.groups[index])

    @property
    def examples(self) -> int:
        """Of all batches together."""
        return sum(map(len, self.groups))


@dataclass(frozen=True)
class Data:
    """The parts of the data; no example is in two of them, and equal ones count once.

    Attributes:
        sha256: of the file's bytes, of a folder its files' names and bytes.
        calibration: what layers are fitted to.
        validation: what chooses.
        test: what is reported on, and nothing else.
        example: the batch that latency is measured on, the largest of the calibration batches.
    """

    path: Path
    kind: str
    sha256: str
    calibration: Batches
    validation: Batches
    test: Batches
    example: Any


def open_data(path: Path, source: Source, *, batch: int | None, max_tokens: int, device: str) -> Data:
    """The examples of a file or folder, split by a fixed seed.

    Args:
        batch: examples a batch at most; None for 64 sentences or 32 of anything else.

    Raises:
        ValueError: nothing is there, too little, or it does not fit the model.
    """
    examples = _read(path, source, max_tokens)
    calibration, validation, test = _parts(path, examples)
    size = batch or (64 if examples.kind == "text" else 32)

    def make(rows: list[int]) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(device), examples.make(rows))

    def batches(rows: list[int]) -> Batches:
        return Batches(_groups(rows, examples.lengths, size), make)

    fitted = batches(calibration)
    example = make(max(fitted.groups, key=lambda rows: len(rows) * examples.lengths[rows[0]]))
    _check_fit(path, source, example)
    if examples.outermost:
        _check_fit(path, source, make(examples.outermost))
    if examples.kind == "images":
        for row in (*validation, *test):
            make([row])  # what is measured last is read first: a broken image ends no finished work
    return Data(
        path=path,
        kind=examples.kind,
        sha256=data_hash(path),
        calibration=fitted,
        validation=batches(validation),
        test=batches(test),
        example=example,
    )


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: its one input, or its inputs by name."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def data_hash(path: Path) -> str:
    """SHA-256 of a file, or of the images of a folder with their names."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in _image_files(path):
        digest.update(f"{file.relative_to(path).as_posix()} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def shape_of(batch: Any) -> str:
    """A batch in words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    return ", ".join(f"{name} {shape_of(tensor)}" for name, tensor in batch.items())


def _parts(path: Path, examples: Examples) -> tuple[list[int], list[int], list[int]]:
    """Calibration, validation and test, by a fixed seed; of equal examples only the first is in any."""
    different: dict[Hashable, int] = {}
    for row in range(len(examples.lengths)):
        different.setdefault(examples.content(row), row)
    rows = list(different.values())
    if len(rows) < LEAST_EXAMPLES:
        raise ValueError(
            f"--data {path} holds {len(rows)} different examples, too few to split into calibration, "
            f"validation and test: give at least {LEAST_EXAMPLES}"
        )
    order = [rows[index] for index in _shuffled(len(rows))]
    test = min(MOST_TEST, max(1, len(order) // PART))
    chosen = test + min(MOST_VALIDATION, max(1, len(order) // PART))
    return order[chosen:], order[test:chosen], order[:test]


def _groups(rows: list[int], lengths: list[int], size: int) -> list[list[int]]:
    """Rows of equal length, at most `size` together; in no order of length, as a part may be read alone."""
    by_length: dict[int, list[int]] = {}
    for row in rows:
        by_length.setdefault(lengths[row], []).append(row)
    groups = [g[i : i + size] for _, g in sorted(by_length.items()) for i in range(0, len(g), size)]
    return [groups[index] for index in _shuffled(len(groups))]


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()


def _read(path: Path, source: Source, max_tokens: int) -> Examples:
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


def _image_files(path: Path) -> list[Path]:
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

    files, size = _image_files(path), image_size(source.model)
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
            "inputs", [1] * len(array), lambda rows: array[rows], _content([array]), _outermost([array])
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
        _content(list(arrays.values())),
        _outermost(arrays.values()),
    )


def _content(arrays: list[Tensor]) -> Callable[[int], Hashable]:
    """An example's hash, over all arrays."""

    def content(row: int) -> bytes:
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array[row].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    return content


def _outermost(arrays: Iterable[Tensor]) -> list[int]:
    """The examples with the least and the largest values of the arrays of whole numbers."""
    whole = [a.reshape(len(a), -1) for a in arrays if not a.is_floating_point() and a.numel()]
    return sorted({int(f(a) // a.shape[1]) for a in whole for f in (torch.argmin, torch.argmax)})


def _check_fit(path: Path, source: Source, batch: Any) -> None:
    """Run the model once.

    Raises:
        ValueError: it does not take the batch.
    """
    try:
        with torch.no_grad():
            call(source.model, batch)
    except Exception as error:
        raise ValueError(
            f"--data {path} gives {shape_of(batch)}, {source.spec} takes {source.takes}: {error}"
        ) from error
