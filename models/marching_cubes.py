"""Marching cubes on tensors (Lorensen and Cline 1987): the zero level of values on a lattice, as triangles.

It runs where the values lie, and vertices carry gradients to the values. Only mixed cells, those with corners on both
sides, are worked on; the rest costs a few passes over bytes.

Numbering, that of Shap-E and diffusers, so that a table can be exchanged with them: corner c of a cell lies at
(c & 1, c >> 1 & 1, c >> 2 & 1); a case has bit c set where corner c is inside; edge 4a + i runs along axis a, and i
counts its four positions, the lower of the two other axes fastest. Values are positive inside.

Shapes: X, Y, Z lattice points along each axis, V vertices, F faces, M mixed cells.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch

__all__ = ["case_table", "marching_cubes"]

MAX_TRIANGLES = 5  # that a case can need


def marching_cubes(
    values_XYZ: torch.Tensor, box: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triangles where the values, linear along lattice edges, are zero.

    A vertex between lattice points p1 and p2 with values s1 and s2 is t p2 + (1 - t) p1, t = s1 / (s1 - s2).

    Args:
        values_XYZ: positive inside; a surface that reaches the lattice's border is left open there.
        box: where the first and the last lattice point lie, two tensors [3]; None measures in lattice steps.
    Returns: vertices_V3, ordered by their lattice edge, x edges first, with gradients to the values;
        faces_F3 (int64) in the order of cells, normals pointing out. Both may be empty.
    Raises: ValueError if the values have not three axes of two points or more.
    Example: values 0.5 - x on 2x2x2 points give the square x = 0.5 as two triangles.
    """
    if values_XYZ.dim() != 3 or min(values_XYZ.shape) < 2:
        raise ValueError(f"values must have three axes of 2 or more points, got shape {tuple(values_XYZ.shape)}")
    inside_XYZ = values_XYZ > 0
    vertices_V3, edge_ids_V = _vertices(values_XYZ, inside_XYZ, box)
    corners_F3 = _triangles(inside_XYZ)
    return vertices_V3, torch.searchsorted(edge_ids_V, corners_F3)


def _vertices(
    values_XYZ: torch.Tensor, inside_XYZ: torch.Tensor, box: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices [V, 3] and the sorted numbers [V] of the lattice edges they lie on."""
    shape = values_XYZ.shape
    vertices, edge_ids = [], []
    first = 0
    for axis in range(3):
        n = shape[axis] - 1
        crossed = inside_XYZ.narrow(axis, 0, n) ^ inside_XYZ.narrow(axis, 1, n)
        ids_V = crossed.reshape(-1).nonzero()[:, 0]
        p1_V3 = torch.stack(torch.unravel_index(ids_V, crossed.shape), dim=-1)
        p2_V3 = p1_V3.clone()
        p2_V3[:, axis] += 1
        s1_V, s2_V = values_XYZ[p1_V3.unbind(-1)], values_XYZ[p2_V3.unbind(-1)]
        t_V1 = (s1_V / (s1_V - s2_V))[:, None]
        vertices.append(t_V1 * _place(p2_V3, values_XYZ, box) + (1 - t_V1) * _place(p1_V3, values_XYZ, box))
        edge_ids.append(ids_V + first)
        first += crossed.numel()
    return torch.cat(vertices), torch.cat(edge_ids)


def _place(
    points_V3: torch.Tensor, values_XYZ: torch.Tensor, box: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Lattice indices to positions."""
    points_V3 = points_V3.to(values_XYZ.dtype)
    if box is None:
        return points_V3
    low_3, high_3 = (end.to(values_XYZ) for end in box)
    steps_3 = torch.tensor(values_XYZ.shape, device=values_XYZ.device) - 1
    return points_V3 / steps_3 * (high_3 - low_3) + low_3


def _triangles(inside_XYZ: torch.Tensor) -> torch.Tensor:
    """The three lattice edges of each triangle, [F, 3]."""
    cases = inside_XYZ.to(torch.uint8)
    for axis in range(3):
        n = cases.shape[axis] - 1
        cases = cases.narrow(axis, 0, n) | cases.narrow(axis, 1, n) << (1 << axis)
    cells_M = ((cases != 0) & (cases != 255)).reshape(-1).nonzero()[:, 0]
    edges_M12 = _edge_ids(torch.unravel_index(cells_M, cases.shape), inside_XYZ.shape)
    edges_C53, masks_C5 = (table.to(inside_XYZ.device) for table in case_table())
    cases_M = cases.reshape(-1)[cells_M].long()
    cell_F, triangle_F = masks_C5[cases_M].nonzero(as_tuple=True)
    return edges_M12[cell_F[:, None], edges_C53[cases_M[cell_F], triangle_F]]


def _edge_ids(cells: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
    """The lattice's numbers of the cells' twelve edges, [M, 12]; all x edges come before the y edges, then z."""
    ids, first = [], 0
    for axis in range(3):
        nx, ny, nz = (n - (a == axis) for a, n in enumerate(shape))
        strides = (ny * nz, nz, 1)
        base_M = cells[0] * strides[0] + cells[1] * strides[1] + cells[2] + first
        one, two = (strides[a] for a in range(3) if a != axis)
        ids += [base_M, base_M + one, base_M + two, base_M + one + two]
        first += prod((nx, ny, nz))
    return torch.stack(ids, dim=-1)


# The table. Where the surface leaves a cell it is cut by the cell's six squares, and there it is drawn by one rule that
# looks at the square's four corners alone; two cells that share a square therefore always agree on it.


@cache
def case_table() -> tuple[torch.Tensor, torch.Tensor]:
    """The triangles of every case: edges [256, 5, 3] int64 and which of the five are used [256, 5] bool."""
    edges_C53 = torch.zeros(256, MAX_TRIANGLES, 3, dtype=torch.long)
    masks_C5 = torch.zeros(256, MAX_TRIANGLES, dtype=torch.bool)
    for case in range(256):
        triangles = [triangle for loop in _loops(case) for triangle in _fan(loop)]
        for i, triangle in enumerate(triangles):
            edges_C53[case, i] = torch.tensor(triangle)
            masks_C5[case, i] = True
    return edges_C53, masks_C5


def _edge(corner: int, other: int) -> int:
    """The number of the edge between two corners of a cell."""
    axis = (corner ^ other).bit_length() - 1
    low = corner & other
    below = low & ((1 << axis) - 1)
    return 4 * axis + (below | (low >> (axis + 1)) << axis)


def _squares() -> list[list[int]]:
    """The corners of a cell's six squares, anticlockwise as seen from outside the cell."""
    squares = []
    for axis in range(3):
        one, two = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        ring = [0, one, one | two, two]
        squares += [ring[::-1], [corner | 1 << axis for corner in ring]]
    return squares


def _sides(square: list[int]) -> list[int]:
    """The edges of a square in order: side i from corner i to corner i + 1."""
    return [_edge(corner, square[(i + 1) % 4]) for i, corner in enumerate(square)]


def _loops(case: int) -> list[list[int]]:
    """The closed polygons in which the surface crosses a cell, as edges, anticlockwise as seen from outside the solid.

    On a square, each run of outside corners is cut off by one segment. Where two inside corners lie diagonally, they
    are thus joined: thin parts stay whole.
    """
    following = {}
    for square in _squares():
        inside = [bool(case >> corner & 1) for corner in square]
        sides = _sides(square)
        for i in range(4):
            if inside[i] and not inside[(i + 1) % 4]:  # the walk leaves the solid on side i ...
                back = next(j % 4 for j in range(i + 1, i + 4) if inside[(j + 1) % 4])  # ... and comes back on this one
                following[sides[back]] = sides[i]
    loops = []
    while following:
        loop = [min(following)]
        while (edge := following.pop(loop[-1])) != loop[0]:
            loop.append(edge)
        loops.append(loop)
    return loops


def _fan(loop: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of a polygon, from a corner none of whose diagonals lies in a square.

    There the neighbouring cell could draw the same diagonal, and four triangles would share it.
    """
    squares = [set(_sides(square)) for square in _squares()]
    for i in range(len(loop)):
        first, *rest = loop[i:] + loop[:i]
        if not any({first, edge} <= square for edge in rest[1:-1] for square in squares):
            return [(first, second, third) for second, third in zip(rest, rest[1:])]
    raise AssertionError(f"no fan fits {loop}")
