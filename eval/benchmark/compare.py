"""Two runs, or several, on the prompts they share: which is better, by how much, and whether that can be known.

Each run is the folder of an R-precision run. The first, A, is compared with each of the others, prompt by prompt, after
it is clear that both were scored the same way.

Shapes: P prompts that both runs have, S seeds of a run (the most that a prompt has; NaN where one is missing).
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import UserError
from ...files import write_json
from .schema import METRICS, PER_PROMPT, Independence, Results, read_results
from .statistics import PairedDifference, holm, mcnemar, paired_bootstrap

__all__ = ["FORMAT", "Comparison", "Comparisons", "McNemar", "Outcome", "Scored", "compare"]

FORMAT = "shapeloom-compare/1"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHARES = ("r@1", "r@5", "r@10", "mrr")  # in [0, 1], and no object is without one
N_EXTREME = 5
WIDTH_IN_A_FILE = 140


@dataclass(frozen=True)
class Scored:
    """What is compared: a metric of the generated objects by one evaluator, in one shading, gallery and group."""

    metric: str
    evaluator: str
    shading: str
    gallery: str
    group: str


@dataclass(frozen=True)
class Outcome:
    """A prompt's mean over its seeds, in A and in the other run."""

    id: str
    text: str
    a: float
    b: float


@dataclass(frozen=True)
class McNemar:
    """Prompts that are right (by more than half of their seeds) in one run alone.

    won: right in B alone; lost: right in A alone; halves: at exactly half of their seeds in one run, left out.
    p: exact, two-sided; p_holm: adjusted for the number of runs compared with A.
    """

    won: int
    lost: int
    halves: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Of A with one other run. Numbers are as in results.json: shares and cosines, not percent.

    a_mean, b_mean: over the prompts that are compared.
    p_holm: the difference's p_value, adjusted for the number of runs compared with A.
    mcnemar: None for metrics by which a prompt is not right or wrong.
    without_value: shared prompts left out because all their objects failed in one run, so that they have no cosine.
    lost_most, won_most: the prompts that changed most for the worse and for the better, at most five.
    """

    b: str
    a_mean: float
    b_mean: float
    difference: PairedDifference
    p_holm: float
    mcnemar: McNemar | None
    only_in_a: int
    only_in_b: int
    without_value: int
    verdict: str
    lost_most: list[Outcome]
    won_most: list[Outcome]


@dataclass(frozen=True)
class Comparisons:
    """What `compare` finds.

    hashes: of the protocol, gallery, evaluator and set of prompts that the runs have in common.
    leaks: runs whose system was conditioned by what judges it, and how.
    """

    a: str
    scored: Scored
    hashes: dict[str, str]
    comparisons: list[Comparison]
    leaks: dict[str, Independence] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def has_worse(self, points: float) -> bool:
        """Whether a run is surely worse than A by more than so many percentage points."""
        return any(one.difference.hi < -points / 100 for one in self.comparisons)


def compare(
    runs: Sequence[str | Path],
    *,
    metric: str = "r@1",
    evaluator: str | None = None,
    shading: str | None = None,
    gallery: str | None = None,
    group: str = "all",
    allow_partial: bool = False,
    out: str | Path | None = None,
) -> Comparisons:
    """Compare the first run with each of the others, print what is found, and write it to `out`.

    Args:
        runs: folders with results.json and per_prompt.csv; two or more.
        evaluator, shading, gallery: None takes the first run's headline, or its first score where it has none.
        group: "all", or a group of prompts.
        allow_partial: take runs of `--limit` too.
    Raises: UserError for runs that were not scored the same way, lack what is asked for, share fewer than two prompts,
        or have a damaged file.
    """
    if not 2 <= len(runs) <= len(LETTERS):
        raise UserError(f"give two to {len(LETTERS)} run folders to compare, got {len(runs)}")
    if metric not in METRICS:
        raise UserError(f"--metric {metric!r} is not known; there are {', '.join(METRICS)}")
    folders = [Path(run) for run in runs]
    results = [read_results(folder) for folder in folders]
    scored = _choose(folders[0], results[0], metric, (evaluator, shading, gallery), group)
    identity = _check_the_same(folders, results, scored, allow_partial)
    a_prompts, *others = (
        _read_prompts(folder, result, _by_its_name(scored, results[0], result))
        for folder, result in zip(folders, results)
    )
    pairs = [_pair(folders[0], folder, a_prompts, prompts) for folder, prompts in zip(folders[1:], others)]
    hashes = {what: hash_ for what, (_, hash_) in identity.items()}
    leaks = {
        str(folder): leak
        for folder, result in zip(folders, results)
        if (leak := _leaks(result, _by_its_name(scored, results[0], result)))
    }
    found = Comparisons(str(folders[0]), scored, hashes, _compare(pairs, metric), leaks)
    if out is not None:
        write_json(out, found.to_json())
    _print(found)
    return found


# --- were they scored the same way? ----------------------------------------------------------------------------------


def _choose(folder: Path, results: Results, metric: str, asked: Sequence[str | None], group: str) -> Scored:
    """What the user asks for, filled up from A's headline, or from its first score where it has none."""
    if not results.scores:
        raise UserError(f"{folder} holds no scores, so there is nothing to compare")
    headline, first = results.headline, results.scores[0]
    evaluator, shading, gallery = (
        name or getattr(headline, what) or getattr(first, what)
        for name, what in zip(asked, ("evaluator", "shading", "gallery"))
    )
    return Scored(metric, evaluator, shading, gallery, group)


def _check_the_same(
    folders: Sequence[Path], results: Sequence[Results], scored: Scored, allow_partial: bool
) -> dict[str, tuple[str, str]]:
    """Name and hash of what made the numbers. Raises UserError where runs differ in it, or a run is partial."""
    identities = [
        _identity(folder, result, _by_its_name(scored, results[0], result)) for folder, result in zip(folders, results)
    ]
    for folder, result, identity in zip(folders, results, identities):
        if result.partial and not allow_partial:
            raise UserError(
                f"{folder} is a partial run (--limit), which is comparable to nothing: score all of its prompts, or "
                "add --allow-partial"
            )
        for what, (name, hash_) in identity.items():
            a_name, a_hash = identities[0][what]
            if hash_ != a_hash:
                raise UserError(
                    f"{folders[0]} and {folder} cannot be compared, their {what} differs ({a_name} {a_hash[:12]} and "
                    f"{name} {hash_[:12]}): score both with the same"
                )
    return identities[0]


def _identity(folder: Path, results: Results, scored: Scored) -> dict[str, tuple[str, str]]:
    """Name and hash of what made the run's numbers. Raises UserError where the run lacks what is compared."""
    wanted = (scored.evaluator, scored.shading, scored.gallery)
    scores = [score for score in results.scores if score.row == "generated"]
    there = [(score.evaluator, score.shading, score.gallery) for score in scores]
    for place, what in enumerate(("evaluator", "shading", "gallery")):
        if wanted[place] not in (names := [key[place] for key in there]):
            raise UserError(f"{folder} was not scored with the {what} {wanted[place]!r}, it has {_listed(names)}")
    if wanted not in there:
        raise UserError(f"{folder} was not scored with {' + '.join(wanted)}, it has {_listed(map(' + '.join, there))}")
    groups = [score.group for score, key in zip(scores, there) if key == wanted]
    if scored.group not in groups:
        raise UserError(f"{folder} has no group of prompts {scored.group!r}, it has {_listed(groups)}")
    of_gallery = {record.name: record.hash for record in results.galleries}
    of_evaluator = {record.name: record.hash for record in results.evaluators}
    return {
        "protocol": (str(results.protocol.get("name", "")), str(results.protocol.get("hash", ""))),
        "gallery": (scored.gallery, of_gallery.get(scored.gallery, "")),
        "evaluator": (scored.evaluator, of_evaluator.get(scored.evaluator, "")),
        "set of prompts": (str(results.prompts.get("source", "")), str(results.prompts.get("hash", ""))),
    }


def _by_its_name(scored: Scored, a: Results, results: Results) -> Scored:
    """What is compared, with the evaluator as this run calls it: one run may have named a folder in another way."""
    hashes = [record.hash for record in a.evaluators if record.name == scored.evaluator]
    names = [record.name for record in results.evaluators if record.hash in hashes]
    return scored if scored.evaluator in names or not names else replace(scored, evaluator=names[0])


def _leaks(results: Results, scored: Scored) -> Independence | None:
    """The evaluator's tie with what conditioned the run's system, where it makes the score no fair one."""
    found = [record.independence for record in results.evaluators if record.name == scored.evaluator]
    return found[0] if found and found[0] in ("same weights", "same pre-training") else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


# --- per_prompt.csv --------------------------------------------------------------------------------------------------


@dataclass
class _Prompt:
    """A prompt's text, and its outcomes in one run by seed; NaN where an object that failed has none."""

    text: str
    by_seed: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        values = [value for value in self.by_seed.values() if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan


def _read_prompts(folder: Path, results: Results, scored: Scored) -> dict[str, _Prompt]:
    """A run's prompts of the group by id, in the order of its file. Raises UserError naming line and column."""
    path = (folder if folder.is_dir() else folder.parent) / "per_prompt.csv"
    wanted = (scored.evaluator, scored.shading, scored.gallery)
    prompts: dict[str, _Prompt] = {}
    for line, row in _rows(path):
        if (row["evaluator"], row["shading"], row["gallery"]) != wanted:
            continue
        if scored.group not in ("all", *row["groups"].split("|")):
            continue
        if not (row["seed"].isascii() and row["seed"].isdigit()):
            raise _damaged(path, line, "seed", f"{row['seed']!r} is no seed")
        prompt, seed = prompts.setdefault(row["id"], _Prompt(row["text"])), int(row["seed"])
        if seed in prompt.by_seed:
            raise _damaged(path, line, "seed", f"seed {seed} of prompt {row['id']!r} stands there twice")
        prompt.by_seed[seed] = _outcome(path, line, scored.metric, row[scored.metric])
    key = ("generated", *wanted, scored.group)
    for score in results.scores:
        if (score.row, score.evaluator, score.shading, score.gallery, score.group) == key:
            counted = score.metrics["r@1"].prompts
            if counted != len(prompts):
                raise UserError(
                    f"{path} has {len(prompts)} prompts of what is compared, but results.json beside it counts "
                    f"{counted}: one of them is damaged, score the run again"
                )
    return prompts


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line number, column -> cell) of a per_prompt.csv."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: score the run again") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8: score the run again") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = next(reader, [])
        for place, column in enumerate(PER_PROMPT):
            if head[place : place + 1] != [column]:
                raise _damaged(path, 1, column, f"{''.join(head[place : place + 1])!r} stands in its place")
        for cells in reader:
            if len(cells) != len(PER_PROMPT):
                last = PER_PROMPT[min(max(len(cells), 1), len(PER_PROMPT)) - 1]
                raise _damaged(path, reader.line_num, last, f"{len(cells)} cells instead of {len(PER_PROMPT)}")
            yield reader.line_num, dict(zip(PER_PROMPT, cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is damaged ({error}): score the run again") from None


def _outcome(path: Path, line: int, metric: str, cell: str) -> float:
    if cell == "" and metric not in SHARES:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (0 <= value <= 1 if metric in SHARES else math.isfinite(value)):
        raise _damaged(path, line, metric, f"{cell!r} is no {metric}")
    return value


def _damaged(path: Path, line: int, column: str, what: str) -> UserError:
    return UserError(f"{path}, line {line}, column {column}: {what}; the file is damaged, score the run again")


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Outcomes of A and another run on the prompts for which both have a value."""

    b: str
    outcomes: list[Outcome]
    only_in_a: int
    only_in_b: int
    without_value: int

    def means(self, run: str) -> np.ndarray:
        return np.array([getattr(outcome, run) for outcome in self.outcomes])


def _pair(a_folder: Path, b_folder: Path, a: Mapping[str, _Prompt], b: Mapping[str, _Prompt]) -> _Pair:
    """Pair two runs' prompts by id, in A's order."""
    shared = [id_ for id_ in a if id_ in b]
    for id_ in shared:
        if a[id_].text != b[id_].text:
            raise UserError(
                f"prompt {id_!r} is {a[id_].text!r} in {a_folder} and {b[id_].text!r} in {b_folder}: compare runs of "
                "one list of prompts"
            )
    every = [Outcome(id_, a[id_].text, a[id_].mean, b[id_].mean) for id_ in shared]
    outcomes = [one for one in every if not math.isnan(one.a + one.b)]
    if len(outcomes) < 2:
        raise UserError(
            f"{a_folder} and {b_folder} have {len(outcomes)} prompt(s) in common that can be compared: compare runs of "
            "one list of prompts"
        )
    return _Pair(str(b_folder), outcomes, len(a) - len(shared), len(b) - len(shared), len(every) - len(outcomes))


def _compare(pairs: Sequence[_Pair], metric: str) -> list[Comparison]:
    differences = [paired_bootstrap(pair.means("a")[:, None], pair.means("b")[:, None]) for pair in pairs]
    adjusted = holm([difference.p_value for difference in differences])
    changes = _mcnemars(pairs) if metric.startswith("r@") else [None] * len(pairs)
    comparisons = []
    for letter, pair, difference, p_holm, changed in zip(LETTERS[1:], pairs, differences, adjusted, changes):
        by_change = sorted(pair.outcomes, key=lambda one: one.b - one.a)
        comparisons.append(
            Comparison(
                b=pair.b,
                a_mean=float(pair.means("a").mean()),
                b_mean=float(pair.means("b").mean()),
                difference=difference,
                p_holm=p_holm,
                mcnemar=changed,
                only_in_a=pair.only_in_a,
                only_in_b=pair.only_in_b,
                without_value=pair.without_value,
                verdict=_verdict(letter, difference, p_holm, len(pairs)),
                lost_most=[one for one in by_change[:N_EXTREME] if one.b < one.a],
                won_most=[one for one in by_change[: -N_EXTREME - 1 : -1] if one.b > one.a],
            )
        )
    return comparisons


def _mcnemars(pairs: Sequence[_Pair]) -> list[McNemar]:
    counts = []
    for pair in pairs:
        a_P, b_P = pair.means("a"), pair.means("b")
        clear_P = (a_P != 0.5) & (b_P != 0.5)
        right = a_P[clear_P] > 0.5, b_P[clear_P] > 0.5
        counts.append((int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()), int((~clear_P).sum()),
                       mcnemar(*right)))  # fmt: skip
    return [McNemar(*count, p_holm) for count, p_holm in zip(counts, holm([count[-1] for count in counts]))]


def _verdict(letter: str, difference: PairedDifference, p_holm: float, n_compared: int) -> str:
    """One plain sentence."""
    prompts = f"{difference.prompts} prompts"
    if difference.discordant == 0:
        return f"{letter} and A score the same on every one of these {prompts}"
    differs = difference.lo > 0 or difference.hi < 0
    if differs and (n_compared == 1 or p_holm < 0.05):
        lo, hi = sorted((100 * abs(difference.lo), 100 * abs(difference.hi)))
        better = "better" if difference.mean > 0 else "worse"
        return f"{letter} is {better} than A by {100 * abs(difference.mean):.1f} points ({lo:.1f} to {hi:.1f})"
    among = f" among {n_compared} comparisons" if differs else ""
    return (
        f"{letter} and A cannot be told apart{among}: with these {prompts} a difference below "
        f"{100 * difference.smallest_detectable:.1f} points stays unseen"
    )


# --- what is printed -------------------------------------------------------------------------------------------------


def _print(found: Comparisons) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_FILE)

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    scored, compared = found.scored, found.comparisons
    for letter, folder in zip(LETTERS, [found.a, *(one.b for one in compared)]):
        tell(f"{letter} = {folder}")
    console.print(_table(scored, compared))
    if any(one.mcnemar for one in compared):
        tell(
            "McNemar: a prompt is right if more than half of its seeds are; one at exactly half in A or B is left out."
        )
    if len(compared) > 1:
        tell(f"p values are adjusted for {len(compared)} comparisons (Holm).")
    for letter, one in zip(LETTERS[1:], compared):
        left_out = {
            "that only A has": one.only_in_a,
            f"that only {letter} has": one.only_in_b,
            f"whose objects all failed in A or {letter}, so that they have no {scored.metric}": one.without_value,
        }
        for what, count in left_out.items():
            if count:
                tell(f"{letter}: left out {count} prompt(s) {what}.")
        for title, outcomes in (("lost most", one.lost_most), ("won most", one.won_most)):
            if outcomes:
                console.print(_extremes(f"{letter} {title}", letter, outcomes))
    for folder, leak in found.leaks.items():
        tell(
            f"{folder}: the evaluator has its conditioner's {leak.removeprefix('same ')}, so the score is no fair one."
        )
    for one in compared:
        tell(f"{one.verdict}.")


def _table(scored: Scored, compared: Sequence[Comparison]) -> Table:
    where = f"{scored.metric}, {scored.evaluator}, {scored.shading}, {scored.gallery}, {scored.group} prompts"
    table = Table(title=escape(f"{where}: percent, and difference in points"), title_justify="left", title_style="bold")
    for column in ("", "prompts", "A", "other", "difference (95 %)", "p", "McNemar's p", "won : lost", "at half",
                   "smallest detectable"):  # fmt: skip
        table.add_column(column, justify="right" if column else "left")
    for letter, one in zip(LETTERS[1:], compared):
        d, changed = one.difference, one.mcnemar
        table.add_row(
            f"{letter} - A",
            str(d.prompts),
            f"{100 * one.a_mean:.1f}",
            f"{100 * one.b_mean:.1f}",
            f"{100 * d.mean:+.1f} ({100 * d.lo:+.1f} to {100 * d.hi:+.1f})",
            f"{one.p_holm:.3f}",
            *((f"{changed.p_holm:.3f}", f"{changed.won} : {changed.lost}", str(changed.halves)) if changed else "–––"),
            f"{100 * d.smallest_detectable:.1f}" if d.discordant else "–",
        )
    return table


def _extremes(title: str, letter: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("id", "A", letter):
        table.add_column(column, justify="left" if column == "id" else "right")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for one in outcomes:
        table.add_row(escape(one.id), f"{100 * one.a:.0f}", f"{100 * one.b:.0f}", escape(one.text))
    return table
