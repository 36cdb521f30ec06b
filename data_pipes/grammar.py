"""What the procedural set says: scenes of coloured primitives, their captions, and what is held out of training.

A `SceneSpec` is a meaning. Many captions share one ("a cone left of a ball", "a sphere to the right of a cone"), and
`parse` gives it back from any of them: two captions mean the same if and only if `parse` returns equal specs. Left,
right, in front and behind are as seen from the object's front (+Z); left is smaller x.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ..errors import UserError

Level = Literal["core", "full"]

SIZES = ("small", "medium", "big")
CORE_SHAPES = ("sphere", "cube", "cylinder", "cone", "pyramid", "torus")
CORE_COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "gray")
SHAPES = {"core": CORE_SHAPES, "full": (*CORE_SHAPES, "capsule", "octahedron", "hexagonal prism")}
COLORS = {"core": CORE_COLORS, "full": (*CORE_COLORS, "pink", "brown")}

# Words of one meaning, the canonical one first. A medium object has no size word.
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "block"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
    "pyramid": ("pyramid",),
    "torus": ("torus", "ring", "donut"),
    "capsule": ("capsule", "pill"),
    "octahedron": ("octahedron",),
    "hexagonal prism": ("hexagonal prism", "six-sided prism"),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {color: (color,) for color in COLORS["full"]} | {
    "purple": ("purple", "violet"),
    "gray": ("gray", "grey"),
    "cyan": ("cyan", "aqua"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("",),
    "big": ("big", "large"),
}

# The phrases of a relation between its first and second part, and those that name the second part first.
RELATIONS = {
    "on top of": (("on top of", "on"), ("under", "below", "beneath")),
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "in front of": (("in front of", "placed in front of"), ("behind", "placed behind")),
}
BETWEEN = ("between", "placed between")
PAIR_RELATIONS = {"core": ("on top of", "left of"), "full": tuple(RELATIONS)}
TRIPLE_RELATIONS = {"core": (), "full": ("between", "tower")}  # the middle one first; from top to bottom
VIEW_DEPENDENT = {"left of", "in front of", "between"}

# (shape, colour) never seen in training, each shape and colour at most once: core holds out the first six.
HELD_OUT_ATTRIBUTES = (
    ("sphere", "green"),
    ("cube", "purple"),
    ("cylinder", "red"),
    ("cone", "blue"),
    ("pyramid", "orange"),
    ("torus", "yellow"),
    ("capsule", "cyan"),
    ("octahedron", "gray"),
)
HELD_OUT_COMBINATIONS = 0.2  # of the unordered pairs of (shape, colour)


@dataclass(frozen=True, order=True)
class Part:
    shape: str
    color: str
    size: str = "medium"

    @property
    def attribute(self) -> tuple[str, str]:
        return self.shape, self.color


@dataclass(frozen=True)
class SceneSpec:
    """A meaning: one part, or several in a relation (in the order the relation names them).

    The outer parts of "between" have no order and are kept sorted, so equal meanings are equal specs.
    """

    parts: tuple[Part, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.relation == "between":
            object.__setattr__(self, "parts", (self.parts[0], *sorted(self.parts[1:])))

    @property
    def view_dependent(self) -> bool:
        """Whether it must be judged from frontal views."""
        return self.relation in VIEW_DEPENDENT

    def to_json(self) -> dict[str, Any]:
        return {"relation": self.relation, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SceneSpec:
        return cls(tuple(Part(**part) for part in fields["parts"]), fields["relation"])


# ---------------------------------------------------------------------------------------------- spec -> captions


def canonical_caption(spec: SceneSpec) -> str:
    """The caption made of first words and first phrases; one per meaning."""
    return _join(spec.relation, [_noun_phrase(part) for part in spec.parts])


def captions(spec: SceneSpec, rng: np.random.Generator, n: int = 4) -> list[str]:
    """`n` different captions of one meaning, the canonical one first."""
    found = {canonical_caption(spec): None}  # a dict keeps the order
    for _ in range(50 * n):
        if len(found) >= n:
            break
        found[_paraphrase(spec, rng)] = None
    return list(found)


def swaps(spec: SceneSpec) -> list[dict[str, str]]:
    """Captions that are wrong in one way each: {"kind": parts | colors | shapes | relation, "caption": ...}.

    The first two parts (colours, shapes) are exchanged, or the relation is inverted; for two parts "parts" and
    "relation" mean the same in other words. Swaps that leave the meaning as it was are left out. Single objects have
    none.
    """
    if spec.relation is None:
        return []
    first, second, *rest = spec.parts
    exchanged = {
        "parts": (second, first),
        "colors": (replace(first, color=second.color), replace(second, color=first.color)),
        "shapes": (replace(first, shape=second.shape), replace(second, shape=first.shape)),
    }
    wrong = {kind: SceneSpec((*pair, *rest), spec.relation) for kind, pair in exchanged.items()}
    found = {kind: canonical_caption(other) for kind, other in wrong.items() if other != spec}
    if spec.relation == "tower":
        upside_down = SceneSpec(spec.parts[::-1], "tower")
        if upside_down != spec:
            found["relation"] = canonical_caption(upside_down)
    elif spec.relation in RELATIONS and first != second:
        phrase = RELATIONS[spec.relation][1][0]
        found["relation"] = f"{_noun_phrase(first)} {phrase} {_noun_phrase(second)}"
    return [{"kind": kind, "caption": caption} for kind, caption in found.items()]


def near_misses(spec: SceneSpec, level: Level, rng: np.random.Generator, n: int) -> list[str]:
    """`n` captions in drawn words, each wrong in one: a part's shape or colour, or a single object's size."""
    values = {"shape": SHAPES[level], "color": COLORS[level]} | ({} if spec.relation else {"size": SIZES})
    found = []
    for _ in range(n):
        parts = list(spec.parts)
        wrong, name = int(rng.integers(len(parts))), str(rng.choice(list(values)))
        others = [value for value in values[name] if value != getattr(parts[wrong], name)]
        parts[wrong] = replace(parts[wrong], **{name: others[int(rng.integers(len(others)))]})
        found.append(_paraphrase(SceneSpec(tuple(parts), spec.relation), rng))
    return found


def with_article(words: str) -> str:
    """orange cone -> an orange cone."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun_phrase(part: Part, rng: np.random.Generator | None = None) -> str:
    """A part with its article, in canonical words or in drawn ones."""
    words = (SIZE_WORDS[part.size], COLOR_WORDS[part.color], SHAPE_WORDS[part.shape])
    return with_article(" ".join(filter(None, (_draw(options, rng) for options in words))))


def _paraphrase(spec: SceneSpec, rng: np.random.Generator) -> str:
    phrases = [_noun_phrase(part, rng) for part in spec.parts]
    if spec.relation in RELATIONS:
        straight, inverse = RELATIONS[spec.relation]
        if rng.random() < 0.5:
            return f"{phrases[0]} {_draw(straight, rng)} {phrases[1]}"
        return f"{phrases[1]} {_draw(inverse, rng)} {phrases[0]}"
    if spec.relation == "between" and rng.random() < 0.5:
        phrases[1:] = phrases[:0:-1]
    if spec.relation is not None:
        return _join(spec.relation, phrases, rng)
    (part,) = spec.parts
    color, noun = _draw(COLOR_WORDS[part.color], rng), _draw(SHAPE_WORDS[part.shape], rng)
    sized = with_article(" ".join(filter(None, (_draw(SIZE_WORDS[part.size], rng), noun))))
    return _draw((phrases[0], f"a model of {phrases[0]}", f"{sized} that is {color}", f"{sized} in {color}"), rng)


def _join(relation: str | None, phrases: list[str], rng: np.random.Generator | None = None) -> str:
    if relation is None:
        return phrases[0]
    if relation == "between":
        word = _draw(BETWEEN, rng)
        return f"{phrases[0]} {word} {phrases[1]} and {phrases[2]}"
    if relation == "tower":
        upside_down = rng is not None and rng.random() < 0.5
        word = _draw(RELATIONS["on top of"][upside_down], rng)
        return f" {word} ".join(phrases[::-1] if upside_down else phrases)
    return f"{phrases[0]} {relation} {phrases[1]}"


def _draw(options: tuple[str, ...], rng: np.random.Generator | None) -> str:
    return options[0] if rng is None or len(options) == 1 else options[int(rng.integers(len(options)))]


# ---------------------------------------------------------------------------------------------- caption -> spec


def _meanings(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for name, options in words.items() for word in options}


_SHAPE_OF, _COLOR_OF, _SIZE_OF = _meanings(SHAPE_WORDS), _meanings(COLOR_WORDS), _meanings(SIZE_WORDS)
_PHRASE_OF = {
    phrase: (relation, inverted)
    for relation, sides in RELATIONS.items()
    for inverted, phrases in enumerate(sides)
    for phrase in phrases
}


def _alternatives(words: dict[str, Any]) -> str:
    return "|".join(re.escape(word) for word in sorted(filter(None, words), key=len, reverse=True))


_RELATION_SPLIT = re.compile(rf" ({_alternatives(_PHRASE_OF)}) (?=an? )")
_PART = re.compile(
    rf"an? (?:(?P<size>{_alternatives(_SIZE_OF)}) )?(?:(?P<color>{_alternatives(_COLOR_OF)}) )?"
    rf"(?P<shape>{_alternatives(_SHAPE_OF)})(?: (?:that is|in) (?P<late>{_alternatives(_COLOR_OF)}))?"
)


def parse(caption: str) -> SceneSpec:
    """The meaning of a caption of this grammar (either level; case, final stop and "a model of" do not matter).

    Raises: UserError naming the words that are not understood.
    """
    text = " ".join(caption.lower().strip().rstrip(".").split()).removeprefix("a model of ")
    if between := re.fullmatch(r"(.+?) (?:placed )?between (.+) and (.+)", text):
        return SceneSpec(tuple(_parse_part(words, caption) for words in between.groups()), "between")
    pieces = _RELATION_SPLIT.split(text)
    parts = tuple(_parse_part(words, caption) for words in pieces[::2])
    if len(parts) == 1:
        return SceneSpec(parts)
    said = {_PHRASE_OF[phrase] for phrase in pieces[1::2]}
    relation, inverted = said.pop()
    in_order = parts[::-1] if inverted else parts
    if len(parts) == 2:
        return SceneSpec(in_order, relation)
    if len(parts) == 3 and relation == "on top of" and not said:
        return SceneSpec(in_order, "tower")
    raise UserError(f"caption {caption!r} relates {len(parts)} parts in a way the procedural set does not have")


def _parse_part(words: str, caption: str) -> Part:
    found = _PART.fullmatch(words)
    if not found or (found["color"] is None) == (found["late"] is None):
        raise UserError(f"caption {caption!r} is not of the procedural set: {words!r} is not understood")
    color = _COLOR_OF[found["color"] or found["late"]]
    return Part(_SHAPE_OF[found["shape"]], color, _SIZE_OF[found["size"] or ""])


# ---------------------------------------------------------------------------------------------- held out


def held_out_attributes(level: Level) -> set[tuple[str, str]]:
    return set(HELD_OUT_ATTRIBUTES[: 6 if level == "core" else 8])


def held_out(level: Level, spec: SceneSpec) -> Literal["attr", "combo"] | None:
    """Why a meaning is kept out of training: an unseen attribute, an unseen combination of seen ones, or None.

    A function of the level alone, never of seed or count.
    """
    attributes = [part.attribute for part in spec.parts]
    if held_out_attributes(level) & set(attributes):
        return "attr"
    if any(_combination_held_out(*sorted(pair)) for pair in itertools.combinations(attributes, 2)):
        return "combo"
    return None


def _combination_held_out(first: tuple[str, str], second: tuple[str, str]) -> bool:
    digest = hashlib.sha256("|".join((*first, *second)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_COMBINATIONS


def single_specs(level: Level) -> list[SceneSpec]:
    """Every single object."""
    return [SceneSpec((Part(*choice),)) for choice in itertools.product(SHAPES[level], COLORS[level], SIZES)]


def draw_group(level: Level, n_parts: int, rng: np.random.Generator) -> SceneSpec:
    """A random scene of two or three parts that all differ; every meaning is possible, held out or not."""
    relations = (PAIR_RELATIONS if n_parts == 2 else TRIPLE_RELATIONS)[level]
    shapes, colors = SHAPES[level], COLORS[level]
    chosen = rng.choice(len(shapes) * len(colors), size=n_parts, replace=False)
    parts = tuple(Part(shapes[int(c) // len(colors)], colors[int(c) % len(colors)]) for c in chosen)
    return SceneSpec(parts, relations[int(rng.integers(len(relations)))])
