"""Lines through triangles: against each line tried on each triangle, on edges and corners, against solid angles."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from test_bvh import normals, points, soup

from shapeloom.data_pipes.crossings import Crossings
from shapeloom.launch.bench.sign import winding_numbers


def crossings_of_all(
    triangles_F33: np.ndarray, xyz_N3: np.ndarray, direction_3: np.ndarray, reach: float
) -> np.ndarray:
    """[3, N] beyond, within and before reach, by Moeller and Trumbore's test of each pair."""
    b_F3, c_F3 = triangles_F33[:, 1] - triangles_F33[:, 0], triangles_F33[:, 2] - triangles_F33[:, 0]
    p_NF3 = xyz_N3[:, None] - triangles_F33[:, 0]
    q_F3 = np.cross(direction_3, c_F3)
    det_F = (b_F3 * q_F3).sum(-1)
    u_NF = (p_NF3 * q_F3).sum(-1) / det_F
    r_NF3 = np.cross(p_NF3, b_F3)
    v_NF, t_NF = (r_NF3 @ direction_3) / det_F, (r_NF3 * c_F3).sum(-1) / det_F
    side_NF = np.where((u_NF >= 0) & (v_NF >= 0) & (u_NF + v_NF <= 1), np.sign(np.cross(b_F3, c_F3) @ direction_3), 0)
    where = t_NF > reach, np.abs(t_NF) <= reach, t_NF < -reach
    return np.array([(side_NF * which_NF).sum(axis=1) for which_NF in where])


@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("reach", [0.0, 0.2])
def test_lines_cross_what_they_cross_among_all_triangles(turned: int, reach: float) -> None:
    triangles_F33, xyz_N3 = soup(), points(400)
    crossings = Crossings(triangles_F33, turned * normals(triangles_F33))
    for direction_3 in (*points(6), np.array([0, 0, 1.0]), np.array([-3.0, 0, 0])):
        found_3N = np.array(crossings._along(direction_3, xyz_N3, np.full(len(xyz_N3), reach)))
        reach_of_t = reach / np.linalg.norm(direction_3)
        wanted_3N = turned * crossings_of_all(triangles_F33, xyz_N3, direction_3, reach_of_t)
        assert np.abs(wanted_3N).sum() > 100 and (found_3N == wanted_3N).all()


def test_long_and_large_triangles_among_small_ones_are_found() -> None:
    """They reach into many cells, of which a row's ends are worked out side by side."""
    rng = np.random.default_rng(3)
    small_F33 = rng.uniform(-1, 1, (20_000, 1, 3)) + 0.01 * rng.standard_normal((20_000, 3, 3))
    long_F33 = rng.uniform(-1, 1, (60, 3, 3))
    long_F33[::2, 2] = long_F33[::2, 1] + 1e-3  # needles from side to side
    triangles_F33, xyz_N3 = np.concatenate([small_F33, long_F33]), points(300)
    found_3N = Crossings(triangles_F33, normals(triangles_F33))._along(np.array([1, 2, 3.0]), xyz_N3, np.zeros(300))
    wanted_3N = crossings_of_all(triangles_F33, xyz_N3, np.array([1, 2, 3.0]), 0.0)
    assert (np.array(found_3N) == wanted_3N).all()


def test_a_line_through_edges_and_corners_crosses_a_closed_surface_once_each_way() -> None:
    """The faces of a grid of quads, halved, lie beneath points that fall on their corners, edges and middles."""
    box = trimesh.creation.box((2, 2, 2)).subdivide().subdivide().subdivide()
    at = np.linspace(-0.9375, 0.9375, 31)  # multiples of a sixteenth: every other one is on a row of corners
    xyz_N3 = np.stack([*np.meshgrid(at, at, [0.1], indexing="ij")], -1).reshape(-1, 3)
    for axis in range(3):
        direction_3 = np.eye(3)[axis]
        ahead_N, at_N, behind_N = Crossings(box.triangles, box.face_normals)._along(
            direction_3, np.roll(xyz_N3, axis + 1, axis=1), np.zeros(len(xyz_N3))
        )
        assert (ahead_N == 1).all() and (at_N == 0).all() and (behind_N == -1).all()


def test_votes_count_every_crossing_and_tend_to_the_winding_number() -> None:
    inner, outer = trimesh.creation.icosphere(2, 0.4), trimesh.creation.icosphere(2, 0.8)
    triangles_F33 = np.concatenate([inner.triangles, outer.triangles])
    crossings = Crossings(triangles_F33, normals(triangles_F33))
    xyz_N3 = np.array([[0.1, 0, 0], [0.6, 0, 0], [0.79, 0.79, 0], [0.9, 0, 0]])
    lines_L3 = np.random.default_rng(0).standard_normal((50, 3))
    share_N, left_out_N = crossings.votes(xyz_N3, lines_L3)
    assert share_N.tolist() == [1, 1, 0, 0] and left_out_N[0] == 1  # within both every ray leaves twice
    open_F33 = trimesh.creation.icosphere(3, 0.8).triangles
    open_F33 = open_F33[open_F33[:, :, 2].max(axis=1) < 0.5]
    lines_L3 = np.random.default_rng(0).standard_normal((8000, 3))
    share_N, left_out_N = Crossings(open_F33, normals(open_F33)).votes(xyz_N3[:2], lines_L3)
    assert share_N + left_out_N == pytest.approx(winding_numbers(open_F33, xyz_N3[:2]), abs=0.02)


def test_both_sides_of_a_face_are_seen_along_one_line() -> None:
    shape = trimesh.creation.box((1, 1, 1))
    crossings = Crossings(shape.triangles, shape.face_normals)
    front_F, back_F = crossings.votes_on_sides(shape.triangles_center, shape.face_normals, 1e-4, points(6))
    assert front_F.tolist() == [0] * 12 and back_F.tolist() == [1] * 12
