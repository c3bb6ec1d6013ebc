"""The control of conditional EUGens: gates by input, by token, by chance, and none."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import router_control
from eugen import EUGenExpertsConfig
from tests.eugen.blocks import block, tokens
from tests.eugen.cli.conftest import write_bert, write_text


def test_each_block_is_compared_under_all_gates(tmp_path, capsys):
    folder = write_bert(tmp_path / "bert")
    data, other = write_text(tmp_path / "some.txt", 120), write_text(tmp_path / "other.txt", 40)
    words = [str(folder), "--data", str(data), "--other", str(other), "--budget", "0.5"]
    assert router_control.main([*words, "--out", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    gates = ["nearest centre", "none", "token id", "token id at random"]
    assert [result["gate"] for result in record["results"]] == gates * 2
    assert record["settings"]["other"] == "other.txt" and str(tmp_path) not in json.dumps(record)
    for mean in record["means"]:
        own = [r["r2"]["other text"] for r in record["results"] if r["gate"] == mean["gate"]]
        assert mean["r2"]["other text"] == pytest.approx(sum(own) / 2)
    assert "nearest centre" in capsys.readouterr().out


def chunks(labels: int):
    """Inputs and their token ids, which have nothing to do with them."""
    x = tokens(1200, 12)
    ids = torch.arange(1200) % labels
    return [(x[i : i + 300], ids[i : i + 300]) for i in range(0, 1200, 300)]


def test_labelled_inputs_go_to_the_expert_of_their_label():
    dense, experts = block(12, 48), 4
    part = chunks(experts)
    labelled = router_control.with_labels(dense, part, lambda ids: ids % experts, experts)
    config = EUGenExpertsConfig(experts=experts, shared=8, width=6)
    wide = router_control.widened(dense, experts)
    layer = config.fit(wide, labelled, generator=torch.Generator().manual_seed(0))
    expert = torch.cat([layer.route(x)[0].flatten() for x, _, _ in labelled])
    label = torch.cat([ids for _, ids in part]) % experts
    pairs = {(int(e), int(i)) for e, i in zip(expert, label, strict=True)}
    assert len(pairs) == experts  # each label has an expert of its own
    for (x, y, _), (narrow, _) in zip(labelled, part, strict=True):
        assert torch.equal(y, dense(narrow)) and torch.allclose(wide(x), y, atol=1e-6)


def test_ids_get_the_expert_of_most_of_their_inputs_and_others_any():
    x, ids = torch.tensor([[0.0], [1.0], [1.0], [2.0]]), torch.tensor([7, 7, 7, 9])
    found = router_control.by_majority(lambda v: (v.long(), None), [(x, ids)], 3)
    assert int(found[7]) == 1 and int(found[9]) == 2
    spread = router_control.by_chance(torch.arange(3000), 3).bincount()
    assert len(spread) == 3 and spread.min() > 900


def test_too_few_lines_are_said(tmp_path):
    folder = write_bert(tmp_path / "bert")
    (tmp_path / "few.txt").write_text("w1 w2\nw1 w2\n")
    with pytest.raises(SystemExit, match="holds 1 different lines: give at least 5"):
        router_control.main([str(folder), "--data", str(tmp_path / "few.txt")])
