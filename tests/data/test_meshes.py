"""Meshes against closed forms: bodies whose distance is known, files written and read, faults of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from stages.data import meshes
from stages.data.verify import DataError

EDGES = (2.0, 1.2, 0.8)
HALF = 0.9 * np.array(EDGES) / max(EDGES)


def box() -> trimesh.Trimesh:
    return trimesh.creation.box(
        extents=EDGES, transform=trimesh.transformations.translation_matrix([5, -3, 2])
    )


def uniform(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3))


def to_box(points: np.ndarray) -> np.ndarray:
    """Signed distance to the normalised box, by cases."""
    excess = np.abs(points) - HALF
    outside = np.sqrt((np.maximum(excess, 0) ** 2).sum(1))
    return np.where((excess < 0).all(1), excess.max(1), outside)


def test_normalisation_centres_the_bounding_box_and_fixes_its_longest_side():
    mesh = meshes.checked(box(), "a box")
    np.testing.assert_allclose(mesh.vertices.max(0), HALF)
    np.testing.assert_allclose(mesh.vertices.min(0), -HALF)
    assert mesh.vertices.dtype == np.float64 and mesh.faces.dtype == np.int64


def test_distance_to_a_box_is_its_closed_form():
    points = uniform(3000)
    found = meshes.signed_distance(meshes.checked(box(), "a box"), points)
    np.testing.assert_allclose(found, to_box(points), atol=1e-9)
    assert (found < 0).any() and (found > 0).any()


@pytest.mark.parametrize("subdivisions", [3, 4])
def test_distance_to_a_sphere_is_that_of_its_radius_but_for_the_facets(subdivisions):
    ball = trimesh.creation.icosphere(subdivisions=subdivisions, radius=7.0)
    mesh = meshes.checked(ball, "a ball")
    points = uniform(2000)
    error = meshes.signed_distance(mesh, points) - (np.linalg.norm(points, axis=1) - 0.9)
    # Facets lie inside the sphere: the distance is too large, at most by the deepest facet's depth.
    depth = 0.9 - np.linalg.norm(mesh.surface.triangles_center, axis=1).min()
    assert error.min() > -1e-9 and error.max() < 1.1 * depth
    radius = np.linalg.norm(points, axis=1)
    clear = np.abs(radius - 0.9) > depth
    assert np.array_equal(meshes.signed_distance(mesh, points)[clear] < 0, radius[clear] < 0.9)


def test_unsigned_distance_is_that_to_the_nearest_triangle():
    mesh, points = meshes.checked(box(), "a box"), uniform(500)
    found = meshes.unsigned_distance(mesh.surface, points)
    np.testing.assert_allclose(found, np.abs(to_box(points)), atol=1e-9)


def test_a_mesh_turned_inside_out_is_turned_back():
    inverted = box()
    inverted.invert()
    assert inverted.volume < 0 < meshes.checked(inverted, "a box").surface.volume
    points = uniform(200)
    found = meshes.signed_distance(meshes.checked(inverted, "a box"), points)
    np.testing.assert_allclose(found, to_box(points), atol=1e-9)


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl", ".PLY"])
def test_files_are_read_as_they_were_written(tmp_path: Path, suffix):
    path = tmp_path / f"box{suffix}"
    path.write_bytes(_exported(box(), suffix.lower()[1:]))
    points = uniform(300)
    found = meshes.signed_distance(meshes.load(path), points)
    np.testing.assert_allclose(found, to_box(points), atol=1e-6)


def _exported(mesh: trimesh.Trimesh, kind: str) -> bytes:
    written = mesh.export(file_type=kind)
    return written.encode() if isinstance(written, str) else bytes(written)


def test_the_default_mesh_is_one_closed_body_with_two_holes_and_the_same_again():
    mesh = meshes.load()
    surface = mesh.surface
    assert surface.is_watertight and surface.is_winding_consistent and surface.body_count == 1
    assert surface.euler_number == 2 - 2 * 2  # the ring's hole and the plate's
    assert surface.volume > 0 and np.abs(mesh.vertices).max() == pytest.approx(0.9)
    # Concave: far smaller than its hull.
    assert surface.volume < 0.5 * surface.convex_hull.volume
    again = meshes.load()
    assert again.sha256 == mesh.sha256 and np.array_equal(again.vertices, mesh.vertices)


def test_the_identity_is_that_of_vertices_and_faces():
    mesh = meshes.checked(box(), "a box")
    moved = meshes.Mesh(mesh.vertices + np.eye(8, 3) * 1e-9, mesh.faces)
    turned = meshes.Mesh(mesh.vertices, mesh.faces[::-1].copy())
    assert len({mesh.sha256, moved.sha256, turned.sha256}) == 3


def test_half_of_the_points_are_near_the_surface_and_half_anywhere():
    mesh = meshes.checked(box(), "a box")
    points = meshes.draw_points(mesh, 40_000, np.random.default_rng(5))
    assert points.shape == (40_000, 3) and points.dtype == np.float32
    distance = np.abs(to_box(points))
    # Of uniform ones, by volume: a shell around the box; of near ones nearly all.
    share = (np.abs(to_box(uniform(40_000))) < 0.1).mean()
    near = 0.5 * (1 + (1 - 2 * 0.0228)) * 0.5 + 0.5 * share  # ±2 deviations of the wider noise, flat surface
    assert (distance < 0.1).mean() == pytest.approx(near, abs=0.02)
    # A quarter has a deviation of 0.01 from a flat surface.
    share = (np.abs(to_box(uniform(40_000))) < 0.01).mean()
    expected = 0.25 * 0.683 + 0.25 * 0.159 + 0.5 * share
    assert (distance < 0.01).mean() == pytest.approx(expected, abs=0.02)
    # In random order: the first half is no nearer than the second.
    assert distance[:20_000].mean() == pytest.approx(distance[20_000:].mean(), rel=0.05)
    assert np.array_equal(points, meshes.draw_points(mesh, 40_000, np.random.default_rng(5)))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="mesh .*none.ply does not exist: correct the path"):
        meshes.load(tmp_path / "none.ply")


def test_another_kind_of_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="unknown kind of file, use one of .obj, .ply, .stl"):
        meshes.load(tmp_path / "mesh.txt")


@pytest.mark.parametrize("suffix", [".ply", ".stl", ".obj"])
@pytest.mark.parametrize("content", [b"", b"\x00\xffthis is no mesh\n" * 20])
def test_a_file_that_is_no_mesh_is_an_error(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"mesh .*bad{suffix} (cannot be read as a mesh|is empty)"):
        meshes.load(path)


def test_a_mesh_without_triangles_is_an_error(tmp_path):
    path = tmp_path / "points.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n", encoding="utf-8")
    with pytest.raises(DataError, match="mesh .*points.obj is empty: it has no triangles|cannot be read"):
        meshes.load(path)


def test_a_removed_triangle_leaves_three_open_edges():
    open_box = box()
    open_box.update_faces(np.arange(12) != 4)
    with pytest.raises(DataError, match="of 18 edges 3 do not have exactly two triangles.*fill_holes"):
        meshes.checked(open_box, "mesh open.obj")


def test_triangles_of_opposite_orientation_are_an_error():
    twisted = box()
    twisted.faces[4] = twisted.faces[4][::-1].copy()
    with pytest.raises(DataError, match="neighbouring triangles of opposite orientation.*fix_winding"):
        meshes.checked(trimesh.Trimesh(twisted.vertices, twisted.faces, process=False), "mesh twisted.obj")


def test_vertices_that_are_not_finite_are_an_error():
    broken = box()
    broken.vertices[3, 1] = np.nan
    with pytest.raises(DataError, match="vertices that are not finite"):
        meshes.checked(broken, "mesh broken.obj")


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_file_with_a_vertex_that_is_not_finite_is_told_so(tmp_path, suffix, value):
    broken, path = box(), tmp_path / f"broken{suffix}"
    broken.vertices[3, 1] = value
    path.write_bytes(_exported(broken, suffix[1:]))
    with pytest.raises(
        DataError, match="mesh .*broken.* has vertices that are not finite: .* export it again"
    ):
        meshes.load(path)


def flat(vertices: np.ndarray) -> trimesh.Trimesh:
    """A quadrilateral and its back, each cut along another diagonal."""
    faces = [[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]]
    return trimesh.Trimesh(vertices, faces, process=False)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("place", [0.0, 1000.0])
def test_a_closed_surface_around_nothing_is_an_error(tilted, place):
    corners = np.array([[0, 0, 0], [3, 0, 0], [3, 2, 0], [0, 2, 0]], dtype=float)
    turn = trimesh.transformations.euler_matrix(0.3, 0.7, 1.1)[:3, :3] if tilted else np.eye(3)
    sheet = flat(corners @ turn.T + place)
    assert sheet.is_watertight and sheet.is_winding_consistent
    with pytest.raises(DataError, match="mesh sheet.ply encloses no volume: .*give it thickness"):
        meshes.checked(sheet, "mesh sheet.ply")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_thin_sheet_or_rod_is_a_body(scale):
    for extents in ((1.0, 1.0, 1e-6), (1.0, 1e-4, 1e-4)):
        thin = trimesh.creation.box(extents=scale * np.array(extents))
        assert meshes.checked(thin, "thin").surface.volume == pytest.approx(1.8**3 * np.prod(extents))


def test_slivers_that_merging_leaves_behind_are_dropped():
    corners, faces = np.asarray(box().vertices), np.asarray(box().faces)
    # An edge split in the middle of nothing: its new vertex is merged with an end, and one face collapses.
    collapsed = trimesh.Trimesh(corners, np.concatenate([faces, [[0, 0, 1]]]), process=False)
    assert not collapsed.is_watertight
    assert len(meshes.checked(collapsed, "a box").faces) == 12
