"""Reading COLLADA: axes and units, transforms, polygons, colours and textures, and files that are broken or hostile."""

from __future__ import annotations

import random
import re
import warnings as python_warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from shapeloom.data_pipes.limits import ANIMATED
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


def skinned(joints: str = "a b") -> str:
    """The triangle, raised by its bind shape and bound to joints at the origin; vertex 3 is in no face."""
    skin = (
        '<library_controllers><controller id="k"><skin source="#g"><bind_shape_matrix>1 0 0 0 0 1 0 0 0 0 1 1 0 0 0 1'
        f'</bind_shape_matrix><source id="j"><Name_array id="j-a">{joints}</Name_array></source>'
        + source("i", np.stack([np.eye(4).ravel()] * 2))
        + source("w", [[1.0], [0.5], [3.0]])
        + '<joints><input semantic="JOINT" source="#j"/><input semantic="INV_BIND_MATRIX" source="#i"/></joints>'
        '<vertex_weights><input semantic="JOINT" source="#j" offset="0"/>'
        '<input semantic="WEIGHT" source="#w" offset="1"/>'
        "<vcount>1 2 2 1</vcount><v>0 0 0 1 1 1 0 0 1 2 -1 0</v></vertex_weights></skin></controller>"
        "</library_controllers>"
    )
    nodes = (
        '<node><translate>99 0 0</translate><instance_controller url="#k"><skeleton>#A</skeleton>'
        '</instance_controller></node><node><translate>0 10 0</translate><node id="A" sid="a"><translate>0 10 0'
        '</translate><node sid="b"><rotate>0 0 1 90</rotate></node></node></node><node sid="b"/>'
    )
    return collada(nodes=nodes, more=skin)


def test_a_skinned_mesh_is_at_rest(tmp_path: Path) -> None:
    """Joint a moves by (0, 20, 0), joint b turns x to y besides; the node of the mesh itself does not count."""
    mesh = read(tmp_path / "a.dae", skinned())
    # Vertex 1, (1, 0, 1), by half of each; vertex 2, (0, 2, 1), a quarter by a and three quarters by b.
    wanted = np.array([[0, 20, 1], [0.5, 20.5, 1], [-1.5, 20.5, 1]])
    assert mesh.triangles[0] == pytest.approx(wanted, abs=1e-5)
    unbound = skinned().replace("<vcount>1 2 2", "<vcount>1 2 0").replace("0 0 1 2 -1 0<", "-1 0<")
    assert read(tmp_path / "a.dae", unbound).triangles[0, 2] == pytest.approx([0, 2, 1])  # as its bind shape says
    warnings: list[str] = []
    mesh = read(tmp_path / "a.dae", skinned("a nobody"), warnings=warnings)
    assert "a skin is broken" in warnings[0]
    assert mesh.triangles[0, 0] == pytest.approx([99, 0, 0])


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


def test_any_wrong_value_ends_in_a_mesh_or_a_rejection(tmp_path: Path) -> None:
    """Values of attributes and words of texts are replaced, and NumPy has nothing to say of it."""
    more = effect('<texture texture="sampler" texcoord="UV"/>', SAMPLER_14, '<image id="img"/>')
    texts = [skinned(), collada(TEXTURED, f"<node><rotate>1 0 0 9</rotate>{BOUND}</node>", more=more)]
    values = ["", "-1", "0", "9", "1e300", "nan", "x", "#v", "#g", "#k", "99999999999999999999", "1 2"]
    good = rejected = 0
    for seed in range(600):
        rng = random.Random(seed)
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 3)):
            start, end = rng.choice(
                [m.span(m.lastindex or 0) for m in re.finditer(r'="([^"]*)"|(?<=[> ])([^<> "=]+)(?=[< ])', text)]
            )
            text = text[:start] + rng.choice(values) + text[end:]
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("error")
            try:
                read(tmp_path / "a.dae", text)
                good += 1
            except Rejected:
                rejected += 1
    assert good > 50 and rejected > 50


def test_an_animated_file_says_that_it_is_at_rest(tmp_path: Path) -> None:
    for channel, wanted in (("", []), ('<channel source="#s" target="n/t"/>', [ANIMATED])):
        more = f"<library_animations><animation><animation>{channel}</animation></animation></library_animations>"
        warnings: list[str] = []
        assert len(read(tmp_path / "a.dae", collada(more=more), warnings=warnings).faces) == 1
        assert warnings == wanted


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
    a, b, c = np.moveaxis(cube.triangles.astype(float), 1, 0)
    assert np.einsum("fi,fi->", a, np.cross(b, c)) / 6 == pytest.approx(1)  # positive: its faces look outwards
    assert cube.albedo(np.array([0]), CENTRE)[0, :3] == pytest.approx([0.137255, 0.403922, 0.870588], abs=1e-5)
    chef = read_mesh(files / "386" / "chr_chef.dae")
    assert np.ptp(chef.triangles, axis=(0, 1)).argmax() == 1  # he stands upright though the file is +Z up
