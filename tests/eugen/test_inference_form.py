"""The inference form: sums of parts in place, and one program for every input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from eugen import EUGenConfig
from eugen.features import new_activation
from eugen.ffn import FFNLayer, linear_of_parts
from eugen.kernels.feature_map import KERNELS
from tests.eugen.blocks import block, generator, linear, stream, tokens
from tests.tolerances import assert_close

WIDTHS, OUT = (5, 9, 2), 7
FORMS = [
    {"sharing": "powers", "direct_linear": True, "merge": True},
    {"sharing": "powers", "direct_linear": True, "merge": False},
    {"norm_gate": True},
    {"activation": "univariate"},
]


class Names(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def parts_of(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tokens(count, width, seed=width, dtype=dtype) for width in WIDTHS]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_parts_are_added_up_and_nothing_else_is_written(bias, number):
    parts = parts_of(63)[:number]
    plain = linear(sum(WIDTHS[:number]), OUT, bias=bias, dtype=torch.float32, seeded=generator())
    expected = torch.cat(parts, 1).double() @ plain.weight.detach().double().T
    expected = expected + plain.bias.detach().double() if bias else expected
    before = [t.clone() for t in (*parts, *plain.parameters())]
    with torch.no_grad(), Names() as ran:
        found = linear_of_parts(plain, parts)
    assert_close(found, expected, precision=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip((*parts, *plain.parameters()), before, strict=True))
    assert ran.names.count("addmm_") == number - 1
    with Names() as ran:
        learned = linear_of_parts(plain, parts)
    assert "addmm_" not in ran.names
    assert_close(learned, expected, precision=torch.float32)
    learned.sum().backward()
    assert_close(plain.weight.grad, torch.cat(parts, 1).sum(0).expand(OUT, -1), precision=torch.float32)


def test_parts_under_autocast():
    parts, plain = parts_of(9), nn.Linear(sum(WIDTHS), OUT)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_of_parts(plain, parts)
    assert found.dtype == torch.bfloat16
    assert_close(found, plain(torch.cat(parts, 1)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_without_numbers(kernel):
    """On the device `meta` there is no autocast to ask for: torch raises where it is asked."""
    layer = EUGenConfig(num_features=4, direct_linear=True, kernel=kernel).build(
        block(), generator=generator()
    )
    with torch.no_grad():
        y = layer.to("meta")(torch.empty(3, 60, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (3, 60))


def test_exported_programs_write_over_nothing():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(sum(WIDTHS), OUT)

        def forward(self, a, b, c):
            return linear_of_parts(self.linear, [a, b, c])

    with torch.no_grad():
        program = torch.export.export(Sum(), tuple(parts_of(9)))
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "addmm_." in str(n.target)]


def fit(form: dict) -> FFNLayer:
    dense = block()
    config = EUGenConfig(num_features=9, **form)
    return config.fit(dense, stream(dense, tokens(2000)), generator=generator()).eval()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_program_serves_every_input(form):
    """Traced on tensors without values: a branch on a value or `.item()` would end the trace."""
    layer, x = fit(form).merged(), tokens(63)
    state = {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    torch.compiler.reset()
    with torch.no_grad():
        program = make_fx(lambda s, x: functional_call(layer, s, (x,)), tracing_mode="symbolic")(state, x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for other in (x, tokens(17, seed=3), torch.zeros(17, 60), 1e3 * tokens(17, seed=4)):
            assert_close(program(state, other), layer.reference(other), precision=torch.float32)
            assert_close(compiled(other), layer.reference(other), precision=torch.float32)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {"aten.cat.default", "aten.item.default", "aten._local_scalar_dense.default"} & called


@pytest.mark.parametrize("autocast", [False, True])
def test_a_learned_function_of_each_feature_is_the_same_without_gradients(autocast):
    act = new_activation("univariate", 9).double()
    with torch.no_grad():
        for seed, parameter in enumerate(act.parameters()):
            parameter.copy_(tokens(1, 9, seed=seed, dtype=torch.float64)[0])
    z = tokens(6, 9, dtype=torch.float64)
    expected = act(z)
    assert expected.requires_grad
    kept = z.clone()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), Names() as seen:
        result = act(z)
    assert_close(result, expected)
    assert torch.equal(z, kept)
    assert ("addcmul_" in seen.names) != autocast
