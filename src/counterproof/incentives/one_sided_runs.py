"""Runs of a learner with one-sided labels, and their regret in accuracy and fairness."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import extra
from counterproof.incentives.auditing import Panel, best_fair_policy
from counterproof.incentives.semi_bandit import lagrangian_loss, rule_decisions

with extra("incentives"):
    from sklearn.base import clone

__all__ = ["FairRegret", "OneSidedRun", "fairness_frontier", "run_one_sided"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class FairRegret:
    """What a run lost against the best policy that is fair by a margin.

    Attributes:
        accuracy: R_acc, expected errors of the run less those of the benchmark; negative where unfairness pays.
        lagrangian: R_L, the same in Lagrangian loss. R_acc <= R_L.
        reduction: Lagrangian loss of the run less that of the best rule in hindsight, fair or not: what a no-regret
            algorithm keeps below T. It is at least R_L.
        violations: rounds with an objection, V <= `violation_bound`.
        violation_bound: (R_L + people) / (C slack), of the least C; infinite where that is 0.
        benchmark_error: of the benchmark, per person.
        policy: (h,) the benchmark: the best mixture of the class with no (alpha - slack, gamma)-violation in any round.
    """

    accuracy: float
    lagrangian: float
    reduction: float
    violations: int
    violation_bound: float
    benchmark_error: float
    policy: Floats


@dataclass(frozen=True, eq=False)
class OneSidedRun:
    """What happened in a run of T rounds.

    Attributes:
        batches: T arrays (k, d).
        labels: T arrays (k,), all labels, also those that the learner did not see.
        probabilities: T arrays (k,), the policy shown to the panel.
        decisions: T arrays (k,).
        pairs: T violations or None.
        panels: the panel of each round.
        C: (T,) weight of fairness in each round.
        policy: (h,) final weights of the rules, with Exp2; else None.
    """

    batches: tuple[NDArray[Any], ...]
    labels: tuple[NDArray[Any], ...]
    probabilities: tuple[Floats, ...]
    decisions: tuple[Ints, ...]
    pairs: tuple[Pair | None, ...]
    panels: tuple[Panel | None, ...]
    C: Floats
    policy: Floats | None = None

    @property
    def people(self) -> int:
        return sum(map(len, self.labels))

    @property
    def errors(self) -> Floats:
        """(T,) expected errors of the deployed policy, Err_t(pi_t)."""
        return np.array([lagrangian_loss(q, y, None, 0.0) for q, y in zip(self.probabilities, self.labels)])

    @property
    def error(self) -> float:
        """Expected errors per person."""
        return float(self.errors.sum() / self.people)

    @property
    def objected(self) -> NDArray[np.bool_]:
        """(T,) rounds with an objection."""
        return np.array([pair is not None for pair in self.pairs])

    @property
    def objections(self) -> float:
        """Share of rounds with an objection."""
        return float(self.objected.mean())

    @property
    def labels_seen(self) -> int:
        """People accepted, whose labels are all that was learned from."""
        return int(sum(decisions.sum() for decisions in self.decisions))

    def regret(self, hypotheses: Any, *, slack: float | None = None) -> FairRegret:
        """Regret in accuracy and fairness against the best fair mixture of a finite class.

        Args:
            hypotheses: as in `rule_decisions`.
            slack: eps in (0, alpha]: by how much fairer than the panel asks the benchmark is; None: half of alpha.

        Raises:
            ValueError: for a slack outside (0, alpha], or a run without a panel in some round.
        """
        panels = [panel for panel in self.panels if panel is not None]
        if len(panels) < len(self.panels):
            raise ValueError("regret needs a panel in every round; run with one, it need not be heard: C=0")
        alpha = min(panel.alpha for panel in panels)
        slack = alpha / 2 if slack is None else slack
        if not 0 < slack <= alpha:
            raise ValueError(f"slack lies in (0, alpha], here (0, {alpha}], not {slack!r}; no policy need exist beyond")
        decided = rule_decisions(hypotheses, np.concatenate(self.batches))
        y = np.concatenate(self.labels)
        lefts, rights, limits, offset = [], [], [], 0
        for X, panel in zip(self.batches, panels):
            limit = panel.limits(X, slack=slack)
            left, right = np.nonzero(limit < 1)  # no gap is wider
            lefts.append(left + offset)
            rights.append(right + offset)
            limits.append(limit[left, right])
            offset += len(X)
        policy, errors = best_fair_policy(
            decided, y, np.concatenate(lefts), np.concatenate(rights), np.concatenate(limits)
        )
        best = np.split(decided @ policy, np.cumsum([len(X) for X in self.batches])[:-1])
        lagrangian = sum(
            lagrangian_loss(q, y, pair, C) - lagrangian_loss(p, y, pair, C)
            for q, p, y, pair, C in zip(self.probabilities, best, self.labels, self.pairs, self.C)
        )
        own = sum(
            lagrangian_loss(q, y, pair, C) for q, y, pair, C in zip(self.probabilities, self.labels, self.pairs, self.C)
        )
        each = (decided != (y == 1)[:, None]).sum(0).astype(float)
        starts = np.cumsum([0, *map(len, self.batches)])
        for start, pair, C in zip(starts, self.pairs, self.C):
            if pair is not None:
                each += C * (decided[start + pair[0]].astype(float) - decided[start + pair[1]])
        return FairRegret(
            accuracy=float(self.errors.sum() - errors),
            lagrangian=lagrangian,
            reduction=own - float(each.min()),
            violations=int(self.objected.sum()),
            violation_bound=(lagrangian + self.people) / (self.C.min() * slack) if self.C.min() else math.inf,
            benchmark_error=errors / self.people,
            policy=policy,
        )


def run_one_sided(
    learner: Any,
    stream: Iterable[Sequence[Any]],
    panel: Panel | None = None,
    *,
    watch: Callable[[int], None] | None = None,
) -> OneSidedRun:
    """Play a stream of batches, hiding the labels of rejected people from the learner.

    Args:
        learner: a `FairOneSidedClassifier`, or what has its methods; is trained in place.
        stream: per round (X, y), or (X, y, panel) where panels change; y (k,) holds all labels.
        panel: of the rounds that bring none; None: nobody objects.
        watch: called with the number of finished rounds.

    Raises:
        ValueError: for an empty stream.
    """
    kept: list[list[Any]] = [[] for _ in range(7)]
    for number, entry in enumerate(stream, 1):
        X, y = np.asarray(entry[0]), np.asarray(entry[1])
        judges = entry[2] if len(entry) > 2 else panel
        decisions = learner.predict(X)
        q = learner.predict_proba(X)[:, 1]
        pair = None if judges is None else judges(q, X)
        shown = y.astype(float) if getattr(learner, "full_information", False) else np.where(decisions == 1, y, np.nan)
        weight = getattr(learner, "C_", 0.0)  # may change with the round, where the horizon is not known
        learner.partial_fit(X, shown, violation=pair)
        for into, value in zip(kept, (X, y, q, decisions, pair, judges, weight)):
            into.append(value)
        if watch is not None:
            watch(number)
    if not kept[0]:
        raise ValueError("the stream is empty; give at least one batch (X, y)")
    batches, labels, chances, decided, pairs, panels, weights = map(tuple, kept)
    policy = learner.policy() if getattr(learner, "algorithm", None) == "exp2" else None
    return OneSidedRun(batches, labels, chances, decided, pairs, panels, np.array(weights), policy)


def fairness_frontier(
    learner: Any,
    stream: Iterable[Sequence[Any]],
    panel: Panel | None = None,
    *,
    C: Sequence[float] = (0.0, 2.0, 8.0),
    watch: Callable[[int, int], None] | None = None,
) -> tuple[OneSidedRun, ...]:
    """The same stream once per weight of fairness: what fewer objections cost in errors.

    Args:
        learner: is cloned, not trained.
        stream, panel: as in `run_one_sided`.
        C: weights of fairness, increasing as a rule.
        watch: called with the index of the weight and the number of finished rounds.
    """
    rounds = list(stream)
    runs = []
    for at, weight in enumerate(C):
        told = None if watch is None else partial(watch, at)
        runs.append(run_one_sided(clone(learner).set_params(C=weight), rounds, panel, watch=told))
    return tuple(runs)
