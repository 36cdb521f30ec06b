"""The mesh renderer against closed forms and properties."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes.mesh import Material, Mesh, linear_to_srgb, merge, srgb_to_linear
from shapeloom.data_pipes.render import AMBIENT, DIFFUSE, MAX_LAYERS, composite, render
from shapeloom.models.cameras import Cameras, orbit

QUAD = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)


def quad(material: Material, z: float = 0.0) -> Mesh:
    """Faces +Z; texture upright and unmirrored when seen from there."""
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(QUAD + (0, 0, z), faces, [0, 0], (material,), corner_uv=uv[faces])


def colored(shape: trimesh.Trimesh, rgb: tuple[int, int, int] = (200, 50, 25)) -> Mesh:
    return Mesh.from_face_colors(shape.vertices, shape.faces, np.tile(np.uint8(rgb), (len(shape.faces), 1)))


def test_a_sphere_has_the_right_silhouette_depth_and_normals() -> None:
    radius, distance, size = 0.8, 4.0, 128
    cameras = orbit([0, 73, 200], [0, 30, 89], size=size, distance=distance)
    views = render(colored(trimesh.creation.icosphere(subdivisions=5, radius=radius)), cameras)
    covered = views.albedo[..., 3].sum(axis=(1, 2)) / 255
    # Seen along its axis the sphere's outline is a circle of tan(angle) = r / sqrt(d^2 - r^2).
    area = np.pi * cameras.focal**2 * radius**2 / (distance**2 - radius**2)
    assert covered == pytest.approx(area, rel=0.005)
    middle = size // 2
    assert views.depth[:, middle, middle] == pytest.approx(distance - radius, abs=1e-3)
    origins, directions = cameras.rays()
    rim = views.albedo[..., 3] == 255
    z = -np.einsum("vij,vhwi->vhwj", cameras.camera_to_world[:, :3, :3], directions)[..., 2]
    points = origins + directions * (views.depth / z)[..., None]
    assert np.abs(np.linalg.norm(points[rim], axis=-1) - radius).max() < 0.02
    cosine = np.einsum("nc,nc->n", views.normal[rim], points[rim] / radius)
    assert np.percentile(cosine, 1) > 0.99


def test_outside_is_empty_and_the_picture_is_the_same_twice() -> None:
    mesh = colored(trimesh.creation.box((1, 0.5, 1)))
    first, second = (render(mesh, orbit([20, 130], 25, size=48)) for _ in range(2))
    empty = first.albedo[..., 3] == 0
    assert empty.any() and (first.albedo[empty] == 0).all() and (first.lit[empty] == 0).all()
    assert (np.isinf(first.depth) == empty).all() and (first.normal[empty] == 0).all()
    for name in ("albedo", "lit", "depth", "normal"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


def test_views_do_not_depend_on_the_views_beside_them() -> None:
    mesh, cameras = colored(trimesh.creation.torus(0.6, 0.2)), orbit([0, 100, 220], 20, size=512)
    together = render(mesh, cameras, samples_per_axis=1)
    alone = render(mesh, cameras[[1]], samples_per_axis=1)
    assert (together.albedo[1] == alone.albedo[0]).all() and (together.depth[1] == alone.depth[0]).all()


@pytest.mark.parametrize("rgb", [(0, 0, 0), (255, 255, 255), (3, 77, 201)])
def test_flat_colour_comes_through_exactly_at_edges_too(rgb: tuple[int, int, int]) -> None:
    views = render(colored(trimesh.creation.icosphere(), rgb), orbit([10], [10], size=40))
    seen = views.albedo[0][views.albedo[0, ..., 3] > 0]
    assert (seen[:, :3] == rgb).all()
    assert len(np.unique(seen[:, 3])) > 2  # partly covered pixels


def test_a_texture_is_upright_and_not_mirrored() -> None:
    texture = np.zeros((2, 2, 4), np.uint8)
    texture[..., 3] = 255
    texture[0, 0, 0], texture[0, 1, 1], texture[1, 0, 2] = 255, 255, 255  # red | green above blue | black
    picture = render(quad(Material(np.ones(4), texture)), orbit([0], 0, size=64)).albedo[0]
    seen = np.argwhere(picture[..., 3] == 255)
    (top, left), (bottom, right) = seen.min(axis=0), seen.max(axis=0)
    y0, y1 = top + (bottom - top) // 4, bottom - (bottom - top) // 4
    x0, x1 = left + (right - left) // 4, right - (right - left) // 4
    strongest = [[int(picture[y, x, :3].argmax()) for x in (x0, x1)] for y in (y0, y1)]
    assert strongest[0] == [0, 1] and strongest[1][0] == 2 and picture[y1, x1, :3].max() < 60


def test_pixels_are_averaged_in_linear_light() -> None:
    # One pixel looks at a plane that is half white, half black.
    left, right = QUAD * (0.5, 1, 1) - (0.5, 0, 0), QUAD * (0.5, 1, 1) + (0.5, 0, 0)
    faces = [[0, 1, 2], [0, 2, 3]]
    halves = [Mesh.from_face_colors(v, faces, np.full((2, 3), c)) for v, c in ((left, 0.0), (right, 1.0))]
    views = render(merge(halves), orbit([0], 0, size=1, fov_deg=10))
    assert views.albedo[0, 0, 0, :3].tolist() == [188] * 3  # linear 0.5


def test_depth_is_along_the_axis_and_follows_a_camera_anywhere() -> None:
    views = render(quad(Material(np.ones(4))), orbit([0], 0, size=32, distance=3.0))
    seen = np.isfinite(views.depth[0])
    assert views.depth[0][seen] == pytest.approx(3.0, abs=1e-5)  # the same all over a plane that faces the camera
    assert views.normal[0][seen] == pytest.approx(np.tile([0, 0, 1], (seen.sum(), 1)), abs=1e-6)
    behind = render(quad(Material(np.ones(4))), orbit([180], 0, size=32))
    assert behind.normal[0][np.isfinite(behind.depth[0])][:, 2] == pytest.approx(-1)  # two-sided


def test_inside_a_box_every_pixel_is_covered() -> None:
    eye = Cameras(np.eye(4)[None], np.array([16.0]), 32, 32)
    views = render(colored(trimesh.creation.box((2, 2, 2))), eye)
    assert (views.albedo[..., 3] == 255).all() and views.depth.max() <= 1 + 1e-5


def test_faces_of_a_cube_are_told_apart_by_their_shading() -> None:
    views = render(colored(trimesh.creation.box((1, 1, 1)), (200, 200, 200)), orbit([35], [25], size=64))
    solid = views.lit[0][views.lit[0, ..., 3] == 255][:, 0]
    values, counts = np.unique(solid, return_counts=True)
    shades = np.sort(values[counts > 50])
    assert len(shades) == 3 and np.diff(shades).min() >= 15
    assert (views.albedo[0][views.albedo[0, ..., 3] == 255][:, 0] == 200).all()
    full = linear_to_srgb(srgb_to_linear(np.uint8([200])) * (AMBIENT + DIFFUSE)) * 255
    assert shades.max() <= full + 0.5


def test_cut_out_texels_let_through_what_is_behind() -> None:
    hole = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    for mode, front_right in (("MASK", (0, 255, 0)), ("OPAQUE", (255, 0, 0))):
        front = quad(Material(np.ones(4), hole.repeat(8, axis=1), alpha_mode=mode), z=0.2)
        mesh = merge([front, quad(Material([0, 1, 0, 1]))])
        views = render(mesh, orbit([0], 0, size=32))
        assert views.albedo[0, 16, 24].tolist() == [*front_right, 255], mode
        assert views.albedo[0, 16, 8].tolist() == [255, 0, 0, 255]
        assert views.depth[0, 16, 8] == pytest.approx(3.8, abs=1e-5)
        assert views.depth[0, 16, 24] == pytest.approx(4.0 if mode == "MASK" else 3.8, abs=1e-5)


def test_glass_is_blended_front_to_back() -> None:
    panes = [quad(Material([1, 1, 1, 0.5], alpha_mode="BLEND"), z) for z in np.linspace(-0.5, 0.5, 3)]
    alone = render(merge(panes), orbit([0], 0, size=16)).albedo[0, 8, 8]
    assert alone.tolist() == [255, 255, 255, round(255 * (1 - 0.5**3))]
    black = quad(Material([0, 0, 0, 1]), -0.8)
    before_black = render(merge([*panes, black]), orbit([0], 0, size=16)).albedo[0, 8, 8]
    grey = round(255 * float(linear_to_srgb(np.array(1 - 0.5**3))))
    assert before_black.tolist() == [grey, grey, grey, 255]
    assert len(panes) < MAX_LAYERS


def test_nothing_gives_empty_pictures() -> None:
    nothing = Mesh(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), ())
    views = render(nothing, orbit([0, 90], 0, size=8))
    assert views.albedo.shape == (2, 8, 8, 4) and not views.albedo.any() and np.isinf(views.depth).all()
    looking_away = Cameras(orbit([0], 0, size=8).camera_to_world @ np.diag([-1, 1, -1, 1]), np.array([8]), 8, 8)
    assert not render(colored(trimesh.creation.box()), looking_away).albedo.any()
    with pytest.raises(ValueError, match="at least 1|sample"):
        render(nothing, orbit([0], 0, size=8), samples_per_axis=0)


def test_composite_blends_as_pillow_does() -> None:
    rgba = np.array([[[100, 0, 0, 255], [100, 0, 0, 0], [100, 0, 0, 51]]], np.uint8)
    assert composite(rgba).tolist() == [[[100, 0, 0], [255, 255, 255], [224, 204, 204]]]
    assert composite(rgba, (0, 0, 0))[0, 2].tolist() == [20, 0, 0]


def test_white_is_laid_under_every_value_and_alpha_as_any_colour_is() -> None:
    rgba = np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2, indexing="ij"), axis=-1)[..., [0, 0, 0, 1]]
    nearly = (1 - 1e-9, 1, 1)  # takes the general way
    np.testing.assert_array_equal(composite(rgba), composite(rgba, nearly))
