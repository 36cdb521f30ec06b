"""R-precision end to end with fakes of known score: a perfect pipeline, a shuffled one, one that makes nothing."""

from __future__ import annotations

import csv
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shapeloom.data_pipes import grammar
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.render import render
from shapeloom.data_pipes.shards import ShardFolder
from shapeloom.errors import UserError
from shapeloom.eval import objects, r_precision, stored
from shapeloom.eval.prompts import choose, groups, pools, prompt_of
from shapeloom.eval.renders import FRONTAL, render_meshes
from shapeloom.eval.report import ReportInput, read_figures, write_report
from shapeloom.eval.scoring import find
from shapeloom.eval.stored import exact_mesh
from shapeloom.models.cameras import Cameras

WIDTH = 64


def vector(meaning: str) -> np.ndarray:
    """A fixed random unit vector for each meaning."""
    seed = int.from_bytes(hashlib.sha256(meaning.encode()).digest()[:8], "big")
    x = np.random.default_rng(seed).normal(size=WIDTH)
    return (x / np.linalg.norm(x)).astype(np.float32)


def meaning(caption: str) -> str:
    return grammar.canonical_caption(grammar.parse(caption))


class FakeJudge(torch.nn.Module):
    """Knows every picture it was shown by its bytes; all it was not shown look alike."""

    image_size = 32
    weights_hash = "judge"
    config = SimpleNamespace(name="fake")

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, str] = {}

    def learn(self, pictures, what: str) -> None:
        self.known |= {picture.tobytes(): what for picture in pictures}

    def encode_text(self, texts):
        return SimpleNamespace(pooled=torch.from_numpy(np.stack([vector(meaning(text)) for text in texts])))

    def encode_image(self, images):
        rows = [vector(self.known.get(np.asarray(image).tobytes(), "unknown")) for image in images]
        return SimpleNamespace(pooled=torch.from_numpy(np.stack(rows)))


class FakeAutoencoder(torch.nn.Module):
    """A latent is the number of a mesh; what it encodes comes out again."""

    def __init__(self, meshes, surfaces) -> None:
        super().__init__()
        self.device, self.meshes, self.surfaces = torch.device("cpu"), meshes, surfaces
        self.config, self.encoder = SimpleNamespace(n_centres=0, patch_size=0), torch.nn.Identity()

    def encode(self, surface_BN9, views):
        assert views is None
        keys = [row[0, :3].numpy().round(4).tobytes() for row in surface_BN9]
        return torch.tensor([[[float(self.surfaces[key])]] for key in keys])

    def decode(self, z_BLC):
        return [self.meshes[int(z)] if z >= 0 else None for z in z_BLC[:, 0, 0]]


class FakePipeline:
    """Makes the object that `plan` names for a caption's meaning (None: nothing at all), whatever the seed."""

    def __init__(self, autoencoder, plan, pictures=None) -> None:
        self.autoencoder, self.plan, self.pictures, self.calls = autoencoder, plan, pictures or {}, 0
        self.denoiser = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.denoiser.weight), torch.nn.init.zeros_(self.denoiser.bias)
        self.conditioner = SimpleNamespace(weights_hash="conditioner")

    def generate_latents(self, text, image, seeds, *, images, **settings):
        self.calls += len(seeds)
        wanted = [meaning(t) for t in text] if text else [self.pictures[np.asarray(i).tobytes()] for (i,) in images]
        places = [self.plan.get(what) for what in wanted]
        return torch.tensor([[[-1.0 if place is None else float(place)]] for place in places])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small procedural set, its prompts, and fakes that know it."""
    folder = tmp_path_factory.mktemp("eval") / "raw"
    settings = ProceduralSettings(
        count=200, n_surface=64, n_near=32, n_uniform=32, n_views=4, image_size=32, shard_size=64
    )
    generate(folder, settings)
    shards = ShardFolder(folder)
    tests = [i for i in range(len(shards)) if shards.splits(i).startswith("test")]
    prompts = [prompt_of(shards.uids[i], i, shards.splits(i), shards.read_json(i)) for i in tests]
    meshes = [exact_mesh(shards, p.uid, p.meta) for p in prompts]
    judge, surfaces, pictures = FakeJudge(), {}, {}
    for place, (prompt, views) in enumerate(zip(prompts, render_meshes(meshes, size=32))):
        judge.learn(views, prompt.meaning)
        view = stored.frontal_pictures(shards, prompt.index, first_only=True)[0]
        judge.learn([view], prompt.meaning)
        pictures[view.tobytes()] = prompt.meaning
        surfaces[stored.surface_rows(shards, prompt.index)[0, :3].round(4).tobytes()] = place
    return SimpleNamespace(
        folder=folder, shards=shards, prompts=prompts, judge=judge,
        autoencoder=FakeAutoencoder(meshes, surfaces), pictures=pictures,
        plan={prompt.meaning: place for place, prompt in enumerate(prompts)},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def meshes_pass_through(monkeypatch):
    """The fake decoder already gives meshes."""
    monkeypatch.setattr(objects, "extract_mesh", lambda meshes, resolution: meshes)


def score(world, plan, out, **more):
    pipe = FakePipeline(world.autoencoder, plan, world.pictures)
    record = r_precision.run(pipe, world.folder, world.judge, out, **{"image_prompts": 10, **more})
    return record, pipe


def r_at_1(record, row, pool="hard", group="all"):
    return find(record["rows"], row, pool, group, "r@1")["mean"]


def test_the_exact_mesh_gives_the_stored_pictures_again(world):
    prompt = world.prompts[3]
    cameras = Cameras.from_json(json.loads(world.shards.read(prompt.index, ["cameras.json"])["cameras.json"]))
    from shapeloom.data_pipes.raw_sample import decode_webp

    kept = decode_webp(world.shards.read(prompt.index, ["lit_00.webp"])["lit_00.webp"], "view")
    again = render(exact_mesh(world.shards, prompt.uid, prompt.meta), cameras).lit[0]
    assert np.abs(kept.astype(int) - again).max() <= 1


def test_a_perfect_pipeline_scores_what_the_truth_scores(world, tmp_path):
    record, _ = score(world, world.plan, tmp_path)
    for row in ("generated", "true renders", "reconstructions"):
        for pool in ("random", "hard"):
            assert r_at_1(record, row, pool) == 1.0
        assert find(record["two_way"], row, "order", "all", "accuracy")["mean"] == 1.0
        assert find(record["two_way"], row, "binding", "pairs", "accuracy")["mean"] == 1.0
    assert r_at_1(record, "shuffled prompts") < 0.1
    assert r_at_1(record, "chance") == pytest.approx(1 / record["counts"]["pools"]["hard"])
    assert record["counts"]["pools"]["hard"] > record["counts"]["pools"]["random"]
    assert [row["r@1"]["mean"] for row in record["image"] if row["row"] != "shuffled prompts"][:2] == [1.0, 1.0]
    assert record["hashes"]["judge"] == "judge" and record["hashes"]["protocol"] == FRONTAL.hash
    assert record == json.loads((tmp_path / "results.json").read_text())
    lines = list(csv.DictReader((tmp_path / "per_prompt.csv").read_text().splitlines()))
    assert len(lines) == len(world.prompts) and {line["rank_hard"] for line in lines} == {"1"}
    assert (tmp_path / "contact_sheet.png").stat().st_size < 500_000


def test_a_shuffled_pipeline_scores_chance(world, tmp_path):
    places = list(world.plan.values())
    record, _ = score(world, dict(zip(world.plan, places[1:] + places[:1])), tmp_path, image_prompts=0)
    assert r_at_1(record, "generated") == 0.0 and r_at_1(record, "true renders") == 1.0
    assert record["image"] == []


def test_objects_without_a_surface_are_misses_and_are_counted(world, tmp_path):
    missing = [prompt.meaning for prompt in world.prompts if prompt.parts == 2]
    record, _ = score(world, {**world.plan, **dict.fromkeys(missing)}, tmp_path, image_prompts=0)
    assert r_at_1(record, "generated", group="pairs") == 0.0
    assert r_at_1(record, "generated", group="single objects") == 1.0
    assert find(record["two_way"], "generated", "any", "all", "accuracy")["mean"] == 0.0
    assert record["counts"]["empty"] == sum(prompt.parts == 2 for prompt in world.prompts)


def test_a_restart_generates_nothing_again_and_gives_the_same(world, tmp_path):
    first, pipe = score(world, world.plan, tmp_path)
    assert pipe.calls == len(world.prompts) + 10
    again, pipe = score(world, world.plan, tmp_path)
    assert pipe.calls == 0
    assert {**again, "timings_s": 0} == {**first, "timings_s": 0}
    _, pipe = score(world, world.plan, tmp_path, steps=12)  # other settings are another run
    assert pipe.calls == len(world.prompts) + 10


def test_a_stopped_run_goes_on_where_it_was(world, tmp_path):
    class Stops(FakePipeline):
        def generate_latents(self, *args, **settings):
            if self.calls:
                raise KeyboardInterrupt
            return super().generate_latents(*args, **settings)

    r_precision_save, r_precision.SAVE_EVERY_S = r_precision.SAVE_EVERY_S, 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            pipe = Stops(world.autoencoder, world.plan)
            r_precision.run(pipe, world.folder, world.judge, tmp_path, image_prompts=0, seeds=(0, 1, 2, 3))
    finally:
        r_precision.SAVE_EVERY_S = r_precision_save
    record, second = score(world, world.plan, tmp_path, image_prompts=0, seeds=(0, 1, 2, 3))
    assert pipe.calls > 0 and pipe.calls + second.calls == 4 * len(world.prompts)
    assert r_at_1(record, "generated") == 1.0


def test_damaged_leftovers_are_made_again(world, tmp_path):
    score(world, world.plan, tmp_path, image_prompts=0)
    for path in [tmp_path / "latents.npz", *(tmp_path / "cache").iterdir()]:
        path.write_bytes(path.read_bytes()[:100])
    record, _ = score(world, world.plan, tmp_path, image_prompts=0)
    assert r_at_1(record, "generated") == 1.0


def test_the_judge_must_not_be_the_conditioner(world, tmp_path):
    pipe = FakePipeline(world.autoencoder, world.plan)
    pipe.conditioner = world.judge
    with pytest.raises(UserError, match="same weights"):
        r_precision.run(pipe, world.folder, world.judge, tmp_path)


def test_bad_settings_are_refused(world, tmp_path):
    pipe = FakePipeline(world.autoencoder, world.plan)
    for settings in ({"seeds": ()}, {"seeds": (1, 1)}, {"prompts": 0}):
        with pytest.raises(UserError):
            r_precision.run(pipe, world.folder, world.judge, tmp_path, **settings)
    generate(
        tmp_path / "raw", ProceduralSettings(count=6, holdout=False, n_views=0, n_surface=0, n_near=0, n_uniform=0)
    )
    with pytest.raises(UserError, match="test split"):
        r_precision.run(pipe, tmp_path / "raw", world.judge, tmp_path / "out")


def test_fewer_prompts_are_taken_from_all_splits_and_the_pools_stay_whole(world, tmp_path):
    some = choose(world.prompts, 6)
    assert {prompt.split for prompt in some} == {"test_seen", "test_combo", "test_attr"} and len(some) == 6
    assert choose(world.prompts, None) == world.prompts
    record, _ = score(world, world.plan, tmp_path, prompts=6, image_prompts=0)
    assert record["counts"]["prompts"] == 6
    assert record["counts"]["pools"]["random"] == len({prompt.meaning for prompt in world.prompts})


def test_equal_meanings_stand_in_a_pool_once():
    spec = grammar.parse("a red cube left of a blue ball")
    meta = {"captions": ["a blue sphere right of a red block"], "spec": spec.to_json(), "swaps": grammar.swaps(spec)}
    same = {**meta, "captions": ["a red cube left of a blue ball"]}
    prompts = [prompt_of("a", 0, "test", meta), prompt_of("b", 1, "test", same)]
    random, hard = pools(prompts)
    assert len(random.captions) == 1 and random.hits(prompts).tolist() == [[True], [True]]
    assert len(set(hard.meanings)) == len(hard.meanings) == 4  # truth, parts (= relation), colours, shapes exchanged
    assert groups(prompts)["pairs"].all()


def test_captions_without_a_grammar_mean_themselves():
    prompt = prompt_of("a", 0, "test", {"captions": ["a worn leather boot"]})
    assert prompt.meaning == "a worn leather boot" and prompt.parts is None and prompt.swaps == ()
    assert [pool.name for pool in pools([prompt])] == ["random"]
    with pytest.raises(UserError, match="no caption"):
        prompt_of("a", 0, "test", {"captions": []})


def test_the_report_is_one_file_and_reads_the_figures(world, tmp_path):
    score(world, world.plan, tmp_path / "r")
    log = tmp_path / "log.jsonl"
    lines = [{"step": i, "time": i / 2, "loss": 1 / i} for i in range(1, 99)] + [
        {"step": 99, "time": 50, "eval/iou": 0.5}
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 100, "ti')
    report = ReportInput(
        title="a <b> & c", r_precision=tmp_path / "r", reconstruction=tmp_path / "absent", logs={"autoencoder": log},
        timings={"data": 5.0}, commands=["bash launch/quickstart.sh"], meshes=[tmp_path / "a b.glb"],
    )  # fmt: skip
    html = write_report(report, tmp_path / "report.html").read_text()
    assert "a &lt;b&gt; &amp; c" in html and 'href="a%20b.glb"' in html and "autoencoder: loss" in html
    for outside in ("http://", "https://", "<script", "<link", 'src="/'):
        assert outside not in html.replace("http://www.w3.org/", "")
    figures = read_figures(report)
    assert figures["r@1/hard/generated/all"][1] == 1.0 and figures["empty_share"][1] == 0.0
    assert figures["iou"][1] is None and "not measured" in html
    bare = write_report(ReportInput(title="nothing yet"), tmp_path / "bare.html").read_text()
    assert "nothing yet" in bare


def test_data_without_a_specification_falls_back_to_stored_views(world, tmp_path, monkeypatch):
    def plain(uid, index, split, meta):
        return prompt_of(uid, index, "test", {"captions": meta["captions"][:1]})

    for prompt in world.prompts:  # the judge must know the stored views, too
        world.judge.learn(stored.frontal_pictures(world.shards, prompt.index), prompt.meaning)
    monkeypatch.setattr(r_precision, "prompt_of", plain)
    record, _ = score(world, world.plan, tmp_path)
    assert list(record["counts"]["pools"]) == ["random"] and record["two_way"] == []
    assert r_at_1(record, "true renders", "random") == r_at_1(record, "generated", "random") == 1.0
    assert "stored frontal views" in record["notes"][0]
    assert {row["group"] for row in record["rows"]} == {"all"}
