"""A training step of the loop against its floor: the same model and batch in a bare PyTorch loop.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.loop --preset tiny
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.loop --preset small --batch 4 --steps 6

Cost model: the model's forward and backward pass are 6 operations a weight and token; AdamW and clipping read and write
the weights a few times, once a step. What the loop adds: the EMA (one read and write of the weights), a batch made in a
thread beside (in Python, so it takes the interpreter from the step), a check that loss and gradients are finite. With
few weights and many tokens that is a few percent, and less the larger the batch.

outside_share: of a step's time, what is neither forward, backward nor the optimiser's update. Aim: 0.05 at tiny.
over_floor: seconds a step over those of the bare loop (forward, backward, clipping, AdamW of one batch that is there
already), taken in turns. Aim: 1.05 at small.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from ...training import loop
from ...training.loop import fit, make_optimiser
from ...training.parallel import Parallel
from .measure import finish
from .random_stage import random_stage

ROUNDS = 5


class Stopwatch:
    """Seconds spent in wrapped calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def ours(preset: str, overrides: list[str], warm: int, steps: int) -> tuple[float, float]:
    """Seconds a step of `fit`, and the share of them outside forward, backward and update."""
    inside, marks = Stopwatch(), {}
    backward, update, log_step = loop.backward, Parallel.update, loop.Log.step

    def marked(log: loop.Log, **metrics: Any) -> None:
        log_step(log, **metrics)
        if log.progress.step in (warm, warm + steps):
            marks[log.progress.step] = time.perf_counter(), inside.seconds

    loop.backward, Parallel.update, loop.Log.step = inside.around(backward), inside.around(update), marked
    try:
        with tempfile.TemporaryDirectory() as out:
            run, stage = random_stage(preset, [*overrides, f"steps={warm + steps + 1}", f"out={out}"])
            fit(run, stage, resume="never")
    finally:
        loop.backward, Parallel.update, loop.Log.step = backward, update, log_step
    (began, before), (ended, after) = marks[warm], marks[warm + steps]
    return (ended - began) / steps, 1 - (after - before) / (ended - began)


def bare(preset: str, overrides: list[str], warm: int, steps: int) -> float:
    """Seconds a step of a plain loop on one batch."""
    run, stage = random_stage(preset, overrides)
    model, optimiser = stage.model, make_optimiser(run, stage.model)
    batch = next(stage.batches(0, 1).iterate(0, 1))
    for step in range(warm + steps):
        if step == warm:
            began = time.perf_counter()
        loss_B, _ = stage.loss(model, batch)
        loss_B.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=30, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    overrides = [f"batch_size={options.batch}"] if options.batch else []
    warm, steps = max(2, options.steps // 5), options.steps
    rounds = []
    for _ in range(options.rounds):
        floor = bare(options.preset, overrides, warm, steps)
        step, outside = ours(options.preset, overrides, warm, steps)
        rounds.append((step, floor, step / floor, outside))
        print(f"step {step:.4f} s, floor {floor:.4f} s, outside {outside:.1%}", flush=True)
    step, floor, ratio, outside = (statistics.median(values) for values in zip(*rounds, strict=True))
    sizes = {"preset": options.preset, "batch": options.batch}
    finish(sizes | {"step_s": step, "floor_s": floor, "over_floor": ratio, "outside_share": outside})


if __name__ == "__main__":
    main()
