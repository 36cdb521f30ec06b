"""``shapeloom data``: the verbs that make, build, caption and look at raw shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .options import CORES, Device, Overrides, Preset, Workers

Raw = Annotated[str, typer.Argument(metavar="RAW", help="A folder of raw shards, or a URL (s3://, https://, pipe:).")]

app = typer.Typer(help="Make, build, caption and look at raw shards.", no_args_is_help=True)


@app.command("procedural", epilog="Example: shapeloom data procedural --count 3000 --seed 0 --out raw/")
def procedural(
    out: Annotated[Path, typer.Option(help="The folder of raw shards to make.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="How many objects.", show_default="the preset's, or 3000")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same bytes.", show_default="the preset's, or 0"),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="core: 6 shapes, 8 colours, one or two parts. full: more of each, up to three parts.",
            show_default="the preset's, or core",
        ),
    ] = None,
    workers: Workers = CORES,
    preset: Preset = None,
    overrides: Overrides = None,
) -> None:
    """Make the procedural reference set: objects of coloured primitives, with exact distances, views and captions.

    A preset's section "data" (tiny:judge_data: another) is read first, then the options, then KEY=VALUE."""
    from ..config import load_config
    from ..data_pipes.procedural import ProceduralSettings, generate

    options = {"level": level, "count": count, "seed": seed}
    name, _, section = (preset or "").partition(":")
    settings = load_config(
        ProceduralSettings, name or None, section or "data", overrides=overrides or [], values=options
    )
    print(generate(out, settings, workers))


@app.command("build", epilog="Example: shapeloom data build my_models/ --captions captions.csv --out raw/")
def build(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="3D files (GLB, glTF, OBJ, PLY, STL, OFF, DAE, 3MF, USD) at any depth, archives of them too; or a URL "
            "that fsspec knows.",
        ),
    ],
    out: Annotated[str, typer.Option(help="The folder of raw shards to make or to go on with, or a URL.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns file and caption (and caption_2 ..., category, licence, author, source); or "
            "JSONL with the keys file and captions (and the like).",
            show_default="captions are made of the file names",
        ),
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(help="allow=CC0-1.0,CC-BY-4.0: these alone. deny=CC-BY-NC-4.0: all but these."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Files at a time.", show_default="all cores, or all the cluster's")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine's processes, or a Ray cluster (RAY_ADDRESS).")
    ] = "local",
    retry: Annotated[bool, typer.Option("--retry-rejected", help="Try rejected files again, changed or not.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop assets whose file is gone, even where those are most of all.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use only so many files; those built before count.", show_default="all of them"),
    ] = None,
    preset: Preset = None,
    overrides: Overrides = None,
) -> None:
    """Turn a folder of 3D files into raw shards; what cannot be used is in OUT/rejected.jsonl with the reason.

    Run again, only what is new or changed is built."""
    from ..config import load_config
    from ..data_pipes.build import BuildSettings
    from ..data_pipes.build import build as build_shards
    from ..data_pipes.licences import LicenceFilter

    if out.startswith("memory://"):
        raise UserError("what is written to memory:// is gone when this command ends: give --out a folder or a URL")
    settings = load_config(BuildSettings, preset, "build", overrides=overrides or [])
    licences = LicenceFilter.parse(licence or [])
    workers = workers or (CORES if executor == "local" else None)
    print(
        build_shards(
            folder,
            out,
            captions,
            settings,
            workers,
            limit=limit,
            licences=licences,
            executor=executor,
            retry=retry,
            prune=prune,
        )
    )


@app.command("show", epilog="Example: shapeloom data show raw/ --count 24")
def show(
    raw: Raw,
    out: Annotated[
        Path | None,
        typer.Option(help="The PNG to write.", show_default="contact_sheet.png in RAW, or here where that is a URL"),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many objects to show.")] = 24,
    split: Annotated[str | None, typer.Option(help="Only this split.", show_default="all of them")] = None,
) -> None:
    """Write a contact sheet of raw shards and print a short summary."""
    from ..data_pipes.contact_sheet import sheet_of_raw

    print(sheet_of_raw(raw, out, count, split))


@app.command("verify", epilog="Example: shapeloom data verify raw/")
def verify(
    raw: Annotated[str, typer.Argument(metavar="RAW", help="A folder of raw or latent shards, or a URL.")],
) -> None:
    """Check every byte and every sample of a folder of shards; says all that is wrong, and exits with 1 if anything."""
    from ..data_pipes.verify import verify as check

    verified = check(raw)
    print(verified)
    raise typer.Exit(1 if verified.faults else 0)


@app.command("report", epilog="Example: shapeloom data report raw/ --out report.html")
def report(
    raw: Raw,
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write.", show_default="report.html in RAW, or here where that is a URL"),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many assets to show.")] = 48,
) -> None:
    """Write one HTML page: counts, rejections and warnings, pictures, captions, sizes, licences."""
    from ..data_pipes.report import write_report

    print(write_report(raw, out, count=count))


@app.command(
    "caption",
    epilog="Example: shapeloom data caption raw/ --model blip-image-captioning-base/ --out captions.jsonl",
)
def caption(
    raw: Raw,
    model: Annotated[
        str,
        typer.Option(
            help="An image-to-text model of transformers, a folder or a name: BLIP, BLIP-2, GIT, chat models."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The captions file to write.")],
    views: Annotated[
        int, typer.Option(min=1, max=100, help="Pictures of an asset, frontal ones first: a caption each.")
    ] = 4,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What captions begin with, or what a chat model is asked.", show_default="none; chat models have one"
        ),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, max=64, help="Captions tried side by side; 1 is greedy search.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=1000, help="Tokens of a caption at most.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    keep: Annotated[
        bool, typer.Option("--keep", help="Put the assets' own captions first, save those made of file names.")
    ] = False,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch a model that is not on this machine.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="What the model computes in.", show_default="float32 on a CPU, else as the weights are"),
    ] = None,
    device: Device = None,
) -> None:
    """Caption rendered views by a model, for data build --captions. Goes on where an unfinished OUT was."""
    if not allow_download:  # before what reads it is imported: else it asks the hub all the same
        os.environ["HF_HUB_OFFLINE"] = "1"
    from ..data_pipes.captioning import CaptionSettings
    from ..data_pipes.captioning import caption as caption_assets

    settings = CaptionSettings(views, prompt, beams, max_tokens, batch, keep)
    print(caption_assets(raw, model, out, settings, device=device, dtype=dtype, allow_download=allow_download))
