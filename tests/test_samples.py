"""R-precision while training: which objects count as hits, and what bounds the work."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_folders import CAPTIONS, four_latents, shapeloom, small_autoencoder, small_clip, succeed, write_latents
from PIL import Image

from shapeloom.checkpoints.pipeline import load, load_conditioner
from shapeloom.data_pipes.latents import LatentDataset
from shapeloom.models.mesh import ExtractedMesh
from shapeloom.training import samples
from shapeloom.training.features import FeatureSource
from shapeloom.training.samples import HeldOutSamples

COLOURS = {
    CAPTIONS[0]: (1.0, 0.0, 0.0),
    CAPTIONS[1]: (0.0, 0.0, 1.0),
    CAPTIONS[2]: (0.0, 1.0, 0.0),
    CAPTIONS[3]: (1, 1, 0),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder and its latents."""
    at = tmp_path_factory.mktemp("samples")
    latents = write_latents(at / "latents", small_autoencoder(), small_clip(), four_latents())
    words = ["--data", latents, "--out", at / "run", "steps=2", "batch_size=4", "eval_samples=2", "sample_steps=2"]
    succeed("train", "denoiser", *words, "model.width=32", "model.heads=2", "model.layers=1", "trackers=[]")
    return at


def test_the_log_has_it_and_the_sheet_is_there(run):
    last = json.loads((run / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["eval/scored"] == 4 and 0 <= last["eval/r_precision"] <= 1
    with Image.open(run / "run" / "samples" / "00000002.png") as sheet:
        assert sheet.width > 300


def triangle(rgb: tuple[float, float, float]) -> ExtractedMesh:
    """One that fills much of every frontal view."""
    vertices = np.array([[-0.9, -0.7, 0], [0.9, -0.7, 0], [0, 0.9, 0]], np.float32)
    return ExtractedMesh(vertices, np.array([[0, 1, 2]], np.int32), np.tile(np.float32(rgb), (3, 1)))


class ColourJudge:
    """Knows what colour a caption is, and which a picture has: CLIP's interface with an answer one can work out."""

    image_size = 32

    def encode_text(self, texts):
        return SimpleNamespace(pooled=torch.tensor([COLOURS.get(text, (0.5, 0.5, 0.5)) for text in texts]))

    def encode_image(self, images):
        ink = (255.0 - images.astype(np.float32)).mean((1, 2))  # on white: what is missing
        colour = ink.max(1, keepdims=True) - ink
        return SimpleNamespace(pooled=torch.from_numpy(colour))


def test_a_hit_is_an_object_whose_own_caption_is_nearest(run, tmp_path, monkeypatch):
    dataset = LatentDataset(run / "latents", "train")
    source = FeatureSource(load_conditioner(run / "latents" / "conditioner"))
    captions = [dataset.meta(i)["captions"][0] for i in range(4)]
    right = [triangle(COLOURS[caption]) for caption in captions]
    nothing = ExtractedMesh(*(np.zeros((0, 3), kind) for kind in (np.float32, np.int32, np.float32)))
    pipeline = load(run / "run" / "pipeline")

    def score(meshes: list[ExtractedMesh]) -> dict[str, float]:
        monkeypatch.setattr(samples, "extract_mesh", lambda field, resolution: meshes)
        held_out = HeldOutSamples(dataset, source, shown=2, scored=4, steps=1, seconds=60, judge=ColourJudge())
        return held_out(pipeline, tmp_path / "sheet.png")

    before = torch.get_rng_state()
    assert score(right) == {"r_precision": 1.0, "scored": 4}
    assert score([right[1], right[0], *right[2:]]) == {"r_precision": 0.5, "scored": 4}
    assert score([nothing, *right[1:]]) == {"r_precision": 0.75, "scored": 4}
    assert torch.equal(torch.get_rng_state(), before)


def test_no_chunk_is_begun_when_the_time_is_over(run, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 1)
    dataset = LatentDataset(run / "latents", "train")
    source = FeatureSource(load_conditioner(run / "latents" / "conditioner"))
    held_out = HeldOutSamples(dataset, source, shown=4, scored=4, steps=1, seconds=1e-9, judge=source.conditioner)
    clock = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(samples.time, "monotonic", lambda: next(clock))
    assert held_out(load(run / "run" / "pipeline"), tmp_path / "sheet.png")["scored"] == 1


def test_a_judge_that_is_not_there_is_one_sentence(run):
    words = ["--data", run / "latents", "--out", run / "other", "judge=nowhere"]
    code, _, errors = shapeloom("train", "denoiser", *words)
    assert code == 1 and "nowhere" in errors and errors.count("\n") == 1
