"""``shapeloom eval``: the verbs that put numbers on what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .options import (
    CORES,
    Device,
    ImageGuidance,
    Solver,
    Steps,
    TextGuidance,
    Workers,
    parse_seeds,
)

app = typer.Typer(help="Put numbers on what was made.", no_args_is_help=True)


# --- options that several verbs share --------------------------------------------------------------------------------

Prompts = Annotated[Path, typer.Option(help="prompts.jsonl, a .txt of captions, or a folder of raw shards.")]
Generated = Annotated[
    Path | None,
    typer.Option(help="Objects of any system, named ID.glb, ID/SEED.glb (obj, ply, stl, off) or ID/SEED/rgb_0.png …"),
]
Protocol = Annotated[str, typer.Option(help="A protocol's name, or a YAML file; see eval ls.")]
SomeSeeds = Annotated[str | None, typer.Option(help="Such as 0-3, or 0,5,7.", show_default="those found")]
AllowDownload = Annotated[bool, typer.Option("--allow-download", help="Fetch weights that are not on this machine.")]
Up = Annotated[Literal["y", "z"], typer.Option(help="The axis that points up in the meshes.")]


@app.command(
    "r-precision",
    epilog="Example: shapeloom eval r-precision --generated meshes/ --prompts prompts.jsonl --evaluator "
    "ViT-B-32/openai --out runs/eval",
)
def r_precision(
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Where results.json, report.html and the pictures go.")],
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            help="A CLIP: open_clip's NAME/PRETRAINED, a folder, ARCH=FILE, judge, tiny-colours; give it several times."
        ),
    ] = None,
    generated: Generated = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="A pipeline folder to make the objects with, instead of --generated.")
    ] = None,
    protocol: Protocol = "default-v1",
    seeds: SomeSeeds = None,
    conditioned_by: Annotated[
        list[str] | None,
        typer.Option(help="A CLIP that the system was conditioned or guided by: an evaluator like it is no judge."),
    ] = None,
    up: Up = "y",
    condition: Annotated[
        Literal["text", "image", "both"], typer.Option(help="What the pipeline makes objects from.")
    ] = "text",
    steps: Steps = 24,
    solver: Solver = "own",
    text_guidance: TextGuidance = 3.0,
    image_guidance: ImageGuidance = 2.0,
    resolution: Annotated[int, typer.Option(min=4, help="Points of the mesh's lattice along an edge.")] = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, to try things out: the result is no result.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Render and embed this part only, for clusters without a launcher."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Renders and embeddings, to share between runs.", show_default="OUT/cache")
    ] = None,
    workers: Workers = CORES,
    time_limit: Annotated[int, typer.Option(min=1, help="Seconds of processor time for rendering one object.")] = 60,
    allow_download: AllowDownload = False,
    device: Device = None,
) -> None:
    """Score objects of any text-to-3D system by CLIP R-precision, with its controls and intervals.

    Several ranks share the work: accelerate launch -m shapeloom eval r-precision … (on CPUs: torchrun)."""
    from ..eval.benchmark.r_precision import run

    sampling = None
    if pipeline is not None:
        from ..eval.benchmark.make import Sampling

        sampling = Sampling(condition, steps, solver, text_guidance, image_guidance, resolution)
    run(
        prompts,
        out,
        generated=generated,
        pipeline=pipeline,
        sampling=sampling,
        protocol=protocol,
        evaluators=evaluator or (),
        seeds=None if seeds is None else parse_seeds(seeds),
        conditioned_by=conditioned_by or (),
        up=up,
        limit=limit,
        shard=shard,
        cache_folder=cache,
        workers=workers,
        time_limit_s=time_limit,
        allow_download=allow_download,
        device=device,
    )


@app.command(
    "validate", epilog="Example: shapeloom eval validate --generated meshes/ --prompts prompts.jsonl --seeds 0-3"
)
def validate(
    prompts: Prompts,
    generated: Generated = None,
    protocol: Protocol = "default-v1",
    seeds: SomeSeeds = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(help="Count the captions' tokens for this CLIP.", show_default="77 of CLIP's BPE"),
    ] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="Captions the system was trained on (.txt, .jsonl, raw shards): is any a prompt?"),
    ] = None,
    workers: Workers = CORES,
) -> None:
    """Check prompts and objects without a model: what is missing, empty, broken, given twice or too long to be read.

    Exits with 1 if anything is missing or broken."""
    from ..eval.benchmark.validate import validate as check

    chosen = None if seeds is None else parse_seeds(seeds)
    raise typer.Exit(check(prompts, generated, protocol, chosen, evaluator or (), workers, trained_on))


@app.command("ls", epilog="Example: shapeloom eval ls evaluators")
def ls(
    what: Annotated[
        Literal["all", "protocols", "evaluators"], typer.Argument(metavar="[WHAT]", help="protocols or evaluators.")
    ] = "all",
) -> None:
    """List protocols, and evaluators with what weights are present."""
    from ..eval.benchmark.listing import show

    show(what)


@app.command(
    "reconstruction",
    epilog="Example: shapeloom eval reconstruction runs/ae/autoencoder --data raw/ --out runs/ae/eval. Of any meshes: "
    "shapeloom eval reconstruction --generated made/ --references true/ --out scores/",
)
def reconstruction(
    out: Annotated[Path, typer.Option(help="Where results.json and the pictures go.")],
    autoencoder: Annotated[Path | None, typer.Argument(metavar="[AUTOENCODER]", help="An autoencoder folder.")] = None,
    data: Annotated[str | None, typer.Option(help="With AUTOENCODER: a folder of raw shards, or a URL.")] = None,
    split: Annotated[
        str | None, typer.Option(help="With AUTOENCODER: which split.", show_default="all that were held out")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="With AUTOENCODER: at most so many objects.", show_default="all")
    ] = None,
    device: Device = None,
    generated: Annotated[
        Path | None, typer.Option(help="Instead of AUTOENCODER: a folder of meshes (GLB, OBJ, OFF, PLY, STL).")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="With --generated: a folder of the true meshes, by the same names.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            help="With --generated: none, box, yaw4 or yaw24 (so many turns about +Y, the nearest is taken).",
            show_default="box",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --generated: processes to use.", show_default="all cores")
    ] = None,
) -> None:
    """Compare objects with what they should be: IoU, Chamfer distance, F-score, normals, colour, pictures.

    Either held-out objects with their reconstructions by AUTOENCODER, or two folders of meshes."""
    if autoencoder and data and not any((generated, references, align, workers)):
        from ..eval.metrics.reconstruction import run

        run(autoencoder, data, out, split=split, count=count, device=device)
    elif generated and references and not any((autoencoder, data, split, count, device)):
        from ..eval.metrics.reconstruction import run_folders

        run_folders(generated, references, out, align=align or "box", workers=workers or CORES)
    else:
        raise UserError(
            "give AUTOENCODER and --data (and --split, --count, --device), or --generated and --references "
            "(and --align, --workers)"
        )


@app.command(
    "distribution",
    epilog="Example: shapeloom eval distribution --generated made/ --references true/ --evaluator clip/ --out scores/",
)
def distribution(
    generated: Annotated[Path, typer.Option(help="A folder of meshes (GLB, OBJ, OFF, PLY, STL).")],
    references: Annotated[Path, typer.Option(help="A folder of meshes of what they should be like.")],
    out: Annotated[Path, typer.Option(help="Where results.json goes.")],
    evaluator: Annotated[
        str | None,
        typer.Option(help="A CLIP, for Fréchet distance, KID and CMMD.", show_default="only points are compared"),
    ] = None,
    workers: Workers = CORES,
    allow_download: AllowDownload = False,
    device: Device = None,
) -> None:
    """Compare two folders of meshes as sets: Fréchet distance, KID, CMMD, coverage, MMD, 1-NNA, with a noise floor."""
    from ..eval.metrics.distribution_run import run

    run(
        generated,
        references,
        out,
        evaluator=evaluator,
        workers=workers,
        allow_download=allow_download,
        device=device,
    )


@app.command(
    "compare",
    epilog="Example: shapeloom eval compare runs/old/eval runs/new/eval --fail-if-worse 5",
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B [C]", help="Folders of r-precision runs.")],
    metric: Annotated[str, typer.Option(help="r@1, r@5, r@10, mrr, cosine or margin.")] = "r@1",
    evaluator: Annotated[str | None, typer.Option(help="By its name.", show_default="A's headline")] = None,
    shading: Annotated[str | None, typer.Option(help="colour or textureless.", show_default="A's headline")] = None,
    gallery: Annotated[str | None, typer.Option(help="By its name.", show_default="A's headline")] = None,
    group: Annotated[str, typer.Option(help="A group of prompts.")] = "all",
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take runs of --limit too.")] = False,
    fail_if_worse: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="End with exit code 3 if another run is worse than A by more than so many percentage points, the "
            "whole 95 % interval counted.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write what is found there, too.")] = None,
) -> None:
    """Compare run A with B (and C ...) on the prompts they share: how much better, and can it be known?

    Exit code 0; 1 is an error; 3 is worse by --fail-if-worse."""
    from ..eval.benchmark.compare import compare as compare_runs

    found = compare_runs(
        runs,
        metric=metric,
        evaluator=evaluator,
        shading=shading,
        gallery=gallery,
        group=group,
        allow_partial=allow_partial,
        out=out,
    )
    if fail_if_worse is not None and found.has_worse(fail_if_worse):
        raise typer.Exit(3)
