"""The page of an R-precision run in a real browser: what its selectors, objects, detail and link do."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_folder import EVALUATORS, FAILURES, P, S, make_folder

from shapeloom.eval.benchmark.schema import Results, read_results
from shapeloom.eval.report.benchmark import write_report

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
FIRST = {"evaluator": EVALUATORS[0], "shading": "colour", "gallery": "prompts", "group": "all"}
Line = dict[str, str]


def absent(what: str) -> None:
    """Skips; where CI=true the tests must have run, so fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true: install it so that the page is tested")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: $SHAPELOOM_CHROMIUM, or one on the path."""
    candidates = filter(None, (os.environ.get("SHAPELOOM_CHROMIUM"), *NAMES))
    path = next(filter(None, map(shutil.which, candidates)), None)
    if path is None:
        absent(f"no Chromium ($SHAPELOOM_CHROMIUM, {', '.join(NAMES)})")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_folder(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Results:
    return read_results(folder)


@pytest.fixture(scope="module")
def lines(folder) -> list[Line]:
    """Of per_prompt.csv."""
    with open(folder / "per_prompt.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def address(folder) -> str:
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def context(browser) -> Any:
    return browser.new_context(viewport={"width": 1280, "height": 900})


@pytest.fixture
def open_page(context, address) -> Iterator[Any]:
    """Opens the page with a hash; afterwards nothing may have complained, or been asked of anyone else."""
    opened, complaints, requests = [], [], []

    def opener(hash_: str = "") -> Any:
        page = context.new_page()
        opened.append(page)
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address + hash_)
        return page

    yield opener
    for page in opened:
        assert page.evaluate("window.hacked") is None, "a caption ran"
        page.close()
    assert not complaints
    assert requests and all(url.split("#")[0] == address or url.startswith("data:") for url in requests)


def choose(page: Any, **choices: str) -> None:
    for name, value in choices.items():
        page.select_option(f"#choose [name={name}]", value)


def shown_row(page: Any, row: str) -> list[str]:
    """The cells of a row in the table of scores that is seen."""
    table = page.locator("#scores .view[data-group]:visible table")
    assert table.count() == 1
    return table.locator("tr", has=page.get_by_role("rowheader", name=row)).locator("td").all_inner_texts()


def cards(page: Any) -> list[str]:
    return page.locator("#cards [data-object] .verdict").all_inner_texts()


def of_view(lines: list[Line], **choices: str) -> list[Line]:
    where = {name: value for name, value in {**FIRST, **choices}.items() if name != "group"}
    return [line for line in lines if where.items() <= line.items()]


def verdict(line: Line) -> tuple[str, str]:
    """Kind of failure and margin, as a card shows them."""
    if line["failure"]:
        return f"failed: {line['failure']}", ""
    return "rank", f"{float(line['margin']):+.3f}".replace("-", "−")


def assert_shows(page: Any, expected: list[Line]) -> None:
    """The visible cards are these lines in this order."""
    found = cards(page)
    assert len(found) == len(expected)
    for text, line in zip(found, expected):
        told, margin = verdict(line)
        assert told in text and text.strip().endswith(margin or told), (text, line)


def by_margin(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: float(line["margin"] or "-inf"))


def test_the_selectors_switch_every_table_to_its_numbers(open_page, results):
    page = open_page()
    seen = set()
    for choices in (
        FIRST,
        {**FIRST, "evaluator": EVALUATORS[1]},
        {**FIRST, "shading": "textureless", "gallery": "prompts and swaps"},
        {**FIRST, "evaluator": EVALUATORS[1], "gallery": "prompts and swaps", "group": "odd & <rare>"},
    ):
        choose(page, **choices)
        for row in ("generated", "true renders", "shuffled prompts"):
            wanted = {"row": row, **choices}
            (expected,) = (one.metrics for one in results.scores if wanted.items() <= one.to_json().items())
            cells = [text.replace("−", "-").split() for text in shown_row(page, row)]
            one = expected["r@1"]
            drawn = [f"{100 * one.lo:.1f}–{100 * one.hi:.1f}"] if one.lo < one.hi else []
            assert cells[0] == [f"{100 * one.mean:.1f}", *drawn]
            assert cells[4][0] == f"{expected['mrr'].mean:.3f}" and cells[6][0] == f"{expected['margin'].mean:.3f}"
            seen.add((row, *cells[0]))
        blocks = page.locator(".view:visible").evaluate_all("blocks => blocks.map((block) => ({ ...block.dataset }))")
        assert len(blocks) == 2 + 1 + 3 + 1, "rows, groups; two-way; ranks, azimuths, confusions; variance"
        assert all(block.items() <= choices.items() for block in blocks)
        assert page.locator(".absent:visible").count() == 0
    assert len(seen) == 4 * 3, "each choice had other numbers"


def test_objects_are_sorted_by_margin_both_ways(open_page, lines):
    page = open_page()
    rising = by_margin(of_view(lines))
    assert_shows(page, rising[:24] + rising[-24:])
    page.get_by_text("Best first").click()
    assert_shows(page, rising[::-1][:24] + rising[::-1][-24:])
    assert "order=best" in page.url
    page.get_by_role("button", name="Show 32").click()
    assert_shows(page, rising[::-1])
    choose(page, evaluator=EVALUATORS[1])
    rising = by_margin(of_view(lines, evaluator=EVALUATORS[1]))
    assert_shows(page, rising[::-1][:24] + rising[::-1][-24:])


def test_objects_are_filtered(open_page, lines):
    page = open_page()
    rising = by_margin(of_view(lines))
    page.get_by_text("Failures only").click()
    assert_shows(page, [line for line in rising if line["failure"]])
    assert len(cards(page)) == len(FAILURES)
    page.get_by_text("Misses only").click()
    misses = [line for line in rising if float(line["r@1"]) < 0.5]
    assert 24 < len(misses) < P * S
    assert_shows(page, misses if len(misses) <= 48 else misses[:24] + misses[-24:])
    page.get_by_text("All", exact=True).click()
    page.get_by_role("searchbox").fill("ring BLUE")
    assert_shows(page, [line for line in rising if "ring" in line["text"] and "blue" in line["text"]])
    page.get_by_role("searchbox").fill("würfel/007")
    assert len(cards(page)) == S
    page.get_by_role("searchbox").fill("no such thing")
    assert cards(page) == [] and page.locator("#count").inner_text() == "No object fits."
    page.get_by_role("searchbox").fill("")
    choose(page, group="odd & <rare>")
    assert_shows(page, [line for line in rising if "odd & <rare>" in line["groups"].split("|")])


def test_the_detail_of_an_object(open_page, lines):
    page = open_page()
    page.get_by_role("searchbox").fill("</script>")
    page.locator("#cards button").first.click()
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible()
    worst = by_margin([line for line in of_view(lines) if "</script>" in line["text"]])[0]
    assert dialog.get_by_role("heading").inner_text() == worst["text"]
    assert dialog.locator("dd").all_inner_texts() == [worst["id"], worst["seed"], ", ".join(worst["groups"].split("|"))]
    own = [line for line in lines if (line["id"], line["seed"]) == (worst["id"], worst["seed"])]
    rows = dialog.locator("tbody tr").all()
    assert len(rows) == len(own) == 8
    for row, line in zip(rows, own):
        head = f"{line['evaluator']}\n{line['shading']}, gallery {line['gallery']}"
        assert row.locator("th").inner_text() == head
        hits, rank, cosine, margin, nearest = (text.replace("−", "-") for text in row.locator("td").all_inner_texts())
        assert float(hits) == pytest.approx(100 * float(line["r@1"]), rel=0.01)
        assert float(rank) == pytest.approx(float(line["rank"]), rel=0.01)
        assert float(cosine) == pytest.approx(float(line["cosine"]), abs=0.00051)
        assert float(margin) == pytest.approx(float(line["margin"]), abs=0.00051)
        assert nearest == ("its own" if line["nearest"] == line["text"] else line["nearest"])
    for image in dialog.locator("img").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
    assert [image.get_attribute("alt").split(":")[0] for image in dialog.locator("img").all()] == [
        "generated",
        "true renders",
    ]


def test_the_detail_by_keyboard(open_page):
    page = open_page()
    first, second = (page.locator("#cards button").nth(place) for place in (0, 1))
    captions = [button.locator(".caption").inner_text() for button in (first, second)]
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == captions[0]
    assert dialog.get_by_role("button", name="Previous").is_disabled()
    page.keyboard.press("ArrowRight")
    assert dialog.get_by_role("heading").inner_text() == captions[1] and "object=" in page.url
    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('object=')")
    assert not dialog.is_visible()
    assert first.evaluate("button => button === document.activeElement")


def test_a_link_shows_the_same_view(open_page):
    page = open_page()
    choose(page, evaluator=EVALUATORS[1], gallery="prompts and swaps", group="odd & <rare>")
    page.get_by_text("Misses only").click()
    page.get_by_text("Best first").click()
    page.get_by_role("searchbox").fill("red")
    page.locator("#cards button").first.click()
    told = page.get_by_role("dialog").inner_text()
    _, _, hash_ = page.url.partition("#")
    again = open_page("#" + hash_)
    assert again.get_by_role("dialog").inner_text() == told
    for one in (again, page):
        one.keyboard.press("Escape")
        one.wait_for_function("!location.hash.includes('object=')")
    assert again.url == page.url
    for look in (lambda page: shown_row(page, "generated"), cards):
        assert look(again) == look(page)
    assert again.get_by_role("combobox", name="Evaluator").input_value() == EVALUATORS[1]
    assert again.get_by_role("searchbox").input_value() == "red"
    again.evaluate("location.hash = '#evaluator=gone&order=sideways&object=none'")
    again.wait_for_function("document.querySelector('#choose [name=group]').value === 'all'")
    assert again.get_by_role("combobox", name="Evaluator").input_value() == FIRST["evaluator"]


def test_links_to_sections_keep_the_choice(open_page):
    page = open_page()
    choose(page, shading="textureless")
    page.get_by_role("link", name="Statistics").click()
    assert page.url.endswith("#shading=textureless")
    page.wait_for_function("document.getElementById('statistics').getBoundingClientRect().top < innerHeight / 2")


def test_a_hash_is_short_to_the_eye_and_whole_when_copied(open_page, results):
    page = open_page()
    code = page.locator("code.hash").first
    code.click()
    assert page.evaluate("getSelection().toString()") == results.galleries[0].hash
    assert code.bounding_box()["width"] < 120


def test_a_dark_phone_shows_it_without_scrolling_sideways(open_page):
    page = open_page()
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, evaluator=EVALUATORS[1])
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    width = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert page.evaluate(width) == 360
    page.locator("#cards button").nth(3).click()
    dialog = page.locator("dialog")
    assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth") and page.evaluate(width) == 360
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
        ink, ground = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
        assert (ground > ink) is (scheme == "light")


def test_without_a_script_the_first_choice_is_shown(browser, address, results):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    one = results.headline.r_at_1
    assert shown_row(page, "generated")[0].split()[0] == f"{100 * one.mean:.1f}"
    assert page.locator("#cards [data-object]:visible").count() == 48
    assert page.locator("form:visible, #more button:visible, dialog:visible").count() == 0
    context.close()
