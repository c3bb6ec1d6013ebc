"""A clone made ready for a run: one benchmark at a time, the wanted parameters, checked before any work."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from flows.dvc.repair import Say, remove_parts


class WrongParameters(Exception):
    """The parameters do not allow a run. The message says which and how to put it right."""


class Busy(Exception):
    """Another process works in the clone. The message says which."""


def own_clone(project: str | None = None) -> Path:
    """The clone to work in: the one that is named, EUGEN_CLONE, or the one of this code."""
    return Path(project or os.environ.get("EUGEN_CLONE") or Path(__file__).parents[1]).resolve()


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` whole or not at all: a temporary file beside `path`, then a rename.

    Its name tells the process, as those of the stages do, so that `remove_parts` knows it after a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


_held = threading.local()
"""The clones that this thread holds."""


@contextmanager
def held(project: Path, say: Say, *, wait: bool = True) -> Iterator[bool]:
    """Hold the clone for one benchmark; another is waited for, and named. Raises `Busy` without `wait`.

    If the last one was killed, its name is still there, and its drafts are removed. Gives whether one was
    killed whose flow run nobody has closed yet (`killed_mark`). Within another `held` of the same thread it
    does nothing.
    """
    if str(project) in _held.__dict__:
        yield killed_mark(project).exists()
        return
    owner = project / ".work" / "bench.owner.json"
    owner.parent.mkdir(exist_ok=True)
    lock = FileLock(project / ".work" / "bench.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Busy(f"another benchmark holds {project} ({_describe(owner)})") from None
        say(f"another benchmark holds this clone ({_describe(owner)}): waiting until it ends")
        lock.acquire()
    try:
        if owner.exists():
            killed_mark(project).touch()
            say(f"the last benchmark of this clone was killed ({_describe(owner)}): going on where it was")
        remove_parts(project, say)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"pid": os.getpid(), "since": since, "command": shlex.join(sys.argv)}
        write_whole(owner, json.dumps(entry).encode())
        _held.__dict__[str(project)] = True
        yield killed_mark(project).exists()
    finally:
        _held.__dict__.pop(str(project), None)
        owner.unlink(missing_ok=True)
        lock.release()


def killed_mark(project: Path) -> Path:
    """The file that stays until the flow runs of killed processes are closed on the Prefect server."""
    return project / ".work" / "killed"


def _describe(owner: Path) -> str:
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {found['pid']} since {found['since']}: {found['command']}"
    except (OSError, ValueError, KeyError):
        return "it has not said who it is yet"


def choose_profile(project: Path, name: str, say: Say) -> None:
    """Copy `params/<name>.yaml` to `params.yaml`, unless that would lose somebody's own edits.

    Raises `WrongParameters` for an unknown profile and for a `params.yaml` that is kept nowhere else.
    """
    profiles = {path.stem: path.read_bytes() for path in sorted((project / "params").glob("*.yaml"))}
    if name not in profiles:
        raise WrongParameters(f"profile: {name!r} is not one of {', '.join(profiles)} (the files of params/)")
    if place_parameters(project, profiles[name], f"params/{name}.yaml"):
        say(f"params.yaml is now the profile {name} (params/{name}.yaml)")


def place_parameters(project: Path, wanted: bytes, source: str) -> bool:
    """Make `wanted` the content of `params.yaml`; whether it was another. `source` says where it comes from.

    Raises `WrongParameters` for a `params.yaml` that is kept nowhere else.
    """
    target, mark = project / "params.yaml", project / ".work" / "params.sha256"
    present = target.read_bytes() if target.exists() else None
    if present == wanted:
        write_whole(mark, _digest(wanted).encode())  # it is kept elsewhere, so it may be replaced later
        return False
    profiles = (path.read_bytes() for path in (project / "params").glob("*.yaml"))
    known = {*profiles, None, git(project, "show", "HEAD:./params.yaml")}
    placed = mark.read_text() if mark.exists() else ""
    if present not in known and _digest(present or b"") != placed:
        raise WrongParameters(
            f"params.yaml holds edits of your own that {source} would overwrite. Keep them as a "
            "profile (cp params.yaml params/mine.yaml), drop them (git checkout params.yaml), or run them "
            "as they are (without a profile)."
        )
    write_whole(target, wanted)
    write_whole(mark, _digest(wanted).encode())
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git(project: Path, *arguments: str) -> bytes | None:
    """What git answers in the clone, None if it refuses, as outside a repository."""
    told = subprocess.run(["git", *arguments], cwd=project, capture_output=True, check=False)
    return told.stdout if told.returncode == 0 else None


def changed_sources(project: Path) -> str:
    """What git finds changed, and not committed, of the code that computes; empty if nothing is."""
    changed = git(project, "status", "--porcelain", "--", "eugen", "stages", "flows", "dvc.yaml")
    return changed.decode().rstrip() if changed else ""


def commit(project: Path) -> str | None:
    """The commit that the clone is at, None without one."""
    told = git(project, "rev-parse", "HEAD")
    return None if told is None else told.decode().strip()


def check_parameters(project: Path) -> None:
    """Run `python -m stages.validate`, where the project has it; raise `WrongParameters` with its message."""
    if not (project / "stages" / "validate.py").exists():
        return
    command = [sys.executable, "-m", "stages.validate"]
    checked = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    message = (checked.stderr.strip() or checked.stdout.strip()) or "python -m stages.validate gave no reason"
    if checked.returncode == 2:
        raise WrongParameters(message)
    if checked.returncode:
        raise RuntimeError(f"the check of params.yaml itself failed (code {checked.returncode}): {message}")
