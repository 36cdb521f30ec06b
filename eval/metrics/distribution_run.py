"""How near a folder of generated meshes is, as a set, to a folder of reference meshes; nothing is matched.

Points: COV, MMD and 1-NNA of each object's surface. Features, where an evaluator is given: Fréchet distance, KID and
CMMD, one feature an object, the mean of its views' embeddings. Beside each number stands the same one between two
disjoint halves of the references, the floor that even a perfect generator has; where there is no number or no interval
stands the reason. The formulas and the least numbers of objects are in `distribution.py`.

What the worker processes load of this module imports no torch. Shapes: K objects, P points, V views, D features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...data_pipes.asset import prepare
from ...data_pipes.build import Guard
from ...data_pipes.limits import Limits, Rejected
from ...data_pipes.read import read_mesh
from ...data_pipes.sampling import Solid, sample_surface
from ...data_pipes.workers import Failed, isolated_map
from ...errors import UserError
from ...files import write_json
from ...progress import Bar
from ..environment import environment
from ..evaluators.registry import Evaluator, open_evaluator
from .distribution import Estimate, chamfer_matrix, cmmd, frechet_distance, kid, point_set_scores
from .mesh_files import ORBIT_WORDS, files_hash, mesh_files, orbit_pictures

__all__ = ["run"]

RESULTS_FORMAT = "shapeloom-distribution/1"
POINTS = 2048
DENSE_POINTS = 4 * POINTS  # what the outer ones are taken of
MOST_SETS = 1000  # a side: the work for COV, MMD and 1-NNA grows with the square
TOLD_FAILURES = 10
FEATURE_METRICS = ("frechet", "kid", "cmmd")
POINT_METRICS = ("cov", "mmd", "1-nna")
BETTER = {**dict.fromkeys((*FEATURE_METRICS, "mmd"), "lower"), "cov": "higher", "1-nna": "50 %"}
DEFINITIONS = {
    "frechet": "squared Fréchet distance of Gaussians fitted to the features (Heusel et al. 2017); falls with the "
    "number of objects, so it compares only at one number",
    "kid": "unbiased squared MMD with the kernel (x . y / D + 1)^3 (Bińkowski et al. 2018), not scaled",
    "cmmd": "1000 times the unbiased squared MMD with the Gaussian kernel of sigma 10 of unit features (Jayasumana et "
    "al. 2024, whose released code has the biased estimate)",
    "cov": "share of references that are the nearest reference of a generated object; higher is better",
    "mmd": "mean over references of the Chamfer distance to the nearest generated object; not squared, mean of both "
    "directions, object units (longest side 1.8)",
    "1-nna": "share of objects whose nearest other one, by Chamfer distance, is of their own side; more: they can be "
    "told apart, less: references are copied",
    "interval": "95 %, over objects, by halves of them without replacement",
    "noise_floor": "the same between two disjoint halves of the references",
    "objects": "each moved and scaled by its own box to a longest side of 1.8, not turned",
}
NO_INTERVAL = {
    "frechet": "biased by the number of objects, so parts of them have another mean",
    **dict.fromkeys(POINT_METRICS, "depends on the number of objects, so parts of them have another mean"),
}


@dataclass(frozen=True)
class _Job:
    path: str
    size: int | None
    limits: Limits


@dataclass(frozen=True)
class _Object:
    """points f32 [P, 3]; pictures u8 [V, H, W, 3] if they were asked for."""

    points: np.ndarray
    pictures: np.ndarray | None


@dataclass(frozen=True)
class _Side:
    """points f32 [K, P, 3] and features f32 [K, D] of the objects that could be read, and the files that could not."""

    points: np.ndarray
    features: np.ndarray | None
    failures: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.points)


def run(
    generated: str | Path,
    references: str | Path,
    out: str | Path,
    *,
    evaluator: str | Path | None = None,
    most_sets: int = MOST_SETS,
    workers: int = 1,
    allow_download: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare two folders of meshes as sets; writes results.json into `out`.

    Args:
        generated, references: folders of GLB, glTF, OBJ, OFF, PLY or STL files; names do not matter.
        evaluator: as `evaluators.open_evaluator` reads it, for Fréchet distance, KID and CMMD; None leaves them out.
        most_sets: at most so many objects a side are drawn for COV, MMD and 1-NNA, as many of either.
        workers: processes that read and render, then threads that compare points.
    Returns: what results.json holds.
    Raises: UserError for a folder without meshes, or without one that can be read, and whatever is wrong with the
        evaluator.
    """
    began = time.perf_counter()
    if workers < 1 or most_sets < 1:
        raise UserError(f"workers and most_sets must be at least 1, got {workers} and {most_sets}")
    files = {
        "generated": mesh_files(generated, "--generated"),
        "references": mesh_files(references, "--references"),
    }
    embedder = None
    if evaluator is not None:
        embedder = open_evaluator(str(evaluator), device=device, allow_download=allow_download)
    sides = {name: _take(name, some, embedder, workers) for name, some in files.items()}
    made, true = sides["generated"], sides["references"]
    metrics, floor = _point_scores(made, true, most_sets, workers)
    of_features, their_floor = _feature_scores(made.features, true.features)
    hashes = {name: files_hash(some) for name, some in files.items()}
    record = {
        "format": RESULTS_FORMAT,
        "settings": {
            "generated": str(generated),
            "references": str(references),
            "points": POINTS,
            "most_sets": most_sets,
            "views": ORBIT_WORDS if embedder else None,
        },
        "evaluator": {"name": embedder.facts.name, "image_size": embedder.facts.image_size} if embedder else None,
        "hashes": {**hashes, **({"evaluator": embedder.facts.hash} if embedder else {})},
        "definitions": DEFINITIONS,
        "objects": {name: len(side) for name, side in sides.items()},
        "failures": {name: side.failures for name, side in sides.items()},
        "metrics": {**of_features, **metrics},
        "noise_floor": {**their_floor, **floor},
        "timings_s": {"all": round(time.perf_counter() - began, 2)},
        "environment": environment(),
    }
    write_json(Path(out) / "results.json", record)
    _tell(record, Path(out))
    return record


# ----------------------------------------------------------------------------------------------------- files to arrays


def _take(side: str, files: list[Path], embedder: Evaluator | None, workers: int) -> _Side:
    """Read all files of a side, each in a worker; one that fails is left out and noted."""
    guard = Guard()
    jobs = [_Job(str(path), embedder.facts.image_size if embedder else None, guard.limits) for path in files]
    results = isolated_map(
        _describe,
        jobs,
        workers=workers,
        cpu_s=guard.cpu_s,
        wall_s=guard.wall_s,
        memory_bytes=guard.memory_bytes,
        prepare=prepare,
    )
    points, features, failures = [], [], []
    with Bar(len(jobs), f"reading {side}") as bar:
        for path, result in zip(files, results, strict=True):
            bar.update(1)
            if isinstance(result, Failed):
                failures.append({"file": path.name, "reason": result.reason})
                continue
            points.append(result.points)
            if embedder is not None and result.pictures is not None:
                features.append(_feature(embedder, result.pictures, path))
    if not points:
        raise UserError(
            f"none of the {len(files)} files in --{side} {files[0].parent} can be read, the first, "
            f"{failures[0]['file']}, because {failures[0]['reason']}"
        )
    return _Side(np.stack(points), np.stack(features) if features else None, failures)


def _describe(job: _Job) -> _Object | Failed:
    """Runs in a worker."""
    try:
        mesh, _ = read_mesh(job.path, job.limits).normalised()
    except Rejected as rejected:
        return Failed(str(rejected))
    points_P3 = sample_surface(Solid(mesh, DENSE_POINTS), POINTS, np.random.default_rng(0)).xyz
    return _Object(points_P3, orbit_pictures(mesh, job.size) if job.size else None)


def _feature(embedder: Evaluator, pictures_VHW3: np.ndarray, path: Path) -> np.ndarray:
    """The mean of the views' unit embeddings, of unit length again: [D]."""
    mean_D = embedder.embed_pictures(pictures_VHW3).mean(axis=0)
    length = np.linalg.norm(mean_D)
    if not (np.isfinite(length) and length > 0):
        raise UserError(f"the evaluator gives no finite embedding of {path}: it is damaged, or does not fit its config")
    return mean_D / length


# ---------------------------------------------------------------------------------------------------- arrays to scores


def _point_scores(made: _Side, true: _Side, most_sets: int, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """COV, MMD and 1-NNA, and between halves of the references; as many objects of either side, drawn at random."""
    count = min(len(made), len(true), most_sets)
    rng = np.random.default_rng(0)
    drawn = [side.points[rng.permutation(len(side))[:count]] for side in (made, true)]
    distances_KK = chamfer_matrix(np.concatenate(drawn), workers=workers, quiet=False)
    generated, references = np.arange(count), np.arange(count, 2 * count)
    halves = references[: count // 2], references[count // 2 : count // 2 * 2]

    def scores(some: np.ndarray, others: np.ndarray) -> dict[str, Any]:
        try:
            values = point_set_scores(distances_KK, some, others)
        except UserError as error:
            return {name: _entry(str(error), len(some), len(others)) for name in POINT_METRICS}
        return {name: _entry(values[name], len(some), len(others), NO_INTERVAL[name]) for name in POINT_METRICS}

    return scores(generated, references), scores(*halves)


def _feature_scores(made_KD: np.ndarray | None, true_KD: np.ndarray | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fréchet distance, KID and CMMD, and between halves of the references."""
    if made_KD is None or true_KD is None:
        missing = {name: _entry("it needs --evaluator, a CLIP folder", 0, 0) for name in FEATURE_METRICS}
        return missing, missing
    order = np.random.default_rng(0).permutation(len(true_KD))
    half = len(order) // 2

    def scores(some_ND: np.ndarray, others_MD: np.ndarray) -> dict[str, Any]:
        found = {}
        for name, metric in (("frechet", frechet_distance), ("kid", kid), ("cmmd", cmmd)):
            value: float | Estimate | str
            try:
                value = metric(some_ND, others_MD)
            except UserError as error:
                value = str(error)
            found[name] = _entry(value, len(some_ND), len(others_MD), NO_INTERVAL.get(name, ""))
        return found

    return scores(made_KD, true_KD), scores(true_KD[order[:half]], true_KD[order[half : 2 * half]])


def _entry(value: float | Estimate | str, n_generated: int, n_references: int, no_interval: str = "") -> dict[str, Any]:
    """A score for results.json; a text is the reason why there is none."""
    entry = {"value": None, "lo": None, "hi": None, "n": [n_generated, n_references], "reason": ""}
    if isinstance(value, str):
        return {**entry, "reason": value}
    if isinstance(value, Estimate):
        return {**entry, **value.to_json()}
    return {**entry, "value": value, "reason": f"no interval: {no_interval}"}


def _tell(record: Mapping[str, Any], out: Path) -> None:
    objects = record["objects"]
    title = f"{objects['generated']} generated objects and {objects['references']} references, as sets"
    table = Table(title=title, title_justify="left")
    for column in ("", "value", "95 % interval", "noise floor", "better"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in record["metrics"].items():
        interval = "–" if score["lo"] is None else f"{score['lo']:.4g} to {score['hi']:.4g}"
        floor = record["noise_floor"][name]
        beside = "–" if floor["value"] is None else f"{floor['value']:.4g} ({floor['n'][0]} each)"
        table.add_row(name, "–" if score["value"] is None else f"{score['value']:.4g}", interval, beside, BETTER[name])
    console = Console()
    console.print(table)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for reason in dict.fromkeys(score["reason"] for score in record["metrics"].values()):
        names = [name for name, score in record["metrics"].items() if score["reason"] == reason]
        if reason:
            say(f"{', '.join(names)}: {reason}")
    for name, floor in record["noise_floor"].items():
        if floor["value"] is None and record["metrics"][name]["value"] is not None:
            say(f"{name}, noise floor: {floor['reason']}")
    used = record["metrics"]["1-nna"]["n"][0]
    if used < max(objects.values()):
        say(f"cov, mmd, 1-nna: of {used} objects a side, drawn at random")
    for name in ("mmd", "noise_floor", "objects"):
        say(f"{name}: {record['definitions'][name]}")
    for side, failures in record["failures"].items():
        for entry in failures[:TOLD_FAILURES]:
            say(f"{side}, left out: {entry['file']}: {entry['reason']}")
        if (more := len(failures) - TOLD_FAILURES) > 0:
            say(f"{side}, left out: {more} more, in results.json")
    say(f"written: {out}/results.json")
