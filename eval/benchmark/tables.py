"""From what evaluators saw to the tables of results.json.

Shapes: P prompts, S seeds, V views, N captions of a gallery, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import numpy as np

from ...data_pipes import grammar
from ...errors import UserError
from ..environment import environment
from ..evaluators.files import JUDGE
from ..evaluators.registry import EvaluatorFacts
from .inputs import Found
from .prompts import Gallery, Prompt, PromptSet, galleries, groups
from .protocol import Protocol, published_rows
from .schema import (
    AzimuthCurve,
    Confusion,
    EvaluatorRecord,
    Failure,
    GalleryRecord,
    Headline,
    Independence,
    Interval,
    RankHistogram,
    Results,
    Score,
    Shading,
    TwoWay,
    Variance,
)
from .scoring import (
    Objects,
    Retrieved,
    chance,
    from_the_front,
    metrics_of,
    rank_counts,
    retrieve,
    shuffled,
    two_way_by_kind,
)
from .statistics import cluster_bootstrap, variance_parts

__all__ = ["PICTURES", "Placed", "Scored", "placements", "tabulate"]

PICTURES = "pictures"  # a row that is no row: the gallery of pictures, where objects were made from pictures
LEAKS = ("same weights", "same pre-training")
MOST_CONFUSIONS = 40
LISTED = 20


@dataclass(frozen=True)
class Scored:
    """One evaluator's view of the run.

    Args:
        objects: rows by shading.
        captions: text to unit embedding [D]; tokens: how many it has.
    """

    facts: EvaluatorFacts
    independence: Independence
    objects: dict[Shading, list[Objects]]
    captions: dict[str, np.ndarray]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Placed:
    """The objects of a shading in one gallery, by row."""

    evaluator: str
    shading: Shading
    gallery: Gallery
    hits_PN: np.ndarray
    by_row: dict[str, tuple[Objects, Retrieved]]

    @cached_property
    def generated(self) -> Retrieved:
        return self.by_row["generated"][1]


def placements(
    scored: Sequence[Scored], prompts: PromptSet, chosen: Sequence[Prompt], protocol: Protocol
) -> Iterator[Placed]:
    """Every evaluator, shading and gallery, with the shuffled row added."""
    pools = galleries(prompts.prompts)
    for one in scored:
        for shading, rows in one.objects.items():
            real = [objects for objects in rows if objects.name != PICTURES]
            if not any(objects.name == "generated" for objects in real):
                continue
            real.append(shuffled(next(objects for objects in real if objects.name == "generated")))
            matrices = [(pool, np.stack([one.captions[text] for text in pool.captions])) for pool in pools]
            matrices += [_picture_gallery(objects, prompts) for objects in rows if objects.name == PICTURES]
            for pool, gallery_ND in matrices:
                hits_PN = pool.hits(chosen)
                frontal_P = np.array([pool.name == "hard" and from_the_front(prompt) for prompt in chosen])
                placed = {
                    objects.name: (objects, retrieve(objects, gallery_ND, hits_PN, protocol.aggregation, frontal_P))
                    for objects in real
                }
                yield Placed(one.facts.name, shading, pool, hits_PN, placed)


def tabulate(
    scored: Sequence[Scored],
    placed: Sequence[Placed],
    *,
    protocol: Protocol,
    prompts: PromptSet,
    chosen: Sequence[Prompt],
    found: Found,
    inputs: Mapping[str, Any],
    duplicates: Sequence[Sequence[str]],
    misses: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> Results:
    """All tables; timings are left for the caller to fill."""
    masks = groups(chosen)
    records = [_evaluator(one, chosen, protocol) for one in scored]
    captioned = [one for one in placed if one.gallery.name != PICTURES]
    return Results(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        partial=len(chosen) < len(prompts.prompts),
        headline=_headline(placed, records, protocol, chosen),
        protocol={**protocol.to_json(), "hash": protocol.hash},
        prompts={"source": prompts.source, "count": len(chosen), "of": len(prompts.prompts), "hash": prompts.hash},
        inputs={
            **inputs,
            "seeds": list(found.seeds),
            "objects": len(chosen) * len(found.seeds),
            "extra": found.extra[:LISTED],
            "extra_count": len(found.extra),
            "unplaced": found.unplaced[:LISTED],
            "duplicates": [list(group) for group in duplicates[:LISTED]],
        },
        galleries=_galleries(placed, protocol),
        evaluators=records,
        scores=[score for one in placed for score in _scores(one, masks)],
        two_way=[row for one in scored for row in _two_way(one, chosen, protocol, masks)],
        azimuth=[curve for one in captioned for curve in _azimuth(one)],
        ranks=[_histogram(one) for one in captioned],
        confusions=[pair for one in captioned for pair in _confusions(one, chosen)],
        variance=[_variance(one) for one in captioned if len(chosen) > 1],
        failures=[Failure(**miss) for miss in misses],
        published=published_rows(protocol),
        timings_s={},
        notes=[*notes, *_notes(scored, protocol, found, chosen)],
        environment=environment(),
    )


def _picture_gallery(pictures: Objects, prompts: PromptSet) -> tuple[Gallery, np.ndarray]:
    """The pictures that objects are made from, of all prompts; each means what its prompt means."""
    there = pictures.present_P & ~pictures.missed_PS[:, 0]
    having = [prompt for prompt, is_there in zip(prompts.prompts, there) if is_there]
    gallery_ND = pictures.embeddings_PSVD[there, 0].mean(axis=1)
    gallery_ND /= np.maximum(np.linalg.norm(gallery_ND, axis=1, keepdims=True), 1e-12)
    gallery = Gallery(PICTURES, tuple(prompt.id for prompt in having), tuple(prompt.meaning for prompt in having))
    return gallery, gallery_ND


def _headline(
    placed: Sequence[Placed], records: Sequence[EvaluatorRecord], protocol: Protocol, prompts: Sequence[Prompt]
) -> Headline:
    """The first evaluator that shares nothing with the conditioner, in the protocol's gallery, in colour."""
    fair = [record for record in records if record.independence not in LEAKS]
    able = [record for record in fair if record.family != "test" and (record.name != JUDGE or _procedural(prompts))]
    fit = next(iter(able or fair), None)
    if fit is None:
        shared = records[0].independence.removeprefix("same ")
        return Headline(
            reason=f"every evaluator has the conditioner's {shared} and would grade its own pupil: add an independent "
            "one with --evaluator"
        )
    mine = {one.gallery.name: one for one in placed if (one.evaluator, one.shading) == (fit.name, "colour")}
    chosen = mine.get(protocol.gallery.kind) or mine["prompts"]
    if len(set(chosen.gallery.meanings)) == 1:
        return Headline(reason="all captions of the gallery say the same, so that nothing can be told apart")
    everyone = np.ones(len(chosen.hits_PN), bool)
    score = metrics_of(chosen.generated, everyone)["r@1"]
    reasons = []
    if fit.family == "test":
        reasons.append(f"{fit.name} is for dry runs: no number to quote")
    if fit.name == JUDGE and not _procedural(prompts):
        reasons.append(f"{JUDGE} knows the procedural reference set alone: no number to quote")
    if fit.independence == "unknown":
        reasons.append("what the system was conditioned by was not declared")
    if not _of_protocol(chosen.gallery, protocol):
        reasons.append(f"the captions are not those of {protocol.name}, so it is not comparable with others by it")
    reason = "; ".join(reasons)
    return Headline(evaluator=fit.name, shading="colour", gallery=chosen.gallery.name, **{"r@1": score}, reason=reason)


def _procedural(prompts: Sequence[Prompt]) -> bool:
    """Whether the grammar of the procedural set reads all of the captions."""
    try:
        for prompt in prompts:
            grammar.parse(prompt.text)
    except UserError:
        return False
    return True


def _evaluator(one: Scored, chosen: Sequence[Prompt], protocol: Protocol) -> EvaluatorRecord:
    facts = one.facts
    return EvaluatorRecord(
        name=facts.name,
        hash=facts.hash,
        weights=facts.weights,
        family=facts.family,
        architecture=facts.architecture,
        pretraining=facts.pretraining,
        image_size=facts.image_size,
        context_length=facts.context_length,
        independence=one.independence,
        notes=list(facts.notes),
        truncated=[prompt.id for prompt in chosen if one.tokens[prompt.text] > facts.context_length],
    )


def _galleries(placed: Sequence[Placed], protocol: Protocol) -> list[GalleryRecord]:
    rule, records = protocol.gallery, {}
    for one in placed:
        gallery = one.gallery
        if gallery.name not in records:
            known = gallery.name == "prompts" and (rule.size, rule.captions_sha256) != (None, None)
            records[gallery.name] = GalleryRecord(
                name=gallery.name,
                size=len(gallery.captions),
                hash=gallery.hash,
                of_protocol=_of_protocol(gallery, protocol) if known else None,
                most_retrieved={},
            )
        nearest = one.generated.nearest_PSV[one.generated.nearest_PSV >= 0]
        if one.shading == "colour" and len(nearest):
            place, count = Counter(nearest.tolist()).most_common(1)[0]
            records[gallery.name].most_retrieved[one.evaluator] = (gallery.captions[place], count / len(nearest))
    return list(records.values())


def _of_protocol(gallery: Gallery, protocol: Protocol) -> bool:
    """Whether it is the gallery that the protocol asks for; of one that names none, any is."""
    rule = protocol.gallery
    return rule.size in (None, len(gallery.captions)) and rule.captions_sha256 in (None, gallery.hash)


def _scores(one: Placed, masks: Mapping[str, np.ndarray]) -> Iterator[Score]:
    for group, mask in masks.items():
        for name, (objects, retrieved) in one.by_row.items():
            chosen = mask & objects.present_P
            if chosen.any():
                yield _score(one, name, group, metrics_of(retrieved, chosen))
        yield _score(one, "chance", group, chance(one.hits_PN[mask]))


def _score(one: Placed, row: str, group: str, metrics: dict[str, Interval]) -> Score:
    return Score(
        row=row, evaluator=one.evaluator, shading=one.shading, gallery=one.gallery.name, group=group, metrics=metrics
    )


def _two_way(
    one: Scored, chosen: Sequence[Prompt], protocol: Protocol, masks: Mapping[str, np.ndarray]
) -> Iterator[TwoWay]:
    for shading, rows in one.objects.items():
        for objects in rows:
            if objects.name not in ("generated", "true renders", "reconstructions", "conditioning images"):
                continue
            by_kind = two_way_by_kind(objects, chosen, one.captions, protocol.aggregation)
            for group, mask in masks.items():
                for kind, values_PS in by_kind.items():
                    judged = mask & ~np.isnan(values_PS[:, 0])
                    if judged.any():
                        accuracy = cluster_bootstrap(values_PS[judged][..., None])[0]
                        yield TwoWay(
                            row=objects.name,
                            evaluator=one.facts.name,
                            shading=shading,
                            kind=kind,
                            group=group,
                            accuracy=accuracy,
                        )


def _azimuth(one: Placed) -> Iterator[AzimuthCurve]:
    for name in ("generated", "true renders"):
        if name in one.by_row and len(one.by_row[name][0].azimuths_deg or ()) > 1:
            objects, retrieved = one.by_row[name]
            right_V = retrieved.right_PSV[objects.present_P].mean(axis=(0, 1))
            yield AzimuthCurve(
                row=name,
                evaluator=one.evaluator,
                shading=one.shading,
                gallery=one.gallery.name,
                azimuths_deg=list(objects.azimuths_deg or ()),
                **{"r@1": right_V.round(6).tolist()},
            )


def _histogram(one: Placed) -> RankHistogram:
    edges, counts = rank_counts(one.generated, len(one.gallery.captions))
    return RankHistogram(
        evaluator=one.evaluator, shading=one.shading, gallery=one.gallery.name, edges=edges, counts=counts
    )


def _confusions(one: Placed, chosen: Sequence[Prompt]) -> list[Confusion]:
    """The captions that stand nearest to views of a prompt's objects instead of its own, the most frequent first."""
    shares: dict[tuple[int, int], float] = {}
    for place, nearest in enumerate(one.generated.nearest_PSV):
        seen = nearest[nearest >= 0].tolist()
        for item, count in Counter(seen).items():
            if not one.hits_PN[place, item]:
                shares[place, item] = count / len(seen)
    listed = sorted(shares.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_CONFUSIONS]
    return [
        Confusion(
            evaluator=one.evaluator,
            shading=one.shading,
            gallery=one.gallery.name,
            prompt=chosen[place].id,
            text=chosen[place].text,
            caption=one.gallery.captions[item],
            share=share,
        )
        for (place, item), share in listed
    ]


def _variance(one: Placed) -> Variance:
    prompts, seeds = variance_parts(one.generated.scores_PSM[..., 0])
    return Variance(
        evaluator=one.evaluator,
        shading=one.shading,
        gallery=one.gallery.name,
        between_prompts=prompts,
        between_seeds=seeds,
    )


def _notes(scored: Sequence[Scored], protocol: Protocol, found: Found, chosen: Sequence[Prompt]) -> Iterator[str]:
    for one in scored:
        if one.independence == "same architecture":
            yield f"{one.facts.name} has the conditioner's architecture with other weights"
        for shading, rows in one.objects.items():
            if not any(objects.name == "generated" for objects in rows):
                yield f"there is no {shading} score by {one.facts.name}: not every object has such pictures"
    if protocol.gallery.kind == "hard" and not any(prompt.swaps for prompt in chosen):
        yield "the protocol asks for the hard gallery, but no caption has a swap: the gallery is the prompts"
    if not any(objects.name == "true renders" for one in scored for rows in one.objects.values() for objects in rows):
        yield "there are no references, so nothing shows what these evaluators make of true objects"
    elif any(o.name == "true renders" and o.azimuths_deg is None for one in scored for o in one.objects["colour"]):
        yield "true renders are the data's stored frontal views but the first, not the protocol's cameras"
    if found.missing:
        yield f"{found.missing} of {len(chosen) * len(found.seeds)} objects have no file; they count as misses"
