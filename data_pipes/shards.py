"""Shards: WebDataset tars with an index beside each, and a manifest that names what made them.

A folder of shards holds

    manifest.json             format, settings and their hash, shard list with sha256, counts
    shard-00000.tar           members {uid}.{suffix}, read in order by plain `webdataset`
    shard-00000.index.json    where each member lies, so that one sample is one seek away, and each sample's CRC-32
    index.bin                 all of these in a form that opens at once (index.py)

A shard counts as finished once its index exists: the tar is renamed into place first, the index last. The manifest
exists from the start with "complete": false, so that a killed run is told from a finished one and may go on.

The members of a raw sample are described in raw_sample.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import ASIDE, parse_json, read_json, sha256_json
from .hashes import Hashes
from .index import INDEX, Index, join
from .raw_sample import encode_raw_sample
from .sample_bytes import crc32
from .store import LocalStore, Store, side_by_side, store_at

__all__ = [
    "FinishedShard",
    "LATENT_FORMAT",
    "MANIFEST",
    "RAW_FORMAT",
    "ShardInfo",
    "ShardWriter",
    "begin_folder",
    "crc32",
    "encode_raw_sample",
    "finished_shard",
    "split_of",
    "write_manifest",
]

RAW_FORMAT = "shapeloom-raw/1"
LATENT_FORMAT = "shapeloom-latent/1"
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")

_UID = re.compile(r"[A-Za-z0-9_-]{1,200}")
_BLOCK = 512


def split_of(uid: str) -> str:
    """train 90 %, val 5 %, test 5 % by the uid's hash alone, so that added data never moves an asset."""
    place = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.9 else "val" if place < 0.95 else "test"


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.json"


def index_path(shard: Path) -> Path:
    return shard.with_name(index_name(shard.name))


class ShardWriter:
    """Writes one shard: aside first, under its name when the block ends without an exception.

    Example::

        with ShardWriter(out / "shard-00000.tar") as writer:
            writer.write(uid, members, "train")
        writer.info

    Args:
        path: of the shard, or its name in `store`.
        store: where it goes; the folder that `path` is in by default.
        record: called with what is known of the shard when it is written and not yet in its place: a record made
            by it exists for every finished shard.
    """

    def __init__(
        self, path: str | Path, store: Store | None = None, record: Callable[[ShardInfo], None] | None = None
    ) -> None:
        self.store: Store = LocalStore(Path(path).parent) if store is None else store
        self.name = Path(path).name
        self._record = record
        self.info: ShardInfo | None = None
        self._members: dict[str, dict[str, tuple[int, int]]] = {}
        self._splits: dict[str, str] = {}
        self._crc32: dict[str, int] = {}
        self._sha256 = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> ShardWriter:
        self._aside = self.store.compose(self.name)
        self._file = open(self._aside, "wb")
        return self

    def write(self, uid: str, members: dict[str, bytes], split: str) -> None:
        """Add one sample. Raises ValueError for a uid that WebDataset would cut (a dot) or that was written before."""
        if not _UID.fullmatch(uid):
            raise ValueError(f"uid {uid!r} must be 1 to 200 letters, digits, '_' or '-'")
        if uid in self._members:
            raise ValueError(f"uid {uid!r} is written twice into {self.name}")
        places = self._members[uid] = {}
        self._splits[uid], self._crc32[uid] = split, crc32(members.values())
        for suffix, data in members.items():
            header = tarfile.TarInfo(f"{uid}.{suffix}")  # owner, time and mode keep their fixed defaults
            header.size = len(data)
            self._append(header.tobuf(tarfile.GNU_FORMAT))
            places[suffix] = (self._size, len(data))
            self._append(data)
            self._append(b"\0" * (-len(data) % _BLOCK))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._append(b"\0" * (2 * _BLOCK))
                with self._naming_the_shard():
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()
            return
        self._file.close()
        self.info = ShardInfo(self.name, len(self._members), self._size, self._sha256.hexdigest())
        self.store.delete(index_name(self.name))  # never an index beside a tar it does not describe
        try:
            if self._record is not None:
                self._record(self.info)
            self.store.publish(self._aside, self.name)
        except BaseException:
            self._discard()
            raise
        index = {**asdict(self.info), "splits": self._splits, "crc32": self._crc32, "members": self._members}
        self.store.write(index_name(self.name), json.dumps(index, separators=(",", ":")))  # in the order written

    @contextlib.contextmanager
    def _naming_the_shard(self) -> Iterator[None]:
        """A full disk does not say by itself which file it is that does not fit."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.store.where(self.name)) from None

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing tries once more to write what is buffered
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        with self._naming_the_shard():
            self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)


class FinishedShard:
    """A finished shard in a folder that is being added to, for its samples to be copied.

    Args:
        tar: the shard as a local file.
        index: what its index.json holds.
    """

    def __init__(self, tar: Path, index: bytes) -> None:
        self._tar, self._index = tar, parse_json(index, f"the index of {tar.name}")

    def read(self, uid: str) -> dict[str, bytes]:
        """Members of a sample as they were written. Raises UserError if they are not what was written."""
        members = {}
        with open(self._tar, "rb") as file:
            for suffix, (offset, size) in self._index["members"][uid].items():
                file.seek(offset)
                members[suffix] = file.read(size)
        if crc32(members.values()) != self._index["crc32"][uid]:
            raise UserError(f"{uid} in {self._index['name']} is damaged: delete that shard and build it again")
        return members


def finished_shard(path: str | Path) -> ShardInfo | None:
    """What is known of a shard that an earlier run finished, or None if it must be written (again)."""
    path = Path(path)
    if not (path.is_file() and index_path(path).is_file()):
        return None
    try:
        index = read_json(index_path(path), "the shard index")
        info = ShardInfo(index["name"], index["samples"], index["bytes"], index["sha256"])
    except (UserError, KeyError, TypeError):
        return None
    return info if info.name == path.name and info.bytes == path.stat().st_size else None


def begin_folder(out: str | Path | Store, *, format: str, settings: dict[str, Any]) -> None:
    """Claim `out` for shards of these settings; an unfinished or finished run of the same settings may go on in it.

    Raises: UserError if `out` holds anything else.
    """
    store = store_at(out)
    if isinstance(store, LocalStore) and store.folder.exists() and not store.folder.is_dir():
        raise UserError(f"{store.where()} is a file: give another output folder")
    there = stored_manifest(store)
    if there is not None:
        if not isinstance(there, dict) or there.get("format") != format:
            raise UserError(f"{store.where()} holds data of another format: give another output folder, or delete it")
        if there.get("settings_hash") != sha256_json(settings):
            differs = _first_difference(there.get("settings"), settings)
            raise UserError(
                f"{store.where()} was made with other settings ({differs}): give another output folder, or delete it"
            )
        return
    if not store.is_new():
        built = bool(store.sizes("parts"))
        lost = "put it back, for it tells with which settings the shards were made, or " if built else ""
        raise UserError(f"{store.where()} is not empty and has no {MANIFEST}: {lost}give another output folder")
    write_manifest(store, format=format, settings=settings, shards=[], counts={}, complete=False)


def stored_manifest(store: Store) -> Any:
    """What the manifest holds, or None if there is none. Raises UserError if it is no JSON."""
    try:
        return parse_json(store.read(MANIFEST), f"the manifest {store.where(MANIFEST)}")
    except FileNotFoundError:
        return None


def write_manifest(
    out: str | Path | Store,
    *,
    format: str,
    settings: dict[str, Any],
    shards: Iterable[ShardInfo],
    counts: dict[str, Any],
    extra: dict[str, Any] | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Write and return the manifest; with `complete` it is what makes the folder readable.

    Args:
        settings: JSON-able; everything that the bytes depend on, and nothing else (no paths, no worker count).
        counts: for people, e.g. {"samples": 3, "train": 2, "val": 1}.
        extra: more keys.
    Raises: UserError if two samples have one uid.
    """
    store, shards, kept = store_at(out), list(shards), None
    if complete:
        composed = store.compose(INDEX)
        try:
            kept = join_indices(store, [asdict(shard) for shard in shards], composed)
            store.publish(composed, INDEX)
        except BaseException:
            composed.unlink(missing_ok=True)
            raise
    manifest = {
        "format": format,
        "complete": complete,
        "settings": settings,
        "settings_hash": sha256_json(settings),
        "counts": counts,
        **(extra or {}),
        **({"index": kept} if kept else {}),
        "shards": [asdict(shard) for shard in shards],
    }
    store.write(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    if complete:
        for name in store.sizes():
            if ASIDE in name:  # left by a killed run
                store.delete(name)
    return manifest


def _first_difference(old: Any, new: dict[str, Any]) -> str:
    old = old if isinstance(old, dict) else {}
    if old.get("maker") != new.get("maker"):
        return "by another command"
    if old.get("recipe") != new.get("recipe"):
        return "by an older version, which made other bytes"
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            if key.endswith("_hash"):
                return f"{'other raw data' if key == 'raw_hash' else 'another ' + key.removesuffix('_hash')}"
            return f"{key} {old.get(key)!r} there, {new.get(key)!r} asked"
    return "its settings are damaged"


def join_indices(store: Store, shards: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Write the folder's index, from each shard's index.json, and return what the manifest must keep.

    Raises: UserError for one that is missing, damaged or of another shard, or for a uid that is there twice.
    """
    of = sha256_json([shard["sha256"] for shard in shards])
    kept = join(lambda: side_by_side(store, lambda shard: _shard_index(store, shard), shards), of, path)
    index, uids = Index.read(path, kept), Hashes()
    for i in range(len(index)):
        uids.add(index.uid[i].decode())
    # Hashes may agree by chance, so the uids themselves have the last word.
    if uids.repeated() and len(np.unique(index.uid)) != len(index):
        raise UserError(f"{store.where()} holds a uid twice: build it again")
    return kept


def _shard_index(store: Store, shard: dict[str, Any]) -> Index:
    """Of one shard. Raises UserError if it is missing, damaged or of another shard."""
    name = index_name(Path(str(shard["name"])).name)
    try:
        contents = parse_json(store.read(name), f"the shard index {store.where(name)}")
    except FileNotFoundError:
        raise UserError(f"the shard index {store.where(name)} does not exist") from None
    try:
        belongs, index = contents["sha256"] == shard["sha256"], Index.of_shard(contents)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{store.where(name)} is damaged ({error!r}): delete it and build the shard again") from None
    if not belongs or len(index) != shard["samples"]:
        raise UserError(f"{store.where(name)} belongs to another shard: delete both and build them again")
    return index
