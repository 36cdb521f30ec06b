"""A disk that is full at any moment, and an output folder that holds another dataset: nothing already made is lost."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trimesh

from shapeloom.data_pipes import executors
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.shards import MANIFEST, finished_shard
from shapeloom.data_pipes.verify import verify
from shapeloom.errors import UserError, sentence_of
from shapeloom.files import ASIDE, sha256_file

PROCEDURAL = ProceduralSettings(count=6, n_surface=20, n_near=10, n_uniform=10, n_views=1, image_size=8, shard_size=2)
BUILD = BuildSettings(n_surface=16, n_near=4, n_uniform=4, n_views=0, shard_size=2)
PAGE = 4096  # what a tmpfs counts in


class SmallDisk:
    """A tmpfs whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, pages: int) -> None:
        mount("-o", f"remount,size={pages * PAGE}", str(self.folder))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={PAGE}", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for i in range(5):
        trimesh.creation.box(extents=(1, 1, 1 + i)).export(folder / f"box{i}.ply")
    (folder / "broken.ply").write_bytes(b"ply")
    return folder


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(params=["procedural", "build"])
def make(request: pytest.FixtureRequest, models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Makes a dataset in a folder, in this process."""
    if request.param == "procedural":
        return lambda out: generate(out, PROCEDURAL)
    monkeypatch.setattr(executors, "isolated_map", lambda function, jobs, **_: map(function, jobs))
    return lambda out: build(models, out, settings=BUILD)


def test_whenever_the_disk_is_full_finished_shards_stay_and_the_next_run_goes_on(
    disk: SmallDisk, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "whole")
    wanted = hashes(tmp_path / "whole")
    failures, kept = 0, set()
    for pages in range(1, 200):  # one more each time, so that every write is the one that does not fit
        disk.resize(pages)
        out = disk.folder / f"raw{pages}"
        try:
            make(out)
        except OSError as full:
            failures += 1
            assert full.errno == errno.ENOSPC
            sentence = sentence_of(full, [])
            assert sentence is not None and sentence.startswith("the disk is full") and "start the same" in sentence
        else:
            assert hashes(out) == wanted
            break
        assert not list(out.rglob(f"*{ASIDE}*")), "what did not fit must not go on taking room"
        finished = {path.name: sha256_file(path) for path in out.glob("*.tar") if finished_shard(path)}
        assert finished.items() <= wanted.items()
        times = {name: (out / name).stat().st_mtime_ns for name in finished}
        kept.add(len(finished))
        disk.resize(1000)
        make(out)
        assert hashes(out) == wanted
        assert times == {name: (out / name).stat().st_mtime_ns for name in finished}, "made again"
        shutil.rmtree(out)
    assert failures > 10 and kept == {0, 1, 2, 3}


def test_the_command_says_it_in_one_sentence(disk: SmallDisk, cli) -> None:
    disk.resize(100)
    out = disk.folder / "raw"
    words = ["data", "procedural", "--out", out, "--count", 8, "--workers", 2, "shard_size=2"]
    done = cli(*words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "ignored" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: the disk is full ({out}/shard-0000"), done.stderr
    disk.resize(2000)
    again = cli(*words)
    assert again.returncode == 0, again.stderr
    assert verify(out).faults == ()


def test_a_folder_of_another_dataset_is_left_as_it_is(models: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    build(models, ours, settings=BUILD)
    generate(theirs, PROCEDURAL)
    before = hashes(tmp_path)
    for other in (
        lambda: generate(ours, PROCEDURAL),
        lambda: build(models, theirs, settings=BUILD),
    ):
        with pytest.raises(UserError, match="made with other settings .by another command.: give another output"):
            other()
    with pytest.raises(UserError, match="made with other settings .count 6 there, 7 asked"):
        generate(theirs, PROCEDURAL.model_copy(update={"count": 7}))
    (theirs / MANIFEST).rename(tmp_path / MANIFEST)
    with pytest.raises(UserError, match=f"is not empty and has no {MANIFEST}"):
        generate(theirs, PROCEDURAL)
    (tmp_path / MANIFEST).rename(theirs / MANIFEST)
    assert hashes(tmp_path) == before
