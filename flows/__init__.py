"""Order, retries, schedule and progress of the benchmark; the work itself is done by DVC's stages.

Prefect reads its settings from the environment while it is imported, so they are set here, before any
module of this package can import it. Whatever the user has set wins.
"""

import os
from pathlib import Path

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": "false",
    # The flow prints its own lines; Prefect's go to its server only.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
if "PREFECT_API_URL" not in os.environ:
    # A server of this clone, alive only during a run: no profile of the user's, nothing in the home folder.
    _SETTINGS["PREFECT_HOME"] = str(Path(__file__).resolve().parent.parent / ".work" / "prefect")

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
