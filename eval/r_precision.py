"""CLIP R-precision of a pipeline, with the rows that say what the number means.

The generated objects are rendered by the data's renderer from frontal cameras and embedded by a judge, a CLIP that is
not the conditioning one. An object scores if its caption is the nearest of the pool. Beside it stand: true renders (the
judge's own ceiling), reconstructions (the autoencoder's), shuffled prompts and chance.

Shapes: P prompts, S seeds, K = P * S objects in prompt order, L latents of C channels, D embedding width, N pool.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data_pipes.raw_sample import decode_npz, encode_npz
from ..data_pipes.shards import ShardFolder
from ..errors import UserError
from ..files import sha256_json, write_atomic
from ..models.conditioner import Conditioner
from ..models.hashing import weights_hash
from ..models.pipeline import ShapeloomPipeline
from ..progress import Bar
from .generate import Request, generate
from .objects import (
    Cache,
    Clock,
    Embedded,
    Judge,
    decode_meshes,
    embed_meshes,
    embed_pictures,
    encode_surfaces,
)
from .prompts import TEST_SPLITS, Prompt, choose, groups, pools, prompt_of
from .renders import FRONTAL, render_pool
from .results import RESULTS_FORMAT, environment, write_results
from .scoring import METRICS, Objects, Row, retrieval_rows, retrieval_values, shuffled, two_way_rows
from .statistics import Interval, chance_scores, cluster_bootstrap
from .stored import exact_mesh, frontal_pictures

__all__ = ["run"]

SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class _Run:
    """What every step of one run needs."""

    pipe: ShapeloomPipeline
    folder: ShardFolder
    judge: Judge
    cache: Cache
    out: Path
    pool: Executor | None
    clock: Clock
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    resolution: int
    hashes: dict[str, str]

    def key(self, *names: str, **more: Any) -> dict[str, Any]:
        """What cached arrays depend on: the named hashes, and more."""
        return {**{name: self.hashes[name] for name in names}, **more}


def run(
    pipeline: str | Path | ShapeloomPipeline,
    data: str | Path,
    judge: str | Path | Conditioner,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    prompts: int | None = None,
    image_prompts: int = 100,
    steps: int = 24,
    solver: str = "own",
    text_guidance: float = 3.0,
    image_guidance: float = 2.0,
    resolution: int = 48,
    workers: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Generate one object per prompt and seed, score them, write results.json, per_prompt.csv and contact_sheet.png.

    Started again with the same settings it goes on where it was; true renders, reconstructions and latents are kept.

    Args:
        data: a folder of raw shards with test splits.
        judge: a CLIP folder; its weights must differ from the pipeline's conditioner's.
        prompts: at most so many test samples, taken in turn from the test splits (None: all). The pools stay whole.
        image_prompts: how many of them are also generated from a picture alone; 0 for none.
        resolution: mesh cells along each axis; finer than 48 is not seen in pictures of 64 pixels, and costs twice.
        workers: processes that render.
    Returns: what results.json holds.
    Raises: UserError for a judge that is the conditioner, data without test samples, or settings out of range.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"give at least one seed and each once, got {list(seeds)}")
    if prompts is not None and prompts < 1:
        raise UserError(f"prompts must be at least 1, got {prompts}")
    began = time.perf_counter()
    folder = ShardFolder(data)
    every = _test_prompts(folder)
    pipe, judge_model = open_pipeline(pipeline, device), open_judge(judge, device)
    if judge_model.weights_hash == pipe.conditioner.weights_hash:
        raise UserError(
            "the judge has the same weights as the pipeline's conditioner, so it would grade its own pupil: "
            "give another CLIP with --judge"
        )
    chosen = choose(every, prompts)
    hashes = {
        "data": folder.hash,
        "judge": judge_model.weights_hash,
        "conditioner": pipe.conditioner.weights_hash,
        "autoencoder": weights_hash(pipe.autoencoder),
        "denoiser": weights_hash(pipe.denoiser),
        "protocol": FRONTAL.hash,
    }
    settings = {"steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "solver": solver}
    out, clock = Path(out), Clock()
    n_objects = len(chosen) * (2 + len(seeds))
    with render_pool(workers, n_objects) as pool:
        this = _Run(
            pipe, folder, Judge(judge_model, clock), Cache(out / "cache"), out, pool, clock, tuple(seeds), settings,
            resolution, hashes,
        )  # fmt: skip
        results = _score(this, every, chosen, image_prompts)
    results["record"]["timings_s"] = {**clock.to_json(), "all": round(time.perf_counter() - began, 2)}
    write_results(out, **results)
    return results["record"]


def _score(this: _Run, every: list[Prompt], chosen: list[Prompt], image_prompts: int) -> dict[str, Any]:
    """All rows of the run."""
    galleries = pools(every)
    text = this.judge.texts(
        [caption for pool in galleries for caption in pool.captions]
        + [caption for p in chosen for caption in (p.caption, *(swap.caption for swap in p.swaps))]
    )
    true, note = _true_objects(this, chosen)
    rebuilt = _reconstructions(this, chosen)
    requests = [Request(seed, text=p.caption) for p in chosen for seed in this.seeds]
    made = _generated(this, "generated", requests, [[p.caption, seed] for p in chosen for seed in this.seeds])

    generated = _objects("generated", made, len(this.seeds))
    rows = [generated, _objects("true renders", true, 1), _objects("reconstructions", rebuilt, 1)]
    masks = groups(chosen)
    table: list[Row] = []
    for pool in galleries:
        pool_ND = np.stack([text[caption] for caption in pool.captions])
        with this.clock("score"):
            table += retrieval_rows([*rows, shuffled(generated)], pool, pool_ND, pool.hits(chosen), masks)
    with this.clock("score"):
        orders = two_way_rows(rows, chosen, text, masks)
    image = _image_conditioned(this, every, choose(chosen, image_prompts), chosen, true) if image_prompts else []
    record = {
        "format": RESULTS_FORMAT,
        "settings": {**this.settings, "seeds": list(this.seeds), "prompts": len(chosen), "resolution": this.resolution},
        "protocol": FRONTAL.to_json(),
        "hashes": {**this.hashes, **{f"pool_{pool.name}": pool.hash for pool in galleries}},
        "judge": {"name": str(getattr(this.judge.model.config, "name", "")), "image_size": this.judge.size},
        "counts": {
            "prompts": len(chosen),
            "objects": len(made.empty),
            "empty": int(made.empty.sum()),
            "empty_reconstructions": int(rebuilt.empty.sum()),
            "pools": {pool.name: len(pool.captions) for pool in galleries},
        },
        "rows": [row.to_json() for row in table],
        "two_way": [row.to_json() for row in orders],
        "image": image,
        "notes": [note] if note else [],
        "environment": environment(),
    }
    return {"record": record, "prompts": chosen, "pools": galleries, "text": text, "generated": generated,
            "thumbnails": {"true": true.thumbnails, "generated": made.thumbnails[:: len(this.seeds)]}}  # fmt: skip


def _true_objects(this: _Run, prompts: list[Prompt]) -> tuple[Embedded, str]:
    """The test samples themselves, by the protocol where their mesh can be rebuilt; and a note where it cannot."""
    exact = all(prompt.parts is not None for prompt in prompts)
    key = this.key("data", "judge", "protocol", uids=[prompt.uid for prompt in prompts], exact=exact)

    def make() -> dict[str, np.ndarray]:
        if exact:
            meshes = [exact_mesh(this.folder, prompt.uid, prompt.meta) for prompt in prompts]
            chunks = (meshes[i : i + 64] for i in range(0, len(meshes), 64))
            return embed_meshes(chunks, len(meshes), this.judge, pool=this.pool, description="true renders").arrays()
        pictures = [frontal_pictures(this.folder, prompt.index) for prompt in prompts]
        # The first picture is what image conditioning is asked about: it must not stand for the object itself.
        return embed_pictures([views[1:] if len(views) > 1 else views for views in pictures], this.judge).arrays()

    note = "" if exact else "true renders are the data's stored frontal views but the first, not the protocol's cameras"
    return Embedded(**this.cache.fetch("true", key, make)), note


def _reconstructions(this: _Run, prompts: list[Prompt]) -> Embedded:
    """The test samples through the autoencoder."""
    key = this.key("data", "judge", "protocol", "autoencoder", uids=[p.uid for p in prompts], size=this.resolution)

    def make() -> dict[str, np.ndarray]:
        autoencoder = this.pipe.autoencoder
        latents = encode_surfaces(autoencoder, this.folder, [prompt.index for prompt in prompts], this.clock)
        chunks = decode_meshes(autoencoder, latents, this.resolution, this.clock)
        return embed_meshes(chunks, len(latents), this.judge, pool=this.pool, description="reconstructions").arrays()

    return Embedded(**this.cache.fetch("reconstructions", key, make))


def _generated(this: _Run, name: str, requests: list[Request], content: Any) -> Embedded:
    """Generate (or take up) the latents of all requests, and embed their objects.

    Args:
        content: JSON that tells the requests apart from others.
    """
    key = this.key("conditioner", "autoencoder", "denoiser", settings=this.settings, content=content)
    latents = _latents(this, name, requests, sha256_json(key))
    shown = {**this.key("judge", "protocol"), "latents": key, "size": this.resolution}

    def make() -> dict[str, np.ndarray]:
        chunks = decode_meshes(this.pipe.autoencoder, latents, this.resolution, this.clock)
        return embed_meshes(chunks, len(latents), this.judge, pool=this.pool, description=f"rendering {name}").arrays()

    return Embedded(**this.cache.fetch(name, shown, make))


def _latents(this: _Run, name: str, requests: list[Request], key: str) -> np.ndarray:
    """Latents f32 [K, L, C] of the requests; those an earlier run with the same key made are taken up."""
    path = this.out / ("latents.npz" if name == "generated" else f"latents-{name}.npz")
    parts: list[np.ndarray] = []
    try:
        stored = decode_npz(path.read_bytes(), str(path)) if path.exists() else {}
        if str(stored.get("key", "")) == key:
            parts.append(stored["latents"])
    except UserError:
        pass  # damaged: made again
    done = sum(map(len, parts))
    if done >= len(requests):
        return np.concatenate(parts)
    saved = time.monotonic()
    with Bar(len(requests), f"sampling {name}", start=done) as bar:
        batches = generate(this.pipe, requests[done:], **this.settings)
        while True:
            with this.clock("generate"):
                latents_BLC = next(batches, None)
            if latents_BLC is None:
                break
            parts.append(latents_BLC)
            bar.update(len(latents_BLC))
            if time.monotonic() - saved > SAVE_EVERY_S:
                write_atomic(path, encode_npz(latents=np.concatenate(parts), key=np.array(key)))
                saved = time.monotonic()
    latents = np.concatenate(parts)
    write_atomic(path, encode_npz(latents=latents, key=np.array(key)))
    return latents


def _image_conditioned(
    this: _Run, every: list[Prompt], some: list[Prompt], chosen: list[Prompt], true: Embedded
) -> list[dict[str, Any]]:
    """Objects made from one stored view each: of which of the test set's views is this the object?

    The pool is the first stored frontal view of every test sample; those of objects with the same meaning are right.
    """
    views = {prompt.uid: frontal_pictures(this.folder, prompt.index, first_only=True)[0] for prompt in every}
    pool_ND = embed_pictures([view[None] for view in views.values()], this.judge).embeddings
    hits_PN = np.array([[other.meaning == prompt.meaning for other in every] for prompt in some])
    requests = [Request(seed, views=(Image.fromarray(views[p.uid]),)) for p in some for seed in this.seeds]
    content = [[hashlib.sha256(views[p.uid].tobytes()).hexdigest(), seed] for p in some for seed in this.seeds]
    made = _objects("generated", _generated(this, "from-images", requests, content), len(this.seeds))
    place = {prompt.uid: index for index, prompt in enumerate(chosen)}
    rows_K = [place[prompt.uid] for prompt in some]
    truth = Objects("true renders", true.embeddings[rows_K][:, None], true.empty[rows_K][:, None])
    table = []
    with this.clock("score"):
        for objects in (made, truth, shuffled(made)):
            scores = cluster_bootstrap(retrieval_values(objects, pool_ND, hits_PN))
            table.append(Row(objects.name, "images", "all", dict(zip(METRICS, scores, strict=True))))
    blind = [chance_scores(len(every), int(hits)) for hits in hits_PN.sum(axis=1)]
    means = {metric: float(np.mean([entry[metric] for entry in blind])) for metric in METRICS}
    chance = {metric: Interval(mean, mean, mean, len(some), 1) for metric, mean in means.items()}
    return [row.to_json() for row in (*table, Row("chance", "images", "all", chance))]


def _objects(name: str, embedded: Embedded, n_seeds: int) -> Objects:
    """K objects in prompt order as [P, S]."""
    return Objects(
        name,
        embedded.embeddings.reshape(-1, n_seeds, embedded.embeddings.shape[-1]),
        embedded.empty.reshape(-1, n_seeds),
    )


def _test_prompts(folder: ShardFolder) -> list[Prompt]:
    """A prompt of every sample in a test split."""
    tests = [index for index, uid in enumerate(folder.uids) if folder.splits(index) in TEST_SPLITS]
    if not tests:
        raise UserError(f"{folder.folder} has no sample in a test split, so there is nothing to score: build more data")
    return [prompt_of(folder.uids[i], i, folder.splits(i), folder.read_json(i)) for i in tests]


def open_pipeline(pipeline: str | Path | ShapeloomPipeline, device: str | None) -> ShapeloomPipeline:
    if isinstance(pipeline, (str, Path)):
        from ..checkpoints.pipeline import load

        pipeline = load(pipeline)
    return pipeline.to(device) if device else pipeline


def open_judge(judge: str | Path | Conditioner, device: str | None) -> Conditioner:
    if isinstance(judge, (str, Path)):
        from ..checkpoints.clip import load_clip

        judge = load_clip(judge)
    return judge.to(device) if device else judge
