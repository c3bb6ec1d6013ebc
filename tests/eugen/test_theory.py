"""The theorems of EUGen (arXiv 2410.09771) as statistical tests on whole layers, in float64.

The rows of one wide layer hold many independent draws: m times what a feature adds to the output is
an estimate with m = 1. Seeds are fixed; a right layer fails a check with probability below 1e-4.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eugen import DenseFFN, EUGenConfig, LinearConfig, LowRankConfig, NarrowConfig, SNNKConfig
from eugen.features import RANDOM_PROJECTIONS
from eugen.layers.eugen import EUGen
from eugen.polynomials import Polynomial
from tests.eugen.blocks import block, generator, stream, tokens
from tests.eugen.test_features import assert_mean
from tests.tolerances import assert_close, relative_rms

D, COLUMNS = 5, 7
"""Inputs, and columns of G: orthogonal blocks have seven rows."""
WIDE = 4000 * COLUMNS
"""Features per layer in the tests: whole orthogonal blocks."""
Z = 4.0
"""Standard errors that a mean may be off."""
SEEN = 0.05 / (Z + 1)
"""Relative standard error at which a mean that is 5 % off is seen to be."""
every_kind = pytest.mark.parametrize("kind", RANDOM_PROJECTIONS)


def neuron(coefficients, *, towards: float = 0.95, b: float = 0.4) -> tuple[DenseFFN, Tensor]:
    """One neuron and an input with ‖w‖ = 0.8, ‖x‖ = 1.5 and this cosine between w and x."""
    x = torch.randn(D, generator=generator(1), dtype=torch.float64)
    across = torch.randn(D, generator=generator(2), dtype=torch.float64)
    x = x / x.norm()
    across = across - across.dot(x) * x
    up = nn.Linear(D, 1, dtype=torch.float64)
    with torch.no_grad():
        up.weight.copy_(0.8 * (towards * x + math.sqrt(1 - towards**2) * across / across.norm()))
        up.bias.fill_(b)
    return DenseFFN(up, Polynomial(coefficients)), 1.5 * x


@torch.no_grad()
def draw(dense: DenseFFN, x: Tensor, count: int, **options) -> tuple[Tensor, Tensor]:
    """At least `count` estimates with m = 1 of each order's term, `[order, count]`, and the constant."""
    options = {"order": len(dense.act.coefficients) - 1, "num_features": WIDE, "from_weights": True} | options
    seeded, terms, constant = generator(), [], torch.zeros(())
    for _ in range(math.ceil(count / WIDE)):
        layer = EUGenConfig(**options, merge=False).build(dense, generator=seeded)
        features = torch.cat(layer.map(x[None])).view(-1, WIDE)
        terms.append(WIDE * features * layer.readout.weight.view(-1, WIDE))
        constant = layer.readout.bias[0].detach()
        assert_close(layer(x)[0], terms[-1].mean(1).sum() + constant)
    return torch.cat(terms, dim=1), constant


def moments(dense: DenseFFN, x: Tensor, kind: str, *, norm_slot: bool) -> tuple[float, float, float]:
    """A and B of the table of variances, and c = w⁺·x⁺."""
    w = torch.cat([dense.up.weight.detach()[0], dense.up.bias.detach(), torch.zeros(1)])
    x = torch.cat([x, torch.ones(1), x.norm()[None] * norm_slot])
    c, n, d = float(w.dot(x)), float(w.dot(w) * x.dot(x)), COLUMNS
    gauss, between = n + 2 * c**2, d * (d * c**2 - n) / ((d - 1) * (d + 2))
    same, pair = {
        "gaussian": (gauss, c**2),
        "rademacher": (gauss - 2 * float((w * x).square().sum()), c**2),
        "orthogonal": (d / (d + 2) * gauss, between),
        "orthogonal_chi": (gauss, between),
    }[kind]
    return same, pair, c


SIGNS = [
    (0.5, *(sign * size for sign, size in zip(signs, (0.8, 0.6, 0.4)[:degree], strict=True)))
    for degree in (1, 2, 3)
    for signs in ([1, -1, 1][:degree], [-1, 1, -1][:degree])
]


@every_kind
@pytest.mark.parametrize("sharing", ["independent", "shared"])
@pytest.mark.parametrize("coefficients", SIGNS, ids=str)
def test_the_readout_from_weights_is_unbiased(kind, sharing, coefficients):
    """Theorem 3.1, order by order and in all; an error of 5 % in any order would show."""
    dense, x = neuron(coefficients)
    same, _, c = moments(dense, x, kind, norm_slot=False)
    degree = len(coefficients) - 1
    count = math.ceil((same / c**2) ** degree / SEEN**2)
    terms, constant = draw(dense, x, count, projection=kind, sharing=sharing, norm_slot=False)
    for i, term in enumerate(terms, start=1):
        error = float(term.std()) / math.sqrt(len(term))
        expected = coefficients[i] * c**i
        assert error <= 1.2 * SEEN * abs(expected), "too few draws to see 5 %"
        assert abs(float(term.mean()) - expected) <= Z * error
    total = terms.sum(0) + constant
    error = float(total.std()) / math.sqrt(len(total))
    assert abs(float(total.mean()) - float(dense(x).detach())) <= Z * error
    assert abs(coefficients[0]) > 2 * Z * error, "too few draws to miss the constant"


@every_kind
@pytest.mark.parametrize("towards", [0.9, -0.5])
def test_the_norm_slot_and_a_bias_leave_the_mean_alone(kind, towards):
    """x⁺ holds ‖x‖, w⁺ holds 0 in its place."""
    dense, x = neuron((0.2, 0.7, -0.9), towards=towards, b=-0.6)
    terms, constant = draw(dense, x, 100_000, projection=kind, norm_slot=True)
    total = terms.sum(0) + constant
    assert float(total.std()) / math.sqrt(len(total)) < 0.04
    assert_mean(total[:, None], dense(x).detach())


VARIANCE_FORMS = [(1, 1, True), (1, 4, True), (2, 7, True), (1, 9, False), (2, 9, False), (3, 7, False)]


@every_kind
@pytest.mark.parametrize(("order", "m", "norm_slot"), VARIANCE_FORMS)
def test_variances_are_those_of_the_closed_forms(kind, order, m, norm_slot):
    """Var = a²/m² (m Aⁱ + S Bⁱ + D c^2i − m² c^2i); nine rows are a block of seven and two of the next."""
    coefficients = (0.0,) * order + (-0.8,)
    dense, x = neuron(coefficients, towards=0.4)
    count = {1: 150_000, 2: 400_000, 3: 500_000}[order]
    terms, _ = draw(dense, x, count, projection=kind, norm_slot=norm_slot, min_order=order)
    rows = COLUMNS * math.ceil(m / COLUMNS)
    terms = terms[-1][: len(terms[-1]) // rows * rows].view(-1, rows)
    estimates = terms[:, :m].mean(1)
    same, pair, c = moments(dense, x, kind, norm_slot=norm_slot)
    inside = sum(size * (size - 1) for size in (min(m, COLUMNS), max(0, m - COLUMNS)))
    across = m * (m - 1) - inside
    total = m * same**order + inside * pair**order + across * c ** (2 * order) - m**2 * c ** (2 * order)
    expected = 0.64 / m**2 * total
    squares = (estimates - coefficients[order] * c**order).square()
    assert float(squares.std()) / math.sqrt(len(squares)) < 0.08 * expected
    assert_mean(squares[:, None], expected)


@every_kind
@pytest.mark.parametrize("sharing", ["independent", "shared"])
def test_the_variance_falls_as_one_over_m(kind, sharing):
    """Slope of log variance against log m, inside its interval; m counts whole orthogonal blocks."""
    dense, x = neuron((0.3, 0.8, -0.5))
    seeded, sizes, logs, errors = generator(), (7, 28, 112, 448), [], []
    for m in sizes:
        config = EUGenConfig(
            from_weights=True, order=2, num_features=m, projection=kind, sharing=sharing, merge=False
        )
        with torch.no_grad():
            found = torch.cat([config.build(dense, generator=seeded)(x) for _ in range(250)])
        squares = (found - dense(x)).square()
        logs.append(squares.mean().log())
        errors.append(squares.std() / squares.mean() / math.sqrt(len(squares)))
    place = torch.tensor(sizes, dtype=torch.float64).log()
    place = place - place.mean()
    slope = float((place * torch.stack(logs).detach()).sum() / place.square().sum())
    error = float((place * torch.stack(errors).detach()).norm() / place.square().sum())
    assert error < 0.1, "too few layers to tell 1/m from its root"
    assert abs(slope + 1) <= Z * error


def test_failures_become_exponentially_rare():
    """P(estimate > c + ε) against Chernoff's bound exp(−m I(ε)), whose rate Cramér's theorem attains.

    For u·v of two normals with covariance c: E exp(t u v) = ((1 − t c)² − t² n)^(−1/2).
    """
    dense, x = neuron((0.0, 1.0))
    terms, _ = draw(dense, x, 6_000_000, projection="gaussian", norm_slot=False)
    same, _, c = moments(dense, x, "gaussian", norm_slot=False)
    n, gap = same - 2 * c**2, 0.4 * c
    t = torch.linspace(0, 1 / (c + math.sqrt(n)), 100_001, dtype=torch.float64)[:-1]
    rate = float((t * (c + gap) + 0.5 * ((1 - t * c) ** 2 - t**2 * n).log()).max())
    sizes, logs, errors = (10, 40, 80), [], []
    for m in sizes:
        estimates = terms[0][: terms.shape[1] // m * m].view(-1, m).mean(1)
        share = (estimates > c + gap).double()
        p, error = float(share.mean()), float(share.std()) / math.sqrt(len(share))
        assert p - Z * error <= math.exp(-m * rate)
        logs.append(math.log(p))
        errors.append(error / p)
    steps = [(logs[i] - logs[i + 1]) / (sizes[i + 1] - sizes[i]) for i in (0, 1)]
    noise = [math.hypot(errors[i], errors[i + 1]) / (sizes[i + 1] - sizes[i]) for i in (0, 1)]
    for step, error in zip(steps, noise, strict=True):
        assert step >= rate - Z * error
    # A power law would fall a quarter as fast: log 2 over 40 more features after log 4 over 30.
    assert steps[1] >= 0.6 * steps[0] - Z * math.hypot(*noise)
    assert 0.6 * steps[0] - Z * math.hypot(*noise) > 0.375 * steps[0]


@pytest.mark.parametrize("towards", [-0.6, 0.0, 0.5, 1.0])
def test_orthogonal_rows_beat_independent_ones_at_order_two(towards):
    """Rows of length √d, a whole block of them; χ_d rows need not."""
    dense, x = neuron((0.0, 0.0, 1.0), towards=towards)
    found = {}
    for kind in ("gaussian", "orthogonal"):
        terms, _ = draw(dense, x, 250_000, projection=kind, norm_slot=False, min_order=2)
        c = float(dense.up(x).detach())
        squares = (terms[0].view(-1, COLUMNS).mean(1) - c**2).square()
        found[kind] = float(squares.mean()), float(squares.std()) / math.sqrt(len(squares))
    (iid, iid_error), (orthogonal, error) = found["gaussian"], found["orthogonal"]
    assert orthogonal + Z * math.hypot(error, iid_error) < iid


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sharing", ["independent", "shared"])
def test_merging_a_readout_from_weights_is_exact(dtype, allowed, sharing):
    dense, x = block(D, 24, 3, act=nn.Tanh(), dtype=dtype), tokens(63, D, dtype=dtype)
    options = {"from_weights": True, "order": 3, "num_features": 9, "sharing": sharing}
    kept, merged = (
        EUGenConfig(**options, merge=merge).build(dense, generator=generator()) for merge in (False, True)
    )
    assert torch.equal(kept.down.weight, dense.down.weight)
    assert merged.down is None
    for other in (merged, kept.merged()):
        assert relative_rms(other(x), kept(x)) <= allowed


def special(**options) -> EUGen:
    """An untrained layer of 12 inputs and outputs whose rows and readout a test may set."""
    options = {"order": 1, "bias_slot": False, "norm_slot": False} | options
    return EUGenConfig(**options).build(block(12, 30), generator=generator())


@torch.no_grad()
def assign(layer: EUGen, weight, bias=None) -> None:
    layer.map.projection.weight.copy_(weight)
    if bias is not None:
        layer.map.projection.bias.copy_(bias)


def test_order_one_of_all_inputs_is_the_linear_map():
    dense, x = block(12, 30), tokens(300, 12)
    full = LinearConfig().fit(dense, stream(dense, x), generator=generator())
    layer = special(num_features=12)
    assign(layer, torch.eye(12))
    layer.set_readout(full.readout.weight, full.readout.bias)
    assert_close(layer(x), full(x))


def test_order_one_is_low_rank():
    dense = block(12, 30, act=nn.Identity())
    low = LowRankConfig(rank=5).build(dense, generator=generator())
    layer = special(num_features=5)
    assign(layer, low.v1.weight)
    weight = low.readout.weight @ low.v2.weight @ low.u1.weight
    layer.set_readout(weight, low.readout.weight @ low.v2.weight @ low.u1.bias + low.readout.bias)
    assert_close(layer(tokens(63, 12)), low(tokens(63, 12)))


def test_order_one_with_relu_is_snnk():
    snnk = SNNKConfig(num_features=9).build(block(12, 30), generator=generator())
    layer = special(num_features=9, bias_slot=True, activation="relu")
    assign(layer, snnk.projection.weight, snnk.projection.bias)
    layer.set_readout(snnk.readout.weight / 3, snnk.readout.bias)
    assert_close(layer(tokens(63, 12)), snnk(tokens(63, 12)))


def test_order_one_with_the_activation_is_a_narrower_block():
    narrow = NarrowConfig(hidden_features=9).build(block(12, 30), generator=generator())
    layer = special(num_features=9, bias_slot=True, activation="gelu")
    assign(layer, narrow.up.weight, narrow.up.bias)
    layer.set_readout(narrow.down.weight, narrow.down.bias)
    assert_close(layer(tokens(63, 12)), narrow(tokens(63, 12)))
