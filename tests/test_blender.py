"""Cycles' views against our renderer's and closed forms, and what is said where Blender is missing or fails."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from pydantic import ValidationError

from shapeloom.data_pipes import blender as blender_module
from shapeloom.data_pipes.blender import SCRIPT, Blender, BlenderSettings, find_blender
from shapeloom.data_pipes.blender_exr import read_exr
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.loader import RawDataset
from shapeloom.data_pipes.mesh import Material, Mesh, linear_to_srgb, merge, srgb_to_linear
from shapeloom.data_pipes.read import read_mesh
from shapeloom.data_pipes.render import AMBIENT, DIFFUSE, LIGHT_IN_CAMERA, TEXTURELESS_ALBEDO, Views, render
from shapeloom.errors import UserError
from shapeloom.models.cameras import Cameras, orbit

QUAD = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
ONE_THREAD = {"threads": 1, "time_limit_s": 120}


def quad(material: Material, z: float = 0.0) -> Mesh:
    """Faces +Z; texture upright and unmirrored when seen from there."""
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(QUAD + (0, 0, z), faces, [0, 0], (material,), corner_uv=uv[faces])


def colored(shape: trimesh.Trimesh, rgb: tuple[int, int, int] = (200, 50, 25)) -> Mesh:
    return Mesh.from_face_colors(shape.vertices, shape.faces, np.tile(np.uint8(rgb), (len(shape.faces), 1)))


def depth_differences(theirs: Views, ours: Views, where: np.ndarray) -> np.ndarray:
    return np.abs(theirs.depth[where] - ours.depth[where])


def inside(views: Views) -> np.ndarray:
    """Pixels that are wholly covered, as are those around them."""
    covered = np.pad(views.albedo[..., 3] == 255, ((0, 0), (1, 1), (1, 1)))
    height, width = views.depth.shape[1:]
    return np.all([covered[:, y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


@pytest.fixture(scope="module")
def blender() -> Iterator[Blender]:
    try:
        running = Blender(BlenderSettings(samples=4, **ONE_THREAD))
    except UserError as error:
        pytest.skip(str(error))
    with running:
        yield running


# ---------------------------------------------------------------------------------------------- against our renderer


def test_silhouette_depth_and_normals_are_ours(blender: Blender) -> None:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    slab = trimesh.creation.box((1.6, 0.2, 1.2), transform=trimesh.transformations.translation_matrix((0, -0.6, 0.1)))
    mesh = merge([colored(ball), colored(slab, (20, 180, 90))])
    turned = orbit([0, 130, 260], [20, -40, 89], size=64)
    theirs, ours = blender.render(mesh, turned, ("unlit",)), render(mesh, turned)
    alpha, expected = (views.albedo[..., 3].astype(float) for views in (theirs, ours))
    assert alpha.sum(axis=(1, 2)) == pytest.approx(expected.sum(axis=(1, 2)), rel=0.01)
    assert np.abs(alpha - expected).max() <= 128 and np.abs(alpha - expected).mean() < 2
    # Samples lie elsewhere in a pixel; where the surface is flat around it, means over them are alike.
    both = inside(theirs) & inside(ours)
    assert both.sum() > 1500
    assert np.median(depth_differences(theirs, ours, both)) < 3e-3
    assert np.percentile(depth_differences(theirs, ours, both), 90) < 2e-2
    assert np.percentile(np.linalg.norm(theirs.normal - ours.normal, axis=-1)[both], 90) < 0.06
    assert np.abs(np.linalg.norm(theirs.normal[both], axis=-1) - 1).max() < 1e-5
    empty = theirs.albedo[..., 3] == 0
    assert empty.any() and (np.isinf(theirs.depth) == empty).all() and not theirs.normal[empty].any()
    assert not theirs.albedo[empty].any() and theirs.lit.shape == (0, 64, 64, 4)


def test_flat_colours_come_through_exactly_at_edges_too(blender: Blender) -> None:
    for rgb in ((3, 77, 201), (255, 255, 255)):
        albedo = blender.render(colored(trimesh.creation.icosphere(), rgb), orbit([10], 10, size=24), ("unlit",)).albedo
        seen = albedo[0][albedo[0, ..., 3] > 0]
        assert (seen[:, :3] == rgb).all() and len(np.unique(seen[:, 3])) > 2


def test_pinhole_and_picture_are_ours_when_not_square(blender: Blender) -> None:
    plane = quad(Material([0.2, 0.4, 0.6, 1]))
    for width, height, focal in ((40, 24, 30.0), (24, 40, 11.0), (32, 20, 90.0)):
        cameras = Cameras(orbit([25], 15, size=8).camera_to_world, np.array([focal]), width, height)
        theirs, ours = blender.render(plane, cameras, ("unlit",)), render(plane, cameras, samples_per_axis=8)
        alpha, expected = (views.albedo[..., 3].astype(float) / 255 for views in (theirs, ours))
        assert alpha.sum() == pytest.approx(expected.sum(), rel=0.03), (width, height)
        assert np.abs(alpha - expected).mean() < 0.02
        both = inside(theirs) & inside(ours)
        assert both.any() and depth_differences(theirs, ours, both).max() < 0.3 * 4 / focal


def test_textures_are_upright_filtered_and_multiplied_as_ours(blender: Blender) -> None:
    rng = np.random.default_rng(0)
    texture = np.concatenate([rng.integers(0, 256, (4, 5, 3)), np.full((4, 5, 1), 255)], axis=2).astype(np.uint8)
    plane = quad(Material([1, 0.8, 0.6, 1], texture))
    corner_rgba = np.ones((2, 3, 4), np.float32)
    corner_rgba[0, :, 0], corner_rgba[1, 1, 2] = (0.2, 0.5, 1), 0.3
    repeated = Mesh(
        plane.vertices, plane.faces, plane.face_material, plane.materials, 3 * plane.corner_uv - 1, corner_rgba
    )
    for mesh in (plane, repeated):
        cameras = orbit([20, 200], 10, size=96, fov_deg=30)
        theirs, ours = blender.render(mesh, cameras, ("unlit",)), render(mesh, cameras, samples_per_axis=4)
        both = inside(theirs) & inside(ours)
        differences = np.abs(theirs.albedo[both].astype(float) - ours.albedo[both])
        assert differences.mean() < 3 and abs((theirs.albedo[both] - ours.albedo[both].astype(float)).mean()) < 0.5


def test_what_is_cut_out_or_see_through_is_ours(blender: Blender) -> None:
    hole = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8).repeat(8, axis=1)
    front = quad(Material(np.ones(4), hole, alpha_mode="MASK"), z=0.2)
    cut_out = merge([front, quad(Material([0, 1, 0, 1]))])
    panes = [quad(Material([1, 1, 1, 0.5], alpha_mode="BLEND"), z) for z in (-0.5, 0.0, 0.5)]
    for mesh in (cut_out, merge(panes), merge([*panes, quad(Material([0, 0, 0, 1]), -0.8)]), front):
        cameras = orbit([0], 0, size=16)
        theirs, ours = blender.render(mesh, cameras, ("unlit",)), render(mesh, cameras)
        for x in (5, 10):  # left and right of the hole's edge
            assert np.abs(theirs.albedo[0, 8, x].astype(int) - ours.albedo[0, 8, x]).max() <= 1
            assert theirs.depth[0, 8, x] == pytest.approx(ours.depth[0, 8, x], abs=1e-4)
            assert theirs.normal[0, 8, x] == pytest.approx(ours.normal[0, 8, x], abs=1e-5)


def test_a_real_file_looks_as_ours_does(blender: Blender, assets_dir: Path) -> None:
    mesh = read_mesh(assets_dir / "pack" / "kaykit" / "kaykit_dungeon_barrel_small.glb").normalised()[0]
    cameras = orbit([30, 210], 20, size=64)
    theirs, ours = blender.render(mesh, cameras, ("unlit",)), render(mesh, cameras)
    both = inside(theirs) & inside(ours)
    assert both.sum() > 300
    assert np.abs(theirs.albedo[both].astype(float) - ours.albedo[both]).mean() < 8
    assert np.median(depth_differences(theirs, ours, both)) < 0.01


# ------------------------------------------------------------------------------------------------------- lit views


def test_light_goes_with_the_camera_and_has_the_stated_strength(
    blender: Blender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blender, "settings", BlenderSettings(samples=64, **ONE_THREAD))
    rgb, cameras = (200, 120, 40), orbit([0, 145], 40, size=24)
    views = blender.render(colored(trimesh.creation.icosphere(subdivisions=3, radius=0.8), rgb), cameras)
    whole = inside(views)
    light_V3 = np.einsum("vij,j->vi", cameras.camera_to_world[:, :3, :3], LIGHT_IN_CAMERA)
    cos = np.einsum("vhwc,vc->vhw", views.normal, light_V3)[whole]
    # No part of a ball is lit by, or shadowed by, another that it could see.
    shade = AMBIENT + DIFFUSE * np.maximum(0, cos)
    far = np.abs(cos) > 0.15  # the sun is not a point
    for picture, albedo in (
        (views.lit, srgb_to_linear(np.uint8(rgb))),
        (views.textureless, np.full(3, TEXTURELESS_ALBEDO)),
    ):
        expected = 255 * linear_to_srgb(np.clip(shade[:, None] * albedo, 0, 1))
        difference = picture[whole][:, :3] - expected
        assert np.abs(difference[far]).mean() < 3 and abs(difference[far].mean()) < 1.5
        assert (picture[..., 3] == views.albedo[..., 3]).all()


def test_things_cast_shadows_and_lend_colour(blender: Blender) -> None:
    floor = trimesh.creation.box((1.8, 0.02, 1.8), transform=trimesh.transformations.translation_matrix((0, -0.5, 0)))
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    cameras = orbit([0], 30, size=48)
    alone = blender.render(colored(floor, (200, 200, 200)), cameras)
    together = blender.render(merge([colored(floor, (200, 200, 200)), colored(ball, (255, 0, 0))]), cameras)
    on_floor = inside(alone) & (together.albedo[..., 1] == 200)
    lit, before = together.lit[on_floor].astype(float), alone.lit[on_floor].astype(float)
    assert (lit[:, 1] < 0.6 * before[:, 1]).mean() > 0.02  # shadow
    assert lit[:, 0].mean() > lit[:, 2].mean() + 1  # red light from the ball


# ----------------------------------------------------------------------------------------------------- properties


def test_the_same_twice_from_one_blender(blender: Blender) -> None:
    mesh, cameras = colored(trimesh.creation.torus(0.5, 0.2)), orbit([30], 30, size=24)
    first, second = blender.render(mesh, cameras), blender.render(mesh, cameras)
    for name in ("albedo", "lit", "textureless", "depth", "normal"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name
    assert {mode: len(seconds) for mode, seconds in blender.seconds.items()} == {"unlit": 1, "lit": 1, "textureless": 1}


def test_faces_that_are_none_are_left_out(blender: Blender) -> None:
    faces = [[0, 1, 2], [0, 0, 1], [0, 2, 3], [3, 3, 3]]
    mesh = Mesh(QUAD, faces, [0, 0, 0, 0], (Material([1, 0, 0, 1]),))
    views = blender.render(mesh, orbit([0], 0, size=16), ("unlit",))
    assert views.albedo[0, 8, 8].tolist() == [255, 0, 0, 255]
    nothing = Mesh(np.zeros((1, 3)), [[0, 0, 0]], [0], (Material(np.ones(4)),))
    empty = blender.render(nothing, orbit([0, 90], 0, size=8))
    assert empty.lit.shape == (2, 8, 8, 4) and not empty.albedo.any() and np.isinf(empty.depth).all()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with Blender(program=fake(tmp_path, "exit 0")) as running:
        for cameras in (orbit([0], 0, size=3), orbit([0, 1], 0, size=8)[[]]):
            with pytest.raises(ValueError, match="there must be a camera, and 4 pixels a side"):
                running.render(colored(trimesh.creation.box()), cameras)
        with pytest.raises(ValueError, match="unlit among them"):
            running.render(colored(trimesh.creation.box()), orbit([0], 0, size=8), ("lit",))
    for wrong in ({"samples": 0}, {"device": "tpu"}, {"denoise": True}, {"time_limit_s": 0}):
        with pytest.raises(ValidationError):
            BlenderSettings(**wrong)


# ------------------------------------------------------------------------------------- without a Blender that works


def fake(folder: Path, lines: str) -> str:
    """A shell script in Blender's place."""
    path = folder / "blender"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def render_a_box(time_limit_s: float = 60) -> Views:
    settings = BlenderSettings(time_limit_s=time_limit_s)
    return blender_module.render(colored(trimesh.creation.box()), orbit([0], 0, size=8), settings)


def test_a_missing_blender_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHAPELOOM_BLENDER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no blender.*\[blender\].*install Blender 3.4"):
        find_blender()
    monkeypatch.setenv("SHAPELOOM_BLENDER", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="SHAPELOOM_BLENDER is .*nowhere, where there is no program"):
        render_a_box()
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path, "exit 0"))
    assert find_blender() == str(tmp_path / "blender")


def test_the_python_of_an_environment_with_bpy_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = Path(fake(tmp_path, f'echo "$@" > {tmp_path}/given; exit 3')).rename(tmp_path / "python3.11")
    monkeypatch.setenv("SHAPELOOM_BLENDER", str(program))
    with pytest.raises(UserError, match="exit code 3"):
        render_a_box()
    assert (tmp_path / "given").read_text().split() == [str(SCRIPT)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("echo 'Blender 9.9'; echo 'out of luck' >&2; exit 11", r"exit code 11 .*Blender 9\.9 \| out of luck"),
        ("exec true", r"exit code 0 .*the last it said: nothing"),
        ("read folder; kill -SEGV $$", "exit code -11"),
        ("read folder; echo '{\"seconds\": {}' > $folder/answer.json; sleep 100", "is not valid JSON"),
    ],
)
def test_a_failing_blender_is_told_with_its_last_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, message: str
) -> None:
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path, lines))
    with pytest.raises(UserError, match=message):
        render_a_box()


def test_something_that_is_no_program_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "blender").write_bytes(b"\x00\x01 no program")
    (tmp_path / "blender").chmod(0o755)
    monkeypatch.setenv("SHAPELOOM_BLENDER", str(tmp_path / "blender"))
    with pytest.raises(UserError, match="cannot be started"):
        render_a_box()


def test_a_hanging_blender_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path, f"sleep 100 & echo $! > {tmp_path}/child; echo waits; wait"))
    with pytest.raises(UserError, match=r"longer than the 1 s allowed .*waits"):
        render_a_box(time_limit_s=1.0)
    child = (tmp_path / "child").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
    assert not state or state.startswith("Z")  # ended, if not yet collected


def test_after_a_failure_the_next_mesh_has_a_new_blender(tmp_path: Path) -> None:
    program = fake(tmp_path, f"echo started >> {tmp_path}/starts; exit 3")
    with Blender(BlenderSettings(time_limit_s=60), program) as running:
        for _ in range(2):
            with pytest.raises(UserError, match="exit code 3"):
                running.render(colored(trimesh.creation.box()), orbit([0], 0, size=8))
    assert (tmp_path / "starts").read_text().split() == ["started"] * 2


def test_an_old_blender_is_told_which_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bpy.py").write_text(
        "class app:\n    version, version_string = (2, 93, 1), '2.93.1'\nclass types:\n    NodeSocket = object\n"
    )
    run = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(SCRIPT)!r})"
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path, f"exec {sys.executable} -c {shlex.quote(run)}"))
    with pytest.raises(UserError, match=r"this is Blender 2\.93\.1, and 3\.4 or newer is needed"):
        render_a_box()


def test_pictures_of_another_layout_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = '{"seconds": {}, "version": "9.9"}'
    lines = f"read folder; echo no picture > $folder/unlit0.exr; echo '{answer}' > $folder/answer.json; sleep 100"
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path, lines))
    with pytest.raises(UserError, match=r"Blender 9\.9\) wrote pictures unlike those of 3\.4"):
        render_a_box()


def test_a_damaged_exr_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"\x76\x2f\x31\x01", b"\x76\x2f\x31\x01\x02\0\0\0compression\0compression\0\x01\0\0\0\x03\0"):
        (tmp_path / "a.exr").write_bytes(data)
        with pytest.raises(ValueError, match="damaged|only OpenEXR"):
            read_exr(tmp_path / "a.exr")


def a_box(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    trimesh.creation.box().export(tmp_path / "models" / "box.ply")
    return tmp_path / "models"


def test_data_build_renders_by_blender_if_asked(blender: Blender, tmp_path: Path) -> None:
    settings = {"n_surface": 64, "n_near": 16, "n_uniform": 16, "n_views": 1, "image_size": 32, "samples_per_axis": 4}
    folder = a_box(tmp_path)
    for renderer in ("raster", "blender"):
        made = BuildSettings(**settings, renderer=renderer, blender=BlenderSettings(samples=4, threads=1))
        build(folder, tmp_path / renderer, settings=made)
    ours, theirs = (RawDataset(tmp_path / renderer, parts=("albedo", "lit"))[0] for renderer in ("raster", "blender"))
    assert np.abs(ours.albedo.astype(int) - theirs.albedo)[..., 3].mean() < 4  # the same silhouette
    assert (ours.lit != theirs.lit).any()


def test_data_build_without_blender_says_so_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAPELOOM_BLENDER", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no program"):
        build(a_box(tmp_path), tmp_path / "raw", settings=BuildSettings(renderer="blender"))
    assert not (tmp_path / "raw").exists()


def test_what_blender_failed_at_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been this machine's Blender, not the file."""
    settings = BuildSettings(n_surface=64, n_near=16, n_uniform=16, n_views=1, image_size=32, renderer="blender")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("SHAPELOOM_BLENDER", fake(tmp_path / "bin", f"echo x >> {tmp_path}/starts; exit 3"))
    folder = a_box(tmp_path)
    for starts in (1, 2):
        with pytest.raises(UserError, match="none of the 1 files .*blender ended with exit code 3"):
            build(folder, tmp_path / "raw", settings=settings)
        assert len((tmp_path / "starts").read_text().split()) == starts
