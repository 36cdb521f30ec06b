"""What the json members of a folder of raw shards say, and the lists beside them, summed up in one pass.

The lists are `rejected.jsonl` and `duplicates.jsonl`, files that are doubles of others; either may be absent. What is
kept are numbers and hashes.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..progress import Bar
from .caption_twins import ARTICLES, CaptionTwins, text_hash, words_of
from .shard_folder import ShardFolder

__all__ = [
    "Doubles",
    "Rejections",
    "Survey",
    "general_form",
    "particulars",
    "read_duplicates",
    "read_rejections",
    "strings",
    "survey",
]

EXAMPLES = 6  # assets kept of a kind of warning, pictures of a kind of rejection
FILES = 3  # file names kept of a kind of rejection
PAIRS = 8  # pairs kept of a kind of doubles
LITTLE_WORDS = ARTICLES | set(
    re.findall(r"\w+", "and as at by for from in into is it its of on or that this to with without")
)
NONE_GIVEN = "none given"
MESH_NUMBERS = (
    "vertices",
    "faces",
    "materials",
    "textures",
    "texture_side",
    "components",
    "open_edge_share",
    "flipped_share",
    "hidden_share",
    "sheet_share",
)


_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\(.*\)|[\d.,]*\d%?")


def general_form(sentence: str) -> str:
    """A sentence without the names and numbers in it, so that those of one kind are equal."""
    return _PARTICULAR.sub("…", sentence)


def particulars(sentence: str) -> str:
    """The names and numbers in a sentence, which its general form leaves out.

    Example: "the file 'a.png' is missing: 2 of 3" -> "a.png, 2, 3".
    """
    return ", ".join(found.strip("'\"()") for found in _PARTICULAR.findall(sentence))


@dataclass
class Survey:
    """What the json members of a folder say, summed up; indices are those of `ShardFolder`."""

    splits: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    licences: Counter[tuple[str, str]] = field(default_factory=Counter)  # (licence, author)
    mesh: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    with_warnings: int = 0
    warnings: Counter[str] = field(default_factory=Counter)  # assets by kind
    warned: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))  # (index, sentence)
    captions_per_asset: Counter[int] = field(default_factory=Counter)
    words_per_caption: Counter[int] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    from_names: int = 0
    texts: Counter[int] = field(default_factory=Counter)  # captions by the hash of their text
    repeated: dict[int, str] = field(default_factory=dict)  # hash -> text, of those met again
    twins: CaptionTwins = field(default_factory=CaptionTwins)  # of captions met the first time; owners are assets
    wanted: Collection[str] = ()  # files to look out for
    places: dict[str, int] = field(default_factory=dict)  # asset by its file, of the wanted ones

    def add(self, index: int, meta: Mapping[str, Any], split: str) -> None:
        """Count one asset in."""
        self.splits[split] += 1
        self.categories[_name(meta.get("category"))] += 1
        self.licences[_name(meta.get("licence")), _name(meta.get("author"))] += 1
        file = meta.get("file")
        if isinstance(file, str) and file in self.wanted:
            self.places[file] = index
        mesh = meta.get("mesh")
        for key, value in mesh.items() if isinstance(mesh, dict) else ():
            if key in MESH_NUMBERS and isinstance(value, int | float) and np.isfinite(value):
                self.mesh[key].append(float(value))
        warnings = strings(meta.get("warnings"))
        self.with_warnings += bool(warnings)
        for kind, sentence in {general_form(sentence): sentence for sentence in warnings}.items():
            self.warnings[kind] += 1
            if len(self.warned[kind]) < EXAMPLES:
                self.warned[kind].append((index, sentence))
        captions = strings(meta.get("captions"))
        self.captions_per_asset[len(captions)] += 1
        self.from_names += bool(meta.get("caption_from_name"))
        for caption in captions:
            self._add_caption(index, caption)

    def _add_caption(self, index: int, caption: str) -> None:
        words = words_of(caption)
        self.words_per_caption[len(words)] += 1
        self.words.update(word for word in words if word not in LITTLE_WORDS)
        text = text_hash(caption)
        self.texts[text] += 1
        if self.texts[text] == 1:
            self.twins.add(index, caption)
        if self.texts[text] == 2:
            self.repeated[text] = caption

    @property
    def captions(self) -> int:
        return self.texts.total()

    def duplicates(self) -> list[tuple[int, str]]:
        """Captions that stand more than once, letter case and spaces aside: (times, text), most frequent first."""
        return sorted(((self.texts[key], text) for key, text in self.repeated.items()), key=lambda pair: -pair[0])


def strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _name(value: Any) -> str:
    return value.strip() or NONE_GIVEN if isinstance(value, str) else NONE_GIVEN


def survey(shards: ShardFolder, wanted: Collection[str] = ()) -> Survey:
    """Read the json member of every asset. Raises UserError for a damaged one.

    Args:
        wanted: files whose assets are to be found (Survey.places).
    """
    found = Survey(wanted=frozenset(wanted))
    with Bar(len(shards), "reading") as bar:
        for index in range(len(shards)):
            found.add(index, shards.read_json(index), shards.splits(index))
            bar.update(1)
    return found


# ------------------------------------------------------------------------------------------- lists beside the shards


@dataclass
class Rejections:
    """Files of one kind of reason: how many, the first few as in rejected.jsonl, and the first that have a picture."""

    count: int = 0
    first: list[dict[str, str]] = field(default_factory=list)
    pictured: list[dict[str, str]] = field(default_factory=list)

    def reasons(self) -> list[str]:
        """As they are given for the files kept."""
        return [entry["reason"] for entry in (*self.first, *self.pictured)]


def read_rejections(shards: ShardFolder) -> dict[str, Rejections]:
    """rejected.jsonl by general reason, most frequent first; none where there is no such file.

    Raises: UserError naming the line that is no JSON object with a file and a reason.
    """
    found: dict[str, Rejections] = defaultdict(Rejections)
    for entry in _entries(shards.local("rejected.jsonl"), ("file", "reason"), ("hint", "picture")):
        kind = found[general_form(entry["reason"])]
        kind.count += 1
        if len(kind.first) < FILES:
            kind.first.append(entry)
        if entry["picture"] and len(kind.pictured) < EXAMPLES:
            kind.pictured.append(entry)
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


@dataclass
class Doubles:
    """Files that are doubles of one kind: how many, and the first as in duplicates.jsonl, each of another file."""

    count: int = 0
    first: list[dict[str, str]] = field(default_factory=list)


def read_duplicates(shards: ShardFolder) -> dict[str, Doubles] | None:
    """duplicates.jsonl by what is the same ("shape and colours", "shape"); None where there is no such file.

    Raises: UserError naming the line that is no JSON object with file, of (whose double it is) and same.
    """
    path = shards.local("duplicates.jsonl")
    if not path.is_file():
        return None
    found: dict[str, Doubles] = defaultdict(Doubles)
    for entry in _entries(path, ("file", "of", "same"), ("picture",)):
        kind = found[entry["same"]]
        kind.count += 1
        if len(kind.first) < PAIRS and all(entry["of"] != other["of"] for other in kind.first):
            kind.first.append(entry)
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def _entries(path: Path, needed: Sequence[str], others: Sequence[str]) -> Iterator[dict[str, str]]:
    """The keys named, of each line of a file that may be absent; an absent one of the others is an empty text."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                said = {key: str(entry[key]) for key in needed}
                said |= {key: str(entry.get(key) or "") for key in others}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                names = f"{', '.join(needed[:-1])} and {needed[-1]}"
                raise UserError(f"{path}: line {number} is no JSON object with {names}") from None
            yield said
