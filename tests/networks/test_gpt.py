"""The decoder against a naive one in float64, its size against the formula, and what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import eugen
from stages.networks.gpt import GPT
from tests.tolerances import assert_close

VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS = 31, 13, 20, 3, 5


def model(seed: int = 0) -> GPT:
    """A small network with weights that are large enough for attention to be uneven."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = GPT(VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS)
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)
    return made


def some_ids(count: int = CONTEXT, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def naive(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits `[tokens, vocabulary]`, one token and one head after the other."""

    def linear(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    size = WIDTH // HEADS
    stream = [weights["tokens.weight"][t] + weights["positions.weight"][i] for i, t in enumerate(ids)]
    for block in range(DEPTH):
        at = f"blocks.{block}"
        qkv = [linear(f"{at}.attention.qkv", norm(f"{at}.norm1", x)) for x in stream]
        for i in range(len(ids)):
            heads = []
            for head in range(HEADS):
                q, k, v = (slice(j * WIDTH + head * size, j * WIDTH + (head + 1) * size) for j in range(3))
                scores = torch.stack([qkv[i][q] @ qkv[past][k] / math.sqrt(size) for past in range(i + 1)])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(shares[past] * qkv[past][v] for past in range(i + 1)))
            stream[i] = stream[i] + linear(f"{at}.attention.out", torch.cat(heads))
        for i, x in enumerate(stream):
            hidden = gelu(linear(f"{at}.ffn.0", norm(f"{at}.norm2", x)))
            stream[i] = x + linear(f"{at}.ffn.2", hidden)
    return torch.stack([weights["tokens.weight"] @ norm("norm", x) for x in stream])


def test_logits_and_loss_equal_a_naive_decoder_in_float64():
    net, ids = model().double(), some_ids()
    weights = dict(net.state_dict())
    expected = torch.stack([naive(weights, row) for row in ids.tolist()])
    assert_close(net(ids), expected, "logits")
    after = torch.randint(VOCABULARY, ids.shape, generator=torch.Generator().manual_seed(2))
    loss = torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), after.flatten())
    rows = expected.flatten(0, 1)
    by_hand = [row.exp().sum().log() - row[t] for row, t in zip(rows, after.flatten().tolist(), strict=True)]
    assert_close(loss, torch.stack(by_hand).mean(), "loss")


@pytest.mark.parametrize("changed", [0, 5, CONTEXT - 1])
def test_a_token_changes_nothing_before_itself_and_something_after(changed):
    net, ids = model().double(), some_ids()
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    difference = (net(ids) - net(other)).abs().amax(-1)
    assert not difference[:, :changed].any()
    assert (difference[:, changed:] > 0).all()


def test_sequences_shorter_than_the_context_are_their_beginnings():
    net, ids = model().double(), some_ids()
    for count in (1, 7):
        assert_close(net(ids[:, :count]), net(ids)[:, :count], f"{count} tokens")


def test_gpt2_has_the_parameters_of_gpt2():
    with torch.device("meta"):
        net = GPT(vocabulary=50257, context=1024, width=768, depth=12, heads=12)
    d, layers = 768, 12
    # Attention 4d² + 4d, feed-forward 8d² + 5d, two norms 4d; the head is the embedding.
    expected = (50257 + 1024) * d + layers * (12 * d * d + 13 * d) + 2 * d
    assert sum(p.numel() for p in net.parameters()) == expected
    assert round(expected / 1e6, 1) == 124.4


def test_the_head_is_the_embedding():
    net = model()
    net(some_ids()).sum().backward()
    unused = sorted(set(range(VOCABULARY)) - set(some_ids().flatten().tolist()))
    assert net.tokens.weight.grad is not None
    assert net.tokens.weight.grad[unused].abs().sum() > 0


@pytest.mark.parametrize(("width", "depth"), [(768, 1), (192, 8)])
def test_weights_start_as_those_of_gpt2(width, depth):
    torch.manual_seed(0)
    net = GPT(vocabulary=512, context=256, width=width, depth=depth, heads=4)
    deviation = {768: 0.02, 192: 0.04}[width]  # a quarter of the inputs: twice as large
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            into_stream = name.endswith(("attention.out.weight", "ffn.2.weight"))
            expected = deviation / math.sqrt(2 * depth) if into_stream else deviation
            close = 5 / math.sqrt(2 * weight.numel())  # the deviation of n draws is known to 1/√(2n)
            assert float(weight.detach().std()) == pytest.approx(expected, rel=close), name


def test_every_block_is_found_with_the_stream_that_it_adds_to():
    net, ids = model().double(), some_ids()
    sites = eugen.find_ffns(net)
    assert [site.name for site in sites] == [f"blocks.{i}.ffn" for i in range(DEPTH)]
    seen: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(sites[0].stream or "").register_forward_pre_hook(
            lambda _, inputs: seen.update(stream=inputs[0])
        ),
        net.get_submodule(sites[0].output).register_forward_hook(
            lambda _, inputs, y: seen.update(x=inputs[0], y=y)
        ),
        net.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.update(after=inputs[0])),
    ]
    net(ids)
    for handle in handles:
        handle.remove()
    assert_close(sites[0].dense(seen["x"]), seen["y"], "the block")
    assert_close(seen["stream"] + seen["y"], seen["after"], "the stream")


def test_replaced_blocks_are_no_longer_found_and_the_rest_is_untouched():
    result = eugen.replace(model(), eugen.NarrowConfig(budget=0.5), where=lambda site: site.index > 0)
    assert [site.name for site in eugen.find_ffns(result.model)] == ["blocks.0.ffn"]
    assert result.model(some_ids()).shape == (2, CONTEXT, VOCABULARY)


def test_compile_makes_one_graph():
    net, ids = model(), some_ids()
    assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(ids), net(ids), "compiled")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 18}, "width=18 is no multiple of heads=5"),
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"heads": -1}, "heads=-1: must be at least 1"),
        ({"vocabulary": 0}, "vocabulary=0: must be at least 1"),
    ],
)
def test_sizes_that_fit_no_network_are_named(sizes, message):
    known = {"vocabulary": 31, "context": 13, "width": 20, "depth": 3, "heads": 5}
    with pytest.raises(ValueError, match=message):
        GPT(**{**known, **sizes})


def test_sequences_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="ids of 14 tokens do not fit context=13"):
        model()(some_ids(CONTEXT + 1))
