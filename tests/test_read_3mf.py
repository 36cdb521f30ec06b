"""Reading 3MF: units, frame, placement, colours, textures, and packages that are broken or hostile."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shapeloom.data_pipes.read import Limits, Rejected, read_mesh

RELS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r" '
    'Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel" Target="/3D/m.model"/></Relationships>'
)
TRIANGLE = (
    '<mesh><vertices><vertex x="0" y="0" z="0"/><vertex x="1" y="0" z="0"/><vertex x="0" y="0" z="2"/></vertices>'
    "<triangles>{}</triangles></mesh>"
)
PLAIN = TRIANGLE.format('<triangle v1="0" v2="1" v3="2"/>')
CENTRE = np.full((1, 3), 1 / 3)


def model(resources: str, items: str = '<item objectid="1"/>', unit: str = "meter") -> str:
    core = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
    material = "http://schemas.microsoft.com/3dmanufacturing/material/2015/02"
    return (
        f'<model unit="{unit}" xmlns="{core}" xmlns:m="{material}" xmlns:p="urn:p"><resources>{resources}</resources>'
        f"<build>{items}</build></model>"
    )


def thing(inside: str) -> str:
    return f'<object id="1">{inside}</object>'


def package(path: Path, root: str, **parts: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_rels/.rels", RELS)
        archive.writestr("3D/m.model", root)
        for name, data in parts.items():
            archive.writestr(f"3D/{name}", data)
    return path


def test_units_are_metres_and_y_is_up(tmp_path: Path) -> None:
    for unit, metres in (("millimeter", 0.001), ("inch", 0.0254)):
        mesh = read_mesh(package(tmp_path / "a.3mf", model(thing(PLAIN), unit=unit)))
        # 3MF's z is our y.
        assert mesh.triangles[0] / metres == pytest.approx(np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]]), abs=1e-5)
    with pytest.raises(Rejected, match="'parsec'"):
        read_mesh(package(tmp_path / "a.3mf", model(thing(PLAIN), unit="parsec")))


def test_components_and_items_are_placed(tmp_path: Path) -> None:
    turn = "0 1 0 -1 0 0 0 0 1 10 0 0"  # x -> y, y -> -x, then 10 along x: rows multiply a row vector
    resources = (
        f'<object id="1">{PLAIN}</object><object id="2"><components><component objectid="1" transform="{turn}"/>'
        f'<component objectid="1"/></components></object><object id="3" type="support">{PLAIN}</object>'
    )
    items = '<item objectid="2" transform="1 0 0 0 1 0 0 0 1 0 0 5"/><item objectid="3"/>'
    mesh = read_mesh(package(tmp_path / "a.3mf", model(resources, items)))
    assert len(mesh.faces) == 2
    assert mesh.triangles[0] == pytest.approx(np.array([[10, 5, 0], [10, 5, -1], [10, 7, 0]]))
    assert mesh.triangles[1] == pytest.approx(np.array([[0, 5, 0], [1, 5, 0], [0, 7, 0]]))


def test_an_object_in_another_part(tmp_path: Path) -> None:
    root = model("", '<item objectid="7" p:path="/3D/other.model"/>')
    other = model(f'<object id="7">{PLAIN}</object>', "")
    assert len(read_mesh(package(tmp_path / "a.3mf", root, **{"other.model": other})).faces) == 1


def test_colours_of_faces_corners_and_objects(tmp_path: Path) -> None:
    triangles = (
        '<triangle v1="0" v2="1" v3="2"/><triangle v1="0" v2="1" v3="2" pid="5" p1="1"/>'
        '<triangle v1="0" v2="1" v3="2" pid="6" p1="0" p2="1" p3="0"/>'
    )
    resources = (
        '<basematerials id="5"><base name="a" displaycolor="#0A141E"/><base name="b" displaycolor="#FF8000FF"/>'
        '</basematerials><m:colorgroup id="6"><m:color color="#FF0000"/><m:color color="#00FF0080"/></m:colorgroup>'
        f'<object id="1" pid="5" pindex="0">{TRIANGLE.format(triangles)}</object>'
    )
    mesh = read_mesh(package(tmp_path / "a.3mf", model(resources)))
    corners = np.eye(3)[[0, 0, 0, 1]]
    rgb = np.rint(mesh.albedo(np.array([0, 1, 2, 2]), corners) * 255)[:, :3]
    assert rgb.tolist() == [[10, 20, 30], [255, 128, 0], [255, 0, 0], [0, 255, 0]]


def textured(picture: bytes) -> tuple[str, dict[str, bytes]]:
    resources = (
        '<m:texture2d id="2" path="/3D/t.png" contenttype="image/png"/><m:texture2dgroup id="3" texid="2">'
        '<m:tex2coord u="0.5" v="0.75"/><m:tex2coord u="0.5" v="0.25"/></m:texture2dgroup>'
    )
    triangles = '<triangle v1="0" v2="1" v3="2" pid="3" p1="0"/><triangle v1="0" v2="1" v3="2" pid="3" p1="1"/>'
    return model(f'{resources}<object id="1">{TRIANGLE.format(triangles)}</object>'), {"t.png": picture}


def test_texture_coordinates_grow_upwards(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8)).save(png, "PNG")  # red above blue
    root, parts = textured(png.getvalue())
    mesh = read_mesh(package(tmp_path / "a.3mf", root, **parts))
    assert np.rint(mesh.albedo(np.array([0, 1]), np.repeat(CENTRE, 2, 0))[:, [0, 2]]).tolist() == [[1, 0], [0, 1]]


def test_a_broken_texture_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    root, parts = textured(b"no picture")
    assert len(read_mesh(package(tmp_path / "a.3mf", root, **parts), warnings=warnings).faces) == 2
    assert "t.png" in warnings[0] and len(warnings) == 1


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (model(thing(PLAIN), '<item objectid="9"/>'), "object '9' is missing"),
        (model(thing('<components><component objectid="1"/></components>')), "part of itself"),
        (model(thing("")), "no triangles"),
        (model(thing(PLAIN.replace("v3=", "w="))), "structure is broken"),
        (model(thing(PLAIN.replace('v1="0"', 'v1="x"'))), "structure is broken"),
        (model(thing(PLAIN.replace('v1="0"', 'v1="3"'))), "does not exist"),
        (model(thing(PLAIN.replace('x="1"', 'x="1e300"'))), "not finite"),
        (model(thing(PLAIN.replace("x=", "y="))), "XML is broken"),
        (model('<vertex x="0" y="0" z="0"/>'), "object '1' is missing"),
        (model(thing(PLAIN).replace("<object", '<object type="other"')), "no triangles"),
        (f'<!DOCTYPE m [<!ENTITY a "aa">]>{model(PLAIN)}', "entities"),
        ("<model>", "XML is broken"),
    ],
)
def test_broken_models_are_rejected_with_their_reason(tmp_path: Path, root: str, reason: str) -> None:
    with pytest.raises(Rejected, match=reason) as caught:
        read_mesh(package(tmp_path / "a.3mf", root))
    assert caught.value.hint and "\n" not in caught.value.reason and "Rejected" not in caught.value.reason


def test_a_bomb_a_chain_and_a_cut_package(tmp_path: Path) -> None:
    bomb = package(tmp_path / "bomb.3mf", model(" " * 3_000_000))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(Rejected, match="unpacks to more than the 1,000,000 bytes"):
        read_mesh(bomb, Limits(file_bytes=1_000_000))
    # Ten objects, each twice the one before: 2^10 placements.
    doubling = "".join(
        f'<object id="{k}"><components>{2 * component}</components></object>'
        for k in range(2, 12)
        for component in [f'<component objectid="{k - 1}"/>']
    )
    chain = model(thing(PLAIN) + doubling, '<item objectid="11"/>')
    assert len(read_mesh(package(tmp_path / "a.3mf", chain)).faces) == 1024
    for limits, reason in ((Limits(nodes=500), "components"), (Limits(faces=500), "faces")):
        with pytest.raises(Rejected, match=f"501 {reason}"):
            read_mesh(tmp_path / "a.3mf", limits)
    whole = (tmp_path / "a.3mf").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "a.3mf").write_bytes(whole[:cut])
        with pytest.raises(Rejected, match="ZIP archive"):
            read_mesh(tmp_path / "a.3mf")


def test_a_real_file(assets_dir: Path) -> None:
    mesh = read_mesh(assets_dir / "hard" / "files" / "379" / "box.3mf")
    a, b, c = np.moveaxis(mesh.triangles.astype(float), 1, 0)
    volume = np.einsum("fi,fi->", a, np.cross(b, c)) / 6  # positive: its faces look outwards
    assert len(mesh.faces) == 12 and volume == pytest.approx(0.01 * 0.02 * 0.03, rel=1e-4)
    assert np.ptp(mesh.triangles, axis=(0, 1)) == pytest.approx([0.01, 0.03, 0.02])
