"""``shapeloom doctor``: what this machine and environment have, what is wrong, and the one repair it can make itself.

It must run where the stack is broken, so it uses the standard library alone and looks at everything else from outside:
each thing that may crash is imported in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import write_atomic
from . import torchvision_repair

State = Literal["ok", "note", "broken"]

PROBE_TIME_S = 300.0  # a first import on a cold, slow disk can take minutes
ENOUGH_DISK_BYTES = 5 << 30
REPAIR_NAME = "shapeloom_torchvision_repair"
REPAIR_PTH = f"import {REPAIR_NAME}; {REPAIR_NAME}.install()\n"

# What pyproject.toml requires and its extras, by distribution. Used where the package itself is not installed.
REQUIRED = (
    *("torch", "torchvision", "accelerate", "diffusers", "transformers", "safetensors", "open_clip_torch"),
    *("webdataset", "trimesh", "embreex", "DracoPy", "scipy", "scikit-image", "numpy", "Pillow"),
    *("pydantic", "PyYAML", "typer", "rich", "tensorboard", "packaging", "peft", "numba", "fsspec"),
)
EXTRAS = {
    "deepspeed": ("deepspeed",),
    "xformers": ("xformers",),
    "usd": ("usd-core",),
    "remote": ("s3fs", "gcsfs"),
    "export": ("xatlas", "fast-simplification", "usd-core"),
    "eval": ("torchmetrics", "lpips"),
    "ray": ("ray",),
    "viewer": ("viser",),
    "wandb": ("wandb",),
    "dev": ("pytest", "pytest-xdist", "pytest-timeout", "ruff", "mypy", "ray", "usd-core"),
}

PROBES = {
    "torch": """
import json, torch
mps = getattr(torch.backends, "mps", None)
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if cuda else 0)]
devices = [f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for i, gpu in enumerate(gpus)]
print(json.dumps({"built_for": torch.version.cuda, "devices": devices, "mps": bool(mps and mps.is_available()),
                  "threads": torch.get_num_threads()}))
""",
    "torchvision": """
import json, sys, torchvision
from torchvision import extension
print(json.dumps({"whole": bool(extension._has_ops()), "repaired": "shapeloom_torchvision_repair" in sys.modules}))
""",
    "embree": """
import json, numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
scene = EmbreeScene()
TriangleMesh(scene, np.array([[[-1, -1, 0], [1, -1, 0], [0, 1, 0]]], np.float32))
hit = scene.run(np.array([[0, 0, 1]], np.float32), np.array([[0, 0, -1]], np.float32), query="INTERSECT")
print(json.dumps({"hit": int(hit[0])}))
""",
    "draco": """
import json, numpy as np, DracoPy
points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
mesh = DracoPy.decode(DracoPy.encode(points, np.array([[0, 1, 2]], np.uint32)))
print(json.dumps({"points": len(mesh.points)}))
""",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says what to do about it, where there is something to do."""

    state: State
    name: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """What a piece of Python printed as JSON, or the last line of its complaint."""

    result: dict[str, Any] | None
    error: str = ""


def main(repair: bool = False, yes: bool = False) -> int:
    """Print the report. Returns the exit code: 1 if something required is broken.

    Args:
        repair: put torchvision right first, if it needs it.
        yes: allow the repair outside a virtual environment.
    Raises: UserError if a repair is asked for outside a virtual environment, without `yes`.
    """
    if repair and not yes and not in_virtual_environment():
        raise UserError(
            f"{sys.prefix} is not a virtual environment, so nothing is written there; run this inside one, or add --yes"
        )
    probes = run_probes(PROBES)
    if repair:
        what_was_done = repair_torchvision(probes["torchvision"])
        if what_was_done:
            print(what_was_done)
            probes |= run_probes({"torchvision": PROBES["torchvision"]})
    findings = list(examine(probes))
    print_report(findings)
    broken = [f.name for f in findings if f.state == "broken"]
    print(f"\nBroken: {', '.join(broken)}" if broken else "\nEverything required works.")
    return 1 if broken else 0


# --- looking ---------------------------------------------------------------------------------------------------------


def run_probes(probes: dict[str, str]) -> dict[str, Probe]:
    """Run each piece of Python in a process of its own, side by side."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=os.sep,  # the current folder may hold a file called torch.py
            env=environment,
        )
        for name, code in probes.items()
    }
    return {name: _answer(process) for name, process in running.items()}


def _answer(process: subprocess.Popen[str]) -> Probe:
    try:
        printed, complaint = process.communicate(timeout=PROBE_TIME_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Probe(None, f"gave no answer in {PROBE_TIME_S:.0f} s")
    if process.returncode < 0:
        return Probe(None, f"crashed with signal {-process.returncode}")
    lines = printed.strip().splitlines()
    if process.returncode == 0 and lines:
        try:
            return Probe(json.loads(lines[-1]))
        except json.JSONDecodeError:
            pass
    said = [line for line in complaint.strip().splitlines() if line.strip()]
    return Probe(None, said[-1].strip() if said else f"exit code {process.returncode}")


def examine(probes: dict[str, Probe]) -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield from _machine()
    yield from _packages()
    yield from _devices(probes["torch"])
    yield _torchvision(probes["torchvision"])
    embree, draco = probes["embree"], probes["draco"]
    if embree.result and embree.result["hit"] == 0:
        yield Finding("ok", "embree", "casts rays")
    else:
        yield Finding("broken", "embree", embree.error or "misses a triangle", "pip install --force-reinstall embreex")
    if draco.result and draco.result["points"] == 3:
        yield Finding("ok", "DracoPy", "reads compressed meshes")
    else:
        yield Finding("broken", "DracoPy", draco.error or "loses points", "pip install --force-reinstall DracoPy")
    yield from _extras()
    yield from _conflicts()


def _machine() -> Iterator[Finding]:
    inside = "virtual environment" if in_virtual_environment() else "no virtual environment"
    new_enough = sys.version_info >= (3, 10)
    yield Finding(
        "ok" if new_enough else "broken",
        "Python",
        f"{platform.python_version()} ({inside}: {sys.prefix})",
        "" if new_enough else "Python 3.10 or newer is needed",
    )
    yield Finding("ok", "system", f"{_os_name()}, {platform.machine()}")
    memory = memory_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shown = f"{memory / 2**30:.0f} GiB of memory" if memory else "memory unknown"
    small = bool(memory) and memory < 8 << 30
    advice = "the quickstart wants 8 GiB" if small else ""
    yield Finding("note" if small else "ok", "processor", f"{cores} cores, {shown}", advice)
    free = shutil.disk_usage(Path.cwd()).free
    full = free < ENOUGH_DISK_BYTES
    yield Finding(
        "note" if full else "ok",
        "disk",
        f"{free / 2**30:.0f} GiB free here",
        "the quickstart wants 5 GiB with its environment" if full else "",
    )


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.platform(terse=True)


def memory_bytes() -> int:
    """The memory this process may use: the machine's, or its container's limit. 0 where that cannot be told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return total


def _packages() -> Iterator[Finding]:
    for name, specifier in required_versions().items():
        version = installed_version(name)
        if version is None:
            yield Finding("broken", name, "is not installed", f'pip install "{name}{specifier}"')
        elif not _allows(specifier, version):
            yield Finding("broken", name, f"{version}, but {specifier} is needed", f'pip install "{name}{specifier}"')
        else:
            yield Finding("ok", name, version)


def required_versions() -> dict[str, str]:
    """Required distribution -> version specifier, from the installed package's own metadata."""
    try:
        lines = importlib.metadata.requires("shapeloom") or []
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys(REQUIRED, "")
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", requirement)
        if match and "extra" not in marker:
            found[match.group(1)] = match.group(2).strip()
    return found


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _allows(specifier: str, version: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # its own line of the report says so
        return True
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _devices(probe: Probe) -> Iterator[Finding]:
    if probe.result is None:
        yield Finding("broken", "devices", f"torch does not import: {probe.error}", "reinstall torch")
        return
    found = probe.result
    build = f"CUDA {found['built_for']}" if found["built_for"] else "CPU"
    for device in found["devices"]:
        yield Finding("ok", "device", device)
    if found["mps"]:
        yield Finding("ok", "device", "mps")
    yield Finding("ok", "device", f"cpu, {found['threads']} threads (torch is built for {build})")
    if not found["devices"] and shutil.which("nvidia-smi") and not os.environ.get("SHAPELOOM_CPU"):
        yield Finding(
            "note",
            "GPU",
            f"nvidia-smi is there, but torch (built for {build}) sees no GPU",
            "install the pair of constraints-cuda.txt, and a driver new enough for it",
        )


def _torchvision(probe: Probe) -> Finding:
    if probe.result is None:
        return Finding("broken", "torchvision imports", f"no: {probe.error}", "shapeloom doctor --repair")
    if probe.result["whole"]:
        return Finding("ok", "torchvision imports", "yes, with its operators")
    how = "repaired; " if probe.result["repaired"] else ""
    return Finding("ok", "torchvision imports", f"yes ({how}without its compiled operators, which nothing here needs)")


def _extras() -> Iterator[Finding]:
    present = []
    for extra, names in EXTRAS.items():
        have = [name for name in names if installed_version(name) is not None]
        if len(have) == len(names):
            present.append(extra)
        elif have:
            present.append(f"{extra} (only {', '.join(have)})")
    if shutil.which(os.environ.get("SHAPELOOM_BLENDER", "blender")):
        present.append("blender")
    yield Finding("ok", "extras", ", ".join(present) or "none")


def _conflicts() -> Iterator[Finding]:
    """Combinations that were seen to fail, or to do the wrong thing without a word."""
    torch, vision = installed_version("torch"), installed_version("torchvision")
    if torch and vision:
        made_for = _minor(torch) + 15  # torchvision 0.28 goes with torch 2.13, and so on
        if torch.startswith("2.") and vision.startswith("0.") and _minor(vision) != made_for:
            yield Finding(
                "note",
                "torchvision version",
                f"{vision} is not the one made for torch {torch}",
                f'pip install "torchvision==0.{made_for}.*"',
            )
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in sorted(cache.glob("**/lock"))[:3]:
        yield Finding(
            "note", "extension lock", f"{lock} is there", "if nothing is being compiled, delete it: builds wait for it"
        )
    if importlib.util.find_spec("xformers") and not shutil.which("nvidia-smi"):
        yield Finding("note", "xformers", "works on CUDA alone; sdpa is used on this machine")


def _minor(version: str) -> int:
    match = re.match(r"\d+\.(\d+)", version)
    return int(match.group(1)) if match else -1


# --- repairing -------------------------------------------------------------------------------------------------------


def in_virtual_environment() -> bool:
    """A venv, or a conda environment other than the base one."""
    conda = os.environ.get("CONDA_PREFIX", "")
    named_conda = conda and os.environ.get("CONDA_DEFAULT_ENV") != "base" and Path(conda) == Path(sys.prefix)
    return sys.prefix != sys.base_prefix or bool(named_conda)


def repair_torchvision(probe: Probe, site_packages: Path | None = None) -> str:
    """Write the repair if torchvision does not import, or bring an older one up to date. Returns what was done."""
    folder = site_packages or Path(sysconfig.get_paths()["purelib"])
    module, pth = folder / f"{REPAIR_NAME}.py", folder / f"{REPAIR_NAME}.pth"
    code = Path(torchvision_repair.__file__).read_text(encoding="utf-8")
    is_current = module.is_file() and pth.is_file() and module.read_text(encoding="utf-8") == code
    present = module.exists() or pth.exists()
    needed = probe.result is None and "torchvision" in probe.error
    if installed_version("torchvision") is None or is_current or not (needed or present):
        return ""
    try:
        write_atomic(module, code)  # first the module: a .pth without it would complain in every process
        write_atomic(pth, REPAIR_PTH)
    except OSError as error:
        raise UserError(f"the repair cannot be written into {folder} ({error.strerror or error})") from None
    return f"Repaired torchvision's import: wrote {module.name} and {pth.name} into {folder}"


def print_report(findings: list[Finding]) -> None:
    """One aligned line each; what is wrong is marked and says what to do."""
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": "  ", "note": "! ", "broken": "X "}
    for finding in findings:
        advice = f"\n  {'':{width}}    -> {finding.advice}" if finding.advice else ""
        print(f"{marks[finding.state]}{finding.name:{width}}  {finding.text}{advice}")
