"""flows/prefect.yaml names flows and parameters that exist."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml
from prefect import Flow

from flows.operate.pools import POOLS
from tests.flows.toy import ROOT

DEPLOYMENTS = yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())["deployments"]


def flow_of(deployment: dict[str, Any]) -> Flow[Any, Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: f"{one['entrypoint']}-{one['name']}")
def test_each_deployment_has_a_flow_its_parameters_and_a_pool(deployment: dict[str, Any]):
    flow = flow_of(deployment)
    assert isinstance(flow, Flow) and deployment["work_pool"]["name"] in POOLS
    assert deployment["parameters"].keys() <= flow.parameters.properties.keys()


def test_the_deployments_are_those_of_the_operators_guide():
    names = sorted(f"{flow_of(one).name}/{one['name']}" for one in DEPLOYMENTS)
    assert names == [
        "benchmark/cpu",
        "benchmark/gpu",
        "cells/cpu",
        "cells/gpu",
        "gpu-check/weekly",
        "regression/nightly",
    ]
    crons = {one["name"]: one["schedules"][0]["cron"] for one in DEPLOYMENTS if "schedules" in one}
    assert crons == {"nightly": "0 3 * * *", "weekly": "0 5 * * 0"}
