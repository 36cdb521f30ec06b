"""The protocol, empty objects, and rendering in several processes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.eval.plots import line_plot
from shapeloom.eval.renders import FRONTAL, is_empty, render_meshes, render_pool, to_mesh
from shapeloom.eval.sheets import Cell, contact_sheet
from shapeloom.models.mesh import ExtractedMesh

CORNERS = np.array([[0, 0.8, 0], [-0.7, -0.5, 0.5], [0.7, -0.5, 0.5], [0, -0.5, -0.7]], np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]], np.int32)


def tetrahedron(red: float = 1.0) -> ExtractedMesh:
    return ExtractedMesh(CORNERS, FACES, np.tile(np.array([[red, 0, 0]], np.float32), (4, 1)))


def test_the_protocol_is_frozen():
    assert FRONTAL.name == "shapeloom-frontal-4/1"
    # A change of cameras or shading makes scores incomparable: then raise the version in the name, and this hash.
    assert FRONTAL.hash[:12] == "27d17148eb67"
    eyes_V3 = FRONTAL.cameras(32).camera_to_world[:, :3, 3]
    assert (eyes_V3[:, 2] > 3).all() and (np.diff(eyes_V3[:, 0]) > 0).all()  # all in front, from left to right


def test_renders_are_on_white_and_red():
    (views,) = render_meshes([tetrahedron()], size=32)
    assert views.shape == (4, 32, 32, 3) and views.dtype == np.uint8
    assert (views[:, 0, 0] == 255).all()
    middle = views[:, 16, 16].astype(int)
    assert (middle[:, 0] > middle[:, 1] + 50).all()


def test_what_counts_as_empty():
    none = np.zeros((0, 3))
    broken = ExtractedMesh(CORNERS * np.nan, FACES, CORNERS)
    colourless = ExtractedMesh(CORNERS, FACES, CORNERS * np.nan)
    for mesh in (None, ExtractedMesh(none, none.astype(int), none), broken, colourless):
        assert is_empty(mesh)
        assert (next(render_meshes([mesh], size=16)) == 255).all()
    assert not is_empty(tetrahedron()) and not is_empty(to_mesh(tetrahedron()))
    assert isinstance(to_mesh(tetrahedron()), Mesh)


def test_processes_render_the_same():
    meshes = [tetrahedron(0.2), None, tetrahedron(0.9)]
    here = np.stack(list(render_meshes(meshes, size=16)))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = np.stack(list(render_meshes(meshes, size=16, pool=pool)))
    np.testing.assert_array_equal(here, there)


def test_few_objects_start_no_process():
    with render_pool(2, n_objects=10) as pool:
        assert pool is None


def test_contact_sheet():
    black = np.zeros((8, 8, 3), np.uint8)
    sheet = contact_sheet(
        [Cell([black, black], "a caption", True), Cell([black], "é and more", False)], columns=4, size=40
    )
    assert sheet.width == 2 * 80 + 3 * 8
    pixels = np.asarray(sheet)
    assert (pixels[30, 30] == 0).all() and (pixels[0, 0] == 255).all()


def test_plots_leave_out_what_cannot_be_drawn():
    svg = line_plot({"loss": [(0.0, 1.0), (1.0, float("nan")), (2.0, 0.0), (3.0, 0.1)]}, title="a < b", log=True)
    assert "a &lt; b" in svg and "nan" not in svg
    assert line_plot({"loss": []}, title="nothing") == ""
    assert "polyline" in line_plot({"flat": [(0.0, 0.5), (1.0, 0.5)]}, title="flat")
