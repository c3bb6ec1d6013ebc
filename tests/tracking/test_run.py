"""What a stage may say, and what a failure leaves behind. No MLflow in these."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stages.tracking import process, stage_run
from stages.tracking.outbox import Journal
from stages.tracking.record import Failure, write_record
from stages.tracking.run import Run, flatten
from tests.tracking.conftest import Stage, finish


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with tracking off. The test process itself must outlive a detached shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EUGEN_TRACKING", "off")
    monkeypatch.setattr(process, "die_with_parent", lambda: None)
    return tmp_path


def journal_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Journal]:
    monkeypatch.chdir(folder)
    journal = Journal.create("x", {"name": "x", "params": {}, "tags": {}, "time": 1})
    return Run(journal), journal


def left(stage: str) -> Failure:
    return Failure(stage=stage, task="vision", method="eugen", error="e", traceback="t", time="now")


def test_parameters_are_flattened_to_dotted_text() -> None:
    flat = flatten({"a": {"b": [1, 2.5], "c": {}}, "d": None, "e": "text", "f": {"g": {"h": True}}})
    assert flat == {"a.b": "[1, 2.5]", "a.c": "{}", "d": "null", "e": "text", "f.g.h": "true"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_by_name(tmp_path, monkeypatch, value: float) -> None:
    run, journal = journal_run(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="'quality' is .* at step 3"):
        run.metrics({"fine": 1.0, "quality": value}, step=3)
    with pytest.raises(ValueError, match="'loss' is .* at step 1"):
        run.curve("loss", [(0, 1.0), (1, value)])
    assert list(journal.events()) == []


def test_a_name_mlflow_would_refuse_is_refused_at_once(tmp_path, monkeypatch) -> None:
    run, _ = journal_run(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="'quality@0.3'"):
        run.metrics({"quality@0.3": 1.0})


def test_an_artifact_that_is_not_there_is_refused(tmp_path, monkeypatch) -> None:
    run, _ = journal_run(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"missing\.bin"):
        run.artifact("missing.bin")


def test_artifacts_are_kept_as_they_were(tmp_path, monkeypatch) -> None:
    run, journal = journal_run(tmp_path, monkeypatch)
    (tmp_path / "figures" / "deep").mkdir(parents=True)
    for name in ("weights.bin", "figures/a.svg", "figures/deep/b.svg"):
        (tmp_path / name).write_text("first")
    run.artifact("weights.bin", folder="weights")
    run.artifact(tmp_path / "figures")
    journal.keep_artifacts()
    (tmp_path / "weights.bin").write_text("second")
    (tmp_path / "figures" / "a.svg").unlink()
    file, folder = (journal.artifact_source(event) for event in journal.events())
    assert file is not None and file.read_text() == "first"
    assert folder is not None and (folder / "a.svg").read_text() == "first"
    assert (folder / "deep" / "b.svg").read_text() == "first"


def test_an_unfinished_line_is_not_read(tmp_path, monkeypatch) -> None:
    run, journal = journal_run(tmp_path, monkeypatch)
    run.tag("a", "b")
    with (journal.folder / "events.jsonl").open("a") as file:
        file.write('{"kind": "ta')
    assert list(journal.events()) == [{"kind": "tag", "key": "a", "value": "b"}]


FULL_DISK = """
import resource, signal
from stages.tracking.outbox import Journal
from stages.tracking.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal.create("x", {"name": "x", "params": {}, "tags": {}, "time": 1})
run = Run(journal)
run.tag("0", "a")
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for number in range(1, 5):
    run.tag(str(number), "b" * 150)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.tag("5", "c")
print([event["key"] for event in journal.events()])
"""


def test_a_full_disk_is_said_once_and_loses_nothing(start: Stage) -> None:
    out, err = finish(start(FULL_DISK))
    assert out.strip() == "['0', '1', '2', '3', '4', '5']"
    assert err.count("free some disk space") == 1 and "work goes on" in err


def test_an_exception_is_recorded_and_passes_on(quiet: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage_run("transfer", task="vision", method="eugen", params={}):
        print(1 / 0)
    left_behind = Failure.model_validate_json((quiet / "results/failures/vision-eugen.json").read_text())
    assert (left_behind.stage, left_behind.method) == ("transfer", "eugen")
    assert left_behind.error == "ZeroDivisionError: division by zero"
    assert "print(1 / 0)" in left_behind.traceback


def test_a_stage_without_method_fails_for_all(quiet: Path) -> None:
    with pytest.raises(ValueError, match="bad"), stage_run("baseline", task="vision", params={}):
        raise ValueError("bad")
    assert json.loads((quiet / "results/failures/vision-all.json").read_text())["method"] is None


def test_an_interrupt_is_no_failure(quiet: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage_run("transfer", task="vision", method="eugen", params={}):
        raise KeyboardInterrupt
    assert not (quiet / "results/failures").exists()


@pytest.mark.parametrize(("stage", "stays"), [("transfer", False), ("finetune", True)])
def test_a_new_start_forgets_the_failure_of_its_own_stage(quiet: Path, stage: str, stays: bool) -> None:
    path = quiet / "results/failures/vision-eugen.json"
    write_record(path, left(stage))
    with stage_run("transfer", task="vision", method="eugen", params={}):
        assert path.exists() == stays


def test_switched_off_keeps_nothing_but_works(quiet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_run("transfer", task="vision", method="eugen", params={"seeds": [0]}) as run:
        run.metrics({"quality": 0.9})
        run.progress("seed 1/3")
        with pytest.raises(ValueError, match="quality"):
            run.metrics({"quality": math.nan})
    assert capsys.readouterr().out == "seed 1/3\n"
    assert not (quiet / ".work/outbox").exists() and not (quiet / "mlflow.db").exists()


def test_overhead_is_the_age_of_the_process_at_entry(start: Stage) -> None:
    source = """
import time
begun = time.time()
time.sleep(0.3)
from stages.tracking import stage_run
with stage_run("transfer", task="vision", method="eugen", params={}) as run:
    print(run.overhead_seconds, time.time() - begun)
    """
    overhead, since = map(float, finish(start(source, EUGEN_TRACKING="off"))[0].split())
    assert 0.3 <= since - 0.02 <= overhead <= since + 5.0
