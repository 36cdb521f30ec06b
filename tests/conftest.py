"""What all tests share: offline, one thread a process, the real assets where there are some, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch or tokenizers are imported by any test; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Files of long tests that share next to nothing.
LONG = {"test_launch_files", "test_layouts", "test_quickstart", "test_resume"}
Cli = Callable[..., subprocess.CompletedProcess[str]]


class _RootIsNoTestPackage:
    """Keeps pytest from importing the root as a package of the checkout's name: a second copy, if it imports at all."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # A conftest's own hook would not be asked about the folder above it.
    config.pluginmanager.register(_RootIsNoTestPackage())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)  # first, lest one process ends long after the other


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, a file's tests run in one process, so that what they share is made once; LONG's are spread."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).stem in LONG else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root, which is the package."""
    return ROOT


@pytest.fixture(scope="session")
def assets_dir() -> Path:
    """The folder of real 3D assets: $SHAPELOOM_ASSETS, or shared/assets beside the repository. Skips without it."""
    folder = Path(os.environ.get("SHAPELOOM_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no real assets in {folder} (set SHAPELOOM_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def call() -> Cli:
    """Runs the command in this process, which saves its start: for all but what only a process of its own shows."""

    def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        from latent_folders import shapeloom

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "120")
            patch.setenv("NO_COLOR", "1")
            if cwd:
                patch.chdir(cwd)
            return subprocess.CompletedProcess(words, *shapeloom(*words))

    return run


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs ``python -m shapeloom`` with the given words in a process of its own."""

    def run(*words: object, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shapeloom", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
        )

    return run
