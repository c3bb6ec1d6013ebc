"""Outputs shared between clones through a DVC remote: a folder, or S3-compatible storage.

python -m flows.dvc.remote push|pull [--remote FOLDER|s3://BUCKET/PATH] [TARGET…]

`push` sends the outputs of the present `dvc.lock` with DVC's record of past runs, `pull` restores from them
every stage of the present parameters that somebody has pushed: a run in a fresh clone then computes the rest
only. The remote stands in `.dvc/config.local`, which git ignores; S3's keys are read from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from ~/.aws, and are never written.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from flows import clone
from flows.dvc.repair import Say
from flows.dvc.runner import DvcRunner

NAME = "eugen"
"""What the remote is called in `.dvc/config.local`."""
CONNECT_S = 10
"""How long S3 may take to accept a connection."""
ONE_OF = "a folder, or s3://bucket/path with EUGEN_S3_ENDPOINT for storage other than Amazon's"

_STAGE = re.compile(r"Stage '(?P<name>.+)' (?P<how>didn't change|is cached)")
_REFUSED, _QUOTED = "ERROR: failed to reproduce ", re.compile(r"'([^']+)'")
_UNREACHED = re.compile(r"WARNING: Failed to pull run cache: (.*)")


class RemoteError(RuntimeError):
    """The remote cannot be used. The message says which, why, and what to do."""


@dataclass
class Pulled:
    """What `pull` found, by stage."""

    restored: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Nobody has pushed these for the present parameters, code and data. What needs them is not named."""


class Remote:
    """The remote of the clone `project`: `url`, else EUGEN_DVC_REMOTE, else the one that it has.

    Raises `RemoteError` if there is none, or for an address that cannot be used.
    """

    def __init__(self, project: Path, url: str | None = None) -> None:
        self._project = project
        config = dict(line.split("=", 1) for line in _dvc(project, "config", "--list") if "=" in line)
        if wanted := url or os.environ.get("EUGEN_DVC_REMOTE"):
            settings = _settings(wanted)
            _configure(project, config, settings)
            there = settings["url"]
        else:
            there = config.get(f"remote.{config.get('core.remote')}.url")
        if there is None:
            raise RemoteError(f"no DVC remote: name one with EUGEN_DVC_REMOTE or --remote ({ONE_OF})")
        self._folder = None if "://" in there else project / ".dvc" / there

    def push(self, *targets: str, say: Say = print) -> None:
        """Send the outputs of `targets` (stages; default: all) and the record of past runs to the remote.

        Raises `RemoteError` if the remote cannot be reached or written, or if outputs are lost here too.
        """
        self.make_writable()
        lines = _dvc(self._project, "push", "--run-cache", *targets)
        say(f"push: {lines[-1] if lines else 'done'}")

    def make_writable(self) -> None:
        """Make the remote's folder if it is not there. Raises `RemoteError` where nothing can be written."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise RemoteError(
                f"the remote {self._folder} cannot be written ({error.strerror}): mount it or change its "
                "rights, or name another one"
            ) from None

    def pull(self, *targets: str, say: Say = print) -> Pulled:
        """Restore from the remote what the present parameters need, for `targets` and their needs or for all.

        Nothing is computed: to DVC it is a run in which every command refuses. Returns what is there now and
        what is missing. Raises `RemoteError` if the remote cannot be reached.
        """
        if self._folder is not None and not self._folder.is_dir():
            raise RemoteError(
                f"the remote {self._folder} is not there: mount it, name another one, or push to it first"
            )
        found, lines = Pulled(), list[str]()
        with tempfile.TemporaryDirectory(prefix="eugen-pull-") as refusing:
            python = Path(refusing) / "python"
            python.write_text("#!/bin/sh\nexit 75\n")
            python.chmod(0o755)
            path = os.pathsep.join([refusing, os.environ.get("PATH", os.defpath)])
            DvcRunner(self._project, "pull").follow(
                lines.append, "repro", "--pull", "--keep-going", *targets, env={"PATH": path}
            )
        for line in lines:
            if unreached := _UNREACHED.match(line):
                raise RemoteError(_unreachable(unreached[1]))
            if stage := _STAGE.match(line):
                (found.restored if stage["how"] == "is cached" else found.present).append(stage["name"])
            elif line.startswith(_REFUSED):  # one line for each, or one for all
                found.missing += _QUOTED.findall(line)
        if not (found.restored or found.present or found.missing):
            raise RemoteError(_unreachable("\n".join(lines[-5:])))
        say(f"pull: {len(found.restored)} stages restored, {len(found.present)} were up to date")
        if found.missing:
            say(f"not in the remote, the next run computes them: {', '.join(found.missing)}")
        return found

    def fetch(self, *stages: str, say: Say = print) -> None:
        """Bring here the outputs that dvc.lock names for `stages`, instead of whatever is in their place.

        Raises `RemoteError` if the remote lacks any, or cannot be reached.
        """
        if stages:
            _dvc(self._project, "pull", "--force", *stages)
            say(f"fetched what {len(stages)} stages have left elsewhere")


def pull_keeping(remote: Remote, project: Path, *targets: str) -> None:
    """Pull, and keep what is here of the stages that the remote lacks: DVC removes it before it asks.

    Raises `RemoteError` where that could not be brought back, because DVC has never recorded it.
    """
    if unrecorded := _unrecorded(project, targets):
        raise RemoteError(
            "pulling would delete outputs that no run has recorded: dvc commit -f "
            f"{' '.join(unrecorded)}, or delete them first"
        )
    if missing := remote.pull(*targets).missing:
        with suppress(RemoteError):  # what DVC's cache has lost as well is not here either
            _dvc(project, "checkout", "--force", *missing)


def _unrecorded(project: Path, targets: tuple[str, ...]) -> list[str]:
    """Stages with an output that differs from the one that dvc.lock has, or that it does not have."""
    outs = {
        stage: change["changed outs"]
        for stage, changes in DvcRunner(project, "remote").changes(*targets).items()
        for change in changes
        if isinstance(change, dict) and "changed outs" in change
    }
    return [
        stage for stage, changed in outs.items() if {"modified", "new", "not in cache"} & {*changed.values()}
    ]


def _configure(project: Path, present: dict[str, str], settings: dict[str, str]) -> None:
    """Enter a remote into the clone's settings unless it stands there."""
    wanted = {f"remote.{NAME}.{key}": value for key, value in settings.items()} | {"core.remote": NAME}
    if wanted == {key: value for key, value in present.items() if key in wanted or NAME in key.split(".")}:
        return
    _dvc(project, "remote", "add", "--local", "--force", "--default", NAME, settings["url"])
    for key in settings.keys() - {"url"}:
        _dvc(project, "remote", "modify", "--local", NAME, key, settings[key])


def _settings(url: str) -> dict[str, str]:
    """DVC's settings of the remote `url`, whose bytes are hashed again when they arrive.

    Raises `RemoteError` if it is neither a folder nor S3.
    """
    parts = urlsplit(url)
    if "://" not in url:
        return {"url": str(Path(url).expanduser().resolve()), "verify": "true"}
    endpoint = os.environ.get("EUGEN_S3_ENDPOINT", "")
    if "@" in parts.netloc or "@" in urlsplit(endpoint).netloc:
        raise RemoteError(
            "the remote's address holds a password, which would be written down: leave it out and "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use ~/.aws/credentials"
        )
    if parts.scheme != "s3" or not parts.netloc:
        raise RemoteError(f"remote {url!r} is not {ONE_OF}")
    if find_spec("dvc_s3") is None:
        raise RemoteError(f"remote {url!r} needs DVC's part for S3: .venv/bin/pip install -e '.[s3]'")
    settings = {"url": url, "verify": "true", "connect_timeout": str(CONNECT_S)}
    return settings | ({"endpointurl": endpoint} if endpoint else {})


def _dvc(project: Path, *arguments: str) -> list[str]:
    """What a DVC command says, without empty lines; `RemoteError` with its complaint if it fails."""
    lines: list[str] = []
    code = DvcRunner(project, "remote").follow(lambda line: lines.append(line) if line else None, *arguments)
    if code:
        complaints = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        # One for each file, and the last for the whole.
        raise RemoteError(_unreachable(complaints[-1] if complaints else "\n".join(lines[-5:])))
    return lines


def _unreachable(why: str) -> str:
    return f"the DVC remote cannot be used: {why}. Check its address, the network and its credentials"


class Direction(StrEnum):
    """Where the outputs go."""

    push = "push"
    pull = "pull"


def main(
    direction: Direction,
    targets: Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")] = None,
    remote: Annotated[str | None, typer.Option(help=f"{ONE_OF}; default: EUGEN_DVC_REMOTE.")] = None,
    project: Annotated[Path, typer.Option(help="The clone.", file_okay=False, exists=True)] = Path(),
) -> None:
    """Share outputs with other clones. Exit codes: 0 done, 1 the remote cannot be used."""
    project = project.resolve()
    try:
        if remote:
            _settings(remote)  # before the command's words are noted as the owner of the clone
        with clone.held(project, print):
            there = Remote(project, remote)
            if direction is Direction.push:
                there.push(*(targets or ()))
            else:
                pull_keeping(there, project, *(targets or ()))
    except RemoteError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
