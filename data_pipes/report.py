"""One HTML page about a folder of raw shards: `shapeloom data report`.

The json members are read once (survey.py), pictures only for what the page shows. The page loads nothing, needs no
JavaScript, and every word that comes from the data is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import write_atomic
from .raw_sample import decode_webp
from .render import composite
from .shards import ShardFolder
from .survey import NONE_GIVEN, Rejections, Survey, read_rejections, strings, survey, text_key, words_key

__all__ = ["write_report"]

THUMBNAIL = 144  # pixels; shown at up to this size, so sharp on a dense phone screen too, where it is shown smaller
LISTED = 12  # rows of a table of names; the rest is summed up
WORDS = 40
MOST_KINDS = 40  # kinds of warnings and rejections told apart on the page
# What is known of a mesh: how it is called, and whether it is a count (shares are the others).
MESH_PLOTS = {
    "vertices": ("Vertices", True),
    "faces": ("Faces", True),
    "materials": ("Materials", True),
    "textures": ("Textures", True),
    "texture_side": ("Largest texture, pixels", True),
    "components": ("Unconnected parts", True),
    "open_edge_share": ("Open edges", False),
    "flipped_share": ("Faces wound the wrong way", False),
    "hidden_share": ("Surface hidden inside", False),
    "sheet_share": ("Surface of thin sheets", False),
}


# --------------------------------------------------------------------------------------------------------- the page


def write_report(raw: str | Path, out: str | Path | None = None, *, count: int = 48) -> str:
    """Write the page about a folder of raw shards, and say in a few lines what is on it.

    Args:
        out: the HTML file; report.html in `raw` by default.
        count: assets on the contact sheet, evenly spread over the set.
    Raises: UserError if `raw` is no finished folder of raw shards, or where it is damaged.
    """
    shards = ShardFolder(raw)
    out = Path(out) if out is not None else Path(raw) / "report.html"
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of the page, such as {out / 'report.html'}")
    found, rejections = survey(shards), read_rejections(Path(raw))
    write_atomic(out, _page(shards, found, rejections, count))
    rejected = sum(kind.count for kind in rejections.values())
    return (
        f"{out}: {len(shards)} assets, {rejected} rejected files, {found.with_warnings} assets with warnings, "
        f"{len(found.duplicates())} captions that stand more than once"
    )


def _page(shards: ShardFolder, found: Survey, rejections: Mapping[str, Rejections], count: int) -> str:
    title = _text(shards.folder.resolve().name or "raw shards")
    css = Path(__file__).with_suffix(".css").read_text("utf-8")
    sections = [
        _contact_sheet(shards, count),
        _rejected(rejections),
        _warned(shards, found),
        _captions(shards, found),
        _sizes(found),
        _provenance(found),
        _settings(shards),
    ]
    anchors = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in anchors)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: data report</title><style>{css}</style></head>\n<body><main>"
        f'<header><p class="kind">Data report</p><h1>{title}</h1>{_overview(shards, found, rejections)}'
        f"<nav>{links}</nav></header>\n{''.join(sections)}</main></body></html>\n"
    )


def _overview(shards: ShardFolder, found: Survey, rejections: Mapping[str, Rejections]) -> str:
    n, rejected = len(shards), sum(kind.count for kind in rejections.values())
    n_bytes = sum(shard["bytes"] for shard in shards.manifest["shards"])
    tiles = [
        (f"{n:,}", "assets"),
        (f"{rejected:,}", "files rejected"),
        (f"{found.with_warnings:,}", "assets with warnings"),
        (f"{found.captions:,}", "captions"),
        (f"{len(shards.manifest['shards']):,}", "shards"),
        (_bytes(n_bytes), f"{_bytes(n_bytes / max(n, 1))} an asset"),
    ]
    cells = "".join(f'<div class="tile"><b>{number}</b><span>{name}</span></div>' for number, name in tiles)
    return f'<div class="tiles">{cells}</div>{_split_bar(found.splits)}'


def _split_bar(splits: Counter[str]) -> str:
    total = max(1, splits.total())
    names = sorted(splits, key=lambda name: -splits[name])
    parts = "".join(
        f'<i class="c{k % 6}" style="flex:{splits[name]}" title="{_text(name)} {splits[name]:,}"></i>'
        for k, name in enumerate(names)
    )
    legend = "".join(
        f'<li><i class="c{k % 6}"></i>{_text(name)} <b>{splits[name]:,}</b> '
        f"<small>{splits[name] / total:.1%}</small></li>"
        for k, name in enumerate(names)
    )
    return f'<div class="splits"><div class="bar">{parts}</div><ul>{legend}</ul></div>'


def _contact_sheet(shards: ShardFolder, count: int) -> str:
    picks = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)).tolist()
    if not picks:
        return ""
    about = f"{len(picks)} of {len(shards):,} assets, evenly spread over the set."
    figures = []
    for index in picks:
        meta, uid = shards.read_json(index), shards.uid(index)
        captions = strings(meta.get("captions"))
        more = f" · {len(captions)} captions" if len(captions) > 1 else ""
        figures.append(
            f'<figure title="{_text(" / ".join([uid, *captions]), 600)}">{_thumbnail(shards, index)}<figcaption>'
            f"<bdi>{_text(captions[0] if captions else 'no caption', 120)}</bdi>"
            f'<small>{_text(shards.splits(index))}{more}</small><small class="uid">{_text(uid)}</small>'
            "</figcaption></figure>"
        )
    return _section("assets", "Assets", about, f'<div class="sheet">{"".join(figures)}</div>')


def _thumbnail(shards: ShardFolder, index: int) -> str:
    """The first view on white as an <img> that holds its bytes; a box that says so where no view is stored."""
    members = shards.suffixes(index)
    name = next((name for name in ("lit_00.webp", "view_00.webp") if name in members), None)
    if name is None:
        return '<div class="blank">no view is stored</div>'
    image = Image.fromarray(composite(decode_webp(shards.read(index, [name])[name], f"{shards.uid(index)}.{name}")))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/webp;base64,{data}">'


def _rejected(rejections: Mapping[str, Rejections]) -> str:
    total = sum(kind.count for kind in rejections.values())
    if not total:
        return _section("rejected", "Rejected files", "", '<p class="fine">No file was rejected.</p>')
    cards = []
    for form, kind in list(rejections.items())[:MOST_KINDS]:
        reasons = [entry["reason"] for entry in kind.first]
        files = "".join(
            f"<li><code>{_text(entry['file'], 160)}</code>{_told_apart(entry['reason'], reasons)}</li>"
            for entry in kind.first
        )
        more = f"<li>and {kind.count - len(kind.first):,} more</li>" if kind.count > len(kind.first) else ""
        hint = f'<p class="hint">{_text(kind.first[0]["hint"])}</p>' if kind.first[0]["hint"] else ""
        cards.append(_finding(kind.count, "file", _of_all(form, reasons), f"{hint}<ul>{files}{more}</ul>"))
    about = f"{total:,} files could not be used; rejected.jsonl lists them all."
    return _section(
        "rejected", "Rejected files", about, f'<div class="pairs">{"".join(cards)}</div>', _left_out(len(rejections))
    )


def _warned(shards: ShardFolder, found: Survey) -> str:
    if not found.warnings:
        return _section("warnings", "Warnings", "", '<p class="fine">No asset has a warning.</p>')
    cards = []
    for kind, n in found.warnings.most_common(MOST_KINDS):
        figures = "".join(
            f'<figure title="{_text(shards.uid(index))}: {_text(sentence)}">{_thumbnail(shards, index)}<figcaption>'
            f'<small class="uid">{_text(shards.uid(index))}</small></figcaption></figure>'
            for index, sentence in found.warned[kind]
        )
        cards.append(
            _finding(
                n,
                "asset",
                _of_all(kind, [sentence for _, sentence in found.warned[kind]]),
                f'<div class="sheet few">{figures}</div>',
            )
        )
    share = found.with_warnings / max(1, len(shards))
    about = f"{found.with_warnings:,} of {len(shards):,} assets ({share:.1%}) have a warning; each kind with examples."
    return _section(
        "warnings", "Warnings", about, f'<div class="pairs">{"".join(cards)}</div>', _left_out(len(found.warnings))
    )


def _captions(shards: ShardFolder, found: Survey) -> str:
    repeated, near = found.duplicates(), found.near_duplicates()
    facts = [
        _fact(f"{found.captions / max(1, len(shards)):.2f}", "captions an asset"),
        _fact(f"{_mean(found.words_per_caption):.1f}", "words a caption"),
        _fact(f"{found.from_names:,}", "assets captioned by file name"),
        _fact(f"{sum(n - 1 for n, _ in repeated):,}", "captions that repeat another"),
        _fact(f"{len(near):,}", "sets of near duplicates"),
    ]
    plots = [
        _bars("Captions an asset", found.captions_per_asset, "assets"),
        _bars("Words a caption", found.words_per_caption, "captions"),
    ]
    most = max(found.words.values(), default=1)
    words = "".join(
        f'<li style="--s:{0.8 + 0.9 * (n / most) ** 0.5:.2f}" title="{n:,} times"><bdi>{_text(word, 40)}</bdi></li>'
        for word, n in found.words.most_common(WORDS)
    )
    parts = [f'<div class="tiles small">{"".join(facts)}</div>', f'<div class="plots">{"".join(plots)}</div>']
    if words:
        parts.append(f'<div class="card"><h3>Most frequent words</h3><ul class="words">{words}</ul></div>')
    if repeated:
        rows = [(f"<bdi>{_text(text, 200)}</bdi>", f"{n:,}") for n, text in repeated[:LISTED]]
        parts.append(_table(("Same caption", "times"), rows, len(repeated) - LISTED))
    if near:
        rows = [(_wordings(shards, key, indices), f"{len(indices):,}") for key, indices in near[:LISTED]]
        parts.append(_table(("Same words in another order, articles aside", "wordings"), rows, len(near) - LISTED))
    return _section("captions", "Captions", "", *parts)


def _wordings(shards: ShardFolder, key: int, indices: Sequence[int]) -> str:
    """Up to three captions of the same words, from the assets that have them."""
    captions = {
        text_key(caption): caption
        for index in dict.fromkeys(indices[:3])
        for caption in strings(shards.read_json(index).get("captions"))
        if words_key(caption) == key
    }
    return "<br>".join(f"<bdi>{_text(text, 200)}</bdi>" for text in list(captions.values())[:3])


def _sizes(found: Survey) -> str:
    if not found.mesh:
        about = "The assets record no mesh statistics, as those of a procedural set do not."
        return _section("sizes", "Sizes", about, "")
    plots = [_histogram(name, found.mesh[key], log) for key, (name, log) in MESH_PLOTS.items() if key in found.mesh]
    return _section("sizes", "Sizes", "The median is marked.", f'<div class="plots">{"".join(plots)}</div>')


def _provenance(found: Survey) -> str:
    licences: Counter[str] = Counter()
    authors: Counter[str] = Counter()
    for (licence, author), n in found.licences.items():
        licences[licence] += n
        authors[author] += n
    tables = [
        _counts(("Licence", "assets"), licences),
        _counts(("Author", "assets"), authors),
        _counts(("Category", "assets"), found.categories),
    ]
    unknown = licences[NONE_GIVEN]
    about = f"{unknown:,} assets name no licence." if unknown else "Every asset names a licence."
    return _section("origin", "Licences, authors, categories", about, f'<div class="columns">{"".join(tables)}</div>')


def _settings(shards: ShardFolder) -> str:
    rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in _flat(shards.manifest["settings"]))
    return _section("settings", "Built with", "", f'<div class="card"><dl>{rows}</dl></div>')


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings as they are written on the command line: a.b and its value."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------- pieces of a page


def _text(value: object, most: int = 500) -> str:
    """Text from the data as HTML: escaped, cut to `most` characters, without control and direction characters."""
    shown = "".join(
        " " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202c\u202d\u202e" else c
        for c in str(value)[: most + 1]
    )
    return escape(shown[:most].rstrip() + "…" if len(shown) > most else shown)


def _section(anchor: str, title: str, about: str, *content: str) -> str:
    told = f'<p class="about">{about}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{title}</h2>{told}{"".join(content)}</section>\n'


def _finding(n: int, of: str, sentence: str, body: str) -> str:
    """A card on one kind of trouble."""
    count = f"<b>{n:,}</b> {of}{'s' if n != 1 else ''}"
    return f'<div class="card finding"><p class="count">{count}</p><div><h3>{sentence}</h3>{body}</div></div>'


def _of_all(form: str, sentences: Sequence[str]) -> str:
    """The sentence where all are one, otherwise what they have in common."""
    return _text(sentences[0] if len(set(sentences)) == 1 else form)


def _told_apart(sentence: str, sentences: Sequence[str]) -> str:
    return f" {_text(sentence, 160)}" if len(set(sentences)) > 1 else ""


def _left_out(n_kinds: int) -> str:
    return f'<p class="about">and {n_kinds - MOST_KINDS:,} more kinds</p>' if n_kinds > MOST_KINDS else ""


def _fact(number: str, name: str) -> str:
    return f'<div class="tile"><b>{number}</b><span>{name}</span></div>'


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]], left: int = 0) -> str:
    body = "".join(f'<tr><th scope="row">{name}</th><td>{number}</td></tr>' for name, number in rows)
    more = f'<p class="about">and {left:,} more</p>' if left > 0 else ""
    top = f'<th scope="col">{head[0]}</th><th scope="col">{head[1]}</th>'
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{more}</div>'


def _counts(head: tuple[str, str], counts: Counter[str]) -> str:
    """A table of names with a bar behind each."""
    most = max(counts.values(), default=1)
    rows = [
        (f'<span class="share" style="--w:{100 * n / most:.1f}%"><bdi>{_text(name, 80)}</bdi></span>', f"{n:,}")
        for name, n in counts.most_common(LISTED)
    ]
    return _table(head, rows, len(counts) - LISTED)


def _bars(title: str, counts: Counter[int], of: str) -> str:
    """A histogram of small whole numbers, a bar each; from 24 on in one bar."""
    if not counts:
        return ""
    if len(counts) == 1:
        only = f'<p class="only"><b>{next(iter(counts))}</b> for all of them</p>'
        return f'<div class="card plot"><h3>{title}</h3>{only}</div>'
    low, high = min(min(counts), 24), min(max(counts), 24)
    heights = [sum(n for value, n in counts.items() if min(value, 24) == k) for k in range(low, high + 1)]
    names = [f"{k}{' or more' if k == 24 and max(counts) > 24 else ''}" for k in range(low, high + 1)]
    return _plot(title, heights, [f"{name}: {n:,} {of}" for name, n in zip(names, heights)], (names[0], names[-1]))


def _histogram(title: str, values: Sequence[float], log: bool) -> str:
    """A histogram in 28 bins, or of whole numbers where they are few; `log`: counts, in bins of equal ratios."""
    x_N = np.asarray(values)
    if (x_N == np.rint(x_N)).all() and 0 < np.ptp(x_N) <= 24:
        return _bars(title, Counter(x_N.astype(int).tolist()), "assets")
    forward: Callable[..., Any] = np.log10 if log else np.asarray
    back: Callable[..., Any] = (lambda y: 10.0**y) if log else np.asarray
    scaled_N = forward(np.maximum(x_N, 1)) if log else x_N
    low, high = float(scaled_N.min()), float(scaled_N.max())
    heights, edges = np.histogram(scaled_N, bins=28, range=(low, high if high > low else low + 1))
    say: Callable[[float], str] = (lambda v: f"{v:,.0f}") if log else (lambda v: f"{v:.1%}")
    tips = [f"{say(back(a))} to {say(back(b))}: {n:,} assets" for a, b, n in zip(edges, edges[1:], heights)]
    median = float(np.median(x_N))
    place = (float(forward(max(median, 1) if log else median)) - edges[0]) / (edges[-1] - edges[0])
    return _plot(title, heights.tolist(), tips, (say(x_N.min()), say(x_N.max())), (place, f"median {say(median)}"))


def _plot(
    title: str,
    heights: Sequence[int],
    tips: Sequence[str],
    ends: tuple[str, str],
    mark: tuple[float, str] | None = None,
) -> str:
    """Two or more bars as SVG. tips: one a bar; ends: labels of the axis; mark: (place in [0, 1], label)."""
    width, height, top = 320.0, 92.0, 12.0
    step, tallest = min(width / len(heights), 44), max(max(heights), 1)
    gap = min(2.0, step / 6)
    tall = [max(height * n / tallest, 1.5 if n else 0) for n in heights]  # a few are seen beside many
    bars = "".join(
        f'<rect x="{k * step + gap / 2:.1f}" y="{top + height - h:.1f}" width="{step - gap:.1f}" height="{h:.1f}">'
        f"<title>{tip}</title></rect>"
        for k, (h, tip) in enumerate(zip(tall, tips))
    )
    foot = top + height
    line = label = ""
    if mark:
        x = step * len(heights) * mark[0]
        line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{foot}"/>'
        label = f"<small>{mark[1]}</small>"
    last = f'<text x="{step * len(heights):g}" y="{foot + 15}" text-anchor="end">{ends[1]}</text>'
    return (
        f'<div class="card plot"><h3>{title}{label}</h3><svg viewBox="0 0 {width:g} {foot + 20:g}" role="img" '
        f'aria-label="{title}: {ends[0]} to {ends[1]}">{bars}<line class="axis" x1="0" x2="{width}" y1="{foot}" '
        f'y2="{foot}"/>{line}<text x="0" y="{foot + 15}">{ends[0]}</text>{last}</svg></div>'
    )


def _mean(counts: Counter[int]) -> float:
    return sum(value * n for value, n in counts.items()) / max(1, counts.total())


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
