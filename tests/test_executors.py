"""The same build by this machine's processes, by a Ray cluster, and into other places than a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import trimesh

from shapeloom.data_pipes import executors
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.store import LocalStore, RemoteStore, side_by_side, store_at
from shapeloom.data_pipes.verify import verify
from shapeloom.errors import UserError
from shapeloom.files import ASIDE

SMALL = BuildSettings(n_surface=64, n_near=32, n_uniform=32, n_views=1, image_size=16, shard_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files and a broken one, which make three shards."""
    (tmp_path / "models").mkdir()
    for i in range(4):
        trimesh.creation.box(extents=(1, 1, 1 + i)).export(tmp_path / "models" / f"box{i}.ply")
    (tmp_path / "models" / "broken.ply").write_bytes(b"ply")
    return tmp_path / "models"


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "isolated_map", lambda function, jobs, **_: map(function, jobs))


CLUSTER = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real one, of this machine alone, that RAY_ADDRESS names; it ends with the process that holds it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else the token of the process that holds it is needed
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # sockets want short names
        words = [sys.executable, "-c", CLUSTER, short]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin and holder.stdout
            monkeypatch.setenv("RAY_ADDRESS", holder.stdout.readline().strip())
            yield
            holder.stdin.close()
            holder.wait(60)


def test_a_ray_cluster_writes_the_shards_that_this_machine_does(cluster, folder: Path, tmp_path: Path, cli) -> None:
    build(folder, tmp_path / "here", settings=SMALL)
    settings = [f"{key}={getattr(SMALL, key)}" for key in SMALL.model_fields_set]
    words = ["data", "build", folder, "--out", tmp_path / "there", "--executor", "ray", *settings]
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "4 of 5 files built" in done.stdout
    assert hashes(tmp_path / "here") == hashes(tmp_path / "there")
    trimesh.creation.icosphere(1).export(folder / "ball.ply")
    again = cli(*words)
    assert "5 of 6 files built" in again.stdout and "2 shards were there already" in again.stdout, again.stderr


def test_without_a_cluster_ray_is_refused_in_a_sentence(folder: Path, tmp_path: Path, cli) -> None:
    done = cli("data", "build", folder, "--out", tmp_path / "raw", "--executor", "ray", "n_views=0")
    assert done.returncode == 1 and "no Ray cluster was found" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_build_at_a_url_is_the_same(folder: Path, tmp_path: Path, protocol: str, in_this_process: None) -> None:
    build(folder, tmp_path / "here", settings=SMALL)
    url = f"{protocol}://{tmp_path}/there"
    build(folder, url, settings=SMALL)
    fsspec.filesystem(protocol).get(url, str(tmp_path / "copy"), recursive=True)
    assert hashes(tmp_path / "copy") == hashes(tmp_path / "here")
    assert verify(tmp_path / "copy").faults == ()

    trimesh.creation.icosphere(1).export(folder / "ball.ply")
    for out in (url, tmp_path / "here"):
        assert build(folder, out, settings=SMALL).kept_shards == 2
    fsspec.filesystem(protocol).get(url, str(tmp_path / "again"), recursive=True)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "here")
    with pytest.raises(UserError, match="image_size 16 there, 8 asked"):
        build(folder, url, settings=SMALL.model_copy(update={"image_size": 8}))


def test_a_build_at_a_url_that_is_stopped_goes_on(
    folder: Path, tmp_path: Path, in_this_process: None, monkeypatch
) -> None:
    url = f"file://{tmp_path}/there"
    real = RemoteStore.publish

    def breaks(self: RemoteStore, composed: Path, name: str) -> None:
        if name == "shard-00001.tar":
            raise ConnectionResetError("the other side is gone")
        real(self, composed, name)

    monkeypatch.setattr(RemoteStore, "publish", breaks)
    with pytest.raises(ConnectionResetError):
        build(folder, url, settings=SMALL)
    names = {path.name for path in (tmp_path / "there").rglob("*")}
    assert "shard-00000.tar" in names and "shard-00001.tar" not in names and not any(ASIDE in name for name in names)
    assert not json.loads((tmp_path / "there" / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(RemoteStore, "publish", real)
    assert build(folder, url, settings=SMALL).kept_shards == 1
    build(folder, tmp_path / "here", settings=SMALL)
    assert hashes(tmp_path / "there") == hashes(tmp_path / "here")


def test_stores_agree(tmp_path: Path) -> None:
    for store in (
        LocalStore(tmp_path / "a"),
        RemoteStore(f"file://{tmp_path}/b"),
        RemoteStore(f"memory://{tmp_path}/c"),
    ):
        assert store.is_new() and store.sizes() == {} and store.sizes("parts") == {}
        store.delete("nothing")
        with pytest.raises(FileNotFoundError):
            store.read("nothing")
        with pytest.raises(FileNotFoundError), store.local("nothing"):
            pass
        store.write("parts/x.json", "é")
        composed = store.compose("big.tar")
        composed.write_bytes(b"12345")
        assert store.sizes() == {} or isinstance(store, LocalStore)
        store.publish(composed, "big.tar")
        assert not composed.exists() and store.sizes() == {"big.tar": 5} and store.sizes("parts") == {"x.json": 2}
        assert store.read("parts/x.json") == "é".encode() and not store.is_new()
        with store.local("big.tar") as path:
            assert path.read_bytes() == b"12345"
        store.delete("big.tar")
        assert store.sizes() == {}


def test_wrong_urls_are_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="of a kind that is not known"):
        store_at("nosuch://bucket/raw")
    with pytest.raises(UserError, match="pip install .shapeloom.remote"):
        store_at("s3://bucket/raw")


class FarStore(LocalStore):
    at_once = 4


def test_small_files_far_away_are_read_side_by_side_in_order(tmp_path: Path) -> None:
    store, together = FarStore(tmp_path), threading.Barrier(4)  # each waits for as many as are said to be read at once

    def read(n: int) -> int:
        together.wait(timeout=30)
        return n

    assert list(side_by_side(store, read, range(12))) == list(range(12))
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(store, lambda n: 1 // (40 - n), range(100)))
    assert RemoteStore("memory://far").at_once == LocalStore(tmp_path).at_once == 1, "not all bear several at once"


@pytest.mark.parametrize("failures", [1, 99])
def test_what_cannot_be_read_now_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A store that fails once is asked again; one that goes on failing ends the build, and loses nothing."""
    models = tmp_path / "models"
    models.mkdir()
    for k in range(3):
        trimesh.creation.box((1, 1 + k, 1)).export(models / f"m{k}.ply")
    store = RemoteStore(f"memory://{tmp_path}/raw")
    settings = BuildSettings(n_surface=16, n_near=4, n_uniform=4, n_views=0, shard_size=1)
    build(models, store.url, None, settings)
    there = {name: store.read(name) for name in store.sizes()}
    monkeypatch.setattr(RemoteStore, "retry_after_s", (0.0,))
    system, left = store.filesystem, [failures]
    cat_file = system.cat_file

    def busy(path: str, *more: object, **options: object) -> bytes:
        if "parts/" in path and left[0]:
            left[0] -= 1
            raise OSError("503 SlowDown")
        return cat_file(path, *more, **options)

    monkeypatch.setattr(type(system), "cat_file", staticmethod(busy))
    with contextlib.nullcontext() if failures == 1 else pytest.raises(UserError, match="503 SlowDown"):
        build(models, store.url, None, settings)
    monkeypatch.undo()
    assert {name: store.read(name) for name in store.sizes()} == there


def test_a_ray_address_that_does_not_answer_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    trimesh.creation.box().export(tmp_path / "a.ply")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"RAY_ADDRESS is 127\.0\.0\.1:9, which does not answer"):
        build(tmp_path, tmp_path / "raw", executor="ray")
