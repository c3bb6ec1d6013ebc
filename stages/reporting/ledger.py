"""reports/ledger.md: each claim of the papers, and each question, beside what the committed records say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.reporting import ablations, findings, gpu, kernels, own, theory
from stages.reporting.findings import Finding, condense, needs
from stages.reporting.full_size import open_at_full_size
from stages.reporting.intervals import budgets
from stages.reporting.markdown import escape, table
from stages.reporting.outcomes import Outcome, of_cells, of_scratch
from stages.reporting.scratch import runs
from stages.reporting.table import is_provisional
from stages.reporting.text import NONE
from stages.tracking.record import CellRecord, ScratchRecord


@dataclass(frozen=True)
class Evidence:
    """All that may be quoted: the cells, and both protocols' results in one shape."""

    cells: list[CellRecord]
    outcomes: list[Outcome]


Evaluate = Callable[[Evidence], list[Finding]]


@dataclass(frozen=True)
class Entry:
    """A claim of a paper, or a question of its reviewers or our own, and how records answer it."""

    kind: Literal["claim", "question", "own"]
    text: str
    where: str
    evaluate: Evaluate
    full_size: tuple[str, ...] = ()
    """Tasks whose commands test the claim at the papers' own size."""

    def findings(self, evidence: Evidence) -> list[Finding]:
        """Every result, then what stays open."""
        return self.evaluate(evidence) + (open_at_full_size(*self.full_size) if self.full_size else [])


def _narrow(evidence: Evidence) -> list[Finding]:
    """EUGens against narrow rows: on the tasks, then on the synthetic kernels over all budgets."""
    return _both(
        findings.against_layer(evidence.outcomes, "narrow"), kernels.against_layer(evidence.cells, "narrow")
    )


def _gated(evidence: Evidence) -> list[Finding]:
    """The same against gated rows, where one declared row answers."""
    return _both(ablations.gated(evidence.outcomes), kernels.gated(evidence.cells))


def _both(elsewhere: list[Finding], kernel: list[Finding]) -> list[Finding]:
    return kernel if kernel and elsewhere[0].ours == NONE else [*elsewhere, *kernel]


ENTRIES = [
    Entry(
        "claim",
        "Unbiased for polynomial activations; variance falls as 1/m; orthogonal rows lower it",
        "theorems 3.1–3.3",
        lambda e: theory.theorems(e.cells),
    ),
    Entry(
        "claim",
        "Lower MSE than SNNK and low-rank on synthetic kernels (d=512; ReLU, Softplus, GELU; 10 repeats)",
        "synthetic kernels",
        lambda e: kernels.synthetic(e.cells),
    ),
    Entry(
        "claim",
        "GPT-2 124M, OpenWebText, 11 of 12 layers: −27 % parameters, up to 27 % faster, loss close to dense",
        "language",
        lambda e: findings.sized(e.outcomes, "language", "GPT-2 has 124 M"),
        ("language",),
    ),
    Entry(
        "claim",
        "ViT-B, 6 of 12 layers: about −0.5 point at −30 % parameters",
        "vision",
        lambda e: findings.sized(e.outcomes, "vision", "ViT-B has 86 M"),
        ("vision",),
    ),
    Entry(
        "claim", "Well above low-rank at equal size", "vision", lambda e: findings.above_low_rank(e.outcomes)
    ),
    Entry(
        "claim",
        "NeRF: 24 % faster rendering, 30 % smaller, PSNR near baseline; Mip-NeRF 360: 27 % faster",
        "3D",
        lambda e: findings.sized(e.outcomes, "radiance", "NeRF has two networks of 8 layers of 256"),
        ("radiance",),
    ),
    Entry(
        "claim",
        "iSDF: 22.6 % faster inference, 5 % faster training",
        "3D",
        lambda e: findings.sized(e.outcomes, "distance", "iSDF has 4 layers of 256"),
        ("distance",),
    ),
    Entry(
        "claim",
        "Closed-form transfer in seconds keeps about 99 % of quality",
        "transfer",
        lambda e: findings.retention(e.outcomes),
        findings.RECONSTRUCTION,
    ),
    Entry(
        "claim",
        "Distillation with trainable G keeps 99.8 % (NeRF, Zip-NeRF, iSDF)",
        "transfer",
        lambda e: findings.distillation(e.outcomes),
        findings.RECONSTRUCTION,
    ),
    Entry(
        "claim",
        "Trainable G beats fixed G",
        "ablations",
        lambda e: ablations.trainable_projection(e.outcomes),
    ),
    Entry("claim", "k ≤ 3 is enough", "ablations", lambda e: ablations.order(e.outcomes)),
    Entry(
        "claim",
        "Adapters: up to 5× fewer trainable parameters at like accuracy; bundled network in closed form",
        "SNNK",
        lambda _: [needs("a task that trains adapters, and bundled rows")],
    ),
    Entry("question", "Is a narrower MLP as good?", "reviews", _narrow),
    Entry(
        "question",
        "Is the gain EUGen's or any gated block's?",
        "reviews",
        _gated,
    ),
    Entry("question", "What does the norm slot buy?", "reviews", lambda e: ablations.norm_slot(e.outcomes)),
    Entry("question", "What does training cost?", "reviews", lambda e: findings.training_cost(e.outcomes)),
    Entry("question", "Are there error bars?", "reviews", lambda e: findings.error_bars(e.outcomes)),
    Entry("question", "Does it beat quantisation?", "reviews", lambda e: kernels.quantisation(e.cells)),
    Entry(
        "question",
        "Does it hold in Transformers?",
        "reviews",
        lambda e: findings.in_transformers(e.outcomes),
    ),
    Entry(
        "own",
        "Do conditional EUGens (experts) beat the best other row at equal MACs?",
        "library",
        lambda e: own.experts(e.outcomes),
    ),
    Entry(
        "own",
        "Is a choice for each block better than pruning them all, at equal MACs or, `auto_time`, equal time?",
        "library",
        lambda e: own.choice(e.outcomes),
    ),
]

HEAD = """# Claims ledger

Generated from `reports/records/` by `python -m stages.report --readme`; edits are overwritten.

*reproduced*, *not reproduced*: decided by a 95 % Student-t interval over seeds, paired where two rows are
compared. A difference that the claim calls clear and that no interval shows is not reproduced. That more of
something is not needed is reproduced where more is worse, or the whole interval lies within a stated margin.
*not comparable*: a number under other conditions. *open*: what is missing. A claim stands once, above all
the rows that bear on it, a line each: at the budget nearest to 0.3, after the last stage, from scratch in the
base variant. Of several results in a line the worst verdict is given; all results stand under
[All results](#all-results). Provisional records do not count.
"""

GOALS = """Of this library, from the records of `make gpu-check` in `reports/gpu/`. *met*: the whole interval,
where there is one, reaches the goal.
"""


def ledger(cells: list[CellRecord], scratch: Sequence[ScratchRecord] = ()) -> str:
    """The whole file."""
    quotable = [kept for record in cells if (kept := _quotable(record))]
    trained = [kept for record in scratch if (kept := runs.quotable(record))]
    evidence = Evidence(quotable, [*of_cells(quotable), *of_scratch(trained)])
    found = [(entry, entry.findings(evidence)) for entry in ENTRIES]
    questions, ours = ([[row[0], *row[2:]] for row in _rows(kind, found)] for kind in ("question", "own"))
    lines = [HEAD, "## Claims of the papers", ""]
    lines += table(["claim", "where", "ours", "conditions", "verdict"], _rows("claim", found))
    lines += ["", "## Questions of the reviewers", ""]
    lines += table(["question", "ours", "conditions", "status"], questions)
    lines += ["", "## Questions of our own", ""]
    lines += table(["question", "ours", "conditions", "status"], ours)
    lines += ["", "## Goals on a GPU", "", GOALS, *gpu.goals()]
    lines += ["", "## All results", "", "Of every claim or question that has more than stands above."]
    for entry, results in found:
        if len(results) > len(condense(results)):
            summary = f"{escape(entry.text)} ({len(results)} results)"
            lines += ["", f"<details><summary>{summary}</summary>", ""]
            lines += table(["ours", "conditions", "verdict"], [_cells(finding) for finding in results])
            lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _quotable(record: CellRecord) -> CellRecord | None:
    """The record with its provisional budgets left out; None if nothing remains."""
    kept = [budget for budget in budgets(record) if not is_provisional(record, budget)]
    seeds = [result for result in record.seeds if result.budget in kept]
    return record.model_copy(update={"seeds": seeds}) if seeds else None


def _rows(kind: str, found: list[tuple[Entry, list[Finding]]]) -> list[list[str]]:
    rows = []
    for entry, results in found:
        said = entry.text, entry.where
        for finding in condense(results) if entry.kind == kind else []:
            rows.append([*said, *_cells(finding)])
            said = "", ""
    return rows


def _cells(finding: Finding) -> list[str]:
    return [finding.ours, finding.conditions, finding.verdict]
