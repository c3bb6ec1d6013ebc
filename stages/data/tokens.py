"""Token files: one uint16 id after another, as nanoGPT writes them, and what is known about them.

A folder of prepared tokens holds `tokens.json`: the vocabulary, bytes of each token, the parts (file,
first token, number of tokens) and two baselines for each part that is judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.data import dtypes
from stages.data.verify import DataError, stamp

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokens.json"
NAMES = {"train": "train.bin", "validation": "val.bin", "test": "test.bin"}
ID = np.dtype("<u2")
LARGEST_VOCABULARY = 1 << 16
BYTES = 256
"""Ids of the byte level; a byte-level BPE begins with them too."""
COUNTED = 20_000_000
"""The baselines are fitted to the first so many training tokens: more move a bigram little."""
CHUNK = 1 << 24
"""Tokens that are checked at a time."""


def train_bpe(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` ids, learned from these texts; it encodes any text.

    Raises:
        DataError: the texts are too short for so many ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise DataError(
            f"the training text yields {found} BPE tokens, vocabulary = {vocabulary} were asked for: "
            f"set vocabulary to {found} or less, or use more text"
        )
    return tokenizer


def bpe_bytes(tokenizer: Tokenizer) -> list[int]:
    """Bytes of each token of a byte-level BPE, which writes every byte as one character."""
    vocabulary = tokenizer.get_vocab()
    return [len(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def encode(text: str, tokenizer: Tokenizer | None) -> np.ndarray:
    """Token ids of a text: those of the tokenizer, or the bytes of UTF-8."""
    if tokenizer is None:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(ID)
    return np.array(tokenizer.encode(text).ids, dtype=ID)


def read_text(path: Path) -> str:
    """A text file in UTF-8, its line ends as they are.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"text file {path} is missing: put it there or correct `path`")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path} is not UTF-8 ({error.reason} at byte {error.start}): "
            "convert it, for example with `iconv -t UTF-8`"
        ) from None


def count_tokens(path: Path) -> int:
    """Tokens of a file, by its size.

    Raises:
        DataError: the file is missing, is a NumPy file or has an odd number of bytes.
    """
    if not path.is_file():
        raise DataError(f"token file {path} is missing: make it with nanoGPT's prepare.py, or correct `path`")
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(
                f"token file {path} is a NumPy file: write bare ids with `array.astype('uint16').tofile(...)`"
            )
    size = path.stat().st_size
    if size % ID.itemsize:
        raise DataError(
            f"token file {path} has {size} bytes, an odd number, so it does not hold uint16 ids: "
            "it is cut off or of another dtype, write it again as uint16"
        )
    return size // ID.itemsize


def check_file(path: Path, vocabulary: int) -> int:
    """Read a whole file of tokens and return how many it holds.

    Raises:
        DataError: as `count_tokens` and `dtypes.check`; or an id is beyond the vocabulary.
    """
    total = count_tokens(path)
    for start in range(0, total, CHUNK):
        ids = view(path, start, min(CHUNK, total - start))
        dtypes.check(path, ids)
        if ids.max() >= vocabulary:
            raise DataError(
                f"token file {path} holds id {ids.max()}, beyond the vocabulary of {vocabulary}: "
                "set data.vocabulary to the tokenizer's, or write the file again as uint16"
            )
    return total


def view(path: Path, start: int, count: int) -> np.ndarray:
    """Tokens of a file as they lie on disk, uint16 `[count]`; nothing is read yet."""
    if not count:
        return np.empty(0, dtype=ID)  # an empty file cannot be mapped
    return np.memmap(path, dtype=ID, mode="r", offset=start * ID.itemsize, shape=(count,))


def write_texts(folder: Path, texts: Mapping[str, Sequence[str]], vocabulary: int | None) -> dict[str, Any]:
    """Encode the documents of each part into `<part>.bin`; returns what `write` wants to know.

    Args:
        vocabulary: of a BPE learned from the training documents, kept as `tokenizer.json`; None for bytes.
    """
    tokenizer = None if vocabulary is None else train_bpe(texts["train"], vocabulary)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    parts = {}
    for part, documents in texts.items():
        ids = np.concatenate([encode(document, tokenizer) for document in documents])
        ids.tofile(folder / NAMES[part])
        parts[part] = {"file": NAMES[part], "file_tokens": len(ids), "start": 0, "tokens": len(ids)}
    return {
        "vocabulary": vocabulary or BYTES,
        "token_bytes": 1 if tokenizer is None else bpe_bytes(tokenizer),
        "parts": parts,
    }


def check_memmaps(folder: Path, vocabulary: int, bytes_per_token: float) -> dict[str, Any]:
    """Look through nanoGPT's files, which stay where they are; returns what `write` wants to know.

    Each part keeps its file's stamp, for `stages.data.verify.check_unchanged`.
    Without a `test.bin` the first half of `val.bin` is the validation part, the second half the test part.
    """
    files = {name: folder / file for name, file in NAMES.items()}
    if not files["test"].exists():
        del files["test"]
    held = {name: count_tokens(file) for name, file in files.items()}
    # Taken before the files are read, so that a change in the meantime is noticed too.
    stamps = {name: stamp(file) for name, file in files.items()}
    for file in files.values():
        check_file(file, vocabulary)
    parts = {name: (name, 0, count) for name, count in held.items()}
    if "test" not in parts:
        half = held["validation"] // 2
        parts["validation"] = ("validation", 0, half)
        parts["test"] = ("validation", half, held["validation"] - half)
    described = {
        part: {
            "file": str(files[name].resolve()),
            "stamp": stamps[name],
            "file_tokens": held[name],
            "start": start,
            "tokens": count,
        }
        for part, (name, start, count) in parts.items()
    }
    return {"vocabulary": vocabulary, "token_bytes": bytes_per_token, "parts": described}


def write(folder: Path, known: dict[str, Any], least: int) -> None:
    """Write `tokens.json`: `known`, the bytes of each part and the baselines of those that are judged.

    Raises:
        DataError: a part has fewer than `least` tokens.
    """
    path = folder / FILE
    path.write_text(json.dumps(known), encoding="utf-8")
    tokens = Tokens(folder)
    parts = {name: tokens.part(name, least) for name in NAMES}
    for name, ids in parts.items():
        known["parts"][name]["bytes"] = tokens.length(ids)
    known["baselines"] = {
        name: baselines(parts["train"], parts[name], tokens.vocabulary, tokens.bytes_of)
        for name in ("validation", "test")
    }
    path.write_text(json.dumps(known, indent=1), encoding="utf-8")


class Tokens:
    """A folder of prepared tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))

    @property
    def vocabulary(self) -> int:
        return self.known["vocabulary"]

    @cached_property
    def bytes_of(self) -> np.ndarray:
        """Bytes of each token id, float64 `[vocabulary]`: a mean where the tokenizer is not at hand."""
        return np.broadcast_to(np.asarray(self.known["token_bytes"], dtype=np.float64), self.vocabulary)

    def length(self, ids: np.ndarray) -> float:
        """Bytes of all these tokens."""
        return sum(float(self.bytes_of[ids[i : i + CHUNK]].sum()) for i in range(0, len(ids), CHUNK))

    def part(self, name: str, least: int) -> np.ndarray:
        """The tokens of `train`, `validation` or `test`, uint16, on disk.

        Raises:
            DataError: there are fewer than `least`, or the file is missing or not the one that was prepared.
        """
        known = self.known["parts"][name]
        path = self.folder / known["file"]  # a memmap of the user's stands under its absolute path
        if count_tokens(path) != known["file_tokens"]:
            raise DataError(
                f"token file {path} has changed since it was prepared "
                f"({count_tokens(path)} tokens, then {known['file_tokens']}): run the stage prepare again"
            )
        if known["tokens"] < least:
            raise DataError(
                f"token file {path}: its {name} part has {known['tokens']} tokens, one window needs {least}: "
                "use more text or a smaller baseline.context"
            )
        return view(path, known["start"], known["tokens"])


def windows(tokens: np.ndarray, context: int, most: int | None) -> np.ndarray:
    """First tokens of windows that do not overlap, `[n]`, at most `most` tokens, even over the whole part.

    A window has `context` tokens to predict, and one before them.
    """
    total = (len(tokens) - 1) // context
    wanted = total if most is None else min(total, max(most // context, 1))
    return np.arange(wanted, dtype=np.int64) * total // wanted * context


def cut(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """`[len(starts), length]`, int64, read from disk."""
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


def baselines(train: np.ndarray, part: np.ndarray, vocabulary: int, bytes_of: np.ndarray) -> dict[str, float]:
    """Bits per byte of two models without a network, on all of `part` but its first token.

    `unigram` has add-one smoothing; `bigram` is interpolated with it by Witten and Bell's weights (Chen and
    Goodman 1998, section 2.5): `p(b|a) = (c(ab) + D(a) p(b)) / (c(a) + D(a))`, D(a) being the number of
    different successors of a.
    """
    seen = np.asarray(train[:COUNTED]).astype(np.int64)
    unigram = (np.bincount(seen, minlength=vocabulary) + 1) / (len(seen) + vocabulary)
    pairs, counts = np.unique(seen[:-1] * vocabulary + seen[1:], return_counts=True)
    followed = np.bincount(pairs // vocabulary, weights=counts, minlength=vocabulary)
    different = np.bincount(pairs // vocabulary, minlength=vocabulary)
    bits, length = {"unigram": 0.0, "bigram": 0.0}, 0.0
    for before, after in _neighbours(part):
        code = before * vocabulary + after
        place = np.searchsorted(pairs, code).clip(max=len(pairs) - 1)
        count = np.where(pairs[place] == code, counts[place], 0)
        a, b = followed[before], different[before]
        mixed = (count + b * unigram[after]) / np.maximum(a + b, 1)
        bigram = np.where(a > 0, mixed, unigram[after])
        bits["unigram"] -= float(np.log2(unigram[after]).sum())
        bits["bigram"] -= float(np.log2(bigram).sum())
        length += float(bytes_of[after].sum())
    return {name: total / length for name, total in bits.items()}


def _neighbours(tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a token and the next, int64, in chunks."""
    for start in range(0, len(tokens) - 1, CHUNK):
        ids = np.asarray(tokens[start : start + CHUNK + 1]).astype(np.int64)
        yield ids[:-1], ids[1:]
