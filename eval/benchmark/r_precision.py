"""CLIP R-precision of any text-to-3D system, with the rows that say what the number means.

Objects come from a folder or are made by a pipeline, are rendered by a protocol, and embedded by evaluators; an object
scores if its own caption is the nearest of a gallery. Beside it stand controls: true renders, reconstructions, the
pictures that objects were made from, shuffled prompts, a blank picture, a grey ball, and chance.

The way: prompts → objects (`inputs`, `make`) → pictures (`renders`) → embeddings (`embeddings`) → scores (`scoring`,
`statistics`) → results.json, per_prompt.csv, report.html. Renders and embeddings are kept by content, which is also how
ranks hand them to the first one: each rank does its share of the objects, then the first reads them all.

Shapes: P prompts, S seeds, V views, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ...files import sha256_json
from ..evaluators.registry import (
    EvaluatorFacts,
    describe,
    describe_conditioner,
    describe_declared,
    independence,
    open_evaluator,
)
from .embeddings import EmbeddingCache
from .inputs import Found, find_objects
from .prompts import Prompt, PromptSet, choose, read_prompts
from .protocol import Protocol, load_protocol
from .ranks import Ranks
from .renders import Limits, RenderCache, Rendered
from .results import write_results
from .schema import Independence, Results
from .scoring import Objects
from .sources import Blank, GreySphere, Source, Up
from .tables import PICTURES, Scored, placements, tabulate

if TYPE_CHECKING:
    from .make import Sampling

__all__ = ["run"]

TIES: tuple[Independence, ...] = ("same weights", "same pre-training", "same architecture", "independent", "unknown")


@dataclass(frozen=True)
class Row:
    """A row's objects before they are rendered; a control has as many seeds as it has objects of a prompt.

    ring: whether its pictures are the protocol's views.
    """

    name: str
    sources_PS: list[list[Source | None]]
    present_P: np.ndarray
    ring: bool = True


class Clock:
    """Wall seconds per kind of work."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(("generate", "render", "embed", "score"), 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began

    def to_json(self) -> dict[str, float]:
        every = {**self.seconds, "all": time.perf_counter() - self.began}
        return {what: round(seconds, 2) for what, seconds in every.items()}


@dataclass(frozen=True)
class Inputs:
    """The rows to score, and what results.json says of where they are from."""

    rows: list[Row]
    found: Found
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def run(
    prompts: str | Path,
    out: str | Path,
    *,
    generated: str | Path | None = None,
    pipeline: str | Path | None = None,
    sampling: Sampling | None = None,
    protocol: str | Path = "default-v1",
    evaluators: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    conditioned_by: Sequence[str] = (),
    up: Up = "y",
    limit: int | None = None,
    shard: str | None = None,
    cache_folder: str | Path | None = None,
    workers: int = 1,
    time_limit_s: int = 60,
    allow_download: bool = False,
    device: str | None = None,
) -> Results | None:
    """Score objects; write results.json, per_prompt.csv, thumbnails.npz, contact_sheet.png and report.html into `out`.

    Args:
        prompts: as `prompts.read_prompts` reads them.
        generated: a folder of objects (`inputs.find_objects`); or give a pipeline, which makes them first.
        sampling: how the pipeline makes them.
        protocol: a name, or a YAML file.
        evaluators: as `evaluators.open_evaluator` reads them; the first that is independent makes the headline.
        seeds: that every prompt should have; None takes those found (0 for a pipeline).
        conditioned_by: CLIPs that the system was conditioned, guided or filtered by, beside the pipeline's own; names
            need no weights here.
        limit: at most so many prompts, in turn from all groups; the galleries stay whole, the result is "partial".
        shard: "I/N", this process's part of a run without a launcher; it renders and embeds, and scores nothing.
        cache_folder: for renders and embeddings; by default in `out`.
        workers: processes that render, on each machine. time_limit_s: processor time for rendering one object.
    Returns: what results.json holds; None on other ranks than the first, and for a shard.
    Raises: UserError for whatever is wrong with prompts, objects, evaluators, protocol or settings.
    """
    clock, ranks, out = Clock(), Ranks.of_this_process(shard), Path(out)
    _refuse_wrong_options(generated, pipeline, evaluators, seeds, ranks)
    workers = max(1, workers // ranks.on_this_machine)
    device = device or ranks.device()
    kept = Path(cache_folder) if cache_folder else out / "cache"
    rules, every = load_protocol(protocol), read_prompts(prompts)
    chosen = choose(every.prompts, limit)
    memo = kept / "evaluators.json"
    facts = [describe(name, memo=memo, allow_download=allow_download) for name in evaluators]
    leaks = _independence(facts, pipeline, conditioned_by, memo, allow_download)

    if pipeline is None:
        assert generated is not None
        inputs = _from_folder(generated, chosen, rules, seeds, up)
    else:
        with clock("generate"):
            inputs = _from_pipeline(pipeline, every, chosen, rules, seeds or (0,), sampling, out, ranks, device)
    renders = RenderCache(kept, rules, Limits(cpu_s=time_limit_s))
    rows = [*inputs.rows, *_controls(every, chosen, sampling)]
    with clock("render"):
        shown = _render(rows, renders, ranks, workers)
        ranks.wait()
    embedders = [_embedder(kept, one, device, allow_download) for one in facts]
    with clock("embed"):
        for embedder in embedders:
            embedder.embed(renders, shown, f"embedding by {embedder.facts.name}")
        ranks.wait()
    if not (ranks.first and ranks.joined):
        if not ranks.joined:
            print(f"shard {shard} is done; when all are, the same command without --shard scores from {kept}")
        return None
    with clock("embed"):
        if ranks.world > 1:  # all objects; the other ranks' are there
            shown = renders.render(_flat(rows), workers=workers, description="rendering")
            for embedder in embedders:
                embedder.embed(renders, shown, f"embedding by {embedder.facts.name}")
        scored = [
            _scored(embedder, rows, shown, every, chosen, rules, leak)
            for embedder, leak in zip(embedders, leaks, strict=True)
        ]
    with clock("score"):
        placed = list(placements(scored, every, chosen, rules))
        results = tabulate(
            scored,
            placed,
            protocol=rules,
            prompts=every,
            chosen=chosen,
            found=inputs.found,
            inputs=inputs.record,
            duplicates=_duplicates(chosen, inputs.found, shown),
            misses=_misses(chosen, inputs.found, shown),
            notes=[*inputs.notes, *_notes(rows, shown, chosen)],
        )
    return write_results(out, results, placed, chosen, inputs.found, _thumbnails(rows, shown, renders), clock.to_json)


def _refuse_wrong_options(
    generated: str | Path | None,
    pipeline: str | Path | None,
    evaluators: Sequence[str],
    seeds: Sequence[int] | None,
    ranks: Ranks,
) -> None:
    if (generated is None) == (pipeline is None):
        raise UserError(
            "give either --generated FOLDER, objects that are there, or --pipeline FOLDER, which makes them"
        )
    if not evaluators or len(set(evaluators)) != len(evaluators):
        raise UserError("give at least one --evaluator, and each once; shapeloom eval ls shows those there are")
    if seeds is not None and (not seeds or len(set(seeds)) != len(seeds)):
        raise UserError(f"give at least one seed and each once, got {list(seeds)}")
    if pipeline is not None and not ranks.joined:
        raise UserError(
            "--shard takes objects that are there: make them with --pipeline and no --shard first, then give their "
            "folder in OUT/generated as --generated"
        )


def _independence(
    facts: Sequence[EvaluatorFacts],
    pipeline: str | Path | None,
    conditioned_by: Sequence[str],
    memo: Path,
    allow_download: bool,
) -> list[Independence]:
    """Of each evaluator from whatever conditioned the system, the closest tie of all."""
    known: list[EvaluatorFacts | None] = [
        describe_declared(name, memo=memo, allow_download=allow_download) for name in conditioned_by
    ]
    if pipeline is not None:
        known.append(describe_conditioner(pipeline, memo=memo))
    return [min((independence(one, other) for other in known or [None]), key=TIES.index) for one in facts]


def _from_folder(
    folder: str | Path, chosen: Sequence[Prompt], protocol: Protocol, seeds: Sequence[int] | None, up: Up
) -> Inputs:
    found = find_objects(folder, chosen, protocol, seeds, up)
    notes = []
    if "pictures" in found.kind:
        notes.append("ready renders were scored: nothing shows that their cameras are the protocol's")
    row = Row("generated", found.sources_PS, np.ones(len(chosen), bool))
    return Inputs([row], found, {"kind": found.kind, "source": str(folder), "up": up}, notes)


def _from_pipeline(
    pipeline: str | Path,
    prompts: PromptSet,
    chosen: Sequence[Prompt],
    protocol: Protocol,
    seeds: Sequence[int],
    sampling: Sampling | None,
    out: Path,
    ranks: Ranks,
    device: str | None,
) -> Inputs:
    """Objects, and reconstructions of the references, in folders named by what they depend on."""
    from .make import Sampling, generate_objects, open_pipeline, pipeline_hash, reconstruct_objects

    sampling = sampling or Sampling()
    opened = cache(lambda: open_pipeline(pipeline, device))
    own_hash = pipeline_hash(pipeline)
    wanted: list[Any] = [[prompt.id, prompt.text] for prompt in chosen]
    if sampling.condition != "text":
        wanted += [prompt.image.key() for prompt in chosen if prompt.image]
    made = out / "generated" / sha256_json([own_hash, sampling.to_json(), wanted, list(seeds)])[:16]
    generate_objects(opened, chosen, seeds, made, sampling, ranks)
    referenced = [prompt for prompt in chosen if prompt.reference is not None]
    true = [[prompt.id, prompt.reference.key()] for prompt in chosen if prompt.reference is not None]
    rebuilt = out / "reconstructions" / sha256_json([own_hash, sampling.resolution, true])[:16]
    if referenced:
        reconstruct_objects(opened, prompts, referenced, rebuilt, sampling.resolution, ranks)
    ranks.wait()
    found = find_objects(made, chosen, protocol, seeds)
    rows = [Row("generated", found.sources_PS, np.ones(len(chosen), bool))]
    if rebuilt.is_dir():
        again = find_objects(rebuilt, chosen, protocol, [0])
        rows.append(Row("reconstructions", again.sources_PS, _present(again.sources_PS)))
    record = {"kind": "pipeline", "source": str(pipeline), "hash": own_hash, "sampling": sampling.to_json()}
    return Inputs(rows, found, record)


def _controls(prompts: PromptSet, chosen: Sequence[Prompt], sampling: Sampling | None) -> list[Row]:
    """Rows that no system made. The blank and the ball are one object for all prompts."""
    rows = []
    true_P1: list[list[Source | None]] = [[prompt.reference] for prompt in chosen]
    if _present(true_P1).any():
        exact = all(getattr(prompt.reference, "exact", True) for prompt in chosen if prompt.reference)
        rows.append(Row("true renders", true_P1, _present(true_P1), ring=exact))
    image_P1: list[list[Source | None]] = [[prompt.image] for prompt in chosen]
    if _present(image_P1).any() and (prompts.raw is None or (sampling and sampling.condition != "text")):
        rows.append(Row("conditioning images", image_P1, _present(image_P1), ring=False))
    if sampling and sampling.condition != "text":
        every_P1: list[list[Source | None]] = [[prompt.image] for prompt in prompts.prompts]
        rows.append(Row(PICTURES, every_P1, _present(every_P1), ring=False))
    everywhere = np.ones(len(chosen), bool)
    blank, ball = Blank(), GreySphere()
    rows.append(Row("blank object", [[blank] for _ in chosen], everywhere))
    rows.append(Row("grey sphere", [[ball] for _ in chosen], everywhere))
    return rows


def _present(sources_PS: list[list[Source | None]]) -> np.ndarray:
    return np.array([any(source is not None for source in row) for row in sources_PS])


def _flat(rows: Sequence[Row]) -> list[Source | None]:
    return [source for row in rows for sources in row.sources_PS for source in sources]


def _render(rows: Sequence[Row], renders: RenderCache, ranks: Ranks, workers: int) -> list[Rendered]:
    """Of this rank's share of all objects."""
    return renders.render(ranks.mine(_flat(rows)), workers=workers, description="rendering")


def _embedder(kept: Path, facts: EvaluatorFacts, device: str | None, allow_download: bool) -> EmbeddingCache:
    opened = lambda: open_evaluator(facts.name, device=device, allow_download=allow_download)  # noqa: E731
    return EmbeddingCache(kept, facts, opened)


def _scored(
    embedder: EmbeddingCache,
    rows: Sequence[Row],
    shown: Sequence[Rendered],
    prompts: PromptSet,
    chosen: Sequence[Prompt],
    protocol: Protocol,
    leak: Independence,
) -> Scored:
    """Everything one evaluator says, from the caches."""
    texts = [p.text for p in prompts.prompts] + [swap.text for p in prompts.prompts for swap in p.swaps]
    distinct = list(dict.fromkeys(texts))
    embeddings_ND, tokens_N = embedder.captions([protocol.caption(text) for text in distinct])
    width = embeddings_ND.shape[1]
    objects = {
        shading: [
            one for row, its in _by_row(rows, shown) if (one := _objects(embedder, row, its, shading, protocol, width))
        ]
        for shading in protocol.shadings
    }
    return Scored(embedder.facts, leak, objects, dict(zip(distinct, embeddings_ND)), dict(zip(distinct, tokens_N)))


def _by_row(rows: Sequence[Row], shown: Sequence[Rendered]) -> Iterator[tuple[Row, list[Rendered]]]:
    start = 0
    for row in rows:
        count = sum(map(len, row.sources_PS))
        yield row, list(shown[start : start + count])
        start += count


def _objects(
    embedder: EmbeddingCache, row: Row, shown: Sequence[Rendered], shading: str, protocol: Protocol, width: int
) -> Objects | None:
    """A row as the evaluator sees it; None where an object has pictures, but not in this shading: that is no miss."""
    n_prompts, n_seeds = len(row.sources_PS), len(row.sources_PS[0])
    seen = [one for one in shown if one.pixels and shading in one.pixels]
    if any(one.pixels and shading not in one.pixels for one in shown):
        return None
    views = {embedder.of(one, shading).shape for one in {one.key: one for one in seen}.values()}
    if len(views) > 1:
        raise UserError(f"the objects of '{row.name}' have different numbers of views: {sorted(v for v, _ in views)}")
    shape = next(iter(views), (1, width))
    azimuths = protocol.cameras.azimuths_deg if row.ring and shape[0] == len(protocol.cameras.azimuths_deg) else None
    if len(shown) > 1 and len({one.key for one in shown}) == 1 and seen:  # a control that is one object for all
        same_PSVD = np.broadcast_to(embedder.of(seen[0], shading), (n_prompts, n_seeds, *shape))
        return Objects(row.name, same_PSVD, np.zeros((n_prompts, n_seeds), bool), row.present_P, azimuths)
    embeddings_PSVD = np.zeros((n_prompts, n_seeds, *shape), np.float32)
    missed_PS = np.ones((n_prompts, n_seeds), bool)
    for place, one in enumerate(shown):
        if one.pixels and shading in one.pixels:
            at = divmod(place, n_seeds)
            embeddings_PSVD[at], missed_PS[at] = embedder.of(one, shading), False
    return Objects(row.name, embeddings_PSVD, missed_PS, row.present_P, azimuths)


def _misses(chosen: Sequence[Prompt], found: Found, shown: Sequence[Rendered]) -> list[dict[str, Any]]:
    """Of the generated objects, the first row."""
    units = [(prompt.id, seed) for prompt in chosen for seed in found.seeds]
    return [
        {"id": own_id, "seed": seed, "kind": one.miss.kind, "reason": one.miss.reason}
        for (own_id, seed), one in zip(units, shown)
        if one.miss
    ]


def _notes(rows: Sequence[Row], shown: Sequence[Rendered], chosen: Sequence[Prompt]) -> Iterator[str]:
    """Controls that failed, which lower the ceiling, and objects that were read without a part of what they name."""
    for row, its in _by_row(rows, shown):
        per_prompt = len(row.sources_PS[0])
        if row.name not in ("generated", PICTURES):
            failed = [(chosen[n // per_prompt].id, one.miss) for n, one in enumerate(its) if one.miss]
            failed = [(own_id, miss) for own_id, miss in failed if miss.kind != "missing"]
            if failed:
                told = "; ".join(f"{own_id}: {miss.reason}" for own_id, miss in failed[:3])
                yield f"{len(failed)} of the {row.name} failed and count as misses ({told})"
        warned = [one for one in its if one.warnings]
        if warned:
            yield f"{len(warned)} of {row.name} were read without a part of what they name ({warned[0].warnings[0]})"


def _duplicates(chosen: Sequence[Prompt], found: Found, shown: Sequence[Rendered]) -> list[list[str]]:
    """Generated objects of equal bytes, as ID/SEED: a sign that a folder was filled wrongly."""
    by_key: dict[str, list[str]] = {}
    for name, one in zip((f"{prompt.id}/{seed}" for prompt in chosen for seed in found.seeds), shown):
        if one.pixels:
            by_key.setdefault(one.key, []).append(name)
    return [names for names in by_key.values() if len(names) > 1]


def _thumbnails(rows: Sequence[Row], shown: Sequence[Rendered], renders: RenderCache) -> dict[str, list[bytes | None]]:
    """WebP bytes of generated objects and true renders, in their order; None for a miss."""
    return {
        row.name: [renders.thumbnail(one) for one in its]
        for row, its in _by_row(rows, shown)
        if row.name in ("generated", "true renders")
    }
