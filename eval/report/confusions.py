"""Ranks, confusions and variances of an R-precision run, as HTML."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from statistics import fmean

from ..benchmark.schema import AzimuthCurve, RankHistogram, Results
from .objects import Pictures
from .parts import card, section, table
from .plots import histogram, line_plot
from .views import ROWS, Choice, View, mark, ordered, text, views, where

__all__ = ["ranks_and_confusions", "statistics"]

MOST_CONFUSIONS = 12


def ranks_and_confusions(results: Results, first: Choice, pictures: Pictures) -> str:
    """Where captions ranked, R@1 around the object, and which captions took the place of others."""
    plots = _histograms(results, first) + _azimuths(results, first)
    about = "Of all prompts. A caption that many objects are nearest to is a favourite of the evaluator, not a finding."
    return section(
        "Ranks and confusions",
        about,
        f'<div class="plots">{plots}</div>' if plots else "",
        _confusions(results, first, pictures),
        _most_retrieved(results),
        anchor="confusions",
    )


def _histograms(results: Results, first: Choice) -> str:
    blocks = []
    for one in results.ranks:
        plot = histogram(_bins(one), title="Generated objects by rank of their caption", bad="failed")
        blocks.append((View.of(one)._asdict(), card(plot + where(results, *View.of(one)))))
    return views(first, blocks)


def _bins(ranks: RankHistogram) -> dict[str, int]:
    """Counts by the bin's name: "1", "2–5", …, "failed"."""
    names, lowest = [], 1
    for edge in ranks.edges:
        names.append(str(edge) if edge == lowest else f"{lowest}–{edge}")
        lowest = edge + 1
    return dict(zip([*names, "failed"], ranks.counts))


def _azimuths(results: Results, first: Choice) -> str:
    """R@1 around the object, generated against true renders."""
    found: dict[View, dict[str, AzimuthCurve]] = defaultdict(dict)
    for curve in results.azimuth:
        found[View.of(curve)][curve.row] = curve
    blocks = []
    for view, curves in found.items():
        series = {row: _around(curves[row]) for row in ordered(curves, ROWS)}
        signed = any(azimuth < 0 for points in series.values() for azimuth, _ in points)
        plot = line_plot(
            series,
            title="R@1 by azimuth, %",
            x_label="degrees",
            x_ticks=(-180, -90, 0, 90, 180) if signed else (0, 90, 180, 270, 360),
            y_range=(0, 100),
        )
        blocks.append((view._asdict(), card(plot + where(results, *view))))
    return views(first, blocks)


def _around(curve: AzimuthCurve) -> list[tuple[float, float]]:
    """(degrees, percent), rising, closed to a full turn; cameras of one azimuth (at several elevations) averaged."""
    values: dict[float, list[float]] = defaultdict(list)
    for azimuth, value in zip(curve.azimuths_deg, curve.r_at_1):
        values[azimuth].append(100 * value)
    points = [(azimuth, fmean(values[azimuth])) for azimuth in sorted(values)]
    turn, value = points[0][0] + 360, points[0][1]
    return [*points, (turn, value)] if turn in (180, 360) else points


def _confusions(results: Results, first: Choice, pictures: Pictures) -> str:
    """Captions that lost to another one, most often first."""
    found: dict[View, list[tuple[str, list[str]]]] = defaultdict(list)
    for one in sorted(results.confusions, key=lambda one: -one.share):
        caption = f"<span>{escape(one.text)}<small>{escape(one.prompt)}</small></span>"
        cells = [
            f'<span class="said">{pictures.of_prompt(one.prompt)}{caption}</span>',
            f'<span class="said">{escape(one.caption)}</span>',
            f"{100 * one.share:.0f} %",
        ]
        found[View.of(one)].append(("", cells))
    head = ["caption", text("nearest instead"), "share of its views"]
    blocks = []
    for view, lines in found.items():
        content = table(head, lines[:MOST_CONFUSIONS], where(results, *view))
        if rest := lines[MOST_CONFUSIONS:]:
            content += f"<details><summary>{len(rest)} more</summary>{table(head, rest)}</details>"
        blocks.append((view._asdict(), content))
    return f"<h3>Most confused captions</h3>{views(first, blocks)}" if blocks else ""


def _most_retrieved(results: Results) -> str:
    lines = [
        (
            "",
            [
                f"{escape(evaluator)}{mark(results, evaluator)}",
                text(gallery.name),
                text(caption),
                f"{100 * share:.1f}",
                f"{100 / max(gallery.size, 1):.1f}",
            ],
        )
        for gallery in results.galleries
        for evaluator, (caption, share) in gallery.most_retrieved.items()
    ]
    head = ["evaluator", text("gallery"), text("caption"), "nearest to,&nbsp;%", "even share,&nbsp;%"]
    return f"<h3>Most retrieved caption</h3>{table(head, lines)}" if lines else ""


def statistics(results: Results, first: Choice) -> str:
    """What the interval is made of, and what would narrow it."""
    seeds = max((score.metrics["r@1"].seeds for score in results.scores if score.row == "generated"), default=1)
    blocks = []
    for one in results.variance:
        parts = {"between prompts": one.between_prompts, "between seeds of a prompt": one.between_seeds}
        listed = "".join(f"<dt>{name}</dt><dd>{value:.3g}</dd>" for name, value in parts.items())
        told = _what_to_add(one.between_prompts, one.between_seeds, seeds)
        content = card(f"{where(results, *View.of(one))}<p>{told}</p><dl>{listed}</dl>")
        blocks.append((View.of(one)._asdict(), content))
    about = "Variance of the mean R@1 of the generated objects, all prompts; the root of the sum is the standard error."
    return section("Statistics", about, views(first, blocks), anchor="statistics")


def _what_to_add(between_prompts: float, between_seeds: float, seeds: int) -> str:
    """Prompts or seeds, and what each would bring."""

    def half(prompts: float, seeds: float) -> str:
        return f"±{196 * max(prompts + seeds, 0.0) ** 0.5:.1f}"

    total = between_prompts + between_seeds
    if total <= 0:
        return "Every prompt and every seed scored the same: there is no variance to divide."
    now = f"By the normal approximation the interval is {half(between_prompts, between_seeds)} points. "
    twice_prompts = half(between_prompts / 2, between_seeds / 2)
    if seeds < 2:
        return (
            f"{now}With one seed a prompt the two parts cannot be told apart: run two or more seeds to learn which to "
            f"add. Twice the prompts give {twice_prompts}."
        )
    twice_seeds, bound = half(between_prompts, between_seeds / 2), half(between_prompts, 0)
    share = 100 * between_seeds / total
    if share < 33:
        return (
            f"{now}<b>Add prompts to narrow it.</b> Seeds make only {share:.0f} % of the variance: twice the seeds "
            f"give {twice_seeds}, any number of them no less than {bound}, and twice the prompts {twice_prompts}."
        )
    return (
        f"{now}<b>Add seeds to narrow it.</b> They make {share:.0f} % of the variance: twice the seeds give "
        f"{twice_seeds}, very many {bound}; twice the prompts, where there are more, give {twice_prompts}."
    )
