"""The words of a comparison that a room and a paper write down: metric, budget, task, arm, trial, claim.

Everything here is a declaration. Code is named by reference, ``"package.module:function"``, and resolved inside the
trial: so claims can be listed without importing torch, and the code an arm runs is known before it runs.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Better = Literal["lower", "higher"]


def resolve(reference: str) -> Any:
    """The object behind ``"package.module:name"``.

    Raises:
        ValueError: when the reference is not of that form.
        ImportError, AttributeError: when there is no such module or name.
    """
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise ValueError(f"a reference is 'package.module:name', not {reference!r}")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Metric:
    """What a task measures: which direction is better, and the unit it is printed in."""

    better: Better
    unit: str = ""
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a claim may cost at one level.

    Args:
        settings: what the task reads of it (steps, images, instances, ...); part of a trial's key.
        seeds: fewest and most seeds of a comparison.
        minutes: processor time of all trials of a claim together (wall time on other devices), divided by the number
            of jobs; None is unlimited.
        trial_minutes: wall time after which one trial is stopped.
        trial_memory: GiB of resident memory after which one trial is stopped.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, int] = (4, 12)
    minutes: float | None = 3.0
    trial_minutes: float = 10.0
    trial_memory: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work on which methods can be compared: data, model, loop, metrics.

    Args:
        name: what the command line calls it.
        says: one line: data, model, what is trained, what is measured.
        run: reference of ``run(arm: Arm, trial: Trial) -> Mapping[str, float]``.
        metrics: what ``run`` returns, the main one first.
        budgets: by level; at least ``"quick"``.
        plug: what ``arm.method`` has to be and how the task calls it, in one or two lines.
        data: reference of ``data(path: Path) -> str``: reads and checks a user's own data, raises `UserError` naming
            file and remedy, returns one line that says what was read. None: the task has embedded data only.
        model: what a user's ``--model`` may be, in a line; empty: the task takes none.
        sample: what a seed stands for: a random start, or a problem instance of a deterministic task.
        threads: cores one trial uses.
    """

    name: str
    says: str
    run: str
    metrics: Mapping[str, Metric]
    budgets: Mapping[str, Budget]
    plug: str
    data: str | None = None
    model: str = ""
    sample: Literal["seed", "instance"] = "seed"
    threads: int = 1


@dataclass(frozen=True)
class Arm:
    """One way of doing a task: the baseline (no method), or a method with its settings.

    Args:
        name: unique within the task.
        method: reference of what fills the task's plug; None leaves it empty.
        settings: keyword arguments of the method, or whatever the task's plug says; JSON values only.
    """

    name: str
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The method itself, or None for an arm without one."""
        return None if self.method is None else resolve(self.method)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """ "On this task, this arm beats that arm on this metric", written down before the run.

    Args:
        paper: slug.
        name: unique within the paper.
        says: the claim as a sentence that ends where the metric begins.
        task, baseline, method, metric, better: what is run and compared.
        effect: ``"difference"`` (improvement in the metric's unit) or ``"ratio"`` (method over baseline, geometric).
        smallest: the smallest effect that matters: for a difference the improvement as a positive number, for a ratio
            the ratio that must be passed (0.95 where lower is better, 1.05 where higher is). None: any improvement.
        reported: what the paper reports, with its setting.
        settings: the task's settings for both arms, over those of the budget.
        seeds: fewest and most seeds, over those of the budget.
    """

    paper: str
    says: str
    task: Task
    baseline: Arm
    method: Arm
    metric: str
    better: Better
    effect: Literal["difference", "ratio"] = "difference"
    smallest: float | None = None
    reported: str = ""
    name: str = "main"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        where = f"claim {self.paper}/{self.name}"
        if self.metric not in self.task.metrics:
            raise ValueError(f"{where}: task {self.task.name} has no metric {self.metric!r}")
        if self.better != self.task.metrics[self.metric].better:
            raise ValueError(f"{where}: the task says {self.metric} is better {self.task.metrics[self.metric].better}")
        if self.baseline.name == self.method.name:
            raise ValueError(f"{where}: both arms are called {self.method.name!r}")
        if self.smallest is not None:
            if self.effect == "difference" and self.smallest < 0:
                raise ValueError(f"{where}: the smallest difference is an improvement, a number >= 0")
            if self.effect == "ratio" and not (
                0 < self.smallest <= 1 if self.better == "lower" else self.smallest >= 1
            ):
                raise ValueError(f"{where}: the smallest ratio must lie on the side that is better {self.better}")


class Diverged(ArithmeticError):
    """Raised by a task whose training has gone to NaN or infinity: a result that counts against the arm."""


class Trial:
    """One arm on one seed within one budget, as the task sees it.

    Attributes:
        seed: the seed shared by all arms of the comparison.
        budget: the level's name.
        settings: the task's settings at this level, read-only.
        data, model: the user's own, or None for the embedded ones.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
    """

    def __init__(
        self,
        *,
        seed: int,
        budget: str = "quick",
        settings: Mapping[str, Any] = MappingProxyType({}),
        data: Path | None = None,
        model: str | None = None,
        device: str = "cpu",
        listener: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.seed = seed
        self.budget = budget
        self.settings = MappingProxyType(dict(settings))
        self.data = data
        self.model = model
        self.device = device
        self._listener = listener
        self._off_clock = 0.0
        self._started = time.process_time()

    def rng(self, purpose: str) -> "np.random.Generator":
        """A NumPy generator of this seed for one purpose: the same for every arm, independent between purposes.

        One purpose, one generator: an arm that draws more often than another from ``rng("noise")`` leaves
        ``rng("batches")`` where it was, so the arms stay paired.
        """
        import numpy as np  # here, because declaring tasks and claims must not wait for it

        return np.random.Generator(np.random.PCG64(self._sequence(purpose)))

    def torch_generator(self, purpose: str) -> "torch.Generator":
        """The same for torch; a CPU generator, so that draws agree between devices."""
        # By name, not by an import statement: a task that never asks for it does not depend on torch.
        generator: torch.Generator = resolve("torch:Generator")()
        state = int(self._sequence(purpose).generate_state(1, "uint64")[0])
        return generator.manual_seed(state & (2**63 - 1))

    def _sequence(self, purpose: str) -> "np.random.SeedSequence":
        import numpy as np

        return np.random.SeedSequence([self.seed, *purpose.encode()])

    def cost(self) -> float:
        """CPU seconds this trial has spent on the work itself: what an equal-compute budget counts."""
        return time.process_time() - self._started - self._off_clock

    @contextmanager
    def off_clock(self) -> Iterator[None]:
        """What happens inside (evaluation, plots) is not the method's cost."""
        began = time.process_time()
        try:
            yield
        finally:
            self._off_clock += time.process_time() - began

    def log(self, progress: float, **values: float) -> None:
        """A point of the learning curve.

        Args:
            progress: the share of the trial that is done, 0 to 1; moves the progress bar.
            values: numbers to keep with it, e.g. ``step=200, energy=0.08``; none only moves the bar.
        """
        if self._listener is not None:
            self._listener({"progress": progress, "cost": self.cost(), **values})
