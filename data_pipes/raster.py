"""Which surface each sample of a picture sees: triangles filled in homogeneous coordinates, with a depth buffer.

A sample at (x, y) of the image plane is the ray r = (x, y, 1) through the eye. With the corners p_i of a triangle in
the same coordinates (x = focal * right, y = focal * down, w = depth), r = sum l_i p_i where l_i = e_i(x, y) / det and
e_i = (p_j x p_k) . r is linear in the image. The ray meets the triangle in front of the eye just where no l_i is
negative, so that triangles through the eye's plane need no clipping (Olano and Greer, "Triangle scan conversion using
2D homogeneous coordinates", 1997). Barycentrics are e_i / sum e, 1 / depth is sum e / det.

Two faces that share an edge compute its e from the same two corners in opposite order: the same float64 with opposite
sign. Together with a rule for zero, each sample beside or on the edge falls to exactly one of them.

Shapes: V vertices, F faces, S samples of the whole picture (row by row), K samples that meet a surface.
"""

from __future__ import annotations

import math

import numpy as np
from numba import boolean, float32, float64, int32, int64, types

from .compiled import array, compiled, inlined

__all__ = ["visible"]

_WIDE = 8  # samples; from here on a row's ends are computed rather than searched


Corner = tuple[float, float, float]


@inlined
def _corner(points_V3: np.ndarray, vertex: int) -> Corner:
    return points_V3[vertex, 0], points_V3[vertex, 1], points_V3[vertex, 2]


@inlined
def _edge(p: Corner, q: Corner) -> Corner:
    """The cross product of two corners; exactly its opposite when they are swapped."""
    return p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]


@inlined
def _owns(a: float, b: float) -> bool:
    """Samples on an edge belong to the face on its right, or below it: to one of the two that share it."""
    return a > 0 or (a == 0 and b > 0)


@inlined
def _row_ends(first: int, last: int, a: float, rest: float, half: float, s: int) -> tuple[int, int]:
    """Narrow a row's samples to those with a x + rest >= 0, with one to spare at the end."""
    if a == 0:
        return (first, last) if rest >= 0 else (1, 0)
    at = (half - rest / a) * s - 0.5
    if a > 0:
        if at > first + 1:
            first = int(min(at, last + 2.0)) - 1
    elif at < last - 1:
        last = int(max(at, first - 2.0)) + 1
    return first, last


@inlined
def _grid(points_V3: np.ndarray, width: int, height: int, s: int) -> np.ndarray:
    """[V, 3] where vertices in front of the eye fall, in samples (0 is the middle of the first), and their 1 / depth;
    of others, nothing.
    """
    grid_V3 = np.empty((len(points_V3), 3))
    for vertex in range(len(points_V3)):
        inverse = 1 / points_V3[vertex, 2]
        grid_V3[vertex, 0] = points_V3[vertex, 0] * inverse * s + (width * s - 1) / 2
        grid_V3[vertex, 1] = points_V3[vertex, 1] * inverse * s + (height * s - 1) / 2
        grid_V3[vertex, 2] = inverse
    return grid_V3


@inlined
def _middles(n: int, s: int) -> np.ndarray:
    """[n * s] coordinates of the samples along an axis of n pixels, in pixels from the picture's middle."""
    middle_C = np.empty(n * s)
    for i in range(n * s):
        middle_C[i] = (i + 0.5) / s - n / 2
    return middle_C


@inlined
def _fill(
    points_V3: np.ndarray, faces_F3: np.ndarray, width: int, height: int, s: int, limit_S: np.ndarray
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """[S] the face that each sample sees first of those with 1 / depth below its limit, or -1; and the columns and rows
    (from, up to) outside which there is none.
    """
    columns, rows = width * s, height * s
    grid_V3 = _grid(points_V3, width, height, s)
    x_C, y_R = _middles(width, s), _middles(height, s)
    face_S = np.full(rows * columns, -1, np.int32)
    nearest_S = np.zeros(rows * columns, np.float32)  # 1 / depth
    i_from, i_to, j_from, j_to = columns, 0, rows, 0
    # By the file's winding the fronts come first: they hide most of the backs, which then cost little. It need not be
    # right.
    for turned in (False, True):
        for face in range(len(faces_F3)):
            v0, v1, v2 = faces_F3[face, 0], faces_F3[face, 1], faces_F3[face, 2]
            p, q, r = _corner(points_V3, v0), _corner(points_V3, v1), _corner(points_V3, v2)
            a0, b0, c0 = _edge(q, r)
            det = p[0] * a0 + p[1] * b0 + p[2] * c0
            if det == 0 or (det > 0) != turned:
                continue
            lowest, highest = min(p[2], q[2], r[2]), max(p[2], q[2], r[2])
            if highest <= 0:
                continue
            left, right, top, bottom = 0.0, columns - 1.0, 0.0, rows - 1.0
            least, most = 0.0, np.inf
            if lowest > 0:
                x0, x1, x2 = grid_V3[v0, 0], grid_V3[v1, 0], grid_V3[v2, 0]
                y0, y1, y2 = grid_V3[v0, 1], grid_V3[v1, 1], grid_V3[v2, 1]
                # 1e-6: more than rounding, so that the edges alone decide.
                left, right = max(left, min(x0, x1, x2) - 1e-6), min(right, max(x0, x1, x2) + 1e-6)
                top, bottom = max(top, min(y0, y1, y2) - 1e-6), min(bottom, max(y0, y1, y2) + 1e-6)
                inverse0, inverse1, inverse2 = grid_V3[v0, 2], grid_V3[v1, 2], grid_V3[v2, 2]
                least, most = min(inverse0, inverse1, inverse2), max(inverse0, inverse1, inverse2)
            i0, i1, j0, j1 = math.ceil(left), math.floor(right), math.ceil(top), math.floor(bottom)
            if i0 > i1 or j0 > j1:
                continue
            a1, b1, c1 = _edge(r, p)
            a2, b2, c2 = _edge(p, q)
            if det < 0:
                a0, b0, c0, a1, b1, c1, a2, b2, c2, det = -a0, -b0, -c0, -a1, -b1, -c1, -a2, -b2, -c2, -det
            owns0, owns1, owns2 = _owns(a0, b0), _owns(a1, b1), _owns(a2, b2)
            scale = 1 / det
            a, b, c = (a0 + a1 + a2) * scale, (b0 + b1 + b2) * scale, (c0 + c1 + c2) * scale
            i_from, i_to, j_from, j_to = min(i_from, i0), max(i_to, i1 + 1), min(j_from, j0), max(j_to, j1 + 1)
            for j in range(j0, j1 + 1):
                y = y_R[j]
                rest0, rest1, rest2, rest = b0 * y + c0, b1 * y + c1, b2 * y + c2, b * y + c
                first, last = i0, i1
                if last - first >= _WIDE:
                    first, last = _row_ends(first, last, a0, rest0, width / 2, s)
                    first, last = _row_ends(first, last, a1, rest1, width / 2, s)
                    first, last = _row_ends(first, last, a2, rest2, width / 2, s)
                entered = False
                for i in range(first, last + 1):
                    if (
                        nearest_S[j * columns + i] >= most
                    ):  # most of the faces that are hidden are so behind nearer ones
                        continue
                    x = x_C[i]
                    e0, e1, e2 = a0 * x + rest0, a1 * x + rest1, a2 * x + rest2
                    if min(e0, e1, e2) <= 0:
                        if e0 < 0 or e1 < 0 or e2 < 0:
                            if entered:
                                break
                            continue
                        entered = True
                        if (e0 == 0 and not owns0) or (e1 == 0 and not owns1) or (e2 == 0 and not owns2):
                            continue
                    entered = True
                    inverse = np.float32(min(max(a * x + rest, least), most))
                    sample = j * columns + i
                    if inverse > nearest_S[sample] and inverse < limit_S[sample]:
                        nearest_S[sample] = inverse
                        face_S[sample] = face
    return face_S, (i_from, i_to, j_from, j_to)


_SEEN = types.Tuple(
    [
        *[array(int32, 1, written=True), array(int32, 1, written=True), array(float32, 1, written=True)],
        *[array(int32, 1, written=True), array(int32, 1, written=True)],
        *[array(float32, 2, written=True), array(float32, 3, written=True)],
    ]
)


@compiled(_SEEN(array(float64, 2), array(int32, 2), int64, int64, int64, array(float32, 1), boolean))
def visible(
    points_V3: np.ndarray, faces_F3: np.ndarray, width: int, height: int, s: int, limit_S: np.ndarray, apart: bool
) -> tuple[np.ndarray, ...]:
    """The nearest surface of each sample, from either side, pixel by pixel.

    Samples of a pixel that see the same face share a spot, in their middle, so that its colour is found once.

    Args:
        points_V3: float64; focal * right, focal * down and depth of each vertex, seen from the camera.
        faces_F3: int32 indices of corners.
        width, height: in pixels; the principal point is their middle.
        s: samples per pixel along each axis, in the middles of s x s cells.
        limit_S: float32; a sample sees surfaces with 1 / depth below it: infinity for all, 0 for none.
        apart: each sample has a spot of its own.
    Returns: of the K samples that meet a surface: which of the S they are and their spot (int32), and their depth
        (float32). Of the N spots: pixel and face (int32), barycentrics and sides (float32). sides_N22[:, 0] is how much
        the second and third barycentric grow from the left to the right of the square that a spot stands for, and
        sides_N22[:, 1] from its top to its bottom.
    """
    face_S, (i_from, i_to, j_from, j_to) = _fill(points_V3, faces_F3, width, height, s, limit_S)
    columns, step = width * s, 1.0 / s
    x_C, y_R = _middles(width, s), _middles(height, s)
    n_hits = 0
    for j in range(j_from, j_to):
        for i in range(i_from, i_to):
            n_hits += face_S[j * columns + i] >= 0
    sample_K, spot_K, depth_K = np.empty(n_hits, np.int32), np.empty(n_hits, np.int32), np.empty(n_hits, np.float32)
    pixel_N, face_N, share_N = np.empty(n_hits, np.int32), np.empty(n_hits, np.int32), np.empty(n_hits, np.int32)
    barycentric_N3, sides_N22 = np.zeros((n_hits, 3), np.float32), np.empty((n_hits, 2, 2), np.float32)
    hit = n_spots = 0
    looked_at = -1  # the face whose corners p, q, r and edges are at hand
    p = q = r = (0.0, 0.0, 0.0)
    a0 = b0 = c0 = a1 = b1 = c1 = a2 = b2 = c2 = 0.0
    for row in range(j_from // s, (j_to + s - 1) // s):
        for column in range(i_from // s, (i_to + s - 1) // s):
            first_spot = n_spots
            for j in range(row * s, row * s + s):
                for i in range(column * s, column * s + s):
                    sample = j * columns + i
                    face = face_S[sample]
                    if face < 0:
                        continue
                    spot = n_spots - 1
                    while spot >= first_spot and (apart or face_N[spot] != face):
                        spot -= 1
                    x, y = x_C[i], y_R[j]
                    if face != looked_at:
                        looked_at = face
                        p = _corner(points_V3, faces_F3[face, 0])
                        q = _corner(points_V3, faces_F3[face, 1])
                        r = _corner(points_V3, faces_F3[face, 2])
                        a0, b0, c0 = _edge(q, r)
                        a1, b1, c1 = _edge(r, p)
                        a2, b2, c2 = _edge(p, q)
                    e0, e1, e2 = a0 * x + (b0 * y + c0), a1 * x + (b1 * y + c1), a2 * x + (b2 * y + c2)
                    scale = 1 / (e0 + e1 + e2)
                    w0, w1, w2 = e0 * scale, e1 * scale, e2 * scale
                    if spot < first_spot:
                        spot = n_spots
                        n_spots += 1
                        pixel_N[spot], face_N[spot], share_N[spot] = row * width + column, face, 0
                        a, b = a0 + a1 + a2, b0 + b1 + b2
                        scale *= step
                        sides_N22[spot, 0, 0], sides_N22[spot, 0, 1] = (a1 - w1 * a) * scale, (a2 - w2 * a) * scale
                        sides_N22[spot, 1, 0], sides_N22[spot, 1, 1] = (b1 - w1 * b) * scale, (b2 - w2 * b) * scale
                    share_N[spot] += 1
                    barycentric_N3[spot, 0] += w0
                    barycentric_N3[spot, 1] += w1
                    barycentric_N3[spot, 2] += w2
                    sample_K[hit], spot_K[hit] = sample, spot
                    depth_K[hit] = w0 * p[2] + w1 * q[2] + w2 * r[2]
                    hit += 1
    for spot in range(n_spots):
        side = math.sqrt(share_N[spot])  # of a square of as many samples, in samples
        for c in range(3):
            barycentric_N3[spot, c] /= share_N[spot]
        for k in range(4):
            sides_N22[spot, k // 2, k % 2] *= side
    n = n_spots
    return sample_K, spot_K, depth_K, pixel_N[:n], face_N[:n], barycentric_N3[:n], sides_N22[:n]
