"""The operator `eugen::feature_map` in plain torch, its gradients, and which layers call it."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import shutil
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernel_cases import Case, check
from eugen import EUGenConfig
from eugen.features import ACTIVATIONS, FIXED_ACTIVATIONS, SHARING
from eugen.kernels import feature_map as kernel
from eugen.kernels.feature_map import naive
from eugen.layers.eugen import EUGen
from eugen.parts.int8_linear import quantise
from tests.eugen.blocks import block, generator, tokens
from tests.tolerances import assert_close

FORMS = [
    {"order": order, "min_order": lowest, "sharing": sharing, "direct_linear": direct}
    for order, lowest, sharing, direct in itertools.product((1, 2, 3), (1, 2, 3), SHARING, (False, True))
    if lowest <= order and not (direct and order == 1)
]
OPERATOR = torch.ops.eugen.feature_map.default
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.mv}


def built(*, d: int = 10, dtype: torch.dtype = torch.float32, **options) -> EUGen:
    config = EUGenConfig(**{"num_features": 7, **options})
    return config.build(block(d, 24, dtype=dtype), generator=generator()).eval()


class Calls(TorchDispatchMode):
    """Which operators run, and between which devices they move numbers."""

    def __enter__(self):
        self.operators, self.devices = [], set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        result = func(*args, **(kwargs or {}))
        held = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.devices |= {t.device.type for t in held}
        return result


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which there is a GPU as far as shapes and devices go: its tensors hold no numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "cc")
    kernel.lack.cache_clear()
    yield FakeTensorMode()
    kernel.lack.cache_clear()


def on_gpu(layer: EUGen, dtype: torch.dtype) -> EUGen:
    """The layer with such tensors in the place of its own, which torch's `to` cannot make."""
    for module in layer.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = torch.empty(value.shape, device="cuda", dtype=dtype)
    layer.map.fused = layer.map._choice()
    return layer


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_the_definition_is_the_merged_layer(form):
    for bias_slot, norm_slot in itertools.product((True, False), repeat=2):
        slots = {"bias_slot": bias_slot, "norm_slot": norm_slot}
        layer = built(**form, **slots, dtype=torch.float64, kernel="composed", activation="silu").merged()
        x, rows, config = tokens(63, 10, dtype=torch.float64), layer.map.projection, layer.config
        form_of = (config.order, config.lowest_order, config.sharing, config.activation)
        features = naive.feature_map(x, rows.weight, rows.bias, layer.map.norm, *form_of)
        y = naive.output(x, features, layer.readout.weight, layer.readout.bias)
        assert_close(y, layer.reference(x))
        called = built(**form, **slots, dtype=torch.float64, kernel="fused", activation="silu").merged()
        assert_close(called(x), layer.reference(x))


@pytest.mark.parametrize("activation", naive.ACTIVATIONS)
@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_are_those_of_finite_differences(activation, sharing):
    for order, lowest in ((1, 1), (3, 1), (3, 2)):
        case = Case(tokens=3, d=4, m=2, order=order, lowest=lowest, sharing=sharing, activation=activation)
        inputs = [t.double().requires_grad_() for t in case.tensors()]
        call = lambda *tensors, form=case.form: kernel.feature_map(*tensors, *form)  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs)
        x, weight, _, _ = inputs
        assert torch.autograd.gradcheck(lambda x, w, call=call: call(x, w, None, None), (x, weight))
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("needed", range(4), ids=["x", "weight", "bias", "norm"])
def test_only_gradients_that_are_asked_for_are_computed(needed):
    """Beside z, computed anew, the products for x and for the rows; composed torch spares them, too."""
    case = Case()
    tensors = case.tensors()
    tensors[needed].requires_grad_()
    features = kernel.feature_map(*tensors, *case.form)
    with Calls() as seen:
        features.sum().backward()
    products = [str(func) for func in seen.operators if func.overloadpacket in PRODUCTS]
    assert len(products) == (3, 2, 1, 1)[needed], products  # for x one with the weights, one with the norm
    expected = torch.autograd.grad(naive.feature_map(*tensors, *case.form).sum(), tensors[needed])[0]
    assert_close(tensors[needed].grad, expected)


def test_gradients_at_the_origin_and_of_saturated_activations_are_finite():
    case = Case(order=1, activation="softplus")
    x, weight, bias, norm = case.tensors()
    x = torch.zeros_like(x).requires_grad_()
    kernel.feature_map(x, weight * 1e4, bias + 100, norm, *case.form).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_keeps_torchs_rules(dtype):
    """Schema, fake kernel and gradients agree, also for a number of tokens that is not known."""
    for sharing in SHARING:
        case = Case(sharing=sharing, activation="gelu", dtype=dtype)
        tensors = case.tensors()
        if dtype == torch.float32:
            check(case, kernel.feature_map(*tensors, *case.form), tensors)
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
        close = 8 * torch.finfo(dtype).eps  # compiled, sums may be taken in another order
        torch.library.opcheck(kernel.feature_map, (*tensors, *case.form), rtol=close, atol=close)


def test_compiled_in_one_graph_with_gradients():
    layer, x = built(direct_linear=True, kernel="fused"), tokens(63, 10)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    parameters = list(layer.parameters())
    mine = torch.autograd.grad(compiled(x).square().sum(), parameters)
    theirs = torch.autograd.grad(layer.reference(x).square().sum(), parameters)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, "gradient")


@pytest.mark.parametrize("mode", ["fused", "auto"])
def test_an_exported_program_holds_the_operator_only_where_it_was_asked_for(mode, tmp_path):
    layer, x = built(kernel=mode), tokens(63, 10)
    layer.map.fused = True  # as on a GPU
    with torch.no_grad():
        many = torch.export.Dim("tokens", min=2)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: many},))
    targets = {node.target for node in program.graph.nodes}
    assert (OPERATOR in targets) == (mode == "fused")
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for count in (17, 2 * kernel.LEAST_TOKENS):
        assert_close(again(tokens(count, 10)), layer.reference(tokens(count, 10)))


@pytest.mark.parametrize("mode", kernel.KERNELS)
def test_saved_copied_and_moved_layers_keep_their_kernel(mode):
    layer, x = built(kernel=mode), tokens(63, 10)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), torch.load(file, weights_only=False), layer.merged(), layer.float()]
    for twin in twins:
        assert twin.map.fused == (mode == "fused")
        assert torch.equal(twin(x), layer(x))
    composed = built(kernel="composed")
    composed.load_state_dict(layer.state_dict())
    assert_close(composed(x), layer(x))


def test_another_precision_of_the_projection_composes():
    layer, x = built(kernel="fused"), tokens(63, 10)
    quantise(layer)
    with torch.no_grad(), Calls() as seen:
        y = layer(x)
    assert OPERATOR not in seen.operators
    assert_close(y, layer.reference(x), precision=torch.int8)


def test_on_the_cpu_auto_is_the_composed_layer():
    auto, composed, x = built(), built(kernel="composed"), tokens(63, 10)
    for layer in (auto, composed):
        layer.map.fused = layer.map._choice()
    with torch.no_grad(), Calls() as one:
        y = auto(x)
    with torch.no_grad(), Calls() as other:
        expected = composed(x)
    assert torch.equal(y, expected)
    assert one.operators == other.operators
    assert OPERATOR not in one.operators


def test_auto_on_a_gpu_is_for_inference_on_many_tokens_in_half_precision(gpu):
    def calls(mode: str, count: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        layer = built(kernel=mode)
        with gpu, Calls() as seen:
            x, layer = torch.empty(count, 10, device="cuda", dtype=dtype), on_gpu(layer, dtype)
            assert layer(x).shape == (count, 10)
        return OPERATOR in seen.operators

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    many = kernel.LEAST_TOKENS
    assert not calls("auto", many)  # gradients
    assert calls("fused", 1)
    with torch.no_grad():
        assert [calls("auto", many, dtype) for dtype in dtypes] == [False, True, True]
        assert not calls("auto", many - 1)
        assert not calls("composed", many)
        with torch.autocast("cuda", dtype=torch.float16):
            assert not calls("auto", many)


def test_inputs_on_another_device_are_refused_by_torch(gpu):
    """Triton would take the other device's address and read what lies there."""
    layer = built(kernel="fused")
    with gpu, torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        on_gpu(layer, torch.bfloat16)(torch.empty(63, 10, dtype=torch.bfloat16))


def test_a_layer_that_is_cast_chooses_anew(monkeypatch):
    monkeypatch.setattr(kernel, "lack", lambda device, dtype: None)  # as on a GPU
    layer = torch.nn.Sequential(built())
    assert not layer[0].map.fused
    assert layer.bfloat16()[0].map.fused
    assert not layer.float()[0].map.fused


def test_a_layer_that_is_loaded_elsewhere_chooses_anew(monkeypatch):
    monkeypatch.setattr(kernel, "lack", lambda device, dtype: None if device.type == "cpu" else "as on a GPU")
    layer = torch.nn.Sequential(built()).bfloat16()
    elsewhere, file = copy.deepcopy(layer).to("meta"), io.BytesIO()
    assert not elsewhere[0].map.fused
    elsewhere.load_state_dict(layer.state_dict(), assign=True)
    assert elsewhere[0].map.fused
    torch.save(layer, file)
    for device in ("cpu", "meta"):
        file.seek(0)
        loaded = torch.load(file, weights_only=False, map_location=device)
        assert loaded[0].map.fused == (device == "cpu")


def test_a_projection_that_torch_quantised_can_be_moved():
    """There `weight` is a method."""

    class Packed(torch.nn.Module):
        def weight(self):
            raise NotImplementedError

    layer = built(kernel="fused")
    layer.map.projection = Packed()
    assert not layer.to("cpu").map.fused


REFUSED = [
    ({"order": 4}, "10 groups"),
    ({"norm_gate": True}, "norm gate"),
    ({"activation": "univariate"}, "activation"),
    ({"activation": "rbf", "order": 1, "norm_slot": False}, "activation"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_form_that_the_kernel_lacks_is_composed_and_said_once(options, words, caplog):
    kernel._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="eugen"):
        layer = built(kernel="fused", **options)
        built(kernel="fused", **options)
    assert not layer.map.fused
    assert len([message for message in caplog.messages if words in message]) == 1
    assert_close(layer(tokens(63, 10)), layer.reference(tokens(63, 10)))


def test_why_a_machine_composes_is_said(caplog, gpu, monkeypatch):
    kernel._say.cache_clear()
    with gpu:
        weight = torch.empty(6, 10, device="cuda", dtype=torch.bfloat16)
    form = {"groups": 3, "activation": "gelu", "gated": False}
    with caplog.at_level(logging.INFO, logger="eugen"):
        assert kernel.choice("auto", weight, **form)
        assert not caplog.messages
        assert not kernel.choice("auto", weight.float(), **form)
        assert kernel.choice("fused", weight.float(), **form)
        assert not kernel.choice("auto", weight.double(), **form)
        assert not kernel.choice("auto", weight.cpu(), **form)
        kernel.lack.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert not kernel.choice("auto", weight, **form)
        kernel.lack.cache_clear()
        monkeypatch.setitem(sys.modules, "triton", None)
        assert not kernel.choice("auto", weight, **form)
    for word in ("torch.float32", "torch.float64", "on cpu", "(7, 5)", "not installed"):
        assert any(word in message for message in caplog.messages), word


def test_what_a_gpu_may_lack(gpu, monkeypatch):
    device = torch.device("cuda", 0)

    def lacking(dtype: torch.dtype = torch.bfloat16) -> str | None:
        kernel.lack.cache_clear()
        return kernel.lack(device, dtype)

    assert [lacking(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [None] * 3
    assert "float64" in lacking(torch.float64)
    with monkeypatch.context() as patch:  # a bare image: Triton would fail at the first launch
        patch.delenv("CC")
        patch.setattr(shutil, "which", lambda name: None)
        assert "C compiler" in lacking()
        patch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
        assert lacking() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert "NVIDIA" in lacking()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA" in lacking()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel='cuda' is unknown: use one of auto, composed, fused"):
        EUGenConfig(kernel="cuda")


def test_every_fixed_activation_is_known():
    assert naive.ACTIVATIONS.keys() == FIXED_ACTIVATIONS.keys()
    x = tokens(63, 10)
    for name, act in FIXED_ACTIVATIONS.items():
        assert torch.equal(naive.ACTIVATIONS[name](x), act()(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_composed_layer_can_stand_in_a_cuda_graph(activation, gpu):
    """No number comes back from the device and none goes there: FakeTensor has none to give."""
    forms = FORMS if activation != "rbf" else [{"order": 1}]
    for form in forms:
        slots = {"norm_slot": activation != "rbf", "norm_gate": activation == "univariate"}
        layer = built(**form, **slots, activation=activation, kernel="composed")
        with gpu, torch.no_grad():
            x, layer = torch.empty(63, 10, device="cuda"), on_gpu(layer, torch.float32)
            with Calls() as seen:
                layer(x)
        assert seen.devices == {"cuda"}


@pytest.mark.parametrize("form", FORMS[::4], ids=lambda f: "-".join(str(v) for v in f.values()))
def test_the_composed_layer_compiles_in_one_graph_for_inference(form):
    layer, x = built(**form, activation="tanh", kernel="composed").merged(), tokens(63, 10)
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer.reference(x))
