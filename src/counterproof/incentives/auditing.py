"""Auditors who know similar people when they see them, and panels that object to a randomised policy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

__all__ = ["Auditor", "ColumnDistance", "Panel", "best_fair_policy"]

Floats = NDArray[np.float64]

# A gap that exceeds its limit by rounding only is no violation: equal policies on equal people must never be one.
ROUNDING = 1e-12


class ColumnDistance:
    """d(x, x') = min(1, scale * sum_c w_c |x_c - x'_c|).

    Args:
        scale: how fast people become different (L); 0 finds all people alike, so every difference unfair.
        columns: indices of the columns that count; None: all of them.
        weights: one weight w_c >= 0 per counted column; None: one over their number.
    """

    def __init__(
        self, scale: float, columns: Sequence[int] | None = None, weights: Sequence[float] | None = None
    ) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale is a finite number >= 0, not {scale!r}")
        self.scale = scale
        self.columns = None if columns is None else [int(column) for column in columns]
        self.weights = None if weights is None else np.asarray(weights, dtype=float)
        if self.columns is not None and not self.columns:
            raise ValueError("columns is empty; name a column, or None for all of them")
        if self.weights is not None and not ((self.weights >= 0).all() and np.isfinite(self.weights).all()):
            raise ValueError(f"weights are finite and >= 0, not {weights!r}")

    def pairwise(self, X: ArrayLike) -> Floats:
        """(k, k) distances between the rows of X (k, d).

        Raises:
            ValueError: for a column that X does not have, or as many weights as there are no columns.
        """
        X = np.asarray(X, dtype=float)
        if X.ndim != 2:
            raise ValueError(f"X has shape (people, columns), not {X.shape}")
        columns = list(range(X.shape[1])) if self.columns is None else self.columns
        if wrong := [c for c in columns if not 0 <= c < X.shape[1]]:
            raise ValueError(f"there is no column {wrong[0]} in X of {X.shape[1]} columns")
        weights = np.full(len(columns), 1 / len(columns)) if self.weights is None else self.weights
        if len(weights) != len(columns):
            raise ValueError(f"{len(columns)} columns need as many weights, not {len(weights)}")
        Z = X[:, columns]
        distance: Floats = np.abs(Z[:, None] - Z[None]) @ (self.scale * weights)
        return np.minimum(distance, 1.0)

    def __call__(self, x: ArrayLike, x2: ArrayLike) -> float:
        """The distance of two people, each a row (d,)."""
        return float(self.pairwise(np.stack([np.asarray(x, dtype=float), np.asarray(x2, dtype=float)]))[0, 1])


class Auditor:
    """One auditor: how different any two people are, in [0, 1], so by how much their chances may differ.

    Args:
        metric: any function d(x, x') of two rows, not necessarily symmetric; one with a method ``pairwise(X)`` that
            returns all (k, k) distances at once, such as `ColumnDistance`, is asked through it.
    """

    def __init__(self, metric: Callable[[Any, Any], float]) -> None:
        if not callable(metric):
            raise TypeError(f"metric is a function of two people, not {metric!r}")
        self.metric = metric

    def distances(self, X: ArrayLike) -> Floats:
        """d[i, j] = d(x_i, x_j) as (k, k), zero where i = j.

        Raises:
            ValueError: for a distance outside [0, 1].
        """
        X = np.asarray(X)
        if hasattr(self.metric, "pairwise"):
            distance = np.array(self.metric.pairwise(X), dtype=float)
            if distance.shape != (len(X), len(X)):
                raise ValueError(f"pairwise(X) of {len(X)} people has shape {(len(X),) * 2}, not {distance.shape}")
        else:
            distance = np.zeros((len(X), len(X)))
            for i in range(len(X)):
                for j in range(len(X)):
                    if i != j:
                        distance[i, j] = self.metric(X[i], X[j])
        np.fill_diagonal(distance, 0.0)
        if not ((distance >= 0) & (distance <= 1)).all():
            i, j = np.argwhere(~((distance >= 0) & (distance <= 1)))[0]
            raise ValueError(f"an auditor finds people {i} and {j} {distance[i, j]} apart; distances lie in [0, 1]")
        return distance


class Panel:
    """A panel of m auditors that inspects a policy's acceptance probabilities on a batch.

    Auditor j sees an alpha-violation on the ordered pair (l, r) when pi(x_l) - pi(x_r) > d_j(x_l, x_r) + alpha. The
    panel objects, an (alpha, gamma)-violation, when at least a share gamma of the auditors see one on the same ordered
    pair. That is so exactly when the gap exceeds the ceil(gamma m)-th smallest of their distances by more than alpha.

    Args:
        auditors: m >= 1 of them.
        gamma: in (0, 1]; 1/m lets any auditor object, 1 asks for unanimity.
        alpha: what is tolerated over the distance, >= 0.

    Raises:
        ValueError: for values outside these ranges.
    """

    def __init__(self, auditors: Sequence[Auditor], gamma: float = 1.0, alpha: float = 0.0) -> None:
        auditors = tuple(auditors)
        if not auditors:
            raise ValueError("a panel needs at least one auditor")
        if not all(hasattr(auditor, "distances") for auditor in auditors):
            raise TypeError("auditors are Auditor objects; wrap a metric as Auditor(metric)")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma lies in (0, 1], not {gamma!r}")
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha is a finite number >= 0, not {alpha!r}")
        self.auditors, self.gamma, self.alpha = auditors, gamma, alpha

    @property
    def quorum(self) -> int:
        """How many auditors must agree on a pair: the smallest integer that is at least gamma m."""
        return max(1, math.ceil(self.gamma * len(self.auditors) - 1e-9))

    def limits(self, X: ArrayLike, *, slack: float = 0.0) -> Floats:
        """The largest gap pi(x_l) - pi(x_r) to which the panel does not object, for all ordered pairs.

        Args:
            X: (k, d) batch.
            slack: eps of the benchmark class: the limits of level (alpha - eps, gamma).

        Returns:
            (k, k); infinite on the diagonal.
        """
        distance = np.stack([auditor.distances(X) for auditor in self.auditors])
        limit: Floats = np.partition(distance, self.quorum - 1, axis=0)[self.quorum - 1] + (self.alpha - slack)
        np.fill_diagonal(limit, np.inf)
        return limit

    def violations(self, probabilities: ArrayLike, X: ArrayLike) -> NDArray[np.bool_]:
        """Which ordered pairs (l, r) violate, as (k, k) booleans.

        Args:
            probabilities: (k,) acceptance probabilities pi(x_i) of the deployed policy (not its draw).
            X: (k, d) the same people.

        Raises:
            ValueError: for probabilities outside [0, 1], or as many as there are no people.
        """
        return self._excess(probabilities, X) > ROUNDING

    def __call__(self, probabilities: ArrayLike, X: ArrayLike) -> tuple[int, int] | None:
        """The pair (l, r) that exceeds its limit most, the first of equals; None when nothing violates.

        Takes what `violations` takes. The paper lets the panel report any violating pair.
        """
        excess = self._excess(probabilities, X)
        if not excess.size:
            return None
        left, right = divmod(int(excess.argmax()), len(excess))
        return (left, right) if excess[left, right] > ROUNDING else None

    def _excess(self, probabilities: ArrayLike, X: ArrayLike) -> Floats:
        X, q = np.asarray(X), np.asarray(probabilities, dtype=float)
        if q.shape != (len(X),):
            raise ValueError(f"{len(X)} people need as many probabilities in one row, not an array {q.shape}")
        if not ((q >= -1e-9) & (q <= 1 + 1e-9)).all():
            raise ValueError(f"probabilities lie in [0, 1], not {q[~((q >= -1e-9) & (q <= 1 + 1e-9))][0]}")
        excess: Floats = q[:, None] - q[None] - self.limits(X)
        return excess


def best_fair_policy(
    decisions: ArrayLike, y: ArrayLike, left: ArrayLike, right: ArrayLike, limits: ArrayLike
) -> tuple[Floats, float]:
    """The mixture of rules with the fewest expected errors whose gaps stay within limits.

    min over pi in the simplex of sum_i P(h(x_i) != y_i) subject to pi(x_l) - pi(x_r) <= limit for every listed pair: a
    linear programme, solved by adding the constraints that its solution breaks until it breaks none.

    Args:
        decisions: (n, h), 0 or 1, of every rule on every person.
        y: (n,) labels 0 or 1.
        left, right: (p,) indices of people.
        limits: (p,).

    Returns:
        The mixture (h,), and its expected errors, a sum over people.

    Raises:
        ValueError: when no mixture stays within the limits.
    """
    decided, y = np.asarray(decisions, dtype=float), np.asarray(y, dtype=float)
    left, right = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
    limits = np.asarray(limits, dtype=float)
    cost = (1 - 2 * y) @ decided + y.sum()  # errors of every rule
    simplex = np.ones((1, decided.shape[1]))
    held = np.zeros(len(limits), bool)
    while True:
        rows = np.flatnonzero(held)
        gaps = decided[left[rows]] - decided[right[rows]]
        found = linprog(
            cost / max(len(y), 1),
            A_ub=gaps if len(rows) else None,
            b_ub=limits[rows] if len(rows) else None,
            A_eq=simplex,
            b_eq=[1.0],
            method="highs",
        )
        if not found.success or found.x is None:
            raise ValueError(f"no mixture of the rules stays within the limits: {found.message}")
        policy: Floats = np.clip(found.x, 0, None)
        policy /= policy.sum()
        q = decided @ policy
        excess = np.where(held, 0.0, q[left] - q[right] - limits)
        if not (excess > 1e-9).any():
            return policy, float(cost @ policy)
        held[np.argsort(-excess)[: min(100, int((excess > 1e-9).sum()))]] = True
