"""Token files: what spoils them, and the baselines against a count made here token by token."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.data import tokens
from stages.data.verify import DataError

TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog – {i * i}!\n" for i in range(300))


def counted(train: list[int], part: list[int], vocabulary: int, lengths: list[float]) -> tuple[float, float]:
    """Bits per byte of the smoothed unigram and bigram, by the formulas."""
    once, pairs, before = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    different = Counter(a for a, _ in pairs)
    unigram = bigram = length = 0.0
    for a, b in pairwise(part):
        p = (once[b] + 1) / (len(train) + vocabulary)
        unigram -= math.log2(p)
        weight = before[a] / (before[a] + different[a]) if before[a] else 0.0
        q = weight * pairs[a, b] / before[a] + (1 - weight) * p if before[a] else p
        bigram -= math.log2(q)
        length += lengths[b]
    return unigram / length, bigram / length


@pytest.mark.parametrize("vocabulary", [None, 290])
def test_the_baselines_are_those_counted_token_by_token(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 100)
    cut = len(TEXT) * 8 // 10, len(TEXT) * 9 // 10
    texts = {"train": [TEXT[: cut[0]]], "validation": [TEXT[cut[0] : cut[1]]], "test": [TEXT[cut[1] :]]}
    known = tokens.write_texts(tmp_path, texts, vocabulary)
    tokens.write(tmp_path, known, least=2)
    ids = {part: np.fromfile(tmp_path / name, dtype="<u2").tolist() for part, name in tokens.NAMES.items()}
    lengths = known["token_bytes"] if vocabulary else [1] * 256
    for part in ("validation", "test"):
        assert known["parts"][part]["bytes"] == len(texts[part][0].encode())
        unigram, bigram = counted(ids["train"], ids[part], known["vocabulary"], lengths)
        assert known["baselines"][part] == pytest.approx({"unigram": unigram, "bigram": bigram})
        assert bigram < unigram


def test_a_pair_that_was_never_seen_costs_what_its_smoothing_says():
    train, part = np.array([0, 1, 0, 2]), np.array([0, 3, 1, 2])
    found = tokens.baselines(train, part, 4, np.ones(4))
    # p(3) = 1/8, p(1) = p(2) = 2/8; 0 was followed by 1 and 2, 1 once by 0, 3 by nothing.
    bits = -math.log2(2 / 4 * 1 / 8) - math.log2(2 / 8) - math.log2(1 / 2 * 2 / 8)
    assert found == pytest.approx({"unigram": (3 + 2 + 2) / 3, "bigram": bits / 3})


def test_windows_do_not_overlap_and_fill_the_part():
    part = np.arange(31)
    assert tokens.windows(part, 10, None).tolist() == [0, 10, 20]
    assert tokens.windows(part[:30], 10, None).tolist() == [0, 10]  # the last would lack one to predict
    assert tokens.windows(np.arange(101), 10, 39).tolist() == [0, 30, 60]
    assert tokens.windows(np.arange(101), 10, 5).tolist() == [0]


def sound(path: Path) -> None:
    """Overwrite nothing."""


FAULTS: dict[str, tuple[Any, int, str]] = {
    "odd": (lambda p: p.write_bytes(b"\0" * 801), 300, "has 801 bytes, an odd number.*as uint16"),
    "missing": (lambda p: p.unlink(), 300, "is missing: make it with nanoGPT"),
    "beyond": (sound, 257, r"holds id \d+, beyond the vocabulary of 257: set data.vocabulary"),
    "uint32": (lambda p: np.arange(400, dtype=np.uint32).tofile(p), 500, "every second id is 0.*as uint16"),
    "int64": (lambda p: np.arange(400).tofile(p), 500, "every second id is 0.*as uint16"),
    "float32": (lambda p: np.ones(400, dtype=np.float32).tofile(p), 50257, "every second id is 0"),
    "numpy": (lambda p: np.save(p.open("wb"), np.zeros(9, dtype=np.uint16)), 300, "is a NumPy file: write"),
    "short": (lambda p: np.ones(8, dtype=np.uint16).tofile(p), 300, "train part has 8 tokens, .* needs 9"),
    "empty": (lambda p: p.write_bytes(b""), 300, "train part has 0 tokens, one window needs 9"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_token_file_is_named_with_its_cure(tmp_path, fault):
    spoil, vocabulary, message = FAULTS[fault]
    ids = np.random.default_rng(0).integers(300, size=400, dtype=np.uint16)
    for name in tokens.NAMES.values():
        ids.tofile(tmp_path / name)
    tokens.write(tmp_path, tokens.check_memmaps(tmp_path, 300, 4.3), least=9)
    spoil(tmp_path / "train.bin")
    with pytest.raises(DataError, match=f"token file {tmp_path}/train.bin:? .*{message}"):
        tokens.write(tmp_path, tokens.check_memmaps(tmp_path, vocabulary, 4.3), least=9)


TEXTS = {
    "english": TEXT.encode(),
    "no words": b"{[(<\t|~^*\r\n>)]}" * 40,
    "accents": "Das Fräulein las im Garten: ".encode() * 40,
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_the_place_of_ids_is_an_error(tmp_path, text):
    path = tmp_path / "train.bin"
    path.write_bytes(TEXTS[text][: len(TEXTS[text]) // 2 * 2])
    with pytest.raises(DataError, match=f"token file {path} is plain text, not ids: .*data.source to text"):
        tokens.check_file(path, 1 << 16)


def zipf(vocabulary: int, count: int, seed: int = 0) -> np.ndarray:
    """Ids as frequent as words are, the lowest the most."""
    share = 1 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(seed).choice(vocabulary, count, p=share / share.sum())


BYTES = {
    "characters": zipf(65, 40_000),
    "byte pairs": zipf(256, 40_000),
    "upper half": 255 - zipf(200, 40_000),
    "other script": np.frombuffer("Нет, ты не прав: всё иначе. ".encode() * 1000, dtype=np.uint8),
}


@pytest.mark.parametrize("ids", BYTES)
def test_ids_of_one_byte_are_an_error(tmp_path, ids):
    path = tmp_path / "train.bin"
    BYTES[ids].astype(np.uint8).tofile(path)
    with pytest.raises(DataError, match=f"token file {path}: .*8 bits .uint8. or text: write it again"):
        tokens.check_file(path, 1 << 16)


SOUND = {
    "GPT-2, frequent ids low": zipf(50257, 40_000),
    "GPT-2, frequent ids anywhere": np.random.default_rng(1).permutation(50257)[zipf(50257, 40_000)],
    "all of GPT-2 alike": np.random.default_rng(0).integers(50257, size=1 << 14),
    "all of 16 bits alike": np.random.default_rng(0).integers(1 << 16, size=1 << 14),
    "characters": zipf(65, 40_000),
    "printable characters": np.frombuffer(TEXT.encode(), dtype=np.uint8),
    "just above bytes": zipf(300, 40_000),
    "few": np.full(63, 0x2020),
}


@pytest.mark.parametrize("ids", SOUND)
def test_ids_of_two_bytes_are_none(tmp_path, ids):
    path = tmp_path / "train.bin"
    SOUND[ids].astype(np.uint16).tofile(path)
    assert tokens.check_file(path, 1 << 16) == len(SOUND[ids])


def test_the_last_id_of_a_large_file_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 100)
    ids = np.random.default_rng(0).integers(300, size=250, dtype=np.uint16)
    ids[-1] = 300
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="holds id 300, beyond the vocabulary of 300"):
        tokens.check_file(tmp_path / "train.bin", 300)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "text file .*fox.txt is missing: put it there or correct `path`"),
        (b"abc\xff" * 100, "fox.txt is not UTF-8 .*at byte 3.*iconv"),
    ],
)
def test_a_bad_text_file_is_named_with_its_cure(tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "fox.txt").write_bytes(contents)
    with pytest.raises(DataError, match=message):
        tokens.read_text(tmp_path / "fox.txt")


def test_line_ends_of_a_text_stay(tmp_path):
    (tmp_path / "fox.txt").write_bytes(b"a\r\nb\rc\n")
    assert tokens.read_text(tmp_path / "fox.txt") == "a\r\nb\rc\n"


def test_a_text_too_short_for_its_vocabulary_says_what_it_yields():
    with pytest.raises(DataError, match=r"yields (\d+) BPE tokens, vocabulary = 5000 .*set vocabulary to \1"):
        tokens.train_bpe([TEXT], 5000)


def test_a_bpe_encodes_what_it_never_saw():
    tokenizer, text = tokens.train_bpe(["aaaa bbbb " * 50], 258), "né – 中\x00"
    lengths = tokens.bpe_bytes(tokenizer)
    assert sum(lengths[i] for i in tokens.encode(text, tokenizer)) == len(text.encode())
