"""Captions that say something else with the same words: what a model must tell from the caption it was given.

For any English caption whose grammar is plain: one thing in a relation to another ("a dog on top of a car"), or two
coloured things anywhere in it. Word lists and patterns, no model. A caption that is not clear gives nothing: a swap in
wrong English, or one that means the same, would be counted as an error of the model that is scored.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...data_pipes import grammar
from ...errors import UserError

__all__ = ["swaps"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# --- relations -------------------------------------------------------------------------------------------------------

# A relation in space, and one that it cannot be at the same time.
OPPOSITES = {
    "on top of": "under", "on": "under", "atop": "under", "over": "under", "under": "on top of",
    "underneath": "on top of", "beneath": "on top of", "above": "below", "below": "above",
    "in front of": "behind", "behind": "in front of", "left of": "right of", "right of": "left of",
    "to the left of": "to the right of", "to the right of": "to the left of", "in": "outside", "inside": "outside",
    "inside of": "outside", "around": "inside",
}  # fmt: skip
SYMMETRIC = ("next to", "beside", "near", "by", "close to", "alongside", "opposite", "facing", "and")
# What one thing does to another; the other way round it is another scene.
ACTIONS = (
    "riding", "riding on", "holding", "wearing", "carrying", "eating", "chasing", "following", "pulling", "pushing",
    "kicking", "biting", "catching", "lifting", "watching", "looking at", "leaning against", "leaning on",
    "hanging from",
)  # fmt: skip
POSTURES = ("sitting", "standing", "lying", "laying", "resting", "placed", "perched", "stacked")
OWN_POSTURES = ("sleeping", "curled up", "crouching", "parked")  # not of any thing: the two do not change places
VERBS = ("is", "are", "sits", "stands", "lies", "rests")  # must agree with what stands before them

# --- words -----------------------------------------------------------------------------------------------------------

SINGULAR = _set("a an one")
PLURAL = _set("two three four five six some several many")
COLORS = _set(
    "red orange yellow green blue purple violet pink brown black white gray grey cyan aqua teal turquoise magenta "
    "maroon beige tan gold golden silver crimson scarlet lavender indigo"
)
SHADES = _set("dark light bright pale deep neon")  # part of the colour that follows
NAMED_SHADES = _set("blood sky navy lime royal hot baby rose cherry olive forest wine ice snow coal jet lemon mint")
COMPOUNDS = {  # what makes one name with a word that otherwise says how a thing is
    "orange": _set("juice slice slices peel tree trees soda segments"),
    "red": _set("wine panda cardinal cross carpet onion onions"),
    "black": _set("bear hole belt pepper bean beans"),
    "brown": _set("bear rice sugar"),
    "green": _set("tea bean beans onion onions pepper peppers"),
    "blue": _set("jay whale cheese"),
    "white": _set("wine bread rice"),
    "gold": _set("medal coin coins"),
    "golden": _set("retriever gate age"),
    "silver": _set("medal"),
    "gray": _set("whale wolf"),
    "grey": _set("whale wolf"),
    "cotton": _set("candy swab"),
    "paper": _set("clip towel towels"),
    "big": _set("top wheel"),
}
SIZES = _set("small little tiny big large huge giant tall")
ATTRIBUTES = COLORS | SIZES | _set(
    "wooden metal plastic glass stone brick leather velvet ceramic porcelain marble concrete steel iron bronze copper "
    "rubber paper cardboard silk cotton round square striped"
)  # fmt: skip
SYNONYMS = {
    "golden": "gold",
    "crimson": "red",
    "scarlet": "red",
    "huge": "big",
    "giant": "big",
    "six-sided": "hexagonal",
} | {
    word: name
    for words in (grammar.SHAPE_WORDS, grammar.COLOR_WORDS, grammar.SIZE_WORDS)
    for name, options in words.items()
    for word in options
}
# "a pile of dice" is a pile; before any other word, "of" may tell what a thing is a part of.
MEASURES = _set(
    "pile stack bunch group pair couple bowl plate glass cup mug bottle jar bag box basket bucket tray piece slice "
    "wedge loaf bouquet can tub pot set"
)
CONTAINERS = _set(
    "jar box bowl cup mug pot bag basket vase suitcase bucket cage bottle glass crate chest drawer barrel tub can "
    "backpack nest aquarium tank tray"
)
# Places and masses: "the ground on a dog" is no scene.
PLACES = _set(
    "ground floor grass snow water sand mud ice sky air sea ocean river stream lake pond field forest woods jungle "
    "desert garden yard room kitchen bathroom store park street road pavement sidewalk runway track beach background "
    "side top bottom middle back front edge corner center centre way sun sunlight dark night surface area wall walls "
    "ceiling fence moon earth planet world horizon city town village farm island mountain hill valley coast shore "
    "dock pier lot stage court stadium"
)
SCREENS = _set(
    "phone cellphone screen tv television computer laptop internet leash page trip walk"
)  # one is on them otherwise

# Words that only look like verbs or plurals, and plurals that do not look like any.
NAMES_IN_ING = _set(
    "building painting ring king wing string spring swing sling pudding earring dumpling duckling wedding cutting "
    "rolling swimming bowling dining parking baking washing sewing measuring fishing"
)
NAMES_IN_ED = _set("bed shed sled seed weed moped steed reed")
NAMES_IN_LY = _set("fly butterfly dragonfly firefly jelly lily family")
NAMES_IN_S = _set("lens canvas gas atlas christmas sports")
PLURALS = _set("people men women children mice geese feet teeth dice")
BOTH_NUMBERS = _set("sheep fish deer")
# What does not stand inside a plain noun phrase.
NO_NAMES = _set(
    "a an the this that these those his her its their our my your it he she they who which what where while when as "
    "and or but with without of in on at by to from for into onto over under off out up down through across along "
    "against about around between behind beside near next inside outside above below after before during than then "
    "there here not no do don't is are was were be been being has have had can could will would should may might must "
    "does did am all both each every any another other one two three four five six some several many few left put set "
    "sat stood lay laid hung held ate rode wore ran flew swam fell kept seen shown worn driven drawn grown thrown "
    "flown eaten taken given written made built stuck bent caught found got gone lit full open closed upright upside "
    "together alone away asleep very only just so too itself himself herself themselves sit stand lie rest eat hold "
    "wear ride carry bought sold drew drank drink threw broke saw took gave wrote hit cut bit fed led met read slept "
    "spoke stole swung told won sang shook fought blew brought dug hid knelt leapt lost sent slid swept woke wound "
    "torn broken shaped like"
)

# --- noun phrases ----------------------------------------------------------------------------------------------------

_DETERMINERS = "|".join(("the", "a few", *sorted(SINGULAR | PLURAL, key=len, reverse=True)))
_PHRASE = re.compile(rf"(?P<determiner>{_DETERMINERS}) (?P<words>\S+(?: \S+){{0,4}}?)(?: of (?P<of>\S.*))?", re.I)
_WORD = re.compile(r"[A-Za-z0-9]+(?:[-'’][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase, such as "a", ("large", "basket"), "of rainbow macarons"."""

    determiner: str
    words: tuple[str, ...]
    of: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.determiner, *self.words, self.of)))

    @property
    def head(self) -> str:
        return self.words[-1].lower()

    @property
    def is_place(self) -> bool:
        return self.head in PLACES or self.head.removesuffix("s") in PLACES

    @property
    def is_plural(self) -> bool:
        determiner = self.determiner.lower()
        return determiner not in SINGULAR and (determiner != "the" or _looks_plural(self.head))

    @property
    def n_attributes(self) -> int:
        """How many words in front say how it is: all up to the last that is known to. 0 where it is not clear."""
        count = 0
        for place, (word, following) in enumerate(itertools.pairwise(self.words)):
            if word in ATTRIBUTES and following not in COMPOUNDS.get(word, ()):
                if following.endswith("ed") and "-" not in following:
                    return 0  # "a brown haired dog"
                count = place + 1
        return count

    @property
    def attributes(self) -> list[str]:
        return _plain(self.words[: self.n_attributes])

    @property
    def name(self) -> list[str]:
        return _plain((*self.words[self.n_attributes :], self.of))

    def named_as(self, other: _Phrase) -> _Phrase:
        words = self.words[: self.n_attributes] + other.words[other.n_attributes :]
        return _Phrase(self.determiner, words, other.of)


def _parse_phrase(text: str) -> _Phrase | None:
    """A plain noun phrase, or None where a word of it may be something else."""
    found = _PHRASE.fullmatch(text)
    if not found:
        return None
    phrase = _Phrase(found["determiner"], tuple(found["words"].split()), f"of {found['of']}" if found["of"] else "")
    determiner, *before, head = (word.lower() for word in (phrase.determiner, *phrase.words))
    if not all(map(_may_be_name, phrase.words)) or head in (COLORS | SIZES) - {"orange"}:
        return None
    if any(map(_looks_plural, before)):
        return None  # "a girl eats pizza"
    if determiner != "the" and head not in BOTH_NUMBERS and _looks_plural(head) is (determiner in SINGULAR):
        return None  # "a cat sleeps", "two cats sleep"
    if determiner == "the" and _may_be_verb(head, before):
        return None  # "the cat sleeps"
    if any(word.endswith("ed") and not ATTRIBUTES.issuperset(before[:i]) for i, word in enumerate(before)):
        return None  # "a boy dressed warm"
    if head.endswith(("ed", "ly")) and head not in NAMES_IN_ED | NAMES_IN_LY:
        return None
    if found["of"]:
        *before, last = found["of"].lower().split()
        before = before[1:] if before and before[0] in ("a", "an", "the") else before
        if head not in MEASURES or len(before) > 2 or not all(map(_may_be_name, (*before, last))):
            return None
        if any(map(_looks_plural, before)) or _may_be_verb(last, before) or last.endswith("ed"):
            return None
    return phrase


def _may_be_name(word: str) -> bool:
    word = word.lower()
    if not _WORD.fullmatch(word) or word in NO_NAMES:
        return False
    return not word.endswith("ing") or word in NAMES_IN_ING


def _may_be_verb(word: str, before: list[str]) -> bool:
    """Whether a word in -s may say what those before it do: "cat sleeps", but not "small cats"."""
    return _looks_plural(word) and not ATTRIBUTES.issuperset(before)


def _looks_plural(word: str) -> bool:
    if word in PLURALS:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "'s", "’s")) and word not in NAMES_IN_S


# --- scenes ----------------------------------------------------------------------------------------------------------

_LEAD = re.compile(
    r"(?:(?:an?|the) (?:(?:wide angle|zoomed out|close-?up|dslr|3d|detailed|realistic|high quality) )*"
    r"(?:photo|photograph|picture|image|render|rendering|model|drawing|sketch) of |(?P<there>there (?:is|are) ))",
    re.I,
)
_STYLE = (
    r"(?:[,.] (?:low poly(?: 3d model)?|highly detailed|high detail(?: 3d model)?|high resolution|high quality|"
    r"studio lighting|white background|aerial view))*[.!]?"
)
_WITH_STYLE = re.compile(rf"(?P<body>.*?)(?P<style>{_STYLE})", re.I)
_RELATIONS = "|".join(sorted((*OPPOSITES, *SYMMETRIC, *ACTIONS), key=len, reverse=True))
_SPLIT = re.compile(rf" ({_RELATIONS}) (?=(?:{_DETERMINERS}) )", re.I)
_SUBJECT = re.compile(
    rf"(?P<phrase>.+?)(?: (?P<verb>{'|'.join(VERBS)}))?(?: (?P<posture>{'|'.join(POSTURES + OWN_POSTURES)}))?"
)


@dataclass(frozen=True)
class _Scene:
    """A caption that is two things in a relation, cut in its parts; `lead` and `tail` stand before and after."""

    lead: str
    first: _Phrase
    verb: str
    posture: str
    relation: str
    second: _Phrase
    tail: str
    agrees: bool  # whether the two things may change places before the verb

    def say(self, first: _Phrase, relation: str, second: _Phrase) -> str:
        body = " ".join(filter(None, (str(first), self.verb, self.posture, relation, str(second))))
        return f"{self.lead}{body}{self.tail}"


def _parse_scene(caption: str) -> _Scene | None:
    """The scene of a caption all of whose words are understood, or None."""
    styled = _WITH_STYLE.fullmatch(caption)
    assert styled
    lead = _LEAD.match(styled["body"])
    start = lead.end() if lead else 0
    pieces = _SPLIT.split(styled["body"][start:])
    if len(pieces) not in (3, 5):
        return None
    relation, tail = pieces[1].lower(), styled["style"]
    subject = _SUBJECT.fullmatch(pieces[0])
    assert subject
    first, second = _parse_phrase(subject["phrase"]), _parse_phrase(pieces[2])
    verb, posture = subject["verb"] or "", subject["posture"] or ""
    if first is None or second is None or (relation in ACTIONS and (posture or verb not in ("", "is", "are"))):
        return None
    if len(pieces) == 5:
        # "a bear holding a cup and a spoon": what comes third must not belong to the second alone.
        if pieces[3].lower() in ("and", *ACTIONS) or _parse_phrase(pieces[4]) is None:
            return None
        tail = f" {pieces[3]} {pieces[4]}{tail}"
    needs_agreement = verb or (lead and lead["there"])
    agrees = not needs_agreement or first.is_plural is second.is_plural
    return _Scene(lead[0] if lead else "", first, verb, posture, relation, second, tail, agrees)


# --- swaps -----------------------------------------------------------------------------------------------------------


def swaps(caption: str) -> list[tuple[str, str]]:
    """Captions that are wrong in one way each, as (kind, caption); none where the caption is not clear.

    parts: two things around a relation that is not symmetric have changed places ("a car on top of a dog").
    colors: two things have each other's colour. shapes: two things with adjectives are each what the other is.
    relation: the relation is the opposite one ("a dog under a car"), which may mean the same as "parts".

    Canonical captions of the procedural set are read by its grammar. In others articles follow; capitals, stops stay.
    """
    try:
        spec = grammar.parse(caption)
    except UserError:
        return free_swaps(caption)
    # Its swaps are in canonical words: of other words only the free rules keep the wording.
    if caption != grammar.canonical_caption(spec):
        return free_swaps(caption)
    return [(swap["kind"], swap["caption"]) for swap in grammar.swaps(spec)]


def free_swaps(caption: str) -> list[tuple[str, str]]:
    """`swaps` by the rules for any English alone."""
    if caption.isupper():
        return [(kind, other.upper()) for kind, other in free_swaps(caption.lower())]
    caption = " ".join(caption.split())
    if '"' in caption:
        return []
    scene = _parse_scene(caption)
    found = {
        "parts": scene and _exchange_parts(scene),
        "colors": _exchange_colors(caption, scene),
        "shapes": scene and _exchange_names(scene),
        "relation": scene and _invert(scene),
    }
    return [(kind, other) for kind, other in found.items() if other and other.lower() != caption.lower()]


def _is_asymmetric(scene: _Scene | None) -> bool:
    return scene is not None and (scene.relation in OPPOSITES or scene.relation in ACTIONS)


def _may_turn(scene: _Scene) -> bool:
    """Whether the two things are such that either could be where the other is."""
    if scene.first.is_place or scene.second.is_place or scene.second.head in SCREENS:
        return False
    if scene.relation == "in" and scene.second.head not in CONTAINERS:
        return False  # in a hat, in a suit, in a mood
    first, second = scene.first, scene.second
    return _is_asymmetric(scene) and (first.attributes, first.name) != (second.attributes, second.name)


def _exchange_parts(scene: _Scene) -> str | None:
    if not _may_turn(scene) or not scene.agrees or scene.posture in OWN_POSTURES:
        return None
    first = replace(scene.second, determiner=_cased(scene.second.determiner, scene.first.determiner))
    second = replace(scene.first, determiner=_cased(scene.first.determiner, scene.second.determiner))
    return scene.say(first, scene.relation, second)


def _invert(scene: _Scene) -> str | None:
    if not _may_turn(scene) or scene.relation not in OPPOSITES:
        return None
    return scene.say(scene.first, OPPOSITES[scene.relation], scene.second)


def _exchange_names(scene: _Scene) -> str | None:
    first, second = scene.first, scene.second
    if not (first.attributes and second.attributes) or first.name == second.name:
        return None
    if first.is_place or second.is_place or first.is_plural is not second.is_plural or scene.posture in OWN_POSTURES:
        return None
    if first.attributes == second.attributes and not _is_asymmetric(scene):
        return None
    return scene.say(first.named_as(second), scene.relation, second.named_as(first))


def _exchange_colors(caption: str, scene: _Scene | None) -> str | None:
    """The caption with its two colours exchanged, where each plainly belongs to a thing of its own."""
    tokens = caption.split()
    places = _color_places(tokens)
    if places is None or len(places) != 2:
        return None
    (start_a, end_a), (start_b, end_b) = places
    color_a, color_b = tokens[start_a:end_a], tokens[start_b:end_b]
    if _plain(color_a) == _plain(color_b):
        return None
    name_a, name_b = _name_after(tokens, end_a), _name_after(tokens, end_b)
    if end_a + len(name_a) >= start_b:
        return None  # one thing of two colours
    if set(_plain(name_a)) & set(_plain(name_b)) and not _is_asymmetric(scene):
        return None  # "a red ball and a blue ball"
    changed = list(tokens)
    changed[start_b:end_b] = [_cased(color_a[0], color_b[0]), *color_a[1:]]
    changed[start_a:end_a] = [_cased(color_b[0], color_a[0]), *color_b[1:]]
    for start in (start_b + len(color_b) - len(color_a), start_a):
        if start > 0 and changed[start - 1].lower() in ("a", "an"):
            changed[start - 1] = _cased(_article(changed[start]), changed[start - 1])
    return " ".join(changed)


def _color_places(tokens: list[str]) -> list[tuple[int, int]] | None:
    """(start, end) of every colour that tells how a thing is; None where one may be something else."""
    places = []
    for place, token in enumerate(tokens):
        word = token.lower().rstrip(",.;:!?")
        if word not in COLORS:
            continue
        following = tokens[place + 1].lower().rstrip(",.;:!?") if place + 1 < len(tokens) else ""
        before = tokens[place - 1].lower() if place else ""
        if following in COMPOUNDS.get(word, ()):
            continue
        ends = word != token.lower() or not _may_be_name(following)  # as a fruit does, or "a cup that is red"
        if ends or before in NAMED_SHADES or following in COLORS or (place and token[0].isupper()):
            return None
        places.append((place - (before in SHADES), place + 1))
    return places


def _name_after(tokens: list[str], place: int) -> list[str]:
    """The words of the noun phrase that go on at `place`, in lower case."""
    name = []
    for token in tokens[place:]:
        word = token.lower().rstrip(",.;:!?")
        if not _may_be_name(word):
            break
        name.append(word)
        if word != token.lower():
            break
    return name


def _plain(words: Iterable[str]) -> list[str]:
    """In lower case, and one word for all that mean the same."""
    return [SYNONYMS.get(word.lower(), word.lower()) for word in words]


def _cased(word: str, like: str) -> str:
    """`word` with a capital if `like` has one."""
    return word[0].upper() + word[1:] if like[0].isupper() else word[0].lower() + word[1:]


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeio" else "a"  # of colours and shades none begins with u
