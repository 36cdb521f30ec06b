"""Progress that says how much time is left: a bar on a terminal, one plain line at most every ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
Shown = float | int | str

LINE_EVERY_S = float(os.environ.get("SHAPELOOM_PROGRESS_EVERY", 10))  # set by a parent that draws the bars itself
REDRAW_EVERY_S = 0.1


def format_seconds(seconds: float) -> str:
    """``7`` -> ``0:07``, ``3661`` -> ``1:01:01``."""
    minutes, s = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


class Bar:
    """A progress bar for a loop of our own.

    Example::

        with Bar(total=1000, description="autoencoder", start=200) as bar:
            for step in range(200, 1000):
                bar.update(1, loss=loss)        # the metrics shown are the last ones given

    Args:
        total: number of steps, or None where it is not known.
        description: what is being done, a word or three.
        start: steps done in an earlier run; they count as done and not towards the speed.
        quiet: show nothing (the other ranks of a distributed run).
    Metrics may be numbers or strings; reading a tensor's value is the caller's choice, so pass floats.
    """

    def __init__(self, total: int | None = None, description: str = "", *, start: int = 0, quiet: bool = False) -> None:
        self.total, self.description, self.start, self.quiet = total, description, start, quiet
        self.done = start
        self.shown: dict[str, Shown] = {}
        self._live: Progress | None = None
        self._began = self._last_line = self._last_draw = time.monotonic()

    def __enter__(self) -> Bar:
        self._began = self._last_line = self._last_draw = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._live = _terminal_bar()
            self._task = self._live.add_task(self.description, total=self.total, completed=self.done, metrics="")
            self._live.start()
        return self

    def update(self, n: int = 1, **shown: Shown) -> None:
        """Note `n` more steps done, and the metrics to show beside the bar."""
        self.done += n
        self.shown.update(shown)
        if self.quiet:
            return
        now = time.monotonic()
        if self._live is not None:
            if now - self._last_draw >= REDRAW_EVERY_S or self.done == self.total:
                self._last_draw = now
                self._live.update(self._task, completed=self.done, metrics=self._metrics())
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=self.done, metrics=self._metrics())
            self._live.stop()
            self._live = None
        elif not self.quiet:
            print(self._line(time.monotonic(), ended=kind is None), file=sys.stderr, flush=True)

    def _metrics(self) -> str:
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.shown.items())

    def _line(self, now: float, ended: bool = False) -> str:
        passed = now - self._began
        fresh = self.done - self.start
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.description or 'progress'}: {self.done}{of}"]
        if ended:
            parts.append(f"done in {format_seconds(passed)}")
        else:
            parts.append(f"{format_seconds(passed)} passed")
            if self.total is not None and fresh > 0:
                parts.append(f"{format_seconds(passed / fresh * max(self.total - self.done, 0))} left")
        if metrics := self._metrics():
            parts.append(metrics)
        return "  ".join(parts)


def track(iterable: Iterable[Item], total: int | None = None, description: str = "") -> Iterator[Item]:
    """Yield from `iterable` under a progress bar. `total` is taken from ``len`` where it is not given."""
    if total is None:
        try:
            total = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            total = None
    with Bar(total, description) as bar:
        for item in iterable:
            yield item
            bar.update(1)


def _terminal_bar() -> Progress:
    # Imported only where a bar is drawn.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=Console(stderr=True),
    )
