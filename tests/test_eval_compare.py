"""`eval compare`: what it refuses, what it finds in runs of known difference, what it prints, how it ends."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from shapeloom.errors import UserError
from shapeloom.eval.benchmark.compare import compare
from shapeloom.eval.benchmark.schema import PER_PROMPT, Results
from shapeloom.eval.benchmark.statistics import holm, mcnemar, paired_bootstrap
from shapeloom.launch.cli import app


def write_run(
    folder, right_PS, *, texts=None, ids=None, groups=None, failed=(), settings=(), cells=None, headline=True
):
    """A run's folder with the outcomes `right_PS` of R@1; the second evaluator has half of every number.

    settings: of results.json, over what is made here; failed: (prompt, seed) places of objects that failed.
    cells: {(row, column): cell} over what per_prompt.csv would hold.
    """
    right_PS = np.asarray(right_PS, float)
    n_prompts, n_seeds = right_PS.shape
    ids = ids or [f"{place:03d}" for place in range(n_prompts)]
    texts = texts or [f"a thing, number {id_}" for id_ in ids]
    groups = groups or ["all"] * n_prompts
    rows, scores = [], []
    for evaluator, factor in (("b32", 1.0), ("b16", 0.5)):
        for place, (id_, text) in enumerate(zip(ids, texts)):
            for seed in range(n_seeds):
                value, miss = repr(float(factor * right_PS[place, seed])), (place, seed) in failed
                scored = ["0.0"] * 4 + [""] * 3 if miss else [value] * 4 + ["1", repr(0.1 + 0.1 * factor), "0.05"]
                object_ = [id_, seed, groups[place], text, "empty" if miss else ""]
                rows.append([evaluator, "colour", "own", *object_, *scored, ""])
        for group in dict.fromkeys(name for joined in groups for name in ["all", *joined.split("|")]):
            count = sum(group == "all" or group in joined.split("|") for joined in groups)
            share = {"mean": 0.5, "lo": 0.4, "hi": 0.6, "prompts": count, "seeds": n_seeds}
            scores.append({"row": "generated", "evaluator": evaluator, "shading": "colour", "gallery": "own",
                           "group": group, "metrics": {"r@1": share}})  # fmt: skip
    judge = {"weights": "w", "family": "f", "architecture": "a", "image_size": 32, "context_length": 77,
             "independence": "independent"}  # fmt: skip
    record = {
        "date": "2026-01-01", "partial": False, "headline": {"reason": ""}, "protocol": {"name": "p", "hash": "1" * 64},
        "prompts": {}, "inputs": {}, "galleries": [{"name": "own", "size": n_prompts, "hash": "2" * 64}],
        "evaluators": [{"name": name, "hash": name * 9, **judge} for name in ("b32", "b16")], "scores": scores,
        "two_way": [], "azimuth": [], "ranks": [], "confusions": [], "variance": [], "failures": [], "published": [],
        "timings_s": {}, "notes": [], "environment": {}, **dict(settings),
    }  # fmt: skip
    if headline:
        record["headline"] = {"evaluator": "b32", "shading": "colour", "gallery": "own", "reason": ""}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(Results.model_validate(record).to_json()))
    for (row, column), cell in (cells or {}).items():
        rows[row][PER_PROMPT.index(column)] = cell
    with open(folder / "per_prompt.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([PER_PROMPT, *rows])
    return folder


def binary(n_right, n=153, n_seeds=1):
    return np.repeat((np.arange(n) < n_right)[:, None], n_seeds, axis=1)


@pytest.fixture
def pair(tmp_path):
    """153 prompts, of which B wins 30 and loses 10."""
    b = binary(60)
    b[50:60], b[100:130] = False, True
    return write_run(tmp_path / "old", binary(60)), write_run(tmp_path / "new", b), binary(60), b


def test_the_numbers_are_those_of_statistics(pair):
    a, b, a_PS, b_PS = pair
    found = compare([a, b])
    one = found.comparisons[0]
    assert one.difference == paired_bootstrap(a_PS.astype(float), b_PS.astype(float))
    assert (one.a_mean, one.b_mean) == pytest.approx((60 / 153, 80 / 153))
    assert (one.mcnemar.won, one.mcnemar.lost, one.mcnemar.halves) == (30, 10, 0)
    assert one.mcnemar.p == one.mcnemar.p_holm == mcnemar(a_PS[:, 0], b_PS[:, 0]) < 0.01
    assert one.p_holm == one.difference.p_value
    assert one.verdict.startswith("B is better than A by 13.1 points (")
    assert compare([b, a]).comparisons[0].verdict.startswith("B is worse than A by 13.1 points (")
    assert [o.id for o in one.lost_most] == ["050", "051", "052", "053", "054"] and len(one.won_most) == 5
    assert all((o.a, o.b) == (0, 1) and o.text == f"a thing, number {o.id}" for o in one.won_most)


def test_a_run_and_itself(pair):
    one = compare([pair[0], pair[0]]).comparisons[0]
    assert (one.difference.lo, one.difference.hi, one.difference.p_value, one.mcnemar.p) == (0, 0, 1, 1)
    assert one.verdict == "B and A score the same on every one of these 153 prompts"
    assert one.lost_most == one.won_most == []


def test_a_difference_within_the_noise_is_told_so(tmp_path):
    b = binary(60)
    b[52:60], b[60:72] = False, True
    one = compare([write_run(tmp_path / "a", binary(60)), write_run(tmp_path / "b", b)]).comparisons[0]
    expected = 100 * one.difference.smallest_detectable
    assert one.verdict == (
        f"B and A cannot be told apart: with these 153 prompts a difference below {expected:.1f} points stays unseen"
    )
    assert expected == pytest.approx(2.8016 * np.sqrt(20 / 153 / 153) * 100, abs=0.1)


def test_seeds_are_averaged_and_halves_leave_mcnemar(tmp_path):
    a = write_run(tmp_path / "a", [[1, 0], [1, 1], [0, 0], [0, 0]])
    b = write_run(tmp_path / "b", [[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]])  # another number of seeds
    one = compare([a, b]).comparisons[0]
    assert one.difference.mean == pytest.approx((0.5 - 2 / 3 + 2 / 3 + 0) / 4) and one.difference.discordant == 3
    assert (one.mcnemar.won, one.mcnemar.lost, one.mcnemar.halves) == (1, 1, 1)
    assert [(o.id, o.a, o.b) for o in one.lost_most] == [("001", 1.0, pytest.approx(1 / 3))]


def test_several_runs_are_adjusted_for_their_number(tmp_path, pair, capsys):
    a, b, a_PS, b_PS = pair
    c_PS = binary(60)
    c_PS[60:66] = True
    found = compare([a, b, write_run(tmp_path / "c", c_PS)])
    raw = [one.difference.p_value for one in found.comparisons]
    assert [one.p_holm for one in found.comparisons] == holm(raw)
    exact = [mcnemar(a_PS[:, 0], other[:, 0]) for other in (b_PS, c_PS)]
    assert [one.mcnemar.p_holm for one in found.comparisons] == pytest.approx(holm(exact)) != pytest.approx(exact)
    assert found.comparisons[1].verdict.startswith("C ")
    assert "adjusted for 2 comparisons (Holm)" in capsys.readouterr().out


def test_what_adjusting_takes_away_is_not_claimed(tmp_path):
    a, rng = write_run(tmp_path / "a", binary(60)), np.random.default_rng(0)
    b_PS = binary(60)
    b_PS[48:60], b_PS[60:85] = False, True  # p is about 0.03
    others = [write_run(tmp_path / "b", b_PS)]
    for name in "cde":
        noise = binary(60)
        noise[rng.permutation(153)[:20]] ^= True
        others.append(write_run(tmp_path / name, noise))
    assert compare([a, others[0]]).comparisons[0].verdict.startswith("B is better")
    one = compare([a, *others]).comparisons[0]
    assert one.difference.lo > 0 and one.p_holm > 0.05
    assert one.verdict.startswith("B and A cannot be told apart among 4 comparisons: ")


def test_the_file_holds_what_is_found(pair, tmp_path):
    found = compare(pair[:2], out=tmp_path / "deep" / "c.json")
    written = json.loads((tmp_path / "deep" / "c.json").read_text())
    assert written == found.to_json() and written["format"] == "shapeloom-compare/1"
    assert list(written["scored"].values()) == ["r@1", "b32", "colour", "own", "all"]
    assert written["hashes"] == {
        "protocol": "1" * 64,
        "gallery": "2" * 64,
        "evaluator": "b32" * 9,
        "set of prompts": "",
    }
    assert written["comparisons"][0]["difference"]["discordant"] == 40


def test_other_evaluators_groups_and_metrics(tmp_path, pair):
    a, b, *_ = pair
    assert compare([a, b], evaluator="b16").comparisons[0].difference.mean == pytest.approx(10 / 153)
    mrr = compare([a, b], metric="mrr").comparisons[0]
    assert mrr.mcnemar is None and mrr.difference == compare([a, b]).comparisons[0].difference
    groups = ["animals|pairs"] * 2 + ["pairs"] * 3
    c, d = (write_run(tmp_path / n, [[x], [0], [1], [1], [1]], groups=groups) for n, x in (("c", 0), ("d", 1)))
    one = compare([c, d], group="animals").comparisons[0]
    assert one.difference.prompts == 2 and one.difference.mean == 0.5
    assert compare([c, d], group="pairs").comparisons[0].difference.prompts == 5


def test_without_a_headline_the_first_score_is_taken(tmp_path):
    runs = [write_run(tmp_path / name, binary(3, 9), headline=False) for name in "ab"]
    assert compare(runs).scored.evaluator == "b32"


def test_failed_objects_count_as_misses_and_have_no_cosine(tmp_path, capsys):
    a = write_run(tmp_path / "a", np.ones((4, 2)))
    b = write_run(tmp_path / "b", np.ones((4, 2)), failed={(0, 0), (0, 1), (1, 1)})
    assert compare([a, b]).comparisons[0].difference.mean == pytest.approx(-1.5 / 4)
    one = compare([a, b], metric="cosine").comparisons[0]
    assert (one.without_value, one.difference.prompts, one.difference.mean) == (1, 3, 0)
    assert (
        "left out 1 prompt(s) whose objects all failed in A or B, so that they have no cosine"
        in capsys.readouterr().out
    )


def test_prompts_of_one_run_alone_are_counted_and_told(tmp_path, capsys):
    a = write_run(tmp_path / "a", binary(2, 5), ids=list("vwxyz"))
    b = write_run(tmp_path / "b", binary(2, 4), ids=list("zyxu"))
    one = compare([a, b]).comparisons[0]
    assert (one.only_in_a, one.only_in_b, one.difference.prompts) == (2, 1, 3)
    said = capsys.readouterr().out
    assert "B: left out 2 prompt(s) that only A has." in said and "B: left out 1 prompt(s) that only B has." in said


PROTOCOL = {"protocol": {"name": "q", "hash": "9" * 64}}
GALLERY = {"galleries": [{"name": "own", "size": 9, "hash": "f" * 64}]}


@pytest.mark.parametrize(
    ("of_b", "options", "message"),
    [
        ({"settings": PROTOCOL}, {}, r"their protocol differs \(p 1{12} and q 9{12}\)"),
        ({"settings": GALLERY}, {}, r"their gallery differs \(own 2{12} and own f{12}\)"),
        ({"settings": {"partial": True}}, {}, "b is a partial run .* --allow-partial"),
        ({}, {"evaluator": "l14"}, "a was not scored with the evaluator 'l14', it has b32, b16"),
        ({}, {"shading": "textureless"}, "a was not scored with the shading 'textureless', it has colour"),
        ({}, {"gallery": "coco"}, "a was not scored with the gallery 'coco', it has own"),
        ({}, {"group": "cars"}, "a has no group of prompts 'cars', it has all"),
        ({}, {"metric": "r@2"}, "--metric 'r@2' is not known; there are r@1, r@5, r@10, mrr, cosine, margin"),
        ({"settings": {"scores": []}}, {}, "b was not scored with the evaluator 'b32', it has none"),
        ({"ids": [f"x{i}" for i in range(9)]}, {}, "have 0 prompt"),
        ({"texts": ["another"] * 9}, {}, "prompt '000' is 'a thing, number 000' in .*a and 'another' in .*b"),
        ({"cells": {(4, "r@1"): "abc"}}, {}, r"b/per_prompt.csv, line 6, column r@1: 'abc' is no r@1"),
        ({"cells": {(4, "r@1"): ""}}, {}, r"line 6, column r@1: '' is no r@1"),
        ({"cells": {(4, "r@1"): "1.5"}}, {}, r"line 6, column r@1: '1.5' is no r@1"),
        ({"cells": {(4, "cosine"): "nan"}}, {"metric": "cosine"}, r"line 6, column cosine: 'nan' is no cosine"),
        ({"cells": {(4, "seed"): "one"}}, {}, "line 6, column seed: 'one' is no seed"),
        ({"cells": {(4, "id"): "000"}}, {}, "line 6, column seed: seed 0 of prompt '000' stands there twice"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, of_b, options, message):
    a, b = write_run(tmp_path / "a", binary(3, 9)), write_run(tmp_path / "b", binary(4, 9), **of_b)
    with pytest.raises(UserError, match=message):
        compare([a, b], **options)


def test_other_weights_of_an_evaluator_are_refused(tmp_path):
    a, b = write_run(tmp_path / "a", binary(3, 9)), write_run(tmp_path / "b", binary(4, 9))
    record = json.loads((b / "results.json").read_text())
    record["evaluators"][1]["hash"] = "c" * 64
    (b / "results.json").write_text(json.dumps(record))
    compare([a, b])  # not the one compared
    with pytest.raises(UserError, match="their evaluator differs"):
        compare([a, b], evaluator="b16")


def test_an_evaluator_is_the_same_by_its_hash_whatever_it_was_called(tmp_path):
    a, b = write_run(tmp_path / "a", binary(60)), write_run(tmp_path / "b", binary(60))
    for path in (b / "results.json", b / "per_prompt.csv"):
        path.write_text(path.read_text().replace('"b32"', '"./b32/"').replace("b32,", "./b32/,"))
    assert compare([a, b], evaluator="b32").comparisons[0].difference.mean == 0
    with pytest.raises(UserError, match="'b32'"):
        compare([b, a], evaluator="b32")  # A has none of that name


def test_other_prompts_behind_equal_captions_are_refused(tmp_path):
    a = write_run(tmp_path / "a", binary(60), settings={"prompts": {"source": "p.jsonl", "hash": "1" * 64}})
    b = write_run(tmp_path / "b", binary(60), settings={"prompts": {"source": "q.jsonl", "hash": "2" * 64}})
    with pytest.raises(UserError, match="their set of prompts differs"):
        compare([a, b])


def test_a_judge_that_leaked_is_told(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", binary(60)), write_run(tmp_path / "b", binary(90))
    path = b / "results.json"
    path.write_text(path.read_text().replace("independent", "same weights"))
    found = compare([a, b])
    assert found.leaks == {str(b): "same weights"}
    assert f"{b}: the evaluator has its conditioner's weights" in capsys.readouterr().out


def test_partial_runs_are_taken_on_demand(tmp_path):
    runs = [write_run(tmp_path / name, binary(3, 9), settings={"partial": True}) for name in "ab"]
    assert compare(runs, allow_partial=True).comparisons[0].difference.prompts == 9


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "line 1, column evaluator: '' stands in its place"),
        (
            lambda text: text.replace("shading,gallery", "gallery,shading", 1),
            "line 1, column shading: 'gallery' stands",
        ),
        (lambda text: text[: text.index('"a thing, number 005"')], r"line 7, column text: 7 cells instead of 16"),
        (lambda text: text[: text.index("b32,colour,own,005")], "has 5 prompts .* results.json beside it counts 9"),
        (lambda text: text.replace('"a thing, number 003"', '"a thing"x', 1), "line 5 is damaged"),
    ],
)
def test_a_damaged_csv_is_named(tmp_path, damage, message):
    a, b = write_run(tmp_path / "a", binary(3, 9)), write_run(tmp_path / "b", binary(4, 9))
    path = b / "per_prompt.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message):
        compare([a, b])
    path.write_bytes(b"evaluator\n\xff\xfe")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        compare([a, b])
    path.unlink()
    with pytest.raises(UserError, match=r"per_prompt\.csv does not exist"):
        compare([a, b])


def test_the_command(pair, tmp_path):
    runner, (a, b, *_) = CliRunner(), pair
    done = runner.invoke(app, ["eval", "compare", str(a), str(b), "--out", str(tmp_path / "c.json")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("B is better than A by 13.1 points (")
    assert "30 : 10" in done.output and "+13.1 (+" in done.output and "a thing, number 050" in done.output
    assert (tmp_path / "c.json").is_file()
    assert isinstance(runner.invoke(app, ["eval", "compare", str(a)]).exception, UserError)


@pytest.mark.parametrize(("points", "code"), [("0", 3), ("3", 3), ("13", 0), ("20", 0)])
def test_exit_code_3_where_the_whole_interval_is_worse(pair, points, code):
    a, b, *_ = pair
    done = CliRunner().invoke(app, ["eval", "compare", str(b), str(a), "--fail-if-worse", points])
    assert done.exit_code == code, done.output
    assert CliRunner().invoke(app, ["eval", "compare", str(a), str(b), "--fail-if-worse", points]).exit_code == 0


def test_captions_that_look_like_markup_are_printed_as_they_are(tmp_path, capsys):
    texts = ["[red]a car[/red]", "a [/b] cat", "plain"]
    a, b = (
        write_run(tmp_path / name, right, texts=texts)
        for name, right in (("a", [[1], [1], [0]]), ("b", [[0], [0], [0]]))
    )
    compare([a, b])
    assert "[red]a car[/red]" in (said := capsys.readouterr().out) and "a [/b] cat" in said
