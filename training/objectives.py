"""What a denoiser learns to predict, at which noise levels; each objective lies beside the schedule it samples with.

Shapes: B batch, L latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, SchedulerMixin
from torch import nn

from ..models.denoiser import Condition
from .loop import Batch

__all__ = ["Objective", "data_prediction", "flow_loss", "rectified_flow", "sample_loss"]

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Objective:
    """draw: a sample's noise level, as scalars that its batch holds under their names.
    loss: (model, batch) → per-sample losses [B], metrics.
    scheduler: of diffusers; its schedule is the one trained on.
    """

    draw: Callable[[np.random.Generator], dict[str, float]]
    loss: Callable[[nn.Module, Batch], Losses]
    scheduler: SchedulerMixin


def rectified_flow(scheduler: FlowMatchEulerDiscreteScheduler, *, mean: float, std: float) -> Objective:
    """Straight paths from data to noise, at logit-normal levels (Stable Diffusion 3, arXiv 2403.03206, §3.1)."""

    def draw(rng: np.random.Generator) -> dict[str, float]:
        return {"time": 1 / (1 + np.exp(-(mean + std * rng.standard_normal())))}

    return Objective(draw, flow_loss, scheduler)


def data_prediction(scheduler: HeunDiscreteScheduler) -> Objective:
    """Shap-E's: the data from a uniformly drawn step of the scheduler's own noise schedule (arXiv 2305.02463, §3.2)."""
    powers_T = scheduler.alphas_cumprod.numpy().astype(np.float64)

    def draw(rng: np.random.Generator) -> dict[str, float]:
        step = int(rng.integers(len(powers_T)))
        return {"time": step / len(powers_T), "signal_power": powers_T[step]}

    return Objective(draw, sample_loss, scheduler)


def flow_loss(model: nn.Module, batch: Batch) -> Losses:
    """Rectified flow (arXiv 2209.03003, eq. 1): x_t = (1 - t)·z + t·ε, the target is ε - z. Mean square, [B]."""
    t_B11 = batch["time"][:, None, None]
    x_BLC = (1 - t_B11) * batch["latent"] + t_B11 * batch["noise"]
    velocity_BLC = model(x_BLC, batch["time"], condition_of(batch))
    return (velocity_BLC - (batch["noise"] - batch["latent"])).square().mean((1, 2)), {}


def sample_loss(model: nn.Module, batch: Batch) -> Losses:
    """x_t = √ᾱ·z + √(1 - ᾱ)·ε (DDPM, arXiv 2006.11239, eq. 4), the target is z. Mean square, [B]."""
    power_B11 = batch["signal_power"][:, None, None]
    x_BLC = power_B11.sqrt() * batch["latent"] + (1 - power_B11).sqrt() * batch["noise"]
    data_BLC = model(x_BLC, batch["time"], condition_of(batch))
    return (data_BLC - batch["latent"]).square().mean((1, 2)), {}


def condition_of(batch: Batch) -> Condition:
    return Condition(**{name: batch[name] for name in Condition.__dataclass_fields__})
