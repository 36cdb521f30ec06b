"""The one training loop: fetch, step, log, evaluate, save. It does not know which stage it trains."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import distributed, nn

from ..checkpoints.state import Entry, Progress, StateReader, StateWriter, find_state
from ..data_pipes.loader import Batches
from ..data_pipes.shards import MANIFEST
from ..errors import UserError
from .config import RunConfig, lr_at
from .ema import Ema, skeleton
from .launch import launch, say
from .log import Log, check_trackers
from .parallel import MOMENTS, Parallel, parallelise

__all__ = ["REQUEUE_EXIT_CODE", "Batch", "NonFiniteLoss", "Stage", "fit", "say"]

REQUEUE_EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: "state is saved, start me again"; job scripts requeue on it

Batch = dict[str, torch.Tensor]


class NonFiniteLoss(UserError):
    """The loss or a gradient is NaN or infinite."""


class LostRank(UserError):
    """Another rank ended or does not answer."""

    leaves_at_once = True  # gloo's threads, which wait for that rank, abort a process that cleans up


@dataclass
class Stage:
    """What the loop needs to know of a stage.

    Every random number a step uses arrives in its batch, drawn per sample from (seed, position):
    so a step is a function of weights and batch, whatever the rank or the restart.

    loss: (model, batch) → per-sample losses [B], metrics (scalars, detached).
    batches: (rank, world) → this rank's share of every step.
    evaluate: (EMA model, step) → metrics; runs on the main process alone.
    publish: writes the EMA model where the next stage loads it.
    shardable: the loss calls the model as one module, so that its parameters may be spread over ranks.
    data: fingerprint of the data; a run does not go on with other data.
    flops: floating-point operations a sample costs in training; 0 where they are not counted.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    batches: Callable[[int, int], Batches]
    evaluate: Callable[[nn.Module, int], dict[str, float]]
    publish: Callable[[nn.Module], None]
    shardable: bool = False
    data: str = ""
    flops: float = 0.0


def fit(run: RunConfig, stage: Stage, *, resume: str = "auto") -> None:
    """Train `stage.model` for `run.steps` steps, going on from the last state in `run.out`.

    Writes config.json, log.jsonl, what the trackers write, state/, and at evaluations and the end what
    `stage.publish` writes. On SIGTERM, SIGINT or SIGUSR1 it saves, then exits with REQUEUE_EXIT_CODE.

    Raises: UserError for a launch that is not what the config says; NonFiniteLoss and LostRank, with the last state
    kept.
    """
    out = Path(run.out)
    if (out / MANIFEST).is_file():
        raise UserError(f"{out} holds shards, not a run: give another folder as --out")
    check_trackers(run)
    accelerator = launch(run, shardable=stage.shardable)
    torch.manual_seed(run.seed)
    say(trained_share(stage))
    prepare_blocks(run, stage)
    found = find_state(out, resume)
    reader = StateReader(found) if found else None
    progress = begin(run, stage, reader)
    check_same_step(accelerator, progress, out)
    if not accelerator.is_fsdp2:  # which moves one block at a time as it shards it
        stage.model.to(accelerator.device)
    shell = skeleton(stage.model)
    parallel = parallelise(accelerator, stage.model, make_optimiser(run, stage.model))
    ema = Ema(parallel, shell, run.ema_decay)
    if reader is not None:
        restore(reader, parallel, ema)
        reader = None  # or the files of a state that is deleted would keep their place on the disk
    with lost_rank_named(accelerator, progress, out):
        train(run, stage, parallel, ema, progress)
        module = ema.module()
        if accelerator.is_main_process:
            publish(stage, module, out)
        accelerator.wait_for_everyone()
    if distributed.is_initialized():
        distributed.destroy_process_group()  # gloo's threads, left to the end of the process, may abort it


def train(run: RunConfig, stage: Stage, parallel: Parallel, ema: Ema, progress: Progress) -> None:
    """From `progress.step` to `run.steps`."""
    if progress.step == run.steps:
        return
    accelerator, out = parallel.accelerator, Path(run.out)
    rank, world = accelerator.process_index, accelerator.num_processes
    stop, batches = StopSignal(accelerator), stage.batches(rank, world).iterate(progress.step)
    writer = StateWriter(
        out,
        rank=rank,
        world=world,
        any_rank=partial(any_rank, accelerator),
        patience_s=60 * run.timeout_minutes,
        keep_last=run.keep_last,
        keep_every=run.keep_every,
    )
    with (
        writer.finished_before(NonFiniteLoss),
        Log(accelerator, run, out, stage.name, progress, flops=stage.flops) as log,
    ):
        while progress.step < run.steps:
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(batches).items()}
            step_seed(run.seed, progress.step, rank)
            loss, metrics = backward(parallel, stage.loss, batch, run.accumulate)
            norm = parallel.clip(run.optim.max_grad_norm)
            assert_finite(loss, norm, parallel, progress, out)
            writer.before_update()
            lr = lr_at(run.optim, progress.step + 1, run.steps)
            if (late_norm := parallel.update(lr)) is not None:
                norm = late_norm
                assert_finite(loss, norm, parallel, progress, out)
            progress.step += 1
            ema.update(progress.step)
            log.step(loss=loss, grad_norm=norm, lr=lr, **metrics)
            last, stopping = progress.step == run.steps, stop.wanted(progress.step)
            if due(run.save_every, progress.step) or last or stopping:
                note(progress, run, stage, parallel)
                writer.begin(progress, entries(parallel, ema))
            if last or (due(run.eval_every, progress.step) and not stopping):
                evaluate(stage, parallel, ema, log)
            if stopping and not last:
                writer.finish()
                raise SystemExit(REQUEUE_EXIT_CODE)
        writer.finish()


@contextlib.contextmanager
def lost_rank_named(accelerator: Accelerator, progress: Progress, out: Path) -> Iterator[None]:
    """Turns what the communication library says when a rank is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        lost = isinstance(error, distributed.DistError) or "gloo" in first
        if accelerator.num_processes == 1 or not lost:
            raise
        raise LostRank(
            f"step {progress.step + 1}: another rank ended or did not answer (its own message says why, if it could "
            f"leave one); {out}/state/latest is intact: start the same command again ({first[:200]})"
        ) from None


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any rank; all of them ask together."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device)).item() > 0)


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


# --- before the first step -------------------------------------------------------------------------------------------


def check_same_step(accelerator: Accelerator, progress: Progress, out: Path) -> None:
    """Raises UserError on all ranks if some of them found another state, or none."""
    steps = accelerator.gather(torch.tensor([progress.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the ranks go on from different steps ({', '.join(map(str, steps))}): {out} must be the same folder "
            "on all machines"
        )


def trained_share(stage: Stage) -> str:
    """How many of the stage's parameters train, in words. Raises UserError if none does."""
    every = sum(p.numel() for p in stage.model.parameters())
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(f"{stage.name}: none of the {every:,} parameters would be trained")
    return f"{stage.name}: training {trained:,} of {every:,} parameters ({trained / every:.1%})"


def prepare_blocks(run: RunConfig, stage: Stage) -> None:
    """Checkpointing and compilation of the model's blocks. Raises UserError where it has none."""
    if run.gradient_checkpointing:
        if not getattr(stage.model, "_supports_gradient_checkpointing", False):
            raise UserError(
                f"gradient_checkpointing: the model of {stage.name} has no blocks to do it on; leave it off"
            )
        stage.model.enable_gradient_checkpointing()
    if run.compile:
        blocks = [b for name, m in stage.model.named_modules() if name.split(".")[-1] == "blocks" for b in m]
        if not blocks:
            raise UserError(f"compile: the model of {stage.name} has no blocks to compile; leave it false")
        # Alike, so that one compilation serves all. Of any length from the start: what is compiled must not depend on
        # which lengths came first, or a resumed run would differ.
        for block in blocks:
            block.compile(dynamic=True)


def make_optimiser(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains; weight decay on matrices alone, not on gains, biases and embeddings of one axis."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": run.optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=run.optim.lr, betas=run.optim.betas, fused=True)


# --- state -----------------------------------------------------------------------------------------------------------


def begin(run: RunConfig, stage: Stage, reader: StateReader | None) -> Progress:
    """Where to begin, with the weights of the state to go on from in `stage.model`.

    Raises: UserError if that state is of another model, of other data, or of another order of samples.
    """
    if reader is None:
        return Progress()
    progress = reader.progress
    for name, before, now in (
        ("seed", progress.seed, run.seed),
        ("batch_size", progress.batch_size, run.batch_size),
        ("data", progress.data, stage.data),
    ):
        if before != now:
            what = "the data are not those it was trained on" if name == "data" else f"{name} was {before}, it is {now}"
            raise UserError(f"{reader.folder} cannot be gone on from: {what}; put that back, or give another --out")
    weights = {**dict(stage.model.named_parameters()), **dict(stage.model.named_buffers())}
    trained = {name: p.shape for name, p in stage.model.named_parameters() if p.requires_grad}
    reader.check("weights", {name: value.shape for name, value in weights.items()})
    reader.check("ema", trained)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(reader.tensor(f"weights/{name}"))
    return progress


@torch.no_grad()
def restore(reader: StateReader, parallel: Parallel, ema: Ema) -> None:
    """The averages, of weights and of gradients, of a state; the weights came before they were laid out."""
    for name, p in ema.trained.items():
        ema.set(name, reader.tensor(f"ema/{name}"))
        moments = {moment: reader.tensor(f"{moment}/{name}") for moment in MOMENTS}
        parallel.set_moments(p, moments, reader.progress.updates)
    if parallel.scaler is not None and reader.progress.scaler:
        parallel.scaler.load_state_dict(reader.progress.scaler)


def entries(parallel: Parallel, ema: Ema) -> Iterator[Entry]:
    """Every tensor of the state."""
    for name, p in parallel.parameters():
        size = parallel.numel(p) * 4
        yield Entry(f"weights/{name}", size, partial(parallel.weight, p))
        if p.requires_grad:
            yield Entry(f"ema/{name}", size, partial(ema.whole, name))
            for moment in MOMENTS:
                yield Entry(f"{moment}/{name}", size, partial(parallel.moment, p, moment))
    for name, buffer in parallel.bare.named_buffers():
        yield Entry(f"weights/{name}", buffer.nbytes, buffer.detach)


def note(progress: Progress, run: RunConfig, stage: Stage, parallel: Parallel) -> None:
    """What the state shall say of the run."""
    progress.updates, progress.data = parallel.steps_taken(), stage.data
    progress.seed, progress.batch_size = run.seed, run.batch_size
    progress.scaler = parallel.scaler.state_dict() if parallel.scaler is not None else None


# --- a step ----------------------------------------------------------------------------------------------------------


def step_seed(seed: int, step: int, rank: int) -> None:
    """Random numbers drawn inside a model (dropout of adapters) are a function of the step and the rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def backward(
    parallel: Parallel, loss_fn: Callable, batch: Batch, parts: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of the mean loss over the batch, taken in `parts`; returns the mean loss and metrics, detached."""
    losses, all_metrics = [], []
    chunks = [dict(zip(batch, tensors, strict=True)) for tensors in zip(*(v.chunk(parts) for v in batch.values()))]
    for i, chunk in enumerate(chunks):
        with parallel.exchange(last=i == len(chunks) - 1):
            loss_B, metrics = loss_fn(parallel.model, chunk)
            loss = loss_B.mean()
            parallel.backward(loss, parts=len(chunks), last=i == len(chunks) - 1)
        losses.append(loss.detach())
        all_metrics.append(metrics)
    mean = {name: torch.stack([m[name] for m in all_metrics]).mean() for name in all_metrics[0]}
    return torch.stack(losses).mean(), mean


def assert_finite(
    loss: torch.Tensor, norm: torch.Tensor | float | None, parallel: Parallel, progress: Progress, out: Path
) -> None:
    """Gradients are summed over ranks, so one rank's NaN is in every rank's norm and all stop here together."""
    if norm is None:
        return
    skipped = parallel.scaler is not None and parallel.scaler.get_scale() > 1  # it leaves out such an update itself
    if not (math.isfinite(norm) or skipped) or not math.isfinite(loss if parallel.scaler is None else 0.0):
        raise NonFiniteLoss(
            f"step {progress.step + 1}: loss {float(loss):.4g}, gradient norm {float(norm):.4g}; training stopped and "
            f"{out}/state/latest is intact: start again with a lower optim.lr"
        )


def evaluate(stage: Stage, parallel: Parallel, ema: Ema, log: Log) -> None:
    """Evaluate the averages on the main process; what goes wrong there never ends the run."""
    began = time.monotonic()
    module, step = ema.module(), log.progress.step
    if parallel.accelerator.is_main_process:
        try:
            metrics = stage.evaluate(module.to(parallel.accelerator.device), step)
            log.write({f"eval/{name}": value for name, value in metrics.items()})
            log.bar.update(0, **metrics)
        except Exception as error:  # a picture or a score is not worth a run
            print(f"evaluation at step {step} failed ({type(error).__name__}: {error}); training goes on", flush=True)
        if step < log.run.steps:
            try:
                publish(stage, module, log.out)
            except UserError as error:
                print(f"{error}; training goes on", flush=True)
    log.pause(time.monotonic() - began)


def publish(stage: Stage, module: nn.Module, out: Path) -> None:
    """Raises UserError if the disk does not take it."""
    try:
        stage.publish(module)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model could not be written to {out} ({error}); the state is intact: free some space and start the "
            "same command again"
        ) from None


class StopSignal:
    """SIGTERM, SIGINT or SIGUSR1 asks for a state and an end; ranks agree on the step at which they do it."""

    AGREE_EVERY = 10  # steps between the ranks' exchanges; one process looks at every step

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT:  # the second Ctrl-C is meant; launchers repeat the others
            raise KeyboardInterrupt
        self.received = True

    def wanted(self, step: int) -> bool:
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self.AGREE_EVERY:
            return False
        return any_rank(self.accelerator, self.received)
