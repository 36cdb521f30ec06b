"""What a denoiser learns to predict, at which noise levels; each objective lies beside the schedule it samples with.

A noisy latent is x = α·z + σ·ε. On a flow's straight path α = 1 - t, σ = t; in diffusion α = √ᾱ, σ = √(1 - ᾱ).

Shapes: B batch, L latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, SchedulerMixin
from torch import nn

from ..models.denoiser import Condition, PredictionName
from ..models.guidance import shifted
from .loop import Batch

__all__ = ["Objective", "Weighting", "diffusion", "loss_weight", "prediction_loss", "rectified_flow", "target"]

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]
Weighting = Literal["uniform", "min_snr"]


@dataclass(frozen=True)
class Objective:
    """draw: a sample's noise level, as scalars that its batch holds under their names.
    loss: (model, batch) → per-sample losses [B], metrics.
    scheduler: of diffusers; its schedule is the one trained on.
    """

    draw: Callable[[np.random.Generator], dict[str, float]]
    loss: Callable[[nn.Module, Batch], Losses]
    scheduler: SchedulerMixin


def rectified_flow(
    scheduler: FlowMatchEulerDiscreteScheduler,
    *,
    sampling: Literal["logit_normal", "uniform"] = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    weighting: Weighting = "uniform",
    gamma: float = 5.0,
) -> Objective:
    """Straight paths from data to noise (arXiv 2209.03003).

    Levels are logit-normal or uniform in [0, 1], then shifted (Stable Diffusion 3, arXiv 2403.03206, §3.1 and §5.3.2).
    """

    def draw(rng: np.random.Generator) -> dict[str, float]:
        level = rng.random() if sampling == "uniform" else 1 / (1 + np.exp(-(mean + std * rng.standard_normal())))
        return {"time": shifted(level, shift)}

    return Objective(draw, partial(prediction_loss, prediction="flow", weighting=weighting, gamma=gamma), scheduler)


def diffusion(
    scheduler: HeunDiscreteScheduler,
    prediction: PredictionName = "sample",
    *,
    weighting: Weighting = "uniform",
    gamma: float = 5.0,
) -> Objective:
    """The data, the noise or v, at a uniformly drawn step of the scheduler's own schedule (Shap-E: the data, §3.2)."""
    powers_T = scheduler.alphas_cumprod.numpy().astype(np.float64)

    def draw(rng: np.random.Generator) -> dict[str, float]:
        step = int(rng.integers(len(powers_T)))
        return {"time": step / len(powers_T), "signal_power": powers_T[step]}

    return Objective(draw, partial(prediction_loss, prediction=prediction, weighting=weighting, gamma=gamma), scheduler)


def prediction_loss(
    model: nn.Module,
    batch: Batch,
    *,
    prediction: PredictionName,
    weighting: Weighting = "uniform",
    gamma: float = 5.0,
) -> Losses:
    """Weighted mean square of what the model predicts from noisy latents, [B]."""
    if prediction == "flow":
        noise_share_B11 = batch["time"][:, None, None]
        signal_share_B11 = 1 - noise_share_B11
    else:
        power_B11 = batch["signal_power"][:, None, None]
        signal_share_B11, noise_share_B11 = power_B11.sqrt(), (1 - power_B11).sqrt()
    x_BLC = signal_share_B11 * batch["latent"] + noise_share_B11 * batch["noise"]
    # Of latents cut to some of their tokens, the model must know which these are.
    places = {"tokens_BN": batch["tokens"]} if "tokens" in batch else {}
    predicted_BLC = model(x_BLC, batch["time"], condition_of(batch), **places)
    wanted_BLC = target(prediction, batch["latent"], batch["noise"], signal_share_B11, noise_share_B11)
    loss_B = (predicted_BLC - wanted_BLC).square().mean((1, 2))
    if weighting == "uniform":
        return loss_B, {}
    weight_B = loss_weight(prediction, signal_share_B11, noise_share_B11, gamma).flatten()
    return weight_B * loss_B, {"unweighted": loss_B.detach().mean()}


def target(
    prediction: PredictionName, data: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """What is predicted of x = signal·data + sigma·noise.

    flow:    noise - data                    (arXiv 2209.03003, eq. 1)
    sample:  data
    epsilon: noise                           (DDPM, arXiv 2006.11239, eq. 14)
    v:       signal·noise - sigma·data       (arXiv 2202.00512, §4)
    """
    if prediction == "flow":
        return noise - data
    if prediction == "v":
        return signal * noise - sigma * data
    return data if prediction == "sample" else noise


def loss_weight(
    prediction: PredictionName, signal: torch.Tensor, sigma: torch.Tensor, gamma: float = 5.0
) -> torch.Tensor:
    """Min-SNR-γ: the data's error counts min(SNR, γ), SNR = signal² / sigma² (arXiv 2303.09556, §3.4).

    An error e of the prediction is one of the data of e (sample), sigma/signal·e (epsilon), sigma·e (v and flow), so

    sample: min(SNR, γ)     epsilon: min(1, γ / SNR)     v, flow: min(signal², γ·sigma²)

    which for v is the paper's min(SNR, γ) / (SNR + 1), as signal² + sigma² = 1 there.
    """
    if prediction == "sample":
        return (signal.square() / sigma.square()).clamp(max=gamma)
    if prediction == "epsilon":
        return (gamma * sigma.square() / signal.square()).clamp(max=1.0)
    return torch.minimum(signal.square(), gamma * sigma.square())


def condition_of(batch: Batch) -> Condition:
    return Condition(**{name: batch[name] for name in Condition.__dataclass_fields__ if name in batch})
