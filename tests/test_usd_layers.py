"""USD files of several layers, and files that are broken, too large or hostile."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from usd_scenes import (
    RED_OVER_BLUE,
    TRIANGLE,
    Sdf,
    Usd,
    UsdGeom,
    UsdUtils,
    albedo,
    bind,
    new,
    picture,
    polygons,
    primvar,
    read,
    saved,
    textured,
)

from shapeloom.data_pipes.read import Limits, Rejected, read_mesh


def layered(folder: Path) -> Path:
    """A file that names layers by every means, each of which has a triangle; the last names a texture."""
    (folder / "sub" / "deep").mkdir(parents=True)
    picture(folder / "sub" / "t.png", [[[0, 255, 0]]])
    leaf = new(folder / "sub" / "deep" / "leaf.usdc")
    mesh = polygons(leaf)
    primvar(mesh, "st", Sdf.ValueTypeNames.TexCoord2fArray, [(0.5, 0.5)] * 3, "vertex")
    bind(mesh, textured(leaf, "../t.png")[0])
    saved(leaf)
    middle = new(folder / "sub" / "middle.usda")
    polygons(middle, "/Root/own", TRIANGLE + (5, 0, 0))
    inner = middle.DefinePrim("/Root/leaf")
    inner.GetPayloads().AddPayload("./deep/leaf.usdc")
    saved(middle)
    under = new(folder / "under.usd")
    polygons(under, "/Root/under", TRIANGLE + (10, 0, 0))
    saved(under)
    top = new(folder / "top.usda")
    top.GetRootLayer().subLayerPaths.append("under.usd")
    prim = top.DefinePrim("/Root/choice")
    chosen = prim.GetVariantSets().AddVariantSet("size")
    chosen.AddVariant("big")
    chosen.SetVariantSelection("big")
    with chosen.GetVariantEditContext():
        prim.GetReferences().AddReference("sub/middle.usda")
    return saved(top)


def test_layers_beside_a_file_are_part_of_it(tmp_path: Path) -> None:
    path = layered(tmp_path)
    warnings: list[str] = []
    sidecars: dict[str, str | None] = {}
    mesh = read_mesh(path, warnings=warnings, sidecars=sidecars)
    assert sorted(mesh.triangles[:, 0, 0]) == [0, 5, 10] and not warnings
    green = [k for k in range(3) if mesh.triangles[k, 0, 0] == 0]
    assert albedo(mesh, green[0]) == pytest.approx([0, 1, 0, 1])
    assert sorted(sidecars) == ["sub/deep/leaf.usdc", "sub/middle.usda", "sub/t.png", "under.usd"]
    package = tmp_path / "else" / "all.usdz"
    package.parent.mkdir()
    assert UsdUtils.CreateNewUsdzPackage(str(path), str(package))
    packed = read_mesh(package, warnings=warnings)
    assert packed.triangles == pytest.approx(mesh.triangles) and not warnings
    around = new(tmp_path / "else" / "around.usda")
    around.GetPrimAtPath("/Root").GetReferences().AddReference("all.usdz")
    assert read(around)[0].triangles == pytest.approx(mesh.triangles)


def test_layers_that_name_each_other_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        stage = new(tmp_path / f"{name}.usda")
        polygons(stage, f"/Root/{name}")
        saved(stage)
        layer = Sdf.Layer.FindOrOpen(str(tmp_path / f"{name}.usda"))
        layer.subLayerPaths.append(f"{other}.usda")
        layer.Save()
    assert len(read_mesh(tmp_path / "a.usda").faces) == 2


NAMED = {
    "sublayer": "#usda 1.0\n(subLayers = [@{}@])\n",
    "reference": '#usda 1.0\ndef Xform "Root" (references = @{}@</Root>) {{}}\n',
    "payload in a variant": """#usda 1.0
def Xform "Root" (prepend variantSets = "v") {{
    variantSet "v" = {{
        "one" (payload = @{}@</Root>) {{}}
    }}
}}
""",
}


@pytest.mark.parametrize("means", NAMED)
@pytest.mark.parametrize(
    "path",
    [
        "../secret.usda",
        "{folder}/secret.usda",
        "file:{folder}/secret.usda",
        "https://192.0.2.1/x.usda",
        "a/../../secret.usda",
    ],
)
def test_layers_never_lead_out_of_the_folder(tmp_path: Path, means: str, path: str) -> None:
    secret = new(tmp_path / "secret.usda")
    polygons(secret, "/Root/secret")
    saved(secret)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.usda").write_text(NAMED[means].format(path.format(folder=tmp_path)))
    with pytest.raises(Rejected, match="outside its folder"):
        read_mesh(tmp_path / "in" / "a.usda")
    with zipfile.ZipFile(tmp_path / "in" / "a.usdz", "w") as archive:
        archive.write(tmp_path / "in" / "a.usda", "a.usda")
    with pytest.raises(Rejected, match="outside its (folder|package)"):
        read_mesh(tmp_path / "in" / "a.usdz")


def test_no_search_path_expression_or_clip_leads_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not beside the file is not looked for where the process runs, as USD itself would."""
    secret = new(tmp_path / "secret.usda")
    polygons(secret, "/Root/secret")
    saved(secret)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    text = """#usda 1.0
( defaultPrim = "Root"
  expressionVariables = { string where = "%s" } )
def Xform "Root" ( prepend references = [@secret.usda@, @`"${where}/secret.usda"`@]
  clips = { dictionary default = { asset[] assetPaths = [@%s/secret.usda@]
            string primPath = "/Root"
            double2[] active = [(0, 0)] } } )
{
    def Mesh "m" { point3f[] points = [(0,0,0),(1,0,0),(0,1,0)]
                   int[] faceVertexCounts = [3]
                   int[] faceVertexIndices = [0,1,2]
                   uniform token subdivisionScheme = "none"
    }
}
"""
    (tmp_path / "in" / "a.usda").write_text(text % (tmp_path, tmp_path))
    assert Usd.Stage.Open(str(tmp_path / "in" / "a.usda")).GetPrimAtPath("/Root/secret")
    warnings: list[str] = []
    mesh = read_mesh(tmp_path / "in" / "a.usda", warnings=warnings)
    assert len(mesh.faces) == 1
    assert any("'secret.usda' is missing" in warning for warning in warnings)
    assert any("is an expression" in warning for warning in warnings)
    assert any("animated" in warning for warning in warnings)


def test_textures_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture(tmp_path / "secret.png", RED_OVER_BLUE)
    stage = new(tmp_path / "in" / "a.usda")
    bind(polygons(stage), textured(stage, "../secret.png")[0])
    with pytest.raises(Rejected, match="outside its folder"):
        read(stage)
    assert albedo(read(stage, root=tmp_path)[0]).size  # a build's root is the folder it was given


# -------------------------------------------------------------------------------------------- limits and bad files


def test_limits(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    polygons(stage, "/Root/m", np.tile(TRIANGLE, (4, 1)), (12,))
    scatter = UsdGeom.PointInstancer.Define(stage, "/Root/scatter")
    polygons(stage, "/Root/scatter/a")
    scatter.CreatePrototypesRel().SetTargets(["/Root/scatter/a"])
    scatter.CreateProtoIndicesAttr([0] * 50)
    scatter.CreatePositionsAttr([(float(k), 0, 0) for k in range(50)])
    for limits, reason in (
        (Limits(faces=9), "10 faces"),
        (Limits(faces=40), "41 faces"),
        (Limits(vertices=11), "12 vertices"),
        (Limits(nodes=50), "nodes"),
        (Limits(file_bytes=100), "bytes"),
    ):
        with pytest.raises(Rejected, match=reason):
            read(stage, limits=limits)
    scatter.GetPrototypesRel().SetTargets(["/Root/scatter"])
    with pytest.raises(Rejected, match="contain themselves"):
        read(stage)
    picture(tmp_path / "t.png", RED_OVER_BLUE)
    stage = new(tmp_path / "b.usda")
    mesh = polygons(stage)
    bind(mesh, textured(stage, "t.png")[0])
    with pytest.raises(Rejected, match="textures are too large"):
        read(stage, limits=Limits(texture_pixels=1))


def test_a_package_is_counted_as_it_unpacks(tmp_path: Path) -> None:
    stage = new(tmp_path / "a.usda")
    polygons(stage)
    text = saved(stage).read_bytes()
    with zipfile.ZipFile(tmp_path / "bomb.usdz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.usda", text + b"\n" * (10 << 20))
    with pytest.raises(Rejected, match="unpacks to more than"):
        read_mesh(tmp_path / "bomb.usdz", Limits(file_bytes=1 << 20))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    for data, reason in (
        (file.getvalue(), "another format"),
        (b"PK\x05\x06" + bytes(18), "is empty"),
        (b"no zip", "cannot be read"),
    ):
        (tmp_path / "bad.usdz").write_bytes(data)
        with pytest.raises(Rejected, match=reason):
            read_mesh(tmp_path / "bad.usdz")


def test_wrong_geometry_is_refused(tmp_path: Path) -> None:
    for change, reason in (
        (lambda mesh: mesh.CreateFaceVertexIndicesAttr([0, 1, 9]), "names a vertex"),
        (lambda mesh: mesh.CreateFaceVertexCountsAttr([9]), "fewer corners"),
        (lambda mesh: mesh.CreateFaceVertexCountsAttr([-3, 3]), "fewer corners"),
        (lambda mesh: mesh.CreatePointsAttr([(0, 0, 0), (1, 0, 0), (0, float("nan"), 0)]), "not finite"),
        (lambda mesh: mesh.AddScaleOp().Set((float("inf"), 1, 1)), "not finite"),
        (lambda mesh: mesh.CreateFaceVertexCountsAttr([]), "no triangles"),
    ):
        stage = Usd.Stage.CreateInMemory()
        change(polygons(stage))
        stage.Export(str(tmp_path / "a.usda"))
        with pytest.raises(Rejected, match=reason):
            read_mesh(tmp_path / "a.usda")


SCRAPS = ["", "9", "-", "]", "@", '"', "nan", "@x.usda@"]


def test_damaged_text_is_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = layered(tmp_path).read_text()
    scene = (tmp_path / "sub" / "middle.usda").read_text()
    good = rejected = 0
    for seed in range(120):
        rng = random.Random(seed)
        text = rng.choice([whole, scene])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(SCRAPS) + text[at + rng.randint(0, 3) :]
        (tmp_path / "bad.usda").write_text(text)
        try:
            read_mesh(tmp_path / "bad.usda")
            good += 1
        except Rejected:
            rejected += 1
    assert good > 2 and rejected > 50
    assert not capfd.readouterr().err


def test_without_the_library_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = new(tmp_path / "a.usda")
    polygons(stage)
    path = saved(stage)
    for name in [name for name in sys.modules if name.startswith("shapeloom.data_pipes.usd")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pxr", None)
    with pytest.raises(Rejected) as caught:
        read_mesh(path)
    assert caught.value.reason == "it needs the USD library, which is not installed"
    assert caught.value.hint == "pip install 'shapeloom[usd]'"
