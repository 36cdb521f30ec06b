"""One self-contained page about a run: the number, what it means, pictures, curves, times, and how to make it again."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...files import read_json, write_atomic
from ..benchmark.schema import Interval, Results, read_results
from .parts import card, reconstruction, section, table
from .plots import bullet, line_plot, time_bars

__all__ = ["CORE_FIGURES", "Figure", "ReportInput", "read_figures", "write_report"]

FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Figure:
    """A number of the run with the gate it must pass and the aim it hopes for.

    Args:
        key: `iou`, `color_l1`, `empty_share`, `r@1/POOL/ROW/GROUP` or `two-way/ROW/KIND/GROUP`.
    """

    key: str
    label: str
    gate: float
    aim: float | None = None
    higher_is_better: bool = True

    def reached(self, value: float) -> bool:
        return value >= self.gate if self.higher_is_better else value <= self.gate


CORE_FIGURES = (
    Figure("r@1/hard/generated/all", "generated R@1, hard pool", 0.45, 0.75),
    Figure("r@1/hard/generated/single objects", "— single objects", 0.80, 0.97),
    Figure("r@1/hard/generated/unseen combinations", "— unseen combinations", 0.35, 0.65),
    Figure("r@1/hard/reconstructions/all", "reconstruction R@1, hard pool", 0.88, 0.97),
    Figure("r@1/hard/true renders/all", "judge on true renders, hard pool R@1", 0.93, 1.0),
    Figure("two-way/true renders/order/all", "judge on true renders, order two-way", 0.95, 1.0),
    Figure("iou", "autoencoder IoU, unseen objects", 0.70, 0.85),
    Figure("color_l1", "autoencoder colour L1, unseen objects", 0.06, 0.03, higher_is_better=False),
    Figure("empty_share", "empty meshes", 0.01, 0.0, higher_is_better=False),
)


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; every path may be missing, its section is then left out.

    Args:
        r_precision, reconstruction: output folders of the two evaluations.
        logs: name to log.jsonl of a training stage.
        figures: with their gates.
        timings: seconds of each step of the run.
        commands: that make it again.
        pictures: caption to PNG, shown beside the contact sheets of the evaluations.
        meshes: GLB files to link.
        facts: more lines for the settings, e.g. the preset and the machine.
    """

    title: str = "Shapeloom quickstart"
    r_precision: Path | None = None
    reconstruction: Path | None = None
    logs: Mapping[str, Path] = field(default_factory=dict)
    figures: Sequence[Figure] = CORE_FIGURES
    timings: Mapping[str, float] = field(default_factory=dict)
    commands: Sequence[str] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    meshes: Sequence[Path] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def read_figures(report: ReportInput) -> dict[str, tuple[Figure, float | None]]:
    """Each figure with its value in the results (None where there is no such result)."""
    precision, rebuilt = _precision(report), _reconstruction(report)
    return {figure.key: (figure, _value(figure.key, precision, rebuilt)) for figure in report.figures}


def write_report(report: ReportInput, out_html: str | Path) -> Path:
    """Write the page. Returns its path.

    Raises: UserError for a results.json that is damaged.
    """
    out_html = Path(out_html)
    precision, rebuilt = _precision(report), _reconstruction(report)
    body = [
        f"<h1>{escape(report.title)}</h1>",
        '<p class="lead">From 3D files to a trained text-and-image-to-3D model to a number.</p>',
        _headline(precision, rebuilt, report, out_html.parent),
        _gates(report),
        _objects(report, out_html.parent),
        reconstruction(rebuilt),
        _curves(report.logs),
        _times(report, precision),
        _again(report, precision, rebuilt),
    ]
    page = FRAME.format(title=escape(report.title), style=STYLE.read_text(), body="\n".join(filter(None, body)))
    write_atomic(out_html, page)
    return out_html


def _precision(report: ReportInput) -> Results | None:
    folder = report.r_precision
    return read_results(folder) if folder and (Path(folder) / "results.json").exists() else None


def _reconstruction(report: ReportInput) -> dict[str, Any] | None:
    path = Path(report.reconstruction) / "results.json" if report.reconstruction else None
    return read_json(path, "evaluation results") if path and path.exists() else None


def _value(key: str, precision: Results | None, rebuilt: dict[str, Any] | None) -> float | None:
    """A figure's value by its key (see `Figure`)."""
    kind, *path = key.split("/")
    if kind in ("iou", "color_l1"):
        return rebuilt["scores"].get(kind, {}).get("mean") if rebuilt else None
    if precision is None:
        return None
    if kind == "empty_share":
        return sum(miss.kind == "empty" for miss in precision.failures) / precision.inputs["objects"]
    interval = _r_at_1(precision, *path) if kind == "r@1" else _two_way(precision, *path)
    return interval.mean if interval else None


def _r_at_1(precision: Results, gallery: str, row: str, group: str) -> Interval | None:
    return (precision.score(row, gallery, group) or {}).get("r@1")


def _two_way(precision: Results, row: str, kind: str, group: str) -> Interval | None:
    first = precision.headline.evaluator or precision.evaluators[0].name
    for entry in precision.two_way:
        where = (entry.row, entry.kind, entry.group, entry.evaluator, entry.shading)
        if where == (row, kind, group, first, "colour"):
            return entry.accuracy
    return None


def _headline(precision: Results | None, rebuilt: dict[str, Any] | None, report: ReportInput, beside: Path) -> str:
    """The number, what it says, and the few others worth a glance."""
    tiles = []
    if precision:
        gallery = precision.headline.gallery or precision.galleries[-1].name
        for group in dict.fromkeys(score.group for score in precision.scores if score.group != "all"):
            if score := _r_at_1(precision, gallery, "generated", group):
                tiles.append((f"{100 * score.mean:.1f} %", group))
        if order := _two_way(precision, "generated", "order", "all"):
            tiles.append((f"{100 * order.mean:.1f} %", "order of two objects right (chance 50)"))
    if rebuilt and "iou" in rebuilt["scores"]:
        tiles.append((f"{rebuilt['scores']['iou']['mean']:.3f}", "autoencoder IoU, held out"))
    if report.timings:
        tiles.append((f"{sum(report.timings.values()) / 60:.1f} min", "of work in all steps"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in tiles)
    return _main_number(precision, report, beside) + (f'<div class="tiles">{cells}</div>' if cells else "")


def _main_number(precision: Results | None, report: ReportInput, beside: Path) -> str:
    """R@1 of the generated objects in the headline's gallery, in words."""
    if precision is None or precision.headline.r_at_1 is None or precision.headline.gallery is None:
        return ""
    score, gallery = precision.headline.r_at_1, precision.headline.gallery
    size = next(one.size for one in precision.galleries if one.name == gallery)
    swapped = ", swapped captions included" if gallery == "hard" else ""
    truth = _r_at_1(precision, gallery, "true renders", "all")
    ceiling = f" True renders reach {100 * truth.mean:.1f} %." if truth else ""
    page = f"{os.path.relpath(report.r_precision, beside)}/report.html" if report.r_precision else ""
    return (
        f'<div class="card headline"><div class="big">{100 * score.mean:.1f}<small> %</small></div>'
        f"<p><b>CLIP R-precision, gallery {gallery}</b> (95 % interval {100 * score.lo:.1f}–{100 * score.hi:.1f}): "
        f"the share of objects, made for {score.prompts} prompts with {score.seeds} seed(s) each, whose own caption is "
        f"the nearest of {size}{swapped}. The judge is a CLIP that took no part in conditioning.{ceiling} "
        f'<a href="{quote(page)}">All of its tables, controls and objects</a>.</p></div>'
    )


def _gates(report: ReportInput) -> str:
    rows = []
    for figure, value in read_figures(report).values():
        sign = "≥" if figure.higher_is_better else "≤"
        aim = "" if figure.aim is None else f"{sign} {figure.aim:g}"
        goals = [f"{sign} {figure.gate:g}", aim]
        if value is None:
            rows.append(("", [escape(figure.label), "–", "", *goals, '<span class="pill none">not measured</span>']))
            continue
        bar = bullet(value, figure.gate, figure.aim, higher_is_better=figure.higher_is_better)
        rows.append(("", [escape(figure.label), f"<b>{value:.3f}</b>", bar, *goals, _pill(figure, value)]))
    if not rows:
        return ""
    about = "The bar is what was reached, the line the gate, the circle the aim."
    return section("Gates", about, table(["figure", "reached", "", "gate", "aim", ""], rows))


def _pill(figure: Figure, value: float) -> str:
    """Aim reached, passed or missed."""
    at_aim = figure.aim is not None and (value >= figure.aim if figure.higher_is_better else value <= figure.aim)
    if at_aim:
        word, style = "aim reached", "aim"
    else:
        word, style = ("passed", "good") if figure.reached(value) else ("missed", "bad")
    return f'<span class="pill {style}">{word}</span>'


def _objects(report: ReportInput, beside: Path) -> str:
    """Pictures, held in the page itself, and links to the GLB files."""
    shown = dict(report.pictures)
    if report.r_precision:
        caption = "True render | generated, for prompts of all test splits. Ticked: the judge finds the right caption."
        shown[caption] = Path(report.r_precision) / "contact_sheet.png"
    if report.reconstruction:
        shown["Held-out originals | their reconstructions."] = Path(report.reconstruction) / "contact_sheet.png"
    parts = []
    for caption, path in shown.items():
        if Path(path).exists():
            data = base64.b64encode(Path(path).read_bytes()).decode()
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    links = "".join(
        f'<li><a href="{quote(os.path.relpath(mesh, beside))}">{escape(Path(mesh).name)}</a></li>'
        for mesh in report.meshes
    )
    if links:
        parts.append(f'<p class="about">The objects as GLB files:</p><ul class="links">{links}</ul>')
    return section("Objects", "", *parts)


def _curves(logs: Mapping[str, Path]) -> str:
    """Loss of each stage on a logarithmic scale, and each held-out metric."""
    plots = []
    for name, path in logs.items():
        lines = _log_lines(Path(path))
        losses = [(line["time"] / 60, line["loss"]) for line in lines if "loss" in line]
        plots.append(line_plot({"loss": losses}, title=f"{name}: loss", log=True))
        metrics = dict.fromkeys(
            key for line in lines for key in line if key.startswith("eval/") and key != "eval/scored"
        )
        for metric in metrics:
            points = [(line["time"] / 60, line[metric]) for line in lines if metric in line]
            plots.append(line_plot({metric: points}, title=f"{name}: {metric.removeprefix('eval/')} (held out)"))
    cards = "".join(map(card, plots))
    return section(
        "Curves", "Against the wall time of each stage.", f'<div class="plots">{cards}</div>' if cards else ""
    )


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; a line that a kill cut short is skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("time"), (int, float)):
            lines.append({key: value for key, value in line.items() if isinstance(value, (int, float))})
    return lines


def _times(report: ReportInput, precision: Results | None) -> str:
    parts = [card(time_bars(report.timings))] if report.timings else []
    if precision:
        inside = {name: value for name, value in precision.timings_s.items() if name != "all"}
        parts += ["<h3>Within R-precision</h3>", card(time_bars(inside))]
    return section("Time", "", *parts)


def _again(report: ReportInput, precision: Results | None, rebuilt: dict[str, Any] | None) -> str:
    """Commands, settings, hashes, versions."""
    facts: dict[str, Any] = dict(report.facts)
    if rebuilt:
        facts |= {**rebuilt["settings"], **rebuilt["environment"]}
        facts |= {f"{name} hash": value[:16] for name, value in rebuilt["hashes"].items()}
    if precision:
        facts |= {"protocol": f"{precision.protocol['name']} {precision.protocol['hash'][:16]}"}
        facts |= {"notes": "; ".join(precision.notes) or "none", **precision.environment}
    listed = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    commands = f"<pre>{escape(chr(10).join(report.commands))}</pre>" if report.commands else ""
    folded = (
        f"<details><summary>Settings, hashes, versions</summary>{card(f'<dl>{listed}</dl>')}</details>"
        if listed
        else ""
    )
    return section("Make it again", "", commands, folded)
