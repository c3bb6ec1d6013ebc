"""The paper's theorems 3.1–3.3 in numbers: `python -m benchmarks.estimator`.

Bias of the public layer whose readout is computed from weights, variance against the number of
features m and between kinds of rows, failure probability against m. Float64; the intervals of one
section hold together with 95 % confidence (Bonferroni).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eugen
from benchmarks.machine import FORMAT, environment, table, write_json
from benchmarks.variance import ORDERS, closed_form, errors
from eugen.polynomials import Polynomial

CONFIDENCE = 0.95
DRAWS = 40_000
WIDTH = 16
"""Columns that a row acts on; the layer's input and two slots."""
KINDS = ("gaussian", "rademacher", "orthogonal")
CONSTANT, MAGNITUDES = 0.2, (0.7, 0.4, 0.3)
"""|a_0| and |a_i| of the polynomials whose estimate is checked for bias."""
COSINES = (0.0, 0.5, 1.0)
"""Between w and x, both of length 1: unrelated, typical, equal."""
SIZES = {
    "gaussian": (8, 16, 32, 64),
    "rademacher": (8, 16, 32, 64),
    "orthogonal": (8, 16, 32, 64),
    "orthogonal_chi": (8, 16),
}
CONCENTRATION_SIZES = (8, 16, 24, 32, 48)
THRESHOLD = 0.5
"""What counts as failure: an error above this many standard deviations of a single feature."""


@dataclass(frozen=True)
class Variance:
    """A measured variance with its relative standard error, and the theorem's."""

    projection: str
    order: int
    cosine: float
    m: int
    variance: float
    relative_error: float
    closed_form: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the record."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    started, before = time.perf_counter(), environment()
    variances = measure_variances(options.draws, generator)
    record = {
        "format": FORMAT,
        "benchmark": "estimator",
        "environment": {**before, "threads": options.threads},
        "settings": {
            "draws": options.draws,
            "seed": options.seed,
            "width": WIDTH,
            "confidence": CONFIDENCE,
            "cosines": list(COSINES),
        },
        "bias": biases(options.draws, generator),
        "variance": [vars(variance) for variance in variances],
        "slope": slopes(variances),
        "ratio": ratios(variances),
        "concentration": concentration(options.draws, generator),
    }
    record["wall_seconds"] = round(time.perf_counter() - started, 1)
    write_json(options.out, record)
    for section in ("bias", "slope", "ratio", "concentration"):
        print(f"\n## {section}\n", *_table(record[section]), sep="\n")
    return 0


def biases(draws: int, generator: torch.Generator, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    """Mean of the layer's estimate against `act(w·x + b)`, degrees 1–3, coefficients of both signs."""
    cases = [(kind, degree, sign) for kind in kinds for degree in ORDERS for sign in (1, -1)]
    quantile = _quantile(len(cases))
    results = []
    for kind, degree, sign in cases:
        coefficients = [CONSTANT, *(sign * a for a in MAGNITUDES[:degree])]
        values, exact = layer_draws(kind, coefficients, draws, generator)
        error = float(values.std()) / math.sqrt(len(values))
        bias = float(values.mean()) - exact
        low, high = ((bias + side * quantile * error) / abs(exact) for side in (-1, 1))
        named = {"projection": kind, "degree": degree, "sign": "positive" if sign > 0 else "negative"}
        found = {"exact": exact, "relative_bias": bias / abs(exact), "low": low, "high": high}
        results.append(named | found | {"z": bias / error, "draws": len(values)})
    return results


def layer_draws(
    kind: str, coefficients: list[float], draws: int, generator: torch.Generator, *, at_once: int = 2000
) -> tuple[Tensor, float]:
    """Outputs `[draws]` of independently drawn layers of m = WIDTH features, and what they estimate.

    A layer of m·n features is the mean of n layers of m features: orthogonal blocks do not
    straddle them, as m is the blocks' size.
    """
    degree = len(coefficients) - 1
    fixed = torch.Generator().manual_seed(1)
    w, x = torch.randn(2, WIDTH - 2, generator=fixed, dtype=torch.float64)
    up = nn.Linear(WIDTH - 2, 1, dtype=torch.float64)
    with torch.no_grad():
        up.weight.copy_(w / w.norm())
        up.bias.fill_(0.3)
        x = (x / x.norm() + w / w.norm()) / 2
        dense = eugen.DenseFFN(up, Polynomial(coefficients))
        found = []
        for start in range(0, draws, at_once):
            n = min(at_once, draws - start)
            config = eugen.EUGenConfig(
                from_weights=True, order=degree, num_features=WIDTH * n, projection=kind, merge=False
            )
            layer = config.build(dense, generator=generator)
            terms = layer.features(x[None]) * layer.readout.weight
            found.append(layer.readout.bias + n * terms.view(degree, n, WIDTH).sum((0, 2)))
        return torch.cat(found), float(dense(x[None]))


def measure_variances(draws: int, generator: torch.Generator) -> list[Variance]:
    """Mean square error of every kind, size, order and angle; the mean is known, so it is unbiased."""
    w, xs = _points()
    found = []
    for kind, sizes in SIZES.items():
        for m in sizes:
            squares = errors(kind, m, draws, w, xs, generator=generator).square()
            mean = squares.mean(-1)
            relative = squares.std(-1) / math.sqrt(draws) / mean
            found += [
                Variance(kind, i, c, m, float(mean[i - 1, j]), float(relative[i - 1, j]), theory)
                for i in ORDERS
                for j, c in enumerate(COSINES)
                for theory in (closed_form(kind, i, m, w, xs[j]),)
            ]
    return found


def slopes(variances: list[Variance]) -> list[dict[str, Any]]:
    """Slope of log variance on log m at each angle: −1 by theorem.

    Orthogonal rows in whole blocks only, where the law is exact, and without order 1, where a whole
    block has no error at all.
    """
    groups = {}
    for v in variances:
        if v.projection in ("gaussian", "rademacher") or (
            v.projection == "orthogonal" and v.order > 1 and v.m % WIDTH == 0
        ):
            groups.setdefault((v.projection, v.order, v.cosine), []).append(v)
    quantile = _quantile(len(groups))
    results = []
    for (kind, order, cosine), points in groups.items():
        design = torch.tensor([[1.0, math.log(v.m)] for v in points], dtype=torch.float64)
        values = torch.tensor([math.log(v.variance) for v in points], dtype=torch.float64)
        spread = torch.tensor([v.relative_error for v in points], dtype=torch.float64)
        fit, error = _weighted_fit(design, values, spread)
        low, high = (float(fit[1] + side * quantile * error[1]) for side in (-1, 1))
        named = {"projection": kind, "order": order, "cosine": cosine}
        results.append(named | {"slope": float(fit[1]), "low": low, "high": high})
    return results


def ratios(variances: list[Variance]) -> list[dict[str, Any]]:
    """Variance of orthogonal rows over that of Gaussian ones, measured and by closed form."""
    gaussian = {(v.order, v.cosine, v.m): v for v in variances if v.projection == "gaussian"}
    own = [v for v in variances if v.projection.startswith("orthogonal")]
    quantile = _quantile(len(own))
    results = []
    for v in own:
        base = gaussian[v.order, v.cosine, v.m]
        ratio = v.variance / base.variance
        factor = math.exp(quantile * math.hypot(v.relative_error, base.relative_error))
        named = {"projection": v.projection, "order": v.order, "cosine": v.cosine, "m": v.m}
        theory = v.closed_form / base.closed_form
        found = {"ratio": ratio, "low": ratio / factor, "high": ratio * factor}
        results.append(named | found | {"closed_form": theory})
    return results


def concentration(draws: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Probability of an error above the threshold, against m.

    `rate` is the slope of −log probability on m. `curvature`, the square term of log probability
    on log m, tells an exponential fall (below 0) from a power law (0).
    """
    w, xs = _points()
    x = xs[COSINES.index(0.5)]
    kinds, orders = ("gaussian", "rademacher"), (1, 2)
    thresholds = {i: THRESHOLD * math.sqrt(closed_form("gaussian", i, 1, w, x)) for i in orders}
    counts = {(kind, i): [] for kind in kinds for i in orders}
    for kind in kinds:
        for m in CONCENTRATION_SIZES:
            found = errors(kind, m, draws, w, x[None], generator=generator).abs()
            for i in orders:
                counts[kind, i].append(int((found[i - 1, 0] > thresholds[i]).sum()))
    quantile = _quantile(2 * len(counts))
    sizes = torch.tensor(CONCENTRATION_SIZES, dtype=torch.float64)
    results = []
    for (kind, i), failures in counts.items():
        probability = (torch.tensor(failures, dtype=torch.float64) + 0.5) / (draws + 1)
        spread = ((1 - probability) / (draws * probability)).sqrt()
        linear = torch.stack([torch.ones_like(sizes), -sizes], dim=1)
        squared = torch.stack([sizes.log() ** power for power in range(3)], dim=1)
        (_, rate), (_, rate_error) = _weighted_fit(linear, probability.log(), spread)
        fit, error = _weighted_fit(squared, probability.log(), spread)
        results.append(
            {
                "projection": kind,
                "order": i,
                "threshold": thresholds[i],
                "m": list(CONCENTRATION_SIZES),
                "failures": failures,
                "rate": float(rate),
                "rate_low": float(rate - quantile * rate_error),
                "curvature": float(fit[2]),
                "curvature_high": float(fit[2] + quantile * error[2]),
            }
        )
    return results


def _points() -> tuple[Tensor, Tensor]:
    """w of length 1 and one x of length 1 at each angle to it."""
    generator = torch.Generator().manual_seed(2)
    w, other = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator, dtype=torch.float64))[0].T
    xs = [cosine * w + math.sqrt(1 - cosine**2) * other for cosine in COSINES]
    return w.contiguous(), torch.stack(xs)


def _weighted_fit(design: Tensor, values: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with known standard deviations: coefficients and their standard errors."""
    covariance = torch.linalg.inv(design.T @ (design / spread.square()[:, None]))
    return covariance @ (design.T @ (values / spread.square())), covariance.diagonal().sqrt()


def _quantile(comparisons: int) -> float:
    """Two-sided normal quantile at which so many intervals hold together."""
    tail = (1 - CONFIDENCE) / (2 * comparisons)
    return -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))


def _table(results: list[dict[str, Any]]) -> list[str]:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return table(list(results[0]), [[text(value) for value in result.values()] for result in results])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimator", description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"of every quantity ({DRAWS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("reports", "benchmarks", "estimator.json"))
    options = parser.parse_args(arguments)
    if options.draws < 100:
        parser.error(f"--draws {options.draws} must be at least 100 to tell an interval")
    if options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
