"""Block-diagonal maps against dense ones written out entry by entry, and their closed-form fits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eugen import LowRankAwareConfig
from eugen.cost import count_macs
from eugen.layers.block_dense import BlockDenseConfig, set_block_factors
from eugen.layers.block_shuffle import BlockShuffleConfig, ShuffleMap
from eugen.least_squares import RIDGE
from eugen.parts.structured import BlockDiagonal, pair_factors
from tests.eugen.blocks import block, generator, linear, stream, tokens
from tests.tolerances import assert_close, relative_rms

LIKE = torch.empty(0, dtype=torch.float64)
SHAPES = [(60, 240, 4), (63, 50, 4), (7, 64, 3), (12, 12, 1)]
by_shape = pytest.mark.parametrize(("n", "m", "blocks"), SHAPES)


def block_diagonal(n: int, m: int, blocks: int, *, bias: bool = False, seed: int = 0) -> BlockDiagonal:
    return BlockDiagonal(n, m, blocks, like=LIKE, generator=generator(seed), bias=bias)


def shuffle_map(n: int, m: int, blocks: int, width: int, *, seed: int = 0) -> ShuffleMap:
    first = block_diagonal(n, blocks * width, blocks, seed=seed)
    return ShuffleMap(first, block_diagonal(blocks * width, m, blocks, bias=True, seed=seed + 1))


@torch.no_grad()
def dense_of(part: nn.Module, n: int) -> torch.Tensor:
    """The matrix of an affine map, column by column."""
    return (part(torch.eye(n, dtype=torch.float64)) - part(torch.zeros(n, dtype=torch.float64))).T


def full_linear(weight: torch.Tensor) -> nn.Linear:
    full = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        full.weight.copy_(weight)
    return full


def moment_of(n: int, count: int = 2000) -> torch.Tensor:
    x = tokens(count, n, dtype=torch.float64)
    return x.T @ x / count


def error_under(moment: torch.Tensor, error: torch.Tensor) -> float:
    return float((error @ moment * error).sum())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    blocks=st.integers(1, 6),
    count=st.integers(1, 9),
    bias=st.booleans(),
)
def test_a_block_diagonal_map_is_its_blocks(n, m, blocks, count, bias):
    part = block_diagonal(n, m, blocks, bias=bias)
    weight = torch.block_diag(*part.weight)[:m, :n]
    x = torch.randn(count, n, generator=generator(3), dtype=torch.float64, requires_grad=True)
    y, expected = part(x), x @ weight.T + (part.bias if bias else 0)
    assert_close(y, expected)
    inputs = [x, *part.parameters()]
    for mine, exact in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert_close(mine, exact, "gradient")
    assert count_macs(lambda: part(x)) == count * part.macs_per_token


@by_shape
def test_the_shuffle_deals_entries_round_the_blocks(n, m, blocks):
    width = 5
    part = shuffle_map(n, m, blocks, width)
    left, right = dense_of(part.first, n), dense_of(part.second, blocks * width)
    shuffle = torch.zeros(blocks * width, blocks * width, dtype=torch.float64)
    for entry in range(blocks * width):
        shuffle[entry % blocks * width + entry // blocks, entry] = 1
    assert_close(dense_of(part, n), right @ shuffle @ left)


@by_shape
def test_the_blind_projection_is_the_best_of_every_pair_of_blocks(n, m, blocks):
    """With M = I the error is the sum of the singular values that each pair loses (Eckart-Young)."""
    full, width = linear(n, m, bias=True, dtype=torch.float64, seeded=generator()), 5
    part = shuffle_map(n, m, blocks, width)
    part.project(full, torch.eye(n, dtype=torch.float64))
    lost = 0.0
    for to, rows in enumerate(full.weight.detach().split(-(-m // blocks))):
        for source, piece in enumerate(rows.split(-(-n // blocks), dim=1)):
            rank = sum(entry % blocks == to for entry in range(source * width, (source + 1) * width))
            lost += float(torch.linalg.svdvals(piece)[rank:].square().sum())
    error = dense_of(part, n) - full.weight.detach()
    assert float(error.square().sum()) == pytest.approx(lost, rel=1e-4)
    assert torch.equal(part.second.bias, full.bias)


@by_shape
@pytest.mark.parametrize("seen", [False, True])
def test_a_matrix_of_the_class_is_recovered(n, m, blocks, seen):
    """Exactly, up to the ridge of the metric, which moves nothing where the error can be 0."""
    moment = moment_of(n) if seen else torch.eye(n, dtype=torch.float64)
    truth, part = (shuffle_map(n, m, blocks, 2 * blocks, seed=seed) for seed in (0, 5))
    weight = dense_of(truth, n)
    part.project(full_linear(weight), moment)
    assert relative_rms(dense_of(part, n), weight) < (0.1 if seen else 1e-9)
    error = error_under(moment, dense_of(part, n) - weight)
    assert error < (1e-2 if seen else 1e-18) * error_under(moment, weight)


@by_shape
def test_block_and_dense_factors_of_the_class_are_recovered(n, m, blocks):
    inner, moment = 2 * blocks, torch.eye(n, dtype=torch.float64)
    weight = linear(inner, m, bias=False, dtype=torch.float64, seeded=generator()).weight.detach()
    weight = weight @ dense_of(block_diagonal(n, inner, blocks), n)
    b, v = block_diagonal(n, inner, blocks, seed=5), nn.Linear(inner, m, dtype=torch.float64)
    set_block_factors(b, v, full_linear(weight), moment)
    assert relative_rms(dense_of(nn.Sequential(b, v), n), weight) < 1e-9


def test_every_sweep_lowers_the_error_and_the_inputs_matter():
    full = linear(60, 240, bias=False, dtype=torch.float64, seeded=generator())
    moment, ranks = moment_of(60), torch.full((3, 4), 2)

    def error(metric: torch.Tensor, sweeps: int) -> float:
        u, v = pair_factors(full.weight, ranks, metric, sweeps=sweeps)
        product = torch.einsum("lkjr,lkri->ljki", u, v).reshape(240, 60)
        return error_under(moment, full.weight.detach() - product)

    errors = [error(moment, sweeps) for sweeps in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    assert error(torch.eye(60, dtype=torch.float64), 1) > errors[0]


def test_every_pair_has_the_rank_that_was_asked_for():
    ranks = torch.tensor([[0, 2, 1], [3, 1, 2]])
    full = linear(15, 20, bias=False, dtype=torch.float64, seeded=generator())
    u, v = pair_factors(full.weight, ranks, moment_of(15))
    assert torch.equal(torch.linalg.matrix_rank(u @ v), ranks)


def test_one_block_is_activation_aware_low_rank():
    dense, x = block(20, 60, dtype=torch.float64), tokens(800, 20, dtype=torch.float64)
    data = stream(dense, x)
    expected = LowRankAwareConfig(rank=5).fit(dense, data, generator=generator())
    configs = (BlockShuffleConfig(blocks=1, width=5), BlockDenseConfig(blocks=1, rank=5))
    for config in configs:
        layer = config.fit(dense, data, generator=generator())
        assert relative_rms(layer(x), expected(x)) < 1e-5
        assert layer.macs_per_token == expected.macs_per_token


def test_the_papers_sizes_cost_what_it_says():
    d, h, blocks, rank = 64, 256, 4, 6
    layer = BlockShuffleConfig(blocks=blocks, width=d // blocks).build(block(d, h), generator=generator())
    assert layer.up.first.out_features == d == layer.num_features
    assert layer.macs_per_token == 2 * (d + h) * d // blocks
    layer = BlockDenseConfig(blocks=blocks, rank=rank).build(block(d, h), generator=generator())
    inner = blocks * rank
    assert layer.macs_per_token == inner * (d // blocks + h) + inner * (h // blocks + d)


@pytest.mark.parametrize(("d", "h"), [(60, 240), (63, 250), (64, 256), (384, 1536)])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
def test_budgets_are_used(d, h, budget):
    dense = block(d, h)
    shuffle = BlockShuffleConfig(budget=budget).build(dense, generator=generator())
    blocks = len(shuffle.up.first.weight)
    assert blocks > 1
    left = budget * dense.macs_per_token - shuffle.macs_per_token
    given_away = 0.02 * budget * dense.macs_per_token  # for widths that are multiples of 8
    assert 0 <= left < 2 * (d + h + 2 * blocks) + given_away, "one more inner entry for each block would fit"
    layer = BlockDenseConfig(budget=budget).build(dense, generator=generator())
    blocks = len(layer.b1.weight)
    left = budget * dense.macs_per_token - layer.macs_per_token
    assert blocks > 1
    assert 0 <= left < h + blocks * (d + 1) + given_away, "one more rank of the cheaper map would fit"


def test_the_last_factor_of_a_shuffled_layer_is_solved():
    """What `test_recovery.py` asks of a readout, of block-diagonal ones: the ridge bounds the error."""
    dense = block(dtype=torch.float64)
    x = tokens(3000, dtype=torch.float64)
    config = BlockShuffleConfig(budget=0.3)
    truth = config.fit(dense, stream(dense, x), generator=generator())
    layer = config.fit(dense, stream(truth, x), generator=generator())
    with torch.no_grad():
        features = truth.down.between(truth.hidden(x))
        weight = dense_of(truth.down.second, features.shape[1])
        bound = RIDGE * (weight * features.std(0, correction=0)).square().sum()
        error = (layer(x) - truth(x)).square().sum(-1).mean()
        assert error <= bound
        assert bound < truth(x).var(0).sum() / 10, "the bound says nothing"
        unsolved = copy.deepcopy(layer)
        unsolved.down.project(dense.down, moment_of(240))
        assert (unsolved(x) - truth(x)).square().sum(-1).mean() > 10 * bound


@pytest.mark.parametrize(
    "config", [BlockShuffleConfig(blocks=0, width=3), BlockDenseConfig(blocks=0, rank=3)]
)
def test_no_blocks_are_refused(config):
    with pytest.raises(ValueError, match="blocks=0 must be at least 1"):
        config.build(block(), generator=generator())
