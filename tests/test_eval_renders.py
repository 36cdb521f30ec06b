"""Renders by a protocol, kept by content: real worker processes, bad objects, changed files, damaged caches."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from os import getpid, kill

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.data_pipes.render import composite, render
from shapeloom.eval.benchmark import renders as module
from shapeloom.eval.benchmark.protocol import load_protocol
from shapeloom.eval.benchmark.renders import Limits, RenderCache
from shapeloom.eval.benchmark.sources import Blank, GreySphere, Loaded, MeshFile, Picture

PROTOCOL = load_protocol("default-v1").model_copy(update={"resolution": 48})


@dataclass(frozen=True)
class Sleeper:
    """An object whose loading takes a processor's time for ever."""

    def key(self):
        return {"test": "sleeper"}

    def load(self, reading=None) -> Loaded:
        while True:
            time.perf_counter()


@dataclass(frozen=True)
class Killer:
    """An object that kills the process which reads it."""

    def key(self):
        return {"test": "killer"}

    def load(self, reading=None) -> Loaded:
        kill(getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.fixture
def cache(tmp_path):
    return RenderCache(tmp_path / "cache", PROTOCOL, Limits(cpu_s=20))


def one(cache, source):
    (rendered,) = cache.render([source], workers=1, description="test")
    return rendered


def box(path, color=(200, 30, 30), extents=(1.0, 2.0, 1.0), shift=0.0):
    shape = trimesh.creation.box(extents)
    shape.apply_translation([shift, 0, 0])
    shape.visual.face_colors = [*color, 255]
    shape.export(path)
    return MeshFile(str(path))


def test_pictures_are_the_renderers_of_the_normalised_mesh(cache, tmp_path):
    source = box(tmp_path / "a.glb", shift=5.0)
    pictures = cache.pictures(one(cache, source))
    views = render(source.load().mesh.normalised()[0], PROTOCOL.views(), samples_per_axis=2)
    assert np.array_equal(pictures["colour"], composite(views.lit))
    assert np.array_equal(pictures["textureless"], composite(views.textureless))
    inside = pictures["textureless"][0][20:28, 22:26].astype(int)
    assert np.ptp(inside, axis=-1).max() == 0 and 60 < inside.mean() < 230  # grey, whatever its colour


def test_textureless_is_the_colour_of_a_grey_object(tmp_path):
    shape = trimesh.creation.icosphere(subdivisions=3)
    grey = 1.055 * module.renderer.TEXTURELESS_ALBEDO ** (1 / 2.4) - 0.055  # sRGB of that albedo
    own = Mesh.from_vertex_colors(shape.vertices, shape.faces, np.full((len(shape.vertices), 3), grey, np.float32))
    red = Mesh.from_vertex_colors(shape.vertices, shape.faces, np.tile([0.9, 0.1, 0.2], (len(shape.vertices), 1)))
    views = PROTOCOL.views()[[0]]
    assert np.abs(render(own, views).lit.astype(int) - render(red, views).textureless).max() <= 1


def test_a_second_time_nothing_is_rendered(cache, tmp_path, monkeypatch):
    source = box(tmp_path / "a.glb")
    first = one(cache, source)
    monkeypatch.setattr(module, "isolated_map", lambda *a, **k: pytest.fail("rendered again"))
    assert one(cache, source) == first
    other = tmp_path / "b.glb"
    other.write_bytes((tmp_path / "a.glb").read_bytes())
    assert one(cache, MeshFile(str(other))) == first  # by content, not by name
    assert cache.thumbnail(first).startswith(b"RIFF")


def test_what_decides_the_pixels_decides_the_key(tmp_path):
    source = box(tmp_path / "a.glb")
    key = RenderCache(tmp_path, PROTOCOL).key(source)
    for change in ({"resolution": 49}, {"normalise": "none"}, {"background": (0.0, 0.0, 0.0)}):
        assert RenderCache(tmp_path, PROTOCOL.model_copy(update=change)).key(source) != key
    assert RenderCache(tmp_path, PROTOCOL.model_copy(update={"aggregation": "any view"})).key(source) == key
    assert RenderCache(tmp_path, PROTOCOL).key(MeshFile(source.path, up="z")) != key


def textured(folder, colour):
    """An OBJ whose bytes are the same whatever its texture."""
    folder.mkdir(exist_ok=True)
    (folder / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n")
    (folder / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl m\n"
        "f 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    )
    Image.new("RGB", (4, 4), colour).save(folder / "t.png")
    return MeshFile(str(folder / "a.obj"))


def test_two_files_of_equal_bytes_have_each_their_own_texture(cache, tmp_path):
    sources = [textured(tmp_path / colour, colour) for colour in ("red", "lime")]
    red, lime = (cache.pictures(one)["colour"][0, 24, 24] for one in cache.render(sources, workers=1, description=""))
    assert red[0] > red[1] and lime[1] > lime[0]


def test_what_was_missing_and_is_there_now_is_read(cache, tmp_path):
    source = textured(tmp_path / "a", "red")
    (tmp_path / "a" / "t.png").rename(tmp_path / "t.png")
    bare = one(cache, source)
    assert "t.png" in bare.warnings[0] and one(cache, source).warnings == bare.warnings
    (tmp_path / "t.png").rename(tmp_path / "a" / "t.png")
    whole = one(cache, source)
    assert not whole.warnings and whole.pixels != bare.pixels
    box(tmp_path / "b.gltf")
    buffer = next(tmp_path.glob("*.bin"))
    data = buffer.read_bytes()
    buffer.unlink()
    source = MeshFile(str(tmp_path / "b.gltf"))
    assert one(cache, source).miss.kind == "unreadable"
    buffer.write_bytes(data)
    assert one(cache, source).views == 12


def test_a_lost_picture_is_rendered_again(cache, tmp_path):
    source = box(tmp_path / "a.glb")
    first = one(cache, source)
    for harm in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:99])):
        harm(next((tmp_path / "cache").rglob("*.png")))
        assert one(cache, source) == first and cache.pictures(first)["colour"].shape == (12, 48, 48, 3)


def test_a_cache_that_cannot_be_written_ends_the_run(tmp_path):
    cache = RenderCache(tmp_path / "cache", PROTOCOL)
    source = box(tmp_path / "a.glb")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "renders").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="renders"):
        one(cache, source)


def test_a_changed_texture_is_seen(cache, tmp_path):
    source = textured(tmp_path, "red")
    seen = []
    for colour in ("red", "lime", "lime"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "t.png")
        seen.append(cache.pictures(one(cache, source))["colour"][0, 24, 24])
    assert seen[0][0] > seen[0][1] and seen[1][1] > seen[1][0] and np.array_equal(seen[1], seen[2])


def test_the_axis_that_points_up(cache, tmp_path):
    standing = box(tmp_path / "y.glb", extents=(1, 2, 1))
    lying = MeshFile(box(tmp_path / "z.glb", extents=(1, 1, 2)).path, up="z")
    a, b = (cache.pictures(one(cache, source))["colour"] for source in (standing, lying))
    assert np.abs(a.astype(int) - b).max() <= 1


def test_bad_objects_are_misses_with_their_reason(cache, tmp_path):
    box(tmp_path / "whole.glb")
    (tmp_path / "cut.glb").write_bytes((tmp_path / "whole.glb").read_bytes()[:300])
    (tmp_path / "none.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    (tmp_path / "nan.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    sources = [MeshFile(str(tmp_path / name)) for name in ("cut.glb", "none.obj", "nan.obj", "flat.obj", "whole.glb")]
    found = cache.render([*sources, None], workers=2, description="test")
    assert [one.miss and one.miss.kind for one in found] == [
        "unreadable", "empty", "not finite", "empty", None, "missing",
    ]  # fmt: skip
    assert "cut short" in found[0].miss.reason and found[4].views == 12


def test_an_object_that_hangs_or_kills_its_process_is_alone(tmp_path):
    cache = RenderCache(tmp_path / "cache", PROTOCOL, Limits(cpu_s=1))
    slow, dead, ball = cache.render([Sleeper(), Killer(), GreySphere()], workers=1, description="test")
    assert slow.miss.kind == "timed out" and dead.miss.kind == "crashed" and ball.views == 12
    again = RenderCache(tmp_path / "cache", PROTOCOL, Limits(cpu_s=1))
    assert again.render([Sleeper()], workers=1, description="test")[0].miss == slow.miss  # kept
    assert again._find(Sleeper()).miss and not RenderCache(tmp_path / "cache", PROTOCOL)._find(Sleeper()).miss
    assert not again._find(Killer()).miss  # whatever killed it may not do so again


def test_damaged_records_are_made_again(cache, tmp_path):
    source = box(tmp_path / "a.glb")
    first = one(cache, source)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text(path.read_text()[:40])
    assert one(cache, source) == first
    record = json.loads(next((tmp_path / "cache").rglob("*.json")).read_text())
    assert record["pixels"] == first.pixels


def test_controls_and_single_pictures(cache, tmp_path):
    blank, ball = cache.render([Blank(), GreySphere()], workers=1, description="test")
    assert (cache.pictures(blank)["colour"] == 255).all()
    grey = cache.pictures(ball)["colour"][0, 24, 24].astype(int)
    assert np.ptp(grey) == 0 and grey[0] < 250
    Image.new("RGB", (30, 90), "blue").save(tmp_path / "p.png")
    picture = one(cache, Picture(str(tmp_path / "p.png")))
    (view,) = cache.pictures(picture)["colour"]
    assert picture.views == 1 and (view[24, 2] == 255).all() and view[24, 24].tolist() == [0, 0, 255]
