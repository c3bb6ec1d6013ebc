"""Nothing that we ship unpickles, evaluates or hands text to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("eugen", "stages", "flows", "benchmarks")
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *("pandas.read_pickle", "sklearn.externals.joblib.load", "numpy.core.multiarray.fromstring"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all")),
}
METHODS = {"read_pickle", "to_pickle", "extractall"}
"""Of any object."""


def names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, as a dotted path."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def path_of(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted path of what is called, its first name as it was imported; empty if it is no name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        head = path_of(node.value, known)
        return f"{head}.{node.attr}" if head else f"?.{node.attr}"
    return ""


def says(call: ast.Call, keyword: str) -> object:
    """The constant that a call gives for a keyword; None if it gives none, ... if it is no constant."""
    for given in call.keywords:
        if given.arg == keyword:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
        if given.arg is None:
            return ...
    return None


def unsafe(source: str) -> Iterator[str]:
    """Every unsafe import and call of a source, with its line."""
    tree = ast.parse(source)
    known = names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from (f"{node.lineno}: import {name}" for name in modules if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        path = path_of(node.func, known)
        wrong = (
            path in CALLS
            or path.rpartition(".")[2] in METHODS
            or (path == "torch.load" and says(node, "weights_only") is not True)
            or (path == "numpy.load" and says(node, "allow_pickle") not in (None, False))
            or says(node, "shell") not in (None, False, ...)
            or (path.startswith("subprocess.") and says(node, "shell") not in (None, False))
        )
        if wrong:
            yield f"{node.lineno}: {path}"


def test_nothing_unsafe_is_called():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in unsafe(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=False)",
        "from torch import load as read\nread('x', weights_only=flag)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', **options)",
        "import pandas\npandas.read_pickle('x')",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from subprocess import run\nrun('ls', shell=flag)",
        "import tarfile\ntarfile.open('x').extractall()",
    ],
)
def test_the_scan_sees(source: str):
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x')",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "import subprocess\nsubprocess.run(['ls'])",
        "import json\njson.load(file)",
    ],
)
def test_the_scan_lets_pass(source: str):
    assert not list(unsafe(source))
