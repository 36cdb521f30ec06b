"""`data verify` names every fault: of the folder, of its shards, of its samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shapeloom.data_pipes.index import INDEX
from shapeloom.data_pipes.latents import LatentSample, encode_latent_sample
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.raw_sample import encode_npz, encode_webp
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import LATENT_FORMAT, MANIFEST, ShardWriter, begin_folder, write_manifest
from shapeloom.data_pipes.verify import verify
from shapeloom.errors import UserError
from shapeloom.launch.cli import app

SETTINGS = ProceduralSettings(
    level="core", count=5, n_surface=20, n_near=10, n_uniform=10, n_views=2, image_size=16, shard_size=2
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a folder of three raw shards, made once."""
    out = tmp_path_factory.mktemp("whole") / "raw"
    generate(out, SETTINGS)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def raw(whole: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    for name, data in whole.items():
        (tmp_path / "raw" / name).write_bytes(data)
    return tmp_path / "raw"


def place(raw: Path, shard: int, sample: int, suffix: str) -> tuple[str, int, int]:
    """uid, offset and size of a member."""
    members = json.loads((raw / f"shard-{shard:05d}.index.json").read_text())["members"]
    uid = list(members)[sample]
    return uid, *members[uid][suffix]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_latents(out: Path, latents: list[np.ndarray]) -> Path:
    begin_folder(out, format=LATENT_FORMAT, settings={"features": "cached"})
    text = (np.ones((2, 3, 4)), np.ones(2), np.ones((2, 4)))
    with ShardWriter(out / "shard-00000.tar") as writer:
        for i, latent in enumerate(latents):
            sample = LatentSample(f"s{i}", latent, *text, np.ones((1, 3, 4)), np.ones((1, 4)))
            writer.write(sample.uid, encode_latent_sample(sample, {"uid": sample.uid, "captions": ["a"]}), "train")
    assert writer.info is not None
    counts = {"samples": len(latents), "rejected": 0}
    write_manifest(out, format=LATENT_FORMAT, settings={"features": "cached"}, shards=[writer.info], counts=counts)
    return out


def test_whole_folders_have_no_faults(raw: Path, tmp_path: Path) -> None:
    verified = verify(raw)
    assert (verified.faults, verified.samples, verified.shards) == ((), 5, 3)
    assert verified.bytes == sum(path.stat().st_size for path in raw.glob("*.tar"))
    assert f"{raw} is whole: 5 samples in 3 shards" in str(verified)
    assert verify(write_latents(tmp_path / "latents", [np.ones((2, 3))] * 2)).faults == ()


def test_names_longer_than_a_tar_header_are_no_fault(tmp_path: Path) -> None:
    begin_folder(tmp_path / "raw", format=LATENT_FORMAT, settings={})
    with ShardWriter(tmp_path / "raw" / "shard-00000.tar") as writer:
        for uid in ("a" * 200, "b" * 96, "c" * 95, "d"):
            writer.write(uid, {"json": b"{}"}, "train")
    assert writer.info is not None
    with tarfile.open(tmp_path / "raw" / writer.name) as tar:
        assert tar.getnames()[0] == "a" * 200 + ".json"
    write_manifest(
        tmp_path / "raw", format=LATENT_FORMAT, settings={}, shards=[writer.info], counts={"samples": 4, "train": 4}
    )
    assert verify(tmp_path / "raw").faults == ()


def test_every_fault_is_told_not_only_the_first(raw: Path) -> None:
    surface, at, size = place(raw, 0, 1, "surface.npz")
    flip(raw / "shard-00000.tar", at + size // 2)
    lost, picture, _ = place(raw, 1, 1, "view_00.webp")
    shard = raw / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[: picture + 10])
    (raw / "shard-00002.index.json").unlink()

    faults = verify(raw).faults
    (changed, member, cut, missing) = faults
    assert "shard-00000.tar" in changed and "sha256" in changed
    assert f"shard-00000.tar, {surface}.surface.npz at byte {at}" in member and "damaged" in member
    assert f"shard-00001.tar: it is cut short at byte {picture + 10}" in cut
    assert f"in {lost}.view_00.webp; 1 sample(s) are lost" in cut
    assert "shard-00002.index.json" in missing and "does not exist" in missing


@pytest.mark.parametrize("suffix", ["json", "cameras.json", "surface.npz", "field.npz", "depth.npz", "view_01.webp"])
def test_a_member_that_is_overwritten_is_named(raw: Path, suffix: str) -> None:
    uid, at, size = place(raw, 1, 0, suffix)
    with open(raw / "shard-00001.tar", "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * min(size, 40))
    faults = verify(raw).faults
    assert len(faults) == 2 and f"{uid}.{suffix} at byte {at}" in faults[1], faults


def test_any_flipped_bit_is_told_of_its_shard_and_raises_nothing(raw: Path, whole: dict[str, bytes]) -> None:
    rng = np.random.default_rng(0)
    shard = raw / "shard-00002.tar"  # of one sample, so that it is quick
    data, located = whole[shard.name], 0
    for offset, bit in zip(rng.integers(0, len(data), 150), rng.integers(0, 8, 150)):
        flip(shard, int(offset), int(bit))
        faults = verify(raw).faults
        assert faults and all("shard-00002" in fault for fault in faults), (offset, bit, faults)
        located += len(faults) > 1
        shard.write_bytes(data)
    assert located == 150


def test_a_sample_that_still_decodes_is_named_where_its_crc_is_known(raw: Path, whole: dict[str, bytes]) -> None:
    uid, at, _ = place(raw, 1, 1, "json")
    shard, index = raw / "shard-00001.tar", raw / "shard-00001.index.json"
    flip(shard, whole[shard.name].index(b'"captions":["', at) + 14)
    changed, sample = verify(raw).faults
    assert "sha256" in changed and sample.startswith(f"shard-00001.tar, {uid}: bytes {at} to ")
    before_there_were_any = json.loads(index.read_text())
    del before_there_were_any["crc32"]
    index.write_text(json.dumps(before_there_were_any))
    assert verify(raw).faults == (changed,)


@pytest.mark.parametrize("name", [MANIFEST, INDEX, "shard-00002.index.json"])
def test_any_flipped_bit_beside_the_shards_raises_nothing_else(raw: Path, whole: dict[str, bytes], name: str) -> None:
    rng = np.random.default_rng(1)
    path, told = raw / name, 0
    for offset, bit in zip(rng.integers(0, len(whole[name]), 60), rng.integers(0, 8, 60)):
        flip(path, int(offset), int(bit))
        try:
            told += bool(verify(raw).faults)
        except UserError:  # no longer the manifest of a folder of shards
            assert name == MANIFEST
            told += 1
        path.write_bytes(whole[name])
    assert told >= (50 if name == MANIFEST else 58)  # the manifest has words for people, which nothing depends on


def test_a_folder_index_whose_header_is_no_python_is_passed_over(raw: Path, whole: dict[str, bytes]) -> None:
    at = whole[INDEX].index(b"}", whole[INDEX].index(b"'shape'"))
    flip(raw / INDEX, at, 3)  # "}" to "u", which the tokenizer does not survive
    assert verify(raw).faults == (f"{INDEX}: it is missing or damaged; delete it, the shards' own indices will serve",)
    assert len(ShardFolder(raw)) == 5


def test_headers_padding_and_the_end_of_the_tar(raw: Path) -> None:
    shard = raw / "shard-00000.tar"
    uid, at, size = place(raw, 0, 0, "json")
    flip(shard, at - 512)
    flip(shard, at + size)
    flip(shard, shard.stat().st_size - 1)
    faults = verify(raw).faults
    assert any(f"{uid}.json: the header at byte {at - 512}" in fault for fault in faults)
    assert any(f"padding after byte {at + size}" in fault for fault in faults)
    assert any("zeros that end a tar" in fault for fault in faults) and len(faults) == 4


def test_a_shard_that_is_missing_or_too_long(raw: Path) -> None:
    (raw / "shard-00000.tar").unlink()
    with open(raw / "shard-00001.tar", "ab") as file:
        file.write(b"more")
    missing, longer = verify(raw).faults
    assert "shard-00000.tar: it cannot be read (No such file" in missing
    assert "shard-00001.tar: it goes on to byte" in longer


def test_indices_splits_and_counts_that_disagree(raw: Path) -> None:
    index = raw / "shard-00000.index.json"
    splits = json.loads(index.read_text())["splits"]
    uid = next(iter(splits))
    edit(index, splits=splits | {uid: "elsewhere"})
    counts = json.loads((raw / MANIFEST).read_text())["counts"]
    edit(raw / MANIFEST, counts=counts | {"samples": 6, "test_gone": 2})
    faults = verify(raw).faults
    assert any(fault.startswith(f"{INDEX}: it does not agree with {index.name}") for fault in faults)
    assert any(f"{uid}.json" in fault and "its index says 'elsewhere'" in fault for fault in faults)
    assert any("samples 6, the shards hold 5" in fault for fault in faults)
    assert any("test_gone 2, the shards hold 0" in fault for fault in faults)
    assert any("elsewhere 0, the shards hold 1" in fault for fault in faults)


def test_an_index_of_another_shard_a_damaged_folder_index_and_changed_settings(raw: Path) -> None:
    (raw / "shard-00000.index.json").write_bytes((raw / "shard-00001.index.json").read_bytes())
    (raw / INDEX).write_bytes(b"")
    edit(raw / MANIFEST, complete=False, settings={"count": 7})
    faults = verify(raw).faults
    assert [fault.partition(":")[0] for fault in faults] == [MANIFEST, MANIFEST, INDEX, "shard-00000.index.json"]
    assert "unfinished" in faults[0] and "settings" in faults[1] and "not of the shard" in faults[3]


def test_members_that_decode_but_cannot_be_right(raw: Path, tmp_path: Path) -> None:
    members = {i: ShardFolder(raw).read(i) for i in range(2)}
    arrays = dict(np.load(io.BytesIO(members[0]["field.npz"])))
    members[0]["field.npz"] = encode_npz(**arrays | {"sdf": arrays["sdf"][:-1]})
    members[1]["field.npz"] = encode_npz(**arrays | {"sdf": np.full_like(arrays["sdf"], np.nan)})
    members[1]["depth.npz"] = encode_npz(depth=np.zeros((1, 16, 16), np.uint16), scale=np.float32(1))
    members[1]["lit_01.webp"] = encode_webp(np.zeros((8, 8, 4), np.uint8))
    del members[1]["view_00.webp"]
    members[1]["json"] = b'{"uid":"other","captions":"a"}'
    out = tmp_path / "other"
    begin_folder(out, format="shapeloom-raw/1", settings={})
    with ShardWriter(out / "shard-00000.tar") as writer:
        for i, of_sample in members.items():
            writer.write(f"u{i}", of_sample | ({} if i else {"json": b"{}"}), "train")
    assert writer.info is not None
    write_manifest(out, format="shapeloom-raw/1", settings={}, shards=[writer.info], counts={"samples": 2})
    faults = verify(out).faults
    for said in (
        "u0.field.npz",
        "arrays differ in length",
        "its sdf is not finite",
        "its uid is 'other'",
        "u1.depth",
        "u1.lit_01.webp",
        "1 pictures",
    ):
        assert any(said in fault for fault in faults), said
    assert any("captions must be a list of texts" in fault for fault in faults) and len(faults) == 7

    latents = write_latents(tmp_path / "latents", [np.ones((2, 3)), np.full((2, 3), np.nan)])
    (fault,) = verify(latents).faults
    assert "s1.latent.npy" in fault and "not finite" in fault


def test_one_uid_in_two_shards(raw: Path) -> None:
    manifest = json.loads((raw / MANIFEST).read_text())
    edit(raw / MANIFEST, shards=[*manifest["shards"], manifest["shards"][2]])
    uid = place(raw, 2, 0, "json")[0]
    assert any(fault.startswith(f"{uid}: there are 2 samples") for fault in verify(raw).faults)


def test_what_is_no_folder_of_shards_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder of shards"):
        verify(tmp_path / "none")
    with pytest.raises(UserError, match="has no manifest.json"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "other"}')
    with pytest.raises(UserError, match="'format' must be"):
        verify(tmp_path)


def test_the_verb_exits_with_1_where_anything_is_wrong(raw: Path) -> None:
    done = CliRunner().invoke(app, ["data", "verify", str(raw)])
    assert done.exit_code == 0 and "is whole: 5 samples" in done.output
    flip(raw / "shard-00000.tar", place(raw, 0, 0, "json")[1] - 512)
    done = CliRunner().invoke(app, ["data", "verify", str(raw)])
    assert done.exit_code == 1 and "the header at byte 0" in done.output and "2 fault(s)" in done.output
