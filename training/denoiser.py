"""Stage: the latent diffusion transformer, from latent shards, by rectified flow or by Shap-E's data prediction.

accelerate launch -m shapeloom.training.denoiser --preset tiny --data latents/ --out runs/denoiser
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import Field, PositiveInt

from ..checkpoints.folders import load_model_folder
from ..checkpoints.pipeline import load_conditioner, publish_pipeline
from ..config import Config, check_config
from ..data_pipes.latents import LatentDataset, LatentSample
from ..data_pipes.loader import Batches
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.denoiser import Condition, Denoiser
from ..models.guidance import shap_e_scheduler
from ..models.pipeline import ShapeloomPipeline
from .config import RunConfig
from .finetune import LoraConfig, add_lora, check_latents, load_start, merged, settings_of
from .loop import Batch, Stage, fit, say
from .objectives import Objective, data_prediction, rectified_flow
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
    prediction: Literal["flow", "sample"] = "flow"
    qk_norm: bool = True
    adaln: bool = True


class ConditioningConfig(Config):
    """Shares of samples that see text alone, image alone, both, or nothing (for guidance); they add to 1.

    A model that reads text alone, or images alone, sees that in all samples but the share `nothing`.
    """

    text: float = Field(default=0.6, ge=0)
    image: float = Field(default=0.2, ge=0)
    both: float = Field(default=0.1, ge=0)
    nothing: float = Field(default=0.1, ge=0)


class DenoiserRun(RunConfig):
    init: str = ""  # a pipeline folder to start from: its architecture, objective and statistics are then the run's
    lora: LoraConfig = LoraConfig()
    model: DenoiserModelConfig = DenoiserModelConfig()
    standardise: bool = True  # latents to zero mean and unit deviation, per channel; False is Shap-E's way
    conditioning: ConditioningConfig = ConditioningConfig()
    # Of a flow's logit-normal noise level (Stable Diffusion 3, §3.1). What a caption says is decided above .8 here (few
    # tokens, each seen by the whole field), where a mean of 0 would put only 8 % of the samples.
    time_mean: float = 1.5
    time_std: float = 1.5
    sampling_shift: float = 3.0  # sigma → s·sigma / (1 + (s - 1)·sigma): spends the solver's steps there too; flow only
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
    torch.manual_seed(config.seed)
    train = LatentDataset(config.data, "train")
    held_out = LatentDataset(config.data, "test_seen")
    held_out = held_out if len(held_out) else LatentDataset(config.data, "test")
    if not len(held_out):
        held_out = train
    model, objective = make_model(config, train)
    settings, shares = dict(model.config), mode_shares(config, model, train[0])
    folder, out = Path(config.data), Path(config.out)
    frozen = {
        "autoencoder": load_model_folder(Autoencoder, folder / "autoencoder"),
        "conditioner": load_conditioner(folder / "conditioner"),
        "scheduler": objective.scheduler,
    }

    def collate(items: list[tuple[LatentSample, np.random.Generator]]) -> Batch:
        return collate_latents(items, objective, shares, settings)

    @torch.no_grad()
    def evaluate(ema: Denoiser, step: int) -> dict[str, float]:
        items = [(held_out[i], np.random.default_rng(i)) for i in range(min(config.eval_samples, len(held_out)))]
        batch = {name: value.to(ema.device) for name, value in collate(items).items()}
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
        batches=lambda rank, world: Batches(train, collate, config.batch_size, config.seed, rank, world),
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
        scheduler = (
            shap_e_scheduler(clip=not config.standardise)
            if config.model.prediction == "sample"
            else FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.sampling_shift)
        )
    if config.lora.rank:
        if not config.init:
            raise UserError("lora.rank needs init=FOLDER, a pipeline to adapt: adapters on random weights learn little")
        add_lora(model, config.lora)
    if model.config.prediction == "sample":
        return model, data_prediction(scheduler)
    return model, rectified_flow(scheduler, mean=config.time_mean, std=config.time_std)


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


def mode_shares(config: DenoiserRun, model: Denoiser, first: LatentSample) -> np.ndarray:
    """Cumulated shares of samples that see text, an image, both, nothing; among what the model reads.

    Raises: UserError if the shares do not add to 1, or the data lack what the model reads.
    """
    shares = config.conditioning.model_dump()
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"conditioning: the four shares must add to 1, they are {list(shares.values())}")
    kinds = [kind for kind in ("text", "image") if model.takes(kind)]
    for kind, there in (("text", first.has_text), ("image", first.has_image)):
        if kind in kinds and not there:
            others = [name for name in model.config.conditions if not name.startswith(kind)]
            raise UserError(
                f"{config.data} has no {kind} features (its conditioner has no {kind} tower), which the model reads: "
                f"set model.conditions=[{', '.join(others)}], or encode with another conditioner"
            )
    if len(kinds) == 1:
        shares = dict.fromkeys(shares, 0.0) | {"nothing": shares["nothing"], kinds[0]: 1 - shares["nothing"]}
        say(f"conditioning: the model reads {kinds[0]} alone, in {shares[kinds[0]]:.0%} of the samples")
    return np.cumsum(list(shares.values()))


def collate_latents(
    items: list[tuple[LatentSample, np.random.Generator]],
    objective: Objective,
    shares: np.ndarray,
    settings: dict[str, Any],
) -> Batch:
    """Latents standardised as the model's settings say, noise, noise level and condition."""
    modes, texts, images, levels, noises = [], [], [], [], []
    for sample, rng in items:
        modes.append(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")))
        texts.append(int(rng.integers(max(len(sample.text_pooled), 1))))
        images.append(int(rng.integers(max(len(sample.image_pooled), 1))))
        levels.append(objective.draw(rng))
        noises.append(rng.standard_normal(sample.latent.shape, np.float32))
    samples = [sample for sample, _ in items]
    latent_BLC = np.stack([sample.latent for sample in samples]).astype(np.float32)
    if settings["latent_mean"] is not None:
        mean_C, std_C = (np.array(settings[name], np.float32) for name in ("latent_mean", "latent_std"))
        latent_BLC = (latent_BLC - mean_C) / std_C
    arrays: dict[str, np.ndarray] = {"latent": latent_BLC, "noise": np.stack(noises)}
    arrays |= {name: np.array([level[name] for level in levels], np.float32) for name in levels[0]}
    arrays |= text_features(samples, texts, settings) | image_features(samples, images, settings)
    mode_B = np.array(modes)
    arrays |= {"has_text": np.isin(mode_B, [0, 2]), "has_image": np.isin(mode_B, [1, 2])}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def text_features(samples: list[LatentSample], chosen: list[int], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """A caption of each, padded to the longest of them; one masked token of zeros where none are stored."""
    count = len(samples)
    if not samples[0].has_text:
        return {
            "text_tokens": np.zeros((count, 1, settings["text_width"]), np.float32),
            "text_mask": np.zeros((count, 1), bool),
            "text_pooled": np.zeros((count, settings["pooled_width"]), np.float32),
        }
    lengths_B = np.array([sample.text_lengths[k] for sample, k in zip(samples, chosen, strict=True)])
    tokens_BTE = np.zeros((count, int(lengths_B.max()), samples[0].text_tokens.shape[-1]), np.float32)
    for row, length, sample, k in zip(tokens_BTE, lengths_B, samples, chosen, strict=True):
        row[:length] = sample.text_tokens[k, :length]
    return {
        "text_tokens": tokens_BTE,
        "text_mask": np.arange(tokens_BTE.shape[1]) < lengths_B[:, None],
        "text_pooled": np.stack([s.text_pooled[k] for s, k in zip(samples, chosen, strict=True)]).astype(np.float32),
    }


def image_features(samples: list[LatentSample], chosen: list[int], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """A view of each; one token of zeros where none are stored."""
    if not samples[0].has_image:
        return {
            "image_tokens": np.zeros((len(samples), 1, settings["image_width"]), np.float32),
            "image_pooled": np.zeros((len(samples), settings["pooled_width"]), np.float32),
        }
    return {
        name: np.stack([getattr(s, name)[v] for s, v in zip(samples, chosen, strict=True)]).astype(np.float32)
        for name in ("image_tokens", "image_pooled")
    }


def first_conditions(samples: list[LatentSample], model: Denoiser) -> Condition:
    """The first caption of each, or the first view for a model that reads no text, on the model's device."""
    first, by_text = [0] * len(samples), model.takes("text")
    arrays = text_features(samples, first, model.config) | image_features(samples, first, model.config)
    arrays |= {"has_text": np.full(len(samples), by_text), "has_image": np.full(len(samples), not by_text)}
    return Condition(**{name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()})


if __name__ == "__main__":
    from .stages import main

    main("denoiser")
