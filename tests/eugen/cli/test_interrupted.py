"""Ctrl-C keeps finished blocks; the same command goes on from there, another one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eugen import LEVELS, FittedBlock, Plan, PruneConfig, Target
from eugen.cli import compressing
from eugen.cli.compressing import Request
from eugen.cli.data import open_data
from eugen.cli.partial import FinishedBlocks, key_of, partial_root
from eugen.cli.sources import Source
from tests.eugen.models import spread

ROOT = Path(__file__).resolve().parents[3]
VIT = "tests.eugen.models:vit(depth=4)"


@pytest.fixture
def pictures(tmp_path):
    path = tmp_path / "pictures.safetensors"
    save_file({"x": torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(4))}, path)
    return path


def words(data, out, *more, level="quick"):
    common = ("--budget", 0.5, "--row", "prune", "--level", level, "--out", out, *more)
    return [str(word) for word in ("compress", VIT, "--data", data, *common)]


def interrupt_after(monkeypatch, blocks):
    """The next compression is interrupted once so many blocks are finished."""
    put = FinishedBlocks.__setitem__

    def and_stop(self, name, block):
        put(self, name, block)
        if len(self) == blocks:
            raise KeyboardInterrupt

    monkeypatch.setattr(FinishedBlocks, "__setitem__", and_stop)
    return lambda: monkeypatch.setattr(FinishedBlocks, "__setitem__", put)


def test_a_rerun_goes_on_and_gives_the_same_model(eugen_cli, pictures, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert eugen_cli(*words(pictures, whole)).exit_code == 0
    restore = interrupt_after(monkeypatch, 3)
    stopped = eugen_cli(*words(pictures, out))
    assert stopped.exit_code == 130 and not out.exists()
    assert f"3 finished blocks are kept in {partial_root(out)}" in stopped.stderr
    restore()
    resumed = eugen_cli(*words(pictures, out))
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming: 3 of 4 blocks were finished before" in resumed.stderr
    assert sum(line.startswith("block ") for line in resumed.stderr.splitlines()) == 1
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not partial_root(out).exists()


@pytest.mark.parametrize("more", [("--seed", 1), ("--batch", 7), ("--budget", 0.4), ("--row", "linear")])
def test_other_settings_do_not_take_them(eugen_cli, pictures, tmp_path, monkeypatch, more):
    restore = interrupt_after(monkeypatch, 1)
    assert eugen_cli(*words(pictures, tmp_path / "out")).exit_code == 130
    restore()
    other = eugen_cli(*words(pictures, tmp_path / "out", *more))
    assert other.exit_code == 0, other.stderr
    assert "resuming" not in other.stderr
    assert sum(line.startswith("block ") for line in other.stderr.splitlines()) == 4


def activated(act):
    """A model whose code has changed, but not its name or its weights."""
    return spread(nn.Sequential(nn.Linear(12, 40), act(), nn.Linear(40, 12))).eval()


def test_another_model_of_the_same_weights_does_not_take_them(inputs):
    def settings(act):
        source = Source("models:chain", "function", activated(act), None, "")
        data = open_data(inputs, source, batch=None, max_tokens=8, device="cpu")
        asked = Request(
            source=source.spec,
            data=inputs,
            target=Target(macs=0.5),
            row=PruneConfig(),
            level=LEVELS["quick"],
            out=inputs.parent / "out",
            weights=None,
            seed=0,
            device="cpu",
            batch=None,
            max_tokens=8,
        )
        return asked.settings(source, data)

    gelu, relu = settings(nn.GELU), settings(nn.ReLU)
    assert gelu["weights_sha256"] == relu["weights_sha256"]
    assert key_of(gelu) != key_of(relu) and key_of(gelu) == key_of(settings(nn.GELU))


def test_a_plan_once_chosen_is_kept(eugen_cli, pictures, tmp_path, monkeypatch):
    """A choice by measurement would come out otherwise the next time."""
    restore = interrupt_after(monkeypatch, 1)
    assert eugen_cli(*words(pictures, tmp_path / "out")).exit_code == 130
    restore()

    def chosen_again(*_, **__):
        raise AssertionError("the plan was there")

    monkeypatch.setattr(compressing, "plan_for", chosen_again)
    assert eugen_cli(*words(pictures, tmp_path / "out")).exit_code == 0


def test_the_key_sees_every_setting_and_the_code(monkeypatch, tmp_path):
    from eugen.cli import partial

    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
    (tmp_path / "layer.py").write_text("one")
    monkeypatch.setattr(partial, "SOURCE", tmp_path)
    before = key_of({})
    (tmp_path / "layer.py").write_text("two")
    assert key_of({}) != before


def test_blocks_are_kept_on_disk_whole_or_not_at_all(tmp_path):
    kept = FinishedBlocks(tmp_path / "key")
    assert len(kept) == 0 and kept.read_plan() is None
    state = {"up.weight": torch.randn(4, 3)[:, :2], "scale": torch.arange(3, dtype=torch.int8)}
    kept["a.b"], kept[""] = FittedBlock(state, 0.5), FittedBlock({"x": torch.ones(1)}, None)
    again = FinishedBlocks(tmp_path / "key")
    assert set(again) == {"a.b", ""} and again["a.b"].fit_r2 == 0.5 and again[""].fit_r2 is None
    assert all(torch.equal(again["a.b"].state[name], tensor) for name, tensor in state.items())
    for path in (tmp_path / "key").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(again) == 0 and "a.b" not in again
    kept["a.b"] = FittedBlock(state, 0.5)
    del again["a.b"]
    assert "a.b" not in kept
    with pytest.raises(KeyError):
        del again["a.b"]
    plan = Plan({"a.b": PruneConfig(budget=0.5)}, {"figure": 1})
    kept.write_plan(plan)
    assert again.read_plan() == plan


# A shell that starts the tests in the background makes them ignore the signal; children inherit that.
MAIN = """
import signal, eugen.cli
signal.signal(signal.SIGINT, signal.default_int_handler)
eugen.cli.main()
"""


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_process_is_interrupted_and_goes_on(pictures, tmp_path):
    arguments = words(pictures, tmp_path / "out", level="fast")
    first = start(arguments)
    try:
        for line in first.stderr:
            if line.startswith("block 2/"):
                break
        first.send_signal(signal.SIGINT)
        said = first.stderr.read()
        assert first.wait(timeout=60) == 130
    finally:
        first.kill()
        first.wait()
    assert "finished blocks are kept" in said and said.strip().endswith("interrupted")
    assert not (tmp_path / "out").exists()
    second = start(arguments)
    out, said = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert "resuming: " in said and "written to" in out
    assert (tmp_path / "out" / "model.safetensors").is_file()
