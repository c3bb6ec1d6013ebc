"""The README's table, the study's page and the ledger, generated from the committed records."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

from stages.reporting.inputs import ReportError, read_committed, read_committed_scratch
from stages.reporting.ledger import ledger
from stages.reporting.study import study
from stages.reporting.summary import summary

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def generate(root: Path) -> dict[Path, str]:
    """The files that follow from the committed records, with their whole text."""
    records, scratch = read_committed(root), read_committed_scratch(root)
    readme = root / "README.md"
    return {
        readme: _between(readme, summary(records, scratch)),
        root / "reports" / "study.md": study(records, scratch),
        root / "reports" / "ledger.md": ledger(records, scratch),
    }


def drift(root: Path) -> str:
    """A unified diff from what stands in the files to what the records say; empty if they agree."""
    lines = []
    for path, wanted in generate(root).items():
        present = path.read_text(encoding="utf-8") if path.is_file() else ""
        names = f"{path} (as it stands)", f"{path} (from the records)"
        lines += unified_diff(present.splitlines(), wanted.splitlines(), *names, lineterm="", n=1)
    return "\n".join(lines)


def _between(readme: Path, generated: str) -> str:
    """The README with the table between its markers. Raises ReportError where there is no place for it."""
    if not readme.is_file():
        raise ReportError(f"{readme}: missing; restore it with `git checkout -- {readme}`")
    old = readme.read_text(encoding="utf-8")
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ReportError(
            f"{readme}: lacks the line {BEGIN if not begin else END}; put both markers around the table"
        )
    return f"{head}{BEGIN}\n{generated.strip()}\n{END}{tail}"
