"""The ``shapeloom`` command. A verb imports what it runs when it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import run_command
from . import cli_data, cli_eval
from .options import (
    ConfigFile,
    Device,
    ImageGuidance,
    Overrides,
    PipelineFolder,
    Preset,
    RawData,
    Resume,
    Seeds,
    Solver,
    Steps,
    TextGuidance,
    parse_seeds,
)

app = typer.Typer(
    name="shapeloom",
    help="Train and sample text- and image-conditioned diffusion models of 3D assets.",
    epilog="First run: bash launch/quickstart.sh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(
    help="Train one stage: on several devices, accelerate launch -m shapeloom.training.STAGE with the same options.",
    no_args_is_help=True,
)
import_app = typer.Typer(help="Bring in published weights.", no_args_is_help=True)
export_app = typer.Typer(help="Hand pipelines to other software.", no_args_is_help=True)
app.add_typer(cli_data.app, name="data")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")
app.add_typer(train_app, name="train")
app.add_typer(cli_eval.app, name="eval")


def main() -> None:
    """Run the command line; the ``shapeloom`` entry point."""
    run_command(app)


# --- general ---------------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _general(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: shapeloom doctor --repair")
def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Put torchvision right in this virtual environment, if it needs it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Repair outside a virtual environment too.")] = False,
) -> None:
    """Report versions, devices, extras and known conflicts. Exits with 1 if something required is broken."""
    from . import doctor as examination

    raise typer.Exit(examination.main(repair=repair, yes=yes))


# --- training --------------------------------------------------------------------------------------------------------


@train_app.command("clip", epilog="Example: shapeloom train clip --preset tiny --data raw/ --out runs/clip")
def train_clip(
    data: RawData,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    preset: Preset = None,
    config: ConfigFile = None,
    resume: Resume = "auto",
    overrides: Overrides = None,
) -> None:
    """Train a small CLIP on rendered views and captions."""
    _run_stage("clip", data, out, preset, config, resume, overrides)


@train_app.command("autoencoder", epilog="Example: shapeloom train autoencoder --preset tiny --data raw/ --out runs/ae")
def train_autoencoder(
    data: RawData,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    preset: Preset = None,
    config: ConfigFile = None,
    resume: Resume = "auto",
    overrides: Overrides = None,
) -> None:
    """Train the autoencoder: surface points to a latent, and back to distance, density and colour."""
    _run_stage("autoencoder", data, out, preset, config, resume, overrides)


@train_app.command(
    "denoiser", epilog="Example: shapeloom train denoiser --preset tiny --data latents/ --out runs/denoiser"
)
def train_denoiser(
    data: Annotated[Path, typer.Option(help="A folder of latent shards, as encode makes it.")],
    out: Annotated[Path, typer.Option(help="The run folder; its pipeline/ is what sampling loads.")],
    init: Annotated[
        Path | None,
        typer.Option(help="A pipeline folder to go on from; the latents are of its autoencoder and conditioner."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Layers or parameters that do not train, as 'blocks.[0-3]'; may be given several times."),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    resume: Resume = "auto",
    overrides: Overrides = None,
) -> None:
    """Train the denoiser on latents; with --init, fine-tune one: all of it, or adapters (lora.rank=16)."""
    # Overrides are read as YAML, which JSON is: so a text stays that text whatever is in it.
    given = {"init": str(init) if init else None, "freeze": freeze}
    options = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if value]
    _run_stage("denoiser", str(data), out, preset, config, resume, [*options, *(overrides or [])])


@app.command(
    epilog="Example: shapeloom plan --preset small --accelerate launch/accelerate/ddp.yaml --device-tflops 100"
)
def plan(
    preset: Annotated[str, typer.Option(help="A preset's name, or a YAML file of that form.")],
    accelerate: Annotated[Path, typer.Option(help="The file for accelerate launch --config_file.")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on all machines.", show_default="the file's num_processes")
    ] = None,
    device_tflops: Annotated[
        float, typer.Option(min=0.0, help="Operations a device really does a second, in 1e12: peak times utilisation.")
    ] = 0.0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="To train on, repeats counted.", show_default="the run's steps")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Say what a training will take, in memory of a rank, operations and time, without starting it."""
    from .plan import make_plan, show

    made = make_plan(
        preset,
        accelerate,
        ranks=ranks,
        device_tflops=device_tflops,
        samples=samples,
        overrides=overrides,
    )
    print(json.dumps(made.to_dict()) if as_json else show(made))


@app.command(
    epilog="Example: shapeloom encode --data raw/ --out latents/ autoencoder=runs/ae/autoencoder clip=runs/clip/clip"
)
def encode(
    data: RawData,
    out: Annotated[Path, typer.Option(help="The folder of latent shards to make.")],
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Encode raw shards once into latents and CLIP features, for the denoiser. Goes on where OUT was."""
    _run_stage("encode", data, out, preset, config, "auto", overrides)


def _run_stage(
    stage: str,
    data: str,
    out: Path,
    preset: str | None,
    config: Path | None,
    resume: str,
    overrides: list[str] | None,
) -> None:
    from ..training.stages import run_stage

    run_stage(stage, preset=preset, config=config, data=data, out=str(out), resume=resume, overrides=overrides or [])


# --- Shap-E's weights ------------------------------------------------------------------------------------------------


@import_app.command(
    "shap-e", epilog="Example: shapeloom import shap-e --source weights/ --condition text --out runs/shap-e"
)
def import_shap_e(
    source: Annotated[
        Path, typer.Option(help="A folder of OpenAI's .pt files, or a diffusers Shap-E pipeline folder.")
    ],
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")],
    condition: Annotated[
        str | None, typer.Option(help="text or image, where SOURCE has both.", show_default="the one there is")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="The CLIP for .pt files: a folder of transformers or open_clip, or open_clip's NAME/PRETRAINED.",
            show_default="ViT-L-14-quickgelu/openai; a diffusers folder has its own",
        ),
    ] = None,
) -> None:
    """Make a pipeline folder of the released Shap-E weights: sample it, fine-tune it."""
    from ..checkpoints.shap_e import import_shap_e as bring_in

    print(bring_in(source, out, kind=condition, clip=clip))


@export_app.command("diffusers", epilog="Example: shapeloom export diffusers runs/shap-e/pipeline --out exported/")
def export_diffusers(
    pipeline: PipelineFolder,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write a pipeline of Shap-E's architecture as diffusers' own ShapEPipeline or ShapEImg2ImgPipeline."""
    from ..checkpoints.diffusers_export import export_diffusers as hand_out
    from ..checkpoints.pipeline import load

    print(f"{out}: {hand_out(load(pipeline), out)}")


# --- sampling -----------------------------------------------------------------------------------------


@app.command(
    epilog='Example: shapeloom sample runs/quickstart/pipeline --text "a red cube" --seeds 0-3 --out out/',
)
def sample(
    pipeline: PipelineFolder,
    out: Annotated[Path, typer.Option(help="Where the GLBs, PNGs and the contact sheet go.")],
    text: Annotated[list[str] | None, typer.Option(help="What to make; may be given several times.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture of what to make, or a folder of views of it; may be given several times."),
    ] = None,
    seeds: Seeds = "0-3",
    text_guidance: TextGuidance = 3.0,
    image_guidance: ImageGuidance = 2.0,
    guidance_interval: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Noise levels, 0 to 1, between which there is guidance."),
    ] = (0.0, 1.0),
    guidance_rescale: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="How much of the spread that guidance adds is taken back.")
    ] = 0.0,
    steps: Steps = 24,
    resolution: Annotated[int, typer.Option(min=4, help="Points of the mesh's lattice along an edge.")] = 64,
    solver: Solver = "own",
    device: Device = None,
) -> None:
    """Make 3D objects from text, from an image, or from both together."""
    from ..eval.generate import sample as make

    make(
        pipeline,
        texts=text or [],
        images=image or [],
        seeds=parse_seeds(seeds),
        out=out,
        text_guidance=text_guidance,
        image_guidance=image_guidance,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        steps=steps,
        resolution=resolution,
        solver=solver,
        device=device,
    )
