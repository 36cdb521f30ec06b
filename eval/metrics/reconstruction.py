"""How near reconstructions, or generated meshes, are to the objects that they stand for.

`run` takes held-out assets through an autoencoder; `run_folders` takes two folders of mesh files, matched by name. Both
write results.json, per_object.csv and contact_sheet.png. What each score is, with its units and what a failure counts,
stands in results.json under "definitions"; the formulas are in `surfaces.py` and `pictures.py`.

Shapes: V views, N points, P field points, L latents of C channels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...data_pipes.contact_sheet import write_png
from ...data_pipes.raw_sample import decode_field, decode_webp
from ...data_pipes.remote_shards import open_shards
from ...data_pipes.render import composite, render
from ...data_pipes.shard_folder import ShardFolder
from ...data_pipes.workers import Failed
from ...errors import UserError
from ...files import write_atomic, write_json
from ...models.autoencoder import Autoencoder
from ...models.cameras import Cameras
from ...models.hashing import weights_hash
from ...models.mesh import extract_mesh
from ...progress import Bar
from ..benchmark.prompts import TEST_SPLITS
from ..benchmark.statistics import Interval, cluster_bootstrap
from ..encode import encode_stored
from ..environment import environment
from ..meshes import is_empty, to_mesh
from ..sheets import Cell, contact_sheet
from ..stored import ENCODED_POINTS, surface_rows
from .mesh_files import ORBIT_WORDS, files_hash, mesh_files
from .mesh_pairs import ALIGNMENTS, SURFACE_POINTS, Pair, PairJob, compare_all
from .pictures import DEFINITIONS as PICTURE_DEFINITIONS
from .pictures import SMALLEST, Lpips, PictureMetric, available
from .surfaces import THRESHOLDS, iou, points_on, surface_scores

__all__ = ["run", "run_folders"]

RESULTS_FORMAT = "shapeloom-reconstruction/2"
SHEET_OBJECTS = 24
SHEET_VIEW = 1  # of the orbit: from 45 degrees, where two sides are seen
PICTURE_SIZE = 128
TOLD_FAILURES = 10  # printed; results.json has them all
F_SCORES = tuple(f"f@{threshold}" for threshold in THRESHOLDS)
SHARES = ("iou", *F_SCORES, "normal_consistency")
DEFINITIONS = {
    "chamfer": "mean of both directions, L2 not squared, object units (longest side 1.8); those without a surface are "
    "left out",
    "f_score": "harmonic mean of precision and recall within the threshold that its name gives, object units "
    f"({', '.join(f'{t} is {t / 1.8:.1%} of the longest side' for t in THRESHOLDS)}); 0 without a surface",
    "normal_consistency": "mean absolute cosine of the normals at nearest points, mean of both directions; 0 without "
    "a surface",
}


def run(
    autoencoder: str | Path | Autoencoder,
    data: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    count: int | None = None,
    resolution: int = 64,
    device: str | None = None,
) -> dict[str, Any]:
    """Score reconstructions of held-out assets; writes results.json, per_object.csv and contact_sheet.png into `out`.

    Args:
        autoencoder: an autoencoder folder or a pipeline folder.
        data: a folder of raw shards, or a URL.
        split: of the data; None takes every test split.
        count: at most so many assets, spread evenly over the split.
        resolution: mesh cells along each axis.
    Returns: what results.json holds.
    Raises: UserError for data without such a split, and whatever is wrong with the folders.
    """
    began = time.perf_counter()
    if count is not None and count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    folder = open_shards(data)
    indices = _held_out(folder, split, count)
    model = _open(autoencoder)
    model = model.to(device) if device else model
    metrics, notes = available()
    size = min(_stored_views(folder, indices[0])[0].shape[1:3])
    if size < SMALLEST and metrics:
        metrics, notes = {}, [f"the stored views have {size} pixels, PSNR, SSIM and LPIPS need {SMALLEST}"]
    shown, rows, cells = _shown(len(indices)), [], []
    with Bar(len(indices), "reconstructing") as bar:
        for place, index in enumerate(indices):
            row, pair = _score_one(model, folder, index, resolution, metrics)
            rows.append(row)
            if place in shown:
                captions = folder.read_json(index).get("captions") or [folder.uids[index]]
                cells.append(Cell(pair, f"{captions[0]}  (IoU {row['iou']:.2f})"))
            bar.update(1, iou=row["iou"])
    record = {
        "settings": {"split": split or "all test splits", "count": len(indices), "resolution": resolution},
        "hashes": {"data": folder.hash, "autoencoder": weights_hash(model), **_hashes(metrics)},
        "definitions": {
            "iou": "sdf < 0 at stored uniform points, near-surface points left out",
            "color_l1": "mean absolute sRGB difference in 0..1 at stored surface points",
            **DEFINITIONS,
            "points": f"at most {ENCODED_POINTS} a side, stored ones and as many drawn from the mesh; "
            + _floor(ENCODED_POINTS),
            "alignment": "none: the frame is shared",
            "pictures": "lit, on white, from the cameras of the stored views; white without a surface",
        },
        "empty": sum(row["empty"] for row in rows),
        "notes": notes,
    }
    title = "original | reconstruction, the original's own camera"
    return _write(Path(out), record, rows, ("iou", "color_l1"), metrics, cells, title, began)


def run_folders(
    generated: str | Path,
    references: str | Path,
    out: str | Path,
    *,
    align: str = "box",
    points: int = SURFACE_POINTS,
    size: int = PICTURE_SIZE,
    workers: int = 1,
) -> dict[str, Any]:
    """Score each mesh file of one folder against the file of the same stem in another; writes as `run` does.

    A reference without a readable counterpart is a failure: it stays in every mean, with shares of 0 and white
    pictures, and only the Chamfer distance leaves it out. A reference that cannot be read itself is left out and told.

    Args:
        generated, references: folders of GLB, glTF, OBJ, OFF, PLY or STL files.
        align: one of `mesh_pairs.ALIGNMENTS`.
        points: on each surface, and in space for the IoU.
        size: of the pictures, in pixels.
        workers: processes that read and compare.
    Returns: what results.json holds.
    Raises: UserError for a folder without meshes, stems that are not unique, no stem in common, no reference that can
        be read, or settings out of range.
    """
    began = time.perf_counter()
    if align not in ALIGNMENTS:
        raise UserError(f"--align {align!r} is not known: choose one of {', '.join(ALIGNMENTS)}")
    if size < SMALLEST or points < 1 or workers < 1:
        raise UserError(
            f"size must be at least {SMALLEST}, points and workers at least 1, got {size}, {points} and {workers}"
        )
    theirs, ours = (_by_stem(folder, f"--{o}") for folder, o in ((references, "references"), (generated, "generated")))
    if not set(ours) & set(theirs):
        raise UserError(
            f"no file in {generated} has the name of one in {references}, suffixes aside: a generated mesh is matched "
            "with the reference of its name, such as chair.ply with chair.glb"
        )
    metrics, notes = available()
    missing = f"there is no mesh of this name in {generated}"
    jobs = [
        PairJob(str(ours[stem]), str(path), align, size, points)
        if stem in ours
        else PairJob(None, str(path), align, size, points, failure=missing)
        for stem, path in theirs.items()
    ]
    stems, shown, rows, cells, unusable = list(theirs), _shown(len(jobs)), {}, {}, []
    with Bar(len(jobs), "comparing") as bar:
        for place, pair in compare_all(jobs, workers):
            stem = stems[place]
            bar.update(1)
            if isinstance(pair, Failed):
                unusable.append({"id": stem, "reason": pair.reason})
                continue
            rows[place] = _pair_row(stem, pair, metrics)
            if place in shown:
                told = pair.failure or f"F@{THRESHOLDS[-1]} {pair.scores[F_SCORES[-1]]:.2f}"
                seen = [pair.reference[SHEET_VIEW], pair.generated[SHEET_VIEW]]
                cells[place] = Cell(seen, f"{stem.replace('_', ' ')}  ({told})", False if pair.failure else None)
    if not rows:
        raise UserError(
            f"none of the references in {references} can be read, the first because {unusable[0]['reason']}"
        )
    in_order = [rows[place] for place in sorted(rows)]
    failures = [{"id": row["uid"], "reason": row["failure"]} for row in in_order if row["failure"]]
    record = {
        "settings": {
            "generated": str(generated),
            "references": str(references),
            "align": align,
            "count": len(in_order),
            "points": points,
            "size": size,
        },
        "hashes": {
            "generated": files_hash(list(ours.values())),
            "references": files_hash(list(theirs.values())),
            **_hashes(metrics),
        },
        "definitions": {
            "iou": "of what lies inside by the vote of rays, at uniform points around both, open meshes included; 0 "
            "without a surface, and those where neither has an inside are left out",
            **DEFINITIONS,
            "points": f"{points} a side on the outer surface; {_floor(points)}",
            "alignment": f"{align}: {ALIGNMENTS[align]}",
            "pictures": f"{ORBIT_WORDS}, {size} pixels; white without a surface",
        },
        "empty": len(failures),
        "failures": failures,
        "unusable_references": unusable,
        "extra": sorted(set(ours) - set(theirs)),
        "notes": notes,
    }
    title = "reference | generated, both from the same camera"
    shown_cells = [cells[place] for place in sorted(cells)]
    return _write(Path(out), record, in_order, ("iou",), metrics, shown_cells, title, began)


@torch.inference_mode()
def _score_one(
    model: Autoencoder, folder: ShardFolder, index: int, resolution: int, metrics: Mapping[str, PictureMetric]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Scores of one asset; and its first stored view beside its reconstruction's."""
    uid = folder.uids[index]
    surface_N9 = surface_rows(folder, index)
    field = model.decode(encode_stored(model, folder, [index]))
    mesh = extract_mesh(field, resolution)[0]
    stored = decode_field(folder.read(index, ["field.npz"])["field.npz"], f"{uid}.field.npz")
    n_near = folder.manifest["settings"].get("n_near")  # they come first
    if n_near is None or n_near >= len(stored["sdf"]):
        raise UserError(f"sample {uid} in {folder.folder} has no uniform field points; build the data with them")
    rgb_N3 = field(torch.from_numpy(surface_N9[None, :, :3]).to(model.device)).rgb_BP3[0].cpu().numpy()
    empty = is_empty(mesh)
    row: dict[str, Any] = {
        "uid": uid,
        "iou": iou(field, stored["xyz"][n_near:], stored["sdf"][n_near:]),
        "color_l1": float(np.abs(np.clip(rgb_N3, 0, 1) - surface_N9[:, 6:]).mean()),
        "chamfer": float("nan"),
        **dict.fromkeys(F_SCORES, 0.0),
        "normal_consistency": 0.0,
        "empty": empty,
    }
    originals, cameras = _stored_views(folder, index)
    again = np.full_like(originals, 255)
    if not empty:
        xyz_N3, normal_N3 = points_on(mesh.vertices[mesh.faces], len(surface_N9), np.random.default_rng(0))
        row |= surface_scores(surface_N9[:, :3], surface_N9[:, 3:6], xyz_N3, normal_N3)
        again = composite(render(to_mesh(mesh), cameras if metrics else cameras[[0]]).lit)
    row |= {name: float(metric(again, originals).mean()) for name, metric in metrics.items()}
    return row, [originals[0], again[0]]


def _stored_views(folder: ShardFolder, index: int) -> tuple[np.ndarray, Cameras]:
    """All stored lit views on white, u8 [V, H, W, 3], and their cameras."""
    names = sorted(name for name in folder.suffixes(index) if name.startswith("lit_"))
    if not names:
        raise UserError(f"sample {folder.uids[index]} in {folder.folder} has no lit views; build the data with views")
    stored = folder.read(index, [*names, "cameras.json"])
    images = [decode_webp(stored[name], f"{folder.uids[index]}.{name}") for name in names]
    return composite(np.stack(images)), Cameras.from_json(json.loads(stored["cameras.json"]))


def _pair_row(stem: str, pair: Pair, metrics: Mapping[str, PictureMetric]) -> dict[str, Any]:
    """A line of per_object.csv."""
    pictures = {name: float(metric(pair.generated, pair.reference).mean()) for name, metric in metrics.items()}
    return {"uid": stem, **pair.scores, **pictures, "turn_deg": pair.turn_deg, "failure": pair.failure}


def _by_stem(folder: str | Path, option: str) -> dict[str, Path]:
    """The mesh files of a folder by their name without suffix."""
    found: dict[str, Path] = {}
    for path in mesh_files(folder, option):
        if path.stem in found:
            raise UserError(
                f"{option} {folder} has {found[path.stem].name} and {path.name}: keep one of them, meshes are matched "
                "by their names without suffix"
            )
        found[path.stem] = path
    return found


def _held_out(folder: ShardFolder, split: str | None, count: int | None) -> list[int]:
    """Indices of the assets to score."""
    if split is None:
        indices = [index for index in range(len(folder.uids)) if folder.splits(index) in TEST_SPLITS]
    else:
        indices = folder.select(split)
    if not indices:
        raise UserError(f"{folder.folder} has no sample in a test split; name another with --split, for example val")
    if count is None or count >= len(indices):
        return indices
    return [indices[place] for place in np.linspace(0, len(indices) - 1, count).round().astype(int)]


def _open(autoencoder: str | Path | Autoencoder) -> Autoencoder:
    """From an autoencoder folder or a pipeline folder."""
    if not isinstance(autoencoder, (str, Path)):
        return autoencoder
    from ...checkpoints.folders import load_model_folder

    folder = Path(autoencoder)
    return load_model_folder(Autoencoder, folder / "autoencoder" if (folder / "model_index.json").exists() else folder)


# ------------------------------------------------------------------------------------------------ what both forms write


def _write(
    out: Path,
    record: dict[str, Any],
    rows: Sequence[Mapping[str, Any]],
    first: Sequence[str],
    metrics: Mapping[str, PictureMetric],
    cells: Sequence[Cell],
    title: str,
    began: float,
) -> dict[str, Any]:
    """Write everything into `out`, results.json last, and print the table; gives what results.json holds.

    Args:
        first: names of the scores that stand above those of surfaces and pictures.
    """
    names = (*first, "chamfer", *F_SCORES, "normal_consistency", *metrics)
    record["definitions"] |= {name: PICTURE_DEFINITIONS[name] for name in metrics}
    record = {
        "format": RESULTS_FORMAT,
        **record,
        "scores": {name: score.to_json() for name in names if (score := _mean(rows, name))},
        "timings_s": {"all": round(time.perf_counter() - began, 2)},
        "environment": environment(),
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_text(value) for value in row.values()] for row in rows)
    write_atomic(out / "per_object.csv", buffer.getvalue())
    if cells:
        write_png(out / "contact_sheet.png", contact_sheet(cells, columns=4, title=title))
    write_json(out / "results.json", record)
    _tell(record, out)
    return record


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> Interval | None:
    """Mean over the objects that have the score, with its 95 % bootstrap interval."""
    values = np.array([row[name] for row in rows if np.isfinite(row[name])])
    if not len(values):
        return None
    return cluster_bootstrap(values[:, None, None], shares=name in SHARES)[0]


def _floor(points: int) -> str:
    """What a perfect copy scores for the sampling alone (`surfaces.py`)."""
    per_area = points / (6 * 1.8**2)
    chamfer, share = 0.5 / math.sqrt(per_area), 1 - math.exp(-math.pi * per_area * THRESHOLDS[0] ** 2)
    return f"two samplings of a cube have a Chamfer distance of {chamfer:.4f} and {F_SCORES[0]} of {share:.2f}"


def _hashes(metrics: Mapping[str, PictureMetric]) -> dict[str, str]:
    return {name: metric.sha256 for name, metric in metrics.items() if isinstance(metric, Lpips)}


def _shown(count: int) -> set[int]:
    """Which of so many objects the contact sheet shows."""
    return set(np.linspace(0, count - 1, min(SHEET_OBJECTS, count)).round().astype(int).tolist())


def _text(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


def _tell(record: Mapping[str, Any], out: Path) -> None:
    table = Table(title=f"{record['settings']['count']} objects and their originals", title_justify="left")
    for column in ("", "mean", "95 % interval", "objects"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in record["scores"].items():
        interval = f"{score['lo']:.4f}–{score['hi']:.4f}"
        table.add_row(name, f"{score['mean']:.4f}", interval, str(score["prompts"]))
    console = Console()
    console.print(table)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for name in ("chamfer", "f_score", "points", "alignment"):
        say(f"{name}: {record['definitions'][name]}")
    say(f"without a surface: {record['empty']} of {record['settings']['count']}")
    for kind in ("failures", "unusable_references"):
        for entry in record.get(kind, [])[:TOLD_FAILURES]:
            say(f"{'failed' if kind == 'failures' else 'reference left out'}: {entry['id']}: {entry['reason']}")
        if (more := len(record.get(kind, [])) - TOLD_FAILURES) > 0:
            say(f"and {more} more {kind.replace('_', ' ')} in results.json")
    if extra := record.get("extra"):
        say(f"generated without a reference, not scored: {len(extra)}, the first is {extra[0]}")
    for note in record["notes"]:
        say(f"note: {note}")
    say(f"written: {out}/results.json, per_object.csv, contact_sheet.png")
