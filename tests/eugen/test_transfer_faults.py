"""Calibration data and blocks that a fit must survive, or refuse in clear words."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import eugen
from eugen import EUGenConfig, LinearConfig, LowRankAwareConfig, LowRankConfig, PruneConfig, replace
from eugen.least_squares import FEW_TOKENS_PER_FEATURE, HELD_OUT
from tests.eugen.blocks import generator, tokens
from tests.eugen.models import (
    Residual,
    bert,
    chain,
    images,
    residual_parts,
    residuals,
    sentences,
    vectors,
    vit,
)
from tests.tolerances import relative_rms

ROWS = {
    "prune": PruneConfig(budget=0.5),
    "eugen teacher": EUGenConfig(budget=0.5, projection="teacher", direct_linear=True),
    "low_rank_aware": LowRankAwareConfig(budget=0.5),
}
every_row = pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)


def fit(model: nn.Module, config: eugen.LayerConfig, batches: list[torch.Tensor]) -> tuple[nn.Module, float]:
    """The only block's layer and its held-out R²; all weights are finite."""
    (site,) = replace(model, config, calibration=batches).sites
    assert all(torch.isfinite(value).all() for value in site.layer.state_dict().values())
    return site.layer, site.fit_r2


NO_FIT = {
    "another width": (
        vit,
        [torch.zeros(2, 3, 16, 24)],
        None,
        r"batch 1 \(Tensor \[2, 3, 16, 24\] float32\) .*: AssertionError before block blocks.0.mlp: ",
    ),
    "the second batch": (
        chain,
        [*vectors(1), torch.zeros(4, 5)],
        None,
        r"batch 2 \(Tensor \[4, 5\] float32\) .* RuntimeError in or behind block 0: mat1 and mat2",
    ),
    "another dtype": (
        chain,
        [v.double() for v in vectors()],
        None,
        r"batch 1 \(Tensor \[150, 12\] float64\)",
    ),
    "a data set's lists": (
        vit,
        DataLoader(TensorDataset(images()[0]), batch_size=4),
        None,
        r"\(list of Tensor \[4, 3, 16, 16\] float32\) .* before block blocks.0.mlp: .*call= how one goes in",
    ),
    "a tokenizer's dictionary": (
        bert,
        [{"input_ids": sentences()[0], "attention_mask": torch.ones(8, 9)}],
        None,
        r"\(dict with input_ids: Tensor \[8, 9\] int64, attention_mask: Tensor \[8, 9\] float32\)",
    ),
    "a path": (vit, ["images/cat.png"], None, r"batch 1 \(str\) does not go through the model"),
    "a call that asks for more": (
        vit,
        images(),
        lambda model, batch: model(batch.pixels),
        r"AttributeError before block blocks.0.mlp: 'Tensor' object has no attribute 'pixels'",
    ),
}


@pytest.mark.parametrize(("build", "batches", "call", "message"), NO_FIT.values(), ids=NO_FIT)
def test_calibration_that_does_not_fit_the_model(build, batches, call, message):
    with pytest.raises(ValueError, match=message) as raised:
        replace(build(), LinearConfig(), calibration=batches, call=call)
    assert raised.value.__cause__ is not None


def test_a_partly_replaced_model_that_fails_is_named():
    model = vit()

    def call(model, batch):
        if find := [m for m in model.modules() if isinstance(m, eugen.FFNLayer)]:
            raise KeyError(f"{len(find)} new layers")
        return model(batch)

    message = r"batch 1 .* the partly replaced model: KeyError before block blocks.1.mlp: '1 new layers'"
    with pytest.raises(ValueError, match=message):
        replace(model, LinearConfig(), calibration=images(), call=call)


@pytest.mark.usefixtures("adapters")
def test_a_block_that_is_called_by_keyword():
    class Named(Residual):
        def forward(self, x):
            return x + self.ffn(input=self.norm(x))

    eugen.register_site(Residual, residual_parts)
    with pytest.raises(ValueError, match=r"block 0.ffn .* is called with keywords only"):
        replace(nn.Sequential(Named(12, 40, 0)), LinearConfig(), calibration=vectors())


@every_row
def test_too_few_tokens_warn_once_and_say_how_many_are_enough(config):
    features = replace(chain(), config).sites[0].layer.num_features
    least = FEW_TOKENS_PER_FEATURE * features
    enough = next(n for n in range(least, 2 * least) if n - n // HELD_OUT == least)
    with pytest.warns(UserWarning, match="too few") as caught:
        layer, _ = fit(chain(), config, [tokens(least, 12)])
    (warned,) = [str(w.message) for w in caught]
    assert warned.startswith(
        f"too few calibration tokens for 1 of 1 blocks: block 0 was fitted on {least - least // HELD_OUT} for "
        f"{features} features"
    )
    assert f"give at least {25 * features} (25 a feature)" in warned
    assert caught[0].filename == __file__
    assert torch.isfinite(layer(tokens(9, 12))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(chain(), config, [tokens(enough, 12)])


def test_the_neediest_of_several_blocks_is_named():
    model = nn.Sequential(chain(12, 40), chain(12, 96), chain(12, 40))
    with pytest.warns(UserWarning, match=r"for 3 of 3 blocks: block 1.0 was fitted on 35 for 48 features"):
        replace(model, PruneConfig(budget=0.5), calibration=[tokens(40, 12)])


@every_row
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.filterwarnings("ignore:too few calibration tokens")
def test_a_handful_of_tokens_gives_a_finite_layer_and_no_quality(config, count):
    layer, r2 = fit(chain(), config, [tokens(count, 12)])
    assert torch.isfinite(layer(tokens(9, 12))).all()
    assert r2 != r2, "one held-out token, or none, has no spread to explain"


@every_row
def test_dead_and_constant_neurons(config):
    """They carry nothing, so the fit is at least as good as with the neurons that they were."""
    alive, spoilt = chain(12, 40, act=nn.ReLU), chain(12, 40, act=nn.ReLU)
    with torch.no_grad():
        spoilt[0].weight[:8] = 0  # constant
        spoilt[0].bias[:8] = 0.7
        spoilt[0].bias[8:16] = -1e3  # dead
    held_out = tokens(500, 12, seed=77)
    errors = []
    for model in (alive, spoilt):
        layer, r2 = fit(model, config, vectors(8))
        assert r2 > 0
        with torch.no_grad():
            wanted, given = model(held_out), layer(held_out)
        errors.append(float((given - wanted).var(0).sum() / wanted.var(0).sum()))
    assert errors[1] < errors[0]


@every_row
@pytest.mark.parametrize("directions", [1, 3])
def test_inputs_in_few_directions(config, directions):
    plane = torch.linalg.qr(torch.randn(12, directions, generator=generator(3)))[0]
    model, batches = chain(12, 40), vectors(8)
    full = fit(model, config, batches)[1]
    assert fit(model, config, [x @ plane @ plane.T for x in batches])[1] > full


@every_row
def test_inputs_with_constant_columns_and_constant_inputs(config):
    model, batches = chain(12, 40), vectors(8)
    full = fit(model, config, batches)[1]
    columns = [torch.cat([x[:, :6], torch.full_like(x[:, 6:], 3.0)], dim=1) for x in batches]
    assert fit(model, config, columns)[1] > full
    layer, r2 = fit(model, config, [torch.ones_like(x) for x in batches])
    assert r2 != r2
    assert relative_rms(layer(torch.ones(4, 12)), model(torch.ones(4, 12))) < 1e-3


@every_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_are_fitted_as_well(config, dtype):
    wide, narrow = vit().eval(), vit().eval().to(dtype)
    expected = replace(wide, config, calibration=images(12))
    result = replace(narrow, config, calibration=[x.to(dtype) for x in images(12)])
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    for ours, theirs in zip(result.sites, expected.sites, strict=True):
        assert ours.fit_r2 == pytest.approx(theirs.fit_r2, abs=2e-2)


@pytest.mark.usefixtures("adapters")
def test_a_large_residual_stream_does_not_drown_narrow_targets():
    """In bfloat16 a stream of 100 has steps of one half, and the block's output is about one."""
    eugen.register_site(Residual, residual_parts)
    batches = [100 * x for x in vectors(8)]
    model = residuals(depth=1).eval()
    config = PruneConfig(budget=0.8)
    (wide,) = replace(model, config, calibration=batches).sites
    (narrow,) = replace(model.bfloat16(), config, calibration=[x.bfloat16() for x in batches]).sites
    assert 1 - narrow.fit_r2 < 1.1 * (1 - wide.fit_r2)


def test_low_rank_explains_what_has_low_rank():
    """Of an even spectrum, which random weights have, it keeps a part, and all of a matrix of its rank."""
    model, rank = vit(), 9
    even = replace(model, LowRankConfig(rank=rank), calibration=images(12))
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.mlp.fc1, block.mlp.fc2):
                left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
                linear.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    own = replace(model, LowRankConfig(rank=rank), calibration=images(12))
    assert all(site.fit_r2 > 1 - 1e-4 for site in own.sites)
    assert all(site.fit_r2 < 0.9 for site in even.sites)
