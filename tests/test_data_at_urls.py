"""Looking at and checking shards at a URL: as at a folder, over real HTTP and a real command."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image
from typer.testing import CliRunner

from shapeloom.data_pipes.contact_sheet import sheet_of_raw
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.remote_shards import RemoteSource
from shapeloom.data_pipes.report import write_report
from shapeloom.data_pipes.verify import verify
from shapeloom.errors import UserError
from shapeloom.launch.cli import app

SETTINGS = ProceduralSettings(count=6, n_surface=16, n_near=8, n_uniform=8, n_views=2, image_size=16, shard_size=4)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, SETTINGS)
    (folder / "rejected").mkdir()
    Image.new("RGBA", (8, 8), "red").save(folder / "rejected" / "chair.webp", lossless=True)
    entry = {"file": "chair.glb", "reason": "it is empty", "hint": "fill it", "picture": "rejected/chair.webp"}
    Image.new("RGB", (8, 8), "blue").save(folder.parent / "secret.png")
    outside = [{**entry, "picture": name} for name in ("../secret.png", str(folder.parent / "secret.png"))]
    (folder / "rejected.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (entry, *outside)))
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The standard library's, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


class Secretive(Quiet):
    """As S3 to those who may not list: what is not there is forbidden."""

    def send_error(self, code: int, *_: object) -> None:
        super().send_error(403 if code == 404 else code)


class Dropping(Quiet):
    """Loses the connection half way through each file's first answer."""

    begun: set[str]

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        data = source.read()
        outputfile.write(data if self.path in self.begun else data[: len(data) // 2])
        self.begun.add(self.path)


@contextlib.contextmanager
def serving(handler: type[Quiet], folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteSource, "retry_after_s", ())


@pytest.fixture(params=["http", "pipe", "file"])
def url(request: pytest.FixtureRequest, raw: Path) -> Iterator[str]:
    if request.param != "http":
        yield f"pipe:cat {raw}/{{name}}" if request.param == "pipe" else f"file://{raw}"
        return
    with serving(Quiet, raw) as address:
        yield address


def said(*arguments: str) -> str:
    """What the command line says of what goes well."""
    result = CliRunner().invoke(app, ["data", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_is_the_folder_s(raw: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_report(raw, "here.html")
    assert "report.html: 6 assets, 3 rejected files" in said("report", url)
    here, there = (Path(name).read_text().partition("</h1>")[2] for name in ("here.html", "report.html"))
    assert there == here, "but for the name at its head"
    assert here.count("src=") == 7, "six assets and the one picture that lies beside them"


def test_a_contact_sheet_is_the_folder_s(raw: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = said("show", url).splitlines()
    assert (tmp_path / "contact_sheet.png").stat().st_size > 0
    assert str(sheet_of_raw(raw, "here.png")).splitlines()[1:-1] == there[1:-1]


def test_verify_finds_what_is_wrong_where_it_lies(raw: Path, url: str, tmp_path: Path) -> None:
    found = verify(url)
    assert not found.faults and found.samples == 6, str(found)
    broken = shutil.copytree(raw, tmp_path / "broken")
    data = bytearray((broken / "shard-00001.tar").read_bytes())
    data[3000] ^= 1
    (broken / "shard-00001.tar").write_bytes(data)
    (broken / "shard-00000.tar").unlink()
    here, there = verify(broken).faults, verify(f"pipe:cat {broken}/{{name}}").faults
    assert len(here) == 3 and "shard-00000.tar: it cannot be read" in here[0]
    assert "shard-00000.tar cannot be had (OSError: the command ended with 1" in there[0]
    assert there[1:] == here[1:], "the shard that is there has the same faults"


@pytest.mark.parametrize("look", [write_report, sheet_of_raw])
def test_a_page_or_sheet_never_takes_another_file_s_place(raw: Path, tmp_path: Path, look: Callable) -> None:
    copy = shutil.copytree(raw, tmp_path / "raw")
    before = (copy / "shard-00000.tar").read_bytes()
    with pytest.raises(UserError, match="must be named"):
        look(copy, copy / "shard-00000.tar")
    assert (copy / "shard-00000.tar").read_bytes() == before


@pytest.mark.parametrize("look", [write_report, sheet_of_raw, verify])
def test_what_is_not_there_is_told_in_a_sentence(look: Callable[[str], object]) -> None:
    for url in ("memory://nowhere/raw", "http://127.0.0.1:9/raw", "pipe:cat /nowhere/{name}"):
        with pytest.raises(UserError, match=re.escape(url.partition("{")[0])):
            look(url)
    with pytest.raises(UserError, match="is not a folder of shards"):
        look("/nowhere")


def test_lists_that_are_not_there_may_be_forbidden(raw: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(raw, tmp_path / "raw", ignore=shutil.ignore_patterns("rejected*"))
    with serving(Secretive, plain) as address:
        assert "6 assets, 0 rejected files" in write_report(address, tmp_path / "page.html")
        assert not verify(address).faults


def test_what_is_cut_short_on_the_way_is_asked_for_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteSource, "retry_after_s", (0.0,))
    monkeypatch.setattr(Dropping, "begun", set(), raising=False)
    with serving(Dropping, raw) as address:
        assert not verify(address).faults
        assert len(Dropping.begun) == 6, "manifest, index, and two of each shard"
    monkeypatch.setattr(RemoteSource, "retry_after_s", ())
    monkeypatch.setattr(Dropping, "begun", set())
    with (
        serving(Dropping, raw) as address,
        pytest.raises(UserError, match=r"manifest\.json cannot be had .*it ends after"),
    ):
        write_report(address, tmp_path / "page.html")


def test_no_secret_of_an_address_is_told(raw: Path, tmp_path: Path) -> None:
    for url in ("http://me:p@hush@127.0.0.1:9/raw?token=hush", "http://127.0.0.1:9/my raw?token=hush", "http://[hush/"):
        with pytest.raises(UserError) as error:
            verify(url)
        assert "hush" not in str(error.value).replace("http://[hush/", "")
    write_report(f"pipe:token=hush; cat {raw}/{{name}}", tmp_path / "page.html")
    assert "hush" not in (tmp_path / "page.html").read_text()


def test_an_address_is_quoted_as_a_browser_does(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "root" / "m\u00fc raw")
    with serving(Quiet, tmp_path / "root") as address:
        assert not verify(f"{address}/m\u00fc raw").faults and not verify(f"{address}/m%C3%BC%20raw").faults


@pytest.mark.parametrize("name", ["", "/", "x" * 300 + ".tar"])
def test_a_name_that_is_none_is_a_fault_among_others(raw: Path, tmp_path: Path, name: str) -> None:
    odd = shutil.copytree(raw, tmp_path / "raw")
    manifest = json.loads((odd / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (odd / "manifest.json").write_text(json.dumps(manifest))
    found = verify(odd)
    assert found.faults and found.samples == 2, "the other shard was read"
