"""The objects of an R-precision run, as per_prompt.csv and thumbnails.npz have them, and their cards as HTML.

A page has a card for each object, worst first; `benchmark.js` sorts and filters them and opens the detail.
"""

from __future__ import annotations

import base64
import csv
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..benchmark.schema import PER_PROMPT
from .parts import section
from .views import Choice, View

__all__ = ["Object", "Pictures", "Verdict", "objects", "page_data", "read_objects", "read_pictures"]

MOST_SHOWN = 24  # at either end of the sorted list
HIT = 0.5  # an object whose caption is nearest in a smaller share of its views is a miss
AGAIN = "make it again with shapeloom eval r-precision"
Key = tuple[str, str, int]  # row, id of the prompt, seed


@dataclass(frozen=True)
class Verdict:
    """What one evaluator says of an object in one gallery. hit: R@1 over its views; None: of an object that failed."""

    hit: float
    rank: float | None
    cosine: float | None
    margin: float | None
    nearest: str


@dataclass
class Object:
    """What was made for a prompt with a seed. failure: its kind, "" for none."""

    id: str
    seed: int
    text: str
    groups: list[str]
    failure: str
    verdicts: dict[View, Verdict] = field(default_factory=dict)


class Pictures:
    """The small pictures of a page. It holds each once, in a `sprite`, and shows it anywhere by reference."""

    def __init__(self, webp: Mapping[Key, bytes]) -> None:
        self._webp = dict(webp)
        self._names = {key: f"p{place}" for place, key in enumerate(self._webp)}
        rows = {"true renders": 0, "generated": 1}
        rising = sorted(self._webp, key=lambda key: (rows.get(key[0], 0), -key[2]))
        self._of_prompt = {uid: (row, uid, seed) for row, uid, seed in rising}

    def name(self, key: Key) -> str:
        """The id of the picture's element, "" where there is no such picture."""
        return self._names.get(key, "")

    def show(self, key: Key, label: str) -> str:
        """The picture as HTML, nothing where there is none."""
        if key not in self._names:
            return ""
        return (
            f'<svg class="picture" viewBox="0 0 1 1" role="img" aria-label="{escape(label)}">'
            f'<use href="#{self._names[key]}"/></svg>'
        )

    def of_prompt(self, uid: str) -> str:
        """What was generated first for a prompt, or else its true render."""
        key = self._of_prompt.get(uid)
        return self.show(key, key[0]) if key else ""

    def sprite(self) -> str:
        images = "".join(
            f'<image id="{self._names[key]}" width="1" height="1" '
            f'href="data:image/webp;base64,{base64.b64encode(data).decode()}"/>'
            for key, data in self._webp.items()
        )
        return f'<svg class="sprite" aria-hidden="true"><defs>{images}</defs></svg>' if images else ""


def read_objects(path: Path) -> list[Object]:
    """The objects of a per_prompt.csv, in its order.

    Raises: UserError if it is missing, of other columns, or holds what is no number where one belongs.
    """
    found: dict[tuple[str, int], Object] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != PER_PROMPT:
                raise UserError(f"{path} has other columns than {', '.join(PER_PROMPT)}: {AGAIN}")
            for line in reader:
                uid, seed = line["id"], int(line["seed"])
                if (uid, seed) not in found:
                    groups = [group for group in line["groups"].split("|") if group]
                    found[uid, seed] = Object(uid, seed, line["text"], groups, line["failure"])
                rank, cosine, margin = (_number(line[name]) for name in ("rank", "cosine", "margin"))
                verdict = Verdict(_number(line["r@1"]) or 0.0, rank, cosine, margin, line["nearest"])
                found[uid, seed].verdicts[View(line["evaluator"], line["shading"], line["gallery"])] = verdict
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {AGAIN}") from None
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is damaged near line {reader.line_num} ({error}): {AGAIN}") from None
    return list(found.values())


def _number(text: str) -> float | None:
    """None for an empty cell. Raises ValueError for what is no finite number."""
    if text == "":
        return None
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def read_pictures(path: Path) -> Pictures:
    """The pictures of a thumbnails.npz; none where there is no such file.

    Raises: UserError if it is damaged, or a picture in it is not WebP.
    """
    webp: dict[Key, bytes] = {}
    if not path.exists():
        return Pictures(webp)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                row, _, rest = name.partition("/")
                uid, _, seed = rest.rpartition("/")
                data = arrays[name].tobytes()
                if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
                    raise ValueError(f"{name} is not a WebP picture")
                webp[row, uid, int(seed)] = data
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    return Pictures(webp)


def page_data(objects: Sequence[Object], pictures: Pictures) -> dict[str, Any]:
    """What the page's script reads.

    "views": [evaluator, shading, gallery] each; "captions"; "objects": with a place in "captions" for `text`, and in
    `verdicts` for each view [hit, rank, cosine, margin, place in "captions"], or null where it was not scored.
    """
    views = list(dict.fromkeys(view for one in objects for view in one.verdicts))
    captions: dict[str, int] = {}

    def place(caption: str) -> int:
        return captions.setdefault(caption, len(captions))

    def numbers(verdict: Verdict | None) -> list[float | None] | None:
        if verdict is None:
            return None
        return [verdict.hit, verdict.rank, verdict.cosine, verdict.margin, place(verdict.nearest)]

    listed = [
        {
            "id": one.id,
            "seed": one.seed,
            "text": place(one.text),
            "groups": one.groups,
            "failure": one.failure,
            "pictures": {
                row: name
                for row, seed in (("generated", one.seed), ("true renders", 0))
                if (name := pictures.name((row, one.id, seed)))
            },
            "verdicts": [numbers(one.verdicts.get(view)) for view in views],
        }
        for one in objects
    ]
    return {"most": MOST_SHOWN, "hit": HIT, "views": views, "captions": list(captions), "objects": listed}


FILTER = """<form id="filter" hidden>
<fieldset class="segments"><legend>Order</legend>
<label><input type="radio" name="order" value="worst" checked><span>Worst first</span></label>
<label><input type="radio" name="order" value="best"><span>Best first</span></label></fieldset>
<fieldset class="segments"><legend>Show</legend>
<label><input type="radio" name="show" value="all" checked><span>All</span></label>
<label><input type="radio" name="show" value="misses"><span>Misses only</span></label>
<label><input type="radio" name="show" value="failures"><span>Failures only</span></label></fieldset>
<label class="find">Find <input type="search" name="find" placeholder="words of a caption, or an id"></label>
</form>
<p id="count" class="about" role="status"></p>"""
DETAIL = """<dialog id="detail" aria-labelledby="detail-title"><div class="inside">
<header><h3 id="detail-title"></h3><button type="button" id="close" aria-label="Close">✕</button></header>
<div id="detail-body"></div>
<footer><button type="button" id="previous">← Previous</button><button type="button" id="next">Next →</button></footer>
</div></dialog>"""


def objects(every: Sequence[Object], first: Choice, pictures: Pictures) -> str:
    """Cards of all objects, by margin in the first view, worst first; those in the middle are hidden."""
    if not every:
        return ""
    view = View(first["evaluator"], first["shading"], first["gallery"])

    def margin(place: int) -> float:
        verdict = every[place].verdicts.get(view)
        return verdict.margin if verdict and verdict.margin is not None else -math.inf

    rising = sorted(range(len(every)), key=margin)
    middle = range(MOST_SHOWN, len(rising) - MOST_SHOWN)
    cards = [_card(every[at], at, view, pictures, hidden=place in middle) for place, at in enumerate(rising)]
    if len(middle):
        more = f'<li id="more"><span>{len(middle)} more</span><button type="button" hidden>Show more</button></li>'
        cards.insert(MOST_SHOWN, more)
    about = (
        "Generated, beside the true render where there is one, by margin of the own caption over the best wrong one. A "
        "miss: the own caption is nearest in less than half of the views."
    )
    listed = f'<ol id="cards" class="cards">{"".join(cards)}</ol>'
    return section("Objects", about, FILTER, listed, DETAIL, anchor="objects")


def _card(one: Object, at: int, view: View, pictures: Pictures, *, hidden: bool) -> str:
    generated = pictures.show(("generated", one.id, one.seed), "generated")
    truth = pictures.show(("true renders", one.id, 0), "true render")
    pair = f'<span class="pair">{generated or "<i>no picture</i>"}{truth}</span>' if generated or truth else ""
    verdict = one.verdicts.get(view)
    style, told, margin = "miss", "not scored", ""
    if one.failure:
        style, told = "failed", f"failed: {one.failure}"
    elif verdict and verdict.rank is not None and verdict.margin is not None:
        style = "right" if verdict.hit >= HIT else "miss"
        told, margin = f"rank {verdict.rank:.3g}", f"{verdict.margin:+.3f}".replace("-", "−")
    return (
        f'<li data-object="{at}"{" hidden" if hidden else ""}><button type="button" aria-haspopup="dialog">{pair}'
        f'<span class="caption">{escape(one.text)}</span><span class="verdict"><b class="{style}">{escape(told)}</b>'
        f"<span>{margin}</span></span></button></li>"
    )
