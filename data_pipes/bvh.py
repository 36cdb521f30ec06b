"""Triangles in a tree of boxes: nearest points and winding numbers, for many points at once.

All is computed in float64 by one thread. Boxes are halved at the middle of their triangles' centres along the longest
axis; a leaf holds up to `LEAF` triangles.
Shapes: F triangles, M nodes of the tree, N points.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

__all__ = ["Bvh"]

LEAF = 4
HALVED_BY_PLACE = 48  # levels; below, triangles are halved by number, so that no tree is deeper than `STACK`
STACK = 96
FAR = 4.0  # radii of a node from which on its triangles count as one dipole: winding numbers to .004


class Bvh:
    """A tree over triangles [F, 3, 3], of which [F, 3] vectors point out of their fronts."""

    def __init__(self, triangles_F33: np.ndarray, front_F3: np.ndarray) -> None:
        corners_F33 = triangles_F33.astype(np.float64)
        order_F, box_M6, node_M3 = _build(corners_F33.min(axis=1), corners_F33.max(axis=1), corners_F33.mean(axis=1))
        self._tree = box_M6, node_M3
        self._face_F = order_F
        corners_F33 = corners_F33[order_F]
        # Wound so that the front is where it is in a file that is right: the loops need no normals.
        wound_F3 = np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0])
        self._turned_F = np.einsum("fc,fc->f", wound_F3, front_F3[order_F]) < 0
        corners_F33[self._turned_F] = corners_F33[self._turned_F][:, ::-1]
        # A corner and the sides from it.
        self._triangle_F9 = np.concatenate([corners_F33[:, :1], corners_F33[:, 1:] - corners_F33[:, :1]], 1).reshape(
            -1, 9
        )
        self._dipole_M7: np.ndarray | None = None

    def closest(self, xyz_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest point of any triangle: its triangle int64 [N], barycentrics float64 [N, 3], distance [N]."""
        place_N, weight_N3, distance_N = _closest(_rows(xyz_N3), self._triangle_F9, *self._tree)
        turned_N = self._turned_F[place_N]
        weight_N3[turned_N] = weight_N3[turned_N][:, ::-1]
        return self._face_F[place_N], weight_N3, distance_N

    def winding_numbers(self, xyz_N3: np.ndarray) -> np.ndarray:
        """[N] float64: 1 inside a closed surface and 0 outside; in between near openings (Jacobson et al. 2013).

        Far nodes count as dipoles (the first order of Barill et al. 2018).
        """
        if self._dipole_M7 is None:
            self._dipole_M7 = self._dipoles()
        return _winding(_rows(xyz_N3), self._triangle_F9, self._dipole_M7, self._tree[1])

    def _dipoles(self) -> np.ndarray:
        """[M, 7] of each node: the sum of its triangles' area vectors, their centre by area, and the radius around."""
        a_F3, b_F3, c_F3 = self._triangle_F9[:, :3], self._triangle_F9[:, 3:6], self._triangle_F9[:, 6:]
        vector_F3 = np.cross(b_F3, c_F3) / 2
        area_F1 = np.linalg.norm(vector_F3, axis=1, keepdims=True)
        each_F7 = np.concatenate([vector_F3, area_F1 * (a_F3 + (b_F3 + c_F3) / 3), area_F1], axis=1)
        until_F7 = np.concatenate([np.zeros((1, 7)), np.cumsum(each_F7, axis=0)])
        box_M6, node_M3 = self._tree
        sum_M7 = until_F7[node_M3[:, 1]] - until_F7[node_M3[:, 0]]
        sum_M7[:, 3:6] /= np.maximum(sum_M7[:, 6:], 1e-300)
        centre_M3 = sum_M7[:, 3:6]
        sum_M7[:, 6] = np.linalg.norm(np.maximum(box_M6[:, 3:] - centre_M3, centre_M3 - box_M6[:, :3]), axis=1)
        return sum_M7


def _rows(array_N3: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array_N3, np.float64)


# A node is (first triangle, end of its triangles, first child): the second child follows the first; a leaf has 0.
# In the loops all is scalars, one at a time: slices of arrays would cost more than the arithmetic.


@compiled()
def _build(lower_F3, upper_F3, centre_F3):
    n = len(centre_F3)
    order_F, scratch_F = np.arange(n), np.empty(n, np.int64)
    box_M6, node_M3, depth_M = np.empty((2 * n + 1, 6)), np.zeros((2 * n + 1, 3), np.int64), np.zeros(2 * n + 1)
    node_M3[0, 1] = n
    n_nodes = 1
    for node in range(2 * n + 1):
        if node == n_nodes:
            break
        start, stop = node_M3[node, 0], node_M3[node, 1]
        axis, longest, middle = 0, -1.0, 0.0
        for c in range(3):
            lower, upper, lowest, highest = np.inf, -np.inf, np.inf, -np.inf
            for i in range(start, stop):
                face = order_F[i]
                lower, upper = min(lower, lower_F3[face, c]), max(upper, upper_F3[face, c])
                lowest, highest = min(lowest, centre_F3[face, c]), max(highest, centre_F3[face, c])
            box_M6[node, c], box_M6[node, 3 + c] = lower, upper
            if highest - lowest > longest:
                axis, longest, middle = c, highest - lowest, (lowest + highest) / 2
        if stop - start <= LEAF:
            continue
        left, right = start, stop
        for i in range(start, stop):
            if centre_F3[order_F[i], axis] < middle:
                scratch_F[left] = order_F[i]
                left += 1
            else:
                right -= 1
                scratch_F[right] = order_F[i]
        for i in range(start, stop):
            order_F[i] = scratch_F[i]
        if left == start or left == stop or depth_M[node] >= HALVED_BY_PLACE:  # noqa: SIM109 (compiled)
            left = (start + stop) // 2
        node_M3[node, 2] = n_nodes
        node_M3[n_nodes, 0], node_M3[n_nodes, 1] = start, left
        node_M3[n_nodes + 1, 0], node_M3[n_nodes + 1, 1] = left, stop
        depth_M[n_nodes] = depth_M[n_nodes + 1] = depth_M[node] + 1
        n_nodes += 2
    return order_F, box_M6[:n_nodes], node_M3[:n_nodes]


@compiled()
def _squared_to_box(x, y, z, box_M6, node):
    dx = max(box_M6[node, 0] - x, x - box_M6[node, 3], 0.0)
    dy = max(box_M6[node, 1] - y, y - box_M6[node, 4], 0.0)
    dz = max(box_M6[node, 2] - z, z - box_M6[node, 5], 0.0)
    return dx * dx + dy * dy + dz * dz


@compiled()
def _closest(xyz_N3, triangle_F9, box_M6, node_M3):
    n = len(xyz_N3)
    place_N, weight_N3, distance_N = np.zeros(n, np.int64), np.zeros((n, 3)), np.empty(n)
    node_stack, bound_stack = np.empty(STACK, np.int64), np.empty(STACK)
    for i in range(n):
        x, y, z = xyz_N3[i, 0], xyz_N3[i, 1], xyz_N3[i, 2]
        best = np.inf
        node_stack[0], bound_stack[0] = 0, 0.0
        n_stack = 1
        while n_stack:
            n_stack -= 1
            if bound_stack[n_stack] >= best:
                continue
            node = node_stack[n_stack]
            near = node_M3[node, 2]
            if near == 0:
                for face in range(node_M3[node, 0], node_M3[node, 1]):
                    squared, v, w = _closest_on(x, y, z, triangle_F9, face)
                    if squared < best:
                        best = squared
                        place_N[i] = face
                        weight_N3[i, 0], weight_N3[i, 1], weight_N3[i, 2] = 1 - v - w, v, w
                continue
            far = near + 1
            to_near, to_far = _squared_to_box(x, y, z, box_M6, near), _squared_to_box(x, y, z, box_M6, far)
            if to_far < to_near:
                near, far, to_near, to_far = far, near, to_far, to_near
            if to_far < best:
                node_stack[n_stack], bound_stack[n_stack] = far, to_far
                n_stack += 1
            if to_near < best:
                node_stack[n_stack], bound_stack[n_stack] = near, to_near
                n_stack += 1
        distance_N[i] = np.sqrt(best)
    return place_N, weight_N3, distance_N


@compiled()
def _closest_on(x, y, z, triangle_F9, face):
    """Squared distance and the last two barycentrics of a triangle's point nearest to (x, y, z).

    The nearest point of the plane where it falls inside, else the best of the three edges: for needles too.
    """
    px, py, pz = x - triangle_F9[face, 0], y - triangle_F9[face, 1], z - triangle_F9[face, 2]
    bx, by, bz = triangle_F9[face, 3], triangle_F9[face, 4], triangle_F9[face, 5]
    cx, cy, cz = triangle_F9[face, 6], triangle_F9[face, 7], triangle_F9[face, 8]
    bb, bc, cc = bx * bx + by * by + bz * bz, bx * cx + by * cy + bz * cz, cx * cx + cy * cy + cz * cz
    pb, pc = px * bx + py * by + pz * bz, px * cx + py * cy + pz * cz
    determinant = bb * cc - bc * bc
    if determinant > 1e-12 * bb * cc:
        v, w = (cc * pb - bc * pc) / determinant, (bb * pc - bc * pb) / determinant
        if v >= 0 and w >= 0 and v + w <= 1:
            dx, dy, dz = px - v * bx - w * cx, py - v * by - w * cy, pz - v * bz - w * cz
            return dx * dx + dy * dy + dz * dz, v, w
    along = min(max(pb / bb, 0.0), 1.0) if bb > 0 else 0.0  # on the side to b
    dx, dy, dz = px - along * bx, py - along * by, pz - along * bz
    best, v, w = dx * dx + dy * dy + dz * dz, along, 0.0
    along = min(max(pc / cc, 0.0), 1.0) if cc > 0 else 0.0  # to c
    dx, dy, dz = px - along * cx, py - along * cy, pz - along * cz
    squared = dx * dx + dy * dy + dz * dz
    if squared < best:
        best, v, w = squared, 0.0, along
    px, py, pz, cx, cy, cz = px - bx, py - by, pz - bz, cx - bx, cy - by, cz - bz
    cc = cx * cx + cy * cy + cz * cz
    along = min(max((px * cx + py * cy + pz * cz) / cc, 0.0), 1.0) if cc > 0 else 0.0  # from b to c
    dx, dy, dz = px - along * cx, py - along * cy, pz - along * cz
    squared = dx * dx + dy * dy + dz * dz
    if squared < best:
        best, v, w = squared, 1 - along, along
    return best, v, w


@compiled()
def _winding(xyz_N3, triangle_F9, dipole_M7, node_M3):
    winding_N = np.zeros(len(xyz_N3))
    stack = np.empty(STACK, np.int64)
    for i in range(len(xyz_N3)):
        x, y, z = xyz_N3[i, 0], xyz_N3[i, 1], xyz_N3[i, 2]
        total = 0.0
        stack[0] = 0
        n_stack = 1
        while n_stack:
            n_stack -= 1
            node = stack[n_stack]
            dx, dy, dz = dipole_M7[node, 3] - x, dipole_M7[node, 4] - y, dipole_M7[node, 5] - z
            squared = dx * dx + dy * dy + dz * dz
            far = FAR * dipole_M7[node, 6]
            if squared > far * far:
                flux = dipole_M7[node, 0] * dx + dipole_M7[node, 1] * dy + dipole_M7[node, 2] * dz
                total += flux / (squared * np.sqrt(squared))
                continue
            child = node_M3[node, 2]
            if child:
                stack[n_stack], stack[n_stack + 1] = child, child + 1
                n_stack += 2
                continue
            for face in range(node_M3[node, 0], node_M3[node, 1]):
                total += _solid_angle(x, y, z, triangle_F9, face)
        winding_N[i] = total / (4 * np.pi)
    return winding_N


@compiled()
def _solid_angle(x, y, z, triangle_F9, face):
    """Of a triangle seen from (x, y, z), positive from behind (Van Oosterom and Strackee 1983)."""
    ax, ay, az = triangle_F9[face, 0] - x, triangle_F9[face, 1] - y, triangle_F9[face, 2] - z
    bx, by, bz = ax + triangle_F9[face, 3], ay + triangle_F9[face, 4], az + triangle_F9[face, 5]
    cx, cy, cz = ax + triangle_F9[face, 6], ay + triangle_F9[face, 7], az + triangle_F9[face, 8]
    a, b, c = (
        np.sqrt(ax * ax + ay * ay + az * az),
        np.sqrt(bx * bx + by * by + bz * bz),
        np.sqrt(cx * cx + cy * cy + cz * cz),
    )
    volume = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
    ab, bc, ca = ax * bx + ay * by + az * bz, bx * cx + by * cy + bz * cz, cx * ax + cy * ay + cz * az
    return 2 * np.arctan2(volume, a * b * c + ab * c + bc * a + ca * b)
