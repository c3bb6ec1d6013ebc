"""Whom a trial kills, and when: drawn from a seed, so that a trial can be repeated."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.crash.scratch import VERBS, Running, inhabitants, until

VICTIMS = ("flow", "group", "everything", "dvc", "stage", "recorder", "worker", "worker group", "mlflow")
MOMENTS = ("start", *VERBS, "end")
"""Before the first stage, within a stage of each verb, after the last one."""
APPEARS_S = 60.0
"""How long a victim that is not there yet is waited for."""


@dataclass(frozen=True)
class Aim:
    """One kill: whom, within what, and after which part of it (0 to 1)."""

    victim: str
    moment: str
    part: float


def draw(number: int, seed: int) -> Aim:
    """The aim of a trial. Every verb meets another victim in each round of nine."""
    part = random.Random(f"{seed}-{number}").random()  # noqa: S311 (no secret)
    rounds, place = divmod(number, len(VICTIMS))
    return Aim(VICTIMS[place], MOMENTS[(place + rounds + seed) % len(MOMENTS)], part)


def moments(undisturbed: Running, total_s: float) -> dict[str, tuple[str, float]]:
    """By moment: the line of a run that opens it, and how many seconds it lasts."""
    first = undisturbed.said(r"  started$") or total_s
    found = {"start": ("", first)}
    for verb in VERBS:
        begun, ended = undisturbed.said(rf"{verb}\S*  started$"), undisturbed.said(rf"{verb}\S*  run in")
        if begun is None or ended is None:
            raise RuntimeError(f"the undisturbed run has no {verb}: {undisturbed.output()[-3:]}")
        found[verb] = (rf"{verb}\S*  started$", ended - begun)
    last = undisturbed.said(r"report  run in") or total_s
    return found | {"end": (r"report  run in", total_s - last)}


def victims(
    kind: str, folder: Path, running: Running, servers: dict[str, psutil.Process]
) -> list[psutil.Process]:
    """The living processes that a kind names, none if there are none yet."""
    with suppress(psutil.NoSuchProcess):
        if kind == "mlflow":
            return [servers[kind], *servers[kind].children(recursive=True)]
        flow = psutil.Process(running.process.pid)
        here = inhabitants(folder)
        if kind in ("flow", "worker"):
            return [flow]
        if kind == "worker group":
            return [flow, *flow.children(recursive=True)]
        if kind == "group":
            return [p for p in {flow, *flow.children(recursive=True)} if _group(p) == _group(flow)]
        if kind == "everything":
            return [flow, *here]
        wanted = {"dvc": "dvc", "stage": "stages.", "recorder": "stages.tracking.recorder"}[kind]
        return [p for p in here if _is(p, wanted)][-1:]
    return []


def _group(process: psutil.Process) -> int:
    with suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return -1


def _is(process: psutil.Process, wanted: str) -> bool:
    """Whether a process is the thing wanted: of DVC the child that works, of stages no recorder."""
    with suppress(psutil.Error):
        line = process.cmdline()
        if wanted == "dvc":
            parent = process.parent()
            return wanted in line and parent is not None and wanted in parent.cmdline()
        module = line[line.index("-m") + 1] if "-m" in line[:-1] else ""
        if wanted == "stages.":
            return module.startswith("stages.") and module.count(".") == 1 and module != "stages.validate"
        return module == wanted
    return False


def strike(
    aim: Aim, folder: Path, running: Running, window: tuple[str, float], servers: dict[str, psutil.Process]
) -> tuple[list[str], float]:
    """Wait for the moment, kill -9 the victims; what they were, and the second of the run at which.

    A run that ends first is left alone: nothing was killed then.
    """
    opening, seconds = window

    def over() -> bool:
        return running.process.poll() is not None

    if opening:
        until(lambda: over() or running.said(opening), 600)
    until(over, aim.part * seconds)
    until(lambda: over() or victims(aim.victim, folder, running, servers), APPEARS_S)
    names = []
    for process in victims(aim.victim, folder, running, servers):
        with suppress(psutil.NoSuchProcess):
            name = " ".join(process.cmdline()[1:])
            process.send_signal(signal.SIGKILL)
            names.append(name[:120])
    return names, time.monotonic() - running.started
