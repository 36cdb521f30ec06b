"""Captions alike: cases by hand, and all pairs of random sets against comparing each with each."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from shapeloom.data_pipes.caption_twins import CaptionTwins, bag, bag_hash, odd_word

CHAIR = "a red wooden chair with four legs"


def taken(captions: list[str]) -> CaptionTwins:
    """Each caption its own owner."""
    twins = CaptionTwins()
    for owner, caption in enumerate(captions):
        twins.add(owner, caption)
    return twins


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red box", "Box, red!"),
        ("the red boxes", "a RED box"),
        ("two berries on dishes", "two berry on dish"),
        ("houses", "house"),
        ("glasses", "glass"),
        ("ties", "tie"),
        ("ein Würfel", "EIN WÜRFEL"),
        ("red red cup", "cup, red and red".replace(" and", "")),
    ],
)
def test_order_case_punctuation_articles_and_plurals_are_nothing(one: str, other: str) -> None:
    assert bag(one) == bag(other) and bag_hash(bag(one)) == bag_hash(bag(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("red cup", "red red cup"),
        ("a cup with a lid", "a cup without a lid"),
        ("glass", "glas"),
        ("a bus", "a bu"),
        ("this", "thi"),
        ("gas", "ga"),
        ("children's chair", "children chair"),
    ],
)
def test_other_words_and_other_counts_are_not_the_same(one: str, other: str) -> None:
    assert bag(one) != bag(other)


def test_groups_by_hand() -> None:
    captions = [
        CHAIR,
        "A chair, wooden, red, with four legs.",  # the same words as the first
        "a blue wooden chair with four legs",
        "a green wooden chair with four legs",
        "a red wooden chair with four long legs",  # the first and one more
        "a red box",
        "a blue box",  # too few words to be near
        "...",
    ]
    twins = taken(captions)
    assert [group.owners for group in twins.same_words()] == [[0, 1]]
    near = twins.one_word_apart()
    assert [group.owners for group in near] == [[0, 2, 3], [0, 4]]
    assert [odd_word(bag(captions[k]), near[0].key) for k in (0, 2, 3, 4)] == ["red", "blue", "green", None]
    assert [odd_word(bag(captions[k]), near[1].key) for k in (0, 4)] == [None, "long"]


def test_nothing_gives_nothing() -> None:
    for captions in ([], ["a"], ["", "  "], ["a cup"]):
        assert taken(captions).same_words() == [] and taken(captions).one_word_apart() == []


@pytest.mark.parametrize("seed", range(20))
def test_all_pairs_are_those_of_comparing_each_with_each(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = ["red", "blue", "cup", "box", "on", "under", "two", "old"][: rng.randint(2, 8)]
    captions = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 8))) for _ in range(150)]
    twins = taken(captions)
    same = {pair for group in twins.same_words() for pair in combinations(group.owners, 2)}
    bags = [Counter(caption.split()) for caption in captions]
    assert same == {(i, j) for i, j in combinations(range(150), 2) if bags[i] == bags[j]}
    found = [pair for group in twins.one_word_apart() for pair in combinations(group.owners, 2)]
    first = [i for i in range(150) if bags[i] not in bags[:i] and bags[i].total() >= 5]
    # One word in another's place, or one more: then each has at most one word that the other lacks, and they differ.
    expected = [
        (i, j)
        for i, j in combinations(first, 2)
        if (bags[i] - bags[j]).total() <= 1 and (bags[j] - bags[i]).total() <= 1
    ]
    assert sorted(found) == expected, "each pair once"
