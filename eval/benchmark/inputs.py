"""A folder of objects from any system, matched to prompts by id: `ID.glb`, `ID/SEED.glb`, or `ID/SEED/rgb_*.png`.

Names are compared whole, never by prefix, order or number. Meshes may be GLB, glTF, OBJ, OFF, PLY or STL. Ready renders
are the protocol's pictures in the order of its cameras, as rgb_0.png, rgb_1.png … and, for the textureless shading,
textureless_0.png …; they may also lie in `ID/` itself.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...data_pipes.read import SUFFIXES
from ...errors import UserError
from .prompts import Prompt
from .protocol import Protocol
from .sources import MeshFile, Renders, Source, Unusable, Up

__all__ = ["Found", "find_objects"]

PICTURE = re.compile(r"(rgb|textureless)_(\d+)\.png")
SHADING = {"rgb": "colour", "textureless": "textureless"}


@dataclass(frozen=True)
class Found:
    """Objects in prompt order.

    Args:
        sources_PS: one for each prompt and seed, None where there is none.
        seeds: that are scored; extra: ids in the folder that no prompt has.
        kind: "meshes" or "pictures" or "meshes and pictures".
        unplaced: files that lie in a prompt's folder and are named by no seed.
    """

    sources_PS: list[list[Source | None]]
    seeds: tuple[int, ...]
    extra: list[str]
    kind: str
    unplaced: list[str]

    @property
    def missing(self) -> int:
        return sum(source is None for row in self.sources_PS for source in row)


def find_objects(
    folder: str | Path, prompts: Sequence[Prompt], protocol: Protocol, seeds: Sequence[int] | None = None, up: Up = "y"
) -> Found:
    """Match what lies in a folder to prompts and seeds.

    Args:
        seeds: that every prompt should have; None takes all that any prompt has.
        up: the axis that points up in the meshes.
    Raises: UserError for a folder without any of the prompts' objects, an object given twice, and pictures that are not
        the protocol's in number, size or numbering.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--generated {folder} is not a folder")
    known = {prompt.id for prompt in prompts}
    objects: dict[tuple[str, int], Source] = {}
    unplaced: list[str] = []
    ids: dict[str, None] = {}
    for entry in sorted(folder.iterdir()):
        own_id = entry.name if _is_folder(entry) else entry.stem
        if entry.name.startswith(".") or not (_is_folder(entry) or _is_mesh(entry)):
            continue
        ids[own_id] = None
        for seed, source in _of_entry(entry, protocol, up, unplaced) if own_id in known else ():
            if (own_id, seed) in objects:
                raise UserError(f"{folder} has two objects for id '{own_id}' and seed {seed}: leave one")
            objects[own_id, seed] = source
    if not known & set(ids):
        example = f"'{next(iter(ids))}'" if ids else "nothing"
        raise UserError(
            f"{folder} has no object named as a prompt's id: prompts have ids such as '{prompts[0].id}', the folder "
            f"has {example}; name objects ID.glb, ID/SEED.glb or ID/SEED/rgb_0.png"
        )
    _refuse_what_is_wrong_everywhere(objects.values())
    chosen = tuple(sorted({seed for _, seed in objects}) if seeds is None else seeds)
    if not chosen:
        raise UserError(f"{folder} has folders of prompts' ids, but no object in them named by its seed, such as 0.glb")
    sources_PS = [[objects.get((prompt.id, seed)) for seed in chosen] for prompt in prompts]
    kinds = {type(source) for row in sources_PS for source in row if source is not None}
    names = " and ".join(name for kind, name in ((MeshFile, "meshes"), (Renders, "pictures")) if kind in kinds)
    return Found(sources_PS, chosen, [own_id for own_id in ids if own_id not in known], names or "nothing", unplaced)


def _refuse_what_is_wrong_everywhere(sources: Iterable[Source]) -> None:
    """Pictures of one object that are not the protocol's are its failure; those of all objects are a mistake."""
    sources = list(sources)
    wrong = [source for source in sources if isinstance(source, Unusable)]
    if wrong and not any(isinstance(source, Renders) for source in sources):
        raise UserError(wrong[0].reason)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # links in a circle
        return False


def _is_mesh(path: Path) -> bool:
    """By its name: one that cannot be read is an object that failed, not one that is missing."""
    return path.suffix.lower() in SUFFIXES and not _is_folder(path)


def _of_entry(entry: Path, protocol: Protocol, up: Up, unplaced: list[str]) -> Iterable[tuple[int, Source]]:
    """Seeds and sources of a file or folder of one id."""
    if not _is_folder(entry):
        yield 0, MeshFile(str(entry), up)
        return
    own = _renders(entry, protocol)
    if own is not None:
        yield 0, own
    for inner in sorted(entry.iterdir()):
        is_mesh = _is_mesh(inner)
        if not (is_mesh or _is_folder(inner)):
            continue
        name = inner.stem if is_mesh else inner.name
        if not (name.isascii() and name.isdigit() and len(name) < 19):
            unplaced.append(str(inner))
        elif is_mesh:
            yield int(name), MeshFile(str(inner), up)
        elif (renders := _renders(inner, protocol)) is not None:
            yield int(name), renders
        else:
            unplaced += [str(path) for path in sorted(inner.iterdir()) if _is_mesh(path)]


def _renders(folder: Path, protocol: Protocol) -> Renders | Unusable | None:
    """The folder's pictures, if it has any."""
    numbered: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if match := PICTURE.fullmatch(path.name):
            pictures, number = numbered[SHADING[match[1]]], int(match[2])
            if number in pictures:
                return Unusable(str(folder), f"{folder} has two pictures numbered {number}: leave one")
            pictures[number] = path
    if "colour" not in numbered:
        return None
    chosen = {name: numbered[name] for name in protocol.shadings if name in numbered}
    wrong = (_wrong_numbers(folder, name, pictures, protocol) for name, pictures in chosen.items())
    sizes = (_wrong_size(path, protocol) for pictures in chosen.values() for path in pictures.values())
    if reason := next(filter(None, (*wrong, *sizes)), None):
        return Unusable(str(folder), reason)
    shadings = tuple((name, tuple(str(pictures[n]) for n in sorted(pictures))) for name, pictures in chosen.items())
    return Renders(shadings, protocol.resolution)


def _wrong_numbers(folder: Path, name: str, pictures: Iterable[int], protocol: Protocol) -> str | None:
    wanted, numbers = len(protocol.cameras.azimuths_deg), sorted(pictures)
    if numbers in (list(range(wanted)), list(range(1, wanted + 1))):
        return None
    return (
        f"{folder} has {len(numbers)} pictures for '{name}' (numbers {numbers[0]} to {numbers[-1]}), protocol "
        f"{protocol.name} has {wanted} views: number them from 0"
    )


def _wrong_size(path: Path, protocol: Protocol) -> str | None:
    """From the file's head alone; a picture that cannot be decoded is a failure of its object later."""
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if size == (protocol.resolution, protocol.resolution):
        return None
    return (
        f"{path} is {size[0]} x {size[1]} pixels, protocol {protocol.name} has {protocol.resolution} x "
        f"{protocol.resolution}: render it at that size, or give the meshes"
    )
