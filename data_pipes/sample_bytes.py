"""The bytes of one sample on their way out of a shard: cut into members, compared with a CRC-32."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import UserError
from ..files import read_json

__all__ = ["ByteSource", "Damaged", "crc32", "cut_members", "read_crc32"]

Damaged = Literal["fatal", "skip"]  # what is damaged: ends the run, or is named once and left out
Places = dict[str, tuple[int, int]]  # offset and size of each member in its shard


class ByteSource(Protocol):
    """A file being read; what is left of it."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


def crc32(parts: Iterable[bytes | memoryview]) -> int:
    """Of the parts joined: by it a damaged sample is found in its shard."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def read_crc32(index: Path, shard: dict[str, Any], uids: Iterable[str]) -> np.ndarray:
    """The samples' CRC-32, uint32, from their shard's index.json; empty where that has none, as before there were any.

    Args:
        shard: its entry in the manifest.
    Raises: UserError if the index cannot be read, or is of another shard than the manifest's.
    """
    contents = read_json(index, "the shard index")
    try:
        belongs, values = contents["sha256"] == shard["sha256"], contents.get("crc32", {})
        found = np.array([values[uid] for uid in uids] if belongs and values else [], np.uint32)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{index} is damaged ({error!r}): build its shard again, or copy it again") from None
    if not belongs:
        raise UserError(f"{index} is of another shard than the manifest's: if it was built again, open the folder anew")
    return found


def cut_members(
    data: bytes, start: int, places: Places, wanted: Iterable[str], crc: int | None, uid: str, shard: str
) -> dict[str, bytes]:
    """Some members of the sample `uid`, of bytes of its shard from `start` on.

    Args:
        crc: of all members joined, to compare with; None to leave that.
    Raises: UserError for a member that it lacks, where the bytes end early, and where they differ from `crc`.
    """
    wanted = list(wanted)
    if missing := [name for name in wanted if name not in places]:
        raise UserError(f"{uid} in {shard} has no {missing[0]}: build it with that part")
    found = {}
    for name in wanted if crc is None else places:
        offset, size = places[name]
        found[name] = memoryview(data)[offset - start : offset - start + size]
        if len(found[name]) != size:
            raise UserError(f"shard {shard} ends inside {uid}.{name}: build it again, or copy it again")
    if crc is not None and crc32(found.values()) != crc:
        raise UserError(
            f"{uid} in shard {shard} differs from its CRC-32: bytes of it were changed; delete the shard and build it "
            "again, or copy it again"
        )
    return {name: bytes(found[name]) for name in wanted}
