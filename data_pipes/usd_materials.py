"""UsdPreviewSurface materials (its specification, version 2.6) as base colours, textures and how corners find them.

Left out: everything but diffuse colour and opacity. Colours of a USD file are in linear light with sRGB's primaries.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pxr import UsdShade

from .limits import IMAGE_FORMATS, Limits, decode_image
from .mesh import AlphaMode, Material, linear_to_srgb, srgb_to_linear
from .usd_layers import Layers

__all__ = ["Look", "Materials"]

_GREY = 0.18  # UsdPreviewSurface's diffuse colour where none is given
_ST = np.array([[1.0, 0, 0], [0, 1, 0]])
_CHANNELS = ("r", "g", "b", "a")


@dataclass(frozen=True)
class Look:
    """A material, and the primvars it needs: `st` names texture coordinates, to be multiplied by `to_uv` [2, 3] (the
    picture's lower left corner is then (0, 0)); `color` names a corner colour. single: the texture must not repeat."""

    material: Material
    st: str | None = None
    to_uv: np.ndarray = field(default_factory=_ST.copy)
    color: str | None = None
    single: bool = False


@dataclass(frozen=True)
class _Picture:
    """A texture node's values: linear float32 [H, W, 4]."""

    linear: np.ndarray
    st: str
    to_uv: np.ndarray
    single: bool


class Materials:
    """value: gives an attribute's value at rest. pixels are counted over all textures of the file."""

    def __init__(self, layers: Layers, limits: Limits, warnings: list[str], value: Callable[[Any], Any]) -> None:
        self._layers, self._warnings, self._value = layers, warnings, value
        self._pixels_left = limits.texture_pixels
        self._looks: dict[Any, Look | None] = {}
        self._pictures: dict[Any, _Picture | None] = {}

    def look(self, material: Any) -> Look | None:
        """Of a UsdShade.Material; None (and a warning) where it is not a UsdPreviewSurface."""
        key = material.GetPath()
        if key not in self._looks:
            shader = material.ComputeSurfaceSource()[0]
            if shader and shader.GetShaderId() == "UsdPreviewSurface":
                self._looks[key] = self._surface(shader)
            else:
                self._warn("a material is no UsdPreviewSurface, so its colours are not used")
                self._looks[key] = None
        return self._looks[key]

    def _surface(self, shader: Any) -> Look:
        rgb, picture, color = self._diffuse(shader.GetInput("diffuseColor"))
        alpha, mask = self._opacity(shader.GetInput("opacity"))
        threshold = float(self._constant(shader.GetInput("opacityThreshold"), 0.0))
        base_4 = np.array([*rgb, alpha], np.float32)
        texels = None if picture is None else picture.linear.copy()
        if mask is not None:
            mask_HW, mask_picture = mask
            if texels is None:
                texels = np.ones((*mask_HW.shape, 4), np.float32)
            elif mask_HW.shape != texels.shape[:2]:
                size = texels.shape[1], texels.shape[0]
                mask_HW = np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.BILINEAR))
            texels[..., 3] = mask_HW
            if picture is not None and (picture.st != mask_picture.st or (picture.to_uv != mask_picture.to_uv).any()):
                self._warn("an opacity texture with texture coordinates of its own was placed as the colour is")
            picture = picture or mask_picture
        elif texels is not None:
            texels[..., 3] = 1
        is_opaque = alpha >= 1 and (mask is None or (texels is not None and texels[..., 3].min() >= 1))
        mode: AlphaMode = "OPAQUE" if is_opaque else "MASK" if threshold > 0 else "BLEND"
        material = Material(base_4, None if texels is None else _encoded(texels), mode, threshold or 0.5)
        if picture is None:
            return Look(material, color=color)
        return Look(material, picture.st, picture.to_uv, color, picture.single)

    def _diffuse(self, given: Any) -> tuple[Any, _Picture | None, str | None]:
        """A constant factor, a texture, and the primvar of a corner colour; those that are not there are neutral."""
        node, channel, value = self._source(given)
        if node is None:
            return np.full(3, _GREY) if value is None else np.array(value, np.float64)[:3], None, None
        if _is_a(node, "UsdUVTexture"):
            picture = self._picture(node)
            if picture is not None and channel in _CHANNELS:
                one = picture.linear[..., [_CHANNELS.index(channel)] * 3]
                picture = _Picture(np.concatenate([one, picture.linear[..., 3:]], axis=2), *_placing(picture))
            return np.ones(3), picture, None
        if node.GetShaderId() in ("UsdPrimvarReader_float3", "UsdPrimvarReader_float4"):
            return np.ones(3), None, self._varname(node, "displayColor")
        self._warn("a colour comes from a shader that is not read here, so it is not used")
        return np.ones(3), None, None

    def _opacity(self, given: Any) -> tuple[float, tuple[np.ndarray, _Picture] | None]:
        node, channel, value = self._source(given)
        if node is None:
            return 1.0 if value is None else float(value), None
        picture = self._picture(node) if _is_a(node, "UsdUVTexture") else None
        if picture is None or channel not in _CHANNELS:
            self._warn("an opacity is neither a number nor a texture, so it is not used")
            return 1.0, None
        return 1.0, (np.ascontiguousarray(picture.linear[..., _CHANNELS.index(channel)]), picture)

    def _source(self, given: Any) -> tuple[Any, str, Any]:
        """What gives an input its value: a shader and its output's name, or a constant."""
        if not given:
            return None, "", None
        for attribute in UsdShade.Utils.GetValueProducingAttributes(given):
            shader = UsdShade.Shader(attribute.GetPrim())
            if shader and UsdShade.Output.IsOutput(attribute):
                return shader, attribute.GetBaseName(), None
            return None, "", self._value(attribute)
        return None, "", None

    def _constant(self, given: Any, otherwise: Any) -> Any:
        node, _, value = self._source(given)
        return otherwise if node is not None or value is None else value

    # --------------------------------------------------------------------------------------------------- textures

    def _picture(self, node: Any) -> _Picture | None:
        key = node.GetPath()
        if key not in self._pictures:
            self._pictures[key] = self._read_picture(node)
        return self._pictures[key]

    def _read_picture(self, node: Any) -> _Picture | None:
        name = ""
        file = node.GetInput("file")
        try:
            named = UsdShade.Utils.GetValueProducingAttributes(file) if file else []
            if not named:
                raise FileNotFoundError("no file")
            name, data = self._layers.asset(named[0])
            texels = decode_image(data, self._pixels_left)
            self._pixels_left -= texels.shape[0] * texels.shape[1]
        except FileNotFoundError as error:
            name = str(error).removeprefix("[Errno 2] ")
            self._warn(f"the texture file {name[:80]!r} is missing, so its colours are not used")
            return None
        except (OSError, SyntaxError):
            self._warn(f"the texture {name[:80]!r} cannot be decoded, so its colours are not used")
            return None
        space = self._constant(node.GetInput("sourceColorSpace"), "auto")
        linear = texels.astype(np.float32) / 255
        if space == "sRGB" or (space != "raw" and _looks_like_srgb(data)):
            linear[..., :3] = srgb_to_linear(texels[..., :3])
        scale, bias = (self._constant(node.GetInput(name), (v,) * 4) for name, v in (("scale", 1.0), ("bias", 0.0)))
        linear = np.clip(linear * np.array(scale, np.float32) + np.array(bias, np.float32), 0, 1)
        st, to_uv = self._st(node.GetInput("st"))
        wrap_s, wrap_t = (self._constant(node.GetInput(name), "useMetadata") for name in ("wrapS", "wrapT"))
        if wrap_s == "mirror":
            linear = np.concatenate([linear, linear[:, ::-1]], axis=1)
            to_uv = to_uv * [[0.5], [1]]
        if wrap_t == "mirror":
            linear = np.concatenate([linear[::-1], linear], axis=0)  # rows run downwards, t upwards
            to_uv = to_uv * [[1], [0.5]]
        return _Picture(linear, st, to_uv, bool({wrap_s, wrap_t} & {"black", "clamp"}))

    def _st(self, given: Any) -> tuple[str, np.ndarray]:
        """The primvar of texture coordinates and the matrix [2, 3] of the UsdTransform2d nodes on their way."""
        matrix = np.eye(3)
        for _ in range(10):
            node, _, _ = self._source(given)
            if node is None:
                break
            if _is_a(node, "UsdTransform2d"):
                matrix = matrix @ self._transform_2d(node)
                given = node.GetInput("in")
                continue
            return self._varname(node, "st"), matrix[:2]
        return "st", matrix[:2]

    def _transform_2d(self, node: Any) -> np.ndarray:
        """in * scale, turned counter-clockwise, + translation."""
        angle = np.deg2rad(float(self._constant(node.GetInput("rotation"), 0.0)))
        scale_2 = np.array(self._constant(node.GetInput("scale"), (1, 1)), np.float64)
        matrix = np.eye(3)
        matrix[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale_2
        matrix[:2, 2] = self._constant(node.GetInput("translation"), (0, 0))
        return matrix

    def _varname(self, reader: Any, otherwise: str) -> str:
        return str(self._constant(reader.GetInput("varname"), otherwise)) or otherwise

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warnings:
            self._warnings.append(sentence)


def _placing(picture: _Picture) -> tuple[str, np.ndarray, bool]:
    return picture.st, picture.to_uv, picture.single


def _is_a(node: Any, shader_id: str) -> bool:
    return node.GetShaderId() == shader_id


def _looks_like_srgb(data: bytes) -> bool:
    """What `auto` means: 8 bits a channel and three or four of them."""
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        return image.mode not in ("1", "L", "LA", "I", "F", "I;16", "I;16B")


def _encoded(linear_HW4: np.ndarray) -> np.ndarray:
    """uint8 sRGB with straight alpha."""
    encoded = np.concatenate([linear_to_srgb(linear_HW4[..., :3]), linear_HW4[..., 3:]], axis=2)
    return np.round(encoded * 255).astype(np.uint8)
