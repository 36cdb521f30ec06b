"""Meshes from implicit functions: the signed distance's zero level by marching cubes.

Only cells near the surface are evaluated finely: a coarse lattice first, then the blocks that a surface may cross.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from skimage.measure import marching_cubes

from .decoder import ImplicitField

__all__ = ["ExtractedMesh", "extract_mesh"]

BLOCK = 4  # lattice steps between coarse samples
CHUNK = 1 << 16  # points a call of the field; more only costs memory


@dataclass(frozen=True)
class ExtractedMesh:
    """vertices [V, 3] in the object frame, faces [F, 3] wound outward, rgb [V, 3] sRGB; no faces without a surface."""

    vertices: np.ndarray
    faces: np.ndarray
    rgb: np.ndarray

    @property
    def empty(self) -> bool:
        return len(self.faces) == 0


@torch.inference_mode()
def extract_mesh(field: ImplicitField, resolution: int = 64) -> list[ExtractedMesh]:
    """The surfaces of a batch of fields, one mesh an asset.

    Args:
        field: B fields over [-1, 1]^3, signed distance negative inside.
        resolution: cells along each axis; a multiple of 4.
    Returns: B meshes; an asset whose distance never changes sign gives an empty one.
    Raises: ValueError for a resolution that is not a positive multiple of 4.
    """
    if resolution <= 0 or resolution % BLOCK:
        raise ValueError(f"mesh resolution must be a positive multiple of {BLOCK}, got {resolution}")
    return [_extract_one(field[b], resolution) for b in range(len(field))]


def _extract_one(field: ImplicitField, resolution: int) -> ExtractedMesh:
    volume_RRR = _sdf_lattice(field, resolution)
    if not (volume_RRR.min() < 0 < volume_RRR.max()):
        nothing = np.zeros((0, 3), np.float32)
        return ExtractedMesh(nothing, nothing.astype(np.int32), nothing)
    # A surface that leaves the frame is closed just outside it, so that every mesh is watertight.
    padded = np.pad(volume_RRR, 1, constant_values=float(np.abs(volume_RRR).max()))
    vertices_V3, faces_F3, _, _ = marching_cubes(padded, 0.0)
    vertices_V3 = np.clip((vertices_V3 - 1) * (2 / resolution) - 1, -1, 1).astype(np.float32)
    rgb_V3 = _query(field, torch.from_numpy(vertices_V3).to(field.device))[:, 1:].clamp(0, 1).cpu().numpy()
    return ExtractedMesh(vertices_V3, faces_F3.astype(np.int32), rgb_V3)


def _sdf_lattice(field: ImplicitField, resolution: int) -> np.ndarray:
    """Signed distance on the (resolution + 1)^3 lattice; far from the surface, interpolated from the coarse one."""
    axis_R = torch.linspace(-1, 1, resolution + 1, device=field.device)
    lattice_RRR3 = torch.stack(torch.meshgrid(axis_R, axis_R, axis_R, indexing="ij"), dim=-1)
    coarse = _query(field, lattice_RRR3[::BLOCK, ::BLOCK, ::BLOCK].reshape(-1, 3))[:, 0]
    n = resolution // BLOCK + 1
    coarse_nnn = coarse.reshape(1, 1, n, n, n)
    volume = torch.nn.functional.interpolate(
        coarse_nnn, size=(resolution + 1,) * 3, mode="trilinear", align_corners=True
    )[0, 0]
    # A lattice point is evaluated if its nearest coarse one is near: where a cell crosses the surface, a true distance
    # there is at most half a block's diagonal and one cell's. Learned distances are a little steeper, hence 1.25.
    reach = 1.25 * (BLOCK / 2 + 1) * (2 / resolution) * 3**0.5
    near = (coarse_nnn.abs() < reach).float()
    index = (torch.arange(resolution + 1, device=field.device) + BLOCK // 2) // BLOCK
    fine = near[0, 0][index][:, index][:, :, index] > 0
    volume[fine] = _query(field, lattice_RRR3[fine])[:, 0]
    return volume.float().cpu().numpy()


def _query(field: ImplicitField, points_P3: torch.Tensor) -> torch.Tensor:
    """Signed distance and rgb, [P, 4], in chunks."""
    rows = []
    for chunk in points_P3.split(CHUNK):
        values = field(chunk[None])
        rows.append(torch.cat([values.sdf_BP[0, :, None], values.rgb_BP3[0]], dim=-1))
    return torch.cat(rows) if rows else points_P3.new_zeros(0, 4)
