"""A results folder of an R-precision run that never ran: every number follows from simulated embeddings.

Shapes: P prompts, S seeds, V views, N captions of a gallery, D embedding width.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from shapeloom.eval.benchmark.schema import (
    METRICS,
    PER_PROMPT,
    AzimuthCurve,
    Confusion,
    EvaluatorRecord,
    Failure,
    GalleryRecord,
    Headline,
    Interval,
    Published,
    RankHistogram,
    Results,
    Score,
    TwoWay,
    Variance,
)
from shapeloom.files import write_json

P, S, V, D = 40, 2, 8, 24
AZIMUTHS = [45.0 * view for view in range(V)]
SHADINGS = ("colour", "textureless")
EVALUATORS = ("ViT-B-32-quickgelu/openai", "ViT-L-14/openai")
GALLERIES = {"prompts": P, "prompts and swaps": 4 * P}
EDGES = [1, 2, 5, 10]
KINDS = ("order", "binding", "parts", "relation", "colors", "shapes", "any")
BLIND = (EVALUATORS[1], "relation")  # guesses there, on true renders too

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "brown", "white")
SHAPES = ("cube", "ball", "cone", "cylinder", "ring")
ODD_CAPTIONS = (
    "</script><script>window.hacked = true</script> a red cube",
    "<img src=x onerror=window.hacked=true> & \"quotes\" 'and' <b>bold</b> text",
    "ein grüner Würfel auf einer blauen Kugel, 緑の立方体 🟩\u2028",
    "a " + "very " * 30 + "long caption of a red ball",
)
FAILURES = (
    Failure(id="obj-004", seed=1, kind="empty", reason="the mesh has no face"),
    Failure(id="obj-017", seed=0, kind="timed out", reason="rendering took longer than 60 s"),
    Failure(id="obj-030", seed=0, kind="unreadable", reason="<b>obj-030.glb</b> is cut short at byte 4096"),
)


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    groups: tuple[str, ...]
    colour: str
    shape: str


def make_prompts() -> list[Prompt]:
    prompts = []
    for place in range(P):
        colour, shape = COLOURS[place % 8], SHAPES[place // 8 % 5]
        text = f"a {colour} {shape}"
        groups = ["single objects"]
        if place % 2:
            text += f" on top of a {COLOURS[(place + 3) % 8]} {SHAPES[(place + 1) % 5]}"
            groups = ["two objects"]
        if place < len(ODD_CAPTIONS):
            text, groups = ODD_CAPTIONS[place], [*groups, "odd & <rare>"]
        uid = "würfel/007" if place == 7 else f"obj-{place:03d}"
        prompts.append(Prompt(uid, text, tuple(groups), colour, shape))
    return prompts


def interval(values_PSV: np.ndarray) -> Interval:
    """Of a mean over prompts, by the normal approximation."""
    values_P = values_PSV.reshape(len(values_PSV), -1).mean(axis=1)
    mean, half = values_P.mean(), 1.96 * values_P.std() / len(values_P) ** 0.5
    lo, hi = max(mean - half, values_P.min()), min(mean + half, values_P.max())
    return Interval(mean=mean, lo=lo, hi=hi, prompts=len(values_P), seeds=values_PSV.shape[1])


def measure(pictures_PSVD: np.ndarray, captions_ND: np.ndarray, failed_PS: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric, the rank and the nearest caption, [P, S, V] each. The caption of prompt p is the p-th."""
    scores_PSVN = pictures_PSVD @ captions_ND.T
    scores_PSVN /= np.linalg.norm(pictures_PSVD, axis=-1, keepdims=True)
    own_P111 = np.arange(len(pictures_PSVD))[:, None, None, None]
    own_PSV = np.take_along_axis(scores_PSVN, own_P111, axis=-1)[..., 0]
    nearest_PSV = scores_PSVN.argmax(axis=-1)
    np.put_along_axis(scores_PSVN, np.broadcast_to(own_P111, (*own_PSV.shape, 1)), -2.0, axis=-1)
    rank_PSV = 1.0 + (scores_PSVN > own_PSV[..., None]).sum(axis=-1)
    credit = {f"r@{k}": (rank_PSV <= k).astype(float) for k in (1, 5, 10)} | {"mrr": 1 / rank_PSV}
    return {
        **{metric: np.where(failed_PS[..., None], 0.0, values_PSV) for metric, values_PSV in credit.items()},
        "rank": rank_PSV,
        "cosine": own_PSV,
        "margin": own_PSV - scores_PSVN.max(axis=-1),
        "nearest": nearest_PSV,
    }


class Simulation:
    """What stands in the lists of `Results`, and the lines of per_prompt.csv."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.prompts = make_prompts()
        own = [prompt.text for prompt in self.prompts]
        self.captions = own + [f"{caption}, swapped {time}" for time in (1, 2, 3) for caption in own]
        places = {prompt.id: place for place, prompt in enumerate(self.prompts)}
        self.hardness_P = self.rng.uniform(0.4, 1.6, size=P)
        self.failed_PS = np.zeros((P, S), bool)
        for failure in FAILURES:
            self.failed_PS[places[failure.id], failure.seed] = True
        names = dict.fromkeys(group for prompt in self.prompts for group in prompt.groups)
        groups = {name: np.array([name in prompt.groups for prompt in self.prompts]) for name in names}
        self.masks = {"all": np.ones(P, bool), **groups}
        self.most_retrieved: dict[str, dict[str, tuple[str, float]]] = {name: {} for name in GALLERIES}
        lists = ("scores", "two_way", "azimuth", "ranks", "confusions", "variance")
        self.lists: dict[str, list[Any]] = {name: [] for name in lists}
        self.lines: list[dict[str, Any]] = []
        for noise, evaluator in zip((0.3, 0.24), EVALUATORS):
            captions_ND = self.rng.normal(size=(len(self.captions), D))
            captions_ND[P:] = 0.8 * np.tile(captions_ND[:P], (3, 1)) + 0.6 * captions_ND[P:]
            captions_ND /= np.linalg.norm(captions_ND, axis=1, keepdims=True)
            for shading, (gallery, size) in product(SHADINGS, GALLERIES.items()):
                spread = noise + 0.08 * (shading == "textureless")
                self.add_view(evaluator, shading, gallery, spread, captions_ND[:size])
            self.add_two_way(evaluator)
        self.lists["galleries"] = [
            GalleryRecord(name=name, size=size, hash=f"{size:064x}"[::-1], of_protocol=size == P, most_retrieved=most)
            for (name, size), most in zip(GALLERIES.items(), self.most_retrieved.values())
        ]

    def pictures(self, n_seeds: int, spread: float, captions_ND: np.ndarray) -> np.ndarray:
        """Embeddings of objects [P, S, V, D]: their caption's, with noise of the object and of the view."""
        behind_V1 = 1 + 0.4 * (1 - np.cos(np.deg2rad(AZIMUTHS)))[:, None]  # the front is drawn best
        noise = self.rng.normal(size=(P, n_seeds, 1, D)) + 0.5 * self.rng.normal(size=(P, n_seeds, V, D))
        return captions_ND[:P, None, None] + spread * self.hardness_P[:, None, None, None] * behind_V1 * noise

    def add_view(self, evaluator: str, shading: str, gallery: str, spread: float, captions_ND: np.ndarray) -> None:
        where = {"evaluator": evaluator, "shading": shading, "gallery": gallery}
        none_PS = np.zeros((P, 1), bool)
        made_PSVD = self.pictures(S, spread, captions_ND)
        measured = {
            "generated": measure(made_PSVD, captions_ND, self.failed_PS),
            "shuffled prompts": measure(np.roll(made_PSVD, 1, axis=0), captions_ND, self.failed_PS),
        }
        for row, share in (("true renders", 0.5), ("reconstructions", 0.7), ("conditioning images", 0.4)):
            measured[row] = measure(self.pictures(1, share * spread, captions_ND), captions_ND, none_PS)
        for row in ("blank object", "grey sphere"):
            same_PSVD = np.broadcast_to(self.rng.normal(size=D), (P, 1, V, D))
            measured[row] = measure(same_PSVD, captions_ND, none_PS)
        for (row, found), (group, mask) in product(measured.items(), self.masks.items()):
            metrics = {metric: interval(found[metric][mask]) for metric in METRICS}
            self.lists["scores"].append(Score(row=row, group=group, metrics=metrics, **where))
        self.add_chance(len(captions_ND), where)
        for row in ("generated", "true renders"):
            share_V = measured[row]["r@1"].mean(axis=(0, 1))
            curve = AzimuthCurve(row=row, azimuths_deg=AZIMUTHS, r_at_1=share_V.tolist(), **where)
            self.lists["azimuth"].append(curve)
        self.add_generated(measured["generated"], len(captions_ND), where)

    def add_chance(self, size: int, where: dict[str, Any]) -> None:
        guess = {"r@1": 1 / size, "r@5": 5 / size, "r@10": 10 / size, "mrr": float(np.mean(1 / np.r_[1 : size + 1]))}
        for group, mask in self.masks.items():
            blind = {m: Interval(mean=v, lo=v, hi=v, prompts=int(mask.sum()), seeds=1) for m, v in guess.items()}
            self.lists["scores"].append(Score(row="chance", group=group, metrics=blind, **where))

    def add_generated(self, found: dict[str, np.ndarray], size: int, where: dict[str, Any]) -> None:
        """Ranks, variances, confusions and lines of the generated objects."""
        ranks = found["rank"].mean(axis=-1)[~self.failed_PS]
        edges = [*EDGES, size]
        below = [int((ranks <= edge).sum()) for edge in edges]
        counts = [*np.diff([0, *below]).tolist(), int(self.failed_PS.sum())]
        self.lists["ranks"].append(RankHistogram(edges=edges, counts=counts, **where))
        hits_PS = found["r@1"].mean(axis=-1)
        seeds = hits_PS.var(axis=1, ddof=1).mean() / S
        prompts = max(hits_PS.mean(axis=1).var() - seeds, 0.0)
        self.lists["variance"].append(Variance(between_prompts=prompts / P, between_seeds=seeds / P, **where))
        every = Counter(found["nearest"][~self.failed_PS].ravel().tolist())
        ((favourite, count),) = every.most_common(1)
        self.most_retrieved[where["gallery"]][where["evaluator"]] = (self.captions[favourite], count / every.total())
        for place, prompt in enumerate(self.prompts):
            nearest = Counter(found["nearest"][place][~self.failed_PS[place]].ravel().tolist())
            total = nearest.total()
            del nearest[place]
            for other, count in nearest.most_common(1):
                if count / total >= 0.2:
                    names = {"prompt": prompt.id, "text": prompt.text, "caption": self.captions[other]}
                    self.lists["confusions"].append(Confusion(share=count / total, **names, **where))
            self.lines += [self.line(found, place, s, where) for s in range(S)]

    def line(self, found: dict[str, np.ndarray], place: int, s: int, where: dict[str, Any]) -> dict[str, Any]:
        prompt = self.prompts[place]
        line: dict[str, Any] = {"id": prompt.id, "seed": s, "groups": "|".join(prompt.groups), "text": prompt.text}
        line |= where | {metric: f"{found[metric][place, s].mean():.6g}" for metric in ("r@1", "r@5", "r@10", "mrr")}
        if self.failed_PS[place, s]:
            kinds = {(failure.id, failure.seed): failure.kind for failure in FAILURES}
            return line | {"failure": kinds[prompt.id, s]}
        line |= {metric: f"{found[metric][place, s].mean():.6g}" for metric in ("rank", "cosine", "margin")}
        ((nearest, _),) = Counter(found["nearest"][place, s].tolist()).most_common(1)
        return line | {"nearest": self.captions[nearest]}

    def add_two_way(self, evaluator: str) -> None:
        groups = product(SHADINGS, KINDS, (("generated", S, 0.8), ("true renders", 1, 0.97)), self.masks.items())
        for shading, kind, (row, n_seeds, skill), (group, mask) in groups:
            blind = (evaluator, kind) == BLIND
            won_PS = self.rng.uniform(size=(int(mask.sum()), n_seeds)) < (0.5 if blind else skill)
            accuracy = interval(won_PS[..., None].astype(float))
            names = {"row": row, "evaluator": evaluator, "shading": shading, "kind": kind, "group": group}
            self.lists["two_way"].append(TwoWay(accuracy=accuracy, **names))


@cache
def simulate(seed: int) -> Simulation:
    return Simulation(seed)


def make_results(lists: dict[str, Any], **changes: Any) -> Results:
    """The results of a simulation's lists; `changes` replace fields."""
    evaluators = [
        EvaluatorRecord(
            name=EVALUATORS[0],
            hash="b32" + "5" * 61,
            weights="ViT-B-32-quickgelu.safetensors",
            family="open_clip",
            architecture="ViT-B-32-quickgelu",
            pretraining="openai",
            image_size=224,
            context_length=77,
            independence="independent",
            truncated=["obj-003"],
        ),
        EvaluatorRecord(
            name=EVALUATORS[1],
            hash="a14" + "9" * 61,
            weights="ViT-L-14.safetensors",
            family="open_clip",
            architecture="ViT-L-14",
            pretraining="openai",
            image_size=224,
            context_length=77,
            independence="same weights",
            notes=["the pipeline was conditioned on these very weights"],
        ),
    ]
    first = next(score for score in lists["scores"] if score.row == "generated")
    headline = Headline(
        evaluator=first.evaluator, shading=first.shading, gallery=first.gallery, r_at_1=first.metrics["r@1"]
    )
    fields: dict[str, Any] = {
        "date": "2026-03-14T09:26:53+00:00",
        "partial": False,
        "headline": headline,
        "protocol": {
            "name": "default-v1",
            "hash": "c0ffee" + "1" * 58,
            "azimuths_deg": AZIMUTHS,
            "elevation_deg": 20.0,
            "image_size": 224,
            "background": "white",
            "aggregation": "mean over views",
            "caption_template": "{}",
        },
        "prompts": {"source": "prompts/<shapes>.jsonl", "count": P, "hash": "beef" + "2" * 60},
        "inputs": {
            "kind": "meshes",
            "source": "runs/generated & kept",
            "seeds": list(range(S)),
            "objects": P * S,
            "extra": ["obj-900", "obj-<901>"],
            "duplicates": [["obj-010/0", "obj-010/1"]],
        },
        "evaluators": evaluators,
        "failures": list(FAILURES),
        "published": [
            Published(system="Point-E 1B", evaluator="ViT-L-14", r_at_1=46.8, source="Shap-E, table 2", note="of 153"),
            Published(system="Shap-E 300M, <text>", evaluator="ViT-L-14", r_at_1=40.9, source="Shap-E, table 2"),
        ],
        "timings_s": {"generate": 0.0, "render": 92.5, "embed": 41.25, "score": 3.5, "all": 138.0},
        "notes": ["a note with <i>markup</i> & more"],
        "environment": {"python": "3.11.7", "platform": "Linux", "torch": "2.13.0", "open_clip_torch": "3.3.0"},
        **lists,
    }
    return Results(**{**fields, **changes})


def picture(prompt: Prompt, seed: int) -> np.ndarray:
    """The bytes of a small WebP picture of the prompt's first shape; another seed, another place."""
    image = Image.new("RGB", (96, 96), "white")
    draw, shift = ImageDraw.Draw(image), 5 * seed
    box = (22 + shift, 24, 74 + shift, 76)
    if prompt.shape == "ball":
        draw.ellipse(box, fill=prompt.colour, outline="grey")
    elif prompt.shape == "ring":
        draw.ellipse(box, outline=prompt.colour, width=12)
    elif prompt.shape == "cone":
        draw.polygon([(48 + shift, 18), (78, 78), (18, 78)], fill=prompt.colour, outline="grey")
    else:
        draw.rounded_rectangle(box, radius=3 if prompt.shape == "cube" else 18, fill=prompt.colour, outline="grey")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def make_folder(folder: Path, *, thumbnails: bool = True, seed: int = 0, **changes: Any) -> Results:
    """Write results.json, per_prompt.csv and thumbnails.npz into `folder`; `changes` replace fields of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    simulation = simulate(seed)
    results = make_results(simulation.lists, **changes)
    write_json(folder / "results.json", results.to_json())
    with open(folder / "per_prompt.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, PER_PROMPT, lineterminator="\n")
        writer.writeheader()
        writer.writerows(simulation.lines)
    if thumbnails:
        failed = {(failure.id, failure.seed) for failure in FAILURES}
        pictures = {}
        for prompt in make_prompts():
            pictures[f"true renders/{prompt.id}/0"] = picture(prompt, 0)
            for s in range(S):
                if (prompt.id, s) not in failed:
                    pictures[f"generated/{prompt.id}/{s}"] = picture(prompt, s + 1)
        np.savez(folder / "thumbnails.npz", **pictures)
    return results
