"""A record as one page of Markdown; the verdicts come last."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import cuts, failures
from benchmarks.gpu_check.verdicts import verdicts
from benchmarks.machine import table
from benchmarks.tables import sections
from eugen.timing import Profile
from eugen.timing.tables import markdown as profile_page

FORMS = (
    "dtype",
    "tokens × d",
    "launches",
    "fused / composed",
    "composed ms",
    "fused ms",
    "of limit",
    "binds",
)


def markdown(record: dict[str, Any]) -> str:
    """The whole page."""
    lines = ["# GPU check", "", _head(record), "", *_parts(record)]
    lines += ["", "## Kernel against its definition", "", *_kernels(record)]
    lines += ["", "## Fused beside composed", "", *_forms(record["forms"])]
    if record["layers"]:
        lines += ["", "## Blocks beside dense ones", "", *sections(record["layers"], level=3)]
    for profile in record["models"]:
        graph = ", CUDA graphs" if profile["settings"]["cuda_graph"] else ""
        page = profile_page(Profile.of(profile)).replace("\n#", "\n##").strip()
        title, _, rest = page.partition("\n")
        lines += ["", f"#{title}{graph}", rest]
    return "\n".join([*lines, "", *closing(record)]) + "\n"


def closing(record: dict[str, Any]) -> list[str]:
    """What failed, what was cut, and the goals."""
    lines = []
    for title, said in (("Failed", failures(record)), ("Cut", cuts(record))):
        if said:
            lines += [f"## {title}", "", *(f"- {' '.join(line.split())}" for line in said), ""]
    rows = [[v.what, f"≥ {v.goal:g}", v.said, v.verdict] for v in verdicts(record)]
    return [*lines, "## Goals", "", *table(("goal", "least", "measured", "verdict"), rows)]


def _head(record: dict[str, Any]) -> str:
    found = record["environment"]
    dirty = ", with uncommitted changes" if found["dirty"] else ""
    quick = "Toy sizes, to try the command: no result. " if record["quick"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = found["accelerator"] or found["processor"]
    took = f"{record['wall_seconds']:.0f} of {record['budget_seconds']:.0f} s"
    return (
        f"{quick}{machine}, {record['device']}; {record['date']}; {versions}; "
        f"commit {found['commit'][:12]}{dirty}; {took}."
    )


def _parts(record: dict[str, Any]) -> list[str]:
    rows = [
        [p["part"], p["status"], f"{p['seconds']:.0f}", f"{p['budget_seconds']:.0f}", str(len(p["cut"]))]
        for p in record["parts"]
    ]
    return table(("part", "status", "s", "share, s", "cut"), rows)


def _kernels(record: dict[str, Any]) -> list[str]:
    checked = [r["of_allowed"] for r in record["kernels"] if r["of_allowed"] is not None]
    passed = sum(r["status"] == "passed" for r in record["kernels"])
    lack = record["environment"]["kernel_lacks"]
    ran = (
        "the kernel ran" if lack is None else f"the kernel does not run here ({lack}): composed operators ran"
    )
    lines = [
        f"{passed} of {len(record['kernels'])} cases agree with float64, the largest error "
        f"{max(checked, default=0):.2f} of what rounding allows; {ran}."
    ]
    return [*lines, *(f"\n{r['case']}: {r['status']}: {r['said']}" for r in record["tests"])]


def _forms(results: list[dict[str, Any]]) -> list[str]:
    timed = [result for result in results if result["status"] == "timed"]
    rows = [
        [
            r["dtype"],
            f"{r['tokens']} × {r['d']}",
            "graph" if r["cuda_graph"] else "Python",
            f"{r['speedup']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
            f"{r['composed_ms']:.4f}",
            f"{r['fused_ms']:.4f}",
            f"{r['of_limit']:.2f}",
            r["binds"],
        ]
        for r in timed
    ]
    absent = [
        f"- {r['dtype']} {r['tokens']} × {r['d']}: {r['status']}: {' '.join(r['reason'].split())}"
        for r in results
        if r["status"] != "timed"
    ]
    return [*table(FORMS, rows), *([""] if absent else []), *absent]
