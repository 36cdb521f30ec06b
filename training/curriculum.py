"""Batches of latents as a function of the step: the epoch of each sample, and on how many tokens a step trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data_pipes.latents import LatentSample
from ..data_pipes.loader import Batches, Indexed, order, sample_rng
from ..errors import UserError
from .loop import Batch

__all__ = ["Draw", "LatentBatches", "check_curriculum", "choose_tokens", "tokens_at"]

Curriculum = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Draw:
    """A sample, its random numbers (functions of seed and position), and how often it has been seen before."""

    sample: LatentSample
    rng: np.random.Generator
    epoch: int = 0


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


def check_curriculum(curriculum: Curriculum, n_latents: int, patch: int) -> None:
    """Raises UserError for shares that do not rise within (0, 1), or tokens the model cannot be given."""
    shares = [share for share, _ in curriculum]
    if any(not 0 < share < 1 for share in shares) or any(a >= b for a, b in zip(shares, shares[1:])):
        raise UserError(
            f"curriculum: each part is [share of the steps at which it ends, tokens], the shares rising between 0 and "
            f"1 (the rest of the run has all {n_latents} tokens), they are {shares}"
        )
    for _, tokens in curriculum:
        if not 0 < tokens <= n_latents or tokens % patch:
            raise UserError(
                f"curriculum: {tokens} latent tokens must be a multiple of model.patch={patch}, from {patch} to the "
                f"latents' {n_latents}"
            )


def tokens_at(step: int, steps: int, curriculum: Curriculum, n_latents: int) -> int:
    """Latent tokens of step `step` (from 0) of `steps`: those of the first part that has not ended, then all.

    Example: [(0.5, 16)] of 10 steps and 32 latents is 16 for steps 0 … 4, then 32.
    """
    return next((tokens for share, tokens in curriculum if step < share * steps), n_latents)


def choose_tokens(rng: np.random.Generator, there: int, wanted: int) -> np.ndarray:
    """`wanted` different ones of `there` transformer tokens, in their order."""
    return np.sort(rng.permutation(there)[:wanted])
