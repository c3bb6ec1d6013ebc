"""Which layers call the operator `eugen::feature_map`, where, and what is said of those that do not."""

from __future__ import annotations

import copy
import io
import logging
import shutil
import sys

import pytest
import torch

from eugen import EUGenConfig
from eugen.kernels import feature_map as kernel
from eugen.parts.int8_linear import quantise
from tests.eugen.blocks import tokens
from tests.eugen.kernels.layers import OPERATOR, Calls, built, on_gpu
from tests.tolerances import assert_close


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
