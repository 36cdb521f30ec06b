"""Losses of the autoencoder, each per sample.

Of a stage of Shap-E's encoder training (arXiv 2305.02463, §3.1):
  pre-training: `nerf_color_loss` and `transmittance_loss`, for the coarse and for the fine render;
  distillation into the mesh head: `distill_sdf_loss`, `distill_color_loss`;
  fine-tuning: the NeRF losses and `mesh_render_loss`.
Ours, at points with known distances: `sdf_loss`, `occupancy_loss`, `color_loss`. Where a field's density follows from
its distance (`SurfaceVolume`), the NeRF losses serve the mesh head too.

Pictures: sRGB in [0, 1], premultiplied by alpha, which is a picture on black, Shap-E's void. So renders come
(`render_rays`, `rasterize`), and so `premultiply` makes the data's straight-alpha targets.
Shapes: B assets, P points, R rays; "..." of pictures may be [R] or [V, H, W].
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

__all__ = [
    "color_loss",
    "distill_color_loss",
    "distill_sdf_loss",
    "mesh_render_loss",
    "nerf_color_loss",
    "occupancy_loss",
    "premultiply",
    "sdf_loss",
    "transmittance_loss",
]


def sdf_loss(predicted_BP: torch.Tensor, true_BP: torch.Tensor, *, truncation: float) -> torch.Tensor:
    """Mean absolute difference of distances truncated at ±`truncation` (object units), over it: [B].

    Far from the surface only the side matters (as in a TSDF), so the capacity goes to the surface.
    """
    difference_BP = predicted_BP.clamp(-truncation, truncation) - true_BP.clamp(-truncation, truncation)
    return difference_BP.abs().mean(-1) / truncation


def occupancy_loss(predicted_BP: torch.Tensor, true_BP: torch.Tensor, *, sharpness: float) -> torch.Tensor:
    """Binary cross-entropy of inside against outside, the logit being -sdf / sharpness: [B].

    Unlike the truncated distance it still pulls on points predicted far on the wrong side.
    """
    inside_BP = (true_BP < 0).to(predicted_BP.dtype)
    return F.binary_cross_entropy_with_logits(-predicted_BP / sharpness, inside_BP, reduction="none").mean(-1)


def color_loss(
    predicted_BP3: torch.Tensor, true_BP3: torch.Tensor, true_sdf_BP: torch.Tensor, *, reach: float
) -> torch.Tensor:
    """Mean absolute sRGB difference at points within `reach` of the surface: [B].

    Colour has no meaning far from a surface; an asset without a near point gives 0.
    """
    near_BP = (true_sdf_BP.abs() < reach).to(predicted_BP3.dtype)
    error_BP = (predicted_BP3 - true_BP3).abs().mean(-1)
    return (error_BP * near_BP).sum(-1) / near_BP.sum(-1).clamp(min=1)


def premultiply(rgba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight-alpha [..., 4] to premultiplied rgb [..., 3] and alpha [...]."""
    return rgba[..., :3] * rgba[..., 3:], rgba[..., 3]


def nerf_color_loss(
    rgb_BR3: torch.Tensor,
    alpha_BR: torch.Tensor,
    target_rgb_BR3: torch.Tensor,
    target_alpha_BR: torch.Tensor,
    *,
    background: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Mean absolute difference of colours laid on a background: [B].

    |C - C'| with C = rgb + (1 - alpha) background, mean over channels (a third of the norm) and rays.

    Args:
        background: sRGB, a number or a tensor that spreads over [B, R, 3]; on black (0) alpha has no say, and what is
            black and what is nothing look alike: then `transmittance_loss` must tell them apart.
    """
    difference_BR3 = rgb_BR3 - target_rgb_BR3 - background * (alpha_BR - target_alpha_BR)[..., None]
    return difference_BR3.abs().flatten(1).mean(1)


def transmittance_loss(alpha_BR: torch.Tensor, target_alpha_BR: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the light let through, T = 1 - alpha: [B]."""
    return (alpha_BR - target_alpha_BR).abs().flatten(1).mean(1)


def distill_sdf_loss(
    predicted_BP: torch.Tensor, target_BP: torch.Tensor, *, truncation: float = math.inf
) -> torch.Tensor:
    """Mean squared difference of signed distances: [B], in squared object units.

    Shap-E's targets are distances regressed from point clouds, ours the data's own. Targets, not predictions, are
    clamped to ±`truncation`, so that a point predicted far on the wrong side still feels a pull. Targets are true
    distances whatever the head: one that ends in tanh ("nerstf") learns them like any other if they stay within its
    range, so with a truncation below 1. (Far corners of the box are more than 1 from a small object's surface.)
    """
    return (predicted_BP - target_BP.clamp(-truncation, truncation)).square().mean(-1)


def distill_color_loss(
    predicted_BP3: torch.Tensor, target_BP3: torch.Tensor, true_sdf_BP: torch.Tensor, *, reach: float = math.inf
) -> torch.Tensor:
    """Mean squared sRGB difference to the nearest surface point's colour, at points within `reach` of it: [B].

    Shap-E counts all points, wherever they are. An asset without a near point gives 0.
    """
    near_BP = (true_sdf_BP.abs() <= reach).to(predicted_BP3.dtype)
    error_BP = (predicted_BP3 - target_BP3).square().mean(-1)
    return (error_BP * near_BP).sum(-1) / near_BP.sum(-1).clamp(min=1)


def mesh_render_loss(
    rgb_B3: torch.Tensor, alpha_B: torch.Tensor, target_rgb_B3: torch.Tensor, target_alpha_B: torch.Tensor
) -> torch.Tensor:
    """Mean squared difference of mesh renders, of the colours' three channels and alpha alike: [B].

    Args:
        rgb_B3, target_rgb_B3: [B, ..., 3], premultiplied. alpha_B, target_alpha_B: [B, ...].
    """
    color_B = (rgb_B3 - target_rgb_B3).square().flatten(1).mean(1)
    alpha_error_B = (alpha_B - target_alpha_B).square().flatten(1).mean(1)
    return (3 * color_B + alpha_error_B) / 4
