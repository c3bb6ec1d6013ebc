"""Known vulnerabilities of the exact versions in a constraints file: `python .ci/audit.py [FILE]`.

Exit codes: 0 none is known, or the database could not be asked, which is said; 1 some are known. One that
does not concern us is accepted by its name and the reason, a line each, in `.ci/accepted-vulnerabilities`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LIMIT_S = 180
ACCEPTED = Path(__file__).with_name("accepted-vulnerabilities")


def ask(constraints: Path) -> list[dict] | str:
    """pip-audit's findings, one entry for each package, or why there are none."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(constraints), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"no answer within {LIMIT_S} s"
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1][-300:]
    # A mirror that knows no vulnerabilities makes pip-audit skip every package and say that all is well.
    if all("skip_reason" in package for package in found):
        return found[0]["skip_reason"] if found else "the file pins nothing"
    return found


def accepted() -> set[str]:
    """Names of vulnerabilities that were judged not to concern us."""
    lines = ACCEPTED.read_text(encoding="utf-8").splitlines() if ACCEPTED.exists() else []
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def main() -> int:
    """Print what is known."""
    constraints = Path(sys.argv[1] if len(sys.argv) > 1 else "constraints.txt")
    found = ask(constraints)
    if isinstance(found, str):
        print(f"audit skipped: the database of vulnerabilities is out of reach ({found})")
        return 0
    known = 0
    for package in found:
        for one in package.get("vulns", []):
            if accepted().isdisjoint({one["id"], *one.get("aliases", [])}):
                known += 1
                cure = ", ".join(one.get("fix_versions", [])) or "nothing yet"
                print(f"{package['name']} {package['version']}: {one['id']}, mended by {cure}")
    asked = sum("skip_reason" not in package for package in found)
    print(f"audit: {asked} of {len(found)} packages looked up, {known} vulnerabilities known")
    return int(known > 0)


if __name__ == "__main__":
    sys.exit(main())
