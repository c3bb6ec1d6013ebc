"""What a user may get wrong: one line that names it and the cure, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.eugen.cli.conftest import write_images, write_text, write_vectors

CHAIN, VIT = "tests.eugen.models:chain", "timm:vit_tiny_patch16_224(img_size=32,depth=1,pretrained=False)"
TARGET = ("--budget", 0.5)


@pytest.fixture
def fails(eugen_cli, tmp_path):
    """Compress with these words; check that it fails as it should, and return what it said."""

    def run(source, data, *words, code=2, out=tmp_path / "out"):
        before = sorted(tmp_path.iterdir())
        words = [*words, *(() if "--row" in words else ("--row", "prune")), "--out", out]
        found = eugen_cli("compress", source, "--data", data, "--level", "quick", *words)
        assert found.exit_code == code, found.output
        lines = found.stderr.strip().splitlines()
        assert lines[-1].startswith("error: ") and "Traceback" not in found.output
        assert sorted(tmp_path.iterdir()) == before
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "exactly one target, --budget, --params or --speedup: none is given"),
        (("--budget", 0.3, "--speedup", 2), "--budget and --speedup are given"),
        (("--budget", 1.5), "must be in (0, 1]"),
        (("--speedup", 0.5), "must be above 1"),
        ((*TARGET, "--row", "prun"), "did you mean prune?"),
        ((*TARGET, "--row", "something"), "use one of auto, bf16"),
        ((*TARGET, "--row", "eugen(ordr=1)"), "did you mean order or min_order?"),
        ((*TARGET, "--row", "eugen(1)"), "name(option=value"),
        ((*TARGET, "--row", "int8(of=prun)"), "did you mean prune?"),
        ((*TARGET, "--level", "fats"), "did you mean fast?"),
        ((*TARGET, "--device", "gpu"), "--device gpu: this machine has no such device"),
        (("--budget", 0.0001), "is too small for 'prune'"),
    ],
)
def test_wrong_options(fails, inputs, words, said):
    assert said in fails(CHAIN, inputs, *words)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("vit", "must be timm:NAME, hf:FOLDER or package.module:function"),
        ("tim:vit", "did you mean timm?"),
        ("nowhere.at_all:f", "No module named 'nowhere'"),
        ("tests.eugen.models:chian", "did you mean chain?"),
        ("tests.eugen.models:chain(width=3)", "unexpected keyword argument 'width'"),
        ("tests.eugen.models:images", "made list, no torch.nn.Module"),
        ("timm:vit_tiny_patch16_22", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224(pretrained=False,dept=3)", "dept"),
        ("hf:/nowhere/at/all", "is no folder on this machine"),
        ("torch.nn:Identity", "no feed-forward block found"),
    ],
)
def test_wrong_sources(fails, inputs, source, said):
    assert said in fails(source, inputs, *TARGET)


def test_a_folder_that_is_no_model(fails, inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "lacks config.json and model.safetensors" in fails(f"hf:{tmp_path / 'empty'}", inputs, *TARGET)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "magic"}))
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "transformers cannot load" in fails(f"hf:{broken}", inputs, *TARGET)


def test_pretrained_weights_that_cannot_be_had(fails, inputs, monkeypatch):
    import timm

    create = timm.create_model

    def offline(name, *, pretrained, **options):
        if pretrained:
            raise ConnectionError("no route")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    said = fails("timm:vit_tiny_patch16_224(depth=1)", inputs, *TARGET)
    assert "could not be fetched (ConnectionError): give them with --weights" in said


def test_wrong_weights(fails, inputs, tmp_path):
    weights = tmp_path / "weights.safetensors"
    assert "is no file" in fails(CHAIN, inputs, *TARGET, "--weights", weights)
    save_file({"a": torch.ones(2)}, weights)
    assert "are not of Sequential" in fails(CHAIN, inputs, *TARGET, "--weights", weights)
    weights.write_bytes(b"nothing")
    assert "cannot be read" in fails(CHAIN, inputs, *TARGET, "--weights", weights)
    torch.save([1, 2], tmp_path / "weights.pth")
    assert "holds no state dict" in fails(CHAIN, inputs, *TARGET, "--weights", tmp_path / "weights.pth")


def test_weights_of_a_folder_are_its_own(fails, bert_folder, text, tmp_path):
    said = fails(f"hf:{bert_folder}", text, *TARGET, "--weights", tmp_path / "weights.pth")
    assert "hf:FOLDER has its own weights" in said


def test_data_that_are_not_there_or_too_few(fails, bert_folder, tmp_path):
    source = f"hf:{bert_folder}"
    assert "is not there: give a text file" in fails(source, tmp_path / "none.txt", *TARGET)
    few = write_text(tmp_path / "few.txt", 9)
    assert "holds 9 different examples, too few to split" in fails(source, few, *TARGET)
    few.write_text("w1 w2\n\n" * 50)
    # The same line again is no other example.
    assert "holds 1 different examples" in fails(source, few, *TARGET)
    little = write_text(tmp_path / "little.txt", 10)
    assert "too few for 32 features: give at least 64" in fails(source, little, *TARGET)
    (tmp_path / "data.csv.gz").write_bytes(b"")
    assert "is not read: give a text file" in fails(source, tmp_path / "data.csv.gz", *TARGET)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    assert "is no text in UTF-8" in fails(source, tmp_path / "binary", *TARGET)


def test_data_of_the_wrong_kind(fails, bert_folder, text, inputs, tmp_path):
    assert "has no tokenizer.json; it takes images [batch, 3, 32, 32]" in fails(VIT, text, *TARGET)
    images = write_images(tmp_path / "images", 12)
    assert "only timm models tell how images are prepared" in fails(f"hf:{bert_folder}", images, *TARGET)
    assert "is not read: give a text file" in fails(VIT, images / "0.png", *TARGET)
    (tmp_path / "empty").mkdir()
    assert "holds no image" in fails(VIT, tmp_path / "empty", *TARGET)


def test_data_of_the_wrong_shape(fails, inputs, tmp_path):
    said = fails(VIT, inputs, *TARGET)
    assert "gives float32 [32, 12], " in said and "takes images [batch, 3, 32, 32]" in said
    wide = write_vectors(tmp_path / "wide.safetensors", d=13)
    said = fails(CHAIN, wide, *TARGET)
    assert "gives float32 [32, 13], " in said and "takes 12 features" in said


def test_a_tokenizer_of_another_model(fails, bert_folder, text):
    path = bert_folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7":7', '"w7":70').replace('"w7": 7', '"w7": 70'))
    assert "gives the token 70" in fails(f"hf:{bert_folder}", text, *TARGET)


def test_inputs_that_do_not_serve(fails, bert_folder, tmp_path):
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(b"nothing")
    assert "is damaged" in fails(CHAIN, path, *TARGET)
    save_file({"x": torch.full((30, 12), float("nan"))}, path)
    assert "x holds NaN" in fails(CHAIN, path, *TARGET)
    save_file({"input_ids": torch.zeros(30, 4, dtype=torch.int64), "colour": torch.zeros(30, 4)}, path)
    assert "'colour' is none of them" in fails(f"hf:{bert_folder}", path, *TARGET)
    save_file({"input_ids": torch.zeros(30, 4), "attention_mask": torch.zeros(20, 4)}, path)
    assert "must be equal: " in fails(f"hf:{bert_folder}", path, *TARGET)


def test_an_image_that_is_none_is_named(fails, tmp_path):
    images = write_images(tmp_path / "images", 12)
    (images / "3.png").write_bytes(b"nothing")
    assert "3.png is no image that can be read" in fails(VIT, images, *TARGET)


def test_what_is_measured_last_is_looked_at_first(fails, tmp_path):
    images = write_images(tmp_path / "images", 30)
    for number in range(30):  # whichever part it falls into, and before anything is fitted
        good = (images / f"{number}.png").read_bytes()
        (images / f"{number}.png").write_bytes(b"nothing")
        if number % 10 == 0:
            assert f"{number}.png is no image" in fails(VIT, images, *TARGET)
        (images / f"{number}.png").write_bytes(good)


@pytest.mark.parametrize("value", [-1, 50])
@pytest.mark.parametrize("row", range(0, 40, 13))
def test_an_index_out_of_range_is_found_wherever_it_is(fails, bert_folder, tmp_path, value, row):
    ids = torch.randint(0, 50, (40, 6), generator=torch.Generator().manual_seed(0))
    ids[row, 3] = value
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    said = fails(f"hf:{bert_folder}", tmp_path / "ids.safetensors", *TARGET)
    assert "takes token ids [batch, tokens] below 50" in said and "index out of range" in said


def test_an_output_folder_that_is_taken(eugen_cli, inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    found = eugen_cli("compress", CHAIN, "--data", inputs, *TARGET, "--out", tmp_path / "out")
    assert found.exit_code == 2 and "is there already" in found.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_output_folder_that_cannot_be_made(fails, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, said in ((".", "is the folder you are in"), (inputs / "out", "is no folder that you may")):
        assert said in fails(CHAIN, inputs, *TARGET, out=place)


def test_a_link_to_an_empty_folder_is_filled(eugen_cli, inputs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    words = (*TARGET, "--row", "prune", "--level", "quick", "--out", tmp_path / "link")
    assert eugen_cli("compress", CHAIN, "--data", inputs, *words).exit_code == 0
    assert (tmp_path / "real" / "model.safetensors").is_file() and (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob("*.partial"))


def test_what_others_put_beside_unfinished_work_stays(eugen_cli, inputs, tmp_path):
    kept = tmp_path / "out.partial" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("precious")
    words = (*TARGET, "--row", "prune", "--level", "quick", "--out", tmp_path / "out")
    assert eugen_cli("compress", CHAIN, "--data", inputs, *words).exit_code == 0
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


MODELS = """
import torch
from torch import nn
from tests.eugen.models import chain

class Partly(nn.Module):
    def __init__(self, before):
        super().__init__()
        self.before, self.after = before, chain()
    def forward(self, x):
        return self.after(self.before(x))

def quantised():
    first = nn.Sequential(nn.Linear(12, 12))
    return Partly(torch.ao.quantization.quantize_dynamic(first, {nn.Linear}, dtype=torch.qint8))

def empty():
    with torch.device("meta"):
        return chain()

def half():
    return chain().half()

def shared():
    block = chain()
    return nn.Sequential(block, nn.LayerNorm(12), block)
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("odd:quantised", "before.0._packed_params.dtype is no tensor but dtype"),
        ("odd:empty", "is on the meta device and holds no weights"),
        ("odd:half", "is float16, too narrow a range"),
        ("odd:shared", "ran twice in one forward pass"),
    ],
)
def test_models_that_cannot_be_taken(fails, inputs, tmp_path_factory, monkeypatch, source, said):
    folder = tmp_path_factory.mktemp("models")
    (folder / "odd.py").write_text(MODELS)
    monkeypatch.syspath_prepend(folder)
    assert said in fails(source, inputs, *TARGET)


def test_debug_keeps_the_traceback(eugen_cli, tmp_path):
    words = ("compress", CHAIN, "--data", tmp_path / "none", *TARGET, "--out", tmp_path / "out")
    assert isinstance(eugen_cli(*words, "--debug").exception, ValueError)
    assert isinstance(eugen_cli(*words).exception, SystemExit)


def test_what_nobody_expected_is_one_line_too(eugen_cli, inputs, tmp_path, monkeypatch):
    from eugen.cli import compressing

    def breaks(*_, **__):
        raise RuntimeError("the\nmachine")

    monkeypatch.setattr(compressing, "carry_out", breaks)
    words = ("compress", CHAIN, "--data", inputs, *TARGET, "--row", "prune", "--out", tmp_path / "out")
    found = eugen_cli(*words)
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1] == "error: RuntimeError: the machine (--debug shows where)"
