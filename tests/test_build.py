"""From a folder of 3D files to shards: what is written, what is refused, and what survives trouble."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes import executors
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.captions import caption_from_name, read_captions
from shapeloom.data_pipes.ledger import new_uids
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.workers import Failed, isolated_map
from shapeloom.errors import UserError

SMALL = BuildSettings(n_surface=64, n_near=32, n_uniform=32, n_views=2, image_size=16, shard_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five good files of several formats, one of them in a subfolder, and a broken one among them."""
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    for name, shape in (
        ("a_box.glb", trimesh.creation.box()),
        ("RedBall2.obj", trimesh.creation.icosphere(1)),
        ("cone.ply", trimesh.creation.cone(1, 2)),
        ("sub/a_box.stl", trimesh.creation.cylinder(1, 1)),
        ("torus.gltf", None),
    ):
        if shape is not None:
            shape.export(folder / name)
    for name, data in trimesh.creation.torus(1, 0.3).scene().export(file_type="gltf").items():
        (folder / ("torus.gltf" if name.endswith(".gltf") else name)).write_bytes(data)
    (folder / "broken.glb").write_bytes((folder / "a_box.glb").read_bytes()[:-100])
    (folder / "notes.txt").write_text("not 3D")
    return folder


def hashes(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_good_files_are_built_and_the_broken_one_is_set_aside(folder: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text(
        "file,caption,caption_color,licence,author\n"
        'a_box.glb,a box,"a box, grey",CC0-1.0,Ann\n'
        "a_box.glb,a cube,,,\n"
        "./cone.ply,a cone,,CC-BY-4.0,Bob\n"
    )
    report = build(folder, tmp_path / "raw", captions, SMALL)
    assert (report.files, report.samples, report.captions_from_names) == (6, 5, 3)
    assert report.rejected == 1
    assert "5 of 6 files" in str(report) and "3 captions were made of file names" in str(report)
    assert "1 because it is cut short" in str(report)
    (entry,) = rejected(tmp_path / "raw")
    assert entry["file"] == "broken.glb" and "cut short" in entry["reason"]

    shards = ShardFolder(tmp_path / "raw")
    shards.verify()
    metas = {meta["file"]: meta for meta in map(shards.read_json, range(len(shards)))}
    assert metas["a_box.glb"]["captions"] == ["a box", "a box, grey", "a cube"]
    assert metas["RedBall2.obj"]["captions"] == ["red ball 2"] and metas["RedBall2.obj"]["caption_from_name"]
    assert metas["sub/a_box.stl"]["uid"] == "sub__a_box" and len(set(shards.uids)) == 5
    assert metas["a_box.glb"]["sha256"] == hashlib.sha256((folder / "a_box.glb").read_bytes()).hexdigest()
    assert np.array(metas["sub/a_box.stl"]["transform"])[:3, :3] == pytest.approx(np.eye(3) * 2 / 1.8)
    members = shards.suffixes("a_box")
    assert {"surface.npz", "field.npz", "view_01.webp", "lit_00.webp", "depth.npz", "cameras.json"} <= set(members)
    with open(tmp_path / "raw" / "attribution.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert rows["cone.ply"]["licence"] == "CC-BY-4.0" and rows["a_box.glb"]["author"] == "Ann" and len(rows) == 5


def test_bytes_do_not_depend_on_workers_nor_on_an_interruption(folder: Path, tmp_path: Path, monkeypatch) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    build(folder, whole, settings=SMALL, workers=1)

    real, made = executors._make_shard, []

    def stop_after_one(*args):
        if made:
            raise KeyboardInterrupt
        made.append(real(*args))

    monkeypatch.setattr(executors, "_make_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        build(folder, again, settings=SMALL, workers=2)
    monkeypatch.setattr(executors, "_make_shard", real)
    with pytest.raises(UserError, match="unfinished"):
        ShardFolder(again)
    kept = (again / "shard-00000.tar").stat().st_mtime_ns
    report = build(folder, again, settings=SMALL, workers=2)
    assert report.kept_shards == 1 and (again / "shard-00000.tar").stat().st_mtime_ns == kept
    assert hashes(whole) == hashes(again)
    assert build(folder, whole, settings=SMALL).made == 0  # a finished one is only read again
    assert hashes(whole) == hashes(again)


def test_a_damaged_shard_is_made_again(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "raw", settings=SMALL)
    before = hashes(tmp_path / "raw")
    shard = tmp_path / "raw" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    build(folder, tmp_path / "raw", settings=SMALL)
    assert hashes(tmp_path / "raw") == before


def test_lit_views_and_points_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "a", settings=SMALL.model_copy(update={"lit": False}), limit=2)
    folder_a = ShardFolder(tmp_path / "a")
    assert not any(suffix.startswith("lit") for suffix in folder_a.suffixes(0)) and len(folder_a) <= 2
    build(folder, tmp_path / "b", settings=SMALL.model_copy(update={"n_views": 0}))
    assert set(ShardFolder(tmp_path / "b").suffixes(0)) == {"json", "surface.npz", "field.npz"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", "does not exist"),
        (lambda f: f / "notes.txt", "is a file"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "has no 3D files"),
    ],
)
def test_a_wrong_folder_is_named(folder: Path, tmp_path: Path, make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(make(folder), tmp_path / "raw", settings=SMALL)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("file,captoin\na_box.glb,x\n", "no column 'caption'.*is 'captoin' meant"),
        ("path,caption\na_box.glb,x\n", "no column 'file' .it has path, caption"),
        ("file,caption,lisence\na_box.glb,x,y\n", "rename it to 'li[cs]en[cs]e'"),
        ("file,caption\na_bx.glb,y\n", "line 2: there is no 3D file 'a_bx.glb'.*nearest is 'a_box.glb'"),
        ("file,caption\na_box.glb,x,y\n", "line 2: 3 values for 2 columns"),
        ('file,caption\na_box.glb,"x\n', "not valid CSV"),
    ],
)
def test_a_wrong_captions_file_is_refused_with_its_place(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        build(folder, tmp_path / "raw", captions, SMALL)
    assert "captions.csv" in str(caught.value) and not (tmp_path / "raw").exists()


def test_other_wrong_captions_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / "none.csv", [])
    (tmp_path / "a.csv").write_bytes("file,caption\na.glb,Würfel\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_captions(tmp_path / "a.csv", ["a.glb"])
    (tmp_path / "a.csv").write_bytes("\ufefffile;caption\na.glb;x\n".encode())
    with pytest.raises(UserError, match="has ';' between its columns: save it again with commas"):
        read_captions(tmp_path / "a.csv", ["a.glb"])


def test_an_output_that_holds_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        build(folder, out, settings=SMALL)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    build(folder, tmp_path / "other", settings=SMALL)
    with pytest.raises(UserError, match="image_size"):
        build(folder, tmp_path / "other", settings=SMALL.model_copy(update={"image_size": 8}))


def test_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.glb").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 files .* because it is empty"):
        build(tmp_path / "m", tmp_path / "raw", settings=SMALL)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("kaykit_adventurers_arrow_bundle.glb", "kaykit adventurers arrow bundle"),
        ("props/OldBarrel02.v2.glb", "old barrel 02 v 2"),
        ("HTTPServer-box.obj", "http server box"),
        ("Wüstenhaus.glb", "wüstenhaus"),
        ("___.glb", "an object"),
    ],
)
def test_captions_from_names(name: str, caption: str) -> None:
    assert caption_from_name(name) == caption


def test_uids_are_keys_that_never_collide() -> None:
    files = ["a/b.glb", "a__b.glb", "a.b.obj", "桶.glb", "箱.glb", "x" * 300 + ".glb"]
    uids = new_uids(files)
    assert len(set(uids.values())) == len(files)
    assert all(set(uid) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(uid) <= 200 for uid in uids.values())
    assert uids["a.b.obj"] == "a_b"


# ------------------------------------------------------------------------------------------------------- workers


def misbehave(job: str) -> str:
    """For a worker: dies, hangs, spins, eats memory or raises, as told."""
    if job == "die":
        os.abort()
    if job == "leave":
        os._exit(3)
    if job == "hang":
        time.sleep(600)
    if job == "spin":
        while True:
            pass
    if job == "eat":
        np.ones(1 << 33)
    if job == "raise":
        raise RuntimeError("on purpose")
    return job.upper()


def test_a_lost_worker_costs_its_own_job_and_no_more() -> None:
    jobs = ["a", "die", "b", "raise", "c", "eat", "leave", "spin", "d"]
    results = list(isolated_map(misbehave, jobs, workers=2, cpu_s=1, wall_s=300, memory_bytes=4 << 30))
    assert [r for r in results if isinstance(r, str)] == ["A", "B", "C", "D"]
    reasons = {job: r.reason for job, r in zip(jobs, results) if isinstance(r, Failed)}
    assert "SIGABRT" in reasons["die"] and "exit code 3" in reasons["leave"]
    assert "1 s of processor time" in reasons["spin"]
    assert "on purpose" in reasons["raise"] and "memory" in reasons["eat"]
    # Alone, since a busy machine might take another job's second away.
    (hung,) = isolated_map(misbehave, ["hang"], workers=2, cpu_s=60, wall_s=1, memory_bytes=4 << 30)
    assert hung == Failed("it took longer than 1 s")


def test_a_file_whose_worker_is_lost_is_set_aside(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def lose_one(function, jobs, **_):
        return (Failed("it took too long") if job.file == "cone.ply" else function(job) for job in jobs)

    monkeypatch.setattr(executors, "isolated_map", lose_one)
    report = build(folder, tmp_path / "raw", settings=SMALL)
    reasons = {entry["file"]: entry["reason"] for entry in rejected(tmp_path / "raw")}
    assert reasons["cone.ply"] == "it took too long" and len(reasons) == 2 and report.samples == 4
    assert report.reasons["it took too long"] == 1
