"""From the start of a process to the batch of a step in the middle of a run, of a million latents.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.resume # a million samples: 8 GB of disk, 6 minutes
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.resume --samples 20000  # half a minute

Cost model: importing PyTorch and diffusers is 5 to 10 s and has nothing to do with the data. Opening a folder maps
index.bin (110 bytes a sample of four members, of which the splits alone, 1 byte, are read through) and asks the file
system for the size of each shard. The order of an epoch is a permutation, 10 ns a sample; a batch is one read a sample.
Without index.bin (a folder of before there was one) each shard's index.json is parsed: 10 us and 1 kB of Python objects
a sample, three times over, for a run opens three splits.

Each child process is new, and prints its own seconds: importing, `training.denoiser.build` (which opens the three
splits and makes the model), and the first batch. Aim: 20 s from start to batch at a million samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ...checkpoints.folders import publish_model
from ...data_pipes.index import INDEX
from ...data_pipes.latents import LatentSample, encode_latent_sample
from ...data_pipes.shards import LATENT_FORMAT, MANIFEST, ShardWriter, begin_folder, split_of, write_manifest
from ...models.autoencoder import Autoencoder
from ...models.conditioner import Conditioner
from ...models.hashing import weights_hash
from .measure import finish

SHARD_SIZE = 512
BATCH = 64

CHILD = """
import json, resource, sys, time
began = float(sys.argv[1])
from shapeloom.training.denoiser import DenoiserRun, build
imported = time.time()
stage = build(DenoiserRun.model_validate(json.loads(sys.argv[2])))
opened = time.time()
step = int(sys.argv[3])
batch = next(stage.batches(0, 1).iterate(step))
done = time.time()
print(json.dumps({
    "total_s": done - began, "import_s": imported - began, "open_s": opened - imported, "batch_s": done - opened,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    "sum": float(batch["latent"].double().sum()),
}))
"""


def make_folder(out: Path, samples: int) -> None:
    """Latents of 4 x 8, each another, with one caption's and one view's features of the smallest towers there are."""
    autoencoder = Autoencoder(n_latents=4, channels=8, width=32, heads=2, hidden=16)
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    conditioner = Conditioner({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    settings = {"autoencoder_hash": weights_hash(autoencoder), "conditioner_hash": conditioner.weights_hash}
    begin_folder(out, format=LATENT_FORMAT, settings=settings)
    publish_model(autoencoder, out / "autoencoder")
    publish_model(conditioner, out / "conditioner")
    rng = np.random.default_rng(0)
    features = {
        "text_tokens": rng.standard_normal((1, 4, 32)),
        "text_lengths": np.array([4]),
        "text_pooled": rng.standard_normal((1, 16)),
        "image_tokens": rng.standard_normal((1, 4, 32)),
        "image_pooled": rng.standard_normal((1, 16)),
    }
    common = encode_latent_sample(LatentSample("", np.zeros((4, 8)), **features), {"captions": ["a red cube"]})
    head = common["latent.npy"][:-64]  # before the 32 float16
    infos = []
    for k in range(-(-samples // SHARD_SIZE)):
        latents = rng.standard_normal((SHARD_SIZE, 32)).astype(np.float16)
        with ShardWriter(out / f"shard-{k:05d}.tar") as writer:
            for i in range(k * SHARD_SIZE, min((k + 1) * SHARD_SIZE, samples)):
                uid = f"{i:032x}"  # as long as the uids of the large public sets
                latent = head + latents[i % SHARD_SIZE].tobytes()
                writer.write(uid, common | {"latent.npy": latent}, split_of(uid))
        infos.append(writer.info)
    statistics = {"latent_mean": [0.0] * 8, "latent_std": [1.0] * 8}
    counts = {"samples": samples}
    write_manifest(out, format=LATENT_FORMAT, settings=settings, shards=infos, counts=counts, extra=statistics)


def resume(folder: Path, step: int) -> dict[str, float]:
    """What the child says of itself."""
    run = {"data": str(folder), "out": str(folder / "run"), "batch_size": BATCH, "model": {"width": 48, "layers": 1}}
    words = [sys.executable, "-c", CHILD, str(time.time()), json.dumps(run), str(step)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--skip-json", action="store_true", help="leave out the way without index.bin")
    parser.add_argument("--folder", help="where to put the samples", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "latents"
        began = time.perf_counter()
        make_folder(folder, options.samples)
        print(f"{options.samples:,} samples made in {time.perf_counter() - began:.0f} s", flush=True)
        step = 5 * options.samples // 2 // BATCH  # in the third epoch
        resume(folder, step)  # the files are then in the page cache for both ways
        results = {"index": resume(folder, step)}
        print(f"index.bin: {results['index']['total_s']:.1f} s", flush=True)
        if not options.skip_json:
            (folder / INDEX).rename(folder / "aside")
            results["json"] = resume(folder, step)
            print(f"index.json: {results['json']['total_s']:.1f} s", flush=True)
            assert results["json"]["sum"] == results["index"]["sum"], "the two ways give different batches"
        sizes = {"manifest_mb": (folder / MANIFEST).stat().st_size / 1e6}
        finish({"samples": options.samples, "step": step} | sizes | results)


if __name__ == "__main__":
    main()
