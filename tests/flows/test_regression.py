"""The regression flow around a stub of the measurement: verdicts, codes, states, events, bases, stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.flows.toy import ROOT, Toy, ask, gone, newest, place_program, wait_for
from tests.regressions import BASE, CANDIDATE, case, record

HOSTILE = "<script>alert(1)</script> | `x` **y**"


@dataclass
class Clone:
    """A project with a stub in place of the measurement, and the server that its runs go to."""

    folder: Path
    env: dict[str, str]

    def behave(self, **behaviour: Any) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.regression", "--project", str(self.folder), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env | env, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def judge(self, *arguments: str, **env: str) -> tuple[int, str]:
        process = self.start(*arguments, **env)
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
        return process.returncode, output

    def asked(self) -> list[str]:
        """The arguments of every measurement that was started."""
        log = self.folder / "calls.log"
        return log.read_text().splitlines() if log.exists() else []

    def newest(self, kind: str) -> dict[str, Any]:
        return newest(self.env, kind)

    def post(self, path: str, body: Any) -> Any:
        return ask(self.env, path, body)

    def event(self, verdict: str) -> dict[str, Any]:
        """The newest event of a verdict, once the server has it: events travel on their own."""
        wanted = {"filter": {"event": {"name": [f"eugen.regression.{verdict}"]}}}
        return wait_for(lambda: self.post("events/filter", wanted)["events"], "event", 20)[0]


@pytest.fixture
def clone(tmp_path: Path, clean_env: dict[str, str], prefect_server: dict[str, str]) -> Clone:
    folder = tmp_path / "clone"
    stub = Path(__file__).with_name("regression_stub.py")
    place_program(folder, "benchmarks/regression.py", stub.read_text())
    return Clone(folder, clean_env | prefect_server)


@pytest.mark.parametrize(
    ("verdict", "code", "state"),
    [("pass", 0, ("COMPLETED", "Completed")), ("inconclusive", 3, ("FAILED", "Inconclusive"))],
)
def test_a_verdict_has_its_code_state_page_and_event(
    clone: Clone, verdict: str, code: int, state: tuple[str, str]
):
    clone.behave(code=code, record=record(case(HOSTILE, 1.1, verdict)))
    found, output = clone.judge("--base", "v0.1")
    assert found == code, output
    assert clone.asked() == ["--base v0.1"]
    assert "case toy: 300 pairs" in output and "Traceback" not in output
    run = clone.newest("flow_runs")
    assert (run["state_type"], run["state_name"]) == state
    assert "+10.0 % in time" in run["state"]["message"]
    page = clone.newest("artifacts")
    assert page["flow_run_id"] == run["id"] and page["key"] == "regression"
    assert page["data"].startswith(f"# {verdict.capitalize()}\n") and "1.100 [1.089, 1.111]" in page["data"]
    assert "<script" not in page["data"] and page["data"].count("| pass |") == (verdict == "pass")
    event = clone.event(verdict)
    assert event["resource"]["prefect.resource.id"] == "eugen.regression.abcdef012345"
    assert event["payload"]["candidate"]["commit"] == CANDIDATE and event["payload"]["base"]["commit"] == BASE
    related = {resource["prefect.resource.id"] for resource in event["related"]}
    assert f"prefect.flow-run.{run['id']}" in related


def test_a_failed_drill_says_what_it_is(clone: Clone):
    clone.behave(code=1, record=record(case("block", 1.1, "fail"), injected=0.1))
    code, _ = clone.judge("--base", "v0.1", "--inject", "0.1", "--cases", "a, b", "--seconds", "7")
    assert code == 1 and clone.newest("flow_runs")["state_name"] == "Failed"
    assert clone.asked() == ["--base v0.1 --cases a,b --inject 0.1 --seconds 7"]
    assert "drill" in clone.newest("artifacts")["data"].lower()
    event = clone.event("fail")["payload"]
    assert "drill: slowed by 10 %" in event["message"] and event["injected"] == 0.1


def test_wrong_usage_is_said_and_gives_no_verdict(clone: Clone):
    clone.behave(code=2, say="base 'nope' is no commit of this clone")
    code, output = clone.judge("--base", "nope")
    assert code == 2 and "base 'nope' is no commit of this clone" in output
    assert clone.newest("flow_runs")["state_name"] == "Failed"


def test_the_report_that_is_there_gets_the_regression(clone: Clone):
    page = clone.folder / "reports" / "report.html"
    page.parent.mkdir()
    page.write_text("before")
    report = {"cmd": f"ls results/regressions > {page}", "deps": ["results"], "outs": ["reports/report.html"]}
    (clone.folder / "dvc.yaml").write_text(json.dumps({"stages": {"report": report}}))
    assert Toy(clone.folder, clone.env).dvc("init", "--no-scm", "-q").returncode == 0
    clone.behave(code=0, record=record())
    code, output = clone.judge("--base", "v0.1")
    assert code == 0 and page.read_text() == "20260102T030405-2222222.json\n", output
    (clone.folder / "dvc.yaml").write_text(json.dumps({"stages": {"report": report | {"cmd": "false"}}}))
    code, output = clone.judge("--base", "v0.1")
    assert code == 0 and "the report does not show this regression" in output


def test_what_cannot_be_measured_is_no_failed_commit(clone: Clone):
    clone.behave(code=1, record=record(case("block", 1.1, "fail")))
    code, output = clone.judge("--base", "v0.1", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert code == 4 and "there is no verdict: the Prefect server" in output and "Traceback" not in output
    assert clone.asked() == []


def test_a_deployed_run_that_cannot_begin_rings_the_alarm(clone: Clone):
    clone.behave(code=2, say="base 'gone' is no commit of this clone")
    code, output = clone.judge("--base", "gone", PREFECT__RUNTIME__DEPLOYMENT__ID=str(uuid4()))
    assert code == 2 and "base 'gone' is no commit" in output
    message = clone.event("void")["payload"]["message"]
    assert "base 'gone' is no commit of this clone" in message


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_flow_that_is_stopped(clone: Clone, with_signal: signal.Signals):
    clone.behave(hang=True)
    process = clone.start("--base", "v0.1")
    mark = clone.folder / "hanging"
    pids = [int(pid) for pid in wait_for(lambda: mark.exists() and mark.read_text().split(), "measurement")]
    waiting = clone.start("--base", "v0.1")
    assert waiting.stdout is not None
    assert f"another benchmark holds this clone (process {process.pid}" in waiting.stdout.readline()
    clone.behave(code=0, record=record())
    process.send_signal(with_signal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if with_signal == signal.SIGTERM else -signal.SIGKILL), output
    wait_for(lambda: all(gone(pid) for pid in pids), "end of the measurement and its child", 10)
    assert ("no verdict" in output) == (with_signal == signal.SIGTERM)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0, "the clone is free again"


@pytest.mark.slow
def test_without_a_server_it_starts_its_own(clone: Clone, tmp_path: Path):
    clone.behave(code=3, record=record(case(verdict="inconclusive")))
    del clone.env["PREFECT_API_URL"]
    code, output = clone.judge("--base", "v0.1", PREFECT_HOME=str(tmp_path / "home"))
    assert code == 3 and "regression inconclusive" in output and "Traceback" not in output, output


class Listener(HTTPServer):
    """What is told when a regression fails."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[tuple[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_failed_regression_is_told_once_and_a_passed_one_is_not(clone: Clone, listener: Listener):
    url = f"http://127.0.0.1:{listener.server_port}/hook?token=hidden-word"
    source = f"from flows.operate.notify import notify\nfor _ in range(2): notify({url!r})"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=clone.env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "hidden-word" not in done.stdout + done.stderr
    assert len(clone.post("automations/filter", {})) == 2, "the second call makes no more"
    clone.behave(code=0, record=record(case("block")))
    assert clone.judge("--base", "v0.1")[0] == 0
    clone.behave(code=1, record=record(case('a "quoted" <block>', 1.1, "fail")))
    assert clone.judge("--base", "v0.1")[0] == 1
    wait_for(lambda: listener.heard, "call of the webhook", 30)
    ((kind, body),) = listener.heard
    assert kind == "application/json"
    assert body["verdict"] == "fail" and body["candidate"]["commit"] == CANDIDATE
    assert body["text"].startswith("regression fail: 2222222 against v0.1")
    for deployment in ("cpu", "nightly"):  # killed: what Prefect itself tells
        clone.post("events", [crash_of(deployment)])
    wait_for(lambda: listener.heard[1:], "call of the webhook", 30)
    assert [told["text"] for _, told in listener.heard[1:]] == [
        "regression void: a nightly run was killed, nothing was measured"
    ]


def crash_of(deployment: str) -> dict[str, Any]:
    """The event of a deployment's flow run that crashed."""
    related = {"prefect.resource.role": "deployment", "prefect.resource.name": deployment}
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.Crashed",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
        "related": [{"prefect.resource.id": f"prefect.deployment.{uuid4()}"} | related],
        "payload": {},
    }


def test_only_a_web_address_is_told():
    source = "from flows.operate.notify import notify\nnotify('file:///etc/passwd')"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=dict(os.environ), text=True, capture_output=True
    )
    assert done.returncode == 1 and "ValueError: notify: the address must begin with http" in done.stderr
