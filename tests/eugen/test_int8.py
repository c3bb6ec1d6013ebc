"""Products of bytes against the definition, worked out in 64-bit integers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from eugen.cost import UNCOUNTED_BY_TORCH
from eugen.parts import int8_linear
from eugen.parts.int8_linear import Int8Linear, quantise
from tests.eugen.blocks import generator, linear, tokens
from tests.tolerances import assert_close

COUNT, D, OUT = 63, 60, 7


def quantised(d: int = D, out: int = OUT, *, bias: bool = True, dtype=torch.float32) -> Int8Linear:
    return Int8Linear(linear(d, out, bias=bias, dtype=dtype, seeded=generator()))


def between_the_roundings(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 rows with what they are rounded to and each row's step: no entry is near a tie."""
    seeded = generator(seed)
    whole = torch.randint(-126, 127, (rows, columns), generator=seeded)
    offset = 0.6 * torch.rand(rows, columns, generator=seeded, dtype=torch.float64) - 0.3
    whole[:, 0], offset[:, 0] = 127, 0
    step = 10 ** torch.rand(rows, 1, generator=seeded, dtype=torch.float64)
    return (whole + offset) * step, whole, step


def both_paths(layer: Int8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        fast = layer(x)
    return fast, layer(x)


def test_the_product_is_that_of_the_integers():
    x, whole, step = between_the_roundings(COUNT, D, seed=1)
    weight, bytes_of_it, scale = between_the_roundings(OUT, D, seed=2)
    plain = nn.Linear(D, OUT)
    with torch.no_grad():
        plain.weight.copy_(weight)
    layer = Int8Linear(plain)
    assert torch.equal(layer.quantised.long(), bytes_of_it)
    assert_close(layer.weight, bytes_of_it * scale, precision=torch.float32)
    expected = (whole @ bytes_of_it.T) * step * scale.T + plain.bias.double()
    for y in both_paths(layer, x.float()):
        assert_close(y, expected)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 40),
    d=st.integers(1, 80),
    out=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    power=st.integers(-30, 30),
)
@example(count=2, d=1, out=3, bias=True, dtype=torch.float32, power=0)  # oneDNN's own product is wrong there
@example(count=0, d=1, out=1, bias=True, dtype=torch.float32, power=0)
def test_both_paths_agree(count, d, out, bias, dtype, power):
    layer = quantised(d, out, bias=bias, dtype=dtype)
    x = tokens(count, d, dtype=dtype) * (2.0**power if dtype != torch.float16 else 1)
    fast, definition = both_paths(layer, x)
    assert fast.dtype == definition.dtype == dtype
    assert_close(fast.float(), definition.float(), precision=torch.bfloat16 if dtype.itemsize == 2 else dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(-20, 20),
    weight_size=st.integers(-20, 20),
    dead=st.booleans(),
)
def test_no_output_is_further_off_than_half_a_step_of_every_factor(seed, size, weight_size, dead):
    """|Σ Wx − Σ W̃x̃| ≤ Σ |W| t/2 + |x| s/2 + st/4, with the steps t of the token and s of the row."""
    plain = linear(D, OUT, bias=False, dtype=torch.float64, seeded=generator(seed))
    x = tokens(COUNT, D, seed=seed, dtype=torch.float64) * 10.0**size
    with torch.no_grad():
        plain.weight.mul_(10.0**weight_size)
        if dead:
            plain.weight[0], x[0] = 0, 0
    t, s = x.abs().amax(1, keepdim=True) / 127, plain.weight.abs().amax(1, keepdim=True) / 127
    bound = t / 2 * plain.weight.abs().sum(1) + x.abs().sum(1, keepdim=True) / 2 * s.T + D / 4 * t * s.T
    for y in both_paths(Int8Linear(plain), x):
        assert ((y - plain(x)).abs() <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_the_rounding_straight_through(bias):
    layer = quantised(bias=bias)
    x, direction = tokens(COUNT).requires_grad_(), tokens(COUNT, OUT, seed=5)
    found = torch.autograd.grad((layer(x) * direction).sum(), [x, *layer.parameters()])
    wide, rows = x.detach().double(), layer.quantised.double()
    step = wide.abs().amax(1, keepdim=True) / 127
    weight = rows * layer.scale.detach().double()[:, None]
    # The rounded input enters the scale's gradient; a tie that rounds otherwise moves it by one step.
    scale = (direction.double() * ((wide / step).round() * step @ rows.T)).sum(0)
    expected = [direction.double() @ weight, scale, direction.double().sum(0)]
    assert [name for name, _ in layer.named_parameters()] == ["scale", "bias"][: 1 + bias]
    for mine, exact in zip(found, expected[: 2 + bias], strict=True):
        assert_close(mine, exact, precision=torch.float32 if mine is not found[1] else torch.int8)


@pytest.mark.parametrize("bytes_are_multiplied", [True, False])
def test_without_gradients_bytes_are_multiplied_where_the_device_can(bytes_are_multiplied, monkeypatch):
    monkeypatch.setattr(int8_linear, "_CPU_MULTIPLIES_BYTES", bytes_are_multiplied)
    layer, x = quantised(), tokens(COUNT)

    def operators() -> dict:
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH) as counter:
            layer(x)
        return dict(counter.get_flop_counts()["Global"])

    flops = 2 * COUNT * D * OUT
    floats = operators()
    assert torch.ops.aten._int_mm not in floats and sum(floats.values()) == flops
    with torch.no_grad():
        assert operators() == ({torch.ops.aten._int_mm: flops} if bytes_are_multiplied else floats)


@pytest.mark.parametrize(
    ("count", "d", "out", "expected"),
    [(17, 64, 8, True), (16, 64, 8, False), (17, 60, 8, False), (17, 64, 7, False)],
)
def test_cuda_multiplies_bytes_in_whole_tiles_only(count, d, out, expected):
    """What cuBLAS takes; the device itself is not needed to ask."""
    layer = quantised(d, out)
    with FakeTensorMode():
        assert layer._multiplies_bytes(torch.empty(count, d, device="cuda")) is expected


def test_what_is_not_finite_stays_so_and_in_its_token():
    layer, x = quantised(), tokens(COUNT)
    clean = both_paths(layer, x)
    x[3, 5], x[9, 0] = torch.nan, torch.inf
    rest = [i for i in range(COUNT) if i not in (3, 9)]
    for y, before in zip(both_paths(layer, x), clean, strict=True):
        assert not y[[3, 9]].isfinite().any()
        assert torch.equal(y[rest], before[rest])


def test_weights_take_one_byte_each_and_the_map_given_keeps_its_own():
    plain = linear(D, OUT, bias=True, dtype=torch.float32, seeded=generator())
    before = copy.deepcopy(plain.state_dict())
    state = Int8Linear(plain).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == D * OUT + 4 * OUT + 4 * OUT
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


def test_every_linear_map_of_a_tree_is_quantised_and_counted():
    tree = nn.Sequential(nn.Linear(5, 7), nn.ModuleList([nn.GELU(), nn.Linear(7, 3)]), nn.LayerNorm(3))
    assert quantise(tree) == 5 * 7 + 7 * 3
    assert not any(isinstance(module, nn.Linear) for module in tree.modules())
    assert quantise(tree) == 0
