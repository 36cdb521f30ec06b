"""How long the loop stands still for a state of 300 M parameters, against how long the state takes to be written.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.saving              # 5 GB of disk, 12 GB of memory, 3 minutes
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.saving --layers 2   # half a minute

Cost model: a state is weights, EMA and AdamW's two averages, 16 bytes a parameter: 5.1 GB, written at the disk's rate.
The thread that writes first copies it to host memory that it keeps (a few GB/s; the first time the system also has to
find that memory, which is slower), while the next step's forward and backward pass only read the weights. The loop
waits for what is left of that copy before the update, and for nothing else: so a step as long as the copy waits for
nothing. Twice: the second state finds its memory there.

Steps are those of training at batch 1 with 1,024 latent tokens, as in training/loop.py: begin, forward and backward,
before_update, update. Aim: the loop waits at most 0.1 of the time it takes to write.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...checkpoints.state import Progress, StateWriter
from ...training.ema import Ema, skeleton
from ...training.loop import backward, entries, make_optimiser
from ...training.parallel import parallelise
from .measure import finish
from .random_stage import random_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", help="where to write", default=None)
    options = parser.parse_args()
    run, stage = random_stage("shap-e", [f"model.layers={options.layers}", "batch_size=1"])
    stage.model.enable_gradient_checkpointing()
    accelerator = Accelerator(cpu=True)
    shell = skeleton(stage.model)
    parallel = parallelise(accelerator, stage.model, make_optimiser(run, stage.model))
    ema = Ema(parallel, shell, run.ema_decay)
    batches = stage.batches(0, 1).iterate(0)
    results: dict[str, Any] = {"parameters": sum(p.numel() for p in stage.model.parameters())}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        writer = StateWriter(Path(scratch), rank=0, world=1, any_rank=bool, patience_s=600, keep_last=1, keep_every=0)
        progress = Progress()

        def step() -> None:
            backward(parallel, stage.loss, next(batches), 1)
            writer.before_update()
            parallel.update(1e-4)
            progress.step += 1
            ema.update(progress.step)

        step()
        began = time.perf_counter()
        step()
        results["step_s"] = time.perf_counter() - began
        for name in ("first", "second"):
            before, began = writer.waited_s, time.perf_counter()
            writer.begin(progress, entries(parallel, ema))
            while writer.writing:
                step()
            written = writer.written_s
            writer.finish()
            waited = writer.waited_s - before
            size = sum(path.stat().st_size for path in (Path(scratch) / "state").glob("*/*.safetensors"))
            results[name] = {"wait_s": waited, "write_s": written, "share": waited / written, "bytes": size}
            print(f"{name}: waited {waited:.2f} s of {written:.1f} s", flush=True)
    finish(results)


if __name__ == "__main__":
    main()
