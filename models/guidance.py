"""Sampling: classifier-free guidance around the denoiser, the noise schedules, and the solver's loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, SchedulerMixin

from .denoiser import Condition, Denoiser

__all__ = ["Prediction", "fast_solver", "guided", "sample_latents", "shap_e_scheduler"]

Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def shap_e_scheduler(*, clip: bool = True) -> HeunDiscreteScheduler:
    """Shap-E's schedule, ᾱ(t) = exp(-12·t) over 1,024 steps, and its solver: Heun on Karras' noise levels.

    The levels span what the model was trained on (sigma 403 … .11); the release's own sampler goes on to 1e-3 and
    spends 27 of its 127 calls where the model cannot tell the noise from the first step's.

    Args:
        clip: predictions are latents in (-1, 1); False where they are standardised.
    """
    return HeunDiscreteScheduler(
        num_train_timesteps=1024,
        beta_schedule="exp",
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=clip,
        clip_sample_range=1.0,
    )


def fast_solver(scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) (arXiv 2211.01095) on another scheduler's schedule of data predictions: one call a step."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps,
        trained_betas=scheduler.betas.tolist(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=True,
    )


def guided(denoiser: Denoiser, condition: Condition, *, text_scale: float, image_scale: float) -> Prediction:
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

    def predict(x_BLC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        parts = denoiser(x_BLC.repeat(len(terms), 1, 1), t_B.repeat(len(terms)), joint).chunk(len(terms))
        total_BLC = sum(weight * part for (weight, _), part in zip(terms, parts, strict=True))
        # Guidance overshoots: data predictions are kept among the latents there can be, as Shap-E does.
        return total_BLC.clamp(*denoiser.bounds()) if denoiser.config.prediction == "sample" else total_BLC

    return predict


def sample_latents(
    predict: Prediction,
    noise_BLC: torch.Tensor,
    scheduler,
    *,
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Integrate from noise to data with a diffusers scheduler.

    Args:
        predict: (x, level in [0, 1]) → what the scheduler expects: a flow's velocity, or the data.
        noise_BLC: standard normal.
        scheduler: a flow-matching scheduler of diffusers (its `sigmas` are our noise levels), or one of data
            predictions, which scales what the network sees to unit variance.
        steps: of the solver; Heun calls the network twice in each but the last.
    Returns: standardised latents [B, L, C].
    """
    scheduler.set_timesteps(steps, device=noise_BLC.device)
    scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
    x_BLC = noise_BLC * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, timestep in enumerate(scheduler.timesteps):
        level_B = (timestep / scheduler.config.num_train_timesteps).expand(len(x_BLC)).to(x_BLC)
        predicted_BLC = predict(scale(x_BLC, timestep), level_B)
        x_BLC = scheduler.step(predicted_BLC, timestep, x_BLC, return_dict=False)[0]
        if on_step:
            on_step(i)
    return x_BLC
