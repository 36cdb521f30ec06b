"""Reconstruction measures against closed forms, and the whole run with an autoencoder of known fields."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.errors import UserError
from shapeloom.eval import reconstruction
from shapeloom.eval.reconstruction import chamfer_and_f_scores, iou, points_on, run
from shapeloom.models.autoencoder import Autoencoder


class BoxField:
    """The implicit function of a box centred on the origin, of one colour."""

    device = torch.device("cpu")

    def __init__(self, half_3) -> None:
        self.half_3 = torch.tensor(half_3)

    def __call__(self, points_BP3):
        sdf_BP = (points_BP3.abs() - self.half_3).amax(-1)
        return SimpleNamespace(sdf_BP=sdf_BP, rgb_BP3=torch.full_like(points_BP3, 0.5))


def lattice(n: int) -> np.ndarray:
    axis = (np.arange(n) + 0.5) / n * 2 - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def test_chamfer_of_shifted_points_is_the_shift():
    points = lattice(6)
    chamfer, scores = chamfer_and_f_scores(points, points + [0.03, 0, 0], [0.02, 0.05])
    assert chamfer == pytest.approx(0.03) and scores == [0.0, 1.0]
    assert chamfer_and_f_scores(points, points) == (0.0, [1.0, 1.0])


def test_f_score_is_the_harmonic_mean_of_precision_and_recall():
    truth, others = np.zeros((1, 3)), np.array([[0, 0, 0], [1.0, 0, 0]])  # precision and recall 1 and 1/2
    chamfer, (score,) = chamfer_and_f_scores(truth, others, [0.1])
    assert score == pytest.approx(2 / 3) and chamfer == pytest.approx((0 + 0.5) / 2)


def test_iou_of_overlapping_boxes():
    points = lattice(40)
    truth = (np.abs(points) - [0.5, 0.5, 0.5]).max(1)
    assert iou(BoxField([0.5, 0.5, 0.5]), points, truth) == 1.0
    assert iou(BoxField([0.25, 0.5, 0.5]), points, truth) == pytest.approx(0.5)
    assert iou(BoxField([-1.0, -1.0, -1.0]), points, truth) == 0.0
    assert iou(BoxField([-1.0, -1.0, -1.0]), points, np.ones(len(points))) == 1.0


def test_points_are_uniform_by_area():
    small = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    large = small * [3, 1, 1] + [0, 0, 1]
    points = points_on(np.stack([small, large]).astype(np.float32), 40_000, np.random.default_rng(0))
    above = points[:, 2] > 0.5
    assert above.mean() == pytest.approx(0.75, abs=0.01)
    assert (points >= -1e-6).all() and (points[~above, :2].sum(1) <= 1 + 1e-6).all()
    np.testing.assert_allclose(points[above].mean(0), [1, 1 / 3, 1], atol=0.02)


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
    assert set(record["scores"]) >= {"iou", "color_l1", "f@0.02", "f@0.05"}
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
