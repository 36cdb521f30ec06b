"""What every training run is told, whatever its stage."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from ..config import Config

__all__ = ["OptimConfig", "RunConfig", "lr_at"]


class OptimConfig(Config):
    """AdamW with a linear warm-up; `schedule` says what follows it."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "cosine"
    decay_from: float = 0.5  # share of the run after which cosine or line fall; before it the rate is constant
    final_lr: float = 0.02  # share of `lr` reached at their end
    max_grad_norm: float = 1.0


class RunConfig(Config):
    """One run of one stage. Durations are in optimiser steps."""

    data: str = ""
    out: str = ""
    seed: int = 0
    steps: int = 1000
    batch_size: int = 64  # samples of one optimiser step, over all processes and accumulated parts
    accumulate: int = 1  # parts one process's share of a batch is split into, to save memory
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass, for a fraction of the memory
    precision: Literal["no", "bf16", "fp16"] = "no"  # of the forward and backward pass; weights stay float32
    compile: bool = False  # transformer blocks through torch.compile
    processes: int | None = None  # how many there must be; None takes what the launcher started
    cpu: bool = False  # even where there is a GPU
    ema_decay: float = 0.995
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    keep_last: int = 2  # newest states kept
    keep_every: int = 0  # and each whose step divides by this; 0 for none
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    peak_tflops: float = 0.0  # of one device at this precision; the log then has the share that is used (MFU)
    timeout_minutes: float = 30.0  # ranks that wait longer than this for another give up
    optim: OptimConfig = OptimConfig()


def lr_at(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step 1 … steps."""
    warm = min(1.0, step / max(optim.warmup_steps, 1))
    if optim.schedule == "inverse_sqrt":  # Attention Is All You Need (arXiv 1706.03762), §5.3
        return optim.lr * min(warm, (max(optim.warmup_steps, 1) / step) ** 0.5)
    start = optim.decay_from * steps
    if optim.schedule == "constant" or step <= start:
        return optim.lr * warm
    progress = (step - start) / max(steps - start, 1)
    fall = progress if optim.schedule == "linear" else 0.5 * (1 - cos(pi * progress))
    return optim.lr * warm * (1 + (optim.final_lr - 1) * fall)
