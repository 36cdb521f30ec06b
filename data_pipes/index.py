"""Where every member of every sample of a folder lies: columns in one file, mapped into memory and read as needed.

`index.bin` is four NumPy arrays one after another (each as `numpy.save` writes it), samples in the order of the shards:

    uid      S[longest]  [n]      ASCII
    split    u1          [n]      number of a name in `splits`
    layout   u2          [n]      number of a list of members in `layouts`
    first    i8          [n]      the sample's first row of `place`
    place    i8          [m, 2]   offset and size in bytes of each member in its shard, members in the order written

`splits` and `layouts` are in the manifest. So a folder opens in the same time whatever the number of its samples: the
shards' own index.json, which remain the truth, take 15 s and 2 GB of Python objects a million.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["INDEX", "Index"]

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
    def joined(cls, parts: Iterable[Index]) -> Index:
        """One index of several, in their order."""
        parts = list(parts)
        splits = tuple(dict.fromkeys(name for part in parts for name in part.splits))
        layouts = tuple(dict.fromkeys(names for part in parts for names in part.layouts))
        starts = np.cumsum([0, *(len(part.place) for part in parts)])
        none = cls.of_shard({"members": {}, "splits": {}})  # for a folder without shards
        every = [none, *parts]
        return cls(
            uid=np.concatenate([part.uid for part in every]),
            split=np.concatenate([_renumbered(part.split, part.splits, splits) for part in every]),
            layout=np.concatenate([_renumbered(part.layout, part.layouts, layouts) for part in every]),
            first=np.concatenate([none.first, *(part.first + start for part, start in zip(parts, starts))]),
            place=np.concatenate([part.place for part in every]),
            splits=splits,
            layouts=layouts,
        )

    def encode(self) -> tuple[bytes, dict[str, Any]]:
        """The file's bytes, and what the manifest must keep."""
        buffer = io.BytesIO()
        for column in self._columns():
            np.save(buffer, column)
        data = buffer.getvalue()
        kept = {"bytes": len(data), "splits": list(self.splits), "layouts": [list(names) for names in self.layouts]}
        return data, kept

    @classmethod
    def read(cls, path: Path, kept: dict[str, Any]) -> Index:
        """Map the columns. Raises OSError, KeyError, TypeError or ValueError if the file is not what `kept` says."""
        with open(path, "rb") as file:
            uid, split, layout, first, place = (_mapped(file) for _ in range(5))
            if not kept["bytes"] == file.tell() == path.stat().st_size:
                raise ValueError(f"{path} is not of this folder")
        layouts = tuple(tuple(names) for names in kept["layouts"])
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

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.uid, self.split, self.layout, self.first, self.place


def _renumbered(numbers: np.ndarray, names: tuple, among: tuple) -> np.ndarray:
    """Numbers of `names` as numbers of the same names `among` others."""
    return np.array([among.index(name) for name in names], numbers.dtype)[numbers]


def _mapped(file: BinaryIO) -> np.ndarray:
    """The array that begins here, mapped; `file` is then at its end."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a column")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (SyntaxError, tokenize.TokenError) as error:  # not always NumPy's own ValueError
        raise ValueError("not a column") from error
    start = file.tell()
    array = np.memmap(file, dtype, "r", start, shape) if np.prod(shape) else np.zeros(shape, dtype)
    file.seek(start + array.nbytes)
    return array.view(np.ndarray)
