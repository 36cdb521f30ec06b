"""A finished folder of shards (shards.py), read by sample: one seek each."""

from __future__ import annotations

import bisect
import contextlib
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json, sha256_file, sha256_json
from .index import INDEX, Index
from .raw_sample import decode_json
from .sample_bytes import ByteSource, Damaged, cut_members, read_crc32
from .shards import MANIFEST, RAW_FORMAT, index_path, join_indices
from .store import LocalStore

__all__ = ["ShardFolder", "lacks"]


def lacks(folder: object, name: str) -> UserError:
    return UserError(f"{folder} has no {name}: is it a folder of shards (data build makes them), and all of it copied?")


class ShardFolder:
    """A finished folder of shards, with random access by uid or by index in the order of the shards.

    Opening reads the manifest and the indices and compares file sizes; bytes are checked by `verify`, and by `read`
    where it is asked to. Reading is safe from several threads and processes.

    Args:
        damaged: what a shard that is missing or of another size means here: "fatal" raises, "skip" says so on stderr.
        shown: the folder's name for people, where that is not its path.
    Raises: UserError where something is missing, unfinished, cut short or of another format.
    """

    folder: Any  # Path; the URL of a remote one
    retry_after_s: tuple[float, ...] = ()  # pauses after which what could not be read is asked for again

    def __init__(
        self,
        folder: str | Path,
        format: str = RAW_FORMAT,
        damaged: Damaged = "fatal",
        *,
        shown: str | None = None,
    ) -> None:
        self._here = Path(folder)
        self.folder = shown or self._here
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
    def title(self) -> str:
        """What the folder is called on a page or a picture."""
        return self._here.resolve().name or "raw shards"

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
            self._crc32[number] = read_crc32(self._index_file(shard["name"]), shard, uids)
        of_shard = self._crc32[number]
        return int(of_shard[index - start]) if len(of_shard) else None

    def open(self, name: str, offset: int = 0, size: int | None = None) -> ByteSource:
        """A file of the folder, to be read from a byte on, for `size` bytes at most (None: to its end)."""
        file = open(self._here / name, "rb")  # noqa: SIM115
        file.seek(offset)
        return file

    def local(self, name: str) -> Path:
        """A file that lies beside the shards, as one on this machine; there is nothing at the path where it has none.

        Raises: UserError for a name that leads elsewhere, and where it cannot be read.
        """
        path = self._here / name
        if not path.resolve().is_relative_to(self._here.resolve()):
            raise UserError(f"{name!r} leads out of {self.folder}")
        return path

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
        if not (self._here / MANIFEST).exists():
            raise lacks(self.folder, MANIFEST)
        path = f"{self.folder}/{MANIFEST}"
        manifest = read_json(self._here / MANIFEST, "the manifest", shown=path)
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
            raise UserError(f"{self.folder}/{MANIFEST}: an entry of 'shards' lacks name, samples, bytes or sha256")
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
        for shard in shards:
            self._index_file(str(shard["name"]))  # brings it here
        with tempfile.NamedTemporaryFile(prefix="shapeloom-index-") as file:
            kept = join_indices(LocalStore(self._here), shards, Path(file.name))
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
