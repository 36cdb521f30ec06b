"""Wrong input through the command: one clear sentence, exit code 1, no traceback, nothing lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from test_pipeline import CAPTIONS, small_pipeline

from shapeloom.checkpoints.pipeline import publish_pipeline
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.models.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, ProceduralSettings(count=20, n_surface=64, n_near=64, n_uniform=64, n_views=2, image_size=32))
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    publish_pipeline(small_pipeline(), folder)
    return folder


@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    for i, shape in enumerate([trimesh.creation.box(), trimesh.creation.icosphere(), trimesh.creation.cone(1, 1)]):
        shape.export(folder / f"shape_{i}.glb")
    return folder


def refused(done, *words: str) -> None:
    """One sentence that names what matters."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_a_missing_folder(cli, tmp_path):
    refused(cli("data", "build", tmp_path / "none", "--out", tmp_path / "raw"), "none", "not")


def test_an_empty_folder(call, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(call("data", "build", tmp_path / "empty", "--out", tmp_path / "raw"), "empty")
    assert not (tmp_path / "raw" / "manifest.json").exists()


def test_captions_with_a_wrong_column(call, meshes, tmp_path):
    (tmp_path / "c.csv").write_text("path,caption\nshape_0.glb,a box\n")
    done = call("data", "build", meshes, "--captions", tmp_path / "c.csv", "--out", tmp_path / "raw")
    refused(done, "c.csv", "file")


def test_captions_of_an_unknown_file(call, meshes, tmp_path):
    (tmp_path / "c.csv").write_text("file,caption\nshape_9.glb,nothing\n")
    done = call("data", "build", meshes, "--captions", tmp_path / "c.csv", "--out", tmp_path / "raw")
    refused(done, "c.csv", "shape_9.glb")


def test_a_run_does_not_write_among_shards(call, raw):
    before = sorted(path.name for path in raw.iterdir())
    refused(call("train", "autoencoder", "--preset", "tiny", "--data", raw, "--out", raw), "holds shards, not a run")
    assert sorted(path.name for path in raw.iterdir()) == before


def test_a_run_folder_in_the_model_s_place_names_the_model(call, raw, tmp_path):
    (tmp_path / "run" / "autoencoder").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "autoencoder"):
        (folder / "config.json").write_text("{}")
    done = call(
        "eval", "reconstruction", tmp_path / "run", "--data", raw, "--split", "train", "--out", tmp_path / "out"
    )
    refused(done, "did you mean", "run/autoencoder")


def test_a_broken_glb_is_quarantined_and_the_rest_built(call, meshes, tmp_path):
    (meshes / "broken.glb").write_bytes(b"glTF\x02\x00\x00\x00\xff\xff\xff\x7fgarbage")
    small = ["n_surface=64", "n_near=64", "n_uniform=64", "n_views=2", "image_size=16"]
    done = call("data", "build", meshes, "--out", tmp_path / "raw", "--workers", "1", *small)
    assert done.returncode == 0, done.stderr
    rejected = (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 1 and "broken.glb" in rejected[0] and '"hint"' in rejected[0]
    assert "3 of 4" in done.stdout


def test_a_shard_cut_short(call, raw, tmp_path):
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    shard = copy / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    refused(call("train", "autoencoder", "--data", copy, "--out", tmp_path / "run"), "shard-00000.tar", "5000 bytes")


def test_a_pipeline_with_another_autoencoder(call, pipeline, tmp_path):
    copy = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    shutil.rmtree(copy / "autoencoder")
    torch.manual_seed(5)
    Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16).save_pretrained(copy / "autoencoder")
    refused(call("sample", copy, "--text", CAPTIONS[0], "--out", tmp_path / "out"), "another autoencoder")


def test_an_unknown_config_key(cli, raw, tmp_path):
    refused(cli("train", "autoencoder", "--data", raw, "--out", tmp_path / "run", "optim.lrr=1"), "'optim.lr'")


def test_an_empty_text(call, pipeline, tmp_path):
    refused(call("sample", pipeline, "--text", "", "--out", tmp_path / "out"), "text")


def test_an_image_that_is_none(call, pipeline, tmp_path):
    (tmp_path / "picture.png").write_bytes(np.arange(200, dtype=np.uint8).tobytes())
    done = call("sample", pipeline, "--image", tmp_path / "picture.png", "--out", tmp_path / "out")
    refused(done, "picture.png")


def test_a_checkpoint_that_is_a_pickle(call, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "model.ckpt")
    refused(call("sample", tmp_path / "model.ckpt", "--text", "a cube", "--out", tmp_path / "out"), "pickle")
