"""What identifies a trial before it runs, and what is recorded of it afterwards."""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from counterproof.bench.code import closure, distribution_versions
from counterproof.bench.task import Arm, Claim

__all__ = ["Outcome", "Record", "Spec", "specs", "stale_parts"]

Outcome = Literal["ok", "raised", "diverged", "memory", "time", "killed"]


@dataclass(frozen=True)
class Spec:
    """Everything a worker needs to run one trial, as JSON values.

    Attributes:
        key: hash of `parts`: same key, same result.
        parts: what the key covers: code, task, arm, settings, seed, budget, data, model, device, versions.
        paper, claim, arm: who asked first, by name; not part of the key.
        run, method, method_settings, settings, seed, budget, data, model, device: see `Task`, `Arm` and `Trial`.
        threads, seconds, memory: cores, wall time limit, and resident memory limit in bytes.
    """

    key: str
    parts: Mapping[str, Any]
    paper: str
    claim: str
    task: str
    arm: str
    run: str
    metrics: tuple[str, ...]
    method: str | None
    method_settings: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    budget: str
    data: str | None
    model: str | None
    device: str
    threads: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Record:
    """A finished trial, as the journal keeps it and `runs export` writes it.

    Attributes:
        uid: of this execution; a key may have been executed more than once.
        outcome: ``ok``; ``raised`` (an exception), ``diverged`` (NaN or infinity), ``memory`` or ``time`` (over its
            limit), ``killed`` (by a signal from outside).
        metrics: metric -> value; empty unless ``ok``.
        message: the traceback, or what happened, unless ``ok``.
        curve: points of the learning curve, with progress (0 to 1) and cost (CPU seconds).
        cost: wall_seconds, cpu_seconds, peak_memory_bytes.
        versions: Python and the distributions the trial imports.
        host: name, system, processor, cores, memory_bytes, load (of the last minute, at the start).
        started, finished: UTC, ISO 8601.
        parts: as in `Spec`.
    """

    key: str
    paper: str
    claim: str
    task: str
    arm: str
    seed: int
    budget: str
    device: str
    outcome: Outcome
    metrics: Mapping[str, float]
    message: str
    curve: list[Mapping[str, float]]
    cost: Mapping[str, float]
    versions: Mapping[str, str]
    host: Mapping[str, Any]
    started: str
    finished: str
    parts: Mapping[str, Any]
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)

    def value(self, metric: str) -> float | None:
        """The metric, or None for a trial that failed."""
        return self.metrics[metric] if self.outcome == "ok" else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values; refuses what JSON has no word for."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]


def roots(run: str, method: str | None) -> list[str]:
    """The modules a trial starts from."""
    return list(dict.fromkeys(reference.partition(":")[0] for reference in (run, method) if reference is not None))


def specs(
    claim: Claim,
    arm: Arm,
    seeds: Iterable[int],
    *,
    budget: str,
    device: str = "cpu",
    data: tuple[str, str] | None = None,
    model: tuple[str, str] | None = None,
) -> list[Spec]:
    """The trials of one arm of a claim.

    Args:
        claim, arm: the arm need not be one of the claim's own.
        seeds: one trial each.
        budget: a level the task knows.
        device: as torch spells it.
        data, model: (path or name, fingerprint) of the user's own.

    Raises:
        TypeError: settings that are not JSON values.
    """
    task = claim.task
    limits = task.budgets[budget]
    settings = {**limits.settings, **claim.settings}
    code = closure(roots(task.run, arm.method))
    parts = {
        "code": code.modules,
        "task": task.name,
        "run": task.run,
        "method": arm.method,
        "method_settings": dict(arm.settings),
        "settings": settings,
        "budget": budget,
        "data": data and data[1],
        "model": model and model[1],
        "device": device,
        "threads": task.threads,
        "versions": distribution_versions(code.outside),
    }
    try:
        canonical(parts)
    except (TypeError, ValueError) as problem:
        raise TypeError(f"settings of arm {arm.name!r} on task {task.name!r} must be JSON values: {problem}") from None
    return [
        Spec(
            key=key_of({**parts, "seed": seed}),
            parts={**parts, "seed": seed},
            paper=claim.paper,
            claim=claim.name,
            task=task.name,
            arm=arm.name,
            run=task.run,
            metrics=tuple(task.metrics),
            method=arm.method,
            method_settings=dict(arm.settings),
            settings=settings,
            seed=seed,
            budget=budget,
            data=data and data[0],
            model=model and model[0],
            device=device,
            threads=task.threads,
            seconds=limits.trial_minutes * 60,
            memory=int(limits.trial_memory * 2**30),
        )
        for seed in seeds
    ]


def stale_parts(parts: Mapping[str, Any]) -> list[str]:
    """Why a trial would not be answered from the journal today: what changed since, one line each; empty if current.

    Data and models are not read again: their fingerprints stand as recorded.
    """
    try:
        code = closure(roots(parts["run"], parts["method"]))
    except (ImportError, SyntaxError) as problem:
        return [f"its code can no longer be read: {problem}"]
    reasons = []
    for name in sorted({*parts["code"], *code.modules}):
        then, today = parts["code"].get(name), code.modules.get(name)
        if then != today:
            change = "is new" if then is None else "is gone" if today is None else "has changed"
            reasons.append(f"module {name} {change}")
    versions = distribution_versions(code.outside)
    for name in sorted({*parts["versions"], *versions}):
        then, today = parts["versions"].get(name), versions.get(name)
        if then != today:
            reasons.append(f"{name} was {then or 'absent'}, is {today or 'absent'}")
    return reasons
