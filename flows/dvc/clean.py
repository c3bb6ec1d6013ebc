"""What long use leaves behind: old runs in MLflow, old objects in DVC's cache, leftovers of killed runs.

python -m flows.dvc.clean --older 30d [--apply]

Without `--apply` it only says what would go. DVC's part keeps what the present `dvc.lock` needs, and what a
record of a younger run needs; MLflow's part (`python -m stages.tracking.clean`) keeps what is registered.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from filelock import FileLock, Timeout

from flows.dvc.repair import Say, wait_for_other_dvc

UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
LEFTOVERS = (
    ".work/progress/*",
    ".work/traces/*",
    ".work/outbox/.*",
    ".work/*.broken",
    ".work/*.draft*",
    "mlflow.db.draft*",
    "data/.downloads/.fetching-*",
)
"""What killed runs and profiled ones leave; nothing reads it once it is old."""


class CannotClean(RuntimeError):
    """Cleaning now could destroy something. The message says what and what to do."""


class SharedCache(CannotClean):
    """DVC's cache lies outside the clone: other clones may need what is in it."""


@dataclass
class Waste:
    """What may go: files and folders of one kind."""

    kind: str
    paths: list[Path] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What they occupy."""
        return sum(file.lstat().st_size for path in self.paths for file in _files(path))

    def remove(self) -> None:
        """Delete them; one that is gone already is no fault."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def seconds(older: str) -> int:
    """Seconds of an age such as `30d`. ValueError names what is allowed."""
    match = re.fullmatch(r"(\d+)([hdw])", older)
    if match is None:
        raise ValueError(f"--older {older!r}: must be a number and h, d or w, for example 30d")
    return int(match[1]) * UNITS_S[match[2]]


def find(project: Path, before: float, say: Say = print) -> list[Waste]:
    """What is older than `before` (Unix seconds) and needed by nothing younger, nor by `dvc.lock`.

    `say` is told of a cache outside the project, which stays as it is. Raises `CannotClean` for a `dvc.lock`
    that cannot be read.
    """
    try:
        found = _of_dvc(project, before)
    except SharedCache as why:
        say(str(why))
        found = []
    left = [path for pattern in LEFTOVERS for path in sorted(project.glob(pattern)) if _newest(path) < before]
    return [*found, Waste("leftovers of runs", left)]


def _of_dvc(project: Path, before: float) -> list[Waste]:
    cache = _cache(project)
    needed = set(_hashes(_locked_stages(project)))
    old: list[Path] = []
    for entry in sorted((cache / "runs").glob("*/*/*")):
        stage = _read(entry)
        outs = set(_hashes([stage])) if stage else set()
        if entry.stat().st_mtime < before and not (outs and outs <= needed):
            old.append(entry)
        else:
            needed |= outs
    needed |= {name for digest in list(needed) for name in _inside(cache, digest)}
    objects = [
        path
        for path in sorted((cache / "files" / "md5").glob("*/*"))
        if path.parent.name + path.name not in needed and path.stat().st_mtime < before
    ]
    return [
        Waste("records of past runs in DVC's cache", old),
        Waste("objects in DVC's cache", objects),
    ]


def _cache(project: Path) -> Path:
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    told = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if told.returncode:
        raise CannotClean(f"dvc cache dir: {told.stderr.strip()}")
    cache = (project / told.stdout.strip()).resolve()
    if not cache.is_relative_to(project.resolve()):
        raise SharedCache(
            f"DVC's cache {cache} lies outside this clone and others may need what it holds: left as it is; "
            "use `dvc gc` with --projects there"
        )
    return cache


def _locked_stages(project: Path) -> list[dict[str, Any]]:
    """The stages of the present `dvc.lock`."""
    path = project / "dvc.lock"
    if not path.exists():
        return []
    lock = _read(path)
    if not isinstance(lock, dict) or not isinstance(lock.get("stages"), dict):
        raise CannotClean("dvc.lock cannot be read: run `make bench`, which mends it, and clean afterwards")
    return list(lock["stages"].values())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _hashes(stages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The digests of all outputs."""
    return (out["md5"] for stage in stages for out in stage.get("outs", []) if "md5" in out)


def _inside(cache: Path, digest: str) -> Iterator[str]:
    """The digests of a folder's files; none for a file."""
    if digest.endswith(".dir"):
        listing = cache / "files" / "md5" / digest[:2] / digest[2:]
        if listing.exists():
            yield from (entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8")))


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        yield from (file for file in path.rglob("*") if file.is_symlink() or file.is_file())
    elif path.is_symlink() or path.exists():
        yield path


def _newest(path: Path) -> float:
    """When something was last changed in there (Unix seconds)."""
    return max([path.lstat().st_mtime, *(file.lstat().st_mtime for file in _files(path))])


@contextmanager
def _alone(project: Path) -> Iterator[None]:
    """Hold the clone; `CannotClean` while a benchmark has it."""
    (project / ".work").mkdir(exist_ok=True)
    lock = FileLock(project / ".work" / "bench.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CannotClean("a benchmark works in this clone: clean when it has ended") from None
    try:
        wait_for_other_dvc(project, print)
        yield
    finally:
        lock.release()


def _of_mlflow(project: Path, before: float, *, apply: bool) -> int:
    """MLflow's part; the exit code. A project without records of its own has none."""
    if not (project / "stages" / "tracking" / "clean.py").exists():
        return 0
    command = [sys.executable, "-m", "stages.tracking.clean", "--before", str(before)]
    return subprocess.run([*command, *(["--apply"] if apply else [])], cwd=project, check=False).returncode


def main(
    older: Annotated[str, typer.Option(help="Age: a number and h, d or w.")],
    apply: Annotated[bool, typer.Option("--apply", help="Delete; else only say what would go.")] = False,
    project: Annotated[Path, typer.Option(help="The clone.", file_okay=False, exists=True)] = Path(),
) -> None:
    """Delete what is old and not needed. Exit codes: 0 done, 1 cannot be done now, 2 wrong usage."""
    project = project.resolve()
    try:
        before = time.time() - seconds(older)
        with _alone(project):
            for waste in find(project, before):
                verb = "deleted" if apply else "would go"
                print(f"{waste.kind}: {len(waste.paths)}, {waste.bytes / 1e6:.1f} MB, {verb}")
                if apply:
                    waste.remove()
            code = _of_mlflow(project, before, apply=apply)
    except (ValueError, CannotClean) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    if not apply:
        print("nothing was deleted; APPLY=1 (--apply) does it")
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
