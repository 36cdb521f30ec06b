"""What awkward files take: each of ../shared/assets/hard built whole, in a process of its own.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.hard

Each file is read, judged, sampled, rendered and encoded with the default settings, under a build's own limits. Seconds
are by the clock, memory is the process's largest resident size, Python and its libraries included.
Aim: what the manifest expects, at most 10 s and 2 GB each. The exit code is 1 where a file is another than expected.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data_pipes.asset import BuildSettings, Built, Job, build_asset, prepare
from ...data_pipes.captions import AssetText
from ...data_pipes.executors import Guard
from ...data_pipes.licences import LicenceFilter
from ...data_pipes.places import LocalFolder, Place
from ...errors import UserError, run_command
from ...progress import Bar
from .measure import finish

HARD = Path(__file__).resolve().parents[3] / "shared" / "assets" / "hard"
# What the manifest expects, and what may come of it.
ALLOWED = {
    "load": {"built"},
    "empty": {"empty"},
    "error": {"unreadable", "empty", "not finite"},
    "either": {"built", "unreadable", "empty", "not finite"},
}


def main(folder: Annotated[Path, typer.Option(help="Where manifest.jsonl is.")] = HARD) -> None:
    """Build every awkward file and say what it came to, the slowest and the largest first."""
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise UserError(f"there is no {manifest}: give --folder")
    rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    prepare()
    found = []
    with Bar(len(rows), "awkward files") as bar:
        for row in rows:
            found.append(measured(folder, row["file"]))
            bar.update(1)
    wrong = [(row, one) for row, one in zip(rows, found) if one["outcome"] not in ALLOWED[row["expect"]]]
    for row, one in wrong:
        print(f"{row['file']}: expected {row['expect']}, is {one['outcome']} {one['reason']}")
    for key in ("seconds", "MB"):
        for one in sorted(found, key=lambda one: -one[key])[:5]:
            print(f"{one['file']:60s} {one['seconds']:6.2f} s  {one['MB']:6.0f} MB  {one['outcome']} {one['reason']}")
    outcomes = [one["outcome"] for one in found]
    finish(
        {
            "benchmark": "hard",
            "files": len(rows),
            **{name: outcomes.count(name) for name in sorted(set(outcomes))},
            "unexpected": len(wrong),
            "slowest_s": round(max(one["seconds"] for one in found), 2),
            "largest_MB": round(max(one["MB"] for one in found)),
        }
    )
    if wrong:
        raise SystemExit(1)


def measured(folder: Path, file: str) -> dict[str, Any]:
    """What one file came to in a forked child, its seconds and its largest resident size."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(folder, file, theirs))
    start = time.perf_counter()
    child.start()
    theirs.close()
    try:
        outcome, reason, n_kilobytes = ours.recv()
    except EOFError:
        outcome, reason, n_kilobytes = "died", "", 0
    seconds = time.perf_counter() - start
    child.join()
    return {"file": file, "outcome": outcome, "reason": reason, "seconds": seconds, "MB": n_kilobytes * 1024 / 1e6}


def _measure(folder: Path, file: str, answer: Any) -> None:
    guard = Guard()
    resource.setrlimit(resource.RLIMIT_AS, (guard.memory_bytes, guard.memory_bytes))
    place = Place(LocalFolder(folder), file)
    job = Job(place, file, "asset", AssetText(), BuildSettings(), guard.limits, LicenceFilter())
    try:
        built = build_asset(job)
        outcome, reason = ("built", "") if isinstance(built, Built) else (built.rejected.kind, built.rejected.reason)
    except BaseException as error:
        outcome, reason = "raised", repr(error)
    answer.send((outcome, reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


if __name__ == "__main__":
    run_command(main)
