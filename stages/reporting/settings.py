"""Tasks whose quality is a mean over settings: each setting's own value stands among the extra measures.

A measure `<quality>.<setting>` is a setting's; `relative_mse.relu.gaussian` is that of `relu.gaussian`.
"""

from __future__ import annotations

from stages.tracking.record import CellRecord


def settings_of(records: list[CellRecord]) -> list[str]:
    """Names of the settings behind a task's quality, in alphabetical order; none for most tasks."""
    return sorted(
        {
            name.removeprefix(prefix)
            for record in records
            for prefix in [f"{record.quality_name}."]
            for result in record.seeds
            for name in result.extra_transfer_only
            if name.startswith(prefix)
        }
    )


def setting_scores(record: CellRecord, budget: float, setting: str) -> dict[int, float]:
    """One setting's quality by seed after transfer alone."""
    name = f"{record.quality_name}.{setting}"
    at_budget = [result for result in record.seeds if result.budget == budget]
    return {r.seed: r.extra_transfer_only[name] for r in at_budget if name in r.extra_transfer_only}


def in_words(setting: str) -> str:
    """`relu.power_law` as `relu, power law`."""
    return ", ".join(part.replace("_", " ") for part in setting.split("."))
