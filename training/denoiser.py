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
from ..data_pipes.fingerprint import data_fingerprint
from ..data_pipes.latents import LatentDataset, LatentSample
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.denoiser import Denoiser, PredictionName
from ..models.guidance import diffusion_scheduler
from ..models.pipeline import ShapeloomPipeline
from ..models.transformer import AttentionBackend, set_attention
from .arithmetic import denoiser_flops
from .conditioning import ConditioningConfig
from .config import RunConfig
from .curriculum import check_curriculum, tokens_at
from .features import FeatureSource
from .finetune import LoraConfig, add_lora, check_latents, freeze, load_start, merged, settings_of
from .latent_batches import Collate, Draw, LatentBatches
from .loop import Stage, fit, say
from .objectives import Objective, Weighting, diffusion, rectified_flow
from .samples import HeldOutSamples, open_judge

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
    freeze: tuple[str, ...] = ()  # patterns of layers or parameters that do not train, as blocks.[0-3] or *.bias
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
    # At each evaluation, of the EMA model on held-out assets:
    eval_samples: int = 128  # how many the loss is of
    sheet_samples: int = 8  # objects sampled for the picture; 0 for none
    score_samples: int = 32  # objects sampled for R-precision, those of the picture among them; 0 for none
    sample_steps: PositiveInt = 16
    sample_seconds: float = Field(default=60.0, gt=0)  # no further object is begun after that
    judge: str = ""  # a CLIP folder that scores them; "" is the conditioner, which flatters what it conditions


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
    folder, out, device = Path(config.data), Path(config.out), device_of(config)
    main = os.environ.get("RANK", "0") == "0"  # which scores
    source = FeatureSource(load_conditioner(folder / "conditioner"), device if main or train[0].is_computed else None)
    first = source.fill([train[0]])[0]
    model, objective = make_model(config, train.shards.manifest, first)
    settings, shares = dict(model.config), shares_seen(config, model, first)
    check_curriculum(config.curriculum, settings["n_latents"], settings["patch"])
    set_attention(model, config.attention, device)
    autoencoder = load_model_folder(Autoencoder, folder / "autoencoder")
    frozen = {
        "autoencoder": autoencoder,
        "conditioner": source.conditioner,
        "scheduler": objective.scheduler,
    }
    collate = Collate(objective, shares, settings, source, config.seed, config.max_views)
    samples = HeldOutSamples(
        held_out,
        source,
        shown=config.sheet_samples,
        scored=config.score_samples,
        steps=config.sample_steps,
        seconds=config.sample_seconds,
        judge=open_judge(config.judge, source.conditioner) if config.score_samples else None,
    )

    def tokens(step: int) -> int:
        return tokens_at(step, config.steps, config.curriculum, settings["n_latents"])

    @torch.no_grad()
    def evaluate(ema: Denoiser, step: int) -> dict[str, float]:
        draws = [Draw(held_out[i], np.random.default_rng(i)) for i in range(min(config.eval_samples, len(held_out)))]
        batch = {name: value.to(ema.device) for name, value in collate(draws).items()}
        loss = float(objective.loss(ema, batch)[0].mean())
        pipeline = ShapeloomPipeline(denoiser=ema, **frozen)
        autoencoder.to(ema.device)
        try:
            return {"loss": loss, **samples(pipeline, out / "samples" / f"{step:08d}.png")}
        finally:
            autoencoder.to("cpu")  # training needs the room

    return Stage(
        name="denoiser",
        model=model,
        loss=objective.loss,
        batches=lambda rank, world: LatentBatches(train, collate, tokens, config.batch_size, config.seed, rank, world),
        evaluate=evaluate,
        publish=lambda ema: publish_pipeline(ShapeloomPipeline(denoiser=merged(ema), **frozen), out / "pipeline"),
        shardable=True,
        data=data_fingerprint(train),
        flops=sample_flops(config, settings, first),
    )


def device_of(config: DenoiserRun) -> torch.device:
    """This rank's, before there is an accelerator to ask."""
    on_gpu = torch.cuda.is_available() and not config.cpu
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")


def sample_flops(config: DenoiserRun, settings: dict[str, Any], first: LatentSample) -> float:
    """Of a sample in training, with a caption as long as the first, the mean number of views, and all latent tokens.

    0 where only a part of the model trains: how many of the weights' gradients are taken is not counted then.
    """
    if config.lora.rank or config.freeze:
        return 0.0
    text = int(first.text_lengths[0]) if first.has_text else 1
    image = round(first.image_tokens.shape[1] * (1 + config.max_views) / 2) if first.has_image else 1
    return float(denoiser_flops(settings, text_tokens=text, image_tokens=image).training())


def make_model(config: DenoiserRun, manifest: dict[str, Any], first: LatentSample) -> tuple[Denoiser, Objective]:
    """The denoiser, new or of `config.init`, with its adapters and what is frozen; and what it learns to predict.

    Args:
        manifest, first: of the latents, and one of them with its features.
    """
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
    freeze(model, config.freeze)
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


if __name__ == "__main__":
    from .stages import main

    main("denoiser")
