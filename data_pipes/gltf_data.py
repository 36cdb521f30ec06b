"""The raw side of glTF 2.0: the JSON header, the buffers and the accessors that read numbers from them.

Every value is taken as hostile: whatever is out of range ends in `Rejected`; what is of a wrong type raises one of
`BROKEN`, which the caller turns into `Rejected`.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from typing import Any

import numpy as np

from .limits import Limits, Rejected, Sidecars

__all__ = ["BROKEN", "GltfData", "as_float", "denormalised"]

BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error)

_DTYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}


class GltfData:
    """A .gltf or .glb file's header and everything that it refers to by index."""

    def __init__(self, data: bytes, sidecars: Sidecars, limits: Limits) -> None:
        self.header, self._chunk = _split(data)
        self._sidecars, self._limits = sidecars, limits
        self._buffers: dict[int, bytes] = {}

    def item(self, kind: str, index: Any) -> dict[str, Any]:
        """`header[kind][index]`, which must be an object."""
        items = self.header.get(kind)
        if not isinstance(items, list) or type(index) is not int or not 0 <= index < len(items):
            raise Rejected(f"its glTF structure is broken ({kind} has no entry {str(index)[:40]})")
        if not isinstance(items[index], dict):
            raise Rejected(f"its glTF structure is broken ({kind}[{index}] is not an object)")
        return items[index]

    def uri(self, uri: str) -> bytes:
        """The bytes of a data URI or of a file beside. Raises FileNotFoundError if there is none."""
        if uri.startswith("data:"):
            try:
                return base64.b64decode(uri.partition(",")[2] + "==", validate=False)
            except binascii.Error:
                raise Rejected("its embedded base64 data is broken", "copy or download it again") from None
        return self._sidecars.read(uri)

    def _buffer(self, index: int) -> bytes:
        if index not in self._buffers:
            buffer = self.item("buffers", index)
            if "uri" in buffer:
                try:
                    self._buffers[index] = self.uri(buffer["uri"])
                except OSError:
                    raise Rejected(f"its file {buffer['uri'][:80]!r} is missing", "put it beside the .gltf") from None
            elif index == 0 and self._chunk is not None:
                self._buffers[index] = self._chunk
            else:
                raise Rejected(f"its buffer {index} has no data", "copy or download it again")
        return self._buffers[index]

    def view(self, index: int) -> tuple[memoryview, int]:
        """The bytes of a buffer view and its stride (0: tight)."""
        view = self.item("bufferViews", index)
        start, size = _natural(view.get("byteOffset", 0)), _natural(view["byteLength"])
        buffer = self._buffer(view["buffer"])
        if start + size > len(buffer):
            raise Rejected("its binary data is shorter than its header says", "copy or download it again")
        return memoryview(buffer)[start : start + size], _natural(view.get("byteStride", 0))

    def accessor(self, index: int) -> np.ndarray:
        """[count, columns]; normalised integers as float32 in [-1, 1]."""
        accessor = self.item("accessors", index)
        count, columns = _natural(accessor["count"]), _COLUMNS[accessor["type"]]
        dtype = np.dtype(_DTYPES[accessor["componentType"]]).newbyteorder("<")
        self._limits.check("values in one accessor", count, 3 * max(self._limits.vertices, self._limits.faces))
        if "bufferView" in accessor:
            values = self._values(accessor["bufferView"], accessor.get("byteOffset", 0), count, columns, dtype)
        else:
            values = np.zeros((count, columns), dtype)
        if (sparse := accessor.get("sparse")) is not None:
            n, places, new = _natural(sparse["count"]), sparse["indices"], sparse["values"]
            place_dtype = np.dtype(_DTYPES[places["componentType"]])
            rows = self._values(places["bufferView"], places.get("byteOffset", 0), n, 1, place_dtype)[:, 0]
            values[rows] = self._values(new["bufferView"], new.get("byteOffset", 0), n, columns, dtype)
        return denormalised(values) if accessor.get("normalized") else values

    def _values(self, view: int, offset: int, count: int, columns: int, dtype: np.dtype) -> np.ndarray:
        data, stride = self.view(view)
        stride = stride or columns * dtype.itemsize
        offset = _natural(offset)
        if count and offset + (count - 1) * stride + columns * dtype.itemsize > len(data):
            raise Rejected("its binary data is shorter than its header says", "copy or download it again")
        return np.ndarray((count, columns), dtype, data, offset, (stride, dtype.itemsize)).copy()


def _natural(value: Any) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number from 0, got {str(value)[:40]}")
    return value


def denormalised(values: np.ndarray) -> np.ndarray:
    """Integers as float32 in [-1, 1]; floats as they are."""
    if not np.issubdtype(values.dtype, np.integer):
        return values
    return np.maximum(values.astype(np.float32) / float(np.iinfo(values.dtype).max), -1)


def as_float(values: np.ndarray) -> np.ndarray:
    """float32; integers that should have been marked as normalised are taken as such."""
    return denormalised(values).astype(np.float32)


def _split(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON header and the binary chunk, if there is one."""
    chunk = None
    if data[:4] == b"glTF":
        if len(data) < 20:
            raise Rejected("it ends before its JSON header", "copy or download it again")
        version, length = struct.unpack_from("<II", data, 4)
        if version != 2:
            raise Rejected(f"it is glTF version {version}", "convert it to glTF 2.0")
        if length > len(data):
            raise Rejected(f"it is cut short: {len(data)} of {length} bytes", "copy or download it again")
        size, kind = struct.unpack_from("<I4s", data, 12)
        if kind != b"JSON" or 20 + size > len(data):
            raise Rejected("it does not begin with a whole JSON chunk", "copy or download it again")
        if 28 + size <= length:
            chunk_size, chunk_kind = struct.unpack_from("<I4s", data, 20 + size)
            chunk = data[28 + size : 28 + size + chunk_size] if chunk_kind == b"BIN\0" else None
            if chunk is not None and len(chunk) < chunk_size:
                raise Rejected("its binary chunk is cut short", "copy or download it again")
        data = data[20 : 20 + size]
    try:
        header = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Rejected("its glTF header is not JSON", "copy or download it again") from None
    if not isinstance(header, dict):
        raise Rejected("its glTF header is not a JSON object", "copy or download it again")
    return header, chunk
