"""Unlit and lit views of a mesh by ray casting on the CPU (Embree), for data and evaluation alike.

Colour is averaged over a pixel in linear light and encoded to sRGB once at the end; views have straight alpha.
Faces are two-sided and shaded flat, with their geometric normal, so that a mesh looks the same whoever wrote its
normals. Deterministic: same mesh, cameras and library versions, same bytes.
Shapes: V views, H height, W width, S samples per pixel, N rays or hits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..models.cameras import Cameras, orbit
from .mesh import Mesh, linear_to_srgb

__all__ = ["Hits", "RayScene", "Views", "composite", "random_rig", "render"]

VERSION = 1  # of the pixels: it changes with anything that changes them, so that no score rests on stale renders

# Shading of `Views.lit`, in linear light: albedo * (AMBIENT + DIFFUSE * wrapped Lambert of one light that is fixed to
# the camera, above and left of it). The wrap keeps a gradient on surfaces that look away from the light.
AMBIENT = 0.2
DIFFUSE = 0.8
WRAP = 0.4
TEXTURELESS_ALBEDO = 0.6  # linear light; what every surface has where only its shape is to be seen
LIGHT_IN_CAMERA = np.array([-0.4, 0.7, 0.6]) / np.linalg.norm([-0.4, 0.7, 0.6])

MAX_LAYERS = 8  # see-through surfaces followed along one ray
OPAQUE_ENOUGH = 1 / 512  # a ray stops where less light than this would pass
MAX_RAYS_AT_ONCE = 1 << 19


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
        samples_per_axis: rays per pixel along each axis, on a regular grid, box-filtered.
    Raises: ValueError if there is no camera or `samples_per_axis` is not positive.
    Example: a sphere of radius r seen from distance d with focal f covers about pi f^2 r^2 / (d^2 - r^2) pixels.
    """
    if samples_per_axis < 1 or not len(cameras):
        raise ValueError(f"there must be a camera and a sample, got {len(cameras)} and {samples_per_axis} per axis")
    scene = RayScene(mesh)
    rays_per_view = cameras.height * cameras.width * samples_per_axis**2
    step = max(1, MAX_RAYS_AT_ONCE // max(1, rays_per_view))
    parts = [
        _render_some(mesh, scene, cameras[start : start + step], samples_per_axis)
        for start in range(0, len(cameras), step)
    ]
    n_views, height, width = len(cameras), cameras.height, cameras.width
    albedo, lit, textureless, depth, normal = (np.concatenate(arrays) for arrays in zip(*parts))
    return Views(
        albedo.reshape(n_views, height, width, 4),
        lit.reshape(n_views, height, width, 4),
        textureless.reshape(n_views, height, width, 4),
        depth.reshape(n_views, height, width),
        normal.reshape(n_views, height, width, 3),
    )


def composite(rgba: np.ndarray, background: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Lay straight-alpha pictures on a plain background, blending sRGB values as browsers and PIL do.

    Args:
        rgba: uint8 [..., 4].
        background: sRGB in [0, 1].
    Returns: uint8 [..., 3].
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    rgb = rgba[..., :3] * alpha + np.asarray(background, np.float32) * 255 * (1 - alpha)
    return np.rint(rgb).astype(np.uint8)


def random_rig(rng: np.random.Generator, n_views: int, size: int) -> Cameras:
    """The data's cameras: the first half (rounded up) frontal, the rest from all around.

    Frontal: azimuth within 40 degrees of the object's front, elevation 5 to 35. Others: any azimuth, elevation -10 to
    60. Distance and field of view are `orbit`'s defaults.
    """
    n_front = math.ceil(n_views / 2)
    azimuths = [*rng.uniform(-40, 40, n_front), *rng.uniform(0, 360, n_views - n_front)]
    elevations = [*rng.uniform(5, 35, n_front), *rng.uniform(-10, 60, n_views - n_front)]
    return orbit(azimuths, elevations, size=size)


def _render_some(mesh: Mesh, scene: RayScene, cameras: Cameras, samples_per_axis: int) -> tuple[np.ndarray, ...]:
    """The arrays of `Views`, of all pixels of a few views in one row."""
    directions_N3 = _directions(cameras, samples_per_axis)
    n_pixels, n_samples = len(cameras) * cameras.height * cameras.width, samples_per_axis**2
    rays_per_view = cameras.height * cameras.width * n_samples
    eye_V3 = cameras.camera_to_world[:, :3, 3]
    light_V3 = cameras.camera_to_world[:, :3, :3] @ LIGHT_IN_CAMERA.astype(np.float32)
    rays, features = [], []
    live_M = _rays_at(mesh, cameras, n_samples)
    start_N = np.zeros(len(directions_N3), np.float32)  # where each ray goes on, behind the last surface it passed
    passing_N = np.ones(len(directions_N3), np.float32)  # the part of the light that is still to be met
    for _ in range(1 if mesh.opaque else MAX_LAYERS):
        directions_M3 = directions_N3.take(live_M, axis=0)
        origins_M3 = eye_V3.take(live_M // rays_per_view, axis=0)
        origins_M3 += start_N.take(live_M)[:, None] * directions_M3
        hits = scene.cast(origins_M3, directions_M3)
        ray_K = live_M[hits.ray_M]
        depth_K = start_N[ray_K] + hits.distance_M
        albedo_K4 = mesh.albedo_linear(hits.face_M, hits.barycentric_M3)
        normal_K3, shade_K = _shade(
            mesh, hits.face_M, directions_M3.take(hits.ray_M, axis=0), light_V3.take(ray_K // rays_per_view, axis=0)
        )
        rays.append(ray_K)
        features.append(_features(albedo_K4, shade_K, depth_K, normal_K3, passing_N[ray_K]))
        passing_N[ray_K] *= 1 - albedo_K4[:, 3]
        start_N[ray_K] = depth_K * (1 + 1e-5)  # far enough in float32 not to meet the same surface again
        live_M = ray_K[passing_N[ray_K] > OPAQUE_ENOUGH]
        if not len(live_M):
            break
    return _pixels(np.concatenate(rays) // n_samples, np.concatenate(features), n_pixels, n_samples)


def _rays_at(mesh: Mesh, cameras: Cameras, n_samples: int) -> np.ndarray:
    """Indices of the rays through each view's rectangle around the mesh's bounding box: the others can meet nothing."""
    if not len(mesh.faces):
        return np.zeros(0, np.int64)
    corners_83 = np.array(list(itertools.product(*zip(*mesh.bounds()))))
    grid_HW = np.arange(cameras.height * cameras.width).reshape(cameras.height, cameras.width)
    pixels = []
    for view, (camera_to_world, focal) in enumerate(zip(cameras.camera_to_world.astype(np.float64), cameras.focal)):
        local_83 = (corners_83 - camera_to_world[:3, 3]) @ camera_to_world[:3, :3]
        seen_HW = grid_HW
        if (depth_8 := -local_83[:, 2]).min() > 1e-6:
            x_8 = cameras.width / 2 + focal * local_83[:, 0] / depth_8
            y_8 = cameras.height / 2 - focal * local_83[:, 1] / depth_8
            seen_HW = grid_HW[_span(y_8, cameras.height), _span(x_8, cameras.width)]
        pixels.append(seen_HW.ravel() + view * grid_HW.size)
    return (np.concatenate(pixels)[:, None] * n_samples + np.arange(n_samples)).ravel()


def _span(coordinates: np.ndarray, size: int) -> slice:
    """The pixels between the outermost coordinates, with one to spare for rounding."""
    lower, upper = np.clip([np.floor(coordinates.min()) - 1, np.ceil(coordinates.max()) + 1], 0, size)
    return slice(int(lower), int(upper))


def _directions(cameras: Cameras, samples_per_axis: int) -> np.ndarray:
    """[V * H * W * S, 3] float32, scaled so that a distance along them is a z-depth."""
    s, width, height = samples_per_axis, cameras.width, cameras.height
    x_WS = (np.arange(width * s) + 0.5).reshape(width, s) / s - width / 2
    y_HS = height / 2 - (np.arange(height * s) + 0.5).reshape(height, s) / s
    local_HWSS3 = np.empty((height, width, s, s, 3), np.float32)
    local_HWSS3[..., 0] = x_WS[None, :, None, :]
    local_HWSS3[..., 1] = y_HS[:, None, :, None]
    local_HWSS3[..., 2] = -1
    rotation_V33 = np.swapaxes(cameras.camera_to_world[:, :3, :3], 1, 2).copy()
    rotation_V33[:, :2] /= cameras.focal[:, None, None]
    return (local_HWSS3.reshape(1, -1, 3) @ rotation_V33).reshape(-1, 3)


def _shade(
    mesh: Mesh, face_K: np.ndarray, direction_K3: np.ndarray, light_K3: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normals towards the viewer and the factor that turns albedo into lit colour."""
    normal_K3 = mesh.face_normals.take(face_K, axis=0)
    normal_K3 *= -np.sign(np.einsum("kc,kc->k", normal_K3, direction_K3))[:, None]
    towards_light_K = np.einsum("kc,kc->k", normal_K3, light_K3)
    return normal_K3, AMBIENT + DIFFUSE * np.maximum(0, (towards_light_K + WRAP) / (1 + WRAP))


# Columns of the features that are added up over a pixel's samples.
_ALBEDO, _LIT, _SHADE, _ALPHA, _DEPTH, _NORMAL, _COVERED = slice(0, 3), slice(3, 6), 6, 7, 8, slice(9, 12), 12
_COLOURS = slice(0, 7)


def _features(
    albedo_K4: np.ndarray, shade_K: np.ndarray, depth_K: np.ndarray, normal_K3: np.ndarray, passing_K: np.ndarray
) -> np.ndarray:
    """[K, 13]: what each met surface adds to its pixel. Colours are premultiplied; depth is the first surface's."""
    features_KC = np.empty((len(depth_K), 13), np.float32)
    alpha_K = albedo_K4[:, 3] * passing_K
    features_KC[:, _ALBEDO] = albedo_K4[:, :3] * alpha_K[:, None]
    features_KC[:, _LIT] = features_KC[:, _ALBEDO] * shade_K[:, None]
    features_KC[:, _SHADE] = alpha_K * shade_K * TEXTURELESS_ALBEDO
    features_KC[:, _ALPHA] = alpha_K
    first_K = (passing_K == 1) & (alpha_K > 0)
    features_KC[:, _DEPTH] = depth_K * first_K
    features_KC[:, _NORMAL] = normal_K3 * first_K[:, None]
    features_KC[:, _COVERED] = first_K
    return features_KC


def _pixels(pixel_K: np.ndarray, features_KC: np.ndarray, n_pixels: int, n_samples: int) -> tuple[np.ndarray, ...]:
    """The arrays of `Views`, of `n_pixels` pixels in one row, from the features of their samples."""
    albedo, lit, textureless = (np.zeros((n_pixels, 4), np.uint8) for _ in range(3))
    depth = np.full(n_pixels, np.inf, np.float32)
    normal = np.zeros((n_pixels, 3), np.float32)
    if not len(pixel_K):
        return albedo, lit, textureless, depth, normal
    if (np.diff(pixel_K) < 0).any():  # several layers
        order = np.argsort(pixel_K, kind="stable")
        pixel_K, features_KC = pixel_K[order], features_KC[order]
    first = np.flatnonzero(np.diff(pixel_K, prepend=-1))
    sums = np.add.reduceat(features_KC, first, axis=0)
    seen = np.rint(255 * sums[:, _ALPHA] / n_samples) > 0
    sums, where = sums[seen], pixel_K[first][seen]
    colours = np.rint(255 * linear_to_srgb(sums[:, _COLOURS] / sums[:, _ALPHA, None])).astype(np.uint8)
    albedo[where, :3], lit[where, :3] = colours[:, _ALBEDO], colours[:, _LIT]
    textureless[where, :3] = colours[:, _SHADE, None]
    alpha = np.rint(255 * sums[:, _ALPHA] / n_samples)
    albedo[where, 3] = lit[where, 3] = textureless[where, 3] = alpha
    depth[where] = sums[:, _DEPTH] / sums[:, _COVERED]
    length = np.linalg.norm(sums[:, _NORMAL], axis=1, keepdims=True)
    normal[where] = np.divide(sums[:, _NORMAL], length, out=np.zeros_like(sums[:, _NORMAL]), where=length > 1e-6)
    return albedo, lit, textureless, depth, normal
