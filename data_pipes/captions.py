"""captions.csv: which file is what, in the user's words; and captions made of file names where there are none."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError

__all__ = ["AssetText", "caption_from_name", "read_captions"]

_OPTIONAL = {"category": "category", "licence": "licence", "license": "licence", "author": "author", "source": "source"}
_FORM = "file,caption[,caption_*][,category][,licence][,author][,source]"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class AssetText:
    """What captions.csv says of one file; `captions` may be empty."""

    captions: tuple[str, ...] = ()
    category: str | None = None
    licence: str | None = None
    author: str | None = None
    source: str | None = None


def read_captions(path: str | Path, known_files: Iterable[str]) -> dict[str, AssetText]:
    """Read a captions file.

    Columns: `file` (relative to the folder of 3D files), `caption` and any `caption_*`, and optionally category,
    licence, author and source; others are passed over. Several rows of one file are several captions of it.

    Args:
        known_files: the 3D files there are, relative, with "/" between folders.
    Returns: file -> what is said of it.
    Raises: UserError naming the column, or the file and line.
    """
    path = Path(path)
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    known = set(known_files)
    gathered: dict[str, dict[str, list[str]]] = {}
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        _check_header(path, header)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise UserError(f"{path}, line {rows.line_num}: {len(row)} values for {len(header)} columns")
            file = _file(path, rows.line_num, row[header.index("file")], known)
            fields = gathered.setdefault(file, {"caption": []})
            for name, cell in zip(header, row):
                if cell := " ".join(cell.split()):
                    fields.setdefault("caption" if name.startswith("caption") else name, []).append(cell)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: it is not valid CSV ({error})") from None
    return {file: _asset_text(fields) for file, fields in gathered.items()}


def caption_from_name(file: str) -> str:
    """A caption made of a file's name.

    Example: "props/OldBarrel_02.glb" -> "old barrel 02".
    """
    words = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])|([A-Za-z])([0-9])", _insert_space, PurePosixPath(file).stem)
    return " ".join(re.sub(r"[\W_]+", " ", words).lower().split()) or "an object"


def _insert_space(match: re.Match[str]) -> str:
    return " ".join(part for part in match.groups() if part)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is larger than the {_MAX_BYTES >> 30} GB that a captions file may have")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the captions file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"the captions file {path} is not UTF-8 text: save it as CSV with UTF-8 encoding") from None
    except OSError as error:
        raise UserError(f"the captions file {path} cannot be read ({error.strerror or error})") from None


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise UserError(f"{path} is empty: its first line must be {_FORM}")
    if len(set(header)) < len(header):
        raise UserError(f"{path} has a column twice: its first line must be {_FORM}")
    others = [n for n in header if n != "file" and not _is_caption(n) and n not in _OPTIONAL]
    has_caption = any(_is_caption(n) for n in header)
    missing = [name for name, there in (("file", "file" in header), ("caption", has_caption)) if not there]
    if missing:
        near = difflib.get_close_matches(missing[0], others, 1)
        meant = f"; is '{near[0]}' meant to be it?" if near else f": its first line must be {_FORM}"
        raise UserError(f"{path} has no column '{missing[0]}' (it has {', '.join(header)}){meant}")
    for name in others:
        near = difflib.get_close_matches(name, set(_OPTIONAL) - set(header), 1, 0.8)
        if near:
            raise UserError(f"{path} has a column '{name}': rename it to '{near[0]}' if that is meant, or remove it")


def _is_caption(name: str) -> bool:
    return name == "caption" or name.startswith("caption_")


def _file(path: Path, line: int, cell: str, known: set[str]) -> str:
    file = str(PurePosixPath(cell.strip().replace("\\", "/")))
    if file not in known:
        near = difflib.get_close_matches(file, known, 1, 0.8)
        meant = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(f"{path}, line {line}: there is no 3D file {file!r} in the folder{meant}")
    return file


def _asset_text(fields: dict[str, list[str]]) -> AssetText:
    named = {_OPTIONAL[name]: values[0] for name, values in fields.items() if name in _OPTIONAL}
    return AssetText(captions=tuple(dict.fromkeys(fields["caption"])), **named)
