"""Mesh extraction from fields with known surfaces."""

import numpy as np
import pytest
import torch
import trimesh

from shapeloom.models.decoder import FieldValues
from shapeloom.models.mesh import extract_mesh


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


def sphere(radius):
    return lambda p: p.norm(dim=-1) - radius


def box(half):
    def distance(p):
        q = p.abs() - half
        return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

    return distance


def test_sphere_radius_volume_winding_and_colors():
    mesh = extract_mesh(Analytic(sphere(0.7)), 64)[0]
    assert np.abs(np.linalg.norm(mesh.vertices, axis=-1) - 0.7).max() < 2e-3  # not shrunk
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)  # positive: wound outward
    assert np.abs(mesh.rgb - (mesh.vertices + 1) / 2).max() < 1e-6


def test_skipping_empty_blocks_changes_nothing():
    for function in (sphere(0.55), box(0.6), box(torch.tensor([0.9, 0.03, 0.5]))):
        field = Analytic(function)
        mesh = extract_mesh(field, 64)[0]
        axis = torch.linspace(-1, 1, 65)
        dense = function(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1))
        from skimage.measure import marching_cubes

        vertices, faces, _, _ = marching_cubes(dense.numpy(), 0.0)
        assert len(vertices) == len(mesh.vertices) and len(faces) == len(mesh.faces)
        assert np.abs(vertices / 32 - 1 - mesh.vertices).max() < 1e-5
        assert field.evaluated < 0.7 * 65**3


def test_a_surface_that_leaves_the_frame_is_closed():
    mesh = extract_mesh(Analytic(sphere(1.3)), 32)[0]
    assert trimesh.Trimesh(mesh.vertices, mesh.faces).is_watertight
    assert np.abs(mesh.vertices).max() <= 1


def test_no_surface_gives_an_empty_mesh_and_batches_are_independent():
    meshes = extract_mesh(Analytic(lambda p: p[:, 0] * 0 + 1, sphere(0.5)), 32)
    assert meshes[0].empty and not meshes[1].empty
    alone = extract_mesh(Analytic(sphere(0.5)), 32)[0]
    assert (alone.vertices == meshes[1].vertices).all()


def test_resolution_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4"):
        extract_mesh(Analytic(sphere(0.5)), 30)
