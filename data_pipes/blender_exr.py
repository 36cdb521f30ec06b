"""Reads the OpenEXR files that blender_script.py has Blender write: one part, scan lines, not compressed.

Layout: https://openexr.com/en/latest/OpenEXRFileLayout.html
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MAGIC = 20000630
OTHER_LAYOUTS = 0x1A00  # flags: tiles, deep data, several parts
TYPES = (np.dtype("<u4"), np.dtype("<f2"), np.dtype("<f4"))


def read_exr(path: Path) -> dict[str, np.ndarray]:
    """Channels by name, [height, width] each, row 0 at the top. Raises: ValueError for a file of another layout."""
    data = path.read_bytes()
    try:
        return _channels(data)
    except (struct.error, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or no OpenEXR file ({error!r})") from None


def _channels(data: bytes) -> dict[str, np.ndarray]:
    magic, version = struct.unpack_from("<ii", data)
    attributes, at = _attributes(data)
    if magic != MAGIC or version & OTHER_LAYOUTS or attributes["compression"] != b"\0":
        raise ValueError("only OpenEXR files of one part and of scan lines that are not compressed can be read")
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    width, height = right - left + 1, bottom - top + 1
    row = np.dtype(
        [("y", "<i4"), ("size", "<i4")]
        + [(name, TYPES[kind], (width,)) for name, kind in _channel_list(attributes["channels"])]
    )
    if len(data) < at + 8 * height + row.itemsize * height:
        raise ValueError("the OpenEXR file ends too early")
    rows = np.frombuffer(data, row, height, at + 8 * height)  # after the table of where they are
    rows = rows[np.argsort(rows["y"])]
    return {name: np.ascontiguousarray(rows[name]) for name in row.names[2:]}  # type: ignore[index]


def _attributes(data: bytes) -> tuple[dict[str, bytes], int]:
    """The header's values by name, and where it ends."""
    values, at = {}, 8
    while data[at]:
        name, at = _text(data, at)
        _, at = _text(data, at)
        (size,) = struct.unpack_from("<i", data, at)
        values[name] = data[at + 4 : at + 4 + size]
        at += 4 + size
    return values, at + 1


def _channel_list(data: bytes) -> list[tuple[str, int]]:
    """Names and types, in the order of the file."""
    channels, at = [], 0
    while data[at]:
        name, at = _text(data, at)
        channels.append((name, struct.unpack_from("<i", data, at)[0]))
        at += 16
    return channels


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.find(b"\0", at)
    if end < 0:
        raise IndexError("a text without an end")
    return data[at:end].decode("utf-8", "replace"), end + 1
