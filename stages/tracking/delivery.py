"""Who mirrors a stage's journal: the recorder of the whole pipeline if one runs, else one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from stages.tracking import outbox, process

DELIVERY_SECONDS = 120.0
"""How long a finished stage waits for its upload before leaving it to the next one."""
SHARED = Path(".work/recorder.json")
"""Written by a shared recorder while it serves: its pid and start."""


def shared_recorder_serves() -> bool:
    """True while a recorder for all stages of this checkout runs."""
    try:
        owner = json.loads(SHARED.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return process.is_alive(owner["pid"], owner["created"])


def _own_recorder(journal: outbox.Journal) -> subprocess.Popen[str]:
    """Start a recorder for one journal; what it says goes to `recorder.log` in the journal's folder."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "stages.tracking.recorder", str(journal.folder)]
    pipe = subprocess.PIPE
    with (journal.folder / "recorder.log").open("w") as log:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | {"PYTHONPATH": path}
        )


class Delivery:
    """Begins with the stage; `finish` tells what became of the journal."""

    def __init__(self, journal: outbox.Journal) -> None:
        self.journal = journal
        self.recorder = None if shared_recorder_serves() else _own_recorder(journal)

    def finish(self) -> str:
        """Wait for the delivery of the ended journal; why it failed, empty if it did not."""
        if self.recorder is None and (why := self._wait_for_shared()) is not None:
            return why
        try:
            return self._wait_for_own(self.recorder or _own_recorder(self.journal))
        except OSError as error:
            return f"the recorder could not be started: {error}"

    def _wait_for_shared(self) -> str | None:
        """As `finish`; None if the shared recorder is gone and left the journal as it was."""
        deadline = time.monotonic() + DELIVERY_SECONDS
        while time.monotonic() < deadline:
            serves = shared_recorder_serves()
            if not self.journal.folder.exists():
                return ""
            if why := self.journal.undelivered():
                return why
            if not serves:
                return None
            time.sleep(0.05)
        return f"no answer within {DELIVERY_SECONDS:.0f} s"

    def _wait_for_own(self, recorder: subprocess.Popen[str]) -> str:
        try:
            said, _ = recorder.communicate("end\n", timeout=DELIVERY_SECONDS)
            return json.loads(said)["reason"]
        except subprocess.TimeoutExpired:
            recorder.kill()
            recorder.communicate()
            return f"no answer within {DELIVERY_SECONDS:.0f} s"
        except (OSError, ValueError):
            return f"the recorder ended with status {recorder.wait()}"
