"""Shards: plain WebDataset tars with fixed bytes, random access, and clear words when they are damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shapeloom.data_pipes import raw_sample
from shapeloom.data_pipes.index import INDEX
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import (
    RAW_FORMAT,
    ShardWriter,
    begin_folder,
    encode_raw_sample,
    finished_shard,
    index_path,
    split_of,
    write_manifest,
)
from shapeloom.errors import UserError
from shapeloom.models.cameras import orbit

SETTINGS = {"level": "test", "seed": 0}


def sample(uid: str, n_points: int = 50) -> dict[str, bytes]:
    rng = np.random.default_rng(int.from_bytes(uid.encode(), "big") % 2**32)
    xyz = rng.uniform(-1, 1, (n_points, 3)).astype(np.float32)
    rgb = rng.integers(0, 256, (n_points, 3), dtype=np.uint8)
    images = rng.integers(0, 256, (2, 16, 16, 4), dtype=np.uint8)
    depth = np.where(rng.random((2, 16, 16)) < 0.5, rng.uniform(3, 5, (2, 16, 16)), np.inf).astype(np.float32)
    return encode_raw_sample(
        uid,
        captions=[f"caption of {uid}", "élan"],
        category=None,
        source="test",
        licence="CC0-1.0",
        author=None,
        sha256=None,
        transform=np.eye(4),
        split=split_of(uid),
        surface=SimpleNamespace(xyz=xyz, normal=xyz / np.linalg.norm(xyz, axis=1, keepdims=True), rgb=rgb),
        field=SimpleNamespace(xyz=xyz, sdf=xyz[:, 0], rgb=rgb),
        views=SimpleNamespace(albedo=images, lit=images[::-1], depth=depth),
        cameras=orbit([0, 90], 20, size=16),
        extra={"note": 1},
    )


def write_folder(out: Path, uids: tuple[tuple[str, ...], ...] = (("b", "a"), ("c-1", "d_2", "e"))) -> ShardFolder:
    begin_folder(out, format=RAW_FORMAT, settings=SETTINGS)
    infos = []
    for number, of_shard in enumerate(uids):
        with ShardWriter(out / f"shard-{number:05d}.tar") as writer:
            for uid in of_shard:
                writer.write(uid, sample(uid), split_of(uid))
        infos.append(writer.info)
    write_manifest(out, format=RAW_FORMAT, settings=SETTINGS, shards=infos, counts={"samples": 5})
    return ShardFolder(out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "raw")
    return tmp_path / "raw"


def test_random_access_gives_what_was_written(folder: Path) -> None:
    shards = ShardFolder(folder)
    assert shards.uids == ["b", "a", "c-1", "d_2", "e"]
    for i, uid in enumerate(shards.uids):
        assert shards.read(uid) == shards.read(i) == sample(uid)
    assert shards.read("e", ["json"]).keys() == {"json"}
    assert shards.read_json("a")["captions"] == ["caption of a", "élan"]
    assert [shards.splits(uid) for uid in shards.uids] == [split_of(uid) for uid in shards.uids]
    assert sorted(i for split in set(map(split_of, shards.uids)) for i in shards.select(split)) == shards.select()
    shards.verify()


def test_members_decode_to_what_was_encoded(folder: Path) -> None:
    members = ShardFolder(folder).read("a")
    depth = raw_sample.decode_depth(members["depth.npz"], "depth")
    assert depth.shape == (2, 16, 16)
    assert np.isinf(depth).any() and np.isfinite(depth).any()
    again = np.load(io.BytesIO(members["depth.npz"]))
    assert np.abs(depth[np.isfinite(depth)] / again["scale"] - again["depth"][again["depth"] > 0]).max() < 1e-2
    assert raw_sample.decode_webp(members["view_00.webp"], "view").shape == (16, 16, 4)
    np.testing.assert_array_equal(
        raw_sample.decode_webp(members["view_00.webp"], "view"), raw_sample.decode_webp(members["lit_01.webp"], "lit")
    )
    surface = raw_sample.decode_surface(members["surface.npz"], "surface")
    assert (surface["xyz"].dtype, surface["normal"].dtype, surface["rgb"].dtype) == (np.float16, np.int8, np.uint8)
    np.testing.assert_allclose(np.linalg.norm(surface["normal"] / 127.0, axis=1), 1, atol=0.01)


def test_plain_webdataset_reads_them(folder: Path) -> None:
    import webdataset

    shards = ShardFolder(folder)
    urls = [str(folder / shard["name"]) for shard in shards.manifest["shards"]]
    found = {}
    for item in webdataset.WebDataset(urls, shardshuffle=False):
        found[item["__key__"]] = {name: data for name, data in item.items() if not name.startswith("__")}
    assert found == {uid: shards.read(uid) for uid in shards.uids}


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    assert first.hash == second.hash
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_long_uid_survives(tmp_path: Path) -> None:
    import tarfile

    uid = "x" * 180
    folder = write_folder(tmp_path / "raw", ((uid, "b"),))
    assert folder.read(uid) == sample(uid)
    with tarfile.open(tmp_path / "raw" / "shard-00000.tar") as tar:
        assert f"{uid}.json" in tar.getnames()


@pytest.mark.parametrize("uid", ["a.b", "", "../x", "a b", "é"])
def test_a_bad_uid_is_refused(tmp_path: Path, uid: str) -> None:
    with pytest.raises(ValueError, match="uid"), ShardWriter(tmp_path / "shard-00000.tar") as writer:
        writer.write(uid, {"json": b"{}"}, "train")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_an_exception_leaves_the_old_shard_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "raw")
    path = tmp_path / "raw" / "shard-00000.tar"
    before = path.read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(path) as writer:
        writer.write("z", {"json": b"{}"}, "train")
        raise RuntimeError
    assert path.read_bytes() == before
    assert finished_shard(path) is not None
    assert [p.name for p in path.parent.iterdir() if "partial" in p.name] == []


def test_a_finished_shard_is_known_and_an_unfinished_one_is_not(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    info = finished_shard(path)
    assert info is not None and info.samples == 3 and info.bytes == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1024])
    assert finished_shard(path) is None
    index_path(path).unlink()
    assert finished_shard(path) is None
    assert finished_shard(folder / "shard-00009.tar") is None


def test_a_shard_cut_short_is_named(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(UserError, match=rf"shard .*shard-00001\.tar is 1024 bytes, its manifest says {size}"):
        ShardFolder(folder)


def test_a_shard_cut_short_while_open_is_named(folder: Path) -> None:
    shards = ShardFolder(folder)
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(UserError, match="ends inside e"):
        shards.read("e")


def test_a_flipped_bit_is_found(folder: Path) -> None:
    shards = ShardFolder(folder)
    path = folder / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    offset, size = json.loads(index_path(path).read_text())["members"]["b"]["surface.npz"]
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000\.tar differs"):
        shards.verify()
    with pytest.raises(UserError, match=r"b\.surface\.npz is damaged"):
        raw_sample.decode_surface(shards.read("b")["surface.npz"], "b.surface.npz")


def test_a_missing_shard_or_index_is_named(folder: Path) -> None:
    (folder / INDEX).unlink()  # a shard's own index is needed only then
    index_path(folder / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.index\.json does not exist"):
        ShardFolder(folder)
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tar is missing"):
        ShardFolder(folder)


def test_an_index_of_another_shard_is_refused(folder: Path) -> None:
    (folder / INDEX).unlink()
    index = index_path(folder / "shard-00000.tar")
    index.write_text(index.read_text().replace('"sha256":"', '"sha256":"f00'))
    with pytest.raises(UserError, match="belongs to another shard"):
        ShardFolder(folder)


def everything(shards: ShardFolder) -> list:
    return [(uid, shards.splits(i), shards.suffixes(i), shards.read(uid)) for i, uid in enumerate(shards.uids)]


@pytest.mark.parametrize("harm", ["missing", "cut", "of another folder", "of other shards, as long", "not listed"])
def test_without_the_index_of_the_folder_those_of_the_shards_do(tmp_path: Path, harm: str) -> None:
    """One shard has a sample with fewer members, and one more split, than the others."""
    begin_folder(tmp_path / "raw", format=RAW_FORMAT, settings=SETTINGS)
    infos = []
    for number, uids in enumerate((("b", "a"), ("c-1", "much-longer"))):
        with ShardWriter(tmp_path / "raw" / f"shard-{number:05d}.tar") as writer:
            for uid in uids:
                members = sample(uid)
                if uid == "c-1":
                    del members["depth.npz"]
                writer.write(uid, members, "rare" if uid == "a" else "train")
        infos.append(writer.info)
    write_manifest(tmp_path / "raw", format=RAW_FORMAT, settings=SETTINGS, shards=infos, counts={})
    before = everything(ShardFolder(tmp_path / "raw"))
    assert [names.count("depth.npz") for _, _, names, _ in before] == [1, 1, 0, 1]
    assert [split for _, split, *_ in before] == ["train", "rare", "train", "train"]
    path, manifest = tmp_path / "raw" / INDEX, tmp_path / "raw" / "manifest.json"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif harm == "of another folder":
        write_folder(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / INDEX).read_bytes())
    elif harm == "of other shards, as long":
        path.write_bytes(path.read_bytes()[:-64] + b"0" * 64)
    else:
        fields = json.loads(manifest.read_text())
        del fields["index"]
        manifest.write_text(json.dumps(fields))
    assert everything(ShardFolder(tmp_path / "raw")) == before


def test_opening_reads_no_index_of_a_shard(folder: Path) -> None:
    before = everything(ShardFolder(folder))
    for path in folder.glob("*.index.json"):
        path.unlink()
    shards = ShardFolder(folder)
    assert everything(shards) == before and shards.uid(3) == "d_2"
    assert shards.sizes("a") == {name: len(data) for name, data in sample("a").items()}
    assert shards.has("view_") and not shards.has("latent")
    assert shards.where("nowhere").tolist() == [] and shards.where().tolist() == [0, 1, 2, 3, 4]


def test_a_uid_in_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a uid twice"):
        write_folder(tmp_path / "raw", (("a", "b"), ("c", "a")))


def test_wrong_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="not a folder of shards"):
        ShardFolder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no manifest\.json: is it a folder of shards"):
        ShardFolder(tmp_path / "empty")
    with pytest.raises(UserError, match="'format' must be 'shapeloom-latent/1', got 'shapeloom-raw/1'"):
        ShardFolder(folder, format="shapeloom-latent/1")
    begin_folder(tmp_path / "begun", format=RAW_FORMAT, settings=SETTINGS)
    with pytest.raises(UserError, match="unfinished"):
        ShardFolder(tmp_path / "begun")
    with pytest.raises(UserError, match="no split 'nowhere'"):
        ShardFolder(folder).select("nowhere")
    with pytest.raises(UserError, match="no sample 'zz'"):
        ShardFolder(folder).read("zz")
    with pytest.raises(UserError, match=r"a in .* has no latent\.npy"):
        ShardFolder(folder).read("a", ["latent.npy"])


def test_an_output_folder_is_claimed_once(tmp_path: Path, folder: Path) -> None:
    begin_folder(folder, format=RAW_FORMAT, settings=SETTINGS)  # the same again: goes on
    ShardFolder(folder)
    with pytest.raises(UserError, match="other settings .seed 0 there, 1 asked"):
        begin_folder(folder, format=RAW_FORMAT, settings={**SETTINGS, "seed": 1})
    with pytest.raises(UserError, match="another format"):
        begin_folder(folder, format="other/1", settings=SETTINGS)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(UserError, match="not empty"):
        begin_folder(tmp_path / "photos", format=RAW_FORMAT, settings=SETTINGS)
    with pytest.raises(UserError, match="is a file"):
        begin_folder(tmp_path / "photos" / "me.jpg", format=RAW_FORMAT, settings=SETTINGS)


def test_splits_by_uid_have_the_stated_shares() -> None:
    splits = [split_of(f"asset-{i}") for i in range(4000)]
    shares = [splits.count(name) / len(splits) for name in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.02)
    assert split_of("asset-1") == split_of("asset-1")


@pytest.mark.parametrize("kept", [[], None, "x", {"of": 1}, {"bytes": 3, "of": "x"}])
def test_an_index_that_the_manifest_knows_nothing_of_is_not_needed(folder: Path, kept: object) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**fields, "index": kept}))
    assert ShardFolder(folder).uids == ["b", "a", "c-1", "d_2", "e"]


def test_an_index_of_objects_is_not_read_as_addresses(folder: Path) -> None:
    path = folder / "index.bin"
    data = path.read_bytes()
    assert data.count(b"'<i8'") == 2
    path.write_bytes(data.replace(b"'<i8'", b"'|O' "))
    assert ShardFolder(folder).uids == ["b", "a", "c-1", "d_2", "e"]  # by the shards' own
