"""Faults of params.yaml are told by key, value and what is allowed; profiles and dvc.yaml are sound."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eugen import layers
from eugen.local_training import rules
from stages.params import ParamsError
from stages.tasks import task_names
from stages.validate import check

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "params").glob("*.yaml"))
GOOD: dict[str, Any] = yaml.safe_load((ROOT / "params/cpu.yaml").read_text())
GOOD["methods"]["eugen"] = {"layer": "eugen", "order": 2}
LANGUAGE = "scratch.tasks.language"


def changed(place: str, value: Any) -> dict[str, Any]:
    """The default profile with another value at a dotted place."""
    params = copy.deepcopy(GOOD)
    *path, last = place.split(".")
    section = params
    for part in path:
        section = section[part]
    section[last] = value
    return params


def fault(folder: Path, params: dict[str, Any]) -> str:
    """What the check says of these parameters."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ParamsError) as error:
        check(folder / "params.yaml")
    return str(error.value)


V = "tasks.vision"
NAMES: list[Any] = ["../x", "/x", ".x", "-x", "a/b", "a b", "x;ls", "$(ls)", "`ls`", "<b>", "a\n", "", 7, "é"]
"""Names that would lead out of a folder, or that a shell would act on."""
FAULTS: list[tuple[str, Any, str]] = [
    ("extras", {"a": 1}, "extras = {'a': 1}: unknown key, allowed are profile, run, tasks, methods"),
    ("tasks.speech", {}, f"tasks.speech: unknown task, there is a file for {', '.join(task_names())}"),
    (f"{V}.prune", 1, f"{V}.prune = 1: unknown key, allowed are data, baseline, transfer, finetune, profile"),
    (f"{V}.transfer.seed", 3, f"{V}.transfer.seed = 3: unknown key, allowed are budgets, seeds, calibration"),
    (f"{V}.profile.tokens", 8, f"{V}.profile.tokens = 8: unknown key, allowed are batches, pairs"),
    (f"{V}.data", 7, f"{V}.data = 7: .*dictionary"),
    *(("methods", {name: {"layer": "eugen"}}, "methods: the name .* must be of letters") for name in NAMES),
    *(("scratch.rows", {name: {"layer": "eugen"}}, "scratch.rows: the name .* must be") for name in NAMES),
    *(("tasks", {name: {}}, "tasks: the name .* must be of letters") for name in NAMES),
    (f"{LANGUAGE}.variants", {"../x": {}}, f"{LANGUAGE}.variants: the name '../x' must be of letters"),
    ("tasks", {}, "tasks = {}: must be a mapping with at least one entry"),
    ("methods", ["eugen"], r"methods = \['eugen'\]: must be a mapping"),
    ("methods.eugen", "eugen", "methods.eugen = 'eugen': must be a mapping such as {layer: eugen"),
    (
        "methods.new",
        {"layer": "fast"},
        f"new.layer = 'fast': unknown layer, use one of {', '.join(layers())}",
    ),
    ("methods.new", {"layer": ["eugen"]}, r"methods.new.layer = \['eugen'\]: unknown layer"),
    ("methods.new", {"layer": "int8", "of": {"layer": "fast"}}, "new.of.layer = 'fast': unknown layer, use"),
    ("methods.new", {"layer": "int8", "of": "eugen"}, "new.of = 'eugen': must be a mapping such as {layer: "),
    (
        "methods.new",
        {"layer": "int8", "of": {"layer": "eugen", "degree": 2}},
        "new.of.degree = 2: unknown key",
    ),
    (
        "methods.new",
        {"layer": "int8", "of": {"layer": "eugen", "budget": 0.3}},
        "new.of.budget = 0.3: unknown",
    ),
    (
        "methods.new",
        {"layer": "bf16", "of": {"layer": "eugen", "order": "2"}},
        "new.of.order = '2': .*integer",
    ),
    ("methods.new", {"layer": "ffsplit", "heavy": 1.5}, "methods.new: heavy=1.5 must be in"),
    ("scratch", [], "scratch = ..: must be a mapping of rows and tasks"),
    ("scratch.rows.narrow.layer", "slim", "scratch.rows.narrow.layer = 'slim': unknown layer"),
    ("scratch.tasks.speech", {}, "scratch.tasks.speech: there is no such task under `tasks`, which has"),
    (f"{LANGUAGE}.learning_rates", [], f"{LANGUAGE}.learning_rates = .*at least 1"),
    (f"{LANGUAGE}.learning_rates", [1e-3, 1e-3], f"{LANGUAGE}.learning_rates = .*each value may occur once"),
    (f"{LANGUAGE}.variants.base.step", 3, f"{LANGUAGE}.variants.base.step = 3: unknown key, allowed are"),
    (f"{LANGUAGE}.variants.base.rows", ["slim"], f"{LANGUAGE}.variants.base.rows = 'slim': unknown row"),
    (f"{LANGUAGE}.variants.base.sizes", {"wide": 3}, "tasks.language.baseline.wide = 3: unknown key"),
    (f"{LANGUAGE}.variants.base.sizes", {"width": 7}, "width 7 must be a multiple of heads 3"),
    (f"{LANGUAGE}.variants.base.training", {"lr": 3}, "tasks.language.baseline.training.lr = 3: unknown key"),
    (
        "scratch.tasks",
        {"kernel": {**GOOD["scratch"]["tasks"]["language"], "variants": {"b": {"training": {"steps": 1}}}}},
        "scratch.tasks.kernel.variants.b.training: tasks.kernel.baseline has no training to change",
    ),
    ("methods.eugen.degree", 2, "methods.eugen.degree = 2: unknown key, allowed are .*order"),
    ("methods.eugen.budget", 0.2, "methods.eugen.budget = 0.2: unknown key"),
    ("methods.eugen.order", "two", "methods.eugen.order = 'two': .*valid integer"),
    ("methods.eugen.projection", "best", "methods.eugen: projection='best' .* use one of "),
    (
        "methods.new",
        {"layer": "dense", "training": "hebb"},
        f"new.training.rule = 'hebb': unknown rule, use one of {', '.join(rules())}",
    ),
    ("methods.new", {"layer": "dense", "training": 3}, "new.training = 3: must be a rule or a mapping such"),
    (
        "methods.new",
        {"layer": "dense", "training": {"rule": "mono_forward", "rate": 1}},
        "new.training.rate = 1: unknown key, allowed are learning_rate",
    ),
    (
        "methods.new",
        {"layer": "dense", "training": {"rule": "mono_forward", "learning_rate": "fast"}},
        "new.training.learning_rate = 'fast': .*valid number",
    ),
    (
        "methods.new",
        {"layer": "dense", "training": {"rule": "forward_projection", "passes": 0}},
        "methods.new.training: passes=0 must be",
    ),
    (
        "methods.new",
        {"layer": "auto", "target": "energy"},
        "new.target = 'energy': must be one of macs",
    ),
    ("methods.new", {"layer": "auto", "order": 2}, "methods.new.order = 2: unknown key"),
    ("scratch.rows.new", {"layer": "auto"}, "row 'new' chooses a layer for each block of a trained network"),
    (f"{V}.finetune.steps", "many", f"{V}.finetune.steps = 'many': .*valid integer"),
    (f"{V}.transfer.budgets", [0.3, 0.0], f"{V}.transfer.budgets.1 = 0.0: .*greater than 0"),
    (f"{V}.transfer.budgets", [1.5], f"{V}.transfer.budgets.0 = 1.5: .*less than or equal to 1"),
    (f"{V}.transfer.budgets", [math.nan], f"{V}.transfer.budgets.0 = nan: "),
    (f"{V}.transfer.seeds", [], rf"{V}.transfer.seeds = \[\]: .*at least 1 item"),
    (f"{V}.transfer.seeds", [0, -1], f"{V}.transfer.seeds.1 = -1: .*greater than or equal to 0"),
    (f"{V}.transfer.seeds", [0, 1, 0], rf"{V}.transfer.seeds = \[0, 1, 0\]: .*may occur once"),
    (f"{V}.baseline.width", -8, f"{V}.baseline.width = -8: .*greater than 0"),
    (f"{V}.finetune.learning_rates", [math.inf], f"{V}.finetune.learning_rates.0 = inf: .*finite"),
    (f"{V}.profile.precisions", ["int4"], f"{V}.profile.precisions.0 = 'int4': .*'bfloat16'.*'int8'"),
    (f"{V}.profile.precisions", ["int8", "int8"], f"{V}.profile.precisions = .*occur once"),
    (f"{V}.profile.precisions", [], f"{V}.profile.precisions = .*at least 1"),
    ("run.device", "gpu", "run.device = 'gpu': .*cpu.*cuda"),
    (
        f"{V}.finetune.budgets",
        [0.4],
        f"finetune.budgets = 0.4: not among {V}.transfer.budgets, allowed are 0.3",
    ),
    (f"{V}.finetune.seeds", [0, 3], f"finetune.seeds = 3: not among {V}.transfer.seeds, allowed are 0, 1, 2"),
]


@pytest.mark.parametrize(("place", "value", "message"), FAULTS, ids=lambda part: str(part)[:30])
def test_a_fault_is_told_by_key_value_and_what_is_allowed(tmp_path, place, value, message):
    said = fault(tmp_path, changed(place, value))
    assert re.search(message, said), said
    assert "\n" not in said


def test_rows_inside_rows_get_the_outer_budget(tmp_path):
    rows = {
        "quantised": {"layer": "int8", "of": {"layer": "eugen", "order": 3}},
        "twice": {"layer": "bf16", "of": {"layer": "ffsplit", "heavy": 0.2, "of": {"layer": "prune"}}},
        "plain": {"layer": "int8"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed("methods", GOOD["methods"] | rows)))
    methods = check(tmp_path / "params.yaml").methods
    known = layers()
    quantised, twice = methods["quantised"].config(0.3), methods["twice"].config(0.3)
    assert quantised == known["int8"](of=known["eugen"](order=3), budget=0.3)
    assert quantised.inner == known["eugen"](order=3, budget=0.3)
    assert twice.inner == known["ffsplit"](of=known["prune"](), heavy=0.2, budget=0.3)
    assert methods["quantised"].budgets([0.3, 0.5]) == [0.3, 0.5]
    assert methods["plain"].budgets([0.3, 0.5]) == [1.0]


def test_a_row_names_its_rule_with_or_without_hyperparameters(tmp_path):
    def row(training: Any) -> Any:
        params = changed("methods.new", {"layer": "narrow", "training": training})
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        return check(tmp_path / "params.yaml").method("new")

    plain = row("mono_forward")
    assert plain.training == rules()["mono_forward"]() and "training" not in plain.fields
    given = row({"rule": "mono_forward", "learning_rate": 0.5})
    assert given.section == {"layer": "narrow", "training": {"rule": "mono_forward", "learning_rate": 0.5}}
    assert plain.section == row({"rule": "mono_forward"}).section != given.section
    assert check(tmp_path / "params.yaml").method("narrow").section == {"layer": "narrow"}


@pytest.mark.parametrize("place", ["profile", "run", "tasks", "methods", "tasks.vision.data.test"])
def test_a_missing_key_is_named(tmp_path, place):
    params = copy.deepcopy(GOOD)
    *path, last = place.split(".")
    section = params
    for part in path:
        section = section[part]
    del section[last]
    assert fault(tmp_path, params) == f"{place} is missing"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: path.write_text("run: {device: cpu\ntasks: ["),
            "params.yaml is not valid YAML: .*line 2",
        ),
        (lambda path: path.write_bytes(b"\xff\xfe\x00run"), "params.yaml is not valid YAML"),
        (
            lambda path: path.write_text("- cpu\n"),
            "must hold the keys profile, run, tasks, methods and scratch",
        ),
        (lambda path: None, "params.yaml is missing: copy a profile, for example `cp params/cpu.yaml"),
    ],
    ids=["broken", "binary", "list", "absent"],
)
def test_a_file_that_holds_no_parameters(tmp_path, write: Callable[[Path], Any], message):
    write(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=message) as error:
        check(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value"), [("tasks.speech", {}), ("run.thread", 1)], ids=["a task's fault", "its own"]
)
def test_the_command_ends_with_2_and_one_line(tmp_path, place, value):
    said = fault(tmp_path, changed(place, value))
    done = subprocess.run(
        [sys.executable, "-m", "stages.validate"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"params.yaml: {said}\n")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_valid_and_names_itself(profile):
    params = check(profile)
    assert params.profile == profile.stem


def test_the_four_profiles_are_there_and_the_default_is_cpu():
    sizes = ["distance", "imagenet", "language", "radiance"]
    parts = ["distance", "embedding", "kernel", "language", "local", "radiance", "vision"]
    expected = {"cpu", "gpu", "smoke", "study", *(f"gpu_{size}" for size in sizes)}
    assert {path.stem for path in PROFILES} == expected | {f"study_{part}" for part in parts}

    def committed(name: str) -> bytes:  # `make bench PROFILE=…` rightly puts another one into the clone
        shown = subprocess.run(["git", "show", f":{name}"], cwd=ROOT, capture_output=True, check=True)
        return shown.stdout

    assert committed("params.yaml") == committed("params/cpu.yaml")
