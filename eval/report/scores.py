"""Scores of an R-precision run as HTML: retrieval by row, group and evaluator, published ones, the two-way choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape

from ..benchmark.schema import METRICS, Interval, Published, Results
from .parts import section, table
from .plots import against_chance, interval_bar
from .views import ROWS, Choice, View, mark, ordered, percent, selectors, text, views, where

__all__ = ["binding", "scores"]

METRIC_NAMES = {"r@1": "R@1,&nbsp;%", "r@5": "R@5,&nbsp;%", "r@10": "R@10,&nbsp;%", "mrr": "MRR"}
BY_GROUP = ("generated", "true renders", "reconstructions", "conditioning images", "chance")
KINDS = {
    "order": "parts exchanged, or the relation inverted",
    "binding": "colours or shapes exchanged",
    "parts": "the parts exchanged",
    "relation": "the relation inverted",
    "colors": "the colours exchanged",
    "shapes": "the shapes exchanged",
    "any": "every kind of swap",
}


def scores(results: Results, first: Choice) -> str:
    """Every row of the chosen view, R@1 by group, R@1 of every view, and what papers say."""
    about = (
        "R@k: share of pictures whose own caption is among the k nearest of the gallery, averaged over views, seeds "
        "and prompts; an object that failed is a miss. MRR: mean of 1/rank. Cosine: of picture and own caption. "
        "Margin: that cosine less the best wrong caption's. With 95 % intervals over prompts."
    )
    return section("Scores", about, _rows(results, first), _groups(results, first), _every_view(results),
                   _published(results.published), anchor="scores")  # fmt: skip


def _rows(results: Results, first: Choice) -> str:
    """Rows down, metrics across; a table for each view and group."""
    found: dict[tuple[View, str], dict[str, Mapping[str, Interval]]] = defaultdict(dict)
    for score in results.scores:
        found[View.of(score), score.group][score.row] = score.metrics
    names = [METRIC_NAMES.get(metric, metric) for metric in METRICS]
    head = ["", names[0], "0–100 %", *names[1:]]
    blocks = []
    for (view, group), rows in found.items():
        lines = []
        for row in ordered(rows, ROWS):
            cells = [_cell(metric, rows[row].get(metric)) for metric in METRICS]
            name = escape(row) + text(ROWS.get(row, ""))
            style = "main" if row == "generated" else "control"
            lines.append((f'class="{style}"', [name, cells[0], _bar(rows[row].get("r@1")), *cells[1:]]))
        blocks.append(({**view._asdict(), "group": group}, table(head, lines, where(results, *view, group=group))))
    return views(first, blocks)


def _groups(results: Results, first: Choice) -> str:
    """R@1 of each group of prompts; nothing where "all" is the only one."""
    if len(selectors(results)["group"]) < 2:
        return ""
    found: dict[View, dict[str, dict[str, Interval]]] = defaultdict(lambda: defaultdict(dict))
    for score in results.scores:
        found[View.of(score)][score.group][score.row] = score.metrics["r@1"]
    blocks = []
    for view, groups in found.items():
        rows = [row for row in BY_GROUP if any(row in group for group in groups.values())]
        lines = []
        for name in ordered(groups, ["all"]):
            one = groups[name].get("generated")
            label = "all prompts" if name == "all" else escape(name)
            cells = [label, str(one.prompts) if one else "–", _bar(one), *(percent(groups[name].get(r)) for r in rows)]
            lines.append(('class="main"' if name == "all" else "", cells))
        head = ["group", "prompts", "generated, 0–100 %", *(f"{row},&nbsp;%" for row in rows)]
        blocks.append((view._asdict(), table(head, lines, where(results, *view))))
    return f"<h3>R@1 by group of prompts</h3>{views(first, blocks)}"


def _every_view(results: Results) -> str:
    """R@1 of the generated objects, all prompts, under every evaluator, shading and gallery."""
    found = {
        View.of(score): score.metrics["r@1"]
        for score in results.scores
        if (score.row, score.group) == ("generated", "all")
    }
    if len(found) < 2:
        return ""
    columns = list(dict.fromkeys((view.shading, view.gallery) for view in found))
    lines = []
    for evaluator in dict.fromkeys(view.evaluator for view in found):
        style = "main" if results.headline.r_at_1 and evaluator == results.headline.evaluator else ""
        cells = [percent(found.get(View(evaluator, *column))) for column in columns]
        lines.append((f'class="{style}"', [f"{escape(evaluator)}{mark(results, evaluator)}", *cells]))
    head = ["evaluator", *(f"{escape(shading)},<br>{escape(gallery)}" for shading, gallery in columns)]
    caption = '<span class="where">generated objects, all prompts, %</span>'
    return f"<h3>R@1 by evaluator, shading and gallery</h3>{table(head, lines, caption)}"


def _published(published: Iterable[Published]) -> str:
    lines = [
        (
            'class="quiet"',
            [
                f'{escape(one.system)} <span class="pill none">different protocol</span>',
                escape(one.evaluator),
                f"{one.r_at_1:.1f}",
                text("; ".join(filter(None, (one.source, one.note)))),
            ],
        )
        for one in published
    ]
    about = (
        "For context: other views, renderers, seeds or galleries decided these numbers, so none can be compared "
        "with those above."
    )
    head = ["system", "evaluator", "R@1,&nbsp;%", text("source")]
    return f'<h3>Published elsewhere</h3><p class="about">{about}</p>{table(head, lines)}' if lines else ""


def binding(results: Results, first: Choice) -> str:
    """Two-way accuracy by kind of swap, generated beside the evaluator's own ceiling."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Interval]]] = defaultdict(lambda: defaultdict(dict))
    for entry in results.two_way:
        found[entry.evaluator, entry.shading, entry.group][entry.kind][entry.row] = entry.accuracy
    head = ["swap", "prompts", "generated,&nbsp;%", "true renders,&nbsp;%", "0–100 %, chance at 50"]
    blocks = []
    for (evaluator, shading, group), kinds in found.items():
        lines, blind = [], []
        for kind in ordered(kinds, KINDS):
            rows = {row: kinds[kind][row] for row in ("generated", "true renders") if row in kinds[kind]}
            drawn = {f"{row} {100 * one.mean:.1f} %": (one.mean, one.lo, one.hi) for row, one in rows.items()}
            name = escape(kind) + text(KINDS.get(kind, ""))
            generated, truth = rows.get("generated"), rows.get("true renders")
            known = generated or truth
            prompts = str(known.prompts) if known else "–"
            lines.append(("", [name, prompts, percent(generated), percent(truth), against_chance(drawn)]))
            if truth and truth.lo <= 0.5 <= truth.hi:
                blind.append(_blind(evaluator, kind, truth))
        content = table(head, lines, where(results, evaluator, shading, group=group)) + "".join(blind)
        blocks.append(({"evaluator": evaluator, "shading": shading, "group": group}, content))
    about = (
        "An object is offered its caption and one swap of it: which is nearer? Guessing has 50. True renders (the "
        "hollow dot) show how well the evaluator can tell the two apart at all."
    )
    return section("Binding and order", about, views(first, blocks), anchor="binding")


def _blind(evaluator: str, kind: str, truth: Interval) -> str:
    """The sentence about an evaluator that does no better than guessing on the true renders."""
    right, lo, hi = 100 * truth.mean, 100 * truth.lo, 100 * truth.hi
    return (
        f'<p class="note"><b>{escape(evaluator)} is blind to {escape(kind)}</b>, as far as {truth.prompts} prompts '
        f"show. On true renders it is right in {right:.1f} % of the choices, and the interval ({lo:.1f}–{hi:.1f}) "
        "includes the 50 % of guessing, so its number for the generated objects says nothing about them.</p>"
    )


def _bar(interval: Interval | None) -> str:
    return interval_bar(interval.mean, interval.lo, interval.hi) if interval else ""


def _cell(metric: str, interval: Interval | None) -> str:
    """Percent for recall, plain numbers for the others."""
    if metric.startswith("r@") or interval is None:
        return percent(interval)
    mean, lo, hi = (f"{value:.3f}".replace("-", "−") for value in (interval.mean, interval.lo, interval.hi))
    return mean if interval.lo == interval.hi else f"{mean} <small>{lo}&thinsp;–&thinsp;{hi}</small>"
