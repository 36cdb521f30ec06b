"""The page about raw shards: its numbers against the data, hostile words, and what a browser makes of it."""

from __future__ import annotations

import io
import json
import re
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import trimesh
from html_tree import Node, parse
from PIL import Image
from test_eval_browser import browser  # noqa: F401

from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.limits import ANIMATED
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.report import write_report
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.data_pipes.shards import RAW_FORMAT, ShardWriter, write_manifest
from shapeloom.data_pipes.survey import Survey, general_form, particulars, survey
from shapeloom.errors import UserError

HOSTILE = "<script>alert(1)</script>\"'&\u202etxt.exe\x00\ud800"


def shards_of(folder: Path, metas: list[dict]) -> Path:
    """Raw shards of json members alone."""
    folder.mkdir(parents=True)
    with ShardWriter(folder / "shard-00000.tar") as writer:
        for k, meta in enumerate(metas):
            words = {"uid": f"a{k}", "captions": [], "split": "train", **meta}
            writer.write(f"a{k}", {"json": json.dumps(words).encode()}, str(words["split"]))
    assert writer.info
    write_manifest(
        folder,
        format=RAW_FORMAT,
        settings={"note": HOSTILE[:-1]},
        shards=[writer.info],
        counts={},
    )
    return folder


def page_of(raw: Path, **options: int) -> tuple[str, Node]:
    write_report(raw, **options)
    html = (raw / "report.html").read_text("utf-8")
    return html, parse(re.sub(r"<!doctype html>|<style>.*?</style>", "", html, flags=re.DOTALL))


def tiles(page: Node) -> dict[str, str]:
    return {tile.every("span")[0].text: tile.every("b")[0].text for tile in page.every(class_="tile")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good files, one that has a texture missing, and two broken ones."""
    folder = tmp_path_factory.mktemp("report") / "models"
    folder.mkdir()
    for name, shape in (("box.glb", trimesh.creation.box()), ("ball.obj", trimesh.creation.icosphere(2))):
        shape.export(folder / name)
    trimesh.creation.cone(1, 2).export(folder / "cone.stl")
    (folder / "torn.obj").write_text(
        "mtllib torn.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 1 4 3\n"
    )
    (folder / "empty.glb").write_bytes(b"")
    (folder / "<b>cut.glb").write_bytes((folder / "box.glb").read_bytes()[:-40])
    captions = folder.parent / "captions.csv"
    captions.write_text(
        "file,caption,caption_2,category,licence,author\n"
        "box.glb,A red box on the table,a box,thing,CC0-1.0,Ann\n"
        "ball.obj,red table on a box,A  BOX,toy,,\n"
        "cone.stl,<i>cone</i>,,thing,CC0-1.0,<u>Bob</u>\n"
    )
    build(
        folder,
        folder.parent / "raw",
        captions,
        BuildSettings(n_surface=64, n_near=32, n_uniform=32, n_views=2, image_size=48),
    )
    return folder.parent / "raw"


def test_the_numbers_are_those_of_the_data(raw: Path) -> None:
    html, page = page_of(raw)
    found = tiles(page)
    assert (found["assets"], found["files rejected"], found["assets with warnings"]) == ("4", "2", "1")
    assert (found["captions"], found["captions an asset"], found["shards"]) == ("6", "1.50", "1")
    assert found["assets captioned by file name"] == "1" and found["captions that repeat another"] == "1"
    assert found["sets of the same words"] == "1" and found["sets one word apart"] == "0"
    assert "A red box on the table<" in html and "red table on a box<" in html
    faces = survey(ShardFolder(raw)).mesh["faces"]
    assert sorted(faces)[:2] == [4, 12] and 320 in faces
    rows = {row.every("th")[0].text: row.every("td")[0].text for row in page.every("tbody")[-3].every("tr")}
    assert rows == {"CC0-1.0": "2", "none given": "2"} and "2 assets name no licence" in html
    rejected = page.every("section", id="rejected")[0].text
    assert "cut.glb" in rejected and "empty.glb" in rejected and "cut short" in rejected
    built = page.every("section", id="settings")[0]
    said = dict(zip([dt.text for dt in built.every("dt")], [dd.text for dd in built.every("dd")]))
    assert said["n_surface"] == "64" and said["judge.open_edges"] == "0.2" and said["maker"] == "data build"
    warned = page.every("section", id="warnings")[0]
    assert "torn.mtl" in warned.text and len(warned.every("img")) == 1


def test_pictures_are_the_first_views_on_white_in_their_order(raw: Path) -> None:
    _, page = page_of(raw)
    figures = page.every("section", id="assets")[0].every("figure")
    shards = ShardFolder(raw)
    assert [figure.every(class_="uid")[0].text for figure in figures] == shards.uids
    for index, figure in enumerate(figures):
        data = figure.every("img")[0].attributes["src"].removeprefix("data:image/webp;base64,")
        shown = np.asarray(Image.open(io.BytesIO(b64decode(data))).convert("RGB")).astype(int)
        stored = Image.open(io.BytesIO(shards.read(index, ["lit_00.webp"])["lit_00.webp"]))
        expected = Image.alpha_composite(Image.new("RGBA", stored.size, "white"), stored.convert("RGBA"))
        assert np.abs(shown - np.asarray(expected.convert("RGB"))).mean() < 6  # WebP with loss
    assert len(page_of(raw, count=2)[1].every("section", id="assets")[0].every("figure")) == 2


def test_the_page_needs_nothing_else_and_hostile_words_stay_words(tmp_path: Path) -> None:
    meta = {
        "captions": [HOSTILE, HOSTILE, "x" * 5000],
        "category": HOSTILE,
        "licence": HOSTILE,
        "author": HOSTILE,
        "warnings": [HOSTILE],
        "mesh": {"faces": HOSTILE, HOSTILE: 1},
        "split": HOSTILE[:-1],
    }
    odd = {"captions": "no list", "warnings": 3, "mesh": [1], "category": 7, "licence": None}
    raw = shards_of(tmp_path / "<img src=x onerror=alert(1)>", [meta, odd])
    line = {"file": HOSTILE, "reason": HOSTILE, "hint": HOSTILE}
    (raw / "rejected.jsonl").write_text(json.dumps(line) + "\n")
    html, page = page_of(raw)
    assert not page.every("script") and len(page.every("i")) == 4 and "\u202e" not in html and "\x00" not in html
    assert not [node for node in page.every() if any(name.startswith("on") for name in node.attributes)]
    sources = [node.attributes[name] for node in page.every() for name in ("src", "href") if name in node.attributes]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in html and "@import" not in html
    assert "alert(1)" in page.text and "x" * 600 not in html
    assert "default-src 'none'" in html


def test_duplicates_are_counted_by_their_definitions() -> None:
    found = Survey()
    captions = ["a red cup", "A red  cup", "cups, red", "the red cup", "red cup cup", "!!!", "???", "ein Haus"]
    for index, caption in enumerate(captions):
        found.add(index, {"captions": [caption]}, "train")
    assert found.duplicates() == [(2, "A red  cup")]
    (group,) = found.twins.same_words()
    assert group.owners == [0, 2, 3]
    assert found.words["cup"] == 5 and "the" not in found.words and found.words["haus"] == 1
    assert found.captions == len(captions) and found.words_per_caption[3] == 4


def test_one_kind_of_sentence_has_one_form() -> None:
    assert general_form("the file 'a.png' is missing (12 of 3.5)") == general_form("the file 'it.png' is missing (1)")


def test_particulars_are_what_the_general_form_leaves_out() -> None:
    assert (
        particulars("the file 'a.png' is missing: 2 of 3 (x)") == "a.png, 2, 3, x" and particulars("it is flat") == ""
    )


def picture(path: Path, colour: str) -> str:
    """A plain picture beside the shards; its name from the folder of `path`'s parent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (30, 20), colour).save(path)
    return f"{path.parent.name}/{path.name}"


def colours(node: Node) -> list[tuple[int, ...]]:
    """The middle pixel of each picture, to the nearest 64."""
    found = []
    for img in node.every("img"):
        data = b64decode(img.attributes["src"].removeprefix("data:image/webp;base64,"))
        shown = Image.open(io.BytesIO(data)).convert("RGB")
        found.append(tuple(round(c / 64) for c in np.asarray(shown)[shown.height // 2, shown.width // 2]))
    return found


RED, BLUE, WHITE = (4, 0, 0), (0, 0, 4), (4, 4, 4)


def test_rejected_files_are_shown_where_there_is_a_picture(tmp_path: Path) -> None:
    raw = shards_of(tmp_path / "raw", [{}])
    picture(tmp_path / "secret.webp", "red")
    (raw / "rejected").mkdir()
    (raw / "rejected" / "link.webp").symlink_to(tmp_path / "secret.webp")
    (raw / "rejected" / "torn.webp").write_bytes(b"RIFF")
    names = [
        picture(raw / "rejected" / "a.webp", "red"),
        picture(raw / "rejected" / "b.png", "blue"),
        picture(raw / "rejected" / "c.webp", "#ff000000"),  # nothing but the white it is laid on
        "rejected/none.webp",
        "rejected/torn.webp",
        "rejected/link.webp",
    ]
    outside = ["../secret.webp", str(tmp_path / "secret.webp"), "rejected", "a\x00b", "manifest.json"]
    lines = [{"file": f"f{k}.glb", "reason": f"open: {k}%", "picture": name} for k, name in enumerate(names)]
    lines += [{"file": f"g{k}.glb", "reason": f"cut at {k}", "picture": name} for k, name in enumerate(outside)]
    lines += [{"file": "h.glb", "reason": "it is empty", "hint": "copy it again", "picture": None}]
    (raw / "rejected.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, page = page_of(raw)
    open_edges, cut, empty = page.every("section", id="rejected")[0].every(class_="finding")
    assert colours(open_edges) == [RED, BLUE, WHITE]
    assert [caption.text for caption in open_edges.every("figcaption")] == ["0%f0.glb", "1%f1.glb", "2%f2.glb"]
    assert [li.text for li in open_edges.every("li")] == ["and 3 more"]
    assert not cut.every("img") and len(cut.every("code")) == 3 and "and 2 more" in cut.text
    assert "copy it again" in empty.text and "h.glb" in empty.text


def test_doubles_stand_side_by_side(raw: Path, tmp_path: Path) -> None:
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    (raw / "duplicates.jsonl").unlink()
    assert not page_of(raw)[1].every("section", id="doubles"), "it is not known whether there are any"
    (raw / "duplicates.jsonl").write_text("")
    assert "No file is a double" in page_of(raw)[1].every("section", id="doubles")[0].text
    name = picture(raw / "doubles" / "a.webp", "blue")
    lines = [
        {"file": "ball.obj", "uid": "ball", "of": "box.glb", "same": "shape"},
        {"file": "torn.obj", "uid": "torn", "of": "box.glb", "same": "shape"},  # one pair a file is enough
        {"file": "left_out.glb", "uid": "left_out", "of": "cone.stl", "same": "shape", "picture": name},
        {"file": "gone.glb", "uid": "gone", "of": "cone.stl", "same": "shape and colours"},
    ]
    (raw / "duplicates.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, page = page_of(raw)
    shape, all_of_it = page.every("section", id="doubles")[0].every(class_="finding")
    assert tiles(page)["doubles of another"] == "4" and shape.every(class_="count")[0].text == "3 files"
    pairs = [[figure.attributes["title"] for figure in pair.every("figure")] for pair in shape.every(class_="pair")]
    assert pairs == [["box.glb", "ball.obj"], ["cone.stl", "left_out.glb"]]
    assert len(shape.every("img")) == 4 and colours(shape)[3] == BLUE
    sheet = {
        figure.every(class_="uid")[0].text: figure for figure in page.every("section", id="assets")[0].every("figure")
    }
    sources = [img.attributes["src"] for img in shape.every("img")]
    assert sources[:3] == [sheet[uid].every("img")[0].attributes["src"] for uid in ("box", "ball", "cone")]
    assert "not in the shards" in all_of_it.text and len(all_of_it.every("img")) == 1
    (raw / "duplicates.jsonl").write_text('{"file": "a", "same": "shape"}')
    with pytest.raises(UserError, match="duplicates.jsonl: line 1 is no JSON object with file, of and same"):
        write_report(raw)


def test_captions_a_word_apart_are_shown_with_the_word(tmp_path: Path) -> None:
    chairs = [f"A {word} wooden Chair with four legs" for word in ("red", "<b>old</b>", "Blue")]
    metas = [
        {"captions": [text]} for text in [*chairs, "wooden chairs, with four legs", "with four legs, wooden chair"]
    ]
    _, page = page_of(shards_of(tmp_path / "raw", metas))
    assert tiles(page)["sets one word apart"] == "1" and tiles(page)["sets of the same words"] == "1"
    rows = page.every("section", id="captions")[0].every("tbody")
    assert "wooden chairs, with four legs" in rows[0].text and rows[0].every("td")[0].text == "2"
    assert rows[1].every("td")[0].text == "3", "<b>old</b> is three words more"
    assert rows[1].every("mark")[0].text == "red" and "A red wooden Chair with four legs" in rows[1].text
    assert rows[1].every("small")[0].text == "or none, blue"


def test_animated_assets_and_textures_have_their_place(tmp_path: Path) -> None:
    metas = [
        {"warnings": [ANIMATED] if k else [], "mesh": {"texture_side": side}}
        for k, side in enumerate((0, 0, 64, 65, 1024))
    ]
    metas[1]["warnings"].append("it is open")
    _, page = page_of(shards_of(tmp_path / "raw", metas))
    animated, warned = (page.every("section", id=name)[0] for name in ("animated", "warnings"))
    assert animated.every(class_="count")[0].text == "4 assets"
    assert [small.text for small in animated.every(class_="uid")] == ["a1", "a2", "a3", "a4"]
    assert "it is open" in warned.text and len(warned.every(class_="finding")) == 1 and "4 of 5" in warned.text
    assert [tip.text for tip in page.every("section", id="sizes")[0].every("title")] == [
        "no texture: 2 assets",
        "up to 64 pixels: 1 assets",
        "up to 128 pixels: 1 assets",
        "up to 256 pixels: 0 assets",
        "up to 512 pixels: 0 assets",
        "up to 1,024 pixels: 1 assets",
    ]
    _, page = page_of(shards_of(tmp_path / "other", metas[2:3]))
    assert "No asset has another warning" in page.text
    assert not page_of(shards_of(tmp_path / "still", [{}]))[1].every("section", id="animated")


def test_a_procedural_set_has_a_page_too(tmp_path: Path) -> None:
    generate(
        tmp_path / "raw", ProceduralSettings(count=30, n_surface=0, n_near=0, n_uniform=0, n_views=1, image_size=32)
    )
    html, page = page_of(tmp_path / "raw", count=7)
    assert "no mesh statistics" in html and "No file was rejected" in html and "Every asset names a licence" in html
    assert len(page.every("figure")) == 7
    splits = ShardFolder(tmp_path / "raw").split_names()
    assert {name for name in splits if name in page.every(class_="splits")[0].text} == set(splits)


def test_sets_without_views_and_wrong_folders(tmp_path: Path) -> None:
    raw = shards_of(tmp_path / "raw", [{}])
    html, page = page_of(raw)
    assert "no view is stored" in html and "no caption" in html
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder: give the name"):
        write_report(raw, tmp_path)
    (raw / "rejected.jsonl").write_text('{"file": "a", "reason": "b"}\n[1]\n')
    with pytest.raises(UserError, match="line 2"):
        write_report(raw)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_without_javascript(
    raw: Path,
    browser,  # noqa: F811
    tmp_path: Path,
    width: int,
    scheme: str,
) -> None:
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    rejected = {"file": "x" * 300, "reason": "y" * 300, "picture": picture(raw / "rejected" / "a.webp", "red")}
    (raw / "rejected.jsonl").write_text(json.dumps(rejected))
    double = {"file": "ball.obj", "of": "z" * 300, "same": "shape", "picture": rejected["picture"]}
    (raw / "duplicates.jsonl").write_text(json.dumps(double))
    write_report(raw)
    viewport = {"width": width, "height": 800}
    with browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=False) as context:
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((raw / "report.html").as_uri())
        assert page.locator("#assets img").first.bounding_box()["width"] >= 90
        for name in ("h1", ".tiles", ".sheet", "table", ".finding", "figure", ".pair", "svg"):
            for box in (each.bounding_box() for each in page.locator(name).all()):
                assert box["x"] >= 0 and box["x"] + box["width"] <= width, f"{name} is wider than the window"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
        assert (np.median(shown) < 64) == (scheme == "dark")
        assert [url for url in asked if not url.startswith("data:")] == [(raw / "report.html").as_uri()]


def test_the_verb(raw: Path, tmp_path: Path, cli) -> None:
    done = cli("data", "report", raw, "--out", tmp_path / "page.html", "--count", 3)
    assert done.returncode == 0 and "4 assets, 2 rejected files" in done.stdout
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
