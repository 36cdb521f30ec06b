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

from ..files import read_json, write_atomic
from .plots import bullet, line_plot, time_bars
from .report_tables import card, from_pictures, reconstruction, retrieval, section, table, two_way
from .scoring import find

__all__ = ["CORE_FIGURES", "Figure", "ReportInput", "read_figures", "write_report"]

FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
STYLE = Path(__file__).with_name("report.css")


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
    precision, rebuilt = _results(report.r_precision), _results(report.reconstruction)
    return {figure.key: (figure, _value(figure.key, precision, rebuilt)) for figure in report.figures}


def write_report(report: ReportInput, out_html: str | Path) -> Path:
    """Write the page. Returns its path.

    Raises: UserError for a results.json that is damaged.
    """
    out_html = Path(out_html)
    precision, rebuilt = _results(report.r_precision), _results(report.reconstruction)
    body = [
        f"<h1>{escape(report.title)}</h1>",
        '<p class="lead">From 3D files to a trained text-and-image-to-3D model to a number.</p>',
        _headline(precision, rebuilt, report),
        _gates(report),
        _objects(report, out_html.parent),
        retrieval(precision),
        two_way(precision),
        from_pictures(precision),
        reconstruction(rebuilt),
        _curves(report.logs),
        _times(report, precision),
        _again(report, precision, rebuilt),
    ]
    page = FRAME.format(title=escape(report.title), style=STYLE.read_text(), body="\n".join(filter(None, body)))
    write_atomic(out_html, page)
    return out_html


def _results(folder: Path | None) -> dict[str, Any] | None:
    path = Path(folder) / "results.json" if folder else None
    return read_json(path, "evaluation results") if path and path.exists() else None


def _value(key: str, precision: dict[str, Any] | None, rebuilt: dict[str, Any] | None) -> float | None:
    """A figure's value by its key (see `Figure`)."""
    kind, *path = key.split("/")
    interval = None
    if kind == "empty_share" and precision:
        return precision["counts"]["empty"] / precision["counts"]["objects"]
    if kind in ("iou", "color_l1") and rebuilt:
        interval = rebuilt["scores"].get(kind)
    if kind == "r@1" and precision:
        pool, row, group = path
        interval = find(precision["rows"], row, pool, group, "r@1")
    if kind == "two-way" and precision:
        row, swap, group = path
        interval = find(precision["two_way"], row, swap, group, "accuracy")
    return interval["mean"] if interval else None


def _headline(precision: dict[str, Any] | None, rebuilt: dict[str, Any] | None, report: ReportInput) -> str:
    """The number, what it says, and the few others worth a glance."""
    tiles = []
    if precision:
        pool = list(precision["counts"]["pools"])[-1]
        for entry in precision["rows"]:
            if (entry["row"], entry["pool"]) == ("generated", pool) and entry["group"] != "all":
                tiles.append((f"{100 * entry['r@1']['mean']:.1f} %", entry["group"]))
        if order := find(precision["two_way"], "generated", "order", "all", "accuracy"):
            tiles.append((f"{100 * order['mean']:.1f} %", "order of two objects right (chance 50)"))
    if rebuilt and "iou" in rebuilt["scores"]:
        tiles.append((f"{rebuilt['scores']['iou']['mean']:.3f}", "autoencoder IoU, held out"))
    if report.timings:
        tiles.append((f"{sum(report.timings.values()) / 60:.1f} min", "of work in all steps"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in tiles)
    return _main_number(precision) + (f'<div class="tiles">{cells}</div>' if cells else "")


def _main_number(precision: dict[str, Any] | None) -> str:
    """R@1 of the generated objects in the hardest pool, in words."""
    if not precision:
        return ""
    pool, size = list(precision["counts"]["pools"].items())[-1]
    score, chance, truth = (
        find(precision["rows"], row, pool, "all", "r@1") or {} for row in ("generated", "chance", "true renders")
    )
    swapped = ", swapped captions included" if pool == "hard" else ""
    return (
        f'<div class="card headline"><div class="big">{100 * score["mean"]:.1f}<small> %</small></div>'
        f"<p><b>CLIP R-precision, {pool} pool</b> (95 % interval {100 * score['lo']:.1f}–{100 * score['hi']:.1f}): "
        f"the share of objects, made for {score['prompts']} prompts with {score['seeds']} seed(s) each, whose own "
        f"caption is the nearest of {size}{swapped}. The judge is a CLIP that took no part in conditioning. True "
        f"renders reach {100 * truth['mean']:.1f} %, blind guessing {100 * chance['mean']:.2f} %.</p></div>"
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
        for metric in dict.fromkeys(key for line in lines for key in line if key.startswith("eval/")):
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


def _times(report: ReportInput, precision: dict[str, Any] | None) -> str:
    parts = [card(time_bars(report.timings))] if report.timings else []
    if precision:
        inside = {name: value for name, value in precision["timings_s"].items() if name != "all"}
        parts += ["<h3>Within R-precision</h3>", card(time_bars(inside))]
    return section("Time", "", *parts)


def _again(report: ReportInput, precision: dict[str, Any] | None, rebuilt: dict[str, Any] | None) -> str:
    """Commands, settings, hashes, versions."""
    facts: dict[str, Any] = dict(report.facts)
    for results in filter(None, (rebuilt, precision)):
        facts |= {**results["settings"], **results["environment"]}
        facts |= {f"{name} hash": value[:16] for name, value in results["hashes"].items()}
    if precision:
        facts |= {"protocol": precision["protocol"]["name"], "notes": "; ".join(precision["notes"]) or "none"}
    listed = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    commands = f"<pre>{escape(chr(10).join(report.commands))}</pre>" if report.commands else ""
    folded = (
        f"<details><summary>Settings, hashes, versions</summary>{card(f'<dl>{listed}</dl>')}</details>"
        if listed
        else ""
    )
    return section("Make it again", "", commands, folded)
