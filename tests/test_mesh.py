"""Meshes and their colours, and reading them from files, good and bad."""

from __future__ import annotations

import base64
import io
import json
import struct
import warnings as python_warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapeloom.data_pipes.mesh import Material, Mesh, linear_to_srgb, merge, srgb_to_linear
from shapeloom.data_pipes.read import Limits, Rejected, read_mesh
from shapeloom.data_pipes.workers import Failed, isolated_map
from shapeloom.launch.bench.hard import ALLOWED

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
CENTRE = np.full((1, 3), 1 / 3, np.float32)


def one_triangle(material: Material, **corners: np.ndarray) -> Mesh:
    return Mesh(TRIANGLE, [[0, 1, 2]], [0], (material,), **corners)


# ------------------------------------------------------------------------------------------------------- colours


def test_every_byte_survives_linear_light() -> None:
    values = np.arange(256, dtype=np.uint8)
    assert (np.rint(linear_to_srgb(srgb_to_linear(values)) * 255) == values).all()
    assert srgb_to_linear(np.array([0.5])) == pytest.approx([0.21404], abs=1e-5)


@pytest.mark.parametrize("rgb", [[255, 128, 3], [0, 0, 0]])
def test_flat_colours_come_back_exactly(rgb: list[int]) -> None:
    for mesh in (
        Mesh.from_face_colors(TRIANGLE, [[0, 1, 2]], np.array([rgb], np.uint8)),
        Mesh.from_vertex_colors(TRIANGLE, [[0, 1, 2]], np.array([rgb] * 3) / 255),
    ):
        assert mesh.albedo(np.array([0]), CENTRE)[0] * 255 == pytest.approx([*rgb, 255], abs=1e-3)


def test_texture_colours_are_found_where_gltf_puts_them() -> None:
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[0, 0, :3], texture[0, 1, :3] = (255, 0, 0), (0, 255, 0)  # upper left, upper right
    texture[1, 0, :3], texture[1, 1, :3] = (0, 0, 255), (9, 9, 9)
    material = Material(np.ones(4), texture)
    corners = np.eye(3, dtype=np.float32)
    for shift in (0, 1000, -3):  # textures repeat
        mesh = one_triangle(material, corner_uv=np.array([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]]]) + shift)
        rgb = np.rint(mesh.albedo(np.zeros(3, int), corners)[:, :3] * 255)
        assert rgb.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    between = one_triangle(material, corner_uv=np.full((1, 3, 2), (0.5, 0.25))).albedo_linear(np.array([0]), CENTRE)
    assert between[0, :3] == pytest.approx([0.5, 0.5, 0], abs=1e-6)


def test_factor_texture_and_corner_colour_multiply_in_linear_light() -> None:
    texture = np.full((1, 1, 4), (188, 188, 188, 255), np.uint8)
    rgba = np.broadcast_to(np.array([0.5, 1, 1, 1], np.float32), (1, 3, 4))
    mesh = one_triangle(Material([0.5, 0.5, 1, 1], texture), corner_uv=np.zeros((1, 3, 2)), corner_rgba=rgba)
    grey = srgb_to_linear(np.array([188], np.uint8))[0]
    expected = linear_to_srgb(np.array([grey / 4, grey / 2, grey]))
    assert mesh.albedo(np.array([0]), CENTRE)[0, :3] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mode", "alpha"), [("OPAQUE", 1.0), ("MASK", 0.0), ("BLEND", 0.4)])
def test_alpha_modes(mode: Any, alpha: float) -> None:
    mesh = one_triangle(Material([1, 1, 1, 0.4], alpha_mode=mode, alpha_cutoff=0.5))
    assert mesh.albedo(np.array([0]), CENTRE)[0, 3] == pytest.approx(alpha)
    assert mesh.opaque == (mode == "OPAQUE")


# ------------------------------------------------------------------------------------------------------- geometry


def test_normalised_is_undone_by_its_matrix_and_ignores_unused_vertices() -> None:
    vertices = np.concatenate([TRIANGLE * (4, 2, 1) + 7, [[1e6, 0, 0]]])
    mesh, back = Mesh(vertices, [[0, 1, 2]], [0], (Material(np.ones(4)),)).normalised()
    lower, upper = mesh.bounds()
    assert lower + upper == pytest.approx(np.zeros(3), abs=1e-6)
    assert (upper - lower).max() == pytest.approx(1.8)
    assert mesh.transformed(back).vertices[:3] == pytest.approx(vertices[:3], abs=1e-5)


def test_mirroring_keeps_the_outside_outside() -> None:
    box = trimesh.creation.box((1, 1, 1))
    mesh = Mesh.from_face_colors(box.vertices, box.faces, np.ones((12, 3))).transformed(np.diag([-1, 2, 1, 1]))
    outwards = np.einsum("fc,fc->f", mesh.face_normals, mesh.triangles.mean(axis=1))
    assert (outwards > 0).all()


def test_merge_keeps_each_part_its_colour() -> None:
    texture = np.full((1, 1, 4), (10, 20, 30, 255), np.uint8)
    parts = [
        one_triangle(Material(np.ones(4), texture), corner_uv=np.zeros((1, 3, 2))),
        Mesh.from_face_colors(TRIANGLE, [[0, 1, 2]], np.array([[200, 0, 0]], np.uint8)),
        one_triangle(Material([0, 1, 0, 1])),
    ]
    merged = merge([*parts, parts[0]])
    rgb = np.rint(merged.albedo(np.arange(4), np.repeat(CENTRE, 4, 0))[:, :3] * 255)
    assert rgb.tolist() == [[10, 20, 30], [200, 0, 0], [0, 255, 0], [10, 20, 30]]
    assert len(merged.materials) == 3


@pytest.mark.parametrize(
    ("vertices", "faces"),
    [([[0, 0, np.nan], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]]), (TRIANGLE, [[0, 1, 3]]), (TRIANGLE, [[0, 1, -1]])],
)
def test_a_wrong_mesh_is_refused(vertices: Any, faces: Any) -> None:
    with pytest.raises(ValueError, match="finite|faces must lie"):
        Mesh(vertices, faces, [0], (Material(np.ones(4)),))


# ----------------------------------------------------------------------------------------------------------- glTF


class GltfFile:
    """Puts together a small .gltf with embedded data."""

    def __init__(self) -> None:
        self.data = b""
        self.header: dict[str, Any] = {
            "asset": {"version": "2.0"},
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "accessors": [],
            "bufferViews": [],
        }
        self.values(TRIANGLE)

    def values(self, array: np.ndarray, **more: Any) -> int:
        kinds = {"f": 5126, "B": 5121, "H": 5123, "I": 5125}
        columns = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[array.reshape(len(array), -1).shape[1]]
        self.header["bufferViews"].append({"buffer": 0, "byteOffset": len(self.data), "byteLength": array.nbytes})
        self.data += array.tobytes() + b"\0" * (-array.nbytes % 4)
        self.header["accessors"].append(
            {
                "bufferView": len(self.header["bufferViews"]) - 1,
                "componentType": kinds[array.dtype.char],
                "count": len(array),
                "type": columns,
                **more,
            }
        )
        return len(self.header["accessors"]) - 1

    @property
    def primitive(self) -> dict[str, Any]:
        return self.header["meshes"][0]["primitives"][0]

    def write(self, path: Path) -> Path:
        uri = "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
        self.header["buffers"] = [{"uri": uri, "byteLength": len(self.data)}]
        path.write_text(json.dumps(self.header))
        return path


def test_dark_base_colours_keep_their_precision(tmp_path: Path) -> None:
    gltf = GltfFile()
    wanted = np.array([[3, 20, 40]], np.uint8)
    gltf.header["materials"] = [
        {"pbrMetallicRoughness": {"baseColorFactor": [*srgb_to_linear(wanted)[0].astype(float), 1]}}
    ]
    gltf.primitive["material"] = 0
    rgb = read_mesh(gltf.write(tmp_path / "a.gltf")).albedo(np.array([0]), CENTRE)[:, :3]
    assert np.rint(rgb * 255).tolist() == wanted.tolist()


def test_vertex_colours_sparse_positions_and_strips(tmp_path: Path) -> None:
    gltf = GltfFile()
    gltf.primitive["attributes"]["COLOR_0"] = gltf.values(np.full((3, 3), 51, np.uint8), normalized=True)
    places, moved = gltf.values(np.array([1], np.uint16)), gltf.values(np.array([[5, 0, 0]], np.float32))
    gltf.header["accessors"][0]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": places, "componentType": 5123},
        "values": {"bufferView": moved},
    }
    gltf.primitive["mode"] = 5
    mesh = read_mesh(gltf.write(tmp_path / "a.gltf"))
    assert mesh.vertices[1].tolist() == [5, 0, 0]
    assert mesh.albedo_linear(np.array([0]), CENTRE)[0, :3] == pytest.approx([0.2] * 3)


def test_scene_graph_places_every_instance(tmp_path: Path) -> None:
    gltf = GltfFile()
    gltf.header["nodes"] = [
        {"children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "scale": [2, 2, 2]},
        {"mesh": 0, "rotation": [0, 0, np.sin(np.pi / 4), np.cos(np.pi / 4)]},
        {"mesh": 0, "translation": [99, 99, 99]},  # not in the scene
    ]
    mesh = read_mesh(gltf.write(tmp_path / "a.gltf"))
    assert mesh.triangles[0, 1] == pytest.approx([12, 0, 0])
    assert mesh.triangles[1, 1] == pytest.approx([10, 1, 0], abs=1e-6)
    assert len(mesh.faces) == 2


def test_a_skinned_mesh_is_at_rest(tmp_path: Path) -> None:
    gltf = GltfFile()
    inverse = np.eye(4, dtype=np.float32)
    inverse[3, :3] = (0, -1, 0)  # column major: moves down by 1
    gltf.primitive["attributes"] |= {
        "JOINTS_0": gltf.values(np.array([[0, 1, 0, 0]] * 3, np.uint8)),
        "WEIGHTS_0": gltf.values(np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [np.nan] * 4], np.float32)),
    }
    matrices = gltf.values(np.stack([inverse] * 2).reshape(2, 16))
    gltf.header["skins"] = [{"joints": [1, 2], "inverseBindMatrices": matrices}]
    gltf.header["nodes"] = [
        {"mesh": 0, "skin": 0, "translation": [50, 0, 0]},  # which does not count for a skinned mesh
        {"translation": [0, 1, 0]},
        {"translation": [0, 3, 0]},
    ]
    mesh = read_mesh(gltf.write(tmp_path / "a.gltf"))
    assert mesh.vertices == pytest.approx(np.array([[0, 0, 0], [1, 1, 0], [0, 1, 0]]), abs=1e-6)


def test_gltf_texture_from_file_with_transform(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).save(tmp_path / "my tex.png")
    gltf = GltfFile()
    gltf.primitive["attributes"]["TEXCOORD_1"] = gltf.values(np.full((3, 2), 0.25, np.float32))
    gltf.primitive["material"] = 0
    info = {"index": 0, "texCoord": 1, "extensions": {"KHR_texture_transform": {"offset": [0.5, 0]}}}
    gltf.header |= {
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": info}}],
        "textures": [{"source": 0}],
        "images": [{"uri": "my%20tex.png"}],
    }
    blue = read_mesh(gltf.write(tmp_path / "a.gltf")).albedo(np.array([0]), CENTRE)[0]
    assert blue == pytest.approx([0, 0, 1, 1], abs=1e-6)
    (tmp_path / "my tex.png").unlink()
    warnings: list[str] = []
    white = read_mesh(tmp_path / "a.gltf", warnings=warnings).albedo(np.array([0]), CENTRE)[0]
    assert white == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert "my%20tex.png" in warnings[0]


def _cycle(gltf: GltfFile) -> None:
    gltf.header["nodes"] = [{"children": [1]}, {"children": [0], "mesh": 0}]


def _bomb(gltf: GltfFile) -> None:
    gltf.header["accessors"][0] = {"componentType": 5126, "count": 2**40, "type": "VEC3"}


def _escape(gltf: GltfFile) -> None:
    gltf.header["images"] = [{"uri": "../../../../../../etc/passwd"}]
    gltf.header["textures"] = [{"source": 0}]
    gltf.header["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    gltf.primitive["material"] = 0


def _huge_texture(gltf: GltfFile) -> None:
    png = io.BytesIO()
    Image.new("1", (9000, 9000)).save(png, "PNG")
    _escape(gltf)
    gltf.header["images"] = [{"uri": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()}]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_cycle, "own ancestor"),
        (_bomb, "values in one accessor"),
        (_escape, "outside its folder"),
        (_huge_texture, "too large"),
        (lambda g: g.header["accessors"][0].update(count=7), "shorter than its header says"),
        (lambda g: g.header["nodes"][0].update(scale="big"), "structure is broken"),
        (lambda g: g.header.update(extensionsRequired=["EXT_meshopt_compression"]), "meshopt"),
        (lambda g: g.primitive.update(mode=0), "no triangles"),
        (lambda g: g.primitive.update(indices=g.values(np.array([0, 1, 9], np.uint16))), "does not exist"),
        (lambda g: g.header["asset"].update(version="1.0"), "version 1.0"),
    ],
)
def test_hostile_gltf_is_rejected_with_its_reason(tmp_path: Path, spoil: Any, reason: str) -> None:
    gltf = GltfFile()
    spoil(gltf)
    with pytest.raises(Rejected, match=reason) as caught:
        read_mesh(gltf.write(tmp_path / "a.gltf"))
    assert caught.value.hint and "\n" not in caught.value.reason


def test_numbers_too_large_for_float32_are_rejected_in_one_sentence_of_ours(tmp_path: Path) -> None:
    gltf = GltfFile()
    gltf.header["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": [1e308, 1, 1, 1]}}]
    gltf.primitive["material"] = 0
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        with pytest.raises(Rejected, match="must be 4 finite numbers"):
            read_mesh(gltf.write(tmp_path / "a.gltf"))


def test_a_cut_glb_says_so(tmp_path: Path) -> None:
    whole = trimesh.creation.box().export(file_type="glb")
    path = tmp_path / "a.glb"
    for cut, reason in ((len(whole) // 2, "cut short"), (10, "ends before"), (0, "empty")):
        path.write_bytes(whole[:cut])
        with pytest.raises(Rejected, match=reason):
            read_mesh(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Rejected, match="LFS"):
        read_mesh(path)


# -------------------------------------------------------------------------------------------- the other formats


def test_obj_with_material_texture_and_byte_order_mark(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[255, 0, 0]], [[0, 255, 0]]], np.uint8)).save(tmp_path / "t.png")  # red above green
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\nnewmtl n\nKd 0.5 0 0\n")
    (tmp_path / "a.obj").write_text(
        "\ufeffmtllib a.mtl\r\nv 0 0 0\r\nv 1 0 0\r\nv 0 1 0\r\nvt 0 0.75\r\n"
        "usemtl m\r\nf 1/1 2/1 3/1\r\nusemtl n\r\nf 3 2 1\r\n",
        newline="",
    )
    mesh = read_mesh(tmp_path / "a.obj")
    rgb = np.rint(mesh.albedo(np.arange(2), np.repeat(CENTRE, 2, 0))[:, :3] * 255)
    assert sorted(rgb.tolist()) == [[128, 0, 0], [255, 0, 0]]


def test_ply_vertex_colours_are_srgb(tmp_path: Path) -> None:
    header = "ply\nformat ascii 1.0\nelement vertex 3\n" + "".join(f"property float {c}\n" for c in "xyz")
    header += "".join(f"property uchar {c}\n" for c in ("red", "green", "blue"))
    header += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_text(header + "0 0 0 9 99 199\n1 0 0 9 99 199\n0 1 0 9 99 199\n3 0 1 2\n")
    rgb = read_mesh(tmp_path / "a.ply").albedo(np.array([0]), CENTRE)[0, :3] * 255
    assert np.rint(rgb).tolist() == [9, 99, 199]


def test_stl_that_lies_about_its_size_is_rejected(tmp_path: Path) -> None:
    whole = trimesh.creation.box().export(file_type="stl")
    (tmp_path / "a.stl").write_bytes(whole)
    assert len(read_mesh(tmp_path / "a.stl").faces) == 12
    (tmp_path / "a.stl").write_bytes(whole[:80] + struct.pack("<I", 2**32 - 1) + whole[84:])
    with pytest.raises(Rejected, match="4,294,967,295 triangles"):
        read_mesh(tmp_path / "a.stl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v 0\nv 1\nv 2\nf 1 2 3\n", "OBJ data cannot be read .*vertices must have shape"),
        ("v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "OBJ data cannot be read .*vertices must have shape"),
    ],
)
def test_obj_vertices_without_three_coordinates_are_rejected(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.obj").write_text(text)
    with pytest.raises(Rejected, match=reason):
        read_mesh(tmp_path / "a.obj")


def test_what_trimesh_logs_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its reader of text STL logs a traceback for normals that are no numbers, and goes on."""
    facet = "facet normal 0 0 x\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    (tmp_path / "a.stl").write_text(f"solid a\n{facet}endsolid a\n")
    assert len(read_mesh(tmp_path / "a.stl").faces) == 1
    assert not caplog.records


def test_limits_and_flat_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nf 1 2 3\nf 2 3 4\n")
    with pytest.raises(Rejected, match="2 faces, more than the 1"):
        read_mesh(path, Limits(faces=1))
    path.write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    with pytest.raises(Rejected, match="without area"):
        read_mesh(path)


def read_outcome(path: str) -> str:
    """For a worker: what reading a file and normalising the mesh ends in, in the words of `ALLOWED`."""
    try:
        read_mesh(path).normalised()
    except Rejected as rejected:
        return rejected.kind
    return "built"


def test_awkward_files_neither_crash_nor_hang(assets_dir: Path) -> None:
    hard = assets_dir / "hard"
    rows = [json.loads(line) for line in (hard / "manifest.jsonl").read_text().splitlines()]
    paths = [str(hard / row["file"]) for row in rows]
    outcomes = list(isolated_map(read_outcome, paths, workers=2, cpu_s=30, wall_s=120, memory_bytes=4 << 30))
    failed = [(row["file"], outcome.reason) for row, outcome in zip(rows, outcomes) if isinstance(outcome, Failed)]
    assert not failed
    pairs = [(row["file"], row["expect"], outcome) for row, outcome in zip(rows, outcomes)]
    assert not [pair for pair in pairs if pair[2] not in ALLOWED[pair[1]]]
