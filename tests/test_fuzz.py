"""The fuzz script: its damage is what it says, reading survives it, and it tells failures apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import trimesh

from shapeloom.data_pipes.workers import Failed
from shapeloom.launch.bench import fuzz

WHOLE = trimesh.creation.box().export(file_type="glb")


def test_damage_is_the_same_for_the_same_seed_and_is_damage() -> None:
    first, again = ([fuzz.mutate(WHOLE, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 190


def test_an_edited_json_header_leaves_a_whole_glb() -> None:
    for seed in range(200):
        edited = fuzz.edit_json(WHOLE, random.Random(seed))
        end = 20 + fuzz.json_size(edited)
        assert int.from_bytes(edited[8:12], "little") == len(edited)
        assert isinstance(json.loads(edited[20:end]), dict)
        assert edited[end:] == WHOLE[20 + fuzz.json_size(WHOLE) :]
    assert sum(fuzz.edit_json(WHOLE, random.Random(seed)) != WHOLE for seed in range(200)) > 190


def test_damaged_files_load_or_are_rejected(assets_dir: Path, tmp_path: Path) -> None:
    hard = [path for path in sorted((assets_dir / "hard").rglob("*.glb")) if fuzz.is_whole(path)]
    sources = [path for path in hard if path.stat().st_size < 50_000]
    reasons = [fuzz.outcome(fuzz.Mutant(sources[i % len(sources)], tmp_path, 3, i)) for i in range(1000)]
    assert reasons.count("") > 20
    assert any("structure is broken" in reason for reason in reasons)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("reading it failed with TypeError: no", "raised"),
        ("it took longer than 10 s of processor time", "over_limits"),
        ("it needs more than 4 GB of memory", "over_limits"),
        ("the process that read it died (SIGSEGV)", "crashed"),
    ],
)
def test_what_a_workers_failure_means(reason: str, kind: str) -> None:
    assert fuzz.failure_kind(Failed(reason)) == kind


def test_a_file_that_cannot_be_read_is_counted_as_raised(tmp_path: Path) -> None:
    (tmp_path / "box.glb").write_bytes(WHOLE)
    good, gone = (fuzz.Mutant(tmp_path / name, tmp_path, 0, 1) for name in ("box.glb", "gone.glb"))
    counts, failures = fuzz.fuzz([good, gone], workers=1)
    assert counts["raised"] == 1 and counts["loaded"] + counts["rejected"] == 1
    assert "FileNotFoundError" in failures[0]
