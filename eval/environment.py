"""Versions and the machine, for the record of a result. Imports nothing of what it names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["environment"]

PACKAGES = ("shapeloom", "torch", "diffusers", "transformers", "open_clip_torch", "numpy", "trimesh", "embreex")


def environment() -> dict[str, str]:
    """Python, platform, CPUs, packages, and the commit of a source checkout."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found | _commit()


def _commit() -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": done.stdout.strip()}
