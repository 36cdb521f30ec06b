"""Which assets are the same object again: moved, turned, scaled or mirrored, or written by another programme.

A worker makes a `signature` of each asset; `find_duplicates` compares those of a whole dataset.

The shape's part are invariants of the surface's moment tensors. About the area's centroid, in units of the area's RMS
radius, with the mean taken over the area,

    M(p, k) = E[ |x|^(p - k)  x (x) ... (x) x ]        k factors; k = p, p - 2, ... >= 0; p = 2 ... 6:

the eigenvalues for k = 2, the norm else. None changes when x is rotated or mirrored (so a mirror image counts as the
same, as a left shoe and a right one do). They are integrals of polynomials over triangles, done exactly: it does not
matter how the surface is cut into triangles, how they are wound and in which order they come. (Moment invariants: Lo
and Don, "3-D moment forms", PAMI 1989, there of volumes.)
The colours' part is the mean, the spread and the covariance with |x|^2 of the albedo over the surface; textures are
sampled at some thousand points, so it is not exact.

Measured on 1,898 real game props, the largest difference of any number between an asset and its copy. Turned, moved,
scaled and cut into four times the triangles (300 assets): 2e-6 of the shape, 0.0024 of the colours. Through STL, PLY
and GLB (150): 4e-7 of the shape; through OBJ with 6 decimals, scaled by 0.01 to 100: 3e-5 in 99 of 100. Different
assets: three pairs nearer than 1e-5, all recoloured copies; then 1e-4 (a doughnut, with and without icing), 3e-4
(two sorts of ice cream), 6e-4 (a sword, revised), 1.0e-3 (two plain round carpets), 1.4e-3 (a chest of two drawers and
one of three). Of the recoloured, a rug and the same with stripes are 0.013 apart in colour, while GLBs that trimesh
saved again with base colours of 8 bits are at most 0.008 (of 60). Hence the tolerances. Programmes that write linear
colours where sRGB is meant change them by 0.2 and more: such copies are found by shape.
Not found: copies whose rounding makes faces coincide that did not (1 of 150, a bed whose planks touch), copies with
anything added, however small, and those bent or stretched.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from .mesh import Mesh, linear_to_srgb

__all__ = ["SIGNATURE_SIZE", "Duplicate", "find_duplicates", "signature"]

# Dunavant, "High degree efficient symmetrical Gaussian quadrature rules for the triangle", IJNME 1985: degree 6.
# Weight, barycentric coordinates of which every permutation is a point.
_RULE = (
    (0.116786275726379, (0.501426509658179, 0.249286745170910, 0.249286745170910)),
    (0.050844906370207, (0.873821971016996, 0.063089014491502, 0.063089014491502)),
    (0.082851075618374, (0.053145049844817, 0.310352451033784, 0.636502499121399)),
)
_AT_Q3 = np.array([at for _, corners in _RULE for at in sorted(set(itertools.permutations(corners)))])
_WEIGHT_Q = np.repeat([weight for weight, _ in _RULE], [3, 3, 6])
_AT_ONCE = 256  # faces, so that their monomials stay in the cache
_COLOUR_POINTS = 4096  # about so many are spread over the surface, and at least one a face

_EXPONENTS = [e for k in range(4) for e in itertools.product(range(k + 1), repeat=3) if sum(e) == k]
# For k factors, the monomial in each of the 3^k places of the tensor.
_PLACES = [
    np.array([_EXPONENTS.index(tuple(map(word.count, range(3)))) for word in itertools.product(range(3), repeat=k)])
    for k in range(4)
]


def _lower(exponents: tuple[int, ...]) -> tuple[int, int]:
    """A monomial as a lower one (its index) times a coordinate."""
    axis = next(axis for axis in range(3) if exponents[axis])
    return _EXPONENTS.index(tuple(e - (i == axis) for i, e in enumerate(exponents))), axis


_FACTORS = {m: _lower(exponents) for m, exponents in enumerate(_EXPONENTS) if any(exponents)}
SHAPE_SIZE = 16
SHAPE_TOLERANCE = 2e-4
COLOUR_TOLERANCE = 0.01
CELLS = 8  # to a tolerance, along each axis
QUERIES = 1 << 16  # to the tree at once
SIGNATURE_SIZE = SHAPE_SIZE + 9


def signature(mesh: Mesh) -> np.ndarray:
    """float32 [25]: 16 numbers about the shape, 9 about its colours.

    Args:
        mesh: in any frame; each of its faces once, as in `Solid.mesh`, or copies with and without twins differ.
    Raises: ValueError for a mesh without area.
    """
    area = mesh.face_areas.sum()
    if not area > 0:
        raise ValueError("a mesh without area has no signature")
    corners_F33 = mesh.triangles.astype(np.float64)
    corners_F33 -= (mesh.face_areas @ corners_F33.reshape(-1, 9)).reshape(3, 3).sum(axis=0) / (3 * area)
    moments = _moments(corners_F33, mesh.face_areas) / area
    radius = np.trace(_tensor(moments, 2)) ** 0.5
    return np.concatenate([_shape(moments, radius), _colours(mesh, corners_F33 / radius)]).astype(np.float32)


def _moments(corners_F33: np.ndarray, area_F: np.ndarray) -> np.ndarray:
    """[20, 20] integrals over the surface of the products of any two monomials of degree 3 or less."""
    total = np.zeros((len(_EXPONENTS),) * 2)
    buffer = np.empty((len(_EXPONENTS), len(_AT_Q3), min(_AT_ONCE, len(area_F))))
    for start in range(0, len(area_F), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        xyz_3QF = _AT_Q3 @ corners_F33[some].transpose(2, 1, 0)
        monomials_MQF = buffer[:, :, : xyz_3QF.shape[2]]
        monomials_MQF[0] = np.sqrt(_WEIGHT_Q[:, None] * area_F[some])  # half of it in each of the two factors
        for m, (lower, axis) in _FACTORS.items():
            np.multiply(monomials_MQF[lower], xyz_3QF[axis], out=monomials_MQF[m])
        rows = monomials_MQF.reshape(len(_EXPONENTS), -1)
        total += rows @ rows.T
    return total


def _tensor(moments: np.ndarray, degree: int) -> np.ndarray:
    """E[x (x) ... (x) x] with `degree` factors, of shape [3, 3, ...]."""
    left, right = _PLACES[degree // 2], _PLACES[degree - degree // 2]
    return moments[np.ix_(left, right)].reshape((3,) * degree)


def _shape(moments: np.ndarray, radius: float) -> np.ndarray:
    """[16] the numbers of the module's docstring, all in [0, 1]."""
    norms: dict[tuple[int, int], float] = {}
    axes: dict[int, np.ndarray] = {}
    for degree in range(2, 7):
        tensor = _tensor(moments, degree) / radius**degree
        for factors in range(degree, -1, -2):
            norms[degree, factors] = float(np.linalg.norm(tensor))
            if factors == 2:
                axes[degree] = np.linalg.eigvalsh(tensor)[:2]
            tensor = np.trace(tensor) if factors >= 2 else tensor
    fourth, sixth = norms[4, 0], norms[6, 0]
    most = {2: 1.0, 3: fourth**0.75, 4: fourth, 5: sixth ** (5 / 6), 6: sixth}  # Hölder: norms of that degree reach it
    rest = [norm / most[degree] for (degree, factors), norm in norms.items() if factors not in (0, 2)]
    return np.array(
        [*(x / most[degree] for degree in axes for x in axes[degree]), fourth**-0.5, fourth**1.5 / sixth, *rest]
    )


def _colours(mesh: Mesh, corners_F33: np.ndarray) -> np.ndarray:
    """[9] the mean (as sRGB), the spread and the covariance with |x|^2 of red, green and blue; by opacity."""
    face_N, barycentric_N3, area_N = _spread(mesh.face_areas)
    red, green, blue, alpha_N = mesh.albedo_linear(face_N, barycentric_N3).T.astype(np.float64)
    weight_N = area_N * np.maximum(alpha_N, 1e-6)  # what is clear has no colour, unless nothing else is there
    weight_N /= weight_N.sum()
    squared_N = np.square(np.einsum("nk,nkc->cn", barycentric_N3, corners_F33.take(face_N, axis=0))).sum(axis=0)
    rgb_3N = np.stack([red, green, blue])
    mean_3 = rgb_3N @ weight_N
    rgb_3N -= mean_3[:, None]
    return np.concatenate(
        [linear_to_srgb(mean_3), np.sqrt(np.square(rgb_3N) @ weight_N), rgb_3N @ (weight_N * (squared_N - 1))]
    )


def _spread(area_F: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres of parts of faces, more on larger faces: face [N], barycentrics [N, 3] and the part's area [N]."""
    cuts_F = np.ceil(np.sqrt(_COLOUR_POINTS * area_F / area_F.sum())).astype(int).clip(1)
    parts = []
    for cuts in np.unique(cuts_F):
        faces = np.flatnonzero(cuts_F == cuts)
        i_LL, j_LL = np.mgrid[:cuts, :cuts]
        upright = i_LL + j_LL < cuts
        upturned = i_LL + j_LL < cuts - 1
        ij_P2 = np.concatenate([np.stack([i_LL[w], j_LL[w]], 1) + s for w, s in ((upright, 1 / 3), (upturned, 2 / 3))])
        barycentric_P3 = np.column_stack([ij_P2, cuts - ij_P2.sum(axis=1)]) / cuts
        parts.append(
            (
                np.repeat(faces, len(ij_P2)),
                np.tile(barycentric_P3, (len(faces), 1)),
                np.repeat(area_F[faces] / len(ij_P2), len(ij_P2)),
            )
        )
    face_N, barycentric_N3, area_N = (np.concatenate(arrays) for arrays in zip(*parts))
    return face_N, barycentric_N3, area_N


@dataclass(frozen=True)
class Duplicate:
    """One asset that an earlier one, `of`, is already; numbers are rows of what `find_duplicates` was given."""

    number: int
    of: int
    same: Literal["shape and colours", "shape"]


def find_duplicates(
    signatures: np.ndarray,
    *,
    shape_tolerance: float = SHAPE_TOLERANCE,
    colour_tolerance: float = COLOUR_TOLERANCE,
) -> list[Duplicate]:
    """The assets that are earlier ones again, in their order.

    The first of a group is the original and all others are compared with it, so that no chain of small steps makes one
    group of different objects. "shape and colours" goes before "shape": of red, blue, blue, the second is the first's
    shape and the third is the second again. A number in `of` can thus be a duplicate, but only one of shape.

    N log N in time as long as no group is spread over many cells of an eighth of a tolerance; some 600
    bytes an asset beyond the 100 of its signature (ten million: 7 GB), and 40 microseconds.

    Args:
        signatures: [N, 25] of `signature`.
        shape_tolerance, colour_tolerance: how far any of the numbers may be apart, to an eighth; 1e-7 at least.
    Raises: ValueError for another shape, numbers that are not finite, or smaller tolerances.
    """
    if min(shape_tolerance, colour_tolerance) < 1e-7:
        raise ValueError(f"tolerances must be 1e-7 at least, got {shape_tolerance} and {colour_tolerance}")
    signatures = np.asarray(signatures)
    if signatures.shape[1:] != (SIGNATURE_SIZE,) or not np.isfinite(signatures).all():
        raise ValueError(f"signatures must be finite and [N, {SIGNATURE_SIZE}], got {list(signatures.shape)}")
    tolerance = np.repeat([shape_tolerance, colour_tolerance], [SHAPE_SIZE, SIGNATURE_SIZE - SHAPE_SIZE])
    scaled_ND = signatures / tolerance.astype(np.float32)
    original_N = _first_within(scaled_ND)
    full_N = original_N != np.arange(len(signatures))
    distinct_M = np.flatnonzero(~full_N)
    original_N[distinct_M] = distinct_M[_first_within(scaled_ND[distinct_M, :SHAPE_SIZE])]
    return [
        Duplicate(i, int(original_N[i]), "shape and colours" if full_N[i] else "shape")
        for i in np.flatnonzero(original_N != np.arange(len(signatures))).tolist()
    ]


def _first_within(points_ND: np.ndarray) -> np.ndarray:
    """[N] for each point an original at most 1 away along every axis (to a cell), itself if there is none before it."""
    # Points of one cell are taken as one: among thousands of copies, a tree finds the nearest by looking at them all.
    cells = np.rint(points_ND * CELLS).astype(np.int32).view(f"V{4 * points_ND.shape[1]}")[:, 0]
    _, place_M, cell_N = np.unique(cells, return_index=True, return_inverse=True)
    del cells
    order_M = np.argsort(place_M)
    place_M = place_M[order_M]
    first_M = _leaders(points_ND[place_M])
    rank_M = np.empty_like(order_M)
    rank_M[order_M] = np.arange(len(order_M))
    return place_M[first_M[rank_M[cell_N]]]


def _leaders(points_ND: np.ndarray) -> np.ndarray:
    """As `_first_within`, for points no two of which are equal."""
    first_N, taken_N = np.arange(len(points_ND)), np.zeros(len(points_ND), bool)
    if not len(points_ND):
        return first_N
    tree = cKDTree(points_ND)
    for start in range(0, len(points_ND), QUERIES):
        some = points_ND[start : start + QUERIES]
        (next_N1, _) = tree.query(some, k=[2], p=np.inf, distance_upper_bound=1)
        for i in start + np.flatnonzero(np.isfinite(next_N1[:, 0])):
            if not taken_N[i]:
                ball = np.array(tree.query_ball_point(points_ND[i], 1, p=np.inf))
                ball = ball[(ball > i) & ~taken_N[ball]]
                first_N[ball], taken_N[ball] = i, True
    return first_N
