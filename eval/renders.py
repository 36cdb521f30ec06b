"""The evaluation protocol: one frozen set of cameras and shading for every object that is scored, true or generated.

The renderer is the data's own (`data_pipes.render`), so a generated object and the truth differ by their shape and
colour and by nothing else. This module imports no torch: it is also what the rendering processes load.

Shapes: M objects, V views, H height, W width.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data_pipes import render as renderer
from ..data_pipes.mesh import Mesh
from ..data_pipes.workers import end_with_parent
from ..files import sha256_json
from ..models.cameras import Cameras, orbit

if TYPE_CHECKING:
    from ..models.mesh import ExtractedMesh  # it imports torch

__all__ = ["FRONTAL", "RenderProtocol", "is_empty", "render_meshes", "render_pool", "to_mesh"]

DEFAULT_SIZE = 64
WORTH_A_POOL = 150  # objects; starting the processes costs about as much as rendering these


@dataclass(frozen=True)
class RenderProtocol:
    """Everything that decides what the judge sees. Change a value only together with the name's version."""

    name: str = "shapeloom-frontal-4/1"
    azimuths_deg: tuple[float, ...] = (-30.0, -10.0, 10.0, 30.0)  # frontal: left/right and front/behind stay true
    elevation_deg: float = 20.0
    distance: float = 4.0
    fov_deg: float = 40.0
    shading: str = "lit"
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    samples_per_axis: int = 2
    aggregation: str = "mean of the views' unit image embeddings, renormalised"

    def cameras(self, size: int) -> Cameras:
        return orbit(
            list(self.azimuths_deg), self.elevation_deg, size=size, distance=self.distance, fov_deg=self.fov_deg
        )

    def to_json(self) -> dict[str, Any]:
        light = [float(x) for x in renderer.LIGHT_IN_CAMERA]
        shading = {"ambient": renderer.AMBIENT, "diffuse": renderer.DIFFUSE, "wrap": renderer.WRAP, "light": light}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**own, "shading_constants": shading}

    @property
    def hash(self) -> str:
        """sha256 of every value, the renderer's shading included."""
        return sha256_json(self.to_json())


FRONTAL = RenderProtocol()


def is_empty(mesh: Mesh | ExtractedMesh | None) -> bool:
    """No object, no face, or a number that is not finite: all count as a miss."""
    if mesh is None or len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
        return True
    return not isinstance(mesh, Mesh) and not np.isfinite(mesh.rgb).all()


def to_mesh(mesh: Mesh | ExtractedMesh) -> Mesh:
    """The renderer's mesh of an extracted one."""
    if isinstance(mesh, Mesh):
        return mesh
    rgb_V3 = np.clip(np.asarray(mesh.rgb, np.float32), 0, 1)
    return Mesh.from_vertex_colors(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32), rgb_V3)


@contextmanager
def render_pool(workers: int, n_objects: int) -> Iterator[Executor | None]:
    """Processes to render in, or None where this one is quicker."""
    if workers <= 1 or n_objects < WORTH_A_POOL:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside torch's threads
    with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        yield pool


def render_meshes(
    meshes: Sequence[Mesh | ExtractedMesh | None],
    *,
    size: int = DEFAULT_SIZE,
    pool: Executor | None = None,
    protocol: RenderProtocol = FRONTAL,
) -> Iterator[np.ndarray]:
    """Render each object by the protocol: u8 [V, H, W, 3] of one after the other, blank where there is no surface.

    With a pool the work has begun when this returns; without one it happens as the pictures are asked for.

    Args:
        meshes: in the normalised object frame.
        size: height and width in pixels, the judge's input size.
        pool: of `render_pool`.
    """
    jobs = [None if mesh is None or is_empty(mesh) else to_mesh(mesh) for mesh in meshes]
    one = partial(_render_one, size=size, protocol=protocol)
    return map(one, jobs) if pool is None else pool.map(one, jobs, chunksize=4)


def _render_one(mesh: Mesh | None, size: int, protocol: RenderProtocol) -> np.ndarray:
    """Views u8 [V, H, W, 3] of one object."""
    cameras = protocol.cameras(size)
    if mesh is None:
        colour = np.rint(np.array(protocol.background) * 255).astype(np.uint8)
        return np.broadcast_to(colour, (len(cameras), size, size, 3))
    views = renderer.render(mesh, cameras, samples_per_axis=protocol.samples_per_axis)
    return renderer.composite(getattr(views, protocol.shading), protocol.background)
