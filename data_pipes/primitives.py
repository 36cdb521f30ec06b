"""Primitive solids with exact signed distance, exact area-uniform surface samples, and meshes.

Two families cover all shapes. *Round* solids turn a profile in the (radius, y) half-plane about the Y axis: a chain of
straight pieces (cylinder, cone), or a segment or circle swollen by a radius (sphere, capsule, torus). *Flat* solids are
convex polyhedra given by their face polygons. Each stands centred on its own origin, +Y up.

Distances are negative inside and exact everywhere, inside and out, to float64 rounding.
Shapes: P points, E polygon edges, K profile points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SEGMENTS = 48  # of a turned mesh, about the axis
ARC_STEPS = 12  # of a quarter of a turned mesh's circular profile


@dataclass(frozen=True)
class Turned:
    """A convex chain of straight pieces turned about Y: discs, cylinders and cones.

    Args:
        profile_K2: (radius, y) from the axis at the bottom, outwards and up, to the axis at the top.
    """

    profile_K2: np.ndarray

    @cached_property
    def _frustums(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(start, direction, outward normal) of each piece, in the half-plane."""
        steps = np.diff(self.profile_K2, axis=0)
        normals = np.stack([steps[:, 1], -steps[:, 0]], axis=1)
        return list(zip(self.profile_K2, steps, normals / np.linalg.norm(normals, axis=1, keepdims=True)))

    def sdf(self, points_P3: np.ndarray) -> np.ndarray:
        radius_P, y_P = np.hypot(points_P3[:, 0], points_P3[:, 2]), points_P3[:, 1]
        nearest_P, outside_P = np.inf, -np.inf
        for start, step, normal in self._frustums:
            dr_P, dy_P = radius_P - start[0], y_P - start[1]
            outside_P = np.maximum(outside_P, dr_P * normal[0] + dy_P * normal[1])
            along_P = np.clip((dr_P * step[0] + dy_P * step[1]) / (step @ step), 0, 1)
            nearest_P = np.minimum(nearest_P, (dr_P - along_P * step[0]) ** 2 + (dy_P - along_P * step[1]) ** 2)
        return np.copysign(np.sqrt(nearest_P), outside_P)

    @cached_property
    def _areas(self) -> np.ndarray:
        radii = self.profile_K2[:, 0]
        return np.pi * (radii[1:] + radii[:-1]) * np.linalg.norm(np.diff(self.profile_K2, axis=0), axis=1)

    @property
    def area(self) -> float:
        return float(self._areas.sum())

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        counts = rng.multinomial(n, self._areas / self.area)
        starts, steps, normals = (np.repeat(np.array(column), counts, axis=0) for column in zip(*self._frustums))
        # Along a piece the density is proportional to the radius, so the radius squared is uniform.
        first, last = starts[:, 0], starts[:, 0] + steps[:, 0]
        radius = np.sqrt(first**2 + (last**2 - first**2) * rng.random(n))
        along = np.where(steps[:, 0] == 0, rng.random(n), (radius - first) / np.where(steps[:, 0] == 0, 1, steps[:, 0]))
        y = starts[:, 1] + along * steps[:, 1]
        return _turn(radius, y, normals[:, 0], normals[:, 1], rng.uniform(0, 2 * np.pi, n))

    def mesh(self) -> tuple[np.ndarray, np.ndarray]:
        return _revolve(self.profile_K2, SEGMENTS)


@dataclass(frozen=True)
class Swollen:
    """All points within `radius` of an upright segment of half-length `half`: a capsule, and with 0 a sphere."""

    radius: float
    half: float = 0.0

    def sdf(self, points_P3: np.ndarray) -> np.ndarray:
        x_P, y_P, z_P = points_P3.T
        return np.sqrt(x_P**2 + z_P**2 + (y_P - np.clip(y_P, -self.half, self.half)) ** 2) - self.radius

    @property
    def area(self) -> float:
        return 4 * np.pi * self.radius * (self.radius + self.half)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # Height is uniform on a sphere and on a cylinder of the same radius alike (Archimedes).
        y = rng.uniform(-1, 1, n) * (self.radius + self.half)
        normal_y = (y - np.clip(y, -self.half, self.half)) / self.radius
        normal_r = np.sqrt(1 - normal_y**2)
        return _turn(self.radius * normal_r, y, normal_r, normal_y, rng.uniform(0, 2 * np.pi, n))

    def mesh(self) -> tuple[np.ndarray, np.ndarray]:
        angles = np.linspace(-np.pi / 2, np.pi / 2, 2 * ARC_STEPS + 1)
        y = self.radius * np.sin(angles)
        lower, upper = slice(None, ARC_STEPS + 1), slice(ARC_STEPS if self.half else ARC_STEPS + 1, None)
        profile = np.stack([self.radius * np.cos(angles), y], axis=1)
        profile = np.concatenate([profile[lower] - [0, self.half], profile[upper] + [0, self.half]])
        return _revolve(profile, SEGMENTS)


@dataclass(frozen=True)
class Torus:
    """A tube of radius `tube` around a circle of radius `ring` lying in the XZ plane."""

    ring: float
    tube: float

    def sdf(self, points_P3: np.ndarray) -> np.ndarray:
        return np.hypot(np.hypot(points_P3[:, 0], points_P3[:, 2]) - self.ring, points_P3[:, 1]) - self.tube

    @property
    def area(self) -> float:
        return 4 * np.pi**2 * self.ring * self.tube

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # Uniform on the surface, the angle about the tube has a density of (1 + k cos(angle)) / 2 pi. A uniform angle
        # is kept with probability pi times that, else mirrored to the other side of the tube: none is drawn again.
        k = self.tube / self.ring
        angle = rng.uniform(0, 2 * np.pi, n)
        angle = np.where(rng.random(n) < (1 + k * np.cos(angle)) / 2, angle, np.pi - angle)
        normal_r, normal_y = np.cos(angle), np.sin(angle)
        return _turn(
            self.ring + self.tube * normal_r, self.tube * normal_y, normal_r, normal_y, rng.uniform(0, 2 * np.pi, n)
        )

    def mesh(self) -> tuple[np.ndarray, np.ndarray]:
        angles = np.arange(2 * ARC_STEPS) * np.pi / ARC_STEPS
        profile = np.stack([self.ring + self.tube * np.cos(angles), self.tube * np.sin(angles)], axis=1)
        return _revolve(profile, SEGMENTS, closed=True)


@dataclass(frozen=True)
class Polyhedron:
    """A convex solid.

    Args:
        corners_V3: its corners.
        polygons: corner indices of each face, counter-clockwise seen from outside.
    """

    corners_V3: np.ndarray
    polygons: tuple[tuple[int, ...], ...]

    @cached_property
    def _triangles(self) -> np.ndarray:
        return np.array([(face[0], face[i], face[i + 1]) for face in self.polygons for i in range(1, len(face) - 1)])

    @cached_property
    def _normals_F3(self) -> np.ndarray:
        first, second, third = (self.corners_V3[[face[i] for face in self.polygons]] for i in range(3))
        normals = np.cross(second - first, third - first)
        return normals / np.linalg.norm(normals, axis=1, keepdims=True)

    def sdf(self, points_P3: np.ndarray) -> np.ndarray:
        plane_PF = points_P3 @ self._normals_F3.T - np.einsum(
            "fc,fc->f", self._normals_F3, self.corners_V3[[face[0] for face in self.polygons]]
        )
        distance_P = plane_PF.max(axis=1)  # exact inside, and where the foot on the farthest plane lies on its face
        out = np.flatnonzero(distance_P > 0)
        distance_P[out] = self._distance_outside(points_P3[out], plane_PF[out])
        return distance_P

    def _distance_outside(self, points_P3: np.ndarray, plane_PF: np.ndarray) -> np.ndarray:
        """Distance to the nearest face or edge: the foot on a plane counts if it lies within the face's polygon."""
        best_P = np.full(len(points_P3), np.inf)
        for f, face in enumerate(self.polygons):
            within_P = plane_PF[:, f] >= 0
            for a, b in zip(face, (*face[1:], face[0])):
                start, step = self.corners_V3[a], self.corners_V3[b] - self.corners_V3[a]
                inward = np.cross(self._normals_F3[f], step)
                within_P &= points_P3 @ inward >= start @ inward
                if a < b:  # each edge belongs to two faces, once in either direction
                    along_P = np.clip((points_P3 @ step - start @ step) / (step @ step), 0, 1)
                    apart_P3 = points_P3 - start - along_P[:, None] * step
                    np.minimum(best_P, np.einsum("pc,pc->p", apart_P3, apart_P3), out=best_P)
            np.minimum(best_P, np.where(within_P, plane_PF[:, f] ** 2, np.inf), out=best_P)
        return np.sqrt(best_P)

    @cached_property
    def _triangle_areas(self) -> np.ndarray:
        a, b, c = np.moveaxis(self.corners_V3[self._triangles], 1, 0)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2

    @property
    def area(self) -> float:
        return float(self._triangle_areas.sum())

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        counts = rng.multinomial(n, self._triangle_areas / self.area)
        face_of_triangle = np.repeat(np.arange(len(self.polygons)), [len(face) - 2 for face in self.polygons])
        a, b, c = np.moveaxis(np.repeat(self.corners_V3[self._triangles], counts, axis=0), 1, 0)
        u, v = rng.random((2, n, 1))
        root = np.sqrt(u)
        points = a * (1 - root) + b * (root * (1 - v)) + c * (root * v)
        return points, np.repeat(self._normals_F3[face_of_triangle], counts, axis=0)

    def mesh(self) -> tuple[np.ndarray, np.ndarray]:
        return self.corners_V3, self._triangles


Solid = Turned | Swollen | Torus | Polyhedron


def cylinder(radius: float, half_height: float) -> Turned:
    return Turned(np.array([[0, -half_height], [radius, -half_height], [radius, half_height], [0, half_height]]))


def cone(radius: float, half_height: float) -> Turned:
    return Turned(np.array([[0, -half_height], [radius, -half_height], [0, half_height]]))


def box(half_x: float, half_y: float, half_z: float) -> Polyhedron:
    return _prism(np.array([[half_x, -half_z], [-half_x, -half_z], [-half_x, half_z], [half_x, half_z]]), half_y)


def hexagonal_prism(radius: float, half_height: float) -> Polyhedron:
    angles = -np.arange(6) * np.pi / 3
    return _prism(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), half_height)


def pyramid(half_x: float, half_height: float, half_z: float) -> Polyhedron:
    base = np.array([[half_x, -half_z], [-half_x, -half_z], [-half_x, half_z], [half_x, half_z]])
    corners = np.array([*([x, -half_height, z] for x, z in base), [0, half_height, 0]])
    return Polyhedron(corners, ((3, 2, 1, 0), *((i, (i + 1) % 4, 4) for i in range(4))))


def octahedron(half_x: float, half_y: float, half_z: float) -> Polyhedron:
    ring = np.array([[half_x, 0, 0], [0, 0, -half_z], [-half_x, 0, 0], [0, 0, half_z]])
    corners = np.concatenate([ring, [[0, half_y, 0], [0, -half_y, 0]]])
    faces = [((i, (i + 1) % 4, 4), ((i + 1) % 4, i, 5)) for i in range(4)]
    return Polyhedron(corners, tuple(face for pair in faces for face in pair))


def _prism(base_K2: np.ndarray, half_height: float) -> Polyhedron:
    """An upright prism over a polygon of (x, z), counter-clockwise seen from above (x right, z towards the viewer)."""
    n = len(base_K2)
    corners = np.array([[x, y, z] for y in (-half_height, half_height) for x, z in base_K2])
    sides = tuple((i, (i + 1) % n, n + (i + 1) % n, n + i) for i in range(n))
    return Polyhedron(corners, (tuple(reversed(range(n))), tuple(range(n, 2 * n)), *sides))


def _turn(
    radius: np.ndarray, y: np.ndarray, normal_r: np.ndarray, normal_y: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals [P, 3] from the half-plane, each turned by its angle about Y."""
    cos, sin = np.cos(angle), np.sin(angle)
    points = np.stack([radius * cos, y, radius * sin], axis=1)
    return points, np.stack([normal_r * cos, normal_y, normal_r * sin], axis=1)


def _revolve(profile_K2: np.ndarray, segments: int, closed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces of a turned profile: an open one begins and ends on the axis, a closed one never meets it."""
    angles = np.arange(segments) * 2 * np.pi / segments
    rings = profile_K2 if closed else profile_K2[1:-1]
    radius, y = rings[:, :1], np.repeat(rings[:, 1:], segments, axis=1)
    vertices = np.stack([radius * np.cos(angles), y, -radius * np.sin(angles)], axis=2).reshape(-1, 3)
    here = np.arange(segments)
    after = np.roll(here, -1)
    low = np.arange(len(rings) if closed else len(rings) - 1)[:, None] * segments
    high = (low + segments) % len(vertices)
    faces = [
        np.stack([low + here, low + after, high + after], axis=2).reshape(-1, 3),
        np.stack([low + here, high + after, high + here], axis=2).reshape(-1, 3),
    ]
    if not closed:
        top = len(vertices) - segments
        bottom_pole, top_pole = len(vertices), len(vertices) + 1
        vertices = np.concatenate([vertices, [[0, profile_K2[0, 1], 0], [0, profile_K2[-1, 1], 0]]])
        faces.append(np.stack([np.full(segments, bottom_pole), after, here], axis=1))
        faces.append(np.stack([top + here, top + after, np.full(segments, top_pole)], axis=1))
    return vertices, np.concatenate(faces)
