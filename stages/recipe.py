"""How a network is trained: the part of params.yaml that `stages.training` reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from stages.faults import Section

Precision = Literal["float32", "bfloat16"]


class TrainingRecipe(Section):
    """Training of a whole network by AdamW, with linear warm-up, cosine decay to 0 and clipped gradients."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Examples of one step, over all processes."""
    micro_batch: PositiveInt | None = None
    """Examples of one forward pass; gradients of a step's parts are summed. None: the whole batch."""
    learning_rate: PositiveFloat
    """The highest, at the end of the warm-up."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices; biases and gains do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of the initial weights and of all batches."""
    precision: Precision = "float32"
    """bfloat16: by autocast, weights stay float32."""
    evaluate_every: PositiveInt = 100
    """Steps between two points of the curve; each is a checkpoint."""
