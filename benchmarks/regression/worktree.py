"""The base's code in a git worktree of its own, which is gone after the run whatever ends it."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import SOURCES

FOLDER = Path(".work", "regression")


class WrongReference(Exception):
    """A base that git does not know, or a project that is no clone. The message says what to do."""


@dataclass(frozen=True)
class Revision:
    """A name and the commit that it stood for; `dirty` where sources differ from that."""

    ref: str
    commit: str
    dirty: bool | None = None

    def said(self) -> dict[str, Any]:
        """As in the record."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def resolve(project: Path, ref: str) -> Revision:
    """The commit that a git reference stands for.

    Raises:
        WrongReference: git knows none of that name, or the project is no clone.
    """
    if _git(project, "rev-parse", "--git-dir").returncode:
        raise WrongReference(f"{project} is no git clone: a base is a commit, so run this inside one")
    found = _git(project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode:
        raise WrongReference(
            f"base {ref!r} is no commit of this clone: give a branch, tag or commit that `git log` knows, "
            "as main or v0.1.0 (a shallow clone has few: git fetch --unshallow)"
        )
    return Revision(ref, found.stdout.strip())


def candidate(project: Path) -> Revision:
    """The working tree: HEAD, and whether sources differ from it."""
    head = resolve(project, "HEAD")
    changes = _git(project, "status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    return Revision(head.ref, head.commit, dirty=changes.returncode != 0 or changes.stdout.strip() != "")


@contextmanager
def held(project: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the clone for one run: two at once would time each other. The kernel frees it at any end."""
    folder = project / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another regression run holds this clone: waiting until it ends")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def checked_out(project: Path, commit: str) -> Iterator[Path]:
    """The commit's files under `.work/regression/`, removed with the block. The clone must be held.

    Raises:
        WrongReference: git cannot check it out.
    """
    _prune(project)
    place = project / FOLDER / commit
    try:
        made = _git(project, "worktree", "add", "--detach", "--quiet", str(place), commit)
        if made.returncode:
            raise WrongReference(f"git cannot check out {commit} in {place}: {made.stderr.strip()}")
        yield place
    finally:
        _prune(project)


def _prune(project: Path) -> None:
    """Remove every worktree of this command; the clone is held, so what is there was left by a kill."""
    for place in (project / FOLDER).iterdir():
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
    _git(project, "worktree", "prune")


def _git(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=project, check=False, capture_output=True, text=True)
