"""The benchmark of compiled EUGen at toy sizes, and the verdict from intervals given. No time is judged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from benchmarks import compiled
from benchmarks.compiled import COMPOSED, DENSE, MODES, verdict
from benchmarks.layers import Condition
from eugen import EUGenConfig
from tests.eugen.blocks import block, generator, tokens
from tests.tolerances import assert_close

FAST, SAME, SLOW, UNSURE = (1.12, 1.3), (0.97, 1.04), (0.6, 0.7), (0.95, 1.2)
FIRST, SECOND, THIRD = MODES


def result(form: str, d: int, interval: tuple[float, float], *, base: str = COMPOSED, count: int = 1) -> dict:
    low, high = interval
    found = {"form": form, "base": base, "tokens": count, "d": d, "dtype": "float32", "status": "timed"}
    return found | {"speedup": (low * high) ** 0.5, "low": low, "high": high}


def results(control=SAME, **modes: list[tuple[float, float]]) -> list[dict]:
    """At two widths; `a`, `b` and `c` are the modes in turn."""
    found = [result(COMPOSED, d, control) for d in (384, 768)]
    found += [result(FIRST, 128, FAST, count=128), result(FIRST, 384, FAST, base=DENSE)]
    for mode, letter in zip(MODES, "abc", strict=True):
        found += [result(mode, d, i) for d, i in zip((384, 768), modes.get(letter, [SLOW] * 2), strict=True)]
    return found


@pytest.mark.parametrize(
    ("found", "answer", "words"),
    [
        (results(a=[FAST, FAST]), "yes", f"best is '{FIRST}'"),
        (results(c=[FAST, FAST], a=[FAST, SLOW]), "yes", f"best is '{THIRD}'"),
        (results(a=[FAST, SAME]), "no", ""),
        (results(a=[FAST, SLOW], b=[SLOW, FAST]), "no", ""),
        (results(b=[UNSURE, UNSURE]), "no", "an interval still reaches it"),
        (results(), "no", "0.65 [0.60, 0.70] at d=384 float32"),
        (results(a=[FAST, FAST], control=FAST), "void", "beside its own copy"),
        ([result(FIRST, 384, FAST, count=128)], "void", "nothing was measured at one token"),
        (results()[:2], "void", "no compiled form"),
    ],
)
def test_yes_takes_one_mode_whose_intervals_lie_above_at_every_width(found, answer, words):
    said = verdict(found)
    assert said["answer"] == answer
    assert words in said["why"]
    assert ("still reaches" in said["why"]) is (words == "an interval still reaches it")


def test_a_mode_that_failed_at_one_width_says_nothing():
    found = results(a=[FAST, FAST])
    broken = next(r for r in found if (r["form"], r["d"], r["tokens"]) == (FIRST, 768, 1))
    broken |= {"status": "failed", "reason": "no compiler"}
    assert verdict(found)["answer"] == "no"


def test_compiled_copies_are_the_layer():
    dense, x = block(), tokens(1)
    layer = EUGenConfig(budget=0.3).build(dense, generator=generator()).eval().merged()
    make = compiled.compiled(layer, x, {"backend": "aot_eager"})
    with torch.no_grad():
        calls = [make() for _ in range(12)]  # more than torch compiles of one module without a reset
        for call in calls[-2:]:
            assert_close(call(), layer.reference(x), precision=torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_one_run_records_every_form_beside_both_bases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compiled, "MODES", {FIRST: MODES[FIRST]})
    out = tmp_path / "compiled.json"
    arguments = ["--shapes", "1x32,5x32", "--seconds", "0", "--placements", "3", "--threads", "1"]
    assert compiled.main([*arguments, "--out", str(out)]) == 0
    record, page = json.loads(out.read_text()), capsys.readouterr().out
    assert out.with_suffix(".md").read_text() in page
    assert f"**≥ 10 % faster at batch 1: {record['verdict']['answer']}**" in page
    places = [(r["tokens"], r["form"], r["base"]) for r in record["results"]]
    assert places == [
        (t, form, base) for t in (1, 5) for form in (COMPOSED, FIRST) for base in (COMPOSED, DENSE)
    ]
    for found in record["results"]:
        assert 0 < found["low"] <= found["speedup"] <= found["high"]
        assert found["check_error"] <= 1e-5
    # The control and the mode, at one condition of one token.
    assert record["settings"]["confidence"] == pytest.approx(1 - 0.05 / 2)


def test_a_wrong_result_is_not_timed(monkeypatch):
    def wrong(layer, x, options):
        return lambda: lambda: layer(x) * (1 + 1e-3)

    monkeypatch.setattr(compiled, "compiled", wrong)
    monkeypatch.setattr(compiled, "MODES", {FIRST: {}})
    found = compiled.measure(Condition(1, 32, "float32", "cpu"), 0.3, 0, 3, 0.95)
    bad = [r for r in found if r["form"] == FIRST]
    assert [r["status"] for r in bad] == ["failed"] and "not timed" in bad[0]["reason"]
    assert [r["status"] for r in found if r["form"] == COMPOSED] == ["timed", "timed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--placements", "2"], "--placements 2 must be at least 3"),
        (["--dtype", "float8"], "--dtype float8 is unknown"),
        (["--budget", "0"], "--budget 0.0 must be in"),
    ],
)
def test_wrong_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        compiled.main(arguments)
    assert words in capsys.readouterr().err
