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
    neurons_per_feature,
    new_activation,
    orthogonal_rows,
    product_features,
    products_in_place,
    projection_groups,
    random_rows,
    rbf_rows,
    teacher_factors,
    teacher_projection,
)
from eugen.parts.neurons import neuron_scores, strongest
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
    """Var = (m·A + m(m−1)·B − m²c²)/m² at order 1; higher orders are in test_theory."""
    d, m = 6, 3
    w, x = (torch.randn(d, generator=generator(s), dtype=torch.float64) / d**0.5 for s in (1, 2))
    c, n = torch.dot(w, x), w.square().sum() * x.square().sum()
    between = d * (d * c**2 - n) / ((d - 1) * (d + 2))
    same, pair = {
        "gaussian": (n + 2 * c**2, c**2),
        "rademacher": (n + 2 * c**2 - 2 * (w * x).square().sum(), c**2),
        "orthogonal": (d / (d + 2) * (n + 2 * c**2), between),
        "orthogonal_chi": (n + 2 * c**2, between),
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


def test_chi_rows_are_orthogonal_and_of_gaussian_length():
    g = random_rows("orthogonal_chi", 5 * DRAWS, 5, generator=generator()).double().view(DRAWS, 5, 5)
    lengths = torch.linalg.vector_norm(g, dim=-1)
    unit = g / lengths[..., None]
    assert_close(unit @ unit.mT, torch.eye(5).expand(DRAWS, 5, 5), precision=torch.float32)
    assert_mean(lengths**2, 5.0)
    assert_mean((lengths**2 - 5) ** 2, 10.0)  # the variance of χ² with 5 degrees of freedom
    assert_mean((lengths[:, :1] ** 2 - 5) * (lengths[:, 1:] ** 2 - 5), 0.0)


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
    data = stream(dense, tokens(200, 20))
    scores = neuron_scores(dense, data)
    order = sorted(range(33), key=lambda j: -float(scores[j]))[:9]
    rows = teacher_projection(dense, data, 3, teacher_factors(dense, 2, 1, "independent"))
    assert torch.equal(rows.weight, dense.up.weight[order])
    assert torch.equal(rows.bias, dense.up.bias[order] if bias else torch.zeros(9))
    assert torch.equal(rows.norm, torch.zeros(9))
    assert not rows.weight.requires_grad


def test_teacher_rows_of_a_gated_block_pair_gate_and_up():
    """Orders 1 to 3: the strongest gate; gate × up of the same neurons; the same with a second gate."""
    dense = block(20, 33, gated=True)
    data = stream(dense, tokens(200, 20))
    best = strongest(neuron_scores(dense, data), 8)
    factors = teacher_factors(dense, 3, 1, "independent")
    assert neurons_per_feature(factors) == 2
    rows = teacher_projection(dense, data, 4, factors)
    gate, up, first, second = dense.gate, dense.up, best[:4], best[4:]
    expected = [(gate, first), (gate, first), (up, first), (gate, first), (up, first), (gate, second)]
    assert torch.equal(rows.weight, torch.cat([linear.weight[which] for linear, which in expected]))
    assert torch.equal(rows.bias, torch.cat([linear.bias[which] for linear, which in expected]))


@pytest.mark.parametrize(("sharing", "places"), [("shared", "gate0 up0 gate1"), ("powers", "gate0")])
def test_factors_of_a_gated_block_under_shared_rows(sharing, places):
    dense = block(5, 7, gated=True)
    factors = teacher_factors(dense, 3, 1, sharing)
    assert places == " ".join(f"{'up' if linear is dense.up else 'gate'}{place}" for linear, place in factors)


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
    joined = products_in_place(z.clone(), order, lowest, sharing)
    assert joined is None or torch.equal(joined, torch.cat(found, dim=1))


def test_products_are_made_in_place_where_they_are_neighbours():
    """The forms that the suite's rows have."""
    for order, lowest, sharing in [
        (2, 1, "independent"),
        (2, 2, "independent"),
        (3, 1, "shared"),
        (2, 2, "powers"),
    ]:
        z = tokens(3, projection_groups(order, lowest, sharing) * 4)
        joined = products_in_place(z, order, lowest, sharing)
        assert joined is not None and joined.data_ptr() == z.data_ptr()


def test_every_named_activation_is_elementwise():
    x = tokens(5, 4)
    for kind in features.ACTIVATIONS.values():
        module = kind()
        assert isinstance(module, nn.Module)
        assert_close(module(x)[:, :2], module(x[:, :2]))


def test_learnable_functions_are_one_per_feature_and_start_at_gelu():
    x, act = tokens(63, 4, dtype=torch.float64), new_activation("univariate", 4).double()
    assert_close(act(x), nn.functional.gelu(x))
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.copy_(torch.randn(4, generator=generator()))
    a, b, c = act.gelu, act.linear, act.square
    assert_close(act(x), a * nn.functional.gelu(x) + b * x + c * x**2)


def test_rbf_rows_are_centres_at_the_inputs_distance():
    """exp(z − ‖x‖²/2s²) with these rows is exp(−‖x − c‖²/2s²), s² = r²/2, for the centres c read off them."""
    r, x = 5.0, tokens(63, 6, dtype=torch.float64)
    drawn = draw_projection("gaussian", 1, 9, 6, input_rms=r, generator=generator())
    rows = rbf_rows(drawn, r)
    centres = rows.weight.double() * r**2 / 2
    assert_close(torch.linalg.vector_norm(centres, dim=1), torch.full((9,), r), precision=torch.float32)
    cosine = nn.functional.cosine_similarity(centres, drawn.weight.double())
    assert_close(cosine, torch.ones(9), precision=torch.float32)
    z = x @ rows.weight.double().T + rows.bias - (x**2).sum(1, keepdim=True) / r**2
    assert_close(z, -(torch.cdist(x, centres) ** 2) / r**2, precision=torch.float32)
