"""The import arrows of the design, and a few rules of the layout, held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"errors", "files", "progress", "config"}
FOLDERS = {"models", "data_pipes", "checkpoints", "training", "eval", "launch"}
MAX_LINES = 500

# What each part may import of the rest of the package; a name stands for itself and all below it.
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "files": {"errors"},
    "config": {"errors", "files"},
    "diffusers_hook": set(),
    "__init__": {"diffusers_hook", "errors"},
    "__main__": {"launch.cli"},
    "models": {"errors"},
    "data_pipes": LEAVES | {"models.cameras"},
    "checkpoints": LEAVES | {"models"},
    "training": LEAVES | {"models", "data_pipes", "checkpoints"},
    "eval": LEAVES | {"models", "data_pipes", "checkpoints"},
    "launch": LEAVES | FOLDERS | {"__init__"},
}


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def imports(source: str, module: tuple[str, ...], is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Modules of ours that a source imports, anywhere in it, as (dotted name below the root, line).

    Args:
        module: where the source is: ("training", "loop") for training/loop.py, () for the root's __init__.py.
    """
    package = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "shapeloom":
                    yield f"absolute import of {alias.name}", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] == "shapeloom":
                yield f"absolute import of {node.module}", node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level - 1 > len(package):
                yield "relative import from above the package", node.lineno
                continue
            base = package[: len(package) - (node.level - 1)]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                inner = base + (alias.name,)
                is_module = (ROOT.joinpath(*inner).with_suffix(".py")).is_file() or ROOT.joinpath(*inner).is_dir()
                yield ".".join(inner if is_module else base) or "__init__", node.lineno


def violations(source: str, relative: Path) -> list[str]:
    """Imports of `source` (the text of the file `relative` to the root) that its part may not make."""
    parts = relative.with_suffix("").parts
    part = parts[0]
    is_package = parts[-1] == "__init__"
    found = []
    for name, line in imports(source, parts[:-1] if is_package else parts, is_package):
        if part == "__init__" and name.split(".")[0] in FOLDERS:
            continue  # the public names, for type checkers alone: the test of `import shapeloom` holds them lazy
        allowed = ALLOWED[part] | ({part} if part in FOLDERS else set())
        if not any(name == one or name.startswith(one + ".") for one in allowed):
            found.append(f"{relative}:{line} imports {name}")
    return found


def test_the_parts_import_only_what_they_may() -> None:
    found = [line for path in sources() for line in violations(path.read_text("utf-8"), path.relative_to(ROOT))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("where", "source", "wrong"),
    [
        ("models/denoiser.py", "from .transformer import Block\nfrom ..errors import UserError", False),
        ("models/denoiser.py", "from ..files import read_json", True),
        ("models/denoiser.py", "def f():\n    from ..training.loop import fit", True),
        ("data_pipes/render.py", "from ..models.cameras import Cameras", False),
        ("data_pipes/render.py", "from ..models import cameras", False),
        ("data_pipes/render.py", "from ..models.denoiser import Denoiser", True),
        ("eval/report.py", "from ..training.loop import fit", True),
        ("training/loop.py", "import shapeloom.models", True),
        ("training/loop.py", "from shapeloom.models import denoiser", True),
        ("training/loop.py", "from ...models import denoiser", True),
        ("training/loop.py", "from .. import launch", True),
        ("launch/cli.py", "from .. import __version__\nfrom ..training.stages import run_stage", False),
        ("files.py", "from .config import Config", True),
    ],
)
def test_the_check_itself(where: str, source: str, wrong: bool) -> None:
    assert bool(violations(source, Path(where))) is wrong


def test_every_source_belongs_to_a_known_part() -> None:
    known = set(ALLOWED) | {"tests", "docs"}
    for path in ROOT.glob("*/*.py"):
        assert path.parent.name in known, f"{path.relative_to(ROOT)} is in a folder the design does not name"
    for path in ROOT.glob("*.py"):
        assert path.stem in known, f"{path.name} is a root module the design does not name"


def test_no_file_is_too_long() -> None:
    every = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]
    long = [f"{p.relative_to(ROOT)}: {n}" for p in every if (n := len(p.read_text("utf-8").splitlines())) > MAX_LINES]
    assert not long, f"more than {MAX_LINES} lines: {long}"


def test_tests_have_no_init() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "it makes pytest load a second copy of every class"


def test_pytest_did_not_import_a_second_copy() -> None:
    root = str(ROOT / "__init__.py")
    copies = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == root]
    assert copies in ([], ["shapeloom"])


def test_importing_the_package_is_light() -> None:
    code = "import sys, shapeloom; print([m for m in ('torch', 'numpy', 'diffusers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_exist() -> None:
    import shapeloom

    for name in shapeloom.__all__:
        assert getattr(shapeloom, name) is not None
        assert name in dir(shapeloom)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        shapeloom.Nonsense  # noqa: B018
