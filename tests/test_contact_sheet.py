"""Contact sheets: pictures where they belong, captions that fit, a truthful summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shapeloom.data_pipes.contact_sheet import contact_sheet, sheet_of_raw
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.errors import UserError

SETTINGS = ProceduralSettings(count=20, n_surface=64, n_near=32, n_uniform=32, n_views=2, image_size=32)


def plain(color: tuple[int, int, int], height: int = 20, width: int = 20) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def test_pictures_are_in_reading_order() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = contact_sheet([plain(c) for c in colors], ["", "", ""], columns=2, tile=64)
    pixels = np.asarray(sheet)
    centers = [np.argwhere((pixels == c).all(axis=-1)).mean(axis=0) for c in colors]
    assert centers[0][0] == centers[1][0] < centers[2][0]
    assert centers[0][1] == centers[2][1] < centers[1][1]
    assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all(), "white background"


def test_pictures_keep_their_proportions() -> None:
    pixels = np.asarray(contact_sheet([plain((255, 0, 0), 10, 40)], [""], columns=5, tile=80))
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(axis=-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 78)  # the outline covers a pixel on either side
    assert pixels.shape[1] < 100, "no empty columns"


def test_captions_take_room_and_stay_inside() -> None:
    image = plain((255, 0, 0))
    short = contact_sheet([image, image], ["a", "b"], columns=2, tile=64)
    long = contact_sheet([image, image], ["a red cube on top of a blue ball " * 9, "supercalifragilistic" * 9], 2, 64)
    titled = contact_sheet([image, image], ["a", "b"], columns=2, tile=64, title="results")
    assert short.width == long.width == titled.width
    assert short.height < titled.height and short.height < long.height < short.height + 4 * 20
    pixels = np.asarray(long)
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all()
    assert (pixels[:, 64 + 6 :, :][-10:, :4] == 255).all()


def test_a_mismatch_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        contact_sheet([plain((0, 0, 0))] * 2, ["one"], 2, 64)
    with pytest.raises(ValueError, match="got 0 and 0"):
        contact_sheet([], [], 2, 64)


def test_a_look_into_raw_shards(tmp_path: Path) -> None:
    generate(tmp_path / "raw", SETTINGS)
    summary = sheet_of_raw(tmp_path / "raw", tmp_path / "sheet.png", n=12)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 8 * 128 and sheet.height > 2 * 128
    assert (summary.samples, summary.shown, summary.views, summary.image_size) == (20, 12, 2, (32, 32))
    assert summary.splits["train"] == 16 and sum(summary.splits.values()) == 20
    assert sum(summary.categories.values()) == 20 and set(summary.categories) == {"single", "pair"}
    assert summary.points == {"surface": 64, "field": 64} and summary.captions_per_sample == 4
    for words in (
        "20 samples in 1 shard(s)",
        "train 16",
        "64 surface, 64 field",
        "2 of 32 x 32",
        "sheet.png, 12 samples",
    ):
        assert words in str(summary)
    before = (tmp_path / "sheet.png").read_bytes()
    sheet_of_raw(tmp_path / "raw", tmp_path / "sheet.png", n=12)
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert sheet_of_raw(tmp_path / "raw", tmp_path / "val.png", n=12, split="val").shown == 1


def test_shards_without_views_have_a_summary_alone(tmp_path: Path) -> None:
    generate(tmp_path / "raw", SETTINGS.model_copy(update={"n_views": 0, "count": 3}))
    summary = sheet_of_raw(tmp_path / "raw", tmp_path / "sheet.png")
    assert summary.picture is None and not (tmp_path / "sheet.png").exists()
    assert "no views are stored" in str(summary)
    with pytest.raises(UserError, match="not a folder of shards"):
        sheet_of_raw(tmp_path / "none", tmp_path / "sheet.png")
