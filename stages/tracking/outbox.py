"""The journal of a run: a folder of plain JSON that is written first and mirrored to MLflow afterwards.

`.work/outbox/<id>/` holds `start.json` (name, tags, parameters, owner), `events.jsonl` (one line per
call of `Run`), `system.jsonl` (samples of the recorder) and, once the stage is over, `end.json`.
A journal is removed when MLflow has all of it; what is left was not delivered and is sent again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.tracking import process
from stages.tracking.redaction import hidden_in
from stages.tracking.whole_file import part_of, remove_whole, write_json

OUTBOX = Path(".work/outbox")


def now_ms() -> int:
    """Unix time in milliseconds, as MLflow counts it."""
    return time.time_ns() // 1_000_000


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines or nothing; OSError (disk full) leaves the file as it was."""
    data = "".join(line + "\n" for line in lines).encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError:
            file.truncate(size)
            raise


class Journal:
    """One run's folder in the outbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, name: str, start: dict[str, Any]) -> Journal:
        """Make the folder with its `start.json`, both at once. OSError if the disk refuses."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        folder = OUTBOX / f"{name}-{stamp}-{secrets.token_hex(4)}"
        temporary = part_of(folder)
        temporary.mkdir(parents=True)
        try:
            write_json(
                temporary / "start.json", hidden_in(start) | {"owner": process.identity(), "id": folder.name}
            )
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return cls(folder)

    @property
    def name(self) -> str:
        """Name of the folder, unique to the run."""
        return self.folder.name

    def start(self) -> dict[str, Any]:
        """Name, tags, parameters and owner of the run."""
        return json.loads((self.folder / "start.json").read_text(encoding="utf-8"))

    def end(self) -> dict[str, Any] | None:
        """Status and end time, None while the run goes on or if it was killed."""
        path = self.folder / "end.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_end(self, status: str) -> None:
        """Close the journal with MLflow's status word."""
        write_json(self.folder / "end.json", {"status": status, "time": now_ms()})

    def events(self, file: str = "events.jsonl", skip: int = 0) -> Iterator[dict[str, Any]]:
        """Complete lines of a journal file after the first `skip`; an unfinished last line is left out."""
        path = self.folder / file
        if not path.exists():
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                if number >= skip and line.endswith(b"\n"):
                    yield json.loads(line)

    def owner_alive(self) -> bool:
        """True while the stage that writes this journal runs."""
        owner = self.start()["owner"]
        return process.is_alive(owner["pid"], owner["created"])

    def is_over(self) -> bool:
        """True if the stage ended, well or not."""
        return self.end() is not None or not self.owner_alive()

    def write_undelivered(self, why: str) -> None:
        """Note why MLflow did not get it; the next run's flush tries again."""
        write_json(self.folder / "undelivered.json", why)

    def undelivered(self) -> str | None:
        """Why a shared recorder could not deliver it, None if none tried."""
        try:
            return json.loads((self.folder / "undelivered.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def keep_artifacts(self) -> None:
        """Copy the files to be uploaded into the journal, each whole or not at all (OSError: disk full).

        Their originals may be gone or rewritten by the time a later stage uploads them.
        """
        for event in self.events():
            if event["kind"] != "artifact" or not Path(event["path"]).exists():
                continue
            source, target = Path(event["path"]), self.folder / event["kept"]
            draft = target.with_name(f"{target.name}.draft")
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, draft)
            else:
                shutil.copyfile(source, draft)
            draft.rename(target)

    def artifact_source(self, event: dict[str, Any]) -> Path | None:
        """Where an artifact's content is now: kept in the journal, at its own place, or lost (None)."""
        for path in (self.folder / event["kept"], Path(event["path"])):
            if path.exists():
                return path
        return None

    def remove(self) -> None:
        """Delete the folder: its content is in MLflow. One without its end would be sent again as killed."""
        remove_whole(self.folder)


def journals() -> list[Journal]:
    """All journals, oldest first."""
    found = []
    for path in OUTBOX.glob("[!.]*/start.json"):
        with suppress(FileNotFoundError):  # another process delivered it meanwhile
            journal = Journal(path.parent)
            found.append((journal.start()["time"], journal.name, journal))
    return [journal for _, _, journal in sorted(found, key=lambda entry: entry[:2])]


def waiting() -> list[Journal]:
    """Journals whose stage is over or dead, oldest first: what a former run could not deliver."""
    over = []
    for journal in journals():
        with suppress(FileNotFoundError):
            over += [journal] if journal.is_over() else []
    return over
