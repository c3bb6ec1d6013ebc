"""Outputs that travel between clones, with the real DVC and a folder as remote."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.dvc.remote import Remote, RemoteError
from tests.flows.toy import ROOT, STAGES, Toy


def command(toy: Toy, *arguments: str, **env: str) -> tuple[int, str]:
    """Exit code and all that `python -m flows.dvc.remote` says."""
    words = [sys.executable, "-m", "flows.dvc.remote", *arguments, "--project", str(toy.folder)]
    done = subprocess.run(words, cwd=ROOT, env=toy.env | env, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def entries(toy: Toy) -> list[Path]:
    """DVC's record of past runs."""
    return sorted(path for path in (toy.folder / ".dvc/cache/runs").rglob("*") if path.is_file())


def test_a_fresh_clone_gets_every_output_and_computes_nothing(finished: Toy, fresh: Toy, tmp_path: Path):
    shared = str(tmp_path / "mounted" / "remote")
    code, said = command(finished, "push", "--remote", shared)
    assert code == 0 and "files pushed" in said
    code, said = command(fresh, "pull", EUGEN_DVC_REMOTE=shared)
    assert code == 0 and f"{STAGES} stages restored" in said
    assert fresh.dvc("status", "-q").returncode == 0
    again = fresh.dvc("repro")
    assert again.returncode == 0 and fresh.calls() == []
    assert fresh.outputs() == finished.outputs()
    assert len(entries(fresh)) == STAGES


def test_what_nobody_pushed_is_named_and_not_computed(finished: Toy, fresh: Toy, tmp_path: Path):
    Remote(finished.folder, str(tmp_path / "remote")).push()
    params = fresh.folder / "params.yaml"
    changed = yaml.safe_load(params.read_text())
    changed["methods"]["eugen"]["order"] = 3
    params.write_text(yaml.safe_dump(changed))
    remote = Remote(fresh.folder, str(tmp_path / "remote"))
    said: list[str] = []
    found = remote.pull(say=said.append)
    assert found.missing == ["transfer@vision-eugen"] and found.missing[0] in said[-1]
    assert set(found.restored) == {
        "prepare@vision",
        "baseline@vision",
        *(f"{verb}@vision-dense" for verb in ("transfer", "finetune", "profile")),
    }
    assert fresh.calls() == []
    found = remote.pull("transfer@vision-dense", say=said.append)
    assert len(found.present) == 3 and not found.restored and not found.missing


def test_what_is_here_of_a_stage_that_nobody_pushed_stays(finished: Toy, tmp_path: Path):
    shared = str(tmp_path / "remote")
    assert command(finished, "push", "--remote", shared)[0] == 0
    before = finished.outputs()
    (finished.folder / "results" / "note").write_text("the report is stale now")
    code, said = command(finished, "pull")
    assert code == 0 and "not in the remote, the next run computes them: report" in said
    assert finished.outputs() == before | {"results/note": b"the report is stale now"}
    made = finished.folder / "reports" / "report.html"
    made.write_text("by hand")
    code, said = command(finished, "pull")
    assert code == 1 and "dvc commit -f report" in said and made.read_text() == "by hand"


def test_a_changed_byte_in_the_remote_is_not_taken(finished: Toy, fresh: Toy, tmp_path: Path):
    shared = tmp_path / "remote"
    Remote(finished.folder, str(shared)).push()
    victim = finished.folder / "artifacts/transfer/vision/eugen/content"
    for path in (shared / "files").rglob("*"):
        if path.is_file() and path.read_bytes() == victim.read_bytes():
            path.chmod(0o644)
            path.write_bytes(victim.read_bytes()[:-1] + b"?")
    found = Remote(fresh.folder, str(shared)).pull()
    assert "transfer@vision-eugen" in found.missing and "transfer@vision-dense" in found.restored
    assert not (fresh.folder / "artifacts/transfer/vision/eugen/content").exists()


def test_the_remote_is_remembered_where_git_does_not_look(fresh: Toy, tmp_path: Path):
    before = (fresh.folder / ".dvc/config").read_bytes()
    Remote(fresh.folder, str(tmp_path / "remote"))
    assert (fresh.folder / ".dvc/config").read_bytes() == before
    assert str(tmp_path / "remote") in (fresh.folder / ".dvc/config.local").read_text()
    assert "/config.local" in (ROOT / ".dvc/.gitignore").read_text().split()
    with pytest.raises(RemoteError, match=f"{tmp_path / 'remote'} is not there"):
        Remote(fresh.folder).pull()


@pytest.mark.parametrize(
    ("url", "endpoint", "complaint"),
    [
        ("ssh://host/folder", "", "is not a folder, or s3://"),
        ("s3://", "", "is not a folder, or s3://"),
        ("s3://key:secret@bucket/path", "", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/path", "http://key:secret@127.0.0.1:9000", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_an_address_that_cannot_be_used_says_why(
    fresh: Toy, monkeypatch: pytest.MonkeyPatch, url: str, endpoint: str, complaint: str
):
    monkeypatch.setenv("EUGEN_S3_ENDPOINT", endpoint)
    with pytest.raises(RemoteError, match=complaint) as refused:
        Remote(fresh.folder, url)
    assert "secret" not in str(refused.value)
    assert not (fresh.folder / ".dvc/config.local").exists()


def test_without_a_remote_and_with_one_that_is_not_there(fresh: Toy, tmp_path: Path):
    code, said = command(fresh, "pull")
    assert code == 1 and "EUGEN_DVC_REMOTE" in said and "Traceback" not in said
    code, said = command(fresh, "pull", "--remote", str(tmp_path / "absent"))
    assert code == 1 and f"the remote {tmp_path / 'absent'} is not there" in said
    (tmp_path / "file").write_text("in the way")
    code, said = command(fresh, "push", "--remote", str(tmp_path / "file"))
    assert code == 1 and f"the remote {tmp_path / 'file'} cannot be written" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(finished: Toy, tmp_path: Path):
    (tmp_path / "remote").mkdir(mode=0o555)
    remote = Remote(finished.folder, str(tmp_path / "remote"))
    with pytest.raises(RemoteError, match="cannot be written"):
        remote.push()


KEYS = {"AWS_ACCESS_KEY_ID": "planted-key-id", "AWS_SECRET_ACCESS_KEY": "planted-secret-key"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment that leads to an S3-compatible server on this machine, with an empty bucket."""
    server = pytest.importorskip("moto.server", reason="needs the package moto").ThreadedMotoServer(
        "127.0.0.1", port=0, verbose=False
    )
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    try:
        boto3 = pytest.importorskip("boto3")
        named = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **named).create_bucket(Bucket="shared")
        env = KEYS | {"EUGEN_S3_ENDPOINT": endpoint, "EUGEN_DVC_REMOTE": "s3://shared/outputs"}
        yield env | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    finally:
        server.stop()


@pytest.mark.slow
def test_s3_compatible_storage_by_configuration(finished: Toy, fresh: Toy, s3: dict[str, str]):
    code, said = command(finished, "push", **s3)
    assert code == 0 and "files pushed" in said, said
    code, told = command(fresh, "pull", **s3)
    assert code == 0 and f"{STAGES} stages restored" in told, told
    assert fresh.outputs() == finished.outputs() and fresh.calls() == []
    config = (fresh.folder / ".dvc/config.local").read_text()
    assert s3["EUGEN_S3_ENDPOINT"] in config
    assert not [secret for secret in KEYS.values() if secret in said + told + config]


@pytest.mark.slow
def test_s3_that_is_out_of_reach_or_lacks_the_bucket(finished: Toy, s3: dict[str, str]):
    code, said = command(finished, "push", **(s3 | {"EUGEN_DVC_REMOTE": "s3://other/outputs"}))
    assert code == 1 and "the DVC remote cannot be used" in said and "bucket does not exist" in said, said
    assert len(said) < 500
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
        code, said = command(finished, "pull", **(s3 | {"EUGEN_S3_ENDPOINT": dead, "AWS_MAX_ATTEMPTS": "1"}))
        assert code == 1 and "the DVC remote cannot be used" in said, said
        assert "Traceback" not in said and dead in said
