"""One Gram matrix for all sizes gives the layers that each size's own fit gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eugen import FFSplitConfig, LinearConfig, LowRankConfig, PruneConfig
from eugen.least_squares import Moments, fit_quality
from eugen.search.candidates import candidates_for, sizes
from eugen.search.nested import NestedFits, nests
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import relative_rms

BLOCKS = {
    "plain": {},
    "gated": {"gated": True, "act": nn.SiLU()},
    "single layer": {"whole": False, "act": nn.ReLU()},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_nested_fits_are_the_fits_from_scratch(options, weighted):
    dense = block(12, 40, dtype=torch.float64, **options)
    x = tokens(900, 12, dtype=torch.float64)
    gamma = torch.rand(dense.out_features, generator=generator(3), dtype=torch.float64) if weighted else None
    data = stream(dense, x, chunk=210)
    if weighted:
        data = [(x, y, 0.1 + y.square().mean(1)) for x, y, _ in data]
    judged = stream(dense, tokens(300, 12, seed=5, dtype=torch.float64))
    fits, checked = NestedFits(dense, data, gamma), set()
    for name, own in sizes(dense, candidates_for(dense, None)).items():
        for each in own:
            if not nests(each.config):
                continue
            layer = fits.fit(each.config)
            scratch = each.config.fit(dense, data, generator=generator(), output_weight=gamma)
            probe = tokens(50, 12, seed=9, dtype=torch.float64)
            assert relative_rms(layer(probe), scratch(probe)) < 1e-6, (name, each.budget)
            ours, theirs = (1 - fit_quality(f, judged, gamma) for f in (layer, scratch))
            assert ours == pytest.approx(theirs, rel=1e-6)
            checked.add(name)
    whole = {"prune + linear", "prune_linear"} if dense.down is not None else set()
    assert checked == {"drop", "prune", "linear"} | whole


def test_moments_of_a_part_are_those_of_its_stream():
    """Also where the tokens are too few for all features and not for the part: the ridge is its own."""
    x, y = tokens(30, 20, dtype=torch.float64), tokens(30, 3, seed=4, dtype=torch.float64)
    columns, whole, alone = torch.tensor([7, 2, 11]), Moments(), Moments()
    whole.add(x, y)
    alone.add(x[:, columns], y)
    for ours, theirs in zip(whole.part(columns).solve(), alone.solve(), strict=True):
        assert relative_rms(ours, theirs) < 1e-9
    assert whole.solve()[0].shape == (3, 20)


def test_what_has_parameters_inside_does_not_nest():
    assert not nests(FFSplitConfig(of=LowRankConfig()))
    assert nests(FFSplitConfig(of=LinearConfig())) and nests(PruneConfig(budget=0.3))
