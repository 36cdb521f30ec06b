"""What the json members and `rejected.jsonl` of a folder of raw shards say, summed up in one pass.

What is kept are numbers and hashes: 300 bytes a caption, so 12 MB for 10,000 assets of four captions each.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..progress import Bar
from .shards import ShardFolder

__all__ = ["Rejections", "Survey", "general_form", "read_rejections", "survey"]

EXAMPLES = 6  # assets kept of a kind of warning
ARTICLES = {"a", "an", "the"}
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


def general_form(sentence: str) -> str:
    """A sentence without the names and numbers in it, so that those of one kind are equal."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\(.*\)|[\d.,]*\d%?", "…", sentence)


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
    wordings: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # hash of the words -> assets

    def add(self, index: int, meta: Mapping[str, Any], split: str) -> None:
        """Count one asset in."""
        self.splits[split] += 1
        self.categories[_name(meta.get("category"))] += 1
        self.licences[_name(meta.get("licence")), _name(meta.get("author"))] += 1
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
        text = text_key(caption)
        self.texts[text] += 1
        if self.texts[text] == 1 and words:
            self.wordings[words_key(caption)].append(index)
        if self.texts[text] == 2:
            self.repeated[text] = caption

    @property
    def captions(self) -> int:
        return self.texts.total()

    def duplicates(self) -> list[tuple[int, str]]:
        """Captions that stand more than once, letter case and spaces aside: (times, text), most frequent first."""
        return sorted(((self.texts[key], text) for key, text in self.repeated.items()), key=lambda pair: -pair[0])

    def near_duplicates(self) -> list[tuple[int, list[int]]]:
        """Captions of the same words in another order, articles aside: hash, and an asset of each wording."""
        groups = [(key, indices) for key, indices in self.wordings.items() if len(indices) > 1]
        return sorted(groups, key=lambda group: -len(group[1]))


def words_of(caption: str) -> list[str]:
    """Lower-case words of a caption, in any script."""
    return re.findall(r"\w+(?:['’-]\w+)*", caption.casefold())


def text_key(caption: str) -> int:
    return hash(" ".join(caption.casefold().split()))


def words_key(caption: str) -> int:
    return hash(tuple(sorted(word for word in words_of(caption) if word not in ARTICLES)))


def strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _name(value: Any) -> str:
    return value.strip() or NONE_GIVEN if isinstance(value, str) else NONE_GIVEN


def survey(shards: ShardFolder) -> Survey:
    """Read the json member of every asset. Raises UserError for a damaged one."""
    found = Survey()
    with Bar(len(shards), "reading") as bar:
        for index in range(len(shards)):
            found.add(index, shards.read_json(index), shards.splits(index))
            bar.update(1)
    return found


@dataclass
class Rejections:
    """Files of one kind of reason: how many, and the first few as in rejected.jsonl."""

    count: int = 0
    first: list[dict[str, str]] = field(default_factory=list)


def read_rejections(folder: Path) -> dict[str, Rejections]:
    """rejected.jsonl by general reason, most frequent first; none where there is no such file.

    Raises: UserError naming the line that is no JSON object with a file and a reason.
    """
    path = folder / "rejected.jsonl"
    found: dict[str, Rejections] = defaultdict(Rejections)
    if not path.is_file():
        return found
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                file_name, reason, hint = str(entry["file"]), str(entry["reason"]), str(entry.get("hint") or "")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise UserError(f"{path}: line {number} is no JSON object with a file and a reason") from None
            kind = found[general_form(reason)]
            kind.count += 1
            if len(kind.first) < 3:
                kind.first.append({"file": file_name, "reason": reason, "hint": hint})
    return dict(sorted(found.items(), key=lambda item: -item[1].count))
