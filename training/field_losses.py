"""The autoencoder's loss: which terms there are, their weights, and what each needs to be computed.

Stages differ by weights alone. `points` (ours): distances, sides and colours at points. Shap-E's: NeRF pre-training
(`nerf`), distillation of distances and colours into the mesh head (`distill`), fine-tuning on rendered meshes (`mesh`)
beside the NeRF. `surface`, ours again: the NeRF losses on a volume whose density follows from the distance.

Shapes: B assets, P points, R rays, V views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import Config
from ..models.decoder import ImplicitField, SurfaceVolume
from ..models.marching_cubes import marching_cubes
from ..models.nerf import RayNoise, render_rays
from ..models.raster import rasterize
from .batch import view_inputs
from .losses import (
    color_loss,
    distill_color_loss,
    distill_sdf_loss,
    mesh_render_loss,
    nerf_color_loss,
    occupancy_loss,
    premultiply,
    sdf_loss,
    transmittance_loss,
)

__all__ = ["FieldLossConfig", "field_loss", "mesh_views"]

Terms = dict[str, torch.Tensor]


class FieldLossConfig(Config):
    """Weights of the terms (0: not computed), and their lengths in object units (see `training.losses`)."""

    sdf: float = 1.0
    occupancy: float = 1.0
    color: float = 3.0
    latent: float = 0.05  # on the mean square before the tanh: keeps latents from piling up at ±1, where no flow can go
    nerf_color: float = 0.0
    nerf_transmittance: float = 0.0
    distill_sdf: float = 0.0
    distill_color: float = 0.0
    mesh: float = 0.0
    surface_color: float = 0.0
    surface_transmittance: float = 0.0
    truncation: float = 0.1
    sharpness: float = 0.02
    color_reach: float = 0.1
    distill_truncation: float = 0.9  # below 1: Shap-E's distance ends in a tanh
    surface_beta: float = 0.02  # of the density that follows from the distance

    @property
    def on_points(self) -> bool:
        return any((self.sdf, self.occupancy, self.color, self.distill_sdf, self.distill_color))

    @property
    def on_rays(self) -> bool:
        return any((self.nerf_color, self.nerf_transmittance, self.surface_color, self.surface_transmittance))


def field_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], weights: FieldLossConfig, *, mesh_resolution: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the terms, [B], and the mean of each.

    Args:
        batch: of `training.autoencoder.collate`.
        mesh_resolution: lattice points an axis of the meshes that are rendered.
    """
    field, raw_BLC = model(batch.get("surface"), batch["noise"], batch["level"], view_inputs(batch))
    terms: Terms = {"latent": raw_BLC.square().mean((1, 2))}
    if weights.on_points:
        terms |= _point_terms(field, batch, weights)
    if weights.nerf_color or weights.nerf_transmittance:
        terms |= _ray_terms("nerf", field, batch)
    if weights.surface_color or weights.surface_transmittance:
        terms |= _ray_terms("surface", SurfaceVolume(field, weights.surface_beta), batch)
    if weights.mesh:
        terms["mesh"] = _mesh_term(field, batch, mesh_resolution)
    counted = {name: value for name, value in terms.items() if getattr(weights, name)}
    total_B = sum(getattr(weights, name) * value for name, value in counted.items())
    assert isinstance(total_B, torch.Tensor), "every weight of the loss is 0"
    return total_B, {name: value.mean().detach() for name, value in counted.items()}


def _point_terms(field: ImplicitField, batch: dict[str, torch.Tensor], weights: FieldLossConfig) -> Terms:
    values, sdf_BP, rgb_BP3 = field(batch["points"]), batch["sdf"], batch["rgb"]
    return {
        "sdf": sdf_loss(values.sdf_BP, sdf_BP, truncation=weights.truncation),
        "occupancy": occupancy_loss(values.sdf_BP, sdf_BP, sharpness=weights.sharpness),
        "color": color_loss(values.rgb_BP3, rgb_BP3, sdf_BP, reach=weights.color_reach),
        "distill_sdf": distill_sdf_loss(values.sdf_BP, sdf_BP, truncation=weights.distill_truncation),
        "distill_color": distill_color_loss(values.rgb_BP3, rgb_BP3, sdf_BP),
    }


def _ray_terms(name: str, field: Any, batch: dict[str, torch.Tensor]) -> Terms:
    """Colour and transmittance of the coarse and of the fine render, as Shap-E sums them."""
    rgb_BR3, alpha_BR = premultiply(batch["rays.rgba"])
    noise = RayNoise(batch["rays.coarse"], batch["rays.choice"], batch["rays.place"])
    n_coarse, n_fine = noise.coarse.shape[-1], noise.choice.shape[-1]
    seen = render_rays(
        field, batch["rays.origin"], batch["rays.direction"], n_coarse=n_coarse, n_fine=n_fine, noise=noise
    )
    renders = [(seen.rgb, seen.alpha), (seen.coarse_rgb, seen.coarse_alpha)]
    return {
        f"{name}_color": sum(nerf_color_loss(rgb, alpha, rgb_BR3, alpha_BR) for rgb, alpha in renders),
        f"{name}_transmittance": sum(transmittance_loss(alpha, alpha_BR) for _, alpha in renders),
    }


def _mesh_term(field: ImplicitField, batch: dict[str, torch.Tensor], resolution: int) -> torch.Tensor:
    """Rendered meshes against the views, [B]."""
    losses = []
    for b in range(len(field)):
        rgb_VHW3, alpha_VHW = premultiply(batch["mesh.rgba"][b])
        drawn = mesh_views(field[b], batch["mesh.camera"][b], batch["mesh.focal"][b], alpha_VHW.shape[-1], resolution)
        losses.append(mesh_render_loss(drawn[0][None], drawn[1][None], rgb_VHW3[None], alpha_VHW[None])[0])
    return torch.stack(losses)


def mesh_views(
    field: ImplicitField, camera_to_world_V44: torch.Tensor, focal_V: torch.Tensor, size: int, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The surface of one field drawn from V cameras, with gradients to the field: rgb_VHW3 premultiplied, alpha_VHW.

    The whole lattice is evaluated with gradients: with 64 points an axis that is 262,144 points.
    """
    axis_R = torch.linspace(-1, 1, resolution, device=field.device)
    lattice_P3 = torch.stack(torch.meshgrid(axis_R, axis_R, axis_R, indexing="ij"), dim=-1).flatten(0, 2)
    inside_RRR = -field(lattice_P3[None]).sdf_BP[0].reshape((resolution,) * 3)
    closed = torch.nn.functional.pad(inside_RRR, (1,) * 6, value=-1.0)
    corner_3 = torch.full((3,), (resolution + 1) / (resolution - 1), device=field.device)
    vertices_N3, faces_F3 = marching_cubes(closed, (-corner_3, corner_3))
    if not len(faces_F3):  # nothing to draw yet: the losses on points or rays make a surface first
        empty = inside_RRR.sum() * 0
        return empty.expand(len(focal_V), size, size, 3), empty.expand(len(focal_V), size, size)
    rgb_N3 = field(vertices_N3[None]).rgb_BP3[0]
    drawn = rasterize(vertices_N3, faces_F3, rgb_N3, camera_to_world_V44, focal_V, height=size, width=size)
    return drawn.rgb_VHW3, drawn.alpha_VHW
