"""Encoding: the same folder whatever the ranks, kills and bad assets; exact statistics; features now or later."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from latent_folders import small_autoencoder, small_clip

from shapeloom.checkpoints.pipeline import load_conditioner
from shapeloom.data_pipes.fingerprint import data_fingerprint
from shapeloom.data_pipes.latents import LatentDataset, LatentSums
from shapeloom.data_pipes.loader import RawDataset
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.raw_sample import decode_npz, encode_npz
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import RAW_FORMAT, ShardWriter, write_manifest
from shapeloom.errors import UserError
from shapeloom.training.denoiser import DenoiserRun, build
from shapeloom.training.encode import EncodeRun, run
from shapeloom.training.features import FeatureSource
from shapeloom.training.ranks import Ranks

SMALL = {"n_surface": 64, "n_near": 8, "n_uniform": 8, "image_size": 32, "shard_size": 7}
COUNT = 24


def harmed(source: ShardFolder, out: Path) -> dict[str, str]:
    """A copy in which some assets, the first among them, are bad; why each is."""
    reasons = {}

    def harm(i: int, uid: str, members: dict[str, bytes]) -> None:
        if i == 0:
            members["lit_00.webp"] = b"no picture" + members["lit_00.webp"]
            reasons[uid] = f"{uid}.lit_00.webp in shard shard-00000.tar is not a WebP image"
        elif i == 3:
            surface = decode_npz(members["surface.npz"], uid)
            surface["xyz"][5] = np.nan
            members["surface.npz"] = encode_npz(**surface)
            reasons[uid] = "its latent is not finite"
        elif i == 8:
            del members["lit_01.webp"]
            reasons[uid] = "its lit views are 1 x 32 x 32 x 4, those of the other assets 2 x 32 x 32 x 4"
        elif i == 9:
            members["surface.npz"] = members["surface.npz"][:-200]
            reasons[uid] = f"{uid}.surface.npz in shard shard-00001.tar is damaged"
        elif i == 10:
            members["json"] = members["json"].replace(b'"captions":[', b'"captions":[],"were":[')
            reasons[uid] = "it has no captions"
        elif i == 11:
            members["json"] = members["json"].replace(b'"split"', b'"splat"')
            reasons[uid] = "its json has no 'split'"

    infos, i = [], 0
    for shard in source.manifest["shards"]:
        with ShardWriter(out / shard["name"]) as writer:
            for _ in range(shard["samples"]):
                uid, members = source.uid(i), source.read(i)
                harm(i, uid, members)
                writer.write(uid, members, source.splits(i))
                i += 1
        infos.append(writer.info)
    write_manifest(out, format=RAW_FORMAT, settings={"harmed": True}, shards=infos, counts={})
    return reasons


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Path:
    """Raw folders `whole` and `raw`, which has the bad assets, and the models."""
    folder = tmp_path_factory.mktemp("encode")
    generate(folder / "whole", ProceduralSettings(count=COUNT, n_views=2, **SMALL))
    reasons = harmed(ShardFolder(folder / "whole"), folder / "raw")
    (folder / "reasons.json").write_text(json.dumps(reasons))
    small_autoencoder().save_pretrained(folder / "autoencoder")
    small_clip().save_pretrained(folder / "clip")
    return folder


def config(at: Path, out: Path, **settings) -> EncodeRun:
    settings = {"data": str(at / "raw"), "shard_size": 5, "batch_size": 3, "n_views": 2, "cpu": True, **settings}
    return EncodeRun(out=str(out), autoencoder=str(at / "autoencoder"), clip=str(at / "clip"), **settings)


@pytest.fixture(scope="module")
def alone(at, tmp_path_factory) -> Path:
    """What one process makes of `raw`."""
    out = tmp_path_factory.mktemp("alone") / "latents"
    run(config(at, out))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_rank(monkeypatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


# --- ranks, kills ----------------------------------------------------------------------------------------------------


FINE = {"shard_size": 1, "batch_size": 1}  # many shards, so that a kill comes among them


def start(at: Path, out: Path) -> subprocess.Popen:
    """`encode` on two real ranks."""
    settings = config(at, out, **FINE).model_dump(exclude={"data", "out"})
    options = [f"{name}={value}" for name, value in settings.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "shapeloom.training.encode"]
    words = [sys.executable, *launcher, "--data", at / "raw", "--out", out, *options]
    return subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_killed_ranks_and_two_more_leave_what_one_does(at, tmp_path):
    run(config(at, tmp_path / "alone", **FINE))
    out = tmp_path / "latents"
    process = start(at, out)
    while not (out / "manifest.json").is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each a session of its own
    while not list(out.glob("*.index.json")):
        time.sleep(0.001)
    for each in (*ranks, process):
        each.kill()
    psutil.wait_procs(ranks, timeout=30)
    process.communicate()
    assert len(ranks) >= 2 and not json.loads((out / "manifest.json").read_text())["complete"]
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert 0 < len(there) < COUNT
    process = start(at, out)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "encode: 18 assets" in said and "6 left out" in said
    assert contents(out) == contents(tmp_path / "alone")
    assert all(path.stat().st_mtime_ns == written for path, written in there.items()), "what was there was kept"


def test_a_lost_rank_is_named_and_the_rest_goes_on(at, alone, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(UserError, match="rank 0 has not begun the folder"):
        run(config(at, out, timeout_minutes=0.01))
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="2 shards are missing, and rank 1 wrote nothing for 0.01 minutes; run encode"):
        run(config(at, out, timeout_minutes=0.01))
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    as_rank(monkeypatch, 1, 2)
    run(config(at, out))
    assert not json.loads((out / "manifest.json").read_text())["complete"], "rank 0 alone writes the manifest"
    as_rank(monkeypatch, 0, 1)
    run(config(at, out))
    assert contents(out) == contents(alone)


@pytest.mark.parametrize("lost", ["shard-00001.tar", "shard-00001.index.json", "shard-00001.sums.json", "index.bin"])
def test_what_is_missing_is_made_again(at, alone, tmp_path, lost):
    out = Path(shutil.copytree(alone, tmp_path / "latents"))
    (out / lost).unlink()
    run(config(at, out))
    assert contents(out) == contents(alone)


def test_ranks_come_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.here() == Ranks(0, 1, 0)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert (Ranks.here().rank, Ranks.here().world) == (3, 4)
    as_rank(monkeypatch, 1, 2)
    assert Ranks.here() == Ranks(1, 2, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="RANK is 1 where WORLD_SIZE is 1"):
        Ranks.here()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="must be numbers"):
        Ranks.here()


# --- bad assets, statistics ------------------------------------------------------------------------------------------


def test_bad_assets_are_left_out_with_the_reason(at, alone):
    rows = [json.loads(line) for line in (alone / "rejected.jsonl").read_text().splitlines()]
    found = {row["uid"]: row["reason"] for row in rows}
    wanted = json.loads((at / "reasons.json").read_text())
    assert found.keys() == wanted.keys() and all(wanted[uid] in found[uid] for uid in wanted)
    kept = [uid for uid in ShardFolder(at / "raw").uids if uid not in wanted]
    assert LatentDataset(alone).shards.uids == kept


def test_statistics_are_those_of_what_is_stored(alone):
    train = LatentDataset(alone, "train")
    stacked = np.concatenate([train[i].latent for i in range(len(train))]).astype(np.float64)
    manifest = train.shards.manifest
    np.testing.assert_allclose(manifest["latent_mean"], stacked.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest["latent_std"], stacked.std(0), rtol=1e-12)


def test_sums_are_exact_in_any_order():
    rng = np.random.default_rng(0)
    latents = [(rng.standard_normal((5, 3)) * 10.0 ** rng.integers(-6, 4)).astype(np.float16) for _ in range(20)]
    latents.append(np.array([[65504, -65504, 6e-8], [-6e-8, 65504, 0]], np.float16))
    one, other = LatentSums(), [LatentSums() for _ in range(4)]
    for k, latent in enumerate(latents):
        one.add(latent)
        other[k % 3].add(latent)
    merged = LatentSums()
    for part in reversed(other):
        merged.merge(LatentSums(**json.loads(json.dumps(vars(part)))))
    assert merged == one
    exact = [[Fraction(float(value)) for value in column] for column in np.concatenate(latents).T]
    mean, std = one.mean_std()
    for c, values in enumerate(exact):
        true = sum(values) / len(values)
        assert mean[c] == float(true)
        assert std[c] == pytest.approx(float(sum((v - true) ** 2 for v in values) / len(values)) ** 0.5, rel=1e-15)


def test_a_folder_of_nothing_good_is_refused(at, tmp_path):
    source, infos = ShardFolder(at / "raw"), []
    with ShardWriter(tmp_path / "raw" / "shard-00000.tar") as writer:
        for i in (0, 9):
            writer.write(source.uid(i), source.read(i), "train")
    infos.append(writer.info)
    write_manifest(tmp_path / "raw", format=RAW_FORMAT, settings={}, shards=infos, counts={})
    with pytest.raises(UserError, match="not one asset can be encoded, the first because .* is not a WebP image"):
        run(config(at, tmp_path / "latents", data=str(tmp_path / "raw")))


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(at, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("computed") / "latents"
    run(config(at, out, features="computed"))
    return out


def stage_batches(at: Path, data: Path, steps: int) -> list[dict[str, torch.Tensor]]:
    model = {"width": 24, "heads": 2, "layers": 1}
    stage = build(DenoiserRun.model_validate({"data": str(data), "batch_size": 6, "max_views": 2, "model": model}))
    return list(stage.batches(0, 1).iterate(0, steps))


def test_computed_features_give_the_batch_of_cached_ones(alone, computed):
    cached, later = LatentDataset(alone, "train"), LatentDataset(computed, "train")
    source = FeatureSource(load_conditioner(computed / "conditioner"))
    stored, bare = ([dataset[i] for i in range(len(dataset))] for dataset in (cached, later))
    assert all(len(s.text_pooled) == 4 and len(s.image_pooled) == 2 for s in bare)
    every = source.fill(bare, [range(4)] * len(bare), [range(2)] * len(bare))
    for one, other in zip(stored, every):
        np.testing.assert_allclose(one.text_pooled, other.text_pooled, atol=2e-3)
        np.testing.assert_allclose(one.image_tokens, other.image_tokens, atol=2e-3, rtol=2e-3)
    assert source.fill(stored, [0], [0]) == stored


def test_training_draws_the_same_batches_from_either(at, alone, computed):
    several_views = 0
    for one, other in zip(stage_batches(at, alone, 4), stage_batches(at, computed, 4), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].shape == other[name].shape, name
            torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=2e-3)
        assert len({tuple(row.tolist()) for row in one["text_pooled"]}) > 3, "captions differ"
        several_views += "views" in one
    assert several_views


def test_only_the_chosen_are_computed(computed):
    dataset = LatentDataset(computed)
    source = FeatureSource(load_conditioner(computed / "conditioner"))
    every = source.fill([dataset[i] for i in range(3)], [range(4)] * 3, [range(2)] * 3)
    asked: list[int] = []
    encode_text = source.conditioner.encode_text
    source.conditioner.encode_text = lambda texts: asked.append(len(texts)) or encode_text(texts)
    texts, images = [3, 0, 2], [[1, 0], [1], []]  # one caption each; several views, one, and none
    some = source.fill([dataset[i] for i in range(3)], texts, images)
    assert asked == [3]
    for b, (k, vs) in enumerate(zip(texts, images)):
        longest = some[b].text_tokens.shape[1]
        np.testing.assert_allclose(some[b].text_tokens[k], every[b].text_tokens[k, :longest], atol=2e-3)
        assert some[b].text_lengths[k] == every[b].text_lengths[k]
        assert not some[b].text_pooled[(k + 1) % 4].any()
        np.testing.assert_allclose(some[b].image_pooled[vs], every[b].image_pooled[vs], atol=2e-3)
        assert some[b].image_tokens.shape == every[b].image_tokens.shape
    first = source.fill([dataset[0]])[0]
    np.testing.assert_allclose(first.text_pooled[0], every[0].text_pooled[0], atol=2e-3)


def test_the_cost_is_said_before(at, tmp_path, capsys):
    for features in ("cached", "computed"):
        run(config(at, tmp_path / features, features=features, data=str(at / "whole")))
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"encode: {COUNT} assets of ") and said[-1].startswith(f"encode: {COUNT} assets in")
        total, unit = re.search(r"([\d.]+) (kB|MB) in all", said[0]).groups()
        stored = sum(path.stat().st_size for path in (tmp_path / features).glob("*.tar"))
        assert float(total) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(stored, rel=0.15)


def test_text_alone_needs_no_views(at, tmp_path):
    generate(tmp_path / "raw", ProceduralSettings(count=6, n_views=0, **SMALL))
    settings = {"data": str(tmp_path / "raw")}
    with pytest.raises(UserError, match="has no lit views to take image features of: build it with n_views=4"):
        run(config(at, tmp_path / "latents", **settings))
    assert not (tmp_path / "latents").exists()
    run(config(at, tmp_path / "latents", n_views=0, **settings))
    sample = LatentDataset(tmp_path / "latents")[0]
    assert sample.has_text and not sample.has_image
    with pytest.raises(UserError, match="with n_captions=0 and n_views=0 there is nothing to condition on"):
        run(config(at, tmp_path / "none", n_views=0, n_captions=0, **settings))


# --- whose latents they are ------------------------------------------------------------------------------------------


def test_a_folder_of_other_latents_is_refused(at, alone, tmp_path):
    before = contents(alone)
    small_autoencoder(seed=1).save_pretrained(tmp_path / "autoencoder")
    small_clip(seed=1).save_pretrained(tmp_path / "clip")
    (tmp_path / "raw").symlink_to(at / "whole")
    for name, what in (
        ("autoencoder", "another autoencoder"),
        ("clip", "another conditioner"),
        ("raw", "other raw data"),
    ):
        other = {"data" if name == "raw" else name: str(tmp_path / name)}
        with pytest.raises(UserError, match=rf"was made with other settings \({what}\): give another output folder"):
            run(config(at, alone).model_copy(update=other))
    with pytest.raises(UserError, match=r"other settings \(n_captions 4 there, 2 asked\)"):
        run(config(at, alone, n_captions=2))
    with pytest.raises(UserError, match="holds data of another format"):
        run(config(at, at / "whole"))
    assert contents(alone) == before


def test_a_fingerprint_is_of_the_data_and_not_of_the_place(at, alone, computed, tmp_path):
    moved = Path(shutil.copytree(alone, tmp_path / "moved"))
    assert data_fingerprint(LatentDataset(alone, "train")) == data_fingerprint(LatentDataset(moved, "train"))
    datasets = [LatentDataset(folder, split) for folder in (alone, computed) for split in ("train", None)]
    datasets += [RawDataset(at / name, split, ("surface",)) for name in ("raw", "whole") for split in ("train", None)]
    assert len({data_fingerprint(dataset) for dataset in datasets}) == len(datasets)
    parts = [data_fingerprint(RawDataset(at / "whole", "train", parts)) for parts in (("surface",), ("lit",))]
    assert parts[0] == parts[1]
