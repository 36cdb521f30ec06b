"""Stage: the latent diffusion transformer, from latent shards, by rectified flow or by diffusion.

accelerate launch -m shapeloom.training.denoiser --preset tiny --data latents/ --out runs/denoiser
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pydantic import Field, PositiveInt

from ..checkpoints.folders import load_model_folder
from ..checkpoints.pipeline import load_conditioner, publish_pipeline
from ..config import Config, check_config
from ..data_pipes.latents import LatentDataset, LatentSample
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.denoiser import Denoiser, PredictionName
from ..models.guidance import diffusion_scheduler
from ..models.pipeline import ShapeloomPipeline
from ..models.transformer import AttentionBackend, set_attention
from .conditioning import (
    ConditioningConfig,
    choose_views,
    conditions_seen,
    first_conditions,
    image_features,
    text_features,
)
from .config import RunConfig
from .curriculum import Draw, LatentBatches, check_curriculum, choose_tokens, tokens_at
from .finetune import LoraConfig, add_lora, check_latents, load_start, merged, settings_of
from .loop import Batch, Stage, fit, say
from .objectives import Objective, Weighting, diffusion, rectified_flow
from .sheets import sample_sheet

__all__ = ["DenoiserRun", "build", "run"]


ConditionName = Literal["text_pooled", "image_pooled", "text_tokens", "image_tokens"]
EVERY_CONDITION: tuple[ConditionName, ...] = ("text_pooled", "image_pooled", "text_tokens", "image_tokens")


class DenoiserModelConfig(Config):
    """See `models.denoiser.Denoiser`; sizes of latents and features come from the data."""

    patch: PositiveInt = 2
    width: PositiveInt = 192
    heads: PositiveInt = 6
    layers: PositiveInt = 6
    max_text_tokens: PositiveInt = 77
    conditions: tuple[ConditionName, ...] = Field(default=EVERY_CONDITION, min_length=1)
    absent: Literal["learned", "zeros"] = "learned"
    token_kinds: bool = True
    norm_in: bool = False
    time_activation: Literal["silu", "gelu"] = "silu"
    time_scale: float = Field(default=1000.0, gt=0)
    learned_variance: bool = False
    prediction: PredictionName = "flow"
    qk_norm: bool = True
    adaln: bool = True


class DenoiserRun(RunConfig):
    init: str = ""  # a pipeline folder to start from: its architecture, objective and statistics are then the run's
    lora: LoraConfig = LoraConfig()
    model: DenoiserModelConfig = DenoiserModelConfig()
    standardise: bool = True  # latents to zero mean and unit deviation, per channel; False is Shap-E's way
    conditioning: ConditioningConfig = ConditioningConfig()
    max_views: PositiveInt = 1  # an image condition is 1 … max_views views of the asset, each count as likely
    # Of a flow's logit-normal noise level (Stable Diffusion 3, §3.1). What a caption says is decided above .8 here (few
    # tokens, each seen by the whole field), where a mean of 0 would put only 8 % of the samples.
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = 1.5
    time_std: float = Field(default=1.5, gt=0)
    # Noise level t → s·t / (1 + (s - 1)·t). The first is of training (a diffusion's schedule, so of its sampling too);
    # the second of a flow's sampling, and spends the solver's steps where the caption is decided.
    time_shift: float = Field(default=1.0, gt=0)
    sampling_shift: float = Field(default=3.0, gt=0)
    weighting: Weighting = "uniform"
    min_snr_gamma: float = Field(default=5.0, gt=0)
    # [share of the steps at which the part ends, latent tokens], …: parts of the run on random subsets of the tokens
    curriculum: tuple[tuple[float, PositiveInt], ...] = ()
    attention: AttentionBackend = "sdpa"
    eval_samples: int = 128
    sheet_samples: int = 8  # objects sampled for the picture at each evaluation; 0 for none
    sheet_steps: int = 16


def run(config: DenoiserRun, *, resume: str = "auto") -> None:
    """Train, then leave a whole pipeline with the EMA weights in `<out>/pipeline`."""
    config = as_the_folder(config)
    fit(config, build(config), resume=resume)


def as_the_folder(config: DenoiserRun) -> DenoiserRun:
    """The settings with the architecture and statistics of `config.init`; says which of the user's they replace."""
    if not config.init:
        return config
    settings = settings_of(Path(config.init))
    theirs = {name: settings[name] for name in DenoiserModelConfig.model_fields if name in settings}
    model = check_config(DenoiserModelConfig, theirs, f" in {config.init}/denoiser/config.json")
    standardise = settings.get("latent_mean") is not None
    replaced = [
        f"model.{name}={getattr(config.model, name)} (there {getattr(model, name)})"
        for name in sorted(config.model.model_fields_set)
        if getattr(config.model, name) != getattr(model, name)
    ]
    if "standardise" in config.model_fields_set and config.standardise != standardise:
        replaced.append(f"standardise={config.standardise} (there {standardise})")
    if replaced:
        say(f"init: the model is as in {config.init}, without {', '.join(replaced)}")
    return config.model_copy(update={"model": model, "standardise": standardise})


def build(config: DenoiserRun) -> Stage:
    check_objective(config)
    torch.manual_seed(config.seed)
    train = LatentDataset(config.data, "train")
    held_out = LatentDataset(config.data, "test_seen")
    held_out = held_out if len(held_out) else LatentDataset(config.data, "test")
    if not len(held_out):
        held_out = train
    model, objective = make_model(config, train)
    settings, shares = dict(model.config), shares_seen(config, model, train[0])
    check_curriculum(config.curriculum, settings["n_latents"], settings["patch"])
    on_gpu = torch.cuda.is_available() and not config.cpu
    set_attention(model, config.attention, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    folder, out = Path(config.data), Path(config.out)
    frozen = {
        "autoencoder": load_model_folder(Autoencoder, folder / "autoencoder"),
        "conditioner": load_conditioner(folder / "conditioner"),
        "scheduler": objective.scheduler,
    }

    def collate(draws: list[Draw], n_tokens: int = settings["n_latents"]) -> Batch:
        return collate_latents(
            draws, n_tokens, objective, shares, settings, seed=config.seed, max_views=config.max_views
        )

    def tokens(step: int) -> int:
        return tokens_at(step, config.steps, config.curriculum, settings["n_latents"])

    @torch.no_grad()
    def evaluate(ema: Denoiser, step: int) -> dict[str, float]:
        draws = [Draw(held_out[i], np.random.default_rng(i)) for i in range(min(config.eval_samples, len(held_out)))]
        batch = {name: value.to(ema.device) for name, value in collate(draws).items()}
        metrics = {"loss": float(objective.loss(ema, batch)[0].mean())}
        if config.sheet_samples:
            pipeline = ShapeloomPipeline(denoiser=ema, **frozen)
            shown = range(min(config.sheet_samples, len(held_out)))
            condition = first_conditions([held_out[i] for i in shown], ema)
            captions = [held_out.meta(i)["captions"][0] for i in shown]
            sample_sheet(pipeline, condition, captions, config.sheet_steps, out / "samples" / f"{step:08d}.png")
        return metrics

    return Stage(
        name="denoiser",
        model=model,
        loss=objective.loss,
        batches=lambda rank, world: LatentBatches(train, collate, tokens, config.batch_size, config.seed, rank, world),
        evaluate=evaluate,
        publish=lambda ema: publish_pipeline(ShapeloomPipeline(denoiser=merged(ema), **frozen), out / "pipeline"),
        shardable=True,
    )


def make_model(config: DenoiserRun, train: LatentDataset) -> tuple[Denoiser, Objective]:
    """The denoiser, new or of `config.init`, with its adapters; and what it learns to predict."""
    manifest, first = train.shards.manifest, train[0]
    hashes = {name: manifest["settings"][name] for name in ("autoencoder_hash", "conditioner_hash")}
    if config.init:
        folder = Path(config.init)
        model, scheduler = load_start(folder)
        check_latents(model, folder, first.latent.shape, hashes, config.data)
    else:
        model = new_model(config, manifest, first, hashes)
        scheduler = new_scheduler(config, model)
    if config.lora.rank:
        if not config.init:
            raise UserError("lora.rank needs init=FOLDER, a pipeline to adapt: adapters on random weights learn little")
        add_lora(model, config.lora)
    prediction, weighting, gamma = model.config.prediction, config.weighting, config.min_snr_gamma
    if prediction != "flow":
        return model, diffusion(scheduler, prediction, weighting=weighting, gamma=gamma)
    return model, rectified_flow(
        scheduler,
        sampling=config.time_sampling,
        mean=config.time_mean,
        std=config.time_std,
        shift=config.time_shift,
        weighting=weighting,
        gamma=gamma,
    )


def check_objective(config: DenoiserRun) -> None:
    """Raises UserError for settings that the objective does not read, or that say the same thing twice."""
    defaults = DenoiserRun.model_fields
    changed = {name for name in defaults if getattr(config, name) != defaults[name].default}
    prediction = config.model.prediction
    of_a_flow = sorted(changed & {"time_sampling", "time_mean", "time_std", "sampling_shift"})
    if prediction != "flow" and of_a_flow:
        told = f"{of_a_flow[0]} is of a flow's noise levels, and model.prediction={prediction} draws the steps of its "
        told += f"schedule evenly: leave {', '.join(of_a_flow)} out (time_shift moves a diffusion's whole schedule)"
        if not config.init:
            raise UserError(told)
        say(f"init: {', '.join(of_a_flow)} have no effect on {prediction}")
    if config.time_sampling == "uniform" and (logit_normal := sorted(changed & {"time_mean", "time_std"})):
        raise UserError(f"{logit_normal[0]} is of time_sampling=logit_normal: leave it out with uniform")
    if config.weighting == "uniform" and "min_snr_gamma" in changed:
        raise UserError("min_snr_gamma is of weighting=min_snr: set that too, or leave it out")
    if config.init and prediction != "flow" and "time_shift" in changed:
        raise UserError(f"time_shift: the noise schedule is that of init={config.init}; leave it out")


def new_scheduler(config: DenoiserRun, model: Denoiser) -> FlowMatchEulerDiscreteScheduler | HeunDiscreteScheduler:
    """The schedule to train and sample with."""
    prediction = model.config.prediction
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.sampling_shift)
    if not config.standardise:
        clip_range = 1.0
    elif prediction == "sample":  # clipped channel by channel, by guidance
        clip_range = None
    else:
        low_C, high_C = model.bounds()
        clip_range = float(torch.maximum(-low_C, high_C).max())
    return diffusion_scheduler(prediction, clip_range=clip_range, shift=config.time_shift)


def new_model(config: DenoiserRun, manifest: dict[str, Any], first: LatentSample, hashes: dict[str, str]) -> Denoiser:
    """A denoiser of random weights, its widths those of the data."""
    widths = {"pooled_width": (first.text_pooled if first.has_text else first.image_pooled).shape[-1]}
    if first.has_text:
        widths["text_width"] = first.text_tokens.shape[-1]
    if first.has_image:
        widths["image_width"] = first.image_tokens.shape[-1]
    statistics = {name: manifest[name] if config.standardise else None for name in ("latent_mean", "latent_std")}
    n_latents, channels = first.latent.shape
    try:
        return Denoiser(
            n_latents=n_latents, channels=channels, **widths, **config.model.model_dump(), **statistics, **hashes
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def shares_seen(config: DenoiserRun, model: Denoiser, first: LatentSample) -> dict[str, float]:
    """Shares of samples that see text, an image, both, nothing; among what the model reads.

    Raises: UserError if the shares do not add to 1, or the data lack what the model reads.
    """
    shares = config.conditioning.shares()
    kinds = [kind for kind in ("text", "image") if model.takes(kind)]
    for kind, there in (("text", first.has_text), ("image", first.has_image)):
        if kind in kinds and not there:
            others = [name for name in model.config.conditions if not name.startswith(kind)]
            raise UserError(
                f"{config.data} has no {kind} features (its conditioner has no {kind} tower), which the model reads: "
                f"set model.conditions=[{', '.join(others)}], or encode with another conditioner"
            )
    stored = len(first.image_pooled)
    if config.max_views > 1 and (config.max_views > stored or "image" not in kinds):
        why = f"{config.data} keeps {stored} views an asset" if "image" in kinds else "the model reads no images"
        remedy = f"encode with n_views={config.max_views}, or set" if "image" in kinds else "set"
        raise UserError(
            f"max_views={config.max_views}: {why}; {remedy} max_views={max(stored, 1) if kinds[-1] == 'image' else 1}"
        )
    if len(kinds) == 1:
        shares = dict.fromkeys(shares, 0.0) | {"nothing": shares["nothing"], kinds[0]: 1 - shares["nothing"]}
        say(f"conditioning: the model reads {kinds[0]} alone, in {shares[kinds[0]]:.0%} of the samples")
    return shares


def collate_latents(
    draws: list[Draw],
    n_tokens: int,
    objective: Objective,
    shares: dict[str, float],
    settings: dict[str, Any],
    *,
    seed: int,
    max_views: int = 1,
) -> Batch:
    """Latents standardised as the model's settings say, noise, noise level and condition.

    Args:
        n_tokens: latent tokens of each; where fewer than all, a random subset with its places in `tokens`.
        settings: the model's.
    """
    seen, texts, views, levels, noises, tokens = [], [], [], [], [], []
    patch, n_latents = settings["patch"], settings["n_latents"]
    for draw in draws:
        sample, rng = draw.sample, draw.rng
        seen.append(conditions_seen(seed, sample.uid, draw.epoch, shares))
        texts.append(int(rng.integers(max(len(sample.text_pooled), 1))))
        views.append(choose_views(rng, len(sample.image_pooled), max_views))
        levels.append(objective.draw(rng))
        noises.append(rng.standard_normal(sample.latent.shape, np.float32))
        if n_tokens < n_latents:
            tokens.append(choose_tokens(rng, n_latents // patch, n_tokens // patch))
    samples = [draw.sample for draw in draws]
    latent_BLC = np.stack([sample.latent for sample in samples]).astype(np.float32)
    if settings["latent_mean"] is not None:
        mean_C, std_C = (np.array(settings[name], np.float32) for name in ("latent_mean", "latent_std"))
        latent_BLC = (latent_BLC - mean_C) / std_C
    arrays: dict[str, np.ndarray] = {"latent": latent_BLC, "noise": np.stack(noises)}
    if tokens:
        tokens_BN = np.stack(tokens)
        rows_BL1 = (tokens_BN[:, :, None] * patch + np.arange(patch)).reshape(len(draws), -1, 1)
        arrays = {name: np.take_along_axis(array, rows_BL1, 1) for name, array in arrays.items()}
        arrays["tokens"] = tokens_BN
    arrays |= {name: np.array([level[name] for level in levels], np.float32) for name in levels[0]}
    arrays |= text_features(samples, texts, settings) | image_features(samples, views, settings)
    arrays |= dict(zip(("has_text", "has_image"), np.array(seen).T.copy(), strict=True))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


if __name__ == "__main__":
    from .stages import main

    main("denoiser")
