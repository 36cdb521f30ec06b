"""Pipeline folders: saved, loaded by us and by diffusers, refused when their parts do not belong together."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import trimesh
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import shapeloom
from shapeloom.checkpoints.clip import load_clip, publish_clip
from shapeloom.checkpoints.meshes import write_glb
from shapeloom.checkpoints.pipeline import load, publish_pipeline
from shapeloom.errors import UserError
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.conditioner import Conditioner
from shapeloom.models.denoiser import Denoiser
from shapeloom.models.hashing import weights_hash
from shapeloom.models.mesh import ExtractedMesh
from shapeloom.models.pipeline import ShapeloomPipeline
from shapeloom.training.clip import ClipModelConfig, clip_config, train_tokenizer

CAPTIONS = ["a red cube", "a small blue ball left of a green cone"]


def small_clip(seed: int = 0) -> Conditioner:
    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    config = ClipModelConfig(embed_dim=24, vision_cfg=vision, text_width=32, text_heads=2, text_layers=1)
    return Conditioner(**clip_config(config, train_tokenizer(CAPTIONS * 5, 300))).eval()


def small_pipeline() -> ShapeloomPipeline:
    clip = small_clip()
    torch.manual_seed(0)
    autoencoder = Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16).eval()
    denoiser = Denoiser(
        16, 8, width=32, heads=2, layers=1, text_width=32, image_width=256, pooled_width=24,
        latent_mean=[0.1] * 8, latent_std=[0.5] * 8,
        autoencoder_hash=weights_hash(autoencoder), conditioner_hash=clip.weights_hash,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(denoiser.latent_out.weight, std=0.1)
    return ShapeloomPipeline(autoencoder, denoiser, clip, FlowMatchEulerDiscreteScheduler(1000))


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "pipeline"
    publish_pipeline(pipeline, path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_diffusers_loads_the_folder_and_samples_the_same(pipeline, folder):
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(theirs, shapeloom.ShapeloomPipeline)
    ours = load(folder)
    expected = pipeline(text=CAPTIONS, seeds=[3, 4], steps=3, resolution=16)
    for other in (theirs, ours):
        got = other(text=CAPTIONS, seeds=[3, 4], steps=3, resolution=16)
        assert torch.equal(got.latents, expected.latents)
        assert all((a.vertices == b.vertices).all() for a, b in zip(got.meshes, expected.meshes))


def test_an_object_does_not_depend_on_its_batch(pipeline):
    both = pipeline.generate_latents(CAPTIONS, None, [3, 4], steps=3)
    alone = pipeline.generate_latents(CAPTIONS[:1], None, [3], steps=3)
    assert torch.allclose(both[:1], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_text_image_and_both_give_different_objects(pipeline):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    options = {"steps": 3, "text_guidance": 4.0, "image_guidance": 4.0}
    text = pipeline.generate_latents(CAPTIONS[:1], None, [0], **options)
    picture = pipeline.generate_latents(None, [image], [0], **options)
    both = pipeline.generate_latents(CAPTIONS[:1], [image], [0], **options)
    assert text.shape == picture.shape == both.shape == (1, 16, 8)
    assert len({tuple(z.flatten().tolist()) for z in (text, picture, both)}) == 3


def test_nothing_to_condition_on_is_an_error(pipeline):
    with pytest.raises(ValueError, match="nothing to condition on"):
        pipeline(text=None, image=None)
    with pytest.raises(ValueError, match="side by side"):
        pipeline(text=CAPTIONS, seeds=[0])


def test_another_autoencoder_is_refused(copy):
    torch.manual_seed(1)
    other = Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16)
    shutil.rmtree(copy / "autoencoder")
    other.save_pretrained(copy / "autoencoder")
    with pytest.raises(UserError, match="another autoencoder"):
        load(copy)


def test_another_conditioner_is_refused(copy):
    shutil.rmtree(copy / "conditioner")
    small_clip(seed=1).save_pretrained(copy / "conditioner")
    with pytest.raises(UserError, match="another conditioner"):
        load(copy)


def test_pickles_are_refused(copy, tmp_path):
    weights = copy / "denoiser" / "diffusion_pytorch_model.safetensors"
    torch.save({"x": torch.zeros(1)}, copy / "denoiser" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="is a pickle"):
        load(copy)
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a pickle"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("damage", ["cut", "config", "missing"])
def test_damaged_folders_are_one_sentence(copy, damage):
    if damage == "cut":
        weights = copy / "denoiser" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (copy / "autoencoder" / "config.json").write_text("{")
    else:
        (copy / "model_index.json").unlink()
    with pytest.raises(UserError) as error:
        load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_clip_folder_is_open_clips(tmp_path):
    ours = small_clip()
    publish_clip(ours, tmp_path / "clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    again = load_clip(tmp_path / "clip")
    assert again.weights_hash == ours.weights_hash
    assert torch.equal(tokenizer(CAPTIONS), again.tokenize(CAPTIONS))
    theirs.eval()
    with torch.no_grad():
        features = theirs.encode_text(tokenizer(CAPTIONS), normalize=True)
        assert torch.allclose(features, again.encode_text(CAPTIONS).pooled, atol=1e-6)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
        features = theirs.encode_image(preprocess(image)[None], normalize=True)
        assert torch.allclose(features, again.encode_image([image]).pooled, atol=1e-4)


def test_a_damaged_clip_is_one_sentence(tmp_path):
    publish_clip(small_clip(), tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 16
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit") as error:
        load_clip(tmp_path / "clip")
    assert "\n" not in str(error.value)


def test_glb_keeps_geometry_and_colors(tmp_path):
    ball = trimesh.creation.icosphere(2, 0.5)
    rgb = np.clip(ball.vertices + 0.5, 0, 1).astype(np.float32)
    mesh = ExtractedMesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int32), rgb)
    write_glb(tmp_path / "ball.glb", mesh)
    from shapeloom.data_pipes.read import read_mesh

    back = read_mesh(tmp_path / "ball.glb")
    assert len(back.faces) == len(ball.faces)
    corner = np.tile(np.eye(3)[0], (len(back.faces), 1))
    at = back.vertices[back.faces[:, 0]]
    assert np.abs(back.albedo(np.arange(len(back.faces)), corner)[:, :3] - np.clip(at + 0.5, 0, 1)).max() < 0.01
    with pytest.raises(ValueError, match="no surface"):
        write_glb(tmp_path / "none.glb", ExtractedMesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))))
