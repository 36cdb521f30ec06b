"""Volume rendering of implicit functions (NeRF, arXiv 2003.08934, §4 and §5.2).

Shapes: B assets, R rays, S samples.
"""

from __future__ import annotations

import numpy as np
import torch

from .cameras import Cameras
from .decoder import ImplicitField

__all__ = ["integrate", "render_nerf", "render_rays"]


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
    field: ImplicitField,
    origins_R3: torch.Tensor,
    directions_R3: torch.Tensor,
    *,
    n_coarse: int = 48,
    n_fine: int = 48,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrate one field along rays inside the box [-1, 1]^3.

    Args:
        field: one asset (a batch of one).
        origins_R3, directions_R3: object frame, unit directions.
        n_coarse: samples spread evenly; n_fine more are placed where the coarse ones found density.
        generator: jitters the samples within their steps (training); None takes their middles (deterministic).
    Returns: rgb_R3 premultiplied by alpha, alpha_R.
    """
    inverse_R3 = 1 / torch.where(directions_R3.abs() < 1e-9, torch.full_like(directions_R3, 1e-9), directions_R3)
    ends = torch.stack([(-1 - origins_R3) * inverse_R3, (1 - origins_R3) * inverse_R3])
    near_R = ends.amin(0).amax(-1).clamp(min=0)
    far_R = ends.amax(0).amin(-1)
    hit_R = far_R > near_R + 1e-3
    rgb_R3, alpha_R = torch.zeros_like(origins_R3), torch.zeros_like(near_R)
    if not bool(hit_R.any()):
        return rgb_R3, alpha_R
    origins, directions = origins_R3[hit_R], directions_R3[hit_R]
    near, far = near_R[hit_R, None], far_R[hit_R, None]

    edges_RS = near + (far - near) * torch.linspace(0, 1, n_coarse + 1, device=near.device)
    offset = _offsets(len(near), n_coarse, near.device, generator)
    t_RS = edges_RS[:, :-1] + offset * edges_RS.diff(dim=-1)
    values = _along(field, origins, directions, t_RS)
    if n_fine:
        _, _, weights_RS = integrate(values[..., 0], values[..., 1:], edges_RS.diff(dim=-1))
        fine_RS = _importance(edges_RS, weights_RS.detach() + 1e-5, _offsets(len(near), n_fine, near.device, generator))
        fine_values = _along(field, origins, directions, fine_RS)
        t_RS, index = torch.cat([t_RS, fine_RS], dim=-1).sort(dim=-1)
        values = torch.cat([values, fine_values], dim=1).gather(1, index[..., None].expand(-1, -1, 4))
    middles = (t_RS[:, 1:] + t_RS[:, :-1]) / 2
    steps_RS = torch.cat([near, middles, far], dim=-1).diff(dim=-1)
    rgb, alpha, _ = integrate(values[..., 0], values[..., 1:], steps_RS)
    return rgb_R3.index_put((hit_R,), rgb), alpha_R.index_put((hit_R,), alpha)


@torch.inference_mode()
def render_nerf(field: ImplicitField, cameras: Cameras, *, chunk: int = 4096) -> np.ndarray:
    """Views of one field, RGBA uint8 [V, H, W, 4], straight alpha, sRGB."""
    origins_VHW3, directions_VHW3 = cameras.rays()
    origins_R3 = torch.from_numpy(origins_VHW3.reshape(-1, 3)).to(field.device)
    directions_R3 = torch.from_numpy(directions_VHW3.reshape(-1, 3)).to(field.device)
    rows = []
    for origins, directions in zip(origins_R3.split(chunk), directions_R3.split(chunk), strict=True):
        rgb, alpha = render_rays(field, origins, directions)
        rows.append(torch.cat([rgb / alpha.clamp(min=1e-6)[:, None], alpha[:, None]], dim=-1))
    rgba = torch.cat(rows).clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return rgba.reshape(len(cameras), cameras.height, cameras.width, 4)


def _offsets(rays: int, samples: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Positions inside each step, in [0, 1): random with a generator, else the middle."""
    if generator is None:
        return torch.full((rays, samples), 0.5, device=device)
    return torch.rand(rays, samples, device=device, generator=generator)


def _importance(edges_RS: torch.Tensor, weights_RS: torch.Tensor, offsets_RF: torch.Tensor) -> torch.Tensor:
    """F positions a ray by inverting the piecewise-linear cumulative of `weights_RS` (NeRF, §5.2)."""
    cumulative = torch.cat([torch.zeros_like(weights_RS[:, :1]), weights_RS.cumsum(-1)], dim=-1)
    cumulative = cumulative / cumulative[:, -1:]
    n_fine = offsets_RF.shape[1]
    u_RF = ((torch.arange(n_fine, device=edges_RS.device) + offsets_RF) / n_fine).contiguous()
    upper = torch.searchsorted(cumulative, u_RF, right=True).clamp(1, weights_RS.shape[1])
    low_c, high_c = cumulative.gather(1, upper - 1), cumulative.gather(1, upper)
    low_t, high_t = edges_RS.gather(1, upper - 1), edges_RS.gather(1, upper)
    return low_t + (high_t - low_t) * (u_RF - low_c) / (high_c - low_c).clamp(min=1e-8)


def _along(
    field: ImplicitField, origins_R3: torch.Tensor, directions_R3: torch.Tensor, t_RS: torch.Tensor
) -> torch.Tensor:
    """Density and rgb at the samples, [R, S, 4]."""
    points_RS3 = origins_R3[:, None] + t_RS[..., None] * directions_R3[:, None]
    values = field(points_RS3.reshape(1, -1, 3))
    return torch.cat([values.density_BP[0, :, None], values.rgb_BP3[0]], dim=-1).unflatten(0, t_RS.shape)
