"""The streaming ridge against scikit-learn's on all tokens at once, in float64."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from eugen import least_squares
from eugen.least_squares import RIDGE, RIDGE_FEW_TOKENS, ErrorMeter, Moments, ridge
from tests.eugen.blocks import generator, tokens
from tests.tolerances import assert_close, relative_rms


def problem(count=700, d=23, out=5, *, dtype=torch.float64, weighted=True):
    """Correlated features of very different scales, targets with noise, positive token weights."""
    x = tokens(count, d, dtype=torch.float64) * torch.logspace(-2, 2, d, dtype=torch.float64)
    y = (x / x.std(0)) @ torch.randn(d, out, generator=generator(3), dtype=torch.float64) + 7
    y = y + torch.randn(count, out, generator=generator(4), dtype=torch.float64)
    weight = torch.rand(count, generator=generator(5), dtype=torch.float64) * 3 if weighted else None
    return x.to(dtype), y.to(dtype), None if weight is None else weight.to(dtype)


def oracle(x, y, weight, relative):
    """Ridge on standardised features; scikit-learn's penalty is against the sum of the weights."""
    x, y = x.double(), y.double()
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    deviation = ((weight[:, None] * (x - mean).square()).sum(0) / weight.sum()).sqrt()
    model = Ridge(alpha=relative * float(weight.sum()), solver="cholesky")
    model.fit(((x - mean) / deviation).numpy(), y.numpy(), sample_weight=weight.numpy())
    coefficients = torch.from_numpy(model.coef_) / deviation
    return coefficients, torch.from_numpy(model.intercept_) - coefficients @ mean


def chunks(x, y, weight, size):
    pieces = [None] * len(x.split(size)) if weight is None else weight.split(size)
    return list(zip(x.split(size), y.split(size), pieces, strict=True))


def assert_same_map(solved, expected, x, dtype=torch.float64):
    """Both maps say the same about the tokens: single weights of near-dead columns need not agree."""
    said, wanted = (x.double() @ w.T + b for w, b in (solved, expected))
    assert_close((said - said.mean(0)).to(dtype), (wanted - wanted.mean(0)).to(dtype), "spread")
    assert_close(said.to(dtype), wanted.to(dtype), "value")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("relative", [1e-6, 1e-2, 1.0, None])
def test_solution_is_that_of_weighted_ridge(weighted, relative):
    x, y, weight = problem(weighted=weighted)
    solved = ridge(chunks(x, y, weight, 63), ridge=relative)
    expected = oracle(x, y, weight, RIDGE if relative is None else relative)
    assert_same_map(solved, expected, x)
    assert_close(solved[0] * x.std(0), expected[0] * x.std(0), "weights")
    assert solved[0].dtype == solved[1].dtype == torch.float64


@pytest.mark.parametrize("size", [1, 7, 350, 699])
def test_chunks_do_not_matter(size):
    x, y, weight = problem()
    assert_same_map(ridge(chunks(x, y, weight, size)), ridge([(x, y, weight)]), x)


def test_empty_chunks_between_others_do_not_matter():
    x, y, weight = problem()
    nothing = (x[:0], y[:0], weight[:0])
    assert_same_map(ridge([(x, y, weight), nothing]), ridge([(x, y, weight)]), x)


@pytest.mark.parametrize("factor", [1e-3, 5.0])
def test_only_the_ratio_of_weights_matters(factor):
    x, y, weight = problem()
    assert_same_map(ridge([(x, y, factor * weight)]), ridge([(x, y, weight)]), x)


def test_a_token_of_weight_two_is_two_tokens():
    x, y, _ = problem(weighted=False)
    weight = torch.ones(len(x), dtype=x.dtype)
    weight[:100] = 2
    repeated = [(x, y, None), (x[:100], y[:100], None)]
    assert_same_map(ridge([(x, y, weight)]), ridge(repeated), x)


def test_float32_far_from_zero():
    x, y, weight = problem(dtype=torch.float32, weighted=False)
    x = x / x.std(0) + 1000
    y = y + 1000
    solved = ridge(chunks(x, y, weight, 63))
    expected = oracle(x, y, weight, RIDGE)
    said, wanted = (x.double() @ w.T + b for w, b in (solved, expected))
    assert_close((said - said.mean(0)).float(), (wanted - wanted.mean(0)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_summed_wide(dtype):
    x, y, weight = problem(count=5000, dtype=dtype)
    expected = oracle(x, y, weight, RIDGE)
    assert_same_map(ridge(chunks(x, y, weight, 630)), expected, x, torch.float32)


def test_features_that_never_vary_get_no_weight():
    x, y, weight = problem()
    dead = torch.cat([x[:, :5], torch.full((len(x), 2), 3.0, dtype=x.dtype), x[:, 5:]], dim=1)
    solved, bias = ridge(chunks(dead, y, weight, 63))
    assert (solved[:, 5:7] == 0).all()
    kept = torch.cat([solved[:, :5], solved[:, 7:]], dim=1)
    assert_same_map((kept, bias), ridge(chunks(x, y, weight, 63)), x)


def test_a_feature_that_wakes_up_in_a_later_chunk_counts():
    x, y, _ = problem(weighted=False)
    x = x / x.std(0)
    x[:100, 3] = x[100:, 3].mean()
    assert_same_map(ridge(chunks(x, y, None, 100)), oracle(x, y, None, RIDGE), x)


def test_rank_deficient_features_are_solved():
    x, y, weight = problem(dtype=torch.float32)
    twice = torch.cat([x, x, x @ torch.ones(x.shape[1], 1)], dim=1)
    solved, bias = ridge(chunks(twice, y, weight, 63))
    plain, offset = ridge(chunks(x, y, weight, 63))
    error = [relative_rms(f.double() @ w.T + b, y) for f, w, b in ((twice, solved, bias), (x, plain, offset))]
    assert error[0] == pytest.approx(error[1], rel=1e-3)


def test_few_tokens_take_the_larger_ridge():
    x, y, _ = problem(count=46, d=23, weighted=False)
    assert_same_map(ridge([(x, y, None)]), oracle(x, y, None, RIDGE), x)
    x, y = x[:45], y[:45]  # one token below two per feature
    assert_same_map(ridge([(x, y, None)]), oracle(x, y, None, RIDGE_FEW_TOKENS), x)


@pytest.mark.parametrize("where", ["features", "target", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_named(where, value):
    parts = dict(zip(("features", "target", "weight"), problem(), strict=True))
    parts[where].view(-1)[17] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        ridge([tuple(parts.values())])


def test_nothing_to_solve():
    x, y, weight = problem()
    with pytest.raises(ValueError, match="empty"):
        ridge([])
    with pytest.raises(ValueError, match="no token"):
        ridge([(x[:0], y[:0], None)])
    with pytest.raises(ValueError, match="sum to 0"):
        ridge([(x, y, torch.zeros_like(weight))])


def test_memory_is_that_of_the_moments():
    moments = Moments()
    for x, y, weight in chunks(*problem(), 63):
        moments.add(x, y, weight)
    held = [t for t in vars(moments).values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in held) == 23 * 23
    assert moments.tokens == 700


def test_the_ridge_is_raised_until_a_factor_exists():
    indefinite = torch.diag(torch.tensor([1.0, -1e-3], dtype=torch.float64))
    right = torch.ones(2, 1, dtype=torch.float64)
    solved = least_squares._solve_positive(indefinite, right, 1e-6)
    assert torch.isfinite(solved).all()
    with pytest.raises(ValueError, match="not positive definite"):
        least_squares._solve_positive(torch.full((2, 2), torch.nan, dtype=torch.float64), right, 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_r2_is_that_of_scikit_learn(weighted):
    x, y, weight = problem(weighted=weighted)
    solved, bias = ridge([(x, y, weight)])
    prediction = x @ solved.T + bias
    importance = torch.rand(y.shape[1], generator=generator(8), dtype=torch.float64)
    meter = ErrorMeter(importance)
    for p, (_, target, w) in zip(prediction.split(63), chunks(x, y, weight, 63), strict=True):
        meter.add(p, target, w)
    # Scaling a dimension by √γ weighs its error and its variance by γ.
    scaled = [(importance.sqrt() * t).numpy() for t in (y, prediction)]
    expected = r2_score(*scaled, sample_weight=weight, multioutput="variance_weighted")
    assert meter.r2() == pytest.approx(expected, rel=1e-9)
