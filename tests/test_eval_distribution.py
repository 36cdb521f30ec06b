"""Distances between sets of objects: closed forms, torchmetrics' own functions, brute force, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import trimesh
from latent_folders import small_clip
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from shapeloom.checkpoints.clip import publish_clip
from shapeloom.data_pipes.read import read_mesh
from shapeloom.errors import UserError
from shapeloom.eval.metrics import distribution, distribution_run
from shapeloom.eval.metrics.distribution import chamfer_matrix, cmmd, frechet_distance, kid, point_set_scores
from shapeloom.eval.metrics.distribution_run import run
from shapeloom.eval.metrics.mesh_files import orbit_pictures


def normal(n: int, width: int, seed: int, mean=0.0, root=None) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return mean + (rows if root is None else rows @ root)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exactly(rows: np.ndarray, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """The rows moved so that their mean and covariance (over n - 1) are exactly `mean` and root^T root."""
    centred = rows - rows.mean(0)
    return centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T)).T) @ root + mean


# ------------------------------------------------------------------------------------------------------ of features


def test_frechet_of_gaussians_is_the_closed_form():
    """Of covariances that commute: |m - m'|^2 + sum (s_i - s'_i)^2 over standard deviations."""
    s, other = np.array([1.0, 0.5, 0.01, 0.0]), np.array([0.5, 2.0, 0.01, 1.0])
    mean = np.array([0.3, 0, 0, -1.0])
    a = exactly(normal(2048, 4, 0), np.zeros(4), np.diag(s))
    b = exactly(normal(2048, 4, 1), mean, np.diag(other))
    assert frechet_distance(a, b) == pytest.approx((mean**2).sum() + ((s - other) ** 2).sum(), rel=1e-9)
    assert frechet_distance(a, a + mean) == pytest.approx((mean**2).sum(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_that_of_other_formulas():
    from torchmetrics.image.fid import _compute_fid

    root = np.random.default_rng(2).normal(size=(12, 12))
    a, b = normal(2048, 12, 0, root=root), normal(2048, 12, 1, mean=0.2)
    (mean, cov), (other_mean, other_cov) = ((rows.mean(0), np.cov(rows.T)) for rows in (a, b))
    by_sqrtm = ((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * sqrtm(cov @ other_cov).real)
    by_torchmetrics = _compute_fid(*map(torch.from_numpy, (mean, cov, other_mean, other_cov)))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(float(by_torchmetrics), rel=1e-9)


def test_frechet_of_flat_features_is_a_real_number():
    """Where columns repeat or stand still, the covariance has no full rank: the square root of a product of two such
    matrices gets imaginary parts of rounding."""
    flat = normal(2048, 3, 0) @ np.random.default_rng(1).normal(size=(3, 40))
    value = frechet_distance(flat, 1.1 * flat)
    assert value == pytest.approx(0.01 * np.square(flat).sum() / 2047, rel=1e-2) and np.isfinite(value)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6 * np.var(flat) * 40)


def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(90, 24, 0), normal(90, 24, 1, mean=0.3)
    expected = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    assert kid(a, b, n_subsets=10).value == pytest.approx(expected, rel=1e-9)


def by_all_pairs(kernel, x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD, one pair after the other."""
    within = [
        sum(kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j)
        / len(rows)
        / (len(rows) - 1)
        for rows in (x, y)
    ]
    return sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / len(x) / len(y)


def test_kid_and_cmmd_by_all_pairs_with_unequal_numbers():
    x, y = unit(normal(60, 8, 0)), unit(normal(50, 8, 1, mean=0.2))
    cubic = by_all_pairs(lambda a, b: (a @ b / 8 + 1) ** 3, x, y)
    gaussian = 1000 * by_all_pairs(lambda a, b: np.exp(-((a - b) ** 2).sum() / 200), x, y)
    assert kid(x, y, n_subsets=10).value == pytest.approx(cubic, rel=1e-9)
    assert cmmd(x, y, n_subsets=10).value == pytest.approx(gaussian, rel=1e-9)


def test_the_biased_cmmd_is_as_much_larger_as_the_docstring_says():
    x, y = unit(normal(100, 8, 0)), unit(normal(80, 8, 1, mean=0.2))

    def mean(a, b):
        return 1000 * np.exp(-cdist(a, b, "sqeuclidean") / 200).mean()

    biased = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    added = (1000 - mean(x, x)) / 99 + (1000 - mean(y, y)) / 79
    assert biased - cmmd(x, y, n_subsets=2).value == pytest.approx(added, rel=1e-6)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_equal_distributions_have_about_zero(metric):
    values = [
        metric(unit(normal(60, 16, 2 * i, mean=0.5)), unit(normal(60, 16, 2 * i + 1, mean=0.5)), n_subsets=2).value
        for i in range(100)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10 and 30 < sum(value < 0 for value in values) < 70


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_the_interval_is_as_wide_as_the_estimate_varies(metric):
    estimates = [
        metric(unit(normal(80, 8, 2 * i, mean=0.5)), unit(normal(120, 8, 2 * i + 1, mean=-0.1)), n_subsets=200)
        for i in range(60)
    ]
    widths = np.mean([one.hi - one.lo for one in estimates])
    assert widths / 3.92 == pytest.approx(np.std([one.value for one in estimates]), rel=0.25)
    truth = np.mean([one.value for one in estimates])
    assert np.mean([one.lo <= truth <= one.hi for one in estimates]) > 0.85


def test_estimates_do_not_depend_on_the_blocks(monkeypatch):
    a, b = normal(70, 8, 0), normal(60, 8, 1)
    whole = kid(a, b, n_subsets=20)
    monkeypatch.setattr(distribution, "BLOCK_ROWS", 16)
    assert list(kid(a, b, n_subsets=20).to_json().values()) == pytest.approx(list(whole.to_json().values()), rel=1e-9)


def test_too_few_objects_get_a_reason():
    with pytest.raises(UserError, match="needs at least 2048 objects on either side, there are 2047 and 2048"):
        frechet_distance(normal(2047, 4, 0), normal(2048, 4, 1))
    with pytest.raises(UserError, match="needs at least 3000 objects"):  # no full rank with fewer than features
        frechet_distance(np.zeros((2500, 3000)), np.zeros((2500, 3000)))
    with pytest.raises(UserError, match="the same on both sides, there are 2048 and 2049"):
        frechet_distance(normal(2048, 4, 0), normal(2049, 4, 1))
    for metric in (kid, cmmd):
        with pytest.raises(UserError, match="needs at least 50 objects on either side, there are 50 and 49"):
            metric(unit(normal(50, 4, 0)), unit(normal(49, 4, 1)))


def test_broken_features_are_refused():
    good, broken = normal(60, 4, 0), normal(60, 4, 1)
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        kid(good, broken)
    with pytest.raises(ValueError, match="of one width"):
        kid(good, normal(60, 5, 1))
    with pytest.raises(ValueError, match="unit length"):
        cmmd(good, good)


# -------------------------------------------------------------------------------------------------- of sets of points


def clouds(k: int, seed: int, shift: float = 0.0, points: int = 40) -> np.ndarray:
    """Ellipsoids of random axes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, points, 3)) * rng.uniform(0.2, 1, (k, 1, 3)) + shift


def test_chamfer_matrix_by_brute_force(monkeypatch):
    sets = clouds(7, 0)
    expected = np.zeros((7, 7))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            distances = cdist(a, b)
            expected[i, j] = (distances.min(0).mean() + distances.min(1).mean()) / 2
    np.testing.assert_allclose(chamfer_matrix(sets), expected, rtol=1e-12)
    monkeypatch.setattr(distribution, "QUERY_POINTS", 100)  # two clouds at a time
    np.testing.assert_allclose(chamfer_matrix(sets), expected, rtol=1e-12)


def test_point_set_scores_by_brute_force():
    both = np.concatenate([clouds(24, 0, 0.2), clouds(24, 1)])
    distances, generated, references = chamfer_matrix(both), np.arange(24), np.arange(24, 48)
    covered, matching, right = set(), [], 0
    for g in generated:
        covered.add(min(references, key=lambda r: distances[g, r]))
    for r in references:
        matching.append(min(distances[g, r] for g in generated))
    for one in range(48):
        nearest = min((other for other in range(48) if other != one), key=lambda other: distances[one, other])
        right += (one < 24) == (nearest < 24)
    scores = point_set_scores(distances, generated, references)
    assert scores == pytest.approx({"cov": len(covered) / 24, "mmd": np.mean(matching), "1-nna": right / 48})
    assert 0 < scores["cov"] < 1 and 0.5 < scores["1-nna"] < 1


def test_two_halves_of_one_set_cannot_be_told_apart():
    distances = chamfer_matrix(clouds(160, 0))
    order = np.random.default_rng(0).permutation(160)
    assert point_set_scores(distances, order[:80], order[80:])["1-nna"] == pytest.approx(0.5, abs=0.12)


def test_copies_and_strangers():
    references = clouds(20, 0)
    copied = chamfer_matrix(np.concatenate([references, references]))
    assert point_set_scores(copied, np.arange(20), np.arange(20, 40)) == {"cov": 1.0, "mmd": 0.0, "1-nna": 0.0}
    strange = chamfer_matrix(np.concatenate([clouds(20, 1, shift=100.0), references]))
    scores = point_set_scores(strange, np.arange(20), np.arange(20, 40))
    assert scores["1-nna"] == 1.0 and scores["cov"] <= 0.2 and scores["mmd"] > 100


def test_tied_neighbours_share_the_credit():
    """All objects equally far: the nearest is of the own side with 19 in 39."""
    distances = 1 - np.eye(40)
    assert point_set_scores(distances, np.arange(20), np.arange(20, 40))["1-nna"] == pytest.approx(19 / 39)


def test_sets_that_are_too_small_or_unequal_get_a_reason():
    distances = 1 - np.eye(60)
    with pytest.raises(UserError, match="at least 20 objects on either side, there are 19 and 20"):
        point_set_scores(distances, np.arange(19), np.arange(20, 40))
    with pytest.raises(UserError, match="the same number of objects on both sides, there are 20 and 21"):
        point_set_scores(distances, np.arange(20), np.arange(20, 41))


# ------------------------------------------------------------------------------------------------------- whole folders


def boxes(folder, count: int, seed: int) -> None:
    """Boxes of random sides."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for k in range(count):
        trimesh.creation.box(rng.uniform(0.2, 1, 3)).export(folder / f"{k:03d}.stl")


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluator") / "clip"
    publish_clip(small_clip(), path)
    return path


@pytest.fixture
def here(monkeypatch):
    """Files are read in this process, with few points: starting others takes longer than so many small ones."""
    monkeypatch.setattr(distribution_run, "POINTS", 128)
    monkeypatch.setattr(distribution_run, "DENSE_POINTS", 512)
    monkeypatch.setattr(distribution_run, "isolated_map", lambda function, jobs, **limits: map(function, jobs))


def test_folders_with_an_evaluator(tmp_path, evaluator, here, capsys):
    boxes(tmp_path / "made", 51, 0)
    boxes(tmp_path / "true", 101, 1)
    (tmp_path / "true" / "broken.glb").write_bytes(b"glTF")
    record = run(tmp_path / "made", tmp_path / "true", tmp_path / "out", evaluator=evaluator)
    assert record == json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["objects"] == {"generated": 51, "references": 101}
    assert [entry["file"] for entry in record["failures"]["references"]] == ["broken.glb"]
    metrics, floor = record["metrics"], record["noise_floor"]
    assert metrics["frechet"]["value"] is None and "at least 2048 objects" in metrics["frechet"]["reason"]
    for name in ("kid", "cmmd"):
        assert metrics[name]["lo"] <= metrics[name]["value"] <= metrics[name]["hi"]
        assert metrics[name]["n"] == [51, 101] and floor[name]["n"] == [50, 50] and floor[name]["value"] is not None
    for name in ("cov", "mmd", "1-nna"):
        assert metrics[name]["n"] == [51, 51] and floor[name]["n"] == [25, 25]
        assert metrics[name]["lo"] is None and "no interval" in metrics[name]["reason"]
    assert 0.25 < metrics["1-nna"]["value"] < 0.75 and 0 < metrics["mmd"]["value"] < 0.3
    assert len(record["hashes"]["evaluator"]) == 64
    said = capsys.readouterr().out
    assert "(50 each)" in said and "broken.glb" in said and "frechet: the Fréchet distance of" in said


def test_the_feature_of_an_object_is_the_mean_of_its_views(tmp_path, evaluator, here):
    boxes(tmp_path / "made", 50, 0)
    boxes(tmp_path / "true", 50, 1)
    clip, features = small_clip(), {}
    for side in ("made", "true"):
        rows = []
        for path in sorted((tmp_path / side).iterdir()):
            views = orbit_pictures(read_mesh(path).normalised()[0], clip.image_size)
            with torch.inference_mode():
                rows.append(clip.encode_image(views).pooled.mean(0).numpy())
        features[side] = unit(np.stack(rows))
    record = run(tmp_path / "made", tmp_path / "true", tmp_path / "out", evaluator=evaluator)
    expected = cmmd(features["made"], features["true"])
    got = record["metrics"]["cmmd"]
    assert [got["value"], got["lo"], got["hi"]] == pytest.approx(list(expected.to_json().values()), rel=1e-3, abs=1e-5)


def test_few_real_files_get_reasons(assets_dir, tmp_path, call):
    made, true = tmp_path / "made", tmp_path / "true"
    for folder in (made, true):
        folder.mkdir()
    for k, path in enumerate(sorted((assets_dir / "pack").rglob("*.glb"))[:3]):
        shutil.copy(path, (made if k else true) / path.name)
    (true / "cut.glb").write_bytes(path.read_bytes()[:300])
    done = call(
        "eval", "distribution", "--generated", made, "--references", true, "--out", tmp_path / "out", "--workers", 1
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["objects"] == {"generated": 2, "references": 1}
    assert all(score["value"] is None and score["reason"] for score in record["metrics"].values())
    assert (
        "cov, mmd, 1-nna: COV, MMD and 1-NNA need at least 20 objects on either side, there are 1 and 1" in done.stdout
    )
    assert "frechet, kid, cmmd: it needs --evaluator" in done.stdout
    assert "references, left out: cut.glb: it is cut short" in done.stdout


def test_the_processes_that_read_load_no_torch():
    code = "import sys; from shapeloom.eval.metrics import distribution_run, mesh_pairs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_mistakes_with_folders_are_named(tmp_path, here):
    boxes(tmp_path / "made", 1, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.ply").write_bytes(b"")
    with pytest.raises(UserError, match="--references .*empty has no mesh files"):
        run(tmp_path / "made", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match=r"none of the 1 files in --references .*broken can be read, the first, a.ply"):
        run(tmp_path / "made", tmp_path / "broken", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere is no evaluator"):
        run(tmp_path / "made", tmp_path / "made", tmp_path / "out", evaluator=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
