"""Small models and data as a user has them: a folder of transformers, a file of weights, texts, images."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from eugen import LEVELS, Level
from eugen.cli import measure
from eugen.cli.command import app
from tests.eugen.models import bert

WORDS = [f"w{number}" for number in range(48)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A level of little effort, `quick`, and a short measurement of latency."""
    monkeypatch.setitem(LEVELS, "quick", Level("quick", tokens_per_feature=4, refine_steps=2))
    monkeypatch.setattr(measure, "PLACEMENTS", 3)
    monkeypatch.setattr(measure, "PAIRS", 2)


@pytest.fixture
def eugen_cli():
    """Run the command with these words; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*words: object):
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def write_bert(folder: Path) -> Path:
    bert().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder


def write_text(path: Path, lines: int = 200) -> Path:
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(5, 8))) for _ in range(lines)]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, count: int = 30) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(1)
    for number in range(count):
        Image.frombytes("RGB", (24, 20), drawn.randbytes(24 * 20 * 3)).save(folder / f"{number}.png")
    return folder


def write_vectors(path: Path, count: int = 300, d: int = 12) -> Path:
    save_file({"x": torch.randn(count, d, generator=torch.Generator().manual_seed(3))}, path)
    return path


@pytest.fixture
def bert_folder(tmp_path):
    return write_bert(tmp_path / "bert")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "some.txt")


@pytest.fixture
def inputs(tmp_path):
    return write_vectors(tmp_path / "inputs.safetensors")
