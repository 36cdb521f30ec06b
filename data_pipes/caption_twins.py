"""Captions that say the same in other words' order, or all but the same: found in nearly linear time.

A caption is taken as its bag of words: letter case, punctuation, articles and plurals apart. A bag has a hash that is
the sum of its words' (modulo 2^64), so that without one of its words it is one subtraction. Two bags differ in one
word, put in another's place or added, if and only if they share a hash, their own or without a word:
A - a = B - b, or A = B - b. So sorting all such hashes finds all pairs; comparing each caption with each other is not
needed. That two bags share a hash by chance has a probability of about n^2 / 2^65 for n hashes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CaptionTwins", "Group", "bag", "bag_hash", "odd_word", "text_hash", "words_of"]

FEWEST_WORDS = 5  # of captions that a word sets apart; of fewer words, one more is another thing
ARTICLES = {"a", "an", "the"}
_MASK = (1 << 64) - 1


def words_of(caption: str) -> list[str]:
    """Lower-case words of a caption, in any script."""
    return re.findall(r"\w+(?:['’-]\w+)*", caption.casefold())


def text_hash(caption: str) -> int:
    """Equal for captions that differ in letter case and spaces alone; another in each process."""
    return hash(" ".join(caption.casefold().split()))


def bag(caption: str) -> list[str]:
    """The words that count, in the singular and sorted.

    Example: "Two red boxes, on the Table" -> ["box", "on", "red", "table", "two"].
    """
    return sorted(_singular(word) for word in words_of(caption) if word not in ARTICLES)


def _singular(word: str) -> str:
    """English plurals without their ending, most of them; a word is never taken for another that is not near it."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    return word[:-2] if word.endswith(("xes", "ches", "shes", "sses", "zzes")) else word[:-1]


def bag_hash(words: Sequence[str]) -> int:
    """In [0, 2^64), whatever the words' order; another in each process."""
    return sum(map(hash, words)) & _MASK


def odd_word(words: Sequence[str], key: int) -> str | None:
    """The word without which a bag has the hash `key`; None where it has that hash itself or has no such word."""
    whole = bag_hash(words)
    return None if whole == key else next((word for word in words if (whole - hash(word)) & _MASK == key), None)


@dataclass(frozen=True)
class Group:
    """Captions alike: the hash of the bag that they share, and whose they are, one a caption."""

    key: int
    owners: list[int]


class CaptionTwins:
    """Takes captions one by one, and tells which are alike.

    Numbers alone are kept: 16 bytes a caption and 12 bytes a word of it. An owner is a number in [0, 2^32).
    """

    def __init__(self) -> None:
        self._owner, self._key, self._words = array("I"), array("Q"), array("I")
        self._without_number, self._without_key = array("I"), array("Q")

    def add(self, owner: int, caption: str) -> None:
        """Take one caption in; one without words is passed over."""
        words = bag(caption)
        if not words:
            return
        whole, number = bag_hash(words), len(self._owner)
        self._owner.append(owner)
        self._key.append(whole)
        self._words.append(len(words))
        if len(words) >= FEWEST_WORDS:
            for word in set(words):
                self._without_number.append(number)
                self._without_key.append((whole - hash(word)) & _MASK)

    def same_words(self) -> list[Group]:
        """Two or more captions of one bag, the largest group first."""
        numbers, keys = np.arange(len(self._key)), np.frombuffer(self._key, np.uint64)
        return self._largest_first(_shared(keys, numbers))

    def one_word_apart(self) -> list[Group]:
        """Captions of five or more words that are one bag but for a word of each, the largest group first.

        Each two bags that differ in one word are in exactly one group, and those of a group all do from each other. Of
        captions of one bag only the first counts.
        """
        keys = np.frombuffer(self._key, np.uint64)
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        whole = np.flatnonzero(first & (np.frombuffer(self._words, np.uint32) >= FEWEST_WORDS))
        numbers = np.frombuffer(self._without_number, np.uint32).astype(np.int64)
        left = first[numbers]
        every_key = np.concatenate([keys[whole], np.frombuffer(self._without_key, np.uint64)[left]])
        return self._largest_first(_shared(every_key, np.concatenate([whole, numbers[left]])))

    def _largest_first(self, groups: Iterator[tuple[int, np.ndarray]]) -> list[Group]:
        ordered = sorted(groups, key=lambda group: (-len(group[1]), int(group[1][0])))
        return [Group(key, [self._owner[number] for number in numbers]) for key, numbers in ordered]


def _shared(keys: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Keys that stand more than once, each with its numbers, sorted."""
    order = np.lexsort((numbers, keys))
    keys, numbers = keys[order], numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
    for start, end in zip(starts, [*starts[1:], len(keys)]):
        if end - start > 1:
            yield int(keys[start]), numbers[start:end]
