"""The full-size profiles start: every task of params/gpu*.yaml trains two steps on miniature data.

Networks, precision and context are the profile's own; only on a CPU without bfloat16 the large ones train in
float32. And the command for several GPUs, on two CPU processes.
"""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import eugen
from stages.data import scene
from stages.models import read_json
from stages.params import Params, TrainingRecipe
from stages.tasks import BASELINE, DATA, Task, last_blocks, open_task
from stages.tracking import stage_run
from stages.training import train
from stages.validate import check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = (ROOT / (os.environ.get("EUGEN_DATA_DIR") or "data/.downloads")).resolve()
RECIPE = {"steps": 2, "batch_size": 2, "micro_batch": 1, "evaluate_every": 2}
LARGE = 50e6
"""Parameters above which a CPU without bfloat16, a hundred times as slow there, takes over ten minutes."""
VIEWS = {"train": 2, "val": 1, "test": 1}
VIEW_SIDE = 12
GPT2_IDS = 50257
# Ten training images, two for testing: four are left to train on, two steps of two.
IMAGES = {"validation": 6, "test": 2}


def photographs(folder: Path) -> None:
    """Two classes in ImageNet's layout."""
    random = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 1)):
        for name in ("n01440764", "n02102040"):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}_{index}.JPEG")


def of_images(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    if data["source"] == "cifar10" and any(ARCHIVES.glob("*cifar*")):
        return IMAGES | {"limit": 1}  # of each of ten classes
    photographs(folder)
    return IMAGES | {"source": "folder", "folder": str(folder), "side": data.get("side", 32)}


def of_tokens(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        random.integers(0, GPT2_IDS, 4200).astype("<u2").tofile(folder / name)
    return {"path": str(folder), "evaluation_tokens": 1024}


def of_views(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    scene.write(folder, VIEWS, VIEW_SIDE)
    return {"folder": str(folder), "views": VIEWS}


POINTS = {"train": 2000, "validation": 200, "test": 200, "resolution": 8, "surface_points": 200}
DATA_OF: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "vision": of_images,
    "vision_mlp": of_images,
    "language": of_tokens,
    "radiance": of_views,
    "distance": lambda *_: POINTS,
    "kernel": lambda *_: {"validation": 64, "test": 64},
    "embedding": lambda *_: {"sentences": 100},
}
"""What of a task's `data` is changed: where they lie and how many there are."""
UNTRAINED = ("embedding", "kernel")
"""Their dense networks come trained, or are drawn."""


def miniature(profile: str, name: str, folder: Path) -> Params:
    """The profile with one task; but for sizes of data and steps, its section is the profile's."""
    chosen = yaml.safe_load((ROOT / f"params/{profile}.yaml").read_text())
    section = copy.deepcopy(chosen["tasks"][name])
    section["data"] |= DATA_OF[name](section["data"], folder / "source")
    if "training" in section["baseline"]:
        section["baseline"]["training"] |= RECIPE
    elif "epochs" in section["baseline"]:
        section["baseline"] |= {"epochs": 1, "batch_size": 2, "micro_batch": 1}
    elif "teacher_sentences" in section["baseline"]:
        section["baseline"]["teacher_sentences"] = 64
    trained = {task: value for task, value in chosen["scratch"]["tasks"].items() if task == name}
    chosen["run"]["device"] = "cpu"
    chosen["tasks"], chosen["scratch"]["tasks"] = {name: section}, trained
    (folder / "params.yaml").write_text(yaml.safe_dump(chosen))
    return check(folder / "params.yaml")


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def is_gpt2(model: nn.Module) -> None:
    assert parameters(model) == pytest.approx(124.4e6, abs=0.1e6)
    assert model.get_parameter("positions.weight").shape == (1024, 768)


def is_vit_b(model: nn.Module) -> None:
    assert parameters(model) - parameters(model.get_submodule("head")) == pytest.approx(85.8e6, abs=0.1e6)
    assert model.get_parameter("pos_embed").shape == (1, 14 * 14, 768)


def is_nerf(model: nn.Module) -> None:
    # The network of the authors' programs: eight layers of 256, the encoding (63) again at the sixth,
    # density, feature, 128 with the direction (27), colour. Twice: coarse and fine.
    layers = [(63, 256), *[(256, 256)] * 4, (63 + 256, 256), *[(256, 256)] * 2]
    heads = [(256, 1), (256, 256), (256 + 27, 128), (128, 3)]
    assert parameters(model) == 2 * sum(inputs * out + out for inputs, out in layers + heads)
    for network in (model.get_submodule("coarse"), model.get_submodule("fine")):
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        assert [(module.in_features, module.out_features) for module in linear][:8] == layers


def is_isdf(model: nn.Module) -> None:
    encoded = 3 + 2 * 21 * 6
    shapes = [tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1]
    assert shapes == [(256, encoded), (256, 256), (256, 256 + encoded), (256, 256), (1, 256)]


STATED: dict[tuple[str, str], tuple[Callable[[nn.Module], None], int]] = {
    ("gpu_language", "language"): (is_gpt2, 12 - 11),
    ("gpu_imagenet", "vision"): (is_vit_b, 12 - 6),
    ("gpu_radiance", "radiance"): (is_nerf, 0),
    ("gpu_distance", "distance"): (is_isdf, 0),
}
"""The papers' network, and how many of its feed-forward blocks stay dense."""


def check_blocks(model: nn.Module, params: Params, task: Task, left: int) -> None:
    """A student keeps the first `left` blocks; a variant trained from scratch replaces as many as it says."""
    blocks, found = task.settings.transfer.blocks, eugen.find_ffns(model)
    config = eugen.NarrowConfig(budget=task.settings.transfer.budgets[-1])
    student = eugen.replace(model, config, where=last_blocks(model, blocks)).model
    dense = [site.name for site in eugen.find_ffns(student)]
    assert dense == [site.name for site in found[:left]] and len(dense) == left < len(found)
    for section in params.scratch_tasks.values():
        for variant in section.variants.values():
            where = last_blocks(model, variant.blocks) or (lambda _: True)
            assert sum(map(where, found)) == (variant.blocks or len(found))


def recipe_of(task: Task) -> TrainingRecipe:
    """The task's own; two steps of fine-tuning where its network is never trained."""
    if task.name in UNTRAINED:
        return TrainingRecipe(learning_rate=task.settings.finetune.learning_rates[0], **RECIPE)
    return task.recipe()


def bearable(recipe: TrainingRecipe, model: nn.Module) -> TrainingRecipe:
    if parameters(model) < LARGE or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return recipe
    return recipe.model_copy(update={"precision": "float32"})


def cases() -> list[Any]:
    found = []
    for path in sorted((ROOT / "params").glob("gpu*.yaml")):
        for name in yaml.safe_load(path.read_text())["tasks"]:
            marks = [pytest.mark.downloads] if name == "embedding" else []
            found.append(pytest.param(path.stem, name, id=f"{path.stem}-{name}", marks=marks))
    return found


@pytest.mark.parametrize(("profile", "name"), cases())
def test_a_full_size_training_starts(profile, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EUGEN_DATA_DIR", str(ARCHIVES))
    params = miniature(profile, name, tmp_path)
    task = open_task(params, name)
    for folder in (DATA / name, BASELINE / name):
        folder.mkdir(parents=True)
    assert task.prepare(DATA / name)
    recipe = recipe_of(task)
    assert (recipe.steps, recipe.batch_size, recipe.micro_batch) == (2, 2, 1)
    if name in UNTRAINED:
        model = task.train_dense(BASELINE / name, tmp_path / "checkpoint.pt", lambda *_: None)
    else:
        model = task.fresh(recipe.seed)
    is_stated, left = STATED.get((profile, name), (lambda _: None, 0))
    is_stated(model)
    check_blocks(model, params, task, left)

    recipe = bearable(recipe, model)
    dtypes: list[torch.dtype] = []
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    hook = linear.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    (point,) = train(task, model, recipe)
    hook.remove()
    assert dtypes[0] is getattr(torch, recipe.precision)
    assert point.step == 2 and math.isfinite(point.train_loss) and math.isfinite(point.validation)
    matrices = [key for key, weight in model.named_parameters() if weight.requires_grad and weight.dim() > 1]
    assert matrices
    for key in matrices:
        assert not torch.equal(model.get_parameter(key), before[key]), key
    assert all(math.isfinite(value) for value in task.evaluate(model, "test").values())
    if name != "distance":  # its data lie on the device, and safetensors does not load to this one
        elsewhere = type(task)(task.settings, task.folder, "meta")
        assert elsewhere.example(1).is_meta, "inputs follow the task to its device"


def project(folder: Path) -> Path:
    """A folder in which the stages run, with the smoke profile."""
    folder.mkdir()
    for name in ("dvc.yaml", "eugen", "stages"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "params.yaml").write_bytes((ROOT / "params/smoke.yaml").read_bytes())
    return folder


def command(folder: Path, *words: str) -> str:
    """Standard output of a command that must succeed."""
    tools = Path(sys.executable).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith(("EUGEN_", "MLFLOW_"))}
    env |= {"EUGEN_TRACKING": "off", "EUGEN_DATA_DIR": str(ARCHIVES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(tools / words[0]), *words[1:]], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def curve(said: str) -> list[tuple[int, str, float]]:
    """The points that a training prints: step, name, value."""
    found = re.findall(r"^step (\d+): (\w+) (\S+)$", said, re.MULTILINE)
    return [(int(step), name, float(value)) for step, name, value in found]


def written(folder: Path) -> set[str]:
    """The results of the stages, without what they were given."""
    places = [folder / name for name in ("artifacts", "results", ".work")]
    return {str(path.relative_to(folder)) for place in places for path in place.rglob("*") if path.is_file()}


def test_of_several_processes_only_the_first_says_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EUGEN_TRACKING", "off")
    for rank, said in (("0", "half way\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with stage_run("scratch", task="vision", method="dense", params={}) as run:
            run.progress("half way")
        assert capsys.readouterr().out == said


@pytest.mark.downloads
def test_the_command_for_several_gpus_gives_what_one_process_gives(tmp_path):
    stage = ("-m", "stages.baseline", "--task", "language")
    alone, shared = project(tmp_path / "alone"), project(tmp_path / "shared")
    command(alone, "python", "-m", "stages.prepare", "--task", "language")
    (shared / "data").symlink_to(alone / "data")
    expected = curve(command(alone, "python", *stage))
    # --standalone: a free port, where several trainings may run side by side.
    found = curve(command(shared, "torchrun", "--standalone", "--nproc-per-node", "2", *stage))
    names = {"train_loss", "validation_bits_per_byte"}
    assert {name for _, name, _ in expected} == names and {step for step, _, _ in expected} == {50, 100}
    assert [point[:2] for point in found] == [point[:2] for point in expected], "each point once"
    for (*_, value), (*_, other) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-4)
    records = [read_json(folder / BASELINE / "language/record.json") for folder in (shared, alone)]
    assert records[0]["quality"] == pytest.approx(records[1]["quality"], rel=1e-4)
    assert records[0]["data_sha256"] == records[1]["data_sha256"]
    written_alone = {name for name in written(alone) if "prepare" not in name}
    assert written(shared) == written_alone
    assert [name for name in written(shared) if name.endswith("record.json")] == [
        "artifacts/baseline/language/record.json"
    ]
