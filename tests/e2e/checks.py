"""What operations.sh asks: `python tests/e2e/checks.py CHECK ARGUMENT…`, exit code 0 if it holds."""

from __future__ import annotations

import json
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.crash import scratch, verdict

BACKGROUND = re.compile(r"flows\.operate|prefect|mlflow|tracking\.ui|checks\.py")
"""Servers, workers, and the listener."""


def prefect(path: str, body: dict[str, Any] | None = None) -> Any:
    """An answer of the Prefect server."""
    name, _, password = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
    url = f"{os.environ['PREFECT_API_URL']}/{path}"
    return httpx.post(url, json=body or {}, auth=(name, password)).raise_for_status().json()


def page() -> bool:
    """Prefect's page in a browser asks the server that it came from."""
    settings = httpx.get(f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/ui-settings")
    return settings.raise_for_status().json()["api_url"] == "/api"


def mlflow_runs(condition: str) -> list[dict[str, Any]]:
    """Runs of MLflow's server."""
    auth = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
    api = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    asked = {"experiment_name": "eugen"}
    found = httpx.get(f"{api}/experiments/get-by-name", params=asked, auth=auth).raise_for_status().json()
    number = found["experiment"]["experiment_id"]
    query = {"experiment_ids": [number], "filter": condition, "max_results": 1000}
    return httpx.post(f"{api}/runs/search", json=query, auth=auth).raise_for_status().json().get("runs", [])


def clone(folder: str) -> bool:
    """A clone of the last commit with the small benchmark of the real stages."""
    scratch.clone(Path(folder))
    return True


def seeds(folder: str, seed: str) -> bool:
    """Other seeds: transfer and all that follows are stale."""
    path = Path(folder) / "params.yaml"
    params = json.loads(path.read_text())
    params["tasks"]["vision"]["transfer"]["seeds"] = [int(seed), int(seed) + 1]
    params["tasks"]["vision"]["finetune"]["seeds"] = [int(seed)]
    path.write_text(json.dumps(params, indent=1))
    return True


def same(here: str, there: str) -> bool:
    """Equal results, times apart."""
    found = list(verdict.differences(verdict.results(Path(here)), verdict.results(Path(there))))
    print("\n".join(found))
    return not found and len(verdict.results(Path(here))) > 10


def sound(folder: str) -> bool:
    """No half-written record, no leftover file, no run that is RUNNING without a process."""
    found = verdict.broken(Path(folder)) + verdict.leftovers(Path(folder))
    found += [
        f"MLflow: {run['info']['run_name']} is RUNNING"
        for run in mlflow_runs("attributes.status = 'RUNNING'")
    ]
    alive = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    found += [
        f"Prefect: {run['name']} is {run['state_name']}"
        for run in prefect("flow_runs/filter", {"flow_runs": alive})
    ]
    print("\n".join(found))
    return not found


def busy(folder: str, verbs: str) -> bool:
    """A stage of one of these verbs is at work in the clone."""
    wanted = re.compile(rf"stages\.({verbs})\b")
    return any(wanted.search(" ".join(process.cmdline())) for process in scratch.inhabitants(Path(folder)))


def idle(folder: str) -> bool:
    """Nothing but servers and workers is at work in the clone."""
    found = (" ".join(process.cmdline()) for process in scratch.inhabitants(Path(folder)))
    left = [line for line in found if not BACKGROUND.search(line)]
    print("\n".join(left))
    return not left


def refused(url: str) -> bool:
    """The server wants a password."""
    try:
        with urlopen(url, data=b"{}", timeout=10):
            return False
    except HTTPError as error:
        return error.code == 401


def refused_connection(url: str) -> bool:
    """No server is there."""
    try:
        with urlopen(url, timeout=5):
            return False
    except HTTPError:
        return False
    except (URLError, OSError):
        return True


def deployments(count: str) -> bool:
    """So many deployments, however often they were made."""
    found = prefect("deployments/filter")
    print([deployment["name"] for deployment in found])
    return len(found) == int(count)


def online(count: str) -> bool:
    """So many workers of cpu-pool are online."""
    found = prefect("work_pools/cpu-pool/workers/filter")
    return sum(worker["status"] == "ONLINE" for worker in found) == int(count)


def scheduled() -> bool:
    """A run that the scheduler made has completed."""
    runs = prefect("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
    return any(run["auto_scheduled"] for run in runs)


def tracked(stage: str, count: str) -> bool:
    """So many runs of a stage are in MLflow, each with its end."""
    found = mlflow_runs(f"tags.stage = '{stage}'")
    print([run["info"]["status"] for run in found])
    return len(found) == int(count) and all(run["info"]["status"] == "FINISHED" for run in found)


def listen(port: str, path: str) -> bool:
    """Write what is posted here to a file, for ever."""

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Path(path).write_bytes(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    HTTPServer(("127.0.0.1", int(port)), Listener).serve_forever()
    return True


if __name__ == "__main__":
    sys.exit(not globals()[sys.argv[1]](*sys.argv[2:]))
