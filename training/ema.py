"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["Ema"]


class Ema:
    """Keeps `module`, a copy in evaluation mode whose weights trail the trained ones.

    The decay warms up as (1 + n) / (10 + n), so that the random start is soon forgotten.
    Buffers (batch-norm statistics) are averages already and are copied. Frozen weights are shared, not copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(model, shared).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        averages, weights = zip(*((average, p.detach()) for average, p in pairs if p.requires_grad))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
