"""The autoencoder's run, and two folders of meshes: real files, a cut one, a missing one, known solids."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from shapeloom.data_pipes.mesh import Mesh
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.workers import Failed
from shapeloom.errors import UserError
from shapeloom.eval.metrics import reconstruction
from shapeloom.eval.metrics.mesh_pairs import Pair, PairJob, aligned, compare_all, compare_meshes
from shapeloom.eval.metrics.reconstruction import run, run_folders
from shapeloom.eval.report import parts as report_tables
from shapeloom.eval.stored import exact_mesh
from shapeloom.models.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reconstruction") / "raw"
    settings = ProceduralSettings(count=60, n_surface=256, n_near=128, n_uniform=512, n_views=2, image_size=32)
    generate(path, settings)
    return path


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    sizes = {"n_latents": 8, "channels": 8, "width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return Autoencoder(**sizes, hidden=16).eval()


def test_the_whole_run(folder, autoencoder, tmp_path):
    record = run(autoencoder, folder, tmp_path, resolution=16)
    assert record == json.loads((tmp_path / "results.json").read_text())
    assert set(record["scores"]) >= {"iou", "color_l1", "f@0.02", "f@0.05", "normal_consistency", "psnr", "ssim"}
    assert 0 <= record["scores"]["iou"]["lo"] <= record["scores"]["iou"]["mean"] <= record["scores"]["iou"]["hi"] <= 1
    lines = list(csv.DictReader((tmp_path / "per_object.csv").read_text().splitlines()))
    assert len(lines) == record["settings"]["count"] == record["scores"]["iou"]["prompts"]
    assert record["empty"] == sum(int(line["empty"]) for line in lines)
    assert (tmp_path / "contact_sheet.png").exists() and len(record["hashes"]["autoencoder"]) == 64


def test_empty_reconstructions_are_counted(folder, autoencoder, tmp_path, monkeypatch):
    nothing = SimpleNamespace(
        vertices=np.zeros((0, 3), np.float32), faces=np.zeros((0, 3), np.int32), rgb=np.zeros((0, 3), np.float32)
    )
    monkeypatch.setattr(reconstruction, "extract_mesh", lambda field, resolution: [nothing])
    record = run(autoencoder, folder, tmp_path, split="val", resolution=16)
    assert record["empty"] == record["settings"]["count"] > 0
    assert "chamfer" not in record["scores"] and record["scores"]["f@0.05"]["mean"] == 0.0
    assert record["scores"]["normal_consistency"]["mean"] == 0.0 and 5 < record["scores"]["psnr"]["mean"] < 30


def test_the_object_itself_looks_as_it_was_stored(folder, autoencoder, tmp_path, monkeypatch):
    """Stored views are lossless and the renderer is the data's: the exact mesh must give the same pictures."""
    shards = ShardFolder(folder)
    meshes = iter([exact_mesh(shards, shards.uids[i], shards.read_json(i)) for i in shards.select("val")])
    monkeypatch.setattr(reconstruction, "extract_mesh", lambda field, resolution: [next(meshes)])
    scores = run(autoencoder, folder, tmp_path, split="val", resolution=16)["scores"]
    assert scores["psnr"]["mean"] == pytest.approx(100) and scores["ssim"]["mean"] == pytest.approx(1, abs=2e-4)
    assert scores["normal_consistency"]["mean"] > 0.8 and scores["f@0.05"]["mean"] > 0.3  # 256 points are far apart


def test_the_report_shows_the_scores_with_their_definitions(folder, autoencoder, tmp_path):
    record = run(autoencoder, folder, tmp_path, split="val", count=1, resolution=16)
    page = report_tables.reconstruction(record)
    for words in ("normal_consistency", "psnr", "1 held-out assets (val)", "harmonic mean of precision", "dB"):
        assert words in page


def test_pictures_need_the_extra_and_some_pixels(folder, autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "SMALLEST", 64)  # the views have 32
    record = run(autoencoder, folder, tmp_path, split="val", count=1, resolution=16)
    assert "psnr" not in record["scores"] and record["notes"] == [
        "the stored views have 32 pixels, PSNR, SSIM and LPIPS need 64"
    ]
    monkeypatch.setattr(reconstruction, "available", lambda: ({}, ["no torchmetrics"]))
    record = run(autoencoder, folder, tmp_path, split="val", count=1, resolution=16)
    assert "psnr" not in record["scores"] and record["notes"] == ["no torchmetrics"]


def test_few_assets_are_spread_over_the_split(folder, autoencoder, tmp_path):
    record = run(autoencoder, folder, tmp_path, split="train", count=3, resolution=16)
    uids = [line["uid"] for line in csv.DictReader((tmp_path / "per_object.csv").read_text().splitlines())]
    assert record["settings"]["count"] == 3 and uids[0] == "p0-000000" and len(set(uids)) == 3


def test_mistakes_are_named(folder, autoencoder, tmp_path):
    with pytest.raises(UserError, match="no split 'tset'"):
        run(autoencoder, folder, tmp_path, split="tset")
    with pytest.raises(UserError, match="count"):
        run(autoencoder, folder, tmp_path, count=0)
    with pytest.raises(UserError, match="absent"):
        run(tmp_path / "absent", folder, tmp_path)
    with pytest.raises(UserError, match="not a folder of shards"):
        run(autoencoder, tmp_path / "absent", tmp_path)


# ---------------------------------------------------------------------------------------------- two folders of meshes


def ell(scale: float = 1.0, shift=(0, 0, 0)) -> trimesh.Trimesh:
    """An L of two boxes with a mark, alike from no two sides."""
    boxes = [
        trimesh.creation.box([1.0, 0.4, 0.4]),
        trimesh.creation.box([0.3, 1.1, 0.3]).apply_translation([0.4, 0.4, 0.1]),
    ]
    boxes.append(trimesh.creation.box([0.2, 0.2, 0.7]).apply_translation([-0.4, 0.0, 0.2]))
    return trimesh.util.concatenate(boxes).apply_scale(scale).apply_translation(shift)


def mesh_of(shape: trimesh.Trimesh) -> Mesh:
    return Mesh.from_vertex_colors(shape.vertices, shape.faces, np.full((len(shape.vertices), 3), 0.5))


def turned(shape: trimesh.Trimesh, angle_deg: float) -> trimesh.Trimesh:
    return shape.copy().apply_transform(trimesh.transformations.rotation_matrix(np.radians(angle_deg), [0, 1, 0]))


@pytest.fixture(scope="module")
def real_folders(assets_dir, tmp_path_factory):
    """References of real GLBs; of the generated ones one is a copy, one turned, one cut, one missing, one too many."""
    files = {path.stem: path for path in sorted((assets_dir / "pack").rglob("*.glb"))}
    stems = ["kenney_furniture_pack_cardboard_box_open", "quaternius_public_transport_pack_feb_2017_train"]
    stems += ["kaykit_halloween_tree_pine_orange_medium", "quaternius_platformer_game_pack_coin"]
    if missing := set(stems) - set(files):
        pytest.skip(f"the assets lack {missing}")
    made, true = (tmp_path_factory.mktemp(name) for name in ("made", "true"))
    for stem in stems:
        shutil.copy(files[stem], true / f"{stem}.glb")
    shutil.copy(files[stems[0]], made / f"{stems[0]}.glb")
    turned(trimesh.load_scene(files[stems[1]]), 90).export(made / f"{stems[1]}.glb")
    (made / f"{stems[2]}.glb").write_bytes(files[stems[2]].read_bytes()[:700])
    ell().export(made / "nobody.ply")
    return made, true, stems


def test_folders_of_real_files(real_folders, tmp_path, capsys):
    made, true, (copy, train, cut, absent) = real_folders
    record = run_folders(made, true, tmp_path, align="yaw4", points=1 << 13, size=64)
    assert record == json.loads((tmp_path / "results.json").read_text())
    assert record["format"] == "shapeloom-reconstruction/2" and record["extra"] == ["nobody"]
    lines = {line["uid"]: line for line in csv.DictReader((tmp_path / "per_object.csv").read_text().splitlines())}
    assert set(lines) == {copy, train, cut, absent}
    for name in (copy, train):
        assert float(lines[name]["f@0.02"]) > 0.99 and float(lines[name]["iou"]) > 0.99
        assert float(lines[name]["chamfer"]) < 0.002 and float(lines[name]["normal_consistency"]) > 0.99
        assert float(lines[name]["psnr"]) > 50 and lines[name]["failure"] == ""
    assert float(lines[copy]["turn_deg"]) == 0 and float(lines[train]["turn_deg"]) == 270
    for name, reason in ((cut, "it is cut short"), (absent, "there is no mesh of this name")):
        assert reason in lines[name]["failure"] and lines[name]["chamfer"] == "nan"
        assert float(lines[name]["f@0.05"]) == float(lines[name]["iou"]) == 0 and float(lines[name]["psnr"]) < 20
    assert {entry["id"] for entry in record["failures"]} == {cut, absent} and record["empty"] == 2
    assert record["scores"]["f@0.02"]["mean"] == pytest.approx(0.5, abs=0.01)  # failures are in the mean
    assert record["scores"]["f@0.02"]["prompts"] == 4 and record["scores"]["chamfer"]["prompts"] == 2
    said = capsys.readouterr().out
    assert "yaw4" in said and f"failed: {cut}: it is cut short" in said and "the first is nobody" in said
    assert "0.02 is 1.1% of the longest side" in said and (tmp_path / "contact_sheet.png").exists()
    assert "4 references, alignment yaw4, 2 without a surface" in report_tables.reconstruction(record)


def test_none_keeps_the_shared_frame_and_box_does_not():
    """A cube shifted by half its side: IoU 1/3 where the frame is shared, 1 where each has its own box."""
    true, made = (mesh_of(trimesh.creation.box([10.0] * 3).apply_translation([100 + x, 0, 0])) for x in (0, 5))
    normalised, _ = true.normalised()
    shared, turn = aligned(made, true, "none")
    np.testing.assert_allclose(shared.bounds(), np.add(normalised.bounds(), [0.9, 0, 0]), atol=1e-5)
    assert turn == 0 and compare_meshes(shared, normalised, 1 << 13)["iou"] == pytest.approx(1 / 3, abs=0.02)
    np.testing.assert_allclose(aligned(made, true, "box")[0].vertices, normalised.vertices, atol=1e-5)


@pytest.mark.parametrize(("align", "angle", "found"), [("yaw4", 90, 270), ("yaw24", 45, 315), ("yaw24", 345, 15)])
def test_the_turn_is_found_whatever_the_size(align, angle, found):
    reference = mesh_of(ell())
    mesh, turn = aligned(mesh_of(turned(ell(scale=7, shift=(3, 1, 2)), angle)), reference, align)
    assert turn == found
    np.testing.assert_allclose(mesh.vertices, reference.normalised()[0].vertices, atol=1e-5)


def test_a_turn_that_is_not_tried_is_not_found():
    mesh, turn = aligned(mesh_of(turned(ell(), 45)), mesh_of(ell()), "box")
    assert turn == 0 and np.abs(mesh.vertices - mesh_of(ell()).normalised()[0].vertices).max() > 0.3


class Deadly(str):
    """A path that kills the process which takes the job."""

    def __reduce__(self):
        return os._exit, (7,)


def test_what_kills_its_process_is_a_failure_and_the_rest_goes_on(tmp_path):
    for name in ("a", "b"):
        ell().export(tmp_path / f"{name}.stl")
    (tmp_path / "broken.ply").write_bytes(b"ply")
    good, other = str(tmp_path / "a.stl"), str(tmp_path / "b.stl")
    jobs = [PairJob(Deadly(good), good, "box", 32, 4096), PairJob(good, str(tmp_path / "broken.ply"), "box", 32, 4096)]
    results = dict(compare_all([*jobs, PairJob(other, other, "box", 32, 4096)], workers=1))
    assert isinstance(results[0], Pair) and "died (exit code 7)" in results[0].failure
    assert results[0].scores["f@0.02"] == 0 and (results[0].generated == 255).all() and results[0].reference.min() < 200
    assert isinstance(results[1], Failed) and "PLY" in results[1].reason
    assert results[2].failure == "" and results[2].scores["iou"] == 1


def test_a_reference_that_cannot_be_read_is_left_out_and_told(tmp_path, monkeypatch):
    made, true = tmp_path / "made", tmp_path / "true"
    for place in (made, true):
        place.mkdir()
        for name in ("a", "b"):
            ell().export(place / f"{name}.off")
    (true / "b.off").write_text("OFF\nnonsense")
    record = run_folders(made, true, tmp_path / "out", points=1 << 12)
    assert "Chamfer distance of 0.0344 and f@0.02 of 0.23" in record["definitions"]["points"]
    assert record["settings"]["count"] == 1 and [entry["id"] for entry in record["unusable_references"]] == ["b"]
    assert not record["failures"] and record["scores"]["iou"]["mean"] == 1
    assert record["scores"]["chamfer"] == {"mean": 0, "lo": 0, "hi": 0, "prompts": 1, "seeds": 1}
    monkeypatch.setattr(
        reconstruction, "compare_all", lambda jobs, workers: [(k, Failed("it is empty")) for k in (0, 1)]
    )
    with pytest.raises(UserError, match="none of the references in .* can be read, the first because it is empty"):
        run_folders(made, true, tmp_path / "out")


def test_mistakes_with_folders_are_named(tmp_path, call):
    made, true, empty = tmp_path / "made", tmp_path / "true", tmp_path / "empty"
    for place in (made, true, empty):
        place.mkdir()
    ell().export(made / "chair.stl")
    ell().export(true / "table.stl")
    with pytest.raises(UserError, match="--align 'icp' is not known: choose one of none, box, yaw4, yaw24"):
        run_folders(made, true, tmp_path / "out", align="icp")
    with pytest.raises(UserError, match="no file in .*made has the name of one in .*true"):
        run_folders(made, true, tmp_path / "out")
    with pytest.raises(UserError, match="--generated .*empty has no mesh files"):
        run_folders(empty, true, tmp_path / "out")
    with pytest.raises(UserError, match="--references .*absent does not exist"):
        run_folders(made, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UserError, match="--generated .*chair.stl is not a folder"):
        run_folders(made / "chair.stl", true, tmp_path / "out")
    ell().export(made / "chair.ply")
    with pytest.raises(UserError, match="has chair.ply and chair.stl: keep one of them"):
        run_folders(made, true, tmp_path / "out")
    done = call("eval", "reconstruction", "--generated", made, "--references", true, "--count", 3, "--out", "out")
    assert done.returncode == 1 and done.stderr.startswith("error: give AUTOENCODER and --data")
    assert not Path(tmp_path / "out").exists()
