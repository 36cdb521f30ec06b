"""Path-traced views by Blender's Cycles, for those who want them: the interface of render.py.

Blender is a separate program, started as one and spoken to through files: found on the PATH as `blender`, or where
SHAPELOOM_BLENDER says, which may be the Python of another environment with the package bpy (it wants an older NumPy).
What it runs is blender_script.py.

Unlit colour, alpha, depth and normals are what `render.render` gives, but for where in a pixel the samples are. Lit
views are path traced under a light rig of the same strength: a sun that is fixed to the camera, above and left of it,
and white light from everywhere. A diffuse surface that neither is shadowed nor sees another is lit to
albedo * (AMBIENT + DIFFUSE * cos), without render.py's wrap; others have shadows and light from their surroundings.
Deterministic on a CPU: same mesh, cameras, settings and Blender, same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..files import read_json
from ..models.cameras import Cameras
from .blender_exr import read_exr
from .mesh import Mesh, linear_to_srgb, srgb_to_linear
from .render import AMBIENT, DIFFUSE, LIGHT_IN_CAMERA, TEXTURELESS_ALBEDO, Views

__all__ = ["Blender", "BlenderSettings", "find_blender", "render"]

SCRIPT = Path(__file__).with_name("blender_script.py")
INSTALL = (
    "install Blender 3.4 or newer from blender.org and put it on the PATH, or set SHAPELOOM_BLENDER to its path or to "
    "the python of an environment with bpy"
)
SUN_ANGLE = 0.1  # radians across; soft shadows
LAYERS = 64  # see-through surfaces along one ray; behind as many it is black
SMALLEST_SIDE = 4  # of Blender's pictures, in pixels
MODES = ("unlit", "lit", "textureless")
LAST_LINES = 5  # of Blender's output, where it fails


class BlenderSettings(BaseModel):
    """How Cycles renders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=32, ge=1, le=65536, description="paths per pixel; nothing is denoised")
    bounces: int = Field(default=4, ge=0, le=1024, description="from surface to surface; 0 is direct light alone")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of the samples")
    device: Literal["cpu", "gpu"] = Field(default="cpu", description="what Cycles renders on")
    threads: int = Field(default=0, ge=0, le=1024, description="of Blender; 0 takes all cores")
    time_limit_s: float = Field(default=600.0, gt=0, description="for the views of one mesh")


def find_blender() -> str:
    """The path of the Blender program. Raises: UserError if there is none."""
    named = os.environ.get("SHAPELOOM_BLENDER")
    found = shutil.which(named or "blender")
    if found is None:
        where = f"SHAPELOOM_BLENDER is {named}, where there is no program" if named else "there is no blender"
        raise UserError(f"{where}, and rendering with it (the extra [blender]) needs one: {INSTALL}")
    return found


def render(mesh: Mesh, cameras: Cameras, settings: BlenderSettings | None = None) -> Views:
    """Render a mesh from every camera in a Blender of its own; `Blender` spares the start for many meshes.

    Args:
        mesh: in the cameras' object frame.
        cameras: V views of H x W pixels.
    Raises: ValueError if there is no camera or a side is below 4 pixels; UserError if Blender is missing, too old,
        fails or takes too long.
    """
    with Blender(settings) as blender:
        return blender.render(mesh, cameras)


class Blender:
    """A running Blender for one mesh after another: `with Blender() as blender: blender.render(mesh, cameras)`.

    It starts with the first mesh. After an error it is gone, and the next mesh starts another.
    """

    def __init__(self, settings: BlenderSettings | None = None, program: str | None = None) -> None:
        """`program`: the path of Blender, `find_blender()` by default. Raises: UserError if that finds none."""
        self.settings = settings or BlenderSettings()
        self.program = program or find_blender()
        self.seconds: dict[str, list[float]] = {}  # of the last mesh: each view's rendering, by kind of picture
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="shapeloom-blender-")

    def __enter__(self) -> Blender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()

    def render(self, mesh: Mesh, cameras: Cameras, modes: tuple[str, ...] = MODES) -> Views:
        """As `render`. `modes`: which pictures are made; "unlit" must be, and views of what is left out are empty."""
        if not len(cameras) or min(cameras.width, cameras.height) < SMALLEST_SIDE:
            size = f"{len(cameras)} of {cameras.width} x {cameras.height}"
            raise ValueError(f"there must be a camera, and {SMALLEST_SIDE} pixels a side at least, got {size}")
        if "unlit" not in modes or not set(modes) <= set(MODES):
            raise ValueError(f"modes must be some of {MODES}, unlit among them, got {modes}")
        self.seconds, version = {}, ""
        job = Path(tempfile.mkdtemp(dir=self._folder.name))
        try:
            if _write_mesh(job, mesh, self._fields(cameras, modes)):
                answer = self._run(job)
                self.seconds, version = answer["seconds"], answer["version"]
            return _read_views(job, cameras, modes)
        except _Unreadable as error:
            raise UserError(f"{self.program} (Blender {version}) wrote pictures unlike those of 3.4: {error}") from None
        finally:
            shutil.rmtree(job, ignore_errors=True)

    def _fields(self, cameras: Cameras, modes: tuple[str, ...]) -> dict[str, Any]:
        return {
            **self.settings.model_dump(exclude={"time_limit_s"}),
            "modes": modes,
            "width": cameras.width,
            "height": cameras.height,
            "cameras": cameras.to_json(),
            "layers": LAYERS,
            "ambient": AMBIENT,
            "diffuse": DIFFUSE,
            "sun_angle": SUN_ANGLE,
            "light_in_camera": LIGHT_IN_CAMERA.tolist(),
            "textureless_albedo": TEXTURELESS_ALBEDO,
        }

    def _run(self, job: Path) -> dict[str, Any]:
        """Blender's answer to the job in a folder."""
        limit = self.settings.time_limit_s
        until = time.monotonic() + limit
        process = self._running()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and is about to be found so
            assert process.stdin is not None
            process.stdin.write(f"{job}\n")
            process.stdin.flush()
        answer = job / "answer.json"
        while not answer.exists():
            if process.poll() is not None:
                raise self._failed(f"ended with exit code {process.returncode}")
            if time.monotonic() > until:
                raise self._failed(f"took longer than the {limit:g} s allowed (time_limit_s)")
            time.sleep(0.005)
        fields = read_json(answer, "Blender's answer")
        if "refused" in fields:
            raise UserError(f"{self.program}: {fields['refused']}")
        return fields

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            options = ["--background", "--factory-startup", "--python-exit-code", "1", "--python", str(SCRIPT)]
            if Path(self.program).name.startswith("python"):
                options = [str(SCRIPT)]
            elif self.settings.threads:
                options = ["--threads", str(self.settings.threads), *options]
            try:
                with open(self._log, "wb") as log:
                    self._process = subprocess.Popen(
                        [self.program, *options],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        encoding="utf-8",
                        start_new_session=True,  # so that it can be ended with all that it started
                    )
            except OSError as error:
                raise UserError(f"{self.program} cannot be started ({error.strerror}): {INSTALL}") from None
        return self._process

    @property
    def _log(self) -> Path:
        return Path(self._folder.name, "log")

    def _failed(self, what: str) -> UserError:
        self._end()
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        said = " | ".join(lines[-LAST_LINES:]) or "nothing"
        return UserError(f"{self.program} {what} while it rendered a mesh; the last it said: {said}")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it has nothing to save
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


# ---------------------------------------------------------------------------------------------- to and from files


class _Unreadable(Exception):
    """A picture is not laid out as expected."""


def _write_mesh(folder: Path, mesh: Mesh, fields: dict[str, Any]) -> bool:
    """Write the job; false, and nothing written, where no face is to be seen."""
    a_F, b_F, c_F = mesh.faces.T
    real_F = (a_F != b_F) & (b_F != c_F) & (c_F != a_F)  # Blender does not survive others
    if not real_F.any():
        return False
    arrays = {
        "vertices": mesh.vertices.astype("<f4"),
        "faces": mesh.faces[real_F].astype("<i4"),
        "face_material": mesh.face_material[real_F].astype("<i4"),
    }
    if mesh.corner_uv is not None:
        uv = np.nan_to_num(mesh.corner_uv[real_F], nan=0.0, posinf=0.0, neginf=0.0)
        arrays["corner_uv"] = np.stack([uv[..., 0], 1 - uv[..., 1]], axis=-1).astype("<f4")
    if mesh.corner_rgba is not None:
        arrays["corner_rgba"] = mesh.corner_rgba[real_F].astype("<f4")
    textures = {id(m.texture): m.texture for m in mesh.materials if m.texture is not None}
    for i, texture in enumerate(textures.values()):
        # As linear light: Cycles would filter bytes as they are, and convert what comes of it.
        texels = np.concatenate([srgb_to_linear(texture[..., :3]), texture[..., 3:] / np.float32(255)], axis=2)
        arrays[f"texture{i}"] = texels[::-1].astype("<f4")
    number = {key: i for i, key in enumerate(textures)}
    for name, array in arrays.items():
        array.tofile(folder / name)
    fields = fields | {
        "n_vertices": len(mesh.vertices),
        "n_faces": int(real_F.sum()),
        "has_uv": mesh.corner_uv is not None,
        "has_rgba": mesh.corner_rgba is not None,
        "textures": [[texture.shape[1], texture.shape[0]] for texture in textures.values()],
        "materials": [
            {
                "base": material.base_color_linear.astype(float).tolist(),
                "texture": None if material.texture is None else number[id(material.texture)],
                "alpha_mode": material.alpha_mode,
                "alpha_cutoff": material.alpha_cutoff,
            }
            for material in mesh.materials
        ],
    }
    (folder / "job.json").write_text(json.dumps(fields), "utf-8")
    return True


def _read_views(folder: Path, cameras: Cameras, modes: tuple[str, ...]) -> Views:
    n_views, height, width = len(cameras), cameras.height, cameras.width
    pictures = {mode: np.zeros((n_views if mode in modes else 0, height, width, 4), np.uint8) for mode in MODES}
    depth = np.full((n_views, height, width), np.inf, np.float32)
    normal = np.zeros((n_views, height, width, 3), np.float32)
    for view in range(n_views):
        if not (folder / f"unlit{view}.exr").exists():
            continue
        channels = _channels(folder / f"unlit{view}.exr")
        alpha_HW = np.rint(255 * np.clip(_layer(channels, "Combined", "A")[..., 0], 0, 1)).astype(np.uint8)
        seen = alpha_HW > 0
        for mode in modes:
            of_mode = channels if mode == "unlit" else _channels(folder / f"{mode}{view}.exr")
            rgba_N4 = _layer(of_mode, "Combined", "RGBA")[seen]
            straight_N3 = rgba_N4[:, :3] / np.maximum(rgba_N4[:, 3:], 1e-6)
            pictures[mode][view][seen, :3] = np.rint(255 * linear_to_srgb(straight_N3))
            pictures[mode][view][..., 3] = alpha_HW
        measured_N3, sum_N3 = _layer(channels, "measured", "RGB")[seen], _layer(channels, "normal", "RGB")[seen]
        depth[view][seen] = measured_N3[:, 0] / np.maximum(measured_N3[:, 1], 1e-6)
        length_N1 = np.linalg.norm(sum_N3, axis=1, keepdims=True)
        normal[view][seen] = np.divide(sum_N3, length_N1, out=np.zeros_like(sum_N3), where=length_N1 > 1e-6)
    return Views(
        albedo=pictures["unlit"], lit=pictures["lit"], textureless=pictures["textureless"], depth=depth, normal=normal
    )


def _channels(path: Path) -> dict[str, np.ndarray]:
    """The picture's channels by pass and letter, as in "Combined.R", whatever the view layer's name is."""
    try:
        return {".".join(name.split(".")[-2:]): values for name, values in read_exr(path).items()}
    except (OSError, ValueError) as error:
        raise _Unreadable(str(error)) from None


def _layer(channels: dict[str, np.ndarray], layer: str, letters: str) -> np.ndarray:
    """[H, W, C] of a pass."""
    try:
        return np.stack([channels[f"{layer}.{letter}"] for letter in letters], axis=-1)
    except KeyError as missing:
        raise _Unreadable(f"there is no {missing} among {', '.join(sorted(channels))}") from None
