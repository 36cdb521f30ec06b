"""The judge that comes with the package: its weights, its embeddings and what it can tell do not change unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shapeloom.checkpoints.bundled import JUDGE
from shapeloom.data_pipes import grammar
from shapeloom.data_pipes.render import composite, render
from shapeloom.data_pipes.scenes import draw_scene
from shapeloom.eval.benchmark.protocol import load_protocol
from shapeloom.eval.evaluators.registry import open_evaluator

GOLDEN = Path(__file__).with_name("golden_judge.json")
CAPTIONS = ("a red cube", "a blue sphere on top of a green cylinder")


@pytest.fixture(scope="module")
def judge():
    return open_evaluator("judge", device="cpu")


def picture() -> np.ndarray:
    """A drawing that no renderer can change: a red disc and a blue square, 100 pixels wide."""
    image = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill=(200, 30, 40))
    ImageDraw.Draw(image).rectangle((55, 50, 85, 80), fill=(30, 60, 200))
    return np.asarray(image)


def test_embeddings_are_what_they_were(judge):
    """Catches another activation, resize, mean or tokenizer, none of which raises an error."""
    golden = json.loads(GOLDEN.read_text())
    assert judge.facts.weights == golden["weights"]
    found = np.concatenate([judge.embed_texts(list(CAPTIONS)), judge.embed_pictures(picture()[None])])
    kept = np.array(golden["embeddings"])
    assert ((found * kept).sum(axis=1) / np.linalg.norm(kept, axis=1) > 0.9999).all()


def test_it_tells_true_renders_from_their_swaps(judge):
    """On fresh objects: the first caption is the object's, the others are its swaps."""
    protocol, rng = load_protocol("reference-v1"), np.random.default_rng(5)
    right = swapped = 0
    for _ in range(12):
        spec = grammar.draw_group("core", 2, rng)
        mesh = draw_scene(spec, rng).mesh()
        views = composite(render(mesh, protocol.views(), samples_per_axis=2).lit)
        texts = [grammar.canonical_caption(spec), *(swap["caption"] for swap in grammar.swaps(spec))]
        cosines = judge.embed_texts(texts) @ judge.embed_pictures(views).mean(axis=0)
        right += cosines.argmax() == 0
        swapped += len(texts) - 1
    assert right == 12 and swapped > 24


def test_it_is_small_and_no_pickle():
    files = sorted(path.name for path in JUDGE.iterdir())
    assert files == ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sum(path.stat().st_size for path in JUDGE.iterdir()) < 6 << 20
