"""Points on a mesh's surface and signed distances around it, for any triangles: open, overlapping, flipped or doubled.

What is inside. From a point, rays go out in fixed directions, each with its opposite. A ray says "inside" if it
leaves through more backs of faces than it enters fronts; the point is inside if more than half of all directions say
so: where a few rays are undecided, the winding number gives the share to which endlessly many would tend. For closed
parts either is the same; overlapping parts are one solid, an opening is closed by a flat lid. A single sheet has no
inside and is given a thickness of .02. Which side of a face is its front is not taken from the file (fronts.py).

What is the surface. Points on a face with inside on both sides (one part stuck into another) are left out.

How exact. Distances are to triangles, the nearest of all that are shown, in float64. Where one face is partly hidden,
the distance may be to a hidden part of it: too small by at most the gap between samples (about .03 for an object that
fills the frame). The sign is right wherever the surface of a closed solid is 1e-3 away. On 50 watertight meshes with
2 % of their faces taken out at random it is wrong at .016 % of all samples: .015 % near the surface, .078 % of those
along edges and rims, .002 % elsewhere, .15 % of all on the worst mesh (launch/bench/sign.py).

Shapes: N points, D dense samples, F faces. Lengths are in object-frame units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from .edges import points_along, sharp_edges
from .fronts import find_fronts
from .mesh import Mesh, linear_to_srgb

__all__ = ["Field", "Solid", "Surface", "prepare", "sample_field", "sample_surface"]

DENSE_SAMPLES = 1 << 15
MOST_SAMPLES = 1 << 17
SIGN_RAYS = (8, 24)  # from a point in space: the second number where the first do not agree; even
SIDE_RAYS = (4, 24)  # from either side of a surface sample, likewise
UNDECIDED = 0.25  # from this near to one half on, the share of rays is corrected by the winding number
SHEET_MARGIN = 0.005  # over one half, for what is closed by a lid: right behind a sheet it is a hair less than one half
NEAR_SIGMAS = (0.015, 0.06)  # half of the near points with each
EDGE_SHARE = 0.25  # of the near points, around sharp edges
SHEET_HALF_THICKNESS = 0.01  # what a sheet is given on either side, so that it does not vanish
STEP_OFF = 1e-4  # from a surface, before casting a ray


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


def prepare() -> None:
    """Compile what this file runs on, where no earlier process has: seconds that a first mesh takes else."""
    corners = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    sample_field(Mesh.from_face_colors(corners, faces, np.zeros((4, 3))), 16, 16, np.random.default_rng(0))


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


def sample_field(
    shape: Mesh | Solid, n_near: int, n_uniform: int, rng: np.random.Generator, edge_share: float = EDGE_SHARE
) -> Field:
    """Signed distance and colour near the surface and everywhere in [-1, 1]^3.

    Near points are surface points moved by Gaussian noise of `NEAR_SIGMAS`, half each, then kept inside the cube.
    `edge_share` of them are points of sharp edges instead, uniform by length, moved likewise; where no sharp edge is to
    be seen all are surface points. All points are in random order.

    Args:
        shape: a mesh in the normalised object frame, or the `Solid` made of it.
        edge_share: in [0, 1]; 0 takes no account of edges.
    Raises: ValueError if the mesh has no area.
    """
    solid = _solid(shape)
    n_edge = round(edge_share * n_near) if edge_share and len(solid.sharp_edges) else 0
    near_N3 = _with_noise(solid.xyz[rng.integers(len(solid.xyz), size=n_near - n_edge)], rng)
    if n_edge:
        near_N3 = np.concatenate([near_N3, _with_noise(_along_edges(solid, n_edge, rng), rng)])
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
        # Here, for they import numba.
        from .bvh import Bvh
        from .crossings import Crossings

        self.mesh = _without_twins(mesh)
        rng = np.random.Generator(np.random.Philox(0))
        n_dense = max(n_dense, min(4 * len(self.mesh.faces), MOST_SAMPLES))
        face_D, barycentric_D3 = _area_weighted(self.mesh, n_dense, rng)
        self._front_F3 = find_fronts(self.mesh, _points_on(self.mesh, face_D, barycentric_D3), rng)
        self._crossings = Crossings(self.mesh.triangles, self._front_F3)
        # Faces so small that no sample fell on them are looked at too, each at its middle.
        missed_F = np.setdiff1d(np.arange(len(self.mesh.faces)), face_D)
        middle_F3 = np.full((len(missed_F), 3), 1 / 3, np.float32)
        face_N = np.concatenate([face_D, missed_F])
        looks = self._look_at(face_N, np.concatenate([barycentric_D3, middle_F3]))
        front_D, back_D = looks.front_N[:n_dense], looks.back_N[:n_dense]
        shown_N, sheet_N = looks.shown_N, looks.sheet_N
        self.hidden_share = float(np.mean(~front_D & ~back_D))
        self.sheet_share = float(np.mean(front_D & back_D))
        if not shown_N[:n_dense].any():  # all glass, or a shape that the rules above do not fit
            shown_N[:n_dense] = True
        shown_D = np.flatnonzero(shown_N[:n_dense])
        self._sheet_D = sheet_N[shown_D]
        self.xyz = looks.xyz_N3[shown_D].astype(np.float32)
        turned_D1 = np.where(back_D & ~front_D, -1, 1)[shown_D, None].astype(np.float32)
        self.normal = self._front_F3[face_D[shown_D]] * turned_D1
        self.rgb = np.rint(255 * looks.rgba_N4[shown_D, :3]).astype(np.uint8)
        # Hardly a surface point is further than this from its nearest sample: three times their mean distance.
        self._gap = 3 * np.sqrt(self.mesh.face_areas.sum() / n_dense)

        looks_F, shown_F, sheet_F = (
            np.bincount(face_N[which_N], minlength=len(self.mesh.faces))
            for which_N in (slice(None), shown_N, shown_N & sheet_N)
        )
        self._sheet_F = sheet_F > 0
        # Faces that differ from place to place: there the nearest sample tells.
        self._mixed_F = (shown_F < looks_F) | ((sheet_F > 0) & (sheet_F < shown_F))
        self._shown = np.flatnonzero(shown_F)
        self._shown_faces = Bvh(self.mesh.triangles[self._shown], self._front_F3[self._shown])

    @property
    def fronts(self) -> np.ndarray:
        """[F, 3] float32 normals of `mesh`, turned to the side from which each face is seen more often."""
        return self._front_F3

    @cached_property
    def sharp_edges(self) -> np.ndarray:
        """[E, 2, 3] float64 ends of `mesh`'s sharp edges, hidden ones included; see edges.py."""
        return sharp_edges(self.mesh)

    def shown(self, xyz_N3: np.ndarray) -> np.ndarray:
        """[N] bool, of points on the mesh: they are not inside, as there is a surface sample beside them."""
        return self._tree.query(xyz_N3, distance_upper_bound=self._gap)[0] < np.inf

    def inside(self, xyz_N3: np.ndarray) -> np.ndarray:
        """[N] bool: by `SIGN_RAYS`, and by the winding number where they are undecided."""
        from .bvh import Bvh

        share_N, _ = self._crossings.votes(xyz_N3, _lines(SIGN_RAYS[0]))
        open_M = np.flatnonzero((share_N > 0) & (share_N < 1))
        share_N[open_M], left_out_M = self._crossings.votes(xyz_N3[open_M], _lines(SIGN_RAYS[1]))
        undecided_M = np.abs(share_N[open_M] - 0.5) <= UNDECIDED
        open_K = open_M[undecided_M]
        if len(open_K):
            winding_K = Bvh(self.mesh.triangles, self._front_F3).winding_numbers(xyz_N3[open_K])
            share_N[open_K] = winding_K - left_out_M[undecided_M] - SHEET_MARGIN
        return share_N > 0.5

    def nearest(self, xyz_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance (float32 [N], not signed) to the surface, colour (uint8 [N, 3]) of its nearest point, and whether
        that is on a sheet (bool [N])."""
        shown_N, barycentric_N3, distance_N = self._shown_faces.closest(xyz_N3)
        face_N = self._shown[shown_N]
        sheet_N = self._sheet_F[face_N]
        mixed_M = np.flatnonzero(self._mixed_F[face_N])
        to_sample_M, sample_M = self._tree.query(xyz_N3[mixed_M])
        # The triangle's nearest point may be on a hidden part of it; no shown part is nearer than the gap allows.
        distance_N[mixed_M] = np.maximum(distance_N[mixed_M], to_sample_M - self._gap)
        sheet_N[mixed_M] = self._sheet_D[sample_M]
        rgba_N4 = self.mesh.albedo_linear(face_N, barycentric_N3.astype(np.float32))
        return distance_N.astype(np.float32), np.rint(255 * linear_to_srgb(rgba_N4[:, :3])).astype(np.uint8), sheet_N

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.xyz)

    def _look_at(self, face_N: np.ndarray, barycentric_N3: np.ndarray) -> _Looks:
        """What is on either side of points on faces, and their colours."""
        xyz_N3, normal_N3 = _points_on(self.mesh, face_N, barycentric_N3), self._front_F3[face_N]
        share_2N = np.array(self._crossings.votes_on_sides(xyz_N3, normal_N3, STEP_OFF, _lines(SIDE_RAYS[0])))
        # Empty in front and full behind is as it should be; what seems otherwise is looked at more closely.
        open_M = np.flatnonzero((share_2N[0] > 0) | (share_2N[1] < 1))
        step_M3 = STEP_OFF * normal_N3[open_M]
        beside_L3 = np.concatenate([xyz_N3[open_M] + step_M3, xyz_N3[open_M] - step_M3])
        share_2N[:, open_M] = self._crossings.votes(beside_L3, _lines(SIDE_RAYS[1]))[0].reshape(2, -1)
        front_N, back_N = share_2N <= 0.5
        return _Looks(xyz_N3, front_N, back_N, self.mesh.albedo(face_N, barycentric_N3))


@dataclass(frozen=True)
class _Looks:
    """N points on faces: xyz_N3, whether it is outside in front and at the back of them, and rgba_N4, albedo."""

    xyz_N3: np.ndarray
    front_N: np.ndarray
    back_N: np.ndarray
    rgba_N4: np.ndarray

    @property
    def shown_N(self) -> np.ndarray:
        return (self.front_N | self.back_N) & (self.rgba_N4[:, 3] >= 0.5)

    @property
    def sheet_N(self) -> np.ndarray:
        return self.front_N & self.back_N


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


def _points_on(mesh: Mesh, face_N: np.ndarray, barycentric_N3: np.ndarray) -> np.ndarray:
    return np.einsum("nkc,nk->nc", mesh.triangles[face_N], barycentric_N3)


def _along_edges(solid: Solid, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3] points of sharp edges that are not hidden; of the surface where there are none."""
    xyz_N3 = points_along(solid.sharp_edges, n, rng)
    xyz_M3 = xyz_N3[solid.shown(xyz_N3)]
    # Each is used as often as it takes to have n; the noise sets them apart.
    return np.resize(xyz_M3, (n, 3)) if len(xyz_M3) else solid.xyz[rng.integers(len(solid.xyz), size=n)]


def _with_noise(xyz_N3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved by Gaussian noise of `NEAR_SIGMAS`, an equal part with each."""
    n = len(xyz_N3)
    sigma_N1 = np.resize(np.repeat(NEAR_SIGMAS, -(-n // len(NEAR_SIGMAS))), (n, 1))
    return xyz_N3 + sigma_N1 * rng.standard_normal((n, 3))


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


def _unit(vectors_N3: np.ndarray) -> np.ndarray:
    return (vectors_N3 / np.linalg.norm(vectors_N3, axis=-1, keepdims=True)).astype(np.float32)


def _lines(n_rays: int) -> np.ndarray:
    """[n_rays / 2, 3] directions of lines spread over a half sphere (Fibonacci's spiral); each carries two rays."""
    n = n_rays // 2
    i = np.arange(n) + 0.5
    z, angle = i / n, np.pi * (1 + 5**0.5) * i
    radius = np.sqrt(1 - z * z)
    half = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    # Turned away from the axes, along which man-made faces lie.
    turn = _unit(np.array([[0.8, 0.3, 0.52], [-0.3, 0.9, -0.1]]))
    x = turn[0]
    y = _unit(turn[1] - x * (x @ turn[1]))
    return half @ np.stack([x, y, np.cross(x, y)])
