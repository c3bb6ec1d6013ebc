"""The operator `eugen::feature_map` in plain torch and its gradients."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch

from benchmarks.kernel_cases import Case, check
from eugen.features import ACTIVATIONS, FIXED_ACTIVATIONS, SHARING
from eugen.kernels import feature_map as kernel
from eugen.kernels.feature_map import naive
from tests.eugen.blocks import tokens
from tests.eugen.kernels.layers import FORMS, OPERATOR, Calls, built, on_gpu
from tests.tolerances import assert_close

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.mv}


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
