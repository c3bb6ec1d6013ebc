"""Sentences on training from scratch: every one is computed, and "better" only from a paired test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.reporting import text
from stages.reporting.ablations import GATED
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import Comparison, Interval, best_first, mean_interval, nearest
from stages.reporting.scratch import runs
from stages.reporting.verdicts import relation
from stages.tracking.record import ScratchRecord

NARROW = "narrow"
RIVALS = (NARROW, GATED, "low_rank")
"""Layers that each EUGen is told against, beside dense."""
QUESTION = "Is the gain EUGen's or any gated block's?"


def headline(records: Sequence[ScratchRecord]) -> list[str]:
    """The base variant at one budget, for the top of the page; nothing where no run has a quality."""
    for variant in runs.variants(records):
        found = [b for b in runs.row_budgets(records, variant) if ranked(records, variant, b)]
        if found:
            budget = nearest(found)
            said = [verdict(records, variant, budget), *gated(records, variant, budget)]
            return [f"Trained from scratch. {said[0]}", *said[1:]]
    return []


def sentences(records: Sequence[ScratchRecord]) -> tuple[list[str], list[str]]:
    """What a task's rows say: first of the whole and of the base variant, then of the other variants."""
    told = [_scope(records), *ends(records), *baselines(records), *diverged(records)]
    more: list[str] = []
    for i, variant in enumerate(runs.variants(records)):
        for budget in reversed(runs.row_budgets(records, variant)):
            if ranked(records, variant, budget):
                said = [verdict(records, variant, budget), *gated(records, variant, budget)]
                (more if i else told).extend(said)
    return told, more


def ranked(
    records: Sequence[ScratchRecord], variant: str, budget: float
) -> list[tuple[Interval, ScratchRecord]]:
    """Rows but dense that have a result, best mean first."""
    rows = [record for record in records if record.row != DENSE]
    found = [(mean_interval(list(runs.scores(r, variant, budget).values())), r) for r in rows]
    return best_first(found, records[0].higher_is_better)


def verdict(records: Sequence[ScratchRecord], variant: str, budget: float) -> str:
    """The best mean, whether it differs from the next and from dense, and how each EUGen does."""
    rows = ranked(records, variant, budget)
    mean, first = rows[0]
    parts = [f"best mean {text.quality(mean)} (n={mean.n}) by {first.row}"]
    if len(rows) > 1:
        second = rows[1][1]
        comparison = runs.against(first, second, variant, budget)
        parts.append(relation(comparison, f"the next ({second.row})", size=True))
    parts.append(relation(runs.against_dense(records, first, variant, budget), "dense", size=True))
    said = [f"{variant}, budget {budget:g}: {'; '.join(parts)}."]
    alike: dict[str, list[str]] = {}
    for row in (row for _, row in rows if runs.is_eugen(row)):
        alike.setdefault(_relations(_rivals(records, row, variant, budget)), []).append(row.row)
    said += [f"{text.listing(names)}: {relations}." for relations, names in alike.items()]
    return " ".join(said)


def _relations(found: Iterator[tuple[str, Comparison | None]]) -> str:
    """Comparisons in few words: rivals of one verdict and number of seeds stand together."""
    alike: dict[tuple[str, int], list[str]] = {}
    for name, comparison in found:
        verdict = comparison.verdict if comparison else "not compared"
        alike.setdefault((verdict, comparison.difference.n if comparison else 0), []).append(name)
    words = {"no difference shown": "from", "not compared": "with"}
    return "; ".join(
        f"{verdict} {words.get(verdict, 'than')} {text.listing(names)} (n={n})"
        for (verdict, n), names in alike.items()
    )


def _rivals(
    records: Sequence[ScratchRecord], row: ScratchRecord, variant: str, budget: float
) -> Iterator[tuple[str, Comparison | None]]:
    """A row against dense and against every rival that has a result there."""
    yield DENSE, runs.against_dense(records, row, variant, budget)
    for layer in RIVALS:
        for other in records:
            if runs.layer_of(other) == layer and runs.scores(other, variant, budget):
                yield other.row, runs.against(row, other, variant, budget)


def gated(records: Sequence[ScratchRecord], variant: str, budget: float) -> list[str]:
    """The answer to `QUESTION` by the declared row, then the ablations; nothing without both sides."""
    row, control = runs.claimed_row(records), _of_layer(records, GATED, variant, budget)
    if row is None or control is None or not runs.at(row, variant, budget):
        return []
    where = f"{variant}, budget {budget:g}"
    trials = [runs.tried(record, variant, budget) for record in (row, control)]
    declared = f"{row.row}, the row declared for it ({_rates(trials[0])}, {control.row} {trials[1]})"
    if runs.is_lost(row, variant, budget):
        said = "diverged; undecided"
    else:
        comparison = runs.against(row, control, variant, budget)
        narrow = _of_layer(records, NARROW, variant, budget)
        gain = runs.against(row, narrow, variant, budget) if narrow else None
        said = f"{relation(comparison, control.row, size=True)}; {_whose(comparison, gain)}"
    return [f"{QUESTION} {where}: {declared}: {said}.", *_ablations(records, row, control, variant, budget)]


def _ablations(
    records: Sequence[ScratchRecord], row: ScratchRecord, control: ScratchRecord, variant: str, budget: float
) -> list[str]:
    """The other EUGen rows against the gated block, with what was spent on all of them together."""
    rows = [r for r in records if runs.is_eugen(r) and r is not row and runs.at(r, variant, budget)]
    if not rows:
        return []
    alike: dict[str, list[str]] = {}
    for other in rows:
        comparison = runs.against(other, control, variant, budget)
        alike.setdefault(relation(comparison, control.row), []).append(other.row)
    trials = _rates(sum(runs.tried(r, variant, budget) for r in rows))
    found = "; ".join(f"{text.listing(names)}: {relation}" for relation, names in alike.items())
    further = f"{text.plural(len(rows), 'further EUGen row')} ({trials} in all)"
    return [f"Ablations, {variant}, budget {budget:g}, {further}, no part of that answer: {found}."]


def _rates(count: int) -> str:
    return f"{text.plural(count, 'rate')} tried"


def _of_layer(
    records: Sequence[ScratchRecord], layer: str, variant: str, budget: float
) -> ScratchRecord | None:
    found = (r for r in records if runs.layer_of(r) == layer and runs.scores(r, variant, budget))
    return next(found, None)


def _whose(comparison: Comparison | None, gain: Comparison | None) -> str:
    """What follows of a comparison with the gated block, beside that with the plain narrow one."""
    if comparison is None or comparison.difference.half is None:
        return "undecided, for it takes two seeds or more that both have"
    if comparison.verdict == "worse":
        return "a plain gated block does better"
    if comparison.verdict == "better":
        return "more than a gated block's gain"
    if gain is None:
        return "nothing is shown to be EUGen's own"
    if gain.verdict == "better":
        by = relation(gain, NARROW, size=True)
        return f"it is {by}, and nothing of that is shown to be EUGen's own"
    return f"and no gain over {NARROW} is shown either"


def ends(records: Sequence[ScratchRecord], only: str | None = None) -> list[str]:
    """Names every compared row whose chosen rate has no neighbour on one side; of one variant, if named."""
    found: dict[str, list[str]] = {}
    for record in records:
        for variant in runs.variants([record]) if only is None else [only]:
            for budget in runs.budgets(record, variant):
                if runs.rate_at_end(record, variant, budget):
                    rate = runs.rate(record, variant, budget)
                    found.setdefault(record.row, []).append(f"{variant}, budget {budget:g}: {rate:g}")
    named = [f"{row} ({'; '.join(where)})" for row, where in found.items()]
    if not named:
        return []
    return [
        f"The rate chosen is an end of those tried, so a further one may do better: {text.listing(named)}."
    ]


def baselines(records: Sequence[ScratchRecord]) -> list[str]:
    """Measures that do not depend on any network: what the data give away by themselves."""
    found = runs.constants(records)
    if not found:
        return []
    named = text.listing([f"{name} {text.number(value, 4)}" for name, value in sorted(found.items())])
    return [f"The same for every network, as baselines: {named}."]


def diverged(records: Sequence[ScratchRecord]) -> list[str]:
    """Names every run that diverged."""
    found: dict[str, list[str]] = {}
    for record in records:
        for run in (run for run in record.runs if run.diverged):
            where = f"{run.variant}, budget {run.budget:g}, rate {run.learning_rate:g}, seed {run.seed}"
            found.setdefault(record.row, []).append(where)
    named = [f"{row} ({'; '.join(where)})" for row, where in found.items()]
    return [f"Diverged, and without a quality: {text.listing(named)}."] if named else []


def _scope(records: Sequence[ScratchRecord]) -> str:
    first = records[0]
    better = "higher" if first.higher_is_better else "lower"
    rates = {run.learning_rate for record in records for run in record.runs}
    rows = text.plural(len({r.row for r in records} - {DENSE}), "row")
    several = text.plural(len(runs.variants(records)), "variant")
    return (
        f"{rows} beside dense, each trained from scratch in {several}; "
        f"{text.plural(len(rates), 'learning rate')} in all, chosen per row on the validation part with the "
        f"first seed. Quality is {first.quality_name} ({better} is better) on the test part."
    )
