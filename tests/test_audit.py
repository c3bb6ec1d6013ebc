"""The audit of pinned versions: silent only about what it has really asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def audit(folder: Path, **env: str) -> tuple[int, str]:
    (folder / "constraints.txt").write_text("Jinja2==3.1.6\nidna==3.20\n")
    command = [sys.executable, str(ROOT / ".ci/audit.py"), str(folder / "constraints.txt")]
    done = subprocess.run(
        command, env=os.environ | env, text=True, capture_output=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_without_a_network_the_real_pip_audit_is_skipped_and_says_so(tmp_path: Path):
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    code, said = audit(tmp_path, NO_PROXY="", no_proxy="", XDG_CACHE_HOME=str(tmp_path), **nowhere)
    assert code == 0 and said.startswith("audit skipped: the database of vulnerabilities is out of reach")


FINE: dict[str, Any] = {"name": "idna", "version": "3.20", "vulns": []}
BAD: dict[str, Any] = {
    "name": "jinja2",
    "version": "3.1.6",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3.1.7"]}],
}
SKIPPED: dict[str, Any] = {"name": "jinja2", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([FINE, FINE], 0, "audit: 2 of 2 packages looked up, 0 vulnerabilities known"),
        ([FINE, BAD], 1, "jinja2 3.1.6: PYSEC-1, mended by 3.1.7"),
        ([FINE, SKIPPED], 0, "audit: 1 of 2 packages looked up"),
        ([SKIPPED, SKIPPED], 0, "audit skipped: the database of vulnerabilities is out of reach (Dependency"),
    ],
)
def test_answers_of_a_database_that_is_reached(tmp_path: Path, found: list[Any], code: int, said: str):
    """The database is not to be had in every network: a stand-in answers with pip-audit's format."""
    stand_in = tmp_path / "pip_audit"
    stand_in.mkdir()
    answer = json.dumps({"dependencies": found, "fixes": []})
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text(f"print({answer!r})")
    given = audit(tmp_path, PYTHONPATH=str(tmp_path))
    assert given[0] == code and said in given[1]
