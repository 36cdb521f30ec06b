"""Raw shards for the stages that train on them: on the disk with random access, elsewhere as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np

from ..data_pipes.loader import Batches, RawDataset, RawSample
from ..data_pipes.remote_shards import is_remote
from ..data_pipes.sample_bytes import Damaged
from ..data_pipes.stream import StreamBatches
from .config import RunConfig

__all__ = ["RawRunConfig", "first_samples", "raw_batches", "training_data"]

Batch = TypeVar("Batch")
Collate = Callable[[list[tuple[RawSample, np.random.Generator]]], Batch]


class RawRunConfig(RunConfig):
    """`data` may be a URL or a pipe (data_pipes/remote_shards.py): it is then streamed."""

    data_damaged: Damaged = "fatal"  # skip: what is damaged is named on stderr, another sample stands in for it
    data_buffer: int = 1024  # samples of each process's shuffle buffer where data are streamed (data_pipes/stream.py)


def training_data(config: RawRunConfig, parts: Iterable[str]) -> RawDataset:
    """The training split. Raises UserError if it cannot be read."""
    return RawDataset(config.data, split="train", parts=parts, damaged=config.data_damaged)


def raw_batches(config: RawRunConfig, data: RawDataset, collate: Collate[Batch]) -> Callable[[int, int], Batches]:
    """What `Stage.batches` wants."""

    def batches(rank: int, world: int) -> Batches:
        if is_remote(config.data):
            return StreamBatches(data, collate, config.batch_size, config.seed, rank, world, config.data_buffer)
        return Batches(data, collate, config.batch_size, config.seed, rank, world)

    return batches


def first_samples(config: RawRunConfig, data: RawDataset, limit: int = 10_000) -> Iterator[RawSample]:
    """All samples; of data that are streamed `limit` at most, the same on every rank."""
    if not is_remote(config.data):
        return iter(data)
    stream = StreamBatches(RawDataset(data.shards, "train", parts=()), lambda items: items[0][0], 1, 0, buffer=1)
    return islice(stream.iterate(0), min(limit, len(data)))
