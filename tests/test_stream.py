"""Streams: every sample once an epoch at any world size, exact resume, a shuffle as good as its formula, and damage."""

from __future__ import annotations

import importlib
import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from shapeloom.data_pipes.loader import Batches, RawDataset, RawSample
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.raw_batch import RawBatch, raw_batch
from shapeloom.data_pipes.remote_shards import RemoteSource, is_remote, open_shards
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import INDEX, MANIFEST
from shapeloom.data_pipes.stream import StreamBatches, StreamOrder, buffered
from shapeloom.errors import UserError
from shapeloom.files import read_json, write_json

SETTINGS = ProceduralSettings(count=30, n_surface=16, n_near=8, n_uniform=8, n_views=2, image_size=16, shard_size=4)
EVERY_PART = ("surface", "field", "albedo", "lit", "depth", "cameras")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, SETTINGS)  # 8 shards, the last of two samples
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteSource, "retry_after_s", (0.0, 0.0))


def uids(items: list[tuple[RawSample, np.random.Generator]]) -> list[str]:
    return [sample.uid for sample, _ in items]


def stream(folder: str | Path, batch: int = 4, *, damaged: str = "fatal", **how: int) -> StreamBatches:
    data = RawDataset(folder, None, ("lit",), damaged=damaged)
    return StreamBatches(data, uids, batch, seed=3, **{"buffer": 5, **how})


def take(batches: StreamBatches, start: int, stop: int) -> list[list[str]]:
    return list(batches.iterate(start, stop))


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("shards", "world"), [(8, 1), (8, 2), (7, 3), (2, 5)])
def test_an_epoch_deals_each_sample_to_one_rank_and_ranks_stay_level(shards: int, world: int) -> None:
    starts = (*range(0, 10 * shards, 10), 10 * shards - 7)  # the last shard is short
    ranks = [StreamOrder(starts, 1, rank, world, 16) for rank in range(world)]
    for epoch in range(10):
        given = np.concatenate([rank.shuffled(epoch) for rank in ranks])
        assert sorted(given.tolist()) == list(range(starts[-1]))
    read = [sum(len(set(rank.stored(epoch) // 10)) for epoch in range(11)) for rank in ranks]
    assert sum(read) == 11 * shards and max(read) - min(read) <= 1, "in shards, no rank is ahead of another"
    assert len({tuple(ranks[0].stored(epoch)) for epoch in range(11)}) > 2, "epochs differ"


def test_a_buffer_gives_what_a_simulated_one_does() -> None:
    """An independent one: a list that is filled, drawn from, and refilled at its end."""
    n, size = 40, 6
    draws = np.random.default_rng(5).random(n)
    source, held, given = iter(range(n)), [], []
    held = list(itertools.islice(source, size))
    for draw in draws:
        k = int(draw * len(held))
        given.append(held[k])
        follower = next(source, None)
        held[k] = held[-1] if follower is None else follower
        if follower is None:
            held.pop()
    assert buffered(n, size, np.random.default_rng(5)).tolist() == given
    assert buffered(7, 1, np.random.default_rng(0)).tolist() == list(range(7))
    assert sorted(buffered(7, 100, np.random.default_rng(0))) == list(range(7))


def test_the_shuffle_is_as_good_as_the_docstring_says() -> None:
    per_shard, shards, batch = 50, 400, 16
    starts = tuple(range(0, per_shard * shards + 1, per_shard))
    for size in (50, 200):
        order = StreamOrder(starts, 0, 0, 1, size)
        stored, given = order.stored(0), order.shuffled(0)
        place = np.empty(len(stored), np.int64)
        place[stored] = np.arange(len(stored))
        inner = slice(5 * size, -10 * size)  # away from where the buffer fills and drains
        moved = np.arange(len(given)) - place[given]
        assert abs(moved[inner].mean()) < 0.1 * size
        assert np.abs(moved[inner]).mean() == pytest.approx(2 / np.e * size, rel=0.05)
        shard = given // per_shard
        rows = shard[inner][: len(shard[inner]) // batch * batch].reshape(-1, batch)
        pairs = (rows[:, :, None] == rows[:, None]).sum() - rows.size
        share = pairs / (len(rows) * batch * (batch - 1))
        ratio = size / per_shard
        assert share == pytest.approx(1 - ratio * (1 - np.exp(-1 / ratio)), rel=0.1)
        assert share > 20 / shards, "a full permutation is better: it is said"


# ---------------------------------------------------------------------------------------------- sources


class Server(SimpleHTTPRequestHandler):
    """Files with ranges. The first answer for a shard breaks off after `cut_after` bytes; `lost` is not there."""

    cut_after, lost, asked, known_ranges = 10**9, "", [], True

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        path = Path(self.directory, name)
        first = not any(one == name for one, _ in self.asked)
        self.asked.append((name, self.headers.get("Range", "")))
        if not path.is_file() or name == self.lost:
            self.send_error(404)
            return
        data, begin, end = path.read_bytes(), 0, None
        if (given := self.headers.get("Range", "")) and self.known_ranges:
            begin, _, last = given.removeprefix("bytes=").partition("-")
            begin, end = int(begin), int(last) + 1 if last else None
        body = data[begin:end]
        self.send_response(206 if given and self.known_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cut_after] if first and name.endswith(".tar") else body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(raw: Path) -> Iterator[tuple[str, type[Server]]]:
    handler = type("OneServer", (Server,), {"asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(raw)))
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", handler
    running.shutdown()
    running.server_close()


def same(one: RawSample, other: RawSample) -> bool:
    keys = one.stored.keys() == other.stored.keys() and one.meta == other.meta and one.uid == other.uid
    cameras = one.cameras.to_json() == other.cameras.to_json()
    return keys and cameras and all(np.array_equal(one.stored[k], other.stored[k]) for k in one.stored)


def sources(raw: Path) -> dict[str, str]:
    memory = fsspec.filesystem("memory")
    for path in raw.iterdir():
        memory.pipe_file(f"/raw/{path.name}", path.read_bytes())
    return {"memory": "memory://raw", "file": f"file://{raw}", "pipe": f"pipe:cat {raw}/{{name}}", "path": str(raw)}


@pytest.mark.parametrize("kind", ["memory", "file", "pipe", "path"])
def test_every_source_gives_the_samples_of_the_folder(raw: Path, kind: str) -> None:
    url = sources(raw)[kind]
    assert is_remote(url) == (kind != "path")
    stored, there = RawDataset(raw, None, EVERY_PART), RawDataset(url, None, EVERY_PART)
    by_uid = {sample.uid: sample for sample in stored}
    seen = itertools.chain.from_iterable(
        StreamBatches(there, lambda items: [sample for sample, _ in items], 5, 0, buffer=7).iterate(0, 6)
    )
    assert Counter(sample.uid for sample in seen if same(sample, by_uid[sample.uid])) == Counter(list(by_uid))
    assert same(there[17], stored[17]), "one alone"
    assert there.shards.hash == stored.shards.hash


def test_a_connection_that_breaks_off_is_gone_on_with_where_it_broke(raw: Path, server: tuple) -> None:
    url, handler = server
    handler.cut_after = 5_000
    assert take(stream(url), 0, 8) == take(stream(raw), 0, 8)
    ranges = [given for name, given in handler.asked if name == "shard-00000.tar"]
    assert len(ranges) >= 2 and ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"


def test_a_server_without_ranges_serves_as_well(raw: Path, server: tuple) -> None:
    url, handler = server
    handler.known_ranges = False
    assert take(stream(url), 2, 5) == take(stream(raw), 2, 5)


@pytest.mark.parametrize("harm", ["missing", "not listed", "of other shards"])
def test_shards_without_an_index_of_the_folder_are_read_by_their_own(raw: Path, tmp_path: Path, harm: str) -> None:
    shutil.copytree(raw, tmp_path / "old")
    manifest, index = read_json(tmp_path / "old" / MANIFEST), tmp_path / "old" / INDEX
    if harm == "missing":
        index.unlink()
    elif harm == "not listed":
        del manifest["index"]
        write_json(tmp_path / "old" / MANIFEST, manifest)
    else:
        index.write_bytes(index.read_bytes()[:-64] + b"0" * 64)
    assert take(stream(f"file://{tmp_path}/old"), 0, 3) == take(stream(raw), 0, 3)


# ---------------------------------------------------------------------------------------------- batches and resume


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_cover_everything_and_resume_exactly(raw: Path, world: int) -> None:
    ranks = [stream(raw, rank=rank, world=world) for rank in range(world)]
    whole = [take(rank, 0, 45) for rank in ranks]
    assert all(len(batch) == 4 // world for rank in whole for batch in rank)
    seen = Counter(uid for rank in whole for batch in rank for uid in batch)
    assert len(seen) == 30 and seen.total() == 180
    assert max(seen.values()) - min(seen.values()) <= 4, "within the epochs that ranks drift"
    for rank, batches in zip(ranks, whole):
        for start in (1, 7, 8, 31):
            assert take(rank, start, start + 3) == batches[start : start + 3]
    assert ranks[0].batch(9) == whole[0][9]


def test_a_resumed_stream_opens_no_shard_that_gave_all_it_had(server: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shapeloom.data_pipes.stream.OPEN_AHEAD", 1)  # one after the other, so that they have an order
    url, handler = server
    batches = stream(url, 1, buffer=2)
    order, shards = batches.order, batches.data.shards
    left = set(order.stored(0).tolist()) - set(order.shuffled(0)[:22].tolist())
    needed = {shards.shard_name(index) for index in left}
    assert len(needed) < 6, "of eight shards"
    take(batches, 22, 23)
    asked = [name for name, _ in handler.asked if name.endswith(".tar")]
    assert asked and set(asked[: len(needed)]) <= needed


def test_samples_have_the_random_numbers_of_their_place(raw: Path) -> None:
    def numbers(items: list[tuple[RawSample, np.random.Generator]]) -> list[float]:
        return [rng.random() for _, rng in items]

    data = RawDataset(raw, None, ())
    drawn = [StreamBatches(data, numbers, 4, 3, rank, 2).batch(5) for rank in (0, 1)]
    alone = StreamBatches(data, numbers, 4, 3).batch(5)
    assert [value for pair in zip(*drawn) for value in pair] == alone


def test_both_loaders_give_typed_batches(raw: Path) -> None:
    data = RawDataset(raw, "train", EVERY_PART)
    for batches in (Batches(data, raw_batch, 4, 0), StreamBatches(data, raw_batch, 4, 0)):
        batch = batches.batch(0)
        assert isinstance(batch, RawBatch) and len(batch.uids) == len(batch.captions) == len(batch.cameras) == 4
        assert batch.surface_xyz.shape == (4, 16, 3) and batch.field_sdf.shape == (4, 16)
        assert batch.lit.shape == (4, 2, 16, 16, 4) and batch.depth.shape == (4, 2, 16, 16)
        row = data.shards.uids.index(batch.uids[2])
        np.testing.assert_array_equal(batch.lit[2], RawDataset(raw, None, ("lit",))[row].lit)
    assert raw_batch([(RawDataset(raw, "train", ("lit",))[0], None)]).surface_xyz is None


def test_an_error_while_collating_reaches_the_caller(raw: Path) -> None:
    def collate(items: list) -> None:
        raise RuntimeError("broken collate")

    with pytest.raises(RuntimeError, match="broken collate"):
        next(StreamBatches(RawDataset(raw, None, ()), collate, 2, 0).iterate())


# ---------------------------------------------------------------------------------------------- damage


@pytest.fixture
def copy(raw: Path, tmp_path: Path) -> Path:
    shutil.copytree(raw, tmp_path / "copy")
    return tmp_path / "copy"


def flip(folder: Path, uid: str, suffix: str = "lit_00.webp") -> None:
    shards = ShardFolder(folder)
    index = shards.uids.index(uid)
    start, end = shards.span(index, [suffix])
    path = folder / shards.shard_name(index)
    data = bytearray(path.read_bytes())
    data[(start + end) // 2] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_ends_the_run_or_is_named_once_and_stood_in_for(
    raw: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = ShardFolder(raw).uids[9]
    flip(copy, uid, "surface.npz")  # not even a member that is asked for
    with pytest.raises(UserError, match=rf"{uid} in shard .*shard-00002\.tar differs from its CRC-32.*build it again"):
        take(stream(copy), 0, 8)
    batches, sound = stream(copy, 2, damaged="skip"), take(stream(raw, 2), 0, 40)
    found = take(batches, 0, 40)
    given, expected = (list(itertools.chain.from_iterable(rows)) for rows in (found, sound))
    assert given == [next(u for u in expected[k:] if u != uid) for k in range(len(expected))]
    assert len(batches.data.skipped) == 1
    assert capsys.readouterr().err.count("skipped: ") == 1
    assert take(stream(copy, 2, damaged="skip"), 5, 20) == found[5:20], "and resuming stays exact"


@pytest.mark.parametrize("kind", ["cut", "missing"])
@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_cut_short_or_missing_is_named_and_left_out(
    copy: Path, kind: str, remote: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "shard-00003.tar"
    shards = ShardFolder(copy)
    lost = shards.uids[12:16]
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: shards.span(13, ["json"])[0]])
        lost = lost[1:]
    else:
        path.unlink()
    source = f"file://{copy}" if remote else copy
    with pytest.raises(UserError, match=r"shard-00003\.tar .*again"):
        take(stream(source), 0, 9)
    batches = stream(source, damaged="skip")
    found = take(batches, 0, 15)
    assert set(itertools.chain.from_iterable(found)) == set(shards.uids) - set(lost)
    assert {shards.uids[i] for i in batches.data.skipped} == set(lost)
    assert take(batches, 4, 9) == found[4:9]
    assert capsys.readouterr().err.count("shard-00003.tar") == 1


def test_a_shard_lost_on_a_server_is_named(raw: Path, server: tuple) -> None:
    url, handler = server
    handler.lost = "shard-00005.tar"
    with pytest.raises(UserError, match=rf"shard {url}/shard-00005\.tar cannot be read from .* on \(it is missing\)"):
        take(stream(url), 0, 8)
    there = RawDataset(url, None, ("lit",))
    with pytest.raises(UserError, match=r"shard-00005\.tar is missing"):
        there[20]


def test_nothing_sound_is_no_endless_search(copy: Path) -> None:
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="no sample of .* is sound"):
        take(stream(f"file://{copy}", damaged="skip"), 0, 1)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_a_stage_streams_what_is_named_by_a_url(raw: Path, tmp_path: Path, stage: str) -> None:
    module = importlib.import_module(f"shapeloom.training.{stage}")
    kind = module.AutoencoderRun if stage == "autoencoder" else module.ClipRun
    alike = {"batch_size": 4, "cpu": True, "data_buffer": 6, "eval_samples": 1, "out": str(tmp_path)}
    alike |= {"sheet_samples": 0} if stage == "autoencoder" else {}
    there, here = (module.build(kind(data=data, **alike)) for data in (f"file://{raw}", str(raw)))
    assert there.data == here.data, "the same data, wherever they are"
    batches = there.batches(0, 1)
    assert isinstance(batches, StreamBatches) and batches.order.buffer == 6
    assert not isinstance(here.batches(0, 1), StreamBatches)
    first = list(batches.iterate(0, 4))
    assert all(torch.equal(first[3][name], value) for name, value in there.batches(0, 1).batch(3).items())
    losses, _ = there.loss(there.model, first[0])
    assert losses.shape == (4,) and losses.isfinite().all()
    assert there.evaluate(there.model, 1), "held out, by random access"


# ---------------------------------------------------------------------------------------------- clear words


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:cat nowhere", "must have {name}"),
        ("pipe:ls /nowhere/{name}", r"manifest\.json cannot be had .*the command ended with 2: .*nowhere"),
        ("memory://nowhere", r"memory://nowhere has no manifest\.json"),
        ("gs://bucket/raw", "gs://bucket/raw needs a package that is not installed .*gcsfs"),
        ("nonsense://a/b", "nonsense://a/b is of a kind that is not known"),
        ("http://127.0.0.1:9/raw", r"http://127\.0\.0\.1:9/raw/manifest\.json cannot be had .*refused"),
    ],
)
def test_what_cannot_be_opened_is_told_in_a_sentence(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_shards(url)


def test_a_shard_name_is_never_a_command(copy: Path, tmp_path: Path) -> None:
    manifest = read_json(copy / MANIFEST)
    manifest["shards"][0]["name"] = f"x;touch {tmp_path}/owned;.tar"
    write_json(copy / MANIFEST, manifest)
    with pytest.raises(UserError, match="only letters, digits"):
        open_shards(f"pipe:cat {copy}/{{name}}")
    assert not (tmp_path / "owned").exists()
