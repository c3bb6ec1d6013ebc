"""The Triton kernel against the definition in float64, on a GPU or in Triton's interpreter on the CPU.

TRITON_INTERPRET=1 must be set before Triton is imported: `test_interpreter.py` runs this file so.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_cases import Case, check
from eugen import EUGenConfig
from eugen.features import SHARING
from eugen.kernels import feature_map as kernel
from eugen.kernels.feature_map import naive
from tests.eugen.blocks import block, generator, tokens
from tests.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = "needs a CUDA GPU: python -m pytest tests/eugen/kernels/test_fused.py"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason=RUN + "; without one, test_interpreter.py runs these tests in the interpreter",
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason=RUN)
fused = pytest.importorskip("eugen.kernels.feature_map.fused", exc_type=ImportError)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
FORMS = [
    {"order": order, "lowest": lowest, "sharing": sharing}
    for order in (1, 2, 3)
    for lowest in range(1, order + 1)
    for sharing in SHARING
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """torch fills what `empty` returns with NaN in this mode: a feature left out cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case) -> None:
    tensors = case.tensors(DEVICE)
    check(case, fused.feature_map(*tensors, *case.form), tensors)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_every_form(form):
    for index, dtype in enumerate(DTYPES):
        run(Case(**form, dtype=dtype))
        run(Case(**form, dtype=dtype, bias=index == 0, norm=index == 1, seed=1))


@pytest.mark.parametrize("activation", naive.ACTIVATIONS)
def test_every_activation(activation):
    for dtype in DTYPES:
        run(Case(activation=activation, dtype=dtype, d=32, m=9))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 40)),
    form=st.sampled_from(FORMS),
    activation=st.sampled_from(sorted(naive.ACTIVATIONS)),
    slots=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(size, form, activation, slots, dtype):
    sizes = dict(zip(("tokens", "d", "m"), size, strict=True))
    slots = dict(zip(("bias", "norm"), slots, strict=True))
    run(Case(**sizes, **form, **slots, activation=activation, dtype=dtype))


@pytest.mark.parametrize("d", [64, 128])
def test_whole_steps_are_read_without_a_mask(d):
    run(Case(d=d, tokens=65, m=33))


def test_every_pair_of_tiles_is_computed():
    """Of tokens and of features by an even number each: no order of programs reaches all pairs by chance."""
    run(Case(tokens=127, d=16, m=33))


def test_no_token_gives_no_feature():
    x, *rows = Case().tensors(DEVICE)
    assert fused.feature_map(x[:0], *rows, *Case().form).shape == (0, 14)


def test_inputs_of_any_stride():
    case = Case()
    x, weight, bias, norm = case.tensors(DEVICE)
    for strided in (x.T.contiguous().T, x.repeat_interleave(2, 0)[::2], x[:1].expand(63, -1)):
        tensors = (strided, weight.T.contiguous().T, bias.repeat_interleave(2)[::2], norm)
        check(case, fused.feature_map(*tensors, *case.form), tensors)


@pytest.mark.parametrize("activation", naive.ACTIVATIONS)
def test_what_is_not_a_number_stays_so_and_large_ones_are_kept(activation):
    weight = torch.ones(1, 1, device=DEVICE)
    x = torch.tensor([[torch.nan], [-200.0], [80.0]], device=DEVICE)
    y = fused.feature_map(x, weight, None, None, 1, 1, "independent", activation)
    expected = naive.ACTIVATIONS[activation](x.double()).float()
    assert y[0].isnan()
    torch.testing.assert_close(y[1:], expected[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("direct", [False, True])
def test_a_layer_and_its_gradients(sharing, direct):
    """The whole layer, merged: the kernel forward, torch's operators back."""
    config = EUGenConfig(
        num_features=7, sharing=sharing, direct_linear=direct, activation="gelu", kernel="fused"
    )
    layer = config.build(block(out=33), generator=generator()).merged().to(DEVICE)
    assert layer.map.fused
    exact = copy.deepcopy(layer).cpu().double()
    x = tokens(63)
    x[5] = 0  # where ‖x‖ has no derivative
    wide, x = x.double().requires_grad_(), x.to(DEVICE).requires_grad_()
    y, expected = layer(x), exact.reference(wide)
    assert_close(y.cpu(), expected, "output")
    mine = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [wide, *exact.parameters()])
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one.cpu(), other, "gradient")


def test_the_kernel_is_what_runs(monkeypatch):
    monkeypatch.setattr(naive, "feature_map", None)
    case = Case()
    tensors = case.tensors(DEVICE)
    features = kernel.feature_map(*tensors, *case.form)
    monkeypatch.undo()
    check(case, features, tensors)


@needs_gpu
def test_auto_is_chosen_by_device_dtype_and_tokens(monkeypatch):
    layer = EUGenConfig(num_features=64).build(block(), generator=generator()).eval()
    assert not layer.map.fused
    assert not layer.to(DEVICE).map.fused  # float32
    assert layer.bfloat16().map.fused
    assert not copy.deepcopy(layer).cpu().map.fused
    used = []
    monkeypatch.setattr(
        fused, "feature_map", lambda x, *rest: used.append(len(x)) or naive.feature_map(x, *rest)
    )
    few, many = (torch.randn(n, 60, device=DEVICE, dtype=torch.bfloat16) for n in (8, kernel.LEAST_TOKENS))
    layer(many)  # with gradients
    with torch.no_grad():
        layer(few)
        layer(many)
    assert used == [kernel.LEAST_TOKENS]


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [768, 1024])
def test_sizes_of_a_transformer_in_a_cuda_graph(dtype, d):
    """One call before the capture chooses the tiles; a replay reads the new inputs."""
    case = Case(tokens=4099, d=d, m=368, dtype=dtype)
    tensors = case.tensors(DEVICE)
    fused.feature_map(*tensors, *case.form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = fused.feature_map(*tensors, *case.form)
    tensors[0].copy_(Case(tokens=4099, d=d, m=368, dtype=dtype, seed=5).tensors(DEVICE)[0])
    graph.replay()
    check(case, features, tensors)


@needs_gpu
@pytest.mark.parametrize("mode", ["composed", "fused"])
def test_compiled_with_cuda_graphs(mode):
    config = EUGenConfig(num_features=64, direct_linear=True, kernel=mode)
    layer = config.build(block(256, 1024), generator=generator()).eval().to(DEVICE, torch.bfloat16)
    x = tokens(512, 256).to(DEVICE, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            y = compiled(x).clone()
    assert_close(y.cpu(), copy.deepcopy(layer).cpu().double().reference(x.cpu().double()))


@needs_gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_are_as_torch_is_set(precision):
    case = Case(d=256, tokens=100, m=33)
    tensors = case.tensors(DEVICE)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        features = fused.feature_map(*tensors, *case.form)
    finally:
        torch.set_float32_matmul_precision(before)
    if precision == "highest":
        check(case, features, tensors)
    else:  # TF32 keeps 10 bits of each number
        exact = naive.feature_map(*(t.double() for t in tensors), *case.form)
        assert_close(features, exact, precision=torch.bfloat16)
