"""Small USD scenes, authored with the USD library. Importing it skips the tests of a file where that is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.data_pipes.read import read_mesh

pytest.importorskip("pxr", reason="the extra [usd] is not installed")
from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, UsdUtils, Vt  # noqa: F401

CENTRE = np.full((1, 3), 1 / 3)
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]], np.float32)
Stage = Any


def new(path: Path) -> Stage:
    """A stage in metres, +Y up, whose default prim is /Root."""
    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageMetersPerUnit(stage, 1)
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    stage.SetDefaultPrim(UsdGeom.Xform.Define(stage, "/Root").GetPrim())
    return stage


def polygons(
    stage: Stage, path: str = "/Root/m", points: Any = TRIANGLE, counts: Any = (3,), corners: Any = None
) -> Any:
    mesh = UsdGeom.Mesh.Define(stage, path)
    mesh.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(np.array(points, np.float32)))
    mesh.CreateFaceVertexCountsAttr(list(counts))
    mesh.CreateFaceVertexIndicesAttr(list(range(len(points)) if corners is None else corners))
    mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    return mesh


def primvar(mesh: Any, name: str, kind: Any, values: Any, interpolation: str, indices: Any = None) -> None:
    made = UsdGeom.PrimvarsAPI(mesh).CreatePrimvar(name, kind, interpolation)
    made.Set(values)
    if indices is not None:
        made.SetIndices(Vt.IntArray(indices))


def shader(stage: Stage, path: str, kind: str, **inputs: Any) -> Any:
    made = UsdShade.Shader.Define(stage, path)
    made.CreateIdAttr(kind)
    for name, value in inputs.items():
        types = {str: "token", float: "float", tuple: {2: "float2", 3: "color3f", 4: "float4"}, Sdf.AssetPath: "asset"}
        known = types[type(value)]
        known = known[len(value)] if isinstance(known, dict) else known
        made.CreateInput(name, getattr(Sdf.ValueTypeNames, known[0].upper() + known[1:])).Set(value)
    return made


def surface(stage: Stage, path: str = "/Root/mat", **inputs: Any) -> tuple[Any, Any]:
    """A material and its UsdPreviewSurface."""
    material = UsdShade.Material.Define(stage, path)
    preview = shader(stage, f"{path}/preview", "UsdPreviewSurface", **inputs)
    material.CreateSurfaceOutput().ConnectToSource(preview.ConnectableAPI(), "surface")
    return material, preview


def bind(prim: Any, material: Any) -> None:
    UsdShade.MaterialBindingAPI.Apply(prim.GetPrim()).Bind(material)


def textured(stage: Stage, file: str, st: str = "st", **inputs: Any) -> tuple[Any, Any, Any]:
    """A material whose diffuse colour is a texture, its surface and the texture's node."""
    material, preview = surface(stage)
    reader = shader(stage, "/Root/mat/reader", "UsdPrimvarReader_float2", varname=st)
    texture = shader(stage, "/Root/mat/texture", "UsdUVTexture", file=Sdf.AssetPath(file), **inputs)
    texture.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(reader.ConnectableAPI(), "result")
    connect(preview, "diffuseColor", texture, "rgb")
    return material, preview, texture


def connect(preview: Any, name: str, node: Any, output: str) -> None:
    kind = Sdf.ValueTypeNames.Color3f if name == "diffuseColor" else Sdf.ValueTypeNames.Float
    node.CreateOutput(output, kind)
    preview.CreateInput(name, kind).ConnectToSource(node.ConnectableAPI(), output)


def saved(stage: Stage) -> Path:
    stage.GetRootLayer().Save()
    return Path(stage.GetRootLayer().realPath)


def read(stage: Stage, **options: Any) -> tuple[Mesh, list[str]]:
    warnings: list[str] = []
    return read_mesh(saved(stage), warnings=warnings, **options), warnings


def albedo(mesh: Mesh, face: int = 0) -> np.ndarray:
    return mesh.albedo(np.array([face]), CENTRE)[0]


def picture(path: Path, rows: Any) -> None:
    Image.fromarray(np.array(rows, np.uint8)).save(path)


RED_OVER_BLUE = [[[255, 0, 0]], [[0, 0, 255]]]
