"""No password in what is printed or kept: journals, failures, logs, tags, addresses."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

MARK = "[hidden]"
SHORTEST = 6
"""Shorter values are words of their own too often to be looked for."""
_SECRET_NAME = re.compile(
    r"(^|_)(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|APIKEY|API_KEY|ACCESS_KEY|AUTH_STRING|CREDENTIALS?)(_|$)"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s'\"]*@")


def secrets() -> list[str]:
    """Values of the environment's variables whose names say that they are secret, the longest first.

    Of a `name:password` the password counts alone as well.
    """
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name.upper()) and not Path(value).is_absolute()
    }
    values |= {value.partition(":")[2] for value in values}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def hidden(text: str) -> str:
    """`text` without the passwords of its addresses and without the environment's secrets."""
    text = _IN_ADDRESS.sub(f"{MARK}@", text)
    for value in secrets():
        text = text.replace(value, MARK)
    return text


def hidden_in(value: Any) -> Any:
    """Plain nested data with every text, keys included, as `hidden` gives it."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, Mapping):
        return {hidden_in(key): hidden_in(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden_in(entry) for entry in value]
    return value


class HidingFormatter(logging.Formatter):
    """A log's lines, tracebacks included, as `hidden` gives them."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's last words on an error that nobody caught, as `hidden` gives them (`sys.excepthook`)."""
    sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, trace))))
    sys.stderr.flush()
