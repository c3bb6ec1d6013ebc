"""Rank-adaptive training: the steps by their definitions, ranks that adapt, checkpoints that hold them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eugen import DenseFFN, LowRankAwareConfig
from eugen.layers.dlrt import AdaptiveLowRankFFN, DLRTConfig
from eugen.parts import bug_integrator
from eugen.parts.bug_integrator import BugMatrix, adapt_ranks, integrate
from eugen.refine import LocalLoss
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

N, M, RANK = 20, 30, 4


def matrix(rank: int = RANK, *, seed: int = 0, n: int = N, m: int = M) -> BugMatrix:
    seeded = generator(seed)
    v, u = nn.Linear(n, rank, bias=False).double(), nn.Linear(rank, m).double()
    with torch.no_grad():
        for parameter in (*v.parameters(), *u.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded, dtype=torch.float64))
    x = tokens(500, n, dtype=torch.float64)
    return BugMatrix(v, u, torch.linalg.cholesky(x.T @ x / 500))


@torch.no_grad()
def product(part: BugMatrix) -> torch.Tensor:
    """W, in coordinates that are not whitened."""
    return part.u @ part.s @ part.v.T @ torch.linalg.inv(part.root)


def assert_orthonormal(part: BugMatrix) -> None:
    for basis in (part.u, part.v):
        assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))


def low_rank_block(ranks: tuple[int, int], d: int = N, h: int = 60) -> DenseFFN:
    """A block whose matrices have these ranks."""
    dense = block(d, h, act=nn.Tanh(), dtype=torch.float64)
    with torch.no_grad():
        for full, rank in zip((dense.up, dense.down), ranks, strict=True):
            left, values, right = torch.linalg.svd(full.weight, full_matrices=False)
            full.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    return dense


def ranks_of(layer: AdaptiveLowRankFFN) -> tuple[int, int]:
    return layer.v1.out_features, layer.v2.out_features


def refined(dense: DenseFFN, config: DLRTConfig, steps: int = 40) -> tuple[AdaptiveLowRankFFN, ...]:
    data = stream(dense, tokens(2000, dense.in_features, dtype=dense.up.weight.dtype))
    layer = config.fit(dense, data, generator=generator())
    return layer, config.refine(layer, dense, data, steps=steps, generator=generator())


def test_the_two_gradients_are_those_of_the_full_matrix():
    """∇K = ∇W V and ∇L = ∇Wᵀ U from one pass; ∇S = Ûᵀ ∇W V̂ from the other."""
    part, x = matrix(), tokens(50, N, dtype=torch.float64)
    whitened = x @ torch.linalg.inv(part.root).T
    full = (part.u @ part.s @ part.v.T).requires_grad_()
    expected = whitened @ full.T + part.bias
    (slope,) = torch.autograd.grad(expected.sin().sum(), full)
    (k, l), apply = part.tangent()
    assert_close(apply(x), expected)
    for_k, for_l = torch.autograd.grad(apply(x).sin().sum(), (k, l))
    assert_close(for_k, slope @ part.v)
    assert_close(for_l, slope.T @ part.u)
    part.augment(for_k, for_l)
    assert part.rank == 2 * RANK
    assert_close(part.galerkin()(x), expected)
    (for_s,) = torch.autograd.grad(part.galerkin()(x).sin().sum(), part.s)
    assert_close(for_s, part.u.T @ slope @ part.v)


@pytest.mark.parametrize("rank", [4, 15])
def test_larger_bases_hold_the_old_ones_and_the_stepped_factors(rank):
    part, before = matrix(rank), matrix(rank)
    weight, seeded = product(part), generator(4)
    k = torch.randn(M, rank, generator=seeded, dtype=torch.float64)
    l = torch.randn(N, rank, generator=seeded, dtype=torch.float64)
    part.augment(k, l)
    assert_orthonormal(part)
    assert (part.u.shape[1], part.v.shape[1]) == (min(2 * rank, M), min(2 * rank, N))
    assert_close(product(part), weight)
    for size in (0.1, 10.0):
        for basis, held in (
            (part.u, (before.u, before.u @ before.s - size * k)),
            (part.v, (before.v, before.v @ before.s.T - size * l)),
        ):
            for columns in held:
                assert_close(basis @ (basis.T @ columns), columns)


def test_the_first_step_has_its_size_and_the_mean_survives_a_change_of_basis():
    part = matrix()
    norm, old = part.s.norm(), part.s
    slope = torch.randn(RANK, RANK, generator=generator(2), dtype=torch.float64)
    part.step(slope, 0.1)
    assert_close(part.s, old - 0.1 * norm * slope / slope.norm())
    first = part.u @ (0.1 * slope) @ part.v.T
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator(3), dtype=torch.float64)).Q
    part.u, part.s = part.u @ turn, turn.T @ part.s
    part.step(torch.zeros(RANK, RANK, dtype=torch.float64), 0.0)
    u, mean, v = part._mean
    assert_close(u @ mean @ v.T, 0.9 * first)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.7])
def test_truncation_keeps_to_the_tolerance(tolerance):
    part = matrix(8)
    weight, values = part.u @ part.s @ part.v.T, torch.linalg.svdvals(part.s)
    adapt_ranks([part], tolerance, allowed=10**9)
    assert_orthonormal(part)
    error = float((part.u @ part.s @ part.v.T - weight).norm() / weight.norm())
    assert error <= tolerance + 1e-12
    if part.rank > 1:  # and one fewer would not do
        assert float(values[part.rank - 1 :].norm() / values.norm()) > tolerance
    assert_close(part.s.diagonal(), values[: part.rank])


@pytest.mark.parametrize("allowed", [2 * (N + M), 5 * (N + M), 9 * (N + M) + 3])
def test_the_budget_cuts_what_carries_least(allowed):
    parts = [matrix(8, seed=seed) for seed in (0, 1)]
    shares = [torch.linalg.svdvals(p.s).square() / p.s.norm().square() for p in parts]
    adapt_ranks(parts, 0.0, allowed)
    kept = sum(p.rank for p in parts)
    assert kept * (N + M) <= allowed < (kept + 1) * (N + M)
    assert min(p.rank for p in parts) >= 1
    best = max(
        float(shares[0][:r].sum() + shares[1][: kept - r].sum())
        for r in range(1, kept)
        if max(r, kept - r) <= 8
    )
    assert sum(float(s[: p.rank].sum()) for s, p in zip(shares, parts, strict=True)) == pytest.approx(best)


def test_bases_stay_orthonormal_and_the_budget_is_kept_at_every_step(monkeypatch):
    dense = block(N, 60, dtype=torch.float64)
    data = stream(dense, tokens(1000, N, dtype=torch.float64))
    seen = []

    def watched(matrices, tolerance, allowed):
        adapt_ranks(matrices, tolerance, allowed)
        seen.append(tuple(part.rank for part in matrices))
        assert sum(part.rank * part.cost for part in matrices) <= allowed
        for part in matrices:
            assert_orthonormal(part)

    monkeypatch.setattr(bug_integrator, "adapt_ranks", watched)
    config = DLRTConfig(budget=0.4)
    layer = config.fit(dense, data, generator=generator())
    config.refine(layer, dense, data, steps=25, generator=generator())
    assert len(seen) == 25


def test_a_step_takes_two_gradients(monkeypatch):
    calls = []
    plain = LocalLoss.__call__
    monkeypatch.setattr(LocalLoss, "__call__", lambda self, *a: calls.append(a[1]) or plain(self, *a))
    refined(block(N, 60), DLRTConfig(budget=0.4), steps=7)
    assert len(calls) == 2 * 7
    assert all(torch.equal(calls[i], calls[i + 1]) for i in range(0, 14, 2)), "both on one batch"


@pytest.mark.parametrize("ranks", [(3, 4), (5, 3)])
def test_ranks_fall_to_those_of_the_target(ranks):
    dense = low_rank_block(ranks)
    fitted, layer = refined(dense, DLRTConfig(rank=12))
    assert ranks_of(fitted) == (12, 12)
    assert ranks_of(layer) == ranks
    x = tokens(500, N, seed=5, dtype=torch.float64)
    assert relative_rms(layer(x), dense(x)) < 0.1
    assert layer.macs_per_token == sum(ranks) * (N + 60) < fitted.macs_per_token


def test_rank_moves_to_the_matrix_that_needs_it():
    """Equal ranks waste what the second matrix does not need; adapted ones halve the error."""
    dense = low_rank_block((20, 2))
    fitted, layer = refined(dense, DLRTConfig(budget=0.4))
    before, after = ranks_of(fitted), ranks_of(layer)
    assert before[0] == before[1]
    assert after[0] > before[0]
    assert after[1] == 2
    assert layer.macs_per_token <= 0.4 * dense.macs_per_token
    x = tokens(500, N, seed=5, dtype=torch.float64)
    assert relative_rms(layer(x), dense(x)) < 0.7 * relative_rms(fitted(x), dense(x))


def test_integration_recovers_what_was_disturbed():
    """Where the class holds the target, training from a disturbed start goes back to it."""
    dense = low_rank_block((3, 4))
    x = tokens(2000, N, dtype=torch.float64)
    data = stream(dense, x)
    layer = DLRTConfig(rank=6).fit(dense, data, generator=generator())
    with torch.no_grad():
        for factor in (layer.u1, layer.readout):
            noise = torch.randn(factor.weight.shape, generator=generator(3), dtype=torch.float64)
            factor.weight += 0.3 * factor.weight.norm() / noise.norm() * noise
    trained = DLRTConfig(rank=6).refine(layer, dense, data, steps=100, generator=generator())
    assert relative_rms(trained(x), dense(x)) < 0.2 * relative_rms(layer(x), dense(x))


def test_without_refinement_it_is_activation_aware_low_rank():
    dense, x = block(N, 60), tokens(700, N)
    data = stream(dense, x)
    layer = DLRTConfig(budget=0.4).fit(dense, data, generator=generator())
    assert torch.equal(layer(x), LowRankAwareConfig(budget=0.4).fit(dense, data, generator=generator())(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refinement_leaves_the_fitted_layer_alone_and_keeps_its_dtype(dtype):
    dense = block(N, 60, dtype=dtype)
    data = stream(dense, tokens(1000, N, dtype=dtype))
    config = DLRTConfig(budget=0.4)
    layer = config.fit(dense, data, generator=generator())
    before = copy.deepcopy(layer.state_dict())
    other = config.refine(layer, dense, data, steps=3, generator=generator())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert not torch.equal(other(data[0][0]), layer(data[0][0]))


def test_a_single_layer_is_refined_too():
    dense = DenseFFN(nn.Linear(N, 40), nn.GELU())
    x = tokens(2000, N)
    data = stream(dense, x)
    config = DLRTConfig(budget=0.6)
    layer = config.fit(dense, data, generator=generator())
    trained = config.refine(layer, dense, data, steps=60, generator=generator())
    assert trained.v2 is None
    assert trained.macs_per_token <= 0.6 * dense.macs_per_token
    assert relative_rms(trained(x), dense(x)) < relative_rms(layer(x), dense(x))


def test_checkpoints_bring_their_ranks():
    dense = low_rank_block((20, 2))
    config = DLRTConfig(budget=0.4)
    fitted, layer = refined(dense, config)
    assert ranks_of(layer) != ranks_of(fitted)
    x = tokens(9, N, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    trained = nn.Sequential(nn.LayerNorm(N), nn.ModuleDict({"mlp": layer})["mlp"]).double()
    for assign in (False, True):
        fresh = nn.Sequential(nn.LayerNorm(N), config.build(dense, generator=generator(5))).double()
        fresh.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
        assert torch.equal(fresh(x), trained(x))
        assert fresh[1].macs_per_token == layer.macs_per_token
        assert ranks_of(fresh[1]) == ranks_of(layer)
    twin.load_state_dict(fitted.state_dict())  # and back
    assert torch.equal(twin(x), fitted(x))
    optimiser = torch.optim.SGD(fresh.parameters(), lr=0.1)
    fresh(x).sum().backward()
    optimiser.step()
    assert not torch.equal(fresh(x), trained(x))


def test_checkpoints_of_another_block_are_refused_as_ever():
    config = DLRTConfig(rank=3)
    layer = config.build(block(N, 60), generator=generator())
    with pytest.raises(RuntimeError, match="size mismatch for v1.weight"):
        layer.load_state_dict(config.build(block(24, 60), generator=generator()).state_dict())
    state = layer.state_dict()
    del state["v2.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0])
def test_tolerances_beyond_all_or_nothing_are_refused(tolerance):
    with pytest.raises(ValueError, match=f"tolerance={tolerance} must be in"):
        DLRTConfig(rank=3, tolerance=tolerance).build(block(N, 60), generator=generator())


def test_no_steps_change_nothing():
    part = matrix()
    before, x = product(part), tokens(100, N, dtype=torch.float64)
    loss = LocalLoss([(x, x @ before.T, None)], generator=generator())
    integrate([part], nn.Identity(), loss, steps=0, tolerance=0.01, allowed=10**9)
    assert torch.equal(product(part), before)
