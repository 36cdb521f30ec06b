"""The command line: help, examples, and one clear sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shapeloom import __version__
from shapeloom.errors import UserError
from shapeloom.launch.cli import app
from shapeloom.launch.options import parse_seeds

VERBS = [
    "data procedural",
    "data build",
    "data show",
    "data verify",
    "data report",
    "data caption",
    "train clip",
    "train autoencoder",
    "train denoiser",
    "encode",
    "doctor",
    "sample",
    "eval r-precision",
    "eval validate",
    "eval ls",
    "eval reconstruction",
    "eval distribution",
    "eval compare",
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert f"Example: shapeloom {verb}" in shown.output


def test_help_shows_defaults() -> None:
    shown = CliRunner().invoke(app, ["data", "procedural", "--help"], env={"COLUMNS": "120"})
    assert "the preset's, or 3000" in shown.output and "the preset's, or core" in shown.output


def test_help_and_errors_need_no_torch() -> None:
    code = (
        "import sys; from shapeloom.launch import cli, options; options.parse_seeds('0'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_module_and_entry_point_are_one_command(cli) -> None:
    assert cli("--version").stdout.strip() == __version__
    script = Path(sys.executable).parent / "shapeloom"
    if not script.exists():
        pytest.skip("the package is not installed, only on the path")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.strip() == __version__


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("0,5,7", [0, 5, 7]), ("7", [7]), ("0-1, 9", [0, 1, 9]), ("3-3", [3])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not understood: write 0-3, or 0,5,7"),
        ("-1", "is not understood"),
        ("1-", "is not understood"),
        ("a", "is not understood"),
        ("1,,2", "is not understood"),
        ("1.5", "is not understood"),
        ("²", "is not understood"),
        ("3-0", "counts backwards: write 0-3"),
        ("1,1", "names a seed twice"),
        ("0-999999999999", "names more than 100000 seeds"),
    ],
)
def test_wrong_seeds(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_seeds(text)


def test_wrong_usage_exits_with_2(call) -> None:
    for words in (["nonsense"], ["data", "show"], ["sample", "x", "--steps", "none", "--out", "o"]):
        done = call(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "no/pipeline", "--text", "a cube", "--seeds", "3-0", "--out", "o"], "counts backwards"),
        (["data", "procedural", "--out", "o", "countt=3"], "unknown key 'countt'; did you mean 'count'?"),
        (["data", "procedural", "--out", "o", "--preset", "tinny"], "unknown preset 'tinny'"),
        (["data", "show", "no/raw"], "no/raw"),
        (["train", "autoencoder", "--data", "raw", "--out", "o", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["train", "clip", "--data", "raw", "--out", "o", "--config", "no.yaml"], "no.yaml does not exist"),
    ],
)
def test_mistakes_get_one_sentence(call, tmp_path: Path, words: list[str], said: str) -> None:
    refused(call(*words, cwd=tmp_path), said)
    assert not (tmp_path / "o").exists(), "a refused command must leave nothing"


def test_a_process_of_its_own_says_no_more(cli, tmp_path: Path) -> None:
    for words in (["data", "show", "no/raw"], ["train", "clip", "--data", "raw", "--out", "o", "--config", "no.yaml"]):
        refused(cli(*words, cwd=tmp_path), words[-1])


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in done.stderr
