"""The compiled loops over triangles against trimesh and sums over all faces, and how they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes.bvh import Bvh
from shapeloom.data_pipes.compiled import compiled
from shapeloom.data_pipes.workers import isolated_map
from shapeloom.launch.bench.sign import winding_numbers


def soup(n: int = 300) -> np.ndarray:
    """Triangles of all sizes, needles and clusters among them."""
    rng = np.random.default_rng(0)
    triangles_F33 = rng.uniform(-1, 1, (n, 1, 3)) + rng.standard_normal((n, 3, 3)) * 10 ** rng.uniform(-4, 0, (n, 1, 1))
    triangles_F33[::7, 2] = triangles_F33[::7, 1] + 1e-7
    triangles_F33[: n // 5] = triangles_F33[0] + 1e-9 * rng.standard_normal((n // 5, 3, 3))
    return triangles_F33


def normals(triangles_F33: np.ndarray) -> np.ndarray:
    return np.cross(*np.moveaxis(triangles_F33[:, 1:] - triangles_F33[:, :1], 1, 0))


def points(n: int = 200) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1.5, 1.5, (n, 3))


@pytest.mark.parametrize("turned", [1, -1])
def test_the_nearest_point_is_that_of_all_triangles(turned: int) -> None:
    triangles_F33, xyz_N3 = soup(), points()
    face_N, weight_N3, distance_N = Bvh(triangles_F33, turned * normals(triangles_F33)).closest(xyz_N3)
    closest_on = trimesh.triangles.closest_point
    each_NF = np.stack([np.linalg.norm(closest_on(triangles_F33, np.tile(p, (300, 1))) - p, axis=1) for p in xyz_N3])
    assert distance_N == pytest.approx(each_NF.min(axis=1), abs=1e-9)
    assert weight_N3.min() > -1e-12 and weight_N3.sum(axis=1) == pytest.approx(1)
    there_N3 = np.einsum("nkc,nk->nc", triangles_F33[face_N], weight_N3)
    assert np.linalg.norm(there_N3 - xyz_N3, axis=1) == pytest.approx(distance_N, abs=1e-9)


def test_winding_numbers_are_the_solid_angles_of_all_faces() -> None:
    shape = trimesh.creation.icosphere(3, 0.8)
    kept = np.random.default_rng(0).random(len(shape.faces)) < 0.7
    triangles_F33, xyz_N3 = shape.triangles[kept], points(500)
    bvh = Bvh(triangles_F33, normals(triangles_F33))
    assert bvh.winding_numbers(xyz_N3) == pytest.approx(winding_numbers(triangles_F33, xyz_N3), abs=0.004)
    away = Bvh(triangles_F33, -normals(triangles_F33)).winding_numbers(xyz_N3)
    assert away == pytest.approx(-bvh.winding_numbers(xyz_N3), abs=1e-12)


def test_many_triangles_in_one_place_make_no_endless_tree() -> None:
    triangles_F33 = np.tile(soup()[:1], (5000, 1, 1))
    distance_N = Bvh(triangles_F33, normals(triangles_F33)).closest(points(3))[2]
    assert distance_N == pytest.approx(Bvh(triangles_F33[:1], normals(triangles_F33[:1])).closest(points(3))[2])


def test_where_no_cache_can_be_written_it_is_compiled_all_the_same() -> None:
    names: dict = {}
    exec(compile("def twice(x):\n    return 2 * x\n", "<no file>", "exec"), names)  # numba has no place for its cache
    assert compiled(names["twice"])(21) == 42


def sampled(seed: int) -> float:
    from shapeloom.data_pipes.mesh import Mesh
    from shapeloom.data_pipes.sampling import sample_field

    box = trimesh.creation.box((1, 1, 1))
    mesh = Mesh.from_face_colors(box.vertices, box.faces, np.ones((12, 3)))
    return float(sample_field(mesh, 100, 100, np.random.default_rng(seed)).sdf.sum())


def test_it_runs_in_a_worker_of_limited_memory() -> None:
    there = list(isolated_map(sampled, [3], workers=1, cpu_s=120, wall_s=250, memory_bytes=4 << 30))
    assert there == [sampled(3)]


def test_neither_the_package_nor_its_samplers_import_numba_before_it_is_used() -> None:
    code = "import sys, shapeloom, shapeloom.data_pipes.build; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
