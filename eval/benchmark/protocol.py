"""Protocols: frozen, versioned settings of everything between a mesh and its score (`eval/protocols/*.yaml`).

A protocol's hash covers every value of it and the renderer's shading constants. Two scores are comparable only if the
hashes of protocol, gallery and evaluator are equal. Change a value only together with the name's version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from ...config import Config, check_config
from ...data_pipes import render as renderer
from ...data_pipes.mesh import NORMALISED_SIDE
from ...data_pipes.read import VERSION as READER_VERSION
from ...errors import UserError
from ...files import sha256_json
from ...models.cameras import Cameras, orbit
from .schema import Published, Shading

__all__ = ["AGGREGATIONS", "Protocol", "load_protocol", "protocol_names", "published_rows"]

FOLDER = Path(__file__).with_name("protocols")
PUBLISHED = "published.yaml"
AGGREGATIONS = ("view mean", "mean embedding", "best view", "any view")


class CameraRing(Config):
    """Views on a circle around the object (`models.cameras.orbit`): degrees, and a distance in object-frame units."""

    azimuths_deg: tuple[float, ...] = Field(min_length=1)
    elevation_deg: float = Field(ge=-90, le=90)
    distance: float = Field(gt=1.8)
    fov_deg: float = Field(gt=0, lt=150)


class GalleryRule(Config):
    """Which captions a picture is placed among.

    kind: `prompts`, or `hard`: the prompts and every swap of one that the grammar allows.
    size, captions_sha256: of the gallery that the published protocol used; another is scored, and said to be other.
    """

    kind: Literal["prompts", "hard"]
    size: int | None = None
    captions_sha256: str | None = None


class Protocol(Config):
    """Everything that decides a score besides objects, captions and evaluator.

    normalise: `box` scales an object's bounding box to a longest side of 1.8 about the origin, `none` leaves it.
    shadings: `colour` is lit by one light at the camera; `textureless` the same with one grey for every surface.
    aggregation, from an object's views to its score: `view mean` scores every view by itself and takes the mean;
        `mean embedding` scores the mean of the views' unit embeddings; `best view` takes for every caption the view
        nearest to it; `any view` counts a hit of any view.
    ties: an object whose caption is tied at the top with t - 1 others earns 1/t.
    caption_template: with `{text}` where the caption goes.
    """

    name: str
    about: str
    source: str
    cameras: CameraRing
    resolution: int = Field(ge=8, le=2048)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    samples_per_axis: int = Field(default=2, ge=1, le=8)
    normalise: Literal["box", "none"] = "box"
    shadings: tuple[Shading, ...] = Field(min_length=1)
    gallery: GalleryRule
    caption_template: str = "{text}"
    ties: Literal["expected credit"] = "expected credit"
    aggregation: Literal["view mean", "mean embedding", "best view", "any view"]
    published: str | None = None

    @field_validator("caption_template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if template.count("{text}") != 1:
            raise ValueError("must hold {text} once, where the caption goes")
        return template

    @model_validator(mode="after")
    def _colour_comes_first(self) -> Protocol:
        if self.shadings[0] != "colour" or len(set(self.shadings)) != len(self.shadings):
            raise ValueError("shadings must begin with colour and name each once")
        return self

    @property
    def hash(self) -> str:
        """sha256 of every value but the words about it, and of the renderer's shading."""
        words = ("about", "source", "published")
        return sha256_json({k: v for k, v in self.to_json().items() if k not in (*words, "hash")})

    @property
    def render_key(self) -> dict[str, Any]:
        """The part of it that decides pixels."""
        names = ("cameras", "resolution", "background", "samples_per_axis", "normalise", "shadings")
        every = self.to_dict()
        versions = {"renderer": renderer.VERSION, "reader": READER_VERSION}
        return {**{name: every[name] for name in names}, "shading": _shading(), **versions}

    def views(self) -> Cameras:
        ring = self.cameras
        return orbit(
            list(ring.azimuths_deg),
            ring.elevation_deg,
            size=self.resolution,
            distance=ring.distance,
            fov_deg=ring.fov_deg,
        )

    def caption(self, text: str) -> str:
        return self.caption_template.replace("{text}", text)

    def to_json(self) -> dict[str, Any]:
        """What results.json says of it, without its hash."""
        return {**self.to_dict(), "shading": _shading(), "renderer": renderer.VERSION}


def protocol_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != PUBLISHED)


def load_protocol(name: str | Path) -> Protocol:
    """A protocol by name, or from a YAML file of that form.

    Raises: UserError for a name that there is none of, or a file that is damaged or has an unknown key.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in protocol_names() else Path(name)
    if not path.is_file():
        raise UserError(
            f"there is no protocol '{name}'; there are {', '.join(protocol_names())}, or a YAML file's path"
        )
    protocol = check_config(Protocol, _read_yaml(path), f" in {path}")
    if protocol.published is not None and protocol.published not in (known := _read_yaml(FOLDER / PUBLISHED)):
        raise UserError(f"{path}: published '{protocol.published}' is not known; there are {', '.join(known)}")
    return protocol


def published_rows(protocol: Protocol) -> list[Published]:
    """Published numbers for the protocol's prompts; none of them was measured by this code."""
    if protocol.published is None:
        return []
    rows = _read_yaml(FOLDER / PUBLISHED)[protocol.published]
    return [Published.model_validate(row) for row in rows]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" at line {where.line + 1}" if where else ""
        raise UserError(f"protocol {path} is not valid YAML{at}") from None
    if not isinstance(content, dict):
        raise UserError(f"protocol {path} must hold settings by name")
    return content


def _shading() -> dict[str, Any]:
    return {
        "ambient": renderer.AMBIENT,
        "diffuse": renderer.DIFFUSE,
        "wrap": renderer.WRAP,
        "light": [round(float(x), 9) for x in renderer.LIGHT_IN_CAMERA],
        "textureless_albedo": renderer.TEXTURELESS_ALBEDO,
        "longest_side": NORMALISED_SIDE,
    }
