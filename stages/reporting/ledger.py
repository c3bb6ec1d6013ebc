"""reports/ledger.md: each claim of the papers beside what the committed records say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from stages.reporting import findings, kernels, theory
from stages.reporting.findings import Finding, needs
from stages.reporting.intervals import budgets
from stages.reporting.markdown import table
from stages.reporting.table import is_provisional
from stages.tracking.record import CellRecord

Evaluate = Callable[[list[CellRecord]], list[Finding]]


@dataclass(frozen=True)
class Entry:
    """A claim of a paper or a question of its reviewers, and how records answer it."""

    kind: Literal["claim", "question"]
    text: str
    where: str
    evaluate: Evaluate


ENTRIES = [
    Entry(
        "claim",
        "Unbiased for polynomial activations; variance falls as 1/m; orthogonal rows lower it",
        "theorems 3.1–3.3",
        theory.theorems,
    ),
    Entry(
        "claim",
        "Lower MSE than SNNK and low-rank on synthetic kernels (d=512; ReLU, Softplus, GELU; 10 repeats)",
        "synthetic kernels",
        kernels.synthetic,
    ),
    Entry(
        "claim",
        "GPT-2 124M, OpenWebText, 11 of 12 layers: −27 % parameters, up to 27 % faster, loss close to dense",
        "language",
        needs("records of a task `language`"),
    ),
    Entry(
        "claim",
        "ViT-B, 6 of 12 layers: about −0.5 point at −30 % parameters",
        "vision",
        findings.image_points,
    ),
    Entry("claim", "Well above low-rank at equal size", "vision", findings.above_low_rank),
    Entry(
        "claim",
        "NeRF: 24 % faster rendering, 30 % smaller, PSNR near baseline; Mip-NeRF 360: 27 % faster",
        "3D",
        needs("records of a task `radiance`"),
    ),
    Entry(
        "claim",
        "iSDF: 22.6 % faster inference, 5 % faster training",
        "3D",
        needs("records of a task `distance`"),
    ),
    Entry(
        "claim", "Closed-form transfer in seconds keeps about 99 % of quality", "transfer", findings.retention
    ),
    Entry(
        "claim",
        "Distillation with trainable G keeps 99.8 % (NeRF, Zip-NeRF, iSDF)",
        "transfer",
        needs("records of the tasks `radiance` and `distance`"),
    ),
    Entry("claim", "Trainable G beats fixed G", "ablations", findings.trainable_projection),
    Entry("claim", "k ≤ 3 is enough", "ablations", kernels.order),
    Entry(
        "claim",
        "Adapters: up to 5× fewer trainable parameters at like accuracy; bundled network in closed form",
        "SNNK",
        needs("a task that trains adapters, and bundled rows"),
    ),
    Entry("question", "Is a narrower MLP as good?", "reviews", kernels.against_narrow),
    Entry("question", "What does the norm slot buy?", "reviews", findings.norm_slot),
    Entry("question", "What does training cost?", "reviews", findings.training_cost),
    Entry("question", "Are there error bars?", "reviews", findings.error_bars),
    Entry("question", "Does it beat quantisation?", "reviews", kernels.quantisation),
    Entry("question", "Does it hold in Transformers?", "reviews", findings.in_transformers),
]

HEAD = """# Claims ledger

Generated from `reports/records/` by `python -m stages.report --readme`; edits are overwritten.

*reproduced*, *not reproduced*: decided by a 95 % Student-t interval over seeds, paired where two rows are
compared. A difference that the claim calls clear and that no interval shows is not reproduced.
*not comparable*: a number under other conditions. *open*: what is missing. A claim stands once, above all
the rows that bear on it. Provisional records do not count.
"""


def ledger(records: list[CellRecord]) -> str:
    """The whole file."""
    quotable = [kept for record in records if (kept := _quotable(record))]
    claims = _rows("claim", quotable)
    questions = _rows("question", quotable)
    lines = [HEAD, "## Claims of the papers", ""]
    lines += table(["claim", "where", "ours", "conditions", "verdict"], claims)
    lines += ["", "## Questions of the reviewers", ""]
    lines += table(["question", "ours", "conditions", "status"], [[row[0], *row[2:]] for row in questions])
    return "\n".join(lines) + "\n"


def _quotable(record: CellRecord) -> CellRecord | None:
    """The record with its provisional budgets left out; None if nothing remains."""
    kept = [budget for budget in budgets(record) if not is_provisional(record, budget)]
    seeds = [result for result in record.seeds if result.budget in kept]
    return record.model_copy(update={"seeds": seeds}) if seeds else None


def _rows(kind: str, records: list[CellRecord]) -> list[list[str]]:
    rows = []
    for entry in (entry for entry in ENTRIES if entry.kind == kind):
        said = entry.text, entry.where
        for finding in entry.evaluate(records):
            rows.append([*said, finding.ours, finding.conditions, finding.verdict])
            said = "", ""
    return rows
