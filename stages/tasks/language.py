"""Language modelling: a GPT trained from scratch on bytes or tokens, judged on works it never saw.

Full size: GPT-2 124M on the token files that nanoGPT writes (`source: memmap`).
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stages.data import tokens as token_files
from stages.networks.gpt import GPT
from stages.params import Section, TaskSettings, TrainingRecipe
from stages.tasks import DataSource, Task

VALIDATION_WORKS = ("as_you_like_it", "henry_v", "julius_caesar")
TEST_WORKS = ("macbeth", "richard_ii", "twelfth_night")
"""A comedy, a history and a tragedy each. No verse work is held out: these share poems with each other."""
HELD_OUT_SHARE = 0.05
"""Of a text file the last such share is the test part, the one before it the validation part."""
BATCH_TOKENS = 16_384
"""Tokens of a forward pass outside training."""


class DataSettings(Section):
    """Which text, and what a token is."""

    source: Literal["shakespeare", "memmap", "text"] = "shakespeare"
    path: str | None = None
    """memmap: folder of `train.bin`, `val.bin` and perhaps `test.bin`; text: a file in UTF-8."""
    tokens: Literal["byte", "bpe"] = "byte"
    """bpe: byte-level, learned from the training part; memmaps hold tokens of whatever tokenizer."""
    vocabulary: int | None = Field(default=None, gt=token_files.BYTES, le=token_files.LARGEST_VOCABULARY)
    """Of bpe and memmap; GPT-2's has 50257 ids, and 50304 is the multiple of 64 that is faster."""
    bytes_per_token: PositiveFloat | None = None
    """memmap: bytes of the text over its tokens, which the ids do not tell: 4.4 for OpenWebText by GPT-2.
    1 makes the quality bits per token."""
    evaluation_tokens: PositiveInt | None = None
    """At most so many tokens are judged, in windows spread over the whole part; None for all."""

    @model_validator(mode="after")
    def _fits_source(self) -> DataSettings:
        wanted = {
            "path": self.source != "shakespeare",
            "vocabulary": self.source == "memmap" or self.tokens == "bpe",
            "bytes_per_token": self.source == "memmap",
        }
        for key, needed in wanted.items():
            if needed != (getattr(self, key) is not None):
                verb = "needs" if needed else "takes no"
                raise ValueError(f"source {self.source} with tokens {self.tokens} {verb} {key}")
        if self.source == "memmap" and self.tokens != "bpe":
            raise ValueError("source memmap holds the tokens of a tokenizer: set tokens to bpe")
        return self


class BaselineSettings(Section):
    """The network and its training."""

    context: PositiveInt
    """Tokens of a window."""
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    training: TrainingRecipe

    @model_validator(mode="after")
    def _heads_divide(self) -> BaselineSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class LanguageSettings(TaskSettings):
    """The task's section of params.yaml."""

    data: DataSettings
    baseline: BaselineSettings


class Language(Task):
    """Bits per byte of held-out text, each window read without what stands before it.

    The extras: the same as nats per token, and two models without a network on the whole part
    (`stages.data.tokens.baselines`).
    """

    name = "language"
    quality_name = "bits_per_byte"
    higher_is_better = False
    Settings: ClassVar[type[TaskSettings]] = LanguageSettings
    settings: LanguageSettings

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from stages.data import sources, verify

        data = self.settings.data
        known: dict[str, Any]
        if data.source == "memmap":
            assert data.path and data.vocabulary and data.bytes_per_token
            place = Path(data.path)
            known = token_files.check_memmaps(place, data.vocabulary, data.bytes_per_token)
            files = {Path(part["file"]): part["file_tokens"] for part in known["parts"].values()}
            found = {p.name: DataSource(verify.sha256_file(p), count) for p, count in files.items()}
        else:
            if data.source == "shakespeare":
                works = sources.shakespeare_works()
                known = {"works": split_works(list(works))}
                texts = {part: [works[name] for name in known["works"][part]] for part in known["works"]}
            else:
                works = {"text": token_files.read_text(Path(data.path or ""))}
                known, texts = {}, split_text(works["text"])
            known |= token_files.write_texts(folder, texts, data.vocabulary)
            arrays = {name: np.frombuffer(text.encode(), dtype=np.uint8) for name, text in works.items()}
            found = {data.source: DataSource(verify.sha256_arrays(arrays), len(works))}
        token_files.write(folder, known, self._window)
        for part, names in known.get("works", {}).items():
            if part != "train":
                print(f"{part}: {', '.join(names)}", flush=True)
        return found

    @property
    def _window(self) -> int:
        """Tokens of a window with the one before it."""
        return self.settings.baseline.context + 1

    @cached_property
    def _tokens(self) -> token_files.Tokens:
        from stages.data import verify

        found = token_files.Tokens(self.folder)
        for part in found.known["parts"].values():
            if "stamp" in part:  # a memmap stays where it is, out of DVC's sight
                verify.check_unchanged(Path(part["file"]), part["stamp"], self.name)
        return found

    @cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        return {part: self._tokens.part(part, self._window) for part in token_files.NAMES}

    def _cut(self, part: str, starts: np.ndarray) -> Tensor:
        """Windows `[n, context + 1]` of a part."""
        return torch.from_numpy(token_files.cut(self._parts[part], starts, self._window)).to(self.device)

    def _random(self, count: int, generator: torch.Generator) -> Tensor:
        """Windows of the training part."""
        last = len(self._parts["train"]) - self._window
        return self._cut("train", torch.randint(last + 1, (count,), generator=generator).numpy())

    def build(self) -> nn.Module:
        sizes = self.settings.baseline
        model = GPT(self._tokens.vocabulary, sizes.context, sizes.width, sizes.depth, sizes.heads)
        return model.to(self.device)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random windows `[batch, context + 1]` of the training part."""
        return (self._random(batch_size, generator),)

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Nats per token."""
        (ids,) = batch
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        context = self.settings.baseline.context
        ids = self._random(-(-tokens // context), torch.Generator().manual_seed(seed))
        return list(ids[:, :-1].split(max(BATCH_TOKENS // context, 1)))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """In float32 whatever the training's precision, so that figures of all rows compare."""
        model.eval()
        context = self.settings.baseline.context
        starts = token_files.windows(self._parts[part], context, self.settings.data.evaluation_tokens)
        nats, length = 0.0, 0.0
        for first in range(0, len(starts), max(BATCH_TOKENS // context, 1)):
            ids = self._cut(part, starts[first : first + max(BATCH_TOKENS // context, 1)])
            logits, after = self.call(model, ids[:, :-1]), ids[:, 1:]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), after.flatten(), reduction="none")
            nats += float(losses.double().sum())
            length += self._tokens.length(after.cpu().numpy().ravel())
        known = self._tokens.known["baselines"][part]
        return {
            "bits_per_byte": nats / math.log(2) / length,
            "nats_per_token": nats / (len(starts) * context),
            **{f"{name}_bits_per_byte": value for name, value in known.items()},
        }

    def example(self, batch: int) -> Tensor:
        """Windows of the test part, over again where they do not suffice."""
        context = self.settings.baseline.context
        starts = token_files.windows(self._parts["test"], context, None)
        return self._cut("test", np.resize(starts, batch))[:, :-1]


def split_works(names: list[str]) -> dict[str, list[str]]:
    """The works of each part."""
    held_out = {"validation": list(VALIDATION_WORKS), "test": list(TEST_WORKS)}
    taken = {*VALIDATION_WORKS, *TEST_WORKS}
    return {"train": [name for name in names if name not in taken], **held_out}


def split_text(text: str) -> dict[str, list[str]]:
    """One text cut by position."""
    held_out = int(len(text) * HELD_OUT_SHARE)
    first, second = len(text) - 2 * held_out, len(text) - held_out
    return {"train": [text[:first]], "validation": [text[first:second]], "test": [text[second:]]}
