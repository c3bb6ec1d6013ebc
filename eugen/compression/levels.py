"""How much effort a transfer spends: the same for every row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """A recipe's effort.

    Attributes:
        tokens_per_feature: calibration tokens for each column of the widest readout.
        refine_steps: Adam steps on each layer alone.
        distill_steps: Adam steps on the whole network against the dense one's output; 0 for none.
    """

    name: str
    tokens_per_feature: int
    refine_steps: int
    distill_steps: int = 0

    def tokens_for(self, features: int) -> int:
        """Calibration tokens for blocks of at most so many features."""
        return self.tokens_per_feature * features


LEVELS = {
    level.name: level
    for level in (
        Level("fast", tokens_per_feature=50, refine_steps=250),
        Level("standard", tokens_per_feature=75, refine_steps=400),
        Level("best", tokens_per_feature=200, refine_steps=2500, distill_steps=300),
    )
}
