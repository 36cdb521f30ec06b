"""`shapeloom data verify`: everything that can be wrong with a folder of shards, found and told without stopping.

A shard is compared with its sha256, a sample with its CRC-32, its members with the tar around them and with what their
decoders and the other members say. So a flipped bit is told by the shard and by the sample, and by the byte where its
member no longer decodes. Shards from before there was a CRC-32 have but the sha256 for a picture that still decodes.

N points, V views of H x W, L latent tokens, K captions.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..files import read_json, sha256_file, sha256_json
from ..models.cameras import Cameras
from ..progress import Bar
from .index import INDEX, Index
from .raw_sample import ARRAY_ERRORS, decode_depth, decode_field, decode_json, decode_npz, decode_surface, decode_webp
from .remote_shards import RemoteSource, source_at
from .shard_folder import lacks
from .shards import LATENT_FORMAT, MANIFEST, RAW_FORMAT, SPLITS, crc32, index_name
from .store import LocalStore
from .urls import is_full_disk

__all__ = ["Verified", "verify"]

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = tarfile.LENGTH_NAME  # a longer one has two blocks of its own before the header, which holds its start


@dataclass(frozen=True)
class Verified:
    """What `verify` read, and one line for each fault."""

    folder: str
    shards: int
    samples: int
    bytes: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        read = f"{self.samples:,} samples in {self.shards:,} shards, {self.bytes / 1e6:,.0f} MB"
        if not self.faults:
            return f"{self.folder} is whole: {read}"
        return "\n".join([*self.faults, f"{self.folder} has {len(self.faults)} fault(s) in {read}"])


def verify(folder: str | Path) -> Verified:
    """Read every byte of a folder of raw or latent shards, or of one at a URL, and decode every member of every sample.

    Memory: a sample, a shard's index and all uids. Of a URL's shards, one at a time is in TMPDIR.

    Returns: what is wrong, in the order of the shards; nothing in it stops the rest from being checked.
    Raises: UserError if there is no manifest to compare with, or if it is not one of shards.
    """
    source = source_at(folder)
    manifest = _manifest(source)
    shards = [shard for shard in manifest["shards"] if _is_entry(shard)]
    faults = [*_manifest_faults(manifest)]
    splits: Counter[str] = Counter()
    uids: list[np.ndarray] = []
    start = 0
    with contextlib.ExitStack() as stack:
        whole = _open_index(source, manifest, stack, faults)
        bar = stack.enter_context(Bar(sum(shard["samples"] for shard in shards), "verifying"))
        for shard in shards:
            first, start = start, start + shard["samples"]
            with contextlib.ExitStack() as here:
                try:
                    path, index_file = _files(source, shard, here)
                except UserError as error:  # they cannot be had, which says nothing about what they are
                    faults.append(str(error))
                    bar.update(shard["samples"])
                    continue
                try:
                    contents, index = _shard_index(index_file, shard)
                except UserError as error:
                    faults += [str(error), *_shard_faults(path, shard, {})]
                    bar.update(shard["samples"])
                    continue
                faults += _shard_faults(path, shard, contents["members"])
                if whole is not None and not _agrees(whole, first, index):
                    faults.append(f"{INDEX}: it does not agree with {index_file.name}; delete it, those will serve")
                crcs = contents.get("crc32", {})
                for uid, places in contents["members"].items():
                    faults += _sample_faults(path, uid, places, contents["splits"][uid], crcs.get(uid))
                    splits[contents["splits"][uid]] += 1
                    bar.update(1)
                uids.append(index.uid)
    faults += _twins(uids)
    if len(uids) == len(manifest["shards"]):  # else what is left out is told already
        faults += _count_faults(manifest["counts"], splits)
    total = sum(shard["bytes"] for shard in shards)
    return Verified(source.where(), len(shards), sum(splits.values()), total, tuple(faults))


# ------------------------------------------------------------------------------------------------------- the folder


def _here(source: RemoteSource | LocalStore, name: str, stack: contextlib.ExitStack) -> Path:
    """A file of the folder as one on this machine until `stack` is closed; a path to nothing where there is none.

    Raises: UserError where it cannot be had.
    """
    try:
        return stack.enter_context(source.local(name))
    except FileNotFoundError:
        return Path(source.where(name))
    except OSError as error:
        if is_full_disk(error):
            raise
        raise UserError(f"{source.where(name)}: it cannot be read ({error.strerror or error})") from None


def _files(source: RemoteSource | LocalStore, shard: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Path, Path]:
    """A shard and its index, as `_here`."""
    name = Path(shard["name"]).name
    if not name:
        raise UserError(f"{MANIFEST}: it names a shard {shard['name']!r}, which is no name of a file")
    return _here(source, name, stack), _here(source, index_name(name), stack)


def _manifest(source: RemoteSource | LocalStore) -> dict[str, Any]:
    if isinstance(source, LocalStore) and not source.folder.is_dir():
        raise UserError(f"{source.folder} is not a folder of shards: it does not exist or is a file")
    try:
        with source.local(MANIFEST) as path:
            manifest = read_json(path, "the manifest", shown=source.where(MANIFEST))
    except FileNotFoundError:
        raise lacks(source.where(), MANIFEST) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    where = source.where(MANIFEST)
    if found not in (RAW_FORMAT, LATENT_FORMAT):
        raise UserError(f"{where}: field 'format' must be '{RAW_FORMAT}' or '{LATENT_FORMAT}', got {found!r}")
    for name, kind in (("settings", dict), ("shards", list), ("counts", dict)):
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{where}: field '{name}' is missing or of the wrong kind")
    return manifest


def _is_entry(shard: Any) -> bool:
    kinds = {"name": str, "samples": int, "bytes": int, "sha256": str}
    return isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in kinds.items())


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    if not manifest.get("complete"):
        yield f"{MANIFEST}: the folder is unfinished, run the command that makes it again and it will go on"
    if manifest.get("settings_hash") != sha256_json(manifest["settings"]):
        yield f"{MANIFEST}: its settings were changed after it was written"
    for i, shard in enumerate(manifest["shards"]):
        if not _is_entry(shard):
            yield f"{MANIFEST}: entry {i} of 'shards' lacks name, samples, bytes or sha256"


def _open_index(
    source: RemoteSource | LocalStore, manifest: dict[str, Any], stack: contextlib.ExitStack, faults: list[str]
) -> Index | None:
    """The folder's index, mapped until `stack` is closed, where there is one that is whole."""
    if "index" not in manifest:  # made before there was one
        return None
    try:
        return Index.read(_here(source, INDEX, stack), manifest["index"])
    except UserError as error:
        faults.append(str(error))
        return None
    except (OSError, KeyError, TypeError, ValueError):
        faults.append(f"{INDEX}: it is missing or damaged; delete it, the shards' own indices will serve")
        return None


def _agrees(whole: Index, start: int, part: Index) -> bool:
    """Whether the samples of `whole` from `start` on are those of `part`."""
    rows = slice(start, start + len(part))
    if not len(part) or len(whole.uid[rows]) < len(part):
        return not len(part)
    first = int(whole.first[start])
    try:
        return (
            np.array_equal(whole.uid[rows], part.uid)
            and [whole.splits[k] for k in whole.split[rows]] == [part.splits[k] for k in part.split]
            and [whole.layouts[k] for k in whole.layout[rows]] == [part.layouts[k] for k in part.layout]
            and np.array_equal(whole.first[rows] - first, part.first)
            and np.array_equal(whole.place[first : first + len(part.place)], part.place)
        )
    except IndexError:  # a number that names nothing
        return False


def _twins(uids: list[np.ndarray]) -> Iterator[str]:
    uid, counts = np.unique(np.concatenate([np.zeros(0, "S1"), *uids]), return_counts=True)
    for i in np.flatnonzero(counts > 1):
        yield f"{uid[i].decode()}: there are {counts[i]} samples of this uid, build the folder again"


def _count_faults(counts: dict[str, Any], splits: Counter[str]) -> Iterator[str]:
    """Counts by split are compared where there are any: latent folders have none."""
    named = [name for name in counts if name.split("_")[0] in SPLITS]
    found = {"samples": splits.total(), **dict.fromkeys(named, 0), **(splits if named else {})}
    for name, n in found.items():
        if counts.get(name, 0) != n:
            yield f"{MANIFEST}: 'counts' has {name} {counts.get(name, 0)}, the shards hold {n}"


# --------------------------------------------------------------------------------------------------------- a shard


def _shard_index(path: Path, shard: dict[str, Any]) -> tuple[dict[str, Any], Index]:
    """A shard's index.json, as it is and as columns. Raises UserError where it is missing, damaged or another's."""
    name = path.name
    contents = read_json(path, "the shard index", shown=name)
    try:
        index = Index.of_shard(contents)
        same = all(contents[key] == shard[key] for key in ("name", "samples", "bytes", "sha256"))
        if contents.get("crc32", contents["members"]).keys() != contents["members"].keys():
            raise ValueError("crc32 is not of these samples")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{name}: it is damaged ({error!r}), delete it and build the shard again") from None
    if not same or len(index) != shard["samples"] or (index.place < 0).any():
        raise UserError(f"{name}: it is not of the shard that the manifest names, delete both and build again")
    return contents, index


def _shard_faults(path: Path, shard: dict[str, Any], members: dict[str, dict[str, tuple[int, int]]]) -> Iterator[str]:
    """What is wrong with the tar as a whole; `members` may be empty where they are not known."""
    try:
        size = path.stat().st_size
        differs = size == shard["bytes"] and sha256_file(path) != shard["sha256"]
    except OSError as error:
        yield f"{path.name}: it cannot be read ({error.strerror or error}), run the command that makes it again"
        return
    if size != shard["bytes"]:
        cut = [(uid, suffix, offset) for uid, suffix, offset, n in _in_order(members) if offset + n > size]
        where = f", in {cut[0][0]}.{cut[0][1]}; {len({uid for uid, *_ in cut})} sample(s) are lost" if cut else ""
        what = "is cut short at" if size < shard["bytes"] else "goes on to"
        yield f"{path.name}: it {what} byte {size} of {shard['bytes']}{where}; delete it and build it again"
    if differs:
        yield f"{path.name}: its bytes are not those that the manifest recorded (sha256), delete it and build it again"
    if members and size <= shard["bytes"]:
        yield from _tar_faults(path, size, members)


def _tar_faults(path: Path, size: int, members: dict[str, dict[str, tuple[int, int]]]) -> Iterator[str]:
    """Headers, padding and the end, which readers of plain tars go by."""
    end = 0
    with open(path, "rb") as file:
        for uid, suffix, offset, n in _in_order(members):
            what = f"{path.name}, {uid}.{suffix}"
            name = f"{uid}.{suffix}".encode()
            if offset != end + _BLOCK * (3 if len(name) > _LONGEST_NAME else 1):
                yield f"{what}: its index has it at byte {offset}, but the member before it ends at {end}"
            end = offset + n + -n % _BLOCK
            if end > size:
                return  # told as cut short
            file.seek(offset - _BLOCK)
            header = file.read(_BLOCK)
            try:
                found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                fits = found.name.encode("utf-8", "surrogateescape") == name[:_LONGEST_NAME] and found.size == n
            except tarfile.HeaderError:
                fits = False
            if not fits:
                yield f"{what}: the header at byte {offset - _BLOCK} is damaged or of another member"
            file.seek(offset + n)
            if any(file.read(-n % _BLOCK)):
                yield f"{what}: the padding after byte {offset + n} is not zero"
        file.seek(end)
        if file.read(2 * _BLOCK + 1) != b"\0" * (2 * _BLOCK):
            yield f"{path.name}: from byte {end} on there are not just the {2 * _BLOCK} zeros that end a tar"


def _in_order(members: dict[str, dict[str, tuple[int, int]]]) -> Iterator[tuple[str, str, int, int]]:
    """uid, suffix, offset and size of each member, as written."""
    for uid, places in members.items():
        for suffix, (offset, size) in places.items():
            yield uid, suffix, offset, size


# --------------------------------------------------------------------------------------------------------- a sample


def _sample_faults(
    path: Path, uid: str, places: dict[str, tuple[int, int]], split: str, wanted_crc: int | None
) -> Iterator[str]:
    """What cannot be decoded, and what does not fit the rest of the sample. Members beyond a cut are left out."""
    try:
        with open(path, "rb") as file:
            members = {suffix: _read(file, *place) for suffix, place in places.items()}
    except OSError:
        return  # told by the shard
    decoded: dict[str, Any] = {}
    for suffix, (offset, size) in places.items():
        if len(members[suffix]) == size:
            try:
                decoded[suffix] = _decode(suffix, members[suffix], f"{path.name}, {uid}.{suffix} at byte {offset}")
            except UserError as error:
                yield str(error)
    if len(decoded) < len(places):
        return  # what is left may well seem to misfit
    if places and wanted_crc is not None and crc32(members.values()) != wanted_crc:
        first, end = min(places.values())[0], sum(max(places.values()))
        yield f"{path.name}, {uid}: bytes {first} to {end} still decode, but are not what was written (CRC-32)"
    for suffix, fault in _misfits(decoded, uid, split):
        yield f"{path.name}, {uid}.{suffix} at byte {places[suffix][0]}: {fault}"


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _decode(suffix: str, data: bytes, what: str) -> Any:
    """A member as its reader would have it. Raises UserError."""
    known = {"json": decode_json, "surface.npz": decode_surface, "field.npz": decode_field, "depth.npz": decode_depth}
    if suffix in known:
        return known[suffix](data, what)
    if suffix == "cameras.json":
        fields = decode_json(data, what)
        try:
            return Cameras.from_json(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{what} holds no cameras ({error}): delete its shard and build it again") from None
    if suffix.endswith(".webp"):
        return decode_webp(data, what)
    if suffix.endswith(".npz"):
        return decode_npz(data, what)
    if suffix.endswith(".npy"):
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except ARRAY_ERRORS as error:
            raise UserError(f"{what} is damaged ({error}): delete its shard and build it again") from None
    return data


def _misfits(decoded: dict[str, Any], uid: str, split: str) -> Iterator[tuple[str, str]]:
    """Suffix and fault of each member that decodes but cannot be right."""
    meta = decoded.get("json", {})
    for key, wanted in (("uid", uid), ("split", split)):
        if meta.get(key, wanted) != wanted:
            yield "json", f"its {key} is {meta[key]!r}, its index says {wanted!r}"
    captions = meta.get("captions", [])
    if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
        yield "json", "its captions must be a list of texts"
    for suffix in ("surface.npz", "field.npz", "text.npz", "image.npz"):
        arrays = decoded.get(suffix, {})
        if len({len(np.atleast_1d(array)) for array in arrays.values()}) > 1:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            yield suffix, f"its arrays differ in length ({shapes})"
        yield from ((suffix, f"its {name} is not finite") for name, array in arrays.items() if not _finite(array))
    if "latent.npy" in decoded and not _finite(decoded["latent.npy"]):
        yield "latent.npy", "it is not finite"
    cameras = decoded.get("cameras.json")
    if cameras is None:
        return
    wanted_HW = (cameras.height, cameras.width)
    for start in ("view_", "lit_"):
        pictures = {name: value for name, value in decoded.items() if name.startswith(start)}
        for name, value in pictures.items():
            if np.shape(value)[:2] != wanted_HW:
                yield name, f"it is {list(np.shape(value)[:2])}, its cameras say {list(wanted_HW)}"
        if pictures and len(pictures) != len(cameras):
            yield "cameras.json", f"there are {len(cameras)} cameras for {len(pictures)} pictures {start}…"
    depth_VHW = decoded.get("depth.npz")
    if depth_VHW is not None and depth_VHW.shape != (len(cameras), *wanted_HW):
        yield "depth.npz", f"it is {list(depth_VHW.shape)}, its cameras say {[len(cameras), *wanted_HW]}"


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
