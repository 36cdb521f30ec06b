"""The report's tables, as HTML: retrieval, the two-way choice, image conditioning, reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .plots import interval_bar
from .scoring import find

__all__ = ["card", "from_pictures", "reconstruction", "retrieval", "section", "table", "two_way"]

ROW_NOTES = {
    "generated": "what the pipeline made",
    "true renders": "the test objects themselves: the judge's ceiling",
    "reconstructions": "the test objects through the autoencoder: the generator's ceiling",
    "shuffled prompts": "generated objects against each other's captions: must be chance",
    "chance": "blind guessing",
}


def section(title: str, about: str, *content: str) -> str:
    """A heading, a line on how to read what follows, and that; nothing at all without content."""
    content = tuple(filter(None, content))
    if not content:
        return ""
    told = f'<p class="about">{about}</p>' if about else ""
    return f"<section><h2>{title}</h2>{told}{''.join(content)}</section>"


def card(content: str) -> str:
    return f'<div class="card">{content}</div>' if content else ""


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str = "") -> str:
    """A card with a table of cells that are HTML already; each row comes with attributes for its <tr>."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [f"<tr {attributes}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for attributes, cells in rows]
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return card(f"<table>{named}<tr>{top}</tr>{''.join(lines)}</table>")


def retrieval(precision: Mapping[str, Any] | None) -> str:
    """R@1 in each pool, hardest first; the other measures folded away."""
    if not precision:
        return ""
    pools = dict(reversed(precision["counts"]["pools"].items()))
    tables = [
        _matrix(f"{pool} pool, {size} captions: R@1", precision["rows"], pool, "r@1") for pool, size in pools.items()
    ]
    more = [
        _matrix(f"{next(iter(pools))} pool: {name}", precision["rows"], next(iter(pools)), metric)
        for metric, name in (("r@5", "R@5"), ("mrr", "mean reciprocal rank"))
    ]
    about = (
        "Share of objects whose own caption is the nearest of the pool. The random pool holds the test captions, the "
        "hard one also captions that say something else with the same words; captions of equal meaning are right "
        "answers. Percent, with 95 % intervals by a bootstrap over prompts."
    )
    folded = f"<details><summary>R@5 and mean reciprocal rank</summary>{''.join(more)}</details>"
    return section("R-precision", about, *tables, folded)


def two_way(precision: Mapping[str, Any] | None) -> str:
    """Accuracy per kind of swap, over all prompts that have one."""
    if not precision or not precision["two_way"]:
        return ""
    entries = [entry for entry in precision["two_way"] if entry["group"] == "all"]
    by_kind = [{**entry, "group": entry["pool"], "pool": "swaps"} for entry in entries]
    about = (
        "An object is offered its caption and one swap of it: which is nearer? Order joins exchanged parts and "
        "inverted relations, binding exchanged colours and shapes. Blind guessing has 50."
    )
    return section("Order and binding", about, _matrix("accuracy of the choice", by_kind, "swaps", "accuracy"))


def from_pictures(precision: Mapping[str, Any] | None) -> str:
    """Image-conditioned retrieval."""
    if not precision or not precision["image"]:
        return ""
    rows = [
        (_attributes(entry["row"]), [escape(entry["row"]), *(_interval(entry[m]) for m in ("r@1", "r@5", "mrr"))])
        for entry in precision["image"]
    ]
    about = (
        f"Objects made from one picture of a test object each, without text ({precision['image'][0]['r@1']['prompts']} "
        "of them): which of the test set's pictures is this the object of?"
    )
    return section("From a picture", about, table(["", "R@1", "R@5", "MRR"], rows))


def reconstruction(rebuilt: Mapping[str, Any] | None) -> str:
    """Scores of the autoencoder with their definitions."""
    if not rebuilt:
        return ""
    told = rebuilt["definitions"]
    rows = [
        (
            "",
            [
                escape(name),
                f"<b>{score['mean']:.4f}</b>",
                f"{score['lo']:.4f}–{score['hi']:.4f}",
                f'<span class="words">{escape(told.get(name, told["f_score"]))}</span>',
            ],
        )
        for name, score in rebuilt["scores"].items()
    ]
    settings = rebuilt["settings"]
    about = f"{settings['count']} held-out assets ({escape(settings['split'])}), {rebuilt['empty']} without a surface."
    return section("Reconstruction", about, table(["", "mean", "95 % interval", ""], rows))


def _matrix(caption: str, rows: Sequence[Mapping[str, Any]], pool: str, metric: str) -> str:
    """Rows down, groups across, with the interval drawn for the first group."""
    chosen = [entry for entry in rows if entry["pool"] == pool]
    groups = {entry["group"]: entry[metric]["prompts"] for entry in chosen}
    lines = []
    for row in dict.fromkeys(entry["row"] for entry in chosen):
        intervals = [find(chosen, row, pool, group, metric) for group in groups]
        first = intervals[0]
        drawn = interval_bar(first["mean"], first["lo"], first["hi"]) if first else ""
        lines.append((_attributes(row), [escape(row), drawn, *map(_interval, intervals)]))
    head = [f"{escape(group)}<br>n&nbsp;=&nbsp;{count}" for group, count in groups.items()]
    return table(["", "", *head], lines, caption)


def _interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    mean, lo, hi = (100 * interval[name] for name in ("mean", "lo", "hi"))
    return f"{mean:.{1 + (mean < 1)}f}" if lo == hi else f"{mean:.1f} <small>{lo:.0f}–{hi:.0f}</small>"


def _attributes(row: str) -> str:
    """Of a table row: its tooltip, and the mark on the row that matters."""
    mark = ' class="main"' if row == "generated" else ""
    return f'title="{escape(ROW_NOTES.get(row, ""))}"{mark}'
