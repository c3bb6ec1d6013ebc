"""What the transfer fits against, and that each of its steps earns its place."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import eugen
from eugen import EUGenConfig, LinearConfig, NarrowConfig, PruneConfig, replace, transfer
from eugen.ffn import DenseFFN
from eugen.layers.dense import new_block
from eugen.least_squares import RIDGE, fit_quality
from eugen.refine import LocalLoss, refine
from eugen.surgery import install
from tests.eugen.blocks import block, generator, stream, tokens
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
from tests.tolerances import relative_rms


def test_more_tokens_less_error():
    model, held_out = chain(12, 48), tokens(2000, 12, seed=77)
    errors = []
    for count in (50, 200, 1600):
        student = replace(model, EUGenConfig(budget=0.6), calibration=list(tokens(count, 12).split(50))).model
        errors.append(relative_rms(student(held_out), model(held_out)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.usefixtures("adapters")
def test_correcting_the_residual_stream_beats_copying_the_teacher():
    """Against each block's own teacher activations, and against the teacher's output without correction."""
    model, batches, config = residuals(depth=2), vectors(8), NarrowConfig(budget=0.3)
    held_out = tokens(2000, 12, seed=77)
    model.eval()

    def error(student):
        return relative_rms(student(held_out), model(held_out))

    for seed in range(3):
        eugen.register_site(Residual, residual_parts)
        corrected = replace(model, config, calibration=batches, seed=seed).model
        copied, seeded = residuals(depth=2).eval(), generator(seed)
        x = torch.cat(batches)
        for index, site in enumerate(eugen.find_ffns(model)):
            layer = config.fit(site.dense, stream(site.dense, model[index].norm(x)), generator=seeded)
            copied, x = install(copied, site, layer), model[index](x)
        eugen.register_site(Residual, lambda module: residual_parts(module, stream=None))
        uncorrected = replace(model, config, calibration=batches, seed=seed).model
        assert error(corrected) < error(copied)
        assert error(corrected) < error(uncorrected)


@pytest.mark.usefixtures("adapters")
def test_dropout_is_off_while_activations_are_taken():
    model = residuals().train()
    eugen.register_site(Residual, residual_parts)
    result = replace(model, eugen.PruneConfig(budget=1), calibration=vectors())
    assert [s.fit_r2 for s in result.sites] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("steps", [1, 20])
def test_refinement_never_lowers_the_held_out_fit(steps):
    model, options = chain(12, 48), {"calibration": vectors(), "seed": 3}
    for config in (EUGenConfig(budget=0.5), NarrowConfig(budget=0.3), LinearConfig()):
        plain = replace(model, config, **options).sites[0].fit_r2
        refined = replace(model, config, **options, refine_steps=steps).sites[0].fit_r2
        assert refined >= plain


def test_refinement_helps_where_rows_can_learn():
    model, options = chain(12, 48), {"calibration": vectors(8), "seed": 3}
    config = NarrowConfig(budget=0.3)
    closed, refined = (replace(model, config, **options, refine_steps=n).sites[0] for n in (0, 60))
    assert 1 - refined.fit_r2 < 0.9 * (1 - closed.fit_r2)
    assert not torch.equal(refined.layer.up.weight, closed.layer.up.weight)


@pytest.mark.parametrize("spoil", [torch.nan, 1e3])
def test_a_diverged_refinement_is_thrown_away(monkeypatch, spoil):
    def diverged(config, layer, *_, **__):
        layer = new_block(layer, layer.hidden_features, generator=generator())
        with torch.no_grad():
            layer.down.bias.fill_(spoil)
        return layer

    monkeypatch.setattr(NarrowConfig, "refine", diverged)
    model, options = chain(12, 48), {"calibration": vectors(), "seed": 3}
    plain, kept = (replace(model, NarrowConfig(budget=0.3), **options, refine_steps=n) for n in (0, 5))
    assert torch.equal(plain.model(vectors()[0]), kept.model(vectors()[0]))
    assert kept.sites[0].fit_r2 == plain.sites[0].fit_r2


def test_refine_copies_and_solves_the_readout_last():
    dense, x = block(12, 48), tokens(400, 12)
    data = stream(dense, x, 100)
    layer = NarrowConfig(budget=0.3).build(dense, generator=generator())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    refined = refine(layer, data, steps=5, generator=generator())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    again = new_block(refined, refined.hidden_features, generator=generator())
    again.load_state_dict(refined.state_dict())
    again.fit_readout(data)
    assert torch.equal(again.down.weight, refined.down.weight)


def test_refine_minds_weights_of_tokens_and_outputs():
    """Noise on tokens or on outputs that weigh nothing moves no row of the first matrix."""
    dense, x = block(12, 48), tokens(400, 12)
    y, weight, importance = dense(x).detach(), torch.ones(400), torch.ones(12)
    weight[200:], importance[6:] = 0, 0
    noisy_outputs, noisy_tokens = y.clone(), y.clone()
    noisy_outputs[:, 6:] += 100 * tokens(400, 6, seed=6)
    noisy_tokens[200:] = y[200:].flip(0)  # the same spread, which sets the unit of the error
    layer = NarrowConfig(budget=0.3).build(dense, generator=generator())

    def rows(target: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        options = {"steps": 5, "generator": generator(), "output_weight": importance}
        return refine(layer, [(x, target, weight)], **options).up.weight

    clean = rows(y, weight, importance)
    assert relative_rms(rows(noisy_outputs, weight, importance), clean) < 1e-5
    assert relative_rms(rows(noisy_tokens, weight, importance), clean) < 1e-5
    assert relative_rms(rows(noisy_tokens, torch.ones(400), importance), clean) > 1e-3
    assert relative_rms(rows(noisy_outputs, weight, torch.ones(12)), clean) > 1e-3


def bert_site(model: nn.Module):
    (site,) = eugen.find_ffns(model)
    return site


def test_post_norm_fit_is_ridge_weighted_by_the_variance_before_the_norm():
    model, batches = bert(layers=1).eval(), sentences(1, 40)
    with torch.no_grad():  # tokens whose variance differs by orders of magnitude
        model.encoder.layer[0].attention.output.LayerNorm.weight.mul_(torch.logspace(-1, 1, 32))
    seen = {}
    site = bert_site(model)
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(lambda _m, args: seen.update(x=args[0])),
        model.get_submodule(site.output).register_forward_hook(lambda _m, _a, out: seen.update(y=out)),
    ]
    call_bert(model, batches[0])
    for handle in handles:
        handle.remove()
    x, y = (seen[key].detach().reshape(-1, 32).double() for key in "xy")
    weight = 1 / (x + y).var(1, correction=0)
    cut = len(x) - len(x) // transfer.HELD_OUT
    x_fit, y_fit, w_fit = x[:cut], y[:cut], weight[:cut]
    mean = (w_fit[:, None] * x_fit).sum(0) / w_fit.sum()
    deviation = ((w_fit[:, None] * (x_fit - mean).square()).sum(0) / w_fit.sum()).sqrt()
    oracle = Ridge(alpha=RIDGE * float(w_fit.sum())).fit(
        ((x_fit - mean) / deviation).numpy(), y_fit.numpy(), sample_weight=w_fit.numpy()
    )
    expected = torch.from_numpy(oracle.predict(((x - mean) / deviation).numpy()))
    result = replace(model, LinearConfig(), calibration=batches, call=call_bert)
    assert relative_rms(result.sites[0].layer(x.float()), expected) < 1e-4
    gamma = model.get_submodule(site.norm).weight.detach().double().square()
    error = (weight[:, None] * gamma * (y - expected).square())[cut:].sum()
    w_out, y_out = weight[cut:, None], y[cut:]
    centre = (w_out * y_out).sum(0) / w_out.sum()
    total = (w_out * gamma * (y_out - centre).square()).sum()
    assert result.sites[0].fit_r2 == pytest.approx(float(1 - error / total), rel=1e-4)


def test_neurons_are_chosen_by_what_matters_behind_the_norm():
    model, batches = bert(layers=1).eval(), sentences(1, 40)
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.output.LayerNorm.weight[1:] = 0  # only the first output dimension is left
        layer.output.dense.weight[0, 20:] = 0  # and only the first 20 neurons reach it
    result = replace(model, PruneConfig(hidden_features=20), calibration=batches, call=call_bert)
    kept, own = result.sites[0].layer.up.weight, layer.intermediate.dense.weight
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in own[:20].tolist()}


def test_blocks_are_fitted_front_to_back_on_what_the_student_gives_them():
    model, batches = vit(depth=3).eval(), images(8)
    config = NarrowConfig(budget=0.3)
    both = replace(model, config, calibration=batches, where=lambda s: s.index < 2).model.eval()
    whole = replace(model, config, calibration=batches).model.eval()
    for index in range(2):  # later blocks do not look back
        ours, theirs = (m.blocks[index].mlp.state_dict() for m in (both, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    alone = replace(model, config, calibration=batches, where=lambda s: s.index == 1).model
    assert not torch.equal(alone.blocks[1].mlp.down.weight, both.blocks[1].mlp.down.weight)


def test_held_out_tokens_take_no_part_in_the_fit():
    model, batches = chain(12, 48), vectors(1, 400)
    spoilt = [batches[0].clone()]
    spoilt[0][350:] *= 30
    one, other = (replace(model, LinearConfig(), calibration=b).sites[0] for b in (batches, spoilt))
    assert torch.equal(one.layer.readout.weight, other.layer.readout.weight)
    assert one.fit_r2 != other.fit_r2


def test_fit_quality_of_the_block_itself_is_one():
    dense = DenseFFN(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5))
    assert fit_quality(dense, stream(dense, tokens(50, 5), 7)) == 1.0


def test_local_loss_takes_chunks_with_and_without_weights():
    x, y, w = tokens(40, 12), tokens(40, 12, seed=2), torch.arange(40.0)
    mixed = LocalLoss([(x, y, None), (x, y, w)], generator=generator())
    whole = LocalLoss(
        [(torch.cat([x, x]), torch.cat([y, y]), torch.cat([torch.ones(40), w]))], generator=generator()
    )
    rows = torch.arange(80)
    assert torch.equal(mixed(torch.sin, rows), whole(torch.sin, rows))
    with pytest.raises(ValueError, match="empty"):
        LocalLoss([], generator=generator())


def test_targets_that_do_not_vary_are_refined_all_the_same():
    x = tokens(40, 12)
    layer = NarrowConfig(hidden_features=4).build(block(12, 48), generator=generator())
    refined = refine(layer, [(x, torch.ones(40, 12), None)], steps=3, generator=generator())
    assert all(torch.isfinite(p).all() for p in refined.parameters())
