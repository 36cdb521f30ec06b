"""What an R-precision run writes and prints: results.json, per_prompt.csv, thumbnails, a contact sheet, the report."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...data_pipes.contact_sheet import write_png
from ...data_pipes.raw_sample import encode_npz
from ...files import write_atomic, write_json
from ..report.benchmark import write_report
from ..sheets import Cell, contact_sheet
from .inputs import Found
from .prompts import Prompt, choose
from .schema import METRICS, PER_PROMPT, Interval, Results
from .tables import PICTURES, Placed

__all__ = ["print_results", "write_results"]

SHEET_PROMPTS = 24
WIDTH_IN_A_FILE = 150
MOST_GROUPS = 6  # in a printed table


def write_results(
    out: Path,
    results: Results,
    placed: Sequence[Placed],
    chosen: Sequence[Prompt],
    found: Found,
    thumbnails: Mapping[str, Sequence[bytes | None]],
    timings: Callable[[], dict[str, float]],
) -> Results:
    """Write everything into `out`, results.json and the report last, and print the table.

    Args:
        thumbnails: "generated" in the order of prompts and seeds, and perhaps "true renders" in that of prompts.
        timings: asked at the end.
    """
    captioned = [one for one in placed if one.gallery.name != PICTURES]
    write_atomic(out / "per_prompt.csv", _per_prompt(captioned, chosen, found, results))
    _write_thumbnails(out / "thumbnails.npz", chosen, found, thumbnails)
    write_png(out / "contact_sheet.png", _sheet(captioned, chosen, found, thumbnails))
    results = results.model_copy(update={"timings_s": timings()})
    write_json(out / "results.json", results.to_json())
    write_report(out)
    print_results(results, out)
    return results


def _per_prompt(placed: Sequence[Placed], chosen: Sequence[Prompt], found: Found, results: Results) -> str:
    """One line for each evaluator, shading, gallery, prompt and seed."""
    failed = {(miss.id, miss.seed): miss.kind for miss in results.failures}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(PER_PROMPT)
    for one in placed:
        scores_PSM = one.generated.scores_PSM
        for place, prompt in enumerate(chosen):
            for column, seed in enumerate(found.seeds):
                scores = dict(zip(METRICS, map(_number, scores_PSM[place, column])))
                row: dict[str, Any] = {
                    "evaluator": one.evaluator,
                    "shading": one.shading,
                    "gallery": one.gallery.name,
                    "id": prompt.id,
                    "seed": seed,
                    "groups": "|".join(prompt.groups),
                    "text": prompt.text,
                    "failure": failed.get((prompt.id, seed), ""),
                    **scores,
                    "rank": _number(one.generated.rank_PS[place, column]),
                    "nearest": "",
                }
                if (nearest := one.generated.nearest(place, column)) >= 0:
                    row["nearest"] = one.gallery.captions[nearest]
                writer.writerow([row[name] for name in PER_PROMPT])
    return buffer.getvalue()


def _number(value: float) -> str:
    """The shortest text of 9 digits; nothing for what is not finite."""
    return f"{value:.9g}" if np.isfinite(value) else ""


def _write_thumbnails(
    path: Path, chosen: Sequence[Prompt], found: Found, thumbnails: Mapping[str, Sequence[bytes | None]]
) -> None:
    named: dict[str, np.ndarray] = {}
    for row, pictures in thumbnails.items():
        seeds = found.seeds if row == "generated" else (0,)
        units = [f"{row}/{prompt.id}/{seed}" for prompt in chosen for seed in seeds]
        named |= {name: np.frombuffer(data, np.uint8) for name, data in zip(units, pictures, strict=True) if data}
    write_atomic(path, encode_npz(compressed=False, **named))


def _sheet(
    placed: Sequence[Placed], chosen: Sequence[Prompt], found: Found, thumbnails: Mapping[str, Sequence[bytes | None]]
) -> Image.Image:
    """True render beside generated object, ticked where the caption is found, of prompts of all groups."""
    last = [one for one in placed if one.shading == "colour"][-1]
    right_P = last.generated.scores_PSM[:, 0, 0] >= 0.5
    place = {prompt.id: number for number, prompt in enumerate(chosen)}
    cells = []
    for prompt in choose(chosen, SHEET_PROMPTS):
        at = place[prompt.id]
        data = [thumbnails["true renders"][at]] if "true renders" in thumbnails else []
        pictures = [_picture(one) for one in [*data, thumbnails["generated"][at * len(found.seeds)]]]
        cells.append(Cell(pictures, prompt.text, bool(right_P[at])))
    beside = "true | generated" if "true renders" in thumbnails else "generated"
    title = f"{beside} (seed {found.seeds[0]}), right or wrong in the gallery '{last.gallery.name}'"
    return contact_sheet(cells, columns=4, title=title)


def _picture(data: bytes | None) -> np.ndarray:
    if data is None:
        return np.full((64, 64, 3), 255, np.uint8)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------------------------- to read


def print_results(results: Results, out: Path) -> None:
    """R@1 of every row and group in the headline's gallery, the two-way choice, failures and times."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_FILE)
    for evaluator in results.evaluators:
        for gallery in results.galleries:
            console.print(_retrieval(results, evaluator.name, gallery.name))
        if any(row.evaluator == evaluator.name for row in results.two_way):
            console.print(_two_way(results, evaluator.name))
    say = lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    inputs, headline = results.inputs, results.headline
    say(
        f"{results.prompts['count']} prompts x {len(inputs['seeds'])} seed(s), {len(results.failures)} of "
        f"{inputs['objects']} objects failed, seconds: {results.timings_s}"
    )
    for evaluator in results.evaluators:
        for note in evaluator.notes:
            say(f"note: {evaluator.name}: {note}")
    for note in results.notes:
        say(f"note: {note}")
    if results.partial:
        say("PARTIAL: only some of the prompts were scored; the numbers are comparable to nothing")
    score = headline.r_at_1
    if score is None:
        say(f"no headline: {headline.reason}")
    else:
        gallery = next(gallery for gallery in results.galleries if gallery.name == headline.gallery)
        evaluator = next(evaluator for evaluator in results.evaluators if evaluator.name == headline.evaluator)
        say(
            f"R@1 {100 * score.mean:.1f} % (95 % interval {100 * score.lo:.1f} to {100 * score.hi:.1f}) among "
            f"{gallery.size} captions ({gallery.name} {gallery.hash[:12]}), judged by {evaluator.name} "
            f"{evaluator.hash[:12]}, protocol {results.protocol['name']} {results.protocol['hash'][:12]}"
            + (f"; {headline.reason}" if headline.reason else "")
        )
    say(f"written: {out}/report.html, results.json, per_prompt.csv, contact_sheet.png")


def _retrieval(results: Results, evaluator: str, gallery: str) -> Table:
    """R@1: rows down, the groups in colour across, then all without texture."""
    chosen = [row for row in results.scores if (row.evaluator, row.gallery) == (evaluator, gallery)]
    size = next(one.size for one in results.galleries if one.name == gallery)
    cells: dict[tuple[str, str, str], Interval] = {
        (row.row, row.shading, row.group): row.metrics["r@1"] for row in chosen
    }
    sizes = {row.group: row.metrics["r@1"].prompts for row in chosen if row.row == "chance"}
    largest = sorted(sizes, key=lambda group: -sizes[group])[:MOST_GROUPS]  # "all" is among them
    columns = [("colour", group) for group in sizes if group in largest]
    columns += [(row.shading, row.group) for row in chosen if row.shading != "colour" and row.group == "all"][:1]
    title = f"R@1 by {evaluator} among {size} ({gallery}), percent with 95 % interval"
    if len(sizes) > len(columns):
        title += f"; {len(sizes) - len(columns)} smaller groups are in the report"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for shading, group in columns:
        counted = cells.get(("generated", shading, group))
        name = group if shading == "colour" else shading
        table.add_column(escape(f"{name}\nn = {counted.prompts if counted else 0}"), justify="right")
    for name in dict.fromkeys(row.row for row in chosen):
        table.add_row(name, *(_cell(cells.get((name, shading, group))) for shading, group in columns))
    return table


def _two_way(results: Results, evaluator: str) -> Table:
    """Kinds of swap across."""
    chosen = [row for row in results.two_way if (row.evaluator, row.shading, row.group) == (evaluator, "colour", "all")]
    title = f"caption or its swap by {evaluator}, by kind of swap: accuracy, chance 50"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    cells = {(row.row, row.kind): row.accuracy for row in chosen}
    kinds = list(dict.fromkeys(row.kind for row in chosen))
    for kind in kinds:
        counted = cells.get(("generated", kind))
        table.add_column(escape(f"{kind}\nn = {counted.prompts if counted else 0}"), justify="right")
    for name in dict.fromkeys(row.row for row in chosen):
        table.add_row(name, *(_cell(cells.get((name, kind))) for kind in kinds))
    return table


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    mean, lo, hi = (100 * value for value in (interval.mean, interval.lo, interval.hi))
    return f"{mean:.{1 + (mean < 1)}f}" if lo == hi else f"{mean:.1f} ({lo:.0f}–{hi:.0f})"
