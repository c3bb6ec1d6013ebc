"""Where blocks are found, in whose models, and where none are."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import eugen
from eugen import DenseFFN, FFNParts, find_ffns, register_site
from tests.eugen.architectures import ARCHITECTURES
from tests.eugen.blocks import tokens
from tests.eugen.models import Residual, bert, chain, residual_parts, residuals, vit
from tests.tolerances import assert_close


def names(model: nn.Module) -> list[str]:
    return [site.name for site in find_ffns(model)]


def test_timm_vit_tiny():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    sites = find_ffns(model)
    assert [s.name for s in sites] == [f"blocks.{i}.mlp" for i in range(12)]
    assert [s.index for s in sites] == list(range(12))
    assert [s.stream for s in sites] == [f"blocks.{i}.norm2" for i in range(12)]
    assert all(s.output == s.name and s.bypass == () and s.norm is None for s in sites)
    assert {(s.dense.in_features, s.dense.hidden_features, s.dense.out_features) for s in sites} == {
        (192, 768, 192)
    }
    assert sites[3].dense.up is model.blocks[3].mlp.fc1


def test_timm_layer_scale_goes_into_the_block():
    model = vit(init_values=0.1)
    sites = find_ffns(model)
    assert [s.stream for s in sites] == ["blocks.0.norm2", "blocks.1.norm2"]
    assert [s.output for s in sites] == ["blocks.0.ls2", "blocks.1.ls2"] == [s.bypass[0] for s in sites]
    block, x = model.blocks[1].eval(), tokens(5, 32)
    assert_close(sites[1].dense(x), block.ls2(block.mlp(x)))
    model.blocks[0].ls2 = nn.Tanh()  # unknown: whatever it does, the stream is then not the block's target
    assert [s.stream for s in find_ffns(model)] == [None, "blocks.1.norm2"]


def test_timm_mlp_alone_and_one_that_normalises_its_neurons():
    from timm.layers import Mlp

    assert names(Mlp(8, 16)) == [""]
    assert names(nn.ModuleDict({"a": Mlp(8, 16), "b": nn.ModuleList([Mlp(8, 16)])})) == ["a", "b.0"]
    assert names(Mlp(8, 16, norm_layer=nn.LayerNorm)) == []
    assert names(Mlp(8, 16, use_conv=True)) == []


def test_bert_pairs():
    model = bert()
    sites = find_ffns(model)
    paths = [f"encoder.layer.{i}" for i in range(2)]
    assert [s.name for s in sites] == [f"{p}.intermediate" for p in paths]
    assert [s.stream for s in sites] == [f"{p}.intermediate" for p in paths]
    assert [s.output for s in sites] == [f"{p}.output.dense" for p in paths]
    assert [s.bypass for s in sites] == [(f"{p}.output.dense",) for p in paths]
    assert [s.norm for s in sites] == [f"{p}.output.LayerNorm" for p in paths]
    assert sites[1].dense.down is model.encoder.layer[1].output.dense


def test_bert_activation_given_as_a_function():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.intermediate, self.output = nn.Module(), nn.Module()
            self.intermediate.dense, self.output.dense = nn.Linear(4, 8), nn.Linear(8, 4)
            self.intermediate.intermediate_act_fn = torch.relu
            self.output.LayerNorm = nn.LayerNorm(4)

    layer = Layer()
    (site,) = find_ffns(layer)
    x = tokens(5, 4)
    hidden = torch.relu(layer.intermediate.dense(x))
    assert torch.equal(site.dense(x), layer.output.dense(hidden))
    layer.intermediate.intermediate_act_fn = None
    assert find_ffns(layer) == []


@pytest.mark.parametrize(
    ("linears", "expected"),
    [(1, []), (2, ["0"]), (3, ["0"]), (4, ["0", "4"]), (8, ["0", "4", "8", "12"])],
)
def test_chains_give_disjoint_pairs(linears, expected):
    model = chain(linears=linears)
    sites = find_ffns(model)
    assert [s.name for s in sites] == expected
    assert [s.index for s in sites] == list(range(len(expected)))
    used = [path for s in sites for path in (s.name, *s.bypass)]
    assert len(used) == len(set(used)) == 3 * len(expected)
    for site in sites:
        first = int(site.name)
        assert site.bypass == (str(first + 1), str(first + 2))
        assert (site.output, site.stream, site.norm) == (str(first + 2), None, None)
        x = tokens(5, site.dense.in_features)
        assert torch.equal(site.dense(x), model[first : first + 3](x))


def test_chains_deep_inside_and_with_other_modules_between():
    model = nn.ModuleDict({"deep": nn.ModuleList([nn.Identity(), chain()])})
    assert names(model) == ["deep.1.0"]
    linear, relu, norm = nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)
    assert names(nn.Sequential(linear, norm, relu, linear)) == []
    assert names(nn.Sequential(linear, nn.Linear(4, 4), nn.Linear(4, 4))) == []
    assert names(nn.Sequential(norm, linear, relu, nn.Linear(4, 4), norm)) == ["1"]
    assert names(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))) == []
    assert names(nn.Sequential(linear, nn.PReLU(), nn.Linear(4, 4))) == []


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 4), nn.Conv2d(1, 1, 1), nn.Sequential(), nn.LSTM(3, 4), nn.Identity()], ids=str
)
def test_models_without_blocks(model):
    assert find_ffns(model) == []


def test_finding_changes_nothing():
    model = vit().eval()
    before = copy.deepcopy(model.state_dict())
    find_ffns(model)
    assert not any(module.training for module in model.modules())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("build", [vit, bert, chain, lambda: chain(linears=5)])
def test_replaced_models_hold_no_blocks(build):
    model = build()
    for config in (eugen.EUGenConfig(budget=0.5), eugen.LinearConfig(), eugen.DenseConfig()):
        assert find_ffns(eugen.replace(model, config).model) == []


def test_blocks_that_were_left_are_found_again():
    model = vit(depth=3)
    once = eugen.replace(model, eugen.LinearConfig(), where=lambda s: s.index == 1).model
    assert names(once) == ["blocks.0.mlp", "blocks.2.mlp"]
    deep = chain(linears=6)
    once = eugen.replace(deep, eugen.LinearConfig(), where=lambda s: s.index == 0).model
    assert names(once) == ["4", "8"]


@pytest.mark.usefixtures("adapters")
def test_own_classes_and_their_subclasses():
    class Special(Residual):
        pass

    model = residuals()
    model.append(Special(12, 40, 9))
    assert find_ffns(model) == []
    register_site(Residual, residual_parts)
    sites = find_ffns(model)
    assert [s.name for s in sites] == ["0.ffn", "1.ffn", "2.ffn"]
    assert [s.stream for s in sites] == ["0.norm", "1.norm", "2.norm"]
    register_site(Special, lambda module: None)  # falls back on the base class
    assert len(find_ffns(model)) == 3
    register_site(Residual, lambda module: None)
    assert find_ffns(model) == []


@pytest.mark.usefixtures("adapters")
def test_one_module_may_hold_several_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)]) for _ in range(2))

    def adapter(module):
        return [
            FFNParts(DenseFFN(getattr(module, n)[0], nn.ReLU(), getattr(module, n)[1]), slot=n, output=n)
            for n in ("a", "b")
        ]

    register_site(Two, adapter)
    sites = find_ffns(nn.ModuleList([Two(), Two()]))
    assert [(s.name, s.index) for s in sites] == [("0.a", 0), ("0.b", 1), ("1.a", 2), ("1.b", 3)]


@pytest.mark.parametrize("wrong", ["Mlp", int, nn.Linear(2, 2), None])
def test_only_module_types_are_registered(wrong):
    with pytest.raises(ValueError, match="module_type=.* must be a subclass of torch.nn.Module"):
        register_site(wrong, lambda module: None)


def test_blocks_that_share_modules():
    """Two places with one Mlp are two blocks: each is replaced, and says what the shared one said."""
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    assert names(model) == ["blocks.0.mlp", "blocks.1.mlp"]
    result = eugen.replace(model, eugen.LinearConfig())
    assert find_ffns(result.model) == []
    x = torch.randn(2, 3, 16, 16)
    dense = eugen.replace(model.eval(), eugen.DenseConfig(), calibration=None)
    for site, own in zip(dense.sites, find_ffns(model), strict=True):
        site.layer.load_state_dict(own.dense.state_dict())
    assert_close(dense.model(x), model(x))


@pytest.mark.parametrize("act", [nn.GLU(), nn.Softmax(dim=-1)], ids=str)
def test_what_mixes_neurons_is_no_activation(act):
    width = 8 if isinstance(act, nn.GLU) else 16
    model = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [site.name for site in find_ffns(model)] == ["2"]


def test_packed_gates_are_not_copied():
    model = ARCHITECTURES["phi3"].build()
    for site in find_ffns(model):
        packed, down = (model.get_submodule(f"{site.name}.{n}").weight for n in ("gate_up_proj", "down_proj"))
        assert site.dense.gate.weight.data_ptr() == packed.data_ptr()
        assert site.dense.up.weight.data_ptr() == packed[48:].data_ptr()
        assert site.dense.down.weight is down
