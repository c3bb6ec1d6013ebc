"""Claims of the ledger that need more than the sign of a difference: orders, and the closed form."""

from __future__ import annotations

import pytest

from stages.reporting import tables
from stages.reporting.ablations import GATED, MARGIN
from stages.reporting.kernels import gated
from stages.reporting.ledger import ledger
from stages.reporting.study import study_tables
from stages.tracking.record import CellRecord

from . import factory
from .test_readme import verdict

LAYER = {"layer": "eugen", "order": 3, "projection": "orthogonal"}
RETENTION, ORDERS = "Closed-form transfer", "k ≤ 3"


def cell(method: str, values: list[float], layer: dict, steps: int = 0, **change) -> CellRecord:
    """A row on the vision task with these qualities after transfer, by seed, at budget 0.3."""
    record = factory.cell("vision", method, layer=layer)
    first = next(result for result in record.seeds if result.budget == 0.3)
    kept = {"quality_finetuned": None, "quality_dense": 1.0} | change
    seeds = [
        first.model_copy(update=kept | {"seed": i, "quality_transfer_only": v}) for i, v in enumerate(values)
    ]
    params = record.params | {"task": {"transfer": {"refine_steps": steps}}}
    return record.model_copy(update={"seeds": seeds, "params": params})


# Below, seeds 0, 1 and 2 differ by the mean ± 2.48 times the second number.
@pytest.mark.parametrize(
    ("shift", "spread", "expected"),
    [
        (-0.05, 0.002, "reproduced"),  # worse
        (0.05, 0.002, "not reproduced"),  # better, and by more than the margin
        (0.0, 0.002, "reproduced"),  # the interval lies within the margin
        (0.003, 0.0005, "reproduced"),  # better, by less than anyone asked for
        (0.0, 0.02, "open"),  # nothing shown: that is not nothing
        (0.004, 0.003, "open"),  # reaches beyond the margin
        (0.0, 0.0, "open"),  # one observation
    ],
)
def test_that_an_order_is_enough_takes_a_loss_or_an_interval_within_the_margin(shift, spread, expected):
    three = [0.80, 0.81, 0.82]
    four = [value + shift + spread * sign for value, sign in zip(three, (-1, 0, 1), strict=True)]
    records = [cell("three", three, LAYER), cell("four", four, LAYER | {"order": 4})]
    text = ledger(records)
    assert verdict(text, ORDERS) == [expected]
    assert f"margin ±{MARGIN * 0.81:.5f}, 1 % of three" in text
    single = [r.model_copy(update={"seeds": r.seeds[:1]}) for r in records]
    assert verdict(ledger(single), ORDERS) == ["open"]


@pytest.mark.parametrize(("share", "expected"), [(0.995, "reproduced"), (0.95, "not reproduced")])
def test_retention_is_that_of_the_closed_form_alone(share: float, expected: str):
    refined = cell("eugen", [0.999, 0.9991, 0.9992], LAYER, steps=100)
    assert verdict(ledger([refined]), RETENTION) == ["open", "open"]
    assert "without local refinement, of vision, eugen" in ledger([refined])
    seeds = [r.model_copy(update={"quality_closed_form": share + 1e-4 * r.seed}) for r in refined.seeds]
    known = refined.model_copy(update={"seeds": seeds})
    text = ledger([known])
    assert verdict(text, RETENTION) == [expected, "open"]
    (line,) = [row for row in text.splitlines() if row.startswith(f"| {RETENTION}")]
    assert (
        f"{100 * share + 0.01:.1f} ± 0.0 % of top-1 | vision, eugen, budget 0.3, in closed form, n=3" in line
    )
    assert "with 100 local steps" in line
    plain = cell("eugen", [share, share + 1e-4, share + 2e-4], LAYER)
    assert verdict(ledger([plain]), RETENTION) == [expected, "open"]


def test_the_closed_form_has_a_column_where_any_record_tells_it_apart():
    refined = cell("eugen", [0.9, 0.91, 0.92], LAYER, steps=100, quality_closed_form=0.7)
    older = cell("snnk", [0.8, 0.81, 0.82], {"layer": "snnk"}, steps=100)
    plain = cell("prune", [0.85, 0.86, 0.87], {"layer": "prune"})
    records = [refined, older, plain]
    table = tables.quality(records)
    at = table.columns.index("closed form")
    assert [row[at] for row in table.rows] == ["0.7000 ± 0.0000", "–", "0.8600 ± 0.0248"]
    assert [row[at + 1][:6] for row in table.rows] == ["0.9100", "0.8100", "0.8600"]
    text = study_tables(records)
    assert "| quality | closed form | transfer alone |" in text
    assert "| eugen | 0.3 | 3 | 0.9100 ± 0.0248 | 0.7000 ± 0.0000 | 0.9100 ± 0.0248 |" in text
    assert "closed form" not in tables.quality([older, plain]).columns
    assert "closed form |" not in study_tables([older, plain])


def test_on_the_synthetic_kernels_too_one_row_answers_for_eugen():
    rows = {"narrow_gated": 1.0, "eugen": 0.5, "eugen_product": 0.8, "eugen_shared": 2.0}
    layers = {name: {"layer": name if name == GATED else "eugen"} for name in rows}
    cells = [
        factory.kernel_cell(name, strength=s, params={"method": layers[name]}) for name, s in rows.items()
    ]
    answer, *ablations = gated(cells)
    assert answer.conditions.startswith("kernel, eugen_product,") and answer.verdict == "measured"
    said = "ablation, one of 2 further EUGen rows: kernel, "
    assert [
        f.conditions.startswith(f"{said}{name},")
        for f, name in zip(ablations, ("eugen", "eugen_shared"), strict=True)
    ] == [True, True]
