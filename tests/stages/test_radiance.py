"""The radiance task: measures and rays by hand, transfer into a second pass, folders as others leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

import eugen
from stages.data import blender, scene
from stages.data.verify import DataError
from stages.networks.nerf import RAY
from stages.params import ParamsError, validate
from stages.tasks import BASELINE, radiance
from tests.tolerances import assert_close

SIDE = 16
COUNTS = {"train": 3, "val": 1, "test": 2}
DATA = {"views": COUNTS, "side": SIDE, "near": 2.7, "far": 5.3}
NETWORK = {"width": 16, "depth": 5, "skip": 3, "samples": 8}
TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "evaluate_every": 2}


def settings(baseline: dict[str, Any] | None = None, **data: Any) -> radiance.RadianceSettings:
    section = {
        "data": DATA | data,
        "baseline": NETWORK | {"training": TRAINING} | (baseline or {}),
        "transfer": {"budgets": [0.5], "seeds": [0], "calibration_tokens": 64},
        "finetune": {"steps": 1, "batch_size": 2, "learning_rates": [1e-3]},
        "profile": {"batches": [1], "pairs": 10},
    }
    return validate(radiance.RadianceSettings, section, "tasks.radiance")


def prepared(folder: Path, baseline: dict[str, Any] | None = None, **data: Any) -> radiance.Radiance:
    folder.mkdir()
    task = radiance.Radiance(settings(baseline, **data), folder)
    task.prepare(folder)
    return task


@pytest.fixture
def task(tmp_path: Path) -> radiance.Radiance:
    return prepared(tmp_path / "data")


class Pictures(nn.Module):
    """Shows what it was made with, ray after ray."""

    def __init__(self, colours: Tensor) -> None:
        super().__init__()
        self.colours, self.given = colours, 0

    def forward(self, rays: Tensor, jitter: Tensor | None = None, fine_edges: Tensor | None = None) -> Tensor:
        self.given += len(rays)
        return self.colours[self.given - len(rays) : self.given, None]


def truth(task: radiance.Radiance, part: str) -> Tensor:
    return torch.stack([task._colours(part, view) for view in range(COUNTS.get(part, 1))])


def test_psnr_is_the_mean_over_views_of_each_view_s_own(task):
    pictures = truth(task, "test")
    pictures[0] += 0.1
    pictures[1, : SIDE // 2] -= 0.02
    found = task.evaluate(Pictures(pictures.reshape(-1, 3)), "test")
    # Errors of .1 everywhere, and of .02 in one half: 20 dB, and 10 log10(2 / .0004).
    assert found["psnr"] == pytest.approx((20 + 10 * np.log10(5000)) / 2, abs=1e-4)


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two grey images by Wang et al.'s formula, windows that leave the image left out."""

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    a, b = 0.01**2, 0.03**2
    index = (2 * mx * my + a) * (2 * vxy + b) / ((mx**2 + my**2 + a) * (vx + vy + b))
    return float(index[5:-5, 5:-5].mean())


def test_ssim_is_what_its_formula_says(task):
    pictures = truth(task, "test")
    noisy = (
        pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    ).double()
    found = task.evaluate(Pictures(noisy.reshape(-1, 3)), "test")["ssim"]
    pairs = zip(noisy.float().double().numpy(), pictures.double().numpy(), strict=True)
    expected = [similarity(a[..., c], b[..., c]) for a, b in pairs for c in range(3)]
    assert found == pytest.approx(np.mean(expected), abs=1e-6)
    assert task.evaluate(Pictures(pictures.reshape(-1, 3) + 1e-6), "test")["ssim"] == pytest.approx(1)


@pytest.mark.parametrize(("background", "level"), [("white", 1.0), ("black", 0.0)])
def test_what_is_transparent_shows_the_background(tmp_path, background, level):
    task = prepared(tmp_path / "data", background=background)
    pixels = scene.render(scene.cameras("val", 1)[0], SIDE) / 255
    alpha = pixels[..., 3:]
    expected = pixels[..., :3] * alpha + level * (1 - alpha)
    assert_close(task._colours("validation", 0), torch.from_numpy(expected), precision=torch.float32)
    assert (task._colours("validation", 0)[0, 0] == level).all()
    assert task.build().background == level


def test_parts_are_the_folder_s_own(task):
    for part, file in radiance.FILES.items():
        poses = scene.cameras(file, COUNTS[file])
        assert np.array_equal(task._data[f"{part}.poses"].numpy(), poses)


def test_each_training_ray_has_its_own_pixel_s_colour(tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "SAMPLES", 1)  # then a pixel is what its central ray shows
    task = prepared(tmp_path / "data")
    rays, colours = task._train
    assert rays.shape == (3 * SIDE**2, RAY) and colours.shape == (3 * SIDE**2, 3)
    seen = scene.shade(rays[:, :3].double().numpy(), rays[:, 3:6].double().numpy())
    error = np.abs(colours.numpy() - (seen[:, :3] + 1 - seen[:, 3:])).max(axis=1)
    # Rounded to 8 bits; a ray in float32 may pass an edge on the other side.
    assert (error < 0.51 / 255).mean() > 0.99


def test_a_cone_is_as_wide_as_its_pixel(task):
    rays = task._rays("test", 0).view(SIDE, SIDE, RAY)
    width = (rays[3, 5, 3:6] - rays[3, 6, 3:6]).norm()
    assert float(rays[3, 5, 6]) == pytest.approx(float(width) * 2 / 12**0.5, rel=1e-5)


def test_a_batch_holds_training_pixels_and_all_that_is_random(task):
    rays, colours, jitter = task.draw(64, torch.Generator().manual_seed(1))
    known, wanted = task._train
    for ray, colour in zip(rays, colours, strict=True):
        row = (known == ray).all(dim=1).nonzero()[0]
        assert torch.equal(wanted[row[0]], colour)
    assert jitter.shape == (64, 7) and (jitter >= 0).all() and (jitter < 1).all()
    model = task.fresh(0)
    batch = (rays, colours, jitter)
    whole = task.batch_loss(model, batch)
    halves = [task.batch_loss(model, tuple(tensor[i : i + 32] for tensor in batch)) for i in (0, 32)]
    assert_close(whole, sum(halves) / 2, precision=torch.float32)


def test_the_loss_counts_both_passes(tmp_path):
    task = prepared(tmp_path / "data", {"fine_samples": 4})
    rays, colours, jitter = task.draw(8, torch.Generator().manual_seed(1))
    assert jitter.shape == (8, 7 + 4)
    model = task.fresh(0)
    shown = model(rays, jitter)
    expected = sum(((shown[:, i] - colours) ** 2).mean() for i in range(2))
    assert_close(task.batch_loss(model, (rays, colours, jitter)), expected, precision=torch.float32)
    assert torch.equal(task.call(model, rays), model(rays)[:, 1])


def test_calibration_asks_the_second_pass_at_the_dense_network_s_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = prepared(tmp_path / "data", {"fine_samples": 4})
    dense = task.fresh(0)
    (BASELINE / task.name).mkdir(parents=True)
    save_file(dense.state_dict(), BASELINE / task.name / "dense.safetensors")
    batches = task.calibration(0, 200)
    assert [batch.shape for batch in batches] == [(25, RAY + 8 + 1 + 4)]
    expected = dense(batches[0][:, :RAY])[:, 1]
    assert_close(task.call(dense, batches[0]), expected, precision=torch.float32)

    ruined = eugen.replace(dense, eugen.NarrowConfig(budget=0.3), where=lambda s: "coarse" in s.name).model
    assert torch.equal(task.call(ruined, batches[0]), task.call(dense, batches[0]))
    assert not torch.allclose(task.call(ruined, batches[0][:, :RAY]), expected)


def test_a_prepared_folder_of_somebody_else_is_read_as_it_is(tmp_path):
    scene.write(tmp_path / "lego", {"train": 4, "val": 2, "test": 3}, 24)
    for file in (tmp_path / "lego").rglob("*.json"):
        before = file.read_bytes()
        task = radiance.Radiance(settings(folder=str(tmp_path / "lego"), downscale=2), tmp_path)
        (sources,) = task.prepare(tmp_path).items()
        assert file.read_bytes() == before
    assert sources[0] == "lego" and sources[1].rows == sum(COUNTS.values())
    for part, file in radiance.FILES.items():
        views = blender.load(tmp_path / "lego", file, most=COUNTS[file], downscale=2)
        assert np.array_equal(task._data[f"{part}.pixels"].numpy(), views.pixels)
        assert views.pixels.shape == (COUNTS[file], 12, 12, 4)
    assert np.isfinite(task.evaluate(task.fresh(0), "test")["psnr"])


def test_a_folder_that_is_not_there_is_told(tmp_path):
    task = radiance.Radiance(settings(folder=str(tmp_path / "ship")), tmp_path)
    with pytest.raises(DataError, match=r"ship/transforms_train.json is missing"):
        task.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_the_data_s_identity(tmp_path):
    source = tmp_path / "lego"
    scene.write(source, COUNTS, SIDE)

    def identity(**changes: Any) -> str:
        (found,) = radiance.Radiance(settings(**changes), tmp_path).prepare(tmp_path).values()
        return found.sha256

    same = {identity(folder=str(source)), identity(), identity(background="black")}
    assert len(same) == 1
    picture = np.array(Image.open(source / "test/r_1.png"))
    picture[3, 4, 0] ^= 1
    Image.fromarray(picture).save(source / "test/r_1.png")
    assert identity(folder=str(source)) not in same


def test_pictures_show_what_the_network_renders_beside_the_truth(task, tmp_path):
    wanted = truth(task, "test")
    true = task.truth_pictures(tmp_path / "truth")
    shown = task.pictures(Pictures(wanted.reshape(-1, 3)), tmp_path / "dense")
    assert [path.name for path in true] == [path.name for path in shown] == ["view-0.png", "view-1.png"]
    for view, (first, second) in enumerate(zip(true, shown, strict=True)):
        for path in (first, second):
            pixels = np.asarray(Image.open(path))
            assert np.abs(pixels / 255 - wanted[view].numpy()).max() <= 0.5 / 255 + 1e-6


def test_large_pictures_are_made_small(tmp_path):
    large = np.random.default_rng(0).random((400, 600, 3)).astype(np.float32)
    path = radiance._save(large, tmp_path, 0)
    assert Image.open(path).size == (256, 171)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"near": 6.0}}, r"tasks.radiance.data = .*near = 6 must be below far = 5.3"),
        ({"baseline": {"skip": 5}}, r"tasks.radiance.baseline = .*skip = 5 must be below depth = 5"),
        ({"data": {"side": 10}}, r"tasks.radiance.data.side = 10: .*greater than or equal to 11"),
        ({"baseline": {"encoding": "hash"}}, r"baseline.encoding = 'hash': .*'positional' or 'integrated'"),
        ({"data": {"background": "grey"}}, r"data.background = 'grey': .*'white' or 'black'"),
    ],
)
def test_settings_that_contradict_are_told(changes, message):
    with pytest.raises(ParamsError, match=message):
        settings(changes.get("baseline"), **changes.get("data", {}))


@pytest.mark.parametrize("encoding", ["positional", "integrated"])
def test_the_full_size_network_trains_on_miniature_data(tmp_path, encoding):
    full = {"width": 256, "depth": 8, "skip": 5, "samples": 64, "fine_samples": 128, "encoding": encoding}
    task = prepared(tmp_path / "data", full)
    before = task.fresh(0).state_dict()
    curve: list[tuple[str, float, int]] = []
    model = task.train_dense(tmp_path, tmp_path / "checkpoint.pt", lambda *point: curve.append(point))
    assert [name for name, _, _ in curve] == ["train_loss", "validation_psnr"]
    assert all(np.isfinite(value) for _, value, _ in curve)
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
