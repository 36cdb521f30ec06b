"""``shapeloom eval``: the verbs that put numbers on what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    CORES,
    Device,
    ImageGuidance,
    PipelineFolder,
    RawData,
    Seeds,
    Solver,
    Steps,
    TextGuidance,
    Workers,
    parse_seeds,
)

app = typer.Typer(help="Put numbers on what was made.", no_args_is_help=True)


@app.command(
    "r-precision",
    epilog="Example: shapeloom eval r-precision runs/x/pipeline --data raw/ --judge runs/judge/clip --out runs/x/eval",
)
def r_precision(
    pipeline: PipelineFolder,
    data: RawData,
    judge: Annotated[Path, typer.Option(help="A CLIP folder that the pipeline's conditioner is not.")],
    out: Annotated[Path, typer.Option(help="Where results.json and the pictures go.")],
    seeds: Seeds = "0",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="At most so many test captions.", show_default="all of them")
    ] = None,
    image_prompts: Annotated[int, typer.Option(min=0, help="How many objects to make from an image alone.")] = 100,
    steps: Steps = 24,
    solver: Solver = "own",
    text_guidance: TextGuidance = 3.0,
    image_guidance: ImageGuidance = 2.0,
    workers: Workers = CORES,
    device: Device = None,
) -> None:
    """Score generated objects by CLIP R-precision, in a random and a hard pool, with intervals."""
    from ..eval.r_precision import run

    run(
        pipeline,
        data,
        judge,
        out,
        seeds=parse_seeds(seeds),
        prompts=prompts,
        image_prompts=image_prompts,
        steps=steps,
        solver=solver,
        text_guidance=text_guidance,
        image_guidance=image_guidance,
        workers=workers,
        device=device,
    )


@app.command(
    "reconstruction",
    epilog="Example: shapeloom eval reconstruction runs/ae/autoencoder --data raw/ --out runs/ae/eval",
)
def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(metavar="AUTOENCODER", help="An autoencoder folder.")],
    data: RawData,
    out: Annotated[Path, typer.Option(help="Where results.json and the pictures go.")],
    split: Annotated[str | None, typer.Option(help="Which split.", show_default="all that were held out")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="At most so many objects.", show_default="all")] = None,
    device: Device = None,
) -> None:
    """Compare held-out objects with their reconstructions: IoU, colour, Chamfer distance, F-score."""
    from ..eval.reconstruction import run

    run(autoencoder, data, out, split=split, count=count, device=device)
