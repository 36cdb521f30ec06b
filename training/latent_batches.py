"""From latent samples to the denoiser's batches: what each sees of its conditions, its noise, its noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data_pipes.latents import LatentSample
from ..data_pipes.loader import Batches, Indexed, order, sample_rng
from .conditioning import choose_views, conditions_seen, image_features, text_features
from .curriculum import choose_tokens
from .features import FeatureSource
from .loop import Batch
from .objectives import Objective

__all__ = ["Collate", "Draw", "LatentBatches"]


@dataclass(frozen=True)
class Draw:
    """A sample, its random numbers (functions of seed and position), and how often it has been seen before."""

    sample: LatentSample
    rng: np.random.Generator
    epoch: int = 0


@dataclass(frozen=True)
class Collate:
    """Makes a batch of draws: latents standardised as the model's settings say, noise, noise level and condition.

    shares: of samples that see text, an image, both, nothing.
    settings: the model's.
    source: computes the features that are not cached; those of the chosen caption and views alone.
    """

    objective: Objective
    shares: dict[str, float]
    settings: dict[str, Any]
    source: FeatureSource
    seed: int
    max_views: int = 1

    def __call__(self, draws: list[Draw], n_tokens: int | None = None) -> Batch:
        """`n_tokens` of the latent tokens of each (None: all): a random subset, with its places in `tokens`."""
        seen, texts, views, levels, noises, tokens = [], [], [], [], [], []
        patch, n_latents = self.settings["patch"], self.settings["n_latents"]
        for draw in draws:
            sample, rng = draw.sample, draw.rng
            seen.append(conditions_seen(self.seed, sample.uid, draw.epoch, self.shares))
            texts.append(int(rng.integers(max(len(sample.text_pooled), 1))))
            views.append(choose_views(rng, len(sample.image_pooled), self.max_views))
            levels.append(self.objective.draw(rng))
            noises.append(rng.standard_normal(sample.latent.shape, np.float32))
            if n_tokens not in (None, n_latents):
                tokens.append(choose_tokens(rng, n_latents // patch, n_tokens // patch))
        samples = [draw.sample for draw in draws]
        arrays = {"latent": self._standardised(samples), "noise": np.stack(noises)}
        if tokens:
            tokens_BN = np.stack(tokens)
            rows_BL1 = (tokens_BN[:, :, None] * patch + np.arange(patch)).reshape(len(draws), -1, 1)
            arrays = {name: np.take_along_axis(array, rows_BL1, 1) for name, array in arrays.items()}
            arrays["tokens"] = tokens_BN
        arrays |= {name: np.array([level[name] for level in levels], np.float32) for name in levels[0]}
        samples = self.source.fill(samples, texts, views)
        arrays |= text_features(samples, texts, self.settings) | image_features(samples, views, self.settings)
        arrays |= dict(zip(("has_text", "has_image"), np.array(seen).T.copy(), strict=True))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _standardised(self, samples: list[LatentSample]) -> np.ndarray:
        latent_BLC = np.stack([sample.latent for sample in samples]).astype(np.float32)
        if self.settings["latent_mean"] is None:
            return latent_BLC
        mean_C, std_C = (np.array(self.settings[name], np.float32) for name in ("latent_mean", "latent_std"))
        return (latent_BLC - mean_C) / std_C


class LatentBatches(Batches[LatentSample, Batch]):
    """As `Batches`, with collate told each sample's epoch and the step's number of latent tokens.

    Args:
        collate: (draws of this rank, latent tokens of the step) → the batch.
        tokens: step (from 0) → how many latent tokens it trains on.
    """

    def __init__(
        self,
        dataset: Indexed[LatentSample],
        collate: Callable[[list[Draw], int], Batch],
        tokens: Callable[[int], int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(dataset, collate, batch_size, seed, rank, world)  # type: ignore[arg-type] # see `batch`
        self.tokens = tokens

    def batch(self, step: int) -> Batch:
        positions, count = self.positions(step), len(self.dataset)
        draws = [
            Draw(self.dataset[int(i)], sample_rng(self.seed, int(p)), int(p) // count)
            for i, p in zip(order(count, self.seed, positions), positions)
        ]
        return self.collate(draws, self.tokens(step))  # type: ignore[call-arg, arg-type]
