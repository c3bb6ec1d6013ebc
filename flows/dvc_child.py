"""Run DVC's command line in a process group that dies with its parent, even if that is killed by -9.

Called as `python -P flows/dvc_child.py PARENT_PID ARGUMENTS…` by a process that makes it the leader of a
group. The leader only watches: without it a killed flow would leave DVC, its shell and its stage running,
and the next run would meet a second writer of the same files.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
WATCHED = {signal.SIGTERM, signal.SIGCHLD}


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
    """Run DVC with the arguments after the parent's process id."""
    parent = int(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if child := os.fork():
        return watch(child, parent)
    ask_for(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    sys.argv = ["dvc", *sys.argv[2:]]
    from dvc.cli import main as dvc

    return dvc(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
