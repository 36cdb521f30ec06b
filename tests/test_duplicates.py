"""Copies of an asset are found however they are moved, written and cut up; other shapes are not."""

from __future__ import annotations

import itertools
from math import factorial
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes import duplicates
from shapeloom.data_pipes.duplicates import Duplicate, find_duplicates, signature
from shapeloom.data_pipes.mesh import WHITE, Material, Mesh
from shapeloom.data_pipes.read import read_mesh
from shapeloom.data_pipes.sampling import Solid

SHAPE = slice(0, duplicates.SHAPE_SIZE)
COLOURS = slice(duplicates.SHAPE_SIZE, None)


def mesh_of(shape: trimesh.Trimesh, *materials: Material) -> Mesh:
    return Mesh(shape.vertices, shape.faces, np.zeros(len(shape.faces), np.int32), materials or (WHITE,))


def lumpy(seed: int = 0, subdivisions: int = 3) -> trimesh.Trimesh:
    """A closed shape that no rotation or reflection maps to itself."""
    shape = trimesh.creation.icosphere(subdivisions)
    direction, amount = np.random.default_rng(seed).normal(size=(2, 6, 3))
    bumps = np.exp(3 * (shape.vertices @ (direction / np.linalg.norm(direction, axis=1)[:, None]).T - 1))
    shape.vertices *= 1 + 0.5 * bumps @ amount[:, :1] ** 2
    return shape


def moved(shape: trimesh.Trimesh, seed: int, scale: float = 1.0) -> trimesh.Trimesh:
    rng = np.random.default_rng(seed)
    matrix = trimesh.transformations.random_rotation_matrix(rng.random(3))
    matrix[:3, :3] *= scale
    matrix[:3, 3] = scale * rng.normal(size=3)
    return shape.copy().apply_transform(matrix)


def same(*meshes: Mesh) -> list[str]:
    """What `find_duplicates` says of all but the first."""
    found = find_duplicates(np.stack([signature(mesh) for mesh in meshes]))
    assert all(duplicate.of == 0 for duplicate in found)
    by_number = {duplicate.number: duplicate.same for duplicate in found}
    return [by_number.get(i, "") for i in range(1, len(meshes))]


def textured(n: int, image: np.ndarray) -> Mesh:
    """A flat square of n x n squares of two triangles each, under one picture."""
    grid = np.linspace(0, 1, n + 1)
    xy = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    i, j = np.divmod(np.arange(n * n), n)
    a = i * (n + 1) + j
    faces = np.concatenate([np.stack([a, a + n + 1, a + n + 2], 1), np.stack([a, a + n + 2, a + 1], 1)])
    xyz = np.concatenate([xy, np.zeros((len(xy), 1))], axis=1)
    return Mesh(xyz, faces, np.zeros(len(faces)), (Material(np.ones(4), image),), corner_uv=xy[faces])


def picture(seed: int) -> np.ndarray:
    """Smooth colours with an edge in them."""
    rng = np.random.default_rng(seed)
    image = np.full((64, 64, 4), 255, np.uint8)
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    for channel in range(3):
        a, b, c = rng.uniform(0.02, 0.2, 3)
        image[..., channel] = 127 + 127 * np.sin(a * x + b * y + 20 * c)
    image[10:30, 20:50, :3] = rng.integers(0, 255, 3)
    return image


def test_the_moments_are_those_of_the_closed_form() -> None:
    triangle = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], float)
    moments = duplicates._moments(triangle, np.array([0.5]))
    tensor = {degree: duplicates._tensor(moments, degree) for degree in range(7)}
    for a, b in itertools.product(range(7), range(7)):
        if a + b <= 6:  # integral of x^a y^b
            got = tensor[a + b][(0,) * a + (1,) * b]
            assert got == pytest.approx(factorial(a) * factorial(b) / factorial(a + b + 2), rel=1e-12)
            assert a + b == 0 or not tensor[a + b][2].any(), "it lies in z = 0"


def test_the_numbers_of_a_sphere_and_of_a_rod() -> None:
    axes = [f"axis {degree}{which}" for degree in (2, 4, 6) for which in "ab"]
    names = [*axes, "m4", "m6", "3,3", "3,1", "4,4", "5,5", "5,3", "5,1", "6,6", "6,4"]
    sphere = signature(mesh_of(trimesh.creation.icosphere(5)))[SHAPE]
    want = dict.fromkeys(names, 0.0) | dict.fromkeys(axes, 1 / 3) | {"m4": 1, "m6": 1}
    want |= {"4,4": 5**-0.5, "6,6": 7**-0.5, "6,4": 5**-0.5}  # |E[x (x) ... (x) x]|^2 is 1 / (1 + the number of x)
    assert dict(zip(names, sphere.tolist())) == pytest.approx(want, abs=2e-3)
    # x uniform in [-h, h]: E x^2 = h^2 / 3, E x^4 = h^4 / 5, E x^6 = h^6 / 7
    rod = signature(mesh_of(trimesh.creation.box((1000, 1, 1))))[SHAPE]
    want = dict.fromkeys(names, 0.0) | {"m4": (9 / 5) ** -0.5, "m6": (9 / 5) ** 1.5 * 7 / 27}
    want |= {"4,4": 1, "6,6": 1, "6,4": 1}
    assert dict(zip(names, rod.tolist())) == pytest.approx(want, abs=5e-3)


@pytest.mark.parametrize("scale", [1e-3, 1, 500])
def test_a_copy_is_the_same_turned_moved_scaled_mirrored_and_in_any_order(scale: float) -> None:
    shape = lumpy()
    copies = [moved(shape, seed, scale) for seed in range(4)]
    copies.append(shape.copy().apply_transform(np.diag([-1, 1, 1, 1])))
    rng = np.random.default_rng(0)
    shuffled = trimesh.Trimesh(shape.vertices, rng.permutation(shape.faces)[:, [1, 2, 0]], process=False)
    inside_out = trimesh.Trimesh(shape.vertices, shape.faces[:, ::-1], process=False)
    corners = np.arange(3 * len(shape.faces)).reshape(-1, 3)
    soup = trimesh.Trimesh(shape.triangles.reshape(-1, 3), corners, process=False)
    copies += [shuffled, inside_out, soup, shape.subdivide()]
    assert same(mesh_of(shape), *map(mesh_of, copies)) == ["shape and colours"] * len(copies)


def test_a_box_is_the_same_however_its_sides_are_cut() -> None:
    box = trimesh.creation.box((1, 2, 3))
    fans = []
    for pair in box.facets:  # each side as four triangles about an inner point
        corners = box.vertices[np.unique(box.faces[pair])]
        centre = corners.mean(axis=0) + 0.2 * (corners[1] - corners[0])
        across_2 = np.flatnonzero(np.ptp(corners, axis=0))
        x, y = (corners - corners.mean(axis=0))[:, across_2].T
        ring = corners[np.argsort(np.arctan2(y, x))]
        fans += [np.stack([ring[i], ring[(i + 1) % 4], centre]) for i in range(4)]
    fan = trimesh.Trimesh(np.concatenate(fans), np.arange(72).reshape(-1, 3), process=False)
    assert fan.area == pytest.approx(box.area)
    assert same(mesh_of(box), mesh_of(fan), mesh_of(moved(fan, 3, 7))) == ["shape and colours"] * 2


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl", "off"])
def test_a_copy_in_another_format_is_the_same(tmp_path: Path, suffix: str) -> None:
    shape = lumpy(1)
    path = tmp_path / f"copy.{suffix}"
    moved(shape, 5, 30).export(path, **({"digits": 6} if suffix in ("obj", "off") else {}))
    copy, original = read_mesh(path).normalised()[0], mesh_of(shape).normalised()[0]
    assert same(original, Solid(copy, 512).mesh) == ["shape and colours"]


def test_two_faces_in_one_place_count_once() -> None:
    shape = lumpy(2)
    both = trimesh.Trimesh(shape.vertices, np.concatenate([shape.faces, shape.faces[::2, ::-1]]), process=False)
    meshes = [Solid(mesh_of(s).normalised()[0], 512).mesh for s in (shape, both)]
    assert same(*meshes) == ["shape and colours"]


def test_other_colours_are_told_from_other_shapes() -> None:
    shape = lumpy(3)
    red, blue = Material(np.array([0.8, 0.1, 0.1, 1])), Material(np.array([0.1, 0.1, 0.8, 1]))
    assert same(mesh_of(shape, red), mesh_of(moved(shape, 1), blue), mesh_of(moved(shape, 2), red)) == [
        "shape",
        "shape and colours",
    ]
    # As much of each colour, one within and one without, against the other way round.
    pair = trimesh.util.concatenate([trimesh.creation.icosphere(2, 0.5), trimesh.creation.icosphere(2, 1)])
    outer = np.repeat([0, 1], len(pair.faces) // 2).astype(np.int32)
    one, other = (Mesh(pair.vertices, pair.faces, which, (red, blue)) for which in (outer, 1 - outer))
    assert same(one, other) == ["shape"]


def test_a_copy_of_a_recoloured_copy_is_one_of_that() -> None:
    shape = mesh_of(lumpy(3))
    red, blue = (Material(np.array([*rgb, 1])) for rgb in ((0.8, 0.1, 0.1), (0.1, 0.1, 0.8)))
    meshes = [Mesh(shape.vertices, shape.faces, shape.face_material, (m,)) for m in (red, blue, blue, red, blue)]
    names = ["red", "blue", "blue2", "red2", "blue3"]
    found = find_duplicates(np.stack([signature(mesh) for mesh in meshes]))
    assert [(names[d.number], names[d.of], d.same) for d in found] == [
        ("blue", "red", "shape"),
        ("blue2", "blue", "shape and colours"),
        ("red2", "red", "shape and colours"),
        ("blue3", "blue", "shape and colours"),
    ]


def test_a_picture_on_it_is_the_same_however_it_is_cut() -> None:
    first, second = picture(0), picture(1)
    coarse = textured(1, first)
    assert same(coarse, textured(3, first), textured(40, first), textured(3, second)) == [
        *["shape and colours"] * 2,
        "shape",
    ]
    clear = first.copy()
    clear[:32, :, 3] = 0
    hidden = clear.copy()
    hidden[:32, :, :3] = 0  # what nobody sees
    see_through = [
        Mesh(coarse.vertices, coarse.faces, coarse.face_material, (Material(np.ones(4), i, "MASK"),), coarse.corner_uv)
        for i in (clear, hidden)
    ]
    assert same(*see_through) == ["shape and colours"]


def test_other_shapes_are_not_the_same() -> None:
    shapes = [
        trimesh.creation.box((1, 1, 1)),
        trimesh.creation.box((1, 1, 1.01)),
        trimesh.creation.box((1, 1.01, 1.01)),
    ]
    shapes += [trimesh.creation.icosphere(4), trimesh.creation.torus(1, 0.3), trimesh.creation.torus(1, 0.31)]
    shapes += [trimesh.creation.cylinder(1, 2, n) for n in (16, 17, 64)] + [lumpy(seed) for seed in range(20)]
    signatures = np.stack([signature(mesh_of(shape)) for shape in shapes])
    assert find_duplicates(signatures) == []


def test_real_objects(assets_dir: Path) -> None:
    def signature_of(name: str) -> np.ndarray:
        return signature(Solid(read_mesh(assets_dir / "pack" / f"{name}.glb").normalised()[0], 512).mesh)

    drawers = "quaternius/quaternius_house_interior_pack_kitchen_"
    names = ["kenney/kenney_nature_kit_tree_tall", "kenney/kenney_nature_kit_tree_tall_fall"]
    names += ["kaykit/kaykit_furniture_rug_rectangle_a", "kaykit/kaykit_furniture_rug_rectangle_stripes_a"]
    names += [f"{drawers}2drawers", f"{drawers}3drawers", "kenney/kenney_nature_kit_tent_detailed_closed"]
    names += ["kenney/kenney_nature_kit_tent_detailed_open"]
    found = find_duplicates(np.stack([signature_of(name) for name in names]))
    assert found == [Duplicate(1, 0, "shape"), Duplicate(3, 2, "shape")]


def test_ten_thousand_equal_cubes_are_one_group() -> None:
    rng = np.random.default_rng(0)
    cube = signature(mesh_of(trimesh.creation.box()))
    noise = rng.normal(scale=1e-7, size=(10_000, len(cube))).astype(np.float32)
    ball = signature(mesh_of(trimesh.creation.icosphere(2)))
    found = find_duplicates(np.concatenate([ball[None], cube + noise, ball[None]]))
    assert [(d.number, d.of) for d in found] == [(i, 1) for i in range(2, 10_001)] + [(10_001, 0)]


def test_every_duplicate_is_near_its_original_and_no_two_originals_are_near() -> None:
    rng = np.random.default_rng(0)
    signatures = (rng.integers(0, 3, (300, 25)) * (rng.random(25) < 0.15) + rng.uniform(0, 0.4, (300, 25))).astype("f4")
    limits = {"shape_tolerance": 0.5, "colour_tolerance": 0.7}
    per_axis = np.repeat([0.5, 0.7], [duplicates.SHAPE_SIZE, 25 - duplicates.SHAPE_SIZE])
    apart = np.abs(signatures[:, None] - signatures) / per_axis  # all pairs
    full, shape = apart.max(axis=2), apart[..., SHAPE].max(axis=2)
    found = {d.number: d for d in find_duplicates(signatures, **limits)}
    assert 50 < len(found) < 300 and {d.same for d in found.values()} == {"shape", "shape and colours"}
    for i in range(300):
        if i in found:
            of, apart = found[i].of, shape if found[i].same == "shape" else full
            assert of < i and apart[i, of] <= 1.125 + 1e-6
        originals = [j for j in range(i) if j not in found]
        assert i in found or (shape[i, originals] > 1 - 1e-6).all()


def test_nothing_and_wrong_input() -> None:
    assert find_duplicates(np.zeros((0, 25), np.float32)) == []
    assert find_duplicates(np.zeros((1, 25), np.float32)) == []
    with pytest.raises(ValueError, match=r"\[N, 25\]"):
        find_duplicates(np.zeros((1, 24)))
    with pytest.raises(ValueError, match="finite"):
        find_duplicates(np.full((1, 25), np.nan))
    with pytest.raises(ValueError, match="at least"):
        find_duplicates(np.zeros((1, 25)), colour_tolerance=0)
    point = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), np.zeros(1), (WHITE,))
    with pytest.raises(ValueError, match="without area"):
        signature(point)
