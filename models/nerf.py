"""Volume rendering of implicit functions (NeRF, arXiv 2003.08934, §4 and §5.2), in Shap-E's two passes.

The part of a ray inside [-1, 1]^3 is sampled evenly, then again where the field's coarse head saw something; its fine
head is integrated over both. A field gives both heads at once, so no point is evaluated twice.

Shapes: B assets, R rays, S samples on a ray, of which C coarse and F fine; a star stands for an optional B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch

from ..errors import UserError
from .cameras import Cameras
from .decoder import FieldValues
from .occupancy import RESOLUTION, Field, Occupancy, in_chunks

__all__ = ["RayNoise", "RenderedRays", "integrate", "render_nerf", "render_rays"]

DIRECTION_EPSILON = 1e-6  # keeps the crossings of a ray that is parallel to a face finite
SHORTEST_CROSSING = 1e-3  # a ray that is in the box for less has missed it
PMF_FLOOR = 1e-5  # weight that every interval keeps, so that fine samples see what coarse ones did not


@dataclass(frozen=True)
class RenderedRays:
    """What rays see, before any background.

    rgb, coarse_rgb: [*, R, 3] sRGB times alpha; by the fine head at all samples, by the coarse head at the coarse ones.
    alpha, coarse_alpha: [*, R] in [0, 1], 1 - transmittance.
    depth: [*, R] expected distance along the ray to what stops it, object-frame units; 0 where nothing does.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor
    depth: torch.Tensor
    coarse_rgb: torch.Tensor
    coarse_alpha: torch.Tensor

    def over(self, background_3: torch.Tensor) -> torch.Tensor:
        """rgb [*, R, 3] in front of a constant colour."""
        return self.rgb + (1 - self.alpha)[..., None] * background_3


@dataclass(frozen=True)
class RayNoise:
    """Uniform numbers in [0, 1) that place the samples of each ray.

    coarse: [*, R, C] places in the coarse intervals.
    choice: [*, R, F] which interval a fine sample falls in, as a value of the cumulative weights.
    place: [*, R, F] where in it.
    """

    coarse: torch.Tensor
    choice: torch.Tensor
    place: torch.Tensor

    @classmethod
    def draw(
        cls,
        *rays: int,
        n_coarse: int = 64,
        n_fine: int = 128,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> RayNoise:
        """Noise for [*, R] `rays`, on `device` whatever the generator's; the three are drawn in their order."""
        counts = (n_coarse, n_fine, n_fine)
        return cls(*(torch.rand(*rays, n, generator=generator, device=generator.device).to(device) for n in counts))


def integrate(
    density_RS: torch.Tensor, rgb_RS3: torch.Tensor, step_RS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C = Σ T_i (1 - exp(-σ_i δ_i)) c_i, T_i = exp(-Σ_{j<i} σ_j δ_j)   (NeRF, eq. 3).

    Returns: rgb_R3 (premultiplied), alpha_R in [0, 1], weights_RS.
    Example: a slab of density 2 and thickness 0.5 has alpha 1 - 1/e.
    """
    optical_RS = density_RS * step_RS
    transmittance_RS = torch.exp(-(optical_RS.cumsum(-1) - optical_RS))
    weights_RS = transmittance_RS * -torch.expm1(-optical_RS)
    return (weights_RS[..., None] * rgb_RS3).sum(-2), weights_RS.sum(-1), weights_RS


def render_rays(
    field: Field,
    origins: torch.Tensor,
    directions: torch.Tensor,
    *,
    n_coarse: int = 64,
    n_fine: int = 128,
    noise: RayNoise | None = None,
    occupancy: Occupancy | None = None,
) -> RenderedRays:
    """Integrate B fields along rays inside the box [-1, 1]^3; a ray that misses it sees nothing.

    Gradients reach the field's weights through its values, not through where the samples lie.

    Args:
        field: B assets.
        origins, directions: [B, R, 3], object frame, unit directions; or [R, 3] for a field of one asset.
        n_coarse: samples spread evenly, by midpoints of linspace(near, far, n_coarse).
        n_fine: samples placed where the coarse head found something; 0 integrates the fine head at the coarse ones.
        noise: places of the samples (training); None takes the middles of the coarse intervals and even steps of the
            cumulative weights (deterministic, and each ray on its own).
        occupancy: of the same field; samples in its empty cells are not evaluated and have no density.
    Raises: ValueError if shapes, asset counts or noise disagree.
    """
    if origins.dim() == 2:
        seen = render_rays(
            field,
            origins[None],
            directions[None],
            n_coarse=n_coarse,
            n_fine=n_fine,
            noise=None if noise is None else _map(noise, lambda x: x[None]),
            occupancy=occupancy,
        )
        return _map(seen, lambda x: x[0])
    _check(field, origins, directions, n_coarse, n_fine, noise)
    near_BR, far_BR = _box_crossing(origins.detach(), directions.detach())
    rays = _Rays(origins, directions, near_BR[..., None], far_BR[..., None])
    hit_BR = far_BR > near_BR + SHORTEST_CROSSING
    packed = _Packed(hit_BR if occupancy is None else hit_BR & _meets(rays, occupancy))
    rays = _map(rays, packed.take)
    seen = _render(field, rays, n_coarse, n_fine, None if noise is None else _map(noise, packed.take), occupancy)
    return _map(seen, packed.restore)


@torch.inference_mode()
def render_nerf(
    field: Field,
    cameras: Cameras,
    *,
    n_coarse: int = 64,
    n_fine: int = 128,
    skip_empty: bool = True,
    chunk: int = 4096,
) -> np.ndarray:
    """Views of one asset, RGBA uint8 [V, H, W, 4], straight alpha, sRGB; the same for any `chunk`, to rounding.

    Args:
        skip_empty: find empty space first (see `Occupancy`) and evaluate nothing there, unless so few rays are asked
            for that finding it would cost more. False evaluates every sample.
        chunk: rays at a time; memory is below 100 kB a ray at 192 samples.
    Raises: UserError for an image or a number of samples below 1; ValueError for a batch of assets.
    """
    if min(cameras.width, cameras.height, n_coarse, chunk) < 1 or n_fine < 0:
        raise UserError(
            f"a {cameras.width}x{cameras.height} image with {n_coarse} + {n_fine} samples a ray, {chunk} rays at a "
            "time, cannot be rendered; width, height, coarse samples and rays must be at least 1"
        )
    if len(field) != 1:
        raise ValueError(f"render_nerf draws one asset, got {len(field)}")
    origins_R3, directions_R3 = (torch.from_numpy(x.reshape(-1, 3)).to(field.device) for x in cameras.rays())
    worth_it = len(origins_R3) * (n_coarse + n_fine) > 2 * RESOLUTION**3
    occupancy = Occupancy.of(field) if skip_empty and worth_it else None
    rows = []
    for origins, directions in zip(origins_R3.split(chunk), directions_R3.split(chunk)):
        seen = render_rays(field, origins, directions, n_coarse=n_coarse, n_fine=n_fine, occupancy=occupancy)
        rows.append(torch.cat([seen.rgb / seen.alpha.clamp(min=1e-6)[:, None], seen.alpha[:, None]], dim=-1))
    rgba = torch.cat(rows).clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return rgba.reshape(len(cameras), cameras.height, cameras.width, 4)


@dataclass(frozen=True)
class _Rays:
    """Rays and the distances at which they enter and leave the box."""

    origins_BR3: torch.Tensor
    directions_BR3: torch.Tensor
    near_BR1: torch.Tensor
    far_BR1: torch.Tensor

    def edges(self, t_BRS: torch.Tensor) -> torch.Tensor:
        """The ends [B, R, S + 1] of the intervals that samples stand for: halfway to their neighbours."""
        return torch.cat([self.near_BR1, (t_BRS[..., 1:] + t_BRS[..., :-1]) * 0.5, self.far_BR1], dim=-1)

    def points(self, t_BRS: torch.Tensor) -> torch.Tensor:
        """Places [B, R * S, 3]."""
        return (self.origins_BR3[:, :, None] + t_BRS[..., None] * self.directions_BR3[:, :, None]).flatten(1, 2)


class _Packed:
    """Marked elements of each asset's row moved to its front; rows padded with zeros to the longest, M."""

    def __init__(self, marked_BN: torch.Tensor) -> None:
        counts_B = marked_BN.sum(1)
        self.marked_BN = marked_BN
        self.filled_BM = torch.arange(int(counts_B.max()), device=marked_BN.device) < counts_B[:, None]

    def take(self, x_BN: torch.Tensor) -> torch.Tensor:
        """[B, N, ...] to [B, M, ...]."""
        return _move(x_BN, self.marked_BN, self.filled_BM)

    def restore(self, x_BM: torch.Tensor) -> torch.Tensor:
        """[B, M, ...] to [B, N, ...], zero where nothing was marked."""
        return _move(x_BM, self.filled_BM, self.marked_BN)


def _move(x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Elements of `x` where `source` is set, in order, to where `target` is; both masks have as many in each row."""
    return x.new_zeros(*target.shape, *x.shape[2:]).index_put((target,), x[source])


Record = TypeVar("Record", RayNoise, RenderedRays, _Rays)


def _map(record: Record, change: Callable[[torch.Tensor], torch.Tensor]) -> Record:
    return type(record)(*(change(getattr(record, field.name)) for field in fields(record)))


def _check(
    field: Field,
    origins_BR3: torch.Tensor,
    directions_BR3: torch.Tensor,
    n_coarse: int,
    n_fine: int,
    noise: RayNoise | None,
) -> None:
    assets, rays = origins_BR3.shape[:2]
    if origins_BR3.shape != (len(field), rays, 3) or directions_BR3.shape != origins_BR3.shape:
        raise ValueError(
            f"rays must be [{len(field)}, R, 3] for {len(field)} assets, "
            f"got {list(origins_BR3.shape)} and {list(directions_BR3.shape)}"
        )
    if noise is not None:
        expected = [(assets, rays, n) for n in (n_coarse, n_fine, n_fine)]
        got = [tuple(x.shape) for x in (noise.coarse, noise.choice, noise.place)]
        if got != expected:
            raise ValueError(f"noise must have shapes {expected}, got {got}")


def _box_crossing(origins_BR3: torch.Tensor, directions_BR3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances near_BR, far_BR at which rays enter and leave [-1, 1]^3, from the origin on; far < near is a miss."""
    away = torch.where(directions_BR3 < 0, directions_BR3 - DIRECTION_EPSILON, directions_BR3 + DIRECTION_EPSILON)
    ends = torch.stack([(-1 - origins_BR3) / away, (1 - origins_BR3) / away])
    return ends.amin(0).amax(-1).clamp(min=0), ends.amax(0).amin(-1)


def _meets(rays: _Rays, occupancy: Occupancy) -> torch.Tensor:
    """hit_BR: rays that may cross an occupied cell.

    Asked at places at most two cells' sides apart: wherever a ray is, one of them is in its cell or in one around it.
    """
    n_places = math.ceil(3**0.5 * occupancy.cells_BNNN.shape[-1] / 2)  # on the box's diagonal
    middles_S = (torch.arange(n_places, device=rays.near_BR1.device) + 0.5) / n_places
    points_BP3 = rays.points(rays.near_BR1 + (rays.far_BR1 - rays.near_BR1) * middles_S)
    return occupancy.around(points_BP3).unflatten(1, (-1, n_places)).any(-1)


def _render(
    field: Field, rays: _Rays, n_coarse: int, n_fine: int, noise: RayNoise | None, occupancy: Occupancy | None
) -> RenderedRays:
    t_BRS = _spread(rays, n_coarse, noise)
    values_BRS8 = _along(field, rays, t_BRS, occupancy, _both_heads)
    values_BRS4, coarse_BRC4 = values_BRS8.split(4, dim=-1)
    edges_BRS = rays.edges(t_BRS)
    coarse_rgb, coarse_alpha, weights_BRC = integrate(coarse_BRC4[..., 0], coarse_BRC4[..., 1:], edges_BRS.diff(dim=-1))
    if n_fine:
        fine_BRF = _importance(edges_BRS, weights_BRC.detach(), n_fine, noise)
        fine_BRF4 = _along(field, rays, fine_BRF, occupancy, _fine_head)
        t_BRS, order_BRS = torch.cat([t_BRS, fine_BRF], dim=-1).sort(dim=-1)
        values_BRS4 = torch.cat([values_BRS4, fine_BRF4], dim=2)
        values_BRS4 = values_BRS4.gather(2, order_BRS[..., None].expand(-1, -1, -1, 4))
    steps_BRS = rays.edges(t_BRS).diff(dim=-1)
    rgb, alpha, weights_BRS = integrate(values_BRS4[..., 0], values_BRS4[..., 1:], steps_BRS)
    depth = (weights_BRS * t_BRS).sum(-1) / alpha.clamp(min=1e-6)
    return RenderedRays(rgb, alpha, depth, coarse_rgb, coarse_alpha)


def _spread(rays: _Rays, n_coarse: int, noise: RayNoise | None) -> torch.Tensor:
    """One position in each of the intervals around linspace(near, far, C); the first and last are half as long."""
    grid_C = torch.linspace(0, 1, n_coarse, device=rays.near_BR1.device, dtype=rays.near_BR1.dtype)
    edges_BRC = rays.edges(rays.near_BR1 * (1 - grid_C) + rays.far_BR1 * grid_C)
    place = 0.5 if noise is None else noise.coarse
    return edges_BRC[..., :-1] + edges_BRC.diff(dim=-1) * place


def _importance(
    edges_BRS: torch.Tensor, weights_BRC: torch.Tensor, n_fine: int, noise: RayNoise | None
) -> torch.Tensor:
    """F positions a ray by inverting the cumulative weights (NeRF, §5.2); places in an interval are the noise's."""
    pmf_BRC = weights_BRC + PMF_FLOOR
    pmf_BRC = pmf_BRC / pmf_BRC.sum(-1, keepdim=True)
    cdf_BRC = pmf_BRC.cumsum(-1)
    if noise is None:
        even_F = (torch.arange(n_fine, device=cdf_BRC.device, dtype=cdf_BRC.dtype) + 0.5) / n_fine
        choice_BRF = even_F.expand(*cdf_BRC.shape[:-1], -1).contiguous()
    else:
        choice_BRF = noise.choice
    index_BRF = torch.searchsorted(cdf_BRC, choice_BRF).clamp(max=cdf_BRC.shape[-1] - 1)
    if noise is None:
        start_BRF = (cdf_BRC - pmf_BRC).gather(-1, index_BRF)
        place_BRF = ((choice_BRF - start_BRF) / pmf_BRC.gather(-1, index_BRF)).clamp(0, 1)
    else:
        place_BRF = noise.place
    lower_BRF, upper_BRF = edges_BRS[..., :-1].gather(-1, index_BRF), edges_BRS[..., 1:].gather(-1, index_BRF)
    return lower_BRF + (upper_BRF - lower_BRF) * place_BRF


def _along(
    field: Field,
    rays: _Rays,
    t_BRS: torch.Tensor,
    occupancy: Occupancy | None,
    read: Callable[[FieldValues], torch.Tensor],
) -> torch.Tensor:
    """What `read` takes from the field at the samples, [B, R, S, ...]; zero in empty cells."""
    points_BP3 = rays.points(t_BRS)
    if occupancy is None:
        values_BP = in_chunks(field, points_BP3, read)
    else:
        packed = _Packed(occupancy(points_BP3))
        values_BP = packed.restore(in_chunks(field, packed.take(points_BP3), read))
    return values_BP.unflatten(1, t_BRS.shape[1:]).to(t_BRS.dtype)


def _fine_head(values: FieldValues) -> torch.Tensor:
    """Density and rgb, [B, P, 4]."""
    return torch.cat([values.density_BP[..., None], values.volume_rgb_BP3], dim=-1)


def _both_heads(values: FieldValues) -> torch.Tensor:
    """The fine head's, then the coarse head's: [B, P, 8]."""
    coarse_BP4 = torch.cat([values.coarse_density_BP[..., None], values.coarse_rgb_BP3], dim=-1)
    return torch.cat([_fine_head(values), coarse_BP4], dim=-1)
