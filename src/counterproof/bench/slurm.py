"""Trials on a Slurm cluster, through submitit: one job a trial, its queue and limits Slurm's own.

Nodes must see the driver's file system and Python environment. The journal stays with the driver; a job leaves its log
and its pickled record in a folder of the home. Whether a trial that was preempted, ran out of memory or time is tried
again is the driver's decision: such ends are reported as ``killed``, ``memory`` and ``time``.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from counterproof.bench import worker
from counterproof.bench.engine import Point
from counterproof.bench.journal import home
from counterproof.bench.trials import Outcome, Record, Spec, now
from counterproof.errors import UserError, extra

__all__ = ["Slurm"]

LOOK_EVERY = 2.0  # seconds between looks at the queue
# What Slurm says of a job that left no record; anything else is an end from outside.
STATES: dict[str, Outcome] = {"TIMEOUT": "time", "OUT_OF_MEMORY": "memory", "FAILED": "raised"}


@dataclass
class _Job:
    spec: Spec
    job: Any
    began: float
    started: str


class Slurm:
    """An engine that hands each trial to Slurm.

    Args:
        jobs: trials in the queue at a time.
        folder: shared with the nodes; default ``home() / "slurm"``.
        cluster: submitit's executor; ``"local"`` runs jobs as processes of this machine, for tests.

    Raises:
        UserError: no Slurm on this machine.
        MissingExtra: submitit is not installed.
    """

    retries: frozenset[Outcome] = frozenset({"killed", "memory", "time"})

    def __init__(self, jobs: int, *, folder: Path | None = None, cluster: Literal["slurm", "local"] = "slurm") -> None:
        with extra("slurm"):
            import submitit
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("no Slurm on this machine: sbatch is not on the PATH; use --engine local")
        self.jobs = jobs
        self._submitit = submitit
        self._cluster = cluster
        self._executor = submitit.AutoExecutor(folder=folder or home() / "slurm" / "%j", cluster=cluster)
        self._running: dict[str, _Job] = {}

    def submit(self, spec: Spec) -> None:
        setup = [f"export {name}={value}" for name, value in worker.environment(spec.threads).items()]
        self._executor.update_parameters(
            name=f"counterproof-{spec.key[:8]}",
            timeout_min=max(1, math.ceil(spec.seconds / 60)),
            mem_gb=math.ceil(spec.memory / 2**30),
            cpus_per_task=spec.threads,
            gpus_per_node=int(spec.device.startswith("cuda")),
            **{f"{self._cluster}_setup": setup},
        )
        job = self._executor.submit(worker.execute, spec, worker.unheard)
        self._running[spec.key] = _Job(spec, job, time.monotonic(), now())

    def poll(self, seconds: float) -> list[Point | Record]:
        end = time.monotonic() + seconds
        while self._running:
            ended = [run for run in self._running.values() if run.job.done()]
            for run in ended:
                del self._running[run.spec.key]
            if ended or time.monotonic() >= end:
                return [self._record(run) for run in ended]
            time.sleep(min(LOOK_EVERY, max(0.0, end - time.monotonic())))
        return []

    def cancel(self, keys: Sequence[str] | None = None) -> list[str]:
        stopped = [key for key in (self._running if keys is None else keys) if key in self._running]
        for key in stopped:
            job = self._running.pop(key).job
            with contextlib.suppress(self._submitit.core.utils.UncompletedJobError):
                job.cancel()
        return stopped

    def _record(self, run: _Job) -> Record:
        try:
            record: Record = run.job.result()
            return record
        except (self._submitit.core.utils.UncompletedJobError, self._submitit.core.utils.FailedJobError) as problem:
            state = str(run.job.state).partition(" ")[0]  # "CANCELLED by 0"
            outcome = STATES.get(state, "killed")
            wall = time.monotonic() - run.began
            message = f"Slurm job {run.job.job_id} ended as {state}: {problem}"
            return worker.failure(run.spec, outcome, message, wall=wall, cpu=0.0, memory=0.0, started=run.started)
