"""The training loop of the autoencoder: on two ranks, in parts, gone wrong. Kills and signals: test_resume.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_folders import shapeloom

from shapeloom.config import load_config
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.errors import UserError
from shapeloom.training.autoencoder import AutoencoderRun
from shapeloom.training.config import OptimConfig, lr_at

SMALL = [
    *("model.width=32", "model.heads=2", "model.hidden=16", "model.n_latents=16", "model.channels=8"),
    *("batch_size=4", "n_surface=64", "n_field=64", "eval_samples=2", "log_every=1", "eval_every=0", "save_every=3"),
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, ProceduralSettings(count=24, n_surface=256, n_near=256, n_uniform=256, n_views=2, image_size=32))
    return folder


def words(raw: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(raw), "--out", str(out), *SMALL, *more]


def run(raw: Path, out: Path, *more: str, code: int = 0) -> str:
    ended, said, errors = shapeloom("train", "autoencoder", *words(raw, out, *more))
    assert ended == code, said + errors
    return said + errors


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """A run of 12 steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(raw, out, "steps=12")
    return out


def test_two_ranks_are_one(raw, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["shapeloom.training.autoencoder", *words(raw, out, "steps=12", "processes=2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = losses(out), losses(whole)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4)


def test_accumulated_parts_are_one_batch(raw, whole, tmp_path):
    out = tmp_path / "run"
    run(raw, out, "steps=12", "accumulate=2")
    assert torch.allclose(torch.tensor(losses(out)), torch.tensor(losses(whole)), rtol=1e-4)


def test_one_process_where_two_were_asked_for_is_refused(raw, tmp_path):
    said = run(raw, tmp_path / "run", "processes=2", code=1)
    assert "2 processes were asked for but 1 came up" in said and "Traceback" not in said


def test_a_loss_that_is_not_finite_stops_before_the_update(raw, tmp_path):
    out = tmp_path / "run"
    said = run(raw, out, "steps=40", "save_every=1", "optim.lr=1e30", "optim.warmup_steps=0", code=1)
    assert "is intact" in said and "Traceback" not in said
    pointer = (out / "state" / "latest").read_text()
    assert (out / "state" / pointer / "progress.json").exists()


def test_a_state_of_another_model_is_refused(raw, whole, tmp_path):
    state = whole / "state" / "00000012"
    said = run(raw, tmp_path / "run", "steps=20", "model.width=64", "--resume", str(state), code=1)
    assert "another model" in said and "Traceback" not in said


def test_old_states_are_dropped(whole):
    assert sorted(p.name for p in (whole / "state").iterdir()) == ["00000009", "00000012", "latest"]


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'optim.lr'"):
        load_config(AutoencoderRun, overrides=["optim.lrr=1"])


def test_learning_rate_schedule():
    optim = OptimConfig(lr=1.0, warmup_steps=10, decay_from=0.5, final_lr=0.1)
    assert lr_at(optim, 1, 100) == pytest.approx(0.1) and lr_at(optim, 50, 100) == 1.0
    assert lr_at(optim, 75, 100) == pytest.approx(0.55) and lr_at(optim, 100, 100) == pytest.approx(0.1)
