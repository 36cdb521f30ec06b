"""From raw shards to batches: random access with a cache, an order that is a function, and batches that are too.

Nothing here has a state to save: batch number `step` is a pure function of (seed, step, rank, world). The order is a
fresh permutation of the split per epoch; position p of the global sequence belongs to rank p mod world; each sample's
random numbers are drawn from (seed, p). So a run resumes exactly from its step number, and with another world size the
same samples come in the same order with the same draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

from ..errors import UserError
from ..models.cameras import Cameras
from .raw_sample import NORMAL_SCALE, decode_depth, decode_field, decode_json, decode_surface, decode_webp
from .remote_shards import open_shards
from .sample_bytes import Damaged
from .shard_folder import ShardFolder

PARTS = ("surface", "field", "albedo", "lit", "pictures", "depth", "cameras")
_VIEW_PREFIX = {"albedo": "view_", "lit": "lit_", "pictures": "lit_"}
_ORDER_KEY = 0x6F72646572  # sets the order's random numbers apart from the samples'
_STAND_IN_KEY = 0x7374616E64
_STAND_INS = 1000  # more draws in a row do not fail where there is anything to be found

Sample_co = TypeVar("Sample_co", covariant=True)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class RawSample:
    """One asset, kept as stored; the properties turn what is asked into float32 (about 10 us an array of 4,096 points).

    Args:
        index: its place in the folder of shards.
        meta: the json member.
        stored: arrays as in raw_sample.py, under "surface.xyz", "field.sdf", "lit", ...
        cameras: of the views, if asked for.
        pictures: the lit views as they are stored, WebP, if asked for; see `picture`.
    What was not asked for is None.
    """

    uid: str
    index: int
    meta: dict[str, Any]
    stored: dict[str, np.ndarray]
    cameras: Cameras | None = None
    pictures: tuple[bytes, ...] | None = None
    _decoded: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def captions(self) -> list[str]:
        return self.meta["captions"]

    @property
    def surface_xyz(self) -> np.ndarray | None:
        """float32 [N, 3], object frame."""
        return self._float("surface.xyz")

    @property
    def surface_normal(self) -> np.ndarray | None:
        """float32 [N, 3], unit to within 1 %."""
        return self._float("surface.normal", 1 / NORMAL_SCALE)

    @property
    def surface_rgb(self) -> np.ndarray | None:
        """float32 [N, 3], sRGB in [0, 1]."""
        return self._float("surface.rgb", 1 / 255)

    @property
    def field_xyz(self) -> np.ndarray | None:
        """float32 [N, 3], object frame: near-surface points first, then uniform ones."""
        return self._float("field.xyz")

    @property
    def field_sdf(self) -> np.ndarray | None:
        """float32 [N], negative inside, object units."""
        return self._float("field.sdf")

    @property
    def field_rgb(self) -> np.ndarray | None:
        """float32 [N, 3], sRGB in [0, 1] of the nearest surface."""
        return self._float("field.rgb", 1 / 255)

    @property
    def albedo(self) -> np.ndarray | None:
        """uint8 [V, H, W, 4], sRGB, straight alpha."""
        return self.stored.get("albedo")

    @property
    def lit(self) -> np.ndarray | None:
        """uint8 [V, H, W, 4], sRGB, straight alpha."""
        return self.stored.get("lit")

    @property
    def depth(self) -> np.ndarray | None:
        """float32 [V, H, W], z-depth in object units, inf where nothing is seen."""
        return self.stored.get("depth")

    def picture(self, k: int) -> np.ndarray:
        """uint8 [H, W, 4], sRGB, straight alpha: one of `pictures`, decoded when it is first asked for, then kept."""
        if k not in self._decoded:
            assert self.pictures is not None, "pictures were not asked for"
            self._decoded[k] = decode_webp(self.pictures[k], f"{self.uid}.lit_{k:02d}.webp")
        return self._decoded[k]

    def pick_surface(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(xyz, normal, rgb) of some points, as the properties give them.

        Points are stored in random order, so a slice at a random place is a fair draw and the fastest one.
        """
        return (
            self._float("surface.xyz", rows=rows),
            self._float("surface.normal", 1 / NORMAL_SCALE, rows),
            self._float("surface.rgb", 1 / 255, rows),
        )

    def pick_field(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(xyz, sdf, rgb) of some points, as the properties give them.

        Near and uniform points are each in random order.
        """
        return (
            self._float("field.xyz", rows=rows),
            self._float("field.sdf", rows=rows),
            self._float("field.rgb", 1 / 255, rows),
        )

    def _float(self, name: str, scale: float = 1.0, rows: np.ndarray | slice | None = None) -> Any:
        if name not in self.stored:
            return None
        stored = self.stored[name]
        if isinstance(rows, slice):
            stored = stored[rows]
        elif rows is not None:
            stored = stored.take(rows, axis=0)  # five times faster than stored[rows] for these short rows
        values = stored.astype(np.float32)
        return values if scale == 1.0 else np.multiply(values, np.float32(scale), out=values)


class RawDataset:
    """Samples of one split of a folder of raw shards, decoded once and then kept in RAM as far as it is allowed.

    What is damaged (a shard missing or cut short, a sample that differs from its CRC-32 or cannot be decoded) is named.
    With "skip" another sample of the split stands in for it, drawn by the place of the damaged one alone: so resuming
    stays exact, ranks agree, and what a lost shard leaves open is shared by all the others.

    Args:
        folder: of raw shards, a path or a URL (remote_shards.py), or an opened one.
        split: one, several, or None for all.
        parts: of `PARTS`; only these are decoded.
        cache_bytes: decoded arrays are kept until they take this much; further ones are decoded each time.
        damaged: "fatal" raises; "skip" says so once on stderr and goes on. An opened folder has its own.
    Raises: UserError if the folder cannot be read, or the split or a part is not there; on reading, what is damaged.
    """

    def __init__(
        self,
        folder: str | Path | ShardFolder,
        split: str | list[str] | None = None,
        parts: Iterable[str] = ("surface", "field", "albedo", "lit", "cameras"),
        cache_bytes: int = 2 << 30,
        damaged: Damaged = "fatal",
    ) -> None:
        self.shards = folder if isinstance(folder, ShardFolder) else open_shards(folder, damaged=damaged)
        self.shards.refuse_unknown(split)
        self.indices = self.shards.where(split)
        self.parts = tuple(parts)
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"part {min(unknown)!r} is not one of {', '.join(PARTS)}")
        if not len(self.indices):
            raise UserError(f"{self.shards.folder} holds no samples")
        for part in self.parts:
            if not self.shards.has(_member(part)):
                self._suffixes(int(self.indices[0]), part)  # which says so
        self._room, self._picture_bytes = cache_bytes, 0
        self._kept: dict[int, RawSample] = {}
        self.skipped: dict[int, str] = {}  # what is wrong with each sample that another stood in for, by its index

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> RawSample:
        if (sample := self._sound(i)) is not None:
            return sample
        for k in sample_rng(_STAND_IN_KEY, i % len(self)).integers(len(self), size=_STAND_INS).tolist():
            if (sample := self._sound(k)) is not None:
                return sample
        raise UserError(f"hardly a sample of {self.shards.folder} is sound: build it again")

    def members(self, index: int) -> list[str]:
        """What is read of a sample of the folder. Raises UserError if it lacks a part."""
        return ["json", *(name for part in self.parts for name in self._suffixes(index, part))]

    def decode(self, index: int, members: dict[str, bytes]) -> RawSample:
        """A sample of the folder from its members' bytes. Raises UserError naming what cannot be decoded."""
        uid = self.shards.uid(index)
        where = f" in shard {self.shards.shard_name(index)}"
        stored: dict[str, np.ndarray] = {}
        cameras = pictures = None
        for part in self.parts:
            of_part = self._suffixes(index, part)
            data, what = members[of_part[0]], f"{uid}.{of_part[0]}{where}"
            if part == "cameras":
                cameras = _cameras(decode_json(data, what), what)
            elif part == "pictures":
                pictures = tuple(members[name] for name in of_part)
                if self.shards.crc32(index) is None:  # older ones, of which decoding alone tells that they are sound
                    for name in of_part:
                        decode_webp(members[name], f"{uid}.{name}{where}")
            elif part in _VIEW_PREFIX:
                stored[part] = np.stack([decode_webp(members[name], f"{uid}.{name}{where}") for name in of_part])
            elif part == "depth":
                stored[part] = decode_depth(data, what)
            else:
                arrays = (decode_surface if part == "surface" else decode_field)(data, what)
                stored |= {f"{part}.{name}": array for name, array in arrays.items()}
        return RawSample(uid, index, decode_json(members["json"], f"{uid}.json{where}"), stored, cameras, pictures)

    def pass_over(self, index: int, error: UserError) -> None:
        """Leave a sample of the folder out, saying so once; raises `error` where damage is fatal."""
        if self.shards.damaged == "fatal":
            raise error
        if index not in self.skipped and self.shards.shard_name(index) not in self.shards.faulty:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
        self.skipped[index] = str(error)

    def _sound(self, i: int) -> RawSample | None:
        """A sample, kept where there is room; None if it is damaged."""
        index = int(self.indices[i])
        if i in self._kept or index in self.skipped:
            return self._kept.get(i)
        try:
            sample = self.decode(index, self.shards.read(index, self.members(index), check=True))
        except UserError as error:
            self.pass_over(index, error)
            return None
        size = sum(array.nbytes for array in sample.stored.values()) + 4096  # json and cameras, roughly
        if sample.pictures:  # all will be decoded some time; those of a folder are of one size
            self._picture_bytes = self._picture_bytes or sample.picture(0).nbytes
            size += sum(map(len, sample.pictures)) + len(sample.pictures) * self._picture_bytes
        if size <= self._room:
            self._room -= size
            self._kept[i] = sample
        return sample

    def _suffixes(self, index: int, part: str) -> list[str]:
        """Members that hold a part of a sample."""
        names = [name for name in self.shards.suffixes(index) if name.startswith(_member(part))]
        if not names:
            raise UserError(f"{self.shards.uid(index)} in {self.shards.folder} has no {part}: build it with that part")
        return names


def _member(part: str) -> str:
    """How the names of a part's members begin."""
    return _VIEW_PREFIX.get(part) or ("cameras.json" if part == "cameras" else f"{part}.npz")


def _cameras(fields: dict[str, Any], what: str) -> Cameras:
    try:
        return Cameras.from_json(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what} is not understood ({error}): build it again") from None


# ---------------------------------------------------------------------------------------------- order and batches


@overload
def order(n: int, seed: int, position: int) -> int: ...
@overload
def order(n: int, seed: int, position: np.ndarray) -> np.ndarray: ...
def order(n: int, seed: int, position: int | np.ndarray) -> int | np.ndarray:
    """Which of `n` samples is at a position of the endless sequence: a permutation per epoch, epoch = position // n.

    Args:
        position: one, or an array of any shape.
    Example: [order(3, 0, p) for p in range(6)] holds each of 0, 1, 2 once in either half.
    """
    if np.ndim(position) == 0:
        return int(_permutation(n, seed, int(position) // n)[int(position) % n])
    positions = np.asarray(position)
    epochs = positions // n
    indices = np.empty(positions.shape, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(n, seed, int(epoch))[positions[here] % n]
    return indices


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    indices = np.random.Generator(np.random.Philox(key=[seed ^ _ORDER_KEY, epoch])).permutation(n)
    indices.setflags(write=False)  # all callers share it
    return indices


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at a position: a function of (seed, position) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


class Indexed(Protocol[Sample_co]):
    """What batches are drawn from: raw samples, latents, anything with a length and random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample_co: ...


class Batches(Generic[Sample_co, Batch]):
    """Batches as a function of the step.

    Args:
        dataset: random access to samples.
        collate: takes [(sample, rng), ...] of this rank and returns the batch; all its randomness comes from the rngs.
        batch_size: of all ranks together.
    Raises: ValueError if the batch does not divide among the ranks.
    """

    def __init__(
        self,
        dataset: Indexed[Sample_co],
        collate: Callable[[list[tuple[Sample_co, np.random.Generator]]], Batch],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch size {batch_size} must be a multiple of the number of ranks, {world}")
        self.dataset, self.collate, self.batch_size, self.seed = dataset, collate, batch_size, seed
        self.rank, self.world = rank, world

    def positions(self, step: int) -> np.ndarray:
        """Global positions of this rank's share of a step's batch."""
        return np.arange(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)

    def batch(self, step: int) -> Batch:
        positions = self.positions(step)
        indices = order(len(self.dataset), self.seed, positions)
        return self.collate([(self.dataset[int(i)], sample_rng(self.seed, int(p))) for i, p in zip(indices, positions)])

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of steps from `start_step` on (to before `stop_step`); a thread makes one ahead."""
        return one_ahead(self.batch, start_step, stop_step)


def one_ahead(make: Callable[[int], Batch], start: int, stop: int | None) -> Iterator[Batch]:
    """make(start), make(start + 1), … to before `stop`; a thread makes one while the last is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        step, ahead = start, None
        while stop is None or step < stop:
            ready = ahead or thread.submit(make, step)
            step += 1
            more = stop is None or step < stop
            batch = ready.result()
            ahead = thread.submit(make, step) if more else None
            yield batch
