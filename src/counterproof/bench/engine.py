"""Where trials run. An engine is dumb: it takes trials, reports what became of them, and can be told to stop.

The truth lives in the journal; an engine neither looks there nor retries.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, Protocol

import psutil

from counterproof.bench import worker
from counterproof.bench.code import closure
from counterproof.bench.trials import Outcome, Record, Spec, now, roots
from counterproof.errors import UserError

__all__ = ["Engine", "Local", "Point", "cores", "engine", "jobs_at_once"]

LOOK_EVERY = 0.05  # seconds between looks at the memory and the clock of running trials
COUNT_EVERY = 1.0  # seconds between looks at what a trial has started: that reads the whole process table


@dataclass(frozen=True)
class Point:
    """A running trial has logged a point of its learning curve."""

    key: str
    values: Mapping[str, float]


class Engine(Protocol):
    """What a comparison needs of the place where its trials run."""

    jobs: int
    retries: frozenset[Outcome]
    """Outcomes that are not the trial's doing, after which the driver runs it again with the same seed."""

    def submit(self, spec: Spec) -> None:
        """Start a trial, or queue it."""

    def poll(self, seconds: float) -> list[Point | Record]:
        """What has happened since the last call; waits at most `seconds` for something."""

    def cancel(self, keys: Sequence[str] | None = None) -> list[str]:
        """Stop trials, by default all, without a record; returns the keys of those that had not ended."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_at_once(name: str, threads: int) -> int:
    """Trials an engine runs at a time unless told otherwise: one per core of this machine, or 16 on a cluster."""
    return max(1, cores() // threads) if name == "local" else 16


def engine(name: str, jobs: int, prepare: Sequence[Spec]) -> Engine:
    """The engine of that name.

    Args:
        name: ``"local"`` or ``"slurm"``.
        jobs: trials at a time.
        prepare: examples of the trials to come, one of each arm, so that what they import is loaded once.

    Raises:
        UserError: an unknown name, or an engine that this machine does not have.
        MissingExtra: an engine whose extra is not installed.
    """
    if name == "local":
        return Local(jobs, threads=max((spec.threads for spec in prepare), default=1), prepare=prepare)
    if name == "slurm":
        from counterproof.bench.slurm import Slurm

        return Slurm(jobs)
    raise UserError(f"unknown engine {name!r}; known: local, slurm")


@dataclass
class _Running:
    spec: Spec
    process: Any
    pipe: connection.Connection
    monitor: psutil.Process | None
    began: float
    started: str
    cpu: float = 0.0
    memory: float = 0.0
    children: list[psutil.Process] = field(default_factory=list)
    counted: float = 0.0
    result: Record | None = None


class Local:
    """This machine's cores: every trial in a fresh process of its own, forked from one that has its imports loaded.

    A trial that passes its time or memory limit is killed with everything it started. Trials end with the driver, even
    if that is killed with -9.

    Args:
        jobs: trials at a time.
        threads: cores each trial's libraries may use.
        prepare: examples of the trials to come.
    """

    retries: frozenset[Outcome] = frozenset({"killed"})

    def __init__(self, jobs: int, *, threads: int = 1, prepare: Sequence[Spec] = ()) -> None:
        self.jobs = jobs
        self._running: dict[str, _Running] = {}
        self._environment = {**worker.environment(threads), worker.PRELOAD: _imports(prepare)}
        # A fork of a small process that has torch loaded takes milliseconds; a fresh interpreter takes seconds.
        self._context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            self._context.set_forkserver_preload(["counterproof.bench._preload"])

    def submit(self, spec: Spec) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_trial, args=(spec, theirs), name=f"trial-{spec.key[:8]}")
        with _environment(self._environment), _no_main():
            process.start()
        theirs.close()
        monitor = None
        with contextlib.suppress(psutil.NoSuchProcess):  # the trial may have ended by now
            monitor = psutil.Process(process.pid)
        self._running[spec.key] = _Running(spec, process, ours, monitor, time.monotonic(), now())

    def poll(self, seconds: float) -> list[Point | Record]:
        events: list[Point | Record] = []
        end = time.monotonic() + seconds
        while self._running and not events:
            patience = min(LOOK_EVERY, max(0.0, end - time.monotonic()))
            sources: list[Any] = []
            for run in self._running.values():
                sources += [run.process.sentinel] if run.pipe.closed else [run.pipe, run.process.sentinel]
            connection.wait(sources, patience)
            for run in list(self._running.values()):
                events += self._read(run)
                if (record := self._ended(run)) is not None:
                    del self._running[run.spec.key]
                    events.append(record)
            if time.monotonic() >= end:
                break
        return events

    def cancel(self, keys: Sequence[str] | None = None) -> list[str]:
        stopped = [key for key in (self._running if keys is None else keys) if key in self._running]
        for key in stopped:
            run = self._running.pop(key)
            _kill(run)
            run.process.join()
            run.pipe.close()
        return stopped

    def _read(self, run: _Running) -> list[Point]:
        points = []
        try:
            while not run.pipe.closed and run.pipe.poll():
                message = run.pipe.recv()
                if isinstance(message, Record):
                    run.result = message
                else:
                    points.append(Point(run.spec.key, message))
        except (EOFError, OSError):  # the trial's end of the pipe is gone; its process is about to be
            run.pipe.close()
        return points

    def _ended(self, run: _Running) -> Record | None:
        """The trial's record, once its process has ended or had to be stopped."""
        wall = time.monotonic() - run.began
        if run.process.exitcode is None and run.result is None:
            self._measure(run)
            limit = None
            if wall > run.spec.seconds:
                limit = f"stopped after {run.spec.seconds:.0f} s, the limit of budget {run.spec.budget!r}"
                outcome: Any = "time"
            elif run.memory > run.spec.memory:
                limit = f"stopped at {run.memory / 2**30:.2f} GiB, over {run.spec.memory / 2**30:.2f} GiB"
                outcome = "memory"
            if limit is None:
                return None
            _kill(run)
        elif run.result is None:
            self._read(run)
            code = run.process.exitcode
            outcome = "killed" if code < 0 else "raised"
            limit = f"the process was ended by {_signal_name(-code)}" if code < 0 else f"the process exited with {code}"
        run.process.join(timeout=5)
        if run.process.exitcode is None:  # it has answered, but a thread of its own keeps it
            _kill(run)
            run.process.join()
        run.pipe.close()
        return run.result or worker.failure(
            run.spec, outcome, limit or "", wall=wall, cpu=run.cpu, memory=run.memory, started=run.started
        )

    def _measure(self, run: _Running) -> None:
        if run.monitor is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            with run.monitor.oneshot():
                memory = float(run.monitor.memory_info().rss)
                times = run.monitor.cpu_times()
            if time.monotonic() - run.counted > COUNT_EVERY:
                run.children = run.monitor.children(recursive=True)
                run.counted = time.monotonic()
            for child in run.children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory += child.memory_info().rss
            run.memory = max(run.memory, memory)
            run.cpu = times.user + times.system


def _trial(spec: Spec, pipe: connection.Connection) -> None:
    """The main function of a trial's process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal is the driver's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        worker.leave_with(parent.sentinel)
    record = worker.execute(spec, pipe.send)
    pipe.send(record)
    pipe.close()


def _kill(run: _Running) -> None:
    """End a trial and everything it started."""
    if run.monitor is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in run.monitor.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        run.monitor.kill()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _imports(prepare: Sequence[Spec]) -> str:
    """What the trials import, ours last, as `worker.preload` takes it."""
    outside: set[tuple[str, str]] = set()
    inside: list[tuple[str, str]] = []
    for spec in prepare:
        start = roots(spec.run, spec.method)
        outside |= closure(start).outside
        inside += [(name, "") for name in start]
    return json.dumps([*sorted(outside), *dict.fromkeys(inside)])


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _no_main() -> Iterator[None]:
    """Trials import what they run by name: the user's own script is not imported again in every one of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
