"""A training killed with SIGKILL at random moments, again and again: it must end in the same state, bit for bit.

    python -m shapeloom.launch.bench.kills --kills 20 --seed 0 [--ranks 2] [--steps 200]

A run without interruption gives the hash to reach. Then the same command is started and killed at moments drawn
uniformly over what is left of it, from the first logged step on, so that kills meet steps, states being written and
their renaming alike (a state is written every third step). With two ranks the kill takes one of them, drawn too, and
the launcher must end the other. A run that comes to its end is compared, and another begins, until all kills are spent.
The last line is JSON; the exit code is 1 if a hash differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ...data_pipes.procedural import ProceduralSettings, generate
from ...errors import UserError, run_command
from ...progress import Bar
from .measure import finish

SMALL = ["model.width=32", "model.heads=2", "model.hidden=16", "model.n_latents=16", "model.channels=8", "batch_size=4"]
LOOP = ["n_surface=64", "n_field=64", "eval_samples=2", "log_every=1", "eval_every=0", "save_every=3"]


def main(
    kills: Annotated[int, typer.Option(help="How many times to kill.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    ranks: Annotated[int, typer.Option(help="Processes of the training.")] = 1,
    steps: Annotated[int, typer.Option(min=3, help="Of the training.")] = 600,
) -> None:
    """Kill a training at random moments and compare where it ends."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="shapeloom-kills-") as scratch, Bar(kills, "kills") as bar:
        raw, whole, killed = (Path(scratch) / name for name in ("raw", "whole", "killed"))
        quick = ProceduralSettings(count=24, n_surface=256, n_near=256, n_uniform=256, n_views=2, image_size=32)
        generate(raw, quick)
        life, ended = attempt(raw, whole, ranks, steps, after=None, rng=rng)
        if not ended:
            raise UserError("the run without kills did not end well: see what it said above")
        wanted, spent, ends = state_hash(whole, ranks, steps), 0, 0
        while spent < kills or killed.exists():
            left = life * (1 - last_step(killed) / steps)
            after = rng.uniform(0, left) if spent < kills else None
            _, ended = attempt(raw, killed, ranks, steps, after=after, rng=rng)
            if ended:
                ends += 1
                if (got := state_hash(killed, ranks, steps)) != wanted:
                    finish({"benchmark": "kills", "kills": spent, "same": False, "wanted": wanted, "got": got})
                    raise SystemExit(1)
                shutil.rmtree(killed)
            else:
                spent += 1
                bar.update(1, step=last_step(killed))
    finish({"benchmark": "kills", "kills": spent, "ends": ends, "ranks": ranks, "same": True, "hash": wanted})


def attempt(
    raw: Path, out: Path, ranks: int, steps: int, *, after: float | None, rng: random.Random
) -> tuple[float, bool]:
    """One start; SIGKILL `after` seconds of training, or never. Returns seconds of training, and whether it ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = ["-m", "shapeloom.training.autoencoder", "--data", raw, "--out", out, *SMALL, *LOOP, f"steps={steps}"]
    log, env = out / "log.jsonl", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    size = log.stat().st_size if log.exists() else -1
    with open(out.with_suffix(".txt"), "w+") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, launcher + words)], env=env, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None and (log.stat().st_size if log.exists() else -1) == size:
            time.sleep(0.005)
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        if process.returncode is None:
            victims = children(process.pid) if ranks > 1 else [process.pid]
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(victims), signal.SIGKILL)
            process.wait()
        if process.returncode and after is None:
            said.seek(0)
            print(said.read(), flush=True)
        return time.monotonic() - began, process.returncode == 0


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def last_step(out: Path) -> int:
    """Of the state a run would go on from."""
    pointer = out / "state" / "latest"
    return int(pointer.read_text()) if pointer.exists() else 0


def state_hash(out: Path, ranks: int, steps: int) -> str:
    """SHA-256 over the last state's tensors, in their files."""
    digest = hashlib.sha256()
    for rank in range(ranks):
        part = out / "state" / f"{steps:08d}" / f"part-{rank:05d}-of-{ranks:05d}.safetensors"
        digest.update(part.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
