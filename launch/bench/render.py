"""The mesh renderer of data and evaluation: views a second, on one thread.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.render                        # a minute, most of it compiling
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.render --glb FILE.glb         # one of your own

Cost model of a view: a set-up of each face (some 100 ns), a test of each sample in the box around each face, a lookup
of 1 to 8 places of a texture for each pixel and face that it sees, and passes over the pixels. The rays that Embree
casts through the same samples, without any shading, stand beside it: what a renderer by rays could not go below.
Aim on one core: 60 views a second of 20,000 faces, 256 pixels of a side, 4 samples a pixel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ...data_pipes.mesh import Material, Mesh
from ...data_pipes.read import read_mesh
from ...data_pipes.render import RayScene, prepare, render
from ...models.cameras import orbit
from .measure import finish, interleaved


def bumpy_sphere(columns: int = 142, rows: int = 71) -> Mesh:
    """2 * columns * rows faces with a 1024 x 1024 texture of noise at all scales."""
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1))
    around, down = 2 * np.pi * u, np.pi * v
    radius = 0.85 * (1 + 0.05 * np.sin(9 * around) * np.sin(7 * down) * np.sin(down))
    xyz = radius * np.stack([np.sin(down) * np.sin(around), np.cos(down), np.sin(down) * np.cos(around)])
    index = np.arange(u.size).reshape(u.shape)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.stack([a, b, c, a, c, d], axis=-1).reshape(-1, 3)
    uv = np.stack([u, v], axis=-1).reshape(-1, 2)[faces]
    rng, picture = np.random.default_rng(0), np.zeros((1024, 1024, 3))
    for size in 2 ** np.arange(1, 11):
        picture += rng.random((size, size, 3)).repeat(1024 // size, axis=0).repeat(1024 // size, axis=1) / size**0.5
    texture = np.concatenate([255 * picture / picture.max(), np.full((1024, 1024, 1), 255)], axis=2).astype(np.uint8)
    return Mesh(xyz.reshape(3, -1).T, faces, np.zeros(len(faces)), (Material(np.ones(4), texture),), corner_uv=uv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glb", type=Path, help="render this file in place of a bumpy sphere")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    mesh = read_mesh(args.glb).normalised()[0] if args.glb else bumpy_sphere()
    cameras = orbit(np.arange(args.views) * 360 / args.views, 20, size=args.size)
    scene = RayScene(mesh)
    rays = [part.reshape(-1, 3) for part in cameras.resized(2 * args.size, 2 * args.size).rays()]
    prepare()
    render(mesh, cameras[[0]])  # makes the textures' levels
    seconds = interleaved({"render": lambda: render(mesh, cameras), "rays": lambda: scene.cast(*rays)}, args.repeat)
    finish(
        {
            "faces": len(mesh.faces),
            "size": args.size,
            "views_per_s": round(args.views / seconds["render"], 1),
            "rays_alone_views_per_s": round(args.views / seconds["rays"], 1),
        }
    )


if __name__ == "__main__":
    main()
