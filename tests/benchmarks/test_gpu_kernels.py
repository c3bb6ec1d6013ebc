"""The first parts of `make gpu-check`: the kernel's check, and its tests where pytest is installed."""

from __future__ import annotations

import subprocess

import pytest
import torch

from benchmarks import kernel_cases
from benchmarks.gpu_check import kernels
from benchmarks.gpu_check.budget import Outcome
from benchmarks.kernel_cases import small_cases
from eugen.kernels.feature_map import feature_map

NOW = float("inf")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_operator_is_found_by_every_case(factor, monkeypatch):
    monkeypatch.setattr(kernels, "feature_map", lambda *args: factor * feature_map(*args))
    outcome = Outcome()
    kernels.check_cases(outcome, NOW, small_cases(), "cpu")
    wrong = [r["status"] for r in outcome.results]
    assert wrong.count("failed") == len(outcome.failed) == len(wrong)
    assert all("float32" in result["case"] for result in outcome.results)
    assert "times the allowed error" in outcome.failed[0]


def test_the_cases_hold_every_form_dtype_activation_and_slot():
    cases = small_cases()
    forms = {(c.order, c.lowest, c.sharing) for c in cases}
    assert len(forms) == 3 * (1 + 2 + 3)
    assert {c.dtype for c in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert {c.activation for c in cases} == set(kernel_cases.naive.ACTIVATIONS)
    assert {(c.bias, c.norm) for c in cases} == {(a, b) for a in (True, False) for b in (True, False)}


def test_cases_that_do_not_begin_in_time_are_counted():
    outcome = Outcome()
    kernels.check_cases(outcome, 0.0, small_cases(), "cpu")
    assert outcome.results == []
    assert outcome.cut == ["21 of 21 cases of the kernel's check"]


def test_without_pytest_it_says_so(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    outcome = Outcome()
    kernels.run_tests(outcome, NOW)
    (result,) = outcome.results
    assert (result["status"], outcome.failed) == ("not run", [])
    assert result["said"] == "pytest is not installed: kernel tests not run"


@pytest.mark.parametrize(("code", "status"), [(1, "failed"), (0, "passed")])
def test_the_tests_result_is_pytests(code, status, monkeypatch):
    done = subprocess.CompletedProcess([], code, f"F.\n=== {code} failed in 3 s ===\n", "")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: done)
    outcome = Outcome()
    kernels.run_tests(outcome, NOW, "-x")
    assert (outcome.results[0]["status"], outcome.results[0]["said"]) == (status, f"{code} failed in 3 s")
    assert len(outcome.failed) == code
