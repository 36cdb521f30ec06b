"""Unlit and lit views of a mesh on the CPU, for data and evaluation alike; and Embree's rays, for sampling.

Which surface a sample sees is found by `raster`, its colour by the mesh (`colour`). Surfaces that can be seen through
are followed front to back, one more layer of the same rasteriser each.
Colour is averaged over a pixel in linear light and encoded to sRGB once at the end; views have straight alpha.
Faces are two-sided and shaded flat, with their geometric normal, so that a mesh looks the same whoever wrote its
normals. Of faces in the same place the first is seen. Deterministic: same mesh, cameras and library versions, same
bytes.
Shapes: V views or vertices, H height, W width, S samples of a view, K samples that meet a surface, N spots on surfaces
(`raster.visible`), F faces, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.cameras import Cameras
from .mesh import Mesh

__all__ = ["Hits", "RayScene", "Views", "composite", "prepare", "render"]

VERSION = 2  # of the pixels: it changes with anything that changes them, so that no score rests on stale renders

# Shading of `Views.lit`, in linear light: albedo * (AMBIENT + DIFFUSE * wrapped Lambert of one light that is fixed to
# the camera, above and left of it). The wrap keeps a gradient on surfaces that look away from the light.
AMBIENT = 0.2
DIFFUSE = 0.8
WRAP = 0.4
TEXTURELESS_ALBEDO = 0.6  # linear light; what every surface has where only its shape is to be seen
LIGHT_IN_CAMERA = np.array([-0.4, 0.7, 0.6]) / np.linalg.norm([-0.4, 0.7, 0.6])

MAX_LAYERS = 8  # see-through surfaces followed behind one sample
OPAQUE_ENOUGH = 1 / 512  # a sample's light stops where less light than this would pass
SAME_SURFACE = 1e-5  # of the depth: what is nearer behind a surface than this is its other side, and not met


@dataclass(frozen=True)
class Views:
    """V pictures of one mesh.

    Args:
        albedo: uint8 [V, H, W, 4] unlit colour, sRGB with straight alpha; all zero where nothing is.
        lit: uint8 [V, H, W, 4] shaded colour, same alpha.
        textureless: uint8 [V, H, W, 4] the same shading with one grey for every surface, same alpha.
        depth: float32 [V, H, W] distance along the viewing axis in object units, mean of the pixel's covered samples,
            infinite where nothing is.
        normal: float32 [V, H, W, 3] unit normal in the object frame, turned towards the camera; zero where nothing is.
    """

    albedo: np.ndarray
    lit: np.ndarray
    textureless: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True)
class Hits:
    """First surfaces met by rays: for the M rays that met one, which ray, face, barycentrics and distance.

    `distance_M` is in multiples of the ray's direction.
    """

    ray_M: np.ndarray
    face_M: np.ndarray
    barycentric_M3: np.ndarray
    distance_M: np.ndarray


class RayScene:
    """A mesh prepared for ray casting."""

    def __init__(self, mesh: Mesh) -> None:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self._empty = len(mesh.faces) == 0
        if not self._empty:
            self._scene = EmbreeScene(robust=True)
            TriangleMesh(self._scene, mesh.vertices, mesh.faces)

    def cast(self, origins_N3: np.ndarray, directions_N3: np.ndarray) -> Hits:
        """The first surface along each ray, seen from either side. Directions need not be of unit length."""
        if self._empty or not len(origins_N3):
            nothing = np.zeros(0, np.int32)
            return Hits(nothing, nothing, np.zeros((0, 3), np.float32), np.zeros(0, np.float32))
        found = self._scene.run(_float_rows(origins_N3), _float_rows(directions_N3), output=True)
        ray_M = np.flatnonzero(found["primID"] >= 0)
        u_M, v_M = found["u"][ray_M], found["v"][ray_M]
        barycentric_M3 = np.stack([1 - u_M - v_M, u_M, v_M], axis=1)
        return Hits(ray_M, found["primID"][ray_M], barycentric_M3, found["tfar"][ray_M])


def _float_rows(array_N3: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array_N3, np.float32)


def render(mesh: Mesh, cameras: Cameras, *, samples_per_axis: int = 2) -> Views:
    """Render a mesh from every camera.

    Args:
        mesh: in the cameras' object frame.
        cameras: V views of H x W pixels.
        samples_per_axis: samples per pixel along each axis, on a regular grid, box-filtered.
    Raises: ValueError if there is no camera or `samples_per_axis` is not positive.
    Example: a sphere of radius r seen from distance d with focal f covers about pi f^2 r^2 / (d^2 - r^2) pixels.
    """
    if samples_per_axis < 1 or not len(cameras):
        raise ValueError(f"there must be a camera and a sample, got {len(cameras)} and {samples_per_axis} per axis")
    from . import colour, raster

    n_views, height, width, s = len(cameras), cameras.height, cameras.width, samples_per_axis
    albedo, lit, textureless = (np.zeros((n_views, height * width, 4), np.uint8) for _ in range(3))
    depth = np.full((n_views, height * width), np.inf, np.float32)
    normal = np.zeros((n_views, height * width, 3), np.float32)
    # A face without area becomes a point, which no sample sees.
    faces_F3 = np.where(mesh.face_areas[:, None] > 0, mesh.faces, mesh.faces[:, :1])
    cut_out = any(material.alpha_mode == "MASK" for material in mesh.materials)
    shading_3 = np.array([AMBIENT, DIFFUSE, WRAP])
    # Of one view, and left as they are here at its end: fresh ones each time would take as long as they take to fill.
    limit_S = np.full(height * width * s**2, np.inf, np.float32)  # 1 / depth of the last surface that was passed
    passing_S = np.ones(height * width * s**2, np.float32)  # the part of the light that is still to be met
    sums_PC = np.zeros((height * width, colour.N_SUMS), np.float32)
    for view, (camera_to_world, focal) in enumerate(zip(cameras.camera_to_world.astype(np.float64), cameras.focal)):
        rotation_33, eye_3 = camera_to_world[:3, :3], camera_to_world[:3, 3].copy()
        points_V3 = _seen_from(mesh.vertices, eye_3, rotation_33 * [focal, -focal, -1])
        met_K = reached_N = None  # all samples that meet anything, and their pixels
        for _ in range(1 if mesh.opaque else MAX_LAYERS):
            sample_K, spot_K, depth_K, pixel_N, face_N, barycentric_N3, sides_N22 = raster.visible(
                points_V3, faces_F3, width, height, s, limit_S, cut_out
            )
            if met_K is None or reached_N is None:
                met_K, reached_N = sample_K, pixel_N
            rgba_N4 = mesh.albedo_linear(face_N, barycentric_N3, sides_N22)
            colour.add_samples(
                *(sums_PC, passing_S, sample_K, spot_K, depth_K, pixel_N, face_N, rgba_N4),
                *(mesh.face_normals, mesh.triangles, eye_3, rotation_33 @ LIGHT_IN_CAMERA, shading_3),
            )
            if mesh.opaque:
                break
            limit_S[:] = 0
            going_K = passing_S[sample_K] > OPAQUE_ENOUGH
            limit_S[sample_K[going_K]] = 1 / (depth_K[going_K] * (1 + SAME_SURFACE))
            if not going_K.any():
                break
        if not mesh.opaque:
            limit_S[:] = np.inf
        passing_S[met_K] = 1
        colour.finish_pixels(
            *(sums_PC, reached_N, s**2, TEXTURELESS_ALBEDO),
            *(albedo[view], lit[view], textureless[view], depth[view], normal[view]),
        )
    return Views(
        albedo.reshape(n_views, height, width, 4),
        lit.reshape(n_views, height, width, 4),
        textureless.reshape(n_views, height, width, 4),
        depth.reshape(n_views, height, width),
        normal.reshape(n_views, height, width, 3),
    )


def _seen_from(vertices_V3: np.ndarray, eye_3: np.ndarray, axes_33: np.ndarray) -> np.ndarray:
    """[V, 3] products of what leads from the eye to each vertex with the columns of a matrix.

    Equal rows give equal bits, which a matrix product does not promise and without which a seam between vertices in the
    same place could let a sample through.
    """
    x_V, y_V, z_V = np.ascontiguousarray(vertices_V3.T) - eye_3[:, None]
    points_V3 = np.empty(vertices_V3.shape)
    for column, (a, b, c) in enumerate(axes_33.T):
        points_V3[:, column] = a * x_V + b * y_V + c * z_V
    return points_V3


def prepare() -> None:
    """Load what `render` runs on, and compile it where no earlier process has: seconds that a first view takes else."""
    from . import colour, raster  # noqa: F401


def composite(rgba: np.ndarray, background: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Lay straight-alpha pictures on a plain background, blending sRGB values as browsers and PIL do.

    Args:
        rgba: uint8 [..., 4].
        background: sRGB in [0, 1].
    Returns: uint8 [..., 3].
    """
    if tuple(background) == (1, 1, 1):  # in whole numbers: the same to the bit, in a third of the time
        weight = rgba[..., 3:].astype(np.uint16)
        total = rgba[..., :3] * weight
        total += 255 * (255 - weight) + 127  # at most 65,152
        return (total // 255).astype(np.uint8)
    alpha = rgba[..., 3:].astype(np.float32) / 255
    rgb = rgba[..., :3] * alpha + np.asarray(background, np.float32) * 255 * (1 - alpha)
    return np.rint(rgb).astype(np.uint8)
