"""Order, retries, schedule and progress of the benchmark; the work itself is done by DVC's stages.

Prefect reads its settings from the environment while it is imported, so they are set here, before any
module of this package can import it. Whatever the user has set wins.
"""

import json
import os
from pathlib import Path

from flows.machine.process import lives

_WORK = Path(__file__).resolve().parent.parent / ".work"


def _server_of_this_clone() -> str | None:
    """The address of the Prefect server that `make server` runs in this clone, if it does."""
    try:
        entry = json.loads((_WORK / "servers.json").read_text(encoding="utf-8"))
        return entry["prefect"] if lives(entry["pid"], entry["created"]) else None
    except (OSError, ValueError, KeyError):
        return None


_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": "false",
    # The flow prints its own lines; Prefect's go to its server only.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
if "PREFECT_API_URL" not in os.environ and "PREFECT_HOME" not in os.environ:
    # Without `make server`, a server that is alive only during a run. Either way one of this clone: no
    # profile of the user's, nothing in the home folder.
    _WORK.mkdir(exist_ok=True)  # Prefect makes its own folder only
    _SETTINGS["PREFECT_HOME"] = str(_WORK / "prefect")
    if _address := _server_of_this_clone():
        _SETTINGS["PREFECT_API_URL"] = _address

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
