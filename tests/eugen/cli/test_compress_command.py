"""`eugen compress` and `eugen verify` on the models that users bring."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eugen
from eugen.cli import measure
from eugen.cli.data import open_data
from eugen.cli.sources import open_source
from tests.eugen.cli.conftest import write_images, write_vectors
from tests.eugen.models import chain

CHAIN = "tests.eugen.models:chain"
TIMM = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}


def compress(eugen_cli, source, data, out, *more, budget=0.5, row="prune"):
    words = ("--budget", budget, "--row", row, "--level", "quick", "--out", out, *more)
    return eugen_cli("compress", source, "--data", data, *words)


def records(out):
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return config, eugen.Plan.from_json((out / "plan.json").read_text(encoding="utf-8"))


def test_a_text_model_is_compressed_and_verified(eugen_cli, bert_folder, text, tmp_path):
    out, source = tmp_path / "out", f"hf:{bert_folder}"
    made = compress(eugen_cli, source, text, out)
    assert made.exit_code == 0, made.stderr
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "config.json",
        "README.md",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out", "some.txt"]
    config, plan = records(out)
    assert config["quality"]["kind"] == "features"
    assert 0 < config["quality"]["cosine"] < 1
    assert plan.figures["macs_per_token_ratio"] <= 0.5 and set(plan.blocks) == {
        f"encoder.layer.{i}.intermediate" for i in (0, 1)
    }
    assert len(re.findall(r"block \d/2 .*held-out R²", made.stderr)) == 2
    assert "1/2" in made.stderr and "left" in made.stderr
    verified = eugen_cli("verify", out)
    assert verified.exit_code == 0, verified.stderr
    assert "is what its records say" in verified.stdout


def test_the_quality_is_that_of_the_loaded_model_on_the_test_part(eugen_cli, bert_folder, text, tmp_path):
    out = tmp_path / "out"
    compress(eugen_cli, f"hf:{bert_folder}", text, out)
    source = open_source(f"hf:{bert_folder}")
    loaded = eugen.load(out, source.model).eval()
    data = open_data(text, source, batch=None, max_tokens=128, device="cpu")
    cosines = []
    with torch.no_grad():
        for ids in data.test:
            pair = [model(input_ids=ids).last_hidden_state.double() for model in (source.model, loaded)]
            cosines.append(torch.cosine_similarity(*pair, dim=-1).reshape(-1))
    recorded = records(out)[0]["quality"]["cosine"]
    assert recorded == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)


def test_the_card_loads_the_model(eugen_cli, bert_folder, text, tmp_path):
    out = tmp_path / "out"
    compress(eugen_cli, f"hf:{bert_folder}", text, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    space: dict = {}
    exec(code, space)  # what a user would paste
    assert not space["model"].training
    assert len(eugen.find_ffns(space["model"])) == 0
    assert "{" not in card.replace("{}", "")


def test_a_timm_model_is_compressed_with_images(eugen_cli, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(TIMM, **SHAPE)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = ",".join(f"{key}={value}" for key, value in SHAPE.items())
    source, images, out = f"timm:{TIMM}({options})", write_images(tmp_path / "images"), tmp_path / "out"
    made = compress(
        eugen_cli, source, images, out, "--weights", tmp_path / "weights.safetensors", "--batch", 8
    )
    assert made.exit_code == 0, made.stderr
    config, _ = records(out)
    assert config["quality"]["kind"] == "classes"
    assert config["conditions"]["batch"] == "float32 [8, 3, 32, 32]"
    verified = eugen_cli("verify", out)
    assert verified.exit_code == 0, verified.stderr
    (images / "0.png").write_bytes((images / "1.png").read_bytes())
    changed = eugen_cli("verify", out)
    assert changed.exit_code == 2 and "another SHA-256" in changed.stderr


def test_targets_of_parameters_and_speed(eugen_cli, inputs, tmp_path):
    source = f"{CHAIN}(d=12, h=200)"
    words = ("--row", "prune", "--level", "quick", "--data", inputs)
    made = eugen_cli("compress", source, *words, "--params", 0.3, "--out", tmp_path / "small")
    assert made.exit_code == 0, made.stderr
    assert 0.2 < records(tmp_path / "small")[1].figures["parameters_ratio"] <= 0.3
    hopeless = eugen_cli("compress", source, *words, "--speedup", 1e6, "--out", tmp_path / "fast")
    assert hopeless.exit_code == 2
    assert "speedup=1000000.0 is out of reach" in hopeless.stderr
    assert not (tmp_path / "fast").exists()


def spoiled(out, change):
    """The records of a folder changed, as by another version; hashes are made to fit."""
    from eugen.compression.saved import file_hash

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    change(config, plan)
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    config["files"]["plan.json"] = file_hash(out / "plan.json")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda config, plan: config["quality"].update(cosine=config["quality"]["cosine"] - 0.05),
            "cosine was",
        ),
        (lambda config, plan: config["quality"].update(examples=7), "examples was 7"),
        (lambda config, plan: plan["figures"].update(replaced_macs_per_token=1), "the plan says 1 MACs"),
        (lambda config, plan: config["cost"]["compressed"].update(macs=1), "MACs of the batch were 1"),
    ],
)
def test_verify_fails_where_records_and_model_differ(eugen_cli, inputs, tmp_path, change, said):
    out = tmp_path / "out"
    assert compress(eugen_cli, CHAIN, inputs, out).exit_code == 0
    spoiled(out, change)
    found = eugen_cli("verify", out)
    assert found.exit_code == 1
    assert f"differs: {said}" in found.stderr and "error:" not in found.stderr


def partly():
    """One block replaced before, two to go."""
    model = nn.Sequential(chain(), nn.LayerNorm(12), chain(), nn.LayerNorm(12), chain())
    return eugen.replace(model, {"0.0": eugen.LinearConfig()}).model


def test_blocks_that_were_replaced_before_are_none_of_the_plan(eugen_cli, inputs, tmp_path):
    out = tmp_path / "out"
    made = compress(eugen_cli, "tests.eugen.cli.test_compress_command:partly", inputs, out)
    assert made.exit_code == 0, made.stderr
    assert set(records(out)[1].blocks) == {"2.0", "4.0"}
    verified = eugen_cli("verify", out)
    assert verified.exit_code == 0, verified.stderr


def silent():
    """Its second block gives the same for every input."""
    model = nn.Sequential(chain(act=nn.ReLU), nn.LayerNorm(12), chain(act=nn.ReLU))
    with torch.no_grad():
        model[2][0].bias.fill_(-1e4)
    return model


@pytest.mark.parametrize("row", ["prune", "auto"])
def test_a_block_that_does_nothing_leaves_no_nan_behind(eugen_cli, inputs, tmp_path, row):
    out = tmp_path / "out"
    made = compress(eugen_cli, "tests.eugen.cli.test_compress_command:silent", inputs, out, row=row)
    assert made.exit_code == 0, made.stderr
    for name in ("config.json", "plan.json"):
        json.loads((out / name).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_a_row_may_hold_another(eugen_cli, inputs, tmp_path):
    assert compress(eugen_cli, CHAIN, inputs, tmp_path / "out", row="int8(of=prune)").exit_code == 0
    (config,) = records(tmp_path / "out")[1].blocks.values()
    assert config == eugen.Int8Config(budget=0.5, of=eugen.PruneConfig())


def test_a_folder_in_float16_is_taken_as_float32(eugen_cli, bert_folder, text, tmp_path):
    weights = load_file(bert_folder / "model.safetensors")
    save_file({n: w.half() for n, w in weights.items()}, bert_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((bert_folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float16"}
    (bert_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = compress(eugen_cli, f"hf:{bert_folder}", text, tmp_path / "out")
    assert made.exit_code == 0, made.stderr
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert eugen_cli("verify", tmp_path / "out").exit_code == 0


def test_lines_that_are_equal_to_the_model_are_one_example(bert_folder, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"w{i} w{i + 1} w{j}\n" for i in range(30) for j in range(5)))
    source = open_source(f"hf:{bert_folder}")
    data = open_data(path, source, batch=4, max_tokens=2, device="cpu")
    parts = [{tuple(row) for batch in part for row in batch.tolist()} for part in parts_of(data)]
    assert sum(map(len, parts)) == 30 == sum(part.examples for part in parts_of(data))
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_equal_inputs_and_images_are_one_example(tmp_path):
    """Or what is reported on would have been fitted to."""
    kinds, labels = torch.randn(20, 12), torch.arange(20)
    save_file({"x": kinds.repeat(3, 1)}, tmp_path / "one.safetensors")
    source = open_source("tests.eugen.models:chain")
    data = open_data(tmp_path / "one.safetensors", source, batch=4, max_tokens=8, device="cpu")
    seen = [x for part in parts_of(data) for batch in part for x in batch[:, 0].tolist()]
    assert sorted(seen) == sorted(kinds[:, 0].tolist())
    save_file({"input_ids": labels.repeat(2)[:, None].repeat(1, 3)}, tmp_path / "two.safetensors")
    images = write_images(tmp_path / "images", 20)
    for number in range(20):
        (images / f"again-{number}.png").write_bytes((images / f"{number}.png").read_bytes())
    vit = f"timm:{TIMM}(img_size=32,depth=1,pretrained=False)"
    for path, spec in (("two.safetensors", "tests.eugen.models:bert"), ("images", vit)):
        data = open_data(tmp_path / path, open_source(spec), batch=4, max_tokens=8, device="cpu")
        assert sum(part.examples for part in parts_of(data)) == 20


def parts_of(data):
    return data.calibration, data.validation, data.test


def test_verify_finds_what_has_moved(eugen_cli, inputs, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved.safetensors"
    assert compress(eugen_cli, CHAIN, inputs, out).exit_code == 0
    inputs.rename(moved)
    lost = eugen_cli("verify", out)
    assert lost.exit_code == 2 and "give their place with --data" in lost.stderr
    assert eugen_cli("verify", out, "--data", moved).exit_code == 0
    write_vectors(inputs, 299)
    other = eugen_cli("verify", out)
    assert other.exit_code == 2 and "another SHA-256" in other.stderr
    wrong = eugen_cli("verify", out, "tests.eugen.models:vit", "--data", moved)
    assert wrong.exit_code == 2 and "has other weights" in wrong.stderr


def test_verify_needs_a_folder_with_records(eugen_cli, tmp_path):
    nothing = eugen_cli("verify", tmp_path)
    assert nothing.exit_code == 2 and "holds no config.json" in nothing.stderr
    model = chain()
    plan = eugen.Plan({"0": eugen.PruneConfig(budget=0.5)})
    eugen.save(tmp_path / "out", eugen.replace(model, plan.blocks).model, plan)
    bare = eugen_cli("verify", tmp_path / "out")
    assert bare.exit_code == 2 and "no record of its quality" in bare.stderr


def test_the_tolerance_of_quality():
    recorded = {
        "kind": "classes",
        "cosine": 0.9,
        "top1_agreement": 0.8,
        "relative_error": 0.5,
        "examples": 100,
    }
    assert not measure.differences(recorded, recorded)
    near = recorded | {"cosine": 0.9085, "top1_agreement": 0.785, "relative_error": 0.4955}
    assert not measure.differences(recorded, near)
    far = recorded | {"cosine": 0.92, "top1_agreement": 0.77, "relative_error": 0.49, "kind": "features"}
    assert [line.split()[0] for line in measure.differences(recorded, far)] == [
        "kind",
        "cosine",
        "top1_agreement",
        "relative_error",
    ]
    assert measure.differences(recorded, recorded | {"cosine": float("nan")})
    assert "not measured any more" in measure.differences(recorded, {"kind": "classes", "examples": 100})[0]


def test_a_level_that_distils_never_sees_the_test_part(eugen_cli, inputs, tmp_path, monkeypatch):
    """With other test examples in the file, the same network comes out."""
    monkeypatch.setitem(eugen.LEVELS, "quick", eugen.Level("quick", 4, 2, distill_steps=5))
    assert compress(eugen_cli, CHAIN, inputs, tmp_path / "one").exit_code == 0
    config, _ = records(tmp_path / "one")
    assert config["work"]["distillation"]["validation_loss_before"] > 0
    source = open_source(CHAIN)
    data = open_data(inputs, source, batch=None, max_tokens=128, device="cpu")
    from safetensors.torch import load_file

    tensors = load_file(inputs)
    rows = [row for group in data.test.groups for row in group]
    assert len(rows) == 30
    tensors["x"][rows] += 100.0
    save_file(tensors, tmp_path / "other.safetensors")
    assert compress(eugen_cli, CHAIN, tmp_path / "other.safetensors", tmp_path / "two").exit_code == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert records(tmp_path / "two")[0]["quality"] != config["quality"]
