"""dvc.yaml agrees with the verbs, with every profile, and with the library's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "params").glob("*.yaml"))


def test_every_verb_is_a_stage_and_every_stage_a_verb():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    verbs = {path.stem for path in (ROOT / "stages").glob("*.py") if "typer.run(" in path.read_text()}
    assert set(stages) == verbs
    for name, stage in stages.items():
        keys = stage.get("matrix", {})
        options = "".join(f" --{key} ${{item.{key}}}" for key in keys)
        assert stage["cmd"] == f"python -m stages.{name}{options}"
        assert f"stages/{name}.py" in stage["deps"]
        if name == "scratch":
            assert keys == {"task": "${scratch.tasks}", "method": "${scratch.rows}"}
        else:
            assert {key: f"${{{key}s}}" for key in keys} == keys, "the matrix is params.yaml's own keys"


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_what_a_stage_depends_on_is_there_or_made_by_another(profile):
    params = yaml.safe_load(profile.read_text())
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

    def spelled(stage: str, items: list[Any]) -> set[str]:
        trained = params["scratch"]
        tasks, methods = (
            (trained["tasks"], trained["rows"])
            if stage == "scratch"
            else (params["tasks"], params["methods"])
        )
        names = [next(iter(item)) if isinstance(item, dict) else item for item in items]
        return {
            name.replace("${item.task}", task).replace("${item.method}", method)
            for name in names
            for task in tasks
            for method in methods
        }

    made = {
        made_here
        for name, stage in stages.items()
        for made_here in spelled(name, [*stage["outs"], *stage.get("metrics", [])])
    }
    made |= {parent.as_posix() for name in made for parent in Path(name).parents}
    for verb, stage in stages.items():
        for name in spelled(verb, stage["deps"]):
            assert name in made or (ROOT / name).exists(), name
        for key in spelled(verb, stage.get("params", [])):
            section = params
            for part in key.split("."):
                assert part in section, key
                section = section[part]


def test_every_library_file_that_decides_a_transfer_makes_it_stale():
    """Costs and timing decide no weights; bundling, the command and its work are not part of the pipeline."""
    apart = {"__init__.py", "bundle.py", "cli", "compression", "cost.py", "shapes.py", "timing"}
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["transfer"]["deps"]
    files = {path.name for path in (ROOT / "eugen").iterdir() if path.suffix == ".py" or path.is_dir()}
    listed = {dep.removeprefix("eugen/") for dep in deps if dep.startswith("eugen/")}
    assert listed == files - apart - {"__pycache__"}
