"""Swapped captions: what is made of real captions and what is refused, and two implementations that agree."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from shapeloom.data_pipes import grammar
from shapeloom.data_pipes.grammar import COLORS, PAIR_RELATIONS, SHAPES, SIZES, TRIPLE_RELATIONS, Part, SceneSpec
from shapeloom.errors import UserError
from shapeloom.eval.benchmark.swaps import free_swaps, swaps

# Captions of the object-centric COCO set and of the DreamFusion gallery, and all that is made of each.
GOOD = {
    "an orange bike leaning on a pole in the snow": ["parts: a pole leaning on an orange bike in the snow"],
    "A red light in front of a tall building": [
        "parts: A tall building in front of a red light",
        "shapes: A red building in front of a tall light",
        "relation: A red light behind a tall building",
    ],
    "A bulldog is wearing a black pirate hat.": ["parts: A black pirate hat is wearing a bulldog."],
    "A stuffed animal in a bag in a room.": [
        "parts: A bag in a stuffed animal in a room.",
        "relation: A stuffed animal outside a bag in a room.",
    ],
    "A gold tie is tied under a brown dress shirt with stripes.": [
        "colors: A brown tie is tied under a gold dress shirt with stripes."
    ],
    "White surfboard leaning against a brown tiki wall.": [
        "colors: Brown surfboard leaning against a white tiki wall."
    ],
    "A bunch of apples stacked on a plate": [
        "parts: A plate stacked on a bunch of apples",
        "relation: A bunch of apples stacked under a plate",
    ],
    "A pile of broccoli laying on a plastic cutting board.": [
        "parts: A plastic cutting board laying on a pile of broccoli.",
        "relation: A pile of broccoli laying under a plastic cutting board.",
    ],
    "a stuffed grey rabbit holding a pretend carrot": ["parts: a pretend carrot holding a stuffed grey rabbit"],
    "A white cat curled up on a wooden chair.": ["relation: A white cat curled up under a wooden chair."],
    "A dog is sleeping on a pile of pillows.": ["relation: A dog is sleeping under a pile of pillows."],
    "A small green vase displays some small yellow blooms.": [
        "colors: A small yellow vase displays some small green blooms."
    ],
    "A bed with white comforter and two black stiletto heels.": [
        "colors: A bed with black comforter and two white stiletto heels."
    ],
    "A bobble head is placed on a laptop keyboard": [
        "parts: A laptop keyboard is placed on a bobble head",
        "relation: A bobble head is placed under a laptop keyboard",
    ],
    "A computer mouse sitting on a keyboard on a desk.": [
        "parts: A keyboard sitting on a computer mouse on a desk.",
        "relation: A computer mouse sitting under a keyboard on a desk.",
    ],
    "There is a cell phone on a table.": [
        "parts: There is a table on a cell phone.",
        "relation: There is a cell phone under a table.",
    ],
    "a capybara wearing a top hat, low poly": ["parts: a top hat wearing a capybara, low poly"],
    "a DSLR photo of a kitten standing on top of a giant tortoise": [
        "parts: a DSLR photo of a giant tortoise standing on top of a kitten",
        "relation: a DSLR photo of a kitten standing under a giant tortoise",
    ],
    "a DSLR photo of an iguana holding a balloon": ["parts: a DSLR photo of a balloon holding an iguana"],
    "a kitten looking at a goldfish in a bowl": ["parts: a goldfish looking at a kitten in a bowl"],
    "an astronaut riding a kangaroo": ["parts: a kangaroo riding an astronaut"],
    "a nest with a few white eggs and one golden egg": ["colors: a nest with a few golden eggs and one white egg"],
    "a wedge of cheese on a silver platter": [
        "parts: a silver platter on a wedge of cheese",
        "relation: a wedge of cheese under a silver platter",
    ],
    "a zoomed out DSLR photo of a brain in a jar": [
        "parts: a zoomed out DSLR photo of a jar in a brain",
        "relation: a zoomed out DSLR photo of a brain outside a jar",
    ],
    "a zoomed out DSLR photo of a few pool balls sitting on a pool table": [
        "parts: a zoomed out DSLR photo of a pool table sitting on a few pool balls",
        "relation: a zoomed out DSLR photo of a few pool balls sitting under a pool table",
    ],
    "a zoomed out DSLR photo of a silver candelabra sitting on a red velvet tablecloth, only one candle is lit": [
        "colors: a zoomed out DSLR photo of a red candelabra sitting on a silver velvet tablecloth, only one candle is "
        "lit"
    ],
    "a zoomed out DSLR photo of a tiger eating an ice cream cone": [
        "parts: a zoomed out DSLR photo of an ice cream cone eating a tiger"
    ],
    # Of no set.
    "The red cup is to the left of the blue plate!": [
        "parts: The blue plate is to the left of the red cup!",
        "colors: The blue cup is to the left of the red plate!",
        "shapes: The red plate is to the left of the blue cup!",
        "relation: The red cup is to the right of the blue plate!",
    ],
    "An orange cat and a white dog.": [
        "colors: A white cat and an orange dog.",
        "shapes: An orange dog and a white cat.",
    ],
    "a red ceramic mug on a red table": [
        "parts: a red table on a red ceramic mug",
        "shapes: a red ceramic table on a red mug",
        "relation: a red ceramic mug under a red table",
    ],
    "a light blue car next to an old dark red truck": ["colors: a dark red car next to an old light blue truck"],
    "A CAT UNDER A RED BOX": ["parts: A RED BOX UNDER A CAT", "relation: A CAT ON TOP OF A RED BOX"],
    "The cats are on the mat.": ["relation: The cats are under the mat."],
    "a golden retriever on a red sofa": [
        "parts: a red sofa on a golden retriever",
        "relation: a golden retriever under a red sofa",
    ],
    "two red boxes beside a blue vase": ["colors: two blue boxes beside a red vase"],
}

REFUSED = {
    "of those sets": [
        "A blue bicycle parked by a metal gate.",
        "a bus covered with assorted colorful graffiti on the side of it",
        "A truck is drying several items of clothing in the sun.",
        "A red and blue fire hydrant with flowers around it.",
        "A red fire hydrant with an open sign on it",
        "A large blue bird standing next to a painting of flowers.",
        "A brown and white horse is wearing a blue muzzle.",
        "A cat relaxes in a suitcase next to a pile of clothes.",
        "A yellow frisbee next to a box with Nike Cleats.",
        "A blue and white traffic sign on a grey brick wall.",
        "A stuffed animal that is frowning is on a skateboard.",
        "A small surfboard sign that says TRADER VIC'S, Los Angeles.",
        "A pizza and fork on a tray on the table",
        "Cut up blood red oranges lay on a blue surface.",
        "A pair of yellow and pink teddy bears leaning against a wall.",
        "A silver and black wired computer mouse on a wooden surface.",
        "A tear in a black, blue, white and yellow piece of material.",
        "a big metal clock sitting on the wall by itself",
        "A slug crawling on the ground around flower petals.",
        "A stuffed animal sitting in the grass, with a book in front of it.",
        "a ceramic upside down yellow octopus holding a blue green ceramic cup",
        "a DSLR photo of a cat lying on its side batting at a ball of yarn",
        "a DSLR photo of a knight holding a lance and sitting on an armored horse",
        "a DSLR photo of a robot cat knocking over a chess piece on a board",
        "a DSLR photo of a swan and its cygnets swimming in a pond",
        "an orangutan holding a paint palette in one hand and a paintbrush in the other",
        "a hotdog in a tutu skirt",
        "a mojito in a beach chair",
        "a spanish galleon sailing on the open sea",
        "a woolly mammoth standing on ice",
        "a zoomed out DSLR photo of an adorable kitten lying next to a flower",
        "a zoomed out DSLR photo of an origami bulldozer sitting on the ground",
        "a zoomed out DSLR photo of a kangaroo sitting on a bench playing the accordion",
        "a zoomed out DSLR photo of a toad catching a fly with its tongue",
    ],
    "because it would say the same": [
        "a cat and a dog",
        "a red cat next to a red dog",
        "a red apple and a green apple",
        "a red ball near a blue ball on a table",
        "a big cat beside a large dog",
        "a grey cat and a gray dog",
        "a dog on a dog",
        "the dog chasing a dog",
    ],
    "because a word may be another": [
        "an orange next to a red cup",
        "a girl eats pizza on a bench",
        "the cat sleeps on a bed",
        "a pile of snow falls on a car",
        "a man on a phone",
        "a statue of a man on a horse",
        "a bottle of red wine next to a white plate",
        "a red car next to a Green Bay sign",
        "a bear holding a cup and a spoon",
        "a knight riding a horse with a red tail",
        '"a red car" next to a blue sign',
        "a ball that is red next to a vase that is blue",
        "an old fashioned clock next to a big dog",
        "a light bulb next to a small cup",
        "a small dog in a big room",
        "a train engine on the tracks",
        "Ein rotes Auto neben einem blauen Haus",
        "",
        ".",
    ],
}


@pytest.mark.parametrize("caption", GOOD)
def test_what_is_made_of_real_captions(caption):
    assert [f"{kind}: {other}" for kind, other in swaps(caption)] == GOOD[caption]


@pytest.mark.parametrize("caption", list(itertools.chain(*REFUSED.values())))
def test_what_is_not_clear_gives_nothing(caption):
    assert swaps(caption) == []


def test_a_swap_undone_is_the_caption():
    undone = 0
    for caption in GOOD:
        for kind, other in swaps(caption):
            back = dict(swaps(other)).get(kind)
            if back is None:
                continue  # "a jar in a brain": of a brain it is not clear that things are in it
            undone += back == caption
            if kind == "relation":  # what is "under" now may have been "on", or "on top of"
                assert back == caption or " on top of " in back
            else:
                assert back == caption
    assert undone > 30


def test_blanks_do_not_matter():
    assert swaps("  a cat \t on  a\nmug ") == swaps("a cat on a mug") != []


def test_any_words_are_taken():
    draw, made = random.Random(0), 0
    phrases = [
        "a dog",
        "a red box",
        "an orange",
        "the light blue cat",
        "two white fish",
        "A few",
        "red",
        "a glass of",
        "é",
    ]
    others = [
        "on",
        "on top of",
        "and",
        "next to",
        "is",
        "sitting",
        "in",
        "of",
        ",",
        ".",
        "a photo of",
        "there is",
        "\\1",
        "(",
    ]
    for _ in range(20_000):
        caption = " ".join(draw.choice(draw.choice((phrases, others))) for _ in range(draw.randrange(7)))
        for kind, other in swaps(caption):
            made += 1
            assert kind in ("parts", "colors", "shapes", "relation") and other.split() != caption.split()
    assert made > 100


# --- the procedural set ----------------------------------------------------------------------------------------------


def specs(n_parts, relations, n, seed):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        # Few words, so that equal shapes and colours meet often.
        parts = (
            Part(str(rng.choice(SHAPES["full"][5:])), str(rng.choice(COLORS["full"][1:4])), str(rng.choice(SIZES)))
            for _ in range(n_parts)
        )
        yield SceneSpec(tuple(parts), str(rng.choice(relations))), rng


def test_procedural_captions_are_read_by_their_grammar():
    for spec, rng in specs(3, TRIPLE_RELATIONS["full"], 50, seed=0):
        canonical, *others = grammar.captions(spec, rng)
        assert swaps(canonical) == [(swap["kind"], swap["caption"]) for swap in grammar.swaps(spec)]
        for caption in others:
            assert swaps(caption) == free_swaps(caption)  # in the caption's own words
    assert swaps("A red cube.") == []
    assert dict(swaps("a red ball to the left of a blue ball"))["parts"] == "a blue ball to the left of a red ball"


def test_these_rules_agree_with_the_grammar():
    """Written apart: what both make of a pair's caption means the same, or neither makes anything."""
    kinds = ("parts", "colors", "shapes")
    made = dict.fromkeys(kinds, 0)
    for spec, rng in specs(2, PAIR_RELATIONS["full"], 400, seed=1):
        expected = {swap["kind"]: grammar.parse(swap["caption"]) for swap in grammar.swaps(spec)}
        for caption in grammar.captions(spec, rng):
            found = dict(free_swaps(caption))
            for kind in kinds:
                meaning = grammar.parse(found[kind]) if kind in found else None
                assert meaning == expected.get(kind), (caption, kind)
                made[kind] += meaning is not None
            if "relation" in found and "above" not in found["relation"]:  # which the grammar does not have
                assert grammar.parse(found["relation"]) == expected["relation"], caption
    assert min(made.values()) > 500


def test_swaps_of_a_group_of_three_say_something_else():
    made = 0
    for spec, rng in specs(3, TRIPLE_RELATIONS["full"], 200, seed=2):
        for caption in grammar.captions(spec, rng):
            for _, other in free_swaps(caption):
                try:
                    assert grammar.parse(other) != spec, (caption, other)
                    made += 1
                except UserError:
                    pass  # "above", or both on and under: outside of the grammar
    assert made > 50
