"""Self-guided training: the guide leads, is trained, fades, and leaves nothing behind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from eugen import DenseFFN
from eugen.layers.block_dense import BlockDenseConfig
from eugen.layers.block_shuffle import BlockShuffleConfig
from eugen.refine import refine
from eugen.self_guided import SelfGuided, refine_guided
from tests.eugen.blocks import block, generator, stream, tokens
from tests.tolerances import assert_close, relative_rms

STEPS = 8
by_config = pytest.mark.parametrize("config", [BlockShuffleConfig, BlockDenseConfig])


@pytest.fixture
def guided() -> SelfGuided:
    dense = block(20, 60)
    return SelfGuided(BlockShuffleConfig(budget=0.5).build(dense, generator=generator()), dense, STEPS)


def advanced(guided: SelfGuided, steps: int) -> SelfGuided:
    for _ in range(steps):
        guided.advance()
    return guided


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_guides_share_falls_from_one_to_nothing(guided):
    shares = [guided.alpha]
    for _ in range(STEPS + 2):
        guided.advance()
        shares.append(guided.alpha)
    assert shares[0] == 1
    assert shares[STEPS // 4] == pytest.approx((2 + 2**0.5) / 4)
    assert shares[STEPS // 2] == pytest.approx(0.5)
    assert shares[STEPS:] == [0, 0, 0]
    assert all(later < sooner for sooner, later in itertools.pairwise(shares[: STEPS + 1]))
    # A cosine's halves mirror each other.
    assert [a + b for a, b in zip(shares, reversed(shares[: STEPS + 1]), strict=False)] == pytest.approx(
        [1] * (STEPS + 1)
    )


def test_outputs_go_from_the_guides_to_the_layers(guided):
    x = tokens(9, 20)
    assert torch.equal(guided(x), guided.guide(x))
    advanced(guided, STEPS // 4)
    assert_close(guided(x), guided.alpha * guided.guide(x) + (1 - guided.alpha) * guided.layer(x))
    advanced(guided, STEPS)
    for mode in (True, False):
        assert torch.equal(guided.train(mode)(x), guided.layer(x))
    assert guided.finished() is guided.layer


@pytest.mark.parametrize(("steps", "led"), [(STEPS // 2, True), (2 * STEPS, False)])
def test_guide_and_layer_are_trained_until_the_guide_is_gone(guided, steps, led):
    advanced(guided, steps)(tokens(9, 20)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in guided.layer.parameters())
    assert all((p.grad is not None and bool(p.grad.any())) == led for p in guided.guide.parameters())


def test_the_guide_is_a_copy_that_can_learn():
    dense = block(20, 60).requires_grad_(False)
    guided = SelfGuided(BlockDenseConfig(budget=0.5).build(dense, generator=generator()), dense, STEPS)
    assert same(guided.guide, dense)
    with torch.no_grad():
        for parameter in guided.guide.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert not same(guided.guide, dense)


def test_a_checkpoint_goes_on_where_it_was(guided):
    x = tokens(9, 20)
    state = copy.deepcopy(advanced(guided, 3).state_dict())
    other = block(20, 60, seed=7)
    fresh = SelfGuided(BlockShuffleConfig(budget=0.5).build(other, generator=generator(4)), other, STEPS)
    fresh.load_state_dict(state)
    assert fresh.alpha == guided.alpha not in (0, 1)
    assert torch.equal(fresh(x), guided(x))


def test_training_from_scratch_in_a_network():
    dense, x = block(20, 60), tokens(300, 20)
    target = torch.tanh(dense(x).detach().flip(-1))
    layer = BlockShuffleConfig(budget=0.5).build(dense, generator=generator())
    model = nn.Sequential(nn.LayerNorm(20), SelfGuided(layer, block(20, 60, seed=3), steps=40), nn.Tanh())
    with torch.no_grad():
        before = float((model(x) - target).square().mean())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        optimiser.step()
        model[1].advance()
    y = model(x).detach()
    model[1] = model[1].finished()
    assert torch.equal(model(x).detach(), y)
    assert float((y - target).square().mean()) < before / 2
    assert not any(isinstance(part, DenseFFN) for part in model.modules())


def test_what_cannot_be_guided():
    layer = BlockShuffleConfig(budget=0.5).build(block(20, 60), generator=generator())
    with pytest.raises(ValueError, match=r"guide maps \(12, 12\) features, the layer \(20, 20\)"):
        SelfGuided(layer, block(12, 60), STEPS)
    with pytest.raises(ValueError, match="steps=-1 must be at least 0"):
        SelfGuided(layer, block(20, 60), -1)
    assert SelfGuided(layer, block(20, 60), 0).alpha == 0


@by_config
def test_refinement_is_guided_unless_told_otherwise(config):
    dense = block(20, 60)
    data, kept = stream(dense, tokens(600, 20)), copy.deepcopy(dense)
    layer = config(budget=0.3).fit(dense, data, generator=generator())
    before, counts = copy.deepcopy(layer), []

    def refined(guided: bool) -> nn.Module:
        counts.append(0)
        return config(budget=0.3, self_guided=guided).refine(
            layer, dense, data, steps=12, generator=generator()
        )

    def count(*_: object) -> None:
        counts[-1] += 1

    handle = register_optimizer_step_post_hook(count)
    plain, led = refined(False), refined(True)
    handle.remove()
    assert counts == [12, 12]
    assert same(plain, refine(layer, data, steps=12, generator=generator()))
    assert same(led, refine_guided(layer, dense, data, steps=12, generator=generator()))
    assert not same(plain, led)
    assert led.state_dict().keys() == layer.state_dict().keys()
    assert same(layer, before)
    assert same(dense, kept)


@by_config
def test_guided_refinement_helps(config):
    dense = block(20, 60)
    x = tokens(3000, 20)
    data = stream(dense, x[:2000])
    layer = config(budget=0.3).fit(dense, data, generator=generator())
    refined = config().refine(layer, dense, data, steps=60, generator=generator())
    errors = [relative_rms(each(x[2000:]), dense(x[2000:])) for each in (layer, refined)]
    assert errors[1] < 0.97 * errors[0]


def test_one_step_is_a_refinement_too():
    dense = block(20, 60)
    data = stream(dense, tokens(600, 20))
    layer = BlockDenseConfig(budget=0.3).fit(dense, data, generator=generator())
    assert torch.isfinite(
        refine_guided(layer, dense, data, steps=1, generator=generator())(tokens(5, 20))
    ).all()
