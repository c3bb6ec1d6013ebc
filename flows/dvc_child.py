"""Run DVC's command line in a process that dies with its parent, even if the parent is killed by -9.

Called as `python -P flows/dvc_child.py PARENT_PID ARGUMENTS…`. Without it a killed flow would leave DVC and
its stage running, and the next run would meet a second writer of the same files.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when `parent` ends; elsewhere only the process group protects."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request stood
        os._exit(1)


def main() -> int:
    """Run DVC with the arguments after the parent's process id."""
    die_with(int(sys.argv[1]))
    sys.argv = ["dvc", *sys.argv[2:]]
    from dvc.cli import main as dvc

    return dvc(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
