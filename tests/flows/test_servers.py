"""One pair of servers for a clone, and what a dead one is told apart by."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from flows.machine.process import lives
from flows.operate import servers
from tests.flows.toy import Toy

AT = "http://127.0.0.1:4999"


def test_a_process_number_that_was_given_again_is_another_process():
    started = psutil.Process().create_time()
    assert lives(os.getpid(), started)
    assert not lives(os.getpid(), started - 60)
    assert not lives(2**22 + 1, time.time())


def test_a_second_make_server_finds_the_first_and_leaves_its_record(tmp_path: Path):
    said: list[str] = []
    servers.record_path(tmp_path).parent.mkdir()
    with FileLock(tmp_path / ".work" / "servers.lock"):
        servers.record_path(tmp_path).write_text(json.dumps({"prefect": f"{AT}/api"}))
        servers.serve(tmp_path, "127.0.0.1", 4999, 5999, said.append)
        assert said == [f"the servers of this clone are running: Prefect {AT}, MLflow http://127.0.0.1:5999"]
        with pytest.raises(servers.CannotServe, match=f"run at {AT}/api: stop them first"):
            servers.serve(tmp_path, "127.0.0.1", 4998, 5999, said.append)
    assert servers.record_path(tmp_path).exists()


def test_a_server_that_does_not_answer_is_named(fresh: Toy):
    gone = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    code, output = fresh.bench(**gone)
    assert code == 1 and "http://127.0.0.1:9/api) does not answer" in output and "Traceback" not in output
    assert fresh.calls() == []
