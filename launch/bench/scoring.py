"""Scoring a folder of GLBs by a CLIP of ViT-B/32's size: where the time goes, and what a second run takes.

    python -m shapeloom.launch.bench.scoring ../shared/assets/pack    # 153 prompts, 4 seeds, 12 views: about 14 minutes

Each object is a GLB of the folder (as many as there are, then again with the bytes of their JSON changed, so that none
is the cached one of another), named ID/SEED.glb for 153 captions. The CLIP has random weights: what it says is worth
nothing, what it costs is the same. Both runs are the command itself, in a process of its own.

Cost model: 612 objects x 12 views x 2 shadings = 14,688 pictures of 224 pixels. A view of 224 x 224 is 200,704 rays, a
picture 8.8 GFLOP (4.4 billion multiplications of ViT-B/32), 129 TFLOP in all: 22 minutes at 100 GFLOP/s.
Aims on two cores: rendering at most a third of the whole, a second run with everything cached below 3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from ...files import read_json
from .measure import finish

ARCHITECTURE = "ViT-B-32"


def write_clip(folder: Path) -> None:
    """An open_clip folder with random weights."""
    torch.manual_seed(0)
    config: dict[str, Any] = open_clip.get_model_config(ARCHITECTURE)
    clip = open_clip.create_model(ARCHITECTURE, pretrained=None)
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def write_objects(assets: Path, out: Path, prompts: int, seeds: int) -> None:
    """`out/ID/SEED.glb`, no two of equal bytes."""
    files = sorted(assets.rglob("*.glb"))
    if not files:
        raise SystemExit(f"error: no GLB in {assets}")
    for number in range(prompts * seeds):
        data = files[number % len(files)].read_bytes()
        # A JSON chunk may end in spaces; a blank more makes another file of the same object.
        json_length = int.from_bytes(data[12:16], "little")
        blanks = 4 * (number // len(files))
        head = data[:8] + (len(data) + blanks).to_bytes(4, "little") + (json_length + blanks).to_bytes(4, "little")
        path = out / f"{number // seeds:03d}" / f"{number % seeds}.glb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head + data[16 : 20 + json_length] + b" " * blanks + data[20 + json_length :])


def score(words: list[str]) -> float:
    """Run the command; returns its wall seconds."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "shapeloom", *words], check=True, env=environment)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path, help="a folder of GLBs")
    parser.add_argument("--prompts", type=int, default=153)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        print("writing objects and a CLIP", flush=True)
        write_objects(options.assets, work / "objects", options.prompts, options.seeds)
        write_clip(work / "clip")
        captions = [f"thing number {number}" for number in range(options.prompts)]
        (work / "prompts.txt").write_text("\n".join(captions) + "\n")
        words = ["eval", "r-precision", "--generated", str(work / "objects"), "--prompts", str(work / "prompts.txt")]
        words += ["--evaluator", str(work / "clip"), "--out", str(work / "out")]
        cold_s = score(words)
        split = read_json(work / "out" / "results.json")["timings_s"]
        warm_s = min(score(words) for _ in range(3))
        record = read_json(work / "out" / "results.json")
    finish(
        {
            "bench": "scoring",
            "objects": record["inputs"]["objects"],
            "failed": len(record["failures"]),
            "cold_s": cold_s,
            "render_s": split["render"],
            "embed_s": split["embed"],
            "score_s": split["score"],
            "render_share": split["render"] / cold_s,
            "warm_s": warm_s,
        }
    )


if __name__ == "__main__":
    main()
