"""What became of every file in a build, one record a shard: by it a build goes on, and does only what is new.

`parts/shard-00000.json` says which shard it is of and, file by file, what was made of it and from which bytes. It is
written when its shard is, before that gets its name and its index (shards.py), which is what makes both count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import parse_json
from .captions import NO_TEXT, AssetText
from .hashes import Hashes
from .places import Place, is_known
from .shards import ShardInfo, index_name
from .store import Store, side_by_side

__all__ = ["Copy", "Entry", "Ledger", "Make", "Part", "Settle", "ShardTask", "new_uids", "plan", "shard_name"]

_FOLDER = "parts"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: what it was (stamps and hashes), and what became of it.

    sidecars: sha256 and stamp of each file that it names, both None where there is none.
    sample: whether there is one; otherwise `reason` and `hint` say why not, and `picture` shows it.
    duplicate_of: the file because of which it was left out.
    """

    file: str
    uid: str
    stamp: list[Any] | None
    text: AssetText
    sidecars: dict[str, list[Any]] = field(default_factory=dict)
    sha256: str | None = None
    sample: bool = False
    warnings: int = 0
    signature: list[float] | None = None
    reason: str | None = None
    hint: str | None = None
    picture: str | None = None
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Part:
    """A finished shard and the files it was made of, in its order."""

    number: int
    shard: ShardInfo
    entries: list[Entry]

    def to_json(self) -> str:
        # Without the default values, which are most of it.
        entries = [{k: v for k, v in asdict(e).items() if v != _DEFAULTS.get(k, e)} for e in self.entries]
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in entries)
        return f'{{"shard": {json.dumps(asdict(self.shard))}, "entries": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, number: int, fields: dict[str, Any]) -> Part:
        """Raises KeyError or TypeError if it is none."""
        entries = [
            Entry(**{**entry, "text": AssetText(**{**entry["text"], "captions": tuple(entry["text"]["captions"])})})
            for entry in fields["entries"]
        ]
        return cls(number, ShardInfo(**fields["shard"]), entries)


_DEFAULTS: dict[str, Any] = {"sidecars": {}, "sha256": None, "sample": False, "warnings": 0, "signature": None}
_DEFAULTS |= dict.fromkeys(("reason", "hint", "picture", "duplicate_of"))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


class Ledger:
    """The parts in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def numbers(self) -> list[int]:
        """Of the shards that have a part, in order."""
        found = (re.fullmatch(r"shard-(\d{5,})\.json", name) for name in self.store.sizes(_FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def read(self, number: int) -> Part | None:
        """A part, or None if it is damaged or there is none. Raises UserError where it cannot be had now."""
        try:
            data = self.store.read(_part_name(number))
        except FileNotFoundError:
            return None
        try:
            return Part.from_json(number, parse_json(data, "the record of a shard"))
        except (UserError, KeyError, TypeError, AttributeError):
            return None

    def finished(self) -> Iterator[Part]:
        """The parts whose shards are there, one after the other."""
        sizes = self.store.sizes()
        parts = side_by_side(self.store, lambda number: self.finished_part(number, sizes), self.numbers())
        return (part for part in parts if part is not None)

    def finished_part(self, number: int, sizes: Mapping[str, int] | None = None) -> Part | None:
        """A part whose shard is there, among files of these sizes."""
        part, sizes = self.read(number), self.store.sizes() if sizes is None else sizes
        if part is None or index_name(part.shard.name) not in sizes:
            return None
        return part if sizes.get(part.shard.name) == part.shard.bytes else None

    def write(self, part: Part) -> None:
        self.store.write(_part_name(part.number), part.to_json())

    def remove(self, number: int) -> None:
        """A shard and its part."""
        for name in (index_name(shard_name(number)), _part_name(number), shard_name(number)):
            self.store.delete(name)


def _part_name(number: int) -> str:
    return f"{_FOLDER}/{PurePosixPath(shard_name(number)).stem}.json"


# ------------------------------------------------------------------------------------------------------- what to do


@dataclass(frozen=True, slots=True)
class Make:
    """A file to build; with the entry it had, if only its date may have changed."""

    file: str
    uid: str
    text: AssetText
    before: Entry | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A sample to take over as it is, but for the words about it."""

    entry: Entry
    text: AssetText

    @property
    def file(self) -> str:
        return self.entry.file


@dataclass(frozen=True, slots=True)
class Settle:
    """A file that stays, or is now, left out."""

    entry: Entry

    @property
    def file(self) -> str:
        return self.entry.file


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: its number and files in order."""

    number: int
    slots: list[Make | Copy | Settle]


@dataclass(frozen=True)
class Plan:
    """Shards to write, to keep (how many files each has, by number) and to remove; of the samples that there were, the
    number and how many are of files that are gone."""

    tasks: list[ShardTask]
    kept: dict[int, int]
    emptied: list[int]
    samples: int = 0
    gone: int = 0


def plan(
    ledger: Ledger,
    places: Mapping[str, Place],
    texts: Mapping[str, AssetText],
    shard_size: int,
    *,
    fill: bool,
    retry: bool = False,
) -> Plan:
    """What is new or changed since the shards there were written.

    A shard with a file that changed or went is written again, its other samples copied. New files fill the last shard
    and then make shards of their own.

    Args:
        places: every file there is now, in order.
        texts: of the captions file.
        fill: whether the last shard may be added to; not after an interruption, which must give the shards that there
            would have been without it.
        retry: try the files again that were rejected.
    """
    tasks: dict[int, list[Make | Copy | Settle]] = {}
    sizes: dict[int, int] = {}  # files of the shards that need nothing
    new, uids, sound, copies = dict.fromkeys(places), Hashes(), Hashes(), []
    # Archives that cannot be opened now: what came from them stays.
    shut = tuple(f"{name}/" for name, place in places.items() if place.refused is not None)
    samples = gone = 0
    for part in ledger.finished():
        slots: list[Make | Copy | Settle] = []
        for entry in part.entries:
            text = texts.get(entry.file, NO_TEXT)
            samples += entry.sample
            if entry.file in new:
                del new[entry.file]
                slot = _slot(entry, places[entry.file], text, retry)
            elif entry.file.startswith(shut):
                slot = Copy(entry, text) if entry.sample else Settle(entry)
            else:
                gone += entry.sample
                continue
            slots.append(slot)
            uids.add(entry.uid)
            if isinstance(slot, Copy):
                sound.add(entry.file)
            if entry.duplicate_of is not None:
                copies.append((part.number, entry.duplicate_of))
        if len(slots) == len(part.entries) and all(map(_is_as_it_was, slots)):
            sizes[part.number] = len(slots)
        else:
            tasks[part.number] = slots
    lone = sound.holds([of for _, of in copies])
    for number in {number for (number, _), there in zip(copies, lone) if not there}:
        slots = tasks.get(number) or _as_they_are(ledger, number)
        tasks[number] = [_without_original(slot, sound) for slot in slots]
        sizes.pop(number, None)
    emptied = [number for number, slots in tasks.items() if not slots]
    for number in emptied:
        del tasks[number]
    named = new_uids(list(new), uids).items()
    fresh: list[Make | Copy | Settle] = [Make(file, uid, texts.get(file, NO_TEXT)) for file, uid in named]
    last = max((*sizes, *tasks), default=None)
    if fill and last is not None and fresh:
        there = tasks.get(last) or (_as_they_are(ledger, last) if sizes[last] < shard_size else [])
        if room := max(0, shard_size - len(there)) if there else 0:
            tasks[last] = there + fresh[:room]
            sizes.pop(last, None)
            fresh = fresh[room:]
    # Damaged shards are written again; new ones come last, so that what was there first stays first.
    sound_ones = {*sizes, *tasks, *emptied}
    damaged = [number for number in ledger.numbers() if number not in sound_ones]
    free = itertools.chain(damaged, itertools.count(1 + max((*sound_ones, *damaged), default=-1)))
    for start in range(0, len(fresh), shard_size):
        tasks[next(free)] = list(fresh[start : start + shard_size])
    emptied = [number for number in emptied if number not in tasks]
    ordered = [ShardTask(number, tasks[number]) for number in sorted(tasks)]
    return Plan(ordered, sizes, emptied, samples, gone)


def _as_they_are(ledger: Ledger, number: int) -> list[Make | Copy | Settle]:
    part = ledger.read(number)
    assert part is not None, "it was read a moment ago"
    return [Copy(entry, entry.text) if entry.sample else Settle(entry) for entry in part.entries]


def _without_original(slot: Make | Copy | Settle, sound: Hashes) -> Make | Copy | Settle:
    """A file that was left out as a copy is built where there is no original any more."""
    if not isinstance(slot, Settle) or slot.entry.duplicate_of is None or sound.holds([slot.entry.duplicate_of])[0]:
        return slot
    return Make(slot.entry.file, slot.entry.uid, slot.entry.text)


def _slot(entry: Entry, place: Place, text: AssetText, retry: bool) -> Make | Copy | Settle:
    if place.refused is not None and not entry.sample:
        same = entry.reason == place.refused.reason
        return Settle(entry) if same and not retry else Make(entry.file, entry.uid, text)
    same = (
        entry.stamp == place.stamp
        and is_known(place.stamp)
        and all(place.sidecar_stamp(name) == stamp for name, (_, stamp) in entry.sidecars.items())
    )
    if entry.sample:
        return Copy(entry, text) if same else Make(entry.file, entry.uid, text, before=entry)
    if same and entry.text == text and not retry:
        return Settle(entry)
    return Make(entry.file, entry.uid, text)


def _is_as_it_was(slot: Make | Copy | Settle) -> bool:
    return isinstance(slot, Settle) or (isinstance(slot, Copy) and slot.text == slot.entry.text)


def new_uids(files: Sequence[str], taken: Hashes | None = None) -> dict[str, str]:
    """A WebDataset key for each file: its path without suffix, plus a hash where that is not unique or too long."""
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", file.rpartition(".")[0].replace("/", "__")) for file in files]
    count = Counter(plain)
    is_taken = np.zeros(len(plain), bool) if taken is None else taken.holds(plain)

    def unique(file: str, uid: str, is_taken: bool) -> str:
        if count[uid] == 1 and len(uid) <= 150 and not is_taken:
            return uid
        return f"{uid[:150]}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"

    return {file: unique(file, uid, there) for file, uid, there in zip(files, plain, is_taken)}
