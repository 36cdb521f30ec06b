"""The choices an R-precision run's page offers, and blocks of HTML of which the page shows the one that is chosen.

Every number of a run stands under an evaluator, a shading, a gallery and often a group of prompts. The page holds a
block for each combination; `benchmark.js` unhides the one the selectors stand on.

Whatever comes from results.json is text of others, so `escape` stands wherever it enters the HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple, Protocol

from ..benchmark.schema import Interval, Results

__all__ = ["ROWS", "Choice", "View", "mark", "ordered", "percent", "selectors", "text", "views", "where"]

Choice = Mapping[str, str]  # what the selectors "evaluator", "shading", "gallery" and "group" stand on

ROWS = {
    "generated": "the objects under test",
    "true renders": "the prompts' own objects in the same renderer: the evaluator's ceiling",
    "reconstructions": "those objects through the autoencoder: the generator's ceiling",
    "conditioning images": "the pictures the objects were made from: the ceiling of a lift to 3D",
    "shuffled prompts": "generated objects against each other's captions: must be near chance",
    "blank object": "an empty picture for every prompt: must be near chance",
    "grey sphere": "a plain sphere for every prompt: must be near chance",
    "chance": "blind guessing",
}
INDEPENDENCE = {
    "same weights": "shares weights with the conditioner",
    "same pre-training": "shares pre-training with the conditioner",
    "same architecture": "same architecture as the conditioner",
    "unknown": "independence unknown",
}


class _Scored(Protocol):
    @property
    def evaluator(self) -> str: ...
    @property
    def shading(self) -> str: ...
    @property
    def gallery(self) -> str: ...


class View(NamedTuple):
    """What a score of retrieval stands under."""

    evaluator: str
    shading: str
    gallery: str

    @classmethod
    def of(cls, record: _Scored) -> View:
        return cls(record.evaluator, record.shading, record.gallery)


def selectors(results: Results) -> dict[str, list[str]]:
    """What each selector offers; the headline's choice comes first, and is what the page shows at first."""
    headline = results.headline
    names: dict[str, Iterable[str]] = {
        "evaluator": [record.name for record in results.evaluators],
        "shading": [score.shading for score in results.scores],
        "gallery": [record.name for record in results.galleries],
        "group": [score.group for score in results.scores],
    }
    first = {"evaluator": headline.evaluator, "shading": headline.shading, "gallery": headline.gallery, "group": "all"}
    return {key: ordered(dict.fromkeys(names[key]), [first[key] or ""]) for key in names}


def views(first: Choice, blocks: Iterable[tuple[Choice, str]]) -> str:
    """Blocks of which at most one is shown, and a line for a choice that none stands for; nothing without blocks.

    Args:
        first: what is shown until the selectors say otherwise.
        blocks: what each stands for (of some or all selectors), and its HTML.
    """
    parts, found = [], False
    for stands_for, content in blocks:
        chosen = all(first[key] == value for key, value in stands_for.items())
        attributes = " ".join(f'data-{key}="{escape(value)}"' for key, value in stands_for.items())
        parts.append(f'<div class="view" {attributes}{"" if chosen else " hidden"}>{content}</div>')
        found |= chosen
    absent = f'<p class="absent"{" hidden" if found else ""}>Not measured for this choice.</p>'
    return f'<div class="views">{"".join(parts)}{absent}</div>' if parts else ""


def mark(results: Results, evaluator: str) -> str:
    """A pill beside an evaluator that is not known to be independent of the conditioner."""
    for record in results.evaluators:
        if record.name == evaluator and record.independence != "independent":
            style = "warn" if record.independence in ("same weights", "same pre-training") else "none"
            return f' <span class="pill {style}">{INDEPENDENCE[record.independence]}</span>'
    return ""


def where(results: Results, evaluator: str, shading: str, gallery: str = "", group: str = "") -> str:
    """What a table's numbers stand under, the evaluator's mark included."""
    sizes = {record.name: record.size for record in results.galleries}
    named = [f"{escape(evaluator)}{mark(results, evaluator)}", escape(shading)]
    if gallery:
        named.append(f"gallery {escape(gallery)} ({sizes.get(gallery, '?')})")
    if group:
        named.append("all prompts" if group == "all" else f"group {escape(group)}")
    return f'<span class="where">{" · ".join(named)}</span>'


def percent(interval: Interval | None) -> str:
    """A score in percent with its interval."""
    if interval is None:
        return "–"
    mean, lo, hi = 100 * interval.mean, 100 * interval.lo, 100 * interval.hi
    return f"{mean:.{1 + (0 < mean < 1)}f}" if lo == hi else f"{mean:.1f} <small>{lo:.1f}–{hi:.1f}</small>"


def text(words: str) -> str:
    """Words in a table, to the left and free to wrap."""
    return f'<span class="words">{escape(words)}</span>'


def ordered(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """The names as `order` has them, those it lacks last, as they came."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: places.get(name, len(places)))
