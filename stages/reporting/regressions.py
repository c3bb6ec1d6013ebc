"""The section on regressions: latest verdicts, what the latest run found, and the trend of each machine.

Records whose candidate was slowed down on purpose are shown and marked, and enter nothing else.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC
from typing import Any

from stages.reporting import text
from stages.reporting.inputs import Inputs
from stages.reporting.tables import Table
from stages.tracking.regression_record import Case, Quality, Ratio, Regression


def section(inputs: Inputs) -> dict[str, Any] | None:
    """What the page says of them; None where nothing was ever compared."""
    records = inputs.regressions
    if not records and not inputs.regression_faults:
        return None
    return {
        "sentences": list(_sentences(records)),
        "faults": inputs.regression_faults,
        "verdicts": verdicts(records),
        "latest": [latest(newest) for newest in newest_by_host(records)],
    }


def real(records: list[Regression]) -> list[Regression]:
    """Those that judge the code as it is."""
    return [record for record in records if not record.is_drill]


def newest_by_host(records: list[Regression]) -> list[Regression]:
    """The newest real record of every machine; `records` stand newest first."""
    newest: dict[str, Regression] = {}
    for record in real(records):
        newest.setdefault(record.host.fingerprint, record)
    return list(newest.values())


def _sentences(records: list[Regression]) -> list[str]:
    said = []
    for record in newest_by_host(records):
        said.append(
            f"Last verdict on {machine(record)}: {record.verdict}, {moment(record)} UTC, {sides(record)}: "
            f"{record.reason.rstrip('.')}."
        )
    counts = Counter(record.verdict for record in real(records))
    drills = len(records) - counts.total()
    if counts:
        parts = [f"{counts[verdict]} {verdict}" for verdict in ("pass", "fail", "inconclusive", "void")]
        total = text.plural(counts.total(), "comparison")
        said.append(f"{total}: {text.listing([part for part in parts if not part.startswith('0 ')])}.")
    if drills:
        said.append(f"{text.plural(drills, 'drill')} with a slow-down on purpose, counted nowhere.")
    return said


def verdicts(records: list[Regression]) -> Table:
    """One row a run, newest first, and one column a case."""
    cases = list(dict.fromkeys(case.name for record in records for case in record.cases))
    rows = []
    for record in records:
        found = {case.name: case for case in record.cases}
        host = f"{record.host.processor} ({record.host.fingerprint})"
        verdict = (
            f"{record.verdict}, drill +{100 * record.injected:g} %" if record.is_drill else record.verdict
        )
        cells = [_told(found[name]) if name in found else text.NONE for name in cases]
        rows.append([moment(record), sides(record), verdict, *cells, host, record.reason])
    caption = (
        "Verdicts, newest first. Each case: verdict, time of the candidate over that of the base with its "
        "99 % interval; above 1 the candidate is slower."
    )
    return Table(
        caption, ["time, UTC", "base → candidate", "verdict", *cases, "machine", "reason"], rows, labels=3
    )


def latest(record: Regression) -> Table:
    """Every case of one run."""
    columns = ["case", "verdict", "candidate / base", "pairs", "base, ms", "candidate, ms", "A/A control"]
    rows = [_case_row(case) for case in record.cases]
    caption = (
        f"The latest run on {machine(record)}: {moment(record)}, {sides(record)}. Ratios with their 99 % "
        "interval; the control, a second process of the base, must cover 1."
    )
    return Table(caption, [*columns, "quality, difference", "MACs, parameters, bytes", "reason"], rows, 2)


def _case_row(case: Case) -> list[str]:
    times = case.latency
    return [
        case.name,
        case.verdict,
        ratio(times),
        str(times.pairs) if times else text.NONE,
        text.number(times.base_ms if times else None),
        text.number(times.candidate_ms if times else None),
        ratio(case.control),
        _quality(case.quality),
        _exact(case),
        case.reason,
    ]


def _told(case: Case) -> str:
    return f"{case.verdict} {ratio(case.latency)}" if case.latency else case.verdict


def ratio(times: Ratio | None) -> str:
    """`1.002 [0.991, 1.013]`."""
    return f"{times.ratio:.3f} [{times.low:.3f}, {times.high:.3f}]" if times else text.NONE


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return text.NONE
    ends = quality.difference, quality.low, quality.high
    middle, low, high = (f"{value:+.3g}".replace("-", "−") if value else "0" for value in ends)
    return f"{quality.name} {middle} [{low}, {high}], {quality.better} is better"


def _exact(case: Case) -> str:
    changed = [f"{name} {base} → {now}" for name, (base, now) in case.exact.items() if base != now]
    return "; ".join(changed) or ("equal" if case.exact else text.NONE)


def sides(record: Regression) -> str:
    """`0123456 → 89abcde`, with a word if the candidate was not committed."""
    dirty = " + changes" if record.candidate.dirty else ""
    return f"{record.base.commit[:7]} → {record.candidate.commit[:7]}{dirty}"


def machine(record: Regression) -> str:
    """The machine in words."""
    host = record.host
    accelerator = f", {host.accelerator}" if host.accelerator else ""
    return f"{host.processor}, {text.plural(host.cores, 'core')}{accelerator} ({host.fingerprint})"


def moment(record: Regression) -> str:
    """Day and minute, UTC."""
    return f"{record.time.astimezone(UTC):%Y-%m-%d %H:%M}"
