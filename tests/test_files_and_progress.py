"""Files are whole or absent; progress says what is left; a command ends as users should see it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shapeloom import files
from shapeloom.errors import ASIDE, UserError, sentence_of
from shapeloom.progress import Bar, format_seconds, track


def test_write_atomic_replaces_and_keeps_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.txt"
    files.write_atomic(path, "één")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["x.txt"]
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_atomic_folder(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with files.atomic_folder(tmp_path / "run") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
    assert [p.name for p in (tmp_path / "run").rglob("*")] == ["sub", "second"]
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "run") as folder:
        (folder / "third").write_text("")
        raise KeyError
    assert (tmp_path / "run" / "sub" / "second").is_file() and os.listdir(tmp_path) == ["run"]


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_json({"a": 1, "b": [1.5]}) == files.sha256_json({"b": [1.5], "a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.sha256_json({"a": float("nan")})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "the manifest .*x.json does not exist"),
        (b"{", r"the manifest .*x.json is not valid JSON \(line 1"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 200_000, "is not valid JSON"),
    ],
)
def test_read_json_names_the_file_and_the_problem(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        files.read_json(path, "the manifest")


def test_read_json_refuses_folders_and_giants(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path, "the manifest")
    (tmp_path / "x").write_text("[1, 2, 3]")
    with pytest.raises(UserError, match="9 bytes long, more than the 4 allowed"):
        files.read_json(tmp_path / "x", "the manifest", limit_bytes=4)


def test_track_yields_everything_and_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track((i for i in range(3)), total=3, description="counting")) == [0, 1, 2]
    assert capsys.readouterr().err == "counting: 3/3  done in 0:00\n"


def test_a_bar_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("shapeloom.progress.time.monotonic", lambda: now)
    with Bar(total=100, description="train", start=50) as bar:
        for _ in range(10):
            now += 4
            bar.update(1, loss=0.5, stage="x")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 53/100  0:12 passed  3:08 left  loss 0.5  stage x"
    assert [line.split()[1] for line in lines] == ["53/100", "56/100", "59/100", "60/100"]  # at most every 10 s


def test_a_quiet_bar_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=2, quiet=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


def test_what_the_user_is_told() -> None:
    assert sentence_of(UserError("a sentence"), []) == "a sentence"
    assert sentence_of(ValueError("a bug"), []) is None
    assert "disk is full" in (sentence_of(OSError(errno.ENOSPC, "No space", "runs/x"), []) or "")
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "raw/manifest.json")
    assert sentence_of(missing, ["data", "show", "raw/"]) == "raw/manifest.json: No such file or directory"
    assert sentence_of(missing, ["data", "show", "other/"]) is None


def test_ctrl_c_and_bugs() -> None:
    def end(code: str) -> subprocess.CompletedProcess[str]:
        code = f"from shapeloom.errors import *\ndef f(): {code}\nrun_command(f)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    stopped, bug = end("raise KeyboardInterrupt"), end("1 / 0")
    assert (stopped.returncode, stopped.stderr) == (130, "")
    assert bug.returncode == 1 and "bug in shapeloom" in bug.stderr and "ZeroDivisionError" in bug.stderr
    told = end("raise UserError('x is not y')")
    assert (told.returncode, told.stderr) == (1, "error: x is not y\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_path_that_cannot_be_written_is_told_as_the_user_named_it() -> None:
    exists = FileExistsError(errno.EEXIST, "File exists", "setup.log")
    assert sentence_of(exists, ["data", "show", "raw", "--out", "setup.log/q.png"]) == "setup.log: File exists"
    aside = FileNotFoundError(errno.ENOENT, "No such file or directory", f"/proc/q.png{ASIDE}h5f")
    assert (
        sentence_of(aside, ["data", "show", "raw", "--out", "/proc/q.png"]) == "/proc/q.png: No such file or directory"
    )
    assert sentence_of(FileNotFoundError(errno.ENOENT, "No such file", "elsewhere"), ["raw"]) is None
