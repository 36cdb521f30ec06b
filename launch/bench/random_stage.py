"""The denoiser's own stage on random latents of a preset's sizes, in memory: for benchmarks of the loop around it."""

from __future__ import annotations

import numpy as np
from torch import nn

from ...config import load_config
from ...data_pipes.latents import LatentSample
from ...models.denoiser import Denoiser
from ...training.denoiser import DenoiserRun, make_model
from ...training.features import FeatureSource
from ...training.latent_batches import Collate, LatentBatches
from ...training.loop import Stage
from ..plan import Features, features_of

__all__ = ["random_stage"]

SAMPLES = 256


def random_stage(preset: str, overrides: list[str]) -> tuple[DenoiserRun, Stage]:
    """The preset's run and its stage, which evaluates nothing and publishes nothing."""
    quiet = ["log_every=1000000", "eval_every=0", "save_every=0", "trackers=[]", "cpu=true", "precision=no"]
    run = load_config(DenoiserRun, preset, "denoiser", overrides=[*quiet, *overrides])
    features = features_of(preset)
    latents = [random_sample(features, i) for i in range(SAMPLES)]
    statistics = {"latent_mean": [0.0] * features.channels, "latent_std": [1.0] * features.channels}
    hashes = {"autoencoder_hash": "", "conditioner_hash": ""}
    model, objective = make_model(run, {"settings": hashes, **statistics}, latents[0])
    assert isinstance(model, Denoiser)
    shares, source = run.conditioning.shares(), FeatureSource(nn.Identity())  # nothing is left to compute
    collate = Collate(objective, shares, dict(model.config), source, run.seed)
    return run, Stage(
        name="denoiser",
        model=model,
        loss=objective.loss,
        batches=lambda rank, world: LatentBatches(
            latents, collate, lambda step: features.n_latents, run.batch_size, run.seed, rank, world
        ),
        evaluate=lambda ema, step: {},
        publish=lambda ema: None,
        shardable=True,
    )


def random_sample(features: Features, i: int) -> LatentSample:
    """One caption of a length between half of the longest and that, and one view."""
    rng = np.random.default_rng(i)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    length = int(rng.integers(features.text_tokens // 2, features.text_tokens + 1))
    return LatentSample(
        uid=f"random-{i}",
        latent=normal(features.n_latents, features.channels),
        text_tokens=normal(1, features.text_tokens, features.text_width),
        text_lengths=np.array([length]),
        text_pooled=normal(1, features.pooled_width),
        image_tokens=normal(1, features.image_tokens, features.image_width),
        image_pooled=normal(1, features.pooled_width),
    )
