"""Views a second of the mesh renderer, and against Blender's Cycles on the same mesh and cameras.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python -m shapeloom.launch.bench.render              # a minute
    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python -m shapeloom.launch.bench.render --no-cycles  # seconds

A ball of 20,480 triangles under a texture, views of 256 x 256 pixels, one thread each. Ours gives in one pass, with
default settings: unlit colour, shaded colour, shape alone, depth and normals; its time is a whole call of `render`, the
preparation of the mesh included, over the number of views. Cycles renders a picture at a time; its times are those of a
view's rendering alone, measured inside Blender once everything is loaded: neither Blender's start (`cycles_start_s`),
nor handing over the mesh, nor reading the results. They are told for the unlit picture, which brings depth and normals
(`unlit`), for the path-traced one (`lit`) and for all that ours gives (`all`: unlit, lit and textureless).

Cost model: a view of ours is a set-up of each face (some 100 ns), a test of each sample in the box around each face, a
lookup of 1 to 8 places of a texture for each pixel and face that it sees, and passes over the pixels.
Cycles at N samples follows N paths from every pixel, each with up to 4 bounces.

Times are medians over turns, in each of which ours runs before and after Cycles.
Aims on one core: 60 views a second; 10x Cycles at 1 sample, 150x at 32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
import trimesh

from ...data_pipes.blender import Blender, BlenderSettings
from ...data_pipes.mesh import Material, Mesh
from ...data_pipes.render import render
from ...data_pipes.rigs import RigSettings
from ...errors import UserError
from ...models.cameras import Cameras
from .measure import finish

SIZE = 256
SAMPLES = (1, 32)


def textured_ball() -> Mesh:
    """20,480 triangles with a texture of 1,024 x 512 pixels of noise, by longitude and latitude."""
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.9)
    x_F3, y_F3, z_F3 = np.moveaxis(ball.vertices[ball.faces] / 0.9, -1, 0)
    longitude_F3 = np.arctan2(x_F3, z_F3) / (2 * np.pi)
    longitude_F3 -= np.round(longitude_F3 - longitude_F3[:, :1])  # of a face across the seam, which repeats
    uv = np.stack([longitude_F3, np.arccos(np.clip(y_F3, -1, 1)) / np.pi], axis=-1)
    texture = np.random.default_rng(0).integers(0, 256, (512, 1024, 4), dtype=np.uint8)
    return Mesh(ball.vertices, ball.faces, np.zeros(len(ball.faces)), (Material(np.ones(4), texture),), corner_uv=uv)


class Ours:
    """Seconds a view of `render`, one for each call."""

    def __init__(self, mesh: Mesh, cameras: Cameras) -> None:
        self.mesh, self.cameras = mesh, cameras
        self.seconds: list[float] = []
        render(mesh, cameras)  # libraries are loaded, what is compiled is

    def run(self) -> None:
        start = time.perf_counter()
        render(self.mesh, self.cameras)
        self.seconds.append((time.perf_counter() - start) / len(self.cameras))


class Cycles:
    """Seconds a view of Cycles by number of samples and kind of picture."""

    def __init__(self, mesh: Mesh, cameras: Cameras) -> None:
        self.mesh, self.cameras = mesh, cameras
        self.seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
        self.blender = Blender(BlenderSettings(samples=1, threads=1))
        start = time.perf_counter()
        self.blender.render(mesh, cameras[:1])
        self.start_s = time.perf_counter() - start

    def run(self, samples: int) -> None:
        self.blender.settings = BlenderSettings(samples=samples, threads=1)
        self.blender.render(self.mesh, self.cameras)
        of_views = self.blender.seconds
        for kind, seconds in of_views.items():
            self.seconds[samples, kind] += seconds[1:]  # the first builds the tree
        self.seconds[samples, "all"] += [sum(of_view) for of_view in list(zip(*of_views.values()))[1:]]

    def results(self, ours_s: float) -> dict[str, float]:
        results = {"cycles_start_s": self.start_s}
        for (samples, kind), seconds in self.seconds.items():
            median = statistics.median(seconds)
            results[f"cycles_{samples}_{kind}_s"] = median
            results[f"ratio_{samples}_{kind}"] = median / ours_s
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--views", type=int, default=8, help="of ours a call; Cycles renders half as many a turn")
    parser.add_argument("--no-cycles", action="store_true", help="ours alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mesh = textured_ball()
    cameras = RigSettings(kind="turntable").cameras(np.random.default_rng(0), options.views, SIZE)
    ours, cycles = Ours(mesh, cameras), None
    if not options.no_cycles:
        try:
            cycles = Cycles(mesh, cameras[::2])
        except UserError as error:
            print(f"without Cycles: {error}", flush=True)
    for turn in range(options.repeat):
        ours.run()
        if cycles is not None:
            for samples in SAMPLES:
                cycles.run(samples)
        ours.run()
        print(f"turn {turn + 1}: {1 / statistics.median(ours.seconds):.1f} views/s", flush=True)
    ours_s = statistics.median(ours.seconds)
    result = {
        "bench": "render",
        "triangles": len(mesh.faces),
        "size": SIZE,
        "ours_views_per_s": 1 / ours_s,
        "ours_best_views_per_s": 1 / min(ours.seconds),
        **({} if cycles is None else cycles.results(ours_s)),
    }
    finish(result)


if __name__ == "__main__":
    main()
