"""Unpacking archives from outside, good, broken and hostile; and building from them."""

from __future__ import annotations

import io
import json
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trimesh

from shapeloom.data_pipes.archives import ArchiveLimits, unpack
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.find import find
from shapeloom.data_pipes.limits import Limits, Rejected
from shapeloom.data_pipes.read import read_mesh


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.lower().endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EVERY_KIND = pytest.mark.parametrize(
    ("name", "write"), [("a.zip", write_zip), ("a.tar", write_tar), ("a.tar.gz", write_tar), ("a.TGZ", write_tar)]
)


@EVERY_KIND
def test_everything_comes_out(tmp_path: Path, name: str, write: Callable) -> None:
    members = {"x.obj": b"v 0 0 0", "deep/er/t.png": bytes(range(256)) * 9000, "empty": b""}
    unpack(write(tmp_path / name, members), tmp_path / "out")
    assert files_in(tmp_path / "out") == members


@EVERY_KIND
@pytest.mark.parametrize("member", ["../x", "/x", "a/../../x", "..\\x"])
def test_nothing_leaves_the_folder(tmp_path: Path, name: str, write: Callable, member: str) -> None:
    with pytest.raises(Rejected, match="outside itself"):
        unpack(write(tmp_path / name, {member: b"!"}), tmp_path / "in" / "out")
    assert sorted(files_in(tmp_path)) == [name]


@EVERY_KIND
def test_bombs_and_crowds(tmp_path: Path, name: str, write: Callable) -> None:
    bomb = write(tmp_path / name, {"zeros": bytes(40 << 20)})
    if name != "a.tar":
        with pytest.raises(Rejected, match="far more"):
            unpack(bomb, tmp_path / "ratio")
    with pytest.raises(Rejected, match="far more"):
        unpack(bomb, tmp_path / "total", ArchiveLimits(total_bytes=1000))
    crowd = write(tmp_path / name, {f"{k}": b"" for k in range(20)})
    with pytest.raises(Rejected, match="more than the 19 files"):
        unpack(crowd, tmp_path / "crowd", ArchiveLimits(members=19))


@EVERY_KIND
def test_a_cut_or_forged_archive_says_so(tmp_path: Path, name: str, write: Callable) -> None:
    whole = write(tmp_path / name, {"x": bytes(range(256)) * 100}).read_bytes()
    for k, data in enumerate((b"", b"no archive at all", whole[: len(whole) // 2], b"\xff" * 600)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Rejected) as caught:
            unpack(tmp_path / name, tmp_path / f"out{k}")
        assert "cannot be unpacked" in caught.value.reason and caught.value.hint


def test_encrypted_links_and_names_twice(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", {"x": b"!"}).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(Rejected, match="encrypted"):
        unpack(tmp_path / "a.zip", tmp_path / "encrypted")

    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("x", b"!")
    unpack(tmp_path / "a.zip", tmp_path / "zip")
    info = tarfile.TarInfo("link")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(info)
    unpack(tmp_path / "a.tar", tmp_path / "tar")
    assert files_in(tmp_path / "zip") == {"x": b"!"} and files_in(tmp_path / "tar") == {}

    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", b"1")
        archive.writestr("x", b"2")
    with pytest.raises(Rejected, match="File exists"):
        unpack(tmp_path / "a.zip", tmp_path / "twice")


def test_real_archives_are_folders_with_their_textures(assets_dir: Path, tmp_path: Path) -> None:
    hard = assets_dir / "hard" / "files"
    for number, name, textured in (("383", "chair.zip", False), ("384", "fuze.zip", True)):
        (scratch := tmp_path / number).mkdir()
        (file, place), *others = find(hard / number, tmp_path / "raw", scratch).items()
        assert file.startswith(f"{name}/") and file.endswith(".obj") and not others
        with place.local() as (path, root):
            mesh = read_mesh(path, root=root, fetch=place.fetch)
        assert any(material.texture is not None for material in mesh.materials) == textured


def test_a_zip_may_stay_and_its_members_be_read_one_by_one(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    box = trimesh.creation.box().export(file_type="gltf")
    header = box.pop("model.gltf").replace(b'"uri":"', b'"uri":"../data/').replace(b'"uri": "', b'"uri": "../data/')
    members = {"in/box.gltf": header, "in/._box.gltf": b"", "readme.txt": b"hello"}
    write_zip(models / "a.zip", members | {f"data\\{name}": data for name, data in box.items()})
    write_zip(models / "out.zip", {"../x.glb": b"!"})
    write_zip(models / "bomb.zip", {"x.glb": bytes(40 << 20)})
    (models / "cut.zip").write_bytes((models / "a.zip").read_bytes()[:-9])
    (scratch := tmp_path / "scratch").mkdir()
    places = pickle.loads(pickle.dumps(find(models, tmp_path / "raw", scratch)))
    assert list(places) == ["a.zip/in/box.gltf", "bomb.zip", "cut.zip", "out.zip"] and not list(scratch.iterdir())
    for name, reason in (("bomb", "far more"), ("cut", "cannot be unpacked"), ("out", "outside itself")):
        assert reason in places[f"{name}.zip"].refused.reason
    place = places["a.zip/in/box.gltf"]
    sidecars: dict[str, str | None] = {}
    with place.local() as (path, root):
        assert len(read_mesh(path, root=root, fetch=place.fetch, sidecars=sidecars).faces) == 12
    assert not path.exists() and sidecars
    assert place.stamp[0] == len(header)
    assert all(place.sidecar_stamp(name)[0] == len(box[Path(name).name]) for name in sidecars)
    assert place.sidecar_stamp("../data/none.bin") is None and place.sidecar_stamp("../../x") is None
    with pytest.raises(Rejected, match="bytes, more than the 10 allowed"), place.local(Limits(file_bytes=10)):
        pass
    before = place.stamp
    write_zip(models / "a.zip", {"in/box.gltf": header.replace(b"GLTF", b"gltf").replace(b"2.0", b"2.1")})
    (again := tmp_path / "again").mkdir()
    assert find(models, tmp_path / "raw", again)["a.zip/in/box.gltf"].stamp != before


def test_a_build_takes_what_archives_hold_and_sets_bad_ones_aside(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "sub").mkdir(parents=True)
    box = trimesh.creation.box().export(file_type="glb")
    (models / "plain.glb").write_bytes(box)
    write_zip(models / "sub" / "more.zip", {"in/box.glb": box, "cut.glb": box[:-100], "readme.txt": b"hello"})
    write_tar(models / "tarred.tar.gz", {"box.stl": trimesh.creation.icosphere(1).export(file_type="stl")})
    (models / "bad.zip").write_bytes(b"PK\x03\x04 and then nothing")
    write_zip(models / "words.zip", {"readme.txt": b"hello"})
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption\nsub/more.zip/in/box.glb,a box from an archive\n")
    settings = BuildSettings(n_surface=64, n_near=32, n_uniform=32, n_views=0)
    report = build(models, tmp_path / "raw", captions, settings)
    lines = (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()
    rejected = {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}
    assert report.samples == 3 and set(rejected) == {"bad.zip", "sub/more.zip/cut.glb", "words.zip"}
    assert "cannot be unpacked" in rejected["bad.zip"] and "no file in it that can be read" in rejected["words.zip"]
    assert len(lines) == 3
    parts = [json.loads(path.read_text()) for path in (tmp_path / "raw" / "parts").iterdir()]
    uids = {row["file"]: row["uid"] for part in parts for row in part["entries"] if row.get("sample")}
    assert uids == {
        "plain.glb": "plain",
        "sub/more.zip/in/box.glb": "sub__more_zip__in__box",
        "tarred.tar.gz/box.stl": "tarred_tar_gz__box",
    }
    assert report.captions_from_names == 2
    again = build(models, tmp_path / "raw", captions, settings)
    assert again.kept_shards == 1 and again.samples == 3
    assert sorted(path.name for path in models.rglob("*") if path.is_dir()) == ["sub"]
