"""diffusers finds a pipeline class of ours by name, in whichever order things are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOY_LIBRARY = """
import sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        if name == "Known":
            return "known"
        raise AttributeError(f"module {self.__name__} has no attribute {name}")
lazy = Lazy(__name__)
lazy.__spec__ = __spec__
sys.modules[__name__] = lazy      # as diffusers does
"""

ASK = """
assert toy.Ours == "ours" and calls == [1], calls
assert toy.Ours == "ours" and calls == [1], "asked twice"
assert toy.Known == "known"
try:
    toy.Unknown
except AttributeError as error:
    assert "no attribute Unknown" in str(error), error
else:
    raise SystemExit("an unknown name was found")
"""

TEACH = """
from shapeloom.diffusers_hook import teach
calls = []
teach("toy", "Ours", lambda: calls.append(1) or "ours")
"""


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import toy" + TEACH + ASK,
        TEACH + "import toy" + ASK,
        TEACH + "import importlib.util\nassert importlib.util.find_spec('toy')\nimport toy" + ASK,
        TEACH + "import toy" + ASK + "\nassert not any(getattr(f, 'library', '') == 'toy' for f in sys.meta_path)",
    ],
    ids=["imported before", "imported after", "looked for, then imported", "the hook is gone afterwards"],
)
def test_the_name_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "toy.py").write_text(TOY_LIBRARY)
    python("import sys\n" + code, tmp_path)


@pytest.mark.parametrize("order", ["import shapeloom, diffusers", "import diffusers, shapeloom"])
def test_diffusers_finds_our_pipeline(tmp_path: Path, order: str) -> None:
    code = f"""
{order}
assert diffusers.ShapeloomPipeline is shapeloom.ShapeloomPipeline
assert issubclass(diffusers.ShapeloomPipeline, diffusers.DiffusionPipeline)
assert shapeloom.ModelMixin is diffusers.ModelMixin and shapeloom.SchedulerMixin is diffusers.SchedulerMixin
assert diffusers.DDPMScheduler.__name__ == "DDPMScheduler"
"""
    python(code, tmp_path)
