"""The doctor sees what is wrong, and repairs torchvision's import where it is broken and nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shapeloom.errors import UserError
from shapeloom.launch import doctor, torchvision_repair
from shapeloom.launch.doctor import Probe

ROOT = Path(__file__).resolve().parent.parent
GOOD = {
    "torch": Probe({"built_for": None, "devices": [], "mps": False, "threads": 2}),
    "torchvision": Probe({"whole": True, "repaired": False}),
    "embree": Probe({"hit": 0}),
    "draco": Probe({"points": 3}),
}
BROKEN = Probe(None, "RuntimeError: operator torchvision::nms does not exist")


def test_this_environment_is_sound(cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("Python", "torch ", "torchvision imports", "embree", "DracoPy", "GiB free", "cores", "extras"):
        assert word in done.stdout


def test_required_packages_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert listed
    assert set(doctor.REQUIRED) == set(re.findall(r'"([A-Za-z0-9_.-]+?)[><=~]', listed.group(1)))
    assert set(doctor.required_versions()) == set(doctor.REQUIRED)
    for extra, names in doctor.EXTRAS.items():
        line = re.search(rf"^{extra} = \[(.*?)\]\n(?=\S|\n)", text, re.S | re.M)
        assert line, f"pyproject.toml has no extra {extra}"
        assert all(name in line.group(1) for name in names), f"{extra}: {names}"


def test_constraints_cover_what_is_required() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in lines}
    for name in (*doctor.REQUIRED, *doctor.EXTRAS["dev"]):
        assert name.lower().replace("-", "_") in pinned, f"{name} is not pinned"


@pytest.mark.parametrize(
    ("probes", "name", "advice"),
    [
        ({"torchvision": BROKEN}, "torchvision imports", "doctor --repair"),
        ({"embree": Probe(None, "crashed with signal 11")}, "embree", "embreex"),
        ({"embree": Probe({"hit": -1})}, "embree", "embreex"),
        ({"draco": Probe({"points": 0})}, "DracoPy", "DracoPy"),
        ({"torch": Probe(None, "OSError: libtorch.so")}, "devices", "torch"),
    ],
)
def test_what_is_broken_is_reported(
    probes: dict[str, Probe],
    name: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "run_probes", lambda wanted: GOOD | probes)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^X {name} ", printed, re.M) and advice in printed and f"Broken: {name}" in printed


def test_a_missing_or_old_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "required_versions", lambda: {"numpy": ">=99", "no-such-thing": ">=1", "rich": ">=1"})
    states = {finding.name: finding.state for finding in doctor._packages()}
    assert states == {"numpy": "broken", "no-such-thing": "broken", "rich": "ok"}


def test_a_mismatched_torchvision_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cu130", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    assert any("0.26" in finding.advice for finding in doctor._conflicts())
    versions["torchvision"] = "0.26.0"
    assert not any("torchvision" in finding.name for finding in doctor._conflicts())


def test_a_probe_that_crashes_or_hangs_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIME_S", 2.0)
    found = doctor.run_probes(
        {
            "crash": "import os; os.kill(os.getpid(), 11)",
            "hang": "while True: pass",
            "raise": "raise ValueError('told so')",
            "good": "print('noise'); print('{\"a\": 1}')",
        }
    )
    assert found["crash"].error == "crashed with signal 11"
    assert "gave no answer" in found["hang"].error
    assert found["raise"].error == "ValueError: told so"
    assert found["good"].result == {"a": 1}


def test_repair_is_refused_outside_a_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "in_virtual_environment", lambda: False)
    monkeypatch.setattr(doctor, "run_probes", lambda wanted: pytest.fail("must not get so far"))
    with pytest.raises(UserError, match="is not a virtual environment.* --yes"):
        doctor.main(repair=True)


def test_nothing_is_written_where_torchvision_is_whole(tmp_path: Path) -> None:
    assert doctor.repair_torchvision(GOOD["torchvision"], tmp_path) == ""
    assert doctor.repair_torchvision(Probe(None, "ModuleNotFoundError: No module named 'torch'"), tmp_path) == ""
    assert os.listdir(tmp_path) == []


def test_the_repair_is_written_once_and_kept_up_to_date(tmp_path: Path) -> None:
    assert "Repaired" in doctor.repair_torchvision(BROKEN, tmp_path)
    names = ["shapeloom_torchvision_repair.pth", "shapeloom_torchvision_repair.py"]
    assert sorted(os.listdir(tmp_path)) == names
    assert doctor.repair_torchvision(BROKEN, tmp_path) == ""
    (tmp_path / names[1]).write_text("# an older one")
    assert "Repaired" in doctor.repair_torchvision(GOOD["torchvision"], tmp_path)
    assert (tmp_path / names[1]).read_text() == Path(torchvision_repair.__file__).read_text()


# --- the repair itself, on a toy torchvision beside the real torch ---------------------------------------------------

TOY_TORCHVISION = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: dets)
"""


def run_with_repair(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python with the repair in `folder` as a .pth would load it, and no other one."""
    start = f"""
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_WaitForTorchvision"]
        sys.path.insert(0, {str(folder)!r})
        import site; site.addsitedir({str(folder)!r})
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(TOY_TORCHVISION)
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"not a library")
    (tmp_path / "shapeloom_torchvision_repair.py").write_text(Path(torchvision_repair.__file__).read_text())
    return tmp_path


def test_a_broken_torchvision_is_broken_without_and_imports_with_it(toy: Path) -> None:
    without = run_with_repair(toy, "import torchvision")
    assert without.returncode != 0 and "torchvision::nms does not exist" in without.stderr
    (toy / "shapeloom_torchvision_repair.pth").write_text(doctor.REPAIR_PTH)
    looked_for_first = "import importlib.util as u; u.find_spec('torchvision'); import torchvision; print('ok')"
    done = run_with_repair(toy, looked_for_first)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_the_repair_does_nothing_until_torchvision_is_imported(toy: Path) -> None:
    (toy / "shapeloom_torchvision_repair.pth").write_text(doctor.REPAIR_PTH)
    done = run_with_repair(toy, "print('torch' in sys.modules, 'shapeloom_torchvision_repair' in sys.modules)")
    assert done.stdout == "False True\n"


def test_the_repair_leaves_a_whole_torchvision_alone(toy: Path) -> None:
    (toy / "shapeloom_torchvision_repair.pth").write_text(doctor.REPAIR_PTH)
    code = """
        import torch, shapeloom_torchvision_repair as repair
        own = torch.library.Library("torchvision", "DEF")
        def load(path):           # stands for _C: its own operators come with it
            for schema in repair.SCHEMAS: own.define(schema)
        torch.ops.load_library = load
        print(repair.declare_missing("torchvision"), repair._kept)
    """
    done = run_with_repair(toy, code)
    assert (done.stdout, done.stderr) == ("False []\n", "")


def test_the_repair_does_not_hide_a_missing_torch(toy: Path) -> None:
    (toy / "shapeloom_torchvision_repair.pth").write_text(doctor.REPAIR_PTH)
    done = run_with_repair(toy, "sys.modules['torch'] = None\nimport torchvision")
    assert "import of torch halted" in done.stderr and "repair" not in done.stderr.splitlines()[-1]
