"""Licences: which are let into a dataset, what is said of the others, and what is kept of each asset."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import trimesh
from typer.testing import CliRunner

from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.licences import LicenceFilter
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.errors import UserError
from shapeloom.launch.cli import app

SMALL = BuildSettings(n_surface=16, n_near=4, n_uniform=4, n_views=0, shard_size=2)
LICENCES = {"a": "CC0-1.0", "b": "cc-by-4.0", "c": "CC-BY-NC-4.0", "d": "", "e": "CC BY 4.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in LICENCES:
        trimesh.creation.box().export(folder / f"{name}.ply")
    rows = [f"{name}.ply,a box,{licence},Ann,https://x/{name}" for name, licence in LICENCES.items()]
    (folder / "captions.csv").write_text("\n".join(["file,caption,licence,author,source", *rows]))
    return folder


def rejected(out: Path) -> dict[str, dict[str, str]]:
    return {row["file"]: row for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}


def test_only_allowed_licences_are_built_and_the_rest_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw"
    licences = LicenceFilter.parse(["allow=cc0-1.0,CC-BY-4.0"])
    report = build(folder, out, folder / "captions.csv", SMALL, licences=licences)
    assert ShardFolder(out).uids == ["a", "b"]
    left_out = rejected(out)
    assert left_out["c.ply"]["reason"] == "its licence 'CC-BY-NC-4.0' is not allowed"
    assert "add it to --licence allow=" in left_out["c.ply"]["hint"]  # never to be called CC-BY-4.0
    assert "not given" in left_out["d.ply"]["reason"] and "captions" in left_out["d.ply"]["hint"]
    assert "'CC BY 4.0'" in left_out["e.ply"]["reason"] and "write 'CC-BY-4.0'" in left_out["e.ply"]["hint"]
    assert "rejected: 2 because its licence … is not allowed" in str(report)
    with open(out / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("uid", "file", "licence", "author", "source")
    assert [[row[key] for key in keys] for row in rows] == [
        ["a", "a.ply", "CC0-1.0", "Ann", "https://x/a"],
        ["b", "b.ply", "cc-by-4.0", "Ann", "https://x/b"],
    ]
    meta = ShardFolder(out).read_json("b")
    assert (meta["licence"], meta["author"], meta["source"]) == ("cc-by-4.0", "Ann", "https://x/b")


def test_denied_licences_are_left_out_and_all_others_are_taken(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "raw", folder / "captions.csv", SMALL, licences=LicenceFilter.parse(["deny=cc-by-nc-4.0"]))
    assert list(rejected(tmp_path / "raw")) == ["c.ply"]
    assert "deny=" in rejected(tmp_path / "raw")["c.ply"]["hint"]


def test_the_filter_is_part_of_what_a_folder_is(folder: Path, tmp_path: Path) -> None:
    captions, out = folder / "captions.csv", tmp_path / "raw"
    build(folder, out, captions, SMALL, licences=LicenceFilter.parse(["allow=CC0-1.0,CC-BY-4.0"]))
    same = LicenceFilter.parse(["allow=CC-BY-4.0", "allow=cc0-1.0"])
    assert build(folder, out, captions, SMALL, licences=same).kept_shards == 3
    for other in (None, LicenceFilter.parse(["allow=CC0-1.0"])):
        with pytest.raises(UserError, match="made with other settings .licences"):
            build(folder, out, captions, SMALL, licences=other)
    build(folder, tmp_path / "all", captions, SMALL)
    assert "licences" not in ShardFolder(tmp_path / "all").manifest["settings"]  # as before there were filters


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["alow=CC0-1.0"], "'alow=CC0-1.0' is not understood: write --licence allow="),
        (["CC0-1.0"], "is not understood"),
        (["allow="], "is not understood"),
        (["allow=a,,b"], "is not understood"),
        (["allow=A,b", "deny=a"], "both allows and denies 'A'"),
    ],
)
def test_a_wrong_filter_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LicenceFilter.parse(words)


def test_allowing_without_any_licence_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one is given: give --captions"):
        build(folder, tmp_path / "raw", None, SMALL, licences=LicenceFilter(allow=("CC0-1.0",)))
    assert not (tmp_path / "raw").exists()


def test_the_command_takes_it(folder: Path, tmp_path: Path) -> None:
    words = ["data", "build", folder, "--captions", folder / "captions.csv", "--out", tmp_path / "raw", "--workers", 1]
    settings = ["n_surface=16", "n_near=4", "n_uniform=4", "n_views=0"]
    done = CliRunner().invoke(
        app, [*map(str, words), "--licence", "allow=CC0-1.0", "--licence", "deny=CC-BY-NC-4.0", *settings]
    )
    assert done.exit_code == 0, done.output
    assert ShardFolder(tmp_path / "raw").uids == ["a"]
