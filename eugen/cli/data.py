"""The data of `--data`: examples split into parts and batched without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eugen.cli.examples import Examples, image_files, read_examples
from eugen.cli.sources import Source
from eugen.compression.saved import file_hash

SPLIT_SEED, LEAST_EXAMPLES = 0, 10
PART, MOST_VALIDATION, MOST_TEST = 10, 512, 2048
"""A tenth of the examples chooses and another tenth is reported on, but no more than these."""


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
    examples = read_examples(path, source, max_tokens)
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
    for file in image_files(path):
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
