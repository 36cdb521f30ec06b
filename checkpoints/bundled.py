"""Weights that come with the package: the judge of the procedural reference set, so that its numbers can be compared.

Made by (14,000 objects with nothing held out, another seed than the generator's data; about half an hour on a core). It
places all of the 360 true renders of the reference set first among 998 captions, half of which are swaps::

    shapeloom data procedural --preset tiny:judge_data --out runs/judge_raw
    shapeloom train clip --preset tiny:judge --data runs/judge_raw --out runs/judge
    python -m shapeloom.checkpoints.bundled runs/judge/clip
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..errors import UserError, run_command
from ..files import write_atomic
from .clip import CONFIG, TOKENIZER, WEIGHTS, load_clip

__all__ = ["JUDGE"]

JUDGE = Path(__file__).with_name("bundled") / "judge"


def bundle_judge(folder: Path) -> None:
    """Copy a CLIP folder to `JUDGE`, its weights in half precision: they are read into float32."""
    load_clip(folder)  # refuses what is not whole
    JUDGE.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}, JUDGE / WEIGHTS)
    for name in (CONFIG, TOKENIZER, "tokenizer_config.json"):
        write_atomic(JUDGE / name, (folder / name).read_bytes())


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give the CLIP folder to bundle: python -m shapeloom.checkpoints.bundled runs/judge/clip")
    bundle_judge(Path(sys.argv[1]))
    print(f"{JUDGE}: {(JUDGE / WEIGHTS).stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    run_command(main)
