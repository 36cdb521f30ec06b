"""Measures between surfaces and solids against closed forms, and against trimesh as an independent reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.distance import cdist

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.eval.metrics.surfaces import (
    chamfer_and_f_scores,
    iou,
    mesh_iou,
    normal_consistency,
    points_on,
    surface_scores,
)


class BoxField:
    """The implicit function of a box centred on the origin, of one colour."""

    device = torch.device("cpu")

    def __init__(self, half_3) -> None:
        self.half_3 = torch.tensor(half_3)

    def __call__(self, points_BP3):
        sdf_BP = (points_BP3.abs() - self.half_3).amax(-1)
        return SimpleNamespace(sdf_BP=sdf_BP, rgb_BP3=torch.full_like(points_BP3, 0.5))


def mesh_of(shape: trimesh.Trimesh) -> Mesh:
    return Mesh.from_vertex_colors(shape.vertices, shape.faces, np.full((len(shape.vertices), 3), 0.5))


def box(extents, shift=(0, 0, 0)) -> Mesh:
    shape = trimesh.creation.box(extents)
    shape.apply_translation(shift)
    return mesh_of(shape)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def lattice(n: int) -> np.ndarray:
    axis = (np.arange(n) + 0.5) / n * 2 - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def test_chamfer_of_shifted_points_is_the_shift():
    points = lattice(6)
    chamfer, scores = chamfer_and_f_scores(points, points + [0.03, 0, 0], [0.02, 0.05])
    assert chamfer == pytest.approx(0.03) and scores == [0.0, 1.0]
    assert chamfer_and_f_scores(points, points) == (0.0, [1.0, 1.0])


def test_f_score_is_the_harmonic_mean_of_precision_and_recall():
    truth, others = np.zeros((1, 3)), np.array([[0, 0, 0], [1.0, 0, 0]])  # precision and recall 1 and 1/2
    chamfer, (score,) = chamfer_and_f_scores(truth, others, [0.1])
    assert score == pytest.approx(2 / 3) and chamfer == pytest.approx((0 + 0.5) / 2)


def test_chamfer_and_f_scores_by_all_pairs():
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(120, 3)), rng.normal(size=(90, 3)) * 1.2
    distances = cdist(points, others)
    there, back = distances.min(1), distances.min(0)
    precision, recall = (there <= 0.3).mean(), (back <= 0.3).mean()
    chamfer, (score,) = chamfer_and_f_scores(points, others, [0.3])
    assert chamfer == pytest.approx((there.mean() + back.mean()) / 2)
    assert score == pytest.approx(2 * precision * recall / (precision + recall)) and 0.1 < score < 0.9


def test_the_floor_of_a_perfect_copy_is_as_the_file_says():
    triangles, rng = box([1.8] * 3).triangles, np.random.default_rng(0)
    for count, floor, share in ((4096, 0.035, 0.23), (65536, 0.0086, 0.986)):
        chamfer, (score, _) = chamfer_and_f_scores(*(points_on(triangles, count, rng)[0] for _ in range(2)))
        assert chamfer == pytest.approx(floor, rel=0.03) and score == pytest.approx(share, abs=0.02)


def test_normal_consistency_is_the_cosine_between_planes():
    points = lattice(8)
    up, tilted = np.array([0, 0, 1.0]), np.array([0, np.sin(np.radians(60)), np.cos(np.radians(60))])
    normals, others = np.tile(up, (len(points), 1)), np.tile(-tilted, (len(points), 1))  # turned: the sign is no matter
    assert normal_consistency(points, normals, points, others) == pytest.approx(0.5)
    assert normal_consistency(points, normals, points + 0.01, -normals) == pytest.approx(1.0)


def test_normal_consistency_averages_both_directions():
    points, normals = np.zeros((1, 3)), np.array([[1.0, 0, 0]])
    others, other_normals = np.array([[0, 0, 0], [1.0, 0, 0]]), np.array([[1.0, 0, 0], [0, 1.0, 0]])
    assert normal_consistency(points, normals, others, other_normals) == pytest.approx((1 + 1 / 2) / 2)


def test_normals_of_two_samplings_of_a_sphere_agree():
    sphere, rng = trimesh.creation.icosphere(subdivisions=4, radius=0.9), np.random.default_rng(0)
    ours, theirs = points_on(mesh_of(sphere).triangles, 8000, rng), trimesh.sample.sample_surface(sphere, 8000, seed=1)
    assert normal_consistency(*ours, theirs[0], sphere.face_normals[theirs[1]]) > 0.998
    assert chamfer_and_f_scores(ours[0], theirs[0])[0] == pytest.approx(np.sqrt(sphere.area / 8000) / 2, rel=0.05)


def test_all_scores_at_once_are_the_single_ones():
    rng = np.random.default_rng(0)
    ours, theirs = ((rng.normal(size=(n, 3)), unit(rng.normal(size=(n, 3)))) for n in (200, 300))
    chamfer, (near, far) = chamfer_and_f_scores(ours[0], theirs[0], [0.1, 0.3])
    assert surface_scores(*ours, *theirs, [0.1, 0.3]) == {
        "chamfer": chamfer,
        "f@0.1": near,
        "f@0.3": far,
        "normal_consistency": normal_consistency(*ours, *theirs),
    }


def test_iou_of_overlapping_boxes():
    points = lattice(40)
    truth = (np.abs(points) - [0.5, 0.5, 0.5]).max(1)
    assert iou(BoxField([0.5, 0.5, 0.5]), points, truth) == 1.0
    assert iou(BoxField([0.25, 0.5, 0.5]), points, truth) == pytest.approx(0.5)
    assert iou(BoxField([-1.0, -1.0, -1.0]), points, truth) == 0.0
    assert iou(BoxField([-1.0, -1.0, -1.0]), points, np.ones(len(points))) == 1.0


def test_mesh_iou_of_overlapping_boxes():
    cube = box([1, 1, 1])
    assert mesh_iou(cube, box([1, 1, 1], [0.5, 0, 0])) == pytest.approx(1 / 3, abs=0.01)
    assert mesh_iou(cube, box([0.5, 0.5, 1])) == pytest.approx(1 / 4, abs=0.01)
    assert mesh_iou(cube, cube) == 1.0
    assert mesh_iou(box([0.4] * 3, [-0.6, 0, 0]), box([0.4] * 3, [0.6, 0, 0])) == 0.0


def test_mesh_iou_of_spheres():
    """Of radii r < R around one centre: (r / R)^3, of the polyhedra by their volumes."""
    small, large = (trimesh.creation.icosphere(subdivisions=4, radius=r) for r in (0.6, 0.9))
    assert mesh_iou(mesh_of(small), mesh_of(large)) == pytest.approx(small.volume / large.volume, abs=0.01)


def test_mesh_iou_of_open_and_flipped_meshes():
    cube = trimesh.creation.box([1.8] * 3)
    lid = cube.face_normals[:, 1] > 0.9
    cup = trimesh.Trimesh(cube.vertices, cube.faces[~lid][:, ::-1], process=False)
    assert lid.sum() == 2 and mesh_iou(mesh_of(cup), mesh_of(cube)) > 0.97


def test_mesh_iou_of_sheets_is_no_number():
    sheet = mesh_of(
        trimesh.Trimesh([[-0.9, 0, -0.9], [0.9, 0, -0.9], [0.9, 0, 0.9], [-0.9, 0, 0.9]], [[0, 1, 2], [0, 2, 3]])
    )
    assert np.isnan(mesh_iou(sheet, sheet, n_points=2000))
    assert mesh_iou(sheet, box([1, 1, 1]), n_points=2000) == 0.0


def test_points_are_uniform_by_area_with_their_normals():
    small = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    large = small * [3, 1, 1] + [0, 0, 1]
    points, normals = points_on(np.stack([small, large]).astype(np.float32), 40_000, np.random.default_rng(0))
    above = points[:, 2] > 0.5
    assert above.mean() == pytest.approx(0.75, abs=0.01)
    assert (points >= -1e-6).all() and (points[~above, :2].sum(1) <= 1 + 1e-6).all()
    np.testing.assert_allclose(points[above].mean(0), [1, 1 / 3, 1], atol=0.02)
    np.testing.assert_allclose(normals, np.tile([0, 0, 1], (len(points), 1)), atol=1e-6)


def test_nothing_is_drawn_from_triangles_without_area():
    with pytest.raises(ValueError, match="without area"):
        points_on(np.zeros((2, 3, 3), np.float32), 10, np.random.default_rng(0))
