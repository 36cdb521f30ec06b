"""What an R-precision run writes and prints: results.json, per_prompt.csv, contact_sheet.png, a table.

Shapes: P prompts, S seeds, N captions of a pool, D embedding width.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..data_pipes.contact_sheet import write_png
from ..files import write_atomic, write_json
from .prompts import Pool, Prompt, choose
from .scoring import Objects, find, retrieval_values
from .sheets import Cell, contact_sheet
from .statistics import rank_scores

__all__ = ["RESULTS_FORMAT", "environment", "print_results", "write_results"]

RESULTS_FORMAT = "shapeloom-r-precision/1"
SHEET_PROMPTS = 24
WIDTH_IN_A_FILE = 140
PACKAGES = ("torch", "diffusers", "open_clip_torch", "numpy", "trimesh", "embreex")


def environment() -> dict[str, str]:
    """Versions and the machine, for the record."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def write_results(
    out: Path,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    pools: Sequence[Pool],
    text: Mapping[str, np.ndarray],
    generated: Objects,
    thumbnails: Mapping[str, np.ndarray],
) -> None:
    """Write everything into `out`, results.json last, and print the table.

    Args:
        record: what results.json holds.
        text: caption to unit embedding [D].
        thumbnails: "true" and "generated" (first seed), u8 [P, H, W, 3] each.
    """
    hardest = pools[-1]
    pool_ND = np.stack([text[caption] for caption in hardest.captions])
    hits_PN = hardest.hits(prompts)
    write_atomic(out / "per_prompt.csv", _csv(prompts, hardest, pool_ND, hits_PN, text, generated))
    right_P = retrieval_values(generated, pool_ND, hits_PN)[:, 0, 0] >= 0.5
    place = {prompt.uid: index for index, prompt in enumerate(prompts)}
    cells = []
    for prompt in choose(prompts, SHEET_PROMPTS):
        at = place[prompt.uid]
        pair = [thumbnails["true"][at], thumbnails["generated"][at]]
        cells.append(Cell(pair, prompt.caption, bool(right_P[at])))
    title = f"true | generated (seed {record['settings']['seeds'][0]}), right or wrong in the {hardest.name} pool"
    write_png(out / "contact_sheet.png", contact_sheet(cells, columns=4, title=title))
    write_json(out / "results.json", record)
    print_results(record)
    Console().print(f"written: {out}/results.json, per_prompt.csv, contact_sheet.png", highlight=False, soft_wrap=True)


def print_results(record: Mapping[str, Any]) -> None:
    """R@1 of every row, pool and group, then the two-way choice, then image conditioning."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_FILE)
    counts, settings = record["counts"], record["settings"]
    for pool, size in counts["pools"].items():
        title = f"R@1 in the {pool} pool ({size} captions), percent with 95 % interval"
        console.print(_table(title, record["rows"], pool, "r@1"))
    by_kind = [{**row, "group": row["pool"], "pool": "swaps"} for row in record["two_way"] if row["group"] == "all"]
    if by_kind:
        console.print(_table("caption or its swap, by kind of swap: accuracy, chance 50", by_kind, "swaps", "accuracy"))
    if record["image"]:
        console.print(_table("from a picture: R@1", record["image"], "images", "r@1"))
    console.print(
        f"{counts['prompts']} prompts x {len(settings['seeds'])} seed(s), {counts['empty']} of {counts['objects']} "
        f"meshes empty, seconds: {record['timings_s']}",
        highlight=False,
        soft_wrap=True,
    )
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _table(title: str, rows: Sequence[Mapping[str, Any]], pool: str, metric: str) -> Table:
    """Rows down, groups across."""
    chosen = [entry for entry in rows if entry["pool"] == pool]
    groups = {entry["group"]: entry[metric]["prompts"] for entry in chosen}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for group, count in groups.items():
        table.add_column(f"{group}\nn = {count}", justify="right")
    for row in dict.fromkeys(entry["row"] for entry in chosen):
        table.add_row(row, *(_cell(find(chosen, row, pool, group, metric)) for group in groups))
    return table


def _cell(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    mean, lo, hi = (100 * interval[name] for name in ("mean", "lo", "hi"))
    return f"{mean:.{1 + (mean < 1)}f}" if lo == hi else f"{mean:.1f} ({lo:.0f}–{hi:.0f})"


def _csv(
    prompts: Sequence[Prompt],
    pool: Pool,
    pool_ND: np.ndarray,
    hits_PN: np.ndarray,
    text: Mapping[str, np.ndarray],
    generated: Objects,
) -> str:
    """One line per prompt and seed: where its caption ranked in the pool and what was nearest."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["uid", "split", "parts", "caption", "seed_index", "empty", f"rank_{pool.name}", "cosine", "margin", "nearest"]
    )
    for place, prompt in enumerate(prompts):
        for seed in range(generated.empty.shape[1]):
            head = [prompt.uid, prompt.split, prompt.parts, prompt.caption, seed]
            if generated.empty[place, seed]:
                writer.writerow([*head, 1, "", "", "", ""])
                continue
            scores_N = pool_ND @ generated.embeddings[place, seed]
            ranks = rank_scores(scores_N[None], hits_PN[place : place + 1])
            rank = 1 + ranks.above_Q[0] + ranks.tied_Q[0] / 2
            own = float(generated.embeddings[place, seed] @ text[prompt.caption])
            wrong = scores_N[~hits_PN[place]].max(initial=-1.0)
            margin = f"{scores_N[hits_PN[place]].max() - wrong:.4f}"
            writer.writerow([*head, 0, f"{rank:g}", f"{own:.4f}", margin, pool.captions[int(scores_N.argmax())]])
    return buffer.getvalue()
