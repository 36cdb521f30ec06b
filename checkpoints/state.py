"""A training run's state: written aside by all ranks while training goes on, published by one rename, found again.

Layout of a run folder: `state/<step>/` with `part-<rank>-of-<ranks>.safetensors` and `progress.json`, and
`state/latest`, a text file that names the step to go on from. The parts together hold whole tensors by name
(`weights/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…`), each in one of them, so that any number of ranks can read them,
however these lay out their tensors. Random states need no place: every draw is a function of (seed, step or sample).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import ASIDE, read_json, write_atomic, write_json

__all__ = ["Progress", "StateReader", "StateWriter", "find_state"]

APPEARS_S = 10.0


@dataclass
class Progress:
    """What a state says beside its tensors.

    step: optimiser steps done; updates: of which changed the weights (a float16 scaler skips some).
    seconds: training time so far, over all starts.
    seed, batch_size: with `step`, which samples come next. data: fingerprint of what was trained on.
    scaler: state of the float16 loss scaler, {} without one.
    """

    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    seed: int = 0
    batch_size: int = 0
    data: str = ""
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor of the state: its name, bytes, and how to get it whole (ranks that share it do so together)."""

    name: str
    nbytes: int
    get: Callable[[], torch.Tensor]


class StateWriter:
    """Writes states in a thread of each rank.

    A crash at any moment leaves the previous state whole and pointed at. A state that cannot be written is given up,
    with a message; the next is tried anew.

    Args:
        run: the run folder, the same on all ranks.
        any_rank: whether the flag is set on any rank; returns once all ranks have called it.
        patience_s: how long the main rank waits for the others' parts, in seconds.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        world: int,
        any_rank: Callable[[bool], bool],
        patience_s: float,
        keep_last: int,
        keep_every: int,
    ) -> None:
        self.folder = run / "state"
        self.rank, self.world, self.any_rank = rank, world, any_rank
        self.patience_s, self.keep_last, self.keep_every = patience_s, keep_last, keep_every
        self.waited_s = 0.0  # time the loop has stood still for states
        self.written_s = 0.0  # time the last state took, from begin to its end
        self._room: dict[str, torch.Tensor] = {}  # host memory for this rank's share, used again by each state
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error = ""

    def begin(self, progress: Progress, entries: Iterable[Entry]) -> None:
        """Start to write a state; called by all ranks together, after which they may go on but for `before_update`."""
        began = time.monotonic()
        self._join()
        aside = self.folder / f"{progress.step:08d}{ASIDE}state"
        why = f"{aside} is not there for every rank: the run folder must be the same one on all machines"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            try:
                aside.mkdir(parents=True)
            except OSError as error:
                why = str(error)
        self.any_rank(False)  # now it is there, or will not be
        if self.any_rank(not _appears(aside)):
            self._give_up(aside, progress.step, OSError(why))
            print(f"{self._error}; training goes on", flush=True)
            return
        held = {}
        filled = [0] * self.world
        for entry in entries:
            owner = filled.index(min(filled))
            filled[owner] += entry.nbytes
            whole = entry.get()
            if owner == self.rank:
                held[entry.name] = whole
        self._copied.clear()
        details = dict(vars(progress))
        self._thread = threading.Thread(target=self._write, args=(aside, held, details), daemon=True)
        self._thread.start()
        self.waited_s += time.monotonic() - began

    @property
    def writing(self) -> bool:
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    def before_update(self) -> None:
        """Wait until nothing of a state is still to be read from the weights; they may then change."""
        if self._thread is not None:
            began = time.monotonic()
            self._copied.wait()
            self.waited_s += time.monotonic() - began

    def finish(self) -> None:
        """Wait for the state that is being written; all ranks call this. Raises UserError on all if it could not be."""
        self._join()
        if self.any_rank(bool(self._error)):
            raise UserError(self._error or "the last state could not be written by another rank, which says why")

    @contextlib.contextmanager
    def finished_before(self, *errors: type[Exception]) -> Iterator[None]:
        """Around the loop: these errors wait for the state in writing; after others nobody may answer for it."""
        try:
            yield
        except errors:
            self._join()
            raise

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error:
            print(f"{self._error}; training goes on", flush=True)

    def _write(self, aside: Path, held: dict[str, torch.Tensor], details: dict[str, Any]) -> None:
        """This rank's part; on the main rank also what makes a state of the parts."""
        self._error, began = "", time.monotonic()
        try:
            try:
                self._copy(held)
            finally:
                names = list(held)
                held.clear()
                self._copied.set()
            part = aside / part_name(self.rank, self.world)
            temporary = part.with_suffix(ASIDE)
            save_file({name: self._room[name] for name in names}, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, part)
            if self.rank == 0:
                self._await_parts(aside)
                self._publish(aside, details)
            self.written_s = time.monotonic() - began
        except (OSError, SafetensorError, RuntimeError) as error:
            self._give_up(aside, details["step"], error)

    def _copy(self, held: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            room = self._room.get(name)
            if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._room[name] = room
            room.copy_(tensor)

    def _await_parts(self, aside: Path) -> None:
        waiting = {part_name(rank, self.world) for rank in range(self.world)}
        until = time.monotonic() + self.patience_s
        while waiting := {name for name in waiting if not (aside / name).exists()}:
            if failed := next(aside.glob("failed-*"), None):
                raise OSError(failed.read_text())
            if time.monotonic() > until:
                raise OSError(f"{min(waiting)} was not written in {self.patience_s / 60:.0f} minutes")
            time.sleep(0.02)

    def _publish(self, aside: Path, details: dict[str, Any]) -> None:
        write_json(aside / "progress.json", details)
        final = self.folder / f"{details['step']:08d}"
        if final.exists():  # an earlier try's; `latest` may name it, so it must not be missing while it is deleted
            old = self.folder / f"{final.name}{ASIDE}old"
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
            os.replace(final, old)
        os.replace(aside, final)
        write_atomic(self.folder / "latest", final.name)
        _prune(self.folder, details["step"], self.keep_last, self.keep_every)

    def _give_up(self, aside: Path, step: int, error: Exception) -> None:
        latest = self.folder / "latest"
        last = (
            f"{self.folder}/{latest.read_text().strip()} is intact" if latest.is_file() else "there is none before it"
        )
        self._error = f"the state of step {step} could not be written ({error}); {last}: free some space, or mend that"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                (aside / f"failed-{self.rank}").write_text(f"rank {self.rank}: {error}")


class StateReader:
    """The tensors of a state folder, whole, one at a time. Raises UserError for parts missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = read_json(folder / "progress.json", "training progress")
        known = {name: fields[name] for name in Progress.__dataclass_fields__ if name in fields}
        self.progress = Progress(**known)
        parts = sorted(folder.glob("part-*-of-*.safetensors"))
        world = int(parts[0].stem.rpartition("-")[2]) if parts else 1
        if [part.name for part in parts] != [part_name(rank, world) for rank in range(world)]:
            raise UserError(f"{folder} lacks some of its {world} parts; write the name of another state into latest")
        self._files: dict[str, Any] = {}
        for part in parts:
            try:
                file = safe_open(part, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{part} is damaged ({error}); write the name of another state into latest") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self, kind: str) -> set[str]:
        """Names of the tensors under `kind/`."""
        return {name.partition("/")[2] for name in self._files if name.startswith(f"{kind}/")}

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def check(self, kind: str, expected: dict[str, torch.Size]) -> None:
        """Raises UserError unless the tensors under `kind/` have these names and shapes."""
        shapes = {
            name: self._files[f"{kind}/{name}"].get_slice(f"{kind}/{name}").get_shape() for name in self.names(kind)
        }
        differ = sorted(
            name for name in shapes.keys() | expected.keys() if shapes.get(name) != list(expected.get(name, ()))
        )
        if differ:
            raise UserError(
                f"{self.folder} holds the state of another model ({kind} of {differ[0]} and {len(differ) - 1} more "
                "differ): give the preset it was trained with, or another --out"
            )


def _appears(folder: Path) -> bool:
    """Whether it is there; network file systems may take seconds to show it to other machines."""
    until = time.monotonic() + APPEARS_S
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def part_name(rank: int, world: int) -> str:
    return f"part-{rank:05d}-of-{world:05d}.safetensors"


def find_state(run: Path, resume: str) -> Path | None:
    """The state folder to go on from.

    Args:
        resume: `auto` (the latest, if there is one), `never`, or a path to a state folder.
    Raises: UserError if what is asked for or pointed at is not there.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not (Path(resume) / "progress.json").is_file():
            raise UserError(f"--resume {resume}: no training state there; give a folder like {run}/state/00001000")
        return Path(resume)
    pointer = run / "state" / "latest"
    if not pointer.is_file():
        return None
    folder = run / "state" / pointer.read_text().strip()
    if not (folder / "progress.json").is_file():
        raise UserError(f"{pointer} names {folder.name}, which is not there; write the name of another state into it")
    return folder


def _prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Drop states older than the last of `step` and whatever a killed run left half-written.

    States of later steps are of an earlier try, which the run did not go on from: they are not this one's to delete.
    """
    states = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit() and int(p.name) <= step)
    for path in states[:-keep_last]:
        if not (keep_every and int(path.name) % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
