"""Facts about the package, its pinned versions and the Makefile's set-up."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()
}
LIBRARY = [Requirement(text) for text in PROJECT["dependencies"]]
DIRECT = [item for group in (LIBRARY, *EXTRAS.values()) for item in group if item.name != "eugen"]
OTHER_NAMES = {
    "PIL": "pillow",
    "igl": "libigl",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_the_library_alone_needs_torch_only():
    assert [item.name for item in LIBRARY] == ["torch"]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda item: item.name)
def test_a_direct_dependency_has_a_floor_and_a_pin_that_satisfies_it(requirement):
    assert any(specifier.operator == ">=" for specifier in requirement.specifier), "no floor"
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_constraints_are_exact_versions_without_addresses():
    for name, version in PINS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), name
        assert re.fullmatch(r"[0-9][A-Za-z0-9.!]*", version), f"{name}=={version}: local or inexact"


def imported_modules(folder):
    """Top-level names of all modules that the Python files of a folder import, lazily or not."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"benchmarks", "eugen", "stages", "flows", "tests"}


@pytest.mark.parametrize("folder", ["benchmarks", "eugen", "stages", "flows", "tests"])
def test_everything_imported_is_a_declared_dependency(folder):
    suite = [item for extra in ("cli", "vision", "text", "scene", "suite") for item in EXTRAS[extra]]
    lazily = (
        EXTRAS["cli"] + EXTRAS["vision"] + EXTRAS["text"] + [Requirement("jaxtyping"), Requirement("triton")]
    )
    # benchmarks.crash looks for what the processes that it killed have left, router_control opens an encoder.
    allowed = {
        "benchmarks": [*LIBRARY, Requirement("psutil"), *EXTRAS["text"]],
        "eugen": LIBRARY + lazily,
        "tests": DIRECT + lazily,
    }.get(folder, LIBRARY + suite)
    declared = {canonicalize_name(item.name) for item in allowed}
    missing = {
        canonicalize_name(OTHER_NAMES.get(module, module)) for module in imported_modules(folder)
    } - declared
    assert missing == set(), f"{folder} imports what pyproject.toml does not declare"


@pytest.fixture
def clone(tmp_path):
    """A folder with the real Makefile, and a stand-in for Python that notes what it is asked to do."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    note = 'printf "%s|%s|%s%s%s\\n" "$*" "${PATH%%:*}" "$DO_NOT_TRACK" "$MLFLOW_DISABLE_TELEMETRY" '
    note += '"$PREFECT_SERVER_ANALYTICS_ENABLED" >> log'
    inner = f'#!/bin/sh\n{note}\ncase "$*" in "-m pip"*) [ ! -e pip-fails ];; esac\n'
    (tmp_path / "inner").write_text(inner)
    # Version checks reach a real interpreter; PRETEND is the version that it takes itself for.
    check = "import os, sys; sys.version_info = eval(os.environ['PRETEND']); exec(sys.argv.pop(1))"
    outer = f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{check}" "$2" "$3"\n{note}\n'
    outer += "mkdir -p .venv/bin && cp inner .venv/bin/python\n"
    (tmp_path / "outer").write_text(outer)
    for name in ("inner", "outer"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(clone, *words, version=(3, 11, 2)):
    """Run make with the stand-in; return its result and what Python was asked since the last time."""
    (clone / "log").unlink(missing_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    environment = clean | {"PRETEND": repr(version)}
    command = ["make", f"PYTHON={clone / 'outer'}", *words]
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    log = (clone / "log").read_text().splitlines() if (clone / "log").exists() else []
    return result, [line.split("|") for line in log]


def stamps(clone):
    return list(clone.glob(".venv/.stamp-*"))


PYTEST = "-m pytest -n 2 --dist loadfile"


def test_set_up_happens_once(clone):
    result, calls = make(clone, "test", "ARGS=-k one")
    assert result.returncode == 0, result.stderr
    asked = [call[0] for call in calls]
    assert asked[0] == "-m venv .venv" and asked[2] == f"{PYTEST} -k one" and len(asked) == 3
    assert "-c constraints.txt -e .[suite,dev]" in asked[1]
    result, calls = make(clone, "test")
    assert result.returncode == 0 and [call[0].strip() for call in calls] == [PYTEST]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_another_set_of_packages_is_installed_anew(clone, name):
    make(clone, "test")
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    _, calls = make(clone, "test")
    assert any(call[0].startswith("-m pip") for call in calls) and len(stamps(clone)) == 1


def test_an_interrupted_set_up_is_taken_up_again(clone):
    make(clone, "test")
    before = (clone / "constraints.txt").read_text()
    (clone / "constraints.txt").write_text(before + "# changed\n")
    (clone / "pip-fails").touch()
    result, calls = make(clone, "test")
    assert result.returncode != 0 and not any("pytest" in call[0] for call in calls)
    assert stamps(clone) == []
    # The half-installed packages may be of either set: going back must install as well.
    (clone / "constraints.txt").write_text(before)
    (clone / "pip-fails").unlink()
    result, calls = make(clone, "test")
    assert result.returncode == 0 and any(call[0].startswith("-m pip") for call in calls)


def test_an_old_python_is_refused_with_the_cure(clone):
    result, calls = make(clone, "bench", version=(3, 10, 9))
    assert result.returncode != 0 and calls == [] and not (clone / ".venv").exists()
    assert "Python 3.11 or newer is needed" in result.stderr and "is 3.10" in result.stderr
    assert "PYTHON=python3.12" in result.stderr


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], "-m flows.benchmark"),
        (["PROFILE=smoke"], "-m flows.benchmark --profile smoke"),
        (["ENGINE=dvc"], "-m flows.benchmark --engine dvc"),
        (["PROFILE=study", "ENGINE=prefect"], "-m flows.benchmark --profile study --engine prefect"),
    ],
)
def test_bench_passes_profile_and_engine_on(clone, words, asked):
    _, calls = make(clone, "bench", *words)
    assert " ".join(calls[-1][0].split()) == asked


def test_the_check_of_a_gpu_sets_nothing_up_and_takes_what_is_set_up(clone):
    result, calls = make(clone, "gpu-check", "ARGS=--quick")
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["-m benchmarks.gpu_check --quick"]
    assert not stamps(clone)
    shutil.copy(clone / "inner", clone / "outer")  # whatever runs now is .venv's or leaves no .venv
    (clone / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (clone / ".venv/bin/python").write_text("#!/bin/sh\necho own $* >> log\n")
    (clone / ".venv/bin/python").chmod(0o755)
    _, calls = make(clone, "gpu-check")
    assert [call[0].strip() for call in calls] == ["own -m benchmarks.gpu_check"]


def test_commands_find_the_projects_python_and_send_no_telemetry(clone):
    _, calls = make(clone, "bench")
    assert calls[-1][1:] == [str(clone / ".venv/bin"), "1truefalse"]


def test_dvc_sends_no_telemetry():
    config = configparser.ConfigParser()
    config.read_string("\n".join(line.strip() for line in (ROOT / ".dvc/config").read_text().splitlines()))
    assert dict(config["core"]) == {"analytics": "false", "check_update": "false"}


def test_git_ignores_what_a_run_makes_and_nothing_else(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    made = "data/vision/x artifacts/x results/cells/x.json .work/x mlflow.db mlflow.db-wal mlartifacts/1/x"
    made += " .venv/x reports/report.html reports/results.csv reports/figures/x.svg stages/__pycache__/x.pyc"
    kept = "dvc.lock params.yaml reports/records/vision/eugen.json reports/ledger.md reports/template.html"
    kept += " stages/data/fetch.py tests/data/test_fetch.py params/cpu.yaml"
    paths = made.split() + kept.split()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(paths), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.stdout.split() == made.split()


def test_the_check_of_a_commit_is_runnable():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
