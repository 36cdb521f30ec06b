"""Stage: the latent diffusion transformer, from latent shards, by rectified flow.

accelerate launch -m shapeloom.training.denoiser --preset tiny --data latents/ --out runs/denoiser
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..checkpoints.clip import load_clip
from ..checkpoints.folders import load_model_folder
from ..checkpoints.pipeline import publish_pipeline
from ..config import Config
from ..data_pipes.latents import LatentDataset, LatentSample
from ..data_pipes.loader import Batches
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.denoiser import Condition, Denoiser
from ..models.pipeline import ShapeloomPipeline
from .config import RunConfig
from .loop import Batch, Stage, fit
from .sheets import sample_sheet

__all__ = ["DenoiserRun", "build", "run"]


class DenoiserModelConfig(Config):
    """See `models.denoiser.Denoiser`; sizes of latents and features come from the data."""

    patch: int = 2
    width: int = 192
    heads: int = 6
    layers: int = 6
    qk_norm: bool = True
    adaln: bool = True


class ConditioningConfig(Config):
    """Shares of samples that see text alone, image alone, both, or nothing (for guidance); they add to 1."""

    text: float = 0.6
    image: float = 0.2
    both: float = 0.1
    nothing: float = 0.1


class DenoiserRun(RunConfig):
    model: DenoiserModelConfig = DenoiserModelConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    # Of the logit-normal noise level (Stable Diffusion 3, arXiv 2403.03206, §3.1). What a caption says is decided above
    # .8 here (few tokens, each seen by the whole field), where a mean of 0 would put only 8 % of the samples.
    time_mean: float = 1.5
    time_std: float = 1.5
    sampling_shift: float = 3.0  # sigma → s·sigma / (1 + (s - 1)·sigma): spends the solver's steps there too
    eval_samples: int = 128
    sheet_samples: int = 8  # objects sampled for the picture at each evaluation; 0 for none
    sheet_steps: int = 16


def run(config: DenoiserRun, *, resume: str = "auto") -> None:
    """Train, then leave a whole pipeline with the EMA weights in `<out>/pipeline`."""
    fit(config, build(config), resume=resume)


def build(config: DenoiserRun) -> Stage:
    shares = list(config.conditioning.model_dump().values())
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"conditioning: the four shares must not be negative and add to 1, they are {shares}")
    torch.manual_seed(config.seed)
    train = LatentDataset(config.data, "train")
    held_out = LatentDataset(config.data, "test_seen")
    held_out = held_out if len(held_out) else LatentDataset(config.data, "test")
    manifest, first = train.shards.manifest, train[0]
    model = Denoiser(
        **config.model.model_dump(),
        n_latents=first.latent.shape[0],
        channels=first.latent.shape[1],
        text_width=first.text_tokens.shape[-1],
        image_width=first.image_tokens.shape[-1],
        pooled_width=first.text_pooled.shape[-1],
        latent_mean=manifest["latent_mean"],
        latent_std=manifest["latent_std"],
        autoencoder_hash=manifest["settings"]["autoencoder_hash"],
        conditioner_hash=manifest["settings"]["conditioner_hash"],
    )
    statistics = np.array(manifest["latent_mean"], np.float32), np.array(manifest["latent_std"], np.float32)
    folder, out = Path(config.data), Path(config.out)
    frozen = {
        "autoencoder": load_model_folder(Autoencoder, folder / "autoencoder"),
        "conditioner": load_clip(folder / "conditioner"),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.sampling_shift),
    }

    def collate(items: list[tuple[LatentSample, np.random.Generator]]) -> Batch:
        return collate_latents(items, config, statistics)

    @torch.no_grad()
    def evaluate(ema: Denoiser, step: int) -> dict[str, float]:
        source = held_out if len(held_out) else train
        items = [(source[i], np.random.default_rng(i)) for i in range(min(config.eval_samples, len(source)))]
        batch = {name: value.to(ema.device) for name, value in collate(items).items()}
        metrics = {"loss": float(flow_loss(ema, batch)[0].mean())}
        if config.sheet_samples:
            pipeline = ShapeloomPipeline(denoiser=ema, **frozen)
            captions = [source.meta(i)["captions"][0] for i in range(min(config.sheet_samples, len(source)))]
            sample_sheet(pipeline, captions, config.sheet_steps, out / "samples" / f"{step:08d}.png")
        return metrics

    return Stage(
        name="denoiser",
        model=model,
        loss=flow_loss,
        batches=lambda rank, world: Batches(train, collate, config.batch_size, config.seed, rank, world),
        evaluate=evaluate,
        publish=lambda ema: publish_pipeline(ShapeloomPipeline(denoiser=ema, **frozen), out / "pipeline"),
    )


def flow_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rectified flow (arXiv 2209.03003, eq. 1): x_t = (1 - t)·z + t·ε, the target is ε - z. Mean square, [B]."""
    t_B11 = batch["time"][:, None, None]
    x_BLC = (1 - t_B11) * batch["latent"] + t_B11 * batch["noise"]
    condition = Condition(**{name: batch[name] for name in Condition.__dataclass_fields__})
    velocity_BLC = model(x_BLC, batch["time"], condition)
    return (velocity_BLC - (batch["noise"] - batch["latent"])).square().mean((1, 2)), {}


def collate_latents(
    items: list[tuple[LatentSample, np.random.Generator]],
    config: DenoiserRun,
    statistics: tuple[np.ndarray, np.ndarray],
) -> Batch:
    """Standardised latents, noise, noise level and condition; texts are padded to the longest of the batch."""
    mean_C, std_C = statistics
    shares = np.cumsum(list(config.conditioning.model_dump().values()))
    chosen, modes, times, noises = [], [], [], []
    for sample, rng in items:
        modes.append(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")))
        chosen.append((sample, rng.integers(len(sample.text_pooled)), rng.integers(len(sample.image_pooled))))
        times.append(1 / (1 + np.exp(-(config.time_mean + config.time_std * rng.standard_normal()))))
        noises.append(rng.standard_normal(sample.latent.shape, np.float32))
    longest = max(int(sample.text_lengths[k]) for sample, k, _ in chosen)
    text_tokens = np.zeros((len(items), longest, items[0][0].text_tokens.shape[-1]), np.float32)
    for row, (sample, k, _) in zip(text_tokens, chosen, strict=True):
        row[: sample.text_lengths[k]] = sample.text_tokens[k, : sample.text_lengths[k]]
    lengths_B = np.array([sample.text_lengths[k] for sample, k, _ in chosen])
    mode_B = np.array(modes)
    arrays = {
        "latent": (np.stack([sample.latent for sample, _, _ in chosen]).astype(np.float32) - mean_C) / std_C,
        "noise": np.stack(noises),
        "time": np.array(times, np.float32),
        "text_tokens": text_tokens,
        "text_mask": np.arange(longest) < lengths_B[:, None],
        "text_pooled": np.stack([sample.text_pooled[k] for sample, k, _ in chosen]).astype(np.float32),
        "has_text": np.isin(mode_B, [0, 2]),
        "image_tokens": np.stack([sample.image_tokens[v] for sample, _, v in chosen]).astype(np.float32),
        "image_pooled": np.stack([sample.image_pooled[v] for sample, _, v in chosen]).astype(np.float32),
        "has_image": np.isin(mode_B, [1, 2]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
