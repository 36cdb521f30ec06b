"""From a latent's field to a coloured mesh: ours against diffusers' `decode_to_mesh`, same weights, same lattice.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.mesh                                # 128^3: 2 minutes
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.mesh --resolution 256 --repeat 1    # 10 minutes, 9 GB

Cost model, n points along an axis. A value costs the field's MLP, 0.71 MFLOP (93x256, 5 of 256x256, 256x12). Theirs
evaluates n^3 lattice points and V vertices, and marching cubes makes twelve edges, five triangles and their indices for
each cell, some 500 bytes a point. What must be evaluated is the corners of the cells that the surface crosses, and the
vertices: about 3 n^2 and 1.5 n^2 for the chair, so the floor is 4.5 n^2 values at the speed of the largest matrix
product. Ours adds the points that could not be ruled out (2 to 3 n^2), and passes over n^3 bytes and floats: about 17
bytes a point. Their 256-case table comes with Shap-E's weights; here both use ours.

Checked before anything is timed: marching cubes alike bit for bit on the same values, as many faces, each vertex where
theirs is once their shrinking is undone. Times are medians over turns, in each of which ours runs before and after
theirs.
Aims on one core: 8x at 128^3 and 25x at 256^3, marching cubes 20x, peak memory at 128^3 below 800 MB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from diffusers.pipelines.shap_e.renderer import MeshDecoderOutput, ShapERenderer
from scipy.spatial import cKDTree

from ...models.decoder import ImplicitField, to_z_up
from ...models.marching_cubes import case_table, marching_cubes
from ...models.mesh import ExtractedMesh, extract_mesh
from .measure import finish, interleaved, median_seconds, peak_rss_mb
from .reference import chair_field, diffusers_renderer

FLOP = 2 * (93 * 256 + 5 * 256 * 256 + 256 * 12)  # of the field's MLP at a point
TOLERANCE = 1e-4  # of a vertex, in the object frame


def renderer_with_table(field: ImplicitField) -> ShapERenderer:
    """diffusers' renderer, its empty table of cases filled with ours."""
    renderer = diffusers_renderer(field)
    cases, masks = case_table()
    renderer.mesh_decoder.cases.copy_(cases)
    renderer.mesh_decoder.masks.copy_(masks)
    return renderer


def evaluations(module: torch.nn.Module, call: Callable[[], object]) -> tuple[int, object]:
    """At how many points `call` runs the MLP `module`, and what it returns."""
    count = 0

    def add(_module, args: tuple, kwargs: dict, _output) -> None:
        nonlocal count
        points_BP3 = args[0] if args else kwargs["position"]
        count += points_BP3.shape[0] * points_BP3.shape[1]

    handle = module.register_forward_hook(add, with_kwargs=True)
    result = call()
    handle.remove()
    return count, result


def largest_distance(ours: ExtractedMesh, theirs: MeshDecoderOutput, n: int) -> float:
    """Of our vertices to theirs, un-shrunk, and the other way round. Raises: RuntimeError if counts differ."""
    if len(ours.faces) != len(theirs.faces) or len(ours.vertices) != len(theirs.verts):
        raise RuntimeError(f"meshes differ: {len(ours.faces)} faces against {len(theirs.faces)}")
    ours_V3 = to_z_up(torch.from_numpy(ours.vertices)).numpy()
    theirs_V3 = theirs.verts.numpy() * (n + 1) / (n - 1)
    there, back = cKDTree(theirs_V3).query(ours_V3)[0], cKDTree(ours_V3).query(theirs_V3)[0]
    return float(max(there.max(), back.max()))


def matrix_flops() -> float:
    """Operations a second of the MLP's largest product at the best chunk, the yardstick for the floor."""
    a, b = torch.randn(8192, 256), torch.randn(256, 256)
    torch.mm(a, b)
    return 2 * 8192 * 256 * 256 / median_seconds(lambda: torch.mm(a, b), 20)


def compare_marching_cubes(renderer: ShapERenderer, arguments: tuple[torch.Tensor, ...], repeat: int) -> dict:
    """Marching cubes alone on the values that theirs got. Raises: RuntimeError unless alike bit for bit."""
    values, low, size = arguments

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return marching_cubes(values, (low, low + size))

    def theirs() -> MeshDecoderOutput:
        return renderer.mesh_decoder(values, low, size)

    (vertices, faces), expected = ours(), theirs()
    if not (torch.equal(vertices, expected.verts) and torch.equal(faces, expected.faces)):
        raise RuntimeError("marching cubes differ")
    seconds = interleaved({"ours": ours, "diffusers": theirs}, repeat)
    return {
        "cubes_ours_s": seconds["ours"],
        "cubes_diffusers_s": seconds["diffusers"],
        "cubes_ratio": seconds["diffusers"] / seconds["ours"],
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3, help="turns of whole meshes; theirs is slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, field = options.resolution, chair_field()
    renderer = renderer_with_table(field)

    def ours() -> ExtractedMesh:
        return extract_mesh(field, n)[0]

    def theirs() -> MeshDecoderOutput:
        return renderer.decode_to_mesh(torch.zeros(1, 1), "cpu", grid_size=n)

    seen: list[tuple[torch.Tensor, ...]] = []
    watch = renderer.mesh_decoder.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments))
    print(f"one mesh each at {n}^3, to compare", flush=True)
    their_count, their_mesh = evaluations(renderer.mlp, theirs)
    our_count, our_mesh = evaluations(field.head, ours)
    watch.remove()
    distance = largest_distance(our_mesh, their_mesh, n)
    if not distance < TOLERANCE:
        raise RuntimeError(f"a vertex is {distance} away from theirs")
    print(f"{len(our_mesh.faces)} faces each, vertices within {distance:.1e}; marching cubes alone", flush=True)
    cubes = compare_marching_cubes(renderer, seen.pop(), 5 if n <= 128 else 1)
    print(f"{cubes['cubes_ratio']:.0f}x; {options.repeat} turns of whole meshes", flush=True)
    seconds = interleaved({"before": ours, "diffusers": theirs, "after": ours}, options.repeat)
    seconds["ours"] = (seconds["before"] + seconds["after"]) / 2  # theirs takes minutes, and machines change meanwhile
    print(f"{seconds['diffusers'] / seconds['ours']:.1f}x; memory, one mesh each", flush=True)
    result = {
        "bench": "mesh",
        "resolution": n,
        "ours_s": seconds["ours"],
        "diffusers_s": seconds["diffusers"],
        "ratio": seconds["diffusers"] / seconds["ours"],
        "floor_s": np.ceil(4.5 * n**2) * FLOP / matrix_flops(),
        "ours_evaluations": our_count,
        "diffusers_evaluations": their_count,
        **cubes,
        "ours_peak_mb": peak_rss_mb(ours),
        "diffusers_peak_mb": peak_rss_mb(theirs),
        "faces": len(our_mesh.faces),
        "largest_distance": distance,
    }
    finish(result)


if __name__ == "__main__":
    main()
