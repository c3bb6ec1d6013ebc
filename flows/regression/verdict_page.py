"""A regression's verdict for a person: one line, and one page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MEANING = {
    "pass": "Nothing got slower, larger or worse beyond what the measurement can tell.",
    "fail": "The candidate is worse, and a second measurement agreed where times are concerned.",
    "inconclusive": "The machine was too noisy to decide. This is no pass: measure again on a quiet machine.",
    "void": "The measurement itself cannot be trusted: nothing was learnt about the candidate.",
}
_NONE = "–"


def headline(record: dict[str, Any]) -> str:
    """`regression fail: 0123456 against v0.1 (89abcde) on Example CPU: the reason`."""
    drill = f" (drill: slowed by {100 * injected:g} %)" if (injected := record.get("injected")) else ""
    compared = f"{sides(record)} on {record['host']['processor']}: " if "host" in record else ""
    return f"regression {record['verdict']}{drill}: {compared}{record['reason']}"


def sides(record: dict[str, Any]) -> str:
    """`candidate against base`."""
    base, candidate = record["base"], record["candidate"]
    dirty = " with uncommitted changes" if candidate["dirty"] else ""
    short = base["commit"][:7]
    named = (
        short if base["ref"] == base["commit"] else f"{base['ref']} ({short})"
    )  # an alias came as its commit
    return f"{candidate['commit'][:7]}{dirty} against {named}"


def page(record: dict[str, Any]) -> str:
    """Verdict, reason, a table of the cases and the conditions, as Markdown without foreign markup."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"# {_safe(record['verdict']).capitalize()}"
    yield "\n" + (f"**{_safe(sides(record))}.** " if "host" in record else "") + _safe(record["reason"])
    yield f"\n{MEANING[record['verdict']]}"
    if injected := record.get("injected"):
        yield f"\n**Drill:** the candidate was slowed down by {100 * injected:g} % on purpose."
    if record["cases"]:
        columns = ["case", "verdict", "time, candidate / base [CI99]", "pairs", "A/A control [CI99]"]
        columns += ["quality, candidate − base", "MACs, parameters, bytes", "reason"]
        yield "\n| " + " | ".join(columns) + " |"
        yield "|" + " --- |" * len(columns)
        for case in record["cases"]:
            yield "| " + " | ".join(_cells(case)) + " |"
        yield "\nAbove 1 the candidate is slower. The control is a second process of the base: it must be 1."
    if "host" in record:
        host = record["host"]
        machine = f"{host['processor']}, {host['cores']} cores, {host['memory_gb']:g} GB"
        machine += f", {host['accelerator']}" if host.get("accelerator") else ""
        versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        yield f"\nMeasured {_safe(record['time'])} in {record['seconds']:.0f} s on {_safe(machine)}"
        yield f"(fingerprint {_safe(host['fingerprint'])}); {_safe(versions)}."
    if record.get("file"):
        yield f"\nRecord: `{_safe(record['file'])}`"


def _cells(case: dict[str, Any]) -> list[str]:
    times, quality = case.get("latency"), case.get("quality")
    return [
        _safe(case["name"]),
        _safe(case["verdict"]),
        _ratio(times),
        str(times["pairs"]) if times else _NONE,
        _ratio(case.get("control")),
        _quality(quality) if quality else _NONE,
        _safe(_exact(case.get("exact") or {})),
        _safe(case["reason"]),
    ]


def _ratio(times: dict[str, Any] | None) -> str:
    return f"{times['ratio']:.3f} [{times['low']:.3f}, {times['high']:.3f}]" if times else _NONE


def _quality(quality: dict[str, Any]) -> str:
    middle, low, high = (f"{quality[key]:+.4g}" for key in ("difference", "low", "high"))
    return f"{middle} [{low}, {high}] {_safe(quality['name'])}"


def _exact(pairs: dict[str, list[int | None]]) -> str:
    changed = [f"{name} {base} → {now}" for name, (base, now) in pairs.items() if base != now]
    return "; ".join(changed) or ("equal" if pairs else _NONE)


def _safe(text: Any) -> str:
    """Text that neither a table, Markdown nor HTML acts on."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*[]|":
        flat = flat.replace(sign, f"&#{ord(sign)};")
    return flat
