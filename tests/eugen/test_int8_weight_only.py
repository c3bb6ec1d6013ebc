"""Weights alone as bytes: every path against the product of the dequantised weights in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import eugen
from eugen import EUGenConfig, Int8Config
from eugen.cost import UNCOUNTED_BY_TORCH
from eugen.parts import int8_linear
from eugen.parts.int8_linear import Int8Linear, WeightOnlyInt8Linear
from eugen.parts.wrapper import WrapperConfig
from tests.contract.cases import fitted
from tests.eugen.blocks import block, generator, linear, stream, tokens
from tests.tolerances import assert_close, relative_rms

D, OUT = 64, 7
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
INNER = [name for name, config in eugen.layers().items() if not issubclass(config, WrapperConfig)]


def quantised(d: int = D, out: int = OUT, *, bias: bool = True, dtype=torch.float32) -> WeightOnlyInt8Linear:
    return WeightOnlyInt8Linear(linear(d, out, bias=bias, dtype=dtype, seeded=generator()))


def both_paths(layer: WeightOnlyInt8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        fast = layer(x)
    return fast, layer(x)


def in_float64(layer: WeightOnlyInt8Linear, x: Tensor) -> Tensor:
    y = (x.double() @ layer.quantised.double().T) * layer.scale.detach().double()
    return y if layer.bias is None else y + layer.bias.detach().double()


def half(dtype: torch.dtype) -> torch.dtype:
    """The tolerance's dtype: float16 is at least as fine as bfloat16."""
    return BFLOAT16 if dtype.itemsize == 2 else dtype


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(0, 20),
    d=st.integers(1, 80) | st.sampled_from([16, 32, 48, 64, 80]),
    out=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, BFLOAT16, FLOAT16]),
)
@example(count=8, d=64, out=7, bias=True, dtype=BFLOAT16)
@example(count=1, d=56, out=7, bias=True, dtype=BFLOAT16)  # torch's own product reads past the end there
@example(count=0, d=16, out=1, bias=False, dtype=BFLOAT16)
def test_both_paths_are_the_product_of_the_dequantised_weights(count, d, out, bias, dtype):
    layer, x = quantised(d, out, bias=bias, dtype=dtype), tokens(count, d, dtype=dtype)
    for y in both_paths(layer, x):
        assert y.dtype == dtype
        assert_close(y.float() if dtype == FLOAT16 else y, in_float64(layer, x), precision=half(dtype))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), weight_size=st.integers(-20, 20))
def test_no_output_is_further_off_than_half_a_step_of_every_weight(seed, weight_size):
    plain = linear(D, OUT, bias=False, dtype=torch.float64, seeded=generator(seed))
    x = tokens(9, D, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.mul_(10.0**weight_size)
    bound = x.abs().sum(1, keepdim=True) / 2 * (plain.weight.abs().amax(1) / 127)
    for y in both_paths(WeightOnlyInt8Linear(plain), x):
        assert ((y - plain(x)).abs() <= bound * (1 + 1e-9)).all()


def test_gradients_are_those_of_the_dequantised_product():
    layer, x, direction = quantised(), tokens(9, D).requires_grad_(), tokens(9, OUT, seed=5)
    found = torch.autograd.grad((layer(x) * direction).sum(), [x, layer.scale, layer.bias])
    rows, wide = layer.quantised.double(), direction.double()
    expected = [
        wide @ (rows * layer.scale.detach().double()[:, None]),
        (wide * (x.detach().double() @ rows.T)).sum(0),
        wide.sum(0),
    ]
    for mine, exact in zip(found, expected, strict=True):
        assert_close(mine, exact, precision=torch.float32)


@pytest.mark.parametrize("reads_bytes", [True, False])
@pytest.mark.parametrize(
    ("count", "d", "dtype", "few"),
    [
        (1, 64, BFLOAT16, True),
        (8, 64, BFLOAT16, True),
        (9, 64, BFLOAT16, False),
        (1, 56, BFLOAT16, False),
        (1, 64, FLOAT16, False),
        (1, 64, torch.float32, False),
    ],
)
def test_few_tokens_in_bfloat16_read_bytes(count, d, dtype, few, reads_bytes, monkeypatch):
    """On a processor without the instructions the product is the same, only slower: it may be asked for."""
    monkeypatch.setattr(int8_linear, "_CPU_READS_BYTES", reads_bytes)
    layer, x = quantised(d, dtype=dtype), tokens(count, d, dtype=dtype)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH) as counter:
        layer(x)
    found = dict(counter.get_flop_counts()["Global"])
    assert (torch.ops.aten._weight_int8pack_mm in found) is (few and reads_bytes)
    assert sum(found.values()) == 2 * count * d * OUT


@pytest.mark.parametrize("shifted", ["inputs", "weights"])
def test_addresses_that_are_not_aligned_are_taken(shifted):
    """As memory mapped from a file, or a slice, may be: torch's product would end the process."""
    layer, x = quantised(dtype=BFLOAT16), tokens(2, D, dtype=BFLOAT16)
    expected = in_float64(layer, x)
    place = torch.empty(max(x.numel(), layer.quantised.numel()) + 1, dtype=torch.int16)
    if shifted == "inputs":
        x = place.view(BFLOAT16)[1 : x.numel() + 1].view_as(x).copy_(x)
    else:
        own = place.view(torch.int8)[1 : layer.quantised.numel() + 1].view_as(layer.quantised)
        layer.quantised = own.copy_(layer.quantised)
    with torch.no_grad():
        assert_close(layer(x), expected)
        assert_close(layer(x.T.contiguous().T), expected)


def test_sums_of_whole_numbers_do_not_overflow_float16():
    plain = nn.Linear(D, OUT, dtype=FLOAT16)
    with torch.no_grad():
        plain.weight.fill_(0.01)
        y = WeightOnlyInt8Linear(plain)(torch.full((3, D), 100.0, dtype=FLOAT16))
    assert y.isfinite().all()  # about 64, though 127 · 100 · 64 is above 65504


@pytest.mark.parametrize("count", [3, 63])
def test_autocast_is_that_of_a_plain_linear_map(count):
    plain, x = nn.Linear(D, OUT), tokens(count, D)
    layer = WeightOnlyInt8Linear(plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=BFLOAT16):
        assert layer(x).dtype == plain(x).dtype == BFLOAT16
        assert_close(layer(x), in_float64(layer, x))


def shaken(layer: nn.Module) -> nn.Module:
    """A copy whose weights are off by as much as rounding them to 127 steps may be, at random."""
    copied, seeded = copy.deepcopy(layer), generator(1)
    for module in copied.modules():
        if type(module) is nn.Linear:
            step = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight.data += step * (torch.rand(module.weight.shape, generator=seeded) - 0.5)
    return copied


def quantisable(name: str) -> eugen.FFNLayer | None:
    """The fitted row; None where its products are others than those of `nn.Linear` maps."""
    inner = fitted(name, block())
    macs = sum(m.weight.numel() for m in inner.modules() if isinstance(m, nn.Linear))
    return inner if macs == inner.macs_per_token else None


@pytest.mark.parametrize("name", INNER)
def test_a_row_is_itself_up_to_the_rounding_of_its_weights(name):
    inner = quantisable(name)
    config = Int8Config(of=eugen.layers()[name](), weight_only=True)
    if inner is None:
        with pytest.raises(eugen.UnsuitableBlock, match=name):
            config.wrap(fitted(name, block()))
        return
    layer, x = config.wrap(inner), tokens(500, seed=7)
    maps = [module for module in layer.modules() if isinstance(module, WeightOnlyInt8Linear)]
    assert maps and not any(isinstance(module, (Int8Linear, nn.Linear)) for module in layer.modules())
    with torch.no_grad():
        allowed = relative_rms(shaken(inner)(x), inner(x))
        assert 0 < relative_rms(layer(x), inner(x)) < 1.5 * allowed
        assert layer.precision == torch.float32
        assert_close(layer(x), layer.reference(x))


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("weight_only", [True, False])
def test_rows_of_a_half_precision_model_stay_in_it(name, weight_only):
    inner = quantisable(name)
    if inner is None:
        return
    for dtype in (BFLOAT16, FLOAT16):
        layer = Int8Config(of=eugen.layers()[name](), weight_only=weight_only).wrap(inner.to(dtype))
        assert {p.dtype for p in layer.parameters()} == {dtype}
        exact = copy.deepcopy(layer).double()
        for count in (1, 63):
            x = tokens(count, dtype=dtype)
            expected = exact.reference(x.double())
            with torch.no_grad():
                fast = layer(x)
            for y in (fast, layer(x)):
                assert y.dtype == dtype
                assert_close(y.float(), expected, precision=torch.int8 if not weight_only else BFLOAT16)


@pytest.mark.parametrize("weight_only", [True, False])
@pytest.mark.parametrize("count", [3, 63])
def test_programs_of_a_bfloat16_row_hold_for_any_number_of_tokens(weight_only, count):
    dense = block(D, 4 * D, dtype=BFLOAT16)
    config = Int8Config(of=EUGenConfig(budget=0.3), weight_only=weight_only)
    layer = config.fit(dense, stream(dense, tokens(2000, D, dtype=BFLOAT16)), generator=generator()).eval()
    state = {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    x, fewer = tokens(count, D, dtype=BFLOAT16), tokens(2, D, dtype=BFLOAT16)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), layer.reference(x), precision=layer.precision)
        program = make_fx(lambda s, x: functional_call(layer, s, (x,)), tracing_mode="symbolic")(state, x)
        assert_close(program(state, fewer), layer.reference(fewer), precision=layer.precision)
