"""Where a field may have density: a lattice of cells over [-1, 1]^3, and the chunked evaluation that fills it.

Shapes: B assets, P points, N cells along an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from .decoder import FieldValues

__all__ = ["RESOLUTION", "Field", "Occupancy", "in_chunks"]

RESOLUTION = 64
# A ray through the whole box at this density (1/unit) ends with alpha 3.5e-5: 89 dB if every pixel were so.
EMPTY_DENSITY = 1e-5
CROWD = 0.26  # of a cell and its 26 neighbours; finds in a sparser crowd may be all that was hit of a thin part
CPU_CHUNK, GPU_CHUNK = 1 << 11, 1 << 18  # points a call: activations that stay in a core's cache; that fill a GPU


class Field(Protocol):
    """What can be rendered: B assets that are called with points [B, P, 3], as `ImplicitField`."""

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> Field: ...

    def __call__(self, points_BP3: torch.Tensor) -> FieldValues: ...


def in_chunks(field: Field, points_BP3: torch.Tensor, read: Callable[[FieldValues], torch.Tensor]) -> torch.Tensor:
    """What `read` takes from the field at any number of points, without holding the activations of all of them."""
    size = max(1, (CPU_CHUNK if points_BP3.device.type == "cpu" else GPU_CHUNK) // len(points_BP3))
    return torch.cat([read(field(chunk_BP3)) for chunk_BP3 in points_BP3.split(size, dim=1)], dim=1)


class Occupancy:
    """Cells of [-1, 1]^3 that are not known to be empty; call it with points to ask.

    Args:
        cells_BNNN: bool, cell [i, j, k] of an asset at x, y, z.
    """

    def __init__(self, cells_BNNN: torch.Tensor) -> None:
        self.cells_BNNN = cells_BNNN
        self._around_BNNN = _near(cells_BNNN, 1)

    @classmethod
    @torch.no_grad()
    def of(cls, field: Field, resolution: int = RESOLUTION) -> Occupancy:
        """Look for density, coarse or fine, in the cells of [-1, 1]^3.

        Every cell is asked at one point, then the empty neighbours of finds twice more, against thin parts; what is
        found is widened by a cell, and by three where it stands alone, as a part thinner than a cell does. What can be
        lost is a speck apart from all else, smaller than a cell.
        """
        assets = [field] if len(field) == 1 else [field[b] for b in range(len(field))]
        return cls(torch.stack([_Search(asset, resolution).cells() for asset in assets]))

    def __call__(self, points_BP3: torch.Tensor) -> torch.Tensor:
        """occupied_BP; points outside the box are taken to its nearest cell."""
        return _look_up(self.cells_BNNN, points_BP3)

    def around(self, points_BP3: torch.Tensor) -> torch.Tensor:
        """Whether each point's cell or one of its neighbours is occupied, [B, P]."""
        return _look_up(self._around_BNNN, points_BP3)


class _Search:
    """One asset's occupied cells, found by asking ever more of them.

    A cell is asked at a random place in it: on a regular lattice, thin plates and rods along an axis could run between
    the planes from end to end. The places are the same in every search.
    """

    def __init__(self, field: Field, resolution: int) -> None:
        self.field = field
        self.generator = torch.Generator().manual_seed(0)
        self.found_NNN = torch.zeros((resolution,) * 3, dtype=torch.bool, device=field.device)

    def cells(self) -> torch.Tensor:
        self._ask(torch.ones_like(self.found_NNN))
        for _ in range(2):
            self._ask(_near(self.found_NNN, 1) & ~self.found_NNN)
        crowd_NNN = F.avg_pool3d(self.found_NNN[None].float(), 3, stride=1, padding=1)[0]
        return _near(self.found_NNN, 1) | _near(self.found_NNN & (crowd_NNN < CROWD), 3)

    def _ask(self, cells_NNN: torch.Tensor) -> None:
        """Evaluate one point in each of these cells."""
        corners_P3 = cells_NNN.nonzero()
        if not len(corners_P3):
            return
        places_P3 = torch.rand(corners_P3.shape, generator=self.generator).to(corners_P3.device)
        points_P3 = (corners_P3 + places_P3) * (2 / len(cells_NNN)) - 1
        density_P = in_chunks(self.field, points_P3[None], _largest_density)[0]
        self.found_NNN[cells_NNN] |= ~(density_P <= EMPTY_DENSITY)  # NaN is not empty: it shall be seen


def _near(cells: torch.Tensor, reach: int) -> torch.Tensor:
    """Cells within `reach` cells, along each axis, of one that is set; [..., N, N, N]."""
    shape = cells.shape
    dilated = F.max_pool3d(cells.reshape(-1, 1, *shape[-3:]).float(), 2 * reach + 1, stride=1, padding=reach)
    return (dilated > 0).reshape(shape)


def _look_up(cells_BNNN: torch.Tensor, points_BP3: torch.Tensor) -> torch.Tensor:
    n = cells_BNNN.shape[-1]
    x_BP, y_BP, z_BP = ((points_BP3 + 1) * (n / 2)).clamp(0, n - 1).long().unbind(-1)
    return cells_BNNN.flatten(1).gather(1, (x_BP * n + y_BP) * n + z_BP)


def _largest_density(values: FieldValues) -> torch.Tensor:
    return torch.maximum(values.density_BP, values.coarse_density_BP)
