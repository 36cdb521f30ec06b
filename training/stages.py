"""The stages by name: settings from preset, file and command line, then the stage's `run`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from ..config import load_config
from ..errors import run_command

__all__ = ["STAGES", "main", "run_stage"]

STAGES = {"clip": "ClipRun", "autoencoder": "AutoencoderRun", "encode": "EncodeRun", "denoiser": "DenoiserRun"}


def run_stage(
    stage: str,
    *,
    preset: str | None,
    config: Path | None,
    data: str,
    out: str,
    resume: str,
    overrides: list[str],
) -> None:
    """Run one stage. The preset may name another of its sections for the stage: `tiny:judge`.

    Raises: UserError for settings, data or a launch that will not do.
    """
    module = importlib.import_module(f".{stage}", __package__)
    preset, _, section = (preset or "").partition(":")
    settings = load_config(
        getattr(module, STAGES[stage]),
        preset=preset or None,
        section=section or stage,
        config_file=config,
        overrides=overrides,
        values={"data": data or None, "out": out or None},
    )
    module.run(settings, resume=resume)


def main(stage: str) -> None:
    """The command line of `python -m shapeloom.training.<stage>`; launchers start it once a rank."""

    def command(
        data: Annotated[str, typer.Option(help="Folder of the data to train on.")] = "",
        out: Annotated[str, typer.Option(help="Run folder.")] = "",
        preset: Annotated[str, typer.Option(help="A preset's name, or a YAML file of that form.")] = "",
        config: Annotated[Path | None, typer.Option(help="YAML or JSON over the preset.")] = None,
        resume: Annotated[str, typer.Option(help="auto, never, or a state folder.")] = "auto",
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    ) -> None:
        run_stage(stage, preset=preset, config=config, data=data, out=out, resume=resume, overrides=overrides or [])

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_command(app)
