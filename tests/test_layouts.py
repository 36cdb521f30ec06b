"""The layouts a launcher can ask for, on two real ranks: the same losses, and each goes on from any other's state."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_folders import four_latents, small_autoencoder, small_clip, succeed, write_latents
from safetensors.torch import load_file

from shapeloom.launch.launch_file import environment, read_launch_file

MODEL = ["model.width=32", "model.heads=2", "model.layers=2"]
LOOP = ["batch_size=4", "steps=9", "log_every=1", "eval_every=0", "save_every=3", "keep_last=9", "optim.lr=0.01"]
QUICK = [*MODEL, *LOOP, "optim.warmup_steps=2", "sheet_samples=0", "eval_samples=2", "trackers=[]"]

FILES = Path(__file__).parent.parent / "launch" / "accelerate"
LAYOUTS = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-offload"]


def slow_but(*quick: str, of: list[str] = LAYOUTS) -> list:
    """Layouts as parameters, of which those that another one shows nearly as well are slow."""
    return [pytest.param(layout, marks=() if layout in quick else pytest.mark.slow) for layout in of]


def two_ranks(layout: str, stage: str, words: list, code: int = 0) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, Path(__file__).with_name("rank_main.py"), stage, *words]
    asked = environment(read_launch_file(FILES / f"{layout}.yaml"))
    env = {**os.environ, **asked, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LAYOUT": layout}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    parts = sorted((out / "state" / f"{step:08d}").glob("part-*.safetensors"))
    return {name: value for part in parts for name, value in load_file(part).items()}


def start_from(other: Path, out: Path, step: int) -> Path:
    """A run folder that has got as far as `step` of another."""
    shutil.copytree(other / "state" / f"{step:08d}", out / "state" / f"{step:08d}")
    (out / "state" / "latest").write_text(f"{step:08d}")
    return out


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    return write_latents(folder, small_autoencoder(), small_clip(), four_latents())


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """A run of 9 steps in one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed("train", "denoiser", "--data", latents, "--out", out, *QUICK)
    return out


@pytest.mark.parametrize("layout", slow_but("ddp", "fsdp2", "zero3"))
def test_one_rank_then_two_then_one(layout, latents, whole, tmp_path):
    first = start_from(whole, tmp_path / "first", 3)
    said = two_ranks(layout, "denoiser", ["--data", latents, "--out", first, *QUICK, "accumulate=2", "processes=2"])
    assert "training" in said and said.count("training 5") == 1  # said by one rank alone
    ours, expected = losses(first), losses(whole)
    assert sorted(ours) == [4, 5, 6, 7, 8, 9]
    assert ours == pytest.approx({step: expected[step] for step in ours}, rel=1e-5)
    mine, theirs = state(first, 9), state(whole, 9)
    assert mine.keys() == theirs.keys()
    for name in theirs:  # weights, their averages, the optimiser's
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)
    sizes = [p.stat().st_size for p in (first / "state" / "00000009").glob("part-*")]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    pipeline = load_file(first / "pipeline/denoiser/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipeline[name], mine[f"ema/{name}"]) for name in pipeline)

    again = start_from(first, tmp_path / "again", 6)  # as it was laid out: every bit the same
    two_ranks(layout, "denoiser", ["--data", latents, "--out", again, *QUICK, "accumulate=2"])
    assert losses(again) == {step: ours[step] for step in (7, 8, 9)}
    assert all(torch.equal(value, mine[name]) for name, value in state(again, 9).items())

    alone = start_from(first, tmp_path / "alone", 6)
    succeed("train", "denoiser", "--data", latents, "--out", alone, *QUICK)
    assert losses(alone) == pytest.approx({step: expected[step] for step in (7, 8, 9)}, rel=1e-5)


@pytest.mark.parametrize("layout", slow_but("fsdp2", of=["fsdp2", "zero3"]))
def test_adapters_and_frozen_layers_train_in_shards(layout, latents, whole, tmp_path):
    words = ["--data", latents, *LOOP, "steps=4", "sheet_samples=0", "eval_samples=2", "trackers=[]"]
    words += [f"init={whole}/pipeline", "lora.rank=2", "freeze=[blocks.0]"]
    alone, shards = tmp_path / "alone", tmp_path / "shards"
    said = succeed("train", "denoiser", *words, "--out", alone)
    told = two_ranks(layout, "denoiser", [*words, "--out", shards, "processes=2"])
    counts = [line for line in said.splitlines() if "training" in line and "parameters" in line]
    assert counts and counts[0] in told
    assert losses(shards) == pytest.approx(losses(alone), rel=1e-5)
    file = "pipeline/denoiser/diffusion_pytorch_model.safetensors"
    mine, theirs, before = (load_file(folder / file) for folder in (shards, alone, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    changed = {name for name in before if not torch.equal(mine[name], before[name])}
    assert changed and not any(name.startswith("blocks.0.") for name in changed)


@pytest.mark.parametrize("layout", slow_but("ddp", "zero3", of=["ddp", "fsdp2", "zero2", "zero3"]))
def test_bf16_is_the_same_autocast_in_every_layout(layout, latents, tmp_path):
    words = ["--data", latents, *QUICK, "precision=bf16", "steps=3"]
    alone, shards = tmp_path / "alone", tmp_path / "shards"
    succeed("train", "denoiser", *words, "--out", alone)
    two_ranks(layout, "denoiser", [*words, "--out", shards])
    assert losses(shards) == pytest.approx(losses(alone), rel=3e-3)
    assert losses(shards)[1] == pytest.approx(losses(alone)[1], rel=1e-4)  # the very same weights
