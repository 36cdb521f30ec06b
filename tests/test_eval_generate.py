"""`sample`: what it refuses, what it writes, and that a batch's neighbours do not matter."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shapeloom.errors import UserError
from shapeloom.eval import generate as module
from shapeloom.eval.generate import Request, generate, open_picture, sample, slug
from shapeloom.launch.cli import app
from shapeloom.models.mesh import ExtractedMesh


class FakePipeline:
    """Makes a tetrahedron, tinted by the seed; nothing for seed 13."""

    conditioner = SimpleNamespace(weights_hash="c")

    def __init__(self) -> None:
        self.batches: list[tuple] = []

    def generate_latents(self, text, image, seeds, *, images, **settings):
        assert image is None
        self.batches.append((text, images, seeds, settings))
        return torch.tensor(seeds, dtype=torch.float32)[:, None, None]

    def decode(self, latents_BLC):
        return latents_BLC[:, 0, 0]

    def to(self, device):
        return self


def tetrahedra(seeds_B, resolution):
    corners = np.array([[0, 0.8, 0], [-0.7, -0.5, 0.5], [0.7, -0.5, 0.5], [0, -0.5, -0.7]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]], np.int32)
    return [
        ExtractedMesh(corners[:0], faces[:0], corners[:0])
        if seed == 13
        else ExtractedMesh(corners, faces, np.full((4, 3), 0.2 + 0.1 * float(seed), np.float32))
        for seed in seeds_B
    ]


@pytest.fixture(autouse=True)
def fake_extraction(monkeypatch):
    monkeypatch.setattr(module, "extract_mesh", tetrahedra)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "Red Mug.png"
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to make"),
        ({"texts": [""]}, "--text is empty"),
        ({"texts": ["  "]}, "--text is empty"),
        ({"texts": ["a" * 3000]}, "3000 characters"),
        ({"texts": ["a cube"], "seeds": []}, "no seed"),
        ({"texts": ["a cube"], "steps": 0}, "steps"),
        ({"texts": ["a cube"], "resolution": 3}, "at least 4"),
        ({"texts": ["a cube"], "guidance_interval": (0.7, 0.2)}, "the lower first, got 0.7 and 0.2"),
        ({"texts": ["a cube"], "guidance_interval": (-0.1, 1.0)}, "guidance interval"),
        ({"texts": ["a cube"], "guidance_interval": (0.0, float("nan"))}, "guidance interval"),
        ({"texts": ["a cube"], "guidance_rescale": 1.5}, "guidance rescale must be between 0 and 1, got 1.5"),
        ({"images": ["absent.png"]}, "absent.png does not exist"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sample(FakePipeline(), out=tmp_path, **arguments)


def test_a_missing_pipeline_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        sample(tmp_path / "nowhere", texts=["a cube"], out=tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n then nothing"])
def test_an_image_that_is_none_is_named(content, tmp_path):
    path = tmp_path / "mug.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mug\.png is not a picture"):
        open_picture(path)


def test_a_picture_cut_short_is_named(tmp_path):
    path = tmp_path / "mug.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"mug\.jpg is not a picture"):
        open_picture(path)


def test_a_huge_picture_is_refused(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(UserError, match="too many pixels"):
        open_picture(path)


def test_transparency_is_put_on_white(picture):
    assert open_picture(picture).getpixel((3, 3)) == (255, 255, 255)


def test_text_alone(tmp_path):
    pipe = FakePipeline()
    record = sample(pipe, texts=["A red cube!", "a red cube"], seeds=[0, 2], out=tmp_path, text_guidance=4.0, steps=7)
    assert [entry["glb"] for entry in record["samples"]] == [
        "a-red-cube-0.glb", "a-red-cube-2.glb", "a-red-cube-v2-0.glb", "a-red-cube-v2-2.glb",
    ]  # fmt: skip
    for entry in record["samples"]:
        assert (tmp_path / entry["glb"]).read_bytes()[:4] == b"glTF"
        assert Image.open(tmp_path / entry["png"]).size == (256, 256)
    assert Image.open(tmp_path / "contact_sheet.png").width > 300
    assert json.loads((tmp_path / "samples.json").read_text()) == record
    text, images, seeds, settings = pipe.batches[0]
    assert text == ["A red cube!"] * 2 + ["a red cube"] * 2 and images is None and seeds == [0, 2, 0, 2]
    assert settings.pop("on_step") is not None
    assert settings == {
        "steps": 7, "text_guidance": 4.0, "image_guidance": 2.0, "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0, "solver": "own",
    }  # fmt: skip
    assert record["settings"] == {**settings, "resolution": 64}


def test_image_alone_and_both_together(tmp_path, picture):
    pipe = FakePipeline()
    record = sample(pipe, images=[picture], seeds=[1], out=tmp_path / "image")
    assert record["samples"][0]["glb"] == "red-mug-1.glb" and len(record["samples"][0]["image_sha256"]) == 64
    assert pipe.batches[0][0] is None and [view.size for view in pipe.batches[0][1][0]] == [(40, 20)]
    record = sample(pipe, texts=["a mug", "a cup"], images=[picture, picture], seeds=[1], out=tmp_path / "both")
    assert [entry["glb"] for entry in record["samples"]] == [
        "a-mug-red-mug-1.glb", "a-mug-red-mug-v2-1.glb", "a-cup-red-mug-1.glb", "a-cup-red-mug-v2-1.glb",
    ]  # fmt: skip
    assert pipe.batches[1][0] == ["a mug", "a mug", "a cup", "a cup"] and len(pipe.batches[1][1]) == 4


@pytest.fixture
def views(tmp_path):
    """Five views of one object, of colours in the order of their names, beside what is none."""
    folder = tmp_path / "My Chair"
    (folder / "old.png").mkdir(parents=True)
    (folder / "notes.txt").write_text("front, left, …")
    (folder / "._a.png").write_bytes(b"what some systems leave beside a file")
    for name, red in (("e.PNG", 250), ("b.jpeg", 100), ("a.png", 50), ("d.JPG", 200), ("c.webp", 150)):
        Image.new("RGB", (40, 20), (red, 0, 0)).save(folder / name)
    return folder


def test_a_folder_is_views_of_one_object(tmp_path, views, picture):
    pipe = FakePipeline()
    record = sample(pipe, images=[views, picture], seeds=[1], out=tmp_path / "out")
    of_folder, of_picture = pipe.batches[0][1]
    assert [view.getpixel((9, 9))[0] for view in of_folder] == pytest.approx([50, 100, 150, 200, 250], abs=3)
    assert len(of_picture) == 1
    first, second = record["samples"]
    files = [views / name for name in ("a.png", "b.jpeg", "c.webp", "d.JPG", "e.PNG")]
    assert first["glb"] == "my-chair-1.glb" and first["image"] == str(views)
    assert first["image_sha256"] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert second["image_sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out" / "samples.json").read_text()) == record
    # Four views of 160 pixels, each a stripe on white, and then the object.
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png")).astype(int)
    stripe = sheet[8 + 80, 8 + 80 :: 160]
    assert stripe[:4].tolist() == pytest.approx(np.array([[50, 0, 0], [100, 0, 0], [150, 0, 0], [200, 0, 0]]), abs=3)
    assert not (stripe[4:] == [250, 0, 0]).all(-1).any()


def test_the_folder_one_stands_in_has_a_name(tmp_path, views, monkeypatch):
    monkeypatch.chdir(views)
    record = sample(FakePipeline(), images=["."], seeds=[1], out=tmp_path / "out")
    assert record["samples"][0]["glb"] == "my-chair-1.glb"


def test_a_folder_of_no_use_is_named(tmp_path, views):
    pipe, empty = FakePipeline(), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty has no picture: put views of one object there"):
        sample(pipe, images=[empty], out=tmp_path / "out")
    with pytest.raises(UserError, match="is an --image too: write to another folder"):
        sample(pipe, images=[views], out=views)
    (views / "b.jpeg").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.jpeg is not a picture"):
        sample(pipe, images=[views], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_passes_guidance_on(tmp_path, views, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "sample", lambda *arguments, **options: calls.append(options))
    words = ["sample", "pipeline", "--image", str(views), "--guidance-interval", "0.2", "0.8"]
    done = CliRunner().invoke(app, [*words, "--guidance-rescale", "0.7", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert calls[0]["guidance_interval"] == (0.2, 0.8) and calls[0]["guidance_rescale"] == 0.7
    assert calls[0]["images"] == [views]


def test_an_empty_object_has_no_glb_and_is_told(tmp_path, capsys):
    record = sample(FakePipeline(), texts=["a cube"], seeds=[13, 1], out=tmp_path)
    assert [(entry["empty"], entry["glb"]) for entry in record["samples"]] == [(True, None), (False, "a-cube-1.glb")]
    said = capsys.readouterr().out
    assert "'a cube' with seed 13: no surface: signed distance lies in [" in said


def test_batches_hold_one_kind_of_condition():
    pipe, shown = FakePipeline(), (Image.new("RGB", (4, 4)),)
    requests = [Request(0, "a"), Request(1, "b"), Request(2, "c"), Request(3, None, shown), Request(4, "d", shown)]
    latents = np.concatenate(list(generate(pipe, requests, batch_size=2)))
    assert latents[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert [seeds for _, _, seeds, _ in pipe.batches] == [[0, 1], [2], [3], [4]]
    assert [images for _, images, _, _ in pipe.batches] == [None, None, [list(shown)], [list(shown)]]


def test_slugs():
    assert slug("A red cube, left of …") == "a-red-cube-left-of" and slug("立方体") == "object"
    assert len(slug("word " * 99)) <= 60
