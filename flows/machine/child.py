"""Run a Python program in a process group that dies with its parent, even if that is killed by -9.

Called as `python -P flows/machine/child.py PARENT_PID MODULE ARGUMENTS…` by a process that makes it the
leader of a group: `MODULE` then runs as by `python -m`. The leader only watches: without it a killed flow
would leave DVC, its shell and its stage running, and the next run would meet a second writer of the same
files.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
WATCHED = {signal.SIGTERM, signal.SIGCHLD}


def command(module: str, *arguments: str) -> list[str]:
    """What a parent starts, in a new session, to run `python -m module arguments…` as its bound child."""
    return [sys.executable, "-P", __file__, str(os.getpid()), module, *arguments]


def ask_for(number: signal.Signals) -> None:
    """Have Linux send `number` when the parent ends; elsewhere a flow can only end what it outlives."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def watch(child: int, parent: int) -> int:
    """The exit code of `child`; ends the whole group, this process included, when `parent` ends first."""
    ask_for(signal.SIGTERM)
    orphaned = os.getppid() != parent  # it ended before the request stood
    while not orphaned:
        orphaned = signal.sigwait(WATCHED) == signal.SIGTERM
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
    os.killpg(0, signal.SIGKILL)
    return 1


def main() -> int:
    """Run the module that the arguments name after the parent's process id."""
    parent = int(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if child := os.fork():
        return watch(child, parent)
    ask_for(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    module, sys.argv = sys.argv[2], sys.argv[2:]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
