"""How the command fails: one line, and an exit code that says what kind of failure it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import typer

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line; with its option `--debug` they keep their traceback.

    Exit codes: 2 what the user gave is wrong, 1 a check failed or something unexpected, 130 interrupted.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:  # it has said why
            raise
        except (ValueError, OSError) as error:
            _stop(error, _one_line(error), USAGE, options["debug"])
        except Exception as error:
            said = f"{type(error).__name__}: {_one_line(error)} (--debug shows where)"
            _stop(error, said, FAILED, options["debug"])

    return run


def _stop(error: Exception, message: str, code: int, debug: bool) -> None:
    if debug:
        raise error
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def unknown(what: str, given: str, known: Iterable[str]) -> ValueError:
    """That a name is none of those known, with the nearest one, or else all of them."""
    names = list(known)
    near = get_close_matches(given, names, n=3, cutoff=0.6)
    if near:
        return ValueError(f"{what} {given!r} is unknown: did you mean {' or '.join(near)}?")
    shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
    return ValueError(f"{what} {given!r} is unknown: use one of {shown}")
