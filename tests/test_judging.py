"""What the checks of a mesh say, against numbers that can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapeloom.config import load_config
from shapeloom.data_pipes import judging
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.judging import JudgeSettings, Measures, findings, measure
from shapeloom.data_pipes.limits import ANIMATED, Limits
from shapeloom.data_pipes.mesh import WHITE, Material, Mesh
from shapeloom.data_pipes.read import read_mesh
from shapeloom.data_pipes.sampling import Solid
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.errors import UserError


def box(extents: Sequence[float] = (1, 1, 1), at: Sequence[float] = (0, 0, 0)) -> trimesh.Trimesh:
    return trimesh.creation.box(extents, trimesh.transformations.translation_matrix(at))


def together(*shapes: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.util.concatenate(shapes)


def turned(shape: trimesh.Trimesh, faces: Sequence[int] | slice) -> trimesh.Trimesh:
    """Some faces with the other winding."""
    new = shape.faces.copy()
    new[faces] = new[faces, ::-1]
    return trimesh.Trimesh(shape.vertices, new, process=False)


def mesh_of(shape: trimesh.Trimesh, *materials: Material) -> Mesh:
    return Mesh(shape.vertices, shape.faces, np.zeros(len(shape.faces), np.int32), materials or (WHITE,))


def measures(
    shape: trimesh.Trimesh, settings: JudgeSettings | None = None, alpha: np.ndarray | None = None
) -> Measures:
    mesh, back = mesh_of(shape).normalised()
    return measure(mesh, Solid(mesh, 2048), back, alpha, settings)


def kinds(shape: trimesh.Trimesh, **settings: float) -> set[str]:
    judge = JudgeSettings(**settings)
    return set(findings(measures(shape, judge), judge))


def soup(shape: trimesh.Trimesh) -> trimesh.Trimesh:
    """The same triangles with corners of their own, as flat-shaded exports have."""
    return trimesh.Trimesh(
        shape.triangles.reshape(-1, 3), np.arange(3 * len(shape.faces)).reshape(-1, 3), process=False
    )


def test_a_good_mesh_has_no_findings() -> None:
    for shape in (box(), soup(box()), trimesh.creation.icosphere(2), trimesh.creation.torus(1, 0.3)):
        m = measures(shape)
        assert (m.open_edge_share, m.degenerate_share, m.flipped_share, m.components, m.groups) == (0, 0, 0, 1, 1)
        assert not m.floor and not findings(m, JudgeSettings())


def test_open_edges_of_a_box_without_a_side() -> None:
    shape = box()
    shape.update_faces(shape.face_normals[:, 1] < 0.5)
    m = measures(shape)
    assert m.open_edge_share == pytest.approx(4 / 17)  # 12 edges and 5 diagonals
    assert findings(m, JudgeSettings()) == {"open": "it is not watertight: 24% of its edges are open"}
    assert not kinds(shape, open_edges=0.25)
    assert m.flipped_share == 0


def test_faces_without_area() -> None:
    shape = box()
    extra = np.array([[0, 1, 1], [0, 0, 0], [2, 3, 2]])
    shape = trimesh.Trimesh(shape.vertices, np.concatenate([shape.faces, extra]), process=False)
    assert measures(shape).degenerate_share == pytest.approx(3 / 15) and kinds(shape) == {"degenerate"}
    sliver = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0.5, 1e-7, 0]]), np.array([[0, 1, 2]]), np.zeros(1), (WHITE,))
    thin = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0.5, 1e-5, 0]]), np.array([[0, 1, 2]]), np.zeros(1), (WHITE,))
    assert (judging.degenerate_share(sliver), judging.degenerate_share(thin)) == (1, 0)


@pytest.mark.parametrize("count", [1, 3, 12, 20])
def test_flipped_faces_of_a_sphere_are_counted(count: int) -> None:
    sphere = trimesh.creation.icosphere(1)
    assert measures(turned(sphere, slice(count))).flipped_share == pytest.approx(count / 80)


def test_a_sphere_inside_out_and_its_open_and_flat_kin() -> None:
    sphere = trimesh.creation.icosphere(2)
    assert measures(turned(sphere, slice(None))).flipped_share == 1
    assert kinds(turned(sphere, slice(None))) == {"flipped"}
    open_box = box()
    open_box.update_faces(open_box.face_normals[:, 1] < 0.5)
    assert measures(turned(open_box, slice(None))).flipped_share == 1
    plane = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], [[0, 1, 2], [0, 2, 3]])
    assert measures(plane).flipped_share == measures(turned(plane, slice(None))).flipped_share == 0


def test_the_wall_of_a_cavity_is_not_flipped_and_a_moebius_strip_is_not_judged() -> None:
    hollow = together(trimesh.creation.icosphere(2, 1), turned(trimesh.creation.icosphere(2, 0.8), slice(None)))
    assert measures(hollow).flipped_share == 0
    angle, side = np.meshgrid(np.linspace(0, 2 * np.pi, 24, endpoint=False), [-0.3, 0.3], indexing="ij")
    radius = 1 + side * np.cos(angle / 2)
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), side * np.sin(angle / 2)], -1).reshape(-1, 3)
    quads = [(2 * i, 2 * i + 1, 2 * i + 3, 2 * i + 2) for i in range(23)] + [(46, 47, 0, 1)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    strip = mesh_of(trimesh.Trimesh(xyz, faces, process=False))
    assert not judging.flipped_faces(strip).any()


def test_faces_of_both_windings_are_not_flipped() -> None:
    sphere = trimesh.creation.icosphere(1)
    lined = trimesh.Trimesh(sphere.vertices, np.concatenate([sphere.faces[:, ::-1], sphere.faces[:20]]), process=False)
    assert measures(lined).flipped_share == pytest.approx(60 / 80)
    assert measures(turned(lined, slice(80, None))).flipped_share == 1, "the same winding twice is one side only"
    mesh = mesh_of(soup(lined)).normalised()[0]
    joined = Solid(mesh, 512).mesh
    both = judging.two_sided(joined, mesh)
    centres = sphere.triangles_center[:20] / sphere.bounds[1, 0] * 0.9
    want = (np.abs(joined.triangles.mean(axis=1)[:, None] - centres).max(axis=2) < 1e-5).any(axis=1)
    assert both.sum() == 20 and (both == want).all()


def test_parts_agree_with_another_implementation() -> None:
    shape = together(*(box(at=(2 * x, 2 * y, 0)) for x in range(5) for y in range(3)), trimesh.creation.icosphere(1))
    mesh = Solid(mesh_of(soup(shape)).normalised()[0], 512).mesh
    assert measures(soup(shape)).components == len(shape.split()) == 16
    assert "parts" in kinds(shape, parts=10) and "parts" not in kinds(shape, parts=16)
    assert len(np.unique(judging.parts(mesh))) == 16


def test_two_far_boxes_are_two_objects() -> None:
    pair = together(box(), box(at=(3, 0, 0)))  # a gap of 2, a longest side of 4
    assert kinds(pair) == {"apart"} and kinds(pair, gap=0.51) == set() and kinds(pair, gap=0.49) == {"apart"}
    bridged = together(pair, box((0.4, 0.4, 0.4), at=(1.5, 0, 0)))  # gaps of 0.8
    assert kinds(bridged) == set() and measures(bridged, JudgeSettings(gap=0.19)).groups == 3
    assert measures(bridged, JudgeSettings(gap=0.19, group_share=0.08)).groups == 2, "the bridge has 0.96 of 12.96"
    speck = together(box(), box((0.1, 0.1, 0.1), at=(3, 0, 0)))
    assert kinds(speck) == set()
    diagonal = together(box(), box(at=(2, 2, 0)))  # gaps of 1 along two axes, so of sqrt 2; a longest side of 3
    assert measures(diagonal, JudgeSettings(gap=2**0.5 / 3 + 0.01)).groups == 1
    assert measures(diagonal, JudgeSettings(gap=2**0.5 / 3 - 0.01)).groups == 2


def test_a_plane_under_a_box_is_a_floor() -> None:
    ground = trimesh.Trimesh([[-2, -0.6, -2], [-2, -0.6, 2], [2, -0.6, 2], [2, -0.6, -2]], [[0, 1, 2], [0, 2, 3]])
    assert kinds(together(box(), ground)) == {"floor"} and kinds(together(box(), ground), floor=False) == set()
    assert kinds(together(box(), box((4, 0.05, 4), at=(0, -0.55, 0)))) == {"floor"}
    assert kinds(ground, open_edges=1) == set(), "a lone plane is the object"
    assert kinds(together(box(), box((1, 0.01, 1), at=(0, -0.6, 0)))) == set(), "a base as wide as what it carries"
    assert kinds(together(box(), box((4, 0.05, 4), at=(0, 0.55, 0)))) == set(), "a table top is above"
    assert kinds(together(box(), box((4, 0.5, 4), at=(0, -0.75, 0)))) == set(), "a plinth is not flat"
    layers = (box((4 - k, 0.01, 4 - k), at=(0, 0.02 * k, 0)) for k in range(4))
    assert kinds(together(*layers)) == set(), "a flat object in layers"
    assert kinds(together(box(), box((4, 0.05, 1), at=(0, -0.55, 0)))) == {"floor"}, "as deep as the whole, and wider"


def test_a_floor_may_be_at_minus_z_but_a_ceiling_is_none() -> None:
    plane = box((4, 4, 0.05))
    for z, floor in ((-0.55, True), (0.55, False)):
        scene = together(box(), plane.copy().apply_translation((0, 0, z)))
        assert measures(scene).floor == floor
    sideways = together(box(), box((0.05, 4, 4), at=(-0.55, 0, 0)))
    assert not measures(sideways).floor


@pytest.mark.parametrize(("size", "odd"), [(1e-4, True), (0.01, False), (1000, False), (1e5, True)])
def test_scale(size: float, odd: bool) -> None:
    shape = box((size, size / 2, size / 3), at=(size, 0, 0))
    assert measures(shape).longest_side == pytest.approx(size, rel=1e-5)
    assert kinds(shape) == ({"scale"} if odd else set())


def test_near_empty_views() -> None:
    alpha = np.zeros((2, 10, 20), np.uint8)
    alpha[0, 0, 0] = 255
    m = measures(box(), alpha=alpha)
    assert m.seen_share == pytest.approx(1 / 400)
    assert findings(m, JudgeSettings()) == {"empty": "its views are nearly empty: it covers 0.2% of them"}
    alpha[1, 0, 0] = 255
    assert not findings(measures(box(), alpha=alpha), JudgeSettings()), "0.5 % is enough"


def test_textures_are_counted_once() -> None:
    image = np.zeros((8, 32, 4), np.uint8)
    materials = (WHITE, Material(np.ones(4), image), Material(np.ones(4), image), Material(np.ones(4), image[:, :4]))
    mesh, back = mesh_of(box(), *materials).normalised()
    m = measure(mesh, Solid(mesh, 512), back, None)
    assert (m.textures, m.texture_side, m.texture_pixels) == (2, 32, 8 * 32 + 8 * 4)
    assert findings(m, JudgeSettings(texture_side=32, texture_pixels=288)) == {}
    (sentence,) = findings(m, JudgeSettings(texture_side=31)).values()
    assert sentence == "it has a texture of 32 pixels along a side"
    assert set(findings(m, JudgeSettings(texture_pixels=287))) == {"texture"}


def test_what_a_reader_told_of_an_animation_is_a_finding() -> None:
    told = ["a texture cannot be decoded, so its colours are not used", ANIMATED]
    m = measures(box())
    assert findings(m, JudgeSettings(), told) == {"animated": told[1]}
    assert findings(m, JudgeSettings(), told[:1]) == findings(m, JudgeSettings()) == {}


def test_kinds_that_reject_are_those_of_the_settings() -> None:
    assert JudgeSettings(reject=("animated", "duplicate", "texture")).reject == ("animated", "duplicate", "texture")
    text = JudgeSettings.model_json_schema()["properties"]["reject"]["description"]
    assert all(kind in text for kind in judging.KINDS)


def test_a_build_warns_and_rejects_as_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    together(box(), box(at=(3, 0, 0))).export(folder / "pair.glb")
    box().export(folder / "box.glb")
    small = {"n_surface": 32, "n_near": 16, "n_uniform": 16, "n_views": 1, "image_size": 16}
    report = build(folder, tmp_path / "raw", settings=BuildSettings(**small))
    assert (report.samples, report.warnings) == (2, 1) and "1 file has warnings" in str(report)
    metas = {meta["file"]: meta for meta in map(ShardFolder(tmp_path / "raw").read_json, (0, 1))}
    assert metas["pair.glb"]["warnings"] == ["it is not one object: its parts form 2 groups that lie far apart"]
    assert metas["box.glb"]["warnings"] == [] and metas["box.glb"]["mesh"]["components"] == 1
    assert 0.05 < metas["box.glb"]["mesh"]["seen_share"] < 1

    settings = load_config(BuildSettings, overrides=[f"{k}={v}" for k, v in small.items()] + ["judge.reject=[apart]"])
    report = build(folder, tmp_path / "strict", settings=settings)
    assert report.rejected == 1
    (line,) = (tmp_path / "strict" / "rejected.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["file"] == "pair.glb" and "not one object" in entry["reason"] and "judge.reject" in entry["hint"]
    build(folder, tmp_path / "strict", settings=settings)  # the manifest's own settings are the same ones
    with pytest.raises(UserError, match="other settings"):
        build(folder, tmp_path / "strict", settings=BuildSettings(**small))
    with pytest.raises(UserError, match="judge.reject"):
        load_config(BuildSettings, overrides=["judge.reject=[ugly]"])


@pytest.mark.parametrize(
    ("file", "low", "high"), [("410/barrel_flipped.ply", 0.99, 1), ("409/barrel_tiny.stl", 0, 0.01)]
)
def test_winding_of_real_files(assets_dir: Path, file: str, low: float, high: float) -> None:
    path = assets_dir / "hard" / "files" / file
    mesh, back = read_mesh(str(path), Limits(), root=str(path.parent), warnings=[]).normalised()
    m = measure(mesh, Solid(mesh, 4096), back, None)
    assert low <= m.flipped_share <= high
    assert ("scale" in findings(m, JudgeSettings())) == ("tiny" in file)


@pytest.mark.parametrize(("said", "kinds"), [("floor", ("floor",)), ("", ()), ("[floor,open]", ("floor", "open"))])
def test_what_rejects_is_one_kind_or_several_on_the_command_line(said: str, kinds: tuple[str, ...]) -> None:
    assert load_config(BuildSettings, None, "build", overrides=[f"judge.reject={said}"]).judge.reject == kinds
