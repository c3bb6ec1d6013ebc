"""The estimator of (w·x)ⁱ drawn many times, and its variance in closed form (docs/benchmarks.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eugen.features import product_features, random_rows
from eugen.shapes import Float

ORDERS = (1, 2, 3)
ROWS_PER_CHUNK = 2**18


def errors(
    kind: str,
    m: int,
    draws: int,
    w: Float[Tensor, " d"],
    xs: Float[Tensor, "n d"],
    *,
    generator: torch.Generator,
) -> Float[Tensor, "orders n draws"]:
    """`(1/m) Σ_j Π_r (g_rj·w)(g_rj·x) − (w·x)ⁱ` of independent draws, m features each, float64.

    The orders continue each other's product (`sharing="shared"`), so that they are not independent
    of each other; draws are. A draw of orthogonal rows takes the first m of whole blocks.
    """
    points = torch.cat([w[None], xs])
    d = len(w)
    per = math.ceil(m / d) * d if kind.startswith("orthogonal") else m
    chunk = max(1, ROWS_PER_CHUNK // per)
    found = []
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        factors = []
        for _ in ORDERS:
            rows = random_rows(kind, count * per, d, generator=generator).to(w)
            kept = rows.view(count, per, d)[:, :m].reshape(-1, d)
            factors.append(points @ kept.T)
        features = product_features(torch.cat(factors, dim=1), max(ORDERS), 1, "shared")
        found.append(torch.stack([(f[:1] * f[1:]).view(len(xs), count, m).mean(-1) for f in features]))
    exact = torch.stack([(xs @ w) ** i for i in ORDERS])
    return torch.cat(found, dim=-1) - exact[..., None]


def closed_form(kind: str, order: int, m: int, w: Float[Tensor, " d"], x: Float[Tensor, " d"]) -> float:
    """`(1/m²)[m Aⁱ + S Bⁱ + D c²ⁱ − m² c²ⁱ]`: S ordered pairs of rows in one orthogonal block, D others.

    A = E[(g·w)²(g·x)²] of a row, B = E[(g·w)(g·x)(g'·w)(g'·x)] of two rows in one block.
    """
    d, c = len(w), float(w @ x)
    n = float(w @ w) * float(x @ x)
    alone, pair = n + 2 * c**2, c**2
    if kind == "rademacher":
        alone -= 2 * float((w * x).square().sum())
    if kind.startswith("orthogonal"):
        pair = d * (d * c**2 - n) / ((d - 1) * (d + 2))
    if kind == "orthogonal":
        alone *= d / (d + 2)
    whole, rest = divmod(m, d)
    same = whole * d * (d - 1) + rest * (rest - 1)
    other = m * (m - 1) - same
    total = m * alone**order + same * pair**order + (other - m * m) * c ** (2 * order)
    return max(0.0, total / m**2)  # whole orthogonal blocks have no error at order 1
