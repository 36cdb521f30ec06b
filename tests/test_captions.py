"""Captions files: CSV and JSONL say the same, and every mistake in them is one sentence with its place."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import trimesh

from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.caption_twins import words_of
from shapeloom.data_pipes.captions import AssetText, read_captions
from shapeloom.data_pipes.hashes import Hashes
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.errors import UserError

FILES = ["chair.glb", "sub/tisch.obj"]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"file": "./chair.glb", "captions": ["a chair", "a  red\tchair"], "licence": "CC0-1.0", "author": "Ann, Bob"},
        {"file": "sub\\tisch.obj", "captions": ["ein Tisch, grün\u2028und rund"], "category": "table", "source": None},
        {"file": "chair.glb", "captions": ["a chair", "a seat"]},
    ]
    lines = [json.dumps(row, ensure_ascii=i == 0) for i, row in enumerate(rows)]
    jsonl = write(tmp_path / "c.JSONL", "\ufeff" + "\r\n\n".join(lines))
    table = io.StringIO()
    out = csv.DictWriter(table, ["file", "caption", "caption_2", "category", "license", "author", "source", "notes"])
    out.writeheader()
    for row in rows:
        of_csv = dict(zip(("caption", "caption_2"), row["captions"])) | {"notes": "passed over"}
        names = {"file": "file", "licence": "license", "author": "author", "category": "category", "source": "source"}
        out.writerow(of_csv | {names[name]: value for name, value in row.items() if name in names})
    said = read_captions(jsonl, FILES)
    assert said == read_captions(write(tmp_path / "c.csv", table.getvalue()), FILES)
    assert said == {
        "chair.glb": AssetText(("a chair", "a red chair", "a seat"), None, "CC0-1.0", "Ann, Bob", None),
        "sub/tisch.obj": AssetText(("ein Tisch, grün und rund",), "table", None, None, None),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: each of its lines must be like"),
        ('{"file": "chair.glb", "captions": ["a"]}\n{"file"', "line 2: it is not valid JSON"),
        ('["chair.glb", "a"]', "line 1: it is not a JSON object"),
        ('"chair.glb"', "line 1: it is not a JSON object"),
        ("[" * 100_000, "line 1: it is n"),  # as deep as the reader goes, or not JSON
        ('{"file": "chair.glb", "caption": "a"}', "unknown key 'caption', rename it to 'captions'"),
        (
            '{"file": "chair.glb", "captions": ["a"], "lisence": "x"}',
            "unknown key 'lisence', rename it to 'li[cs]ence'",
        ),
        ('{"file": "chair.glb", "file": "b", "captions": []}', "a key is in it twice"),
        ('{"captions": ["a"]}', "no key 'file'"),
        ('{"file": "chair.glb"}', "no key 'captions'"),
        ('{"file": "chair.glb", "captions": "a"}', "'captions' must be a list of texts"),
        ('{"file": "chair.glb", "captions": {"a": "b"}}', "'captions' must be a list of texts"),
        ('{"file": 3, "captions": []}', "'file' must be a text"),
        ('{"file": "chair.glb", "captions": [], "author": ["Ann"]}', "'author' must be a text"),
        ('{"file": "chair.glb", "captions": ["\\ud800"]}', "half of a character"),
        ('\n{"file": "chiar.glb", "captions": []}', "line 2: there is no 3D file 'chiar.glb'.*nearest is 'chair.glb'"),
    ],
)
def test_a_mistake_in_jsonl_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_captions(write(tmp_path / "captions.jsonl", text), FILES)
    assert "captions.jsonl" in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "is UTF-16 text, not UTF-8: save it again"),
        ("utf-16-le", "is UTF-16 text"),
        ("utf-16-be", "is UTF-16 text"),
        ("utf-32", "is UTF-16"),
        ("latin-1", "is not UTF-8 text .line 2 has the byte 0xfc, as Latin-1"),
    ],
)
def test_a_wrong_encoding_is_named(tmp_path: Path, suffix: str, encoding: str, said: str) -> None:
    text = {"csv": "file,caption\nchair.glb,grün", "jsonl": '\n{"file": "chair.glb", "captions": ["grün"]}'}[suffix]
    read_captions(write(tmp_path / f"right.{suffix}", text), FILES)
    with pytest.raises(UserError, match=said):
        read_captions(write(tmp_path / f"wrong.{suffix}", text.encode(encoding)), FILES)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "file,caption,licence\nchair.glb,a,CC0-1.0\nchair.glb,b,CC0-1.0\nchair.glb,c,CC-BY-4.0\n"),
        ("c.jsonl", '{"file": "chair.glb", "captions": [], "licence": "CC0-1.0", "license": "CC-BY-4.0"}'),
    ],
)
def test_two_licences_of_one_file_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match="'chair.glb' has two licences, 'C.*' and 'C.*'"):
        read_captions(write(tmp_path / name, text), FILES)


def test_repeated_captions_are_counted_by_their_words_in_order() -> None:
    def repeated(*captions: str) -> int:
        hashes = Hashes()
        for caption in captions:
            hashes.add(" ".join(words_of(caption)))
        return hashes.repeated()

    assert repeated() == 0
    assert repeated("a red box", "A red box.", "a  red, box", "a box, red", "ein Würfel", "EIN WÜRFEL") == 3
    assert repeated("a red box on a blue ball", "a blue ball on a red box") == 0


def test_a_build_takes_jsonl_and_reports_repeated_captions(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in "abcd":
        trimesh.creation.box().export(tmp_path / "models" / f"{name}.ply")
    (tmp_path / "models" / "d.ply").write_bytes(b"ply")  # rejected, so its caption counts for nothing
    rows = [{"file": "a.ply", "captions": ["B!", "a box"]}, {"file": "c.ply", "captions": ["A box."]}]
    rows.append({"file": "d.ply", "captions": ["a box"]})
    captions = write(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, rows)))
    settings = BuildSettings(n_surface=16, n_near=4, n_uniform=4, n_views=0)
    report = build(tmp_path / "models", tmp_path / "raw", captions, settings)
    assert report.repeated_captions == 2  # c's, and the one made of b's name
    assert "2 captions have the same words as another" in str(report)
    assert ShardFolder(tmp_path / "raw").read_json("a")["captions"] == ["B!", "a box"]
    assert build(tmp_path / "models", tmp_path / "raw", captions, settings).repeated_captions == 2  # read again
