"""What a stage sees of the tracking: one context manager, one object.

A stage writes plain lines into its journal; the recorder beside it mirrors them to MLflow. So a
stage neither waits for MLflow nor fails with it.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.tracking import environment, location, outbox, process, record
from stages.tracking.delivery import Delivery
from stages.tracking.redaction import hidden, print_error

FAILURES = Path("results/failures")
_NAME = re.compile(r"[\w\-./: ]{1,250}")


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as dotted keys and text; lists and other leaves as JSON."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def digest(value: Any) -> str:
    """Short hash of plain data, the same for equal data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(name: str, value: float, time: int, step: int) -> list[Any]:
    """One metric, checked here: MLflow would only refuse it long after the stage."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"metric name {name!r}: use letters, digits, spaces and _ - . / : only")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"metric {name!r} is {number} at step {step}: a diverged result is a failure")
    return [name, number, time, int(step)]


class Run:
    """What one cell reports in one stage. Cheap to call; every call is one line of the journal."""

    def __init__(self, journal: outbox.Journal | None, *, silent: bool = False) -> None:
        self._journal, self._silent = journal, silent
        self._pending: list[str] = []
        self._artifacts = 0
        self._warned = False
        self.overhead_seconds = 0.0
        """Process start to entering the block: interpreter, imports, waiting for the lock."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Report numbers. ValueError names one that is not finite."""
        time = outbox.now_ms()
        self._note(kind="metrics", rows=[_row(k, v, time, step) for k, v in values.items()])

    def curve(self, name: str, points: Iterable[tuple[int, float]]) -> None:
        """Report a whole curve of (step, value). ValueError names a value that is not finite."""
        time = outbox.now_ms()
        self._note(kind="metrics", rows=[_row(name, value, time, step) for step, value in points])

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file or folder, uploaded when the stage ends. FileNotFoundError if it is not there."""
        full = Path(path).resolve()
        if not full.exists():
            raise FileNotFoundError(f"artifact {path}: no such file; write it before reporting it")
        kept = f"artifacts/{self._artifacts}/{full.name}"
        self._artifacts += 1
        self._note(kind="artifact", path=str(full), folder=folder, kept=kept)

    def dataset(self, name: str, *, sha256: str, rows: int, context: str = "training") -> None:
        """Name a data set that was used, by its SHA-256 and number of rows."""
        self._note(kind="dataset", name=name, sha256=sha256, rows=int(rows), context=context)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._note(kind="tag", key=key, value=hidden(str(value)))

    def progress(self, text: str) -> None:
        """Say where the stage is: one line to standard output, at once."""
        if not self._silent:
            print(hidden(text), flush=True)

    def _note(self, **event: Any) -> None:
        """Append to the journal. On a full disk keep the line in memory and try again with the next."""
        if self._journal is None:
            return
        self._pending.append(json.dumps(event, allow_nan=False))
        try:
            outbox.append_lines(self._journal.folder / "events.jsonl", self._pending)
            self._pending.clear()
        except OSError as error:
            self._warn(f"the journal cannot be written ({error}); free some disk space")

    def _warn(self, text: str) -> None:
        """Say once that tracking is impaired."""
        if not self._warned:
            print(hidden(f"tracking: {text}; work goes on"), file=sys.stderr, flush=True)
            self._warned = True


def _tags(stage: str, task: str, method: str | None, params: Any, work_key: str | None) -> dict[str, str]:
    """The tags runs are found by."""
    flat = flatten(params)
    seeds = next((value for key, value in flat.items() if key.split(".")[-1] in ("seed", "seeds")), "")
    lock = Path("dvc.lock")
    tags = {
        "pipeline_run": process.pipeline_run(),
        "stage": stage,
        "task": task,
        "method": method or "",
        "seed": seeds,
        "git_commit": environment.commit(),
        "dvc_lock_md5": hashlib.md5(lock.read_bytes(), usedforsecurity=False).hexdigest()
        if lock.exists()
        else "",
        "params_hash": digest(params),
        "cell": digest([stage, task, method, params, work_key]),
        "checkout": location.checkout(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": f"stages.{stage}",
    }
    return {key: value for key, value in tags.items() if value}


def _close(run: Run, delivering: Delivery | None, status: str) -> None:
    """End the journal and wait for its delivery; whatever goes wrong is said, never raised."""
    journal = run._journal
    if journal is None:
        return
    try:
        if run._pending:
            outbox.append_lines(journal.folder / "events.jsonl", run._pending)
        journal.write_end(status)
    except OSError as error:
        run._warn(f"the journal cannot be written ({error}); free some disk space")
    why = delivering.finish() if delivering else "the recorder could not be started"
    if why:
        with suppress(OSError):
            journal.keep_artifacts()
        target = "server" if location.is_server(location.tracking_uri()) else "database"
        place = f"{target} {location.tracking_uri()} unreachable ({why})"
        run._warn(f"{place}: kept in {outbox.OUTBOX}, uploaded by the next run")


def _open(name: str, params: Mapping[str, Any], tags: dict[str, str]) -> tuple[Run, Delivery | None]:
    """The run and the delivery of its journal; a run that keeps nothing if tracking is off or impossible."""
    if os.environ.get("EUGEN_TRACKING") == "off":
        return Run(None), None
    start = {"name": name, "params": flatten(params), "tags": tags, "time": outbox.now_ms()}
    try:
        journal = outbox.Journal.create(name.replace(" ", "-"), start)
    except OSError as error:
        run = Run(None)
        run._warn(f"the journal cannot be written ({error}); free some disk space")
        return run, None
    try:
        return Run(journal), Delivery(journal)
    except OSError:
        return Run(journal), None


def _forget_failure(path: Path, stage: str) -> None:
    """Remove the failure this stage left earlier; another stage's stays until that one runs again."""
    try:
        if json.loads(path.read_text(encoding="utf-8"))["stage"] != stage:
            return
    except FileNotFoundError:
        return
    except (ValueError, KeyError):
        pass  # unreadable: half of an older format, of no use to anybody
    path.unlink(missing_ok=True)


def _fail(run: Run, path: Path, stage: str, task: str, method: str | None, error: Exception) -> None:
    """Leave the reason where the report and MLflow look for it."""
    text = hidden(traceback.format_exc())
    failure = record.Failure(
        stage=stage,
        task=task,
        method=method,
        error=hidden(f"{type(error).__name__}: {error}"),
        traceback=text,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        record.write_record(path, failure)
        run.artifact(path, folder="failure")
        run.tag("error", failure.error)
    except OSError as problem:
        print(f"the failure could not be recorded: {problem}", file=sys.stderr, flush=True)


@contextmanager
def stage_run(
    stage: str,
    *,
    task: str,
    method: str | None = None,
    params: Mapping[str, Any],
    work_key: str | None = None,
) -> Iterator[Run]:
    """Run the body as `stage` of one cell: alone, dying with its parent, mirrored to MLflow.

    `params` is plain nested data. `work_key` is a hash of what else the result depends on (data,
    code); with the parameters it identifies the cell. An exception is recorded as the cell's failure
    and passes on; an interrupt leaves the run KILLED and no failure. Troubles of MLflow never reach
    the body: they are said in one line, and the records wait in `.work/outbox`. What is trained from
    scratch is a cell of its own, beside the transfer of the same name.
    """
    process.die_with_parent()
    sys.excepthook = print_error
    if os.environ.get("RANK", "0") != "0":  # of several processes that torchrun started, the first reports
        yield Run(None, silent=True)
        return
    # The method first: narrow columns and legends cut the end of a name.
    names = [method, task, stage] if method else [task, stage]
    cell = f"{task}-{method or 'all'}"
    failure = FAILURES / f"{f'scratch-{cell}' if stage == 'scratch' else cell}.json"
    with process.alone("-".join([stage, task, method or "all"])):
        _forget_failure(failure, stage)
        run, delivering = _open(" ".join(names), params, _tags(stage, task, method, params, work_key))
        run.overhead_seconds = process.seconds_since_start()
        status = "KILLED"
        try:
            yield run
            status = "FINISHED"
        except Exception as error:
            status = "FAILED"
            _fail(run, failure, stage, task, method, error)
            raise
        finally:
            _close(run, delivering, status)
