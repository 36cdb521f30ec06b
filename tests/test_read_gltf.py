"""Reading glTF: what is said of animated files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trimesh

from shapeloom.data_pipes.limits import ANIMATED
from shapeloom.data_pipes.read import read_mesh

CHANNEL = {"sampler": 0, "target": {"node": 0, "path": "translation"}}


@pytest.mark.parametrize(
    ("animations", "warned"),
    [
        (None, False),
        ([], False),
        ([{"channels": []}], False),
        ([{"channels": [CHANNEL], "samplers": []}], True),
        ([{}, {"channels": [CHANNEL]}], True),
        ("nonsense", False),
        ([5, None], False),
    ],
)
def test_an_animated_file_says_once_that_it_is_at_rest(tmp_path: Path, animations: Any, warned: bool) -> None:
    files = trimesh.creation.box().export(file_type="gltf")
    header = json.loads(files.pop("model.gltf"))
    if animations is not None:
        header["animations"] = animations
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.gltf").write_text(json.dumps(header))
    warnings: list[str] = []
    assert len(read_mesh(tmp_path / "a.gltf", warnings=warnings).faces) == 12
    assert warnings == [ANIMATED] * warned
