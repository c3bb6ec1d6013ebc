"""A task that trains in milliseconds: a small regression with dropout, drawn by the generator alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.params import FinetuneSettings, ProfileSettings, TaskSettings, TrainingRecipe, TransferSettings
from stages.params import Section as Empty
from stages.tasks import DataSource, Task

RECIPE = TrainingRecipe(steps=12, batch_size=8, learning_rate=1e-2, seed=3, evaluate_every=4)


class Toy(Task):
    """Learns a fixed nonlinear map of four numbers."""

    name = "toy"
    quality_name = "mse"
    higher_is_better = False

    def __init__(self, dropout: float = 0.0) -> None:
        settings = TaskSettings(
            data=Empty(),
            baseline=Empty(),
            transfer=TransferSettings(budgets=[0.5], seeds=[0], calibration_tokens=8),
            finetune=FinetuneSettings(steps=0, batch_size=8, learning_rates=[1e-3]),
            profile=ProfileSettings(batches=[1], pairs=10),
        )
        super().__init__(settings, Path())
        self.dropout = dropout

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        return {}

    def recipe(self) -> TrainingRecipe:
        return RECIPE

    def build(self) -> nn.Module:
        block = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        return nn.Sequential(nn.Dropout(self.dropout), block, nn.LayerNorm(4), nn.Linear(4, 1))

    def call(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch)

    def calibration(self, seed: int, tokens: int) -> list[Any]:
        return [torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))]

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            batch = self.draw(64, torch.Generator().manual_seed({"validation": 100, "test": 101}[part]))
            return {"mse": float(self.batch_loss(model, batch))}

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch_size, 4, generator=generator)
        return x, (x.square().sum(1, keepdim=True) + x[:, :1]).sin()

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def example(self, batch: int) -> Tensor:
        return torch.zeros(batch, 4)
