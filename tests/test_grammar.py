"""The caption grammar: every caption of a meaning parses back to it, and swaps never do."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from shapeloom.data_pipes.grammar import (
    COLORS,
    PAIR_RELATIONS,
    SHAPES,
    Part,
    SceneSpec,
    canonical_caption,
    captions,
    draw_group,
    held_out,
    held_out_attributes,
    near_misses,
    parse,
    single_specs,
    swaps,
)
from shapeloom.errors import UserError

LEVELS = ("core", "full")


def all_specs(level: str, n_groups: int = 600) -> list[SceneSpec]:
    rng = np.random.default_rng(0)
    sizes = (2,) if level == "core" else (2, 3)
    return single_specs(level) + [draw_group(level, n, rng) for n in sizes for _ in range(n_groups)]


def pair(first: str, relation: str, second: str) -> SceneSpec:
    (color_1, shape_1), (color_2, shape_2) = first.split(), second.split()
    return SceneSpec((Part(shape_1, color_1), Part(shape_2, color_2)), relation)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_have_the_promised_vocabulary(level: str) -> None:
    n_shapes, n_colors, n_relations = {"core": (6, 8, 2), "full": (9, 10, 3)}[level]
    assert (len(SHAPES[level]), len(COLORS[level]), len(PAIR_RELATIONS[level])) == (n_shapes, n_colors, n_relations)
    assert len(single_specs(level)) == n_shapes * n_colors * 3
    relations = {spec.relation for spec in all_specs(level)}
    assert relations == {None, *PAIR_RELATIONS[level], *(("between", "tower") if level == "full" else ())}


@pytest.mark.parametrize("level", LEVELS)
def test_every_caption_parses_back(level: str) -> None:
    rng = np.random.default_rng(1)
    for spec in all_specs(level):
        said = captions(spec, rng)
        assert said[0] == canonical_caption(spec)
        assert len(said) == len(set(said)) == 4
        assert all(parse(caption) == spec for caption in said)
        assert SceneSpec.from_json(spec.to_json()) == spec


def test_every_pair_of_core_parses_back() -> None:
    parts = [Part(shape, color) for shape in SHAPES["core"] for color in COLORS["core"]]
    for first, second in itertools.permutations(parts, 2):
        for relation in PAIR_RELATIONS["core"]:
            spec = SceneSpec((first, second), relation)
            assert parse(canonical_caption(spec)) == spec


@pytest.mark.parametrize("level", LEVELS)
def test_articles_are_right(level: str) -> None:
    rng = np.random.default_rng(2)
    for spec in all_specs(level):
        for caption in captions(spec, rng) + [swap["caption"] for swap in swaps(spec)]:
            for article, letter in re.findall(r"\b(an?) (\w)", caption):
                assert (article == "an") == (letter in "aeiou"), caption
            assert "  " not in caption


@pytest.mark.parametrize("level", LEVELS)
def test_swaps_mean_something_else(level: str) -> None:
    for spec in all_specs(level):
        wrong = swaps(spec)
        assert bool(wrong) == (spec.relation is not None)
        for swap in wrong:
            other = parse(swap["caption"])
            assert other != spec
            assert sorted(p.color for p in other.parts) == sorted(p.color for p in spec.parts)
            assert sorted(p.shape for p in other.parts) == sorted(p.shape for p in spec.parts)


@pytest.mark.parametrize("level", LEVELS)
def test_near_misses_are_wrong_in_one_word(level: str) -> None:
    rng = np.random.default_rng(3)
    kinds = set()
    for spec in all_specs(level):
        for caption in near_misses(spec, level, rng, 3):
            other = parse(caption)
            assert other.relation == spec.relation
            left, wrong = (Counter(one.parts) - Counter(two.parts) for one, two in ((spec, other), (other, spec)))
            (part,), (changed,) = left.elements(), wrong.elements()
            (kind,) = (name for name in ("shape", "color", "size") if getattr(part, name) != getattr(changed, name))
            kinds.add((kind, spec.relation is None))
            assert changed.shape in SHAPES[level] and changed.color in COLORS[level]
    assert kinds == {("shape", True), ("color", True), ("size", True), ("shape", False), ("color", False)}


def test_swaps_by_hand() -> None:
    spec = pair("red cube", "on top of", "blue sphere")
    assert swaps(spec) == [
        {"kind": "parts", "caption": "a blue sphere on top of a red cube"},
        {"kind": "colors", "caption": "a blue cube on top of a red sphere"},
        {"kind": "shapes", "caption": "a red sphere on top of a blue cube"},
        {"kind": "relation", "caption": "a red cube under a blue sphere"},
    ]
    meanings = {swap["kind"]: parse(swap["caption"]) for swap in swaps(spec)}
    assert meanings["parts"] == meanings["relation"]
    assert len(set(meanings.values())) == 3
    same_color = swaps(pair("red cube", "left of", "red sphere"))
    assert [swap["kind"] for swap in same_color] == ["parts", "shapes", "relation"]
    assert swaps(SceneSpec((Part("cube", "red"),))) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a cyan cone left of a red ball", "a red sphere to the right of an aqua cone"),
        ("an orange ring on top of a gray block", "A grey cube beneath an orange donut."),
        ("a big red cube", "a large block that is red"),
        ("a tiny purple torus", "a model of a small ring in violet"),
        ("a red cube in front of a pink pill", "a pink capsule behind a red block"),
        ("a red cube between a pink pill and a blue cone", "a red cube placed between a blue cone and a pink pill"),
        (
            "a red cube on top of a blue cone on top of a gray sphere",
            "a gray ball under a blue cone below a red cube",
        ),
    ],
)
def test_synonyms_mean_the_same(one: str, other: str) -> None:
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red cone left of a blue ball", "a blue ball left of a red cone"),
        ("a red cone left of a blue ball", "a red cone right of a blue ball"),
        ("a red cube", "a small red cube"),
        ("a red cube between a pink pill and a blue cone", "a pink pill between a red cube and a blue cone"),
    ],
)
def test_other_words_mean_something_else(one: str, other: str) -> None:
    assert parse(one) != parse(other)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cube",
        "red cube",
        "a red dog",
        "a red cube near a blue ball",
        "a red cube that is blue",
        "a photo of a cat",
    ]
    + ["a red cube on a blue ball left of a gray cone", "a huge red cube"],
)
def test_what_is_not_of_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(caption))):
        parse(caption)


def test_held_out_is_as_stated() -> None:
    assert len(held_out_attributes("core")) == 6 and len(held_out_attributes("full")) == 8
    for level in LEVELS:
        attributes = set(itertools.product(SHAPES[level], COLORS[level]))
        assert held_out_attributes(level) <= attributes
        seen = sorted(attributes - held_out_attributes(level))
        kinds = [
            held_out(level, SceneSpec((Part(*first), Part(*second)), "left of"))
            for first, second in itertools.combinations(seen, 2)
        ]
        assert set(kinds) == {None, "combo"}
        assert 0.17 < kinds.count("combo") / len(kinds) < 0.23
        # Every shape and every colour is still seen, and so is every part in some pair.
        assert {shape for shape, _ in seen} == set(SHAPES[level]) and {c for _, c in seen} == set(COLORS[level])
    spec = pair("green sphere", "left of", "blue cube")
    assert held_out("core", spec) == "attr"
    exchanged = SceneSpec(spec.parts[::-1], "on top of")
    assert held_out("core", exchanged) == "attr"


def test_held_out_combinations_do_not_depend_on_order_or_relation() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        spec = draw_group("core", 2, rng)
        others = [SceneSpec(parts, r) for parts in (spec.parts, spec.parts[::-1]) for r in PAIR_RELATIONS["core"]]
        assert len({held_out("core", other) for other in others}) == 1
