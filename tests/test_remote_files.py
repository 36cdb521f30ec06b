"""3D files that are not on this machine: what is found, read, refused and said, on real servers and stores."""

from __future__ import annotations

import functools
import http.server
import io
import json
import pickle
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import trimesh
from PIL import Image

from shapeloom.data_pipes import remote_files as remote
from shapeloom.data_pipes.archives import ArchiveLimits
from shapeloom.data_pipes.find import find
from shapeloom.data_pipes.limits import Limits, Rejected
from shapeloom.data_pipes.places import LocalFolder, Place
from shapeloom.data_pipes.read import read_mesh
from shapeloom.errors import UserError

BOX = trimesh.creation.box().export(file_type="glb")


def png(rgb: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), rgb).save(file, "PNG")
    return file.getvalue()


def gltf(image: str) -> dict[str, bytes]:
    """A triangle whose buffer lies beside it and whose texture is where `image` says."""
    header = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}],
        "images": [{"uri": image}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC2"},
        ],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"uri": "tri.bin", "byteLength": 36}],
    }
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
    return {"tri.gltf": json.dumps(header).encode(), "tri.bin": corners.tobytes()}


def textured() -> dict[str, bytes]:
    """Two 3D files, one of which names two more."""
    return {
        "plain.glb": BOX,
        **{f"a folder/{name}": data for name, data in gltf("../art/red%20one.png").items()},
        "art/red one.png": png((255, 0, 0)),
        ".hidden/no.glb": BOX,
        "readme.txt": b"hello",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `trouble` are status codes and breaks that come first."""

    trouble: list[int | str] = []
    asked: list[str] = []
    chunked = False

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        if Handler.trouble and self.path.endswith((".glb", ".png")):
            trouble = Handler.trouble.pop(0)
            if isinstance(trouble, int):
                return self.send_error(trouble)
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half of it")
            return None
        if Handler.chunked and self.path.endswith(".glb"):  # no length is known before the end
            self.send_response(200)
            self.end_headers()
            self.wfile.write(Path(self.translate_path(self.path)).read_bytes())
            return None
        return super().do_GET()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL under which a real server lists it."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(Handler, "trouble", [])
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.0, 0.0))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


def found(url: str | Path, tmp_path: Path, **options: ArchiveLimits) -> dict[str, Place]:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return find(url, tmp_path / "raw", scratch, **options)


def read(place: Place, limits: Limits | None = None) -> tuple:
    sidecars: dict[str, str | None] = {}
    with place.local(limits) as (path, root):
        mesh = read_mesh(path, limits, root=root, fetch=place.fetch, sidecars=sidecars)
    return mesh, sidecars


def is_red(mesh: object) -> bool:
    albedo = mesh.albedo(np.array([0]), np.full((1, 3), 1 / 3))
    return np.allclose(albedo, [1, 0, 0, 1])


def everywhere(served: tuple[Path, str], memory: fsspec.AbstractFileSystem, files: dict[str, bytes]) -> list[str]:
    """URLs that lead to the same files."""
    folder, url = served
    write(folder, files)
    for name, data in files.items():
        memory.pipe_file(f"/models/{name}", data)
    return [url, f"{url}/", "memory://models", f"file://{folder}", f"local://{folder}"]


def test_every_store_gives_the_same_files_and_meshes(
    served: tuple[Path, str], memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    for url in everywhere(served, memory, textured()):
        places = found(url, tmp_path)
        assert list(places) == ["a folder/tri.gltf", "plain.glb"], url
        places = pickle.loads(pickle.dumps(places))
        assert len(pickle.dumps(places["plain.glb"])) < 1000
        mesh, sidecars = read(places["a folder/tri.gltf"])
        assert is_red(mesh) and len(mesh.faces) == 1, url
        assert len(read(places["plain.glb"])[0].faces) == 12
        json.dumps([place.stamp for place in places.values()])
        for name in sidecars:
            stamp = places["a folder/tri.gltf"].sidecar_stamp(name)
            assert stamp is not None and len(stamp) == 2, (url, name)
        assert places["a folder/tri.gltf"].sidecar_stamp("nowhere.bin") is None
        assert places["a folder/tri.gltf"].sidecar_stamp("../../passwd") is None
    assert not list((tmp_path / "scratch").iterdir())  # downloads are gone


def test_stamps_change_with_the_files(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    folder = write(tmp_path / "models", textured())
    for name, data in textured().items():
        memory.pipe_file(f"/models/{name}", data)
    for url, change in (
        (f"local://{folder}", lambda name: write(folder, {name: png((0, 0, 9))})),
        (folder, lambda name: write(folder, {name: png((0, 9, 0))})),
        ("memory://models", lambda name: memory.pipe_file(f"/models/{name}", png((0, 0, 9)))),
    ):
        before, again = (found(url, tmp_path) for _ in range(2))
        assert before == again
        old = before["a folder/tri.gltf"].sidecar_stamp("../art/red one.png")
        assert old == again["a folder/tri.gltf"].sidecar_stamp("../art/red one.png")
        change("plain.glb")
        change("art/red one.png")
        after = found(url, tmp_path)
        assert after["plain.glb"].stamp != before["plain.glb"].stamp
        assert after["a folder/tri.gltf"].stamp == before["a folder/tri.gltf"].stamp
        assert after["a folder/tri.gltf"].sidecar_stamp("../art/red one.png") != old
        write(folder, textured())


def test_listing_takes_one_request_a_folder(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    write(folder, {f"{k % 3}/{k}.glb": BOX for k in range(30)} | {f"{k}.png": b"" for k in range(10)})
    places = found(url, tmp_path)
    assert len(places) == 30 and len(Handler.asked) <= 5  # what it is, itself, three folders
    assert all(place.stamp == [None, None] for place in places.values())
    Handler.asked.clear()
    assert all(place.sidecar_stamp("../3.png") is not None for place in places.values())
    assert len(Handler.asked) == 1


def test_files_that_a_3d_file_names_never_lead_out_of_the_folder(
    served: tuple[Path, str], memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    folder, url = served
    write(folder, {"secret.png": png((1, 2, 3)), "in/x.txt": b""})
    memory.pipe_file("/secret.png", png((1, 2, 3)))
    for uri in ("../secret.png", "..%2Fsecret.png", "/secret.png", "sub/../../secret.png", "..\\secret.png"):
        files = gltf(uri)
        write(folder / "in", files)
        for name, data in files.items():
            memory.pipe_file(f"/in/{name}", data)
        for where in (f"{url}/in", "memory://in", f"local://{folder}/in"):
            with pytest.raises(Rejected, match="outside its folder"):
                read(found(where, tmp_path)["tri.gltf"])
    assert not any("secret" in path for path in Handler.asked)


@pytest.mark.parametrize("chunked", [False, True])
def test_limits_hold_before_and_while_downloading(
    served: tuple[Path, str], memory: fsspec.AbstractFileSystem, tmp_path: Path, chunked: bool
) -> None:
    Handler.chunked = chunked
    for url in everywhere(served, memory, {"big.glb": BOX + bytes(1 << 20)}):
        with pytest.raises(Rejected, match="more than the 1,000 allowed"):
            read(found(url, tmp_path)["big.glb"], Limits(file_bytes=1000))
    small = Limits(file_bytes=len(textured()["a folder/tri.gltf"]) + 10)
    for url in everywhere(served, memory, textured() | {"art/red one.png": bytes(1 << 20)}):
        with pytest.raises(Rejected, match="too large together"):
            read(found(url, tmp_path)["a folder/tri.gltf"], small)
    Handler.chunked = False
    assert not list((tmp_path / "scratch").iterdir())


def test_what_passes_is_tried_again_and_what_does_not_is_said(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    write(folder, textured())
    places = found(url, tmp_path)
    for trouble in ([503], ["cut", 500], [429, "cut"]):
        Handler.trouble = list(trouble)
        assert len(read(places["plain.glb"])[0].faces) == 12 and not Handler.trouble
    Handler.trouble = [503]
    assert is_red(read(places["a folder/tri.gltf"])[0])
    Handler.trouble = ["cut"] * 3
    with pytest.raises(Rejected, match="it ends after 10 of 1,000,000 bytes"):
        read(places["plain.glb"])
    Handler.trouble = [403, 403]
    with pytest.raises(Rejected, match="may not be read.*403.*check the credentials"):
        read(places["plain.glb"])
    assert Handler.trouble == [403]  # not tried again
    Handler.trouble = []
    (folder / "plain.glb").unlink()
    with pytest.raises(Rejected, match="it is not there: check its address"):
        read(places["plain.glb"])


def test_one_clear_sentence_for_what_cannot_be_listed(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    for where, sentence in (
        (f"{url}/nowhere", "nowhere is not there: check its address"),
        (url, "has no 3D files"),
        ("memory://nothing", "is not there: check its address"),
        ("s3://bucket/models", "needs a package that is not installed .*: pip install .shapeloom.remote"),
        ("gs://bucket/models", "pip install .shapeloom.remote"),
        ("sftp://host/models", "pip install paramiko"),
        ("nonsense://x", "of a kind that is not known"),
        ("http://127.0.0.1:9/models?token=secret", "127.0.0.1:9/models cannot be had .*: check the address"),
        (f"file://{folder}/nowhere", "does not exist"),
    ):
        protocol = where.partition(":")[0]
        if protocol in ("s3", "gs", "sftp") and _installed(protocol):
            continue
        with pytest.raises(UserError, match=sentence) as caught:
            found(where, tmp_path)
        assert "secret" not in str(caught.value)


def _installed(protocol: str) -> bool:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return False
    return True


def test_archives_and_single_files_at_a_url(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "sub").mkdir()
    with zipfile.ZipFile(folder / "sub" / "more models.zip", "w") as archive:
        for name, data in textured().items():
            archive.writestr(name, data)
    write(folder, {"bad.zip": b"PK\x03\x04", "one.glb": BOX})
    zipped = "more models.zip/a folder/tri.gltf"
    archive_url = f"{url}/sub/more%20models.zip"
    places = found(url, tmp_path)
    assert list(places) == ["bad.zip", "one.glb", f"sub/{zipped}", "sub/more models.zip/plain.glb"]
    assert "cannot be unpacked" in places["bad.zip"].refused.reason
    assert is_red(read(places[f"sub/{zipped}"])[0])
    assert not list((tmp_path / "scratch").rglob("*.zip"))  # the download itself
    stamps = []
    for k, where in enumerate((f"{archive_url}?token=1", f"file://{folder}/sub/more models.zip")):
        (here := tmp_path / str(k)).mkdir()
        Handler.asked.clear()
        places = found(where, here)
        assert is_red(read(places[zipped])[0]) and len(places) == 2
        assert all(path.endswith("?token=1") for path in Handler.asked)
        stamps.append(places[zipped].stamp)
    # An archive's members are as old as the archive, not as their unpacking; here both know when it changed.
    assert all(stamp[0] == len(textured()["a folder/tri.gltf"]) and stamp[-1] is not None for stamp in stamps)
    (limited := tmp_path / "limited").mkdir()
    refused = found(f"zip://::{archive_url}", limited, archives=ArchiveLimits(total_bytes=100))
    assert "more than the 100 allowed" in refused["more models.zip"].refused.reason
    for where in (f"{url}/one.glb", f"file://{folder}/one.glb", f"local://{folder}/one.glb"):
        ((name, place),) = found(where, tmp_path).items()
        assert name == "one.glb" and len(read(place)[0].faces) == 12 and place.stamp[0] == len(BOX)


def test_a_listing_cannot_lead_elsewhere(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    links = ["../up.glb", "/up.glb", "http://192.0.2.1/x.glb", "//192.0.2.1/y.glb", "%2e%2e/up.glb", "a/../../up.glb"]
    links += ["javascript:x.glb", "http://[bad/x.glb", "good.glb?x=1#y", "./", "loop/", "in/%00.glb"]
    page = "".join(f'<a href="{link}">x</a>' for link in links)
    files = {"index.html": page.encode(), "good.glb": BOX}
    write(folder, {"up.glb": BOX} | {f"{where}/{name}": files[name] for where in ("in", "in/loop") for name in files})
    assert list(found(f"{url}/in", tmp_path)) == ["good.glb", "loop/good.glb"]


def test_local_places_are_what_they_were(tmp_path: Path) -> None:
    folder = write(tmp_path / "models", textured())
    (folder / "link.glb").symlink_to(write(tmp_path / "else", {"x.glb": BOX}) / "x.glb")
    (folder / "broken.glb").symlink_to(tmp_path / "nowhere.glb")
    places = found(folder, tmp_path)
    assert list(places) == ["a folder/tri.gltf", "broken.glb", "link.glb", "plain.glb"]
    place = places["link.glb"]
    assert (place.path, place.root, place.refused) == (folder / "link.glb", folder, None)
    assert place.stamp == [len(BOX), (folder / "link.glb").stat().st_mtime_ns] and place.fetch is None
    with place.local() as where:
        assert where == (folder / "link.glb", folder)
    assert places["broken.glb"].stamp == [None, None]
    assert LocalFolder(folder).stamp("link.glb") is None  # as Sidecars: what leads out is not looked at
