"""How many batches a second the loader makes with one worker thread, against what the training of a preset takes.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.loader [--preset tiny] [--data raw/]

The stages are the preset's own, with their parts, batch size and collate; the data are a small procedural set of the
preset's sizes, made here unless --data gives one. Ways:

    cached      local shards, every sample decoded before (training's second epoch and later, with the default cache)
    uncached    local shards, every sample read, compared with its CRC-32 and decoded
    stream      the same from file://, front to back through the shuffle buffer

Cost model, of one sample of 160 KB (4,096 surface and 8,192 field points, 6 views of 64²): CRC-32 of its bytes 0.13 ms
(1.2 GB/s), npz members 1 ms and a WebP view .15 ms to decode; of that, nothing is left where it is cached but the draw
of the points or of one view.

ratio: batches a second over the training's steps a second, in the same run; the least of the stages, of `cached`, which
is how training runs by default from its second epoch on. Aim: 20. The other ratios are given beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...config import load_config
from ...data_pipes.loader import Batches, RawDataset
from ...data_pipes.procedural import ProceduralSettings, generate
from ...data_pipes.stream import StreamBatches
from ...training import autoencoder, clip, loop
from .measure import finish

STAGES = {"autoencoder": (autoencoder, autoencoder.AutoencoderRun), "clip": (clip, clip.ClipRun)}
WARM = 2


def steps_per_second(run: Any, stage: loop.Stage) -> float:
    """Of a real training, from the first logged step after the warm-up to the last."""
    times: list[float] = []
    log_step = loop.Log.step

    def timed(log: loop.Log, **metrics: Any) -> None:
        log_step(log, **metrics)
        times.append(time.perf_counter())

    loop.Log.step = timed
    try:
        loop.fit(run, stage, resume="never")
    finally:
        loop.Log.step = log_step
    return (len(times) - 1 - WARM) / (times[-1] - times[WARM])


def batches_per_second(batches: Batches, count: int) -> float:
    """Of `count` batches as they come, after a first that fills what is filled once."""
    coming: Iterator[Any] = batches.iterate(0, count + 1)
    next(coming)
    began = time.perf_counter()
    made = sum(1 for _ in islice(coming, count))
    return made / (time.perf_counter() - began)


def ways(config: Any, batches: Batches) -> dict[str, Batches]:
    """The stage's own batches, of data that are kept, decoded anew and streamed."""
    parts, collate = batches.dataset.parts, batches.collate
    for i in range(len(batches.dataset)):
        batches.dataset[i]
    uncached = RawDataset(config.data, "train", parts, cache_bytes=0)
    remote = RawDataset(f"file://{Path(config.data).resolve()}", "train", parts)
    return {
        "cached": batches,
        "uncached": Batches(uncached, collate, config.batch_size, config.seed),
        "stream": StreamBatches(remote, collate, config.batch_size, config.seed, buffer=config.data_buffer),
    }


def measure(name: str, options: argparse.Namespace, data: Path, out: Path) -> dict[str, float]:
    """Steps a second of the training, and batches a second of each way: the best of the rounds."""
    module, kind = STAGES[name]
    quiet = ["log_every=1000000", "eval_every=0", "save_every=0", "trackers=[]", "cpu=true", f"steps={options.steps}"]
    quiet += ["eval_samples=1"] + (["sheet_samples=0"] if name == "autoencoder" else [])
    found: dict[str, float] = {}
    for turn in range(options.rounds):
        values = {"data": str(data), "out": str(out / f"{name}-{turn}")}
        config = load_config(kind, options.preset, name, overrides=quiet, values=values)
        stage = module.build(config)
        rates = {"train": steps_per_second(config, stage)}
        for way, batches in ways(config, stage.batches(0, 1)).items():
            rates[way] = batches_per_second(batches, options.batches)
        print(name, {way: f"{rate:.1f}/s" for way, rate in rates.items()}, flush=True)
        found = {way: max(rate, found.get(way, 0.0)) for way, rate in rates.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", type=Path, help="default: a set made here")
    parser.add_argument("--count", type=int, default=300, help="objects of that set")
    parser.add_argument("--steps", type=int, default=12, help="of training, in each round")
    parser.add_argument("--batches", type=int, default=40, help="of each way, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder, "raw")
        if not options.data:
            generate(data, ProceduralSettings(count=options.count))
        rates = {name: measure(name, options, data, Path(folder)) for name in STAGES}
    result: dict[str, Any] = {"bench": "loader", "preset": options.preset}
    for name, found in rates.items():
        result |= {f"{name}_{way}_per_s": rate for way, rate in found.items()}
        result |= {f"{name}_{way}_ratio": found[way] / found["train"] for way in found if way != "train"}
    finish(result | {"ratio": min(found["cached"] / found["train"] for found in rates.values())})


if __name__ == "__main__":
    main()
