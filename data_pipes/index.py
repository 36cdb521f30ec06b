"""Where every member of every sample of a folder lies: columns in one file, mapped into memory and read as needed.

`index.bin` is four NumPy arrays one after another (each as `numpy.save` writes it), samples in the order of the shards:

    uid      S[longest]  [n]      ASCII
    split    u1          [n]      number of a name in `splits`
    layout   u2          [n]      number of a list of members in `layouts`
    first    i8          [n]      the sample's first row of `place`
    place    i8          [m, 2]   offset and size in bytes of each member in its shard, members in the order written

and at its end, as text, the hash of the shards that it is of. `splits` and `layouts` are in the manifest. So a folder
opens in the same time whatever the number of its samples: the shards' own index.json, which remain the truth, take 15 s
and 2 GB of Python objects a million.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["INDEX", "Index", "join"]

INDEX = "index.bin"


@dataclass(frozen=True)
class Index:
    """The index of a folder; see the head of this file."""

    uid: np.ndarray
    split: np.ndarray
    layout: np.ndarray
    first: np.ndarray
    place: np.ndarray
    splits: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...]

    @classmethod
    def of_shard(cls, contents: dict[str, Any]) -> Index:
        """From what a shard's index.json holds. Raises KeyError, TypeError, AttributeError or ValueError if damaged."""
        members: dict[str, dict[str, tuple[int, int]]] = contents["members"]
        splits: dict[str, int] = {}
        layouts: dict[tuple[str, ...], int] = {}
        split = [splits.setdefault(contents["splits"][uid], len(splits)) for uid in members]
        layout = [layouts.setdefault(tuple(places), len(layouts)) for places in members.values()]
        counts = np.array([len(places) for places in members.values()], np.int64)
        rows = [row for places in members.values() for row in places.values()]
        return cls(
            uid=np.array(list(members), np.bytes_),
            split=np.array(split, np.uint8),
            layout=np.array(layout, np.uint16),
            first=np.cumsum(counts) - counts,
            place=np.array(rows, np.int64).reshape(-1, 2),
            splits=tuple(splits),
            layouts=tuple(layouts),
        )

    @classmethod
    def read(cls, path: Path, kept: dict[str, Any]) -> Index:
        """Map the columns. Raises OSError, KeyError, TypeError or ValueError if the file is not what `kept` says."""
        with open(path, "rb") as file:
            uid, split, layout, first, place = (_mapped(file, kind) for kind in _KINDS)
            n_bytes, of = kept["bytes"], kept.get("of", "")  # older ones do not say of which shards they are
            if not isinstance(of, str) or file.read(len(of.encode())) != of.encode():
                raise ValueError(f"{path} is not of this folder")
            if not n_bytes == file.tell() == path.stat().st_size:
                raise ValueError(f"{path} is not of this folder")
        layouts = tuple(tuple(names) for names in kept["layouts"])
        n = len(uid)
        if not len(split) == len(layout) == len(first) == n or place.ndim != 2 or place.shape[1] != 2:
            raise ValueError(f"the columns of {path} do not fit together")
        if n and (split.max() >= len(kept["splits"]) or layout.max() >= len(layouts)):
            raise ValueError(f"{path} is not of this folder")
        return cls(uid, split, layout, first, place, tuple(kept["splits"]), layouts)

    def __len__(self) -> int:
        return len(self.uid)

    def places(self, i: int) -> dict[str, tuple[int, int]]:
        """Offset and size of each member of a sample, by name."""
        names, start = self.layouts[self.layout[i]], int(self.first[i])
        rows = self.place[start : start + len(names)].tolist()
        return {name: (offset, size) for name, (offset, size) in zip(names, rows)}

    @cached_property
    def uids(self) -> list[str]:
        return [uid.decode() for uid in self.uid.tolist()]

    @cached_property
    def by_uid(self) -> dict[str, int]:
        return {uid: i for i, uid in enumerate(self.uids)}


_COLUMNS = ("uid", "split", "layout", "first", "place")
_KINDS = ("S", "|u1", "<u2", "<i8", "<i8")


def join(parts: Callable[[], Iterable[Index]], of: str, path: Path) -> dict[str, Any]:
    """Write one index of several, in their order, holding one of them at a time (and what `parts` has ahead).

    Args:
        parts: gives them, twice.
        of: a hash of the shards, by which the index of others is known.
    Returns: what the manifest must keep.
    """
    splits: dict[str, int] = {}
    layouts: dict[tuple[str, ...], int] = {}
    rows = dict.fromkeys(_COLUMNS, 0)
    longest = 1
    for part in parts():
        for name in part.splits:
            splits.setdefault(name, len(splits))
        for names in part.layouts:
            layouts.setdefault(names, len(layouts))
        longest = max(longest, part.uid.dtype.itemsize)
        rows = {column: n + len(getattr(part, column)) for column, n in rows.items()}
    kinds = {"uid": f"S{longest}", "split": "|u1", "layout": "<u2", "first": "<i8", "place": "<i8"}
    with contextlib.ExitStack() as open_files:
        # Each column is written to a file of its own, and these are put one behind the other.
        columns = {name: open_files.enter_context(tempfile.TemporaryFile(dir=path.parent)) for name in _COLUMNS}
        for name, file in columns.items():
            shape = (rows[name], 2) if name == "place" else (rows[name],)
            header = {"descr": kinds[name], "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        before = 0
        for part in parts():
            arrays = {
                "uid": part.uid,
                "split": _renumbered(part.split, part.splits, splits),
                "layout": _renumbered(part.layout, part.layouts, layouts),
                "first": part.first + before,
                "place": part.place,
            }
            for name, array in arrays.items():
                columns[name].write(np.ascontiguousarray(array, kinds[name]).tobytes())
            before += len(part.place)
        with open(path, "wb") as joined:
            for file in columns.values():
                file.seek(0)
                shutil.copyfileobj(file, joined, 1 << 20)
            joined.write(of.encode())
            joined.flush()
            os.fsync(joined.fileno())
            size = joined.tell()
    return {"bytes": size, "of": of, "splits": list(splits), "layouts": [list(names) for names in layouts]}


def _renumbered(numbers: np.ndarray, names: Sequence[Any], among: dict[Any, int]) -> np.ndarray:
    """Numbers of `names` as numbers of the same names `among` others."""
    return np.array([among[name] for name in names], numbers.dtype)[numbers]


def _mapped(file: BinaryIO, kind: str) -> np.ndarray:
    """The array that begins here, mapped; `file` is then at its end."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a column")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (SyntaxError, tokenize.TokenError) as error:  # not always NumPy's own ValueError
        raise ValueError("not a column") from error
    # An array of objects would be read as their addresses.
    if dtype.str.rstrip("0123456789") != "|S" if kind == "S" else dtype.str != kind:
        raise ValueError("not a column of its kind")
    start = file.tell()
    array = np.memmap(file, dtype, "r", start, shape) if np.prod(shape) else np.zeros(shape, dtype)
    file.seek(start + array.nbytes)
    return array.view(np.ndarray)
