"""A small chain of units, and labelled examples that no linear classifier can tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eugen.local_training import LocalRule, rules
from eugen.local_training.forward_forward import ForwardForward

CLASSES, FEATURES, WIDTH = 4, 24, 32
QUICK = {name: rule() for name, rule in rules().items()} | {
    "forward_forward": ForwardForward(learning_rate=2e-3)
}


class Unit(nn.Module):
    """`relu(down(relu(up(norm(x)))))`, a block of the kind that the suite replaces."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm(x)).relu()


def network(seed: int = 0, width: int = WIDTH) -> tuple[list[nn.Module], nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())
        return [stem, Unit(), Unit(width)], nn.Linear(width, CLASSES)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every class is two opposite clouds, so that no linear classifier is better than chance."""
    centres = 2 * torch.eye(FEATURES)[-CLASSES:]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    return sign * centres[labels] + 0.4 * torch.randn(count, FEATURES, generator=generator), labels


def passes(count: int, batches: int = 16) -> list[list[tuple[Tensor, Tensor]]]:
    data = [examples(64, seed) for seed in range(count * batches)]
    return [data[i * batches : (i + 1) * batches] for i in range(count)]


def accuracy(units: list[nn.Module], head: nn.Linear) -> float:
    x, labels = examples(2000, 10**6)
    with torch.no_grad():
        return float((nn.Sequential(*units, head)(x).argmax(-1) == labels).double().mean())


def trained(
    rule: LocalRule, units: list[nn.Module], head: nn.Linear, count: int = 2, seed: int = 0
) -> tuple[list[nn.Module], nn.Linear]:
    rule.train(units, head, passes(count), generator=torch.Generator().manual_seed(seed))
    return units, head


def weights(*modules: nn.Module) -> list[Tensor]:
    return [t for module in modules for t in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
