"""Names of rows and models: what they make, and what they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import eugen
from eugen.layers.linear import LinearLayer
from eugen.timing import rows
from eugen.timing.rows import RowName, available, build, config_of, parse_rows
from eugen.timing.spec import parse, split
from eugen.timing.subjects import block_inputs, load, parts
from tests.eugen.models import chain, images, vectors, vit


def test_the_control_comes_first_and_once():
    assert [row.name for row in parse_rows("eugen,dense,prune")] == ["dense", "eugen", "prune"]
    assert parse_rows("") == [RowName("dense", "dense", False)]
    compiled = parse_rows("compile,compile_of_int8_of_eugen")[1:]
    assert compiled == [
        RowName("compile", "dense", True),
        RowName("compile_of_int8_of_eugen", "int8_of_eugen", True),
    ]


def test_every_name_that_is_listed_is_known_and_every_layer_is_listed():
    names = available()
    assert [row.name for row in parse_rows(",".join(names))] == names
    assert {*eugen.layers(), "int8_of_eugen", "bf16_of_prune", "compile"} <= set(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eugen,nothing", "no row is called 'nothing'"),
        ("int8_of_nothing", "no row is called 'nothing'"),
        ("eugen_of_prune", "'eugen' holds no other layer"),
        ("compile_of_", "no row is called ''"),
    ],
)
def test_unknown_rows_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rows(text)


def test_configurations_get_the_budget_their_options_and_what_they_hold():
    assert config_of("eugen(order=3,sharing=powers)", 0.4) == eugen.EUGenConfig(
        budget=0.4, order=3, sharing="powers"
    )
    assert config_of("int8_of_eugen(order=1)", 0.2) == eugen.Int8Config(
        budget=0.2, of=eugen.EUGenConfig(order=1)
    )
    assert config_of("bf16", 0.2) == eugen.Bf16Config()
    assert config_of("narrow(budget=0.7)", 0.2).budget == 0.7
    with pytest.raises(ValueError, match="colour"):
        config_of("eugen(colour=3)", 0.2)


def test_brackets_keep_commas_and_values_are_plain():
    assert split("a, b(c=1,d=(2,3)),e") == ["a", "b(c=1,d=(2,3))", "e"]
    assert parse("a.b:f(x=1,y='z',w=bare,n=None)") == ("a.b:f", {"x": 1, "y": "z", "w": "bare", "n": None})
    assert parse("plain") == ("plain", {})
    for wrong in ("f(1)", "f(x=g())", "f(x=1", "f(**{'a': 1})", "f(x=1)(y=2)"):
        with pytest.raises(ValueError, match="must be a name"):
            parse(wrong)


@pytest.mark.parametrize("name", ["eugen", "int8_of_eugen", "bf16_of_prune", "eugen(merge=False)"])
@pytest.mark.parametrize("make", [lambda: (chain(), vectors()[0]), lambda: (vit().eval(), images()[0])])
def test_a_row_is_the_replaced_model_as_it_is_deployed(make, name):
    model, x = make()
    built, error = build(name, model, 0.8, block_inputs(model, x))
    expected = eugen.replace(model, config_of(name, 0.8)).model.eval()
    with torch.no_grad():
        wanted, found = expected(x), built(x)
    assert 0 <= error <= rows.COARSEST
    assert torch.linalg.vector_norm(found - wanted) <= rows.COARSEST * torch.linalg.vector_norm(wanted)
    assert not eugen.find_ffns(built)
    assert len(eugen.find_ffns(model)) == len(block_inputs(model, x)) > 0, "the dense model changed"


def test_a_fast_path_that_is_another_function_is_not_timed(monkeypatch):
    model, inputs = chain(), block_inputs(chain(), vectors()[0])
    assert build("linear", model, 1.0, inputs)[1] <= 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(LinearLayer, "forward", lambda self, x: self.reference(x) * 1.001)
        with pytest.raises(ArithmeticError, match="not timed"):
            build("linear", model, 1.0, inputs)
        patch.setattr(LinearLayer, "forward", lambda self, x: self.reference(x) * float("nan"))
        with pytest.raises(ArithmeticError, match="nan"):
            build("linear", model, 1.0, inputs)


def keep(seen: dict, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    seen.setdefault(name, (args[0], output))


def test_blocks_get_what_they_get_in_the_model():
    model, x = vit().eval(), images()[0]
    seen = {}
    for index, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(partial(keep, seen, f"blocks.{index}.mlp"))
    with torch.no_grad():
        model(x)
        whole, ffn, layers = (parts(model, x, scope) for scope in ("model", "ffn", "layer"))
        assert [part.name for part in whole] == ["model"] and whole[0].of(model) is model
        assert [part.name for part in layers] == list(seen)
        outputs = ffn[0].of(model)(ffn[0].example)
        assert all(torch.equal(y, wanted) for y, (_, wanted) in zip(outputs, seen.values(), strict=True))
        for part, (inputs, wanted) in zip(layers, seen.values(), strict=True):
            assert torch.equal(part.example[0], inputs)
            assert torch.equal(part.of(model)(part.example)[0], wanted)
        built, _ = build("narrow", model, 0.5, block_inputs(model, x))
        own = layers[1].of(built)(layers[1].example)[0]
        assert torch.equal(own, built.blocks[1].mlp(layers[1].example[0]))


def test_inputs_are_copies_of_the_first_run():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, x):
            y = self.chain(x)
            x.zero_()
            return self.chain(y)

    x = vectors()[0]
    kept = x.clone()
    (found,) = block_inputs(Twice(), x).values()
    assert torch.equal(found, kept)
    with pytest.raises(ValueError, match="no feed-forward block"):
        block_inputs(nn.Linear(3, 3), torch.zeros(1, 3))


def test_models_by_name():
    assert load("mlp(width=8,depth=3)").model[0].in_features == 8
    assert len(eugen.find_ffns(load("mlp(width=8,depth=3)").model)) == 3
    encoder = load("transformer(width=16,heads=2,depth=2)")
    assert encoder.model(encoder.inputs("forward", 3)).shape == (3, 128, 16)
    assert len(eugen.find_ffns(encoder.model)) == 2
    image = load("timm:vit_tiny_patch16_224(depth=1)")
    assert image.inputs("forward", 2).shape == (2, 3, 224, 224)
    assert load("torch.nn:Linear(in_features=3,out_features=2)", "5x3").inputs("forward", 2).shape == (
        2,
        5,
        3,
    )


def with_inputs(size: int) -> tuple[nn.Module, object]:
    return nn.Linear(size, size), lambda batch: torch.full((batch, size), 7.0)


def test_a_factory_may_bring_its_inputs():
    subject = load(f"{__name__}:with_inputs(size=4)")
    assert torch.equal(subject.inputs("forward", 2), torch.full((2, 4), 7.0))
    assert load(f"{__name__}:with_inputs(size=4)", "3x4").inputs("forward", 2).shape == (2, 3, 4)


def test_weights_are_random_but_the_same_and_leave_the_global_generator():
    state = torch.get_rng_state()
    first, second = load("mlp(width=8)"), load("mlp(width=8)")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.model[0].weight, second.model[0].weight)
    assert torch.equal(first.inputs("forward", 2), second.inputs("forward", 2))
    assert not any(p.requires_grad for p in first.model.parameters())
    assert not first.model.training


def test_decode_is_one_token_of_each_sequence():
    subject = load("torch.nn:Embedding(num_embeddings=9,embedding_dim=4)", "ids:5:9")
    whole, one = subject.inputs("prefill", 3), subject.inputs("decode", 3)
    assert torch.equal(whole, subject.inputs("forward", 3))
    assert whole.shape == (3, 5) and int(whole.min()) >= 0 and int(whole.max()) < 9
    assert torch.equal(one, whole[:, -1:])
    for call in ("prefill", "decode"):
        with pytest.raises(ValueError, match="ids:TOKENS:VOCABULARY"):
            load("mlp(width=8)").inputs(call, 1)


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        ("nothing", None, "must be mlp, transformer"),
        ("no.such.package:f", None, "No module named"),
        ("torch.nn:Nothing", None, "has no 'Nothing'"),
        ("torch.nn:Linear(in_features=3,out_features=2)", None, "tells no inputs"),
        ("builtins:dict", "3", "made dict"),
        ("mlp", "3x", "must be a shape"),
        ("mlp", "0x3", "must be a shape"),
        ("mlp", "ids:3", "must be a shape"),
        ("mlp(", None, "must be a name"),
    ],
)
def test_names_that_lead_nowhere_say_so(spec, given, message):
    with pytest.raises(ValueError, match=message):
        load(spec, given)
