"""Losses of the autoencoder, each per sample.

Shapes: B assets, P points.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["color_loss", "occupancy_loss", "sdf_loss"]


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
