"""How a run's tensors lie on its ranks, and how a step is taken there: one process, DDP, FSDP2, DeepSpeed's ZeRO.

Each parameter has a part on this rank (its `local` tensor: all of it, an FSDP2 shard, a ZeRO-3 partition); what trails
it, the EMA, is laid out alike. `whole` gathers one tensor at a time, so no rank ever holds the model twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["Parallel", "ZeroParallel", "parallelise"]

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def parallelise(accelerator: Accelerator, model: nn.Module, optimiser: torch.optim.Optimizer) -> Parallel:
    """The model and its optimiser, laid out as the launcher asks."""
    kind = ZeroParallel if accelerator.distributed_type == DistributedType.DEEPSPEED else Parallel
    return kind(accelerator, model, optimiser)


class Parallel:
    """One process, DDP or FSDP2: parameters are tensors or DTensors.

    Attributes:
        model: what a loss is computed with.
        sharded: whether a rank holds only a part of each parameter.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
            _autocast_shards(accelerator, model)
        self.model, self.optimiser = accelerator.prepare(model, optimiser)
        self.bare = model  # launchers wrap it or change it in place
        self.sharded = any(isinstance(p, DTensor) for p in self.bare.parameters())

    # --- a step

    def exchange(self, *, last: bool) -> AbstractContextManager:
        """Around forward and backward of an accumulated part: ranks exchange gradients only at the last."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, *, parts: int, last: bool) -> None:
        """Add the gradients of one of `parts` accumulated losses."""
        self.accelerator.backward(loss / parts)

    def clip(self, max_norm: float) -> torch.Tensor | None:
        """Clip the gradients; their norm before it over all ranks, or None where it is only known after the update."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, lr: float) -> torch.Tensor | None:
        """Take the optimiser's step; returns the gradients' norm where `clip` could not."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return None

    # --- tensors

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.bare.named_parameters()

    def numel(self, p: nn.Parameter) -> int:
        """Numbers in a parameter, on all ranks together."""
        return p.numel()

    def local(self, p: nn.Parameter) -> torch.Tensor:
        """This rank's part of a parameter; it shares memory with it."""
        return p.to_local().detach() if isinstance(p, DTensor) else p.detach()

    def whole(self, p: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        """A tensor laid out as `p`, from all ranks' parts of it; all of them call this together."""
        if not isinstance(p, DTensor):
            return local
        shape, stride = p.shape, p.stride()
        return DTensor.from_local(local, p.device_mesh, p.placements, shape=shape, stride=stride).full_tensor()

    def weight(self, p: nn.Parameter) -> torch.Tensor:
        """A parameter, whole."""
        return self.whole(p, self.local(p))

    def part(self, p: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that is to lie as `p` does."""
        whole = whole.to(p.device)
        if not isinstance(p, DTensor):
            return whole
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()

    # --- the optimiser's

    def moment(self, p: nn.Parameter, name: str) -> torch.Tensor:
        """One of AdamW's averages, whole."""
        value = self.optimiser.state[p][name]
        return self.whole(p, value.to_local() if isinstance(value, DTensor) else value)

    def set_moments(self, p: nn.Parameter, whole: dict[str, torch.Tensor], step: int) -> None:
        state = self.optimiser.state[p]
        state["step"] = torch.tensor(float(step), device=p.device if _fused(self.optimiser) else None)
        for name, value in whole.items():
            part = self.part(p, value)
            if isinstance(p, DTensor):
                part = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            state[name] = part

    def steps_taken(self) -> int:
        """Updates the optimiser has made; fewer than asked for where a loss scaler skipped some."""
        return max((int(state["step"]) for state in self.optimiser.state.values()), default=0)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of float16 gradients."""
        return self.accelerator.scaler


class ZeroParallel(Parallel):
    """DeepSpeed's ZeRO; its engine clips, updates and keeps AdamW's averages in flat partitions."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        super().__init__(accelerator, model, optimiser)
        self.engine: Any = self.model
        self.zero: Any = self.engine.optimizer
        self.sharded = self.engine.zero_optimization_stage() == 3
        if not self.sharded:  # DeepSpeed links them to the parameters at the first group's update, the others' not
            self._allocate(step=0)

    def exchange(self, *, last: bool) -> AbstractContextManager:
        return nullcontext()  # the engine knows where in the batch it is

    def backward(self, loss: torch.Tensor, *, parts: int, last: bool) -> None:
        self.engine.backward(loss)  # the engine divides by its gradient_accumulation_steps
        if not last:
            self.engine.step()  # counts the part; the update waits for the last one

    def clip(self, max_norm: float) -> torch.Tensor | None:
        return None

    def update(self, lr: float) -> torch.Tensor | None:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    def numel(self, p: nn.Parameter) -> int:
        return p.ds_numel if self.sharded else p.numel()

    def local(self, p: nn.Parameter) -> torch.Tensor:
        return p.ds_tensor.detach() if self.sharded else p.detach()

    def whole(self, p: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        if not self.sharded:
            return local
        local = local.to(self.accelerator.device)  # it may be offloaded
        parts = [torch.empty_like(local) for _ in range(self.accelerator.num_processes)]
        distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)

    def part(self, p: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        if not self.sharded:
            return whole.to(p.device)
        size = p.ds_tensor.numel()
        flat = whole.flatten()[size * self.accelerator.process_index :][:size]
        padded = torch.zeros(size, dtype=flat.dtype)  # the last rank's partition ends in padding
        padded[: len(flat)] = flat
        return padded.to(p.ds_tensor.device)

    def moment(self, p: nn.Parameter, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(p, name)

    def set_moments(self, p: nn.Parameter, whole: dict[str, torch.Tensor], step: int) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._allocate(step)
        for name, value in whole.items():
            if self.sharded:
                safe_set_local_optimizer_state(p, self.part(p, value), name)
            else:
                safe_set_full_optimizer_state(p, value, name)

    def _allocate(self, step: int) -> None:
        """Give the flat partitions their averages, which they would get with the first update."""
        inner = self.zero.optimizer
        groups = [flat for group in inner.param_groups for flat in group["params"]]
        for flat in self.zero.fp32_partitioned_groups_flat if self.sharded else groups:
            state = inner.state[flat]
            state["step"] = torch.tensor(float(step), device=flat.device if _fused(inner) else None)
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(flat)
        if not self.sharded:
            self.zero._lazy_init_hp_params_optimizer_state()

    def steps_taken(self) -> int:
        return max((int(state["step"]) for state in self.zero.optimizer.state.values() if "step" in state), default=0)


def _autocast_shards(accelerator: Accelerator, model: nn.Module) -> None:
    """Have FSDP2 compute as the other layouts do: float32 weights, gathered so, under autocast.

    Accelerate's own policy casts the model's inputs and outputs too, and so rounds noise levels to 8 bits, and sums
    gradients in bf16.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)


def _fused(optimiser: Any) -> bool:
    """A fused optimiser's step counts lie beside its parameters."""
    return bool(optimiser.param_groups[0].get("fused"))
