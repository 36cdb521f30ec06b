"""Sampling: classifier-free guidance around the denoiser, the noise schedules, and the solver's loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, SchedulerMixin

from .denoiser import Condition, Denoiser, PredictionName

__all__ = [
    "PREDICTION_TYPES",
    "Prediction",
    "diffusion_scheduler",
    "fast_solver",
    "guided",
    "rescaled",
    "sample_latents",
    "shap_e_scheduler",
    "shifted",
]

Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# What diffusers calls what a denoiser predicts, in the settings of a diffusion scheduler.
PREDICTION_TYPES = {"sample": "sample", "v": "v_prediction", "epsilon": "epsilon"}


def shifted(level: float, shift: float) -> float:
    """s·t / (1 + (s - 1)·t): the level's noise-to-signal ratio t / (1 - t) times s (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * level / (1 + (shift - 1) * level)


def diffusion_scheduler(
    prediction: PredictionName, *, clip_range: float | None = None, shift: float = 1.0
) -> HeunDiscreteScheduler:
    """Shap-E's schedule, ᾱ(t) = exp(-12·t) over 1,024 steps, and its solver: Heun on Karras' noise levels.

    The levels span what the model was trained on (sigma 403 … .11); the release's own sampler goes on to 1e-3 and
    spends 27 of its 127 calls where the model cannot tell the noise from the first step's.

    Args:
        prediction: sample, v or epsilon.
        clip_range: the data a step predicts are clipped to ± it; None leaves them.
        shift: every step's noise-to-signal ratio √(1/ᾱ - 1) is multiplied by it: `shifted` on this schedule
            (simple diffusion, arXiv 2301.11093, §2.1, with the ratio of the sides).
    """
    settings: dict = {
        "num_train_timesteps": 1024,
        "beta_schedule": "exp",
        "prediction_type": PREDICTION_TYPES[prediction],
        "use_karras_sigmas": True,
        "clip_sample": clip_range is not None,
        "clip_sample_range": 1.0 if clip_range is None else clip_range,
    }
    scheduler = HeunDiscreteScheduler(**settings)
    if shift == 1.0:
        return scheduler
    power_T = scheduler.alphas_cumprod.double()
    power_T = power_T / (power_T + shift**2 * (1 - power_T))
    betas_T = 1 - power_T / torch.cat([power_T.new_ones(1), power_T[:-1]])
    return HeunDiscreteScheduler(**settings, trained_betas=betas_T.tolist())


def shap_e_scheduler(*, clip: bool = True) -> HeunDiscreteScheduler:
    """Shap-E's own: data predictions. `clip`: they are latents in (-1, 1); False where they are standardised."""
    return diffusion_scheduler("sample", clip_range=1.0 if clip else None)


def fast_solver(scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) (arXiv 2211.01095) on another diffusion scheduler's schedule: one call a step."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps,
        trained_betas=scheduler.betas.tolist(),
        prediction_type=scheduler.config.prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=True,
    )


def guided(
    denoiser: Denoiser,
    condition: Condition,
    *,
    text_scale: float,
    image_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Prediction:
    """v = v(∅) + s_i·(v(image) - v(∅)) + s_t·(v(image, text) - v(image))   (InstructPix2Pix, eq. 3).

    With text alone this is v(∅) + s_t·(v(text) - v(∅)), with image alone v(∅) + s_i·(v(image) - v(∅)).
    All channels are guided. The terms a batch needs are evaluated together, in one call.

    Args:
        condition: of B samples; whether they have text and image must be the same for all of them.
        interval: noise levels, ends included, at which there is guidance; at others the prediction is the plain
            conditional one, a single evaluation (arXiv 2404.07724).
        rescale: φ of `rescaled`; 0 leaves the sum as it is.
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
    # A weight of exactly zero (a scale of 1) needs no evaluation, but rescaling looks at the last term, all conditions.
    last = len(levels) - 1
    terms = [
        (weight, level)
        for i, (weight, level) in enumerate(zip(weights, levels, strict=True))
        if weight != 0 or (rescale and i == last)
    ]
    joint = Condition.cat([level for _, level in terms])

    def total(x_BLC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        parts = denoiser(x_BLC.repeat(len(terms), 1, 1), t_B.repeat(len(terms)), joint).chunk(len(terms))
        total_BLC = sum(weight * part for (weight, _), part in zip(terms, parts, strict=True))
        return rescaled(total_BLC, parts[-1], rescale) if rescale else total_BLC

    def predict(x_BLC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        inside_B = (t_B >= interval[0]) & (t_B <= interval[1])
        if inside_B.all():
            predicted_BLC = total(x_BLC, t_B)
        elif not inside_B.any():
            predicted_BLC = denoiser(x_BLC, t_B, condition)
        else:
            plain_BLC = denoiser(x_BLC, t_B, condition)
            predicted_BLC = torch.where(inside_B[:, None, None], total(x_BLC, t_B), plain_BLC)
        # Guidance overshoots: data predictions are kept among the latents there can be, as Shap-E does.
        return predicted_BLC.clamp(*denoiser.bounds()) if denoiser.config.prediction == "sample" else predicted_BLC

    return predict


def rescaled(guided_BLC: torch.Tensor, conditional_BLC: torch.Tensor, share: float) -> torch.Tensor:
    """φ·v·std(v_c)/std(v) + (1 - φ)·v, each sample's standard deviation over tokens and channels.

    Large scales inflate the prediction; this takes it back to the conditional one's (arXiv 2305.08891, §3.4).
    """
    ours_B11, theirs_B11 = (v.std(dim=(1, 2), keepdim=True) for v in (guided_BLC, conditional_BLC))
    # A constant prediction has no spread to bring back.
    ratio_B11 = torch.where(ours_B11 > 0, theirs_B11 / ours_B11, 1.0)
    return share * ratio_B11 * guided_BLC + (1 - share) * guided_BLC


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
        predict: (x, level in [0, 1]) → what the scheduler expects: a flow's velocity, the data, the noise or v.
        noise_BLC: standard normal.
        scheduler: a flow-matching scheduler of diffusers (its `sigmas` are our noise levels), or one of diffusion,
            which scales what the network sees to unit variance.
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
