"""Pinhole cameras, shared by the data renderer, the NeRF renderer and evaluation.

A leaf of plain NumPy: it imports nothing of ours, so every folder may use it.

Frame: glTF's, right-handed, +Y up, an object's front looks along +Z.
Camera axes: OpenGL's, x right, y up, looking down -z.
Shapes: V views, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Cameras", "look_at", "orbit"]


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras of one image size.

    Args:
        camera_to_world: [V, 4, 4] float32, camera to object frame, OpenGL axes.
        focal: [V] float32, focal length in pixels (square pixels, centre of the image is the principal point).
        width, height: image size in pixels.
    """

    camera_to_world: np.ndarray
    focal: np.ndarray
    width: int
    height: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "camera_to_world", np.asarray(self.camera_to_world, np.float32))
        object.__setattr__(self, "focal", np.asarray(self.focal, np.float32))
        n_views = len(self.focal)
        if self.camera_to_world.shape != (n_views, 4, 4):
            raise ValueError(
                f"camera_to_world must be [{n_views}, 4, 4] for {n_views} focal lengths, "
                f"got {list(self.camera_to_world.shape)}"
            )

    def __len__(self) -> int:
        return len(self.focal)

    def __getitem__(self, views: slice | list[int] | np.ndarray) -> Cameras:
        """The chosen views, in the order given."""
        return Cameras(self.camera_to_world[views], self.focal[views], self.width, self.height)

    def resized(self, width: int, height: int) -> Cameras:
        """The same views at another image size (same vertical field of view)."""
        return Cameras(self.camera_to_world, self.focal * (height / self.height), width, height)

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Rays through the pixel centres, row 0 at the top.

        Returns: origins_VHW3 and unit directions_VHW3, float32, object frame.
        """
        x_W = (np.arange(self.width) + 0.5 - self.width / 2)[None, None, :]
        y_H = (self.height / 2 - np.arange(self.height) - 0.5)[None, :, None]
        focal_V = self.focal[:, None, None]
        local_VHW3 = np.stack(np.broadcast_arrays(x_W / focal_V, y_H / focal_V, np.float32(-1.0)), axis=-1)
        local_VHW3 /= np.linalg.norm(local_VHW3, axis=-1, keepdims=True)
        directions_VHW3 = np.einsum("vij,vhwj->vhwi", self.camera_to_world[:, :3, :3], local_VHW3)
        origins_VHW3 = np.broadcast_to(self.camera_to_world[:, None, None, :3, 3], directions_VHW3.shape)
        return origins_VHW3.astype(np.float32), directions_VHW3.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back exactly."""
        return {
            "axes": "opengl",
            "width": self.width,
            "height": self.height,
            "focal": [float(f) for f in self.focal],
            "camera_to_world": self.camera_to_world.astype(float).tolist(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cameras:
        if fields.get("axes") != "opengl":
            raise ValueError(f"cameras.json: field 'axes' must be 'opengl', got {fields.get('axes')!r}")
        return cls(np.array(fields["camera_to_world"]), np.array(fields["focal"]), fields["width"], fields["height"])


def look_at(position_3: np.ndarray) -> np.ndarray:
    """Camera-to-world [4, 4] at `position_3` looking at the origin, image up along +Y.

    Looking straight up or down, the image's up is -Z or +Z.
    """
    back = np.array(position_3, np.float64)
    back /= np.linalg.norm(back)
    up = np.array([0.0, 1.0, 0.0]) if abs(back[1]) < 0.9999 else np.array([0.0, 0.0, -np.sign(back[1])])
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2], matrix[:3, 3] = right, np.cross(back, right), back, position_3
    return matrix.astype(np.float32)


def orbit(
    azimuths_deg: np.ndarray | list[float],
    elevations_deg: np.ndarray | list[float] | float,
    *,
    size: int,
    distance: float = 4.0,
    fov_deg: float = 40.0,
) -> Cameras:
    """Cameras on a sphere around the origin, looking at it.

    Azimuth 0 is the object's front (+Z); 90 sees it from +X. Elevation 90 looks down from +Y.
    The default distance and field of view keep the whole of [-1, 1]^3's inscribed sphere in the image.

    Args:
        azimuths_deg: [V] degrees.
        elevations_deg: [V] or one for all, degrees.
        size: width and height in pixels.
        distance: to the origin, object-frame units.
        fov_deg: vertical field of view, degrees.
    """
    azimuths_V = np.radians(np.asarray(azimuths_deg, np.float64))
    elevations_V = np.broadcast_to(np.radians(np.asarray(elevations_deg, np.float64)), azimuths_V.shape)
    positions_V3 = distance * np.stack(
        [
            np.sin(azimuths_V) * np.cos(elevations_V),
            np.sin(elevations_V),
            np.cos(azimuths_V) * np.cos(elevations_V),
        ],
        axis=-1,
    )
    focal = size / 2 / np.tan(np.radians(fov_deg) / 2)
    matrices = np.stack([look_at(position) for position in positions_V3])
    return Cameras(matrices, np.full(len(azimuths_V), focal), size, size)
