"""Errors of sizes that were not fitted, and which methods are worth a look in every block."""

from __future__ import annotations

import pytest

from eugen import DenseConfig, EUGenConfig, PruneConfig, find_ffns
from eugen.search.block import Seen
from eugen.search.candidates import Sized
from eugen.search.sensitivity import Sensitivity, far_behind
from eugen.transfer import default_call
from tests.eugen.models import chain, vectors

TWIN = EUGenConfig(order=1, projection="teacher", activation="gelu", norm_slot=False)
"""In a GELU block its closed form is that of `prune`, but it is fitted at three sizes only."""


def errors(*given) -> dict[str, dict[int, float]]:
    """Each candidate's local errors by MACs."""
    model = chain(16, 128).eval()
    (site,) = find_ffns(model)
    study = Sensitivity(model, [site], vectors(8, d=16), default_call, given=given, seed=0)
    found: dict[str, dict[int, float]] = {}
    for option in study.options(site):
        found.setdefault(option.sized.candidate, {})[option.sized.macs] = option.local_error
    return found


def test_between_fitted_sizes_a_method_follows_the_one_that_is_known_at_all():
    found = errors(PruneConfig(), TWIN)
    twin = found["eugen"]
    assert len(twin) > 6
    for macs, error in twin.items():
        assert error == pytest.approx(found["prune"][macs], rel=0.02)


def test_without_such_a_method_a_straight_line_promises_too_much():
    """What the one above saves us from; alone there is nothing better."""
    known, alone = errors(PruneConfig())["prune"], errors(TWIN)["eugen"]
    assert min(alone[macs] / known[macs] for macs in alone) < 0.95


def test_a_size_that_buys_a_little_less_is_no_excuse():
    """Ten MACs fewer than another's smallest size: still far behind it."""

    def seen(name: str, sizes: dict[int, float]) -> list[Seen]:
        return [Seen(Sized(name, 0.1, DenseConfig(), macs, macs), error) for macs, error in sizes.items()]

    good, bad = seen("good", {1000: 0.5, 2000: 0.3}), seen("bad", {990: 0.7, 1990: 0.4})
    assert far_behind({"good": good, "bad": bad}, {}) == {"bad"}
    early = seen("early", {500: 0.7, 1990: 0.4})
    assert far_behind({"good": good, "early": early}, {}) == set()
    assert far_behind({"good": good, "bad": bad}, {"bad": 0.5}) == {"good"}
