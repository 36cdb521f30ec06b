"""What `results.json` of an R-precision run holds, field by field; `docs/evaluation.md` has the same in words.

Every score stands under the names of what decided it: row (whose objects), evaluator, shading, gallery and group of
prompts. `per_prompt.csv` beside it has one line for each evaluator, shading, gallery and (object, seed) of the row
"generated"; see `PER_PROMPT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UserError
from ...files import read_json

__all__ = [
    "FORMAT",
    "METRICS",
    "PER_PROMPT",
    "AzimuthCurve",
    "Confusion",
    "EvaluatorRecord",
    "Failure",
    "GalleryRecord",
    "Headline",
    "Interval",
    "Published",
    "RankHistogram",
    "Results",
    "Score",
    "TwoWay",
    "Variance",
    "read_results",
]

FORMAT: Final = "shapeloom-r-precision/2"
METRICS = ("r@1", "r@5", "r@10", "mrr", "cosine", "margin")

# The columns of per_prompt.csv. Of an object that failed, the scores r@k and mrr are 0 and the rest is empty.
PER_PROMPT = (
    "evaluator", "shading", "gallery", "id", "seed", "groups", "text", "failure", "r@1", "r@5", "r@10", "mrr", "rank",
    "cosine", "margin", "nearest",
)  # fmt: skip

Independence = Literal["independent", "same architecture", "same pre-training", "same weights", "unknown"]
Shading = Literal["colour", "textureless"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


class Interval(_Record):
    """A mean over prompts (of the mean over their seeds) with its 95 % interval."""

    mean: float
    lo: float
    hi: float
    prompts: int
    seeds: int


class Score(_Record):
    """Retrieval scores of one row. `metrics`: "r@1", "r@5", "r@10", "mrr" in [0, 1], "cosine" and "margin" in [-1, 1].

    row: "generated", or a control: "true renders", "reconstructions", "conditioning images", "shuffled prompts",
        "blank object", "grey sphere", "chance" (which has no cosine and no margin).
    group: "all", or a group of prompts.
    """

    row: str
    evaluator: str
    shading: Shading
    gallery: str
    group: str
    metrics: dict[str, Interval]


class TwoWay(_Record):
    """How often an object is nearer to its caption than to a swap of it; chance is 1/2.

    kind: of the swap ("parts", "relation", "colors", "shapes", …), or "order", "binding", "any".
    """

    row: str
    evaluator: str
    shading: Shading
    kind: str
    group: str
    accuracy: Interval


class AzimuthCurve(_Record):
    """R@1 of the single views, in the order of the protocol's cameras; of protocols with several views."""

    row: str
    evaluator: str
    shading: Shading
    gallery: str
    azimuths_deg: list[float]
    r_at_1: list[float] = Field(alias="r@1")


class RankHistogram(_Record):
    """How many generated objects' own caption stood at which rank; objects that failed are the last entry of `counts`.

    edges: upper rank of each bin (inclusive), rising; one less than there are counts.
    """

    evaluator: str
    shading: Shading
    gallery: str
    edges: list[int]
    counts: list[int]


class Confusion(_Record):
    """Objects of one prompt whose nearest caption was another one: `share` of the prompt's objects and views.

    caption: the one that was nearest instead; prompt: an id.
    """

    evaluator: str
    shading: Shading
    gallery: str
    prompt: str
    text: str
    caption: str
    share: float


class Variance(_Record):
    """Of R@1 of the generated objects in all prompts: what prompts, and what seeds of one prompt, add to the standard
    error (both as variances of the mean; the sum is its square)."""

    evaluator: str
    shading: Shading
    gallery: str
    between_prompts: float
    between_seeds: float


class GalleryRecord(_Record):
    """A gallery of captions. hash: sha256 of its captions joined by line breaks.

    of_protocol: whether it is the very gallery the protocol asks for; None where the protocol names none.
    most_retrieved: the caption that most generated objects are nearest to, and the share of them, by evaluator.
    """

    name: str
    size: int
    hash: str
    of_protocol: bool | None = None
    most_retrieved: dict[str, tuple[str, float]] = Field(default_factory=dict)


class EvaluatorRecord(_Record):
    """A CLIP that scored. name: as it was asked for; hash: of weights, preparation of pictures and tokenizer.

    independence: from the conditioner, as far as is known; only "independent" (or "unknown" where no conditioner is
        declared) may make the headline.
    truncated: ids of prompts with more tokens than it reads.
    """

    name: str
    hash: str
    weights: str
    family: str
    architecture: str
    pretraining: str | None = None
    image_size: int
    context_length: int
    independence: Independence
    notes: list[str] = Field(default_factory=list)
    truncated: list[str] = Field(default_factory=list)


class Failure(_Record):
    """An object that counts as a miss. kind: "missing", "empty", "not finite", "unreadable", "timed out", "crashed"."""

    id: str
    seed: int
    kind: str
    reason: str


class Headline(_Record):
    """The one number to quote, or why there is none."""

    evaluator: str | None = None
    shading: Shading | None = None
    gallery: str | None = None
    r_at_1: Interval | None = Field(default=None, alias="r@1")
    reason: str = ""


class Published(_Record):
    """A number of a paper, for context: none of them was measured by this protocol."""

    system: str
    evaluator: str
    r_at_1: float = Field(alias="r@1")  # percent
    source: str
    note: str = ""


class Results(_Record):
    """The whole of results.json.

    partial: `--limit` was given, so that the numbers are comparable to nothing.
    protocol: every setting of it, its "name" and "hash" included.
    inputs: "kind" (meshes, pictures or pipeline), "source", "seeds", "objects", "extra" (ids without a prompt) and
        "duplicates" (groups of objects with the same bytes).
    prompts: "source", "count", "hash".
    timings_s: "generate", "render", "embed", "score", "all"; seconds of wall time of this run, so what a cache held
        took none.
    """

    format: Literal["shapeloom-r-precision/2"] = FORMAT
    date: str
    partial: bool
    headline: Headline
    protocol: dict[str, Any]
    prompts: dict[str, Any]
    inputs: dict[str, Any]
    galleries: list[GalleryRecord]
    evaluators: list[EvaluatorRecord]
    scores: list[Score]
    two_way: list[TwoWay]
    azimuth: list[AzimuthCurve]
    ranks: list[RankHistogram]
    confusions: list[Confusion]
    variance: list[Variance]
    failures: list[Failure]
    published: list[Published]
    timings_s: dict[str, float]
    notes: list[str]
    environment: dict[str, str]

    def score(
        self, row: str, gallery: str, group: str = "all", *, evaluator: str | None = None, shading: Shading = "colour"
    ) -> dict[str, Interval] | None:
        """The metrics of one row, of the headline's (or else the first) evaluator unless another is named."""
        evaluator = evaluator or self.headline.evaluator or self.evaluators[0].name
        for score in self.scores:
            where = (score.row, score.evaluator, score.shading, score.gallery, score.group)
            if where == (row, evaluator, shading, gallery, group):
                return score.metrics
        return None


def read_results(folder: str | Path) -> Results:
    """The results in a run's folder (or in a results.json itself).

    Raises: UserError if there are none, or they are of another format.
    """
    path = Path(folder)
    path = path / "results.json" if path.is_dir() else path
    content = read_json(path, "evaluation results")
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} has the format {found!r}, not {FORMAT!r}: make it again with shapeloom eval r-precision"
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: field {field}: {first['msg']}; make it again with shapeloom eval r-precision"
        ) from None
