"""Damaged GLB files by the thousand: each must load or be rejected; nothing may crash, hang or end the parent.

    python -m shapeloom.launch.bench.fuzz --files 10000 --seed 0 [--workers 2] [--only 1234]

File i is a file of the folder, drawn and damaged by a generator seeded with (seed, i): single bytes, ranges, cuts, the
28 bytes of GLB headers, or values of the JSON header, which then is whole again, so that the damage reaches what reads
accessors, images and the scene graph. `--only i` reads that one file here, where an exception shows its traceback.
The last line is JSON; the exit code is 1 if reading raised anything but `Rejected` or ended a worker. Going over the
limits (10 s of processor time, 4 GB of address space) is counted, but is what limits are for.
"""

from __future__ import annotations

import copy
import json
import random
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ...data_pipes.mesh import NORMALISED_SIDE
from ...data_pipes.read import Rejected, read_mesh
from ...data_pipes.workers import Failed, isolated_map
from ...errors import UserError, run_command
from ...progress import Bar
from .measure import finish

PACK = Path(__file__).resolve().parents[3] / "shared" / "assets" / "pack"
CPU_S, WALL_S, MEMORY_BYTES = 10, 120.0, 4 << 30
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**40,
    2**64,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "data:,",
    "../x",
    [],
    {},
    [[]],
    [0] * 5,
]


@dataclass(frozen=True)
class Mutant:
    """File `index` of the run with `seed`, made of `source`; written into `folder` while it is read."""

    source: Path
    folder: Path
    seed: int
    index: int

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.index}")


def main(
    folder: Annotated[Path, typer.Option(help="Where the whole GLB files are.")] = PACK,
    files: Annotated[int, typer.Option(min=1, help="How many to damage and read.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the choice of files and of the damage.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read.")] = 1,
    only: Annotated[int | None, typer.Option(help="Read this one in this process.")] = None,
) -> None:
    """Read damaged GLB files and count how that ends."""
    sources = [path for path in sorted(folder.rglob("*.glb")) if is_whole(path)]
    if not sources:
        raise UserError(f"there are no whole .glb files under {folder}: give --folder")
    with tempfile.TemporaryDirectory(prefix="shapeloom-fuzz-") as scratch:
        choice = random.Random(seed)
        mutants = [Mutant(choice.choice(sources), Path(scratch), seed, index) for index in range(files)]
        if only is not None:
            if not 0 <= only < files:
                raise UserError(f"--only must be below --files ({files}), as in the run that it is taken from")
            print(f"{mutants[only].source}: {outcome(mutants[only])}")
            return
        counts, failures = fuzz(mutants, workers)
    finish({"benchmark": "fuzz", "files": files, "seed": seed, **counts, "failures": failures[:20]})
    if counts["raised"] or counts["crashed"]:
        raise SystemExit(1)


def fuzz(mutants: list[Mutant], workers: int) -> tuple[dict[str, float], list[str]]:
    """Read all in workers. Returns counts with the slowest file's seconds, and a line for each that failed."""
    counts: dict[str, float] = dict.fromkeys(("loaded", "rejected", "raised", "crashed", "over_limits"), 0)
    reasons: Counter[str] = Counter()
    failures, slowest_s = [], 0.0
    results = isolated_map(
        timed_outcome, mutants, workers=workers, cpu_s=CPU_S, wall_s=WALL_S, memory_bytes=MEMORY_BYTES
    )
    with Bar(len(mutants), "damaged files") as bar:
        for mutant, result in zip(mutants, results):
            if isinstance(result, Failed):
                kind = failure_kind(result)
                failures.append(f"{mutant.index}: {result.reason}")
            else:
                reason, seconds = result
                kind = "rejected" if reason else "loaded"
                reasons[re.sub(r"\(.*\)|[\d,]*\d", "…", reason)[:80]] += bool(reason)
                slowest_s = max(slowest_s, seconds)
            counts[kind] += 1
            bar.update(1, **{name: counts[name] for name in ("loaded", "rejected")}, failed=len(failures))
    for reason, count in reasons.most_common(20):
        print(f"{count:6d}  {reason}")
    return counts | {"slowest_s": round(slowest_s, 2)}, failures


def failure_kind(failed: Failed) -> str:
    """What a worker's answer means: "raised" (an exception that is not `Rejected`), "over_limits" or "crashed"."""
    if failed.reason.startswith("reading it failed"):
        return "raised"
    return "over_limits" if failed.reason.startswith(("it took longer", "it needs more")) else "crashed"


def timed_outcome(mutant: Mutant) -> tuple[str, float]:
    """Runs in a worker: `outcome` and the seconds it took."""
    start = time.perf_counter()
    return outcome(mutant), time.perf_counter() - start


def outcome(mutant: Mutant) -> str:
    """The reason why a mutant is rejected, or "" where it is read into a mesh that can be sampled."""
    path = mutant.folder / f"{mutant.index}.glb"
    path.write_bytes(mutate(mutant.source.read_bytes(), mutant.rng()))
    try:
        mesh, _ = read_mesh(path).normalised()
    except Rejected as rejected:
        return rejected.reason
    finally:
        path.unlink()
    every_F = np.arange(len(mesh.faces))
    assert np.isfinite(mesh.albedo(every_F, np.full((len(every_F), 3), 1 / 3))).all(), "a colour is not finite"
    assert abs(np.ptp(mesh.triangles, axis=(0, 1)).max() - NORMALISED_SIDE) < 1e-3, "its normalised size is wrong"
    return ""


# ---------------------------------------------------------------------------------------------------------- damage


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A GLB file with one kind of damage, drawn."""
    damage: Callable[[bytes, random.Random], bytes] = rng.choice(
        [set_bytes, fill_range, cut, edit_headers, *[edit_json] * 4]
    )
    return damage(data, rng)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    """1 to 16 bytes take other values, each anywhere or, half of the time, in the JSON chunk."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 16)):
        end = len(data) if rng.random() < 0.5 else 20 + json_size(data)
        damaged[rng.randrange(end)] = rng.randrange(256)
    return bytes(damaged)


def fill_range(data: bytes, rng: random.Random) -> bytes:
    """Up to 4096 bytes are overwritten, taken out, or put in twice."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 4096))
    new = rng.choice(
        [bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start), b"", data[start:stop] * 2]
    )
    return data[:start] + new + data[stop:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing; half of the time the file's header says so."""
    data = data[: rng.randrange(len(data))]
    if len(data) >= 12 and rng.random() < 0.5:
        data = data[:8] + struct.pack("<I", len(data)) + data[12:]
    return data


def edit_headers(data: bytes, rng: random.Random) -> bytes:
    """One field of the file's header or of a chunk's takes another value."""
    place = rng.choice([0, 4, 8, 12, 16, 20 + json_size(data), 24 + json_size(data)])
    size = int.from_bytes(data[place : place + 4], "little")
    value = rng.choice([0, 1, size ^ 1, size - 4, size + 4, 2**31, 2**32 - 1, rng.getrandbits(32)]) % 2**32
    return data[:place] + struct.pack("<I", value) + data[place + 4 :]


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """1 to 4 values of the JSON header are replaced, taken out or swapped; lengths are made right again."""
    end = 20 + json_size(data)
    header = json.loads(data[20:end])
    for _ in range(rng.randint(1, 4)):
        places = list(containers(header))
        if not places:
            break
        # By kind of place, not by place: else nearly all would be numbers of accessors.
        kind = rng.choice(sorted({name for name, _ in places}))
        parent = rng.choice([container for name, container in places if name == kind])
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        action = rng.choice(["replace", "replace", "replace", "remove", "swap", "add"])
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif action == "remove":
            del parent[key]
        elif action == "swap":
            parent[key] = copy.deepcopy(rng.choice(places)[1])
        elif isinstance(parent[key], int | float):
            parent[key] += rng.choice([-1, 1, 4, 1e6])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    rest = data[end:]
    return data[:8] + struct.pack("<II", 20 + len(text) + len(rest), len(text)) + data[16:20] + text + rest


def is_whole(path: Path) -> bool:
    """Whether a file is a GLB to the end of its JSON chunk: what is broken before would break the editing of it."""
    data = path.read_bytes()
    try:
        return data.startswith(b"glTF") and isinstance(json.loads(data[20 : 20 + json_size(data)]), dict)
    except ValueError:
        return False


def json_size(data: bytes) -> int:
    """Bytes of a whole GLB's JSON chunk."""
    return int.from_bytes(data[12:16], "little")


def containers(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every non-empty object and list in a JSON value, with the last key on the way to it."""
    if not isinstance(value, dict | list) or not value:
        return []
    inner = value.items() if isinstance(value, dict) else ((name, item) for item in value)
    return [(name, value), *(found for key, item in inner for found in containers(item, key))]


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
