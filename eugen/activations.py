"""Activations in bounded memory: kept as they are up to a limit, the rest in memory-mapped files."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import torch
from torch import Tensor

Chunk = tuple[Tensor, Tensor, "Tensor | None"]
"""Inputs `[T, d]`, targets `[T, out]`, and token weights `[T]` or None."""
MEMORY_LIMIT = 2 * 2**30
"""Bytes of activations that `replace` keeps in memory by default: 2 GiB."""
ROWS = 4096
"""Rows of a chunk: the larger, the rarer the sums over whole Gram matrices; the smaller, the less memory."""

PREFIX = "eugen-activations-"
"""Of the temporary folder."""


class Store:
    """Keeps tensors, in memory up to a limit, then in files of a temporary folder that `close` removes.

    The folder is where `tempfile` puts it (`TMPDIR`); a file is mapped only while its tensor is in use.

    Args:
        memory_limit: bytes, at least 0.
    """

    def __init__(self, memory_limit: int = MEMORY_LIMIT) -> None:
        if memory_limit < 0:
            raise ValueError(f"memory_limit={memory_limit} must be at least 0 bytes")
        self.memory_limit, self.in_memory = memory_limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names = itertools.count()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with all files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def keep(self, tensor: Tensor, *, share: float = 1.0) -> Kept:
        """Keep a tensor; what is in memory must not be written to.

        Args:
            share: part of the limit that may be in use for this tensor to stay in memory.

        Raises:
            OSError: the disk does not take it.
        """
        tensor = tensor.detach()
        if self.in_memory + tensor.nbytes <= share * self.memory_limit or not tensor.nbytes:
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor = tensor.clone()  # a view would keep all that it is a part of
            self.in_memory += tensor.nbytes
            return Kept(self, tensor, None)
        return Kept(self, tensor[:0], self._write(tensor), len(tensor))

    def _write(self, tensor: Tensor) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        path = Path(self._folder.name) / str(next(self._names))
        tensor = tensor.cpu().contiguous()
        try:  # a plain write: a full disk is then an error, where a mapped one would end the process
            with path.open("wb") as file:
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: activations beyond memory_limit={self.memory_limit} go to files; raise "
                "the limit or let TMPDIR name a larger disk",
                str(path),
            ) from error
        return path


class Kept:
    """A tensor in a `Store`.

    Args:
        tensor: itself, or an empty one of its kind if it is in a file.
        path: the file.
        rows: the length of a tensor in a file.
    """

    def __init__(self, store: Store, tensor: Tensor, path: Path | None, rows: int | None = None) -> None:
        self._store, self._tensor, self._path = store, tensor, path
        self._rows = len(tensor) if rows is None else rows

    def __len__(self) -> int:
        return self._rows

    @property
    def spilled(self) -> bool:
        """Whether it is in a file."""
        return self._path is not None

    def read(self) -> Tensor:
        """The tensor; from a file, mapped as long as the result lives (a copy on another device)."""
        return self._mapped().to(self._tensor.device)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows; `index` is on the CPU."""
        device = self._tensor.device
        if self._path is None:
            return self._tensor[index.to(device)]
        return self._mapped()[index].to(device)

    def _mapped(self) -> Tensor:
        if self._path is None:
            return self._tensor
        shape = (self._rows, *self._tensor.shape[1:])
        count = torch.Size(shape).numel()
        return torch.from_file(str(self._path), shared=False, size=count, dtype=self._tensor.dtype).view(
            shape
        )

    def free(self) -> None:
        """Give its memory or its file back; it must not be read again."""
        if self._path is None:
            self._store.in_memory -= self._tensor.nbytes
        else:
            self._path.unlink(missing_ok=True)
        self._tensor, self._path = self._tensor[:0].clone(), None


class Activations(Sequence[Chunk]):
    """What a layer is fitted to: chunks `(x, target, weight)`, each read anew whenever it is asked for.

    Args:
        pieces: at least one; weights in all of them or in none.
    """

    def __init__(self, pieces: Sequence[tuple[Kept, Kept, Kept | None]]) -> None:
        self._pieces = pieces
        self._ends = torch.tensor([len(x) for x, _, _ in pieces]).cumsum(0)

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Activations:
        """Chunks that are in memory; where only some have weights, the others get ones."""
        store, given = Store(), list(chunks)
        weighted = any(weight is not None for _, _, weight in given)

        def weights(x: Tensor, weight: Tensor | None) -> Kept | None:
            if not weighted:
                return None
            return Kept(store, x.new_ones(len(x)) if weight is None else weight, None)

        return cls([(Kept(store, x, None), Kept(store, y, None), weights(x, w)) for x, y, w in given])

    @property
    def tokens(self) -> int:
        """Rows of all chunks together."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        x, y, weight = self._pieces[index]
        return x.read(), y.read(), None if weight is None else weight.read()

    def gather(self, rows: Tensor) -> Chunk:
        """Some tokens, counted over all chunks, in the order given."""
        ordered, order = rows.cpu().sort()
        cuts = torch.searchsorted(ordered, self._ends).tolist()
        columns: tuple[list[Tensor], ...] = ([], [], [])
        start = 0
        for piece, end, cut in zip(self._pieces, self._ends.tolist(), cuts, strict=True):
            index = ordered[start:cut] - (end - len(piece[0]))
            if cut > start or (end == self.tokens and not columns[0]):
                for column, kept in zip(columns, piece, strict=True):
                    column.extend([] if kept is None else [kept.rows(index)])
            start = cut
        back = order.argsort().to(columns[0][0].device)
        x, y, *weight = (torch.cat(column)[back] for column in columns if column)
        return x, y, weight[0] if weight else None

    def free(self) -> None:
        """Give the memory and files of all chunks back."""
        for kept in itertools.chain.from_iterable(self._pieces):
            if kept is not None:
                kept.free()


class ActivationsWriter:
    """Collects chunks of any length into `Activations` of `ROWS` rows each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pieces: list[tuple[Kept, Kept, Kept | None]] = []
        self._waiting: list[Chunk] = []

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Add one chunk; weights come with all chunks or with none."""
        self._waiting.append((x, y, weight))
        if sum(len(chunk[0]) for chunk in self._waiting) >= ROWS:
            self._flush(everything=False)

    def finish(self) -> Activations:
        """All chunks; without any token a single empty one, which still has widths.

        Raises:
            ValueError: nothing was added, not even an empty chunk.
        """
        if not (self._waiting or self._pieces):
            raise ValueError("the calibration data are empty: give at least one chunk of tokens")
        self._flush(everything=True)
        return Activations(self._pieces)

    def _flush(self, *, everything: bool) -> None:
        if not self._waiting:
            return
        x = torch.cat([x for x, _, _ in self._waiting])
        y = torch.cat([y for _, y, _ in self._waiting])
        weights = [weight for _, _, weight in self._waiting if weight is not None]
        weight = torch.cat(weights) if weights else None
        whole = len(x) - len(x) % ROWS
        parts = [slice(start, start + ROWS) for start in range(0, whole, ROWS)]
        if everything and (whole < len(x) or not (self._pieces or parts)):
            parts.append(slice(whole, None))
        for part in parts:
            of_weight = None if weight is None else self._store.keep(weight[part])
            self._pieces.append((self._store.keep(x[part]), self._store.keep(y[part]), of_weight))
        rest = slice(whole, None)
        self._waiting = [(x[rest].clone(), y[rest].clone(), None if weight is None else weight[rest].clone())]
