"""The regression benchmark for real in a toy clone that holds this library: worktrees, workers, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.machine import ROOT
from benchmarks.regression import worktree
from benchmarks.regression.processes import Refused, Worker, WorkerLost, started
from benchmarks.regression.worktree import FOLDER, WrongReference, candidate, checked_out, held, resolve
from tests.tracking.conftest import until

linux = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def new_clone(folder: Path, files: dict[str, str]) -> str:
    """A git repository with one commit of these files; its hash."""
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("/.work/\n__pycache__/\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "one")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def toy(tmp_path):
    """Two commits of `eugen/x.py`, the first tagged."""
    first = new_clone(tmp_path, {"eugen/x.py": "1"})
    git(tmp_path, "tag", "v1")
    (tmp_path / "eugen/x.py").write_text("2")
    git(tmp_path, "commit", "-qam", "two")
    return tmp_path, first


def test_a_reference_becomes_a_commit(toy):
    project, first = toy
    assert {resolve(project, ref).commit for ref in ("v1", "HEAD~1", first, first[:10])} == {first}
    assert resolve(project, "main").commit == git(project, "rev-parse", "HEAD") != first


@pytest.mark.parametrize("ref", ["nowhere", "", "--help", "HEAD:eugen", "-q"])
def test_an_unknown_reference_is_named(toy, ref):
    with pytest.raises(WrongReference, match=f"'{ref}' is no commit"):
        resolve(toy[0], ref)


def test_a_folder_without_git_is_no_project(tmp_path):
    with pytest.raises(WrongReference, match="is no git clone"):
        resolve(tmp_path, "HEAD")


def test_the_candidate_is_the_working_tree(toy):
    project, _ = toy
    assert candidate(project).said() == {
        "ref": "HEAD",
        "commit": git(project, "rev-parse", "HEAD"),
        "dirty": False,
    }
    (project / "notes").write_text("no source")
    assert candidate(project).dirty is False
    (project / "eugen/new.py").write_text("")
    assert candidate(project).dirty is True


def test_the_worktree_is_gone_after_any_end(toy):
    project, first = toy
    with held(project, print):
        try:
            with checked_out(project, first) as tree:
                assert tree == project / FOLDER / first and git(tree, "status", "--porcelain") == ""
                assert (tree / "eugen/x.py").read_text() == "1" and (
                    project / "eugen/x.py"
                ).read_text() == "2"
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert not tree.exists() and len(git(project, "worktree", "list").splitlines()) == 1


def test_what_a_kill_left_is_pruned_and_nothing_else(toy, tmp_path_factory):
    project, first = toy
    (project / FOLDER).mkdir(parents=True)
    git(project, "worktree", "add", "--detach", "-q", str(project / FOLDER / first), first)
    (project / FOLDER / first / "eugen/x.py").write_text("changed")
    own = tmp_path_factory.mktemp("own") / "tree"
    git(project, "worktree", "add", "--detach", "-q", str(own), first)
    with held(project, print), checked_out(project, first) as tree:
        assert (tree / "eugen/x.py").read_text() == "1"
    assert str(own) in git(project, "worktree", "list") and (own / "eugen/x.py").exists()
    assert [place.name for place in (project / FOLDER).iterdir()] == ["lock"]


def test_a_second_run_waits(toy, monkeypatch):
    said, locks = [], []
    real = worktree.fcntl.flock

    def flock(file, how):
        locks.append(how)
        if how == worktree.fcntl.LOCK_EX:  # it would wait for ever: the first one is this test
            raise TimeoutError
        real(file, how)

    with held(toy[0], said.append):
        monkeypatch.setattr(worktree.fcntl, "flock", flock)
        with pytest.raises(TimeoutError), held(toy[0], said.append):
            pass
    assert len(locks) == 2 and said == ["another regression run holds this clone: waiting until it ends"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """This library as a commit that calls a layer otherwise; the working tree has it back, and two faults."""
    project = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "eugen", project / "eugen", ignore=shutil.ignore_patterns("__pycache__"))
    aware = project / "eugen/layers/low_rank_aware.py"
    today = edit(aware, 'name="low_rank_aware"', 'name="older_name"')
    new_clone(project, {})
    aware.write_text(today)
    edit(
        project / "eugen/ffn.py",
        "self.readout.weight.copy_(weight)",
        "self.readout.weight.copy_(0.9 * weight)",
    )
    edit(
        project / "eugen/layers/eugen.py",
        "self.readout, self.down = readout, down\n",
        "self.readout, self.down = readout, down\n        self.register_buffer('fat', torch.zeros(1000))\n",
    )
    return project


def edit(path: Path, old: str, new: str) -> str:
    """Replace what must be there once; returns the text as it was."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return text


def command(project: Path, *arguments: str, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.regression", "--project", str(project), "--base", "HEAD"),
        *("--out", str(out), *arguments),
    ]


def test_a_run_finds_what_was_made_worse(clone, tmp_path):
    """Times are only asked for what no noise can hide: calls that are drawn out threefold."""
    arguments = ["--cases", "low_rank_aware-128,eugen-1", "--pairs", "16"]
    arguments += ["--seconds", "0.5", "--inject", "2.0"]
    done = subprocess.run(command(clone, *arguments, out=tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["schema"] == 1 and found["verdict"] == "fail" and found["injected"] == 2.0
    assert found["candidate"]["dirty"] is True and path.stem.endswith(f"-{found['candidate']['commit'][:7]}")
    new, worse = found["cases"]
    assert new["verdict"] == "pass" and "new: nothing to compare" in new["reason"] and new["latency"] is None
    assert "KeyError: 'low_rank_aware'" in new["reason"]
    assert worse["exact"]["parameters"][1] - worse["exact"]["parameters"][0] == 1000
    assert worse["exact"]["bytes"][1] - worse["exact"]["bytes"][0] == 4000
    assert worse["exact"]["macs"][1] == worse["exact"]["macs"][0]
    assert worse["quality"]["low"] > 0 and len(worse["quality"]["seeds"]) == 6
    assert worse["latency"]["ratio"] > 1.5
    assert all(words in worse["reason"] for words in ("more parameters", "worse:"))
    assert "slowed by 200 % on purpose" in done.stdout and "FAIL" in done.stdout and str(path) in done.stdout
    assert "2/2 eugen-1: fail" in done.stderr
    assert not list((clone / FOLDER).glob("?" * 40))


@pytest.fixture
def start():
    """Starts a command in the background; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def run(arguments: list[str]) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_worker_and_no_half_record(clone, tmp_path, start, number):
    arguments = command(clone, "--cases", "eugen-1", "--pairs", "100000", "--seconds", "300", out=tmp_path)
    process = start(arguments)
    parent = psutil.Process(process.pid)

    def cores(child: psutil.Process) -> int:
        """How many cores a worker may use, 0 for what is no worker or ends while it is asked."""
        try:
            return len(child.cpu_affinity() or ()) if "worker.py" in " ".join(child.cmdline()) else 0
        except psutil.NoSuchProcess:  # a zombie is one too
            return 0

    def workers() -> list[psutil.Process]:
        return [child for child in parent.children() if cores(child)]

    def computing() -> bool:
        """A worker's cores are set with its first place in memory."""
        return [cores(worker) for worker in workers()] == [1, 1, 1]

    until(computing, "the first samples", seconds=150)
    children = workers()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(tmp_path.iterdir())
    if number == signal.SIGTERM:
        assert process.returncode == 130 and "stopped" in said
        assert not list((clone / FOLDER).glob("?" * 40))


def test_workers_speak_of_the_library_of_their_tree(clone, tmp_path):
    with started(clone, ROOT, 1) as workers:
        assert workers.base.ask("hello")["eugen"] == str(clone)
        assert workers.candidate.ask("hello")["eugen"] == str(ROOT)
        fat, thin = (w.ask("prepare", case="eugen-1") for w in (workers.base, workers.candidate))
        assert fat["parameters"] - thin["parameters"] == 1000
        with pytest.raises(Refused, match="KeyError: 'unknown'"):
            workers.base.ask("prepare", case="unknown")
        assert workers.base.ask("place", cores=[])["ms"] > 0  # a refusal is no end
        assert workers.base.ask("sample", calls=2, lengthen=0.0)["ms"] > 0
        os.kill(workers.control.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="control's worker died"):
            workers.control.ask("hello")
    stranger = Worker("base", tmp_path, 1)
    with pytest.raises(Refused, match="is to measure"):
        stranger.ask("hello")
    stranger.stop()
    assert not psutil.pid_exists(stranger.pid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "nowhere"], "'nowhere' is no commit"),
        (["--base", "HEAD", "--cases", "eugen-1,x"], "--cases x is unknown: use dense-128"),
        (["--base", "HEAD", "--pairs", "4"], "--pairs must be at least 6"),
        (["--base", "HEAD", "--inject", "-1"], "--inject 0 or more"),
        ([], "--base"),
    ],
)
def test_wrong_usage_is_said_before_any_work(toy, arguments, words, capsys):
    from benchmarks.regression.__main__ import main

    try:
        code = main([*arguments, "--project", str(toy[0])])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (toy[0] / FOLDER).exists()
