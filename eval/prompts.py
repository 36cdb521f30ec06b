"""The prompts of an R-precision run, their groups, and the two pools of captions they are judged in.

Both pools come from all test samples of the data folder, whatever number of them is generated: a pool that shrank with
the run would make the task easier. Each meaning stands in a pool once, so no distractor is ever a right answer.

Shapes: P prompts, N captions of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data_pipes.grammar import canonical_caption, parse
from ..errors import UserError
from ..files import sha256_json

__all__ = ["Pool", "Prompt", "Swap", "choose", "groups", "pools", "prompt_of"]

TEST_SPLITS = ("test_seen", "test_combo", "test_attr", "test")
PART_NAMES = {1: "single objects", 2: "pairs", 3: "triples"}
SPLIT_NAMES = {"test_seen": "seen", "test_combo": "unseen combinations", "test_attr": "unseen attributes"}


@dataclass(frozen=True)
class Swap:
    """A caption that says something else with the same words."""

    kind: str
    caption: str
    meaning: str


@dataclass(frozen=True)
class Prompt:
    """One test sample's first caption.

    Args:
        index: place in the data folder.
        meaning: equal for captions that say the same.
        parts: number of primitives, None for data without a specification.
    """

    uid: str
    index: int
    caption: str
    meaning: str
    split: str
    parts: int | None = None
    swaps: tuple[Swap, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Pool:
    """A gallery of captions, one per meaning, in a fixed order."""

    name: str
    captions: tuple[str, ...]
    meanings: tuple[str, ...]

    @property
    def hash(self) -> str:
        return sha256_json(list(self.captions))

    def hits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """bool [P, N]: which captions mean what the prompt means."""
        place = {meaning: index for index, meaning in enumerate(self.meanings)}
        hits_PN = np.zeros((len(prompts), len(self.captions)), bool)
        hits_PN[np.arange(len(prompts)), [place[prompt.meaning] for prompt in prompts]] = True
        return hits_PN


def prompt_of(uid: str, index: int, split: str, meta: dict[str, Any]) -> Prompt:
    """Read a prompt from a sample's JSON.

    Captions of the procedural set (they have a `spec`) mean what the grammar reads in them; any other caption means
    itself.

    Raises: UserError if the sample has no caption.
    """
    captions = meta.get("captions") or []
    if not captions:
        raise UserError(f"sample {uid} has no caption to use as a prompt; build the data with captions")
    spec = meta.get("spec")
    read = _grammar_meaning if spec else str
    own = read(captions[0])
    swaps = tuple(Swap(swap["kind"], swap["caption"], read(swap["caption"])) for swap in meta.get("swaps", ()))
    parts = len(spec["parts"]) if spec else None
    return Prompt(uid, index, captions[0], own, split, parts, tuple(s for s in swaps if s.meaning != own), meta)


def choose(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """The first `count` prompts (None: all), taken in turn from each split, in the order of the data."""
    if count is None or count >= len(prompts):
        return list(prompts)
    by_split: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_split.setdefault(prompt.split, []).append(prompt)
    turns = sorted((turn, place) for place, split in enumerate(by_split.values()) for turn in range(len(split)))
    queues = list(by_split.values())
    return sorted((queues[place][turn] for turn, place in turns[:count]), key=lambda prompt: prompt.index)


def pools(prompts: Sequence[Prompt]) -> list[Pool]:
    """The `random` pool (the prompts) and, where there are swapped captions, the `hard` one (the prompts and those)."""
    own = [(prompt.meaning, prompt.caption) for prompt in prompts]
    swapped = [(swap.meaning, swap.caption) for prompt in prompts for swap in prompt.swaps]
    found = [_pool("random", own)]
    if swapped:
        found.append(_pool("hard", own + swapped))
    return found


def groups(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """bool [P] masks: all, by number of parts, by split."""
    masks = {"all": np.ones(len(prompts), bool)}
    for parts in sorted({prompt.parts for prompt in prompts if prompt.parts is not None}):
        masks[PART_NAMES.get(parts, f"{parts} parts")] = np.array([prompt.parts == parts for prompt in prompts])
    splits = list(dict.fromkeys(prompt.split for prompt in prompts))
    for split in splits if len(splits) > 1 else ():
        masks[SPLIT_NAMES.get(split, split)] = np.array([prompt.split == split for prompt in prompts])
    return masks


def _pool(name: str, entries: list[tuple[str, str]]) -> Pool:
    first: dict[str, str] = {}
    for meaning, caption in entries:
        first.setdefault(meaning, caption)
    return Pool(name, tuple(first.values()), tuple(first))


def _grammar_meaning(caption: str) -> str:
    """The one canonical caption of a meaning."""
    return canonical_caption(parse(caption))
