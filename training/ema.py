"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .parallel import Parallel

__all__ = ["Ema", "skeleton"]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without memory for what trains; what is frozen and the buffers are shared."""
    stand_in = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) if p.requires_grad else p
        for p in model.parameters()
    }
    return copy.deepcopy(model, stand_in).eval()


class Ema:
    """Averages that trail the trained weights, laid out over the ranks as the weights are.

    The decay warms up as (1 + n) / (10 + n), so that the random start is soon forgotten.
    Buffers (batch-norm statistics) are averages already and are copied. Frozen weights are shared, not copied.

    Args:
        shell: `skeleton` of the model, made before its parameters were laid out.
    """

    def __init__(self, parallel: Parallel, shell: nn.Module, decay: float) -> None:
        self.parallel, self.shell, self.decay = parallel, shell, decay
        self.trained = {name: p for name, p in parallel.parameters() if p.requires_grad}
        self.averages = {name: parallel.local(p).float().clone() for name, p in self.trained.items()}
        if parallel.sharded:
            _assign(shell, {name: torch.empty_like(p, device="meta") for name, p in shell.named_parameters()})
        else:  # then the shell is the whole average, at no cost
            _assign(shell, self.averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self.parallel.local(p) for p in self.trained.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)
        for mine, theirs in zip(self.shell.buffers(), self.parallel.bare.buffers(), strict=True):
            mine.copy_(theirs)

    def whole(self, name: str) -> torch.Tensor:
        """One average, from all ranks, which call this together."""
        return self.parallel.whole(self.trained[name], self.averages[name])

    def set(self, name: str, whole: torch.Tensor) -> None:
        self.averages[name].copy_(self.parallel.part(self.trained[name], whole))

    def module(self) -> nn.Module:
        """The model with the averages, whole on the main process; elsewhere, when sharded, only its shell.

        All ranks call this together. When sharded, the main process gets one copy in host memory.
        """
        if self.parallel.sharded:
            main = self.parallel.accelerator.is_main_process
            gathered = {}
            for name, p in self.parallel.parameters():
                whole = self.whole(name) if name in self.trained else self.parallel.weight(p)
                if main:
                    gathered[name] = whole.float().cpu()
            shell = copy.deepcopy(self.shell, {id(p): p for p in self.shell.parameters()})
            _assign(shell, gathered)
            return shell
        return self.shell


def _assign(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Have parameters of a module be these tensors, without copying them."""
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
