"""What is generated from the committed records: README's table, docs/transfer.md's, study page, ledger."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

from stages.reporting.advice import advice
from stages.reporting.inputs import ReportError, read_committed, read_committed_scratch
from stages.reporting.ledger import ledger
from stages.reporting.study import study
from stages.reporting.summary import summary

BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"


def generate(root: Path) -> dict[Path, str]:
    """The files that follow from the committed records, with their whole text."""
    records, scratch = read_committed(root), read_committed_scratch(root)
    readme, page = root / "README.md", root / "docs" / "transfer.md"
    return {
        readme: _filled(readme, {"table": summary(records, scratch)}),
        page: _filled(page, advice(root, records)),
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


def _filled(page: Path, tables: dict[str, str]) -> str:
    """The page with each table between its markers. Raises ReportError where there is no place for one."""
    if not page.is_file():
        raise ReportError(f"{page}: missing; restore it with `git checkout -- {page}`")
    whole = page.read_text(encoding="utf-8")
    for name, generated in tables.items():
        opening, closing = BEGIN.format(name), END.format(name)
        head, begin, rest = whole.partition(opening)
        _, end, tail = rest.partition(closing)
        if not begin or not end:
            lost = opening if not begin else closing
            raise ReportError(f"{page}: lacks the line {lost}; put both markers around the table")
        whole = f"{head}{opening}\n{generated.strip()}\n{closing}{tail}"
    return whole
