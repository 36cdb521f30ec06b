"""Camera rigs against closed forms and properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial import cKDTree

from shapeloom.data_pipes.rigs import DEFAULTS, RigSettings
from shapeloom.models.cameras import Cameras, orbit

CORNERS_83 = np.array(list(itertools.product((-0.9, 0.9), repeat=3)))


def cameras_of(seed: int = 0, n_views: int = 8, size: int = 64, **settings: object) -> Cameras:
    return RigSettings(**settings).cameras(np.random.default_rng(seed), n_views, size)


def directions(cameras: Cameras) -> np.ndarray:
    positions = cameras.camera_to_world[:, :3, 3].astype(np.float64)
    return positions / np.linalg.norm(positions, axis=1, keepdims=True)


def angles(cameras: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Azimuths in [0, 360) and elevations, degrees."""
    x, y, z = directions(cameras).T
    return np.degrees(np.arctan2(x, z)) % 360, np.degrees(np.arcsin(np.clip(y, -1, 1)))


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_rig_is_a_function_of_its_generator_and_looks_at_the_origin(kind: str) -> None:
    cameras, again = cameras_of(kind=kind, seed=7), cameras_of(kind=kind, seed=7)
    assert cameras.camera_to_world.tobytes() == again.camera_to_world.tobytes()
    assert len(cameras) == 8 and (cameras.width, cameras.height) == (64, 64)
    positions = cameras.camera_to_world[:, :3, 3]
    assert np.linalg.norm(positions, axis=1) == pytest.approx(4.0, abs=1e-5)
    assert cameras.camera_to_world[:, :3, 2] == pytest.approx(positions / 4, abs=1e-6)
    other = cameras_of(kind=kind, seed=8)
    drawn = kind in ("frontal", "shap-e", "random")
    assert (other.camera_to_world != cameras.camera_to_world).any() == drawn


@pytest.mark.parametrize("kind", DEFAULTS)
def test_settings_come_back_from_json(kind: str) -> None:
    settings = RigSettings(kind=kind)
    assert RigSettings.model_validate_json(settings.model_dump_json()) == settings
    assert RigSettings(**settings.model_dump()) == settings


@pytest.mark.parametrize("n_views", [1, 2, 7, 8])
def test_the_frontal_rig_draws_as_the_first_data_were_drawn(n_views: int) -> None:
    rng = np.random.default_rng(3)
    n_front = -(-n_views // 2)
    azimuths = [*rng.uniform(-40, 40, n_front), *rng.uniform(0, 360, n_views - n_front)]
    elevations = [*rng.uniform(5, 35, n_front), *rng.uniform(-10, 60, n_views - n_front)]
    expected = orbit(azimuths, elevations, size=48)
    cameras = cameras_of(seed=3, size=48, n_views=n_views)
    assert cameras.camera_to_world.tobytes() == expected.camera_to_world.tobytes()
    assert cameras.focal.tobytes() == expected.focal.tobytes()


def test_the_shap_e_rig_looks_through_a_50_mm_lens_from_the_whole_sphere() -> None:
    cameras = cameras_of(kind="shap-e", size=256)
    assert cameras.focal == pytest.approx(256 * 50 / 36)
    d = directions(cameras_of(kind="shap-e", n_views=1000))
    assert np.abs(d.mean(axis=0)).max() < 0.08
    assert d.T @ d / 1000 == pytest.approx(np.eye(3) / 3, abs=0.05)


@pytest.mark.parametrize("n_views", [12, 20, 100, 500])
def test_fibonacci_covers_the_sphere_evenly(n_views: int) -> None:
    d = directions(cameras_of(kind="fibonacci", n_views=n_views))
    nearest = cKDTree(d).query(d, k=2)[0][:, 1]
    # The densest packing gives each point 4 pi / n of the sphere, as one of a triangular lattice.
    closest_possible = np.sqrt(8 * np.pi / (np.sqrt(3) * n_views))
    assert nearest.min() > 0.7 * closest_possible
    assert np.abs(d.mean(axis=0)).max() < 0.6 / n_views
    probes = np.random.default_rng(0).standard_normal((20000, 3))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    assert cKDTree(d).query(probes)[0].max() < 0.95 * closest_possible  # no hole


def test_a_band_is_covered_evenly_by_area() -> None:
    for kind in ("fibonacci", "random"):
        _, elevation = angles(cameras_of(kind=kind, n_views=900, elevation_deg=(-10, 60)))
        assert elevation.min() > -10.01 and elevation.max() < 60.01
        heights = np.sin(np.radians(elevation))
        lowest, highest = np.sin(np.radians([-10, 60]))
        counts, _ = np.histogram(heights, bins=3, range=(lowest, highest))
        assert np.abs(counts - 300).max() <= (1 if kind == "fibonacci" else 60), kind


def test_the_turntable_turns_in_equal_steps_from_the_front() -> None:
    azimuth, elevation = angles(cameras_of(kind="turntable", n_views=12, elevation_deg=-15))
    assert azimuth == pytest.approx(np.arange(12) * 30, abs=1e-3)
    assert elevation == pytest.approx(-15, abs=1e-4)
    front = cameras_of(kind="turntable", n_views=1, elevation_deg=0)
    assert front.camera_to_world[0, :3, 3] == pytest.approx([0, 0, 4], abs=1e-6)


@pytest.mark.parametrize("kind", ["turntable", "fibonacci", "random"])
def test_a_whole_object_is_in_every_picture(kind: str) -> None:
    cameras = cameras_of(kind=kind, n_views=1000)
    apart_V83 = CORNERS_83 - cameras.camera_to_world[:, None, :3, 3]
    local_V83 = np.einsum("vij,vni->vnj", cameras.camera_to_world[:, :3, :3], apart_V83)
    pixels = cameras.focal[:, None, None] * local_V83[..., :2] / -local_V83[..., 2:]
    assert np.abs(pixels).max() < cameras.width / 2


def test_distance_and_field_of_view_are_those_of_the_settings() -> None:
    cameras = cameras_of(kind="random", distance=2.5, fov_deg=90.0, size=100)
    assert cameras.focal == pytest.approx(50.0)
    assert np.linalg.norm(cameras.camera_to_world[:, :3, 3], axis=1) == pytest.approx(2.5)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_no_views_are_no_cameras_and_draw_nothing(kind: str) -> None:
    rng = np.random.default_rng(0)
    assert len(RigSettings(kind=kind).cameras(rng, 0, 8)) == 0
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "frontal", "elevation_deg": 20}, "its own elevations"),
        ({"kind": "shap-e", "elevation_deg": [0, 20]}, "its own elevations"),
        ({"kind": "turntable", "elevation_deg": [0, 20]}, "one elevation_deg"),
        ({"kind": "turntable", "elevation_deg": None}, "one elevation_deg"),
        ({"kind": "random", "elevation_deg": 20}, "lowest and a highest"),
        ({"kind": "fibonacci", "elevation_deg": [60, -10]}, "from the lowest to the highest"),
        ({"kind": "random", "elevation_deg": [-91, 0]}, "greater than or equal to -90"),
        ({"kind": "orbit"}, "'turntable'"),
        ({"kind": ["frontal"]}, "'turntable'"),
        ({"distance": 1.0}, "greater than or equal to 1.6"),
        ({"fov_deg": float("nan")}, "less than or equal to 120"),
        ({"view_count": 3}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RigSettings(**settings)
