"""The stage prepare: what DVC sees of a setting that changes no data, only what is measured on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stages import prepare
from stages.data.verify import sha256_file

ROOT = Path(__file__).resolve().parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize("change", [{}, {"threshold": 0.02}, {"resolution": 17}, {"surface_points": 501}])
def test_a_setting_of_the_evaluation_changes_the_prepared_folder(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EUGEN_TRACKING", "off")
    chosen = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    section = chosen["tasks"]["distance"]
    section["data"] |= {"train": 20, "validation": 20, "test": 20}
    chosen["tasks"], chosen["scratch"] = {"distance": section}, {"rows": {}, "tasks": {}}
    prepared = []
    for added in ({}, change):
        section["data"] |= added
        Path("params.yaml").write_text(yaml.safe_dump(chosen))
        prepare.prepare("distance")
        prepared.append(digests(Path("data/distance")))
    first, second = prepared
    differing = {name for name in first | second if first.get(name) != second.get(name)}
    assert differing == ({prepare.MANIFEST} if change else set())
