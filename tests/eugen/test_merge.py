"""A layer takes up the linear map that follows it, exactly."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from eugen import DenseFFN, EUGenConfig, SNNKConfig
from eugen.bundle import merge, merge_linear
from eugen.cost import count_macs
from eugen.ffn import FFNLayer
from tests.contract.cases import every_layer, fitted, unless_refused
from tests.eugen.blocks import block, generator, linear, stream, tokens
from tests.tolerances import relative_rms

D, OUT = 20, 7
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def maps(
    *widths: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 3
) -> list[nn.Linear]:
    seeded = generator(seed)
    pairs = pairwise(widths)
    return [linear(n_in, n_out, bias=bias, dtype=dtype, seeded=seeded) for n_in, n_out in pairs]


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
def test_linear_maps_merge_exactly(biases, dtype, allowed):
    (first,), (second,) = (
        maps(*widths, bias=bias, dtype=dtype, seed=seed)
        for widths, bias, seed in (((D, 30), biases[0], 1), ((30, OUT), biases[1], 2))
    )
    merged, x = merge_linear(first, second), tokens(63, D, dtype=dtype)
    assert (merged.in_features, merged.out_features) == (D, OUT)
    assert merged.weight.dtype == dtype
    assert (merged.bias is not None) == any(biases)
    assert relative_rms(merged(x), second(first(x))) <= allowed


def test_linear_maps_that_do_not_chain():
    with pytest.raises(ValueError, match="first.out_features=30 must equal second.in_features=31"):
        merge_linear(nn.Linear(D, 30), nn.Linear(31, OUT))


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
def test_every_layer_takes_up_what_follows_or_refuses(name, bias, dtype, allowed):
    dense = block(60, 120, dtype=dtype)
    layer, x = fitted(name, dense, budget=0.5, count=300), tokens(63, dtype=dtype)
    before = copy.deepcopy(layer.state_dict())
    (following,) = maps(60, OUT, bias=bias, dtype=dtype)
    merged = unless_refused(lambda: merge(layer, following), type(layer).__name__, "plain nn.Linear")
    if merged is None:
        plain = type(layer.readout) is nn.Linear and layer.readout in set(layer.modules())
        assert not plain or type(layer).reference is not FFNLayer.reference
        return
    for one in (merged(x), merged.reference(x)):
        assert relative_rms(one, following(layer(x))) <= allowed
    assert merged.out_features == OUT
    assert merged.macs_per_token < layer.macs_per_token + following.weight.numel()
    if dtype == torch.float32:  # in which the contract counts
        assert count_macs(lambda: merged(x)) == len(x) * merged.macs_per_token
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(1)
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the layer given has changed"


def test_a_layer_that_keeps_its_output_matrix_merges_both():
    dense, (following,) = block(D, 50, dtype=torch.float64), maps(D, OUT)
    x = tokens(500, D, dtype=torch.float64)
    config = EUGenConfig(num_features=9, merge=False)
    layer = config.fit(dense, stream(dense, x), generator=generator())
    assert relative_rms(merge(layer, following)(x), following(layer(x))) <= 1e-12


def test_a_merged_layer_can_be_fitted_again_and_frozen_stays_frozen():
    dense, (following,) = block(D, 50, dtype=torch.float64), maps(D, OUT, bias=False)
    x = tokens(500, D, dtype=torch.float64)
    layer = SNNKConfig(num_features=9).fit(dense, stream(dense, x), generator=generator())
    layer.requires_grad_(False)
    merged = merge(layer, following)
    assert not any(p.requires_grad for p in merged.parameters())
    again = copy.deepcopy(merged)
    again.fit_readout([(x, following(dense(x)).detach(), None)])
    assert relative_rms(again(x), merged(x)) < 1e-9, "the fit of W2 y is W2 times the fit of y"


def test_a_single_layer_ends_in_its_activation():
    dense = DenseFFN(nn.Linear(D, 30), nn.GELU())
    with pytest.raises(ValueError, match="DenseFFN does not end in one plain nn.Linear.*readout is None"):
        merge(dense, nn.Linear(30, OUT))
