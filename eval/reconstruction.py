"""How well an autoencoder gives held-out assets back: IoU, colour, Chamfer, F-score, and originals beside results.

Definitions, all in the normalised object frame (longest side 1.8):
IoU: occupied (signed distance < 0) by truth and by the decoded field, at the stored uniform points of [-1, 1]^3;
near-surface points are left out. Colour: mean absolute difference of sRGB in [0, 1] at the stored surface points.
Chamfer: mean over both directions of the mean distance to the nearest point (L2, not squared) between stored surface
points and as many points drawn uniformly from the extracted mesh. F-score at t: harmonic mean of the shares of either
set that lie within t of the other. No alignment is done. Objects without a surface have F-score 0, no Chamfer, and are
counted.

Shapes: K objects, N points, P field points, L latents of C channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.spatial import cKDTree

from ..data_pipes.contact_sheet import write_png
from ..data_pipes.raw_sample import decode_field
from ..data_pipes.render import composite, render
from ..data_pipes.shards import ShardFolder
from ..errors import UserError
from ..files import write_atomic, write_json
from ..models.autoencoder import Autoencoder
from ..models.cameras import Cameras
from ..models.decoder import ImplicitField
from ..models.hashing import weights_hash
from ..models.mesh import ExtractedMesh, extract_mesh
from ..progress import Bar
from .prompts import TEST_SPLITS
from .renders import is_empty, to_mesh
from .results import environment
from .sheets import Cell, contact_sheet
from .statistics import cluster_bootstrap
from .stored import ENCODED_POINTS, encode_stored, frontal_pictures, surface_rows

__all__ = ["chamfer_and_f_scores", "iou", "points_on", "run"]

RESULTS_FORMAT = "shapeloom-reconstruction/1"
THRESHOLDS = (0.02, 0.05)
SHEET_OBJECTS = 24


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
        data: a folder of raw shards.
        split: of the data; None takes every test split.
        count: at most so many assets, spread evenly over the split.
        resolution: mesh cells along each axis.
    Returns: what results.json holds.
    Raises: UserError for data without such a split, and whatever is wrong with the folders.
    """
    began = time.perf_counter()
    if count is not None and count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    folder = ShardFolder(data)
    indices = _held_out(folder, split, count)
    model = _open(autoencoder)
    model = model.to(device) if device else model
    shown = set(np.linspace(0, len(indices) - 1, min(SHEET_OBJECTS, len(indices))).round().astype(int).tolist())
    rows, cells = [], []
    with Bar(len(indices), "reconstructing") as bar:
        for place, index in enumerate(indices):
            scores, mesh = _score_one(model, folder, index, resolution)
            rows.append(scores)
            if place in shown:
                cells.append(_cell(folder, index, mesh, scores))
            bar.update(1, iou=scores["iou"])
    record = {
        "format": RESULTS_FORMAT,
        "settings": {"split": split or "all test splits", "count": len(indices), "resolution": resolution},
        "hashes": {"data": folder.hash, "autoencoder": weights_hash(model)},
        "definitions": {
            "iou": "sdf < 0 at stored uniform points, near-surface points left out; mean over objects",
            "color_l1": "mean absolute sRGB difference in 0..1 at stored surface points",
            "chamfer": f"mean of both directions, unsquared L2, at most {ENCODED_POINTS} points a side, object units "
            "(longest side 1.8), no alignment, objects without a surface left out",
            "f_score": "harmonic mean of precision and recall at the threshold, object units; 0 without a surface",
        },
        "scores": _summary(rows),
        "empty": sum(row["empty"] for row in rows),
        "timings_s": {"all": round(time.perf_counter() - began, 2)},
        "environment": environment(),
    }
    out = Path(out)
    names = list(rows[0])
    lines = [",".join(names), *(",".join(_text(row[name]) for name in names) for row in rows)]
    write_atomic(out / "per_object.csv", "\n".join(lines) + "\n")
    sheet = contact_sheet(cells, columns=4, title="original | reconstruction, the original's own camera")
    write_png(out / "contact_sheet.png", sheet)
    write_json(out / "results.json", record)
    _tell(record, out)
    return record


def iou(field: ImplicitField, points_P3: np.ndarray, sdf_P: np.ndarray) -> float:
    """Intersection over union of the insides of a field of one object and the truth; 1 where both are empty."""
    points_1P3 = torch.from_numpy(np.ascontiguousarray(points_P3, np.float32))[None].to(field.device)
    inside_P = field(points_1P3).sdf_BP[0].cpu().numpy() < 0
    union = (inside_P | (sdf_P < 0)).sum()
    return float((inside_P & (sdf_P < 0)).sum() / union) if union else 1.0


def chamfer_and_f_scores(
    points_N3: np.ndarray, others_N3: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[float, list[float]]:
    """Chamfer distance and an F-score per threshold of two sets of points (definitions: the head of this file).

    Example: two equal sets shifted by d, less than half their spacing, have Chamfer d.
    """
    there_N = cKDTree(others_N3).query(points_N3)[0]
    back_N = cKDTree(points_N3).query(others_N3)[0]
    scores = []
    for threshold in thresholds:
        precision, recall = (there_N <= threshold).mean(), (back_N <= threshold).mean()
        scores.append(float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0)
    return float((there_N.mean() + back_N.mean()) / 2), scores


def points_on(triangles_F33: np.ndarray, n_points: int, rng: np.random.Generator) -> np.ndarray:
    """Points drawn uniformly by area from triangles, [N, 3]; all surfaces count, inner ones too."""
    origin_F3, u_F3, v_F3 = triangles_F33[:, 0], *(triangles_F33[:, k] - triangles_F33[:, 0] for k in (1, 2))
    areas_F = np.linalg.norm(np.cross(u_F3, v_F3), axis=1).astype(np.float64)
    face_N = rng.choice(len(areas_F), size=n_points, p=areas_F / areas_F.sum())
    a_N1, b_N1 = rng.random((2, n_points, 1))
    a_N1, b_N1 = np.where(a_N1 + b_N1 > 1, (1 - a_N1, 1 - b_N1), (a_N1, b_N1))  # the far half of the square, folded
    return origin_F3[face_N] + a_N1 * u_F3[face_N] + b_N1 * v_F3[face_N]


@torch.inference_mode()
def _score_one(
    model: Autoencoder, folder: ShardFolder, index: int, resolution: int
) -> tuple[dict[str, Any], ExtractedMesh]:
    """Scores of one asset, and its reconstruction."""
    uid = folder.uids[index]
    surface_N9 = surface_rows(folder, index)
    field = model.decode(encode_stored(model, folder, [index]))
    mesh = extract_mesh(field, resolution)[0]
    stored = decode_field(folder.read(index, ["field.npz"])["field.npz"], f"{uid}.field.npz")
    n_near = folder.manifest["settings"].get("n_near")  # they come first
    if n_near is None or n_near >= len(stored["sdf"]):
        raise UserError(f"sample {uid} in {folder.folder} has no uniform field points; build the data with them")
    rgb_N3 = field(torch.from_numpy(surface_N9[None, :, :3]).to(model.device)).rgb_BP3[0].cpu().numpy()
    scores: dict[str, Any] = {
        "uid": uid,
        "iou": iou(field, stored["xyz"][n_near:], stored["sdf"][n_near:]),
        "color_l1": float(np.abs(np.clip(rgb_N3, 0, 1) - surface_N9[:, 6:]).mean()),
        "chamfer": float("nan"),
        **{f"f@{threshold}": 0.0 for threshold in THRESHOLDS},
        "empty": is_empty(mesh),
    }
    if not scores["empty"]:
        drawn_N3 = points_on(mesh.vertices[mesh.faces], len(surface_N9), np.random.default_rng(0))
        scores["chamfer"], f_scores = chamfer_and_f_scores(surface_N9[:, :3], drawn_N3)
        scores |= {f"f@{threshold}": score for threshold, score in zip(THRESHOLDS, f_scores, strict=True)}
    return scores, mesh


def _cell(folder: ShardFolder, index: int, mesh: ExtractedMesh, scores: dict[str, Any]) -> Cell:
    """The stored first view, and the reconstruction from the same camera."""
    original = frontal_pictures(folder, index, first_only=True)[0]
    cameras = Cameras.from_json(json.loads(folder.read(index, ["cameras.json"])["cameras.json"]))[[0]]
    again = np.full_like(original, 255) if is_empty(mesh) else composite(render(to_mesh(mesh), cameras).lit)[0]
    captions = folder.read_json(index).get("captions") or [folder.uids[index]]
    return Cell([original, again], f"{captions[0]}  (IoU {scores['iou']:.2f})")


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
    from ..checkpoints.folders import load_model_folder

    folder = Path(autoencoder)
    return load_model_folder(Autoencoder, folder / "autoencoder" if (folder / "model_index.json").exists() else folder)


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Mean over objects with a 95 % bootstrap interval of each score; Chamfer over objects that have one."""
    summary = {}
    for name in ("iou", "color_l1", "chamfer", *(f"f@{threshold}" for threshold in THRESHOLDS)):
        values = np.array([row[name] for row in rows if np.isfinite(row[name])])
        if len(values):
            summary[name] = cluster_bootstrap(values[:, None, None])[0].to_json()
    return summary


def _text(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


def _tell(record: dict[str, Any], out: Path) -> None:
    table = Table(title=f"reconstruction of {record['settings']['count']} assets", title_justify="left")
    for column in ("", "mean", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in record["scores"].items():
        table.add_row(name, f"{score['mean']:.4f}", f"{score['lo']:.4f}–{score['hi']:.4f}")
    console = Console()
    console.print(table)
    console.print(f"empty: {record['empty']}; chamfer: {record['definitions']['chamfer']}", highlight=False)
    console.print(f"written: {out}/results.json, per_object.csv, contact_sheet.png", highlight=False, soft_wrap=True)
