"""One tree's library in a process of its own, driven by JSON lines: a request on stdin, its reply on stdout.

Started by `benchmarks.regression.processes` as `python -P worker.py TREE PARENT_PID THREADS`, with the tree
on PYTHONPATH. This file is always the candidate's: an older base has none. It ends at the end of stdin and
dies with its parent.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
SPACERS, LARGEST_SPACER = 4, 2**18
"""Before each copy of the network so many blocks of random size, up to these bytes, are taken and kept:
it comes to lie somewhere else (eugen/timing/placements.py says why)."""
SAMPLE_MS = 1.0
"""A sample is as many calls as take about so long: the way through the pipe leaves cold caches behind."""
STEADY, LEAST_WARM_UP, MOST_WARM_UP = 0.98, 0.02, 2.0
"""Warm-up ends with a call that takes no less than 0.98 of the best before it; seconds, least and most."""


def main() -> int:
    """Answer requests until stdin ends."""
    tree, parent, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the coordinator ends us
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    subject = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if subject is None:
                subject = Subject(tree, threads)
            reply = getattr(subject, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        _answer(replies, reply)
    return 0


def _answer(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def die_with(parent: int) -> None:
    """Have Linux kill this process when `parent` ends; elsewhere the end of stdin must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request stood
        raise SystemExit("the process that started this worker is gone")


class Subject:
    """The network of one case in this process. Each public method is a request; its result the reply.

    Raises:
        ImportError: `import eugen` finds the library of another tree.
    """

    def __init__(self, tree: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        import eugen

        found = Path(eugen.__file__).resolve().parent.parent
        if found != tree:
            raise ImportError(f"this worker is to measure {tree}, but `import eugen` finds {found}")
        # Cases are the candidate's in every worker; the eugen that they import is the one imported above.
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from benchmarks.regression import cases

        self._torch, self._cases = torch, cases
        self._hello = {"eugen": str(found), "torch": torch.__version__, "threads": torch.get_num_threads()}
        self._generator = torch.Generator()
        self._generator.seed()  # by chance: the same places in every run would be no sample of places
        self._spacers: list[Any] = []
        self._call: Callable[[], Any] | None = None
        gc.disable()  # collected between samples, in `place`

    def hello(self) -> dict[str, Any]:
        """Which library this is."""
        return self._hello

    def prepare(self, case: str) -> dict[str, Any]:
        """Build the network of a case and call a copy of it once; says MACs, parameters and bytes."""
        self._call = None
        self._spacers.clear()
        self._model, self._example, counted = self._cases.build(self._cases.CASES[case])
        with self._torch.no_grad():
            copy.deepcopy(self._model)(self._example)
        gc.collect()
        gc.freeze()  # what is alive now need not be looked through again at each new place
        return counted

    def quality(self, case: str, seed: int) -> dict[str, float]:
        """Relative error of the case's closed form."""
        return {"error_of_fit": self._cases.closed_form_error(self._cases.CASES[case], seed)}

    def place(self, cores: list[int]) -> dict[str, float]:
        """Move the network and its input to fresh memory, and this process to these cores; warm up.

        Returns:
            milliseconds of one call: the best of the warm-up.
        """
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        self._call = None
        gc.collect()
        for _ in range(SPACERS):
            size = int(self._torch.randint(1, LARGEST_SPACER, (), generator=self._generator))
            self._spacers.append(self._torch.empty(size, dtype=self._torch.uint8))
        model, example = copy.deepcopy(self._model), self._example.clone()
        self._call = lambda: model(example)
        return {"ms": self._warm_up(self._call)}

    def sample(self, calls: int, lengthen: float) -> dict[str, float]:
        """Time `calls` calls after one that is not timed, without gradients.

        Args:
            lengthen: share by which the timed region is drawn out, spinning: an injected slow-down.

        Returns:
            milliseconds of one call.
        """
        assert self._call is not None, "place comes before sample"
        with self._torch.no_grad():
            self._call()
            start = time.perf_counter()
            for _ in range(calls):
                self._call()
            if lengthen:
                end = start + (time.perf_counter() - start) * (1 + lengthen)
                while time.perf_counter() < end:
                    pass
            return {"ms": (time.perf_counter() - start) * 1e3 / calls}

    def _warm_up(self, call: Callable[[], Any]) -> float:
        best, begun = float("inf"), time.perf_counter()
        with self._torch.no_grad():
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                steady, seconds = now - start >= STEADY * best, now - begun
                best = min(best, now - start)
                if (steady and seconds >= LEAST_WARM_UP) or seconds >= MOST_WARM_UP:
                    return best * 1e3


if __name__ == "__main__":
    sys.exit(main())
