"""Pictures made during training, of meshes and of the points they are to be like."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..data_pipes.contact_sheet import contact_sheet
from ..data_pipes.loader import RawSample
from ..data_pipes.mesh import Mesh
from ..data_pipes.render import composite, render
from ..files import write_atomic
from ..models.cameras import Cameras, orbit
from ..models.mesh import ExtractedMesh

__all__ = ["picture", "picture_of_points", "pictures", "write_sheet"]

TILE = 96


def picture(mesh: ExtractedMesh) -> np.ndarray:
    """The mesh lit, on white, seen from its front a little above; uint8 [H, W, 3]."""
    return pictures(mesh, orbit([-20], 20, size=TILE))[0]


def pictures(mesh: ExtractedMesh, cameras: Cameras) -> np.ndarray:
    """The mesh lit, on white, from each camera; uint8 [V, H, W, 3]."""
    if mesh.empty:
        return np.full((len(cameras), cameras.height, cameras.width, 3), 255, np.uint8)
    return composite(render(Mesh.from_vertex_colors(mesh.vertices, mesh.faces, mesh.rgb), cameras).lit)


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
