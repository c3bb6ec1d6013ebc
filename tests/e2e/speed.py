"""What operating costs: `python -m tests.e2e.speed [fan-out|metrics|runners|cached|flow …] --out FILE`.

Real servers, workers and clones on one machine, each figure beside what it could be at best. `cached` and
`flow` run a profile in fresh clones, `flow` in turn with plain `dvc repro`; that takes as long as the profile
does. The record keeps what other calls have measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import environment, write_json
from tests.flows.toy import ROOT, Toy, ask, end, serve, start, wait_for

CELLS, JOBS, POINTS = 32, 3, 10_000
STAGE = """import sys, time, pathlib
time.sleep(1)
path = pathlib.Path("results") / sys.argv[1]
path.parent.mkdir(exist_ok=True)
path.write_text("{}")
"""
DVC = {
    "stages": {
        "transfer": {
            "matrix": {"cell": "${cells}"},
            "cmd": "python stage.py ${item.cell}",
            "deps": ["stage.py"],
            "outs": ["results/${item.cell}"],
        }
    }
}
RUNNERS = {
    "prefect.task_runners": ("ThreadPoolTaskRunner", f"max_workers={JOBS}"),
    "prefect_dask": ("DaskTaskRunner", f"cluster_kwargs=dict(n_workers={JOBS}, threads_per_worker=1)"),
    "prefect_ray": ("RayTaskRunner", f"init_kwargs=dict(num_cpus={JOBS})"),
}
PROBE = f"""import subprocess
from prefect import flow, task
from {{module}} import {{name}}

@task(persist_result=False)
def wait():
    subprocess.run(["sleep", "1"], check=True)

@flow(task_runner={{name}}({{setting}}))
def probe():
    for future in [wait.submit() for _ in range({CELLS})]:
        future.result()

if __name__ == "__main__":
    probe()
"""
LOGGED = f"""import time
from stages.tracking import stage_run
began = time.monotonic()
with stage_run("probe", task="toy", method="toy", params={{"seeds": [0]}}) as run:
    for step in range({POINTS} // 10):
        run.metrics({{f"metric{{k}}": float(step * k) for k in range(10)}}, step=step)
print(time.monotonic() - began)
"""


def main() -> None:
    """Measure what the arguments name, by default all that takes minutes only, and save it."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.speed", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []], metavar="name")
    parser.add_argument("--profile", default="smoke", help="of params/, for cached and flow")
    parser.add_argument("--times", type=int, default=3, help="how often each is measured")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks/operations.json"))
    options = parser.parse_args()
    for name in options.names or ["fan-out", "metrics", "runners"]:
        record: dict[str, Any] = {"format": 1}
        if options.out.exists():
            record = json.loads(options.out.read_text())
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            found = MEASUREMENTS[name](Path(folder), options)
        key = f"{name} {options.profile}" if name in {"flow", "cached"} else name
        record[key] = found | {"environment": environment()}
        write_json(options.out, record)
        print(key, json.dumps(found, indent=1), flush=True)


def fan_out(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for cells of one second each on two workers, from the command to its end."""
    env = _env(folder) | {"EUGEN_DVC_REMOTE": str(folder / "remote"), "PYTHONPATH": str(ROOT)}
    toys = [_cells(folder / name, env) for name in ("one", "two")]
    seconds: list[float] = []
    with serve(folder / "server.log", env) as server, ExitStack() as workers:
        env |= server
        operate = [sys.executable, "-m", "flows.operate"]
        subprocess.run([*operate, "deploy"], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        for toy in toys:
            command = [*operate, "worker", "--pool", "cpu-pool", "--project", str(toy.folder)]
            workers.callback(end, start(command, folder / f"{toy.folder.name}.log", env, ROOT))
        wait_for(lambda: len(ask(server, "work_pools/cpu-pool/workers/filter", {})) == 2, "workers")
        for turn in range(options.times):
            stage = f"{STAGE}# {turn}\n"  # each turn with cells that nobody has computed
            for toy in toys:
                (toy.folder / "stage.py").write_text(stage)
            coordinator = _cells(folder / f"coordinator{turn}", env, stage)
            began = time.monotonic()
            code, said = coordinator.bench("--pool", "cpu-pool", **server)
            seconds.append(time.monotonic() - began)
            assert code == 0 and f"{CELLS} done" in said, said
    return _seconds(seconds) | {"ideal_seconds": CELLS / 2, "cells": CELLS, "workers": 2}


def metrics(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds until what one stage logs stands in MLflow, whose import and new database are included."""
    seconds: list[float] = []
    for turn in range(options.times):
        place = folder / str(turn)
        place.mkdir()
        env = _env(folder) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", LOGGED], cwd=place, env=env, text=True, capture_output=True, check=True
        )
        seconds.append(float(done.stdout.split()[-1]))
    return _seconds(seconds) | {"points": POINTS}


def runners(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for tasks that wait one second for a process each, by Prefect task runner, where installed."""
    found: dict[str, Any] = {"tasks": CELLS, "jobs": JOBS, "ideal_seconds": -(-CELLS // JOBS)}
    env = _env(folder)
    with serve(folder / "server.log", env) as server:
        for module, (name, setting) in RUNNERS.items():
            try:
                importlib.import_module(module)
            except ImportError:
                found[name] = None
                continue
            (folder / "probe.py").write_text(PROBE.format(module=module, name=name, setting=setting))
            command = [sys.executable, "probe.py"]
            found[name] = _seconds([_timed(command, folder, env | server) for _ in range(options.times)])
    return found


def flow(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The flow's time over that of plain `dvc repro`, from nothing; in turn, each in a fresh clone."""
    seconds: dict[str, list[float]] = {"flow": [], "dvc": []}
    commands = {"flow": ["flows.benchmark"], "dvc": ["dvc", "repro"]}
    for turn in range(options.times):
        for name in ("flow", "dvc") if turn % 2 else ("dvc", "flow"):
            clone = _clone(folder / f"{name}{turn}", options.profile)
            command = [sys.executable, "-m", *commands[name]]
            env = _env(folder) | {"PYTHONPATH": str(clone), "PATH": _path()}
            seconds[name].append(_timed(command, clone, env))
    ratios = [ours / theirs for ours, theirs in zip(seconds["flow"], seconds["dvc"], strict=True)]
    return {name: _seconds(found) for name, found in seconds.items()} | {"ratios": _rounded(ratios)}


def cached(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a flow in which every stage is up to date, with a running server."""
    clone, env = _clone(folder / "clone", options.profile), _env(folder)
    env |= {"PYTHONPATH": str(clone)}
    with serve(folder / "server.log", env) as server:
        command = [sys.executable, "-m", "flows.benchmark"]
        _timed(command, clone, env | server)
        return _seconds([_timed(command, clone, env | server) for _ in range(options.times)])


MEASUREMENTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "fan-out": fan_out,
    "metrics": metrics,
    "runners": runners,
    "cached": cached,
    "flow": flow,
}


def _seconds(found: list[float]) -> dict[str, Any]:
    return {"seconds": _rounded(found), "median_seconds": round(statistics.median(found), 2)}


def _rounded(found: list[float]) -> list[float]:
    return [round(value, 3) for value in found]


def _timed(command: list[str], folder: Path, env: dict[str, str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return time.monotonic() - began


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _env(folder: Path) -> dict[str, str]:
    """An environment in which nothing of this machine's Prefect, MLflow and clones is known."""
    names = ("PREFECT_", "MLFLOW_", "EUGEN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    data = os.environ.get("EUGEN_DATA_DIR", str(ROOT / "data" / ".downloads"))
    return env | {"PREFECT_HOME": str(folder / "prefect"), "EUGEN_DATA_DIR": data, "DO_NOT_TRACK": "1"}


def _clone(folder: Path, profile: str) -> Path:
    """A clone of the last commit with the parameters of `profile`."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / "params.yaml").write_bytes((ROOT / "params" / f"{profile}.yaml").read_bytes())
    return folder


def _cells(folder: Path, env: dict[str, str], stage: str = STAGE) -> Toy:
    """A project of cells that only wait."""
    folder.mkdir()
    (folder / "stage.py").write_text(stage)
    params = {"run": {"device": "cpu"}, "cells": [f"cell{number}" for number in range(CELLS)]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").write_text(yaml.safe_dump(DVC))
    toy = Toy(folder, env)
    for arguments in (["init", "--no-scm", "-q"], ["config", "core.analytics", "false"]):
        assert toy.dvc(*arguments).returncode == 0
    return toy


if __name__ == "__main__":
    main()
