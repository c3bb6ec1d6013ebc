"""The page's tables as plain text cells, so that the template only lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median

from stages.reporting import text, verdicts
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    STAGE_NAMES,
    STAGES,
    budgets,
    closed_form_scores,
    has_closed_form,
    mean_interval,
    scores,
)
from stages.reporting.settings import in_words, setting_scores, settings_of
from stages.reporting.table import (
    COLUMNS,
    cost_at,
    energy_ratio,
    every_latency_at,
    is_provisional,
    quality_in,
    results,
)
from stages.tracking.record import CellRecord, SeedResult

LONG = 48
"""Rows of the longest table that is shown at once."""


@dataclass(frozen=True)
class Table:
    """A caption that says what stands in it, headings, and rows of text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    labels: int = 1
    """How many leading columns are labels: set left, the others right."""

    @property
    def folded(self) -> bool:
        """Whether the page shows it only when asked: a table of several screens hides what follows it."""
        return len(self.rows) > LONG


def of_task(records: list[CellRecord]) -> Iterator[Table]:
    """A task's tables, in the order of the page; none without a cell."""
    if not records:
        return
    settings = settings_of(records)
    for budget in reversed(verdicts.task_budgets(records) if settings else []):
        yield by_setting(records, settings, budget)
    yield quality(records)
    yield comparisons(records)
    if any(record.precisions for record in records):
        yield precision(records)
    yield latency(records)
    yield cost(records)
    if not settings:  # there a block's fit is its setting's quality
        yield fit(records)
    yield seconds(records)


def quality(records: list[CellRecord]) -> Table:
    """Quality after transfer alone and after fine-tuning, each beside dense."""
    closed = has_closed_form(records)
    columns = ["method", "budget", *(["closed form"] if closed else []), "transfer alone", "n"]
    columns += ["fine-tuned", "n", "final − dense", "against dense", "provisional", "learning rates"]
    name = records[0].quality_name
    measures = {key for record in records for result in record.seeds for key in result.extra_transfer_only}
    extras = sorted(key for key in measures if not key.startswith(f"{name}."))  # those have their own table
    columns += [f"{extra}, {stage}" for extra in extras for stage in ("transfer", "fine-tuned")]
    rows = [_quality_row(record, b, extras, closed) for record in records for b in budgets(record)]
    caption = (
        f"{name}: mean ± 95 % Student-t half-width over n seeds. The interval covers the seeds' spread, not "
        "the choice of test examples."
    )
    return Table(caption, columns, rows)


def _quality_row(record: CellRecord, budget: float, extras: list[str], closed: bool) -> list[str]:
    found = {stage: mean_interval(list(scores(record, budget, stage).values())) for stage in STAGES}
    tuned = found["finetuned"]
    comparison = verdicts.against_dense(record, budget, "finetuned" if tuned else "transfer")
    at_budget = [result for result in record.seeds if result.budget == budget]
    rates = sorted({result.learning_rate for result in at_budget if result.learning_rate})
    row = [record.method, f"{budget:g}"]
    if closed:
        row.append(text.quality(mean_interval(list(closed_form_scores(record, budget).values()))))
    for interval in found.values():
        row += [text.quality(interval), str(interval.n) if interval else text.NONE]
    if record.method == DENSE or comparison is None:
        row += [text.NONE, text.NONE]
    else:
        row += [text.difference(comparison.difference), text.verdict(comparison)]
    row.append("yes" if is_provisional(record, budget) else "no")
    row.append(text.listing([f"{rate:g}" for rate in rates]))
    return row + [cell for name in extras for cell in _extra(at_budget, name)]


def _extra(at_budget: list[SeedResult], name: str) -> list[str]:
    kinds = ([r.extra_transfer_only for r in at_budget], [r.extra_finetuned for r in at_budget])
    return [text.quality(mean_interval([kind[name] for kind in dicts if name in kind])) for dicts in kinds]


def by_setting(records: list[CellRecord], settings: list[str], budget: float) -> Table:
    """The settings' own quality at one budget, best mean first."""
    higher = records[0].higher_is_better
    found = [
        (mean, record)
        for record in verdicts.rivals(records, budget)
        if (mean := mean_interval(list(scores(record, budget, "transfer").values())))
    ]
    rows = []
    for mean, record in sorted(found, key=lambda pair: pair[0].mean, reverse=higher):
        results = [result for result in record.seeds if result.budget == budget]
        features = [count for result in results for count in result.num_features]
        own = [mean_interval(list(setting_scores(record, budget, name).values())) for name in settings]
        label = [record.method, f"{fmean(features):.0f}" if features else text.NONE, text.quality(mean)]
        rows.append([*label, *(text.number(interval and interval.mean) for interval in own)])
    names = [in_words(name) for name in settings]
    caption = (
        f"{records[0].quality_name} at budget {budget:g} after transfer alone: mean of the settings ± 95 % "
        "Student-t half-width over repeats, then each setting, whose intervals are in the figures."
    )
    return Table(caption, ["method", "features", "mean", *names], rows)


def comparisons(records: list[CellRecord]) -> Table:
    """Every EUGen row against every other row at equal budget and stage."""
    rows = []
    for budget in verdicts.task_budgets(records):
        at_budget = verdicts.rivals(records, budget)
        pairs = [(a, b) for a in at_budget if verdicts.is_eugen(a) for b in at_budget if a is not b]
        for stage in STAGES:
            for first, second in pairs:
                comparison = verdicts.against(first, second, budget, stage)
                if comparison is not None:
                    difference = text.difference(comparison.difference)
                    labels = [first.method, second.method, f"{budget:g}", STAGE_NAMES[stage]]
                    rows.append([*labels, difference, text.verdict(comparison)])
    caption = (
        "EUGens against every other row at equal budget, paired over seeds: difference of the means with its "
        "95 % interval. Intervals are not widened for the number of comparisons: one in 20 errs by chance."
    )
    return Table(caption, ["EUGen", "against", "budget", "stage", "difference", "verdict"], rows, labels=2)


def latency(records: list[CellRecord]) -> Table:
    """Measured latency and speed-up per batch size beside the limit that MACs set."""
    columns = ["method", "budget", "device", "dtype", "threads", "batch", "placements", "pairs"]
    columns += ["dense, ms", "method, ms", "dense, examples/s", "method, examples/s"]
    columns += ["speed-up", "limit by MACs", "least time, ms", "of it reached", "set by"]
    columns += ["peak memory", "energy"]
    rows = []
    for record in records:
        for x in (x for budget in budgets(record) for x in every_latency_at(record, budget)):
            row = [record.method, f"{x.budget:g}", x.device, x.dtype, str(x.threads), str(x.batch)]
            row += [str(x.placements), str(len(x.dense_ms))]
            medians = [median(ms) if ms else None for ms in (x.dense_ms, x.method_ms)]
            row += [text.number(ms) for ms in medians]
            row += [text.number(1000 * x.batch / ms if ms else None) for ms in medians]
            row += [text.speedup(x.speedup, x.speedup_low, x.speedup_high), f"{x.speedup_limit:.2f}×"]
            row += [text.number(x.least_ms_method), text.ratio(x.limit_share), x.binds or text.NONE]
            memory = text.ratio(x.peak_bytes_method / x.peak_bytes_dense)
            rows.append([*row, memory, text.ratio(energy_ratio(x))])
    caption = (
        "Whole-model latency (medians), examples per second at that latency, and speed-up with its 95 % "
        "interval, from pairs that ran interleaved in one process at several places in memory, beside the "
        "speed-up if time followed MACs. Least time: the roofline's, at the rates of a large product and a "
        "large copy on this device. Memory and energy are relative to dense; no energy: no meter."
    )
    return Table(caption, columns, rows)


def precision(records: list[CellRecord]) -> Table:
    """Quality and time in each precision, both networks in the same one."""
    batches = sorted({x.batch for record in records for x in record.latencies})
    dense = next((record for record in records if record.method == DENSE), None)
    columns = ["method", "budget", "precision", "quality", "over the first", "over dense"]
    columns += [f"speed-up, batch {batch}" for batch in batches]
    rows = []
    for record in records:
        for found in record.precisions:
            first = quality_in(record, found.budget, record.precisions[0].dtype)
            beside = quality_in(dense, 1.0, found.dtype) if dense else None
            row = [record.method, f"{found.budget:g}", found.dtype, text.number(found.quality, 4)]
            row += [_signed(found.quality, other) for other in (first, beside)]
            timed = {x.batch: x for x in every_latency_at(record, found.budget) if x.dtype == found.dtype}
            for batch in batches:
                x = timed.get(batch)
                row.append(text.speedup(x.speedup, x.speedup_low, x.speedup_high) if x else text.NONE)
            rows.append(row)
    caption = (
        "Precisions: quality of the first seed's network in each, beside the same network in the first one "
        "and beside the dense network in the same one; speed-up over dense in the same precision. "
        "int8: products of all linear maps between bytes; int8_weight_only: bytes as weights alone."
    )
    return Table(caption, columns, rows)


def _signed(value: float, other: float | None) -> str:
    return text.NONE if other is None else text.signed(value - other, 4)


def cost(records: list[CellRecord]) -> Table:
    """Exact MACs, parameters and bytes."""
    columns = ["method", "budget", "block MACs per token", "of dense", "model MACs per example", "of dense"]
    columns += ["block parameters", "of dense", "model parameters", "of dense", "weights, MB", "of dense"]
    rows = []
    for record in records:
        for x in (cost_at(record, budget) for budget in budgets(record)):
            if x is None:
                continue
            row = [record.method, f"{x.budget:g}"]
            for part, dense in (
                (x.ffn_macs, x.ffn_macs_dense),
                (x.macs, x.macs_dense),
                (x.ffn_params, x.ffn_params_dense),
                (x.params, x.params_dense),
            ):
                row += [f"{part:,}", text.ratio(part / dense)]
            megabytes = text.number(x.weight_bytes / 1e6)
            rows.append([*row, megabytes, text.ratio(x.weight_bytes / x.weight_bytes_dense)])
    return Table("Exact cost at inference: all replaced blocks, then the whole model.", columns, rows)


def fit(records: list[CellRecord]) -> Table:
    """Held-out R² of each replaced block, mean over seeds."""
    depth = max((len(result.fit_r2) for record in records for result in record.seeds), default=0)
    rows = []
    for record in records:
        for budget in budgets(record):
            fits = [r.fit_r2 for r in record.seeds if r.budget == budget and r.fit_r2]
            means = [f"{fmean(values):.3f}" for values in zip(*fits, strict=False)]
            if means:
                rows.append([record.method, f"{budget:g}", *means, *[text.NONE] * (depth - len(means))])
    caption = "Held-out R² of each replaced block after transfer, front to back, mean over seeds."
    return Table(caption, ["method", "budget", *(f"block {i}" for i in range(1, depth + 1))], rows)


def seconds(records: list[CellRecord]) -> Table:
    """What it costs to make each network: seconds of transfer, fine-tuning and dense training."""
    rows = []
    for record in records:
        for budget in budgets(record):
            at_budget = [result for result in record.seeds if result.budget == budget]
            tuned = [r.finetune_seconds for r in at_budget if r.quality_finetuned is not None]
            row = [record.method, f"{budget:g}", text.number(fmean(r.transfer_seconds for r in at_budget))]
            row.append(text.number(fmean(tuned) if tuned else None))
            rows.append([*row, text.number(record.train_seconds_dense)])
    caption = (
        "Seconds per seed to make the network, on the machine named below; 0 for a network that came trained."
    )
    return Table(caption, ["method", "budget", "transfer", "fine-tuning", "dense training"], rows)


def all_rows(records: list[CellRecord]) -> Table:
    """results.csv, rounded for reading."""
    frame = results(records)
    frame["budget"] = frame["budget"].map("{:g}".format)
    plain = frame.astype(object).where(frame.notna(), None)
    rows = [[_cell(value) for value in row] for row in plain.itertuples(index=False)]
    return Table("All rows; the full digits are in reports/results.csv.", list(COLUMNS), rows, labels=2)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text.number(value, 4)
    return text.NONE if value is None else str(value)
