"""Runs a function on many inputs in worker processes that may hang, run out of memory or die: one input is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

__all__ = ["Failed", "end_with_parent", "isolated_map"]

Job = TypeVar("Job")
Result = TypeVar("Result")

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_START_S = 300  # what a worker may take to import and to prepare itself


@dataclass(frozen=True)
class Failed:
    """Why there is no result: one sentence."""

    reason: str


def isolated_map(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    cpu_s: int,
    wall_s: float,
    memory_bytes: int,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result | Failed]:
    """Results of `function` in the order of `jobs`, each computed in one of at most `workers` spawned processes.

    Jobs are taken from their iterable, and processes started, as they are needed.

    A job that goes over a limit or kills its process gives `Failed`; its worker is replaced and the rest goes on. An
    exception that `function` raises gives `Failed` too.

    Args:
        function: importable by name (processes are spawned, not forked).
        cpu_s: processor time of one job in whole seconds, so that a busy machine fails no job that a quiet one does.
        wall_s: time of one job by the clock, against sleeping and stuck ones.
        memory_bytes: address space of a worker. This and `cpu_s` hold only where the system can limit them (POSIX).
        prepare: called once in each process before its first job, on whose time it does not go: to compile, mostly.
    """
    window = max(16, 4 * workers)  # results waiting for their turn are held in memory
    pool: list[_Worker] = []
    results: dict[int, Result | Failed] = {}
    waiting = enumerate(jobs)
    given = yielded = 0
    exhausted = False
    try:
        while True:
            while not exhausted and given < yielded + window:
                worker = next((worker for worker in pool if worker.job is None), None)
                if worker is None and len(pool) >= workers:
                    break
                number, job = next(waiting, (-1, None))
                if number < 0:
                    exhausted = True
                    break
                if worker is None:
                    pool.append(worker := _Worker(function, cpu_s, wall_s, memory_bytes, prepare))
                worker.give(number, job)
                given += 1
            busy = [worker for worker in pool if worker.job is not None]
            if not busy:  # and no more to give
                return
            left = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], timeout=max(0.0, min(left, 1.0)))
            for worker in busy:
                if worker.job is not None and (result := worker.poll()) is not None:
                    results[worker.job] = result.value
                    worker.job = None
            while yielded in results:
                yield results.pop(yielded)
                yielded += 1
    finally:
        for worker in pool:
            worker.stop()


def end_with_parent() -> None:
    """Called in a worker of Python's own pools: it ends when its parent was killed, where it would wait for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class _Answer(Generic[Result]):
    value: Result | Failed


class _Worker:
    """One process and the job it has."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        cpu_s: int,
        wall_s: float,
        memory_bytes: int,
        prepare: Callable[[], object] | None,
    ) -> None:
        self._function, self._cpu_s, self._wall_s, self._memory_bytes = function, cpu_s, wall_s, memory_bytes
        self._prepare = prepare
        self.job: int | None = None
        self.deadline = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(self._function, theirs, self._cpu_s, self._memory_bytes, self._prepare),
            daemon=True,
            name="shapeloom-data",
        )
        with _environment(_ONE_THREAD):
            self._process.start()
        theirs.close()
        self._fresh = True

    def give(self, index: int, job: Any) -> None:
        self.job = index
        self.deadline = time.monotonic() + self._wall_s + (_START_S if self._fresh else 0)
        with contextlib.suppress(OSError):  # it died while idle; poll() finds out and says so
            self.connection.send(job)

    def poll(self) -> _Answer | None:
        """What came of the job, or None while it is being worked on."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if not isinstance(message, _Answer):  # the start is over, the job's own time begins
                    self._fresh = False
                    self.deadline = time.monotonic() + self._wall_s
                    continue
                return message
        except (EOFError, OSError):
            return self._replace(self._cause())
        if time.monotonic() > self.deadline:
            return self._replace(f"it took longer than {self._wall_s:g} s")
        return None

    def _replace(self, reason: str) -> _Answer:
        self.stop()
        self._start()
        return _Answer(Failed(reason))

    def _cause(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        name = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
        if name == "SIGXCPU":
            return f"it took longer than {self._cpu_s} s of processor time"
        return f"the process that read it died ({name})"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(
    function: Callable[[Any], Any],
    connection: Connection,
    cpu_s: int,
    memory_bytes: int,
    prepare: Callable[[], object] | None,
) -> None:
    """The life of a worker: jobs in, results out, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit("RLIMIT_AS", memory_bytes)
    if prepare is not None:
        prepare()
    with contextlib.suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            job = connection.recv()
            _limit("RLIMIT_CPU", int(time.process_time()) + 1 + cpu_s)
            try:
                value = function(job)
            except MemoryError:
                value = Failed(f"it needs more than {memory_bytes / 2**30:.3g} GB of memory")
            except Exception as error:
                value = Failed(f"reading it failed with {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            connection.send(_Answer(value))


def _limit(name: str, most: int) -> None:
    """Lower one of this process's soft limits, where the system has it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
