"""Image classification on miniature sets: the data's way to the network, and what happens to a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eugen
from stages.data import sources
from stages.data.verify import DataError
from stages.faults import ParamsError, validate
from stages.images import ImageTask, distort
from stages.tasks.vision import Vision
from stages.tasks.vision_mlp import VisionMLP

SIDE = 16
CLASSES = ["n01440764", "n02102040", "n02979186"]
SECTION: dict[str, Any] = {
    "data": {"source": "folder", "side": SIDE, "validation": 9, "test": 9},
    "baseline": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
    "transfer": {"budgets": [0.3], "seeds": [0], "calibration_tokens": 64},
    "finetune": {"steps": 1, "batch_size": 4, "learning_rates": [1e-3]},
    "profile": {"batches": [1], "pairs": 10},
}
SIZES = {
    Vision: {"width": 24, "depth": 1, "heads": 2, "patch": 4},
    VisionMLP: {"width": 24, "hidden": 48, "depth": 1},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(
    folder: Path, *, data: dict[str, Any], cls: type[ImageTask] = Vision, **baseline: Any
) -> ImageTask:
    """The task with some settings; not prepared."""
    folder.mkdir(exist_ok=True)
    section = {
        **SECTION,
        "data": {**SECTION["data"], **data},
        "baseline": {**SECTION["baseline"], **SIZES[cls], **baseline},
    }
    return cls(validate(cls.Settings, section, f"tasks.{cls.name}"), folder)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Sixty photographs in Imagenette's layout. The class is the colour that is strongest."""
    random = np.random.default_rng(0)
    for part, count in (("train", 17), ("val", 3)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                high, wide = random.integers(SIDE, 3 * SIDE, 2)
                pixels = random.integers(0, 160, (high, wide, 3))
                pixels[:, :, number] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_{index}.JPEG", quality=95)
    return tmp_path / "set"


@pytest.fixture
def task(photographs, tmp_path) -> ImageTask:
    """The prepared task, without mixing."""
    made = opened(tmp_path / "data", data={"folder": str(photographs)})
    made.prepare(made.folder)
    return made


@pytest.fixture
def mixing(task) -> ImageTask:
    """The same with both kinds of mixing."""
    baseline = task.settings.baseline.model_copy(update={"mixup": 0.8, "cutmix": 1.0})
    return type(task)(task.settings.model_copy(update={"baseline": baseline}), task.folder)


@pytest.mark.parametrize("cls", [Vision, VisionMLP])
def test_the_network_has_the_classes_of_the_data(photographs, tmp_path, cls):
    task = opened(tmp_path / "data", data={"folder": str(photographs)}, cls=cls)
    (source,) = task.prepare(task.folder).values()
    assert source.rows == 51 + 9
    assert (task.classes, task.side, task.channels) == (3, SIDE, 3)
    assert task.build()(task.example(5)).shape == (5, 3)


@pytest.mark.parametrize("width", [24, 96])
def test_a_block_s_neurons_start_as_far_from_linear_at_every_width(photographs, tmp_path, width):
    task = opened(tmp_path / "data", data={"folder": str(photographs)}, width=width)
    task.prepare(task.folder)
    (site,) = eugen.find_ffns(task.fresh(0))
    inputs = torch.randn(4096, width, generator=generator())
    deviation = float(site.dense.up(inputs).detach().std())
    # Weights uniform within 1/√width have the deviation 1/√(3 width), whatever the width.
    assert deviation == pytest.approx(3**-0.5, rel=0.15)


def test_the_test_part_is_the_official_split(task):
    stored = task._data
    assert {name: len(stored[f"{name}.labels"]) for name in ("train", "validation", "test")} == {
        "train": 42,
        "validation": 9,
        "test": 9,
    }
    assert torch.bincount(stored["test.labels"]).tolist() == [3, 3, 3]


def test_a_limit_leaves_fewer_images_for_training(photographs, tmp_path):
    task = opened(tmp_path / "data", data={"folder": str(photographs), "limit": 5})
    (source,) = task.prepare(task.folder).values()
    assert len(task._data["train.labels"]) == 3 * 5 - 9 and source.rows == 3 * 5 + 9


def test_pixels_are_normalised_by_colour_as_numpy_does(task):
    raw = task._data["train.images"].numpy().astype(np.float64)
    expected = (raw - raw.mean((0, 1, 2))) / raw.std((0, 1, 2))
    rows = torch.arange(len(raw))
    found = task._images("train", rows).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_images_of_one_colour_are_no_division_by_zero(tmp_path):
    for name in CLASSES:
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (SIDE, SIDE), (10, 20, 30)).save(folder / f"{index}.png")
    task = opened(tmp_path / "data", data={"folder": str(tmp_path / "set")})
    task.prepare(task.folder)
    assert (task.example(3) == 0).all()


def test_a_network_learns_from_a_folder_and_is_the_same_again(photographs, tmp_path):
    task = opened(
        tmp_path / "data", data={"folder": str(photographs)}, epochs=12, learning_rate=5e-3, mixup=0.2
    )
    task.prepare(task.folder)
    curve: list[tuple[str, float, int]] = []
    first = task.train_dense(tmp_path, tmp_path / "one.pt", lambda *point: curve.append(point))
    assert (
        task.evaluate(first, "test")["top1"] > 0.85
    )  # the strongest colour tells the class; a guess has 1/3
    again = task.train_dense(tmp_path, tmp_path / "two.pt", lambda *_: None)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_is_drawn_by_the_generator_alone(task, mixing):
    for each in (task, mixing):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, other = each.draw(16, generator()), each.draw(16, generator(1))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        again = each.draw(16, generator())
        for a, b, c in zip(first, again, other, strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_batch_holds_training_images_with_their_labels(task):
    """A crop has only values of its own picture's; no other of these noisy pictures has them all."""
    images, labels = task.draw(64, generator())
    assert images.shape == (64, 3, SIDE, SIDE) and labels.shape == (64,)
    rows = torch.arange(len(task._data["train.labels"]))
    known = [set(image.unique().tolist()) for image in task._images("train", rows)]
    for image, label in zip(images, labels.tolist(), strict=True):
        (row,) = [row for row, values in enumerate(known) if set(image.unique().tolist()) <= values]
        assert int(task._labels("train")[row]) == label
    calibration = torch.cat(task.calibration(0, 32 * task.tokens_per_image))
    assert len(calibration) == 32
    assert all(any(set(image.unique().tolist()) <= v for v in known) for image in calibration)


def test_a_batch_can_be_cut_into_parts(task, mixing):
    for each in (task, mixing):
        model = each.fresh(0)
        batch = each.draw(16, generator())
        whole = each.batch_loss(model, batch)
        parts = zip(*(tensor.split(4) for tensor in batch), strict=True)
        losses = [each.batch_loss(model, part) for part in parts]
        assert len(losses) == 4
        torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_probabilities_of_one_class_cost_what_its_label_costs(task):
    model = task.fresh(0)
    images, labels = task.draw(16, generator())
    targets = F.one_hot(labels, 3).float()
    torch.testing.assert_close(
        task.batch_loss(model, (images, targets)), task.batch_loss(model, (images, labels))
    )


def test_digits_are_distorted_and_never_mirrored(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60, dtype=np.uint8) % 10
    monkeypatch.setattr(sources, "mnist_5k", lambda: (images, labels))
    task = opened(tmp_path / "data", data={"source": "mnist_5k", "side": None})
    task.prepare(task.folder)
    assert (task.classes, task.side, task.channels) == (10, 8, 1)
    draws = generator()
    rows = torch.randint(42, (16,), generator=draws)
    expected = distort(task._images("train", rows), draws)
    batch, drawn = task.draw(16, generator())
    assert torch.equal(batch, expected) and torch.equal(drawn, task._labels("train")[rows])


def test_cifar10_s_test_part_is_its_last_images(tmp_path, monkeypatch):
    images = np.arange(80, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    places = []

    def cifar10(folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
        places.append(folder)
        return images, np.arange(80, dtype=np.uint8) % 10

    monkeypatch.setattr(sources, "cifar10", cifar10)
    monkeypatch.setattr(sources, "CIFAR10_TEST", 20)
    task = opened(tmp_path / "data", data={"source": "cifar10", "side": None, "folder": "some/folder"})
    task.prepare(task.folder)
    assert places == [Path("some/folder")] and task.classes == 10
    assert {part: bool((task._data[f"{part}.images"] >= 60).all()) for part in ("train", "test")} == {
        "train": False,
        "test": True,
    }
    assert (task._data["train.images"] < 60).all() and (task._data["validation.images"] < 60).all()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"folder": "x", "side": None}, "source: folder needs `folder`, its path, and `side`"),
        ({}, "source: folder needs `folder`"),
        ({"source": "cifar10"}, "side = 16: images of cifar10 have a fixed size, leave it out"),
        ({"source": "mnist_5k", "side": None, "folder": "x"}, "folder = 'x': mnist_5k is read from"),
        ({"folder": "x", "side": 0}, "tasks.vision.data.side = 0: Input should be greater than 0"),
        ({"folder": "x", "limit": 0}, "tasks.vision.data.limit = 0: Input should be greater than 0"),
        ({"source": "imagenet"}, "tasks.vision.data.source = 'imagenet'"),
    ],
)
def test_settings_that_do_not_go_together_are_faults(tmp_path, data, says):
    with pytest.raises(ParamsError, match=says):
        opened(tmp_path / "data", data=data)


@pytest.mark.parametrize(
    ("baseline", "says"),
    [
        ({"heads": 5}, "heads = 5: must divide the width, 24"),
        ({"mixup": -1.0}, "baseline.mixup = -1.0"),
        ({"precision": "float8"}, "baseline.precision = 'float8'"),
    ],
)
def test_a_network_that_cannot_be_is_a_fault(tmp_path, baseline, says):
    with pytest.raises(ParamsError, match=says):
        opened(tmp_path / "data", data={"folder": "x"}, **baseline)


def test_sizes_that_do_not_fit_the_images_are_errors(task, photographs, tmp_path):
    def changed(**values: Any) -> ImageTask:
        return opened(task.folder, data={"folder": str(photographs)}, **values)

    with pytest.raises(ValueError, match="patch = 5: must divide the images' side, 16"):
        changed(patch=5).build()
    with pytest.raises(ValueError, match="batch_size = 43: there are only 42 training images, lower it"):
        changed(batch_size=43).recipe()
    with pytest.raises(DataError, match="tasks.vision.data.test = 10: the official test split has 9 images"):
        opened(tmp_path / "other", data={"folder": str(photographs), "test": 10}).prepare(tmp_path / "other")


def test_the_recipe_takes_the_section_s_settings(task, photographs):
    recipe = opened(
        task.folder,
        data={"folder": str(photographs)},
        epochs=3,
        batch_size=10,
        micro_batch=5,
        precision="bfloat16",
    ).recipe()
    assert (recipe.steps, recipe.evaluate_every) == (3 * 4, 4)
    assert (recipe.batch_size, recipe.micro_batch, recipe.precision) == (10, 5, "bfloat16")
