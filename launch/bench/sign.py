"""How often the field's sign is wrong where faces are missing: watertight meshes, 2 % of whose faces are taken out.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.sign              # 50 meshes: 2 minutes

Meshes: files of the pack that are watertight and wound alike once equal corners are joined (trimesh), each of whose
bodies has a positive volume and that have 200 to 4000 faces (so that 2 % are several, and no half of the shape); drawn
with a seed. Where there are too few, spheres, tori, capsules and boxes make up the number.

Truth: the generalised winding number of the whole mesh above one half (Jacobson et al. 2013), the sum of the solid
angles of all its faces by Van Oosterom and Strackee (1983) in float64. Error: the share of the samples of the mesh
with faces missing whose sign differs. Samples are those of `sample_field`: half of all near the surface, of which
`EDGE_SHARE` along sharp edges (the rims of the holes among them), half everywhere.
Aim: at most .5 % in the mean over the meshes. Measured: .016 % (near .015, edge .078, uniform .002; worst mesh .15).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import trimesh
import typer

from ...data_pipes.mesh import Mesh
from ...data_pipes.read import Rejected, read_mesh
from ...data_pipes.sampling import EDGE_SHARE, Solid, sample_field
from ...errors import UserError, run_command
from ...progress import Bar
from .measure import finish

PACK = Path(__file__).resolve().parents[3] / "shared" / "assets" / "pack"
FACES = (200, 4000)
MISSING = 0.02
KINDS = ("near", "edge", "uniform")


def main(
    folder: Annotated[Path, typer.Option(help="Where the GLB files are.")] = PACK,
    meshes: Annotated[int, typer.Option(min=1, help="How many meshes.")] = 50,
    points: Annotated[int, typer.Option(min=1, help="Samples of each kind.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the choice of meshes and of missing faces.")] = 0,
) -> None:
    """Measure the error of the field's sign on meshes with faces missing."""
    rng = np.random.default_rng(seed)
    names, errors = [], []
    with Bar(meshes, "meshes") as bar:
        for name, whole in closed_meshes(folder, meshes, rng):
            names.append(name)
            errors.append(sign_errors(whole, points, rng))
            bar.update(1)
    if not names:
        raise UserError(f"there are no watertight meshes under {folder}: give --folder")
    errors_MK = np.array(errors)
    all_M = errors_MK @ [(1 - EDGE_SHARE) / 2, EDGE_SHARE / 2, 1 / 2]
    worst = np.argsort(-all_M)[:5]
    for m in worst:
        print(f"{names[m]:60s}", *(f"{kind} {error:.2%}" for kind, error in zip(KINDS, errors_MK[m])))
    finish(
        {
            "benchmark": "sign",
            "meshes": len(names),
            "procedural": sum(name.startswith("procedural") for name in names),
            "points": points,
            "seed": seed,
            "error": round(float(all_M.mean()), 5),
            **{kind: round(float(error), 5) for kind, error in zip(KINDS, errors_MK.mean(axis=0))},
            "worst": {names[m]: round(float(all_M[m]), 5) for m in worst[:1]},
        }
    )


def sign_errors(whole: trimesh.Trimesh, points: int, rng: np.random.Generator) -> list[float]:
    """Share of samples with the wrong sign, of each of `KINDS`, once `MISSING` of the faces are gone."""
    solid = Solid(without_faces(whole, rng))
    errors = []
    for n_near, n_uniform, edge_share in ((points, 0, 0), (points, 0, 1), (0, points, 0)):
        field = sample_field(solid, n_near, n_uniform, rng, edge_share)
        inside_N = winding_numbers(whole.triangles, field.xyz.astype(np.float64)) > 0.5
        errors.append(float(np.mean((field.sdf < 0) != inside_N)))
    return errors


def without_faces(whole: trimesh.Trimesh, rng: np.random.Generator) -> Mesh:
    """The mesh less `MISSING` of its faces, at least one, drawn."""
    n_faces = len(whole.faces)
    kept = np.sort(rng.permutation(n_faces)[max(1, round(MISSING * n_faces)) :])
    return Mesh.from_face_colors(whole.vertices, whole.faces[kept], np.full((len(kept), 3), 0.5))


def winding_numbers(triangles_F33: np.ndarray, points_N3: np.ndarray) -> np.ndarray:
    """[N] float64: solid angles of all faces over 4 pi. 1 inside a closed mesh wound outwards, 0 outside."""
    total_N = np.empty(len(points_N3))
    for start in range(0, len(points_N3), 256):
        corners_3NF3 = np.moveaxis(triangles_F33[None] - points_N3[start : start + 256, None, None], 2, 0)
        a, b, c = corners_3NF3
        la, lb, lc = np.linalg.norm(corners_3NF3, axis=-1)
        dots = [np.einsum("nfi,nfi->nf", u, v) for u, v in ((a, b), (b, c), (c, a))]
        volume = np.einsum("nfi,nfi->nf", a, np.cross(b, c))
        angle_NF = 2 * np.arctan2(volume, la * lb * lc + dots[0] * lc + dots[1] * la + dots[2] * lb)
        total_N[start : start + 256] = angle_NF.sum(axis=1) / (4 * np.pi)
    return total_N


# ------------------------------------------------------------------------------------------------------------ meshes


def closed_meshes(folder: Path, count: int, rng: np.random.Generator) -> Iterator[tuple[str, trimesh.Trimesh]]:
    """Names and whole meshes in the normalised frame: files while there are some, then closed forms."""
    files = sorted(folder.rglob("*.glb"))
    for index in rng.permutation(len(files)):
        if not count:
            return
        if (whole := closed(files[index])) is not None:
            count -= 1
            yield str(files[index].relative_to(folder)), whole
    for index in range(count):
        yield f"procedural {index}", closed_form(index, rng)


def closed(path: Path) -> trimesh.Trimesh | None:
    """The file's mesh with equal corners joined, or None where it is no watertight solid of the right size."""
    try:
        mesh = read_mesh(path).normalised()[0]
    except Rejected:
        return None
    whole = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    if not (FACES[0] <= len(whole.faces) <= FACES[1] and whole.is_watertight and whole.is_winding_consistent):
        return None
    return whole if all(body.volume > 1e-6 for body in whole.split(only_watertight=False)) else None


def closed_form(index: int, rng: np.random.Generator) -> trimesh.Trimesh:
    """A sphere, torus, capsule or cut-up box of drawn proportions, turned at random."""
    size = rng.uniform(0.3, 0.6, 3)
    shape = (
        trimesh.creation.icosphere(3, size[0]),
        trimesh.creation.torus(0.6, size[1] / 3),
        trimesh.creation.capsule(size[0], size[1] / 2),
        trimesh.creation.box(2 * size).subdivide().subdivide().subdivide(),
    )[index % 4]
    shape.apply_transform(trimesh.transformations.random_rotation_matrix(rng.random(3)))
    return shape


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
