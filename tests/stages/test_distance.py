"""The signed-distance task: exact functions have no error, and its data and pictures are what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import eugen
from stages.data.verify import DataError
from stages.faults import ParamsError, validate
from stages.tasks import distance

RADIUS = 0.9


class Known(nn.Module):
    """A network whose function is known."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def section(**baseline: Any) -> dict[str, Any]:
    recipe = {"steps": 30, "batch_size": 128, "learning_rate": 3e-3, "evaluate_every": 30}
    return {
        "data": {"train": 3000, "validation": 500, "test": 2000, "resolution": 33, "surface_points": 2000},
        "baseline": {"width": 24, "layers": 4, "frequencies": 2, "training": recipe, **baseline},
        "transfer": {"budgets": [0.3], "seeds": [0], "calibration_tokens": 512},
        "finetune": {"steps": 0, "batch_size": 16, "learning_rates": [3e-4]},
        "profile": {"batches": [1], "pairs": 10},
    }


def opened(folder: Path, mesh: Path | None = None, **baseline: Any) -> distance.Distance:
    whole = section(**baseline)
    if mesh is not None:
        whole["data"]["mesh"] = str(mesh)
    return distance.Distance(validate(distance.DistanceSettings, whole, "tasks.distance"), folder)


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> distance.Distance:
    """The task for a ball, prepared."""
    folder = tmp_path_factory.mktemp("distance")
    trimesh.creation.icosphere(subdivisions=5, radius=3.0).export(folder / "ball.ply")
    task = opened(folder, folder / "ball.ply")
    task.prepare(folder)
    return task


def to_ball(points: Tensor, radius: float = RADIUS) -> Tensor:
    return points.norm(dim=-1) - radius


def test_the_exact_function_has_no_error_and_the_whole_surface(ball):
    for part in ("validation", "test"):
        quality = ball.evaluate(Known(to_ball), part)
        # The mesh's facets lie up to 0.0005 inside the sphere.
        assert quality["sdf_error"] < 5e-4 and quality["near_surface_error"] < 5e-4
        assert quality.get("f_score", 1.0) == 1.0


@pytest.mark.parametrize("offset", [0.004, 0.03])
def test_an_offset_is_the_error_and_beyond_the_threshold_no_surface_counts(ball, offset):
    quality = ball.evaluate(Known(lambda points: to_ball(points) + offset), "test")
    assert quality["sdf_error"] == pytest.approx(offset, abs=5e-4)
    assert quality["f_score"] == (1.0 if offset < 0.008 else 0.0)


def test_the_error_near_the_surface_is_that_of_the_points_there(ball):
    far_only = Known(lambda x: to_ball(x) + 0.5 * (to_ball(x).abs() > 0.06))
    quality = ball.evaluate(far_only, "test")
    points = ball._data["test.points"]
    share = float((to_ball(points).abs() > 0.06).double().mean())
    assert quality["near_surface_error"] < 5e-4
    assert quality["sdf_error"] == pytest.approx(0.5 * share, abs=5e-4)


def test_a_network_without_a_surface_scores_zero(ball, tmp_path):
    empty = Known(lambda points: points.norm(dim=-1) + 1)
    assert ball.evaluate(empty, "test")["f_score"] == 0.0
    (path,) = ball.pictures(empty, tmp_path)
    assert (np.asarray(Image.open(path)) == 255).all()


def test_pictures_of_truth_and_network_agree_and_carry_the_same_name(ball, tmp_path):
    truth, found = tmp_path / "truth", tmp_path / "found"
    for folder in (truth, found):
        folder.mkdir()
    (one,) = ball.truth_pictures(truth)
    (other,) = ball.pictures(Known(to_ball), found)
    assert one.name == other.name and (one.parent, other.parent) == (truth, found)
    first, second = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
    middle, corner = len(first) // 2, 0
    for picture in (first, second):
        assert (picture[middle, middle] != 255).any() and (picture[corner, corner] == 255).all()
    assert ((first != 255).any(-1) != (second != 255).any(-1)).mean() < 0.02


def test_stored_distances_are_those_of_the_stored_points(ball):
    data = load_file(ball.folder / distance.POINTS)
    for part, count in (("train", 3000), ("validation", 500), ("test", 2000)):
        points, distances = data[f"{part}.points"], data[f"{part}.distances"]
        assert points.shape == (count, 3) and distances.shape == (count,)
        assert points.dtype == distances.dtype == torch.float32
        torch.testing.assert_close(distances, to_ball(points), atol=5e-4, rtol=0)
    seen = {part: {tuple(row) for row in data[f"{part}.points"].tolist()} for part in distance.PARTS}
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]


def test_preparing_again_gives_the_same_files(ball, tmp_path):
    again = ball.prepare(tmp_path)
    assert again == ball.prepare(tmp_path) and again["mesh"].rows == 20 * 4**5
    for name in (distance.POINTS, distance.MESH):
        assert (tmp_path / name).read_bytes() == (ball.folder / name).read_bytes()


def test_an_open_mesh_stops_the_preparation_and_leaves_nothing(tmp_path):
    mesh = trimesh.creation.icosphere(subdivisions=3)
    mesh.update_faces(np.arange(len(mesh.faces)) != 7)
    mesh.export(tmp_path / "open.obj")
    target = tmp_path / "data"
    target.mkdir()
    with pytest.raises(
        DataError, match="open.obj is not watertight: of 1920 edges 3 do not have exactly two"
    ):
        opened(target, tmp_path / "open.obj").prepare(target)
    assert list(target.iterdir()) == []


def test_batches_are_training_points_with_their_distances(ball):
    points, distances = ball.draw(400, torch.Generator().manual_seed(2))
    known = {tuple(row) for row in ball._data["train.points"].tolist()}
    assert {tuple(row) for row in points.tolist()} <= known
    torch.testing.assert_close(distances, to_ball(points), atol=5e-4, rtol=0)


def test_the_loss_is_the_mean_absolute_error(ball):
    batch = torch.tensor([[0.0, 0, 0], [1, 0, 0]]), torch.tensor([-0.5, 0.3])
    # The function gives −0.9 and 0.1.
    assert float(ball.batch_loss(Known(to_ball), batch)) == pytest.approx((0.4 + 0.2) / 2)


@pytest.mark.parametrize(("scale", "excess"), [(1.0, 0.0), (3.0, 2.0), (0.25, 0.75)])
def test_the_eikonal_term_is_the_slope_s_distance_from_one(ball, scale, excess):
    task = opened(ball.folder, eikonal=0.1)
    batch = task.draw(50, torch.Generator().manual_seed(0))
    scaled = Known(lambda points: scale * to_ball(points))
    plain = ball.batch_loss(scaled, batch)
    assert (task.batch_loss(scaled, batch) - plain).item() == pytest.approx(0.1 * excess, abs=1e-5)


ROWS = [
    eugen.EUGenConfig(budget=0.3),
    eugen.EUGenConfig(budget=0.3, min_order=2, projection="learned"),
    eugen.NarrowConfig(budget=0.3),
    eugen.PruneConfig(budget=0.3),
]


@pytest.mark.parametrize("block", ["pair", "layer"])
@pytest.mark.parametrize("config", ROWS, ids=lambda c: f"{c.name}-{getattr(c, 'projection', '')}")
def test_the_eikonal_term_s_gradient_is_right_through_replaced_blocks(ball, config, block):
    task = opened(ball.folder, block=block, eikonal=1.0)
    model = eugen.replace(task.fresh(0), config).model.double()
    batch = tuple(tensor.double() for tensor in task.draw(16, torch.Generator().manual_seed(0)))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    task.batch_loss(model, batch).backward()
    slope = sum(float((w.grad * a).sum()) for w, a in zip(weights, along, strict=True) if w.grad is not None)

    def moved(step: float) -> float:
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight.add_(direction, alpha=step)
            loss = float(task.batch_loss(model, batch))
            for weight, direction in zip(weights, along, strict=True):
                weight.add_(direction, alpha=-step)
        return loss

    step = 1e-7
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-3, abs=1e-6)


def test_training_lowers_the_error_well_below_that_of_a_constant(ball, tmp_path):
    curve: list[tuple[str, float, int]] = []
    model = ball.train_dense(tmp_path, tmp_path / "checkpoint.pt", lambda *point: curve.append(point))
    distances = ball._data["test.distances"]
    constant = float((distances - distances.median()).abs().mean())
    assert ball.evaluate(model, "test")["sdf_error"] < 0.5 * constant
    assert {name for name, _, _ in curve} == {"train_loss", "validation_sdf_error"}


def test_an_odd_number_of_layers_is_a_fault_of_the_section():
    with pytest.raises(ParamsError, match="tasks.distance.baseline.layers = 3"):
        validate(distance.DistanceSettings, section(layers=3), "tasks.distance")
