"""Reading COLLADA: axes and units, transforms, polygons, colours and textures, and files that are broken or hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.data_pipes.read import Limits, Rejected, read_mesh

CENTRE = np.full((1, 3), 1 / 3)
VERTEX = '<input semantic="VERTEX" source="#v" offset="0"/>'
TRIANGLE = f'<triangles material="m">{VERTEX}<p>0 1 2</p></triangles>'
INSTANCE = '<instance_geometry url="#g"/>'
BOUND = (
    '<instance_geometry url="#g"><bind_material><technique_common><instance_material symbol="m" target="#mat">'
    '<bind_vertex_input semantic="UV" input_semantic="TEXCOORD" input_set="1"/></instance_material>'
    "</technique_common></bind_material></instance_geometry>"
)


def source(name: str, values: object) -> str:
    values = np.array(values)
    text = " ".join(map(str, values.ravel()))
    return (
        f'<source id="{name}"><float_array id="{name}-a" count="{values.size}">{text}</float_array><technique_common>'
        f'<accessor source="#{name}-a" count="{len(values)}" stride="{values.shape[1]}"/></technique_common></source>'
    )


def collada(parts: str = TRIANGLE, nodes: str = f"<node>{INSTANCE}</node>", asset: str = "", more: str = "") -> str:
    corners = source("xyz", [[0, 0, 0], [1, 0, 0], [0, 2, 0], [-1, 1, 0]])
    return (
        f'<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema"><asset>{asset}</asset>{more}'
        f'<library_geometries><geometry id="g"><mesh>{corners}<vertices id="v"><input semantic="POSITION" source="#xyz"'
        f"/></vertices>{parts}</mesh></geometry></library_geometries><library_visual_scenes><visual_scene "
        f'id="s">{nodes}</visual_scene></library_visual_scenes><scene><instance_visual_scene url="#s"/></scene>'
        "</COLLADA>"
    )


def effect(diffuse: str, parameters: str = "", images: str = "") -> str:
    return (
        f"<library_images>{images}</library_images>"
        '<library_materials><material id="mat"><instance_effect url="#e"/></material></library_materials>'
        f'<library_effects><effect id="e"><profile_COMMON>{parameters}<technique><phong><diffuse>{diffuse}</diffuse>'
        "</phong></technique></profile_COMMON></effect></library_effects>"
    )


def read(path: Path, text: str, **options: Any) -> Mesh:
    path.write_text(text)
    return read_mesh(path, **options)


@pytest.mark.parametrize(
    ("axis", "corner_1", "corner_2"),
    [("Y_UP", [1, 0, 0], [0, 2, 0]), ("Z_UP", [1, 0, 0], [0, 0, -2]), ("X_UP", [0, 1, 0], [-2, 0, 0])],
)
def test_metres_and_y_up(tmp_path: Path, axis: str, corner_1: list, corner_2: list) -> None:
    mesh = read(tmp_path / "a.dae", collada(asset=f'<unit meter="0.01"/><up_axis>{axis}</up_axis>'))
    assert mesh.triangles[0] * 100 == pytest.approx(np.array([[0, 0, 0], corner_1, corner_2]), abs=1e-5)


def test_transforms_multiply_in_the_order_of_the_file(tmp_path: Path) -> None:
    nodes = (
        '<node><translate>10 0 0</translate><rotate>1 2 3 40</rotate><scale>2 3 4</scale><node id="n">'
        f"<matrix>1 0 0 7 0 1 0 8 0 0 1 9 0 0 0 1</matrix>{INSTANCE}</node></node><node><instance_node "
        'url="#n"/></node>'
    )
    mesh = read(tmp_path / "a.dae", collada(nodes=nodes))
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]]) + (7, 8, 9)
    axis = np.array([1, 2, 3]) / np.sqrt(14)
    turned = Rotation.from_rotvec(np.deg2rad(40) * axis).apply(corners * (2, 3, 4)) + (10, 0, 0)
    assert mesh.triangles[0] == pytest.approx(turned, abs=1e-5)
    assert mesh.triangles[1] == pytest.approx(corners)


@pytest.mark.parametrize(
    ("part", "faces"),
    [
        ("<polylist>{}<vcount>4 2 3</vcount><p>0 1 2 3 0 1 2 1 0</p></polylist>", ["012", "023", "210"]),
        ("<polygons>{}<p>0 1 2 3</p><p>0 1 2</p></polygons>", ["012", "023", "012"]),
        ("<tristrips>{}<p>0 1 3 2</p><p>0 1 2</p></tristrips>", ["013", "123", "012"]),
        ("<trifans>{}<p>0 1 2 3</p></trifans>", ["012", "023"]),
        ("<triangles>{}<p>0 1 2 0 2 3</p></triangles>", ["012", "023"]),
    ],
)
def test_every_kind_of_polygon(tmp_path: Path, part: str, faces: list[str]) -> None:
    mesh = read(tmp_path / "a.dae", collada(part.format(VERTEX)))
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [-1, 1, 0]], np.float32)

    def cycles(triangles: np.ndarray) -> list:  # where a triangle begins does not matter, its winding does
        return [sorted(np.roll(triangle, k, axis=0).tolist() for k in range(3)) for triangle in triangles]

    wanted = np.array([[corners[int(i)] for i in face] for face in faces])
    assert cycles(mesh.triangles) == cycles(wanted)


def test_diffuse_and_vertex_colours(tmp_path: Path) -> None:
    more = effect("<color>0.2 0.4 0.6 1</color>")
    mesh = read(tmp_path / "a.dae", collada(nodes=f"<node>{BOUND}</node>", more=more))
    assert mesh.albedo(np.array([0]), CENTRE)[0, :3] == pytest.approx([0.2, 0.4, 0.6], abs=1e-5)
    colors = source("c", [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    part = f'{colors}<triangles>{VERTEX}<input semantic="COLOR" source="#c" offset="1"/><p>0 2 1 0 2 1</p></triangles>'
    mesh = read(tmp_path / "a.dae", collada(part))
    rgb = mesh.albedo(np.zeros(3, int), np.eye(3))[:, :3]
    assert rgb == pytest.approx(np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]), abs=1e-6)


TEXTURED = (
    source("uv0", [[0.5, 0.25]]) + source("uv1", [[0.5, 0.75]]) + f'<triangles material="m">{VERTEX}'
    '<input semantic="TEXCOORD" source="#uv0" offset="1" set="0"/>'
    '<input semantic="TEXCOORD" source="#uv1" offset="1" set="1"/><p>0 0 1 0 2 0</p></triangles>'
)
SAMPLER_14 = (
    '<newparam sid="surface"><surface type="2D"><init_from>img</init_from></surface></newparam>'
    '<newparam sid="sampler"><sampler2D><source>surface</source></sampler2D></newparam>'
)
SAMPLER_15 = '<newparam sid="sampler"><sampler2D><instance_image url="#img"/></sampler2D></newparam>'


@pytest.mark.parametrize(
    ("sampler", "place"),
    [
        (SAMPLER_14, "<init_from>my%20t.png</init_from>"),
        (SAMPLER_15, "<init_from><ref>./my t.png</ref></init_from>"),
        (SAMPLER_14, "<init_from>file:///C:/art/my%20t.png</init_from>"),
    ],
)
def test_textures_by_the_coordinates_that_the_material_names(tmp_path: Path, sampler: str, place: str) -> None:
    Image.fromarray(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8)).save(tmp_path / "my t.png")  # red above blue
    image = f'<image id="img">{place}</image>'
    for name, red in (("UV", 1), ("other", 0)):  # what is not bound means the first set
        more = effect(f'<texture texture="sampler" texcoord="{name}"/>', sampler, image)
        mesh = read(tmp_path / "a.dae", collada(TEXTURED, f"<node>{BOUND}</node>", more=more))
        assert mesh.albedo(np.array([0]), CENTRE)[0, [0, 2]] == pytest.approx([red, 1 - red])
    (tmp_path / "my t.png").unlink()
    warnings: list[str] = []
    mesh = read(tmp_path / "a.dae", (tmp_path / "a.dae").read_text(), warnings=warnings)
    assert mesh.albedo(np.array([0]), CENTRE)[0] == pytest.approx(1)
    assert "t.png' is missing" in warnings[0] and len(warnings) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (collada().replace("0 1 2</p>", "0 1 9</p>"), "does not exist"),
        (collada().replace("0 1 2</p>", "0 1 x</p>"), "structure is broken"),
        (collada().replace('count="4"', 'count="99"'), "shorter than it says"),
        (collada().replace("#xyz", "#zyx"), "there is no 'zyx'"),
        (collada().replace(">0 0 0 ", ">0 nan 0 "), "not finite"),
        (collada(nodes=""), "no triangles"),
        (collada(nodes=f'<node id="n">{INSTANCE}<instance_node url="#n"/></node>'), "contain themselves"),
        (collada(asset="<up_axis>W_UP</up_axis>"), "structure is broken"),
        (collada(asset='<unit meter="0"/>'), "0 metres long"),
        (collada(f"<polylist>{VERTEX}<vcount>9223372036854775807 2</vcount><p>0 1 2</p></polylist>"), "fewer"),
        ("<svg/>", "not COLLADA"),
        ('<!DOCTYPE a [<!ENTITY b "bb">]><COLLADA>&b;</COLLADA>', "entities"),
        (collada()[:-20], "XML is broken"),
    ],
)
def test_broken_files_are_rejected_with_their_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Rejected, match=reason) as caught:
        read(tmp_path / "a.dae", text)
    assert caught.value.hint and "\n" not in caught.value.reason and "Rejected" not in caught.value.reason


def test_limits_hold_before_instances_are_placed(tmp_path: Path) -> None:
    # Ten nodes, each twice the one before: 2^10 placements.
    nodes = f'<node id="n0">{INSTANCE}</node>' + "".join(
        f'<node id="n{k}">{2 * instance}</node>'
        for k in range(1, 11)
        for instance in [f'<instance_node url="#n{k - 1}"/>']
    )
    for limits, reason in ((Limits(nodes=500), "501 nodes"), (Limits(faces=500), "501 faces")):
        with pytest.raises(Rejected, match=reason):
            read(tmp_path / "a.dae", collada(nodes=nodes), limits=limits)


def test_real_files(assets_dir: Path) -> None:
    files = assets_dir / "hard" / "files"
    cube = read_mesh(files / "377" / "cube_UTF16LE.dae")
    assert np.ptp(cube.triangles, axis=(0, 1)) == pytest.approx(1) and len(cube.faces) == 12
    assert cube.albedo(np.array([0]), CENTRE)[0, :3] == pytest.approx([0.137255, 0.403922, 0.870588], abs=1e-5)
    chef = read_mesh(files / "386" / "chr_chef.dae")
    assert np.ptp(chef.triangles, axis=(0, 1)).argmax() == 1  # he stands upright though the file is +Z up
