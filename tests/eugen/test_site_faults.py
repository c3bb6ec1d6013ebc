"""Models that cannot be taken as they are: a message that names the block and the cure."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

import eugen
from eugen import DenseConfig, LinearConfig, PruneConfig, find_ffns, replace
from eugen.surgery import put
from tests.eugen.architectures import ARCHITECTURES, activations, torch_encoder
from tests.eugen.models import (
    Residual,
    bert,
    call_bert,
    chain,
    images,
    residual_parts,
    residuals,
    sentences,
    spread,
    vectors,
    vit,
)
from tests.tolerances import assert_close


def albert() -> AlbertModel:
    shape = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2}
    return spread(AlbertModel(AlbertConfig(**shape, num_hidden_layers=3, intermediate_size=48))).eval()


def test_a_block_that_runs_at_every_depth():
    model, batch = albert(), sentences()[0]
    (site,) = find_ffns(model)
    assert site.norm is not None and site.norm.endswith(".full_layer_layer_norm")
    dense = replace(model, DenseConfig(), calibration=[batch], call=call_bert).model
    assert_close(call_bert(dense, batch), call_bert(model, batch))
    with pytest.raises(
        ValueError, match=rf"^block {site.name} ran twice.*shared blocks.*copy.deepcopy.*where="
    ):
        replace(model, LinearConfig(), calibration=[batch], call=call_bert)


def test_a_block_in_two_places_is_named_at_both_and_the_cure_works():
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match=r"stands at blocks.0.mlp and at blocks.1.mlp.*copy.deepcopy"):
        replace(model, LinearConfig(), calibration=images())
    model.blocks[1].mlp = copy.deepcopy(model.blocks[0].mlp)
    assert len(replace(model, LinearConfig(), calibration=images()).sites) == 2


def test_blocks_that_were_replaced_already():
    model = replace(bert(), LinearConfig()).model
    with pytest.raises(
        ValueError, match=r"no .* left in BertModel, 2 modules \(encoder.layer.0.intermediate"
    ):
        replace(model, LinearConfig())


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("config", [LinearConfig(), PruneConfig(budget=0.5)])
def test_own_blocks_that_were_replaced_already(config):
    """An adapter that reads its block's parts and asks no more."""
    eugen.register_site(Residual, residual_parts)
    model = replace(residuals(3), config, where=lambda site: site.index == 1).model
    assert [site.name for site in find_ffns(model)] == ["0.ffn", "2.ffn"]
    eugen.register_site(Residual, lambda module: residual_parts(module.no_such_part))
    with pytest.raises(AttributeError, match="no_such_part"):
        find_ffns(model)


def test_quantised_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear})
    message = r"quantised: replace the blocks of the floating-point model, then quantise"
    with pytest.raises(ValueError, match=rf"BertModel.*encoder.layer.0.*{message}"):
        replace(model, LinearConfig())


def test_linear_maps_with_integer_weights():
    model = chain()
    model[2].weight = nn.Parameter(torch.zeros(12, 40, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"block 0 is quantised \(float32, uint8\): replace the blocks of"):
        replace(model, LinearConfig())


def test_weights_that_were_not_loaded():
    model = chain().to("meta")
    with pytest.raises(
        ValueError, match=r"block 0 is on the meta device.*load_state_dict.*leave calibration"
    ):
        replace(model, LinearConfig(), calibration=vectors())
    assert replace(model, PruneConfig(budget=0.5)).sites[0].layer.up.weight.is_meta
    other = nn.ModuleDict({"block": chain(), "head": nn.Linear(12, 3, device="meta")})
    with pytest.raises(ValueError, match=r"the model's head.weight is on the meta device"):
        replace(other, LinearConfig(), calibration=vectors(), call=lambda m, x: m["block"](x))


def test_float16_is_fitted_in_closed_form_and_not_refined():
    model, batches = chain().half(), [batch.half() for batch in vectors()]
    wide = replace(chain(), PruneConfig(budget=0.5), calibration=vectors()).sites[0]
    half = replace(model, PruneConfig(budget=0.5), calibration=batches).sites[0]
    assert half.layer.up.weight.dtype == torch.float16
    assert half.fit_r2 == pytest.approx(wide.fit_r2, abs=2e-3)  # eleven bits of each weight
    with pytest.raises(ValueError, match=r"block 0 is float16.*refine_steps.*model.float\(\).*bfloat16"):
        replace(model, PruneConfig(budget=0.5), calibration=batches, refine_steps=2)


class FourBit(nn.Linear):
    """Like bitsandbytes' Linear4bit: packed integers for weights, and a product of its own."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        packed = torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Adapted(FourBit):
    """Like a low-rank adapter, or 8-bit weights that are packed later: the stored weights are not all."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Linear.__init__(self, like.in_features, like.out_features, bias=like.bias is not None)
        self.load_state_dict(like.state_dict())

    def forward(self, x):
        return 2 * super(FourBit, self).forward(x)


def with_linears(model: nn.Module, kind: type[FourBit]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            put(model, name, kind(module))
    return model


LIKE_OTHERS = ("llama", "phi3", "dinov2", "timm vit", "timm deit3", "timm eva", "bert", "t5", "encoder")


@pytest.mark.parametrize("name", LIKE_OTHERS)
def test_linear_maps_that_hold_packed_integers(name):
    case = ARCHITECTURES[name]
    model = with_linears(case.build(), FourBit)
    where = r"block \S+ is quantised \((float32, )?uint8\)|modules \(\S+, …\) are quantised"
    with pytest.raises(ValueError, match=rf"({where}): replace the blocks of the floating-point model, then"):
        replace(model, LinearConfig(), calibration=[case.inputs(5)], call=case.call)


@pytest.mark.parametrize("name", ["timm vit", "bert", "encoder", "llama", "gpt_neox"])
def test_linear_maps_that_compute_in_their_own_way(name):
    model = with_linears(ARCHITECTURES[name].build(), Adapted)
    with pytest.raises(
        ValueError, match=r"block \S+ holds a tests\S+\.Adapted, which computes more than its"
    ):
        replace(model, LinearConfig())


def test_weights_shared_between_blocks_of_their_own():
    """Each place gets a layer; what is left keeps the weights that it shares."""
    model, batches = vit(depth=3).eval(), images()
    for block in model.blocks[1:]:
        block.mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        block.mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    dense = replace(model, DenseConfig(), calibration=batches).model
    assert torch.equal(dense(batches[0]), model(batches[0]))
    result = replace(model, PruneConfig(budget=0.8), calibration=batches, where=lambda s: s.index > 0)
    assert all(site.fit_r2 > 0 for site in result.sites)
    first, second = (site.layer.up.weight for site in result.sites)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(result.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_float16_that_cannot_hold_a_layer_scale():
    model = vit(init_values=0.1)
    for block in model.blocks:
        nn.init.constant_(block.ls2.gamma, 1e-5)  # as deep networks start
    with pytest.raises(
        ValueError, match=r"block blocks.0.mlp is float16 .*layer scale.* RMS \d\.\de-0[67],.*float"
    ):
        replace(copy.deepcopy(model).half(), DenseConfig())
    narrow = copy.deepcopy(model).bfloat16()
    site, x = find_ffns(narrow)[0], vectors(1, 20, 32)[0].bfloat16()
    block = narrow.blocks[0].eval()
    assert_close(site.dense(x), block.ls2(block.mlp(x)))


def test_a_block_that_transformers_keeps_partly_in_float32():
    model = ARCHITECTURES["t5"].build().half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()  # as from_pretrained does with half-precision T5
    with pytest.raises(
        ValueError, match=r"DenseReluDense mixes float16 and float32: convert the model to one"
    ):
        replace(model, LinearConfig())


def test_a_block_of_two_dtypes():
    model = chain()
    model[2].double()
    with pytest.raises(ValueError, match=r"block 0 mixes float32 and float64: convert the model to one"):
        replace(model, LinearConfig())


@torch.no_grad()
def test_torch_s_fused_encoder_does_not_run_past_the_new_layer():
    """With a padding mask the encoder packs tokens; replaced or calibrated, it must not."""
    model, x = torch_encoder(), activations(5)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, 6:] = True
    for where in (None, lambda site: site.index == 1):

        def call(model, batch):
            return model(batch, src_key_padding_mask=mask)

        result = replace(model, PruneConfig(budget=0.8), calibration=[x], call=call, where=where)
        ran = []
        for site in result.sites:
            site.layer.up.register_forward_hook(lambda *_, name=site.name, ran=ran: ran.append(name))
        call(result.model, x)
        assert ran == [site.name for site in result.sites]
        dense = replace(model, DenseConfig(), where=where, calibration=[x], call=call).model
        assert_close(call(dense, x)[~mask], call(model, x)[~mask])
    assert torch.backends.mha.get_fastpath_enabled()


class Swapped(nn.Module):
    """Named like an MLP of transformers, with another order of work."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return self.activation_fn(self.fc2(self.fc1(x)))


class Straight(Swapped):
    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Demanding(Straight):
    """Takes an object that tensors are not."""

    def forward(self, x):
        return super().forward(x.tokens)


class InPlace(Straight):
    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(("kind", "expected"), [(Swapped, 0), (Straight, 1), (Demanding, 0), (InPlace, 0)])
def test_names_alone_make_no_block(kind, expected, monkeypatch):
    monkeypatch.setattr(kind, "__module__", "transformers_modules.somebody.modeling")
    model = kind().train()
    assert len(find_ffns(model)) == expected
    assert all(module.training for module in model.modules())


def test_autocast_is_off_while_a_block_is_compared(monkeypatch):
    """Two roads to one result, as a packed and a halved product, round apart by more than float32 does."""
    seen = []

    class Asking(Straight):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    monkeypatch.setattr(Asking, "__module__", "transformers_modules.somebody.modeling")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(find_ffns(Asking())) == 1
    assert seen == [False]


def test_convolutional_mlps_are_not_taken():
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), conv_mlp=True)
    assert find_ffns(model) == []
    with pytest.raises(ValueError, match="no feed-forward block found in ConvNeXt.*register_site"):
        eugen.replace(model, LinearConfig())
