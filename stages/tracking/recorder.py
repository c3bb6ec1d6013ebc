"""The process beside the stages that mirrors their journals to MLflow.

`python -m stages.tracking.recorder FOLDER` serves the stage that started it, `python -m
stages.tracking.recorder` all stages of this checkout until its standard input closes. MLflow takes
about three seconds to import and may hang on a dead server: here neither costs a stage anything.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

from stages.tracking import delivery, outbox, process
from stages.tracking.redaction import HidingFormatter, hidden
from stages.tracking.whole_file import write_json

if TYPE_CHECKING:
    from stages.tracking.mirror import Mirror

SAMPLE_SECONDS = 5.0
ROUND_SECONDS = 0.1
"""How often the shared recorder looks for journals that began or ended."""
logger = logging.getLogger("stages.tracking")


class Sampler:
    """Load and memory of the machine (MLflow's own monitors) and memory of each stage."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no NVIDIA GPU, or no driver: whatever NVML raises then
            self.monitors.append(GPUMonitor())

    def sample(self, journals: list[outbox.Journal]) -> None:
        """Append one sample to each journal; one that cannot be written misses it."""
        if not journals:
            return
        machine: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            machine |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        now = outbox.now_ms()
        for journal in journals:
            with suppress(OSError):
                self._append(journal, dict(machine), now)

    def _append(self, journal: outbox.Journal, values: dict[str, float], now: int) -> None:
        start = journal.start()
        with suppress(psutil.Error):
            values["stage_memory_megabytes"] = psutil.Process(start["owner"]["pid"]).memory_info().rss / 1e6
        step = (now - start["time"]) // 1000  # seconds since the stage began
        rows = [[f"system/{name}", float(value), now, step] for name, value in values.items()]
        line = json.dumps({"kind": "metrics", "rows": rows})
        outbox.append_lines(journal.folder / "system.jsonl", [line])


class Live:
    """Sends what is new while the stage runs. A server that fails is left alone until the end."""

    def __init__(self, journal: outbox.Journal) -> None:
        self.journal = journal
        self.mirror: Mirror | None = None
        self.run_id = ""
        self.sent = {"events.jsonl": 0, "system.jsonl": 0}

    def open(self) -> None:
        """Open the run in MLflow, status RUNNING."""
        from stages.tracking import mirror

        try:
            self.mirror = mirror.Mirror()
            self.run_id = self.mirror.open(self.journal)
            self.mirror.push_params(self.journal, self.run_id)
        except Exception:
            logger.exception("the run could not be opened; trying again at the end of the stage")
            self.mirror = None

    def push(self) -> None:
        """Send the journal's new lines."""
        if self.mirror is None:
            return
        try:
            for file, lines in self.sent.items():
                self.sent[file] = self.mirror.push_events(self.journal, self.run_id, file, lines)
        except Exception:
            logger.exception("live upload stopped; trying again at the end of the stage")
            self.mirror = None

    def finish(self) -> str:
        """Deliver the whole journal, then what earlier runs left; why it failed, empty if it did not."""
        from stages.tracking import mirror

        try:
            connected = self.mirror or mirror.Mirror()
            connected.deliver(self.journal)
        except Exception as error:
            logger.exception("not delivered")
            return reason(error)
        mirror.flush_outbox(connected)
        return ""


def reason(error: BaseException) -> str:
    """The innermost cause in one line: MLflow wraps what the network or the database said."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return hidden(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


def heard(seconds: float) -> bool:
    """Wait up to `seconds` for a word on standard input, or its end."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def upload_lock(journal: outbox.Journal) -> FileLock:
    """Held by whoever sends the journal."""
    return FileLock(process.LOCKS / f"upload-{journal.name}.lock")


def record(journal: outbox.Journal) -> str:
    """Mirror one journal from its stage's start to its end; why that failed, empty if it did not."""
    sampler = Sampler()
    sampler.sample([journal])
    live = Live(journal)
    live.open()
    while not (heard(SAMPLE_SECONDS) or journal.is_over()):
        sampler.sample([journal])
        live.push()
    sampler.sample([journal])
    return live.finish()


def serve_one(folder: str) -> None:
    """Record for the stage that started this process, and answer it with one JSON line."""
    journal = outbox.Journal(Path(folder))
    lock = upload_lock(journal)
    with lock, redirect_stdout(sys.stderr):  # MLflow prints links; standard output is for the answer
        try:
            why = record(journal) if journal.folder.exists() else ""  # a shared recorder was faster
        except Exception as error:
            logger.exception("not recorded")
            why = reason(error)
    Path(lock.lock_file).unlink(missing_ok=True)
    print(json.dumps({"reason": why}), flush=True)


class Rounds:
    """What the shared recorder knows from one round to the next."""

    def __init__(self) -> None:
        self.sampler = Sampler()
        self.sampled = 0.0
        self.lives: dict[str, tuple[Live, FileLock]] = {}

    def adopt(self) -> None:
        """Take up the journals that nobody sends yet; each gets its first sample."""
        for journal in outbox.journals():
            lock = upload_lock(journal)
            if journal.name in self.lives or journal.undelivered() is not None:
                continue
            with suppress(Timeout):
                lock.acquire(timeout=0)
                self.sampler.sample([journal])  # first: who sees the run in MLflow may kill its stage
                self.lives[journal.name] = (live := Live(journal), lock)
                live.open()

    def work(self) -> None:
        """One round: begin, go on, end."""
        self.adopt()
        for name, (live, lock) in list(self.lives.items()):
            if live.journal.is_over():
                if why := live.finish():
                    live.journal.write_undelivered(why)
                del self.lives[name]
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)
        if time.monotonic() - self.sampled > SAMPLE_SECONDS:
            self.sampled = time.monotonic()
            self.sampler.sample([live.journal for live, _ in self.lives.values()])
            for live, _ in self.lives.values():
                live.push()


def flush_rest() -> None:
    """Send what no stage of this run sent: journals that an earlier one could not deliver."""
    if not (left := outbox.waiting()):
        return
    from stages.tracking import mirror

    try:
        mirror.flush_outbox(mirror.Mirror())
    except Exception as error:
        print(f"tracking: {len(left)} runs wait in {outbox.OUTBOX}: {reason(error)}", file=sys.stderr)


def serve_all() -> None:
    """Record for all stages of this checkout until standard input closes. A second one ends at once."""
    process.LOCKS.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(process.LOCKS / "recorder.lock").acquire(timeout=0):
            rounds = Rounds()
            write_json(delivery.SHARED, process.identity())
            try:
                while not heard(ROUND_SECONDS):
                    rounds.work()
            finally:
                delivery.SHARED.unlink(missing_ok=True)
            rounds.work()
            flush_rest()
    except Timeout:
        print("another recorder serves this checkout", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Serve one stage or all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the stages, which then end their journals
    log = logging.StreamHandler()
    log.setFormatter(HidingFormatter("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[log])
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if arguments:
        serve_one(arguments[0])
    else:
        serve_all()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
