"""Pieces of the page about raw shards: cards, tables and bars as HTML and SVG, and words of the data made safe."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

__all__ = [
    "LISTED",
    "bars",
    "bytes_said",
    "counts_table",
    "fact",
    "finding",
    "histogram",
    "plot",
    "safe",
    "section",
    "table",
]

LISTED = 12  # rows of a table of names; the rest is summed up


def safe(value: object, most: int = 500) -> str:
    """Text from the data as HTML: escaped, cut to `most` characters, without control and direction characters."""
    shown = "".join(
        " " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202c\u202d\u202e" else c
        for c in str(value)[: most + 1]
    )
    return escape(shown[:most].rstrip() + "…" if len(shown) > most else shown)


def section(anchor: str, title: str, about: str, *content: str) -> str:
    told = f'<p class="about">{about}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{title}</h2>{told}{"".join(content)}</section>\n'


def finding(n: int, of: str, sentence: str, body: str) -> str:
    """A card on one kind of trouble."""
    count = f"<b>{n:,}</b> {of}{'s' if n != 1 else ''}"
    return f'<div class="card finding"><p class="count">{count}</p><div><h3>{sentence}</h3>{body}</div></div>'


def fact(number: str, name: str) -> str:
    return f'<div class="tile"><b>{number}</b><span>{name}</span></div>'


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]], left: int = 0) -> str:
    body = "".join(f'<tr><th scope="row">{name}</th><td>{number}</td></tr>' for name, number in rows)
    more = f'<p class="about">and {left:,} more</p>' if left > 0 else ""
    top = f'<th scope="col">{head[0]}</th><th scope="col">{head[1]}</th>'
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{more}</div>'


def counts_table(head: tuple[str, str], counts: Counter[str]) -> str:
    """A table of names with a bar behind each."""
    most = max(counts.values(), default=1)
    rows = [
        (f'<span class="share" style="--w:{100 * n / most:.1f}%"><bdi>{safe(name, 80)}</bdi></span>', f"{n:,}")
        for name, n in counts.most_common(LISTED)
    ]
    return table(head, rows, len(counts) - LISTED)


def bars(title: str, counts: Counter[int], of: str) -> str:
    """A histogram of small whole numbers, a bar each; from 24 on in one bar."""
    if not counts:
        return ""
    if len(counts) == 1:
        only = f'<p class="only"><b>{next(iter(counts))}</b> for all of them</p>'
        return f'<div class="card plot"><h3>{title}</h3>{only}</div>'
    low, high = min(min(counts), 24), min(max(counts), 24)
    heights = [sum(n for value, n in counts.items() if min(value, 24) == k) for k in range(low, high + 1)]
    names = [f"{k}{' or more' if k == 24 and max(counts) > 24 else ''}" for k in range(low, high + 1)]
    return plot(title, heights, [f"{name}: {n:,} {of}" for name, n in zip(names, heights)], (names[0], names[-1]))


def histogram(title: str, values: Sequence[float], log: bool) -> str:
    """A histogram in 28 bins, or of whole numbers where they are few; `log`: counts, in bins of equal ratios."""
    x_N = np.asarray(values)
    if (x_N == np.rint(x_N)).all() and 0 < np.ptp(x_N) <= 24:
        return bars(title, Counter(x_N.astype(int).tolist()), "assets")
    forward: Callable[..., Any] = np.log10 if log else np.asarray
    back: Callable[..., Any] = (lambda y: 10.0**y) if log else np.asarray
    scaled_N = forward(np.maximum(x_N, 1)) if log else x_N
    low, high = float(scaled_N.min()), float(scaled_N.max())
    heights, edges = np.histogram(scaled_N, bins=28, range=(low, high if high > low else low + 1))
    say: Callable[[float], str] = (lambda v: f"{v:,.0f}") if log else (lambda v: f"{v:.1%}")
    tips = [f"{say(back(a))} to {say(back(b))}: {n:,} assets" for a, b, n in zip(edges, edges[1:], heights)]
    median = float(np.median(x_N))
    place = (float(forward(max(median, 1) if log else median)) - edges[0]) / (edges[-1] - edges[0])
    return plot(title, heights.tolist(), tips, (say(x_N.min()), say(x_N.max())), (place, f"median {say(median)}"))


def plot(
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


def bytes_said(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
