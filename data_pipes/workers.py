"""Runs a function on many inputs in worker processes that may hang, run out of memory or die, one input's loss at most."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

__all__ = ["Failed", "isolated_map"]

Job = TypeVar("Job")
Result = TypeVar("Result")

_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_START_S = 120  # what a worker may take to import


@dataclass(frozen=True)
class Failed:
    """Why there is no result: one sentence."""

    reason: str


def isolated_map(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, timeout_s: float, memory_bytes: int
) -> Iterator[Result | Failed]:
    """Results of `function` in the order of `jobs`, each computed in one of `workers` spawned processes.

    A job that takes longer than `timeout_s`, needs more than `memory_bytes` of address space (where the system can
    limit it) or kills its process gives `Failed`; its worker is replaced and the rest goes on. An exception that
    `function` raises gives `Failed` too.

    Args:
        function: importable by name (processes are spawned, not forked).
    """
    window = max(16, 4 * workers)  # results waiting for their turn are held in memory
    pool = [_Worker(function, memory_bytes) for _ in range(min(workers, len(jobs)))]
    results: dict[int, Result | Failed] = {}
    next_job = next_result = 0
    try:
        while next_result < len(jobs):
            for worker in pool:
                if worker.job is None and next_job < min(len(jobs), next_result + window):
                    worker.give(next_job, jobs[next_job], timeout_s)
                    next_job += 1
            for worker in pool:
                if worker.job is not None and (result := worker.poll()) is not None:
                    results[worker.job] = result.value
                    worker.job = None
            while next_result in results:
                yield results.pop(next_result)
                next_result += 1
            busy = [worker for worker in pool if worker.job is not None]
            if busy:
                left = min(worker.deadline for worker in busy) - time.monotonic()
                wait([worker.connection for worker in busy], timeout=max(0.0, min(left, 1.0)))
    finally:
        for worker in pool:
            worker.stop()


@dataclass(frozen=True)
class _Answer(Generic[Result]):
    value: Result | Failed


class _Worker:
    """One process and the job it has."""

    def __init__(self, function: Callable[[Any], Any], memory_bytes: int) -> None:
        self._function, self._memory_bytes = function, memory_bytes
        self.job: int | None = None
        self.deadline = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._function, theirs, self._memory_bytes), daemon=True, name="shapeloom-data"
        )
        with _environment(_ONE_THREAD):
            self._process.start()
        theirs.close()
        self._fresh = True

    def give(self, index: int, job: Any, timeout_s: float) -> None:
        self.job, self._timeout_s = index, timeout_s
        self.deadline = time.monotonic() + timeout_s + (_START_S if self._fresh else 0)
        try:
            self.connection.send(job)
        except OSError:  # it died while idle; poll() finds out and says so
            pass

    def poll(self) -> _Answer | None:
        """What came of the job, or None while it is being worked on."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if message is _READY or message == _READY:  # the start is over, the job's own time begins
                    self._fresh = False
                    self.deadline = time.monotonic() + self._timeout_s
                    continue
                return _Answer(message)
        except (EOFError, OSError):
            return self._replace(f"the process that read it died ({self._cause()})")
        if time.monotonic() > self.deadline:
            return self._replace(f"it took longer than {self._timeout_s:g} s")
        return None

    def _replace(self, reason: str) -> _Answer:
        self.stop()
        self._start()
        return _Answer(Failed(reason))

    def _cause(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


_READY = "ready"


def _serve(function: Callable[[Any], Any], connection: Connection, memory_bytes: int) -> None:
    """The life of a worker: jobs in, results out, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory(memory_bytes)
    with contextlib.suppress(EOFError, OSError):
        connection.send(_READY)
        while True:
            job = connection.recv()
            try:
                answer = function(job)
            except MemoryError:
                answer = Failed(f"it needs more than {memory_bytes / 2**30:.3g} GB of memory")
            except Exception as error:
                answer = Failed(f"reading it failed with {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            connection.send(answer)


def _limit_memory(limit_bytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system can
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


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
