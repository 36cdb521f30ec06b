"""What a training of the published 300 M denoiser takes in memory, against what `shapeloom plan` says.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.plan_memory   # batch 1: 12 GB, 5 GB of disk, 5 minutes on a core

Cost model: 316 M parameters in float32 are 1.26 GB, and a step holds them 5 times (weights, gradients, AdamW's two
averages, EMA): 6.3 GB. With checkpointing a sample adds 4.2 MB a block (1,026 tokens x 1,024), which gradients replace
as they come, so that at batch 1 little is left to add. A state in writing is a copy of four of the five: 5.1 GB.

The preset's denoiser is trained for three steps by the stage's own command in a new process, on made latents. Their
autoencoder and CLIP are small, but for the widths of what they give, and stand in the preset file that both read. The
process notes its peak resident memory (VmHWM) before the third step, and at the end, when a state has been written.
Aim: both within 10 % of the plan. Where there is a GPU, it is the GPU's peak that is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from ...checkpoints.folders import publish_model
from ...config import preset_path, read_settings_file
from ...data_pipes.latents import LatentSample, encode_latent_sample
from ...data_pipes.shards import LATENT_FORMAT, ShardWriter, begin_folder, write_manifest
from ...models.autoencoder import Autoencoder
from ...models.conditioner import Conditioner
from ...models.hashing import weights_hash
from ...training.clip import ClipModelConfig, clip_config, train_tokenizer
from .measure import finish

LATENTS = {"n_latents": 1024, "channels": 1024}
AUTOENCODER = {**LATENTS, "width": 32, "heads": 2, "hidden": 256, "n_generated": 4}
WIDTHS = {"embed_dim": 768, "text_width": 64, "text_heads": 1, "text_layers": 1, "context_length": 8}
CLIP = {**WIDTHS, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16}}

CHILD = """
import json, sys
from pathlib import Path
import torch
from shapeloom.config import load_config
from shapeloom.training.denoiser import DenoiserRun, build
from shapeloom.training.loop import fit

def peak():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

run = load_config(DenoiserRun, sys.argv[1], "denoiser", overrides=sys.argv[2:])
stage, seen = build(run), []
batches = stage.batches

class Watched:
    def __init__(self, *ranks):
        self.inner = batches(*ranks)
    def iterate(self, step):
        for batch in self.inner.iterate(step):
            seen.append(peak())
            yield batch

stage.batches = Watched
fit(run, stage)
print(json.dumps({"step": seen[2], "with_state": peak()}))
"""


def make_preset(path: Path) -> None:
    denoiser = read_settings_file(preset_path("shap-e"), "preset")["denoiser"]
    sections = {
        "autoencoder": {"model": AUTOENCODER},
        "clip": {"model": CLIP},
        "encode": {"n_captions": 1, "n_views": 1},
        "denoiser": denoiser,
    }
    path.write_text(yaml.safe_dump(sections))


def make_folder(out: Path) -> None:
    """Four latents of the full size."""
    autoencoder = Autoencoder(**AUTOENCODER)
    config = ClipModelConfig(**CLIP)
    conditioner = Conditioner(**clip_config(config, train_tokenizer(["a red cube"] * 100, config.vocab_size)))
    settings = {"autoencoder_hash": weights_hash(autoencoder), "conditioner_hash": conditioner.weights_hash}
    begin_folder(out, format=LATENT_FORMAT, settings=settings)
    publish_model(autoencoder, out / "autoencoder")
    publish_model(conditioner, out / "conditioner")
    rng = np.random.default_rng(0)
    text = conditioner.encode_text(["a red cube"])
    image = conditioner.encode_image(np.zeros((1, 32, 32, 3), np.uint8))
    features = {
        "text_tokens": text.tokens.numpy(),
        "text_lengths": text.mask.sum(-1).numpy(),
        "text_pooled": text.pooled.numpy(),
        "image_tokens": image.tokens.numpy(),
        "image_pooled": image.pooled.numpy(),
    }
    with ShardWriter(out / "shard-00000.tar") as writer:
        for i in range(4):
            latent = rng.uniform(-1, 1, tuple(LATENTS.values())).astype(np.float16)
            meta = {"uid": str(i), "captions": ["a red cube"], "split": "train"}
            writer.write(str(i), encode_latent_sample(LatentSample(str(i), latent, **features), meta), "train")
    statistics = {"latent_mean": [0.0] * 1024, "latent_std": [1.0] * 1024}
    infos = [writer.info]
    write_manifest(out, format=LATENT_FORMAT, settings=settings, shards=infos, counts={"samples": 4}, extra=statistics)


def output_of(*words: object) -> dict:
    """The last line that a Python process prints."""
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="no", help="no, bf16 or fp16")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", help="where to put latents and states", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        preset = folder / "preset.yaml"
        make_preset(preset)
        make_folder(folder / "latents")
        overrides = [
            *(f"batch_size={options.batch}", f"precision={options.precision}", f"model.layers={options.layers}"),
            *(
                "steps=3",
                "save_every=0",
                "eval_every=0",
                "eval_samples=1",
                "sheet_samples=0",
                "score_samples=0",
                "trackers=[]",
            ),
        ]
        import torch

        gpu = torch.cuda.is_available()
        file = Path(__file__).parent.parent / "accelerate" / ("gpu.yaml" if gpu else "cpu.yaml")
        words = ["-m", "shapeloom", "plan", "--preset", preset, "--accelerate", file, "--json", *overrides]
        plan = output_of(*words)
        print(f"planned: {plan['device']} {plan['host']}; training three steps", flush=True)
        paths = [f"data={folder / 'latents'}", f"out={folder / 'run'}"]
        measured = output_of("-c", CHILD, preset, *overrides, *paths)
    host = 0 if gpu else plan["host_total"]
    saving = 0 if gpu else plan["host"]["saving"]
    with_state = plan["device_total"] + host
    finish(
        {
            "parameters": plan["parameters"],
            "batch": options.batch,
            "step_planned_gb": (with_state - saving) / 1e9,
            "step_measured_gb": measured["step"] / 1e9,
            "step_ratio": measured["step"] / (with_state - saving),
            "with_state_planned_gb": with_state / 1e9,
            "with_state_measured_gb": measured["with_state"] / 1e9,
            "with_state_ratio": measured["with_state"] / with_state,
        }
    )


if __name__ == "__main__":
    main()
