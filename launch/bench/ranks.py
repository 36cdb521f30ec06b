"""Two gloo ranks on two cores against one rank on one core: samples a second, with the same batch in all.

    python -m shapeloom.launch.bench.ranks --preset tiny

Cost model: each rank computes half of the batch and then averages the gradients with the other, 4 bytes a parameter,
in buckets that travel while the backward pass goes on. Clipping, AdamW and EMA are done by both, in whole: so what
does not shrink with a rank's share is a few passes over the weights, and the exchange. Both run at OMP_NUM_THREADS=1.

Each run is a process group of its own that trains by `training.loop.fit` and says how long its steps took after the
first ones; the two kinds take turns. Aim: 1.7. It takes two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from ...training.loop import Log, fit
from .measure import finish
from .random_stage import random_stage


def samples_per_s(ranks: int, preset: str, steps: int, batch: int | None) -> float:
    """Of a training on so many ranks."""
    child = ["-m", "shapeloom.launch.bench.ranks", "--preset", preset, "--steps", str(steps)]
    child += ["--batch", str(batch)] if batch else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, *launcher, *child, "--child", out]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train(preset: str, steps: int, batch: int | None, out: str) -> None:
    """One rank's part; the main one prints samples a second."""
    warm, marks, step = max(2, steps // 5), {}, Log.step

    def marked(log: Log, **metrics: float) -> None:
        step(log, **metrics)
        marks[log.progress.step] = time.perf_counter()

    Log.step = marked  # type: ignore[method-assign]
    overrides = [f"batch_size={batch}"] if batch else []
    run, stage = random_stage(preset, [*overrides, f"steps={warm + steps}", f"out={out}"])
    fit(run, stage, resume="never")
    if os.environ.get("RANK", "0") == "0":
        print(steps * run.batch_size / (marks[warm + steps] - marks[warm]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=40, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", metavar="OUT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.preset, options.steps, options.batch, options.child)
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for ranks, of in rates.items():
            of.append(samples_per_s(ranks, options.preset, options.steps, options.batch))
        print(f"one rank {rates[1][-1]:.2f}, two {rates[2][-1]:.2f} samples/s", flush=True)
    one, two = (statistics.median(of) for of in rates.values())
    finish({"preset": options.preset, "one": one, "two": two, "ratio": two / one})


if __name__ == "__main__":
    main()
