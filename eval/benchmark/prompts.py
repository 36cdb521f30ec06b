"""Prompt sets: the captions that objects are made for, their groups, their equals, their swaps, and the galleries.

From a file: `.txt` (one caption a line; ids are the caption's place, from 000) or `.jsonl` (see `LINE`). From a folder
of raw shards: the first caption of every sample in a test split, with the sample itself as reference.
Galleries come from the whole set, whatever number of it is scored or found: a gallery that shrank with the run would
make the task easier.

Shapes: P prompts, N captions of a gallery.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data_pipes import grammar
from ...data_pipes.shard_folder import ShardFolder
from ...data_pipes.shards import MANIFEST
from ...errors import UserError
from ...files import sha256_json
from .sources import MeshFile, Picture, Source, StoredObject, StoredPicture
from .swaps import swaps

__all__ = ["TEST_SPLITS", "Gallery", "Prompt", "PromptSet", "Swap", "choose", "galleries", "groups", "read_prompts"]

TEST_SPLITS = ("test_seen", "test_combo", "test_attr", "test")
PART_NAMES = {1: "single objects", 2: "pairs", 3: "triples"}
SPLIT_NAMES = {"test_seen": "seen", "test_combo": "unseen combinations", "test_attr": "unseen attributes"}

# The keys of a line of prompts.jsonl. `group`: a name or several. `image`: a picture file the object may be made from.
# `reference`: a mesh file of the true object; `reference_up`: "y" or "z", the axis that points up in it.
# `equivalent_ids`: prompts that say the same. `swaps`: captions that say something else with the same words
# ({"kind", "text"}), where the grammar's own are not wanted.
LINE = ("id", "text", "group", "image", "reference", "reference_up", "equivalent_ids", "swaps")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LONGEST_TEXT = 2000
MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Swap:
    """A caption that says something else with the same words."""

    kind: str
    text: str
    meaning: str


@dataclass(frozen=True)
class Prompt:
    """One caption to make an object for.

    Args:
        id: also the name of the object's file or folder.
        meaning: equal for captions that say the same.
        groups: names of what the prompt belongs to.
        image: a picture to make the object from; reference: the true object.
        index: place in a folder of raw shards, for prompts that come from one.
    """

    id: str
    text: str
    meaning: str
    groups: tuple[str, ...] = ()
    swaps: tuple[Swap, ...] = ()
    image: Source | None = None
    reference: Source | None = None
    index: int | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their order, where they come from, and the raw shards behind them (if they are of such)."""

    prompts: tuple[Prompt, ...]
    source: str
    raw: ShardFolder | None = None

    @property
    def hash(self) -> str:
        """Of ids, captions and which of them say the same."""
        return sha256_json([[p.id, p.text, p.meaning] for p in self.prompts])


@dataclass(frozen=True)
class Gallery:
    """Distinct captions in a fixed order, and what each means."""

    name: str
    captions: tuple[str, ...]
    meanings: tuple[str, ...]

    @property
    def hash(self) -> str:
        """sha256 of the captions joined by line breaks."""
        return hashlib.sha256("\n".join(self.captions).encode()).hexdigest()

    def hits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """bool [P, N]: which captions say what the prompt says."""
        numbers = {meaning: number for number, meaning in enumerate(dict.fromkeys(self.meanings))}
        of_captions_N = np.array([numbers[meaning] for meaning in self.meanings])
        of_prompts_P = np.array([numbers[prompt.meaning] for prompt in prompts])
        return of_prompts_P[:, None] == of_captions_N


def read_prompts(source: str | Path) -> PromptSet:
    """The prompts of a `.txt`, a `.jsonl` or a folder of raw shards.

    Raises: UserError naming file, line and field, for whatever is wrong.
    """
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).exists():
        return _of_raw(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts {path} must be a .txt, a .jsonl or a folder of raw shards")
    lines = _lines(path)
    prompts = _of_text(lines, path) if path.suffix == ".txt" else _of_json_lines(lines, path)
    if not prompts:
        raise UserError(f"prompts {path} holds no prompt")
    return PromptSet(tuple(prompts), str(path))


def choose(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """The first `count` prompts (None: all), taken in turn from each combination of groups, in their order."""
    if count is None or count >= len(prompts):
        return list(prompts)
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_groups.setdefault(prompt.groups, []).append(place)
    turns = sorted((turn, places[turn]) for places in by_groups.values() for turn in range(len(places)))
    return [prompts[place] for place in sorted(place for _, place in turns[:count])]


def galleries(prompts: Sequence[Prompt]) -> list[Gallery]:
    """`prompts`, every caption once, and (where captions have swaps) `hard`, those and the swaps.

    A swap that says what another caption says already is left out, so that no distractor is a right answer.
    """
    own = dict.fromkeys((prompt.text, prompt.meaning) for prompt in prompts)
    found = [_gallery("prompts", list(own))]
    said = {meaning for _, meaning in own}
    swapped: dict[str, str] = {}
    for prompt in prompts:
        for swap in prompt.swaps:
            if swap.meaning not in said:
                said.add(swap.meaning)
                swapped[swap.text] = swap.meaning
    if swapped:
        found.append(_gallery("hard", [*own, *swapped.items()]))
    return found


def groups(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """bool [P] masks: "all", then each prompt's first groups in the order they are met, then the second ones, …"""
    most = max((len(prompt.groups) for prompt in prompts), default=0)
    names = dict.fromkeys(prompt.groups[k] for k in range(most) for prompt in prompts if len(prompt.groups) > k)
    masks = {name: np.array([name in prompt.groups for prompt in prompts]) for name in names}
    return {"all": np.ones(len(prompts), bool), **masks}


def _gallery(name: str, entries: Sequence[tuple[str, str]]) -> Gallery:
    return Gallery(name, tuple(text for text, _ in entries), tuple(meaning for _, meaning in entries))


# ---------------------------------------------------------------------------------------------------------- from files


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"prompts {path} is larger than {MOST_BYTES >> 20} MB: split it")
        # By line feeds alone: captions may hold what Unicode calls a line separator.
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"prompts {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _of_text(lines: list[str], path: Path) -> list[Prompt]:
    """Lines that begin with # are comments; ids are zero-padded places among the captions."""
    texts = [line for line in lines if line.strip() and not line.startswith("#")]
    width = max(3, len(str(len(texts) - 1)))
    return [_prompt(f"{place:0{width}d}", _text(text, f"{path}: caption {place}")) for place, text in enumerate(texts)]


def _of_json_lines(lines: list[str], path: Path) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}
    equals: list[tuple[str, str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = _fields(line, where)
        prompt = _of_fields(fields, path, where)
        if prompt.id in prompts:
            raise UserError(f"{where}: the id '{prompt.id}' was given before; ids must differ")
        prompts[prompt.id] = prompt
        equals += [(prompt.id, other, where) for other in _names(fields, "equivalent_ids", where)]
    same: dict[str, str] = {}  # a meaning to one that it equals, in chains that end

    def first(meaning: str) -> str:
        while meaning in same:
            meaning = same[meaning]
        return meaning

    for own, other, where in equals:
        if other not in prompts:
            raise UserError(f"{where}: equivalent_ids names '{other}', which no line has as its id")
        if (kept := first(prompts[own].meaning)) != (merged := first(prompts[other].meaning)):
            same[merged] = kept
    return [_with_meanings(prompt, first) for prompt in prompts.values()]


def _with_meanings(prompt: Prompt, of: Callable[[str], str]) -> Prompt:
    """The prompt with its meanings renamed; a swap that now says the same is none."""
    own = of(prompt.meaning)
    renamed = tuple(replace(swap, meaning=of(swap.meaning)) for swap in prompt.swaps)
    return replace(prompt, meaning=own, swaps=tuple(swap for swap in renamed if swap.meaning != own))


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: it is not a JSON object on one line") from None
    if not isinstance(fields, dict):
        raise UserError(f'{where}: it is not a JSON object, such as {{"id": "a", "text": "a red cube"}}')
    for key in fields:
        if key not in LINE:
            near = difflib.get_close_matches(key, LINE, 1)
            meant = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(LINE)}"
            raise UserError(f"{where}: unknown key '{key}'{meant}")
    return fields


def _of_fields(fields: dict[str, Any], path: Path, where: str) -> Prompt:
    own_id = fields.get("id")
    if not isinstance(own_id, str) or not ID.fullmatch(own_id):
        raise UserError(
            f"{where}: the id {own_id!r} cannot name a file everywhere: use 1 to 100 of A-Z a-z 0-9 . _ - and begin "
            "with a letter or digit (captions may hold anything)"
        )
    prompt = _prompt(own_id, _text(fields.get("text"), where), tuple(_names(fields, "group", where)))
    if (image := _file(fields, "image", path, where)) is not None:
        prompt = replace(prompt, image=Picture(str(image)))
    if (reference := _file(fields, "reference", path, where)) is not None:
        if (up := fields.get("reference_up", "y")) not in ("y", "z"):
            raise UserError(f"{where}: reference_up must be 'y' or 'z', got {up!r}")
        prompt = replace(prompt, reference=MeshFile(str(reference), up))
    if fields.get("swaps") is not None:
        prompt = replace(prompt, swaps=_given_swaps(fields["swaps"], prompt, where))
    return prompt


def _file(fields: dict[str, Any], key: str, path: Path, where: str) -> Path | None:
    given = fields.get(key)
    if given is None:
        return None
    if not isinstance(given, str) or not (path.parent / given).is_file():
        raise UserError(f"{where}: {key} {given!r} is not a file (paths are relative to {path.parent})")
    return path.parent / given


def _given_swaps(given: Any, prompt: Prompt, where: str) -> tuple[Swap, ...]:
    shape = isinstance(given, list) and all(
        isinstance(one, dict) and set(one) == {"kind", "text"} and all(isinstance(v, str) for v in one.values())
        for one in given
    )
    if not shape:
        raise UserError(f'{where}: swaps must be a list of {{"kind": "colors", "text": "the swapped caption"}}')
    return tuple(_swap(one["kind"], _text(one["text"], where)) for one in given if one["text"] != prompt.text)


def _names(fields: dict[str, Any], key: str, where: str) -> list[str]:
    given = fields.get(key)
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{where}: {key} must be a text or a list of texts, got {given!r}")
    if key == "group" and any("|" in name or name == "all" for name in names):
        raise UserError(f"{where}: a group may not be called 'all' or hold a '|', got {given!r}")
    return names


def _text(text: Any, where: str) -> str:
    """Line breaks and tabs are blanks, as tokenizers read them; the rest stays, since a gallery's hash is of it."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: the caption is missing or empty: give it as "text"')
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where}: the caption has {len(text)} characters; at most {LONGEST_TEXT} are taken")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: the caption holds half of a character (a lone surrogate): write it whole")
    return re.sub(r"\s*[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text.strip())


def _prompt(own_id: str, text: str, names: tuple[str, ...] = ()) -> Prompt:
    own = _meaning(text)
    found = tuple(_swap(kind, other) for kind, other in swaps(text))
    return Prompt(own_id, text, own, names, tuple(swap for swap in found if swap.meaning != own))


def _swap(kind: str, text: str) -> Swap:
    return Swap(kind, text, _meaning(text))


def _meaning(text: str) -> str:
    """A caption of the procedural set means its canonical one; any other means itself, whatever its case and stop."""
    try:
        return grammar.canonical_caption(grammar.parse(text))
    except UserError:
        return " ".join(text.lower().split()).rstrip(" .")


# ----------------------------------------------------------------------------------------------------- from raw shards


def _of_raw(path: Path) -> PromptSet:
    folder = ShardFolder(path)
    tests = folder.where(TEST_SPLITS).tolist()
    if not tests:
        raise UserError(f"{path} has no sample in a test split, so there is nothing to score: build more data")
    prompts = [_of_sample(folder, index) for index in tests]
    if len({prompt.groups[-1] for prompt in prompts}) == 1:  # one split alone is no group
        prompts = [replace(prompt, groups=prompt.groups[:-1]) for prompt in prompts]
    return PromptSet(tuple(prompts), str(path), folder)


def _of_sample(folder: ShardFolder, index: int) -> Prompt:
    """The sample's first caption; its own swaps where the procedural set gave it some."""
    uid, meta, split = folder.uid(index), folder.read_json(index), folder.splits(index)
    captions = meta.get("captions") or []
    if not captions:
        raise UserError(f"sample {uid} has no caption to use as a prompt; build the data with captions")
    prompt = _prompt(uid, _text(captions[0], f"sample {uid}"))
    names = [SPLIT_NAMES.get(split, split)]
    if spec := meta.get("spec"):
        parts = len(spec["parts"])
        names.insert(0, PART_NAMES.get(parts, f"{parts} parts"))
        given = (_swap(swap["kind"], swap["caption"]) for swap in meta.get("swaps", ()))
        prompt = replace(prompt, swaps=tuple(swap for swap in given if swap.meaning != prompt.meaning))
    kept = str(folder.folder)
    return replace(
        prompt,
        groups=tuple(names),
        image=StoredPicture(kept, folder.hash, uid) if folder.has("lit_") else None,
        reference=StoredObject(kept, folder.hash, uid, exact=bool(spec)),
        index=index,
    )
