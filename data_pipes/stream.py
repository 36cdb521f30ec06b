"""Batches from shards that are read front to back, as far stores want it: `Batches` without random access.

Order. Each epoch permutes the shards and deals them to the ranks in turn, shard k of the endless sequence of all epochs
to rank k mod world. So each sample is read once an epoch, by one rank, also where the shards do not divide among the
ranks: none is ever more than one shard ahead of another. The stream has no end, and every rank has all its batches;
where shards differ in size, ranks are at different places of an epoch. A rank's samples pass through a shuffle buffer
of B samples, which is empty at an epoch's start: full once B are read, each next place of the order takes a random one
of it.

Quality. A sample stays in the buffer for a geometric number of places, B on average. So it moves by (E - 1) B places
from where it was stored, E exponential: 0 on average, by 2B/e = 0.74 B in size. Two samples of a batch much smaller
than B differ in age by B E places, so with shards of n samples they are of one shard with probability

    1 - (B / n) (1 - exp(-n / B)),    about n / 2B where B is the larger,

against n / N in a full permutation of N samples: 0.12 at B = 4n, 0.37 at B = n, 0.98 at B = n / 50. Samples of
different ranks are of different shards. Where that is not enough: a larger buffer, or smaller shards.

Resume. The order is a function of (seed, epoch, rank, world, B) and of the counts in the index, known before a byte is
read. So batch `step` is a function of (seed, step, rank, world, B), and a stream begins anywhere: it passes over the
shards that gave all they had, and reads what the buffer held at that place, some 2B samples.

Damage. With "skip", the next sound sample of the order stands in for a damaged one (it is then seen twice), so that
resuming stays exact where the damage stays. A shard whose bytes still fail after some tries, each going on from the
byte where the last broke, is left out from there on.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .loader import Batch, Batches, RawDataset, RawSample, one_ahead, sample_rng
from .sample_bytes import ByteSource

__all__ = ["StreamBatches", "StreamOrder", "buffered"]

OPEN_AHEAD = 3  # shards that are opened before their turn
_READ_AHEAD = 64  # samples read beyond what the buffer needs
_SKIP_BYTES = 1 << 20  # a gap that is read over; a larger one is jumped
_SHARD_KEY, _BUFFER_KEY = 0x7368617264, 0x627566666572


# ---------------------------------------------------------------------------------------------- order


def buffered(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """The order, int64 [n], in which a shuffle buffer of `size` lets go of 0 … n - 1: a function of the generator."""
    draws = rng.random(n).tolist()
    held = list(range(min(size, n)))
    order = np.empty(n, np.int64)
    for k, draw in enumerate(draws):
        place = int(draw * len(held))
        order[k] = held[place]
        if k + size < n:
            held[place] = k + size
        else:
            held[place] = held[-1]
            held.pop()
    return order


@dataclass(frozen=True)
class StreamOrder:
    """Which rows of a dataset a rank reads in an epoch, and in which order they leave its buffer.

    Args:
        starts: first row of each shard and the end of the last, [S + 1]; rows are in the order of the shards.
    """

    starts: tuple[int, ...]
    seed: int
    rank: int
    world: int
    buffer: int

    @lru_cache(maxsize=4)  # noqa: B019 (there is one order a run)
    def stored(self, epoch: int) -> np.ndarray:
        """Rows as they are read, shard after shard."""
        n_shards = len(self.starts) - 1
        shards = np.random.Generator(np.random.Philox(key=[self.seed ^ _SHARD_KEY, epoch])).permutation(n_shards)
        mine = shards[(np.arange(n_shards) + epoch * n_shards) % self.world == self.rank]
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(self.starts[s], self.starts[s + 1]) for s in mine)])

    @lru_cache(maxsize=4)  # noqa: B019
    def shuffled(self, epoch: int) -> np.ndarray:
        """The same rows as they are given."""
        stored = self.stored(epoch)
        key = np.random.SeedSequence([self.seed, epoch, self.rank, self.world]).generate_state(1, np.uint64)[0]
        rng = np.random.Generator(np.random.Philox(key=[int(key), _BUFFER_KEY]))
        return stored[buffered(len(stored), self.buffer, rng)]

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch, and place in it, of a position of this rank's endless sequence."""
        for epoch in itertools.count():
            if position < (count := len(self.stored(epoch))):
                return epoch, position
            position -= count
        raise AssertionError("unreachable")


# ---------------------------------------------------------------------------------------------- batches


class StreamBatches(Batches[RawSample, Batch]):
    """As `Batches`, in the order at the head of this file. Memory: the members asked for of `buffer` samples.

    Args:
        dataset: what is streamed: split, parts and policy on damage are its own.
        buffer: samples of each rank's shuffle buffer.
    Raises: ValueError if the batch does not divide among the ranks; on iterating, UserError for what is damaged or
        cannot be read, and where nothing is sound.
    Note: workers of one rank that each want a stream of their own count as ranks.
    """

    def __init__(
        self,
        dataset: RawDataset,
        collate: Callable[[list[tuple[RawSample, np.random.Generator]]], Batch],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        buffer: int = 1024,
    ) -> None:
        super().__init__(dataset, collate, batch_size, seed, rank, world)
        if buffer < 1:
            raise UserError(f"the shuffle buffer holds at least 1 sample, not {buffer}")
        self.data = dataset
        numbers = [dataset.shards.shard_number(int(index)) for index in dataset.indices]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()  # shards without a sample of the split are none
        self.order = StreamOrder((*starts, len(dataset)), seed, rank, world, buffer)

    def batch(self, step: int) -> Batch:
        """One batch alone: as dear as starting there."""
        return next(self.iterate(step, step + 1))

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of steps from `start_step` on; a thread reads, and one decodes a batch ahead."""
        share = self.batch_size // self.world
        with _Samples(self.data, self.order, start_step * share) as samples:

            def make(step: int) -> Batch:
                return self.collate([(samples.next(), sample_rng(self.seed, int(p))) for p in self.positions(step)])

            yield from one_ahead(make, start_step, stop_step)


class _Samples:
    """A rank's samples from a position on; a thread reads them into the pool that is the shuffle buffer."""

    def __init__(self, data: RawDataset, order: StreamOrder, position: int) -> None:
        self._data, self._order = data, order
        self._start = order.locate(position)
        self._places = self._ahead(*self._start)
        self._next: deque[tuple[int, int]] = deque()  # (epoch, row) to come, as far as looked
        self._pool: dict[tuple[int, int], dict[str, bytes] | None] = {}  # None: damaged
        self._change = threading.Condition()
        self._waiting = self._closed = False
        self._error: BaseException | None = None

    def __enter__(self) -> _Samples:
        # A daemon: a read that hangs must not keep the process from ending.
        threading.Thread(target=self._read, name="stream", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()

    def next(self) -> RawSample:
        """The sample of the next position, or the next sound one after it."""
        for ahead in range(len(self._data) * 2 + 1):
            if ahead == len(self._next):
                self._next.append(next(self._places))
            epoch, row = self._next[ahead]
            if (sample := self._sample(epoch, row)) is not None:
                break
        else:
            raise UserError(f"no sample of {self._data.shards.folder} is sound: build it again")
        with self._change:
            del self._pool[self._next.popleft()]
            self._change.notify_all()
        return sample

    def _ahead(self, epoch: int, place: int) -> Iterator[tuple[int, int]]:
        for e in itertools.count(epoch):
            rows = self._order.shuffled(e)[place if e == epoch else 0 :]
            yield from ((e, row) for row in rows.tolist())

    def _sample(self, epoch: int, row: int) -> RawSample | None:
        with self._change:
            while (epoch, row) not in self._pool and self._error is None:
                self._waiting = True  # whatever the pool holds
                self._change.notify_all()
                self._change.wait()
            self._waiting = False
            if self._error is not None and (epoch, row) not in self._pool:
                raise self._error
            members = self._pool[epoch, row]
        if members is None:
            return None
        index = int(self._data.indices[row])
        try:
            return self._data.decode(index, members)
        except UserError as error:
            self._data.pass_over(index, error)
            return None

    # ------------------------------------------------------------------------------------------ the reading thread

    def _read(self) -> None:
        try:
            with ThreadPoolExecutor(OPEN_AHEAD, thread_name_prefix="opening") as opening:
                coming: deque[tuple[int, list[int], Future[_Shard]]] = deque()
                shards = self._shards()
                while not self._closed:
                    while len(coming) < OPEN_AHEAD:
                        epoch, rows = next(shards)
                        coming.append((epoch, rows, opening.submit(_Shard, self._data, rows)))
                    epoch, rows, opened = coming.popleft()
                    with contextlib.closing(opened.result()) as shard:
                        for row in rows:
                            if not self._put((epoch, row), shard.read(row)):
                                break
                for *_, opened in coming:
                    opened.result().close()
        except BaseException as error:  # goes to whoever waits
            with self._change:
                self._error = error
                self._change.notify_all()

    def _shards(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, the rows to read of one shard) without end, but for what was given before the start."""
        first, place = self._start
        for epoch in itertools.count(first):
            rows = self._order.stored(epoch)
            if epoch == first:
                rows = rows[~np.isin(rows, self._order.shuffled(epoch)[:place])]
            numbers = np.searchsorted(self._order.starts, rows, side="right")
            for of_shard in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1):
                if len(of_shard):
                    yield epoch, of_shard.tolist()

    def _put(self, key: tuple[int, int], members: dict[str, bytes] | None) -> bool:
        """Into the pool once there is room; False if nobody reads on."""
        room = self._order.buffer + _READ_AHEAD
        with self._change:
            while len(self._pool) >= room and not self._waiting and not self._closed:
                self._change.wait()
            self._pool[key] = members
            self._change.notify_all()
            return not self._closed


class _Shard:
    """One shard of a dataset, read front to back; opened again, where its bytes broke off, a few times."""

    def __init__(self, data: RawDataset, rows: list[int]) -> None:
        self._data, self._shards = data, data.shards
        first = int(data.indices[rows[0]])
        self._name = self._shards.shard_name(first)
        self._file: ByteSource | None = None
        self._at = 0
        self._lost: UserError | None = None
        self._shards.crc32(first)  # reads the shard's index, ahead of its turn
        with contextlib.suppress(Exception):  # the read that meets it again says what it is
            self._reach(self._span(first)[0])

    def read(self, row: int) -> dict[str, bytes] | None:
        """The members asked for of a sample after the last; None if it is damaged and may be."""
        index = int(self._data.indices[row])
        try:
            if self._lost is None:
                start, end = self._span(index)
                data = self._bytes(index, start, end)
                return self._shards.cut(index, data, self._data.members(index), check=True)
        except UserError as error:
            self._data.pass_over(index, error)
        else:
            self._data.pass_over(index, self._lost)
        return None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
            self._file = None

    def _span(self, index: int) -> tuple[int, int]:
        return self._shards.span(index, self._data.members(index), check=True)

    def _reach(self, start: int) -> ByteSource:
        """The shard, open at a byte."""
        if self._file is not None and 0 <= start - self._at <= _SKIP_BYTES:
            self._at += len(self._file.read(start - self._at))
        if self._file is None or self._at != start:
            self.close()
            self._file, self._at = self._shards.open(self._name, start), start
        return self._file

    def _bytes(self, index: int, start: int, end: int) -> bytes:
        """Raises UserError where they cannot be had; the rest of the shard is lost then."""
        data, why = b"", ""
        for pause in (*self._shards.retry_after_s, None):
            try:
                file = self._reach(start + len(data))
                while block := file.read(end - start - len(data)):
                    data += block
                    self._at += len(block)
                    if len(data) == end - start:
                        return data
                why = f"it ends at byte {self._at}"
            except FileNotFoundError:
                why = "it is missing"
                break
            except Exception as error:  # every network library has its own
                why = " ".join(str(error).split())[:300] or type(error).__name__
            self.close()
            if pause is not None:
                time.sleep(pause)
        shard = f"{self._shards.folder}/{self._name}"
        uid = self._shards.uid(index)
        fault = f"shard {shard} cannot be read from {uid} on ({why}): build it again, or copy it again"
        self._lost = UserError(fault)
        self._shards.pass_over(self._name, fault)
        raise self._lost
