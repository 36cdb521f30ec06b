"""R-precision from folder to results.json: known scores, controls, failures, resume, ranks, a pipeline's objects."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from shapeloom.errors import UserError
from shapeloom.eval.benchmark import make, r_precision
from shapeloom.eval.benchmark.r_precision import run
from shapeloom.eval.benchmark.schema import read_results

COLOURS = {
    "red": (230, 20, 20), "green": (20, 200, 20), "blue": (30, 40, 230), "yellow": (240, 230, 20),
    "orange": (250, 130, 10), "purple": (150, 20, 200), "cyan": (20, 220, 220), "gray": (128, 128, 128),
}  # fmt: skip
SWAPPED = "a blue ball left of a red cube"
SETTINGS = {"evaluators": ["tiny-colours"], "protocol": "reference-v1"}


def box(path, colour, extents=(1, 1, 1)):
    shape = trimesh.creation.box(extents)
    shape.visual.face_colors = [*COLOURS[colour], 255]
    path.parent.mkdir(parents=True, exist_ok=True)
    shape.export(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A true object for each colour, prompts that name them, and a perfect system of two seeds."""
    folder = tmp_path_factory.mktemp("world")
    lines = []
    for colour in COLOURS:
        box(folder / "true" / f"{colour}.glb", colour)
        for seed in range(2):
            box(folder / "perfect" / colour / f"{seed}.glb", colour, (1, 0.8 + 0.1 * seed, 1))
        group = ["warm" if colour in ("red", "yellow", "orange") else "cold"]
        reference = f"true/{colour}.glb"
        lines.append({"id": colour, "text": f"a {colour} box", "group": group, "reference": reference})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def score(world, out, generated="perfect", **more):
    return run(world / "prompts.jsonl", out, generated=world / generated, **{**SETTINGS, **more})


def rows(out):
    return list(csv.DictReader((out / "per_prompt.csv").read_text().splitlines()))


def r_at_1(results, row="generated", gallery="prompts", group="all"):
    return results.score(row, gallery, group)["r@1"].mean


@pytest.fixture(scope="module")
def perfect(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("perfect")
    return out, score(world, out)


def test_a_perfect_system_and_its_controls(world, perfect):
    out, results = perfect
    assert r_at_1(results) == r_at_1(results, "true renders") == 1.0
    assert results.score("generated", "prompts")["margin"].mean > 0.1
    assert r_at_1(results, "shuffled prompts") == 0.0
    assert r_at_1(results, "chance") == 1 / 8
    assert r_at_1(results, "blank object") == r_at_1(results, "grey sphere") == 1 / 8  # one caption is nearest for all
    assert r_at_1(results, group="warm") == 1.0 and results.score("generated", "prompts", "warm")["r@1"].prompts == 3
    headline = results.headline
    assert (headline.r_at_1.mean, headline.r_at_1.hi, headline.gallery) == (1.0, 1.0, "prompts")
    assert headline.r_at_1.lo == pytest.approx(0.676, abs=1e-3)  # Wilson at 8 of 8
    assert results.protocol["hash"] and results.galleries[0].hash and results.evaluators[0].hash
    assert results.evaluators[0].independence == "unknown" and not results.failures and not results.partial
    assert results.ranks[0].counts[0] == 16 and sum(results.ranks[0].counts) == 16
    assert results.azimuth[0].r_at_1 == [1.0] * 4


def test_what_is_written_can_be_read_back(world, perfect):
    out, results = perfect
    assert read_results(out) == results
    lines = rows(out)
    assert len(lines) == 16 and {line["rank"] for line in lines} == {"1"}
    assert lines[0]["nearest"] == lines[0]["text"] == "a red box" and lines[0]["groups"] == "warm"
    thumbnails = np.load(out / "thumbnails.npz")
    assert set(thumbnails) == {f"generated/{c}/{s}" for c in COLOURS for s in range(2)} | {
        f"true renders/{c}/0" for c in COLOURS
    }
    assert thumbnails["generated/red/0"].tobytes().startswith(b"RIFF")
    assert (out / "report.html").stat().st_size > 10_000
    assert Image.open(out / "contact_sheet.png").width > 200


def test_failures_are_misses_with_a_list_of_their_own(world, tmp_path):
    folder = tmp_path / "broken"
    for colour in COLOURS:
        for seed in range(2):
            box(folder / colour / f"{seed}.glb", colour)
    (folder / "red/0.glb").unlink()
    (folder / "green/1.glb").write_bytes((folder / "green/1.glb").read_bytes()[:200])
    (folder / "blue/0.glb").unlink()
    (folder / "blue/0.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    results = score(world, tmp_path / "out", folder)
    found = {(miss.id, miss.seed): miss.kind for miss in results.failures}
    assert found == {("red", 0): "missing", ("green", 1): "unreadable", ("blue", 0): "not finite"}
    assert r_at_1(results) == 13 / 16
    assert results.ranks[0].counts[-1] == 3
    lines = {(line["id"], line["seed"]): line for line in rows(tmp_path / "out")}
    assert lines["red", "0"]["failure"] == "missing" and lines["red", "0"]["r@1"] == "0"
    assert lines["red", "0"]["cosine"] == lines["red", "0"]["rank"] == ""
    assert results.inputs["duplicates"]  # seeds with the same bytes


def test_fewer_prompts_are_partial_and_the_gallery_stays_whole(world, tmp_path):
    results = score(world, tmp_path, limit=4)
    assert results.partial and results.prompts["count"] == 4 and results.galleries[0].size == 8
    assert results.score("generated", "prompts", "warm")["r@1"].prompts == 2  # in turn from both groups


def test_a_second_run_renders_and_embeds_nothing(world, perfect, tmp_path, monkeypatch):
    out, results = perfect
    monkeypatch.setattr("shapeloom.eval.benchmark.renders.isolated_map", lambda *a, **k: pytest.fail("rendered again"))
    monkeypatch.setattr(r_precision, "open_evaluator", lambda *a, **k: pytest.fail("opened again"))
    again = score(world, tmp_path, cache_folder=out / "cache")
    assert same(again) == same(results)


def same(results):
    return {name: value for name, value in results.to_json().items() if name not in ("date", "timings_s")}


def command(world, out, *more):
    words = ["eval", "r-precision", "--generated", world / "perfect", "--prompts", world / "prompts.jsonl"]
    words += ["--evaluator", "tiny-colours", "--protocol", "reference-v1", "--out", out, "--workers", "1", *more]
    return list(map(str, words))


def test_two_ranks_give_what_one_gives(world, perfect, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*words, "-m", "shapeloom", *command(world, tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(read_results(tmp_path)) == same(perfect[1])


def test_shards_started_by_hand_fill_the_cache_for_a_last_run(world, perfect, tmp_path, monkeypatch):
    for shard in ("0/2", "1/2"):
        assert score(world, tmp_path, shard=shard) is None
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr("shapeloom.eval.benchmark.renders.isolated_map", lambda *a, **k: pytest.fail("rendered again"))
    assert same(score(world, tmp_path)) == same(perfect[1])


def test_a_killed_run_goes_on_where_it_was(world, perfect, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "shapeloom", *command(world, tmp_path)], start_new_session=True)
    records = tmp_path / "cache" / "renders"
    deadline = time.monotonic() + 120
    while len(list(records.glob("*/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in records.glob("*/*.json")}
    assert 5 <= len(kept) < 26
    assert same(score(world, tmp_path)) == same(perfect[1])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_evaluator_that_conditioned_the_system_makes_no_headline(world, tmp_path):
    results = score(world, tmp_path, conditioned_by=["tiny-colours"])
    assert results.evaluators[0].independence == "same weights"
    assert results.headline.r_at_1 is None and "would grade its own pupil" in results.headline.reason
    assert r_at_1(results) == 1.0  # told, not quoted


def test_every_clip_that_had_a_part_counts(world, tmp_path):
    named = ["ViT-L-14-quickgelu/openai", "tiny-colours", "ViT-B-32/laion2b_s34b_b79k"]  # names need no weights here
    assert score(world, tmp_path, conditioned_by=named).evaluators[0].independence == "same weights"
    results = score(world, tmp_path, conditioned_by=named[:1])
    assert results.evaluators[0].independence == "independent" and results.headline.r_at_1 is not None
    with pytest.raises(UserError, match="ViT-L-14x/openai"):
        score(world, tmp_path, conditioned_by=["ViT-L-14x/openai"])


def prompts_of(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_prompt_and_no_object_at_all_are_scored(world, tmp_path):
    one = prompts_of(
        tmp_path,
        {"id": "red", "text": "a red box left of a blue ball"},
    )
    results = run(one, tmp_path / "a", generated=world / "perfect", **SETTINGS)
    assert results.prompts["count"] == 1 and results.variance == []
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "red.glb").write_bytes(b"glTF")
    results = run(one, tmp_path / "b", generated=tmp_path / "broken", **SETTINGS)
    assert r_at_1(results) == 0.0 and [miss.kind for miss in results.failures] == ["unreadable"]
    assert {row.accuracy.mean for row in results.two_way} == {0.0}


def test_no_headline_where_every_caption_says_the_same(world, tmp_path):
    same = prompts_of(tmp_path, {"id": "red", "text": "a box"}, {"id": "blue", "text": "A box."})
    results = run(same, tmp_path / "out", generated=world / "perfect", **SETTINGS)
    assert results.headline.r_at_1 is None and "nothing can be told apart" in results.headline.reason


def test_captions_that_are_not_the_protocols_are_told_beside_the_number(world, tmp_path):
    results = score(world, tmp_path, protocol="dreamfields-45")
    assert "not those of dreamfields-45" in results.headline.reason and results.galleries[0].of_protocol is False
    assert "dry runs" in results.headline.reason


def test_the_bundled_judge_makes_no_headline_of_objects_it_does_not_know(world, perfect, tmp_path):
    out, _ = perfect
    results = score(world, tmp_path, evaluators=["judge", "tiny-colours"], cache_folder=out / "cache")
    assert (
        results.headline.evaluator == "judge" and "knows the procedural reference set alone" in results.headline.reason
    )


def test_a_broken_reference_is_told(world, tmp_path):
    (tmp_path / "cut.glb").write_bytes(b"glTF")
    lines = [{"id": name, "text": f"a {name} box", "reference": path}
             for name, path in (("red", f"{world}/true/red.glb"), ("blue", "cut.glb"))]  # fmt: skip
    results = run(prompts_of(tmp_path, *lines), tmp_path / "out", generated=world / "perfect", **SETTINGS)
    assert r_at_1(results, "true renders") == 0.5 and not results.failures
    assert any("1 of the true renders failed" in note and "blue: " in note for note in results.notes)


def test_a_shading_that_some_objects_lack_is_left_out(world, tmp_path):
    protocol = tmp_path / "two.yaml"
    protocol.write_text(
        "{name: two, about: x, source: x, cameras: {azimuths_deg: [0], elevation_deg: 20, distance: 4, fov_deg: 40}, "
        "resolution: 64, shadings: [colour, textureless], gallery: {kind: prompts}, aggregation: view mean}"
    )
    folder = tmp_path / "mixed"
    box(folder / "red.glb", "red")
    (folder / "blue").mkdir()
    Image.new("RGB", (64, 64), COLOURS["blue"]).save(folder / "blue" / "rgb_0.png")
    two = prompts_of(tmp_path, {"id": "red", "text": "a red box"}, {"id": "blue", "text": "a blue box"})
    results = run(two, tmp_path / "out", generated=folder, **{**SETTINGS, "protocol": protocol})
    assert {score.shading for score in results.scores} == {"colour"}
    assert any("no textureless score" in note for note in results.notes) and not results.failures
    only = run(two, tmp_path / "out2", generated=world / "perfect", **{**SETTINGS, "protocol": protocol})
    assert {score.shading for score in only.scores} == {"colour", "textureless"}


def test_names_of_groups_are_no_markup(world, tmp_path, capsys):
    odd = prompts_of(
        tmp_path, {"id": "red", "text": "a red box", "group": "odd [/b] [red]"}, {"id": "blue", "text": "b"}
    )
    run(odd, tmp_path / "out", generated=world / "perfect", **SETTINGS)
    assert "[red]" in capsys.readouterr().out


def test_left_and_right_are_judged_from_the_front(tmp_path):
    """Seen from behind, "b left of a" is true of "a left of b": views there must not count against it."""
    from shapeloom.eval.benchmark.prompts import galleries, read_prompts
    from shapeloom.eval.benchmark.scoring import Objects, from_the_front, retrieve

    text = "a red cube left of a blue ball"
    lines = [{"id": "a", "text": text, "swaps": [{"kind": "order", "text": SWAPPED}]}, {"id": "b", "text": "a dog"}]
    prompts = read_prompts(prompts_of(tmp_path, *lines)).prompts
    assert [from_the_front(prompt) for prompt in prompts] == [True, False]
    hard = galleries(prompts)[-1]
    vectors_ND = np.eye(len(hard.captions), dtype=np.float32)
    front, back = (vectors_ND[hard.captions.index(caption)] for caption in (text, SWAPPED))
    azimuths = (0.0, 30.0, 180.0, 210.0)
    views_VD = np.stack([front, front, back, back])
    objects = Objects("generated", np.stack([views_VD, np.stack([vectors_ND[1]] * 4)])[:, None],
                      np.zeros((2, 1), bool), np.ones(2, bool), azimuths)  # fmt: skip
    hits_PN = hard.hits(prompts)
    frontal_P = np.array([True, False])
    for aggregation in ("view mean", "mean embedding", "best view", "any view"):
        found = retrieve(objects, vectors_ND, hits_PN, aggregation, frontal_P)
        assert found.scores_PSM[:, 0, 0].tolist() == [1.0, 1.0], aggregation
    assert found.right_PSV[0, 0].tolist() == [1, 1, 0, 0] and found.nearest_PSV[0, 0, 2:].tolist() == [-1, -1]
    assert retrieve(objects, vectors_ND, hits_PN, "view mean").scores_PSM[0, 0, 0] == 0.5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"evaluators": []}, "give at least one --evaluator"),
        ({"evaluators": ["tiny-colours"] * 2}, "each once"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "each once"),
        ({"pipeline": "x"}, "give either --generated"),
        ({"generated": None}, "give either --generated"),
        ({"generated": None, "pipeline": "x", "shard": "0/2"}, "--shard takes objects that are there"),
        ({"protocol": "none"}, "there is no protocol 'none'"),
        ({"evaluators": ["/nowhere/at-all"]}, "/nowhere/at-all"),
    ],
)
def test_wrong_settings_are_one_sentence(world, tmp_path, more, says):
    with pytest.raises(UserError) as caught:
        run(world / "prompts.jsonl", tmp_path, **{"generated": world / "perfect", **SETTINGS, **more})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_says_what_is_wrong_without_a_traceback(world, tmp_path, call):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "prompt": "x"}\n')
    done = call("eval", "r-precision", "--generated", world / "perfect", "--prompts", tmp_path / "bad.jsonl",
               "--evaluator", "tiny-colours", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1 and "unknown key 'prompt'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_validate_finds_what_is_missing_broken_doubled_and_too_long(world, tmp_path, call):
    def validate(*words):
        return call("eval", "validate", "--workers", 1, *words)

    folder = tmp_path / "objects"
    for colour in ("red", "green", "blue"):
        box(folder / f"{colour}.glb", "red")
    box(folder / "maroon.glb", "red")
    (folder / "yellow.glb").write_bytes(b"glTF")
    prompts = (world / "prompts.jsonl").read_text().replace(f'"{world}', '"').replace("true/", f"{world}/true/")
    prompts += json.dumps({"id": "long", "text": "a very " * 80 + "long caption"}) + "\n"
    (tmp_path / "p.jsonl").write_text(prompts)
    done = validate("--generated", folder, "--prompts", tmp_path / "p.jsonl")
    assert done.returncode == 1, done.stderr
    for part in (
        "9 prompts", "5 missing", "1 empty or broken", "yellow/0: it ends", "red/0, green/0, blue/0",
        "1 objects without a prompt", "maroon", "1 captions longer than the 77 tokens", "long (164 tokens)",
    ):  # fmt: skip
        assert part in done.stdout, (part, done.stdout)
    (tmp_path / "train.txt").write_text("A red box.\nblue, a box\na sofa\n")
    done = validate("--prompts", world / "prompts.jsonl", "--trained-on", tmp_path / "train.txt")
    assert done.returncode == 0, done.stderr
    assert "3 captions in" in done.stdout and "1 prompts are among them" in done.stdout, done.stdout
    assert "1 prompts whose words were trained on in some order" in done.stdout and "blue: a blue box" in done.stdout
    fine = validate("--generated", world / "perfect", "--prompts", world / "prompts.jsonl")
    assert fine.returncode == 0 and "16 of 16 objects" in fine.stdout and "all is well" in fine.stdout


# --- a pipeline's objects ---------------------------------------------------------------------------------------------


class FakeAutoencoder:
    """A latent is a number; decoded, it is a box of that colour (or nothing, at -1)."""

    device = torch.device("cpu")
    encoder = None


class FakePipeline:
    """Makes boxes of the colour that a caption names, wrong or nothing where `wrong` says so."""

    def __init__(self, wrong=()):
        self.autoencoder, self.wrong, self.calls = FakeAutoencoder(), dict(wrong), 0
        self.autoencoder.decode = lambda z_BLC: z_BLC

    def generate_latents(self, text, image, seeds, *, images, **settings):
        self.calls += len(seeds)
        names = [caption.split()[1] for caption in text]
        places = [self.wrong.get(name, list(COLOURS).index(name)) for name in names]
        return torch.tensor(places, dtype=torch.float32)[:, None, None]


def boxes(z_BLC, resolution):
    from shapeloom.models.mesh import ExtractedMesh

    shape = trimesh.creation.box()
    corners, faces = np.asarray(shape.vertices, np.float32), np.asarray(shape.faces, np.int32)
    made = []
    for place in z_BLC[:, 0, 0].tolist():
        rgb = np.tile(np.array(COLOURS[list(COLOURS)[int(place)]], np.float32) / 255, (8, 1))
        made.append(ExtractedMesh(corners[:0], faces[:0], rgb[:0]) if place < 0 else ExtractedMesh(corners, faces, rgb))
    return made


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A pipeline folder whose loading gives a fake."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    monkeypatch.setattr(make, "extract_mesh", boxes)
    monkeypatch.setattr(r_precision, "describe_conditioner", lambda *a, **k: None)

    def use(pipe):
        monkeypatch.setattr(make, "open_pipeline", lambda pipeline, device: pipe)
        return folder

    return use


def test_a_pipelines_objects_go_the_same_way_as_any_others(world, tmp_path, fake):
    pipe = FakePipeline({"red": 1, "blue": -1})
    folder, out = fake(pipe), tmp_path / "out"
    results = run(world / "prompts.jsonl", out, pipeline=folder, seeds=[0, 5], **SETTINGS)
    assert r_at_1(results) == 6 / 8 and results.inputs["seeds"] == [0, 5] and pipe.calls == 16
    assert [(miss.id, miss.kind) for miss in results.failures] == [("blue", "empty")] * 2
    assert results.inputs["kind"] == "pipeline" and results.inputs["sampling"]["steps"] == 24
    assert len(list(out.glob("generated/*/*/*.glb"))) == 16
    again = run(world / "prompts.jsonl", out, pipeline=folder, seeds=[0, 5], **SETTINGS)
    assert same(again) == same(results) and pipe.calls == 16  # nothing was made again
    folder_scored = run(world / "prompts.jsonl", tmp_path / "by-folder",
                        generated=next(out.glob("generated/*")), **SETTINGS)  # fmt: skip
    assert r_at_1(folder_scored) == r_at_1(results)


def test_other_settings_make_other_objects(world, tmp_path, fake):
    pipe = FakePipeline()
    folder = fake(pipe)
    for steps in (24, 12):
        run(world / "prompts.jsonl", tmp_path / "out", pipeline=folder, sampling=make.Sampling(steps=steps), **SETTINGS)
    assert pipe.calls == 16


def test_making_from_pictures_needs_pictures(world, tmp_path, fake):
    folder = fake(FakePipeline())
    sampling = make.Sampling(condition="image")
    with pytest.raises(UserError, match="needs a picture for every prompt; 'red' has none"):
        run(world / "prompts.jsonl", tmp_path / "out", pipeline=folder, sampling=sampling, **SETTINGS)
    with pytest.raises(UserError, match="is not a pipeline folder"):
        run(world / "prompts.jsonl", tmp_path / "out", pipeline=tmp_path, **SETTINGS)


def test_every_field_of_the_results_is_documented(repo_root, perfect):
    text = (repo_root / "docs" / "evaluation.md").read_text()
    record = perfect[1].to_json()
    names = set(record) | {key for name in ("headline", "prompts", "inputs") for key in record[name]}
    names |= {key for name in ("galleries", "evaluators", "scores", "ranks", "variance") for key in record[name][0]}
    missing = [name for name in sorted(names - {"up", "extra_count"}) if f"`{name}`" not in text]
    assert not missing
