"""Pictures made during training: what the EMA model makes of held-out captions or assets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from ..data_pipes.contact_sheet import contact_sheet
from ..data_pipes.loader import RawSample
from ..data_pipes.mesh import Mesh
from ..data_pipes.render import composite, render
from ..files import write_atomic
from ..models.cameras import Cameras, orbit
from ..models.denoiser import Condition
from ..models.guidance import guided, sample_latents
from ..models.mesh import ExtractedMesh, extract_mesh
from ..models.pipeline import ShapeloomPipeline

__all__ = ["picture", "picture_of_points", "sample_sheet", "write_sheet"]

TILE = 96


def sample_sheet(
    pipeline: ShapeloomPipeline, condition: Condition, captions: list[str], steps: int, path: Path
) -> None:
    """Sample each condition once, seed 0, 1, …, and write the sheet to `path`, under the captions."""
    denoiser = pipeline.denoiser
    shape = denoiser.config.n_latents, denoiser.config.channels
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(captions))]
    predict = guided(denoiser, condition, text_scale=3.0, image_scale=2.0)
    # Sampling must not move the training's random state, or a resumed run would differ.
    with torch.random.fork_rng():
        latents_BLC = sample_latents(predict, torch.stack(noises).to(denoiser.device), pipeline.scheduler, steps=steps)
    meshes = extract_mesh(pipeline.decode(denoiser.restore(latents_BLC)), 32)
    write_sheet([picture(mesh) for mesh in meshes], captions, path)


def picture(mesh: ExtractedMesh, cameras: Cameras | None = None) -> np.ndarray:
    """The mesh lit, on white, seen from its front a little above; uint8 [H, W, 3]."""
    cameras = cameras or orbit([-20], 20, size=TILE)
    if mesh.empty:
        return np.full((cameras.height, cameras.width, 3), 255, np.uint8)
    return composite(render(Mesh.from_vertex_colors(mesh.vertices, mesh.faces, mesh.rgb), cameras).lit[0])


def picture_of_points(sample: RawSample) -> np.ndarray:
    """Surface points from the camera of `picture`, the nearest in front; uint8 [H, W, 3]."""
    camera = orbit([-20], 20, size=TILE)
    xyz_N3, normal_N3, rgb_N3 = sample.pick_surface(slice(None))
    world_to_camera = np.linalg.inv(camera.camera_to_world[0])
    local_N3 = xyz_N3 @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    light_N = 0.6 + 0.4 * np.abs(normal_N3 @ camera.camera_to_world[0, :3, 2])
    pixels_N2 = np.round(TILE / 2 + camera.focal[0] * local_N3[:, :2] / -local_N3[:, 2:] * [1, -1]).astype(int)
    far_first = np.argsort(local_N3[:, 2])
    rows, columns = pixels_N2[far_first].clip(0, TILE - 2).T[::-1]
    image = np.full((TILE, TILE, 3), 255, np.uint8)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        image[rows + down, columns + right] = (255 * rgb_N3 * light_N[:, None])[far_first]
    return image


def write_sheet(images: list[np.ndarray], captions: list[str], path: Path, *, columns: int = 8) -> None:
    """A contact sheet as PNG."""
    buffer = io.BytesIO()
    contact_sheet(images, captions, columns=columns, tile=TILE).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
