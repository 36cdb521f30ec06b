"""Reading USD: scenes authored with the USD library against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from usd_scenes import (
    RED_OVER_BLUE,
    TRIANGLE,
    Gf,
    Sdf,
    UsdGeom,
    UsdShade,
    UsdUtils,
    albedo,
    bind,
    connect,
    new,
    picture,
    polygons,
    primvar,
    read,
    saved,
    shader,
    surface,
    textured,
)

from shapeloom.data_pipes.mesh import linear_to_srgb
from shapeloom.data_pipes.read import Rejected, read_mesh


@pytest.mark.parametrize("suffix", [".usda", ".usdc", ".usd", ".usdz"])
def test_every_form_of_a_file_gives_the_same_mesh(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / "t.png", RED_OVER_BLUE)
    stage = new(tmp_path / (f"a{suffix}" if suffix != ".usdz" else "a.usdc"))
    mesh = polygons(stage)
    primvar(mesh, "st", Sdf.ValueTypeNames.TexCoord2fArray, [(0.5, 0.75)] * 3, "vertex")
    bind(mesh, textured(stage, "./t.png")[0])
    path = saved(stage)
    if suffix == ".usdz":
        path = tmp_path / "in" / "a.usdz"  # its texture is in it
        path.parent.mkdir()
        assert UsdUtils.CreateNewUsdzPackage(str(tmp_path / "a.usdc"), str(path))
    sidecars: dict[str, str | None] = {}
    warnings: list[str] = []
    result = read_mesh(path, warnings=warnings, sidecars=sidecars)
    assert result.triangles[0] == pytest.approx(TRIANGLE) and not warnings
    assert albedo(result) == pytest.approx([1, 0, 0, 1])  # v grows upwards: .75 is in the upper half
    assert list(sidecars) == ([] if suffix == ".usdz" else ["t.png"])


def test_metres_and_y_up(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    polygons(stage)
    UsdGeom.SetStageMetersPerUnit(stage, 0.01)
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    assert read(stage)[0].triangles[0] * 100 == pytest.approx(np.array([[0, 0, 0], [1, 0, 0], [0, 0, -2]]), abs=1e-5)
    stage.GetRootLayer().pseudoRoot.ClearInfo("metersPerUnit")
    assert read(stage)[0].triangles[0, 1] == pytest.approx([0.01, 0, 0])  # USD's own unit is the centimetre
    UsdGeom.SetStageMetersPerUnit(stage, 0)
    with pytest.raises(Rejected, match="unit is 0 metres"):
        read(stage)


def test_transforms_multiply_in_order_and_a_reset_begins_anew(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    root = UsdGeom.Xform.Get(stage, "/Root")
    root.AddTranslateOp().Set((10, 0, 0))
    root.AddRotateXYZOp().Set((10, 20, 30))
    root.AddScaleOp().Set((2, 3, 4))
    polygons(stage).AddTransformOp().Set(Gf.Matrix4d().SetTranslate((7, 8, 9)))
    pivoted = polygons(stage, "/Root/pivoted")
    pivoted.SetResetXformStack(True)
    pivoted.AddTranslateOp(opSuffix="pivot").Set((1, 0, 0))
    pivoted.AddRotateZOp().Set(90)
    pivoted.AddTranslateOp(opSuffix="pivot", isInverseOp=True)
    mesh, _ = read(stage)
    turned = Rotation.from_euler("xyz", (10, 20, 30), degrees=True)
    assert mesh.triangles[0] == pytest.approx(turned.apply((TRIANGLE + (7, 8, 9)) * (2, 3, 4)) + (10, 0, 0), abs=1e-5)
    about_1 = Rotation.from_euler("z", 90, degrees=True).apply(TRIANGLE - (1, 0, 0)) + (1, 0, 0)
    assert mesh.triangles[1] == pytest.approx(about_1, abs=1e-6)


def test_every_place_in_a_random_scene_is_usds_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stage = new(tmp_path / "a.usda")
    paths = ["/Root"]
    for k in range(40):
        paths.append(f"{paths[rng.integers(len(paths))]}/n{k}")
        node = polygons(stage, paths[-1]) if k % 2 else UsdGeom.Xform.Define(stage, paths[-1])
        for op in rng.permutation(4)[: rng.integers(1, 4)]:
            x, y, z = map(float, rng.uniform(0.5, 2, 3))
            if op == 0:
                node.AddTranslateOp().Set((x, y, z))
            elif op == 1:
                node.AddRotateZYXOp().Set((40 * x, 50 * y, 60 * z))
            elif op == 2:
                node.AddScaleOp().Set((x, y, -z))
            else:
                node.AddOrientOp().Set(Gf.Quatf(x, y, z, 1).GetNormalized())
        node.SetResetXformStack(bool(rng.random() < 0.1))
    cache = UsdGeom.XformCache()
    wanted = []
    for prim in stage.Traverse():
        if prim.IsA(UsdGeom.Mesh):
            matrix = np.array(cache.GetLocalToWorldTransform(prim)).T
            corners = TRIANGLE if np.linalg.det(matrix[:3, :3]) > 0 else TRIANGLE[::-1]
            wanted.append(corners @ matrix[:3, :3].T + matrix[:3, 3])
    assert read(stage)[0].triangles == pytest.approx(np.array(wanted), rel=1e-4, abs=1e-4)


def test_polygons_orientation_holes_and_mirrors(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    square = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    mesh = polygons(stage, "/Root/m", square, (4, 3, 2), (0, 1, 2, 3, 0, 1, 2, 0, 1))
    mesh.CreateHoleIndicesAttr([1])
    result, warnings = read(stage)
    assert len(result.faces) == 2 and (result.face_normals[:, 2] == 1).all() and not warnings
    assert result.face_areas.sum() == pytest.approx(1)
    mesh.CreateOrientationAttr(UsdGeom.Tokens.leftHanded)
    assert (read(stage)[0].face_normals[:, 2] == -1).all()
    mesh.AddScaleOp().Set((-1, 1, 1))  # a mirror turns the winding, not what is outside
    assert (read(stage)[0].face_normals[:, 2] == -1).all()
    mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.catmullClark)
    assert read(stage)[1] == ["its subdivision surfaces are not subdivided: their cages are taken"]


def test_what_is_not_shown_is_left_out(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    for name in ("shown", "hidden/child", "proxy/child", "guide", "render", "off", "proxy/but"):
        polygons(stage, f"/Root/{name}")
    UsdGeom.Xform.Define(stage, "/Root/hidden").CreateVisibilityAttr("invisible")
    UsdGeom.Xform.Define(stage, "/Root/proxy").CreatePurposeAttr("proxy")
    UsdGeom.Mesh.Get(stage, "/Root/guide").CreatePurposeAttr("guide")
    UsdGeom.Mesh.Get(stage, "/Root/render").CreatePurposeAttr("render")
    UsdGeom.Mesh.Get(stage, "/Root/proxy/but").CreatePurposeAttr("default")
    stage.GetPrimAtPath("/Root/off").SetActive(False)
    UsdGeom.Sphere.Define(stage, "/Root/ball")
    mesh, warnings = read(stage)
    assert len(mesh.faces) == 3 and warnings == ["what is no mesh was left out (Sphere)"]


def test_instances_of_both_kinds(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    polygons(stage, "/Kind/m")
    stage.GetPrimAtPath("/Kind").SetSpecifier(Sdf.SpecifierClass)
    for k in range(2):
        placed = UsdGeom.Xform.Define(stage, f"/Root/i{k}")
        placed.AddTranslateOp().Set((0, 0, 5.0 * k))
        placed.GetPrim().GetReferences().AddInternalReference("/Kind")
        placed.GetPrim().SetInstanceable(True)
        primvar(placed, "displayColor", Sdf.ValueTypeNames.Color3fArray, [(k, 1 - k, 0)], "constant")
    mesh, _ = read(stage)
    assert sorted(mesh.triangles[:, 0, 2]) == [0, 5]
    assert {tuple(albedo(mesh, k)[:3].round(4)) for k in range(2)} == {(0, 1, 0), (1, 0, 0)}  # inherited, each its own

    stage = new(tmp_path / "b.usda")
    scatter = UsdGeom.PointInstancer.Define(stage, "/Root/scatter")
    scatter.AddTranslateOp().Set((100, 0, 0))
    polygons(stage, "/Root/scatter/kinds/a").AddTranslateOp().Set((0, 0, 1))
    polygons(stage, "/Root/scatter/kinds/b", TRIANGLE * 2)
    scatter.CreatePrototypesRel().SetTargets(["/Root/scatter/kinds/a", "/Root/scatter/kinds/b"])
    scatter.CreateProtoIndicesAttr([0, 1, 0])
    scatter.CreatePositionsAttr([(1, 0, 0), (2, 0, 0), (3, 0, 0)])
    scatter.CreateScalesAttr([(1, 1, 1), (3, 3, 3), (1, 1, 1)])
    turn = Gf.Quath(Gf.Rotation(Gf.Vec3d(0, 0, 1), 90).GetQuat())
    scatter.CreateOrientationsAttr([Gf.Quath(1), Gf.Quath(1), turn])
    mesh, _ = read(stage)
    quarter = Rotation.from_euler("z", 90, degrees=True)
    wanted = [TRIANGLE + (101, 0, 1), TRIANGLE * 6 + (102, 0, 0), quarter.apply(TRIANGLE) + (103, 0, 1)]
    assert mesh.triangles == pytest.approx(np.array(wanted), abs=2e-3)  # orientations have half precision
    scatter.CreateInvisibleIdsAttr([1])
    assert len(read(stage)[0].faces) == 2
    scatter.CreateProtoIndicesAttr([0, 7, 0])
    with pytest.raises(Rejected, match="prototype that does not exist"):
        read(stage)


@pytest.mark.parametrize(
    ("interpolation", "values", "indices", "wanted"),
    [
        ("constant", [0], None, [[0] * 3, [0] * 3]),
        ("uniform", [0, 1], None, [[0] * 3, [1] * 3]),
        ("vertex", [0, 1, 2, 3], None, [[0, 1, 2], [0, 2, 3]]),
        ("varying", [3, 2, 1], [0, 1, 2, 0], [[3, 2, 1], [3, 1, 3]]),
        ("faceVarying", [0, 1, 2, 3, 2, 0], None, [[0, 1, 2], [3, 2, 0]]),
    ],
)
def test_display_colours_are_linear(
    tmp_path: Path, interpolation: str, values: list, indices: Any, wanted: list
) -> None:
    palette = np.array([[0.2, 0, 0], [0, 0.4, 0], [0, 0, 0.6], [0.1, 0.3, 0.5]])
    stage = new(tmp_path / "a.usda")
    square = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    mesh = polygons(stage, "/Root/m", square, (3, 3), (0, 1, 2, 0, 2, 3))
    colors = [tuple(map(float, palette[k])) for k in values]
    primvar(mesh, "displayColor", Sdf.ValueTypeNames.Color3fArray, colors, interpolation, indices)
    primvar(mesh, "displayOpacity", Sdf.ValueTypeNames.FloatArray, [0.25], "constant")
    result, warnings = read(stage)
    rgba = result.albedo(np.repeat([0, 1], 3), np.tile(np.eye(3), (2, 1)))
    assert rgba[:, :3] == pytest.approx(linear_to_srgb(palette[np.ravel(wanted)]), abs=1e-5)
    assert rgba[:, 3] == pytest.approx(0.25) and not warnings
    if interpolation != "constant":
        primvar(mesh, "displayColor", Sdf.ValueTypeNames.Color3fArray, colors[:1], interpolation)
        assert "'displayColor' has too few values" in read(stage)[1][0]


def test_a_surfaces_constants_subsets_and_inherited_bindings(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    square = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    mesh = polygons(stage, "/Root/m", square, (3, 3), (0, 1, 2, 0, 2, 3))
    material, preview = surface(stage, diffuseColor=(0.5, 0.25, 0.125), opacity=0.75)
    bind(UsdGeom.Xform.Get(stage, "/Root"), material)
    subset = UsdGeom.Subset.CreateGeomSubset(mesh, "s", UsdGeom.Tokens.face, [1], "materialBind")
    bind(subset, surface(stage, "/Root/plain")[0])
    result, _ = read(stage)
    shown = {tuple(result.triangles[k, 1]): albedo(result, k) for k in range(2)}
    wanted = [*linear_to_srgb(np.array([0.5, 0.25, 0.125])), 0.75]
    assert shown[1, 0, 0] == pytest.approx(wanted, abs=1e-5)
    assert shown[1, 1, 0] == pytest.approx([*linear_to_srgb(np.full(3, 0.18)), 1], abs=1e-5)
    preview.CreateInput("opacityThreshold", Sdf.ValueTypeNames.Float).Set(0.8)
    assert sorted({m.alpha_mode for m in read(stage)[0].materials}) == ["MASK", "OPAQUE"]
    subset.CreateIndicesAttr([9])
    with pytest.raises(Rejected, match="a subset names a face"):
        read(stage)


def test_a_corner_colour_may_be_a_surfaces_diffuse_colour(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    primvar(mesh, "mine", Sdf.ValueTypeNames.Color3fArray, [(0, 0.5, 1)], "constant")
    material, preview = surface(stage)
    connect(preview, "diffuseColor", shader(stage, "/Root/mat/r", "UsdPrimvarReader_float3", varname="mine"), "result")
    bind(mesh, material)
    assert albedo(read(stage)[0])[:3] == pytest.approx(linear_to_srgb(np.array([0, 0.5, 1])), abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "st", "wanted"),
    [
        ({}, (0.5, 0.25), (0, 0, 1)),
        ({"scale": (0.5, 0.5, 0.5, 1.0)}, (0.5, 0.75), (0.7354, 0, 0)),
        ({"scale": (0.5, 0.5, 0.5, 1.0), "bias": (0.0, 0.5, 0.0, 0.0)}, (0.5, 0.75), (0.7354, 0.7354, 0)),
        ({"wrapT": "repeat"}, (0.5, 1.25), (0, 0, 1)),
        ({"wrapT": "mirror"}, (0.5, 1.25), (1, 0, 0)),
        ({"wrapT": "mirror"}, (0.5, -0.25), (0, 0, 1)),
        ({"wrapS": "mirror", "wrapT": "mirror"}, (1.5, 1.75), (0, 0, 1)),
    ],
)
def test_textures(tmp_path: Path, inputs: dict, st: tuple, wanted: tuple) -> None:
    picture(tmp_path / "t.png", RED_OVER_BLUE)
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    primvar(mesh, "uv", Sdf.ValueTypeNames.TexCoord2fArray, [st] * 3, "faceVarying")
    bind(mesh, textured(stage, "t.png", "uv", **inputs)[0])
    result, warnings = read(stage)
    assert albedo(result)[:3] == pytest.approx(wanted, abs=0.003) and not warnings


def test_raw_and_grey_textures_are_linear_light(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    primvar(mesh, "st", Sdf.ValueTypeNames.TexCoord2fArray, [(0.5, 0.5)] * 3, "vertex")
    material, _, texture = textured(stage, "t.png")
    bind(mesh, material)
    space = texture.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token)
    as_srgb, as_linear = 128 / 255, float(linear_to_srgb(np.array([128 / 255]))[0])
    for pixels, name, wanted in (
        ([[[128] * 3]], "auto", as_srgb),
        ([[[128] * 3]], "raw", as_linear),
        ([[128]], "auto", as_linear),
        ([[128]], "sRGB", as_srgb),
    ):
        picture(tmp_path / "t.png", pixels)
        space.Set(name)
        assert albedo(read(stage)[0])[:3] == pytest.approx([wanted] * 3, abs=0.003)


def test_texture_transforms(tmp_path: Path) -> None:
    picture(tmp_path / "t.png", np.random.default_rng(0).integers(0, 256, (8, 8, 3)))
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    material, _, texture = textured(stage, "t.png")
    bind(mesh, material)
    primvar(mesh, "st", Sdf.ValueTypeNames.TexCoord2fArray, [(0.1, 0.2)] * 3, "vertex")
    inputs = {"rotation": 30.0, "scale": (2.0, 0.5), "translation": (0.3, 0.1)}
    moved = shader(stage, "/Root/mat/moved", "UsdTransform2d", **inputs)
    reader = UsdShade.Shader.Get(stage, "/Root/mat/reader")
    moved.CreateInput("in", Sdf.ValueTypeNames.Float2).ConnectToSource(reader.ConnectableAPI(), "result")
    texture.GetInput("st").ConnectToSource(moved.ConnectableAPI(), "result")
    turn = Rotation.from_euler("z", 30, degrees=True).as_matrix()[:2, :2]
    s, t = turn @ (np.array([0.1, 0.2]) * (2, 0.5)) + (0.3, 0.1)
    assert read(stage)[0].corner_uv[0] == pytest.approx(np.tile([s, 1 - t], (3, 1)), abs=1e-6)


def test_opacity_textures(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[255, 0, 0, 51]]], np.uint8)).save(tmp_path / "t.png")
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    primvar(mesh, "st", Sdf.ValueTypeNames.TexCoord2fArray, [(0.5, 0.5)] * 3, "vertex")
    material, preview, texture = textured(stage, "t.png")
    bind(mesh, material)
    assert read(stage)[0].opaque  # its alpha is connected to nothing
    connect(preview, "opacity", texture, "a")
    assert albedo(read(stage)[0]) == pytest.approx([1, 0, 0, 0.2], abs=0.003)
    preview.CreateInput("opacityThreshold", Sdf.ValueTypeNames.Float).Set(0.1)
    result, _ = read(stage)
    assert result.materials[0].alpha_mode == "MASK" and albedo(result)[3] == 1


def test_what_is_missing_is_said_and_the_rest_is_read(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    material, _, texture = textured(stage, "none.png")
    bind(mesh, material)
    assert "texture file 'none.png' is missing" in read(stage)[1][0]
    picture(tmp_path / "t.png", RED_OVER_BLUE)
    texture.GetInput("file").Set(Sdf.AssetPath("C:\\art\\t.png"))
    assert read(stage)[1] == ["a texture has no texture coordinates, so its colours are not used"]
    (tmp_path / "t.png").write_bytes(b"no picture")
    assert "cannot be decoded" in read(stage)[1][0]
    stage.GetRootLayer().subLayerPaths.append("./gone.usdc")
    stage.GetPrimAtPath("/Root").GetReferences().AddReference("also/gone.usda")
    missing = [warning for warning in read(stage)[1] if warning.startswith("the layer")]
    assert len(missing) == 2
    UsdShade.Shader.Get(stage, "/Root/mat/preview").CreateIdAttr("ND_standard_surface")
    assert "a material is no UsdPreviewSurface, so its colours are not used" in read(stage)[1]


def test_animated_files_are_at_rest_and_say_so(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    mesh = polygons(stage)
    move = mesh.AddTranslateOp()
    move.Set((0, 0, 1), 3)
    assert read(stage)[0].triangles[0, 0, 2] == 1 and not read(stage)[1]  # one sample is no animation
    move.Set((0, 0, 2), 5)
    result, warnings = read(stage)
    assert result.triangles[0, 0, 2] == 1 and warnings == ["it is animated: its rest pose is taken"]
    move.Set((0, 0, 7))
    result, warnings = read(stage)
    assert result.triangles[0, 0, 2] == 7 and warnings == ["it is animated: its rest pose is taken"]
