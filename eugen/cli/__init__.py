"""The command `eugen`: compress, inspect, verify, layers. Needs the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        from eugen.cli.command import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("the command needs typer: pip install 'eugen[cli]'")
    app()
