"""captions.csv or captions.jsonl: which file is what, in the user's words; or captions made of file names."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError

__all__ = ["JSON_SUFFIXES", "NO_TEXT", "AssetText", "caption_from_name", "read_captions"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_OPTIONAL = {"category": "category", "licence": "licence", "license": "licence", "author": "author", "source": "source"}
_FORM = "file,caption[,caption_*][,category][,licence][,author][,source]"
_JSON_FORM = '{"file": "chair.glb", "captions": ["a chair"], "licence": "CC0-1.0"}'
_MAX_BYTES = 1 << 30

_Row = tuple[int, str, dict[str, list[str]]]  # line, file as written, and what is said of it by field


@dataclass(frozen=True, slots=True)
class AssetText:
    """What a captions file says of one 3D file; `captions` may be empty."""

    captions: tuple[str, ...] = ()
    category: str | None = None
    licence: str | None = None
    author: str | None = None
    source: str | None = None


NO_TEXT = AssetText()


def read_captions(path: str | Path, known_files: Iterable[str]) -> dict[str, AssetText]:
    """Read a captions file.

    CSV has the columns `file` (relative to the folder of 3D files), `caption` and any `caption_*`, and optionally
    category, licence, author and source. JSONL (by its suffix) has an object a line with the keys `file`, `captions`
    (a list of texts) and those four. Others are passed over. Several rows of one file are several captions of it. Rows
    of files that are not there (any more) are passed over with a word on stderr, unless they are most of all.

    Args:
        known_files: the 3D files there are, relative, with "/" between folders.
    Returns: file -> what is said of it.
    Raises: UserError naming the column, or the file and line.
    """
    path = Path(path)
    rows = _json_rows(path) if path.suffix.lower() in JSON_SUFFIXES else _csv_rows(path)
    known = set(known_files)
    gathered: dict[str, dict[str, list[str]]] = {}
    strange: list[tuple[int, str]] = []
    n_rows = 0
    for line, cell, said in rows:
        n_rows += 1
        file = str(PurePosixPath(cell.strip().replace("\\", "/")))
        if file not in known:
            strange.append((line, file))
            continue
        fields = gathered.setdefault(file, {})
        for name, values in said.items():
            fields.setdefault(name, []).extend(filter(None, (" ".join(value.split()) for value in values)))
    if strange:
        said_of_them = _strangers(path, strange, known)
        if 2 * len(strange) > n_rows:
            raise UserError(said_of_them)
        print(f"passed over: {said_of_them}", file=sys.stderr)
    return {file: _asset_text(path, file, fields) for file, fields in gathered.items()}


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
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the captions file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the captions file {path} cannot be read ({error.strerror or error})") from None
    # Before decoding: UTF-16 without a mark is valid UTF-8, with a null beside each letter.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4096]:
        raise UserError(f"the captions file {path} is UTF-16 text, not UTF-8: save it again with UTF-8 encoding")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the captions file {path} is not UTF-8 text (line {line} has the byte 0x{data[error.start]:02x}, as "
            f"Latin-1 and Windows-1252 do): save it again with UTF-8 encoding"
        ) from None


def _csv_rows(path: Path) -> Iterator[_Row]:
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        _check_header(path, header)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise UserError(f"{path}, line {rows.line_num}: {len(row)} values for {len(header)} columns")
            fields: dict[str, list[str]] = {"captions": []}
            for name, cell in zip(header, row):
                if _is_caption(name) or name in _OPTIONAL:
                    fields.setdefault("captions" if _is_caption(name) else _OPTIONAL[name], []).append(cell)
            yield rows.line_num, row[header.index("file")], fields
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: it is not valid CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[_Row]:
    # Not splitlines(), which parts a line at U+2028, a character that JSON may have in a text.
    lines = _text(path).split("\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty: each of its lines must be like {_JSON_FORM}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield (number, *_json_row(f"{path}, line {number}", line))


def _json_row(where: str, line: str) -> tuple[str, dict[str, list[str]]]:
    """The file and its fields. Raises UserError beginning with `where`."""
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: it is not valid JSON ({error.msg}), write a line like {_JSON_FORM}") from None
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply, write a line like {_JSON_FORM}") from None
    if not line.lstrip().startswith("{"):
        raise UserError(f"{where}: it is not a JSON object, write a line like {_JSON_FORM}")
    row: dict[str, Any] = dict(pairs)
    if len(row) < len(pairs):
        raise UserError(f"{where}: a key is in it twice, leave one out")
    known = {"file", "captions", *_OPTIONAL}
    others = [name for name in row if name not in known]
    for name in others:
        if near := difflib.get_close_matches(name.lower(), known - row.keys(), 1, 0.8):
            raise UserError(f"{where}: unknown key '{name}', rename it to '{near[0]}' if that is meant, or remove it")
    for name in ("file", "captions"):
        if name not in row:
            raise UserError(f"{where}: there is no key '{name}', write a line like {_JSON_FORM}")
    captions = row["captions"]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: 'captions' must be a list of texts, as in {_JSON_FORM}")
    fields: dict[str, list[str]] = {"captions": captions}
    for name in row.keys() - {"captions", *others}:
        if not isinstance(row[name], str) and (name == "file" or row[name] is not None):
            raise UserError(f"{where}: '{name}' must be a text, as in {_JSON_FORM}")
        if name != "file" and row[name] is not None:
            fields.setdefault(_OPTIONAL[name], []).append(row[name])
    if any(re.search("[\ud800-\udfff]", text) for texts in fields.values() for text in texts):
        raise UserError(f"{where}: a text has half of a character (\\ud800 to \\udfff without the other half)")
    return row["file"], fields


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise UserError(f"{path} is empty: its first line must be {_FORM}")
    if len(set(header)) < len(header):
        raise UserError(f"{path} has a column twice: its first line must be {_FORM}")
    others = [n for n in header if n != "file" and not _is_caption(n) and n not in _OPTIONAL]
    has_caption = any(_is_caption(n) for n in header)
    missing = [name for name, there in (("file", "file" in header), ("caption", has_caption)) if not there]
    if missing and len(header) == 1 and (apart := next((mark for mark in ";\t" if mark in header[0]), None)):
        raise UserError(f"{path} has {apart!r} between its columns: save it again with commas")
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


def _strangers(path: Path, strange: list[tuple[int, str]], known: set[str]) -> str:
    line, file = strange[0]
    near = difflib.get_close_matches(file, known, 1, 0.8)
    meant = f"; the nearest is {near[0]!r}" if near else ""
    more = f"; and {len(strange) - 1} more lines name what is not there" if len(strange) > 1 else ""
    return f"{path}, line {line}: there is no 3D file {file!r} in the folder{meant}{more}"


def _asset_text(path: Path, file: str, fields: dict[str, list[str]]) -> AssetText:
    named = {name: values[0] for name, values in fields.items() if name != "captions" and values}
    licences = list(dict.fromkeys(fields.get("licence", [])))
    if len(licences) > 1:
        raise UserError(f"{path}: {file!r} has two licences, {licences[0]!r} and {licences[1]!r}: leave the right one")
    return AssetText(captions=tuple(dict.fromkeys(fields["captions"])), **named)
