"""A small differentiable mesh rasteriser in plain PyTorch, for image losses on extracted meshes.

What is seen is decided without gradients (an identity buffer: which face each pixel's centre sees). Depth and colour of
the seen face, and the place where a silhouette passes between two pixels' centres, are then computed again from the
vertices with gradients, so that vertices move when pictures disagree, inside an outline and at it.

The antialiasing's idea is Laine et al.'s (arXiv 2011.03277): between two neighbouring pixels of unlike depth that a
silhouette edge divides, the colour changes in proportion to where the edge crosses. They look at the edges of the face
seen in the nearer pixel; here all silhouette edges are followed, so that faces smaller than a pixel, which no pixel may
see, still give their gradient.

Screen: x right and y down in pixels, pixel (row, column) has its centre at (column + 1/2, row + 1/2).
Shapes: V views, H height, W width, N vertices, F faces, E edges of the mesh; and in flat lists T drawn triangles,
M pixels tried or crossings, P seen pixels, Q all pixels, K silhouette edges.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

__all__ = ["Raster", "rasterize"]

NEAR = 1e-3  # object-frame units in front of the camera; see `rasterize`
SLIVER = 1e-6  # square pixels of twice the area; thinner triangles are seen edge-on and cover nothing
PIXELS_AT_ONCE = 1 << 18  # pairs of a triangle and a pixel tried together: what bounds memory and fits in a cache
NOTHING = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Raster:
    """V views of a mesh.

    rgb_VHW3: premultiplied by alpha (so: on black), antialiased, in the space of the vertex colours.
    alpha_VHW: in [0, 1], antialiased.
    depth_VHW: along the viewing axis at the pixel's centre, object units; infinite where nothing is.
    face_VHW: index of the face at the pixel's centre, -1 where nothing is.
    """

    rgb_VHW3: torch.Tensor
    alpha_VHW: torch.Tensor
    depth_VHW: torch.Tensor
    face_VHW: torch.Tensor


def rasterize(
    vertices_N3: torch.Tensor,
    faces_F3: torch.Tensor,
    rgb_N3: torch.Tensor,
    camera_to_world_V44: torch.Tensor,
    focal_V: torch.Tensor,
    *,
    height: int,
    width: int,
) -> Raster:
    """Draw a mesh from V cameras; rgb, alpha and depth have gradients to vertices, colours and cameras.

    Both sides of a face are drawn. A face with a corner less than `NEAR` in front of the camera is left out whole, not
    clipped: cameras stand outside the object. Silhouettes at the border of a picture are not antialiased beyond it, and
    what is thinner than a pixel and covers no pixel's centre is not seen. Edges where faces pass through each other
    have no antialiasing, hence no gradient of visibility. The same inputs give the same bytes on a CPU.

    Args:
        vertices_N3: object frame, float32 or float64; the other numbers are brought to their type and device.
        faces_F3: indices into the vertices, any integer type. Faces that share an edge must share its two indices, else
            the edge counts as a border of both; an edge may have any number of faces.
        rgb_N3: colours at the vertices, interpolated linearly on the faces.
        camera_to_world_V44, focal_V: as in `Cameras`: OpenGL axes, pixels, principal point at the centre.
        height, width: of the pictures, in pixels.
    Raises: ValueError for shapes, indices or a type of vertices that do not fit.
    Example: a square of side s facing a camera at distance d covers (focal s / d)^2 pixels: the sum of alpha.
    """
    _check(vertices_N3, faces_F3, rgb_N3, camera_to_world_V44, focal_V)
    n_views, n_vertices = len(focal_V), len(vertices_N3)
    faces_F3 = faces_F3.long()
    rgb_N3, camera_to_world_V44, focal_V = (t.to(vertices_N3) for t in (rgb_N3, camera_to_world_V44, focal_V))
    screen_VN3 = _project(vertices_N3, camera_to_world_V44, focal_V, height, width)
    with torch.no_grad():
        corner_VF33 = screen_VN3.index_select(1, faces_F3.flatten()).view(n_views, -1, 3, 3)
        orientation_VF = _orientation(corner_VF33)
        face_Q = _visible_faces(corner_VF33, orientation_VF, height, width)
    seen_P = (face_Q >= 0).nonzero()[:, 0]
    vertex_P3 = faces_F3.index_select(0, face_Q[seen_P])
    view_P1 = torch.div(seen_P, height * width, rounding_mode="floor")[:, None]
    depth_P, weights_P3 = _barycentrics(screen_VN3, vertex_P3 + view_P1 * n_vertices, _centers(seen_P, height, width))
    corner_rgb_P33 = rgb_N3.index_select(0, vertex_P3.flatten()).view(-1, 3, 3)
    rgb_P3 = (weights_P3[..., None] * corner_rgb_P33).sum(1)

    rgba_P4 = torch.cat([rgb_P3, torch.ones_like(rgb_P3[:, :1])], dim=1)
    rgba_Q4 = rgba_P4.new_zeros(len(face_Q), 4).index_copy(0, seen_P, rgba_P4)
    depth_Q = depth_P.new_full((len(face_Q),), torch.inf).index_copy(0, seen_P, depth_P)
    with torch.no_grad():
        silhouettes = _silhouettes(screen_VN3, faces_F3, orientation_VF)
        crossings = _crossings(screen_VN3, silhouettes, face_Q, depth_Q, height, width)
    rgba_VHW4 = _antialias(rgba_Q4, screen_VN3, crossings, height, width).view(n_views, height, width, 4)
    return Raster(
        rgba_VHW4[..., :3],
        rgba_VHW4[..., 3],
        depth_Q.view(n_views, height, width),
        face_Q.view(n_views, height, width),
    )


def _check(
    vertices_N3: torch.Tensor,
    faces_F3: torch.Tensor,
    rgb_N3: torch.Tensor,
    camera_to_world_V44: torch.Tensor,
    focal_V: torch.Tensor,
) -> None:
    for name, tensor, shape in (
        ("vertices", vertices_N3, (len(vertices_N3), 3)),
        ("faces", faces_F3, (len(faces_F3), 3)),
        ("rgb", rgb_N3, (len(vertices_N3), 3)),
        ("camera_to_world", camera_to_world_V44, (len(focal_V), 4, 4)),
        ("focal", focal_V, (len(focal_V),)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if vertices_N3.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"vertices must be float32 or float64, got {vertices_N3.dtype}")
    if len(faces_F3) and not (faces_F3.min() >= 0 and faces_F3.max() < len(vertices_N3)):
        raise ValueError(f"faces must lie in [0, {len(vertices_N3)}), got [{faces_F3.min()}, {faces_F3.max()}]")


def _project(
    vertices_N3: torch.Tensor, camera_to_world_V44: torch.Tensor, focal_V: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Screen x and y in pixels and depth, [V, N, 3]; x and y mean nothing where depth is less than `NEAR`."""
    rotation_V33, eye_V3 = camera_to_world_V44[:, :3, :3], camera_to_world_V44[:, :3, 3]
    # Not as a matrix product, which autocast and TF32 would round to a few bits: whole pixels.
    x_VN1, y_VN1, z_VN1 = (vertices_N3 - eye_V3[:, None]).split(1, dim=-1)
    x_axis_V13, y_axis_V13, z_axis_V13 = rotation_V33[:, None].unbind(2)  # the object frame's, in camera axes
    local_VN3 = x_VN1 * x_axis_V13 + y_VN1 * y_axis_V13 + z_VN1 * z_axis_V13
    depth_VN = -local_VN3[..., 2]
    scale_VN = focal_V[:, None] / torch.where(depth_VN < NEAR, 1.0, depth_VN)
    x_VN = width / 2 + local_VN3[..., 0] * scale_VN
    y_VN = height / 2 - local_VN3[..., 1] * scale_VN
    return torch.stack([x_VN, y_VN, depth_VN], dim=-1)


def _orientation(corner_VF33: torch.Tensor) -> torch.Tensor:
    """Sign of a face's area on the screen, [V, F]; 0 for faces that are not drawn."""
    a_VF3, b_VF3, c_VF3 = corner_VF33.unbind(2)
    area_VF = _cross(b_VF3 - a_VF3, c_VF3 - a_VF3)
    depth_VF = a_VF3[..., 2].minimum(b_VF3[..., 2]).minimum(c_VF3[..., 2])
    drawn_VF = (area_VF.abs() > SLIVER) & (depth_VF >= NEAR) & area_VF.isfinite()
    return torch.where(drawn_VF, area_VF.sign(), 0.0)


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _centers(pixel_P: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Screen x and y of pixels given as flat indices into [V, H, W]."""
    row_P = torch.div(pixel_P, width, rounding_mode="floor") % height
    return torch.stack([pixel_P % width, row_P], dim=1) + 0.5


def _visible_faces(corner_VF33: torch.Tensor, orientation_VF: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The nearest face at each pixel's centre, flat [V * H * W]; -1 for none. Of equally near ones the first."""
    n_views, n_faces = orientation_VF.shape
    drawn_T = orientation_VF.flatten().nonzero()[:, 0]
    corner_T33 = corner_VF33.flatten(0, 1).index_select(0, drawn_T)
    a_T2, b_T2, c_T2 = corner_T33[..., :2].unbind(1)
    size_2 = a_T2.new_tensor([width, height])
    # The pixels whose centres lie in the triangle's bounding box; for many small triangles there are none.
    low_T2 = (a_T2.minimum(b_T2).minimum(c_T2) - 0.5).ceil().clamp(min=0).minimum(size_2).long()
    high_T2 = (a_T2.maximum(b_T2).maximum(c_T2) - 0.5).floor().clamp(min=-1).minimum(size_2 - 1).long()
    extent_T2 = (high_T2 - low_T2 + 1).clamp(min=0)
    count_T = extent_T2[:, 0] * extent_T2[:, 1]
    some_T = count_T.nonzero()[:, 0]
    drawn_T, count_T, low_T2, columns_T = drawn_T[some_T], count_T[some_T], low_T2[some_T], extent_T2[some_T, 0]
    edges_T53 = _edge_functions(corner_T33[some_T], orientation_VF.flatten()[drawn_T])
    face_T = drawn_T % n_faces
    base_T = torch.div(drawn_T, n_faces, rounding_mode="floor") * (height * width)

    nearest_Q = torch.full((n_views * height * width,), NOTHING, device=corner_VF33.device)
    for chunk in _chunks(count_T):
        triangle_M, offset_M = _ragged(count_T[chunk])
        triangle_M += chunk.start
        row_M = torch.div(offset_M, columns_T[triangle_M], rounding_mode="floor")
        column_M = offset_M - row_M * columns_T[triangle_M] + low_T2[triangle_M, 0]
        row_M += low_T2[triangle_M, 1]
        inside_M, depth_M = _inside(edges_T53, triangle_M, column_M, row_M)
        triangle_M = triangle_M[inside_M]
        pixel_M = base_T[triangle_M] + row_M[inside_M] * width + column_M[inside_M]
        # Positive floats are ordered as their bits are: depth above, face below, and the smallest wins.
        key_M = (depth_M.float().view(torch.int32).long() << 32) | face_T[triangle_M]
        nearest_Q.scatter_reduce_(0, pixel_M, key_M, "amin")
    return torch.where(nearest_Q == NOTHING, -1, nearest_Q & 0xFFFFFFFF)


def _edge_functions(corner_T33: torch.Tensor, orientation_T: torch.Tensor) -> torch.Tensor:
    """For the edge opposite each corner: a point on it, its direction (inside is positive), 1 / that corner's depth.

    Returns [T, 5, 3]. An edge is measured from the same end, whichever triangle asks, so that two triangles that share
    it get values of exactly opposite sign, and no pixel falls between them.
    """
    start_T33, end_T33 = corner_T33.roll(-1, 1), corner_T33.roll(-2, 1)
    x0, y0, x1, y1 = start_T33[..., 0], start_T33[..., 1], end_T33[..., 0], end_T33[..., 1]
    swap_T3 = (x1 < x0) | ((x1 == x0) & (y1 < y0))
    sign_T3 = orientation_T[:, None] * torch.where(swap_T3, -1, 1)
    x_T3, y_T3 = torch.where(swap_T3, x1, x0), torch.where(swap_T3, y1, y0)
    far_x_T3, far_y_T3 = torch.where(swap_T3, x0, x1), torch.where(swap_T3, y0, y1)
    dx_T3, dy_T3 = sign_T3 * (far_x_T3 - x_T3), sign_T3 * (far_y_T3 - y_T3)
    return torch.stack([x_T3, y_T3, dx_T3, dy_T3, 1 / corner_T33[..., 2]], dim=1)


def _inside(
    edges_T53: torch.Tensor, triangle_M: torch.Tensor, column_M: torch.Tensor, row_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels' centres lie in their triangles, borders included; indices, and the depths there."""
    x_M3, y_M3, dx_M3, dy_M3, inverse_M3 = edges_T53.index_select(0, triangle_M).unbind(1)
    edge_M3 = dx_M3 * (row_M[:, None] + 0.5 - y_M3) - dy_M3 * (column_M[:, None] + 0.5 - x_M3)
    inside = (edge_M3.amin(1) >= 0).nonzero()[:, 0]
    edge_M3, inverse_M3 = edge_M3[inside], inverse_M3[inside]
    return inside, edge_M3.sum(1) / (edge_M3 * inverse_M3).sum(1)


def _chunks(count_T: torch.Tensor) -> list[slice]:
    """Consecutive triangles that have about `PIXELS_AT_ONCE` pixels together, or one that has more."""
    group_T = torch.div(count_T.cumsum(0), PIXELS_AT_ONCE, rounding_mode="floor")
    ends = group_T.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def _ragged(count_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (2, 0, 3) as owners (0, 0, 2, 2, 2) and ranks among an owner's (0, 1, 0, 1, 2)."""
    owner_M = torch.repeat_interleave(count_K)
    rank_M = torch.arange(len(owner_M), device=count_K.device) - (count_K.cumsum(0) - count_K)[owner_M]
    return owner_M, rank_M


def _barycentrics(
    screen_VN3: torch.Tensor, index_P3: torch.Tensor, center_P2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and perspective-correct weights of the corners at pixels' centres, with gradients.

    On the screen 1/z is linear, and so is an attribute over z: with edge functions e_i of the corners, the weights
    are e_i / z_i over their sum, and the depth is Σ e_i over Σ e_i / z_i.
    """
    corner_P33 = screen_VN3.flatten(0, 1).index_select(0, index_P3.flatten()).view(-1, 3, 3)
    away_P32 = corner_P33[..., :2] - center_P2[:, None]
    edge_P3 = _cross(away_P32.roll(-1, 1), away_P32.roll(-2, 1))
    weighted_P3 = edge_P3 / corner_P33[..., 2]
    total_P = weighted_P3.sum(1)
    return edge_P3.sum(1) / total_P, weighted_P3 / total_P[:, None]


@dataclass(frozen=True)
class _Silhouettes:
    """Edges of the mesh whose drawn faces all lie on one side of them in a view, borders included.

    ends_2K: their vertices, flat indices into [V * N]. side_K: 1 if the faces lie where a cross product with the edge
    is positive, else -1.
    """

    ends_2K: torch.Tensor
    side_K: torch.Tensor


@dataclass(frozen=True)
class _Crossings:
    """Where silhouettes pass between the centres of two neighbouring pixels.

    ends_2M: as in `_Silhouettes`. axis_M: 0 for pixels beside each other, 1 for one above the other. near_M, far_M: the
    pixels, flat indices; the surface that ends at the edge is seen in the near one. weight_M: see `_walk_weights`.
    """

    ends_2M: torch.Tensor
    axis_M: torch.Tensor
    near_M: torch.Tensor
    far_M: torch.Tensor
    weight_M: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> _Crossings:
        return _Crossings(
            self.ends_2M[:, index], self.axis_M[index], self.near_M[index], self.far_M[index], self.weight_M[index]
        )


def _silhouettes(screen_VN3: torch.Tensor, faces_F3: torch.Tensor, orientation_VF: torch.Tensor) -> _Silhouettes:
    n_vertices = screen_VN3.shape[1]
    start_H, end_H = faces_F3.flatten(), faces_F3.roll(-1, 1).flatten()  # half-edges: each face's three sides
    key_H = torch.minimum(start_H, end_H) * n_vertices + torch.maximum(start_H, end_H)
    key_E, edge_H = key_H.unique(return_inverse=True)
    side_HV = orientation_VF.T.repeat_interleave(3, 0) * torch.where(start_H < end_H, 1, -1)[:, None]
    count_E2V = side_HV.new_zeros(len(key_E), 2, len(screen_VN3))
    count_E2V.index_add_(0, edge_H, torch.stack([side_HV > 0, side_HV < 0], dim=1).to(side_HV.dtype))
    here_E2V = count_E2V > 0
    edge_K, view_K = (here_E2V[:, 0] != here_E2V[:, 1]).nonzero(as_tuple=True)
    key_K = key_E[edge_K]
    ends_2K = torch.stack([torch.div(key_K, n_vertices, rounding_mode="floor"), key_K % n_vertices])
    return _Silhouettes(ends_2K + view_K * n_vertices, torch.where(here_E2V[edge_K, 0, view_K], 1, -1))


def _walk_weights(step_K2: torch.Tensor) -> torch.Tensor:
    """How much an edge counts when it is followed through the rows of pixels, and through the columns: [2, K].

    Followed through the rows, a stretch of outline changes the picture by all of its area; through the columns, by all
    of it again. So the two must share: steep edges belong to the rows and flat ones to the columns. Around 45 degrees
    the share changes smoothly: a sharp change would make the gradient jump with the single pixels there.
    """
    square_K2 = step_K2.square()
    steep_K = square_K2[:, 1] / square_K2.sum(1).clamp(min=torch.finfo(step_K2.dtype).tiny)
    x_K = ((steep_K - 0.2) / 0.6).clamp(0, 1)
    rows_K = x_K * x_K * (3 - 2 * x_K)
    return torch.stack([rows_K, 1 - rows_K])


def _crossings(
    screen_VN3: torch.Tensor,
    silhouettes: _Silhouettes,
    face_Q: torch.Tensor,
    depth_Q: torch.Tensor,
    height: int,
    width: int,
) -> _Crossings:
    """All visible crossings, at most one for each pair of pixels."""
    size_2, stride_2 = torch.tensor([[width, height], [1, width]], device=face_Q.device)
    end_2K2 = screen_VN3.flatten(0, 1)[silhouettes.ends_2K][..., :2]
    weight_2K = _walk_weights(end_2K2[1] - end_2K2[0])
    axis_K, edge_K = (weight_2K > 0).nonzero(as_tuple=True)  # from here K are edges with a way to follow them
    ends_2K, weight_K = silhouettes.ends_2K[:, edge_K], weight_2K[axis_K, edge_K]
    _, along_2K = _along_axes(screen_VN3, ends_2K, axis_K)
    low_side_K = (along_2K[1] - along_2K[0]) * silhouettes.side_K[edge_K] * (1 - 2 * axis_K) > 0

    # The lines of pixel centres from one end, included, to the other, left out: it belongs to the outline's next edge.
    n_lines_K = size_2[1 - axis_K]
    first_K = (along_2K.amin(0) - 0.5).ceil().clamp(min=0).minimum(n_lines_K).long()
    end_K = (along_2K.amax(0) - 0.5).ceil().minimum(n_lines_K).long()
    owner_M, line_M = _ragged((end_K - first_K).clamp(min=0))
    line_M += first_K[owner_M]
    ends_2M, axis_M, low_side_M = ends_2K[:, owner_M], axis_K[owner_M], low_side_K[owner_M]

    across_M, part_M = _where_crossed(screen_VN3, ends_2M, axis_M, line_M + 0.5)
    depth_M = 1 / torch.lerp(*(1 / screen_VN3[..., 2].flatten()[ends_2M]), part_M)
    lower_M = (across_M - 0.5).floor()
    view_M = torch.div(ends_2M[0], screen_VN3.shape[1], rounding_mode="floor")
    low_M = view_M * (height * width) + line_M * stride_2[1 - axis_M] + lower_M.long() * stride_2[axis_M]
    high_M = low_M + stride_2[axis_M]
    near_M, far_M = torch.where(low_side_M, low_M, high_M), torch.where(low_side_M, high_M, low_M)
    inside_M = ((lower_M >= 0) & (lower_M < size_2[axis_M] - 1)).nonzero()[:, 0]
    found = _Crossings(ends_2M, axis_M, near_M, far_M, weight_K[owner_M])[inside_M]
    return found[_unhidden(found, depth_M[inside_M], face_Q, depth_Q)]


def _unhidden(
    crossings: _Crossings, depth_M: torch.Tensor, face_Q: torch.Tensor, depth_Q: torch.Tensor
) -> torch.Tensor:
    """Crossings that are seen: in front of what the far pixel sees, and the nearest of their pair. Indices."""
    near_M, far_M = crossings.near_M, crossings.far_M
    seen_M = (face_Q[near_M] != face_Q[far_M]) & (depth_Q[near_M] < depth_Q[far_M]) & (depth_M < depth_Q[far_M])
    index_M = seen_M.nonzero()[:, 0]
    pair_M = (torch.minimum(near_M, far_M) * 2 + crossings.axis_M)[index_M]
    key_M = (depth_M[index_M].float().view(torch.int32).long() << 32) | index_M
    first_Q = torch.full((2 * len(face_Q),), NOTHING, device=key_M.device).scatter_reduce_(0, pair_M, key_M, "amin")
    return index_M[first_Q[pair_M] == key_M]


def _along_axes(
    screen_VN3: torch.Tensor, ends_2M: torch.Tensor, axis_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends' coordinates along an axis (0: x, 1: y) and along the other, [2, M] each."""
    numbers = screen_VN3.flatten()
    same = numbers.index_select(0, (ends_2M * 3 + axis_M).flatten())
    other = numbers.index_select(0, (ends_2M * 3 + 1 - axis_M).flatten())
    return same.view(2, -1), other.view(2, -1)


def _where_crossed(
    screen_VN3: torch.Tensor, ends_2M: torch.Tensor, axis_M: torch.Tensor, line_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where edges cross a line along the axis, given by its other coordinate; and at what part of their length."""
    across_2M, along_2M = _along_axes(screen_VN3, ends_2M, axis_M)
    part_M = (line_M - along_2M[0]) / (along_2M[1] - along_2M[0])
    return torch.lerp(*across_2M, part_M), part_M


def _antialias(
    rgba_Q4: torch.Tensor, screen_VN3: torch.Tensor, crossings: _Crossings, height: int, width: int
) -> torch.Tensor:
    """Blend neighbours where a silhouette passes between them.

    A surface that reaches t of the way from its pixel's centre to the next, 0 <= t < 1, covers t - 1/2 of the next
    pixel, or leaves 1/2 - t of its own to what is behind: either way the pair's sum grows by the same with t.
    """
    near_M, far_M, axis_M = crossings.near_M, crossings.far_M, crossings.axis_M
    center_M2 = _centers(near_M, height, width).to(screen_VN3.dtype)
    line_M = center_M2.gather(1, 1 - axis_M[:, None])[:, 0]
    center_M = center_M2.gather(1, axis_M[:, None])[:, 0]
    across_M, _ = _where_crossed(screen_VN3, crossings.ends_2M, axis_M, line_M)
    reach_M = (across_M - center_M) * (far_M - near_M).sign() - 0.5
    blended_M = torch.where(reach_M > 0, far_M, near_M)
    share_M = reach_M * crossings.weight_M
    # A pixel with silhouettes on several sides is at most covered, or uncovered, whole.
    total_Q = torch.zeros_like(rgba_Q4[:, 0]).index_add(0, blended_M, share_M.abs())
    share_M = share_M / total_Q.clamp(min=1)[blended_M]
    return rgba_Q4.index_add(0, blended_M, share_M[:, None] * (rgba_Q4[near_M] - rgba_Q4[far_M]))
