"""The main job: data → CLIP and autoencoder → latents → denoiser → R-precision → report, in two chains.

Every step is a command of its own that goes on where it was, so a stopped quickstart is simply started again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UserError, run_command
from ..eval.report.quickstart import ReportInput, read_figures, write_report
from ..files import read_json, write_json

CAPTIONS = (
    "a red cube",
    "a small yellow cone",
    "a big purple torus",
    "a blue ball on top of a green cylinder",
    "an orange cube to the left of a cyan pyramid",
    "a gray cone on top of a red cube",
)
LINE = re.compile(r"^(?P<what>.*?): (?P<done>\d+)/(?P<total>\d+)  (?P<rest>.*)$")


@dataclass
class Step:
    """One command. Steps of a chain follow each other; `needs` names steps of other chains to wait for."""

    name: str
    arguments: list[str]
    needs: tuple[str, ...] = ()
    threads: int = 1


@dataclass
class Board:
    """One progress bar a step on a terminal, plain lines elsewhere; and what each step took."""

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        times = self.out / "timings.json"
        self.seconds = read_json(times, "timings") if times.exists() else {}

    def run(self, step: Step) -> None:
        """Run a step to its end, showing its progress. Raises UserError with its last words if it fails."""
        log = self.out / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        task = self.bars.add_task(step.name, total=None, note="starting")
        began = time.monotonic()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(step.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # a waiting thread must not spin on a core that the other chain could use
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "SHAPELOOM_PROGRESS_EVERY": "1" if self.console.is_terminal else "10",
        }
        command = [sys.executable, "-m", "shapeloom", *step.arguments]
        with open(log, "a") as file:
            file.write(f"$ shapeloom {' '.join(step.arguments)}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            assert process.stdout is not None
            last = ""
            try:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    last = line.strip() or last
                    self._show(task, step.name, line.rstrip())
            except BaseException:
                process.terminate()
                process.wait(timeout=60)
                raise
        if process.wait():
            raise UserError(f"{step.name} stopped with exit code {process.returncode} ({last}); its log is {log}")
        self.bars.update(task, total=1, completed=1, note="done")
        # A step that had been done before takes seconds now; its first time is the one to report.
        took = time.monotonic() - began
        self.seconds[step.name] = round(max(took, self.seconds.get(step.name, 0.0)), 1)
        write_json(self.out / "timings.json", self.seconds)

    def _show(self, task: Any, name: str, line: str) -> None:
        if match := LINE.match(line):
            done, total = int(match["done"]), int(match["total"])
            self.bars.update(task, completed=done, total=total, note=f"{done}/{total} {match['rest']}"[:60])
        if not self.console.is_terminal and line:
            print(f"[{name}] {line}", flush=True)

    def chains(self, *chains: list[Step]) -> None:
        """Run chains side by side. Raises the first failure, after the other chains' steps have ended."""
        failures: list[BaseException] = []
        ended = {step.name: threading.Event() for chain in chains for step in chain}

        def follow(chain: list[Step]) -> None:
            for step in chain:
                try:
                    for name in step.needs:
                        ended[name].wait()
                    if not failures:
                        self.run(step)
                except BaseException as error:
                    failures.append(error)
                finally:
                    ended[step.name].set()

        threads = [threading.Thread(target=follow, args=(chain,)) for chain in chains]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def quickstart(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    preset: Annotated[str, typer.Option(help="A preset's name, or a YAML file of that form.")] = "tiny",
) -> None:
    """Run everything; done steps are kept."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    board = Board(out)
    with board.bars:
        run_steps(board, out, preset)
    report = write_summary(out, board, preset)
    print_summary(out, report, time.monotonic() - began, board)


def run_steps(board: Board, out: Path, preset: str) -> None:
    """The graph of the steps: what does not depend on each other runs side by side, one thread each."""
    raw, latents, clip = str(out / "raw"), str(out / "latents"), str(out / "clip" / "clip")
    autoencoder, pipeline = str(out / "autoencoder" / "autoencoder"), str(out / "denoiser" / "pipeline")

    def train(stage: str, data: str) -> Step:
        return Step(stage, ["train", stage, "--preset", preset, "--data", data, "--out", str(out / stage)])

    models = [f"autoencoder={autoencoder}", f"clip={clip}"]
    texts = [word for caption in CAPTIONS for word in ("--text", caption)]
    reconstruct = ["eval", "reconstruction", autoencoder, "--data", raw, "--out", str(out / "reconstruction")]
    score = ["eval", "r-precision", "--pipeline", pipeline, "--prompts", raw, "--evaluator", "judge"]
    score += ["--protocol", "reference-v1", "--resolution", "48"]  # finer meshes are not seen in 64 pixels
    from_pictures = [*score, "--condition", "image", "--limit", "100", "--out", str(out / "from_pictures")]

    board.run(Step("data", ["data", "procedural", "--preset", preset, "--out", raw]))
    board.chains(
        [
            train("autoencoder", raw),
            Step("encode", ["encode", "--preset", preset, "--data", raw, "--out", latents, *models], needs=("clip",)),
            replace(train("denoiser", latents), threads=2),
        ],
        [train("clip", raw), replace(Step("reconstruction", reconstruct), needs=("autoencoder",))],
    )
    board.chains(
        [Step("r-precision", [*score, "--out", str(out / "r_precision")])],
        [
            Step("samples", ["sample", pipeline, *texts, "--seeds", "0-1", "--out", str(out / "samples")]),
            Step("from-pictures", from_pictures),
        ],
    )


def write_summary(out: Path, board: Board, preset: str) -> ReportInput:
    stages = ("autoencoder", "clip", "denoiser")
    report = ReportInput(
        r_precision=out / "r_precision",
        reconstruction=out / "reconstruction",
        logs={name: out / name / "log.jsonl" for name in stages},
        timings=board.seconds,
        commands=["bash launch/quickstart.sh"],
        pictures={"Samples": out / "samples" / "contact_sheet.png"},
        meshes=sorted((out / "samples").glob("*.glb")),
        facts={"preset": preset},
    )
    write_report(report, out / "report.html")
    return report


def print_summary(out: Path, report: ReportInput, seconds: float, board: Board) -> None:
    figures = read_figures(report)
    for figure, value in figures.values():
        mark = "?" if value is None else "✓" if figure.reached(value) else "✗"
        shown = "not measured" if value is None else f"{value:.3f}"
        print(f"  {mark} {figure.label:<42} {shown:>12}   gate {figure.gate}, aim {figure.aim}")
    print(f"\nTook {seconds / 60:.1f} minutes now; steps, in seconds: {json.dumps(board.seconds)}")
    print(f"GLBs:          {out / 'samples'}")
    print(f"Contact sheet: {out / 'r_precision' / 'contact_sheet.png'}")
    print(f"Pipeline:      {out / 'denoiser' / 'pipeline'}")
    print(f"Report:        {out / 'report.html'}")


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(quickstart)
    run_command(app)


if __name__ == "__main__":
    main()
