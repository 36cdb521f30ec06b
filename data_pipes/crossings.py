"""How often lines through points cross the faces of a mesh, from back to front and from front to back.

Lines in one direction are points of the plane across it. There the triangles are spread over a grid of cells, each with
a list of those that reach into it, so a line is tried against the few of one cell.

Two faces that share an edge compute on which side of it a line passes from the same two corners in opposite order: the
same float64 with opposite sign. With a rule for zero, a line through the edge crosses exactly one of two that lie side
by side.
Shapes: F triangles, N points, L directions, C cells, E entries of their lists.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import compiled, inlined

__all__ = ["Crossings"]

MOST_CELLS = 1024  # along either side of a grid
MOST_ENTRIES = 32  # a triangle, on average: a grid with more is made coarser
_ROOM = 1e-6  # cells, more than rounding


class Crossings:
    """Of lines with triangles [F, 3, 3], of which [F, 3] vectors point out of their fronts."""

    def __init__(self, triangles_F33: np.ndarray, front_F3: np.ndarray) -> None:
        corners_F33 = triangles_F33.astype(np.float64)
        # Wound so that the front is where it is in a file that is right: the loops need no normals.
        wound_F3 = np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0])
        turned_F = np.einsum("fc,fc->f", wound_F3, front_F3) < 0
        corners_F33[turned_F] = corners_F33[turned_F][:, ::-1]
        self._lower_3, self._upper_3 = corners_F33.min(axis=(0, 1)), corners_F33.max(axis=(0, 1))
        self._corners_F9 = corners_F33.reshape(-1, 9)

    def votes(self, xyz_N3: np.ndarray, direction_L3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the 2 L rays from each point along the lines, both ways: the share [N] of those that meet more backs of
        faces than fronts, and the mean [N] over all of the crossings that this leaves out.

        The latter: backs less fronts, less one where that is positive. The winding number is the mean over all
        directions of backs less fronts, so less the latter it is the share to which an endless number of rays tends.
        """
        share_N, left_out_N = np.zeros(len(xyz_N3)), np.zeros(len(xyz_N3))
        # Of two opposite rays from outside the box, one meets nothing: never more than half leave.
        inside_M = np.flatnonzero(((xyz_N3 >= self._lower_3) & (xyz_N3 <= self._upper_3)).all(axis=1))
        leave_M, crossings_M = np.zeros(len(inside_M)), np.zeros(len(inside_M))
        for direction_3 in direction_L3:
            ahead_M, _, behind_M = self._along(direction_3, xyz_N3[inside_M], np.zeros(len(inside_M)))
            leave_M += (ahead_M > 0) + 1.0 * (behind_M < 0)
            crossings_M += ahead_M - behind_M
        n_rays = 2 * len(direction_L3)
        share_N[inside_M], left_out_N[inside_M] = leave_M / n_rays, (crossings_M - leave_M) / n_rays
        return share_N, left_out_N

    def votes_on_sides(
        self, xyz_N3: np.ndarray, normal_N3: np.ndarray, step: float, direction_L3: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The shares of `votes` about `step` from points of faces, on the side of their normals and on the other.

        In half the time, but along the line, not the normal: within a few `step` of an edge it may be beyond it.
        """
        front_N, back_N = np.zeros(len(xyz_N3)), np.zeros(len(xyz_N3))
        for direction_3 in direction_L3 / np.linalg.norm(direction_L3, axis=1, keepdims=True):
            # One line serves both sides: it is entered where it is `step` above the face, and as far below.
            rise_N = normal_N3 @ direction_3
            ahead_N, at_N, behind_N = self._along(direction_3, xyz_N3, step / np.maximum(np.abs(rise_N), 0.1))
            up_N = rise_N >= 0  # else the line is followed the other way
            ahead_N, behind_N = np.where(up_N, ahead_N, -behind_N), np.where(up_N, behind_N, -ahead_N)
            at_N = np.where(up_N, at_N, -at_N)
            front_N += (ahead_N > 0) + 1.0 * (at_N + behind_N < 0)
            back_N += (ahead_N + at_N > 0) + 1.0 * (behind_N < 0)
        n_rays = 2 * len(direction_L3)
        return front_N / n_rays, back_N / n_rays

    def _along(
        self, direction_3: np.ndarray, xyz_N3: np.ndarray, reach_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the lines through points: how many more faces [N] they cross from back to front than from front to back,
        beyond `reach`, up to there, and before -`reach`."""
        if not len(xyz_N3):  # nor is a grid needed
            return (np.zeros(0, np.int64),) * 3
        axes_33 = _axes(direction_3)
        flat_F9 = _in_axes(self._corners_F9.reshape(-1, 3), axes_33).reshape(-1, 9)
        n = min(max(int(math.sqrt(len(flat_F9))), 48), MOST_CELLS)
        most = MOST_ENTRIES * len(flat_F9) + MOST_CELLS
        while True:
            grid_4 = _grid(flat_F9, n)
            start_C = _starts(flat_F9, grid_4, n, most if n > 4 else np.iinfo(np.int64).max)
            if len(start_C):
                break
            n //= 2
        face_E = _entries(flat_F9, grid_4, n, start_C)
        points_N3 = _in_axes(np.ascontiguousarray(xyz_N3, np.float64), axes_33)
        return _count(points_N3, np.ascontiguousarray(reach_N, np.float64), flat_F9, grid_4, n, start_C, face_E)


def _axes(direction_3: np.ndarray) -> np.ndarray:
    """[3, 3] rows: two directions across and the direction itself, right-handed and orthonormal."""
    along = direction_3 / np.linalg.norm(direction_3)
    across = np.cross(np.eye(3)[np.argmin(np.abs(along))], along)
    across /= np.linalg.norm(across)
    return np.stack([across, np.cross(along, across), along])


# In the loops all is scalars, one at a time: slices of arrays would cost more than the arithmetic.


@compiled()
def _in_axes(xyz_N3, axes_33):
    """Coordinates along the axes, each point's the same wherever in the array it is (as a matrix product's are not)."""
    moved_N3 = np.empty((len(xyz_N3), 3))
    for i in range(len(xyz_N3)):
        for k in range(3):
            moved_N3[i, k] = axes_33[k, 0] * xyz_N3[i, 0] + axes_33[k, 1] * xyz_N3[i, 1] + axes_33[k, 2] * xyz_N3[i, 2]
    return moved_N3


@compiled()
def _grid(flat_F9, n):
    """[4] where the grid of n x n cells over the triangles begins, and cells per unit, along either axis."""
    grid_4 = np.empty(4)
    for axis in range(2):
        lower, upper = np.inf, -np.inf
        for face in range(len(flat_F9)):
            for corner in range(axis, 9, 3):
                lower, upper = min(lower, flat_F9[face, corner]), max(upper, flat_F9[face, corner])
        room = 1e-9 * (1 + upper - lower)
        grid_4[axis], grid_4[2 + axis] = lower - room, n / (upper - lower + 2 * room)
    return grid_4


@inlined
def _within(low, high, pa, pb, qa, qb, least, most):
    """Widen [least, most] to the part of a side from p to q that lies between the heights `low` and `high`."""
    if max(pb, qb) < low or min(pb, qb) > high:
        return least, most
    slope = (qa - pa) / (qb - pb) if qb != pb else 0.0
    at_p = pa if low <= pb <= high else pa + ((low if pb < low else high) - pb) * slope
    at_q = qa if low <= qb <= high else qa + ((low if qb < low else high) - qb) * slope
    return min(least, at_p, at_q), max(most, at_p, at_q)


@inlined
def _reached(flat_F9, face, grid_4, n):
    """A triangle's corners in cells, and the first and last row and column of those that it reaches into."""
    pa, pb = (flat_F9[face, 0] - grid_4[0]) * grid_4[2], (flat_F9[face, 1] - grid_4[1]) * grid_4[3]
    qa, qb = (flat_F9[face, 3] - grid_4[0]) * grid_4[2], (flat_F9[face, 4] - grid_4[1]) * grid_4[3]
    ra, rb = (flat_F9[face, 6] - grid_4[0]) * grid_4[2], (flat_F9[face, 7] - grid_4[1]) * grid_4[3]
    first_row, last_row = int(max(min(pb, qb, rb) - _ROOM, 0)), int(min(max(pb, qb, rb) + _ROOM, n - 1))
    first, last = int(max(min(pa, qa, ra) - _ROOM, 0)), int(min(max(pa, qa, ra) + _ROOM, n - 1))
    return pa, pb, qa, qb, ra, rb, first_row, last_row, first, last


@inlined
def _reached_of_row(row, pa, pb, qa, qb, ra, rb, first_row, last_row, first, last, n):
    """Those columns alone that are reached in one row."""
    if last - first < 2 or first_row == last_row:
        return first, last
    low, high = row - _ROOM, row + 1 + _ROOM
    least, most = _within(low, high, pa, pb, qa, qb, np.inf, -np.inf)
    least, most = _within(low, high, qa, qb, ra, rb, least, most)
    least, most = _within(low, high, ra, rb, pa, pb, least, most)
    return max(int(max(least - _ROOM, 0)), first), min(int(min(most + _ROOM, n - 1)), last)


@compiled()
def _starts(flat_F9, grid_4, n, most):
    """[C + 1] where each cell's list begins among those of all cells, row by row, and where the last one ends; [0] if
    there are more than `most` entries."""
    start_C, total = np.zeros(n * n + 1, np.int64), 0
    for face in range(len(flat_F9)):
        pa, pb, qa, qb, ra, rb, first_row, last_row, first, last = _reached(flat_F9, face, grid_4, n)
        for row in range(first_row, last_row + 1):
            i0, i1 = _reached_of_row(row, pa, pb, qa, qb, ra, rb, first_row, last_row, first, last, n)
            total += i1 - i0 + 1
            for column in range(i0, i1 + 1):
                start_C[row * n + column + 1] += 1
        if total > most:
            return start_C[:0]
    for cell in range(n * n):
        start_C[cell + 1] += start_C[cell]
    return start_C


@compiled()
def _entries(flat_F9, grid_4, n, start_C):
    """[E] the lists of all cells: numbers of triangles."""
    face_E, next_C = np.empty(start_C[n * n], np.int32), start_C[:-1].copy()
    for face in range(len(flat_F9)):
        pa, pb, qa, qb, ra, rb, first_row, last_row, first, last = _reached(flat_F9, face, grid_4, n)
        for row in range(first_row, last_row + 1):
            i0, i1 = _reached_of_row(row, pa, pb, qa, qb, ra, rb, first_row, last_row, first, last, n)
            for column in range(i0, i1 + 1):
                cell = row * n + column
                face_E[next_C[cell]] = face
                next_C[cell] += 1
    return face_E


@inlined
def _owns(da, db):
    """Whether a line that passes through a side is the face's on its left, of the two that may lie beside it."""
    return db > 0 or (db == 0 and da < 0)


@compiled()
def _count(points_N3, reach_N, flat_F9, grid_4, n, start_C, face_E):
    ahead_N, at_N, behind_N = (
        np.zeros(len(points_N3), np.int64),
        np.zeros(len(points_N3), np.int64),
        np.zeros(len(points_N3), np.int64),
    )
    for i in range(len(points_N3)):
        a, b, c, reach = points_N3[i, 0], points_N3[i, 1], points_N3[i, 2], reach_N[i]
        column, row = (a - grid_4[0]) * grid_4[2], (b - grid_4[1]) * grid_4[3]
        if not (0 <= column < n and 0 <= row < n):
            continue
        cell = int(row) * n + int(column)
        ahead, at, behind = 0, 0, 0
        for entry in range(start_C[cell], start_C[cell + 1]):
            face = np.int64(face_E[entry])
            pa, pb = flat_F9[face, 0] - a, flat_F9[face, 1] - b
            qa, qb = flat_F9[face, 3] - a, flat_F9[face, 4] - b
            ra, rb = flat_F9[face, 6] - a, flat_F9[face, 7] - b
            e0, e1, e2 = qa * rb - qb * ra, ra * pb - rb * pa, pa * qb - pb * qa
            least, most = min(e0, e1, e2), max(e0, e1, e2)
            if least < 0 < most or least == most == 0:  # beside it, or it has no area from here
                continue
            side = 1 if most > 0 else -1  # 1: the line goes through the face from back to front
            if least == 0 or most == 0:
                if e0 == 0 and not _owns(side * (ra - qa), side * (rb - qb)):
                    continue
                if e1 == 0 and not _owns(side * (pa - ra), side * (pb - rb)):
                    continue
                if e2 == 0 and not _owns(side * (qa - pa), side * (qb - pb)):
                    continue
            along = (e0 * flat_F9[face, 2] + e1 * flat_F9[face, 5] + e2 * flat_F9[face, 8]) / (e0 + e1 + e2) - c
            if along > reach:
                ahead += side
            elif along < -reach:
                behind += side
            else:
                at += side
        ahead_N[i], at_N[i], behind_N[i] = ahead, at, behind
    return ahead_N, at_N, behind_N
