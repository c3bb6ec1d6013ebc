"""Sentence embedding: the pre-trained MiniLM-L6 encoder on Shakespeare, against its own dense embeddings.

Calibration and fine-tuning read Shakespeare only; `cosine_other_text` is the quality on a manual of today, so
that a method which learns the calibration's words by heart shows.

Sentences are batched by equal length, so that nothing is padded: every token counts, in
calibration, in fine-tuning and in evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stages.params import ProfileSettings, Section, TaskSettings
from stages.tasks import BASELINE, DataSource, Log, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLIT_SEED = 0
HELD_OUT_EVERY = 4
"""Of the works in alphabetical order every fourth is for testing, the one after it for validation."""
PUBLISHED_COSINES = {
    "That is a happy dog": 0.6946,
    "That is a very happy person": 0.9429,
    "Today is a sunny day": 0.2569,
}
"""Cosine to "That is a happy person", from the model card; checked before anything builds on the weights."""
TRAIN_SENTENCES = 8192
VALIDATION_SENTENCES = 256
OTHER_SENTENCES = 400
BATCH = 64
NEIGHBOURS = 10


class DataSettings(Section):
    """Sentences longer than `max_tokens` are cut; `sentences` of the held-out works are judged."""

    max_tokens: PositiveInt
    sentences: PositiveInt


class BaselineSettings(Section):
    """Fine-tuning distils the teacher's embeddings of that many training sentences."""

    teacher_sentences: PositiveInt


class EmbeddingProfile(ProfileSettings):
    """Latency is measured on sequences of `tokens`."""

    tokens: PositiveInt


class EmbeddingSettings(TaskSettings):
    """The task's section of params.yaml."""

    data: DataSettings
    baseline: BaselineSettings
    profile: EmbeddingProfile


class Embedding(Task):
    """Mean cosine to the dense network's embedding, and overlap of the ten nearest neighbours."""

    name = "embedding"
    quality_name = "cosine"
    Settings: ClassVar[type[TaskSettings]] = EmbeddingSettings
    settings: EmbeddingSettings

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from tokenizers import Tokenizer

        from stages.data import sources, verify

        sources.minilm(folder)
        works = sources.shakespeare_works()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.settings.data.max_tokens)
        wanted = {
            "train": TRAIN_SENTENCES,
            "validation": VALIDATION_SENTENCES,
            "test": self.settings.data.sentences,
        }
        tensors = {}
        for part, count in wanted.items():
            tensors.update(_pack(part, _sample(works, part, count), tokenizer))
        manual = sources.npm_manual()
        tensors.update(_pack("other", _draw(manual.values(), OTHER_SENTENCES, "manual"), tokenizer))
        save_file(tensors, folder / "sentences.safetensors")

        def source(texts: dict[str, str]) -> DataSource:
            raw = {name: np.frombuffer(text.encode(), dtype=np.uint8) for name, text in texts.items()}
            return DataSource(verify.sha256_arrays(raw), len(texts))

        return {
            "shakespeare": source(works),
            "npm_manual": source(manual),
            "minilm": DataSource(verify.sha256_file(folder / "model.safetensors"), 1),
        }

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        return load_file(self.folder / "sentences.safetensors")

    def _groups(
        self, part: str, rows: Tensor | None = None, size: int = BATCH
    ) -> list[tuple[Tensor, Tensor]]:
        """Batches `(row numbers, ids [n, length])` of sentences of equal length."""
        ids, lengths = self._data[f"{part}.ids"], self._data[f"{part}.lengths"].long()
        rows = torch.arange(len(lengths)) if rows is None else rows
        groups = []
        for length in lengths[rows].unique().tolist():
            for chosen in rows[lengths[rows] == length].split(size):
                groups.append((chosen, ids[chosen, :length].to(self.device, torch.int64)))
        return groups

    def build(self) -> nn.Module:
        from transformers.models.bert.modeling_bert import BertConfig, BertModel

        settings = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        # Distillation has a noiseless target, so dropout stays off in fine-tuning too.
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertModel(BertConfig(**settings), add_pooling_layer=False)
        # Half of all parameters are word embeddings; they are no part of what is compared.
        model.embeddings.requires_grad_(False)
        return nn.Module.to(model, self.device).eval()

    def train_dense(self, out: Path, checkpoint: Path, log: Log) -> nn.Module:
        model = self.build()
        weights = load_file(self.folder / "model.safetensors")
        known = model.state_dict()
        model.load_state_dict({name: weights[name] for name in known if name in weights}, strict=False)
        missing = [name for name in known if name not in weights and not name.endswith("position_ids")]
        if missing:
            raise ValueError(
                f"model.safetensors lacks {missing[0]}: it is not the MiniLM-L6 that this task expects"
            )
        self._check_published(model, log)
        rows = torch.arange(min(self.settings.baseline.teacher_sentences, TRAIN_SENTENCES))
        teacher = {"train": self._embed_all(model, "train", rows)}
        teacher |= {part: self._embed_all(model, part) for part in ("validation", "test", "other")}
        save_file(teacher, out / "teacher.safetensors")
        return model

    def _check_published(self, model: nn.Module, log: Log) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()

        def embed(text: str) -> Tensor:
            with torch.no_grad():
                return self.call(model, torch.tensor([tokenizer.encode(text).ids], device=self.device))[0]

        reference = embed("That is a happy person")
        for step, (text, published) in enumerate(PUBLISHED_COSINES.items()):
            cosine = float(reference @ embed(text))
            log("published_cosine_error", abs(cosine - published), step)
            if abs(cosine - published) > 1e-3:
                raise ValueError(
                    f"the encoder gives cosine {cosine:.4f} for {text!r}, the model card says {published}: "
                    "the weights or the tokenizer are not the published ones"
                )

    @torch.no_grad()
    def _embed_all(self, model: nn.Module, part: str, rows: Tensor | None = None) -> Tensor:
        """Embeddings `[N, d]` in the order of the part's sentences."""
        model.eval()
        groups = self._groups(part, rows)
        order = torch.cat([chosen for chosen, _ in groups])
        embedded = torch.cat([self.call(model, ids).cpu() for _, ids in groups])
        return embedded[order.argsort()].contiguous()

    @cached_property
    def _teacher(self) -> dict[str, Tensor]:
        return load_file(BASELINE / self.name / "teacher.safetensors")

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Unit-length mean of the last hidden states, `[n, d]`; no token is padding."""
        return F.normalize(model(input_ids=batch).last_hidden_state.mean(1), dim=-1)

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        lengths = self._data["train.lengths"].long()
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        enough = int((lengths[order].cumsum(0) < tokens).sum()) + 1
        return [ids for _, ids in self._groups("train", order[:enough].sort().values)]

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        def cosine(embedded: Tensor, part: str) -> float:
            return float((embedded * self._teacher[part]).sum(-1).double().mean())

        embedded = self._embed_all(model, part)
        overlap = (_neighbours(embedded)[:, :, None] == _neighbours(self._teacher[part])[:, None, :]).any(-1)
        measured = {"cosine": cosine(embedded, part), "top10_overlap": float(overlap.double().mean())}
        if part == "test":
            measured["cosine_other_text"] = cosine(self._embed_all(model, "other"), "other")
        return measured

    @cached_property
    def _distillation(self) -> list[tuple[Tensor, Tensor]]:
        rows = torch.arange(len(self._teacher["train"]))
        return self._groups("train", rows, size=1 << 30)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sentences of one length drawn by frequency, and the dense network's embeddings of them."""
        sizes = torch.tensor([len(rows) for rows, _ in self._distillation], dtype=torch.float64)
        rows, ids = self._distillation[int(torch.multinomial(sizes, 1, generator=generator))]
        chosen = torch.randint(len(rows), (batch_size,), generator=generator)
        target = self._teacher["train"][rows[chosen]].to(self.device)
        return ids[chosen], target

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """1 − cosine to the dense network's embedding."""
        ids, target = batch
        return (1 - (self.call(model, ids) * target).sum(-1)).mean()

    def example(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        ids = torch.randint(1000, 20000, (batch, self.settings.profile.tokens), generator=generator)
        return ids.to(self.device)


def _neighbours(embedded: Tensor) -> Tensor:
    """Indices `[N, 10]` of each sentence's nearest others."""
    similarity = embedded @ embedded.T
    similarity.fill_diagonal_(-1)
    return similarity.topk(NEIGHBOURS).indices


def _sample(works: dict[str, str], part: str, count: int) -> list[str]:
    """Distinct random sentences from the works of a part."""
    remainder = {"test": 0, "validation": 1}
    chosen = [n for i, n in enumerate(sorted(works)) if _part(i % HELD_OUT_EVERY, remainder) == part]
    return _draw((works[name] for name in chosen), count, part)


def _draw(texts: Iterable[str], count: int, part: str) -> list[str]:
    """Distinct random sentences.

    Raises:
        ValueError: the texts hold fewer.
    """
    sentences = list(dict.fromkeys(s for text in texts for s in split_sentences(text)))
    if len(sentences) < count:
        raise ValueError(f"the {part} texts hold {len(sentences)} sentences, {count} were asked for")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return [sentences[i] for i in order[:count].tolist()]


def _part(remainder: int, parts: dict[str, int]) -> str:
    return next((part for part, value in parts.items() if value == remainder), "train")


def split_sentences(text: str) -> list[str]:
    """Sentences of at least five words."""
    flat = re.sub(r"\s+", " ", text)
    sentences = re.split(r"(?<=[.!?;])\s+", flat)
    return [s.strip() for s in sentences if len(s.split()) >= 5]


def _pack(part: str, sentences: list[str], tokenizer: Tokenizer) -> dict[str, Tensor]:
    encoded = [e.ids for e in tokenizer.encode_batch(sentences)]
    lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.int32)
    ids = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int32)
    for row, sentence in enumerate(encoded):
        ids[row, : len(sentence)] = torch.tensor(sentence, dtype=torch.int32)
    return {f"{part}.ids": ids, f"{part}.lengths": lengths}
