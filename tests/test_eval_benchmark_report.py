"""The page of an R-precision run as a file: what it says, that it asks for nothing, that captions are never markup."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from benchmark_folder import (
    AZIMUTHS,
    BLIND,
    EVALUATORS,
    FAILURES,
    GALLERIES,
    KINDS,
    ODD_CAPTIONS,
    SHADINGS,
    P,
    S,
    make_folder,
)
from html_tree import Node, parse

from shapeloom.errors import UserError
from shapeloom.eval.benchmark.schema import Headline, Interval, Results, Variance
from shapeloom.eval.report.benchmark import write_report

GROUPS = ("all", "single objects", "two objects", "odd & <rare>")
MARK = "shares weights with the conditioner"


def page_of(folder: Path) -> Node:
    return parse(write_report(folder).read_text("utf-8"))


def section(page: Node, anchor: str) -> Node | None:
    return next(iter(page.every("section", id=anchor)), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_folder(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Results:
    from shapeloom.eval.benchmark.schema import read_results

    return read_results(folder)


@pytest.fixture(scope="module")
def page(folder) -> Node:
    return page_of(folder)


def variant(tmp_path: Path, **changes) -> Node:
    """The page of a run with some fields of its results replaced."""
    make_folder(tmp_path, **changes)
    return page_of(tmp_path)


def test_it_asks_for_nothing_outside_itself(page):
    for node in page.every():
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            address = node.attributes.get(name, "#")
            assert address.startswith(("#", "data:")), f"<{node.tag} {name}={address}>"
    (style,) = page.every("style")
    assert "url(" not in style.text and "@import" not in style.text
    scripts = page.every("script")
    assert [node.attributes.get("type") for node in scripts] == ["application/json", None]
    for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "eval(", "document.write"):
        assert word not in scripts[1].text


def test_the_policy_lets_run_the_page_s_own_script_and_style_alone(page):
    (policy,) = (node.attributes["content"] for node in page.every("meta") if "http-equiv" in node.attributes)

    def hashed(node: Node) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(node.text.encode()).digest()).decode()}'"

    style, script = page.every("style")[0], page.every("script")[1]
    assert policy == f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}"


def test_text_of_others_is_never_markup(page):
    assert not {"img", "rare", "text>", "901"} & {node.tag for node in page.every()}
    for node in page.every():
        assert not [name for name in node.attributes if name.startswith("on") or name == "style"]
    cards = [card.every(class_="caption")[0].text for card in page.every("li") if "data-object" in card.attributes]
    for caption in ODD_CAPTIONS:
        assert cards.count(caption) == S
    whole = page.every("main")[0].text
    for text in ("<b>obj-030.glb</b>", "note with <i>markup</i> & more", "generated & kept", "obj-<901>", "<text>"):
        assert text in whole, text


def test_the_embedded_json_cannot_end_its_element(folder, page):
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', (folder / "report.html").read_text())
    assert raw and not set(raw[1]) & set("<>&\u2028") and raw[1].isascii()
    data = json.loads(raw[1])
    assert set(ODD_CAPTIONS) <= set(data["captions"]) and len(data["objects"]) == P * S
    assert len(data["views"]) == len(EVALUATORS) * len(SHADINGS) * len(GALLERIES)


def test_the_headline_has_all_that_is_needed_to_quote_it(page, results):
    header = page.every("header")[0]
    one = results.headline.r_at_1
    (big,) = header.every(class_="big")
    assert big.text == f"{100 * one.mean:.1f} %"
    assert f"95 % interval {100 * one.lo:.1f}–{100 * one.hi:.1f}" in header.text
    for said in ("40 × 2", "prompts, 40 captions", EVALUATORS[0], "colour", "default-v1", "2026-03-14", "true renders"):
        assert said in header.text, said
    hashes = [results.galleries[0].hash, results.evaluators[0].hash, results.protocol["hash"]]
    for code, whole in zip(header.every("code"), hashes, strict=True):
        assert code.text == code.attributes["title"] == whole
        assert code.parts[0] == whole[:10], "what is seen is short"
    assert "Partial" not in header.text and not header.every(class_="warn")


def test_without_a_headline_the_reason_stands_in_its_place(tmp_path):
    page = variant(tmp_path, headline=Headline(reason="every evaluator shares <weights> with the conditioner"))
    (big,), (reason,) = page.every(class_="big"), page.every(class_="reason")
    assert big.text == "No headline number" and reason.text == "every evaluator shares <weights> with the conditioner"
    assert "No headline R@1" in page.every("title")[0].text
    shown = [block for block in section(page, "scores").every(class_="view") if "hidden" not in block.attributes]
    assert len(shown) == 2


def test_a_partial_run_says_so_first(tmp_path):
    page = variant(tmp_path, partial=True)
    (banner,) = page.every(class_="banner")
    assert "not comparable" in banner.text and page.every("title")[0].text.startswith("Partial")


def test_the_headline_s_choice_comes_first_and_is_shown(tmp_path):
    one = Interval(mean=0.25, lo=0.125, hi=0.5, prompts=40, seeds=2)
    headline = Headline(evaluator=EVALUATORS[1], shading="textureless", gallery="prompts and swaps", r_at_1=one)
    page = variant(tmp_path, headline=headline)
    first = [select.every("option")[0].attributes["value"] for select in page.every("select")]
    assert first == [EVALUATORS[1], "textureless", "prompts and swaps", "all"]
    shown = [block for block in page.every(class_="view") if "hidden" not in block.attributes]
    assert len(shown) == 7
    for block in shown:
        chosen = dict(zip(("data-evaluator", "data-shading", "data-gallery", "data-group"), first))
        stands_for = {name: value for name, value in block.attributes.items() if name.startswith("data-")}
        assert stands_for.items() <= chosen.items()


def test_every_score_stands_in_its_table(page, results):
    found = {}
    for block in section(page, "scores").every(class_="view"):
        if "data-group" not in block.attributes:
            continue
        where = tuple(block.attributes[f"data-{name}"] for name in ("evaluator", "shading", "gallery", "group"))
        for row in block.every("tbody")[0].every("tr"):
            name, note = row.every("th")[0].parts
            assert note.text, f"{name} is not explained"
            found[(name, *where)] = [cell.parts[0] for cell in row.every("td") if isinstance(cell.parts[0], str)]
    assert len(found) == len(results.scores) == 8 * 8 * len(GROUPS)
    for score in results.scores:
        cells = found[score.row, score.evaluator, score.shading, score.gallery, score.group]
        r1, r5, r10, mrr, cosine, margin = (cell.strip().replace("−", "-") for cell in cells)
        expected = score.metrics
        assert float(r1) == pytest.approx(100 * expected["r@1"].mean, abs=0.051)
        assert float(r5) == pytest.approx(100 * expected["r@5"].mean, abs=0.051)
        assert float(r10) == pytest.approx(100 * expected["r@10"].mean, abs=0.051)
        assert float(mrr) == pytest.approx(expected["mrr"].mean, abs=0.00051)
        if score.row == "chance":
            assert (cosine, margin) == ("–", "–")
        else:
            assert float(cosine) == pytest.approx(expected["cosine"].mean, abs=0.00051)
            assert float(margin) == pytest.approx(expected["margin"].mean, abs=0.00051)


def test_a_leaking_evaluator_is_marked_wherever_it_scores(page):
    tables = [table for table in page.every("table") if EVALUATORS[1] in table.text]
    views = len(SHADINGS) * len(GALLERIES)
    # rows and two-way by group; groups and confusions by view; every view, most retrieved, the evaluators themselves
    assert len(tables) == len(GROUPS) * (views + len(SHADINGS)) + 2 * views + 3
    for table in tables:
        assert MARK in table.text, table.text[:200]
    plots = [card for card in section(page, "confusions").every(class_="card") if card.every("svg", class_="plot")]
    assert [MARK in card.text for card in plots] == [EVALUATORS[1] in card.text for card in plots]
    assert not [table for table in page.every("table") if MARK in table.text and EVALUATORS[1] not in table.text]


def test_published_numbers_are_grey_and_of_another_protocol(page, results):
    rows = section(page, "scores").every("tr", class_="quiet")
    assert len(rows) == len(results.published) == 2
    for row, one in zip(rows, results.published):
        assert "different protocol" in row.text
        for said in (one.system, one.evaluator, f"{one.r_at_1:.1f}", one.source, one.note):
            assert said in row.text


def test_a_blind_evaluator_is_called_blind(page, results):
    truths = [entry for entry in results.two_way if entry.row == "true renders"]
    blind = [entry for entry in truths if entry.accuracy.lo <= 0.5 <= entry.accuracy.hi]
    assert any((entry.evaluator, entry.kind) == BLIND for entry in blind)
    notes = section(page, "binding").every(class_="note")
    assert len(notes) == len(blind)
    text = "".join(note.text for note in notes)
    assert all(f"{entry.evaluator} is blind to {entry.kind}" in text for entry in blind)
    shown = [block for block in section(page, "binding").every(class_="view") if "hidden" not in block.attributes]
    rows = shown[0].every("tbody")[0].every("tr")
    assert [row.every("th")[0].parts[0] for row in rows] == list(KINDS)
    assert all(row.every("line", class_="chance") and len(row.every("circle")) == 2 for row in rows)


def test_ranks_and_azimuths_are_drawn_as_counted(page, results):
    confusions = section(page, "confusions")
    labels = [svg.attributes["aria-label"] for svg in confusions.every("svg", class_="plot")]
    one = results.ranks[0]
    names = ["1", "2", "3–5", "6–10", "11–40", "failed"]
    expected = ", ".join(f"{name} {count}" for name, count in zip(names, one.counts, strict=True))
    assert labels[0] == f"Generated objects by rank of their caption: {expected}"
    assert sum(one.counts) == P * S and one.counts[-1] == len(FAILURES)
    lines = [line.attributes["points"] for line in confusions.every("polyline")[:2]]
    for line, curve in zip(lines, results.azimuth[:2]):
        xs, ys = zip(*(map(float, point.split(",")) for point in line.split()))
        assert np.allclose(np.diff(xs), np.diff(xs)[0], atol=0.11) and len(xs) == len(AZIMUTHS) + 1, "a closed turn"
        height = (ys[0] - np.array(ys)) / (np.array([*curve.r_at_1, curve.r_at_1[0]]) - curve.r_at_1[0] + 1e-12)
        moved = np.abs(ys[0] - np.array(ys)) > 5
        assert moved.any() and np.allclose(height[moved], 170, rtol=0.05), "linear from 0 to 100"


def test_confused_captions_come_most_often_first(page, results):
    view = [block for block in section(page, "confusions").every(class_="view") if block.every(class_="said")][0]
    shares = [int(row.every("td")[-1].text.split()[0]) for table in view.every("tbody") for row in table.every("tr")]
    assert shares == sorted(shares, reverse=True) and len(shares) > 12
    where = (EVALUATORS[0], "colour", "prompts")
    assert len(shares) == sum((c.evaluator, c.shading, c.gallery) == where for c in results.confusions)
    retrieved = section(page, "confusions").every("table")[-1].text
    for gallery in results.galleries:
        for caption, share in gallery.most_retrieved.values():
            assert caption in retrieved and f"{100 * share:.1f}" in retrieved


def test_each_picture_is_embedded_once_and_shown_where_it_belongs(folder, page):
    html = (folder / "report.html").read_text()
    with np.load(folder / "thumbnails.npz") as arrays:
        webp = {name: base64.b64encode(arrays[name].tobytes()).decode() for name in arrays.files}
    assert len(re.findall("data:image/webp", html)) == len(webp) == P + P * S - len(FAILURES)
    held = {f"#{image.attributes['id']}": image.attributes["href"].split(",")[1] for image in page.every("image")}
    data = json.loads(page.every("script")[0].text)
    cards = {card.attributes["data-object"]: card for card in page.every("li") if "data-object" in card.attributes}
    for place, one in enumerate(data["objects"]):
        names = [f"generated/{one['id']}/{one['seed']}", f"true renders/{one['id']}/0"]
        shown = [held[use.attributes["href"]] for use in cards[str(place)].every("use")]
        assert shown == [webp[name] for name in names if name in webp]


def test_objects_are_sorted_by_margin_with_both_ends_shown(page):
    cards = page.every("ol", id="cards")[0].every("li")
    assert [card.attributes.get("id") for card in cards].index("more") == 24
    cards = [card for card in cards if "data-object" in card.attributes]
    assert ["hidden" in card.attributes for card in cards] == [24 <= place < P * S - 24 for place in range(P * S)]
    verdicts = [card.every(class_="verdict")[0].every("span")[0].text for card in cards]
    assert verdicts[: len(FAILURES)] == [""] * len(FAILURES)
    margins = [float(text.replace("−", "-")) for text in verdicts[len(FAILURES) :]]
    assert margins == sorted(margins) and margins[0] < 0 < margins[-1]


def test_parts_that_a_run_lacks_are_left_out(tmp_path):
    make_folder(tmp_path, thumbnails=False, two_way=[], azimuth=[], failures=[], confusions=[], published=[], notes=[])
    page = page_of(tmp_path)
    assert not page.every("image") and not page.every("use") and not page.every(class_="pair")
    assert section(page, "binding") is None and not page.every("polyline")
    assert "Failures: none" in section(page, "failures").text and not section(page, "failures").every("table")
    assert "Published elsewhere" not in page.text and not page.every(class_="said") and not page.every("ul")
    assert "#binding" not in {link.attributes["href"] for link in page.every("a")}
    for link in page.every("a"):
        assert section(page, link.attributes["href"][1:]) is not None


def test_every_failure_has_its_reason(page, results):
    failures = section(page, "failures")
    assert failures.every("h2")[0].text == "Failures: 3 of 80 objects"
    for row, one in zip(failures.every("tbody")[0].every("tr"), results.failures, strict=True):
        assert [cell.text for cell in row.parts] == [one.id, str(one.seed), one.kind, one.reason]


@pytest.mark.parametrize(
    ("prompts", "seeds", "told"),
    [
        # half-widths are 1.96 times the root of the variance, in points: 1.96 * 0.05 = 9.8
        (0.0024, 0.0001, ["±9.8", "Add prompts", "4 % of the variance", "±9.7", "±9.6", "±6.9"]),
        (0.0009, 0.0016, ["±9.8", "Add seeds", "64 % of the variance", "±8.1", "±5.9", "±6.9"]),
        (0.0, 0.0, ["no variance to divide"]),
    ],
)
def test_what_would_narrow_the_interval(tmp_path, prompts, seeds, told):
    where = {"evaluator": EVALUATORS[0], "shading": "colour", "gallery": "prompts"}
    page = variant(tmp_path, variance=[Variance(between_prompts=prompts, between_seeds=seeds, **where)])
    (sentence,) = section(page, "statistics").every(class_="view")[0].every("p")
    for words in told:
        assert words in sentence.text


def test_inputs_and_settings_are_all_there(page, results):
    text = section(page, "inputs").text
    for said in ("meshes", "prompts/<shapes>.jsonl", "obj-900, obj-<901>", "obj-010/0", "obj-003", "mean over views"):
        assert said in text, said
    for name, value in {**results.environment, "render": "1 min 32 s"}.items():
        assert name in text and value in text
    assert results.prompts["hash"] in text and results.evaluators[1].notes[0] in text


def test_headings_and_tables_are_real(page):
    levels = [int(node.tag[1]) for node in page.every() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    for table in page.every("table"):
        assert {node.attributes["scope"] for node in table.every("thead")[0].every("th")} == {"col"}
        for row in table.every("tbody")[0].every("tr"):
            assert row.parts[0].tag == "th" and row.parts[0].attributes["scope"] == "row"
            assert len(row.parts) == len(table.every("thead")[0].every("tr")[0].parts)
    ids = [node.attributes["id"] for node in page.every() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert all(svg.attributes.get("aria-label") for svg in page.every("svg", role="img"))


def spoil(folder: Path, header: dict[str, str] | None = None, **cells: str) -> None:
    """Other names of columns, or other cells in the third line of per_prompt.csv."""
    path = folder / "per_prompt.csv"
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    lines[1] |= cells
    names = header or {}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([names.get(name, name) for name in lines[0]])
        writer.writerows(line.values() for line in lines)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "per_prompt.csv").unlink(), r"per_prompt\.csv does not exist"),
        (lambda folder: spoil(folder, {"margin": "gap"}), "has other columns than"),
        (lambda folder: spoil(folder, seed="zero"), "damaged near line 3 .*zero"),
        (lambda folder: spoil(folder, margin="nan"), "damaged near line 3 .*nan is not finite"),
        (lambda folder: spoil(folder, rank="high"), "damaged near line 3 .*high"),
        (lambda folder: (folder / "per_prompt.csv").open("a").write("ViT,colour\n"), "damaged near line 642"),
        (lambda folder: (folder / "per_prompt.csv").write_bytes(b"\xff\xfe\x00"), "damaged near line 0"),
        (lambda folder: np.savez(folder / "thumbnails.npz", odd=np.zeros(9, np.uint8)), "odd is not a WebP picture"),
        (lambda folder: (folder / "thumbnails.npz").write_bytes(b"PK\3\4 cut short"), r"thumbnails\.npz is damaged"),
        (lambda folder: (folder / "results.json").write_text("{}"), "has the format None"),
    ],
)
def test_a_damaged_folder_is_told_in_a_sentence_and_keeps_its_page(tmp_path, damage, message):
    make_folder(tmp_path)
    (tmp_path / "report.html").write_text("the page before")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the page before"
