"""The budgeted choice against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from eugen.search.choice import choose_options


def random_case(seed: int, blocks: int = 4, options: int = 5):
    draw = random.Random(seed)
    costs = [[draw.randint(0, 30) for _ in range(draw.randint(1, options))] for _ in range(blocks)]
    errors = [[draw.random() for _ in row] for row in costs]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return costs, errors, draw.randint(low, max(low, high))


def total(table, chosen):
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


def best_of_all(costs, errors, limit):
    everything = itertools.product(*(range(len(row)) for row in costs))
    return min(total(errors, chosen) for chosen in everything if total(costs, chosen) <= limit)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_choices(seed):
    costs, errors, limit = random_case(seed)
    slack = limit - sum(map(min, costs))
    chosen = choose_options(costs, errors, limit, steps=max(1, slack))
    assert total(costs, chosen) <= limit
    assert total(errors, chosen) == pytest.approx(best_of_all(costs, errors, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_coarse_steps_lose_a_step_for_each_block_and_never_go_over(seed):
    costs, errors, limit = random_case(seed, blocks=5)
    costs = [[cost + random.Random(seed).random() for cost in row] for row in costs]
    slack, steps = limit - sum(map(min, costs)), 40
    chosen = choose_options(costs, errors, limit, steps=steps)
    if slack < 0:
        assert chosen is None
        return
    assert total(costs, chosen) <= limit
    assert total(errors, chosen) <= best_of_all(costs, errors, limit - 5 * slack / steps) + 1e-12


def test_all_that_fits_is_bought():
    """The limit is exactly what the best options cost, in units that no step divides."""
    costs, errors = [[1 / 3, 1.7]] * 7, [[1.0, 0.0]] * 7
    assert choose_options(costs, errors, 7 * 1.7) == [1] * 7
    assert choose_options(costs, errors, 7 / 3) == [0] * 7


def test_of_equal_errors_the_cheaper():
    assert choose_options([[3.0, 2.0, 9.0]], [[0.5, 0.5, 0.5]], 10.0) == [1]


def test_nothing_fits():
    assert choose_options([[3.0], [2.0, 4.0]], [[0.1], [0.2, 0.1]], 4.9) is None
