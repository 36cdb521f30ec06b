"""Pairs of mesh files compared, each pair in a worker process that may hang, run out of memory or die.

This module imports no torch: it is what those processes load.

Shapes: V views, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...data_pipes.asset import prepare
from ...data_pipes.build import Guard
from ...data_pipes.limits import Rejected
from ...data_pipes.mesh import Mesh
from ...data_pipes.read import read_mesh
from ...data_pipes.sampling import Solid, sample_surface
from ...data_pipes.workers import Failed, isolated_map
from .mesh_files import orbit_pictures
from .surfaces import THRESHOLDS, chamfer_and_f_scores, mesh_iou, points_on, surface_scores

__all__ = ["ALIGNMENTS", "FAILED", "SURFACE_POINTS", "Pair", "PairJob", "aligned", "compare_all", "compare_meshes"]

ALIGNMENTS = {
    "none": "one frame is shared: both are moved and scaled as the reference's box asks for",
    "box": "each is moved and scaled by its own box",
    "yaw4": "of 4 turns about +Y, each followed by moving and scaling by its own box, the one of least Chamfer",
    "yaw24": "of 24 turns about +Y, each followed by moving and scaling by its own box, the one of least Chamfer",
}
TURNS = {"yaw4": 4, "yaw24": 24}
SURFACE_POINTS = 1 << 16
TURN_POINTS = 2048  # enough to choose a turn by
GUARD = Guard(cpu_s=120)
FAILED = {"iou": 0.0, "chamfer": float("nan"), **{f"f@{t}": 0.0 for t in THRESHOLDS}, "normal_consistency": 0.0}


@dataclass(frozen=True)
class PairJob:
    """Two files to compare.

    Args:
        generated: None where it is known to have failed, for the reason `failure`; the reference is then rendered.
        align: one of `ALIGNMENTS`.
        size: of the pictures, in pixels.
        points: on each surface, and in space for the IoU.
    """

    generated: str | None
    reference: str
    align: str
    size: int
    points: int = SURFACE_POINTS
    failure: str = ""
    guard: Guard = GUARD


@dataclass(frozen=True)
class Pair:
    """What came of it.

    Args:
        scores: by name; those of `FAILED` where `failure` says why there is no generated object.
        turn_deg: about +Y, that the generated object was given.
        generated, reference: u8 [V, H, W, 3]; white for an object that is not there.
    """

    scores: dict[str, float]
    turn_deg: float
    generated: np.ndarray
    reference: np.ndarray
    failure: str = ""


def compare_all(jobs: Sequence[PairJob], workers: int) -> Iterator[tuple[int, Pair | Failed]]:
    """The place of each job and what came of it, as soon as that is known; `Failed` is a reference of no use.

    A pair that took its process with it is tried again without the generated file: so the guilty one is found.
    """

    def results(some: Sequence[PairJob]) -> Iterator[Pair | Failed]:
        guard = some[0].guard if some else GUARD
        return isolated_map(
            _compare_files,
            some,
            workers=workers,
            cpu_s=guard.cpu_s,
            wall_s=guard.wall_s,
            memory_bytes=guard.memory_bytes,
            prepare=prepare,
        )

    failed = {}
    for place, result in enumerate(results(jobs)):
        if isinstance(result, Failed):
            failed[place] = replace(jobs[place], generated=None, failure=jobs[place].failure or result.reason)
        else:
            yield place, result
    yield from zip(failed, results(list(failed.values())), strict=True)


def compare_meshes(generated: Mesh, reference: Mesh, points: int = SURFACE_POINTS) -> dict[str, float]:
    """Scores of two meshes in the normalised object frame: the keys of `FAILED`.

    Surfaces are the outer ones (`data_pipes.sampling`): what is hidden inside of a reference, no generator is asked
    for.

    Args:
        points: on each surface, and in space for the IoU.
    """
    solids = [Solid(mesh, points) for mesh in (generated, reference)]
    ours, theirs = (sample_surface(solid, points, np.random.default_rng(0)) for solid in solids)
    return {
        "iou": mesh_iou(*solids, n_points=points),
        **surface_scores(ours.xyz, ours.normal, theirs.xyz, theirs.normal),
    }


def aligned(mesh: Mesh, reference: Mesh, align: str) -> tuple[Mesh, float]:
    """A mesh in the reference's normalised frame, and the turn about +Y in degrees that it was given.

    Args:
        mesh, reference: as they were read.
        align: one of `ALIGNMENTS`.
    """
    normalised_reference, to_reference_44 = reference.normalised()
    if align == "none":
        return mesh.transformed(np.linalg.inv(to_reference_44)), 0.0
    if align == "box":
        return mesh.normalised()[0], 0.0
    theirs = points_on(normalised_reference.triangles, TURN_POINTS, np.random.default_rng(0))[0]

    def distance(turned: Mesh) -> float:
        return chamfer_and_f_scores(points_on(turned.triangles, TURN_POINTS, np.random.default_rng(1))[0], theirs)[0]

    angles_deg = [360 / TURNS[align] * turn for turn in range(TURNS[align])]
    distances = [distance(_turned(mesh, angle)) for angle in angles_deg]
    best = angles_deg[int(np.argmin(distances))]
    return _turned(mesh, best), best


def _turned(mesh: Mesh, angle_deg: float) -> Mesh:
    """Turned about +Y, counter-clockwise seen from above, then normalised by its new box."""
    cos, sin = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    matrix_44 = np.array([[cos, 0, sin, 0], [0, 1, 0, 0], [-sin, 0, cos, 0], [0, 0, 0, 1]])
    return mesh.transformed(matrix_44).normalised()[0]


def _compare_files(job: PairJob) -> Pair | Failed:
    """Runs in a worker."""
    try:
        reference = read_mesh(job.reference, job.guard.limits)
    except Rejected as rejected:
        return Failed(str(rejected))
    normalised, _ = reference.normalised()
    pictures = orbit_pictures(normalised, job.size)
    failure = job.failure
    if job.generated is not None:
        try:
            mesh, turn_deg = aligned(read_mesh(job.generated, job.guard.limits), reference, job.align)
            scores = compare_meshes(mesh, normalised, job.points)
            return Pair(scores, turn_deg, orbit_pictures(mesh, job.size), pictures)
        except Rejected as rejected:
            failure = str(rejected)
    return Pair(FAILED, 0.0, orbit_pictures(None, job.size), pictures, failure)
