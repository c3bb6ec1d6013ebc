"""`eugen inspect`, `eugen layers`, and the numbers and lines that people read."""

from __future__ import annotations

import re

import pytest

import eugen
from eugen.cli.progress import Progress, duration
from eugen.cli.tables import aligned, amount, markdown
from eugen.cost import count_macs
from tests.eugen.models import images, vit


def test_inspect_tells_blocks_shares_and_bounds(eugen_cli):
    found = eugen_cli("inspect", "tests.eugen.models:vit", "--example", "3x16x16")
    assert found.exit_code == 0, found.stderr
    model = vit().eval()
    x = images(1, 1)[0]
    whole = count_macs(lambda: model(x))
    dense = eugen.find_ffns(model)
    ffn = sum(site.dense.macs_per_token for site in dense) * 5
    for site in dense:
        [line] = [line for line in found.stdout.splitlines() if line.startswith(site.name)]
        assert "32 → 128 → 32" in line and line.endswith(f"{ffn / 2 / whole:.1%}")
    bounds = re.findall(r"→ ([\d.]+)×", found.stdout)
    assert bounds == [f"{whole / (whole - (1 - budget) * ffn):.2f}" for budget in (0.1, 0.3, 0.5)]


def test_inspect_tells_what_budgets_buy(eugen_cli):
    found = eugen_cli("inspect", "tests.eugen.models:vit", "--example", "3x16x16")
    lines = {line.split()[0]: line for line in found.stdout.splitlines() if line.strip()}
    sizes = [eugen.replace(vit(), eugen.PruneConfig(budget=b)).sites[0] for b in (0.1, 0.3, 0.5)]
    for site in sizes:
        assert f" {site.layer.num_features} ({site.params_ratio:.0%})" in lines["prune"]
    assert "least 0.125" in lines["linear"]
    assert "bf16" not in lines  # it has one budget


@pytest.mark.parametrize(
    "source", ["timm:vit_tiny_patch16_224(img_size=32,depth=1)", "tests.eugen.models:chain"]
)
def test_models_that_tell_their_inputs_need_no_example(eugen_cli, source):
    found = eugen_cli("inspect", source)
    assert found.exit_code == 0, found.stderr
    assert "1 block:" in found.stdout


def test_a_block_in_two_places_counts_twice(eugen_cli):
    found = eugen_cli("inspect", "tests.eugen.search.networks:Twice")
    assert found.exit_code == 0, found.stderr
    assert "1 block: 100% of" in found.stdout


def test_a_folder_needs_no_weights(eugen_cli, bert_folder):
    (bert_folder / "model.safetensors").unlink()
    found = eugen_cli("inspect", f"hf:{bert_folder}")
    assert found.exit_code == 0, found.stderr
    assert "2 blocks" in found.stdout and "int64 [1, 128]" in found.stdout


def test_inspect_says_what_it_lacks(eugen_cli):
    wrong = eugen_cli("inspect", "tests.eugen.models:vit", "--example", "3x20x20")
    assert wrong.exit_code == 2 and "float32 [1, 3, 20, 20] does not fit" in wrong.stderr
    no_shape = eugen_cli("inspect", "tests.eugen.models:vit", "--example", "3xa")
    assert no_shape.exit_code == 2 and "--example '3xa' must be a shape" in no_shape.stderr
    unknown = eugen_cli("inspect", "tests.eugen.models:vit")
    assert unknown.exit_code == 2 and "give --example" in unknown.stderr


def test_layers_lists_every_row(eugen_cli):
    found = eugen_cli("layers")
    assert found.exit_code == 0
    rows = {line.split()[0]: line.split()[1] for line in found.stdout.splitlines() if len(line.split()) > 2}
    assert set(eugen.layers()) <= set(rows)
    assert (rows["prune"], rows["low_rank"]) == ("yes", "no")


def test_the_time_left_is_that_of_the_blocks_not_yet_done(capsys):
    now = iter([0.0, 0.0, 10.0, 20.0, 50.0])
    lines = Progress(resumed=1, total=4, clock=lambda: next(now))
    lines("calibration: 10 tokens")
    for number in (2, 3, 4):
        lines(f"block {number}/4 name: held-out R² 0.9")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "calibration: 10 tokens"
    assert said[1].endswith("0.9; about 0 s left") and said[2].endswith("; about 5 s left")
    assert said[3].endswith("0.9")


def test_times_and_amounts_as_people_read_them():
    assert [duration(s) for s in (7.6, 61, 7500)] == ["8 s", "1 min 1 s", "2 h 5 min"]
    numbers = (0, 512, 999, 1000, 1536, 999_600, 1_179_648, 22_713_216, 1.43e9)
    wanted = ["0", "512", "999", "1.00 k", "1.54 k", "1.00 M", "1.18 M", "22.7 M", "1.43 G"]
    assert [amount(n) for n in numbers] == wanted


def test_tables():
    rows = [["a", "number"], ["long name", "1"]]
    assert aligned(rows).splitlines() == ["a          number", "─────────────────", "long name       1"]
    assert markdown(rows).splitlines() == ["| a | number |", "| --- | --- |", "| long name | 1 |"]
