"""Marching cubes: the table of cases, closed surfaces, measures with closed forms, and two other implementations."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.pipelines.shap_e.renderer import MeshDecoder
from skimage import measure

from shapeloom.models.marching_cubes import case_table, marching_cubes

# Position of each of the twelve edges in a cell, from the axes alone: 4 * axis + i.
EDGE_MIDDLES = torch.tensor(
    [[0.5, y, z] for z in (0, 1) for y in (0, 1)]
    + [[x, 0.5, z] for z in (0, 1) for x in (0, 1)]
    + [[x, y, 0.5] for y in (0, 1) for x in (0, 1)]
)


def lattice(n: int, reach: float = 1.0) -> torch.Tensor:
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def ball(n: int, radius: float = 0.7) -> torch.Tensor:
    return radius - lattice(n).norm(dim=-1)


def torus(n: int) -> torch.Tensor:
    p = lattice(n)
    ring = p[..., :2].norm(dim=-1) - 0.6
    return 0.25 - torch.stack([ring, p[..., 2]], -1).norm(dim=-1)


BOX = (-torch.ones(3), torch.ones(3))


def volume_and_area(vertices: torch.Tensor, faces: torch.Tensor) -> tuple[float, float]:
    a, b, c = vertices[faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    return ((a * normals).sum() / 6).item(), (normals.norm(dim=-1).sum() / 2).item()


def directed_edges(faces: torch.Tensor) -> Counter:
    return Counter((int(f[i]), int(f[(i + 1) % 3])) for f in faces for i in range(3))


def assert_closed(faces: torch.Tensor) -> None:
    """Every edge belongs to two faces, which run through it in opposite directions."""
    edges = directed_edges(faces)
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)


def test_each_case_uses_its_crossed_edges_and_is_open_only_towards_its_neighbours():
    cases, masks = case_table()
    assert cases.shape == (256, 5, 3) and cases.dtype == torch.long and masks.dtype == torch.bool
    corners = torch.tensor([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)]).float()
    for case in range(256):
        faces = cases[case][masks[case]]
        inside = torch.tensor([case >> c & 1 for c in range(8)])
        crossed = set()
        for number, middle in enumerate(EDGE_MIDDLES):
            ends = ((corners - middle).abs().sum(-1) == 0.5).nonzero()[:, 0]
            if inside[ends[0]] != inside[ends[1]]:
                crossed.add(number)
        assert set(faces.flatten().tolist()) == crossed
        edges = directed_edges(faces)
        assert set(edges.values()) <= {1}
        for a, b in edges:
            together = EDGE_MIDDLES[a] == EDGE_MIDDLES[b]
            on_square = bool((together & (EDGE_MIDDLES[a] != 0.5)).any())
            assert on_square != ((b, a) in edges)  # inner edges are shared by two triangles, outer ones by none


def test_random_values_give_closed_surfaces():
    generator = torch.Generator().manual_seed(0)
    for n in (3, 6, 12):
        values = torch.full((n + 2, n + 3, n + 1), -1.0)
        values[1:-1, 1:-1, 1:-1] = torch.randn(n, n + 1, n - 1, generator=generator)
        vertices, faces = marching_cubes(values)
        assert_closed(faces)
        assert len(faces.unique()) == len(vertices)  # none is unused


@pytest.mark.parametrize(("values", "characteristic"), [(ball(24), 2), (torus(32), 0)])
def test_euler_characteristic(values, characteristic):
    vertices, faces = marching_cubes(values)
    assert_closed(faces)
    assert len(vertices) - len(directed_edges(faces)) // 2 + len(faces) == characteristic


def test_volume_and_area_of_a_ball_converge_with_the_square_of_the_step():
    errors = []
    for n in (17, 33, 65):
        volume, area = volume_and_area(*marching_cubes(ball(n), BOX))
        errors.append([4 / 3 * np.pi * 0.7**3 - volume, 4 * np.pi * 0.7**2 - area])
    errors = np.array(errors)
    assert (errors > 0).all()  # positive volume: wound outward; corners on the ball: a little inside it
    assert errors[-1] == pytest.approx([0.001 * 4 / 3 * np.pi * 0.7**3, 0.001 * 4 * np.pi * 0.7**2], rel=1)
    orders = np.log2(errors[:-1] / errors[1:])
    assert (np.abs(orders - 2) < 0.3).all()


@pytest.mark.parametrize("values", [ball(32), torus(40)])
def test_agrees_with_skimage(values):
    vertices, faces = marching_cubes(values)
    theirs, their_faces = (torch.from_numpy(part.copy()) for part in measure.marching_cubes(values.numpy(), 0.0)[:2])
    theirs = theirs.double()
    assert len(vertices) == len(theirs)
    distances = torch.cdist(vertices, theirs)
    assert distances.amin(0).max() < 1e-5 and distances.amin(1).max() < 1e-5
    volume, area = volume_and_area(vertices, faces)
    their_volume, their_area = volume_and_area(theirs, their_faces)
    # Not more alike than this: the same polygons may be cut along another diagonal.
    assert volume == pytest.approx(abs(their_volume), rel=2e-3) and area == pytest.approx(their_area, rel=2e-3)


@pytest.mark.parametrize("shape", [(9, 9, 9), (5, 8, 11), (2, 2, 2)])
def test_bit_identical_to_diffusers_with_our_table(shape):
    decoder = MeshDecoder()
    cases, masks = case_table()
    decoder.cases.copy_(cases)
    decoder.masks.copy_(masks)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    low, high = torch.tensor([-1.0, -0.5, 0.0]), torch.tensor([1.0, 2.0, 0.3])
    theirs = decoder(values, low, high - low)
    vertices, faces = marching_cubes(values, (low, high))
    assert torch.equal(faces, theirs.faces)
    assert torch.equal(vertices, theirs.verts)


def test_vertices_carry_gradients_to_the_values():
    values = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = values + 0.2 * values.sign()  # the differences must not change a sign
    box = (torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.autograd.gradcheck(lambda v: marching_cubes(v, box)[0], values.requires_grad_())
    vertices, faces = marching_cubes(values)
    assert vertices.requires_grad and len(faces) > 5


def test_a_plane_in_one_cell_and_no_surface():
    x = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 2)
    vertices, faces = marching_cubes(0.5 - x)
    assert len(faces) == 2 and (vertices[:, 0] == 0.5).all()
    a, b, c = vertices[faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    assert (normals == torch.tensor([1.0, 0.0, 0.0])).all()  # away from the inside, x < 0.5
    for level in (-1.0, 1.0):
        vertices, faces = marching_cubes(torch.full((3, 3, 3), level))
        assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    with pytest.raises(ValueError, match="three axes"):
        marching_cubes(torch.zeros(1, 4, 4))
