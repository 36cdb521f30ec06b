"""A folder of objects is matched to prompts by whole names; what does not fit is told in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapeloom.errors import UserError
from shapeloom.eval.benchmark.inputs import find_objects
from shapeloom.eval.benchmark.prompts import Prompt
from shapeloom.eval.benchmark.protocol import load_protocol
from shapeloom.eval.benchmark.ranks import Ranks
from shapeloom.eval.benchmark.sources import MeshFile, Renders

PROMPTS = [Prompt(name, name, name) for name in ("chair", "chair-2", "1", "10")]
PROTOCOL = load_protocol("reference-v1")


def mesh(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box().export(path)


def pictures(folder, count=4, size=64, name="rgb", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.fromarray(np.full((size, size, 3), 9 * number, np.uint8)).save(folder / f"{name}_{number}.png")


def find(folder, **more):
    return find_objects(folder, PROMPTS, PROTOCOL, **more)


def test_names_are_compared_whole(tmp_path):
    for name in ("chair.glb", "chair-2.obj", "10.stl", "chair-20.ply", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            mesh(tmp_path / name)
    found = find(tmp_path)
    paths = [row[0] and row[0].path.rpartition("/")[2] for row in found.sources_PS]
    assert paths == ["chair.glb", "chair-2.obj", None, "10.stl"]
    assert found.seeds == (0,) and found.missing == 1 and found.extra == ["chair-20"] and found.kind == "meshes"


def test_seeds_are_the_names_inside_an_ids_folder(tmp_path):
    for name in ("chair/0.glb", "chair/10.glb", "1/3.ply", "1/model.glb", "1/texture.png"):
        mesh(tmp_path / name) if not name.endswith("png") else (tmp_path / name).write_bytes(b"x")
    found = find(tmp_path)
    assert found.seeds == (0, 3, 10) and found.missing == 4 * 3 - 3
    assert [path.rpartition("/")[2] for path in found.unplaced] == ["model.glb"]
    chosen = find(tmp_path, seeds=[10, 0])
    assert chosen.seeds == (10, 0) and [type(source) for source in chosen.sources_PS[0]] == [MeshFile, MeshFile]


def test_ready_renders_lie_in_the_order_of_their_numbers(tmp_path):
    pictures(tmp_path / "chair" / "0")
    pictures(tmp_path / "1", start=1)
    found = find(tmp_path)
    assert found.kind == "pictures"
    source = found.sources_PS[0][0]
    assert isinstance(source, Renders)
    loaded = source.load().pictures["colour"]
    assert loaded.shape == (4, 64, 64, 3) and loaded[:, 0, 0, 0].tolist() == [0, 9, 18, 27]
    assert found.sources_PS[2][0].load().pictures["colour"][:, 0, 0, 0].tolist() == [9, 18, 27, 36]


def test_ten_pictures_are_not_sorted_as_words(tmp_path):
    pictures(tmp_path / "chair", 12, size=224)
    pictures(tmp_path / "chair", 12, size=224, name="textureless")
    (found, *_), *_ = find_objects(tmp_path, PROMPTS, load_protocol("default-v1")).sources_PS
    both = found.load().pictures
    assert both["colour"][:, 0, 0, 0].tolist() == [9 * n for n in range(12)] and set(both) == {"colour", "textureless"}


def test_one_object_with_wrong_pictures_is_its_failure(tmp_path):
    pictures(tmp_path / "chair")
    pictures(tmp_path / "1", 3)
    pictures(tmp_path / "10")
    Image.new("RGB", (64, 64)).save(tmp_path / "10" / "rgb_03.png")
    pictures(tmp_path / "thumbs", 2)  # not a prompt's
    found = find(tmp_path)
    assert isinstance(found.sources_PS[0][0], Renders) and found.extra == ["thumbs"]
    assert "has 3 pictures" in found.sources_PS[2][0].reason
    assert "two pictures numbered 3" in found.sources_PS[3][0].reason


def test_what_cannot_be_read_is_an_object_that_failed(tmp_path):
    mesh(tmp_path / "chair.glb")
    (tmp_path / "1.glb").symlink_to(tmp_path / "gone.glb")
    (tmp_path / "10.glb").symlink_to(tmp_path / "10.glb")
    found = find(tmp_path)
    assert found.missing == 1
    for row in found.sources_PS[2:]:
        with pytest.raises(OSError):
            row[0].key()


def test_a_mesh_inside_a_seeds_folder_is_told(tmp_path):
    mesh(tmp_path / "chair/0.glb")
    mesh(tmp_path / "1/0/model.glb")
    assert [path.rpartition("/")[2] for path in find(tmp_path).unplaced] == ["model.glb"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: pictures(d / "chair", 3), "3 pictures for 'colour' (numbers 0 to 2), protocol reference-v1 has 4"),
        (lambda d: pictures(d / "chair", 4, start=5), "numbers 5 to 8"),
        (lambda d: pictures(d / "chair", 4, size=32), "is 32 x 32 pixels, protocol reference-v1 has 64 x 64"),
        (lambda d: (mesh(d / "chair.glb"), mesh(d / "chair.obj")), "two objects for id 'chair' and seed 0"),
        (lambda d: (mesh(d / "chair.glb"), mesh(d / "chair/0.glb")), "two objects for id 'chair' and seed 0"),
        (lambda d: (mesh(d / "1/0.glb"), pictures(d / "1/0")), "two objects for id '1' and seed 0"),
        (lambda d: mesh(d / "table.glb"), "prompts have ids such as 'chair', the folder has 'table'"),
        (lambda d: None, "the folder has nothing"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        find(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        find(tmp_path / "none")


def test_shares_of_ranks_are_disjoint_and_whole(monkeypatch):
    items = list(range(11))
    shares = [Ranks(rank, 3).mine(items) for rank in range(3)]
    assert sorted(sum(shares, [])) == items and shares[1] == [1, 4, 7, 10]
    assert Ranks.of_this_process("2/4") == Ranks(2, 4, joined=False)
    for wrong in ("4/4", "a/b", "1", "-1/2"):
        with pytest.raises(UserError, match="--shard"):
            Ranks.of_this_process(wrong)
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert Ranks.of_this_process() == Ranks(1, 2)
