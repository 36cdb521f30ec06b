"""Peak memory of a build against the number of its assets: it must not grow with them.

    python -m shapeloom.launch.bench.build_memory                 # 1,000 and 10,000 boxes: about 10 minutes
    python -m shapeloom.launch.bench.build_memory --counts 100 400

The boxes are of different sizes, with few points and one small view each, so that what is measured is what is kept per
asset: by the process that hands out the work, and by a worker, of which one is watched.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trimesh

from .measure import finish

SETTINGS = ("n_surface=64", "n_near=32", "n_uniform=32", "n_views=1", "image_size=16")


def write_boxes(folder: Path, count: int) -> None:
    """STL files whose boxes have other heights: one written, its coordinates replaced."""
    data = bytearray(trimesh.creation.box().export(file_type="stl"))
    for number in range(count):
        place = folder / f"{number // 1000:03d}" / f"box{number:06d}.stl"
        place.parent.mkdir(parents=True, exist_ok=True)
        height = 0.5 + number / count
        for face in range(12):
            for corner in range(3):
                at = 84 + 50 * face + 12 + 12 * corner + 8
                (z,) = struct.unpack_from("<f", data, at)
                struct.pack_into("<f", data, at, height if z > 0 else -height)
        place.write_bytes(data)


def peaks_mb(folder: Path, out: Path) -> tuple[float, float, float]:
    """Peak resident memory of the parent and of the largest of its workers, and the seconds of the build."""
    words = [sys.executable, "-m", "shapeloom", "data", "build", str(folder), "--out", str(out), "--workers", "1"]
    start = time.perf_counter()
    peaks: dict[int, int] = {}
    with subprocess.Popen([*words, *SETTINGS], env={**os.environ, "OMP_NUM_THREADS": "1"}) as parent:
        while parent.poll() is None:
            for pid in (parent.pid, *_children(parent.pid)):
                peaks[pid] = max(peaks.get(pid, 0), _peak_kb(pid))
            time.sleep(0.2)
        if parent.returncode:
            raise SystemExit("error: the build failed")
    workers = [peak for pid, peak in peaks.items() if pid != parent.pid]
    return peaks[parent.pid] / 1024, max(workers) / 1024, time.perf_counter() - start


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of a build against the number of assets (Linux)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        with tempfile.TemporaryDirectory() as place:
            write_boxes(Path(place) / "boxes", count)
            parent, worker, seconds = peaks_mb(Path(place) / "boxes", Path(place) / "raw")
        rows.append(
            {"assets": count, "parent_mb": round(parent), "worker_mb": round(worker), "seconds": round(seconds, 1)}
        )
    grown = rows[-1]["parent_mb"] - rows[0]["parent_mb"]
    more = rows[-1]["assets"] - rows[0]["assets"]
    finish({"benchmark": "build_memory", "rows": rows, "parent_bytes_per_asset": round(grown * 2**20 / max(more, 1))})


if __name__ == "__main__":
    main()
