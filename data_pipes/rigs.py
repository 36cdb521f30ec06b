"""Where the data's cameras stand: rigs as settings.

Frame: the object's, +Y up, front along +Z; every camera looks at the origin. The object is a normalised mesh: its
longest side is 1.8, so that it lies within [-0.9, 0.9]^3 and never further than 1.56 from the origin.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..models.cameras import Cameras, orbit

__all__ = ["RigKind", "RigSettings"]

RigKind = Literal["frontal", "shap-e", "fibonacci", "turntable", "random"]
Elevation = Annotated[float, Field(ge=-90, le=90)]

GOLDEN_ANGLE_DEG = 180 * (3 - math.sqrt(5))
SHAP_E_FOV_DEG = 2 * math.degrees(math.atan(36 / 2 / 50))
# Within it, from 4 away, is all that lies within 1.56 of the origin, from wherever it is seen.
WHOLE_FOV_DEG = 46.0

# What the settings are where they are not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "frontal": {},
    "shap-e": {"fov_deg": SHAP_E_FOV_DEG},
    "fibonacci": {"fov_deg": WHOLE_FOV_DEG, "elevation_deg": (-90.0, 90.0)},
    "turntable": {"fov_deg": WHOLE_FOV_DEG, "elevation_deg": 20.0},
    "random": {"fov_deg": WHOLE_FOV_DEG, "elevation_deg": (-90.0, 90.0)},
}


class RigSettings(BaseModel):
    """The views of one object. What is not given is the kind's own.

    With their own settings turntable, fibonacci and random show the whole object in every view; frontal and shap-e may
    cut the outermost corners of one that fills its box.

    kind:
      frontal: the first half (rounded up) within 40 degrees of the front, 5 to 35 degrees above; the rest from any
        azimuth, -10 to 60 degrees above.
      shap-e: what Shap-E's encoder was given 20 of: views from directions that are uniform on the sphere
        (openai/shap-e, util/data_util.py: "random" poses), distance 2 from an object in a unit cube, and all that twice
        as large (rendering/blender/blender_script.py and util/data_util.py), through the lens of a new camera in
        Blender, 50 mm before a sensor of 36 mm: 39.6 degrees. Its objects have a longest side of 2 in that frame, ours
        of 1.8, so that they are a tenth smaller in the picture.
      fibonacci: as even a cover of the sphere, or of a band of it, as n points allow, from below to above: equal steps
        of height, the golden angle between neighbours (arXiv 0912.4540, section 3).
      turntable: equal steps of azimuth at one elevation, from the front towards +X.
      random: uniform on the sphere, or on a band of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: RigKind = Field(default="frontal", description="how the cameras are placed")
    elevation_deg: Elevation | tuple[Elevation, Elevation] | None = Field(
        default=None, description="degrees above the horizon: turntable's (20), or from and to of random and fibonacci"
    )
    distance: float = Field(default=4.0, ge=1.6, le=100, description="from the origin; a whole object is within 1.56")
    fov_deg: float = Field(
        default=40.0, ge=1, le=120, description="vertical field of view (frontal 40, shap-e 39.6, others 46)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kind = given.get("kind", "frontal")
        return {**(DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}), **given}

    @model_validator(mode="after")
    def _check(self) -> RigSettings:
        elevation = self.elevation_deg
        if self.kind in ("frontal", "shap-e"):
            if elevation is not None:
                raise ValueError(f"a {self.kind} rig has its own elevations: leave elevation_deg out, or take random")
        elif self.kind == "turntable":
            if not isinstance(elevation, float):
                raise ValueError(f"a turntable has one elevation_deg, such as 20, got {elevation}")
        elif not isinstance(elevation, tuple):
            raise ValueError(f"a {self.kind} rig has a lowest and a highest elevation_deg: [-10, 60], got {elevation}")
        elif elevation[0] > elevation[1]:
            raise ValueError(f"elevation_deg must go from the lowest to the highest, got {list(elevation)}")
        return self

    def cameras(self, rng: np.random.Generator, n_views: int, size: int) -> Cameras:
        """So many cameras of `size` x `size` pixels.

        A function of the settings and of the state of `rng`, from which frontal, shap-e and random alone draw.
        """
        if not n_views:
            return Cameras(np.zeros((0, 4, 4)), np.zeros(0), size, size)
        azimuths, elevations = self._directions(rng, n_views)
        return orbit(azimuths, elevations, size=size, distance=self.distance, fov_deg=self.fov_deg)

    def _directions(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Azimuths and elevations, [n] degrees each."""
        if self.kind == "frontal":
            n_front = math.ceil(n / 2)
            azimuths = [rng.uniform(-40, 40, n_front), rng.uniform(0, 360, n - n_front)]
            elevations = [rng.uniform(5, 35, n_front), rng.uniform(-10, 60, n - n_front)]
            return np.concatenate(azimuths), np.concatenate(elevations)
        if isinstance(self.elevation_deg, float):
            return np.arange(n) * 360 / n, np.full(n, self.elevation_deg)
        # The area between two heights on a sphere is proportional to their difference (Archimedes).
        lowest, highest = np.sin(np.radians(self.elevation_deg or (-90, 90)))
        if self.kind == "fibonacci":
            azimuths_V, along_V = np.arange(n) * GOLDEN_ANGLE_DEG, (np.arange(n) + 0.5) / n
        else:
            azimuths_V, along_V = rng.uniform(0, 360, n), rng.random(n)
        return azimuths_V, np.degrees(np.arcsin(np.clip(lowest + (highest - lowest) * along_V, -1, 1)))
