"""The loader: an order that is a permutation, batches that are functions of the step, samples as they were stored."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from shapeloom.data_pipes.loader import PARTS, Batches, RawDataset, RawSample, order, sample_rng
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.errors import UserError
from shapeloom.files import read_json, write_json

SETTINGS = ProceduralSettings(count=20, n_surface=64, n_near=32, n_uniform=32, n_views=2, image_size=32, shard_size=7)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, SETTINGS)
    return folder


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 5), (37, 0), (1000, 2**31)])
def test_every_epoch_is_a_permutation(n: int, seed: int) -> None:
    positions = np.arange(3 * n)
    indices = order(n, seed, positions)
    for epoch in range(3):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert [order(n, seed, int(p)) for p in positions] == indices.tolist()
    np.testing.assert_array_equal(order(n, seed, positions.reshape(3, n)), indices.reshape(3, n))


def test_epochs_and_seeds_differ() -> None:
    first, second = order(100, 0, np.arange(200)).reshape(2, 100)
    assert (first != second).any()
    assert (order(100, 1, np.arange(100)) != first).any()
    with pytest.raises(ValueError, match="read-only"):
        from shapeloom.data_pipes.loader import _permutation

        _permutation(100, 0, 0)[0] = 1  # it is shared by all who ask


def test_samples_have_their_own_random_numbers() -> None:
    draws = {sample_rng(seed, position).random() for seed in range(5) for position in range(50)}
    assert len(draws) == 250
    assert sample_rng(3, 4).random() == sample_rng(3, 4).random()


# ---------------------------------------------------------------------------------------------- batches


def pairs_of(step_range: range, **how: int) -> list[list[tuple[int, float]]]:
    batches = Batches(list(range(23)), lambda pairs: [(i, rng.random()) for i, rng in pairs], 6, 7, **how)
    return [batches.batch(step) for step in step_range]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_together_make_the_batch_of_one_process(world: int) -> None:
    alone = pairs_of(range(10))
    ranks = [pairs_of(range(10), rank=rank, world=world) for rank in range(world)]
    for step in range(10):
        dealt = list(itertools.chain.from_iterable(zip(*(rank[step] for rank in ranks))))
        assert dealt == alone[step]


def test_an_epoch_sees_every_sample_once() -> None:
    seen = [i for batch in pairs_of(range(23)) for i, _ in batch]
    assert all(sorted(seen[k * 23 : (k + 1) * 23]) == list(range(23)) for k in range(6))


def test_a_batch_is_a_function_of_its_step() -> None:
    assert pairs_of(range(5, 9)) == pairs_of(range(9))[5:]


def test_iterating_gives_the_same_batches_and_makes_one_ahead() -> None:
    asked: list[int] = []
    batches = Batches(list(range(23)), lambda pairs: [i for i, _ in pairs], 6, 7)
    expected = [batches.batch(step) for step in range(3, 8)]
    ahead = threading.Event()

    def collate(pairs: list) -> list[int]:
        asked.append(len(asked))
        if len(asked) == 2:
            ahead.set()
        return [i for i, _ in pairs]

    watched = Batches(list(range(23)), collate, 6, 7)
    running = watched.iterate(3, 8)
    first = next(running)
    assert ahead.wait(10), "the second batch is made while the first is used"
    assert [first, *running] == expected
    assert len(asked) == 5
    assert list(itertools.islice(batches.iterate(3), 5)) == expected


def test_an_error_while_collating_reaches_the_caller() -> None:
    def collate(pairs: list) -> None:
        raise RuntimeError("broken sample")

    with pytest.raises(RuntimeError, match="broken sample"):
        next(Batches([1, 2], collate, 2, 0).iterate())


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch size 6 must be a multiple of the number of ranks, 4"):
        Batches([1], list, 6, 0, rank=0, world=4)


# ---------------------------------------------------------------------------------------------- samples


def test_samples_have_the_promised_types(raw: Path) -> None:
    dataset = RawDataset(raw, "train", PARTS)
    assert len(dataset) == 16
    for sample in (dataset[0], dataset[15]):
        assert sample.uid == dataset.shards.uids[sample.index] and sample.meta["split"] == "train"
        assert len(sample.captions) == 4
        for name in ("surface_xyz", "surface_normal", "surface_rgb", "field_xyz", "field_rgb"):
            array = getattr(sample, name)
            assert array.dtype == np.float32 and array.shape == (64, 3)
        assert sample.field_sdf.dtype == np.float32 and sample.field_sdf.shape == (64,)
        assert sample.surface_rgb.min() >= 0 and sample.surface_rgb.max() <= 1
        np.testing.assert_allclose(np.linalg.norm(sample.surface_normal, axis=1), 1, atol=0.01)
        assert sample.albedo.shape == sample.lit.shape == (2, 32, 32, 4) and sample.lit.dtype == np.uint8
        seen = np.isfinite(sample.depth)
        np.testing.assert_array_equal(seen, sample.albedo[..., 3] > 0)
        assert sample.depth[seen].min() > 3 and sample.depth[seen].max() < 5
        assert len(sample.cameras) == 2 and sample.cameras.width == 32


def test_views_see_the_surface_points(raw: Path) -> None:
    """Surface points, projected by the stored cameras, fall on covered pixels at no less than the stored depth."""
    sample = RawDataset(raw, "train", PARTS)[3]
    for v in range(2):
        to_camera = np.linalg.inv(sample.cameras.camera_to_world[v])
        points = sample.surface_xyz @ to_camera[:3, :3].T + to_camera[:3, 3]
        pixels = points[:, :2] / -points[:, 2:] * sample.cameras.focal[v]
        column, row = (16 + pixels[:, 0]).astype(int), (16 - pixels[:, 1]).astype(int)
        assert (sample.albedo[v, row, column, 3] > 0).mean() > 0.85  # the rest lie on the outline
        depth = sample.depth[v, row, column]
        assert (-points[:, 2] > depth - 0.15)[np.isfinite(depth)].mean() > 0.85


def test_picked_points_are_those_of_the_whole(raw: Path) -> None:
    sample = RawDataset(raw, "train")[0]
    for rows in (np.array([5, 3, 3, 60]), slice(10, 20)):
        for picked, whole in zip(sample.pick_surface(rows), ("surface_xyz", "surface_normal", "surface_rgb")):
            np.testing.assert_array_equal(picked, getattr(sample, whole)[rows])
        for picked, whole in zip(sample.pick_field(rows), ("field_xyz", "field_sdf", "field_rgb")):
            np.testing.assert_array_equal(picked, getattr(sample, whole)[rows])


def test_what_is_not_asked_for_is_none(raw: Path) -> None:
    sample = RawDataset(raw, "val", parts=("lit",))[0]
    assert sample.lit is not None
    assert sample.surface_xyz is None and sample.field_sdf is None and sample.albedo is None
    assert sample.depth is None and sample.cameras is None


def equal(one: RawSample, other: RawSample) -> bool:
    same = one.stored.keys() == other.stored.keys() and one.meta == other.meta
    return same and all(np.array_equal(one.stored[name], other.stored[name]) for name in one.stored)


def test_the_cache_changes_nothing_and_keeps_to_its_size(raw: Path) -> None:
    cached, none = RawDataset(raw, cache_bytes=1 << 30), RawDataset(raw, cache_bytes=0)
    some = RawDataset(raw, cache_bytes=100_000)
    for i in range(20):
        assert equal(cached[i], none[i]) and equal(cached[i], some[i])
    assert cached[4] is cached[4] and none[4] is not none[4]
    kept = sum(some[i] is some[i] for i in range(20))
    assert 0 < kept < 20


# ---------------------------------------------------------------------------------------------- damage


def damage(folder: Path, uid: str, suffix: str) -> None:
    """Flip a bit in the middle of a member."""
    shards = ShardFolder(folder)
    index = shards.uids.index(uid)
    start, end = shards.span(index, [suffix])
    path = folder / shards.shard_name(index)
    data = bytearray(path.read_bytes())
    data[(start + end) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copy(raw: Path, tmp_path: Path) -> Path:
    shutil.copytree(raw, tmp_path / "copy")
    return tmp_path / "copy"


def batches_of(folder: Path, **how: int) -> Batches:
    data = RawDataset(folder, "train", ("lit",), damaged="skip")
    return Batches(data, lambda pairs: [sample.uid for sample, _ in pairs], 4, 1, **how)


@pytest.mark.parametrize("suffix", ["json", "surface.npz", "lit_01.webp"])
def test_a_flipped_bit_is_named_and_fatal_unless_asked(copy: Path, suffix: str) -> None:
    uid = RawDataset(copy, "train", ("lit",))[4].uid
    damage(copy, uid, suffix)
    where = rf"{uid} in shard {copy}/shard-0000.\.tar"
    with pytest.raises(UserError, match=rf"{where} differs from its CRC-32.*build it again"):
        RawDataset(copy, "train", ("lit",))[4]


def test_where_there_is_no_crc_the_decoders_name_it(copy: Path) -> None:
    uid = RawDataset(copy, "train", ("lit",))[4].uid
    damage(copy, uid, "surface.npz")
    for path in copy.glob("*.index.json"):
        contents = read_json(path)
        del contents["crc32"]  # as before there was one
        write_json(path, contents)
    assert RawDataset(copy, "train", ("lit",))[4].uid == uid, "what is not asked for is not read"
    with pytest.raises(UserError, match=rf"{uid}\.surface\.npz in shard shard-0000.\.tar is damaged"):
        RawDataset(copy, "train", ("surface",))[4]


def test_another_sample_stands_in_for_a_damaged_one_whatever_the_world(
    raw: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = RawDataset(copy, "train", ())[4].uid
    damage(copy, uid, "lit_00.webp")
    (copy / "shard-00001.tar").unlink()
    lost = {uid, *ShardFolder(raw).uids[7:14]}
    alone = batches_of(copy)
    assert capsys.readouterr().err.count("shard-00001.tar is missing") == 1, "the shard, not each of its samples"
    found = [alone.batch(step) for step in range(12)]
    assert capsys.readouterr().err.count("skipped: ") == 1
    shards = alone.dataset.shards
    assert {shards.uid(index) for index in alone.dataset.skipped} == {u for u in lost if shards.splits(u) == "train"}
    sound = [Batches(RawDataset(raw, "train", ()), alone.collate, 4, 1).batch(step) for step in range(12)]
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*sound)):
        assert ours == theirs if theirs not in lost else ours not in lost
    assert batches_of(copy).batch(7) == found[7], "a resumed run has the same"
    ranks = [batches_of(copy, rank=rank, world=2) for rank in range(2)]
    for step in (0, 5, 9):
        assert list(itertools.chain(*zip(*(rank.batch(step) for rank in ranks)))) == found[step]


def test_a_cut_shard_gives_what_comes_before_the_cut(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = ShardFolder(copy)
    path = copy / "shard-00002.tar"
    path.write_bytes(path.read_bytes()[: shards.span(17, ["lit_00.webp"])[0] + 10])
    with pytest.raises(UserError, match=r"shard-00002\.tar is \d+ bytes, its manifest says"):
        RawDataset(copy, None, ("lit",))
    data = RawDataset(copy, None, ("lit",), damaged="skip")
    assert [sample.uid for sample in data][:17] == shards.uids[:17]
    assert sorted(data.skipped) == [17, 18, 19] and "ends inside" in data.skipped[17]
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_sound_is_said(copy: Path) -> None:
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="hardly a sample of .* is sound"):
        RawDataset(copy, None, (), damaged="skip")[0]


def test_several_splits_and_unknown_ones(raw: Path) -> None:
    tests = RawDataset(raw, ["test_seen", "test_combo", "test_attr"], parts=())
    assert [sample.meta["split"] for sample in tests] == ["test_seen", "test_combo", "test_attr"]
    assert len(RawDataset(raw, None, parts=())) == 20
    with pytest.raises(UserError, match="no split 'test'; it has test_attr, test_combo, test_seen, train, val"):
        RawDataset(raw, "test")
    with pytest.raises(ValueError, match="part 'voxels' is not one of"):
        RawDataset(raw, parts=("voxels",))


def test_pictures_are_decoded_one_by_one_and_once(raw: Path) -> None:
    whole, lazy = RawDataset(raw, parts=("lit",))[0], RawDataset(raw, parts=("pictures",))[0]
    assert lazy.pictures is not None and len(lazy.pictures) == len(whole.lit)
    for k in (1, 0):
        np.testing.assert_array_equal(lazy.picture(k), whole.lit[k])
        assert lazy.picture(k) is lazy.picture(k)


def test_pictures_count_as_decoded_in_what_may_be_kept(raw: Path) -> None:
    sample = RawDataset(raw, parts=("pictures",))[0]
    decoded = sum(sample.picture(k).nbytes for k in range(len(sample.pictures)))
    data = RawDataset(raw, parts=("pictures",), cache_bytes=decoded)
    assert data[0] is not data[0], "it would not fit with its bytes"
    data = RawDataset(raw, parts=("pictures",), cache_bytes=2 * decoded + 10_000)
    assert data[0] is data[0]
