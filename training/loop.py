"""The one training loop: fetch, step, log, evaluate, save. It does not know which stage it trains."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoints.state import Progress, find_state, load_state, save_state
from ..data_pipes.loader import Batches
from ..errors import UserError
from ..files import write_atomic, write_json
from ..progress import Bar
from .config import RunConfig, lr_at
from .ema import Ema

__all__ = ["REQUEUE_EXIT_CODE", "NonFiniteLoss", "Stage", "fit", "say"]

REQUEUE_EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: "state is saved, start me again"; job scripts requeue on it

Batch = dict[str, torch.Tensor]


class NonFiniteLoss(UserError):
    """The loss or a gradient is NaN or infinite; the weights were not touched by it."""


@dataclass
class Stage:
    """What the loop needs to know of a stage.

    Every random number a step uses arrives in its batch, drawn per sample from (seed, position):
    so a step is a function of weights and batch, whatever the rank or the restart.

    loss: (model, batch) → per-sample losses [B], metrics (scalars, detached).
    batches: (rank, world) → this rank's share of every step.
    evaluate: (EMA model, step) → metrics; runs on the main process alone.
    publish: writes the EMA model where the next stage loads it.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    batches: Callable[[int, int], Batches]
    evaluate: Callable[[nn.Module, int], dict[str, float]]
    publish: Callable[[nn.Module], None]


def fit(run: RunConfig, stage: Stage, *, resume: str = "auto") -> None:
    """Train `stage.model` for `run.steps` steps, going on from the last state in `run.out`.

    Writes config.json, log.jsonl, TensorBoard events, state/ and what `stage.publish` writes.
    On SIGTERM or SIGINT it saves, then exits with REQUEUE_EXIT_CODE.

    Raises: UserError for a launch that is not what the config says; NonFiniteLoss, with the last state kept.
    """
    out = Path(run.out)
    accelerator = launch(run)
    torch.manual_seed(run.seed)
    say(trained_share(stage))
    ema = Ema(stage.model.to(accelerator.device), run.ema_decay)
    if run.gradient_checkpointing:
        checkpoint_gradients(stage)
    model, optimiser = accelerator.prepare(stage.model, make_optimiser(run, stage.model))
    found = find_state(out, resume)
    progress = load_state(accelerator, ema.module, found) if found else Progress()
    if progress.step >= run.steps:
        if accelerator.is_main_process:  # a kill may have come between the last state and this
            stage.publish(ema.module)
        return
    batches = stage.batches(accelerator.process_index, accelerator.num_processes).iterate(progress.step)
    stop = StopSignal(accelerator)
    with Log(accelerator, run, out, stage.name, progress) as log:
        while progress.step < run.steps:
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(batches).items()}
            loss, metrics = backward(accelerator, model, stage.loss, batch, run.accumulate)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), run.optim.max_grad_norm)
            assert_finite(loss, grad_norm, progress, out)
            lr = lr_at(run.optim, progress.step + 1, run.steps)
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress.step += 1
            ema.update(accelerator.unwrap_model(model), progress.step)
            log.step(loss=loss, grad_norm=grad_norm, lr=lr, **metrics)
            last, stopping = progress.step == run.steps, stop.wanted(progress.step)
            if due(run.eval_every, progress.step) or last:
                log.evaluation(stage.evaluate, ema.module)
            if due(run.save_every, progress.step) or last or stopping:
                save_state(accelerator, ema.module, progress, out, keep_last=run.keep_last, keep_every=run.keep_every)
                if accelerator.is_main_process:
                    stage.publish(ema.module)
            if stopping and not last:
                raise SystemExit(REQUEUE_EXIT_CODE)
    accelerator.wait_for_everyone()


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def launch(run: RunConfig) -> Accelerator:
    """The accelerator, after checking that the launcher did what it was asked to."""
    cpu = run.cpu or not torch.cuda.is_available()
    if cpu and run.precision != "no":
        raise UserError(f"precision={run.precision} is slower than float32 on a CPU; leave it at 'no' there")
    accelerator = Accelerator(cpu=cpu, mixed_precision=run.precision)
    asked = run.processes or int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for but {accelerator.num_processes} came up: on a CPU start them with "
            f"torchrun --nproc_per_node {asked} -m shapeloom.training.<stage> (accelerate launch --cpu starts only one)"
        )
    share = run.batch_size // accelerator.num_processes
    if run.batch_size % accelerator.num_processes or share % run.accumulate:
        raise UserError(
            f"batch_size {run.batch_size} does not divide among {accelerator.num_processes} processes "
            f"and {run.accumulate} accumulated parts"
        )
    return accelerator


def say(text: str) -> None:
    """Tell the user something once, whatever the number of ranks; usable before there is an accelerator."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def trained_share(stage: Stage) -> str:
    """How many of the stage's parameters train, in words. Raises UserError if none does."""
    every = sum(p.numel() for p in stage.model.parameters())
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(f"{stage.name}: none of the {every:,} parameters would be trained")
    return f"{stage.name}: training {trained:,} of {every:,} parameters ({trained / every:.1%})"


def checkpoint_gradients(stage: Stage) -> None:
    """Have the model compute its blocks again in the backward pass. Raises UserError where it cannot."""
    if not getattr(stage.model, "_supports_gradient_checkpointing", False):
        raise UserError(f"gradient_checkpointing: the model of {stage.name} has no blocks to do it on; leave it false")
    stage.model.enable_gradient_checkpointing()


def make_optimiser(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains; weight decay on matrices alone, not on gains, biases and embeddings of one axis."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": run.optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.optim.lr, betas=run.optim.betas, fused=True)


def backward(
    accelerator: Accelerator, model: nn.Module, loss_fn: Callable, batch: Batch, parts: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of the mean loss over the batch, taken in `parts`; returns the mean loss and metrics, detached."""
    losses, all_metrics = [], []
    chunks = [dict(zip(batch, tensors, strict=True)) for tensors in zip(*(v.chunk(parts) for v in batch.values()))]
    for i, chunk in enumerate(chunks):
        with accelerator.no_sync(model) if i < len(chunks) - 1 else nullcontext():
            loss_B, metrics = loss_fn(model, chunk)
            loss = loss_B.mean()
            accelerator.backward(loss / len(chunks))
        losses.append(loss.detach())
        all_metrics.append(metrics)
    mean = {name: torch.stack([m[name] for m in all_metrics]).mean() for name in all_metrics[0]}
    return torch.stack(losses).mean(), mean


def assert_finite(loss: torch.Tensor, grad_norm: torch.Tensor | float, progress: Progress, out: Path) -> None:
    """Gradients are summed over ranks, so one rank's NaN is in every rank's norm and all stop here together."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLoss(
            f"step {progress.step + 1}: loss {float(loss):.4g}, gradient norm {float(grad_norm):.4g}; the update was "
            f"not made and {out}/state/latest is intact: start again with a lower optim.lr"
        )


class StopSignal:
    """SIGTERM or SIGINT asks for a state and an end; ranks agree on the step at which they do it."""

    AGREE_EVERY = 10  # steps between the ranks' exchanges; one process looks at every step

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, *_: Any) -> None:
        if self.received:  # the second time the user means it
            raise KeyboardInterrupt
        self.received = True

    def wanted(self, step: int) -> bool:
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self.AGREE_EVERY:
            return False
        flag = torch.tensor([float(self.received)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item() > 0)


class Log:
    """log.jsonl, TensorBoard and the progress bar, on the main process. A resumed run's log has no step twice."""

    def __init__(self, accelerator: Accelerator, run: RunConfig, out: Path, name: str, progress: Progress) -> None:
        self.accelerator, self.run, self.out, self.progress = accelerator, run, out, progress
        self.main = accelerator.is_main_process
        self.bar = Bar(run.steps, name, start=progress.step, quiet=not self.main)
        self.began = time.monotonic() - progress.seconds

    def __enter__(self) -> Log:
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", self.run.model_dump(mode="json"))
            path = self.out / "log.jsonl"
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if self._before(line)]
                write_atomic(path, "".join(line + "\n" for line in kept))
            self.tensorboard = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.progress.step + 1)
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
        if self.main:
            self.tensorboard.close()

    def _before(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.progress.step
        except (ValueError, KeyError):  # a line the last kill cut short
            return False

    def step(self, **metrics: torch.Tensor | float) -> None:
        """Note a step; values are read from the device only every `log_every` steps."""
        self.progress.seconds = time.monotonic() - self.began
        shown: dict[str, float] = {}
        if due(self.run.log_every, self.progress.step):
            reduced = {name: torch.as_tensor(value, device=self.accelerator.device) for name, value in metrics.items()}
            if self.accelerator.num_processes > 1:
                reduced = {name: self.accelerator.reduce(value.float(), "mean") for name, value in reduced.items()}
            values = {name: float(value) for name, value in reduced.items()}
            self._write(values)
            shown = {"loss": values["loss"]}
        self.bar.update(1, **shown)

    def evaluation(self, evaluate: Callable[[nn.Module, int], dict[str, float]], model: nn.Module) -> None:
        """Evaluate on the main process; what goes wrong there is noted and never ends the run."""
        if self.main:
            try:
                metrics = evaluate(model, self.progress.step)
            except (RuntimeError, ValueError, OSError) as error:
                print(f"evaluation at step {self.progress.step} failed ({error}); training goes on")
                return
            self._write({f"eval/{name}": value for name, value in metrics.items()})
            self.bar.update(0, **metrics)

    def _write(self, values: dict[str, float]) -> None:
        if not self.main:
            return
        line = {"step": self.progress.step, "time": round(self.progress.seconds, 2), **values}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, self.progress.step)
