"""The procedural set: exact geometry, honest splits, the same bytes for any number of workers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapeloom.data_pipes import primitives
from shapeloom.data_pipes.grammar import Part, SceneSpec, captions, held_out, parse, single_specs
from shapeloom.data_pipes.loader import RawDataset
from shapeloom.data_pipes.procedural import SPLITS, ProceduralSettings, generate, make_sample, plan
from shapeloom.data_pipes.raw_sample import decode_field, decode_surface
from shapeloom.data_pipes.render import RayScene
from shapeloom.data_pipes.scenes import MAKERS, PlacedPart, Scene, draw_scene
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import index_path
from shapeloom.errors import UserError

SOLIDS = {shape: maker(*(0.7 * np.array(unit))) for shape, (maker, unit) in MAKERS.items()}
SOLIDS["cube"] = primitives.box(0.5, 0.6, 0.7)
SOLIDS["pyramid"] = primitives.pyramid(0.6, 0.5, 0.7)
SOLIDS["octahedron"] = primitives.octahedron(0.6, 0.7, 0.8)
FLAT = ("cube", "pyramid", "octahedron", "hexagonal prism")
SMALL = ProceduralSettings(count=12, n_surface=64, n_near=32, n_uniform=32, n_views=2, image_size=32, shard_size=5)


def distance_to_mesh(mesh: trimesh.Trimesh, points_P3: np.ndarray) -> np.ndarray:
    """Signed distance by brute force over the triangles; inside by the parity of ray crossings."""
    n_faces = len(mesh.faces)
    queries = np.repeat(points_P3, n_faces, axis=0)
    nearest = trimesh.triangles.closest_point(np.tile(mesh.triangles, (len(points_P3), 1, 1)), queries)
    distance_P = np.linalg.norm(nearest - queries, axis=1).reshape(len(points_P3), n_faces).min(axis=1)
    return np.where(mesh.contains(points_P3), -distance_P, distance_P)


# ---------------------------------------------------------------------------------------------- primitives


@pytest.mark.parametrize("shape", SOLIDS)
def test_distance_agrees_with_the_mesh(shape: str) -> None:
    solid = SOLIDS[shape]
    mesh = trimesh.Trimesh(*solid.mesh(), process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    points = np.random.default_rng(0).uniform(-1, 1, (120, 3))
    error = np.abs(solid.sdf(points) - distance_to_mesh(mesh, points)).max()
    assert error < (1e-12 if shape in FLAT else 4e-3)  # a turned mesh is inscribed in the round solid
    assert mesh.area == pytest.approx(solid.area, rel=1e-12 if shape in FLAT else 0.01)


@pytest.mark.parametrize("shape", SOLIDS)
def test_distance_has_unit_slope(shape: str) -> None:
    solid, step = SOLIDS[shape], 1e-6
    points = np.random.default_rng(1).uniform(-1, 1, (2000, 3))
    slope = np.stack([(solid.sdf(points + step * e) - solid.sdf(points - step * e)) / (2 * step) for e in np.eye(3)], 1)
    # Inside, the distance has creases where two faces are equally near; a point on one is unlikely.
    assert np.quantile(np.abs(np.linalg.norm(slope, axis=1) - 1), 0.999) < 1e-6


@pytest.mark.parametrize("shape", SOLIDS)
def test_surface_samples_lie_on_it_evenly_with_outward_normals(shape: str) -> None:
    solid = SOLIDS[shape]
    xyz, normal = solid.sample(20_000, np.random.default_rng(2))
    assert np.abs(solid.sdf(xyz)).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-12)
    off = np.abs(solid.sdf(xyz + 1e-4 * normal) - 1e-4)
    assert np.quantile(off, 0.99) < 1e-9
    mesh = trimesh.Trimesh(*solid.mesh(), process=False)
    evenly, _ = trimesh.sample.sample_surface(mesh, 20_000, seed=3)
    edges = np.array([-1, -0.55, -0.31, -0.09, 0.09, 0.31, 0.55, 1])  # none of them in a face
    for axis in range(3):  # the shares of area in slabs across each axis
        ours, theirs = (np.histogram(x[:, axis], edges)[0] / 20_000 for x in (xyz, evenly))
        np.testing.assert_allclose(ours, theirs, atol=0.015)


def test_distances_by_hand() -> None:
    box = primitives.box(1, 1, 1)
    np.testing.assert_allclose(
        box.sdf(np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [2, 2, 2], [0.9, 0, 0]])), [-1, 1, 2**0.5, 3**0.5, -0.1]
    )
    cone = primitives.cone(1, 1)
    np.testing.assert_allclose(cone.sdf(np.array([[0, 2, 0], [0, -2, 0], [1, -1, 0], [2, -1, 0]])), [1, 1, 0, 1])
    torus = primitives.Torus(0.5, 0.2)
    np.testing.assert_allclose(torus.sdf(np.array([[0, 0, 0], [0.5, 0, 0], [0, 0, 1]])), [0.3, -0.2, 0.3])


# ---------------------------------------------------------------------------------------------- scenes


def scenes(level: str, n: int) -> list[tuple[SceneSpec, Scene]]:
    specs = [item.spec for item in plan(ProceduralSettings(level=level, count=n))]
    return [(spec, draw_scene(spec, np.random.default_rng(i))) for i, spec in enumerate(specs)]


@pytest.mark.parametrize("level", ["core", "full"])
def test_parts_are_inside_apart_and_where_the_words_say(level: str) -> None:
    for spec, scene in scenes(level, 150):
        boxes = [(mesh.min(axis=0), mesh.max(axis=0)) for mesh in map(placed_vertices, scene.parts)]
        assert all(low.min() >= -0.95 and high.max() <= 0.95 for low, high in boxes)
        low, high = np.min([b[0] for b in boxes], axis=0), np.max([b[1] for b in boxes], axis=0)
        np.testing.assert_allclose(low + high, 0, atol=1e-6 if spec.relation else 0.35)  # a cone's box is not centred
        for (low_1, high_1), (low_2, high_2) in zip(boxes, boxes[1:]):
            if spec.relation in ("on top of", "tower"):
                assert low_1[1] > high_2[1] + 0.01
            elif spec.relation == "left of":
                assert high_1[0] < low_2[0] - 0.05
            elif spec.relation == "in front of":
                assert low_1[2] > high_2[2] + 0.05
        if spec.relation == "between":
            x_middle, x_1, x_2 = ((low + high)[0] for low, high in boxes)
            assert min(x_1, x_2) < x_middle < max(x_1, x_2)


def placed_vertices(part: PlacedPart) -> np.ndarray:
    return part.solid.mesh()[0] @ part.rotation_33.T + part.center_3


def test_sizes_stay_apart_under_jitter() -> None:
    largest: dict[str, float] = {}
    smallest: dict[str, float] = {}
    for spec in single_specs("full"):
        if spec.parts[0].color == "red":
            for seed in range(20):
                scene = draw_scene(spec, np.random.default_rng(seed))
                volume = trimesh.Trimesh(*scene.parts[0].solid.mesh(), process=False).volume
                key = f"{spec.parts[0].shape} {spec.parts[0].size}"
                largest[key], smallest[key] = max(largest.get(key, 0), volume), min(smallest.get(key, 9), volume)
    for shape in MAKERS:
        assert largest[f"{shape} small"] < 0.7 * smallest[f"{shape} medium"]
        assert largest[f"{shape} medium"] < 0.7 * smallest[f"{shape} big"]


@pytest.mark.parametrize("level", ["core", "full"])
def test_the_distance_of_a_whole_scene_is_exact(level: str) -> None:
    points = np.random.default_rng(5).uniform(-1, 1, (60, 3))
    for _, scene in scenes(level, 12):
        mesh = scene.mesh()
        whole = trimesh.Trimesh(mesh.vertices.astype(float), mesh.faces, process=False)
        assert whole.is_watertight
        sdf, part = scene.sdf_and_part(points)
        assert np.abs(sdf - distance_to_mesh(whole, points)).max() < 4e-3
        assert set(part) <= set(range(len(scene.parts)))


def test_colour_is_that_of_the_nearest_part() -> None:
    spec = SceneSpec((Part("sphere", "red"), Part("cube", "blue")), "on top of")
    scene = draw_scene(spec, np.random.default_rng(0))
    field = scene.sample_field(500, 500, np.random.default_rng(1))
    red = field.rgb[:, 0] > field.rgb[:, 2]
    assert red[field.xyz[:, 1] > 0.3].all() and not red[field.xyz[:, 1] < -0.3].any()
    surface = scene.sample_surface(500, np.random.default_rng(1))
    assert ((surface.rgb[:, 0] > surface.rgb[:, 2]) == (surface.xyz[:, 1] > 0)).mean() > 0.9


def test_the_mesh_is_what_the_distance_says() -> None:
    """Rays cast at the mesh stop where the exact distance is zero."""
    for _, scene in scenes("core", 6):
        mesh = scene.mesh()
        offsets = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 2))
        origins = np.concatenate([offsets, np.full((200, 1), 3.0)], axis=1)
        hits = RayScene(mesh).cast(origins, np.tile([0.0, 0.0, -1.0], (200, 1)))
        points = origins[hits.ray_M] - hits.distance_M[:, None] * np.array([0, 0, 1])
        assert len(points) > 5
        assert np.abs(scene.sdf_and_part(points)[0]).max() < 4e-3


# ---------------------------------------------------------------------------------------------- stored samples


def test_a_stored_sample_is_exact_to_rounding() -> None:
    settings = ProceduralSettings(count=8, n_views=0)
    for index, planned in enumerate(plan(settings)):
        rng = np.random.Generator(np.random.Philox(key=[settings.seed, index]))
        _, members = make_sample(settings, index, planned)
        surface, field = decode_surface(members["surface.npz"], ""), decode_field(members["field.npz"], "")
        captions(planned.spec, rng, settings.n_captions)  # the draws that come before the scene's
        scene = draw_scene(planned.spec, rng)
        assert np.abs(scene.sdf_and_part(surface["xyz"])[0]).max() < 1e-3
        exact = scene.sdf_and_part(field["xyz"])[0]
        assert np.abs(exact - field["sdf"]).max() < 1e-3
        near = np.abs(exact[: settings.n_near])
        assert np.median(near[::2]) < 0.03 and 0.03 < np.median(near[1::2]) < 0.12
        assert surface["xyz"].shape == (4096, 3) and field["xyz"].shape == (8192, 3)


def test_captions_swaps_and_meaning_are_stored(tmp_path: Path) -> None:
    generate(tmp_path / "raw", SMALL)
    for sample in RawDataset(tmp_path / "raw", parts=()):
        spec = SceneSpec.from_json(sample.meta["spec"])
        assert len(sample.captions) == 4
        assert {parse(caption) for caption in sample.captions} == {spec}
        assert all(parse(swap["caption"]) != spec for swap in sample.meta["swaps"])
        assert sample.meta["view_dependent"] == (spec.relation == "left of")
        assert sample.meta["licence"] == "CC0-1.0"


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("level", ["core", "full"])
def test_held_out_meanings_never_reach_training(level: str) -> None:
    settings = ProceduralSettings(level=level, count=3600)
    by_split: dict[str, list[SceneSpec]] = {split: [] for split in SPLITS[True]}
    for item in plan(settings):
        by_split[item.split].append(item.spec)
    assert {split: len(specs) for split, specs in by_split.items()} == {
        "train": 3168, "val": 72, "test_seen": 120, "test_combo": 120, "test_attr": 120
    }  # fmt: skip
    train = set(by_split["train"])
    reasons = {split: {held_out(level, spec) for spec in specs} for split, specs in by_split.items()}
    assert reasons == {
        "train": {None},
        "val": {None},
        "test_seen": {None},
        "test_combo": {"combo"},
        "test_attr": {"attr"},
    }
    assert set(by_split["test_seen"]) <= train
    for split in ("test_seen", "test_combo", "test_attr"):
        assert len(set(by_split[split])) == len(by_split[split]), "test meanings are distinct"
    # The parts of unseen combinations are all seen, and seen alone.
    seen_parts = {part.attribute for spec in train if spec.relation is None for part in spec.parts}
    assert {part.attribute for spec in by_split["test_combo"] for part in spec.parts} <= seen_parts
    shares = [
        sum(len(s.parts) == 1 for s in by_split[split]) / len(by_split[split]) for split in ("train", "test_seen")
    ]
    np.testing.assert_allclose(shares, 1 / 3 if level == "core" else 0.4, atol=0.01)


def test_what_is_held_out_does_not_depend_on_seed_or_count() -> None:
    def forbidden(seed: int, count: int) -> set[SceneSpec]:
        items = plan(ProceduralSettings(seed=seed, count=count))
        return {item.spec for item in items if item.split in ("test_combo", "test_attr")}

    train = {item.spec for seed in (0, 1) for item in plan(ProceduralSettings(seed=seed)) if item.split == "train"}
    assert not train & (forbidden(2, 3000) | forbidden(3, 500))


def test_without_holdout_everything_is_trained_on() -> None:
    items = plan(ProceduralSettings(count=3000, holdout=False))
    assert {item.split for item in items} == {"train", "val"}
    assert {held_out("core", item.spec) for item in items if item.split == "train"} == {None, "combo", "attr"}
    singles = {item.spec for item in items if item.split == "train" and item.spec.relation is None}
    assert singles == set(single_specs("core"))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 20])
def test_small_counts_add_up(count: int) -> None:
    items = plan(ProceduralSettings(count=count))
    assert len(items) == count and items[0].split == "train"


# ---------------------------------------------------------------------------------------------- files


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    one = generate(tmp_path / "one", SMALL, workers=1)
    two = generate(tmp_path / "two", SMALL, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert (one.shards, one.counts, two.counts["samples"]) == (3, two.counts, 12)
    ShardFolder(tmp_path / "two").verify()


def test_a_stopped_run_goes_on_and_keeps_finished_shards(tmp_path: Path) -> None:
    generate(tmp_path / "raw", SMALL)
    before = files(tmp_path / "raw")
    shard = tmp_path / "raw" / "shard-00001.tar"
    shard.write_bytes(b"cut")
    index_path(tmp_path / "raw" / "shard-00002.tar").unlink()
    (tmp_path / "raw" / "shard-00001.tar.partial-123").write_bytes(b"left by a killed run")
    kept = (tmp_path / "raw" / "shard-00000.tar").stat().st_mtime_ns
    report = generate(tmp_path / "raw", SMALL)
    assert report.shards_kept == 1 and files(tmp_path / "raw") == before
    assert (tmp_path / "raw" / "shard-00000.tar").stat().st_mtime_ns == kept


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists processes as Linux does")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shapeloom", "data", "procedural", "--count", "10000", "--workers", "2"]
    parent = subprocess.Popen([*command, "--out", str(tmp_path / "raw"), "shard_size=8"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((tmp_path / "raw").glob("shard-*")) and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    while any(map(lives, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, children))


def lives(pid: int) -> bool:
    """Whether it is there, and not only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_seed_gives_other_objects_and_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    generate(tmp_path / "raw", SMALL)
    other = SMALL.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="other settings .seed 0 there, 1 asked"):
        generate(tmp_path / "raw", other)
    generate(tmp_path / "other", other)
    assert not set(ShardFolder(tmp_path / "raw").uids) & set(ShardFolder(tmp_path / "other").uids)


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    views = SMALL.model_copy(update={"n_surface": 0, "n_near": 0, "n_uniform": 0, "count": 2})
    generate(tmp_path / "views", views)
    assert ShardFolder(tmp_path / "views").suffixes(0) == [
        "json", "view_00.webp", "view_01.webp", "lit_00.webp", "lit_01.webp", "depth.npz", "cameras.json"
    ]  # fmt: skip
    with pytest.raises(UserError, match="has no field"):
        RawDataset(tmp_path / "views", parts=("field",))
    points = SMALL.model_copy(update={"n_views": 0, "count": 2})
    generate(tmp_path / "points", points)
    assert ShardFolder(tmp_path / "points").suffixes(0) == ["json", "surface.npz", "field.npz"]
