"""Surface points and signed distances against closed forms, on whole and on spoilt meshes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes.mesh import Material, Mesh, merge
from shapeloom.data_pipes.sampling import (
    EDGE_SHARE,
    NEAR_SIGMAS,
    SHEET_HALF_THICKNESS,
    Solid,
    sample_field,
    sample_surface,
)
from shapeloom.launch.bench.sign import sign_errors

Sdf = Callable[[np.ndarray], np.ndarray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grey(shape: trimesh.Trimesh, rgb: tuple[int, int, int] = (128, 128, 128)) -> Mesh:
    return Mesh.from_face_colors(shape.vertices, shape.faces, np.tile(np.uint8(rgb), (len(shape.faces), 1)))


def box_sdf(centre: tuple[float, float, float], half: tuple[float, float, float]) -> Sdf:
    def sdf(xyz: np.ndarray) -> np.ndarray:
        q = np.abs(xyz - np.array(centre)) - np.array(half)
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0)

    return sdf


def sphere_sdf(xyz: np.ndarray) -> np.ndarray:
    return np.linalg.norm(xyz, axis=1) - 0.8


def torus_sdf(xyz: np.ndarray) -> np.ndarray:
    return np.hypot(np.hypot(xyz[:, 0], xyz[:, 1]) - 0.6, xyz[:, 2]) - 0.25


def two_boxes() -> tuple[Mesh, Mesh, Sdf]:
    """Boxes stuck into each other, and the distance of their union (exact outside, a lower bound inside)."""
    first, second = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((0.6, 0.6, 0.6))
    second.apply_translation((0.5, 0.1, 0.05))
    one, other = box_sdf((0, 0, 0), (0.5,) * 3), box_sdf((0.5, 0.1, 0.05), (0.3,) * 3)
    return grey(first, (255, 0, 0)), grey(second, (0, 0, 255)), lambda xyz: np.minimum(one(xyz), other(xyz))


@pytest.mark.parametrize(
    ("shape", "sdf", "error"),
    [
        (trimesh.creation.box((1, 1.4, 0.8)), box_sdf((0, 0, 0), (0.5, 0.7, 0.4)), 1e-6),
        (trimesh.creation.icosphere(5, 0.8), sphere_sdf, 2e-4),  # .00015 is the polyhedron's distance from the sphere
        (trimesh.creation.torus(0.6, 0.25, major_sections=256, minor_sections=128), torus_sdf, 2e-4),
    ],
    ids=["box", "sphere", "torus"],
)
def test_distances_of_closed_solids_are_exact(shape: trimesh.Trimesh, sdf: Sdf, error: float) -> None:
    field = sample_field(grey(shape), 4000, 4000, rng())
    expected = sdf(field.xyz.astype(float))
    assert np.abs(field.sdf - expected).mean() < error
    assert np.abs(field.sdf - expected).max() < 0.01
    clear = np.abs(expected) > 1e-3
    assert (np.sign(field.sdf) == np.sign(expected))[clear].mean() > 0.9999


def test_overlapping_parts_are_one_solid() -> None:
    first, second, sdf = two_boxes()
    solid = Solid(merge([first, second]))
    field = sample_field(solid, 4000, 4000, rng())
    expected = sdf(field.xyz.astype(float))
    assert ((field.sdf < 0) == (expected < 0))[np.abs(expected) > 1e-3].all()
    outside = expected > 0
    assert field.sdf[outside] == pytest.approx(expected[outside], abs=1e-5)
    surface = sample_surface(solid, 4000, rng())
    assert np.abs(sdf(surface.xyz.astype(float))).max() < 1e-5  # nothing of the hidden faces
    hidden_area = 2 * 0.6**2 + 4 * 0.6 * 0.3 - 0.6**2
    assert solid.hidden_share == pytest.approx((hidden_area + 0.6**2) / (6 + 6 * 0.6**2), abs=0.01)


def test_winding_in_the_file_does_not_matter() -> None:
    first, second, sdf = two_boxes()
    sphere = trimesh.creation.icosphere(4, 0.8)
    faces = sphere.faces.copy()
    turned = rng().random(len(faces)) < 0.5
    faces[turned] = faces[turned][:, ::-1]
    mixed = Mesh.from_face_colors(sphere.vertices, faces, np.ones((len(faces), 3)))
    doubled = merge([grey(sphere), grey(sphere)._turned()])
    for mesh, distance in ((merge([first._turned(), second]), sdf), (mixed, sphere_sdf), (doubled, sphere_sdf)):
        field = sample_field(mesh, 2000, 2000, rng())
        expected = distance(field.xyz.astype(float))
        assert ((field.sdf < 0) == (expected < 0))[np.abs(expected) > 3e-3].all()
        surface = sample_surface(mesh, 500, rng())
        step = surface.xyz.astype(float) + 0.01 * surface.normal
        assert (distance(step) > 0.004).mean() > 0.97  # normals point outwards (edges apart)


def test_an_open_bottom_is_closed_by_a_flat_lid() -> None:
    box = trimesh.creation.box((1, 1, 1))
    faces = box.faces[box.face_normals[:, 1] > -0.5]
    field = sample_field(Mesh.from_face_colors(box.vertices, faces, np.ones((len(faces), 3))), 2000, 4000, rng())
    expected = box_sdf((0, 0, 0), (0.5,) * 3)(field.xyz.astype(float))
    away = np.abs(expected) > 0.05
    assert ((field.sdf < 0) == (expected < 0))[away].mean() > 0.995


def test_a_sheet_has_no_inside_but_some_thickness() -> None:
    sheet = Mesh(
        [[-0.9, 0, -0.9], [0.9, 0, -0.9], [0.9, 0, 0.9], [-0.9, 0, 0.9]],
        [[0, 1, 2], [0, 2, 3]],
        [0, 0],
        (Material(np.ones(4)),),
    )
    solid = Solid(sheet)
    assert solid.sheet_share == 1 and solid.hidden_share == 0
    field = sample_field(solid, 2000, 2000, rng())
    over = np.abs(field.xyz[:, [0, 2]]).max(axis=1) < 0.85
    assert field.sdf[over] == pytest.approx(np.abs(field.xyz[over, 1]) - SHEET_HALF_THICKNESS, abs=1e-5)


def test_a_thick_cup_is_empty_inside() -> None:
    cup = grey(trimesh.creation.annulus(0.5, 0.7, 1.2, sections=96))
    points = np.array([[0, 0, 0], [0.6, 0, 0], [0, 0.6, 0.3], [0.3, 0, -0.2], [0.8, 0, 0]], np.float32)
    assert Solid(cup).inside(points).tolist() == [False, True, True, False, False]


def test_surface_points_are_spread_by_area_with_their_colours_and_normals() -> None:
    box = trimesh.creation.box((1, 0.5, 0.25))
    colors = np.uint8(np.abs(box.face_normals) * 200 + 20)
    surface = sample_surface(Mesh.from_face_colors(box.vertices, box.faces, colors), 20000, rng())
    axis = np.abs(surface.normal).argmax(axis=1)
    areas = np.array([0.5 * 0.25, 1 * 0.25, 1 * 0.5])
    assert np.bincount(axis) / len(axis) == pytest.approx(areas / areas.sum(), abs=0.003)
    assert (surface.rgb == np.uint8(np.abs(surface.normal) * 200 + 20)).all()
    assert np.abs(box_sdf((0, 0, 0), (0.5, 0.25, 0.125))(surface.xyz.astype(float))).max() < 1e-6
    assert surface.xyz[:10000].mean(axis=0) == pytest.approx([0, 0, 0], abs=0.02)  # any part of them is a fair sample
    assert len(np.unique(surface.xyz, axis=0)) == 20000


def test_field_colour_is_that_of_the_nearest_face() -> None:
    box = trimesh.creation.box((1, 1, 1))
    colors = np.uint8(box.face_normals * 100 + 120)
    field = sample_field(Mesh.from_face_colors(box.vertices, box.faces, colors), 0, 4000, rng())
    beside = (np.sort(np.abs(field.xyz), axis=1)[:, 1] < 0.5) & (field.sdf > 0)
    axis = np.abs(field.xyz[beside]).argmax(axis=1)
    normal = np.zeros((beside.sum(), 3))
    normal[np.arange(len(axis)), axis] = np.sign(field.xyz[beside][np.arange(len(axis)), axis])
    assert (field.rgb[beside] == np.uint8(normal * 100 + 120)).all()
    assert np.abs(field.xyz).max() <= 1


def test_the_same_seed_gives_the_same_points() -> None:
    mesh = grey(trimesh.creation.icosphere(2, 0.8))
    first, second = (sample_field(mesh, 300, 300, rng(5)) for _ in range(2))
    assert first.xyz.tobytes() == second.xyz.tobytes() and first.sdf.tobytes() == second.sdf.tobytes()
    assert sample_surface(mesh, 300, rng(5)).xyz.tobytes() == sample_surface(Solid(mesh), 300, rng(5)).xyz.tobytes()
    assert sample_surface(mesh, 0, rng()).xyz.shape == (0, 3) and sample_field(mesh, 0, 0, rng()).sdf.shape == (0,)


@pytest.mark.parametrize("edge_share", [0.0, 0.25, 0.6])
def test_points_are_denser_along_a_cubes_edges_as_asked(edge_share: float) -> None:
    n, radius, side = 40000, 0.01, 1.6
    field = sample_field(grey(trimesh.creation.box((side,) * 3)), n, 0, rng(), edge_share)
    to_edges_N3 = np.abs(np.abs(field.xyz.astype(float)) - side / 2)
    along_N = to_edges_N3.argmax(axis=1)
    across_N = np.linalg.norm(np.sort(to_edges_N3, axis=1)[:, :2], axis=1)
    middle = np.abs(field.xyz[np.arange(n), along_N]) < side / 4  # away from the corners: half of all edges' length
    near_edge = (across_N < radius) & middle
    sigma = np.array(NEAR_SIGMAS)
    from_edges = np.mean(1 - np.exp(-(radius**2) / (2 * sigma**2)))
    # Two half planes at an edge give as many as one whole: per length of edge, the mean chord of the disc.
    offset = np.linspace(-radius, radius, 2001)
    density = np.exp(-(offset**2) / (2 * sigma[:, None] ** 2)) / (sigma[:, None] * np.sqrt(2 * np.pi))
    chord = np.mean((2 * np.sqrt(radius**2 - offset**2) * density).sum(axis=1) * (offset[1] - offset[0]))
    from_faces = 12 * side * chord / (6 * side**2)
    expected = (edge_share * from_edges + (1 - edge_share) * from_faces) / 2
    assert near_edge.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected / n))


def test_without_sharp_edges_the_share_of_them_changes_nothing() -> None:
    sphere = Solid(grey(trimesh.creation.icosphere(3, 0.8)))
    assert len(sphere.sharp_edges) == 0
    fields = [sample_field(sphere, 1000, 1000, rng(), edge_share) for edge_share in (0, 0.5)]
    assert fields[0].xyz.tobytes() == fields[1].xyz.tobytes()


def test_sharp_edges_are_those_of_large_angles_and_rims_but_not_hidden_ones() -> None:
    box, prism = trimesh.creation.box((1, 1, 1)), trimesh.creation.cylinder(0.5, 1, sections=16)  # 22.5 degrees a side
    turned = box.faces.copy()
    turned[::2] = turned[::2, ::-1]
    mixed = Mesh.from_face_colors(box.vertices, turned, np.ones((12, 3)))
    open_box = Mesh.from_face_colors(box.vertices, box.faces[2:], np.ones((10, 3)))
    assert [len(Solid(mesh, 512).sharp_edges) for mesh in (grey(box), mixed, grey(prism))] == [12, 12, 32]
    assert 12 <= len(Solid(open_box, 512).sharp_edges) <= 14
    inner = trimesh.creation.box((0.5, 0.5, 0.5))
    solid = Solid(merge([grey(box), grey(inner)]))
    assert len(solid.sharp_edges) == 24
    field = sample_field(solid, 4000, 0, rng(), 1.0)
    assert np.abs(field.sdf).max() < 0.25 and np.abs(field.xyz).max(axis=1).min() > 0.25


def test_missing_faces_hardly_change_the_sign() -> None:
    shapes = [
        trimesh.creation.icosphere(3, 0.8),
        trimesh.creation.torus(0.6, 0.2),
        trimesh.creation.box((1.6, 1, 0.4)).subdivide().subdivide().subdivide(),
        trimesh.creation.annulus(0.5, 0.7, 1.2, sections=64),
    ]
    errors = np.mean([sign_errors(shape, 400, rng(seed)) for seed, shape in enumerate(shapes)], axis=0)
    near, edge, uniform = errors
    assert (1 - EDGE_SHARE) / 2 * near + EDGE_SHARE / 2 * edge + uniform / 2 < 0.002  # as the data has them
    assert edge < 0.01  # rims of holes


def test_a_wall_that_is_seen_through_a_hole_keeps_its_front() -> None:
    sphere = trimesh.creation.icosphere(4, 0.8)
    kept = rng().random(len(sphere.faces)) < 0.5
    kept |= sphere.triangles_center[:, 2] < 0  # one half is a sieve, through which the other's back is seen
    solid = Solid(Mesh.from_face_colors(sphere.vertices, sphere.faces[kept], np.ones((kept.sum(), 3))))
    below = solid.mesh.triangles.mean(axis=1)[:, 2] < -0.1
    assert (np.einsum("fc,fc->f", solid.fronts, solid.mesh.triangles.mean(axis=1))[below] > 0).all()


def test_needles_and_faces_without_area_do_no_harm() -> None:
    box = trimesh.creation.box((1, 1, 1))
    vertices = np.concatenate([box.vertices, [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5 - 1e-9]]])
    faces = np.concatenate([box.faces, [[8, 9, 0], [8, 8, 9]]])
    field = sample_field(Mesh.from_face_colors(vertices, faces, np.ones((len(faces), 3))), 500, 500, rng())
    assert field.sdf == pytest.approx(box_sdf((0, 0, 0), (0.5,) * 3)(field.xyz.astype(float)), abs=1e-4)
    with pytest.raises(ValueError, match="area"):
        sample_surface(Mesh([[0, 0, 0]], [[0, 0, 0]], [0], (Material(np.ones(4)),)), 5, rng())
