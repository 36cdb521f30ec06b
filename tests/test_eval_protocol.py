"""Protocols are frozen: their hashes stand here, and change only with a name's version."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from shapeloom.errors import UserError
from shapeloom.eval.benchmark.protocol import FOLDER, load_protocol, protocol_names, published_rows

HASHES = {
    "cap3d-8v": "90a7ccecdc0f1610",
    "default-v1": "c6fd53c5d3ef0677",
    "dreamfields-45": "78284cd0834382c7",
    "dreamfusion-e30": "b63ff5fbae528e04",
    "reference-v1": "c733f99267d6eca2",
    "trellis-8v": "3a8c007f6578867f",
}


def test_every_protocol_loads_under_its_own_name():
    assert protocol_names() == sorted(HASHES)
    for name in protocol_names():
        assert load_protocol(name).name == name


@pytest.mark.parametrize("name", sorted(HASHES))
def test_a_protocol_does_not_change_under_its_name(name):
    assert load_protocol(name).hash[:16] == HASHES[name], "give it a new version instead"


def test_the_hash_covers_numbers_and_not_words(tmp_path):
    fields = yaml.safe_load((FOLDER / "default-v1.yaml").read_text())
    path = tmp_path / "mine.yaml"
    own = load_protocol("default-v1")
    path.write_text(yaml.safe_dump({**fields, "about": "other words"}))
    assert load_protocol(path).hash == own.hash
    for change in ({"resolution": 225}, {"aggregation": "any view"}, {"caption_template": "a 3D model of {text}"}):
        path.write_text(yaml.safe_dump({**fields, **change}))
        assert load_protocol(path).hash != own.hash
    assert load_protocol(path).render_key == own.render_key  # a caption's template renders nothing anew


def test_cameras_stand_where_the_protocol_says():
    views = load_protocol("dreamfields-45").views()
    x, y, z = views.camera_to_world[0, :3, 3]
    assert np.allclose(
        [x, y, z], 4 * np.array([0.5 * np.cos(np.pi / 4), np.sin(np.pi / 4), np.sqrt(3) / 2 * np.cos(np.pi / 4)])
    )
    assert views.width == 224 and abs(views.focal[0] / 224 - 1111.11 / 800) < 0.002  # Dream Fields' focal length
    assert len(load_protocol("default-v1").views()) == 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resolutions": 64}, "resolution"),
        ({"aggregation": "median"}, "aggregation"),
        ({"shadings": ["textureless"]}, "shadings must begin with colour"),
        ({"caption_template": "a render"}, "must hold {text} once"),
        ({"cameras": {"azimuths_deg": [], "elevation_deg": 0, "distance": 4, "fov_deg": 40}}, "azimuths_deg"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, change, says):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((FOLDER / "default-v1.yaml").read_text()), **change}))
    with pytest.raises(UserError) as caught:
        load_protocol(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_protocol_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no protocol 'nonsense'; there are cap3d-8v, default-v1"):
        load_protocol("nonsense")
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(UserError, match="is not valid YAML at line"):
        load_protocol(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- a")
    with pytest.raises(UserError, match="must hold settings by name"):
        load_protocol(tmp_path / "a.yaml")


def test_the_list_names_protocols_and_what_weights_are_here(call):
    shown = call("eval", "ls").stdout
    for name in protocol_names():
        assert f"  {name}  {load_protocol(name).hash[:12]}" in shown
    assert "  + judge  " in shown and "  + tiny-colours  " in shown and "  - ViT-B-32-quickgelu/openai  " in shown
    assert "Evaluators" not in call("eval", "ls", "protocols").stdout


def test_published_rows_name_their_source():
    rows = published_rows(load_protocol("dreamfusion-e30"))
    assert {row.system for row in rows} >= {"DreamFusion", "Shap-E 300M, text", "COCO photographs"}
    assert all(row.source and 0 < row.r_at_1 < 100 for row in rows)
    assert published_rows(load_protocol("default-v1")) == []
