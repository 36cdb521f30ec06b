"""Mesh extraction from fields with known surfaces: sparse evaluation finds what the whole lattice shows."""

import numpy as np
import pytest
import torch
import trimesh

from shapeloom.errors import UserError
from shapeloom.launch.bench.reference import CHAIR, chair_field, diffusers_renderer
from shapeloom.models import mesh as module
from shapeloom.models.decoder import FieldValues, to_z_up
from shapeloom.models.marching_cubes import case_table, marching_cubes
from shapeloom.models.mesh import ExtractedMesh, extract_mesh


class Analytic:
    """A batch of signed distance functions as a field."""

    device = torch.device("cpu")

    def __init__(self, *functions):
        self.functions = functions
        self.evaluated = 0

    def __len__(self):
        return len(self.functions)

    def __getitem__(self, b):
        chosen = Analytic(self.functions[b])
        chosen.parent = self
        return chosen

    def __call__(self, points):
        self.evaluated += points.shape[1]
        getattr(self, "parent", self).evaluated += points.shape[1]
        sdf = torch.stack([f(points[0]) for f in self.functions])
        return FieldValues(sdf, torch.zeros_like(sdf), ((points + 1) / 2).clamp(0, 1))


def sphere(radius, center=(0.0, 0.0, 0.0)):
    return lambda p: (p - torch.tensor(center)).norm(dim=-1) - radius


def box(half, rotation=None):
    def distance(p):
        q = (p if rotation is None else p @ rotation).abs() - half
        return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

    return distance


def rod(radius, direction, center=(0.1, -0.2, 0.05), half_length=0.6):
    direction = torch.nn.functional.normalize(torch.tensor(direction), dim=0)

    def distance(p):
        q = p - torch.tensor(center)
        along = (q @ direction).clamp(-half_length, half_length)
        return (q - along[..., None] * direction).norm(dim=-1) - radius

    return distance


def union(*functions):
    return lambda p: torch.stack([f(p) for f in functions]).amin(0)


def squashed(function, steepness=10.0):
    return lambda p: (steepness * function(p)).tanh()


def wavy(function):
    """A distance as a network may learn it: its slope varies from 0.6 to 1.4."""
    return lambda p: function(p) * (1 + 0.4 * (9 * p).sin().prod(-1))


def dense(function, n):
    """Vertices and faces by evaluating the whole lattice."""
    axis = torch.arange(n) / (n - 1) * 2 - 1
    values = torch.ones((n + 2,) * 3)
    values[1:-1, 1:-1, 1:-1] = function(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1))
    vertices, faces = marching_cubes(-values)
    return ((vertices - 1) / (n - 1) * 2 - 1).numpy(), faces.numpy()


def assert_same(mesh, vertices, faces):
    assert np.array_equal(mesh.faces, faces)
    assert np.abs(mesh.vertices - vertices).max() < 1e-5


N = 64
STEP = 2 / (N - 1)
TILTED = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
SHAPES = {
    "large": union(box(0.5, TILTED), sphere(0.4, (0.5, 0.5, 0.5))),
    "rod": rod(1.2 * STEP, (1.0, 0.3, -0.6)),
    "rod along an axis": rod(1.2 * STEP, (0.0, 1.0, 0.0)),
    "plate": box(torch.tensor([0.6 * STEP, 0.6, 0.5]), TILTED),
    "plate between two planes": box(torch.tensor([0.5, 0.7 * STEP, 0.5])),
    "two far spheres": union(sphere(0.2, (-0.7, -0.7, -0.7)), sphere(0.15, (0.75, 0.7, 0.8))),
    "tiny sphere": sphere(1.25 * STEP, (0.31, -0.43, 0.18)),
    "tinier sphere": sphere(STEP, (-0.52, 0.27, 0.63)),
    "a speck beside a sphere": union(sphere(0.45, (-0.4, 0.0, 0.0)), sphere(1.25 * STEP, (0.7, 0.4, -0.3))),
    "a rod beside a sphere": union(sphere(0.3, (-0.5, -0.5, 0.0)), rod(1.2 * STEP, (0.2, 1.0, 0.4), (0.5, 0.0, 0.0))),
}
READINGS = {
    "distance": lambda f: f,
    "tenth": lambda f: lambda p: 0.1 * f(p),
    "tanh": squashed,
    "steep tanh": lambda f: squashed(f, 30.0),
    "wavy": wavy,
    "wavy tanh": lambda f: squashed(wavy(f)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reading", READINGS)
def test_sparse_evaluation_equals_dense_and_misses_nothing_thin(shape, reading):
    field = Analytic(READINGS[reading](SHAPES[shape]))
    mesh = extract_mesh(field, N)[0]
    assert len(mesh.faces) > 0
    assert_same(mesh, *dense(field.functions[0], N))
    assert field.evaluated < 0.25 * N**3
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


@pytest.mark.parametrize("n", [4, 5, 7, 24, 25, 33, 50, 97])
def test_any_resolution(n):
    function = squashed(union(box(0.5, TILTED), sphere(0.3, (0.5, 0.6, 0.5))))
    mesh = extract_mesh(Analytic(function), n)[0]
    assert_same(mesh, *dense(function, n))


def test_few_points_are_evaluated():
    field = Analytic(squashed(union(box(0.4, TILTED), sphere(0.3, (0.5, 0.6, 0.5)))))
    mesh = extract_mesh(field, 128)[0]
    assert field.evaluated - len(mesh.vertices) < 0.08 * 128**3  # the corners of the cells that it crosses are 0.04


def test_sphere_radius_volume_winding_and_colors():
    mesh = extract_mesh(Analytic(sphere(0.7)), 64)[0]
    assert np.abs(np.linalg.norm(mesh.vertices, axis=-1) - 0.7).max() < 2e-3  # not shrunk
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)  # positive: wound outward
    assert np.abs(mesh.rgb - (mesh.vertices + 1) / 2).max() < 1e-6
    assert mesh.vertices.dtype == mesh.rgb.dtype == np.float32 and mesh.faces.dtype == np.int32
    assert mesh.sdf_range == pytest.approx((-0.7, 3**0.5 - 0.7), abs=0.03)


def test_a_surface_that_leaves_the_box_is_closed_outside_it():
    for function in (sphere(1.3), squashed(sphere(1.3))):
        mesh = extract_mesh(Analytic(function), 32)[0]
        assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight
        assert 1 < np.abs(mesh.vertices).max() < 1 + 2 / 31  # not clipped
        assert_same(mesh, *dense(function, 32))


def test_no_surface_gives_an_empty_mesh_that_says_why():
    outside, inside, broken = extract_mesh(
        Analytic(lambda p: p[:, 0] * 0.1 + 0.5, lambda p: p[:, 0] * 0 - 0.3, lambda p: p[:, 0] * float("nan")), 32
    )
    assert outside.empty and outside.vertices.shape == outside.rgb.shape == (0, 3)
    assert outside.sdf_range == pytest.approx((0.4, 0.6), abs=0.01)
    assert inside.empty and inside.sdf_range == pytest.approx((-0.3, -0.3))
    assert broken.empty and np.isnan(broken.sdf_range).all()
    assert np.isnan(ExtractedMesh(outside.vertices, outside.faces, outside.rgb).sdf_range).all()


def test_assets_of_a_batch_are_independent_and_runs_repeat():
    functions = (lambda p: p[:, 0] * 0 + 1, sphere(0.5), squashed(box(0.4)))
    meshes = extract_mesh(Analytic(*functions), 32)
    assert meshes[0].empty and not meshes[1].empty
    for function, mesh in zip(functions[1:], meshes[1:], strict=True):
        alone = extract_mesh(Analytic(function), 32)[0]
        assert np.array_equal(alone.vertices, mesh.vertices) and np.array_equal(alone.rgb, mesh.rgb)


def test_what_is_seen_of_a_surface_is_completed():
    n, function = 20, union(sphere(0.3, (-0.5, 0.0, 0.0)), sphere(0.3, (0.5, 0.0, 0.0)))
    field = Analytic(function)
    whole = module._evaluate(field, n, torch.ones(n, n, n, dtype=torch.bool).nonzero()).reshape(n, n, n)
    known = torch.zeros(n, n, n, dtype=torch.bool)
    seed = (whole[: n // 2] == whole[: n // 2].min()).nonzero()[0]  # one point inside the first sphere
    known[tuple(seed)] = True
    padded = torch.ones((n + 2,) * 3)
    padded[tuple(seed + 1)] = whole[tuple(seed)]
    module._complete(field, n, padded, known)
    vertices, faces = marching_cubes(-padded)
    expected, expected_faces = dense(sphere(0.3, (-0.5, 0.0, 0.0)), n)
    assert torch.equal(faces, torch.from_numpy(expected_faces))
    assert np.abs((vertices.numpy() - 1) / (n - 1) * 2 - 1 - expected).max() < 1e-5


def test_errors_name_the_resolution_that_would_do(monkeypatch):
    with pytest.raises(UserError, match="at least 4 points along an axis, got 3"):
        extract_mesh(Analytic(sphere(0.5)), 3)
    with pytest.raises(UserError, match=r"10000 lattice points .* needs about 18000.0 GB .* at most \d+ points would"):
        extract_mesh(Analytic(sphere(0.5)), 10_000)
    monkeypatch.setattr(module, "_free_bytes", lambda device: module.BYTES_A_POINT * 40**3 + 100)
    with pytest.raises(UserError, match="at most 40 points would fit"):
        extract_mesh(Analytic(sphere(0.5)), 41)
    assert not extract_mesh(Analytic(sphere(0.5)), 40)[0].empty


@pytest.mark.skipif(not CHAIR.is_file(), reason="the fitted chair is not beside the repository")
def test_equals_diffusers_mesh_of_the_same_field_but_for_its_shrinking():
    n, field = 48, chair_field()
    renderer = diffusers_renderer(field)
    cases, masks = case_table()
    renderer.mesh_decoder.cases.copy_(cases)
    renderer.mesh_decoder.masks.copy_(masks)
    with torch.inference_mode():
        theirs = renderer.decode_to_mesh(torch.zeros(1, 1), "cpu", grid_size=n)
    mesh = extract_mesh(field, n)[0]
    # Their lattice runs along other axes than ours, so that vertices come in another order and faces, where a polygon
    # is cut along another diagonal, may differ.
    ours = to_z_up(torch.from_numpy(mesh.vertices))
    full_size = theirs.verts * (n + 1) / (n - 1)
    distances = torch.cdist(ours.double(), full_size.double())
    nearest = distances.argmin(1)
    assert len(ours) == len(full_size) and len(mesh.faces) == len(theirs.faces)
    assert len(nearest.unique()) == len(ours)
    assert distances.amin(1).max() < 1e-4
    # They ask for colours at the shrunken places and give them linear.
    shrunken = torch.from_numpy(mesh.vertices) * (n - 1) / (n + 1)
    with torch.inference_mode():
        srgb = field(shrunken[None]).rgb_BP3[0]
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    their_rgb = torch.stack([theirs.vertex_channels[c] for c in "RGB"], -1)
    assert (linear - their_rgb[nearest]).abs().max() < 1e-3
    with torch.inference_mode():
        at_surface = field(torch.from_numpy(mesh.vertices)[None]).rgb_BP3[0]
    assert np.abs(at_surface.numpy() - mesh.rgb).max() < 1e-5
