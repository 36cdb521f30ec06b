"""What a run may be told, and that it goes on bit for bit all the same; what becomes of it when a machine fails it."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from latent_folders import (
    four_latents,
    shapeloom,
    small_autoencoder,
    small_clip,
    succeed,
    write_latents,
)
from test_layouts import QUICK, losses, start_from

from shapeloom.training.loop import REQUEUE_EXIT_CODE

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
PART = "part-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    return write_latents(folder, small_autoencoder(), small_clip(), four_latents())


def words(latents: Path, out: Path, *more: str) -> list[str]:
    return ["denoiser", "--data", str(latents), "--out", str(out), *QUICK, *more]


@pytest.mark.parametrize(
    "option",
    [
        ["accumulate=2"],
        ["precision=bf16"],
        ["gradient_checkpointing=true"],
        ["optim.schedule=linear", "optim.decay_from=0.2"],
        ["optim.schedule=inverse_sqrt", "ema_decay=0.9"],
        pytest.param(["compile=true"], marks=[pytest.mark.filterwarnings("ignore"), pytest.mark.slow]),
    ],
    ids=" ".join,
)
def test_a_run_goes_on_bit_for_bit(option, latents, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    succeed("train", *words(latents, whole, *option))
    assert sorted(losses(whole)) == list(range(1, 10))
    start_from(whole, again, 6)
    succeed("train", *words(latents, again, *option))
    assert losses(again) == {step: losses(whole)[step] for step in (7, 8, 9)}
    assert (again / "state/00000009" / PART).read_bytes() == (whole / "state/00000009" / PART).read_bytes()


def test_a_run_may_begin_again_where_later_states_lie(latents, tmp_path):
    succeed("train", *words(latents, tmp_path, "keep_last=1"))
    assert (tmp_path / "state/latest").read_text() == "00000009"
    succeed("train", *words(latents, tmp_path, "keep_last=1", "steps=6"), "--resume", "never")
    assert (tmp_path / "state/latest").read_text() == "00000006"
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000006", "00000009", "latest"]
    left = tmp_path / "state/00000009.partial-old"  # by a kill between putting the old state away and deleting it
    shutil.copytree(tmp_path / "state/00000009", left)
    succeed("train", *words(latents, tmp_path, "keep_last=1"))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000009", "latest"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_asks_to_be_requeued(number, latents, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = ["save_every=50000", "optim.schedule=constant"]  # others depend on how many steps there are
    command = [sys.executable, "-m", "shapeloom", "train", *words(latents, out, "steps=100000", *options)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == REQUEUE_EXIT_CODE
    step = int((out / "state/latest").read_text())
    assert 0 < step < 50000 and max(losses(out)) == step
    for folder in (out, whole):
        succeed("train", *words(latents, folder, f"steps={step + 3}", *options))
    assert losses(out) == losses(whole) and len(losses(out)) == step + 3


def limited_disk() -> None:
    """No file may grow over 600 KB: the state's part is larger, all else is smaller."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))


def test_a_full_disk_leaves_the_last_state(latents, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeed("train", *words(latents, whole))
    start_from(whole, out, 3)
    before = (out / "state/00000003" / PART).read_bytes()
    command = [sys.executable, "-m", "shapeloom", "train", *words(latents, out)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, preexec_fn=limited_disk)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the state of step 6 could not be written" in done.stdout and "training goes on" in done.stdout
    assert "the state of step 9 could not be written" in done.stderr and "00000003 is intact" in done.stderr
    assert (out / "state/latest").read_text() == "00000003"
    assert (out / "state/00000003" / PART).read_bytes() == before
    assert sorted(p.name for p in (out / "state").iterdir()) == ["00000003", "latest"]
    succeed("train", *words(latents, out))  # with room again
    assert (out / "state/00000009" / PART).read_bytes() == (whole / "state/00000009" / PART).read_bytes()


def by_hand(latents: Path, outs: list[Path], *more: str) -> list[subprocess.Popen]:
    """Ranks of one run, without torchrun, which would end the others when one ends."""
    meet = {"WORLD_SIZE": str(len(outs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank, out in enumerate(outs):
        command = [sys.executable, "-m", "shapeloom", "train", *words(latents, out, *more)]
        env = {**ENV, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def test_a_lost_rank_ends_the_others_and_the_state_stays(latents, tmp_path):
    out = tmp_path / "run"
    ranks = by_hand(latents, [out, out], "steps=100000", "keep_last=2")
    while not (out / "state/latest").exists():
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    ranks[1].kill()
    said, errors = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1, said + errors
    assert "another rank ended or did not answer" in errors and "is intact" in errors and "Traceback" not in errors
    folder = out / "state" / (out / "state/latest").read_text()
    assert (folder / "progress.json").exists() and len(list(folder.glob("part-*-of-00002.safetensors"))) == 2


def test_ranks_with_run_folders_of_their_own_are_told(latents, tmp_path):
    ranks = by_hand(latents, [tmp_path / "one", tmp_path / "two"], "steps=3")
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 1 and "the run folder must be the same one on all machines" in errors, errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("ranks", "kills", "steps"),
    [
        (2, 1, 150),
        pytest.param(1, 2, 600, marks=pytest.mark.slow),
        pytest.param(2, 2, 600, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_it_ends_the_same(ranks, kills, steps):
    command = [sys.executable, "-m", "shapeloom.launch.bench.kills"]
    command += ["--kills", str(kills), "--ranks", str(ranks), "--steps", str(steps)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"] is True and result["kills"] >= kills  # one more where the last one comes just before the end


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["model.width=64", "model.heads=4"], "holds the state of another model"),
        (["seed=1"], "seed was 0, it is 1"),
        (["batch_size=2"], "batch_size was 4, it is 2"),
        (["accumulate=3"], "batch_size 4 does not divide among 1 processes and 3 accumulated parts"),
        (["trackers=[wandb]"], "wandb is not installed"),
        (["precision=fp16"], "precision=fp16 needs a GPU"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_run_cannot_do_is_one_sentence(option, sentence, latents, tmp_path):
    succeed("train", *words(latents, tmp_path, "steps=3"))
    code, said, errors = shapeloom("train", *words(latents, tmp_path, "steps=6", *option))
    assert code == 1 and sentence in errors and errors.count("\n") == 1, said + errors


def test_an_accelerate_file_that_contradicts_the_settings_is_refused(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    code, _, errors = shapeloom("train", *words(latents, tmp_path))
    assert code == 1 and "mixed_precision: bf16, the run precision=no" in errors
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, _, errors = shapeloom("train", *words(latents, tmp_path))
    assert code == 1 and "accelerate does not do without GPUs" in errors
