"""The profile in params.yaml, the check of the parameters, one benchmark at a time."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.clone import (
    Busy,
    WrongParameters,
    check_parameters,
    choose_profile,
    held,
    killed_mark,
    place_parameters,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("cpu", "smoke"):
        (tmp_path / "params").mkdir(exist_ok=True)
        (tmp_path / "params" / f"{name}.yaml").write_text(f"profile: {name}\n")
    (tmp_path / "params.yaml").write_text("profile: cpu\n")
    (tmp_path / ".work").mkdir()
    return tmp_path


def present(project: Path) -> str:
    return (project / "params.yaml").read_text()


def test_a_profile_takes_the_place_of_another(project: Path):
    said: list[str] = []
    choose_profile(project, "smoke", said.append)
    assert present(project) == "profile: smoke\n"
    assert said == ["params.yaml is now the profile smoke (params/smoke.yaml)"]
    choose_profile(project, "smoke", said.append)
    assert len(said) == 1, "nothing to say where nothing changed"


def test_edits_of_the_user_are_never_lost(project: Path):
    (project / "params.yaml").write_text("profile: mine\n")
    with pytest.raises(WrongParameters, match=r"edits of your own.*cp params\.yaml params/mine\.yaml"):
        choose_profile(project, "cpu", print)
    assert present(project) == "profile: mine\n"
    (project / "params" / "mine.yaml").write_text("profile: mine\n")
    choose_profile(project, "cpu", print)
    assert present(project) == "profile: cpu\n"


def test_a_committed_params_file_is_safe_and_may_be_replaced(project: Path):
    (project / "params.yaml").write_text("profile: committed\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], cwd=project, check=True)
    choose_profile(project, "cpu", print)
    assert present(project) == "profile: cpu\n"


def test_a_profile_that_changed_since_it_was_put_in_place_is_no_edit(project: Path):
    choose_profile(project, "smoke", print)
    (project / "params" / "smoke.yaml").write_text("profile: smoke, newer\n")
    choose_profile(project, "cpu", print)
    assert present(project) == "profile: cpu\n"


def test_what_a_coordinator_sent_may_be_replaced_by_what_it_sends_next(project: Path):
    (project / "params.yaml").write_text("profile: sent\n")
    assert not place_parameters(project, b"profile: sent\n", "the coordinator's")
    assert place_parameters(project, b"profile: sent later\n", "the coordinator's")
    assert present(project) == "profile: sent later\n"


def test_an_unknown_profile_names_the_known_ones(project: Path):
    with pytest.raises(WrongParameters, match="'big' is not one of cpu, smoke"):
        choose_profile(project, "big", print)


@pytest.mark.parametrize(("code", "error"), [(2, WrongParameters), (1, RuntimeError)])
def test_the_message_of_the_check_is_passed_on(project: Path, code: int, error: type[Exception]):
    (project / "stages").mkdir()
    (project / "stages" / "__init__.py").touch()
    (project / "stages" / "validate.py").write_text(
        f"import sys\nprint('tasks.x: unknown', file=sys.stderr)\nsys.exit({code})"
    )
    with pytest.raises(error, match="tasks.x: unknown"):
        check_parameters(project)


def test_a_second_benchmark_names_the_first_and_waits(project: Path):
    said: list[str] = []
    told, entered, release = threading.Event(), threading.Event(), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        told.set()

    def second() -> None:
        with held(project, tell):
            entered.set()
            release.wait()

    def impatient() -> None:
        with held(project, print, wait=False):
            pass

    with held(project, print):
        with held(project, print, wait=False):
            pass  # the same thread's: nothing to wait for
        with ThreadPoolExecutor() as pool, pytest.raises(Busy, match="another benchmark holds .*process"):
            pool.submit(impatient).result()
        other = threading.Thread(target=second, daemon=True)
        other.start()
        assert told.wait(10) and not entered.is_set()
        assert "another benchmark holds this clone (process " in said[0] and "waiting" in said[0]
    assert entered.wait(10)
    release.set()
    other.join(10)
    assert len(said) == 1


def test_a_killed_run_is_remembered_until_it_is_closed_on_the_server(project: Path):
    (project / ".work" / "bench.owner.json").write_text("{}")
    for _ in range(2):  # a run without Prefect in between closes nothing
        with held(project, print) as killed:
            assert killed
    killed_mark(project).unlink()
    with held(project, print) as killed:
        assert not killed
