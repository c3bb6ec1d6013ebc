"""Projections: their moments by statistical tests, and the rows taken from a teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from eugen import features
from eugen.features import (
    RANDOM_PROJECTIONS,
    draw_projection,
    input_rms,
    neuron_scores,
    orthogonal_rows,
    product_features,
    projection_groups,
    random_rows,
    strongest,
    teacher_projection,
)
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

DRAWS = 4000
FALSE_ALARM = 1e-6
"""Probability that a right sampler fails one test; the seeds are fixed, so it fails always or never."""
every_kind = pytest.mark.parametrize("kind", RANDOM_PROJECTIONS)


def assert_mean(samples: torch.Tensor, expected: torch.Tensor | float) -> None:
    """The mean over the first dimension, entry by entry, by a normal test with Bonferroni's correction."""
    samples, expected = samples.double(), torch.as_tensor(expected, dtype=torch.float64)
    entries = samples[0].numel()
    z = torch.special.ndtri(torch.tensor(1 - FALSE_ALARM / (2 * entries), dtype=torch.float64))
    standard_error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= z * standard_error + 1e-6).all()


def draws(kind: str, rows: int, columns: int) -> torch.Tensor:
    seeded = generator()
    return torch.stack([random_rows(kind, rows, columns, generator=seeded) for _ in range(DRAWS)])


@every_kind
def test_rows_have_zero_mean_and_unit_second_moment(kind):
    g = draws(kind, 3, 6)
    assert_mean(g, 0.0)
    for row in range(3):
        assert_mean(g[:, row, :, None] * g[:, row, None, :], torch.eye(6))


@every_kind
def test_products_estimate_powers_without_bias(kind):
    """Theorem 3.1 for one power: E[Π_j (g_j·w)(g_j·x)] = (w·x)^i with independent blocks."""
    w, x = (torch.randn(6, generator=generator(s)) / 6**0.5 for s in (1, 2))
    first, second = draws(kind, 3, 6), draws(kind, 3, 6).flip(0)
    estimate = (first @ w) * (first @ x)
    assert_mean(estimate.mean(1), torch.dot(w, x))
    assert_mean((estimate * (second @ w) * (second @ x)).mean(1), torch.dot(w, x) ** 2)


@every_kind
def test_variance_is_that_of_the_table(kind):
    """Var = (m·A + m(m−1)·B − m²c²)/m² at order 1; orthogonal rows are those scaled by √d."""
    d, m = 6, 3
    w, x = (torch.randn(d, generator=generator(s), dtype=torch.float64) / d**0.5 for s in (1, 2))
    c, n = torch.dot(w, x), w.square().sum() * x.square().sum()
    same, pair = {
        "gaussian": (n + 2 * c**2, c**2),
        "rademacher": (n + 2 * c**2 - 2 * (w * x).square().sum(), c**2),
        "orthogonal": (d / (d + 2) * (n + 2 * c**2), d * (d * c**2 - n) / ((d - 1) * (d + 2))),
    }[kind]
    variance = (m * same + m * (m - 1) * pair - m**2 * c**2) / m**2
    g = draws(kind, m, d).double()
    estimate = ((g @ w) * (g @ x)).mean(1)
    assert_mean(((estimate - c) ** 2)[:, None], variance)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (3, 7), (12, 5)])
def test_orthogonal_blocks(rows, columns):
    g = orthogonal_rows(rows, columns, generator=generator()).double()
    for part in g.split(columns):
        assert relative_rms(part @ part.T, columns * torch.eye(len(part))) < 1e-6
    if rows > columns:  # the next block neither continues nor repeats the first
        cosines = g[:columns] @ g[columns : 2 * columns].T / columns
        assert 0.01 < cosines.abs().max() < 0.999


def test_orthogonal_blocks_are_haar():
    """Without the sign of R's diagonal, the first entry of the first row would lean to one side."""
    g = draws("orthogonal", 5, 5)
    assert_mean(torch.stack([torch.trace(q) for q in g])[:, None] / 5**0.5, 0.0)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="projection='cauchy'.*gaussian, rademacher, orthogonal"):
        random_rows("cauchy", 2, 3, generator=generator())


@every_kind
def test_projection_of_scaled_inputs_is_scaled_back(kind):
    rows = draw_projection(kind, 2, 9, 6, input_rms=5.0, generator=generator(3))
    unscaled = draw_projection(kind, 2, 9, 6, input_rms=1.0, generator=generator(3))
    assert rows.weight.shape == (18, 6)
    assert rows.bias.shape == rows.norm.shape == (18,)
    assert_close(rows.weight * 5, unscaled.weight)
    assert_close(rows.norm * 5, unscaled.norm)
    assert torch.equal(rows.bias, unscaled.bias)


def test_input_rms_over_chunks():
    x = tokens(100, 20)
    data = [(part, None, None) for part in x.split(7)]
    assert input_rms(data) == pytest.approx(float(x.double().square().sum(1).mean().sqrt()), rel=1e-12)
    for bad in ([], [(x * 0, None, None)], [(x / 0, None, None)]):
        with pytest.raises(ValueError, match="empty, all zero or not finite"):
            input_rms(bad)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_neuron_scores_are_variance_times_output_energy(weighted, gated):
    dense = block(20, 33, 11, dtype=torch.float64, gated=gated)
    x = tokens(200, 20, dtype=torch.float64)
    weight = torch.rand(200, generator=generator(), dtype=torch.float64) if weighted else None
    importance = torch.rand(11, generator=generator(5), dtype=torch.float64)
    parts = [None] * 4 if weight is None else weight.split(63)
    data = [(c, dense(c), w) for c, w in zip(x.split(63), parts, strict=True)]
    hidden = dense.features(x).detach().numpy()
    variance = torch.from_numpy(_weighted_variance(hidden, weight))
    energy = dense.down.weight.detach().square()
    assert_close(neuron_scores(dense, data), variance * energy.sum(0))
    expected = variance * (importance[:, None] * energy).sum(0)
    assert_close(neuron_scores(dense, data, importance), expected)


def _weighted_variance(values, weight):
    mean = np.average(values, axis=0, weights=weight)
    return np.average((values - mean) ** 2, axis=0, weights=weight)


def test_a_single_layer_scores_its_neurons_by_variance_alone():
    dense = block(20, 33, whole=False, dtype=torch.float64)
    x = tokens(200, 20, dtype=torch.float64)
    assert_close(neuron_scores(dense, [(x, None, None)]), dense(x).detach().var(0, correction=0))


def test_no_tokens_no_scores():
    with pytest.raises(ValueError, match="empty"):
        neuron_scores(block(5, 7), [])


def test_strongest_come_first():
    scores = torch.tensor([0.1, 5.0, 0.0, 3.0])
    assert strongest(scores, 3).tolist() == [1, 3, 0]
    with pytest.raises(ValueError, match="5 rows.*only 4 neurons"):
        strongest(scores, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_teacher_rows_are_dense_rows_in_order_of_score(bias):
    dense = block(20, 33, bias=bias)
    scores = neuron_scores(dense, stream(dense, tokens(200, 20)))
    order = sorted(range(33), key=lambda j: -float(scores[j]))[:9]
    rows = teacher_projection(dense, strongest(scores, 9))
    assert torch.equal(rows.weight, dense.up.weight[order])
    assert torch.equal(rows.bias, dense.up.bias[order] if bias else torch.zeros(9))
    assert torch.equal(rows.norm, torch.zeros(9))
    assert not rows.weight.requires_grad


@pytest.mark.parametrize("sharing", ["independent", "shared", "powers"])
@pytest.mark.parametrize(("order", "lowest"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 3)])
def test_product_features_of_prime_numbers(sharing, order, lowest):
    """Each column a prime: the factors of a feature name the columns that it is made of."""
    primes = torch.tensor([2.0, 3, 5, 7, 11, 13, 17, 19, 23, 29], dtype=torch.float64)
    groups = projection_groups(order, lowest, sharing)
    z = primes[:groups].repeat(2, 1)
    used = iter(range(groups))
    expected = {
        "independent": lambda i: math.prod(float(primes[next(used)]) for _ in range(i)),
        "shared": lambda i: math.prod(primes[:i].tolist()),
        "powers": lambda i: 2.0**i,
    }[sharing]
    found = product_features(z, order, lowest, sharing)
    assert [f.tolist() for f in found] == [[[expected(i)]] * 2 for i in range(lowest, order + 1)]


def test_every_named_activation_is_elementwise():
    x = tokens(5, 4)
    for kind in features.ACTIVATIONS.values():
        module = kind()
        assert isinstance(module, nn.Module)
        assert_close(module(x)[:, :2], module(x[:, :2]))
