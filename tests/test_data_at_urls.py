"""Looking at and checking shards at a URL: as at a folder, over real HTTP and a real command."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

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
    outside = {"file": "table.glb", "reason": "it is empty", "hint": "fill it", "picture": "../../secret.png"}
    (folder / "rejected.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (entry, outside)))
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The standard library's, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteSource, "retry_after_s", ())


@pytest.fixture(params=["http", "pipe", "file"])
def url(request: pytest.FixtureRequest, raw: Path) -> Iterator[str]:
    if request.param != "http":
        yield f"pipe:cat {raw}/{{name}}" if request.param == "pipe" else f"file://{raw}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(raw))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def said(*arguments: str) -> str:
    """What the command line says of what goes well."""
    result = CliRunner().invoke(app, ["data", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_is_the_folder_s(raw: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_report(raw, "here.html")
    assert "report.html: 6 assets, 2 rejected files" in said("report", url)
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
    assert there[2:] == here[1:], "the shard that is there has the same faults"


@pytest.mark.parametrize("look", [write_report, sheet_of_raw, verify])
def test_what_is_not_there_is_told_in_a_sentence(look: Callable[[str], object]) -> None:
    for url in ("memory://nowhere/raw", "http://127.0.0.1:9/raw", "pipe:cat /nowhere/{name}"):
        with pytest.raises(UserError, match=re.escape(url.partition("{")[0])):
            look(url)
    with pytest.raises(UserError, match="is not a folder of shards"):
        look("/nowhere")
