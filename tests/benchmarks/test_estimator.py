"""The benchmark of the theorems: closed forms by enumeration, faults that it must find, its record."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import eugen
from benchmarks import estimator, variance
from tests.eugen.blocks import generator

DRAWS = 4000


def vectors(d: int) -> tuple[torch.Tensor, torch.Tensor]:
    w, x = torch.randn(2, d, generator=generator(3), dtype=torch.float64)
    return w, x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2])
def test_rademacher_variance_is_that_of_all_sign_patterns(order, m):
    """d = 3: the exact distribution of a feature's factor has eight values."""
    w, x = vectors(3)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    factor = (signs @ w) * (signs @ x)
    feature = factor
    for _ in range(order - 1):
        feature = (feature[:, None] * factor).flatten()
    assert float(feature.mean()) == pytest.approx(float(w @ x) ** order)
    expected = float(feature.var(correction=0)) / m
    assert variance.closed_form("rademacher", order, m, w, x) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal", "orthogonal_chi"])
@pytest.mark.parametrize("m", [2, 5, 8])
def test_measured_variance_agrees_with_the_closed_form(kind, m):
    """Within 4.5 standard errors: 36 comparisons, of which chance fails one in 4000 runs; d = 4."""
    w, x = vectors(4)
    w, x = w / w.norm(), x / x.norm()
    squares = variance.errors(kind, m, DRAWS, w, x[None], generator=generator(4)).square()
    for order in variance.ORDERS:
        found = squares[order - 1, 0]
        error = float(found.std()) / math.sqrt(DRAWS)
        expected = variance.closed_form(kind, order, m, w, x)
        assert abs(float(found.mean()) - expected) < 4.5 * error + 1e-12, (order, expected)


def test_chunks_do_not_change_how_much_is_drawn(monkeypatch):
    w, x = vectors(4)
    monkeypatch.setattr(variance, "ROWS_PER_CHUNK", 50)
    found = variance.errors("orthogonal", 5, 101, w, x[None], generator=generator())
    assert found.shape == (3, 1, 101)
    assert len(set(found[0, 0].tolist())) == 101, "a draw was repeated"


def test_draws_come_in_batches_that_differ():
    values, exact = estimator.layer_draws("orthogonal", [0.2, -0.7, 0.4], 50, generator(5), at_once=20)
    assert len(set(values.tolist())) == 50
    assert estimator.layer_draws("gaussian", [0.2, -0.7, 0.4], 10, generator(5))[1] == exact


def test_parts_average_to_the_layers_own_output(monkeypatch):
    built = []
    build = eugen.EUGenConfig.build

    def keep(self, dense, *, generator):
        built.append((dense, build(self, dense, generator=generator)))
        return built[-1][1]

    monkeypatch.setattr(eugen.EUGenConfig, "build", keep)
    values, exact = estimator.layer_draws("gaussian", [0.2, -0.7, 0.4, -0.3], 30, generator(6))
    ((dense, layer),) = built
    fixed = torch.Generator().manual_seed(1)
    w, x = torch.randn(2, estimator.WIDTH - 2, generator=fixed, dtype=torch.float64)
    x = (x / x.norm() + w / w.norm()) / 2
    assert float(values.mean()) == pytest.approx(layer(x[None]).item())
    z = dense.up(x[None]).item()
    assert exact == pytest.approx(0.2 - 0.7 * z + 0.4 * z**2 - 0.3 * z**3)


@pytest.fixture
def measured() -> list[estimator.Variance]:
    """Variances that follow the theorems exactly, with a small standard error."""
    w, xs = estimator._points()
    return [
        estimator.Variance(kind, i, c, m, max(variance.closed_form(kind, i, m, w, x), 1e-15), 0.01, 1.0)
        for kind, sizes in estimator.SIZES.items()
        for m in sizes
        for i in variance.ORDERS
        for c, x in zip(estimator.COSINES, xs, strict=True)
    ]


def test_slope_is_minus_one_by_theorem_and_another_law_is_seen(measured):
    assert [s["slope"] for s in estimator.slopes(measured)] == pytest.approx([-1] * 24)
    slower = [replace(v, variance=v.variance * v.m**0.2) for v in measured]
    assert all(s["low"] > -1 for s in estimator.slopes(slower))


def test_ratios_compare_with_gaussian_rows_of_the_same_case(measured):
    found = estimator.ratios(measured)
    assert all(r["high"] < 1 for r in found if r["projection"] == "orthogonal")
    worst = max(found, key=lambda r: r["ratio"])
    assert (worst["projection"], worst["order"], worst["cosine"]) == ("orthogonal_chi", 2, 0)
    d = estimator.WIDTH
    # Order 2 of unrelated vectors, a whole block: A = d/(d+2), B = −d/((d−1)(d+2)), Gaussian 1/m.
    expected = (d / (d + 2)) ** 2 * (1 + 1 / (d - 1))
    (case,) = [
        r for r in found if (r["projection"], r["order"], r["cosine"], r["m"]) == ("orthogonal", 2, 0, d)
    ]
    assert case["ratio"] == pytest.approx(expected)


def test_intervals_widen_with_what_is_compared():
    assert estimator._quantile(1) == pytest.approx(1.959964, abs=1e-6)
    assert estimator._quantile(20) == pytest.approx(3.023341, abs=1e-6)


@pytest.mark.parametrize("fault", ["sign", "scale"])
def test_a_fault_of_the_readout_shows_as_bias(monkeypatch, fault):
    """Signs lost, or A 3 % too large: the intervals of the faulty estimates exclude 0."""
    build = eugen.EUGenConfig.build

    def faulty(self, dense, *, generator):
        layer = build(self, dense, generator=generator)
        with torch.no_grad():
            if fault == "sign":
                layer.readout.weight *= torch.sign(dense.act.coefficients[1])
            else:
                layer.readout.weight *= 1.03
        return layer

    sound = estimator.biases(2000, generator(7), kinds=("orthogonal",))
    assert all(b["low"] <= 0 <= b["high"] or abs(b["relative_bias"]) < 1e-6 for b in sound)
    monkeypatch.setattr(eugen.EUGenConfig, "build", faulty)
    found = estimator.biases(2000, generator(7), kinds=("orthogonal",))
    wrong = [(b["degree"], b["sign"]) for b in found if not b["low"] <= 0 <= b["high"]]
    assert (1, "negative") in wrong
    assert ((1, "positive") in wrong) == (fault == "scale")


def test_the_command_writes_a_record_of_all_sections(tmp_path, capsys):
    out = tmp_path / "estimator.json"
    assert estimator.main(["--draws", "100", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["settings"]["draws"] == 100
    kinds, orders = estimator.KINDS, variance.ORDERS
    assert {(b["projection"], b["degree"], b["sign"]) for b in record["bias"]} == set(
        itertools.product(kinds, orders, ["positive", "negative"])
    )
    page = capsys.readouterr().out
    assert all(f"## {name}" in page for name in ("bias", "slope", "ratio", "concentration"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "99"], "--draws 99 must be at least 100"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        estimator.main(arguments)
    assert message in capsys.readouterr().err
