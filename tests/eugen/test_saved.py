"""A compressed model as a folder: written whole, brought back to the bit, refused where it is damaged."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import eugen
from eugen import EUGenConfig, Plan, PruneConfig, replace
from eugen.compression.saved import state_hash
from tests.eugen.models import bert, call_bert, chain, images, sentences, vectors, vit


def compressed(model, config, calibration, *, call=None, steps=3):
    result = replace(model, config, calibration=calibration, call=call, refine_steps=steps)
    return result.model.eval(), Plan({site.name: config for site in result.sites})


@pytest.fixture
def folder(tmp_path):
    model, plan = compressed(chain(), PruneConfig(budget=0.5), vectors())
    eugen.save(tmp_path / "out", model, plan)
    return tmp_path / "out"


@pytest.mark.parametrize("name", eugen.layers())
def test_every_layer_comes_back_to_the_bit(name, tmp_path):
    kind = eugen.layers()[name]
    config = kind(budget=kind().only_budget or 0.7)
    model, plan = compressed(vit(), config, images())
    eugen.save(tmp_path / "out", model, plan)
    fresh = vit().eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(3).add_(0.1)
    loaded = eugen.load(tmp_path / "out", fresh)
    x = images(1)[0]
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(fresh(x), model(x))  # the instance given is not touched


def test_a_transformer_comes_back_to_the_bit(tmp_path):
    model, plan = compressed(bert(), EUGenConfig(budget=0.5), sentences(), call=call_bert)
    eugen.save(tmp_path / "out", model, plan)
    loaded = eugen.load(tmp_path / "out", bert(hidden_act="gelu")).eval()
    assert torch.equal(call_bert(loaded, sentences()[0]), call_bert(model, sentences()[0]))


class Tied(nn.Module):
    """An embedding, a block, and a head that shares the embedding's weights or does not."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.ffn, self.head = nn.Embedding(9, 12), chain(12, 24), nn.Linear(12, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.ffn(self.embedding(ids)))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    ids = list(torch.arange(360).reshape(4, 90) % 9)
    model, plan = compressed(Tied(), PruneConfig(hidden_features=8), ids)
    eugen.save(tmp_path / "out", model, plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tied"] == {"head.weight": "embedding.weight"}
    loaded = eugen.load(tmp_path / "out", Tied().eval())
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(ids[0]), model(ids[0]))
    untied = eugen.load(tmp_path / "out", Tied(tied=False).eval())
    assert torch.equal(untied(ids[0]), model(ids[0]))


def test_a_model_that_ties_what_was_not_tied_is_another_one(tmp_path):
    ids = list(torch.arange(360).reshape(4, 90) % 9)
    model, plan = compressed(Tied(tied=False), PruneConfig(hidden_features=8), ids)
    eugen.save(tmp_path / "out", model, plan)
    with pytest.raises(ValueError, match="shares memory with another weight"):
        eugen.load(tmp_path / "out", Tied())


def test_dtypes_are_the_saved_ones(tmp_path):
    model, plan = compressed(chain().bfloat16(), PruneConfig(budget=0.5), [v.bfloat16() for v in vectors()])
    eugen.save(tmp_path / "out", model, plan)
    loaded = eugen.load(tmp_path / "out", chain().eval())
    x = vectors()[0].bfloat16()
    assert loaded(x).dtype == torch.bfloat16
    assert torch.equal(loaded(x), model(x))


def test_mode_is_that_of_the_model_given(folder):
    assert eugen.load(folder, chain().train()).training
    assert not eugen.load(folder, chain().eval()).training


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: chain(14, 40), "not the architecture"),
        (lambda: chain(12, 48), "not the architecture"),
        (lambda: nn.Sequential(chain(), nn.Linear(12, 12)), "not the architecture"),
        (lambda: nn.Linear(12, 12), "not the architecture"),
        (lambda: chain().to("meta"), "on the meta device"),
    ],
)
def test_another_architecture_is_refused(folder, other, message):
    with pytest.raises(ValueError, match=message):
        eugen.load(folder, other())


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not what was written"),
        ("model.safetensors", lambda data: data[:100], "is not what was written"),
        ("plan.json", lambda data: data.replace(b"0.5", b"0.4"), "is not what was written"),
        ("config.json", lambda data: data[:-20], "is damaged"),
        ("config.json", lambda data: b"[]", "is damaged"),
        ("config.json", lambda data: b"{}", "is damaged"),
        ("config.json", lambda data: data.replace(b'"format": 1', b'"format": 2'), "install a newer eugen"),
    ],
)
def test_a_damaged_or_newer_folder_is_refused(folder, file, change, message):
    spoil(folder / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        eugen.load(folder, chain())
    assert file in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "plan.json", "config.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(ValueError, match=file):
        eugen.load(folder, chain())


def test_nothing_is_overwritten_and_an_empty_folder_serves(folder, tmp_path):
    model, plan = compressed(chain(), PruneConfig(budget=0.5), vectors())
    with pytest.raises(ValueError, match="is there already"):
        eugen.save(folder, model, plan)
    (tmp_path / "empty").mkdir()
    eugen.save(tmp_path / "empty", model, plan)
    assert eugen.load(tmp_path / "empty", chain())
    with pytest.raises(ValueError, match="plan= is needed"):
        eugen.save(tmp_path / "other", model)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    model, plan = compressed(chain(), PruneConfig(budget=0.5), vectors())
    with pytest.raises(TypeError):
        eugen.save(tmp_path / "out", model, plan, config={"no value of JSON": object()})
    assert not list(tmp_path.iterdir())


def test_the_hash_of_a_state_sees_names_types_and_values():
    def state(**tensors):
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return state_hash(model)

    one = state(a=torch.arange(4.0))
    assert state(a=torch.arange(8.0)[::2] / 2) == one  # not how it lies in memory
    others = [
        state(b=torch.arange(4.0)),
        state(a=torch.arange(4.0).reshape(2, 2)),
        state(a=torch.arange(4.0).bfloat16()),
        state(a=torch.arange(4.0) + 1e-6),
        state(a=torch.tensor(0.0), b=torch.zeros(0)),
    ]
    assert len({one, *others}) == 6
