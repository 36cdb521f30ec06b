"""On how many latent tokens a step trains: fewer in the first parts of a run, then all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError

__all__ = ["check_curriculum", "choose_tokens", "tokens_at"]

Curriculum = Sequence[tuple[float, int]]


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
