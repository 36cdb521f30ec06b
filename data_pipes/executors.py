"""Where the work of a build is done: by processes of this machine, or as tasks of a Ray cluster.

Either way each file is built in a process of its own that has limits and may die, and a shard is written by whoever
builds its files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from ..progress import Bar
from .asset import BuildSettings, Built, Job, Refused, Unchanged, build_asset, prepare, with_text
from .ledger import Copy, Entry, Ledger, Make, Part, Settle, ShardTask, shard_name
from .licences import LicenceFilter
from .limits import Limits
from .places import UNKNOWN, Place
from .raw_sample import decode_json
from .shards import FinishedShard, ShardInfo, ShardWriter, index_name, split_of
from .store import Store
from .workers import Failed, isolated_map

__all__ = ["Context", "Guard", "make_all", "make_all_on_ray"]


@dataclass(frozen=True)
class Guard:
    """What one file may take before it is given up."""

    cpu_s: int = 60
    wall_s: float = 600.0
    memory_bytes: int = 4 << 30
    limits: Limits = Limits()

    @classmethod
    def of(cls, settings: BuildSettings) -> Guard:
        """Enough for any single object; path tracing takes its own time."""
        if settings.renderer == "raster":
            return cls()
        seconds = settings.blender.time_limit_s
        return cls(cpu_s=cls.cpu_s + int(seconds), wall_s=cls.wall_s + seconds, memory_bytes=4 * cls.memory_bytes)


@dataclass(frozen=True)
class Context:
    """What all shards of a build have in common."""

    store: Store
    settings: BuildSettings
    guard: Guard
    licences: LicenceFilter


_Result = Built | Refused | Unchanged | Failed


def make_all(tasks: Sequence[ShardTask], places: dict[str, Place], context: Context, workers: int, bar: Bar) -> None:
    """Write the shards, one after the other; files of the next ones are built meanwhile."""
    results = _results(tasks, places, context, workers)
    for task in tasks:
        _make_shard(task, places, context, results, bar)


def make_all_on_ray(
    tasks: Sequence[ShardTask], places: dict[str, Place], context: Context, workers: int | None, bar: Bar
) -> None:
    """Write the shards as tasks of the Ray cluster that RAY_ADDRESS, or Ray's own search, finds.

    Each task has one processor, builds one shard and writes it to the store; so every machine must see the 3D files
    and the store under the same names. A task whose machine is lost is tried again elsewhere.

    Args:
        workers: tasks at a time; as many as the cluster has processors by default.
    Raises: UserError without Ray or a cluster.
    """
    ray = _connected()
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    make = ray.remote(num_cpus=1, max_retries=3)(_make_alone)
    waiting = iter(tasks)
    running: dict[Any, ShardTask] = {}
    try:
        while True:
            while len(running) < at_once and (task := next(waiting, None)) is not None:
                files = {slot.file: places[slot.file] for slot in task.slots if isinstance(slot, Make)}
                running[make.remote(task, files, context)] = task
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, (UserError, OSError)) else error from None
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"the Ray cluster lost the work on {shard_name(task.number)} ({type(error).__name__}): run the "
                    f"same command again, finished shards are kept"
                ) from None
            bar.update(len(task.slots))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray, which is not installed: pip install 'shapeloom[ray]'") from None
    if not ray.is_initialized():
        _refuse_silence(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster was found ({' '.join(str(error).split())[:100]}): start one with `ray start --head`, "
                f"name one in RAY_ADDRESS, or use --executor local"
            ) from None
    return ray


def _refuse_silence(address: str) -> None:
    """Raises UserError where HOST:PORT does not answer: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS is {address}, which does not answer ({error.strerror or error})") from None


def _make_alone(task: ShardTask, places: dict[str, Place], context: Context) -> None:
    """Runs on a machine of the cluster, again if that machine was lost: then the shard may be there already."""
    if _is_made(task, places, context.store):
        return
    results = _results([task], places, context, 1)
    with Bar(len(task.slots), quiet=True) as bar:
        _make_shard(task, places, context, results, bar)


def _is_made(task: ShardTask, places: dict[str, Place], store: Store) -> bool:
    """Whether a shard is what its task asks for."""
    part = Ledger(store).finished_part(task.number)
    if part is None or len(part.entries) != len(task.slots):
        return False
    for entry, slot in zip(part.entries, task.slots):
        asked = slot.entry.text if isinstance(slot, Settle) else slot.text
        if (entry.file, entry.text) != (slot.file, asked):
            return False
        if isinstance(slot, Make) and entry.stamp != places[slot.file].stamp:
            return False
        if isinstance(slot, Settle) and entry != slot.entry:
            return False
    return True


def _results(tasks: Iterable[ShardTask], places: dict[str, Place], context: Context, workers: int) -> Iterator[_Result]:
    guard = context.guard
    jobs = (_job(slot, places, context) for task in tasks for slot in task.slots if isinstance(slot, Make))
    return isolated_map(
        build_asset,
        jobs,
        workers=workers,
        cpu_s=guard.cpu_s,
        wall_s=guard.wall_s,
        memory_bytes=guard.memory_bytes,
        prepare=prepare,
    )


def _job(slot: Make, places: dict[str, Place], context: Context) -> Job:
    before = None
    if slot.before is not None and slot.before.sha256 is not None:
        before = slot.before.sha256, {name: sha256 for name, (sha256, _) in slot.before.sidecars.items()}
    place, limits = places[slot.file], context.guard.limits
    return Job(place, slot.file, slot.uid, slot.text, context.settings, limits, context.licences, before)


# ---------------------------------------------------------------------------------------------------------- one shard


def _make_shard(
    task: ShardTask, places: dict[str, Place], context: Context, results: Iterator[_Result], bar: Bar
) -> None:
    """Write a shard and its part."""
    name = shard_name(task.number)
    entries: list[Entry] = []

    def record(shard: ShardInfo) -> None:
        Ledger(context.store).write(Part(task.number, shard, entries))

    with _Before(context.store, name) as before, ShardWriter(name, context.store, record) as writer:
        for slot in task.slots:
            entry, members = _outcome(slot, places, context, results, before)
            if members is not None:
                writer.write(entry.uid, members, split_of(entry.uid))
            entries.append(entry)
            bar.update(1)


def _outcome(
    slot: Make | Copy | Settle,
    places: dict[str, Place],
    context: Context,
    results: Iterator[_Result],
    before: _Before,
) -> tuple[Entry, dict[str, bytes] | None]:
    """What becomes of a file, and the members of its sample if it has one."""
    if isinstance(slot, Settle):
        return slot.entry, None
    if isinstance(slot, Copy):
        return _copied(slot.entry, slot.text, context.licences, before)
    result, place = next(results), places[slot.file]
    entry = Entry(slot.file, slot.uid, place.stamp, slot.text)
    if isinstance(result, Built):
        made = replace(
            entry,
            sample=True,
            sha256=result.sha256,
            sidecars=result.sidecars,
            warnings=result.warnings,
            signature=result.signature,
        )
        return made, result.members
    if isinstance(result, Unchanged):
        assert slot.before is not None
        as_it_was = replace(slot.before, stamp=place.stamp, sidecars=result.sidecars)
        return _copied(as_it_was, slot.text, context.licences, before)
    if isinstance(result, Refused) and result.rejected.kind == "unavailable":
        # It may be had another time: what is there of it stays, and the next run tries again.
        unknown = list(UNKNOWN)
        if slot.before is not None:
            return _copied(replace(slot.before, stamp=unknown), slot.text, context.licences, before)
        entry = replace(entry, stamp=unknown)
    if isinstance(result, Refused):
        picture = None
        if result.picture is not None:
            picture = f"rejected/{slot.uid}.webp"
            context.store.write(picture, result.picture)
        reason, hint = result.rejected.reason, result.rejected.hint
        return replace(entry, reason=reason, hint=hint, picture=picture, sidecars=result.sidecars), None
    return replace(entry, reason=result.reason, hint="open it in a 3D editor and export it again"), None


def _copied(entry: Entry, text: Any, licences: LicenceFilter, before: _Before) -> tuple[Entry, dict[str, bytes] | None]:
    """A sample as it was, with the words that it has now."""
    if text != entry.text and (refusal := licences.refusal(text.licence)):
        plain = Entry(entry.file, entry.uid, entry.stamp, text)
        return replace(plain, sidecars=entry.sidecars, reason=refusal.reason, hint=refusal.hint), None
    members = before.read(entry.uid)
    if text == entry.text:
        return entry, members
    meta = decode_json(members["json"], f"{entry.uid}.json")
    return replace(entry, text=text), {**members, "json": with_text(meta, entry.file, text)}


class _Before:
    """The shard that is being replaced, opened if a sample of it is asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._held = contextlib.ExitStack()
        self._shard: FinishedShard | None = None

    def __enter__(self) -> _Before:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def read(self, uid: str) -> dict[str, bytes]:
        if self._shard is None:
            try:
                tar = self._held.enter_context(self._store.local(self._name))
                self._shard = FinishedShard(tar, self._store.read(index_name(self._name)))
            except FileNotFoundError:
                where = self._store.where(self._name)
                raise UserError(f"{where} went while it was read: run the same command again, it goes on") from None
        return self._shard.read(uid)
