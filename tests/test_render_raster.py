"""The rasteriser of data_pipes: against Embree's rays, closed forms and properties of coverage; its textures."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes import raster
from shapeloom.data_pipes.mesh import Material, Mesh, linear_to_srgb, srgb_to_linear
from shapeloom.data_pipes.read import read_mesh
from shapeloom.data_pipes.render import RayScene, render
from shapeloom.data_pipes.workers import isolated_map
from shapeloom.models.cameras import Cameras, orbit

WHITE = Material(np.ones(4))
INSIDE = Cameras(np.eye(4)[None], np.array([24.0]), 32, 32)


def plain(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    return Mesh(vertices, faces, np.zeros(len(faces)), (WHITE,))


def seen(mesh: Mesh, cameras: Cameras, s: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Faces and depths of the only view's samples, [H * s, W * s]; -1 and infinity where there is nothing."""
    to_world, focal = cameras.camera_to_world[0].astype(np.float64), cameras.focal[0]
    points = (mesh.vertices - to_world[:3, 3]) @ (to_world[:3, :3] * [focal, -focal, -1])
    rows, columns = cameras.height * s, cameras.width * s
    everything = np.full(rows * columns, np.inf, np.float32)
    sample, spot, depth, _, face, barycentric, _ = raster.visible(
        points, mesh.faces, cameras.width, cameras.height, s, everything, False
    )
    assert np.isfinite(depth).all() and np.isfinite(barycentric).all()
    assert barycentric.min(initial=0) >= -1e-6 and barycentric.sum(axis=1) == pytest.approx(1, abs=1e-5)
    faces, depths = np.full(rows * columns, -1), np.full(rows * columns, np.inf, np.float32)
    faces[sample], depths[sample] = face[spot], depth
    return faces.reshape(rows, columns), depths.reshape(rows, columns)


def cast(mesh: Mesh, cameras: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """The same by Embree, through pixel centres."""
    origins, directions = (rays[0].reshape(-1, 3) for rays in cameras.rays())
    directions = directions / -(directions @ cameras.camera_to_world[0, :3, 2])[:, None]  # distance is depth
    hits = RayScene(mesh).cast(origins, directions)
    faces, depths = np.full(len(origins), -1), np.full(len(origins), np.inf, np.float32)
    faces[hits.ray_M], depths[hits.ray_M] = hits.face_M, hits.distance_M
    return faces.reshape(cameras.height, -1), depths.reshape(cameras.height, -1)


# ------------------------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_random_triangles_are_seen_as_by_rays(spread: float) -> None:
    rng = np.random.default_rng(int(100 * spread))
    centres, offsets = rng.uniform(-1, 1, (400, 1, 3)), spread * rng.standard_normal((400, 3, 3))
    mesh = plain((centres + offsets).reshape(-1, 3), np.arange(1200).reshape(-1, 3))
    for cameras in (orbit([30], [20], size=96), INSIDE):  # INSIDE has triangles through and behind its own plane
        faces, depths = seen(mesh, cameras)
        cast_faces, cast_depths = cast(mesh, cameras)
        assert (faces >= 0).any() and (faces != cast_faces).mean() < 2e-3  # rays are float32, edges are not
        same = (faces == cast_faces) & (faces >= 0)
        assert np.percentile(np.abs(depths[same] - cast_depths[same]) / cast_depths[same], 99.9) < 1e-3


def test_real_objects_are_seen_as_by_rays(assets_dir: Path) -> None:
    for path in sorted((assets_dir / "pack").rglob("*.glb"))[5::400]:
        mesh = read_mesh(path).normalised()[0]
        for cameras in (orbit([35], [25], size=128), orbit([200], [-10], size=128)):
            faces, depths = seen(mesh, cameras)
            cast_faces, cast_depths = cast(mesh, cameras)
            assert ((faces >= 0) != (cast_faces >= 0)).mean() < 1e-3, path.name
            both = (faces >= 0) & (cast_faces >= 0)
            off = np.abs(depths[both] - cast_depths[both]) > 1e-4  # coplanar faces may take turns, not depths
            assert off.mean() < 2e-3, path.name


@pytest.mark.parametrize("distance", [1.2, 4.0, 400.0])
def test_closed_surfaces_have_no_holes(distance: float) -> None:
    sphere = trimesh.creation.icosphere(subdivisions=4)
    cameras = orbit([13], [37], size=128, distance=distance, fov_deg=min(100, 120 / distance))
    faces, depths = seen(plain(sphere.vertices, sphere.faces), cameras, s=3)
    # All rays that pass well inside the outline; the far side is behind, so that a crack would show in the depth too.
    grid = (np.arange(384) + 0.5) / 3 - 64
    angle = np.arctan(np.hypot(*np.meshgrid(grid, grid)) / cameras.focal[0])
    inside = angle < np.arcsin(1 / distance) * 0.99
    assert inside.sum() > 1000 and (faces[inside] >= 0).all()
    assert (depths[inside] < distance).all()


def test_vertices_in_the_same_place_leave_no_seam() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=3)
    corners = sphere.vertices[sphere.faces].reshape(-1, 3)
    cameras = orbit([0, 45], [0, 35.264], size=64)  # along an axis and a diagonal: edges run through samples
    joined = render(plain(sphere.vertices, sphere.faces), cameras)
    apart = render(plain(corners, np.arange(len(corners)).reshape(-1, 3)), cameras)
    assert (joined.albedo == apart.albedo).all() and (joined.depth == apart.depth).all()


def test_each_sample_on_shared_edges_belongs_to_one_face() -> None:
    """A square cut into fans whose edges run exactly through samples: rows, columns and diagonals."""
    corners = np.array([[x / 16, y / 16, -1] for x in (-8, 0, 8) for y in (-8, 0, 8)])
    ring = [0, 1, 2, 5, 8, 7, 6, 3]
    faces = np.array([[4, a, b] for a, b in zip(ring, ring[1:] + ring[:1])])
    camera = Cameras(np.eye(4)[None], np.array([16.0]), 17, 17)  # an odd size: the middle sample lies on the axis
    alone = np.zeros((17, 17), int)
    for face in faces:
        for winding in (face, face[::-1])[: 1 + face[1] % 2]:
            found = seen(plain(corners, winding[None]), camera)[0] >= 0
        alone += found
    assert set(np.unique(alone)) == {0, 1} and (alone[1:-1, 1:-1] == 1).all()


def test_degenerate_and_extreme_triangles_do_no_harm() -> None:
    tiny, huge = 1e-7, 1e18
    triangles = np.array(
        [
            [[0, 0, -2], [0, 0, -2], [0, 0, -2]],  # a point
            [[-1, 0, -2], [0, 0, -2], [1, 0, -2]],  # a line
            [[0, 0, 0], [1, 0, -1], [0, 1, -1]],  # a corner at the eye
            [[-1, 0, -1], [1, 0, -1], [0, 0, 3]],  # edge-on, through the eye
            [[0.01, 0.01, 2], [1, 0, 2], [0, 1, 2]],  # behind
            [[0, 0, -2], [tiny, 0, -2], [0, tiny, -2]],  # less than a sample
            [[-huge, -huge, -huge], [huge, -huge, -huge], [0, huge, -huge]],  # behind all others
        ]
    )
    mesh = plain(triangles.reshape(-1, 3), np.arange(21).reshape(-1, 3))
    views = render(mesh, INSIDE)
    covered = views.albedo[0, ..., 3] > 0
    assert covered.mean() > 0.3
    assert np.isfinite(views.depth[0][covered]).all() and not np.isnan(views.normal).any()
    assert np.linalg.norm(views.normal[0][covered], axis=-1) == pytest.approx(1, abs=1e-5)
    assert not render(plain(triangles[:2].reshape(-1, 3), np.arange(6).reshape(-1, 3)), INSIDE).albedo.any()


def test_many_triangles_below_a_pixel_cover_as_one_large_one() -> None:
    n = 300
    grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, n), np.linspace(-0.5, 0.5, n), indexing="ij"), axis=-1)
    vertices = np.concatenate([grid, np.zeros((n, n, 1))], axis=2).reshape(-1, 3)
    index = np.arange(n * n).reshape(n, n)
    a, b, c, d = (index[i : n - 1 + i, j : n - 1 + j].ravel() for i, j in ((0, 0), (1, 0), (1, 1), (0, 1)))
    fine = plain(vertices, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]))
    coarse = plain(vertices[[0, -n, -1, n - 1]], np.array([[0, 1, 2], [0, 2, 3]]))
    cameras = orbit([25], [15], size=96)
    first, second = render(fine, cameras), render(coarse, cameras)
    assert (first.albedo == second.albedo).all()
    covered = np.isfinite(first.depth)
    assert first.depth[covered] == pytest.approx(second.depth[covered], abs=1e-5)


# ------------------------------------------------------------------------------------------------------- textures


def floor_with(texture: np.ndarray, repeats: float = 1) -> Mesh:
    vertices = np.array([[-1, -0.4, 1], [1, -0.4, 1], [1, -0.4, -1], [-1, -0.4, -1]])
    uv = repeats * np.array([[0, 1], [1, 1], [1, 0], [0, 0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(vertices, faces, [0, 0], (Material(np.ones(4), texture),), corner_uv=uv[faces])


def opaque_texture(rgb_HW: np.ndarray) -> np.ndarray:
    rgb = np.broadcast_to(rgb_HW[..., None] if rgb_HW.ndim == 2 else rgb_HW, (*rgb_HW.shape[:2], 3))
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255)], axis=2).astype(np.uint8)


def test_a_fine_checkerboard_becomes_the_grey_of_its_light() -> None:
    checks = opaque_texture(255 * (np.indices((512, 512)).sum(axis=0) % 2))
    views = render(floor_with(checks), orbit([20], [60], size=64))
    solid = views.albedo[0][views.albedo[0, ..., 3] == 255][:, :3].astype(int)
    assert len(solid) > 200 and np.abs(solid - 188).max() <= 3  # linear 0.5


@pytest.mark.parametrize("elevation", [12, 40])
def test_textures_are_filtered_as_by_many_more_samples(elevation: float) -> None:
    rng = np.random.default_rng(1)
    noise = opaque_texture(rng.integers(0, 256, (512, 384, 3)))  # the worst texture there is, and no power of two
    mesh, cameras = floor_with(noise), orbit([30], [elevation], size=64)
    unfiltered = replace(mesh, materials=(replace(mesh.materials[0], alpha_mode="MASK"),))
    truth = render(unfiltered, cameras, samples_per_axis=32).albedo[0]
    solid = truth[..., 3] == 255
    errors = []
    for one in (mesh, unfiltered):
        errors.append(render(one, cameras).albedo[0][solid][:, :3].astype(float) - truth[solid][:, :3])
    rms_filtered, rms_unfiltered = (np.sqrt((error**2).mean()) for error in errors)
    assert np.abs(errors[0].mean(axis=0)).max() < 1  # as bright
    assert rms_filtered < 0.2 * rms_unfiltered


def test_neighbours_on_a_palette_do_not_bleed() -> None:
    palette = opaque_texture(np.random.default_rng(2).integers(0, 256, (16, 16, 3)).repeat(4, axis=0).repeat(4, axis=1))
    sphere = trimesh.creation.icosphere(subdivisions=3, radius=0.8)
    texel = np.random.default_rng(3).integers(0, 16, (len(sphere.faces), 2))
    uv = np.repeat(((texel + 0.5) / 16)[:, None], 3, axis=1)
    mesh = Mesh(sphere.vertices, sphere.faces, np.zeros(len(uv)), (Material(np.ones(4), palette),), corner_uv=uv)
    flat = Mesh.from_face_colors(sphere.vertices, sphere.faces, palette[4 * texel[:, 1] + 2, 4 * texel[:, 0] + 2, :3])
    cameras = orbit([0, 120], 20, size=64)
    assert (render(mesh, cameras).albedo == render(flat, cameras).albedo).all()


def test_far_away_texture_coordinates_do_no_harm() -> None:
    for scale in (1e6, 1e30, np.nan):
        mesh = floor_with(opaque_texture(np.full((8, 8), 99)), scale)
        pixels = render(mesh, orbit([20], [60], size=16)).albedo[0]
        assert (pixels[pixels[..., 3] > 0][:, :3] == 99).all()


def test_bytes_of_pixels_are_the_nearest_to_their_light() -> None:
    light = np.linspace(0, 1, 999, dtype=np.float32)
    vertices = np.array([[-1, -1, -1], [1, -1, -1], [0, 2, -1]]) * 9.0
    pixel = Cameras(np.eye(4)[None], np.array([1.0]), 1, 1)
    found = [
        render(Mesh(vertices, [[0, 1, 2]], [0], (Material([x, x, x, 1]),)), pixel).albedo[0, 0, 0, 0] for x in light
    ]
    assert (np.array(found) == np.rint(255 * linear_to_srgb(light))).all()
    assert srgb_to_linear(np.uint8(found[::100])) == pytest.approx(light[::100], abs=0.005)


# ------------------------------------------------------------------------------------------------------ processes


def _size_of_view(subdivisions: int) -> float:
    sphere = trimesh.creation.icosphere(subdivisions=subdivisions)
    return float(render(plain(sphere.vertices, sphere.faces), orbit([0], 0, size=32)).albedo[..., 3].sum() / 255)


def test_workers_with_little_memory_render() -> None:
    here = _size_of_view(2)  # compiles, if nothing has
    (found,) = isolated_map(_size_of_view, [2], workers=1, cpu_s=60, wall_s=200, memory_bytes=4 << 30)
    assert found == pytest.approx(here)


def test_loops_that_cannot_be_kept_on_disk_still_run() -> None:
    code = (
        "from numba import float64\n"
        "from shapeloom.data_pipes.compiled import compiled\n"
        "names = {'compiled': compiled, 'float64': float64}\n"
        "exec('@compiled(float64(float64))\\ndef double(x): return 2 * x', names)\n"  # from no file: numba has no place
        "assert names['double'](4.0) == 8 and not names['double'].stats.cache_path\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_numba_is_imported_where_something_is_rendered_and_not_before() -> None:
    code = "import sys, shapeloom.data_pipes.render, shapeloom.data_pipes.build as b; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
