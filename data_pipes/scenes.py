"""Scenes of the procedural set: a meaning becomes placed, coloured solids with exact distance, colour and mesh.

Parts never touch, so the minimum of their exact distances is the exact distance of the whole, and the nearest part's
colour the colour of a point. Everything stays within 0.95 of the origin along each axis.
Shapes: K parts, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import primitives
from .grammar import Part, SceneSpec
from .mesh import Material, Mesh, srgb_to_linear
from .primitives import Solid
from .sampling import Field, Surface

SRGB = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.88, 0.14),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.16, 0.82, 0.86),
    "blue": (0.13, 0.26, 0.86),
    "purple": (0.53, 0.16, 0.72),
    "gray": (0.55, 0.55, 0.55),
    "pink": (0.97, 0.56, 0.76),
    "brown": (0.45, 0.26, 0.12),
}
COLOR_JITTER = 0.04  # uniform, per channel, sRGB

# Scale of a part: half-extent of a sphere; the other shapes are drawn to look about as large.
SINGLE_SCALE = {"small": 0.36, "medium": 0.56, "big": 0.80}
GROUP_SCALE = {2: 0.40, 3: 0.26}
ASPECT_JITTER = 0.06  # uniform, of each dimension by itself
YAW_JITTER = np.radians(20)  # uniform, about +Y
STACK_GAP, SIDE_GAP = 0.02, 0.06
OFFSET_JITTER = 0.04  # uniform, of a part across the direction of its relation
FRONT_OFFSET = 0.25  # sideways, of a part in front of another, which would be hidden else
NEAR_SIGMAS = (0.02, 0.08)  # of the noise on near-surface points, half each

# Each shape's maker and its dimensions at scale 1.
MAKERS: dict[str, tuple[Callable[..., Solid], tuple[float, ...]]] = {
    "sphere": (primitives.Swollen, (1.0,)),
    "cube": (primitives.box, (0.8, 0.8, 0.8)),
    "cylinder": (primitives.cylinder, (0.75, 0.9)),
    "cone": (primitives.cone, (0.85, 0.95)),
    "pyramid": (primitives.pyramid, (0.82, 0.85, 0.82)),
    "torus": (primitives.Torus, (0.70, 0.29)),
    "capsule": (primitives.Swollen, (0.5, 0.48)),
    "octahedron": (primitives.octahedron, (0.95, 0.95, 0.95)),
    "hexagonal prism": (primitives.hexagonal_prism, (0.85, 0.7)),
}


@dataclass(frozen=True)
class PlacedPart:
    """A solid turned by `yaw` about +Y, then moved to `center_3`."""

    solid: Solid
    center_3: np.ndarray
    yaw: float
    rgb_3: np.ndarray  # sRGB in [0, 1]

    @property
    def rotation_33(self) -> np.ndarray:
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])

    def sdf(self, points_P3: np.ndarray) -> np.ndarray:
        return self.solid.sdf((points_P3 - self.center_3) @ self.rotation_33)


@dataclass(frozen=True)
class Scene:
    """One object of the set: disjoint parts in the object frame."""

    parts: tuple[PlacedPart, ...]

    @property
    def rgb_u8(self) -> np.ndarray:
        """[K, 3], the parts' colours as they are stored."""
        return np.rint(255 * np.array([part.rgb_3 for part in self.parts])).astype(np.uint8)

    def sdf_and_part(self, points_P3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact signed distance (negative inside), and the index of the part it is to."""
        distances_KP = np.stack([part.sdf(np.asarray(points_P3, np.float64)) for part in self.parts])
        nearest_P = distances_KP.argmin(axis=0)
        return distances_KP[nearest_P, np.arange(len(points_P3))], nearest_P

    def mesh(self) -> Mesh:
        """All parts, one material each."""
        meshes = [part.solid.mesh() for part in self.parts]
        vertices = [v @ part.rotation_33.T + part.center_3 for (v, _), part in zip(meshes, self.parts)]
        starts = np.cumsum([0] + [len(v) for v in vertices])
        return Mesh(
            vertices=np.concatenate(vertices),
            faces=np.concatenate([faces + start for (_, faces), start in zip(meshes, starts)]),
            face_material=np.repeat(np.arange(len(meshes)), [len(faces) for _, faces in meshes]),
            materials=tuple(Material(np.append(srgb_to_linear(rgb), 1)) for rgb in self.rgb_u8 / np.float32(255)),
        )

    def sample_surface(self, n: int, rng: np.random.Generator) -> Surface:
        """Points uniform by area over all parts, in random order, with exact normals."""
        areas = np.array([part.solid.area for part in self.parts])
        counts = rng.multinomial(n, areas / areas.sum())
        xyz, normal = zip(*(part.solid.sample(count, rng) for part, count in zip(self.parts, counts)))
        turned = [x @ part.rotation_33.T + part.center_3 for x, part in zip(xyz, self.parts)]
        normals = [x @ part.rotation_33.T for x, part in zip(normal, self.parts)]
        order = rng.permutation(n)
        return Surface(
            xyz=np.concatenate(turned)[order].astype(np.float32),
            normal=np.concatenate(normals)[order].astype(np.float32),
            rgb=np.repeat(self.rgb_u8, counts, axis=0)[order],
        )

    def sample_field(self, n_near: int, n_uniform: int, rng: np.random.Generator) -> Field:
        """Near points (surface points with noise of `NEAR_SIGMAS` in turn, kept in the cube), then uniform ones.

        Positions are rounded to float16 first: distances are exact at the positions that are stored.
        """
        sigma = np.resize(NEAR_SIGMAS, n_near)[:, None]
        near = self.sample_surface(n_near, rng).xyz + sigma * rng.standard_normal((n_near, 3))
        points = np.concatenate([np.clip(near, -1, 1), rng.uniform(-1, 1, (n_uniform, 3))])
        points = points.astype(np.float16).astype(np.float32)
        sdf, part = self.sdf_and_part(points)
        return Field(xyz=points, sdf=sdf.astype(np.float32), rgb=self.rgb_u8[part])


# ---------------------------------------------------------------------------------------------- drawing a scene


def draw_scene(spec: SceneSpec, rng: np.random.Generator) -> Scene:
    """A scene of the given meaning, with jitter."""
    scales = (
        [GROUP_SCALE[len(spec.parts)]] * len(spec.parts)
        if spec.relation
        else [SINGLE_SCALE[part.size] for part in spec.parts]
    )
    loose = [_draw_part(part, scale, rng) for part, scale in zip(spec.parts, scales)]
    centers = _place(spec.relation, np.array([_half_extent(part) for part in loose]), rng)
    return Scene(tuple(PlacedPart(p.solid, c, p.yaw, p.rgb_3) for p, c in zip(loose, centers)))


def _draw_part(part: Part, scale: float, rng: np.random.Generator) -> PlacedPart:
    """A part at the origin."""
    maker, dimensions = MAKERS[part.shape]
    jitter = 1 + rng.uniform(-ASPECT_JITTER, ASPECT_JITTER, len(dimensions))
    rgb = np.clip(SRGB[part.color] + rng.uniform(-COLOR_JITTER, COLOR_JITTER, 3), 0, 1)
    solid = maker(*(scale * np.array(dimensions) * jitter).tolist())
    return PlacedPart(solid, np.zeros(3), float(rng.uniform(-YAW_JITTER, YAW_JITTER)), rgb)


def _half_extent(part: PlacedPart) -> np.ndarray:
    """[3], of the turned part's bounding box; its centre is the part's."""
    return np.abs(part.solid.mesh()[0] @ part.rotation_33.T).max(axis=0)


def _place(relation: str | None, half_K3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [K, 3] of parts given their half-extents: in a row along the relation's axis, the whole centred."""
    n = len(half_K3)
    if relation is None:
        return np.zeros((1, 3))
    order, axis, gap = np.arange(n), 0, SIDE_GAP
    if relation in ("on top of", "tower"):
        order, axis, gap = order[::-1], 1, STACK_GAP
    elif relation == "in front of":
        order, axis = order[::-1], 2
    elif relation == "between":
        order = np.array([1, 0, 2]) if rng.random() < 0.5 else np.array([2, 0, 1])
    centers = rng.uniform(-OFFSET_JITTER, OFFSET_JITTER, (n, 3))
    if axis == 2:
        centers[0, 0] += rng.choice((-FRONT_OFFSET, FRONT_OFFSET))
    if axis != 1:
        centers[:, 1] = half_K3[:, 1]  # side by side they stand on one ground
    widths = 2 * half_K3[order, axis] + gap
    centers[order, axis] = np.cumsum(widths) - widths / 2
    low, high = (centers - half_K3).min(axis=0), (centers + half_K3).max(axis=0)
    return centers - (low + high) / 2
