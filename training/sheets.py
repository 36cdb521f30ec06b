"""Pictures made during training: what the EMA model makes of held-out captions or assets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from ..data_pipes.contact_sheet import contact_sheet
from ..data_pipes.mesh import Mesh
from ..data_pipes.render import composite, render
from ..files import write_atomic
from ..models.cameras import Cameras, orbit
from ..models.mesh import ExtractedMesh
from ..models.pipeline import ShapeloomPipeline

__all__ = ["picture", "sample_sheet", "write_sheet"]

TILE = 96


def sample_sheet(pipeline: ShapeloomPipeline, captions: list[str], steps: int, path: Path) -> None:
    """Sample each caption once, seed 0, 1, …, and write the sheet to `path`."""
    # Sampling must not move the training's random state, or a resumed run would differ.
    with torch.random.fork_rng():
        meshes = pipeline(captions, seeds=list(range(len(captions))), steps=steps, resolution=32).meshes
    write_sheet([picture(mesh) for mesh in meshes], captions, path)


def picture(mesh: ExtractedMesh, cameras: Cameras | None = None) -> np.ndarray:
    """The mesh lit, on white, seen from its front a little above; uint8 [H, W, 3]."""
    cameras = cameras or orbit([-20], 20, size=TILE)
    if mesh.empty:
        return np.full((cameras.height, cameras.width, 3), 255, np.uint8)
    return composite(render(Mesh.from_vertex_colors(mesh.vertices, mesh.faces, mesh.rgb), cameras).lit[0])


def write_sheet(images: list[np.ndarray], captions: list[str], path: Path, *, columns: int = 8) -> None:
    """A contact sheet as PNG."""
    buffer = io.BytesIO()
    contact_sheet(images, captions, columns=columns, tile=TILE).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
