"""Extracted meshes beside the renderer's. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..data_pipes.mesh import Mesh

if TYPE_CHECKING:
    from ..models.mesh import ExtractedMesh  # it imports torch

__all__ = ["is_empty", "to_mesh"]


def is_empty(mesh: Mesh | ExtractedMesh | None) -> bool:
    """No object, no face, or a number that is not finite: all count as a miss."""
    if mesh is None or len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
        return True
    return not isinstance(mesh, Mesh) and not np.isfinite(mesh.rgb).all()


def to_mesh(mesh: Mesh | ExtractedMesh) -> Mesh:
    """The renderer's mesh of an extracted one."""
    if isinstance(mesh, Mesh):
        return mesh
    rgb_V3 = np.clip(np.asarray(mesh.rgb, np.float32), 0, 1)
    return Mesh.from_vertex_colors(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32), rgb_V3)
