"""What an encoder reads of a raw sample, and the rays of its views, as arrays.

Shapes: N surface points, V views of H x W pixels, R rays.
"""

from __future__ import annotations

import numpy as np

from ..models.cameras import Cameras
from .loader import RawSample

__all__ = ["farthest_first", "pick_rays", "surface_features", "view_arrays", "view_targets"]

OPAQUE = 255  # a pixel the object fills; the release takes alpha of at least .999 for it


def surface_features(sample: RawSample, index: np.ndarray | slice = slice(None), *, n_centres: int = 0) -> np.ndarray:
    """xyz, unit normal and sRGB of a sample's surface points, [N, 9] float32.

    Args:
        n_centres: so many points come first, spread as evenly as can be: what an encoder with neighbourhoods expects.
    """
    points_N9 = np.concatenate(sample.pick_surface(index), axis=-1)
    return points_N9[farthest_first(points_N9[:, :3], n_centres)] if n_centres else points_N9


def farthest_first(xyz_N3: np.ndarray, count: int) -> np.ndarray:
    """An order of the points: from the first on, `count` of them each the farthest from those before, then the rest."""
    count = min(count, len(xyz_N3))
    chosen = np.zeros(count, np.int64)
    distance_N = np.full(len(xyz_N3), np.inf, np.float32)
    for k in range(1, count):
        np.minimum(distance_N, np.square(xyz_N3 - xyz_N3[chosen[k - 1]]).sum(-1), out=distance_N)
        chosen[k] = distance_N.argmax()
    rest = np.ones(len(xyz_N3), bool)
    rest[chosen] = False
    return np.concatenate([chosen, np.flatnonzero(rest)])


def view_arrays(sample: RawSample, views: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
    """`ViewInputs`' arrays of some of a sample's views (unlit colour), by name.

    The surface point in a pixel is at its z-depth along the pixel's ray.
    """
    assert sample.albedo is not None and sample.depth is not None and sample.cameras is not None
    rgba_VHW4, cameras = sample.albedo[views], sample.cameras[views]
    origins_VHW3, directions_VHW3 = cameras.rays()
    ahead_V3 = -cameras.camera_to_world[:, :3, 2]
    cosine_VHW = np.einsum("vhwi,vi->vhw", directions_VHW3, ahead_V3)
    seen_VHW = (rgba_VHW4[..., 3] == OPAQUE) & np.isfinite(sample.depth[views])
    distance_VHW = np.where(seen_VHW, sample.depth[views], 0) / cosine_VHW
    return {
        "rgb": np.moveaxis(rgba_VHW4[..., :3].astype(np.float32) / 255, -1, 1),
        "seen": seen_VHW,
        "origin": np.ascontiguousarray(origins_VHW3[:, 0, 0]),
        "position": np.moveaxis(origins_VHW3 + distance_VHW[..., None] * directions_VHW3, -1, 1).astype(np.float32),
    }


def pick_rays(sample: RawSample, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random pixels of all of a sample's views: origin, direction [R, 3], and what is seen there.

    Returns: also rgba [R, 4] in [0, 1], unlit, sRGB with straight alpha.
    """
    assert sample.albedo is not None and sample.cameras is not None
    cameras = sample.cameras
    view_R = rng.integers(len(cameras), size=count)
    row_R, column_R = rng.integers(cameras.height, size=count), rng.integers(cameras.width, size=count)
    return {
        **_rays_through(cameras, view_R, row_R, column_R),
        "rgba": sample.albedo[view_R, row_R, column_R].astype(np.float32) / 255,
    }


def view_targets(sample: RawSample, views: np.ndarray) -> dict[str, np.ndarray]:
    """Whole views to compare renders with: camera [V, 4, 4], focal [V] in pixels, rgba [V, H, W, 4] in [0, 1]."""
    assert sample.albedo is not None and sample.cameras is not None
    cameras = sample.cameras[views]
    rgba_VHW4 = sample.albedo[views].astype(np.float32) / 255
    return {"camera": cameras.camera_to_world, "focal": cameras.focal, "rgba": rgba_VHW4}


def _rays_through(
    cameras: Cameras, view_R: np.ndarray, row_R: np.ndarray, column_R: np.ndarray
) -> dict[str, np.ndarray]:
    """As `Cameras.rays`, of some pixels alone."""
    focal_R = cameras.focal[view_R]
    local_R3 = np.stack(
        [
            (column_R + 0.5 - cameras.width / 2) / focal_R,
            (cameras.height / 2 - row_R - 0.5) / focal_R,
            -np.ones(len(view_R)),
        ],
        axis=-1,
    )
    local_R3 /= np.linalg.norm(local_R3, axis=-1, keepdims=True)
    matrix_R44 = cameras.camera_to_world[view_R]
    return {
        "origin": matrix_R44[:, :3, 3].astype(np.float32),
        "direction": np.einsum("rij,rj->ri", matrix_R44[:, :3, :3], local_R3).astype(np.float32),
    }
