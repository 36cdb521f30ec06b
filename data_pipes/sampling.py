"""Points on a mesh's surface and signed distances around it, for any triangles: open, overlapping, flipped or doubled.

What is inside. From a point, rays go out in fixed directions, each with its opposite. A ray says "inside" if it
leaves through more backs of faces than it enters fronts; the point is inside if more than half of the rays say so.
For closed parts that is the winding number; overlapping parts are one solid, an opening is closed by a flat lid. A
single sheet has no inside and is given a thickness of .02. Which side of a face is its front is not taken from the
file: faces are seen from far away all around, and the side seen more often is the front; unseen faces follow the part
that they belong to.

What is the surface. Points on a face with inside on both sides (one part stuck into another) are left out.

How exact. Distances are to triangles, and exact but for two things, both bounded by the gap between the samples that
find the triangles (about .03 for an object that fills the frame): a face so small that no sample fell on it may be
missed, and deep inside overlapping parts the distance may be too small. Measured in tests/test_sampling.py on closed
solids: mean error below 2e-4 (that of the polyhedron itself), the sign right wherever the surface is 1e-3 away.

Shapes: N points, D dense samples, F faces, K directions. Lengths are in object-frame units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from .mesh import Mesh, linear_to_srgb
from .render import RayScene

__all__ = ["Field", "Solid", "Surface", "sample_field", "sample_surface"]

DENSE_SAMPLES = 1 << 15
MOST_SAMPLES = 1 << 17
SIGN_RAYS = (8, 24)  # from a point in space: the second number where the first do not agree; even
SIDE_RAYS = (4, 24)  # from either side of a surface sample, likewise
FRONT_RAYS = 4  # per surface sample, from far away
CANDIDATES = 8  # nearest samples whose triangles are measured exactly
NEAR_SIGMAS = (0.015, 0.06)  # half of the near points with each
SHEET_HALF_THICKNESS = 0.01  # what a sheet is given on either side, so that it does not vanish
STEP_OFF = 1e-4  # from a surface, before casting a ray
STEP_ON = 1e-5  # behind a surface, before casting on
MAX_CROSSINGS = 16  # along one ray


@dataclass(frozen=True)
class Surface:
    """xyz float32 [N, 3]; normal float32 [N, 3], unit, outwards; rgb uint8 [N, 3], sRGB albedo."""

    xyz: np.ndarray
    normal: np.ndarray
    rgb: np.ndarray


@dataclass(frozen=True)
class Field:
    """xyz float32 [N, 3]; sdf float32 [N], negative inside; rgb uint8 [N, 3], albedo of the nearest surface point."""

    xyz: np.ndarray
    sdf: np.ndarray
    rgb: np.ndarray


def sample_surface(shape: Mesh | Solid, n: int, rng: np.random.Generator) -> Surface:
    """Points on the outer surface, uniform by area, in random order.

    Args:
        shape: a mesh in the normalised object frame, or the `Solid` made of it (saves time when both are sampled).
    Raises: ValueError if the mesh has no area.
    """
    solid = _solid(shape)
    # Without repetition while there are enough; otherwise every sample equally often.
    count = len(solid.xyz)
    picked = np.concatenate([rng.permutation(count) for _ in range(-(-n // count))] or [np.zeros(0, int)])[:n]
    return Surface(solid.xyz[picked], solid.normal[picked], solid.rgb[picked])


def sample_field(shape: Mesh | Solid, n_near: int, n_uniform: int, rng: np.random.Generator) -> Field:
    """Signed distance and colour near the surface and everywhere in [-1, 1]^3.

    Near points are surface points moved by Gaussian noise of `NEAR_SIGMAS`, half each, then kept inside the cube.
    Points are in random order.

    Args:
        shape: a mesh in the normalised object frame, or the `Solid` made of it.
    Raises: ValueError if the mesh has no area.
    """
    solid = _solid(shape)
    sigma_N1 = np.resize(np.repeat(NEAR_SIGMAS, -(-n_near // len(NEAR_SIGMAS))), (n_near, 1))
    near_N3 = solid.xyz[rng.integers(len(solid.xyz), size=n_near)] + sigma_N1 * rng.standard_normal((n_near, 3))
    xyz_N3 = np.concatenate([np.clip(near_N3, -1, 1), rng.uniform(-1, 1, (n_uniform, 3))])
    xyz_N3 = rng.permutation(xyz_N3).astype(np.float32)
    distance_N, rgb_N3, sheet_N = solid.nearest(xyz_N3)
    outside_N = np.where(sheet_N, distance_N - SHEET_HALF_THICKNESS, distance_N)
    return Field(xyz_N3, np.where(solid.inside(xyz_N3), -distance_N, outside_N).astype(np.float32), rgb_N3)


class Solid:
    """A mesh made ready for sampling: fronts found, hidden surface left out. Deterministic.

    Args:
        mesh: in the normalised object frame, so that the lengths above fit.
        n_dense: surface samples to begin with; more are taken for meshes of many faces.
    Attributes:
        xyz, normal, rgb: `n_dense` or more surface samples, less the hidden ones, as in `Surface`.
        hidden_share, sheet_share: parts of the area that lie inside the solid, and that have no inside on either side.
    """

    def __init__(self, mesh: Mesh, n_dense: int = DENSE_SAMPLES) -> None:
        self.mesh = _without_twins(mesh)
        self._scene = RayScene(self.mesh)
        rng = np.random.Generator(np.random.Philox(0))
        n_dense = max(n_dense, min(4 * len(self.mesh.faces), MOST_SAMPLES))
        face_D, barycentric_D3 = _area_weighted(self.mesh, n_dense, rng)
        xyz_D3 = np.einsum("dkc,dk->dc", self.mesh.triangles[face_D], barycentric_D3)
        self._front_F3 = self._find_fronts(xyz_D3, rng)
        normal_D3 = self._front_F3[face_D]
        front_D, back_D = (~self.inside(xyz_D3 + side * STEP_OFF * normal_D3, SIDE_RAYS) for side in (1, -1))
        rgba_D4 = self.mesh.albedo(face_D, barycentric_D3)
        self.hidden_share = float(np.mean(~front_D & ~back_D))
        self.sheet_share = float(np.mean(front_D & back_D))
        kept_D = (front_D | back_D) & (rgba_D4[:, 3] >= 0.5)
        if not kept_D.any():  # all glass, or a shape that the rules above do not fit
            kept_D[:] = True
        turned_D1 = np.where(back_D & ~front_D, -1, 1)[:, None].astype(np.float32)
        self.xyz = xyz_D3[kept_D].astype(np.float32)
        self.normal = (normal_D3 * turned_D1)[kept_D]
        self.rgb = np.rint(255 * rgba_D4[kept_D, :3]).astype(np.uint8)
        self._face_D, self._sheet_D = face_D[kept_D], (front_D & back_D)[kept_D]
        self._tree = cKDTree(self.xyz)
        # Hardly a surface point is further than this from its nearest sample: three times their mean distance.
        self._gap = 3 * np.sqrt(self.mesh.face_areas.sum() / n_dense)

    @property
    def fronts(self) -> np.ndarray:
        """[F, 3] float32 normals of `mesh`, turned to the side from which each face is seen more often."""
        return self._front_F3

    def inside(self, xyz_N3: np.ndarray, rays: tuple[int, int] = SIGN_RAYS) -> np.ndarray:
        """[N] bool; `rays` for all points, and for those whose first rays do not agree."""
        share_N = np.zeros(len(xyz_N3))
        open_M = np.arange(len(xyz_N3))
        for count in rays:
            xyz_M3, votes_M = xyz_N3[open_M], np.zeros(len(open_M))
            for direction_3 in _sphere_pairs(count):
                votes_M += self._leaves(xyz_M3, np.broadcast_to(direction_3, xyz_M3.shape))
            share_N[open_M] = votes_M / count
            open_M = np.flatnonzero((share_N > 0) & (share_N < 1))
        return share_N > 0.5

    def nearest(self, xyz_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance (float32 [N], not signed) to the surface, colour (uint8 [N, 3]) of its nearest point, and whether
        that is on a sheet (bool [N])."""
        k = min(CANDIDATES, len(self.xyz))
        sample_NK = self._tree.query(xyz_N3, k=np.arange(1, k + 1))[1]
        face_NK = self._face_D[sample_NK]
        barycentric_NK3 = _closest_barycentric(xyz_N3[:, None], self.mesh.triangles[face_NK])
        closest_NK3 = np.einsum("nkvc,nkv->nkc", self.mesh.triangles[face_NK], barycentric_NK3)
        distance_NK = np.linalg.norm(closest_NK3 - xyz_N3[:, None], axis=2)
        best_N1 = distance_NK.argmin(axis=1)[:, None]
        exact_N = np.take_along_axis(distance_NK, best_N1, axis=1)[:, 0]
        to_sample_N = np.linalg.norm(self.xyz[sample_NK[:, 0]] - xyz_N3, axis=1)
        rgba_N4 = self.mesh.albedo_linear(
            np.take_along_axis(face_NK, best_N1, axis=1)[:, 0],
            np.take_along_axis(barycentric_NK3, best_N1[:, :, None], axis=1)[:, 0],
        )
        rgb_N3 = np.rint(255 * linear_to_srgb(rgba_N4[:, :3])).astype(np.uint8)
        # The triangle's nearest point may be on a hidden part of it; no shown part is nearer than the gap allows.
        distance_N = np.maximum(exact_N, to_sample_N - self._gap).astype(np.float32)
        return distance_N, rgb_N3, self._sheet_D[sample_NK[:, 0]]

    def _leaves(self, origin_N3: np.ndarray, direction_N3: np.ndarray) -> np.ndarray:
        """[N] bool: the ray meets more backs of faces than fronts."""
        net_N = np.zeros(len(origin_N3), np.int32)
        live_M, origin_M3, direction_M3 = np.arange(len(origin_N3)), origin_N3, direction_N3
        for _ in range(MAX_CROSSINGS):
            hits = self._scene.cast(origin_M3, direction_M3)
            if not len(hits.ray_M):
                break
            live_M, direction_M3 = live_M[hits.ray_M], direction_M3[hits.ray_M]
            net_N[live_M] += np.where(_dot(self._front_F3[hits.face_M], direction_M3) > 0, 1, -1)
            origin_M3 = origin_M3[hits.ray_M] + direction_M3 * (hits.distance_M + STEP_ON)[:, None]
        return net_N > 0

    def _find_fronts(self, xyz_D3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[F, 3] normals turned to the side from which each face is seen more often."""
        far = 4 * max(1.0, float(np.abs(xyz_D3).max()))
        votes_F = np.zeros(len(self.mesh.faces))
        for _ in range(FRONT_RAYS):
            direction_D3 = _unit(rng.standard_normal(xyz_D3.shape, np.float32))
            hits = self._scene.cast(xyz_D3 - far * direction_D3, direction_D3)
            facing_M = -np.sign(_dot(self.mesh.face_normals[hits.face_M], direction_D3[hits.ray_M]))
            votes_F += np.bincount(hits.face_M, facing_M, len(votes_F))
        part_F = _parts(self.mesh)
        part_votes = np.bincount(part_F, votes_F)
        turn_F = np.where(votes_F != 0, votes_F, part_votes[part_F]) < 0
        return np.where(turn_F[:, None], -self.mesh.face_normals, self.mesh.face_normals)


def _solid(shape: Mesh | Solid) -> Solid:
    return shape if isinstance(shape, Solid) else Solid(shape)


def _area_weighted(mesh: Mesh, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Faces [n] and barycentrics [n, 3] of points spread evenly by area (stratified, so large faces miss none)."""
    cumulative_F = np.cumsum(mesh.face_areas)
    if not len(cumulative_F) or not cumulative_F[-1] > 0:
        raise ValueError("a mesh without area has no surface to sample")
    at_N = (np.arange(n) + rng.random(n)) / n * cumulative_F[-1]
    face_N = np.minimum(np.searchsorted(cumulative_F, at_N, side="right"), len(cumulative_F) - 1)
    root_N, v_N = np.sqrt(rng.random(n)), rng.random(n)
    return face_N, np.stack([1 - root_N, root_N * (1 - v_N), root_N * v_N], axis=1).astype(np.float32)


def _equal_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each group of equal rows (indices), and the number of every row's group."""
    order = np.lexsort(rows.T)
    new = np.ones(len(rows), bool)
    new[1:] = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    group = np.empty(len(rows), np.int64)
    group[order] = np.cumsum(new) - 1
    return order[new], group


def _without_twins(mesh: Mesh) -> Mesh:
    """Faces in the same place kept once, faces without area dropped, corners in the same place joined."""
    first, place_V = _equal_rows(mesh.vertices)
    faces_F3 = place_V[mesh.faces]
    kept = np.sort(_equal_rows(np.sort(faces_F3, axis=1))[0])
    kept = kept[mesh.face_areas[kept] > 0]
    return Mesh(
        mesh.vertices[first],
        faces_F3[kept],
        mesh.face_material[kept],
        mesh.materials,
        None if mesh.corner_uv is None else mesh.corner_uv[kept],
        None if mesh.corner_rgba is None else mesh.corner_rgba[kept],
    )


def _parts(mesh: Mesh) -> np.ndarray:
    """[F] the number of the connected part that each face belongs to."""
    a, b = mesh.faces[:, [0, 1]].ravel(), mesh.faces[:, [1, 2]].ravel()
    graph = coo_matrix((np.ones(len(a), bool), (a, b)), shape=(len(mesh.vertices),) * 2)
    return connected_components(graph, directed=False)[1][mesh.faces[:, 0]]


def _closest_barycentric(p: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Barycentrics [..., 3] of the point of each triangle [..., 3, 3] that is nearest to p [..., 3].

    The nearest point of the plane where it falls inside, else the best of the three edges.
    """
    p, triangles = p.astype(np.float64), triangles.astype(np.float64)  # thin triangles need it
    a, b, c = (triangles[..., i, :] for i in range(3))
    ab, ac, ap = b - a, c - a, p - a
    d00, d01, d11 = _dot(ab, ab), _dot(ab, ac), _dot(ac, ac)
    d20, d21 = _dot(ap, ab), _dot(ap, ac)
    determinant = np.maximum(d00 * d11 - d01 * d01, 1e-30)
    v, w = (d11 * d20 - d01 * d21) / determinant, (d00 * d21 - d01 * d20) / determinant
    best = np.stack([1 - v - w, v, w], axis=-1)
    outside = np.nonzero((best < 0).any(axis=-1) | (d00 * d11 - d01 * d01 <= 1e-12 * d00 * d11))
    corners, point = triangles[outside], np.broadcast_to(p, a.shape)[outside]
    nearest = np.full(len(point), np.inf)
    chosen = np.zeros((len(point), 3), best.dtype)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        edge, to_point = corners[:, j] - corners[:, i], point - corners[:, i]
        along = np.clip(_dot(to_point, edge) / np.maximum(_dot(edge, edge), 1e-30), 0, 1)
        distance = np.linalg.norm(to_point - along[:, None] * edge, axis=1)
        nearer = distance < nearest
        nearest[nearer] = distance[nearer]
        chosen[nearer] = 0
        chosen[nearer, i], chosen[nearer, j] = 1 - along[nearer], along[nearer]
    best[outside] = chosen
    return best


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...c,...c->...", a, b)


def _unit(vectors_N3: np.ndarray) -> np.ndarray:
    return (vectors_N3 / np.linalg.norm(vectors_N3, axis=-1, keepdims=True)).astype(np.float32)


def _sphere_pairs(n: int) -> np.ndarray:
    """[n, 3] directions spread over the sphere (Fibonacci's spiral on one half, and their opposites)."""
    i = np.arange(n // 2) + 0.5
    z, angle = i / (n // 2), np.pi * (1 + 5**0.5) * i
    radius = np.sqrt(1 - z * z)
    half = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    # Turned away from the axes, along which man-made faces lie.
    turn = _unit(np.array([[0.8, 0.3, 0.52], [-0.3, 0.9, -0.1]]))
    x = turn[0]
    y = _unit(turn[1] - x * (x @ turn[1]))
    half = half @ np.stack([x, y, np.cross(x, y)])
    return np.concatenate([half, -half]).astype(np.float32)
