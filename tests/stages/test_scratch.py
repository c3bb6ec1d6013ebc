"""Rows trained from scratch: equal trials, the validation part's choice, the same batches, and their cost."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eugen
from eugen import FFNLayer
from stages import comparison as compared
from stages.comparison import Comparison, Step, Trainings, measure_cost, start_as
from stages.params import ScratchSettings, ScratchVariant
from stages.rows import Method
from stages.scratch import Made, flat_metrics, run_variant
from stages.tracking.run import Run
from tests.stages.toy_task import Toy

NARROW = Method("narrow", "narrow", {})
DENSE = Method("dense", "dense", {})


class Kept:
    """Finished units in memory, as `Progress` keeps them in files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.units = folder, {}

    def load(self, name: str):
        return self.units.get(name)

    def store(self, name: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.units[name] = (values, tensors)


def comparison(task: Toy | None = None, **change: Any) -> Comparison:
    settings = ScratchSettings(
        budgets=[0.5], seeds=[5, 6, 7], learning_rates=[1e-3, 3e-2], variants={"base": ScratchVariant()}
    )
    return Comparison("base", task or Toy(), settings, ScratchVariant(**change))


def made(tmp_path: Path, row: Method = NARROW, task: Toy | None = None, **change: Any) -> Made:
    result = Made([], [], [])
    run_variant(comparison(task, **change), row, Kept(tmp_path), Run(None), result)
    return result


def test_every_rate_is_tried_with_the_first_seed_and_the_others_follow_the_best(tmp_path):
    runs = made(tmp_path).runs
    assert [(r.seed, r.learning_rate) for r in runs[:2]] == [(5, 1e-3), (5, 3e-2)]
    best = min(runs[:2], key=lambda r: r.validation or math.inf).learning_rate
    assert [(r.seed, r.learning_rate, r.chosen) for r in runs[2:]] == [(6, best, True), (7, best, True)]
    assert [r.chosen for r in runs[:2]] == [r.learning_rate == best for r in runs[:2]]


def test_where_higher_is_better_the_highest_is_chosen(tmp_path):
    task = Toy()
    task.higher_is_better = True
    runs = made(tmp_path, task=task).runs
    (chosen,) = [r for r in runs[:2] if r.chosen]
    assert chosen.validation == max(r.validation or -math.inf for r in runs[:2])


def test_a_variant_has_its_own_seeds_rates_budgets_and_blocks(tmp_path):
    result = made(tmp_path, seeds=[1], learning_rates=[1e-2], budgets=[0.25, 1.0], blocks=1)
    assert [(r.seed, r.learning_rate, r.budget, r.chosen) for r in result.runs] == [
        (1, 1e-2, 0.25, True),
        (1, 1e-2, 1.0, True),
    ]
    with pytest.raises(ValueError, match="blocks = 2: the network has 1 feed-forward blocks"):
        made(tmp_path, blocks=2)


def test_all_rows_see_the_same_batches_and_start_from_the_same_draw(tmp_path, monkeypatch):
    task, seen = Toy(), []
    draw = task.draw
    monkeypatch.setattr(task, "draw", lambda n, g: seen.append(batch := draw(n, g)) or batch)
    here = comparison(task)
    for row in (DENSE, NARROW):
        Trainings(here, row, row.budgets([0.5])[0], Kept(tmp_path), Run(None)).one(1e-3, 5)
    half = [batch[0] for batch in seen if len(batch[0]) == 8]
    assert len(half) == 24
    assert all(torch.equal(a, b) for a, b in zip(half[:12], half[12:], strict=True))
    drawn = here.network(eugen.DenseConfig(), 5)
    fresh = task.fresh(5)
    assert torch.equal(drawn[1][0].up.weight, fresh[1][0].weight), "dense stays as the task draws it"
    assert torch.equal(drawn[3].weight, fresh[3].weight), "what is not replaced starts as in every row"


def test_a_killed_row_goes_on_with_what_was_finished(tmp_path, monkeypatch):
    kept, whole, again = Kept(tmp_path), Made([], [], []), Made([], [], [])
    run_variant(comparison(), NARROW, kept, Run(None), whole)
    monkeypatch.setattr(compared, "train", lambda *_, **__: pytest.fail("trained again"))
    run_variant(comparison(), NARROW, kept, Run(None), again)
    assert again.runs == whole.runs


class Explosive(Toy):
    """Its loss is not finite where the learning rate is high."""

    limit = 1e-2

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss = super().batch_loss(model, batch)
        return loss if not model.training or self.rate < self.limit else loss * math.nan

    rate = 0.0


@pytest.fixture
def explosive(monkeypatch) -> Explosive:
    task, original = Explosive(), compared.train

    def train(task: Explosive, model: nn.Module, recipe: Any, **kept: Any):
        task.rate = recipe.learning_rate
        return original(task, model, recipe, **kept)

    monkeypatch.setattr(compared, "train", train)
    return task


def test_a_rate_that_diverges_is_listed_and_never_chosen(tmp_path, explosive):
    runs = made(tmp_path, task=explosive).runs
    assert [(r.diverged, r.validation is None, r.quality is None, r.chosen) for r in runs[:2]] == [
        (False, False, False, True),
        (True, True, True, False),
    ]
    assert {r.learning_rate for r in runs if r.chosen} == {1e-3}


def test_where_every_rate_diverges_the_runs_are_listed_without_a_cost(tmp_path, explosive):
    explosive.limit = 0.0
    result = made(tmp_path, task=explosive)
    assert [(r.diverged, r.chosen) for r in result.runs] == [(True, False), (True, False)]
    assert result.costs == []


def test_a_test_part_without_a_finite_number_is_a_divergence(tmp_path, monkeypatch):
    task, evaluate = Toy(), Toy.evaluate
    lost = {"mse": math.inf}
    monkeypatch.setattr(
        task, "evaluate", lambda m, part: dict(lost) if part == "test" else evaluate(task, m, part)
    )
    assert all(run.diverged and run.quality is None for run in made(tmp_path, task=task).runs)


def test_a_finished_training_serves_only_while_everything_it_depends_on_is_the_same(tmp_path, monkeypatch):
    kept = Kept(tmp_path)
    run_variant(comparison(), NARROW, kept, Run(None), Made([], [], []))
    before = len(kept.units)
    run_variant(comparison(seeds=[5, 6, 7, 8]), NARROW, kept, Run(None), Made([], [], []))
    assert len(kept.units) == before + 1
    other = Method("narrow", "narrow_gated", {})
    run_variant(comparison(), other, kept, Run(None), Made([], [], []))
    assert len(kept.units) == 2 * before + 1


def test_a_training_that_two_variants_share_is_done_once_and_stands_in_both(tmp_path):
    kept, first, second = Kept(tmp_path), Made([], [], []), Made([], [], [])
    run_variant(comparison(), DENSE, kept, Run(None), first)
    before = len(kept.units)
    fewer = comparison(blocks=1)
    fewer = Comparison("fewer", fewer.task, fewer.settings, fewer.variant)
    run_variant(fewer, DENSE, kept, Run(None), second)
    assert len(kept.units) == before
    assert second.runs == [run.model_copy(update={"variant": "fewer"}) for run in first.runs]
    run_variant(comparison(), NARROW, kept, Run(None), Made([], [], []))
    between = len(kept.units)
    run_variant(fewer, NARROW, kept, Run(None), Made([], [], []))
    assert len(kept.units) == between + (between - before)


@pytest.mark.parametrize(
    "config",
    [
        eugen.NarrowConfig(budget=0.5),
        eugen.EUGenConfig(budget=0.5, order=2, min_order=2, projection="learned"),
        eugen.LowRankConfig(budget=0.5),
    ],
)
def test_every_row_starts_with_the_dense_block_s_output_scale(config):
    dense = eugen.DenseFFN(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    layer = config.build(dense, generator=torch.Generator().manual_seed(1))
    start_as(layer, dense, torch.Generator().manual_seed(2))
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(3))
    assert float(layer(x).std() / dense(x).std()) == pytest.approx(1, rel=0.1)


def test_rows_share_their_charts_with_dense_at_the_first_budget(tmp_path, monkeypatch):
    class Noting(Run):
        def curve(self, key: str, points: list[tuple[int, float]]) -> None:
            drawn.append(key)

    charts: dict[str, list[str]] = {}
    for row in (DENSE, NARROW):
        drawn = charts[row.name] = []
        run_variant(
            comparison(budgets=[0.5, 0.25], learning_rates=[1e-3], seeds=[5]),
            row,
            Kept(tmp_path),
            Noting(None),
            Made([], [], []),
        )
    assert charts["dense"] == ["base-lr0.001-seed5.mse"]
    assert charts["narrow"] == ["base-lr0.001-seed5.mse", "base-budget0.25-lr0.001-seed5.mse"]


def test_metrics_of_the_first_budget_have_the_dense_row_s_names(tmp_path):
    def named(row: Method) -> set[str]:
        found = made(tmp_path, row, budgets=[0.5, 0.25])
        kept = SimpleNamespace(runs=found.runs, costs=found.costs, quality_name="mse")
        return set(flat_metrics(kept))

    plain = {"scratch.base.mse", "scratch.base.training_speedup"}
    assert named(DENSE) == plain
    assert named(NARROW) == plain | {"scratch.base.b0.25.mse", "scratch.base.b0.25.training_speedup"}


def test_a_budget_that_buys_nothing_is_left_out_with_the_reason(tmp_path):
    result = made(tmp_path, budgets=[0.001, 0.5], seeds=[5], learning_rates=[1e-3])
    assert [(o.budget, o.reason.startswith("base: ")) for o in result.omitted] == [(0.001, True)]
    assert {r.budget for r in result.runs} == {0.5}


def test_cost_is_that_of_the_replaced_blocks_and_both_networks_take_steps():
    here = comparison()
    cost = measure_cost(here, eugen.NarrowConfig(budget=0.5), 0.5)
    # 4 → 16 → 4 beside 4 → 8 → 4, then 4 → 1; biases of 16, 4, 1 and the norm's 8.
    assert (cost.ffn_macs_dense, cost.ffn_macs) == (2 * 4 * 16, 2 * 4 * 8)
    assert (cost.macs_dense, cost.macs) == (2 * 4 * 16 + 4, 2 * 4 * 8 + 4)
    assert cost.params_dense == 2 * 4 * 16 + 16 + 4 + 8 + 5 and cost.params == 2 * 4 * 8 + 8 + 4 + 8 + 5
    assert (cost.blocks, cost.blocks_replaced, cost.steps, cost.batch_size) == (1, 1, 12, 8)
    assert len(cost.step_ms) == len(cost.step_ms_dense) >= 10
    assert cost.training_speedup_low <= cost.training_speedup <= cost.training_speedup_high


def test_a_timed_step_trains_a_copy():
    task = Toy()
    model = task.fresh(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    timed = Step(task, model, task.recipe(), task.draw(8, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        timed()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(v, before[n]) for n, v in timed.model.state_dict().items())
    assert not any(isinstance(module, FFNLayer) for module in timed.model.modules())
