"""Individually fair online classification when labels are seen of accepted people only, and a panel objects.

Paper: arXiv 2206.04475 (Bechavod, Roth: Individually Fair Learning with One-Sided Feedback; ICML 2023).
Read beside: no official code was found; the abstracts of both versions, that of Monotone Individual Fairness (ICML
2024), and what is known of Exp2, of follow-the-perturbed-leader for semi-bandits and of geometric resampling.
Deviations: (1) the paper's text could not be read in full, so the reduction and its two inequalities are derived anew,
with two weighted copies of the reported pair; (2) the default estimate needs no weight for rejections (the black-box
one is ``estimate="semi-bandit"``); (3) the step size is set from a bound derived here, the noise to its usual scale,
and the deployed policy of the oracle-based algorithm is estimated from 50 draws by default where the theory takes of
the order of T; (4) the benchmark of the regret is the best mixture of the class that is fair on the realised batches,
found by a linear programme.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterproof.errors import extra
from counterproof.incentives.auditing import Panel
from counterproof.incentives.decisions import DecisionTable, HalfSpaces, separating_points
from counterproof.incentives.one_sided_runs import OneSidedRun, fairness_frontier
from counterproof.incentives.semi_bandit import (
    Form,
    Pair,
    checked_pair,
    estimate_losses,
    rule_decisions,
    semi_bandit_losses,
)

with extra("incentives"):
    from sklearn.base import BaseEstimator, clone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FairOneSidedClassifier", "FairReplay", "frontier_figure", "replay_decisions"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIRST_EPOCH = 64  # rounds before the first doubling, where the horizon is not known


class FairOneSidedClassifier(BaseEstimator):  # type: ignore[misc]
    """Decisions round by round, learned from labels of accepted people and from objections.

    A round is ``predict(X)``, which draws one rule for the whole batch; ``predict_proba(X)``, the policy it was drawn
    from, for the panel; and ``partial_fit(X, labels, violation)``.

    Args:
        hypotheses: a finite class H: a function that takes X (n, d) to decisions (n, h), such as `HalfSpaces`, or a
            sequence of functions or fitted classifiers.
        estimator: in place of them, any scikit-learn classifier that takes `sample_weight`: the oracle of ``"ftpl"``,
            fitted anew for every draw. Where all its targets agree, the constant rule is used.
        algorithm: ``"exp2"``: exponential weights over H, whose policy is explicit. ``"ftpl"``: Context-Semi-Bandit-
            FTPL, the best rule for past losses plus Laplace noise on the separator; probabilities by geometric
            resampling.
        C: weight of fairness; ``"auto"``: horizon^(1/4). The pair is weighted by C/2 against losses halved (step 1).
        eta: step size of Exp2; ``"auto"``: 2 sqrt(log|H| / horizon) / (k + C).
        horizon: number of rounds T; None: unknown, by doubling from 64 rounds, with a fresh start at each doubling.
        estimate: ``"one-sided"`` or ``"semi-bandit"``, see `estimate_losses`.
        separator: (s, d) points on which any two rules differ somewhere (small separator), or all points that will
            come (transductive); for ``"ftpl"``.
        epsilon: eps_F; the noise is Laplace with scale 1/epsilon. ``"auto"``: horizon^(-1/2). ``math.inf``: no noise.
        cap: most draws of one resampling (Lcap); a weight that reaches it is too small, see `capped_`.
        policy_samples: draws R from which ``"ftpl"`` estimates its policy for `predict_proba`.
        full_information: read every label, as if rejection hid none; what that is worth.
        random_state: seed or generator; draws, audits and resampling have streams of their own.

    Attributes:
        classes_: [0, 1].
        rounds_: finished rounds.
        labels_seen_: labels that were read.
        C_: the weight of fairness in use.
        largest_weight_: largest importance weight so far.
        capped_: how many weights were cut at `cap`.

    Raises:
        ValueError: from the first `predict` or `predict_proba` on, for settings out of range, an empty H, or a
            separator on which two rules agree.
    """

    def __init__(
        self,
        hypotheses: Any = None,
        *,
        estimator: Any = None,
        algorithm: Literal["exp2", "ftpl"] = "exp2",
        C: float | Literal["auto"] = "auto",
        eta: float | Literal["auto"] = "auto",
        horizon: int | None = None,
        estimate: Form = "one-sided",
        separator: ArrayLike | None = None,
        epsilon: float | Literal["auto"] = "auto",
        cap: int = 100,
        policy_samples: int = 50,
        full_information: bool = False,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.hypotheses = hypotheses
        self.estimator = estimator
        self.algorithm = algorithm
        self.C = C
        self.eta = eta
        self.horizon = horizon
        self.estimate = estimate
        self.separator = separator
        self.epsilon = epsilon
        self.cap = cap
        self.policy_samples = policy_samples
        self.full_information = full_information
        self.random_state = random_state

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """The policy deployed in this round: (k, 2) probabilities of rejecting and accepting each row of X (k, d).

        Exact for ``"exp2"``; an average of `policy_samples` fresh draws for ``"ftpl"``, see `policy_error`.
        """
        X = self._batch(X)
        q = self._policy(X)
        return np.stack([1 - q, q], 1).astype(X.dtype if X.dtype.kind == "f" else float, copy=False)

    def predict(self, X: ArrayLike) -> Ints:
        """Decide a batch: draw one rule, and remember what it says of the rows of X (k, d) until `partial_fit`.

        Returns:
            (k,) 1 to accept, 0 to reject.
        """
        X = self._batch(X)
        if self.algorithm == "exp2":
            decided = rule_decisions(self.hypotheses, X)
            policy = self._weights()
            # Summed as the draw sums them, so that a rule with no probability is never drawn.
            total = np.cumsum(policy)
            at = min(self._deciding.random() * total[-1], np.nextafter(total[-1], 0))
            decisions = decided[:, int(np.searchsorted(total, at, side="right"))]
            # Of what was decided, each from its own rules: one less the other may round to zero.
            chances = np.where(decisions, decided @ policy, ~decided @ policy)
        else:
            decisions, chances = self._draws(X, 1, self._deciding)[0], None
        self._pending: Any = (X.copy(), decisions, chances)
        return decisions.astype(np.int64)

    def partial_fit(self, X: ArrayLike, accepted_labels: ArrayLike, violation: Pair | None = None) -> Self:
        """Finish the round that `predict` has begun.

        Args:
            X: (k, d) the batch that was decided.
            accepted_labels: (k,) labels 0 or 1 of the accepted people; of the others NaN, or whatever: it is not read
                (but with `full_information`).
            violation: what the panel reported of `predict_proba`: the ordered pair (l, r), or None.

        Raises:
            ValueError: for a batch that was not decided just before, a label of an accepted person that is not 0 or 1,
                or a pair outside the batch.
        """
        pending = getattr(self, "_pending", None)
        if pending is None:
            raise ValueError("partial_fit finishes a round that predict has begun; call predict(X) first")
        decided_on, decisions, chances = pending
        if not np.array_equal(np.asarray(X), decided_on, equal_nan=decided_on.dtype.kind == "f"):
            raise ValueError("partial_fit was given another batch than the last predict; pass the same X")
        labels = np.asarray(accepted_labels, dtype=float)
        if labels.shape != decisions.shape:
            raise ValueError(f"{len(decisions)} people need as many labels, not an array {labels.shape}")
        read = np.ones_like(decisions) if self.full_information else decisions
        if wrong := [int(i) for i in np.flatnonzero(read) if labels[i] not in (0, 1)]:
            raise ValueError(f"person {wrong[0]} was accepted, so has a label 0 or 1, not {labels[wrong[0]]}")
        if violation is not None:
            checked_pair(violation, len(decisions))
        k = len(decisions)
        if self.full_information:
            losses = semi_bandit_losses(labels, violation, self.C_)
        else:
            weights = np.full(k, np.nan)
            if chances is not None:
                assert (chances > 0).all(), "a decision of probability zero was drawn"
                weights = 1 / chances
            else:
                needed = decisions if self.estimate == "one-sided" else np.ones(k, bool)
                weights[needed] = self._resampled(decided_on, decisions, needed)
            if decisions.any():
                self.largest_weight_: float = max(self.largest_weight_, float(weights[decisions].max()))
            losses = estimate_losses(decisions, labels, weights, violation, self.C_, form=self.estimate)
        items = np.concatenate([np.arange(k), (0, 0) if violation is None else checked_pair(violation, k)])
        self._learn(decided_on[items], losses[:, 1] - losses[:, 0], k)
        self.labels_seen_ += int(read.sum())
        self.rounds_ += 1
        self._pending = None
        if self.horizon is None and self.rounds_ >= self._epoch_end:
            self._begin_epoch(2 * self._epoch)
        return self

    def policy(self) -> Floats:
        """(h,) probabilities of the rules of H in the round at hand; for ``"exp2"`` only.

        Raises:
            ValueError: for ``"ftpl"``, whose policy is a distribution of draws, or before the first round.
        """
        if self.algorithm != "exp2" or not hasattr(self, "_log_weights"):
            raise ValueError("the policy is explicit for algorithm='exp2' only, from the first predict on")
        return self._weights()

    def policy_error(self, people: int, confidence: float = 0.95) -> float:
        """What to add to a panel's alpha: no gap that `predict_proba` shows is further off, with that probability.

        Hoeffding's inequality for `people` averages of `policy_samples` draws, doubled for a gap; 0 for ``"exp2"``.
        """
        if self.algorithm == "exp2":
            return 0.0
        return 2 * math.sqrt(math.log(2 * people / (1 - confidence)) / (2 * self.policy_samples))

    # state

    def _batch(self, X: ArrayLike) -> NDArray[Any]:
        X = np.asarray(X)
        if X.ndim != 2 or not len(X):
            raise ValueError(f"X has shape (people, columns) with at least one person, not {X.shape}")
        if not hasattr(self, "rounds_"):
            self._begin(X)
        return X

    def _begin(self, X: NDArray[Any]) -> None:
        """Check the settings and set up the state: what constructors of scikit-learn leave to the first call."""
        if self.algorithm not in ("exp2", "ftpl"):
            raise ValueError(f"algorithm is 'exp2' or 'ftpl', not {self.algorithm!r}")
        if self.estimate not in ("one-sided", "semi-bandit"):
            raise ValueError(f"estimate is 'one-sided' or 'semi-bandit', not {self.estimate!r}")
        if (self.hypotheses is None) == (self.estimator is None):
            raise ValueError("give either hypotheses, a finite class, or an estimator, an oracle for algorithm='ftpl'")
        if self.algorithm == "exp2" and self.hypotheses is None:
            raise ValueError("algorithm='exp2' keeps a weight per rule; give hypotheses, or choose algorithm='ftpl'")
        value: Any
        for name, value, least in (("C", self.C, 0.0), ("eta", self.eta, None), ("epsilon", self.epsilon, None)):
            if value == "auto":
                continue
            number = isinstance(value, int | float | np.number) and not math.isnan(value)
            if not (number and (value >= least if least is not None else value > 0)) or (
                name != "epsilon" and math.isinf(value)
            ):
                raise ValueError(f"{name} is 'auto' or a number {'>= 0' if least == 0 else '> 0'}, not {value!r}")
        for name, value in (("horizon", self.horizon), ("cap", self.cap), ("policy_samples", self.policy_samples)):
            if not (isinstance(value, int | np.integer) and value >= 1) and not (name == "horizon" and value is None):
                raise ValueError(f"{name} is an integer >= 1, not {value!r}")
        decided = None if self.hypotheses is None else rule_decisions(self.hypotheses, X)
        if self.algorithm == "ftpl":
            if self.separator is None:
                raise ValueError("algorithm='ftpl' puts its noise on a separator; give points (s, d), all rows will do")
            self._separator = np.asarray(self.separator)
            if self._separator.ndim != 2 or self._separator.shape[1:] != X.shape[1:] or not len(self._separator):
                raise ValueError(f"separator has shape (points, {X.shape[1]}), not {self._separator.shape}")
            if decided is not None:
                self._on_separator = rule_decisions(self.hypotheses, self._separator)
                _, first, which = np.unique(self._on_separator, axis=1, return_index=True, return_inverse=True)
                if len(first) < self._on_separator.shape[1]:
                    twin = next(i for i, kind in enumerate(which.ravel()) if first[kind] != i)
                    raise ValueError(
                        f"rules {int(first[which.ravel()[twin]])} and {twin} agree on every point of the separator; "
                        "add a point where they differ, or drop one of them"
                    )
        self._size = 0 if decided is None else decided.shape[1]
        streams = np.random.default_rng(self.random_state).spawn(4)
        self._deciding, self._auditing, self._resampling, self._fitting = streams
        self.classes_ = np.array([0, 1])
        self.rounds_ = self.labels_seen_ = self.capped_ = 0
        self.largest_weight_ = 0.0
        self._epoch_end: int = 0
        self._begin_epoch(self.horizon or FIRST_EPOCH)

    def _begin_epoch(self, length: int) -> None:
        self._epoch = length
        self._epoch_end += length
        self.C_: float = length**0.25 if self.C == "auto" else float(self.C)
        self._log_weights = np.zeros(self._size)
        self._past: dict[bytes, list[Any]] = {}  # row, cost of accepting it less that of rejecting, over the epoch
        self._leader_losses = np.zeros(self._size)

    def _weights(self) -> Floats:
        weights = np.exp(self._log_weights - self._log_weights.max())
        total: Floats = weights / weights.sum()
        return total

    def _policy(self, X: NDArray[Any]) -> Floats:
        if self.algorithm == "exp2":
            q: Floats = rule_decisions(self.hypotheses, X) @ self._weights()
            return np.clip(q, 0.0, 1.0)  # sums of probabilities pass 1 by rounding
        sampled: Floats = self._draws(X, self.policy_samples, self._auditing).mean(0)
        return sampled

    def _learn(self, rows: NDArray[Any], relative: Floats, k: int) -> None:
        """Take in the loss of accepting each item less that of rejecting it: all in which rules differ."""
        if self.hypotheses is not None:
            losses = relative @ rule_decisions(self.hypotheses, rows)
            if self.algorithm == "exp2":
                eta = self.eta
                if eta == "auto":
                    eta = 2 * math.sqrt(math.log(max(self._size, 2)) / self._epoch) / (k + self.C_)
                self._log_weights -= eta * losses
            else:
                self._leader_losses += losses
            return
        for row, cost in zip(rows, relative):
            if cost:
                self._past.setdefault(row.tobytes(), [row, 0.0])[1] += cost

    # follow the perturbed leader

    def _draws(self, X: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """(count, k) decisions of independent draws of the perturbed leader on the rows of X."""
        epsilon = self._epoch**-0.5 if self.epsilon == "auto" else float(self.epsilon)
        noise = rng.laplace(size=(count, len(self._separator))) / epsilon
        if self.hypotheses is not None:
            leaders = (self._leader_losses + noise @ self._on_separator).argmin(1)
            decided: NDArray[np.bool_] = rule_decisions(self.hypotheses, X)[:, leaders].T
            return decided
        past = [row for row, _ in self._past.values()]
        rows = np.concatenate([np.array(past), self._separator]) if past else self._separator
        owed = np.array([cost for _, cost in self._past.values()])
        return np.stack([self._oracle(rows, np.concatenate([owed, xi]))(X) for xi in noise])

    def _oracle(self, rows: NDArray[Any], costs: Floats) -> Callable[[Any], NDArray[np.bool_]]:
        """A rule of small sum_z costs_z h(z), by weighted classification: negative costs are worth accepting."""
        target, weight = costs < 0, np.abs(costs)
        kept = weight > 0
        if not kept.any() or (target[kept] == target[kept][0]).all():
            constant = bool(kept.any() and target[kept][0])
            return lambda X: np.full(len(X), constant)
        estimator = clone(self.estimator)
        if "random_state" in estimator.get_params() and estimator.get_params()["random_state"] is None:
            estimator.set_params(random_state=int(self._fitting.integers(2**31)))
        # Weights of mean 1, so that an estimator's regularisation means the same in every round.
        estimator.fit(rows[kept], target[kept].astype(int), sample_weight=weight[kept] / weight[kept].mean())
        return lambda X: np.asarray(estimator.predict(X)) == 1

    def _resampled(self, X: NDArray[Any], decisions: NDArray[np.bool_], needed: NDArray[np.bool_]) -> Floats:
        """Geometric resampling: for each needed person, how many draws until the decision comes again, at most `cap`.

        Without the cap its expectation is one over the probability of the decision. People share the draws.
        """
        people = np.flatnonzero(needed)
        first = np.full(len(people), self.cap)
        done, block = 0, 1 if self.hypotheses is None else 8
        waiting = np.ones(len(people), bool)
        while waiting.any() and done < self.cap:
            block = min(block, self.cap - done)
            again = self._draws(X, block, self._resampling)[:, people] == decisions[people]
            found = again.any(0) & waiting
            first[found] = done + 1 + again.argmax(0)[found]
            waiting &= ~found
            done += block
            block = block if self.hypotheses is None else 2 * block
        self.capped_ += int(waiting.sum())
        return first.astype(float)


# replays of a table


@dataclass(frozen=True, eq=False)
class FairReplay:
    """Decisions replayed on a table, once per weight of fairness.

    Attributes:
        table: the people.
        rules: the class H.
        rows: T arrays of row indices.
        runs: one per weight.
        policy_error: what sampling adds to a gap that the panel is shown, see `FairOneSidedClassifier.policy_error`.
    """

    table: DecisionTable
    rules: HalfSpaces
    rows: tuple[Ints, ...]
    runs: tuple[OneSidedRun, ...]
    policy_error: float

    def summary(self, *, slack: float | None = None) -> dict[str, Any]:
        """All numbers, JSON types only: what was replayed, a reference, and a row per weight of fairness.

        Args:
            slack: margin of the fair benchmark; None: half of the panel's alpha, or no benchmark if alpha is 0.
        """
        seen, y = np.concatenate(self.rows), np.concatenate(self.runs[0].labels)
        panel = self.runs[0].panels[0]
        measured = panel is not None and panel.alpha > 0
        rows = []
        for run in self.runs:
            accepted = np.concatenate(run.decisions) == 1
            row: dict[str, Any] = {
                "C": float(run.C[-1]),
                "error": run.error,
                "mistakes": int((accepted != (y == 1)).sum()),
                "objections": run.objections,
                "rounds_with_objection": int(run.objected.sum()),
                "labels_seen": run.labels_seen,
                "people_seen": len(np.unique(seen[accepted])),
                "accepted": float(accepted.mean()),
            }
            if measured:
                regret = run.regret(self.rules, slack=slack)
                row |= {
                    "accuracy_regret": regret.accuracy,
                    "lagrangian_regret": regret.lagrangian,
                    "reduction_regret": regret.reduction,
                    "violation_bound": regret.violation_bound if run.C.min() else None,
                    "best_fair_error": regret.benchmark_error,
                }
            if run.policy is not None:
                most = np.argsort(-run.policy, kind="stable")[:5]
                row["rules"] = [{"accepts": self.rules.names[i], "weight": float(run.policy[i])} for i in most]
            rows.append(row)
        return {
            "table": self.table.says,
            "rules": len(self.rules),
            "rounds": len(self.rows),
            "batch": len(self.rows[0]),
            "passes": len(seen) / len(self.table),
            "best_rule_error": float((self.rules(self.table.X[seen]) != (y == 1)[:, None]).mean(0).min()),
            "policy_error": self.policy_error,
            "frontier": rows,
        }


def replay_decisions(
    table: DecisionTable,
    panel: Panel,
    *,
    C: Sequence[float] = (0.0, 2.0, 8.0),
    rounds: int | None = None,
    batch: int = 4,
    cuts: int = 5,
    algorithm: Literal["exp2", "ftpl"] = "exp2",
    rng: int | np.random.Generator | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> FairReplay:
    """Decide about a table's people in random order, round by round, with rules on one column each.

    Args:
        table: people and outcomes; the learner sees the outcomes of the accepted only.
        panel: from `DecisionTable.panel`, or any other.
        C: weights of fairness.
        rounds: number of batches; None: one pass, but at least 2,000, so that small tables come several times.
        batch: people per round.
        cuts: thresholds per column.
        algorithm: ``"exp2"`` or ``"ftpl"``.
        rng: seed or generator, of the order and of the draws.
        watch: as in `fairness_frontier`.

    Raises:
        ValueError: for rounds or a batch below 1, or a batch larger than the table.
    """
    if not 1 <= batch <= len(table):
        raise ValueError(f"a batch has 1 to {len(table)} people, as many as the table, not {batch}")
    rounds = max(2000, len(table) // batch) if rounds is None else rounds
    if rounds < 1:
        raise ValueError(f"rounds is at least 1, not {rounds}")
    order, draws = np.random.default_rng(rng).spawn(2)
    rules = table.rules(cuts)
    rows = table.rounds(rounds, batch, order)
    learner = FairOneSidedClassifier(
        rules,
        algorithm=algorithm,
        horizon=rounds,
        separator=table.X[separating_points(rules(table.X))],
        random_state=int(draws.integers(2**31)),
    )
    runs = fairness_frontier(learner, [(table.X[i], table.y[i]) for i in rows], panel, C=C, watch=watch)
    return FairReplay(table, rules, tuple(rows), runs, learner.policy_error(batch))


def frontier_figure(summary: Mapping[str, Any]) -> "Figure":
    """Objections against error, a point per weight of fairness, from `FairReplay.summary`."""
    with extra("incentives"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = summary["frontier"]
    axes.plot([row["error"] for row in rows], [row["objections"] for row in rows], "o-", color="#1f4e79")
    for row in rows:
        axes.annotate(f"C = {row['C']:g}", (row["error"], row["objections"]), textcoords="offset points", xytext=(6, 5))
    axes.axvline(summary["best_rule_error"], color="0.5", linestyle=":", label="best rule, all labels known")
    if "best_fair_error" in rows[0]:
        axes.axvline(rows[0]["best_fair_error"], color="#b5532a", linestyle="--", label="best fair mixture of rules")
    axes.margins(0.15)
    axes.set(xlabel="expected error per person", ylabel="share of rounds with an objection", ylim=(0, None))
    axes.set_title(summary["table"], fontsize=8)
    axes.legend(fontsize=8)
    return figure
