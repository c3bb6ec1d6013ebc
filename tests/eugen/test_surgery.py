"""`replace`: exact where the layer is the block itself, harmless to the model, clear where it cannot be."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import eugen
from eugen import DenseConfig, EUGenConfig, FFNLayer, LinearConfig, replace
from tests.eugen.models import (
    Residual,
    bert,
    call_bert,
    chain,
    images,
    residual_parts,
    residuals,
    sentences,
    vectors,
    vit,
)
from tests.tolerances import assert_close, relative_rms


def plain(model, batch):
    return model(batch)


MODELS = {
    "timm": (vit, images, plain),
    "bert": (bert, sentences, call_bert),
    "root chain": (chain, vectors, plain),
    "long chain": (lambda: chain(linears=6, h=16), vectors, plain),
    "chain in place": (lambda: chain(linears=6, h=16, act=nn.ReLU, inplace=True), vectors, plain),
}
every_model = pytest.mark.parametrize(("build", "batches", "call"), MODELS.values(), ids=MODELS)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_model
def test_the_dense_row_is_exact_to_the_bit(build, batches, call):
    model = build().eval()
    result = replace(model, DenseConfig(), calibration=batches(), call=call)
    assert all(isinstance(site.layer, FFNLayer) for site in result.sites)
    for batch in batches():
        assert torch.equal(call(result.model, batch), call(model, batch))
    assert [(s.macs_ratio, s.params_ratio) for s in result.sites] == [(1.0, 1.0)] * len(result.sites)
    assert {s.fit_r2 for s in result.sites} == {None}, "a copy needs no calibration, so nothing judged it"


@every_model
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_original_stays_as_it_was(build, batches, call, calibrated):
    model = build().train()
    next(model.children()).eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    modules = list(model.modules())
    result = replace(model, LinearConfig(), calibration=batches() if calibrated else None, call=call)
    assert list(model.modules()) == modules
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == hooks(result.model) == 0
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (result.model, model))
    assert not ours & theirs
    assert all(p.grad is None for p in (*model.parameters(), *result.model.parameters()))


@every_model
def test_state_dict_goes_into_an_untrained_replacement(build, batches, call):
    model, config = build().eval(), EUGenConfig(budget=0.5, trainable=False)
    fitted = replace(model, config, calibration=batches(), call=call, seed=1).model
    fresh = replace(model, config, seed=2).model
    assert not torch.equal(call(fresh, batches()[0]), call(fitted, batches()[0]))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(call(fresh, batches()[0]), call(fitted, batches()[0]))


@every_model
def test_what_a_site_reports_is_what_stands_in_the_model(build, batches, call):
    model = build()
    found = eugen.find_ffns(model)
    result = replace(model, EUGenConfig(budget=0.5), calibration=batches(), call=call)
    for site, old in zip(result.sites, found, strict=True):
        assert (site.name, site.index) == (old.name, old.index)
        assert result.model.get_submodule(site.name) is site.layer
        assert site.macs_ratio == site.layer.macs_per_token / old.dense.macs_per_token <= 0.5
        assert site.params_ratio == site.layer.num_parameters() / old.dense.num_parameters()
        assert all(isinstance(result.model.get_submodule(path), nn.Identity) for path in old.bypass)


def test_a_model_that_is_one_block_becomes_the_layer():
    from timm.layers import Mlp

    model = Mlp(12, 40).eval()
    result = replace(model, DenseConfig(), calibration=vectors())
    assert result.model is result.sites[0].layer
    assert torch.equal(result.model(vectors()[0]), model(vectors()[0]))
    with pytest.raises(ValueError, match=r"block \(the model itself\): budget=0.001"):
        replace(model, LinearConfig(budget=0.001))


def test_the_seed_decides_and_global_state_stays():
    model, batches = vit(), images()
    before = torch.get_rng_state()

    def weights(seed):
        options = {"calibration": batches, "refine_steps": 2, "seed": seed}
        state = replace(model, EUGenConfig(budget=0.3), **options).model.state_dict()
        return torch.cat([v.flatten() for v in state.values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_of_one_seed_differ_from_each_other():
    sites = replace(vit(), EUGenConfig(budget=0.3)).sites
    assert not torch.equal(sites[0].layer.readout.weight, sites[1].layer.readout.weight)


def test_where_selects():
    model = vit(depth=3)
    result = replace(model, LinearConfig(), where=lambda site: site.index >= 1)
    assert [s.name for s in result.sites] == ["blocks.1.mlp", "blocks.2.mlp"]
    assert result.model.blocks[0].mlp.fc1 is not model.blocks[0].mlp.fc1
    with pytest.raises(ValueError, match="selected none of the 3 blocks: blocks.0.mlp, blocks.1"):
        replace(model, LinearConfig(), where=lambda site: False)


def test_a_model_without_blocks_says_what_to_do():
    with pytest.raises(ValueError, match="no feed-forward block found in LSTM.*register_site"):
        replace(nn.LSTM(3, 4), LinearConfig())


def test_a_budget_too_small_names_block_and_least_before_any_work():
    class Never:
        def __iter__(self):
            raise AssertionError("read before the sizes were checked")

    model = nn.ModuleList([chain(12, 400), chain(40, 44)])
    with pytest.raises(ValueError, match=r"block 1\.0: budget=0.2 is too small.*least is") as raised:
        replace(model, LinearConfig(budget=0.2), calibration=Never())
    least = float(re.search(r"least is ([\d.]+)", str(raised.value))[1])
    assert len(replace(model, LinearConfig(budget=least)).sites) == 2


def test_mode_and_gradients_of_the_replacement():
    for training in (True, False):
        result = replace(vit().train(training), EUGenConfig(budget=0.3), calibration=images())
        assert all(m.training == training for m in result.model.modules())
    result.model(images()[0]).square().sum().backward()
    assert all(p.grad is not None for p in result.sites[0].layer.parameters())


@every_model
def test_replacements_compile_and_copy(build, batches, call):
    model = replace(build().eval(), EUGenConfig(budget=0.5), calibration=batches(), call=call).model
    x = batches()[0]
    assert torch.equal(call(copy.deepcopy(model), x), call(model, x))
    torch.compiler.reset()
    assert_close(call(torch.compile(model, fullgraph=True, backend="eager"), x), call(model, x))


class Broken(list):
    """Batches that differ at the second reading, as `later` says."""

    def __init__(self, batches, later):
        super().__init__(batches)
        self.later, self.readings = later, 0

    def __iter__(self):
        self.readings += 1
        yield from list.copy(self) if self.readings == 1 else self.later


BATCHES = vectors()
BAD = {
    "empty": ([], "calibration data are empty"),
    "an iterator": (iter(BATCHES), "iterator that can be read only once.*DataLoader"),
    "a generator": ((b for b in BATCHES), "iterator that can be read only once.*DataLoader"),
    "NaN": ([BATCHES[0], BATCHES[1] * torch.nan], "NaN or infinity at block 0"),
    "infinity": ([BATCHES[0] / 0], "NaN or infinity at block 0"),
    "other sizes": (Broken(BATCHES, [b[:50] for b in BATCHES]), "change from one reading"),
    "fewer batches": (Broken(BATCHES, BATCHES[:2]), "4 batches first and 2 later"),
    "more batches": (Broken(BATCHES, BATCHES + BATCHES[:1]), "4 batches first and 5 later"),
    "read once": (Broken(BATCHES, []), "4 batches first and 0 later"),
    "other order": (Broken(BATCHES, BATCHES[::-1]), "change from one reading"),
    "shuffled": (
        DataLoader(list(torch.cat(BATCHES)), batch_size=50, shuffle=True),
        "change from one reading",
    ),
}


@pytest.mark.parametrize(("batches", "message"), BAD.values(), ids=BAD)
def test_calibration_that_cannot_be_used(batches, message):
    model = chain().train()
    model[2].eval()
    with pytest.raises(ValueError, match=message):
        replace(model, LinearConfig(), calibration=batches)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert hooks(model) == 0


def test_a_call_that_fails_leaves_no_trace():
    model = vit().train()

    def fails(model, batch):
        model(batch)
        raise RuntimeError("out of luck")

    with pytest.raises(
        ValueError, match="RuntimeError in or behind block blocks.1.mlp: out of luck"
    ) as raised:
        replace(model, LinearConfig(), calibration=images(), call=fails)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert all(m.training for m in model.modules())
    assert hooks(model) == 0


def test_a_block_that_is_not_run():
    model = nn.ModuleDict({"used": chain(), "spare": chain()})
    with pytest.raises(ValueError, match=r"block spare.0 did not run"):
        replace(model, LinearConfig(), calibration=vectors(), call=lambda m, batch: m["used"](batch))


def test_a_block_that_runs_twice():
    model = vit()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ValueError, match=r"^block blocks.0.mlp ran twice.*shared blocks"):
        replace(model, LinearConfig(), calibration=images())
    assert hooks(model) == 0


@pytest.mark.usefixtures("adapters")
def test_an_adapter_with_a_wrong_path_leaves_no_hooks():
    model = residuals()
    eugen.register_site(Residual, lambda module: residual_parts(module, stream="no_such_module"))
    with pytest.raises(AttributeError, match="no_such_module"):
        replace(model, LinearConfig(), calibration=vectors())
    eugen.register_site(Residual, lambda module: residual_parts(module, output="no_such_module"))
    with pytest.raises(AttributeError, match="no_such_module"):
        replace(model, LinearConfig(), calibration=vectors())
    assert hooks(model) == 0


def test_gradient_mode_of_the_caller_does_not_matter():
    options = {"calibration": vectors(), "refine_steps": 2}
    free = replace(chain(), EUGenConfig(budget=0.6), **options).model
    with torch.no_grad():
        bound = replace(chain(), EUGenConfig(budget=0.6), **options).model
    assert torch.equal(free(BATCHES[0]), bound(BATCHES[0]))
    assert all(p.requires_grad for p in bound.parameters())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merging_a_replaced_block_changes_nothing(dtype, allowed):
    model, config = chain(12, 40).to(dtype), EUGenConfig(num_features=9, merge=False)
    batches = [b.to(dtype) for b in BATCHES]
    layer = replace(model, config, calibration=batches).sites[0].layer
    assert relative_rms(layer.merged()(batches[0]), layer(batches[0])) <= allowed


def test_progress_is_a_line_per_block():
    lines: list[str] = []
    replace(vit(), LinearConfig(), calibration=images(), progress=lines.append)
    assert [re.match(r"block (\d/\d) (\S+): held-out R² [-\d.]+$", line).groups() for line in lines] == [
        ("1/2", "blocks.0.mlp"),
        ("2/2", "blocks.1.mlp"),
    ]


def test_bfloat16_models_are_fitted():
    model = chain().bfloat16()
    result = replace(model, EUGenConfig(budget=0.6), calibration=[b.bfloat16() for b in BATCHES])
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.sites[0].fit_r2 > 0
