"""Files and folders that are whole or not there, whatever ends their process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.clone import write_whole
from flows.dvc.repair import remove_parts
from stages.checkpoint import Progress
from stages.tracking import outbox
from stages.tracking.whole_file import disk_trouble, remove_whole, whole, write_json

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, shutil, signal
from pathlib import Path
from stages.tracking.whole_file import remove_whole, whole

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_within(folder: Path, source: str) -> None:
    """Run lines that kill their own process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", KILLED + source]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL


def test_a_kill_while_writing_leaves_the_old_file_and_a_part_that_the_next_run_removes(tmp_path: Path):
    target = tmp_path / "results" / "cells" / "vision-eugen.json"
    write_json(target, {"quality": 0.9})
    kill_within(
        target.parent,
        f"""
with whole(Path({target.name!r})) as part:
    part.write_text('{{"qual')
    die()
""",
    )
    assert target.read_text() == '{\n "quality": 0.9\n}\n'
    living = target.with_name(f".{target.name}.{os.getppid()}.part")
    living.touch()
    said: list[str] = []
    remove_parts(tmp_path, said.append)
    assert {path.name for path in target.parent.iterdir()} == {target.name, living.name}
    assert len(said) == 1 and "1 unfinished" in said[0]


def test_flows_name_their_parts_as_stages_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    monkeypatch.setattr(os, "replace", lambda part, _: names.append(Path(part).name))
    write_whole(tmp_path / "x.json", b"{}")
    with whole(tmp_path / "x.json") as part:
        part.touch()
    assert names[0] == names[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_named_with_what_it_lacks(tmp_path: Path, number: int):
    with pytest.raises(OSError, match=str(tmp_path)) as raised, whole(tmp_path / "weights", 5_000_000):
        raise OSError(number, "refused")
    assert raised.value.errno == number
    if number != errno.EROFS:
        assert "5.0 MB are needed" in str(raised.value) and "MB are free" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_torch_and_safetensors_say_of_a_full_disk_is_understood():
    said = RuntimeError("I/O error: No space left on device (os error 28)")
    assert disk_trouble(said) == errno.ENOSPC
    hidden = RuntimeError("unexpected pos 704 vs 598")
    hidden.__context__ = OSError(errno.ENOSPC, "no space")
    assert disk_trouble(hidden) == errno.ENOSPC
    assert disk_trouble(ValueError("(os error 2)")) is None


def test_a_kill_while_removing_leaves_nothing_that_a_reader_takes_for_whole(tmp_path: Path):
    (tmp_path / ".work").mkdir()
    folder = tmp_path / ".work" / "journal"
    folder.mkdir()
    (folder / "start.json").touch()
    kill_within(tmp_path, 'shutil.rmtree = die\nremove_whole(Path(".work/journal"))')
    assert not folder.exists()
    remove_parts(tmp_path, lambda _: None)
    assert list((tmp_path / ".work").iterdir()) == []


def test_finished_progress_and_delivered_journals_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A half-removed unit would fail every rerun; a journal without its end would make its run KILLED."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {transfer: {deps: []}}")
    progress = Progress("transfer", task="vision", method="eugen", params={})
    progress.store("seed0", {"seed": 0}, {})
    start = {"name": "n", "params": {}, "tags": {}, "time": 0}
    journal = outbox.Journal.create("transfer-vision-eugen", start)
    seen: list[bool] = []
    for folder, remove in ((progress.folder, progress.clear), (journal.folder, journal.remove)):
        monkeypatch.setattr("shutil.rmtree", lambda *_, place=folder, **__: seen.append(place.exists()))
        remove()
    assert seen == [False, False]
    assert outbox.journals() == [] and progress.load("seed0") is None


def test_removing_what_is_not_there_is_no_fault(tmp_path: Path):
    remove_whole(tmp_path / "absent")
