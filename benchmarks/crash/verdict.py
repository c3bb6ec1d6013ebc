"""What a rerun left, compared with an undisturbed run: results, records, processes, runs, leftovers."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.crash.scratch import inhabitants, until
from benchmarks.crash.servers import Servers

FOLDERS = ("data", "artifacts", "results", "reports")
DRAWN = ("reports/figures", "reports/report.html", "reports/records")
"""Drawn from measured numbers; that they are whole is all that can be asked."""
LEFTOVER = re.compile(
    r"^\..*(\.part|\.partial|\.draft|\.\d+|\.[a-z0-9_]{8})$|\.draft$|\.partial$|^\.fetching-|\.tmp$"
)
MEASURED = re.compile(
    r"(^|[._])(seconds|ms|speedup\w*|binds|peak|reserved|joules|energy|least|limit_share|examples_per_second|"
    r"ci95|overhead|memory_ratio|mb)($|[._])|stage_overhead|_seconds|(_|^)ms(_|$)|peak_|reserved_bytes"
)
"""Keys of times, memory and what is computed from them: they differ from run to run."""


def results(folder: Path) -> dict[str, Any]:
    """Every file that the stages wrote, by path: data and weights as hashes, records without times."""
    found: dict[str, Any] = {}
    for path in _files(folder, FOLDERS):
        name = path.relative_to(folder).as_posix()
        if name.startswith(DRAWN) or "/." in name or not _made(name):
            continue
        if path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_bytes()))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                found[name] = untimed(list(csv.DictReader(file)))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _made(name: str) -> bool:
    """Whether the stages wrote a file, rather than the commit that was cloned."""
    return not name.startswith("reports/") or name in {"reports/results.csv", "reports/scratch.csv"}


def untimed(value: Any) -> Any:
    """A record in which every measured value is replaced by the word `measured`."""
    if isinstance(value, dict):
        return {key: "measured" if MEASURED.search(key) else untimed(inner) for key, inner in value.items()}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def differences(here: Any, there: Any, name: str = "") -> Iterator[str]:
    """Where two results differ, each place with both values."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            if key not in here or key not in there:
                yield f"{name}/{key} is {'missing' if key not in here else 'new'}"
            elif name.startswith("/results/timings"):
                continue
            else:
                yield from differences(here[key], there[key], f"{name}/{key}")
    elif here != there:
        yield f"{name}: {str(here)[:80]} instead of {str(there)[:80]}"


def faults(
    folder: Path, undisturbed: dict[str, Any], stages: set[str], servers: Servers | None = None
) -> list[str]:
    """Everything that a killed and repeated run left worse than an undisturbed one; empty if nothing."""
    checks: tuple[Callable[[], list[str]], ...] = (
        lambda: list(differences(results(folder), undisturbed)),
        lambda: broken(folder),
        lambda: leftovers(folder),
        lambda: orphans(folder),
        lambda: tracked((servers and servers.database) or folder / "mlflow.db", stages),
        lambda: unfinished(own_flows(folder / ".work" / "prefect" / "prefect.db")),
        lambda: unfinished(servers.flow_runs() if servers else []),
    )
    found: list[str] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a check that cannot be made is a fault too
            found.append(f"{type(error).__name__}: {error}")
    return found[:20]


def broken(folder: Path) -> list[str]:
    """Records that no reader can read."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".csv": lambda path: _check(len({len(row) for row in csv.reader(path.open(newline=""))}) == 1),
        ".parquet": lambda path: _check(path.read_bytes()[:4] == path.read_bytes()[-4:] == b"PAR1"),
        ".html": lambda path: _check(path.read_text().rstrip().endswith("</html>")),
        ".svg": lambda path: _check(path.read_text().rstrip().endswith("</svg>")),
        ".safetensors": _whole_tensors,
    }
    found = []
    for path in _files(folder, (*FOLDERS, ".work")):
        try:
            readers.get(path.suffix, lambda _: None)(path)
        except (ValueError, OSError, KeyError) as error:
            found.append(f"{path.relative_to(folder)} is half written: {error}")
    return found


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("it lacks its end")


def _whole_tensors(path: Path) -> None:
    """The file ends where its own header says (https://github.com/huggingface/safetensors#format)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    _check(path.stat().st_size == 8 + size + max(ends, default=0))


def leftovers(folder: Path) -> list[str]:
    """Temporary files, drafts, and journals that nobody delivered."""
    inside = (*FOLDERS, ".work", ".dvc", "mlartifacts")
    found = [path for path in _files(folder, inside, folders=True) if LEFTOVER.search(path.name)]
    found += list((folder / ".work" / "outbox").glob("*"))
    kept = [
        path for path in (folder / ".work" / "progress").glob("*") if not path.name.startswith("scratch-")
    ]
    return [f"{path.relative_to(folder)} was left behind" for path in {*found, *kept}]


def orphans(folder: Path) -> list[str]:
    """Processes that still work in the clone five seconds after the run."""
    until(lambda: not inhabitants(folder), 5)
    return [f"process {p.pid} is left: {' '.join(p.cmdline())[:100]}" for p in inhabitants(folder)]


def tracked(database: Path, stages: set[str]) -> list[str]:
    """Runs of MLflow that are left RUNNING, and stages without a finished run."""
    query = "select status, t.value || '@' || n.value from runs join tags t using (run_uuid) "
    query += "join tags n using (run_uuid) where t.key = 'stage' and n.key = 'mlflow.runName'"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute(query).fetchall()
    running = [
        f"MLflow's run {name} is left {status}" for status, name in rows if status in ("RUNNING", "SCHEDULED")
    ]
    finished = {name.split("@")[0] for status, name in rows if status == "FINISHED"}
    return running + [f"MLflow has no finished run of {stage}" for stage in sorted(stages - finished)]


def own_flows(database: Path) -> list[tuple[str, str]]:
    """Name and state of the flow and task runs in the clone's own Prefect."""
    if not database.exists():
        return []
    query = "select name, state_type from flow_run union all select name, state_type from task_run"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def unfinished(runs: list[tuple[str, str]]) -> list[str]:
    """The flow and task runs that Prefect still takes for running; one that no worker took yet may wait."""
    living = ("RUNNING", "CANCELLING")
    return [f"Prefect's run {name} is left {state}" for name, state in runs if state in living]


def _files(folder: Path, inside: tuple[str, ...], *, folders: bool = False) -> list[Path]:
    paths = (path for name in inside for path in (folder / name).rglob("*"))
    return [path for path in paths if folders or path.is_file()]
