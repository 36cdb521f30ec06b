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

import bisect
import contextlib
import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import ASIDE, parse_json, read_json, sha256_file, sha256_json
from .hashes import Hashes
from .index import INDEX, Index, join
from .raw_sample import decode_json, encode_raw_sample
from .sample_bytes import ByteSource, Damaged, crc32, cut_members, read_crc32
from .store import LocalStore, Store, store_at

__all__ = [
    "FinishedShard",
    "LATENT_FORMAT",
    "MANIFEST",
    "RAW_FORMAT",
    "ShardFolder",
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


# ---------------------------------------------------------------------------------------------- writing


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
        self._tar, self._index = tar, json.loads(index)

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
        raise UserError(f"{store.where()} is not empty and has no {MANIFEST}: give another output folder")
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
            kept = _join_indices(store, [asdict(shard) for shard in shards], composed)
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
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            if key.endswith("_hash"):
                return f"{'other raw data' if key == 'raw_hash' else 'another ' + key.removesuffix('_hash')}"
            return f"{key} {old.get(key)!r} there, {new.get(key)!r} asked"
    return "its settings are damaged"


# ---------------------------------------------------------------------------------------------- reading


class ShardFolder:
    """A finished folder of shards, with random access by uid or by index in the order of the shards.

    Opening reads the manifest and the indices and compares file sizes; bytes are checked by `verify`, and by `read`
    where it is asked to. Reading is safe from several threads and processes.

    Args:
        damaged: what a shard that is missing or of another size means here: "fatal" raises, "skip" says so on stderr.
    Raises: UserError where something is missing, unfinished, cut short or of another format.
    """

    folder: Any  # Path; the URL of a remote one
    retry_after_s: tuple[float, ...] = ()  # pauses after which what could not be read is asked for again

    def __init__(self, folder: str | Path, format: str = RAW_FORMAT, damaged: Damaged = "fatal") -> None:
        self.folder = self._here = Path(folder)
        self.damaged = damaged
        self.faulty: set[str] = set()  # names of shards that are known, and were said, to be damaged
        self._crc32: dict[int, np.ndarray] = {}  # by shard
        self.manifest = self._read_manifest(format)
        for shard in self.manifest["shards"]:
            self._check(shard)
        self._index = self._open_index()
        # Index of each shard's first sample.
        self._starts = np.cumsum([0, *(shard["samples"] for shard in self.manifest["shards"])])[:-1].tolist()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def uids(self) -> list[str]:
        """Of all samples in order: made when first asked for, a list of Python strings; `uid` is one alone."""
        return self._index.uids

    def uid(self, index: int) -> str:
        return self._index.uid[index].decode()

    @property
    def hash(self) -> str:
        """Of the settings and of every shard's bytes: what a child of this folder records as its parent."""
        return sha256_json([self.manifest["settings"], [shard["sha256"] for shard in self.manifest["shards"]]])

    def splits(self, uid_or_index: str | int) -> str:
        return self._index.splits[self._index.split[self._number(uid_or_index)]]

    def split_names(self) -> list[str]:
        """The splits that samples have, sorted."""
        return sorted(self._index.splits)

    def where(self, split: str | Collection[str] | None = None) -> np.ndarray:
        """As `select`, an array int64 [n]; of no samples for a split that none has."""
        if split is None:
            return np.arange(len(self))
        wanted = {split} if isinstance(split, str) else set(split)
        numbers = [number for number, name in enumerate(self._index.splits) if name in wanted]
        return np.flatnonzero(np.isin(self._index.split, numbers))

    def select(self, split: str | Collection[str] | None = None) -> list[int]:
        """Indices of the samples of a split, of several, or of all.

        Raises: UserError for a split that no sample has.
        """
        self.refuse_unknown(split)
        return self.where(split).tolist()

    def refuse_unknown(self, split: str | Collection[str] | None) -> None:
        """Raises UserError for a split that no sample has."""
        wanted = {split} if isinstance(split, str) else set(split or ())
        if unknown := wanted - set(self._index.splits):
            raise UserError(f"{self.folder} has no split '{min(unknown)}'; it has {', '.join(self.split_names())}")

    def has(self, start: str) -> bool:
        """Whether any sample has a member whose name starts so."""
        return any(name.startswith(start) for names in self._index.layouts for name in names)

    def suffixes(self, uid_or_index: str | int) -> list[str]:
        """Names of the sample's members, in the order they were written."""
        return list(self._index.layouts[self._index.layout[self._number(uid_or_index)]])

    def sizes(self, uid_or_index: str | int) -> dict[str, int]:
        """Bytes of the sample's members, by name."""
        places = self._index.places(self._number(uid_or_index))
        return {name: size for name, (_, size) in places.items()}

    def read(
        self, uid_or_index: str | int, suffixes: Iterable[str] | None = None, *, check: bool = False
    ) -> dict[str, bytes]:
        """Bytes of the asked members (all by default).

        Args:
            check: compare the sample's bytes with its CRC-32, if its shard's index has one; takes all its members.
        Raises: UserError for a member that the sample lacks, and where the shard is missing, ends early or differs.
        """
        index = self._number(uid_or_index)
        wanted = self.suffixes(index) if suffixes is None else list(suffixes)
        start, end = self.span(index, wanted, check=check)
        try:
            with contextlib.closing(self.open(self.shard_name(index), start, end - start)) as file:
                data = file.read(end - start)
        except FileNotFoundError:
            raise UserError(f"shard {self._shard(index)} is missing: run the command that makes it again") from None
        return self.cut(index, data, wanted, check=check)

    def span(self, index: int, suffixes: Iterable[str], *, check: bool = False) -> tuple[int, int]:
        """First byte and end, in its shard, of what must be read for some of a sample's members, as `read` does."""
        places = self._index.places(index)
        whole = check and self.crc32(index) is not None
        asked = list(places.values()) if whole else [places[name] for name in suffixes if name in places]
        return min((offset for offset, _ in asked), default=0), max((sum(place) for place in asked), default=0)

    def cut(self, index: int, data: bytes, suffixes: Iterable[str], *, check: bool = False) -> dict[str, bytes]:
        """What `read` returns, of the bytes of `span` that are there already."""
        start, _ = self.span(index, suffixes, check=check)
        crc = self.crc32(index) if check else None
        return cut_members(data, start, self._index.places(index), suffixes, crc, self.uid(index), self._shard(index))

    def crc32(self, index: int) -> int | None:
        """A sample's, from its shard's index, which is read once; None where that has none (older folders)."""
        number = self.shard_number(index)
        shard, start = self.manifest["shards"][number], self._starts[number]
        if number not in self._crc32:
            uids = map(self.uid, range(start, start + shard["samples"]))
            self._crc32[number] = read_crc32(lambda: self._index_file(shard["name"]), uids)
        of_shard = self._crc32[number]
        return int(of_shard[index - start]) if len(of_shard) else None

    def open(self, name: str, offset: int = 0, size: int | None = None) -> ByteSource:
        """A file of the folder, to be read from a byte on, for `size` bytes at most (None: to its end)."""
        file = open(self._here / name, "rb")  # noqa: SIM115
        file.seek(offset)
        return file

    def read_json(self, uid_or_index: str | int, suffix: str = "json") -> dict[str, Any]:
        """One of the sample's json members."""
        index = self._number(uid_or_index)
        return decode_json(self.read(index, [suffix])[suffix], f"{self.uid(index)}.{suffix} in {self._shard(index)}")

    def verify(self) -> None:
        """Read every byte and compare with the manifest. Raises UserError naming the first shard that differs."""
        for shard in self.manifest["shards"]:
            path = self._here / shard["name"]
            if sha256_file(path) != shard["sha256"]:
                raise UserError(f"shard {path} differs from what its manifest recorded: delete it and build it again")

    def _read_manifest(self, format: str) -> dict[str, Any]:
        if not self._here.is_dir():
            raise UserError(f"{self.folder} is not a folder of shards: it does not exist or is a file")
        path = self._here / MANIFEST
        manifest = read_json(path, "the manifest")
        if not isinstance(manifest, dict) or manifest.get("format") != format:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise UserError(f"{path}: field 'format' must be '{format}', got {found!r}")
        for field, kind in (("settings", dict), ("settings_hash", str), ("shards", list), ("counts", dict)):
            if not isinstance(manifest.get(field), kind):
                raise UserError(f"{path}: field '{field}' is missing or of the wrong kind")
        if not manifest.get("complete"):
            raise UserError(f"{self.folder} is unfinished: run the command that makes it again, it will go on")
        return manifest

    def _check(self, shard: dict[str, Any]) -> None:
        """Check that a shard is there and whole."""
        if not isinstance(shard, dict) or not {"name", "bytes", "sha256", "samples"} <= shard.keys():
            raise UserError(f"{self._here / MANIFEST}: an entry of 'shards' lacks name, samples, bytes or sha256")
        if fault := self._fault(shard):
            self.pass_over(Path(str(shard["name"])).name, fault)

    def pass_over(self, name: str, fault: str) -> None:
        """Note that a shard is damaged, saying so once; raises UserError where that is fatal."""
        if self.damaged == "fatal":
            raise UserError(fault)
        if name not in self.faulty:
            self.faulty.add(name)
            print(f"skipped as far as it is damaged: {fault}", file=sys.stderr, flush=True)

    def _fault(self, shard: dict[str, Any]) -> str:
        """What is wrong with a shard as far as its size tells; empty if nothing."""
        path = self._here / Path(str(shard["name"])).name  # a name with ../ in it cannot leave the folder
        try:
            size = path.stat().st_size
        except OSError:
            return f"shard {path} is missing: run the command that makes it again"
        if size != shard["bytes"]:
            return f"shard {path} is {size} bytes, its manifest says {shard['bytes']}: delete it and build it again"
        return ""

    def _open_index(self) -> Index:
        """The folder's index; put together from the shards' where there is none, as before there was one."""
        shards = self.manifest["shards"]
        try:
            index = Index.read(self._here / INDEX, self.manifest["index"])
            if len(index) == sum(shard["samples"] for shard in shards):
                return index
        except (OSError, KeyError, TypeError, ValueError):
            pass
        with tempfile.NamedTemporaryFile(prefix="shapeloom-index-") as file:
            kept = _join_indices(LocalStore(self._here), shards, Path(file.name))
            return Index.read(Path(file.name), kept)  # mapped, so that it stays readable without its name

    def _index_file(self, shard: str) -> Path:
        """A shard's index.json."""
        return index_path(self._here / Path(shard).name)

    def _number(self, uid_or_index: str | int) -> int:
        if isinstance(uid_or_index, str):
            if uid_or_index not in self._index.by_uid:
                raise UserError(f"{self.folder} has no sample '{uid_or_index}'")
            return self._index.by_uid[uid_or_index]
        return int(uid_or_index)

    def shard_number(self, index: int) -> int:
        """Which shard holds a sample."""
        return bisect.bisect_right(self._starts, index) - 1

    def shard_name(self, index: int) -> str:
        """The file name of the shard that holds a sample."""
        return Path(self.manifest["shards"][self.shard_number(index)]["name"]).name

    def _shard(self, index: int) -> str:
        """The shard that holds a sample, for messages."""
        return f"{self.folder}/{self.shard_name(index)}"


def _join_indices(store: Store, shards: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Write the folder's index, from each shard's index.json, and return what the manifest must keep.

    Raises: UserError for one that is missing, damaged or of another shard, or for a uid that is there twice.
    """
    kept = join(lambda: (_shard_index(store, shard) for shard in shards), path)
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
