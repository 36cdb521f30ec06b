"""The whole way by the README's commands, at a size that shows it works and not that it is any good."""

import json

import numpy as np
import pytest
import torch
import trimesh
import webdataset
from PIL import Image

from shapeloom.data_pipes.latents import LatentDataset
from shapeloom.eval.benchmark.schema import read_results
from shapeloom.models.hashing import weights_hash

DATA = ["n_surface=128", "n_near=128", "n_uniform=128", "n_views=2", "image_size=32"]
STEPS = ["steps=3", "batch_size=8", "eval_every=3", "save_every=2", "log_every=1"]
VISION = "model.vision_cfg={image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 16}"
FIELD = ["model.width=32", "model.heads=2", "model.hidden=16", "model.n_latents=16", "model.channels=8"]


@pytest.fixture(scope="module")
def way(call, tmp_path_factory):
    """A folder in which every stage has run."""
    at = tmp_path_factory.mktemp("way")

    def run(*words):
        done = call(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    run("data", "procedural", "--count", "60", "--out", at / "raw", "--workers", "1", *DATA)
    run("train", "clip", "--data", at / "raw", "--out", at / "clip", *STEPS, VISION)
    run("train", "clip", "--data", at / "raw", "--out", at / "judge", *STEPS, VISION, "seed=1", "model.text_width=64")
    run("train", "autoencoder", "--data", at / "raw", "--out", at / "ae", *STEPS, *FIELD, "n_surface=64", "n_field=64")
    models = [f"autoencoder={at / 'ae' / 'autoencoder'}", f"clip={at / 'clip' / 'clip'}"]
    run("encode", "--data", at / "raw", "--out", at / "latents", *models, "shard_size=25", "n_surface=128")
    small = ["model.width=32", "model.heads=2", "model.layers=1", "sheet_samples=2", "sample_steps=2"]
    run("train", "denoiser", "--data", at / "latents", "--out", at / "denoiser", *STEPS, *small)
    return at


def test_latent_shards_hold_what_the_models_say(way):
    dataset = LatentDataset(way / "latents")
    manifest = dataset.shards.manifest
    assert len(dataset) == 60 and len(manifest["shards"]) == 3
    train = LatentDataset(way / "latents", "train")
    stacked = np.concatenate([train[i].latent for i in range(len(train))]).astype(np.float64)
    np.testing.assert_allclose(manifest["latent_mean"], stacked.mean(0), atol=1e-3)
    np.testing.assert_allclose(manifest["latent_std"], stacked.std(0), atol=1e-3)
    sample = next(iter(webdataset.WebDataset(str(way / "latents" / "shard-00000.tar"), shardshuffle=False).decode()))
    assert sample["latent.npy"].shape == (16, 8) and sample["latent.npy"].dtype == np.float16
    assert {"tokens", "lengths", "pooled"} == set(sample["text.npz"].keys())


def test_encoding_again_keeps_what_is_finished(way, call):
    shard = way / "latents" / "shard-00001.tar"
    before = {path.name: path.read_bytes() for path in (way / "latents").glob("shard-*.tar")}
    shard.unlink()
    models = [f"autoencoder={way / 'ae' / 'autoencoder'}", f"clip={way / 'clip' / 'clip'}"]
    done = call("encode", "--data", way / "raw", "--out", way / "latents", *models, "shard_size=25", "n_surface=128")
    assert done.returncode == 0, done.stderr
    assert before == {path.name: path.read_bytes() for path in (way / "latents").glob("shard-*.tar")}


def test_encoding_with_another_autoencoder_into_the_same_folder_is_refused(way, call):
    words = ["shard_size=25", "n_surface=128", f"autoencoder={way / 'latents' / 'autoencoder'}"]
    done = call("encode", "--data", way / "raw", "--out", way / "latents", *words, f"clip={way / 'judge' / 'clip'}")
    assert done.returncode == 1 and "other settings" in done.stderr and "Traceback" not in done.stderr


def test_run_folders_hold_config_log_state_and_pictures(way):
    for stage in ("clip", "ae", "denoiser"):
        lines = [json.loads(line) for line in (way / stage / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert any(key.startswith("eval/") for line in lines for key in line)
        assert (way / stage / "state" / "latest").read_text() == "00000003"
        assert list((way / stage / "tensorboard").iterdir())
        assert json.loads((way / stage / "config.json").read_text())["steps"] == 3
    for stage in ("ae", "denoiser"):
        Image.open(way / stage / "samples" / "00000003.png").verify()


def test_a_run_starts_again_from_its_own_config(way, call, tmp_path):
    done = call(
        "train",
        "autoencoder",
        "--data",
        way / "raw",
        "--out",
        tmp_path / "again",
        "--config",
        way / "ae" / "config.json",
    )
    assert done.returncode == 0, done.stderr
    logs = [(folder / "log.jsonl").read_text() for folder in (way / "ae", tmp_path / "again")]
    losses = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("condition", ["text", "image", "both"])
def test_sample_writes_meshes_and_pictures(way, call, tmp_path, condition):
    Image.new("RGBA", (50, 40), (200, 30, 30, 255)).save(tmp_path / "picture.png")
    words = ["--text", "a red cube"] if condition != "image" else []
    words += ["--image", tmp_path / "picture.png"] if condition != "text" else []
    out = tmp_path / "out"
    done = call("sample", way / "denoiser" / "pipeline", *words, "--seeds", "0-1", "--out", out, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*-[01].png"))) == 2 and (out / "contact_sheet.png").exists()
    for path in out.glob("*.glb"):
        assert len(trimesh.load(path, force="mesh").faces) > 0


def test_the_command_and_diffusers_sample_the_same(way, call, tmp_path):
    from diffusers import DiffusionPipeline

    import shapeloom  # noqa: F401 - teaches diffusers the pipeline's class

    folder = way / "denoiser" / "pipeline"
    done = call("sample", folder, "--text", "a red cube", "--seeds", "7", "--out", tmp_path, "--steps", "4")
    assert done.returncode == 0, done.stderr
    pipe = DiffusionPipeline.from_pretrained(folder)
    mesh = pipe(text=["a red cube"], seeds=[7], steps=4).meshes[0]
    written = list(tmp_path.glob("*.glb"))
    assert len(written) == (0 if mesh.empty else 1)
    if written:
        loaded = trimesh.load(written[0], force="mesh", process=False)
        np.testing.assert_allclose(loaded.vertices, mesh.vertices, atol=1e-6)
    denoiser = pipe.denoiser
    assert denoiser.config.autoencoder_hash == weights_hash(pipe.autoencoder)
    assert torch.isfinite(next(denoiser.parameters())).all()


def test_r_precision_by_a_judge_makes_the_headline_and_by_the_conditioner_none(way, call, tmp_path):
    words = ["eval", "r-precision", "--pipeline", way / "denoiser" / "pipeline", "--prompts", way / "raw"]
    words += ["--protocol", "reference-v1", "--steps", "2", "--limit", "3", "--workers", "1"]
    words += ["--evaluator", way / "clip" / "clip"]
    done = call(*words, "--evaluator", way / "judge" / "clip", "--condition", "both", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(tmp_path / "r")
    conditioner, judge = results.evaluators
    assert conditioner.independence == "same weights" and judge.independence != "same weights"
    assert results.headline.evaluator == judge.name
    rows = {(score.row, score.gallery) for score in results.scores}
    names = ("generated", "true renders", "reconstructions", "conditioning images", "chance")
    assert rows >= {(name, gallery) for name in names for gallery in ("prompts", "pictures")}
    done = call(*words, "--out", tmp_path / "r2")
    assert done.returncode == 0 and "no headline" in done.stdout, done.stdout + done.stderr
    assert read_results(tmp_path / "r2").headline.r_at_1 is None
