"""The ledger's first claim follows from the estimator's record, and opens without a good one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import estimator
from stages.reporting import theory
from stages.reporting.inputs import ReportError
from stages.reporting.ledger import ledger


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """A record of the real command, and so of its present format."""
    out = tmp_path_factory.mktemp("record") / "estimator.json"
    estimator.main(["--draws", "100", "--threads", "1", "--out", str(out)])
    return json.loads(out.read_text())


@pytest.fixture
def record(measured) -> dict:
    """That record as if every theorem had been confirmed with enough draws from a clean commit."""
    record = copy.deepcopy(measured)
    record["environment"]["dirty"] = False
    record["settings"]["draws"] = 20_000
    for bias in record["bias"]:
        bias |= {"low": -0.01, "high": 0.01}
    for slope in record["slope"]:
        slope |= {"slope": -1.01, "low": -1.1, "high": -0.9}
    for ratio in record["ratio"]:
        ratio |= {"ratio": 0.7, "low": 0.6, "high": 0.8}
    for case in record["concentration"]:
        case |= {"rate": 0.1, "rate_low": 0.05, "curvature": -1.0, "curvature_high": -0.5}
    return record


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What the ledger says of a record in the repository root: (ours, conditions, verdict) a line."""
    monkeypatch.chdir(tmp_path)

    def found(record: dict | str | None) -> list[tuple[str, str, str]]:
        if record is not None:
            theory.ESTIMATOR.parent.mkdir(parents=True, exist_ok=True)
            theory.ESTIMATOR.write_text(record if isinstance(record, str) else json.dumps(record))
        return [(f.ours, f.conditions, f.verdict) for f in theory.theorems([])]

    return found


def verdicts(found: list[tuple[str, str, str]]) -> list[str]:
    return [verdict for _, _, verdict in found]


def test_without_a_record_it_is_open_and_says_the_command(said):
    assert said(None) == [("–", "run `python -m benchmarks.estimator`", "open")]


def test_a_confirmed_record_reproduces_all_four(said, record):
    found = said(record)
    assert verdicts(found) == ["reproduced"] * 4
    ours = [text for text, _, _ in found]
    assert "18 of 18 intervals of the bias cover 0; the widest is ±1.0 %" in ours[0]
    assert "−1.01 to −1.01; 24 of 24 intervals cover −1" in ours[1]
    assert "faster than any power of m in 4 of 4 cases" in ours[2]
    assert all(f"order {i}: 0.70 to 0.70" in ours[3] for i in (1, 2, 3))
    assert all("20,000 draws each" in conditions for _, conditions, _ in found)


@pytest.mark.parametrize(
    ("section", "change", "line"),
    [
        ("bias", {"low": 0.001, "high": 0.02}, 0),
        ("slope", {"low": -0.99, "high": -0.9}, 1),
        ("slope", {"low": -1.2, "high": -1.01}, 1),
        ("concentration", {"rate_low": -0.01}, 2),
        ("concentration", {"curvature_high": 0.1}, 2),
    ],
)
def test_one_interval_that_misses_fails_its_theorem_alone(said, record, section, change, line):
    record[section][3] |= change
    expected = ["reproduced"] * 4
    expected[line] = "not reproduced"
    assert verdicts(said(record)) == expected


def test_rounding_of_the_rows_is_no_bias(said, record):
    record["bias"][0] |= {"low": 1e-9, "high": 3e-9}
    assert verdicts(said(record))[0] == "reproduced"


def test_orders_have_verdicts_of_their_own(said, record):
    """Order 2 higher in one case; rows of another length do not bear on the library's."""
    chi = next(r for r in record["ratio"] if r["projection"] == "orthogonal_chi" and r["order"] == 3)
    chi |= {"ratio": 1.3, "low": 1.2, "high": 1.4}
    assert verdicts(said(record)) == ["reproduced"] * 4
    case = next(r for r in record["ratio"] if r["projection"] == "orthogonal" and r["order"] == 2)
    case |= {"ratio": 0.96, "low": 0.9, "high": 1.2}
    found = said(record)
    assert verdicts(found) == ["reproduced"] * 4 + ["not reproduced"]
    assert "order 1" in found[3][0]
    assert "order 3" in found[3][0]
    assert "order 2" not in found[3][0]
    assert found[4][0].startswith("order 2: 0.70 to 0.96 of the variance")


@pytest.mark.parametrize(
    ("section", "key", "value"), [("environment", "dirty", True), ("settings", "draws", 19_999)]
)
def test_provisional_records_do_not_count(said, record, section, key, value):
    record[section][key] = value
    ((_, conditions, verdict),) = said(record)
    assert verdict == "open"
    assert "from a clean commit with 20,000 draws" in conditions


@pytest.mark.parametrize("fault", ["not json", "format", "missing", "unknown"])
def test_another_format_is_an_error_that_names_file_and_cure(said, record, fault):
    if fault == "format":
        record["format"] = 2
    elif fault == "missing":
        del record["bias"][0]["z"]
    elif fault == "unknown":
        record["surprise"] = 1
    with pytest.raises(
        ReportError, match=r"estimator\.json: not a valid.*run `python -m benchmarks.estimator`"
    ):
        said("{" if fault == "not json" else record)


def test_the_ledger_shows_it_under_the_first_claim(said, record):
    said(record)
    lines = ledger([]).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| Unbiased for polynomial"))
    assert [line.endswith("| reproduced |") for line in lines[first : first + 5]] == [True] * 4 + [False]


def test_the_record_stands_where_the_command_writes_it():
    assert estimator._parse([]).out == theory.ESTIMATOR
    assert not Path(theory.ESTIMATOR).is_absolute()
