"""Meshes from implicit functions: marching cubes where the signed distance is zero.

The lattice is Shap-E's: n points an axis, the first and the last on the faces of the box [-1, 1]^3, and around it a
shell of outside values that closes every surface. (Shap-E then squeezes lattice and shell into the box, which shrinks
its meshes by (n - 1) / (n + 1); ours keep their size.)

Of the n^3 points only those that may touch the surface are evaluated, a few in a hundred. The lattice is refined by
halving its steps. A distance that changes by at most L a step cannot vanish within |f| / L steps, so a new point whose
neighbours vouch for its sign keeps it, with the distance that is left, and the others are evaluated. L is read off the
values around: the largest slope seen there, and half of it more. In the end every corner of a cell with both signs is
evaluated, and whatever this shows to have both signs, so that where a piece of surface was seen, it is whole.

Shapes: N points along each axis (M of a coarser lattice), P points, V vertices, F faces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import ceil, log2, nan, sqrt
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import UserError
from .decoder import ImplicitField
from .marching_cubes import marching_cubes

__all__ = ["ExtractedMesh", "extract_mesh"]

BLOCKS = 16  # steps of the first lattice along an axis, about; a surface is lost only if it hides from this one
MARGIN = 1.5  # of a slope bound over the slopes seen around; of 2,016 random thin shapes 1.25 loses five, 1.5 none
OUTSIDE = 1.0  # the shell's value
PROBES, ROUGHNESS = 2048, 2.0  # see `_is_rough`
CHUNK, CUDA_CHUNK = 1 << 12, 1 << 17  # points a call of the field: a CPU's caches, a GPU's many units
BYTES_A_POINT = 18  # of the lattice at the peak of an extraction: 17 measured at 256 points an axis, 12 at 512


@dataclass(frozen=True)
class ExtractedMesh:
    """vertices [V, 3] in the object frame, faces [F, 3] wound outward, rgb [V, 3] sRGB; no faces without a surface.

    sdf_range: the least and the greatest signed distance seen, which tell why a mesh is empty.
    """

    vertices: np.ndarray
    faces: np.ndarray
    rgb: np.ndarray
    sdf_range: tuple[float, float] = (nan, nan)

    @property
    def empty(self) -> bool:
        return len(self.faces) == 0


@torch.inference_mode()
def extract_mesh(field: ImplicitField, resolution: int = 64) -> list[ExtractedMesh]:
    """The surfaces of a batch of fields, one closed mesh an asset.

    A surface that leaves the box is closed within one lattice step outside it.

    Args:
        field: B fields over [-1, 1]^3, signed distance negative inside; a distance or its tanh. They are asked for
            points a little outside the box too.
        resolution: lattice points along each axis, the box's faces included; 4 or more.
    Returns: B meshes; an asset whose distance never changes sign, or is not finite, gives an empty one.
    Raises: UserError for a resolution below 4 or too fine for the memory that is free.
    """
    if resolution < 4:
        raise UserError(f"mesh resolution must be at least 4 points along an axis, got {resolution}")
    _check_memory(resolution, field.device)
    return [_extract_one(field[b], resolution) for b in range(len(field))]


def _extract_one(field: ImplicitField, n: int) -> ExtractedMesh:
    values_NNN, known_NNN = _near_surface(field, n)
    seen = values_NNN[known_NNN]
    sdf_range = (seen.min().item(), seen.max().item())
    if not sdf_range[0] < 0 <= sdf_range[1]:  # also where they are nan
        nothing = np.zeros((0, 3), np.float32)
        return ExtractedMesh(nothing, nothing.astype(np.int32), nothing, sdf_range)
    values = F.pad(values_NNN, (1,) * 6, value=OUTSIDE)
    del values_NNN, seen
    _complete(field, n, values, known_NNN)
    corner_3 = torch.full((3,), (n + 1) / (n - 1))
    vertices_V3, faces_F3 = marching_cubes(values.neg_(), (-corner_3, corner_3))
    rgb_V3 = _query(field, vertices_V3, lambda found: found.rgb_BP3).clamp(0, 1)
    return ExtractedMesh(vertices_V3.cpu().numpy(), faces_F3.int().cpu().numpy(), rgb_V3.cpu().numpy(), sdf_range)


def _near_surface(field: ImplicitField, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed distances [N, N, N] and where they are evaluated; elsewhere a number of the right sign.

    Not finite on the first lattice, they come back as they are on that one.
    """
    stride = 2 ** round(log2((n - 1) / BLOCKS)) if n > 3 * BLOCKS else 1  # so few points are evaluated one and all
    values_MMM = _lattice(field, n, stride)
    squashed = bool(values_MMM.abs().max() <= 1)
    if stride > 1 and _is_rough(field, n, stride, values_MMM, squashed):
        stride, values_MMM = 1, _lattice(field, n, 1)
    known_MMM = torch.ones_like(values_MMM, dtype=torch.bool)
    if not values_MMM.isfinite().all():
        return values_MMM, known_MMM
    while stride > 1:
        slope_MMM = _slope_bound(values_MMM, known_MMM, squashed)
        # Where a point is not known, its value is its clearance already.
        clearance_MMM = torch.where(known_MMM, _unsquashed(values_MMM, squashed) / slope_MMM, values_MMM)
        stride //= 2
        size = ceil((n - 1) / stride) + 1
        finer, unsure = (part[:size, :size, :size] for part in _refined(clearance_MMM))
        found = _settle(field, n, stride, finer, unsure, slope_MMM, squashed)
        every_second = (slice(None, None, 2),) * 3
        old = tuple(slice(0, length) for length in finer[every_second].shape)
        known = torch.zeros_like(unsure)
        finer[every_second], known[every_second] = values_MMM[old], known_MMM[old]
        for points_P3, sdf_P in found:
            at = points_P3.unbind(-1)
            finer[at], known[at] = sdf_P, True
        values_MMM, known_MMM = finer, known
    return values_MMM, known_MMM


def _lattice(field: ImplicitField, n: int, stride: int) -> torch.Tensor:
    """Signed distances at every so many lattice points, [M, M, M]; the last may lie outside the box."""
    size = ceil((n - 1) / stride) + 1
    everywhere = torch.ones((size,) * 3, dtype=torch.bool, device=field.device)
    return _evaluate(field, n, everywhere.nonzero() * stride).reshape((size,) * 3)


def _is_rough(field: ImplicitField, n: int, stride: int, values_MMM: torch.Tensor, squashed: bool) -> bool:
    """Whether slopes over single steps are far above those over `stride` steps: then a coarse lattice tells nothing.

    Of trained fields they are 1.3 to 1.5 times as large, of random weights (noise at every scale) 3 to 12 times.
    """
    generator = torch.Generator().manual_seed(0)
    from_P3 = torch.randint(0, n - 1, (PROBES, 3), generator=generator).to(field.device)
    to_P3 = from_P3 + torch.eye(3, dtype=torch.long, device=field.device).repeat(ceil(PROBES / 3), 1)[:PROBES]
    from_P, to_P = (_unsquashed(_evaluate(field, n, points_P3), squashed) for points_P3 in (from_P3, to_P3))
    fine = (to_P - from_P).abs().mean()
    distance_MMM = _unsquashed(values_MMM, squashed)
    coarse = torch.stack([distance_MMM.diff(dim=axis).abs().mean() for axis in range(3)]).mean() / stride
    return bool(fine > ROUGHNESS * coarse)


def _slope_bound(values_MMM: torch.Tensor, known_MMM: torch.Tensor, squashed: bool) -> torch.Tensor:
    """The most that the distance changes in one step of this lattice around each point.

    Args:
        squashed: undo a tanh first, under which slopes fade with distance. A plain distance, too, may be taken for
            squashed: near the surface, where it matters, this changes nothing.
    """
    distance_MMM = _unsquashed(values_MMM, squashed)
    here, next_ = slice(None, -1), slice(1, None)
    corner, ahead = (here, here, here), ((next_, here, here), (here, next_, here), (here, here, next_))
    measured = reduce(torch.logical_and, (known_MMM[at] for at in (corner, *ahead)))
    squares = sum((distance_MMM[at] - distance_MMM[corner]).square() for at in ahead)
    slope = torch.where(measured, squares.sqrt(), 0)
    mean = slope.sum() / measured.sum().clamp(min=1)  # a floor, for places as flat as the middle between two walls
    return MARGIN * torch.maximum(_windows(torch.maximum, F.pad(slope, (2,) * 6), (4, 4, 4)), mean)


def _unsquashed(values: torch.Tensor, squashed: bool) -> torch.Tensor:
    return values.clamp(-1 + 2**-24, 1 - 2**-24).atanh() if squashed else values


def _refined(clearance_MMM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clearances on the lattice of half the steps, in those, and the new points whose sign they leave open.

    A new point lies amid 2, 4 or 8 old ones. Where none vouches for its sign, or two contradict each other, it is open.
    """
    size = 2 * len(clearance_MMM) - 1
    finer = clearance_MMM.new_zeros((size,) * 3)
    unsure = torch.zeros_like(finer, dtype=torch.bool)
    for shift in product((0, 1), repeat=3):
        if not any(shift):
            continue
        widths = [1 + a for a in shift]
        high = _windows(torch.maximum, clearance_MMM, widths)
        low = _windows(torch.minimum, clearance_MMM, widths)
        reach = sqrt(sum(shift)) / 2
        at = tuple(slice(a, None, 2) for a in shift)
        unsure[at] = (high > reach) == (low < -reach)
        finer[at] = 2 * torch.where(high > reach, high - reach, low + reach)
    return finer, unsure


def _settle(
    field: ImplicitField,
    n: int,
    stride: int,
    clearance: torch.Tensor,
    unsure: torch.Tensor,
    slope_MMM: torch.Tensor,
    squashed: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Points [P, 3] that had to be evaluated and their values [P]; `clearance` is completed in place.

    The middles of the old cells come first, then those of their faces and of their edges: what is found at one kind
    vouches for the next, one step away, and spares a third of the evaluations.
    """
    clearance[unsure] = 0  # which vouches for nothing
    points_P3 = unsure.nonzero()
    odd_P = (points_P3 % 2).sum(-1)
    one_step_63 = torch.cat([torch.eye(3), -torch.eye(3)]).long().to(points_P3.device)
    found = []
    for odd in (3, 2, 1):
        kind_P3 = points_P3[odd_P == odd]
        around_P63 = (kind_P3[:, None] + one_step_63).clamp(0, len(clearance) - 1)
        near_P6 = clearance[around_P63.unbind(-1)]
        high_P, low_P = near_P6.amax(-1) - 1, near_P6.amin(-1) + 1
        clearance[kind_P3.unbind(-1)] = torch.where(high_P > 0, high_P, low_P)
        open_P3 = kind_P3[(high_P > 0) == (low_P < 0)]
        sdf_P = _evaluate(field, n, open_P3 * stride)
        slope_P = slope_MMM[(open_P3 // 2).unbind(-1)] / 2  # its steps are twice as long
        clearance[open_P3.unbind(-1)] = _unsquashed(sdf_P, squashed) / slope_P
        found.append((open_P3, sdf_P))
    return found


def _complete(field: ImplicitField, n: int, padded: torch.Tensor, known_NNN: torch.Tensor) -> None:
    """Evaluate, in place, the corners of all cells with both signs; `padded` has a shell around the lattice."""
    inner = (slice(1, -1),) * 3
    while True:
        inside = padded < 0
        # A point is such a corner if not all of the 3x3x3 points around it are on one side.
        near_NNN = _windows(torch.logical_or, inside, (3, 3, 3)) & ~_windows(torch.logical_and, inside, (3, 3, 3))
        missing_P3 = (near_NNN & ~known_NNN).nonzero()
        if not len(missing_P3):
            return
        at = missing_P3.unbind(-1)
        padded[inner][at] = _evaluate(field, n, missing_P3)
        known_NNN[at] = True


def _windows(
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], lattice: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """`combine` the values in every window of so many points along each axis."""
    for axis, width in enumerate(widths):
        length = lattice.shape[axis] - width + 1
        lattice = reduce(combine, (lattice.narrow(axis, i, length) for i in range(width)))
    return lattice


def _evaluate(field: ImplicitField, n: int, indices_P3: torch.Tensor) -> torch.Tensor:
    """Signed distances [P] at lattice points."""
    return _query(field, indices_P3 / (n - 1) * 2 - 1, lambda found: found.sdf_BP)


def _query(field: ImplicitField, points_P3: torch.Tensor, pick: Callable) -> torch.Tensor:
    """What `pick` takes of the field's values at points, in float32."""
    chunks = points_P3.split(CUDA_CHUNK if points_P3.is_cuda else CHUNK)  # one chunk if there are no points
    return torch.cat([pick(field(chunk[None]))[0].float() for chunk in chunks])


def _check_memory(n: int, device: torch.device) -> None:
    need, free = n**3 * BYTES_A_POINT, _free_bytes(device)
    if need > free:
        fit = int((free / BYTES_A_POINT) ** (1 / 3))
        raise UserError(
            f"a mesh of {n} lattice points along each axis needs about {need / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; at most {fit} points would fit"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS does not say what is free
