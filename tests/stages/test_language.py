"""The language task against counts and sums made here a second time, on texts small enough to write down."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.data import tokens as token_files
from stages.data.verify import DataError, sha256_file
from stages.params import ParamsError, validate
from stages.tasks import language

TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog – {i * i}!\n" for i in range(300))
NETWORK = {"context": 8, "width": 8, "depth": 1, "heads": 2}
TRAINING = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}


def settings(context: int = 8, **data: Any) -> language.LanguageSettings:
    section = {
        "data": data,
        "baseline": {**NETWORK, "context": context, "training": TRAINING},
        "transfer": {"budgets": [0.3], "seeds": [0], "calibration_tokens": 64},
        "finetune": {"steps": 1, "batch_size": 2, "learning_rates": [1e-3]},
        "profile": {"batches": [1], "pairs": 10},
    }
    return validate(language.LanguageSettings, section, "tasks.language")


def prepared(folder: Path, context: int = 8, **data: Any) -> language.Language:
    folder.mkdir()
    task = language.Language(settings(context, **data), folder)
    task.prepare(folder)
    return task


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "fox.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


def memmaps(folder: Path, vocabulary: int = 300, **counts: int) -> str:
    """A folder as nanoGPT's prepare.py leaves one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in {"train": 400, "val": 101, **counts}.items():
        generator.integers(vocabulary, size=count, dtype=np.uint16).tofile(folder / f"{part}.bin")
    return str(folder)


def of_memmaps(path: str, **changes: Any) -> dict[str, Any]:
    return {
        "source": "memmap",
        "path": path,
        "tokens": "bpe",
        "vocabulary": 300,
        "bytes_per_token": 2.5,
    } | changes


class Bigram(nn.Module):
    """Logits that the token before decides, from a table, not normalised."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def by_hand(table: Tensor, ids: list[int], first: list[int], context: int) -> list[tuple[int, float]]:
    """Each token predicted in windows that begin at `first`, with its nats."""
    rows = table.double().tolist()
    found = []
    for start in first:
        for i in range(start, start + context):
            scores = rows[ids[i]]
            total = math.log(sum(math.exp(score) for score in scores))
            found.append((ids[i + 1], total - scores[ids[i + 1]]))
    return found


def test_the_works_share_no_part_and_all_have_one():
    from stages.data import sources

    names = list(sources.shakespeare_works())
    parts = language.split_works(names)
    together = [name for part in parts.values() for name in part]
    assert sorted(together) == sorted(names) and len(set(together)) == len(together)
    assert all(len(parts[part]) == 3 for part in ("validation", "test"))


@pytest.mark.parametrize("data", [{}, {"tokens": "bpe", "vocabulary": 300}])
def test_each_part_is_its_whole_works_and_nothing_else(tmp_path, data):
    from tokenizers import Tokenizer, decoders

    from stages.data import sources

    task, works = prepared(tmp_path / "data", **data), sources.shakespeare_works()
    stored = json.loads((task.folder / "tokens.json").read_text())
    for part, names in stored["works"].items():
        ids = np.fromfile(task.folder / stored["parts"][part]["file"], dtype="<u2")
        expected = "".join(works[name] for name in names).encode()
        assert stored["parts"][part]["bytes"] == len(expected)
        if data:
            tokenizer = Tokenizer.from_file(str(task.folder / "tokenizer.json"))
            tokenizer.decoder = decoders.ByteLevel()
            assert tokenizer.decode(ids.tolist()).encode() == expected
        else:
            assert ids.astype(np.uint8).tobytes() == expected


def test_a_bpe_learns_from_the_training_part_alone(tmp_path, text):
    held_out = TEXT[: len(TEXT) - 2 * int(len(TEXT) * 0.05)] + "zqzqzqzqzq" * (len(TEXT) // 100)
    other = tmp_path / "other.txt"
    other.write_bytes(held_out.encode())
    parts = language.split_text(held_out)
    assert "zqzq" not in parts["train"][0] and "zqzq" in parts["test"][0]
    folder = prepared(tmp_path / "a", source="text", path=str(other), tokens="bpe", vocabulary=280).folder
    learned = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("zq" in token for token in learned)


def test_a_text_is_cut_into_three_that_make_it_whole():
    parts = language.split_text(TEXT)
    assert "".join(parts["train"] + parts["validation"] + parts["test"]) == TEXT
    assert [len(parts[p][0]) for p in ("validation", "test")] == [int(0.05 * len(TEXT))] * 2


@pytest.mark.parametrize("data", [{"tokens": "byte"}, {"tokens": "bpe", "vocabulary": 290}])
def test_bits_per_byte_are_those_summed_by_hand(tmp_path, text, data):
    data = {"source": "text", "path": text, **data}
    folder, test = prepared(tmp_path / "data", **data).folder, language.split_text(TEXT)["test"][0]
    ids = np.fromfile(folder / "test.bin", dtype="<u2").tolist()
    ends = list(range(len(test.encode()) + 1))
    if data["tokens"] == "bpe":
        from tokenizers import Tokenizer

        read = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(test)
        ends = [0] + [len(test[:end].encode()) for _, end in read.offsets]
    unequal = False
    for context in (5, 6, 7, 9, 11, 13):
        task = language.Language(settings(context, **data), folder)
        model = Bigram(task.build().tokens.num_embeddings)
        predicted = by_hand(model.table, ids, list(range(0, len(ids) - context, context)), context)
        length = ends[len(predicted) + 1] - ends[1]  # the first token is not predicted
        unequal |= length != ends[len(predicted)]
        nats, found = sum(value for _, value in predicted), task.evaluate(model, "test")
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / length, rel=1e-6)
        assert found["nats_per_token"] == pytest.approx(nats / len(predicted), rel=1e-6)
    # Where inputs and what they predict are equally long, the one could stand for the other.
    assert unequal == (data["tokens"] == "bpe")


def test_fewer_evaluation_tokens_are_windows_from_the_whole_part(tmp_path, text):
    task = prepared(tmp_path / "data", source="text", path=text, evaluation_tokens=85)
    ids = np.fromfile(task.folder / "val.bin", dtype="<u2").tolist()
    windows = (len(ids) - 1) // 8
    first = [8 * (i * windows // 10) for i in range(10)]  # 85 tokens are ten windows of eight
    assert len(set(first)) == 10 and first[-1] > 0.85 * len(ids)
    model = Bigram(256)
    nats = sum(value for _, value in by_hand(model.table, ids, first, 8))
    assert task.evaluate(model, "validation")["nats_per_token"] == pytest.approx(nats / 80, rel=1e-6)


def test_evaluation_cuts_into_batches_without_a_trace(tmp_path, text, monkeypatch):
    task, model = prepared(tmp_path / "data", source="text", path=text), Bigram(256)
    whole = task.evaluate(model, "test")
    monkeypatch.setattr(language, "BATCH_TOKENS", 24)
    assert task.evaluate(model, "test") == pytest.approx(whole)


def test_memmaps_count_the_bytes_that_the_settings_say(tmp_path):
    path = memmaps(tmp_path / "owt")
    task, model = prepared(tmp_path / "data", **of_memmaps(path)), Bigram(300)
    ids = np.fromfile(f"{path}/val.bin", dtype="<u2").tolist()
    halves = {"validation": ids[:50], "test": ids[50:]}  # the second half of an odd number is the longer one
    for part, held in halves.items():
        nats = [value for _, value in by_hand(model.table, held, list(range(0, len(held) - 8, 8)), 8)]
        found = task.evaluate(model, part)
        assert found["nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
        expected = sum(nats) / len(nats) / math.log(2) / 2.5
        assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert not list(task.folder.glob("*.bin"))  # gigabytes are not copied


def test_a_test_file_of_the_user_is_the_test_part(tmp_path):
    path = memmaps(tmp_path / "owt", test=60)
    task = prepared(tmp_path / "data", **of_memmaps(path))
    parts = json.loads((task.folder / "tokens.json").read_text())["parts"]
    assert {name: parts[name]["tokens"] for name in parts} == {"train": 400, "validation": 101, "test": 60}
    assert parts["test"]["file"].endswith("test.bin")


def test_evaluation_tells_the_baselines_of_its_part(tmp_path, text):
    task = prepared(tmp_path / "data", source="text", path=text)
    read = {p: np.fromfile(task.folder / f"{p}.bin", dtype=np.uint16) for p in ("train", "val", "test")}
    for part, name in {"validation": "val", "test": "test"}.items():
        expected = token_files.baselines(read["train"], read[name], 256, np.ones(256))
        found = task.evaluate(Bigram(256), part)
        assert found["unigram_bits_per_byte"] == pytest.approx(expected["unigram"])
        assert found["bigram_bits_per_byte"] == pytest.approx(expected["bigram"])


def test_windows_drawn_are_of_the_training_part_and_reach_both_its_ends(tmp_path):
    task = prepared(tmp_path / "data", **of_memmaps(memmaps(tmp_path / "owt", train=20)))
    ids = np.fromfile(tmp_path / "owt/train.bin", dtype="<u2").tolist()
    (batch,) = task.draw(500, torch.Generator().manual_seed(0))
    assert batch.shape == (500, 9) and batch.dtype == torch.int64
    drawn = {tuple(row) for row in batch.tolist()}
    assert drawn == {tuple(ids[i : i + 9]) for i in range(12)}


def test_training_starts_on_memmaps_with_the_settings_of_full_size(tmp_path):
    path = memmaps(tmp_path / "owt")
    task = prepared(tmp_path / "data", **of_memmaps(path))
    full = {**TRAINING, "batch_size": 6, "micro_batch": 4, "precision": "bfloat16"}
    baseline = {**NETWORK, "training": full}
    section = task.settings.model_dump() | {"baseline": baseline}
    large = language.Language(validate(language.LanguageSettings, section, "x"), task.folder)
    before, curve = large.fresh(0).state_dict(), []
    trained = large.train_dense(tmp_path, tmp_path / "checkpoint.pt", lambda *point: curve.append(point))
    assert curve[-1][2] == TRAINING["steps"] and all(math.isfinite(value) for _, value, _ in curve)
    assert all(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())


def test_the_loss_is_that_of_the_next_token(tmp_path, text):
    task, model = prepared(tmp_path / "data", source="text", path=text), Bigram(256)
    (batch,) = task.draw(5, torch.Generator().manual_seed(3))
    nats = [value for row in batch.tolist() for _, value in by_hand(model.table, row, [0], 8)]
    assert float(task.batch_loss(model, (batch,))) == pytest.approx(sum(nats) / len(nats), rel=1e-6)


@pytest.mark.parametrize("data", [{"tokens": "byte"}, {"tokens": "bpe", "vocabulary": 290}])
def test_preparing_again_writes_the_same_files(tmp_path, text, data):
    first, second = (
        {
            p.name: sha256_file(p)
            for p in prepared(tmp_path / name, source="text", path=text, **data).folder.iterdir()
        }
        for name in ("a", "b")
    )
    assert first == second and len(first) >= 4


def test_a_context_that_grew_after_preparing_is_an_error_too(tmp_path, text):
    folder = prepared(tmp_path / "data", source="text", path=text).folder
    task = language.Language(settings(context=4096, source="text", path=text), folder)
    with pytest.raises(DataError, match="val.bin.* one window needs 4097.*smaller baseline.context"):
        task.example(1)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_memmap_that_changed_since_is_an_error(tmp_path, part):
    path = memmaps(tmp_path / "owt", test=60)
    folder, settled = prepared(tmp_path / "data", **of_memmaps(path)).folder, settings(**of_memmaps(path))
    language.Language(settled, folder).draw(1, torch.Generator())
    file = Path(path) / f"{part}.bin"
    before = file.stat()
    (np.fromfile(file, dtype=np.uint16) ^ 1).tofile(file)  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(DataError, match=rf"{part}.bin changed since it was prepared.*-f prepare@language"):
        language.Language(settled, folder).draw(1, torch.Generator())


def test_a_prepared_file_that_was_cut_is_an_error(tmp_path, text):
    task = prepared(tmp_path / "data", source="text", path=text)
    np.zeros(500, dtype=np.uint16).tofile(task.folder / "train.bin")
    with pytest.raises(DataError, match=r"train.bin has changed since .* \(500 tokens, then \d{4}"):
        task.draw(1, torch.Generator())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokens": "bpe"}, "source shakespeare with tokens bpe needs vocabulary"),
        ({"vocabulary": 300}, "source shakespeare with tokens byte takes no vocabulary"),
        ({"path": "x"}, "source shakespeare with tokens byte takes no path"),
        ({"source": "text"}, "source text with tokens byte needs path"),
        ({"bytes_per_token": 4.3}, "takes no bytes_per_token"),
        (of_memmaps("x", bytes_per_token=None), "source memmap with tokens bpe needs bytes_per_token"),
        (of_memmaps("x", tokens="byte"), "source memmap holds the tokens of a tokenizer: set tokens to bpe"),
        ({"tokens": "bpe", "vocabulary": 70000}, "vocabulary = 70000: .*less than or equal to 65536"),
    ],
)
def test_settings_that_fit_no_source_name_the_key(data, message):
    with pytest.raises(ParamsError, match=message):
        settings(**data)
