"""Assets built a second, and where the time of one goes.

    python -m shapeloom.launch.bench.build ../shared/assets/pack                 # every file: about 20 minutes
    python -m shapeloom.launch.bench.build ../shared/assets/pack --count 200     # so many, chosen at random

Of each asset 16,384 surface points, 32,768 field points and 20 views of 256 x 256 at 4 samples a pixel: what
Shap-E's encoder was trained on, and more. The whole is the command itself; the split is of one process that builds
`--split` of the same files, in seconds an asset.
Aim: 1.5 assets a second on two cores, which is 1.33 core-seconds an asset.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ...data_pipes import asset
from ...data_pipes.asset import BuildSettings, Built, Job, build_asset
from ...data_pipes.captions import AssetText
from ...data_pipes.find import find
from ...data_pipes.licences import LicenceFilter
from ...data_pipes.limits import Limits
from ...data_pipes.shard_folder import ShardFolder
from .measure import finish

SETTINGS = {"n_surface": 16384, "n_near": 16384, "n_uniform": 16384, "n_views": 20, "image_size": 256}
STAGES = ("read_mesh", "Solid", "render", "measure", "signature", "sample_surface", "sample_field", "encode_raw_sample")


def split(folder: Path, count: int) -> dict[str, float]:
    """Mean seconds of each stage of an asset, over `count` files after the first, which pays for what starts up."""
    with tempfile.TemporaryDirectory() as scratch:
        places = find(folder, Path(scratch), Path(scratch))
        names = list(places)
        chosen = np.random.default_rng(0).permutation(len(names))[: count + 1]
        seconds: dict[str, float] = defaultdict(float)

        def timed(name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    seconds[name] += time.perf_counter() - start

            return call

        for name in STAGES:
            setattr(asset, name, timed(name, getattr(asset, name)))
        settings, built = BuildSettings(**SETTINGS), 0
        for k, i in enumerate(chosen):
            job = Job(places[names[i]], names[i], f"a{k}", AssetText(), settings, Limits(), LicenceFilter())
            start = time.perf_counter()
            built += isinstance(build_asset(job), Built)
            seconds["total"] += time.perf_counter() - start
            if k == 0:
                seconds.clear()
                built = 0
        return {name: round(value / max(built, 1), 4) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="assets built a second")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, help="build so many files; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--split", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", "shapeloom", "data", "build", str(args.folder), "--out", f"{out}/raw"]
        words += ["--workers", str(args.workers), *(["--limit", str(args.count)] if args.count else [])]
        start = time.perf_counter()
        subprocess.run([*words, *(f"{key}={value}" for key, value in SETTINGS.items())], check=True)
        seconds = time.perf_counter() - start
        shards = ShardFolder(f"{out}/raw")
        size = sum(shard["bytes"] for shard in shards.manifest["shards"])
    finish(
        {
            "benchmark": "build",
            "assets": len(shards),
            "seconds": round(seconds, 1),
            "workers": args.workers,
            "assets_per_second": round(len(shards) / seconds, 3),
            "mb_per_asset": round(size / 1e6 / len(shards), 3),
            "seconds_per_asset": split(args.folder, args.split),
        }
    )


if __name__ == "__main__":
    main()
