"""Sampling: classifier-free guidance around the denoiser, and the solver's loop."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .denoiser import Condition, Denoiser

__all__ = ["Velocity", "guided", "sample_latents"]

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def guided(denoiser: Denoiser, condition: Condition, *, text_scale: float, image_scale: float) -> Velocity:
    """v = v(∅) + s_i·(v(image) - v(∅)) + s_t·(v(image, text) - v(image))   (InstructPix2Pix, eq. 3).

    With text alone this is v(∅) + s_t·(v(text) - v(∅)), with image alone v(∅) + s_i·(v(image) - v(∅)).
    All channels are guided. The terms a batch needs are evaluated together, in one call.

    Args:
        condition: of B samples; whether they have text and image must be the same for all of them.
    """
    has_text, has_image = bool(condition.has_text.any()), bool(condition.has_image.any())
    levels = [condition.keep(text=False, image=False)]
    weights = [1.0]
    for present, scale, kept in [
        (has_image, image_scale, condition.keep(text=False, image=True)),
        (has_text, text_scale, condition.keep(text=True, image=True)),
    ]:
        if present:
            weights[-1] -= scale
            weights.append(scale)
            levels.append(kept)
    # A weight of exactly zero (a scale of 1) needs no evaluation.
    terms = [(weight, level) for weight, level in zip(weights, levels, strict=True) if weight != 0]
    joint = Condition.cat([level for _, level in terms])

    def velocity(x_BLC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        parts = denoiser(x_BLC.repeat(len(terms), 1, 1), t_B.repeat(len(terms)), joint).chunk(len(terms))
        return sum(weight * part for (weight, _), part in zip(terms, parts, strict=True))

    return velocity


def sample_latents(
    velocity: Velocity,
    noise_BLC: torch.Tensor,
    scheduler,
    *,
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Integrate the flow from noise to data with a diffusers scheduler.

    Args:
        noise_BLC: standard normal.
        scheduler: a flow-matching scheduler of diffusers (its `sigmas` are our noise levels).
        steps: network calls a term of guidance (of a first-order solver).
    Returns: standardised latents [B, L, C].
    """
    scheduler.set_timesteps(steps, device=noise_BLC.device)
    x_BLC = noise_BLC
    for i, timestep in enumerate(scheduler.timesteps):
        level_B = (timestep / scheduler.config.num_train_timesteps).expand(len(x_BLC)).to(x_BLC)
        x_BLC = scheduler.step(velocity(x_BLC, level_B), timestep, x_BLC, return_dict=False)[0]
        if on_step:
            on_step(i)
    return x_BLC
