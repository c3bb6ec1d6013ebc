"""int8 and bf16 of every row."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import eugen
from eugen import DenseConfig, DLRTConfig, EUGenConfig, LowRankConfig, PruneConfig, UnsuitableBlock, replace
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.layers.bf16 import Bf16Config, Bf16FFN
from eugen.layers.int8 import Int8Config, Int8FFN
from eugen.parts.bug_integrator import set_rank
from eugen.parts.wrapper import WrapperConfig
from tests.contract.cases import BUDGET, config_of
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

WRAPPERS = [Int8Config, Bf16Config]
INNER = [name for name, config in eugen.layers().items() if not issubclass(config, WrapperConfig)]
every_pair = pytest.mark.parametrize(
    ("wrapper", "name"), [(w, n) for w in WRAPPERS for n in INNER], ids=lambda p: getattr(p, "name", p)
)


def noise(x: Tensor, seed: int) -> Tensor:
    """As much as rounding to 127 steps may be off, at random."""
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    return step * (torch.rand(x.shape, generator=generator(seed)) - 0.5)


class Noisy(nn.Module):
    """A linear map with the noise of the quantisation in place of the quantisation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = nn.Parameter(linear.weight + noise(linear.weight, 1)), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x + noise(x, 2), self.weight, self.bias)


def with_noise(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, Noisy(child) if type(child) is nn.Linear else with_noise(child))
    return module


def linear_macs(layer: nn.Module) -> int:
    return sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))


def pair(wrapper: type[WrapperConfig], name: str) -> tuple[FFNLayer, FFNLayer, WrapperConfig] | None:
    """The fitted row and the same in the wrapper; None where that refuses a row of other products."""
    dense, of = block(), config_of(name)
    data = stream(dense, tokens(2000))
    inner = of.fit(dense, data, generator=generator()).eval()
    config = wrapper(of=of)
    if wrapper is Int8Config and linear_macs(inner) != inner.macs_per_token:
        with pytest.raises(UnsuitableBlock, match=f"'int8'.*{name!r}"):
            config.fit(dense, data, generator=generator())
        return None
    return inner, config.fit(dense, data, generator=generator()).eval(), config


@every_pair
def test_a_wrapped_row_is_the_row_up_to_its_rounding(wrapper, name):
    made = pair(wrapper, name)
    if made is None:
        return
    inner, layer, config = made
    x = tokens(500, seed=7)
    assert layer.macs_per_token == inner.macs_per_token
    with torch.no_grad():
        assert_close(layer(x), layer.reference(x), precision=layer.precision)
        if wrapper is Bf16Config:
            assert torch.equal(layer(x), copy.deepcopy(inner).bfloat16()(x.bfloat16()).float())
            return
        allowed = relative_rms(with_noise(copy.deepcopy(inner))(x), inner(x))
        assert 0 < relative_rms(layer(x), inner(x)) < 1.5 * allowed
    dense = block()
    fresh = config.build(dense, generator=generator(1))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_pair
def test_wrapped_rows_compile(wrapper, name):
    made = pair(wrapper, name)
    if made is None:
        return
    _, layer, _ = made
    x = tokens(63)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    with torch.no_grad():
        assert_close(compiled(x), layer(x), precision=layer.precision)


@pytest.mark.parametrize("config", [Bf16Config(of=Int8Config()), Int8Config(of=Bf16Config())], ids=str)
def test_one_in_the_other(config):
    dense, x = block(), tokens(300)
    layer = config.fit(dense, [], generator=generator())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            # Two roundings of independent size.
            assert relative_rms(layer(x), dense(x)) < 2**0.5 * 3e-2
            assert layer(x).dtype == torch.float32
    layer(x).sum().backward()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_refinement_is_judged_and_done_in_full_precision(wrapper):
    dense, judged = block(), []
    data, of = stream(dense, tokens(2000)), PruneConfig(budget=BUDGET)

    def prefers_the_first(layer: FFNLayer) -> float:  # the refined layer is judged before the fitted one
        judged.append(layer)
        return -len(judged)

    layer = wrapper(of=of).fit_and_refine(
        dense, data, steps=5, judge=prefers_the_first, generator=generator()
    )
    assert [type(each) for each in judged] == [eugen.DenseFFN, eugen.DenseFFN]
    refined, fit = judged
    assert not torch.equal(refined.up.weight, fit.up.weight)
    expected = wrapper(of=of).wrap(refined).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_dense_block_needs_no_calibration(wrapper):
    model, calls = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), []
    made = replace(model, wrapper(), calibration=[tokens(5, 8)], call=lambda m, x: calls.append(m(x)))
    assert not calls and made.sites[0].fit_r2 is None
    assert wrapper(of=PruneConfig()).needs_calibration
    assert_close(made.model(tokens(9, 8)), model(tokens(9, 8)), precision=torch.bfloat16)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_budget_is_the_inner_rows(wrapper):
    assert wrapper(of=PruneConfig(), budget=0.3).inner == PruneConfig(budget=0.3)
    assert wrapper(of=PruneConfig(budget=0.3)).inner == PruneConfig(budget=0.3)
    assert wrapper().only_budget == 1 and wrapper(budget=1).inner == DenseConfig(budget=1)
    assert wrapper(of=PruneConfig()).only_budget is None
    with pytest.raises(ValueError, match="the dense block costs 1"):
        wrapper(budget=0.3)
    with pytest.raises(ValueError, match="budget=0.3 differs from of.budget=0.5"):
        wrapper(of=PruneConfig(budget=0.5), budget=0.3)
    field = next(f for f in dataclasses.fields(wrapper) if f.name == "of")
    assert field.default_factory() == DenseConfig()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_block_that_the_inner_row_refuses_is_refused_by_both_names(wrapper):
    config = wrapper(of=LowRankConfig(rank=3))
    for attempt in (config.build, lambda d, generator: config.fit(d, [], generator=generator)):
        with pytest.raises(UnsuitableBlock, match=f"{wrapper.name!r}.*'low_rank'"):
            attempt(block(gated=True), generator=generator())


class Stacked(LayerConfig):
    """A row whose products are not those of `nn.Linear` maps."""

    name = "stacked"

    def build(self, dense, *, generator):
        class Products(FFNLayer):
            macs_per_token = dense.macs_per_token

        layer = Products()
        layer.in_features, layer.out_features = dense.in_features, dense.out_features
        layer.experts = nn.Parameter(torch.zeros(2, 3, 4))
        return layer


def test_products_that_cannot_be_quantised_are_refused_by_name():
    with pytest.raises(UnsuitableBlock, match="'int8': of='stacked' has products other than"):
        Int8Config(of=Stacked()).build(block(), generator=generator())


def test_merging():
    dense, x = block(), tokens(63)
    of = EUGenConfig(merge=False, num_features=7)
    layer = of.fit(dense, stream(dense, tokens(2000)), generator=generator())
    low = Bf16Config(of=of).wrap(layer)
    merged = low.merged()
    assert isinstance(merged, Bf16FFN) and merged.macs_per_token < low.macs_per_token
    assert_close(merged(x), low(x), precision=torch.bfloat16)
    assert merged.merged() is merged
    quantised = Int8Config(of=of).wrap(layer)
    assert isinstance(quantised, Int8FFN) and quantised.merged() is quantised


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_layer_brings_its_ranks_too(wrapper):
    dense, x = block(), tokens(2000)
    config = wrapper(of=DLRTConfig(rank=10))
    layer = config.fit(dense, stream(dense, x), generator=generator())
    with torch.no_grad():
        set_rank(layer.inner.v1, layer.inner.u1, rank=7)
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.ones_like(tensor))
    fresh = config.build(dense, generator=generator(1))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.inner.v1.out_features == 7
    assert torch.equal(fresh(x), layer(x))
