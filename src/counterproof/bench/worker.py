"""Inside a trial's own process: run it, and say what became of it. Every engine ends here."""

import json
import math
import os
import platform
import random
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from counterproof.bench.code import our_packages
from counterproof.bench.task import Arm, Diverged, Trial, resolve
from counterproof.bench.trials import Outcome, Record, Spec, now

__all__ = ["environment", "execute", "failure", "host", "preload", "unheard"]

PRELOAD = "COUNTERPROOF_PRELOAD"  # environment variable: what the process that trials are forked from imports
CURVE_POINTS = 400  # a longer curve is thinned, so that a chatty task cannot swell the journal


def environment(threads: int) -> dict[str, str]:
    """Environment variables that a trial's process starts with: libraries read them when they are loaded."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **dict.fromkeys(pools, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # CUDA's matrix products repeat only with a fixed workspace
    }


def unheard(point: Mapping[str, float]) -> None:
    """A listener for engines whose trials run out of earshot: their curves arrive with the record."""


def preload(imports: str) -> None:
    """Import what trials will need once, in the process that they are forked from.

    Args:
        imports: JSON list of [module, name]; what cannot be imported is left for the trial to report.
    """
    for module, name in json.loads(imports):
        try:
            loaded = import_module(module)
            if name:
                getattr(loaded, name, None)
        except Exception:  # the trial itself imports it again and records the error as its outcome
            continue
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(True, warn_only=True)  # the first call imports for seconds


def execute(spec: Spec, listen: Callable[[Mapping[str, float]], None]) -> Record:
    """Run a trial in this process.

    Args:
        spec: the trial.
        listen: is given every point of the learning curve at once.
    """
    started, began = now(), time.monotonic()
    machine = host()
    modules_before = set(sys.modules)
    curve: list[Mapping[str, float]] = []

    def log(point: Mapping[str, float]) -> None:
        if len(point) > 2:  # more than progress and cost
            curve.append(point)
        listen(point)

    outcome: Outcome = "ok"
    message = ""
    metrics: dict[str, float] = {}
    try:
        run = resolve(spec.run)
        seed_everything(spec)
        arm = Arm(spec.arm, spec.method, spec.method_settings)
        trial = Trial(
            seed=spec.seed,
            budget=spec.budget,
            settings=spec.settings,
            data=None if spec.data is None else Path(spec.data),
            model=spec.model,
            device=spec.device,
            listener=log,
        )
        metrics = _checked(run(arm, trial), spec)
        _covered(spec, set(sys.modules) - modules_before)
    except Diverged as problem:
        outcome, message = "diverged", str(problem)
    except MemoryError:
        outcome, message = "memory", "the process could not allocate memory"
    except Exception as problem:
        if "allocate memory" in str(problem) or "out of memory" in str(problem):  # torch on CPU and CUDA
            outcome, message = "memory", str(problem)
        else:
            outcome, message = "raised", traceback.format_exc()
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if outcome == "ok" and bad:
        outcome, message = "diverged", ", ".join(f"{name} is {value}" for name, value in bad.items())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return _record(
        spec,
        outcome=outcome,
        metrics=metrics if outcome == "ok" else {},
        message=message,
        curve=[point for point in thinned(curve) if all(math.isfinite(value) for value in point.values())],
        cost={
            "wall_seconds": time.monotonic() - began,
            "cpu_seconds": usage.ru_utime + usage.ru_stime + children.ru_utime + children.ru_stime,
            "peak_memory_bytes": float(
                max(usage.ru_maxrss, children.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
            ),
        },
        machine=machine,
        started=started,
    )


def failure(
    spec: Spec, outcome: Outcome, message: str, *, wall: float, cpu: float, memory: float, started: str
) -> Record:
    """The record of a trial that could not report itself."""
    cost = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_memory_bytes": memory}
    return _record(
        spec, outcome=outcome, metrics={}, message=message, curve=[], cost=cost, machine=host(), started=started
    )


def _record(
    spec: Spec,
    *,
    outcome: Outcome,
    metrics: Mapping[str, float],
    message: str,
    curve: list[Mapping[str, float]],
    cost: Mapping[str, float],
    machine: Mapping[str, Any],
    started: str,
) -> Record:
    return Record(
        key=spec.key,
        paper=spec.paper,
        claim=spec.claim,
        task=spec.task,
        arm=spec.arm,
        seed=spec.seed,
        budget=spec.budget,
        device=spec.device,
        outcome=outcome,
        metrics=metrics,
        message=message,
        curve=curve,
        cost=cost,
        versions=spec.parts["versions"],
        host=machine,
        started=started,
        finished=now(),
        parts=spec.parts,
    )


def seed_everything(spec: Spec) -> None:
    """Threads and global generators of this process; a task takes its own streams from the trial."""
    random.seed(spec.seed)
    np.random.seed(spec.seed % 2**32)  # noqa: NPY002 - code that draws from the global state must repeat too
    if "torch" in spec.parts["versions"]:  # the trial's code imports it
        torch = import_module("torch")
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)


def _checked(metrics: Any, spec: Spec) -> dict[str, float]:
    if not isinstance(metrics, Mapping) or set(metrics) != set(spec.metrics):
        got = sorted(metrics) if isinstance(metrics, Mapping) else type(metrics).__name__
        raise TypeError(f"task {spec.task!r} must return the metrics {sorted(spec.metrics)}, not {got}")
    return {name: float(metrics[name]) for name in spec.metrics}


def _covered(spec: Spec, loaded: set[str]) -> None:
    """Refuse a result of code that the key does not cover."""
    ours = our_packages([spec.run.partition(":")[0], *([spec.method.partition(":")[0]] if spec.method else [])])
    extra = sorted(
        name
        for name in loaded
        if name.partition(".")[0] in ours
        and name not in spec.parts["code"]
        and getattr(sys.modules[name], "__file__", None)
    )
    if extra:
        raise ImportError(
            f"the trial imported {', '.join(extra)} by a computed name, so its key cannot cover that code; "
            "import it with an import statement"
        )


def thinned(curve: list[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """At most `CURVE_POINTS` points, evenly chosen, the first and the last among them."""
    if len(curve) <= CURVE_POINTS:
        return curve
    chosen = np.linspace(0, len(curve) - 1, CURVE_POINTS).round().astype(int)
    return [curve[i] for i in chosen]


def host() -> dict[str, Any]:
    """The machine a trial ran on."""
    return {
        "name": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def leave_with(driver: Any) -> None:
    """End this process when the driver's ends, however it ends: no orphan keeps computing."""

    def watch() -> None:
        from multiprocessing.connection import wait

        wait([driver])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
