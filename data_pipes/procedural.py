"""The procedural reference set: scenes of coloured primitives with exact distance, colour, captions and views.

Two levels (`core`, `full`): grammar.py says what may be said, scenes.py makes it. Objects live directly in the object
frame, not normalised, so that sizes are visible.

Cost per object, one core, at the defaults: 6 views ~ 10 ms, distances of 8,192 points ~ 3 ms, the rest ~ 3 ms.

Deterministic: which scenes are in which split is drawn from (seed, level, count) alone, each object from (seed, index);
shards are fixed ranges of indices. So the same settings give the same bytes for any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..files import sha256_json
from ..progress import Bar
from . import grammar
from .grammar import SceneSpec
from .render import render
from .rigs import RigSettings
from .scenes import draw_scene
from .shards import (
    RAW_FORMAT,
    ShardInfo,
    ShardWriter,
    begin_folder,
    encode_raw_sample,
    finished_shard,
    write_manifest,
)
from .workers import end_with_parent

SPLITS = {
    True: {"train": 0.86, "val": 0.02, "test_seen": 0.04, "test_combo": 0.04, "test_attr": 0.04},
    False: {"train": 0.95, "val": 0.05},
}
# At most so many in a split other than train. A larger pool of captions is a harder one, so a cap keeps the scores of
# sets of 3,000 objects and more comparable.
MOST_HELD_OUT = 120


class ProceduralSettings(BaseModel):
    """Everything that the bytes of the set depend on.

    Zero points or views leave that part out: a set of views alone has `n_surface = n_near = n_uniform = 0`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["core", "full"] = "core"
    count: int = Field(3000, ge=1, description="objects in all splits together")
    seed: int = Field(0, ge=0, lt=2**32)
    holdout: bool = Field(True, description="keep some attributes and combinations out of training")
    n_surface: int = Field(4096, ge=0)
    n_near: int = Field(4096, ge=0)
    n_uniform: int = Field(4096, ge=0)
    n_views: int = Field(6, ge=0, le=100)
    image_size: int = Field(64, ge=8, le=1024)
    n_captions: int = Field(4, ge=1, le=4)
    shard_size: int = Field(256, ge=1, description="objects per shard")


# ---------------------------------------------------------------------------------------------- which scenes


@dataclass(frozen=True)
class Planned:
    """What the object of one index shall be."""

    split: str
    spec: SceneSpec


def plan(settings: ProceduralSettings) -> list[Planned]:
    """Split and meaning of every index, drawn from the settings alone.

    One to two are singles to pairs (in `full` 2 : 2 : 1 of one, two, three parts); unseen combinations are groups by
    nature. Test meanings differ from each other as far as there are enough of them.
    """
    counts = _split_counts(settings.count, SPLITS[settings.holdout])
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, 2**63]))
    drawn: dict[str, list[SceneSpec]] = {}
    for split, n in counts.items():
        wanted = {"test_combo": "combo", "test_attr": "attr"}.get(split)
        source = _Source(settings, wanted, rng)
        if split == "test_seen":
            source.only = list(dict.fromkeys(drawn["train"]))
        drawn[split] = source.take(n, distinct=split.startswith("test"))
    return [Planned(split, spec) for split, specs in drawn.items() for spec in specs]


def _split_counts(count: int, shares: dict[str, float]) -> dict[str, int]:
    """At least one object of each split where there are enough; train takes what rounding leaves."""
    held_out = {split: round(share * count) for split, share in shares.items() if split != "train"}
    counts = {split: min(max(1, n), MOST_HELD_OUT) for split, n in held_out.items()}
    if count <= sum(counts.values()):
        counts = dict.fromkeys(counts, 0)
    return {"train": count - sum(counts.values()), **counts}


class _Source:
    """Draws meanings that are held out as `wanted` says (None: seen ones; anything goes without holdout)."""

    def __init__(self, settings: ProceduralSettings, wanted: str | None, rng: np.random.Generator) -> None:
        self.level, self.holdout, self.wanted, self.rng = settings.level, settings.holdout, wanted, rng
        self.only: list[SceneSpec] | None = None  # draw from these alone

    def take(self, n: int, distinct: bool) -> list[SceneSpec]:
        """`n` meanings, singles and groups in turn."""
        singles = self._of_size(1)
        cycle = [2] if not singles else [1, 2, 2] if self.level == "core" else [1, 2, 1, 2, 3]
        sizes = [cycle[i % len(cycle)] for i in range(n)]
        if distinct:  # more groups where single meanings run out
            surplus = [i for i, size in enumerate(sizes) if size == 1][len(singles) :]
            for i in surplus:
                sizes[i] = 2
        streams = {size: self._stream(size, distinct) for size in set(sizes)}
        return [next(streams[size]) for size in sizes]

    def _of_size(self, n_parts: int) -> list[SceneSpec]:
        """The meanings that can be listed: single ones, or the part of `only` with so many parts."""
        if self.only is not None:
            return [spec for spec in self.only if len(spec.parts) == n_parts]
        return [spec for spec in grammar.single_specs(self.level) if self._wants(spec)] if n_parts == 1 else []

    def _stream(self, n_parts: int, distinct: bool) -> Iterator[SceneSpec]:
        """Meanings without end: a list is gone through in shuffled rounds, so that each comes equally often."""
        if listed := self._of_size(n_parts):
            while True:
                for i in self.rng.permutation(len(listed)):
                    yield listed[int(i)]
        used: set[SceneSpec] = set()
        misses = 0
        while True:
            spec = grammar.draw_group(self.level, max(n_parts, 2), self.rng)
            if not self._wants(spec):
                continue
            if distinct and spec in used and misses < 1000:
                misses += 1
                continue
            misses = 0
            used.add(spec)
            yield spec

    def _wants(self, spec: SceneSpec) -> bool:
        return not self.holdout or grammar.held_out(self.level, spec) == self.wanted


# ---------------------------------------------------------------------------------------------- one object


def make_sample(settings: ProceduralSettings, index: int, planned: Planned) -> tuple[str, dict[str, bytes]]:
    """uid and members of one object; a function of (settings, index) alone."""
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, index]))
    spec, uid = planned.spec, f"p{settings.seed}-{index:06d}"
    captions = grammar.captions(spec, rng, settings.n_captions)
    scene = draw_scene(spec, rng)
    surface = scene.sample_surface(settings.n_surface, rng) if settings.n_surface else None
    wants_field = settings.n_near + settings.n_uniform > 0
    field = scene.sample_field(settings.n_near, settings.n_uniform, rng) if wants_field else None
    cameras = RigSettings().cameras(rng, settings.n_views, settings.image_size) if settings.n_views else None
    members = encode_raw_sample(
        uid,
        captions=captions,
        category=("single", "pair", "triple")[len(spec.parts) - 1],
        source=f"procedural {settings.level}",
        licence="CC0-1.0",
        author="shapeloom",
        sha256=None,
        transform=np.eye(4),
        split=planned.split,
        surface=surface,
        field=field,
        views=render(scene.mesh(), cameras) if cameras is not None else None,
        cameras=cameras,
        extra={
            "spec": spec.to_json(),
            "swaps": grammar.swaps(spec),
            "view_dependent": spec.view_dependent,
            "held_out": grammar.held_out(settings.level, spec),
        },
    )
    return uid, members


# ---------------------------------------------------------------------------------------------- all objects


@dataclass(frozen=True)
class Report:
    """What `generate` did."""

    out: Path
    counts: dict[str, Any]
    shards: int
    shards_kept: int  # finished by an earlier run
    bytes: int
    seconds: float

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {n}" for split, n in self.counts.items() if split != "samples")
        kept = f", {self.shards_kept} kept from an earlier run" if self.shards_kept else ""
        return (
            f"{self.counts['samples']} objects ({splits}) in {self.shards} shard(s){kept}, {self.bytes / 1e6:.0f} MB, "
            f"{self.seconds:.0f} s: {self.out}"
        )


def generate(out: str | Path, settings: ProceduralSettings, workers: int = 1) -> Report:
    """Write the set into `out`, or go on with it where an earlier run was stopped.

    Raises: UserError if `out` holds something else, or if a worker process was killed.
    """
    began, out = time.monotonic(), Path(out)
    begin_folder(out, format=RAW_FORMAT, settings=settings.model_dump())
    planned = plan(settings)
    n_shards = -(-settings.count // settings.shard_size)
    found = {number: finished_shard(_shard_path(out, number)) for number in range(n_shards)}
    shards = {number: info for number, info in found.items() if info}
    todo = [number for number in found if number not in shards]
    n_kept, done = len(shards), sum(info.samples for info in shards.values())
    with Bar(total=settings.count, description="procedural objects", start=done) as bar:
        shards |= _make_shards(out, settings, planned, todo, workers, bar)
    counts = {"samples": settings.count}
    for item in planned:
        counts[item.split] = counts.get(item.split, 0) + 1
    infos = [shards[number] for number in range(n_shards)]
    content = {"caption_grammar": "shapeloom.data_pipes.grammar", "plan_sha256": _plan_hash(planned)}
    write_manifest(out, format=RAW_FORMAT, settings=settings.model_dump(), shards=infos, counts=counts, extra=content)
    return Report(out, counts, len(infos), n_kept, sum(i.bytes for i in infos), time.monotonic() - began)


def _plan_hash(planned: list[Planned]) -> str:
    return sha256_json([[item.split, item.spec.to_json()] for item in planned])


def _shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.tar"


def _make_shards(
    out: Path, settings: ProceduralSettings, planned: list[Planned], todo: list[int], workers: int, bar: Bar
) -> dict[int, ShardInfo]:
    """Make the asked shards in this process or in spawned ones; progress counts objects, not shards."""
    if workers <= 1 or len(todo) <= 1:
        return {number: _make_shard(out, settings, planned, number, lambda: bar.update(1)) for number in todo}
    context = get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (counter, planned)) as pool:
        futures = {pool.submit(_make_shard_in_worker, out, settings, number): number for number in todo}
        shards: dict[int, ShardInfo] = {}
        shown, waiting = 0, set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                shards |= {futures[future]: future.result() for future in done}
                shown, before = counter.value, shown
                bar.update(shown - before)
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps for memory: run the same command again with fewer workers; "
                f"the finished shards in {out} are kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, do not wait for what is still queued
    return shards


_worker: dict[str, Any] = {}  # of a spawned process: what every one of its shards needs


def _start_worker(counter: Any, planned: list[Planned]) -> None:
    end_with_parent()
    _worker.update(counter=counter, planned=planned)


def _make_shard_in_worker(out: Path, settings: ProceduralSettings, number: int) -> ShardInfo:
    def note() -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += 1

    return _make_shard(out, settings, _worker["planned"], number, note)


def _make_shard(
    out: Path, settings: ProceduralSettings, planned: list[Planned], number: int, note: Callable[[], None]
) -> ShardInfo:
    start = number * settings.shard_size
    with ShardWriter(_shard_path(out, number)) as writer:
        for index in range(start, min(start + settings.shard_size, settings.count)):
            writer.write(*make_sample(settings, index, planned[index]), planned[index].split)
            note()
    assert writer.info is not None
    return writer.info
