"""A folder of 3D files to raw shards: `shapeloom data build`.

Every file is read, sampled and rendered in a worker process; one that cannot be is quarantined in `rejected.jsonl`
and the rest goes on. Run again, only what is new or changed is built. The bytes of a sample depend on the file, what
is said of it and `BuildSettings` alone, never on the workers; which shard it is in also on what was there before.

The output folder holds, beside the shards and their manifest (shards.py):

    parts/              what became of each file (ledger.py): all below is put together from it
    rejected.jsonl      file, reason, hint, and picture: a path in this folder, where there is one
    rejected/           those pictures
    duplicates.jsonl    file, uid, of, same: a file of the same shape as an earlier one, `of`
    attribution.csv     who made what, under which licence
"""

from __future__ import annotations

import array
import contextlib
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from ..errors import UserError
from ..files import sha256_json
from ..progress import Bar
from .asset import BuildSettings
from .blender import find_blender
from .caption_twins import words_of
from .captions import AssetText, caption_from_name, read_captions
from .duplicates import SIGNATURE_SIZE, find_duplicates
from .executors import Context, Guard, make_all, make_all_on_ray
from .find import Place, find
from .hashes import Hashes
from .ledger import Copy, Entry, Ledger, Make, Plan, Settle, ShardTask, plan
from .licences import LicenceFilter
from .places import LocalFolder
from .shards import RAW_FORMAT, ShardInfo, begin_folder, split_of, stored_manifest, write_manifest
from .store import LocalStore, Store, store_at
from .survey import general_form
from .urls import is_url, without_secrets

__all__ = ["BuildReport", "BuildSettings", "Guard", "build"]

RECIPE = 3  # counted up when the same settings give other bytes
Executor = Literal["local", "ray"]

MANY_GONE = 10  # assets: so many, and more than half of all, are not dropped unasked


@dataclass(frozen=True)
class BuildReport:
    """What came of a build; `reasons` counts the rejected files by reason, names and numbers in it left out."""

    files: int
    samples: int
    splits: dict[str, int]
    captions_from_names: int
    repeated_captions: int
    duplicates: int
    recoloured: int
    warnings: int
    reasons: dict[str, int]
    made: int
    copied: int
    dropped: int
    kept_shards: int
    seconds: float
    workers: int | None = field(compare=False)

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {self.splits[name]}" for name in ("train", "val", "test") if name in self.splits)
        lines = [f"{self.samples} of {self.files} files built ({splits})"]
        if self.made and self.seconds > 0:
            each = f", {self.made / self.seconds / self.workers:.2f} a second and worker" if self.workers else ""
            lines[0] += f" in {self.seconds:.0f} s{each}"
        if self.copied or self.dropped:
            said = {"new or changed": self.made, "copied as they were": self.copied, "dropped, as gone": self.dropped}
            lines.append(", ".join(f"{count} {what}" for what, count in said.items() if count))
        if self.kept_shards:
            lines.append(f"{self.kept_shards} shards were there already")
        if self.captions_from_names:
            lines.append(
                f"{self.captions_from_names} captions were made of file names: give --captions for better ones"
            )
        if self.repeated_captions:
            lines.append(f"{self.repeated_captions} captions have the same words as another, so tell nothing apart")
        if n := self.duplicates + self.recoloured:
            are = "file is" if n == 1 else "files are"
            colours = f", {self.recoloured} of them in other colours" if self.recoloured else ""
            lines.append(f"{n} {are} the same object as another{colours}: duplicates.jsonl says which")
        if self.warnings:
            have = "file has" if self.warnings == 1 else "files have"
            lines.append(f"{self.warnings} {have} warnings: see 'warnings' in their json, or data report")
        lines += [f"rejected: {count} because {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)


def build(
    folder: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    settings: BuildSettings | None = None,
    workers: int | None = 1,
    *,
    limit: int | None = None,
    guard: Guard | None = None,
    licences: LicenceFilter | None = None,
    executor: Executor = "local",
    retry: bool = False,
    prune: bool = False,
) -> BuildReport:
    """Make raw shards of all 3D files under a folder; run again, of those that are new or changed since.

    Archives (.zip, .tar, .tar.gz, .tgz) are read as folders, for which they are unpacked into a temporary one (in
    TMPDIR), at each run.

    Args:
        folder: a path, or a URL that fsspec knows.
        out: likewise.
        captions: a captions file, CSV or JSONL (see captions.py); without one, or for files that it leaves out,
            captions are made of file names.
        workers: processes, one thread each; on Ray, files at a time, by default as many as there are processors.
        limit: only so many files, those that were built before among them, others chosen at random by `settings.seed`.
        licences: files that it refuses are rejected, unread; all are taken by default.
        executor: this machine's processes, or a Ray cluster's.
        retry: files that were rejected before are tried again, changed or not.
        prune: drop the samples of files that are gone even where those are most of all.
    Raises: UserError for a missing or empty folder, a wrong captions file, an output folder that holds something
        else, or when not one file could be used.
    """
    settings, licences = settings or BuildSettings(), licences or LicenceFilter()
    guard = guard or Guard.of(settings)
    if settings.renderer == "blender":
        find_blender()
    if (workers is not None and workers < 1) or (limit is not None and limit < 1):
        raise UserError("workers and limit must be at least 1")
    if executor == "local" and workers is None:
        workers = 1
    if executor == "ray":  # other machines have another working directory
        folder, out = (path if is_url(path) else Path(path).resolve() for path in (folder, out))
    store = store_at(out)
    leave_out = store.folder if isinstance(store, LocalStore) else str(out)
    with tempfile.TemporaryDirectory(prefix="shapeloom-archives-") as scratch:
        places = find(folder, leave_out, Path(scratch))
        if executor == "ray":
            _refuse_unpacked(places, Path(scratch))
        texts = read_captions(captions, places) if captions is not None else {}
        if limit is not None and limit < len(places):
            places = _limited(places, limit, settings.seed, Ledger(store))
        licences.check_given(text.licence for text in texts.values())
        context = Context(store, settings, guard, licences)
        with _alone(store):
            report, first = _build(places, texts, context, workers, executor, retry, prune)
    if not report.samples:
        raise UserError(
            f"none of the {report.files} files in {without_secrets(str(folder))} could be used, the first, "
            f"{first.get('file')}, because {first.get('reason')}; {store.where('rejected.jsonl')} lists them all"
        )
    return report


def _build(
    places: dict[str, Place],
    texts: dict[str, AssetText],
    context: Context,
    workers: int | None,
    executor: Executor,
    retry: bool,
    prune: bool,
) -> tuple[BuildReport, dict[str, Any]]:
    """As `build`, of files that were found; with the first entry of rejected.jsonl."""
    store, ledger, identity = context.store, Ledger(context.store), _identity(context)
    begin_folder(store, format=RAW_FORMAT, settings=identity)
    was_complete = bool((stored_manifest(store) or {}).get("complete"))
    planned = plan(ledger, places, texts, context.settings.shard_size, fill=was_complete, retry=retry)
    if MANY_GONE <= planned.gone > planned.samples / 2 and not prune:
        raise UserError(
            f"{planned.gone} of the {planned.samples} assets in {store.where()} are of files that are not there now: "
            f"is it the right folder, and all of it there? If they are to be dropped, add --prune"
        )
    if was_complete and (planned.tasks or planned.emptied):
        # Before a shard of it is replaced, so that a reader is told rather than given other bytes.
        write_manifest(store, format=RAW_FORMAT, settings=identity, shards=[], counts={}, complete=False)
    for number in planned.emptied:
        ledger.remove(number)
    started = time.monotonic()
    _make(planned.tasks, places, context, workers, executor, "building", done=sum(planned.kept.values()))
    if "duplicate" in context.settings.judge.reject:
        _make(_without_duplicates(ledger), places, context, workers, executor, "leaving out duplicates")
    seconds = time.monotonic() - started
    return _summary(ledger, identity, planned, seconds, workers)


def _refuse_unpacked(places: dict[str, Place], scratch: Path) -> None:
    """Raises UserError for a file that only this machine has."""
    for name, place in places.items():
        if isinstance(place.folder, LocalFolder) and place.folder.path.is_relative_to(scratch):
            raise UserError(
                f"{name} is in an archive that is unpacked on this machine alone, where --executor ray cannot read it: "
                f"unpack it yourself, or use --executor local"
            )


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Against a second build into the same folder, as far as this machine and its file system can tell."""
    if not isinstance(store, LocalStore) or sys.platform == "win32" or store.folder.is_file():
        yield
        return
    import fcntl

    store.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(store.folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another build is writing to {store.where()}: wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _limited(places: dict[str, Place], limit: int, seed: int, ledger: Ledger) -> dict[str, Place]:
    """The files that were built before, and others up to the limit: the same ones whatever else there is."""
    files = list(places)
    built = Hashes()
    for part in ledger.finished():
        for entry in part.entries:
            built.add(entry.file)
    is_built = built.holds(files)
    room = max(0, limit - int(is_built.sum()))
    others = [file for file, there in zip(files, is_built) if not there]
    others.sort(key=lambda file: sha256_json([seed, file]))
    chosen = {*others[:room], *(file for file, there in zip(files, is_built) if there)}
    return {file: place for file, place in places.items() if file in chosen}


def _identity(context: Context) -> dict[str, Any]:
    """Everything that the bytes of a sample depend on beside its file and what is said of it."""
    return {
        "maker": "data build",
        "recipe": RECIPE,
        **context.settings.model_dump(mode="json"),
        **({"licences": context.licences.identity()} if context.licences else {}),
    }


def _make(
    tasks: Sequence[ShardTask],
    places: dict[str, Place],
    context: Context,
    workers: int | None,
    executor: Executor,
    doing: str,
    done: int = 0,
) -> None:
    total = done + sum(len(task.slots) for task in tasks)
    with Bar(total, doing, start=done, quiet=not tasks) as bar:
        if executor == "ray":
            make_all_on_ray(tasks, places, context, workers, bar)
        else:
            make_all(tasks, places, context, workers or 1, bar)


def _without_duplicates(ledger: Ledger) -> list[ShardTask]:
    """The shards that hold copies, in colours too, of earlier assets, to be written again without them."""
    originals = {d.file: d.of for d in _duplicates(ledger) if d.same == "shape and colours"}
    tasks = []
    for part in ledger.finished() if originals else ():
        if any(entry.sample and entry.file in originals for entry in part.entries):
            tasks.append(ShardTask(part.number, [_kept_or_left_out(entry, originals) for entry in part.entries]))
    return tasks


def _kept_or_left_out(entry: Entry, originals: dict[str, str]) -> Copy | Settle:
    if not entry.sample:
        return Settle(entry)
    if entry.file not in originals:
        return Copy(entry, entry.text)
    of = originals[entry.file]
    reason, hint = f"it is the same object as '{of}'", "leave it out, or take 'duplicate' out of judge.reject"
    return Settle(replace(entry, sample=False, reason=reason, hint=hint, duplicate_of=of))


@dataclass(frozen=True)
class _Again:
    """A sample that an earlier one is already; a row of duplicates.jsonl."""

    file: str
    uid: str
    of: str
    same: str


def _duplicates(ledger: Ledger) -> list[_Again]:
    """In the order of the shards: so what was there first stays the original."""
    n, signatures = 0, array.array("f")
    for entry in _samples(ledger):
        signatures.extend(entry.signature or ())
        n += 1
    found = find_duplicates(np.frombuffer(signatures, np.float32).reshape(n, SIGNATURE_SIZE))
    named = {d.number for d in found} | {d.of for d in found}
    entries = {number: entry for number, entry in enumerate(_samples(ledger)) if number in named} if found else {}
    return [_Again(entries[d.number].file, entries[d.number].uid, entries[d.of].file, d.same) for d in found]


def _samples(ledger: Ledger) -> Iterator[Entry]:
    return (entry for part in ledger.finished() for entry in part.entries if entry.sample)


# ---------------------------------------------------------------------------------------------------- what came of it


class _Tally:
    """Adds up the entries, one at a time: none is kept."""

    def __init__(self) -> None:
        self.files = self.samples = self.from_names = self.warnings = 0
        self.splits: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.captions = Hashes()
        self.first: dict[str, Any] = {}

    def add(self, entry: Entry) -> None:
        self.files += 1
        if not entry.sample:
            self.reasons[general_form(entry.reason or "")] += 1
            self.first = self.first or _rejection(entry)
            return
        self.samples += 1
        self.splits[split_of(entry.uid)] += 1
        self.from_names += not entry.text.captions
        self.warnings += entry.warnings > 0
        for caption in entry.text.captions or [caption_from_name(entry.file)]:
            self.captions.add(" ".join(words_of(caption)))


def _rejection(entry: Entry) -> dict[str, Any]:
    picture = {"picture": entry.picture} if entry.picture else {}
    return {"file": entry.file, "reason": entry.reason, "hint": entry.hint, **picture}


def _summary(
    ledger: Ledger, identity: dict[str, Any], planned: Plan, seconds: float, workers: int | None
) -> tuple[BuildReport, dict[str, Any]]:
    """Write all that is put together from the parts, and last the manifest that makes the folder complete."""
    store, tally = ledger.store, _Tally()
    shards: list[ShardInfo] = []
    pictures: set[str] = set()
    finished: set[int] = set()
    columns = ["uid", "file", "source", "licence", "author", "sha256"]
    with _text_file(store, "rejected.jsonl") as rejected, _text_file(store, "attribution.csv") as attribution:
        table = csv.writer(attribution, lineterminator="\n")
        table.writerow(columns)
        for part in ledger.finished():
            finished.add(part.number)
            if part.shard.samples:
                shards.append(part.shard)
            for entry in part.entries:
                tally.add(entry)
                if entry.sample:
                    text = entry.text
                    table.writerow([entry.uid, entry.file, text.source, text.licence, text.author, entry.sha256])
                else:
                    rejected.write(json.dumps(_rejection(entry), ensure_ascii=False) + "\n")
                    pictures.add(entry.picture or "")
    _remove_orphans(ledger, finished)
    for name in store.sizes("rejected"):
        if f"rejected/{name}" not in pictures:
            store.delete(f"rejected/{name}")
    found = _duplicates(ledger)
    slots = Counter(type(slot) for task in planned.tasks for slot in task.slots)
    with _text_file(store, "duplicates.jsonl") as file:
        file.writelines(json.dumps(asdict(again), ensure_ascii=False) + "\n" for again in found)
    report = BuildReport(
        files=tally.files,
        samples=tally.samples,
        splits=dict(tally.splits),
        captions_from_names=tally.from_names,
        repeated_captions=tally.captions.repeated(),
        duplicates=sum(d.same == "shape and colours" for d in found),
        recoloured=sum(d.same != "shape and colours" for d in found),
        warnings=tally.warnings,
        reasons=dict(tally.reasons.most_common()),
        made=slots[Make],
        copied=slots[Copy],
        dropped=planned.gone,
        kept_shards=len(planned.kept),
        seconds=seconds,
        workers=workers,
    )
    counts = {"samples": report.samples, **report.splits, "rejected": report.rejected}
    extra = {"captions_from_names": report.captions_from_names}
    complete = report.samples > 0
    write_manifest(
        store, format=RAW_FORMAT, settings=identity, shards=shards, counts=counts, extra=extra, complete=complete
    )
    return report, tally.first


def _remove_orphans(ledger: Ledger, finished: set[int]) -> None:
    """Shards that a killed run began and no later one needed: readers of all tars in the folder would find them."""
    names = [re.match(r"shard-(\d{5,})\.", name) for name in ledger.store.sizes()]
    for number in {int(match[1]) for match in names if match} | set(ledger.numbers()):
        if number not in finished:
            ledger.remove(number)


@contextlib.contextmanager
def _text_file(store: Store, name: str) -> Iterator[TextIO]:
    """A text file that may grow large, under its name once it is whole."""
    composed = store.compose(name)
    try:
        with open(composed, "w", encoding="utf-8", newline="") as file:
            yield file
        store.publish(composed, name)
    except BaseException:
        composed.unlink(missing_ok=True)
        raise
