"""The differentiable rasteriser against closed forms, finite differences and the ray caster."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.data_pipes.render import render
from shapeloom.models import raster
from shapeloom.models.cameras import Cameras, orbit
from shapeloom.models.marching_cubes import marching_cubes
from shapeloom.models.raster import Raster, rasterize
from shapeloom.training.losses import mesh_render_loss

SHAPES = {
    "sphere": trimesh.creation.icosphere(subdivisions=4, radius=0.8),
    "box": trimesh.creation.box((1, 0.6, 0.9)),
    "torus": trimesh.creation.torus(0.6, 0.2),
}
FACING = orbit([0], 0, size=64)  # x right, y up, 4 units from the origin
SQUARE_FACES = torch.tensor([[0, 1, 2], [0, 2, 3]])


def tensors(shape: trimesh.Trimesh, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(shape.vertices, dtype=dtype), torch.tensor(shape.faces)


def draw(vertices: torch.Tensor, faces: torch.Tensor, cameras: Cameras, rgb: torch.Tensor | None = None) -> Raster:
    matrices, focal = torch.tensor(cameras.camera_to_world), torch.tensor(cameras.focal)
    rgb = torch.ones_like(vertices) if rgb is None else rgb
    return rasterize(vertices, faces, rgb, matrices, focal, height=cameras.height, width=cameras.width)


def square(half: float, depth: float) -> torch.Tensor:
    """A square before `FACING` that reaches `half` pixels to each side of the picture's middle."""
    x = half * depth / float(FACING.focal[0])
    return torch.tensor([[-x, -x, 4 - depth], [x, -x, 4 - depth], [x, x, 4 - depth], [-x, x, 4 - depth]])


def window(size: int) -> torch.Tensor:
    """A smooth weight for pixels, off centre, so that moves in any direction change the weighted area."""
    x = torch.linspace(-1, 1, size)
    return torch.exp(-2 * ((x - 0.3) ** 2 + (x[:, None] + 0.2) ** 2))


@pytest.mark.parametrize("name", SHAPES)
def test_coverage_and_depth_are_the_ray_casters(name: str) -> None:
    shape, size = SHAPES[name], 96
    cameras = orbit([0, 33, 90, 200, 310], [0, 20, 45, -10, 60], size=size)
    mesh = Mesh.from_vertex_colors(shape.vertices, shape.faces, np.full((len(shape.vertices), 3), 0.5))
    single, fine = render(mesh, cameras, samples_per_axis=1), render(mesh, cameras, samples_per_axis=8)
    result = draw(*tensors(shape), cameras)
    seen, cast = result.face_VHW.numpy() >= 0, single.albedo[..., 3] > 0
    assert (seen & cast).sum() / (seen | cast).sum() > 0.9995
    assert (result.depth_VHW.isfinite().numpy() == seen).all()
    both = seen & cast
    assert np.abs(result.depth_VHW.numpy()[both] - single.depth[both]).max() < 5e-5
    # Antialiased: far nearer to what 64 rays a pixel find than the mask is, and of the right area.
    truth, alpha = fine.albedo[..., 3] / 255, result.alpha_VHW.numpy()
    assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-6
    assert np.square(alpha - truth).mean() < np.square(seen - truth).mean() / 25
    assert alpha.sum() == pytest.approx(truth.sum(), rel=5e-4)


def test_faces_of_any_size_and_turn_cover_each_pixel_of_a_square_once() -> None:
    """A square cut into many triangles has no holes along its cuts, though pixels' centres lie on them."""
    cameras = Cameras(FACING.camera_to_world, np.array([64.0]), 64, 64)
    for cuts in (1, 3, 16, 48):
        axis = torch.linspace(-1, 1, cuts + 1)
        vertices = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.zeros(cuts + 1, cuts + 1)], dim=-1)
        corner = (torch.arange(cuts)[:, None] * (cuts + 1) + torch.arange(cuts)).flatten()
        one, other = (
            torch.stack([corner, corner + 1, corner + cuts + 2]),
            torch.stack([corner, corner + cuts + 1, corner + cuts + 2]),
        )
        result = draw(vertices.view(-1, 3), torch.cat([one.T, other.T]), cameras)
        covered = torch.zeros(64, 64)
        covered[16:48, 16:48] = 1  # 64 pixels of focal length, 4 away: 16 pixels to each side
        assert torch.equal((result.face_VHW[0] >= 0).float(), covered)
        assert torch.allclose(result.alpha_VHW[0], covered, atol=1e-5)


def test_a_triangles_area_is_its_own_and_not_a_parallelograms() -> None:
    corners = torch.tensor([[-0.7, -0.5, 0.0], [0.8, -0.2, 0.0], [-0.1, 0.75, 0.0]])
    result = draw(corners, torch.tensor([[0, 1, 2]]), FACING)
    a, b, c = corners[:, :2] * float(FACING.focal[0]) / 4
    area = 0.5 * abs(float((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]))
    assert result.alpha_VHW.sum().item() == pytest.approx(area, rel=2e-3)
    assert (result.face_VHW >= 0).sum().item() == pytest.approx(area, rel=0.02)
    turned_over = draw(corners, torch.tensor([[0, 2, 1]]), FACING)
    assert torch.equal(turned_over.alpha_VHW, result.alpha_VHW)  # the back is drawn as the front


def test_colours_and_depth_are_interpolated_with_perspective() -> None:
    """A triangle leaning back: where a pixel's ray meets its plane, colour is linear in the position there."""
    corners = torch.tensor([[-1.0, -0.8, 0.8], [1.0, -0.8, 0.8], [0.0, 1.2, -2.0]], dtype=torch.float64)
    result = draw(corners, torch.tensor([[0, 1, 2]]), FACING, corners * 0.2 + 0.5)
    inside = result.alpha_VHW[0].numpy() == 1
    directions = FACING.rays()[1][0][inside].astype(np.float64)
    origin = np.array([0, 0, 4.0])
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    distance = ((corners[0].numpy() - origin) @ normal) / (directions @ normal)
    points = origin + distance[:, None] * directions
    assert inside.sum() > 100
    assert np.abs(result.rgb_VHW3[0].numpy()[inside] - (points * 0.2 + 0.5)).max() < 1e-6
    assert np.abs(result.depth_VHW[0].numpy()[inside] - (4 - points[:, 2])).max() < 1e-6


def test_what_is_nearer_hides_and_equals_are_settled_by_order() -> None:
    red, green = torch.eye(3)[:1].expand(4, 3), torch.eye(3)[1:2].expand(4, 3)
    faces = torch.cat([SQUARE_FACES, SQUARE_FACES + 4])
    behind = draw(torch.cat([square(11.3, 4.0), square(19.6, 4.5)]), faces, FACING, torch.cat([red, green]))
    middle, side = behind.rgb_VHW3[0, 32, 32], behind.rgb_VHW3[0, 32, 14]
    assert middle.tolist() == pytest.approx([1, 0, 0]) and side.tolist() == pytest.approx([0, 1, 0])
    # The small square's outline blends with the large one behind it, not with black.
    inner = behind.rgb_VHW3[0, 14:50, 14:50]
    assert torch.allclose(behind.alpha_VHW[0, 14:50, 14:50], torch.ones(36, 36))
    assert torch.allclose(inner.sum(-1), torch.ones(36, 36))
    assert ((inner[..., 0] > 0.01) & (inner[..., 0] < 0.99)).any()
    same = draw(torch.cat([square(9.0, 4.0)] * 2), faces, FACING, torch.cat([red, green]))
    assert same.face_VHW.max() == 1


def test_no_pixel_falls_between_two_triangles() -> None:
    """Long slanted edges laid through pixels' centres, as near as floats allow: one side at least has the centre."""
    random = np.random.default_rng(0)
    column = np.arange(11, 55, 3)
    row = 63 - column
    centers = np.stack([column, row], axis=-1) + 0.5
    for _ in range(40):
        slope, lengths = random.uniform(0.95, 1.05, 15), random.uniform(5, 30, (2, 15, 1))
        along, side = np.stack([np.ones(15), slope], axis=-1), np.array([-1, 1])
        corners = np.stack([centers + along * lengths[0], centers - along * lengths[1], centers + side, centers - side])
        local = (corners - 32) * [1, -1] * 4 / FACING.focal[0]
        vertices = torch.tensor(np.concatenate([local, np.zeros((4, 15, 1))], axis=-1), dtype=torch.float32)
        one, other, left, right = torch.arange(60).view(4, 15)
        faces = torch.cat([torch.stack([one, other, left], dim=1), torch.stack([other, one, right], dim=1)])
        assert (draw(vertices.view(-1, 3), faces, FACING).face_VHW[0, row, column] >= 0).all()


@pytest.mark.parametrize("half", [12.2, 20.1], ids=["within the same pixels", "well inside"])
def test_hidden_outlines_leave_no_trace(half: float) -> None:
    """A square behind a leaning, many-coloured one, near its outline (in the same pair of pixels) or inside it."""
    n = 12
    axis = torch.linspace(-1, 1, n + 1)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    reach = 12.4 if half < 20 else 25.0
    scale = reach * 4 / float(FACING.focal[0])
    vertices = torch.stack([x * scale, y * scale, torch.zeros_like(x)], dim=-1).view(-1, 3)
    vertices[:, 2] += 0.3 * vertices[:, 0] * (half > 20)
    corner = (torch.arange(n)[:, None] * (n + 1) + torch.arange(n)).flatten()
    faces = torch.cat(
        [torch.stack([corner, corner + 1, corner + n + 2], 1), torch.stack([corner, corner + n + 2, corner + n + 1], 1)]
    )
    rgb = torch.rand(vertices.shape, generator=torch.Generator().manual_seed(0))
    alone = draw(vertices, faces, FACING, rgb)
    all_vertices = torch.cat([vertices, square(half, 4.5 if half < 20 else 6.0)])
    all_faces = torch.cat([faces, SQUARE_FACES + len(vertices)])
    both = draw(all_vertices, all_faces, FACING, torch.cat([rgb, torch.ones(4, 3)]))
    assert torch.equal(both.face_VHW, alone.face_VHW)
    assert torch.equal(both.alpha_VHW, alone.alpha_VHW) and torch.equal(both.rgb_VHW3, alone.rgb_VHW3)


def test_a_hole_smaller_than_its_pixel_is_covered_once() -> None:
    """Four outlines reach into the pixel in its middle, together by more than there is of it."""
    outer, inner = square(8.5, 4.0), square(0.15, 4.0)
    middle = 0.5 * 4 / float(FACING.focal[0])
    vertices = torch.cat([outer, inner]) + torch.tensor([middle, -middle, 0])
    ring = [[i, (i + 1) % 4, 4 + (i + 1) % 4] for i in range(4)] + [[i, 4 + (i + 1) % 4, 4 + i] for i in range(4)]
    result = draw(vertices, torch.tensor(ring), FACING)
    assert result.face_VHW[0, 32, 32] == -1
    assert result.alpha_VHW.max() <= 1 + 1e-6 and result.alpha_VHW[0, 32, 32] > 0.9


def test_gradient_of_a_squares_area_is_the_closed_form() -> None:
    """Area (focal s / d)^2: to its size 2 area / s, to its distance 2 area / d, to a shift in the image's plane 0."""
    corners = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    for turn in (0.0, 0.2, 0.6, math.pi / 4):  # at 45 degrees an edge is followed through rows and columns
        cosine, sine = math.cos(turn), math.sin(turn)
        turned = corners @ torch.tensor([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1.0]])
        side = torch.tensor(1.13, requires_grad=True)
        shift = torch.tensor([0.013, 0.007, 0.0], requires_grad=True)
        area = draw(turned * side + shift, SQUARE_FACES, FACING).alpha_VHW.sum()
        truth = (float(FACING.focal[0]) * 1.13 / 4) ** 2
        assert area.item() == pytest.approx(truth, rel=2e-3)
        d_side, d_shift = torch.autograd.grad(area, (side, shift))
        assert d_side.item() == pytest.approx(2 * truth / 1.13, rel=0.04)
        assert d_shift[2].item() == pytest.approx(2 * truth / 4, rel=0.04)
        assert d_shift[:2].abs().max() < 0.04 * 2 * truth / 1.13


@pytest.mark.parametrize("subdivisions", [3, 6], ids=["faces of 4 pixels", "faces of half a pixel"])
def test_gradient_of_a_spheres_picture_is_the_closed_form_and_the_difference(subdivisions: int) -> None:
    """The disc's area is pi f^2 r^2 / (d^2 - r^2); a window over it makes the picture change with every shift."""
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=subdivisions))
    cameras = orbit([20], 25, size=64)

    def weighted(radius: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
        return (draw(vertices * radius + shift, faces, cameras).alpha_VHW * weight).sum()

    radius, shift = torch.tensor(0.8, requires_grad=True), torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(weighted(radius, shift, 1.0), radius)
    focal = float(cameras.focal[0])
    assert slope.item() == pytest.approx(2 * math.pi * focal**2 * 0.8 * 16 / (16 - 0.64) ** 2, rel=0.01)

    weight, h = window(64), 0.01
    d_radius, d_shift = torch.autograd.grad(weighted(radius, shift, weight), (radius, shift))
    with torch.no_grad():
        radius_slope = (weighted(radius + h, shift, weight) - weighted(radius - h, shift, weight)) / (2 * h)
        shift_slope = [(weighted(radius, e, weight) - weighted(radius, -e, weight)) / (2 * h) for e in torch.eye(3) * h]
    assert d_radius.item() == pytest.approx(radius_slope.item(), rel=0.02)
    assert (d_shift - torch.stack(shift_slope)).norm() < 0.02 * d_shift.norm()


def test_gradients_of_depth_and_inner_colour_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=1), torch.float64)
    vertices = vertices + 0.05 * torch.randn(vertices.shape, generator=generator, dtype=torch.float64)
    rgb = torch.rand(vertices.shape, generator=generator, dtype=torch.float64)
    cameras = orbit([30, 200], [20, 50], size=12)
    inner = draw(vertices, faces, cameras).alpha_VHW
    inner = (inner == 1) & (-torch.nn.functional.max_pool2d(-inner[:, None], 3, 1, 1)[:, 0] == 1)
    assert inner.sum() > 30

    def inside(vertices: torch.Tensor, rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = draw(vertices, faces, cameras, rgb)
        return result.depth_VHW[inner], result.rgb_VHW3[inner]

    assert torch.autograd.gradcheck(inside, (vertices.requires_grad_(), rgb.requires_grad_()), fast_mode=True)


def test_gradient_of_every_pixel_is_exact_where_edges_are_steep_or_flat() -> None:
    """There an edge counts whole, through rows or through columns, and the picture's slope has no approximation."""
    vertices = torch.tensor(
        [[-0.8, -0.7, 0.1], [0.9, -0.9, -0.1], [0.8, 0.7, 0.0], [-0.9, 0.8, 0.2]], dtype=torch.float64
    )
    rgb = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cameras = orbit([3], 4, size=10)

    def picture(vertices: torch.Tensor, rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = draw(vertices, SQUARE_FACES, cameras, rgb)
        return result.rgb_VHW3, result.alpha_VHW

    assert torch.autograd.gradcheck(picture, (vertices.requires_grad_(), rgb.requires_grad_()))


def test_cameras_get_gradients() -> None:
    vertices, faces = tensors(SHAPES["sphere"])
    focal = torch.tensor(FACING.focal, requires_grad=True)
    matrix = torch.tensor(FACING.camera_to_world, requires_grad=True)
    area = rasterize(vertices, faces, torch.ones_like(vertices), matrix, focal, height=64, width=64).alpha_VHW.sum()
    d_focal, d_matrix = torch.autograd.grad(area, (focal, matrix))
    assert d_focal.item() == pytest.approx(2 * area.item() / focal.item(), rel=0.01)
    # The disc shrinks as the camera backs away: pi f^2 r^2 / (d^2 - r^2) to d.
    assert d_matrix[0, 2, 3].item() == pytest.approx(-area.item() * 2 * 4 / (16 - 0.64), rel=0.01)


def test_borders_and_non_manifold_edges_are_silhouettes_where_they_are_seen_to_be() -> None:
    """Three sheets on one edge: it is part of the outline only from where they all lie to one side."""
    line = [[0, -1, 0], [0, 1, 0]]
    tips = [[1, 0, -0.4], [1, 0, 0.0], [1, 0, 0.4]]
    vertices, faces = torch.tensor([*line, *tips], dtype=torch.float32), torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]])
    fan = draw(vertices + torch.tensor([0.011, 0, 0]), faces, FACING).alpha_VHW[0, 32]
    assert ((fan > 0.01) & (fan < 0.99)).sum() >= 1 and fan[32] == pytest.approx(
        1 - 0.011 * FACING.focal[0] / 4, abs=1e-3
    )
    spread = vertices.clone()
    spread[3, 0] = -1.0
    assert (draw(spread, faces, FACING).alpha_VHW[0, 32, 30:34] == 1).all()


def test_faces_behind_or_at_the_camera_are_left_out() -> None:
    vertices, faces = tensors(SHAPES["sphere"])
    cameras = Cameras(FACING.camera_to_world, FACING.focal, 64, 64)
    assert draw(vertices + torch.tensor([0, 0, 8.0]), faces, cameras).alpha_VHW.sum() == 0
    around = (vertices + torch.tensor([0, 0, 4.0])).requires_grad_()  # the camera in its centre sees the far half
    inside = draw(around, faces, cameras)
    assert (inside.alpha_VHW == 1).all() and (inside.depth_VHW < 0.81).all()
    inside.depth_VHW.sum().backward()
    assert around.grad.isfinite().all() and around.grad.abs().sum() > 0


def test_nothing_to_draw_gives_empty_pictures_that_can_be_trained_through() -> None:
    vertices, faces = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, dtype=torch.long)
    result = draw(vertices, faces, FACING)
    assert result.alpha_VHW.shape == (1, 64, 64) and result.alpha_VHW.sum() == 0 and result.rgb_VHW3.sum() == 0
    assert result.depth_VHW.isinf().all() and (result.face_VHW == -1).all()
    (result.alpha_VHW.sum() + result.rgb_VHW3.sum()).backward()
    assert vertices.grad is not None


def test_views_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = tensors(SHAPES["torus"])
    rgb = torch.rand(vertices.shape, generator=torch.Generator().manual_seed(1))
    cameras = orbit([0, 100, 220], 20, size=40)
    wide = Cameras(cameras.camera_to_world, cameras.focal, 56, 24)
    for views in (cameras, wide):
        together = draw(vertices, faces, views, rgb)
        monkeypatch.setattr(raster, "PIXELS_AT_ONCE", 100)
        for i in range(3):
            alone = draw(vertices, faces, views[[i]], rgb)
            for name in ("rgb_VHW3", "alpha_VHW", "depth_VHW", "face_VHW"):
                assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
        monkeypatch.undo()
    middle = draw(vertices, faces, cameras, rgb)
    assert torch.allclose(middle.alpha_VHW[:, 8:32], together.alpha_VHW[:, :, 8:48], atol=1e-4)


def test_the_same_bytes_twice_gradients_too() -> None:
    def once() -> tuple[torch.Tensor, ...]:
        vertices, faces = tensors(SHAPES["torus"])
        rgb = torch.rand(vertices.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        result = draw(vertices.requires_grad_(), faces, orbit([0, 100], 20, size=48), rgb)
        (result.rgb_VHW3.square().sum() + result.depth_VHW[result.face_VHW >= 0].sum()).backward()
        return result.rgb_VHW3.detach(), result.alpha_VHW.detach(), vertices.grad, rgb.grad

    for first, second in zip(once(), once(), strict=True):
        assert first.numpy().tobytes() == second.numpy().tobytes()


def test_wrong_input_is_named() -> None:
    vertices, faces = tensors(SHAPES["box"])
    with pytest.raises(ValueError, match=r"rgb must have shape \[8, 3\], got \[8, 4\]"):
        draw(vertices, faces, FACING, torch.ones(8, 4))
    with pytest.raises(ValueError, match=r"faces must lie in \[0, 8\), got \[1, 8\]"):
        draw(vertices, torch.tensor([[1, 2, 8]]), FACING)
    with pytest.raises(ValueError, match="vertices must be float32 or float64, got torch.bfloat16"):
        draw(vertices.bfloat16(), faces, FACING)


def test_autocast_does_not_blur_where_things_are() -> None:
    vertices, faces = tensors(SHAPES["torus"])
    plain = draw(vertices, faces, FACING, vertices.abs())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw(vertices, faces, FACING, vertices.abs().bfloat16())
    assert torch.equal(mixed.face_VHW, plain.face_VHW) and torch.equal(mixed.alpha_VHW, plain.alpha_VHW)
    assert (mixed.rgb_VHW3 - plain.rgb_VHW3).abs().max() < 2**-8


def test_a_sphere_is_found_again_from_pictures() -> None:
    """Place and radius by 60 steps of Adam on 32-pixel views, from an outline alone."""
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=3))
    cameras = orbit([0, 120, 240], [10, 30, -20], size=32)
    truth = torch.tensor([0.12, -0.15, 0.1, 0.65])
    target = draw(vertices * truth[3] + truth[:3], faces, cameras).alpha_VHW
    guess = torch.tensor([0.0, 0.0, 0.0, 0.45], requires_grad=True)
    optimiser = torch.optim.Adam([guess], lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        (draw(vertices * guess[3] + guess[:3], faces, cameras).alpha_VHW - target).square().mean().backward()
        optimiser.step()
    assert (guess.detach() - truth).abs().max() < 0.005


def test_an_image_loss_reaches_a_distance_field_through_marching_cubes() -> None:
    """A sphere's signed distances on a lattice, all moved by an offset: its radius; pictures tell it which way."""
    axis = torch.linspace(-1, 1, 33, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    distance = (lattice - torch.tensor([0.05, -0.03, 0.08])).norm(dim=-1) - 0.6
    box = (torch.full((3,), -1.0), torch.full((3,), 1.0))
    cameras = orbit([7, 187], [15, -30], size=48)

    def picture(offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vertices, faces = marching_cubes(offset - distance, box)  # positive inside
        result = draw(vertices, faces, cameras, 0.5 + 0.3 * vertices)
        return result.rgb_VHW3[None], result.alpha_VHW[None]

    for other in (0.1, -0.08):
        target = [tensor.detach() for tensor in picture(torch.tensor(other))]
        offset, h = torch.tensor(0.0, dtype=torch.float64, requires_grad=True), 0.005
        (slope,) = torch.autograd.grad(mesh_render_loss(*picture(offset), *target).sum(), offset)
        with torch.no_grad():
            above, below = (mesh_render_loss(*picture(offset + step), *target).sum() for step in (h, -h))
        assert slope * other < 0
        assert slope.item() == pytest.approx(((above - below) / (2 * h)).item(), rel=0.02)
