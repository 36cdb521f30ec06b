"""A build run again: only what is new or changed is made, and the result is that of a build from the start."""

from __future__ import annotations

import fcntl
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trimesh

from shapeloom.data_pipes import executors
from shapeloom.data_pipes import find as find_module
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.judging import JudgeSettings
from shapeloom.data_pipes.ledger import Ledger, Make, ShardTask
from shapeloom.data_pipes.licences import LicenceFilter
from shapeloom.data_pipes.limits import Rejected
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.store import LocalStore
from shapeloom.data_pipes.verify import verify
from shapeloom.errors import UserError

SMALL = BuildSettings(n_surface=64, n_near=32, n_uniform=32, n_views=1, image_size=16, shard_size=2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that workers were given since this was last cleared; they work in this process."""
    files: list[str] = []

    def here(function, jobs, **_):
        for job in jobs:
            files.append(job.file)
            yield function(job)

    monkeypatch.setattr(executors, "isolated_map", here)
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five boxes, each of another shape."""
    (tmp_path / "models").mkdir()
    for i in range(5):
        write_box(tmp_path / "models" / f"box{i}.ply", i)
    return tmp_path / "models"


def write_box(path: Path, height: float) -> None:
    trimesh.creation.box(extents=(1, 1, 1 + height)).export(path)


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    shards = ShardFolder(out)
    assert verify(out).faults == ()
    return {shards.uid(i): shards.read(i) for i in range(len(shards))}


def shard_of(out: Path, uid: str) -> str:
    return next(part.shard.name for part in Ledger(LocalStore(out)).finished() for e in part.entries if e.uid == uid)


def test_nothing_new_is_nothing_done(folder: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    assert sorted(made) == [f"box{i}.ply" for i in range(5)]
    made.clear()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}
    report = build(folder, out, settings=SMALL)
    assert made == [] and report.made == 0 and report.kept_shards == 3 and report.samples == 5
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}


def change_nothing(folder: Path) -> None:
    pass


def add(folder: Path) -> None:
    write_box(folder / "apple.ply", 7)
    write_box(folder / "zebra.ply", 8)


def replace(folder: Path) -> None:
    write_box(folder / "box1.ply", 9)


def remove(folder: Path) -> None:
    (folder / "box2.ply").unlink()
    (folder / "box3.ply").unlink()


def rename(folder: Path) -> None:
    (folder / "box0.ply").rename(folder / "cube.ply")


def touch(folder: Path) -> None:
    os.utime(folder / "box3.ply", (1, 1))


@pytest.mark.parametrize(
    ("change", "worked_on"),
    [
        (change_nothing, []),
        (add, ["apple.ply", "zebra.ply"]),
        (replace, ["box1.ply"]),
        (remove, []),
        (rename, ["cube.ply"]),
        (touch, ["box3.ply"]),
    ],
)
def test_a_changed_folder_gives_the_samples_that_a_new_build_would(
    folder: Path, tmp_path: Path, made: list[str], change: Callable[[Path], None], worked_on: list[str]
) -> None:
    build(folder, tmp_path / "raw", settings=SMALL)
    made.clear()
    change(folder)
    report = build(folder, tmp_path / "raw", settings=SMALL)
    assert sorted(made) == worked_on
    fresh = build(folder, tmp_path / "fresh", settings=SMALL)
    assert samples(tmp_path / "raw") == samples(tmp_path / "fresh")
    assert (report.samples, report.splits) == (fresh.samples, fresh.splits)
    made.clear()
    assert build(folder, tmp_path / "raw", settings=SMALL).made == 0 and made == []


def test_new_files_fill_the_last_shard_and_older_shards_stay(folder: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    old = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-0000[01].tar")}
    add(folder)
    report = build(folder, out, settings=SMALL)
    assert report.kept_shards == 2 and len(list(out.glob("*.tar"))) == 4
    assert shard_of(out, "apple") == shard_of(out, "box4") == "shard-00002.tar"
    assert old == {name: (out / name).stat().st_mtime_ns for name in old}


def test_a_file_it_names_counts_as_part_of_a_file(folder: Path, tmp_path: Path, made: list[str]) -> None:
    (folder / "red.obj").write_text("mtllib red.mtl\nusemtl a\nv 0 0 0\nv 1 0 0\nv 0 1 1\nv 1 1 0\nf 1 2 3\nf 2 4 3\n")
    build(folder, tmp_path / "raw", settings=SMALL)
    made.clear()
    (folder / "red.mtl").write_text("newmtl a\nKd 1 0 0\n")
    build(folder, tmp_path / "raw", settings=SMALL)
    assert made == ["red.obj"]
    (folder / "red.mtl").write_text("newmtl a\nKd 0 0 1\n")
    build(folder, tmp_path / "raw", settings=SMALL)
    assert made == ["red.obj"] * 2
    build(folder, tmp_path / "raw", settings=SMALL)
    assert made == ["red.obj"] * 2


def test_other_words_change_the_json_alone(folder: Path, tmp_path: Path, made: list[str]) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption,licence\nbox0.ply,a box,CC0-1.0\n")
    build(folder, tmp_path / "raw", captions, SMALL)
    made.clear()
    captions.write_text("file,caption,licence\nbox0.ply,a cube,CC-BY-4.0\nbox3.ply,tall,CC0-1.0\n")
    report = build(folder, tmp_path / "raw", captions, SMALL)
    assert made == [] and report.captions_from_names == 3 and report.kept_shards == 1
    build(folder, tmp_path / "fresh", captions, SMALL)
    assert samples(tmp_path / "raw") == samples(tmp_path / "fresh")
    assert "CC-BY-4.0" in (tmp_path / "raw" / "attribution.csv").read_text()


def test_a_licence_that_is_no_longer_allowed_takes_the_sample_out(
    folder: Path, tmp_path: Path, made: list[str]
) -> None:
    captions = tmp_path / "captions.csv"
    rows = "".join(f"box{i}.ply,a box,CC0-1.0\n" for i in range(4))
    captions.write_text("file,caption,licence\n" + rows + "box4.ply,a box,CC0-1.0\n")
    free = LicenceFilter(allow=("CC0-1.0",))
    build(folder, tmp_path / "raw", captions, SMALL, licences=free)
    captions.write_text("file,caption,licence\n" + rows + "box4.ply,a box,CC-BY-NC-4.0\n")
    report = build(folder, tmp_path / "raw", captions, SMALL, licences=free)
    assert set(samples(tmp_path / "raw")) == {f"box{i}" for i in range(4)} and report.rejected == 1
    captions.write_text("file,caption,licence\n" + rows + "box4.ply,a box,CC0-1.0\n")
    assert build(folder, tmp_path / "raw", captions, SMALL, licences=free).samples == 5


def test_rejected_files_are_tried_again_when_they_change_or_when_asked(
    folder: Path, tmp_path: Path, made: list[str]
) -> None:
    (folder / "broken.ply").write_bytes(b"ply")
    assert build(folder, tmp_path / "raw", settings=SMALL).rejected == 1
    made.clear()
    build(folder, tmp_path / "raw", settings=SMALL)
    assert made == []
    build(folder, tmp_path / "raw", settings=SMALL, retry=True)
    assert made == ["broken.ply"]
    write_box(folder / "broken.ply", 11)
    assert build(folder, tmp_path / "raw", settings=SMALL).rejected == 0 and "broken" in samples(tmp_path / "raw")


def test_an_update_that_is_stopped_goes_on(folder: Path, tmp_path: Path, made: list[str], monkeypatch) -> None:
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    add(folder)
    replace(folder)
    real = executors._make_shard

    def stop(task, *rest):
        if task.number > 0:
            raise KeyboardInterrupt
        real(task, *rest)

    monkeypatch.setattr(executors, "_make_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        build(folder, out, settings=SMALL)
    with pytest.raises(UserError, match="unfinished"):
        ShardFolder(out)
    monkeypatch.setattr(executors, "_make_shard", real)
    made.clear()
    build(folder, out, settings=SMALL)
    assert sorted(made) == ["apple.ply", "zebra.ply"]
    build(folder, tmp_path / "fresh", settings=SMALL)
    assert samples(out) == samples(tmp_path / "fresh")


def test_adding_a_file_of_the_same_name_moves_no_uid(folder: Path, tmp_path: Path, made: list[str]) -> None:
    build(folder, tmp_path / "raw", settings=SMALL)
    trimesh.creation.icosphere(1).export(folder / "box0.off")
    build(folder, tmp_path / "raw", settings=SMALL)
    metas = [json.loads(members["json"]) for members in samples(tmp_path / "raw").values()]
    uids = {meta["file"]: meta["uid"] for meta in metas}
    assert uids["box0.ply"] == "box0" and uids["box0.off"].startswith("box0-")


def test_a_copy_is_told_of_and_can_be_left_out(folder: Path, tmp_path: Path, made: list[str]) -> None:
    again = trimesh.load(folder / "box2.ply")
    again.apply_transform(trimesh.transformations.rotation_matrix(0.7, (1, 2, 3)) * 1.0)
    again.export(folder / "other.stl")
    report = build(folder, tmp_path / "raw", settings=SMALL)
    assert report.samples == 6 and report.duplicates == 1 and "same object as another" in str(report)
    (line,) = (tmp_path / "raw" / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file": "other.stl", "uid": "other", "of": "box2.ply", "same": "shape and colours"}

    strict = SMALL.model_copy(update={"judge": JudgeSettings(reject=("duplicate",))})
    report = build(folder, tmp_path / "strict", settings=strict)
    assert report.samples == 5 and report.reasons == {"it is the same object as …": 1}
    assert "other" not in samples(tmp_path / "strict")
    made.clear()
    assert build(folder, tmp_path / "strict", settings=strict).samples == 5 and made == []
    (folder / "box2.ply").unlink()
    report = build(folder, tmp_path / "strict", settings=strict)
    assert made == ["other.stl"] and "other" in samples(tmp_path / "strict")


def test_what_the_judge_rejects_is_kept_as_a_picture(folder: Path, tmp_path: Path, made: list[str]) -> None:
    parts = [trimesh.creation.box(), trimesh.creation.box().apply_translation((5, 0, 0))]
    trimesh.util.concatenate(parts).export(folder / "pair.ply")
    strict = SMALL.model_copy(update={"judge": JudgeSettings(reject=("apart",))})
    build(folder, tmp_path / "raw", settings=strict)
    (line,) = (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()
    picture = tmp_path / "raw" / json.loads(line)["picture"]
    assert picture.read_bytes()[8:12] == b"WEBP"
    (folder / "pair.ply").unlink()
    build(folder, tmp_path / "raw", settings=strict)
    assert not picture.exists()


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    folder: Path, tmp_path: Path, made: list[str], monkeypatch
) -> None:
    (folder / "sub").mkdir()
    write_box(folder / "sub" / "box.ply", 3.5)
    build(folder, tmp_path / "raw", settings=SMALL)
    before = samples(tmp_path / "raw")
    real = os.scandir

    def broken(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(UserError, match="sub cannot be listed"):
        build(folder, tmp_path / "raw", settings=SMALL)
    monkeypatch.setattr(os, "scandir", real)
    assert samples(tmp_path / "raw") == before


def test_an_archive_that_cannot_be_unpacked_now_keeps_its_samples(
    folder: Path, tmp_path: Path, made: list[str], monkeypatch
) -> None:
    write_box(tmp_path / "packed.ply", 12)
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(tmp_path / "packed.ply", "packed.ply")
    build(folder, tmp_path / "raw", settings=SMALL)
    before = samples(tmp_path / "raw")
    assert "a_tar__packed" in before
    no_room = Rejected("there is no room to unpack it", "set TMPDIR", kind="unavailable")
    monkeypatch.setattr(find_module, "isolated_map", lambda function, jobs, **_: [no_room for _ in jobs])
    report = build(folder, tmp_path / "raw", settings=SMALL)
    assert report.rejected == 1 and samples(tmp_path / "raw") == before
    monkeypatch.undo()
    assert build(folder, tmp_path / "raw", settings=SMALL).rejected == 0 and samples(tmp_path / "raw") == before


def test_a_limit_keeps_what_was_built_and_picks_the_same_whatever_is_added(
    folder: Path, tmp_path: Path, made: list[str]
) -> None:
    build(folder, tmp_path / "three", settings=SMALL, limit=3)
    chosen = set(made)
    assert len(chosen) == 3
    for i in range(20):
        write_box(folder / f"more{i}.ply", 20 + i)
    made.clear()
    assert build(folder, tmp_path / "three", settings=SMALL, limit=3).samples == 3 and made == []
    build(folder, tmp_path / "three", settings=SMALL, limit=6)
    assert len(made) == 3 and not chosen & set(made)
    assert build(folder, tmp_path / "three", settings=SMALL, limit=1).samples == 6  # nothing is lost by a trial


def test_a_name_that_is_no_text_is_rejected_and_the_rest_goes_on(folder: Path, tmp_path: Path, made: list[str]) -> None:
    os.rename(folder / "box0.ply", os.fsencode(folder) + b"/caf\xe9.ply")
    assert build(folder, tmp_path / "raw", settings=SMALL).samples == 4
    (line,) = (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == r"caf\udce9.ply" and "UTF-8" in json.loads(line)["reason"]
    made.clear()
    assert build(folder, tmp_path / "raw", settings=SMALL).made == 0


def test_two_builds_do_not_write_into_one_folder(folder: Path, tmp_path: Path, made: list[str]) -> None:
    build(folder, tmp_path / "raw", settings=SMALL)
    handle = os.open(tmp_path / "raw", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another build is writing"):
        build(folder, tmp_path / "raw", settings=SMALL)
    os.close(handle)
    build(folder, tmp_path / "raw", settings=SMALL)


def test_what_a_killed_build_left_and_no_later_one_needed_is_removed(
    folder: Path, tmp_path: Path, made: list[str]
) -> None:
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    (out / "shard-00002.index.json").unlink()  # as if it was killed before it came to that
    (folder / "box4.ply").unlink()
    build(folder, out, settings=SMALL)
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-00000.tar", "shard-00001.tar"]
    assert len(list((out / "parts").iterdir())) == 2 and verify(out).faults == ()


def test_a_task_that_is_done_again_finds_its_shard(folder: Path, tmp_path: Path, made: list[str]) -> None:
    build(folder, tmp_path / "raw", settings=SMALL)
    made.clear()
    store = LocalStore(tmp_path / "raw")
    context = executors.Context(store, SMALL, executors.Guard(), LicenceFilter())
    places = find_module.find(folder, None, tmp_path)
    slots = [Make(e.file, e.uid, e.text) for part in Ledger(store).finished() for e in part.entries if part.number == 1]
    executors._make_alone(ShardTask(1, slots), places, context)
    assert made == []
    executors._make_alone(ShardTask(1, slots[:1]), places, context)
    assert made == [slots[0].file]


def test_another_folder_does_not_empty_a_dataset_unasked(folder: Path, tmp_path: Path, made: list[str]) -> None:
    for i in range(5, 12):
        write_box(folder / f"box{i}.ply", i)
    (tmp_path / "other").mkdir()
    write_box(tmp_path / "other" / "lamp.ply", 3)
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    before = samples(out)
    with pytest.raises(UserError, match=r"12 of the 12 assets in .*raw are of files that are not there now.*--prune"):
        build(tmp_path / "other", out, settings=SMALL)
    assert samples(out) == before
    report = build(tmp_path / "other", out, settings=SMALL, prune=True)
    assert report.dropped == 12 and report.made == 1 and "1 new or changed, 12 dropped, as gone" in str(report)
    assert list(samples(out)) == ["lamp"]


def test_what_was_done_is_told_apart(folder: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "raw"
    build(folder, out, settings=SMALL)
    write_box(folder / "box0.ply", 7)
    (folder / "box4.ply").unlink()
    report = build(folder, out, settings=SMALL)
    assert (report.made, report.copied, report.dropped) == (1, 1, 1)
    assert "1 new or changed, 1 copied as they were, 1 dropped, as gone" in str(report)


def test_words_about_a_file_that_is_gone_stop_nothing(
    folder: Path, tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    captions, out = tmp_path / "captions.csv", tmp_path / "raw"
    captions.write_text("file,caption\nbox0.ply,a box\nbox1.ply,another\n")
    build(folder, out, captions, settings=SMALL)
    (folder / "box1.ply").unlink()
    for dropped in (1, 0):
        assert build(folder, out, captions, settings=SMALL).dropped == dropped
        said = capsys.readouterr().err
        assert "passed over: " in said and "captions.csv, line 3: there is no 3D file 'box1.ply'" in said
    captions.write_text("file,caption\nbox0.ply,a box\nbox9.ply,none\nbox1.ply,gone\nbox8.ply,none\n")
    with pytest.raises(UserError, match=r"line 3: there is no 3D file 'box9.ply'.*and 2 more lines name what is not"):
        build(folder, out, captions, settings=SMALL)


def test_files_of_formats_that_are_not_read_are_listed(folder: Path, tmp_path: Path, made: list[str]) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "Chair.FBX").write_bytes(b"Kaydara FBX Binary")
    report = build(folder, tmp_path / "raw", settings=SMALL)
    assert report.samples == 5 and report.rejected == 1
    (entry,) = map(json.loads, (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines())
    assert entry["file"] == "old/Chair.FBX" and entry["reason"] == ".fbx files are not read"
    assert entry["hint"] == "export it as GLB"
