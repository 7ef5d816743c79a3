"""From one-sided labels and reported pairs to a contextual combinatorial semi-bandit.

A round's people and the pair that a panel reports become items, of which a rule chooses one coordinate each; its
Lagrangian loss is linear in the choice, and the losses of the chosen coordinates are all that is seen.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "checked_pair",
    "chosen_coordinates",
    "estimate_losses",
    "lagrangian_loss",
    "rule_decisions",
    "semi_bandit_losses",
    "shifted_loss",
]

Floats = NDArray[np.float64]
Pair = tuple[int, int]
Form = Literal["one-sided", "semi-bandit"]


def shifted_loss(decisions: ArrayLike, y: ArrayLike) -> Floats:
    """The loss that a rejection reveals by itself: 1/2 for rejecting, 1 - y for accepting (step 1).

    It is (1[decision != y] - y + 1) / 2, so differences between decisions are half of those in 0-1 loss.

    Args:
        decisions: 0 or 1, any shape.
        y: labels 0 or 1 of that shape; not read where the decision is 0.
    """
    accepted = np.asarray(decisions) == 1
    return np.where(accepted, 1.0 - np.asarray(y, dtype=float), 0.5)


def lagrangian_loss(probabilities: ArrayLike, y: ArrayLike, violation: Pair | None, C: float) -> float:
    """L(pi) = sum_i P(h(x_i) != y_i) + C [pi(x_l) - pi(x_r)], the second term only with a violation (step 2).

    Args:
        probabilities: (k,) acceptance probabilities pi(x_i).
        y: (k,) labels 0 or 1.
        violation: the reported ordered pair (l, r), or None.
        C: weight of fairness, >= 0.
    """
    q, y = np.asarray(probabilities, dtype=float), np.asarray(y, dtype=float)
    loss = float((q + y - 2 * q * y).sum())
    if violation is not None:
        left, right = checked_pair(violation, len(q))
        loss += C * float(q[left] - q[right])
    return loss


def semi_bandit_losses(y: ArrayLike, violation: Pair | None, C: float) -> Floats:
    """The loss vector of the contextual combinatorial semi-bandit (step 3).

    Items are the k people and two copies l*, r* of the reported pair; item e has the coordinates (e, 0), (e, 1). Then
    for every h, <losses, a_h> = L(h) / 2 + a term that no policy changes.

    Args:
        y: (k,) labels 0 or 1.
        violation: the reported ordered pair, or None: both copies cost nothing.
        C: weight of fairness; C/2 here, the scale of `shifted_loss`.

    Returns:
        (k + 2, 2).
    """
    y = np.asarray(y, dtype=float)
    losses = np.zeros((len(y) + 2, 2))
    losses[:-2, 0], losses[:-2, 1] = 0.5, 1 - y
    if violation is not None:
        checked_pair(violation, len(y))
        losses[-2, 1] = losses[-1, 0] = C / 2
    return losses


def chosen_coordinates(decisions: ArrayLike, violation: Pair | None) -> NDArray[np.bool_]:
    """The action a_h of a rule: for each of the k + 2 items, the coordinate of its decision (step 3).

    Args:
        decisions: (k,) of one rule, or (k, h) of h rules; 0 or 1.
        violation: the reported ordered pair; without one the copies take the first person's decision and cost nothing.

    Returns:
        (k + 2, 2) or (h, k + 2, 2).
    """
    decided = np.asarray(decisions) == 1
    left, right = (0, 0) if violation is None else checked_pair(violation, len(decided))
    items = np.concatenate([decided, decided[[left, right]]])
    action: NDArray[np.bool_] = np.stack([~items, items], -1)
    return action if items.ndim == 1 else action.transpose(1, 0, 2)


def estimate_losses(
    decisions: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    violation: Pair | None,
    C: float,
    *,
    form: Form = "one-sided",
) -> Floats:
    """An estimate of the loss vector from what the draw has shown, unbiased for differences between rules.

    Args:
        decisions: (k,) 0 or 1, of the rule that was drawn.
        labels: (k,); only those of accepted people are read.
        weights: (k,) importance of the decision taken: one over its probability, or an estimate of that. Those of
            rejections are not read in the one-sided form.
        violation, C: as in `semi_bandit_losses`; the pair's losses are known, not estimated.
        form: ``"one-sided"``: accepting costs (1/2 - y) weight more than rejecting, and rejecting nothing.
            ``"semi-bandit"``: every coordinate on its own, also unbiased for the vector itself.

    Returns:
        (k + 2, 2).
    """
    accepted = np.asarray(decisions) == 1
    labels, weights = np.asarray(labels, dtype=float), np.asarray(weights, dtype=float)
    losses = semi_bandit_losses(np.zeros(len(accepted)), violation, C)
    losses[:-2] = 0.0
    seen = np.flatnonzero(accepted)
    if form == "one-sided":
        losses[seen, 1] = (0.5 - labels[seen]) * weights[seen]
    elif form == "semi-bandit":
        losses[seen, 1] = (1 - labels[seen]) * weights[seen]
        rejected = np.flatnonzero(~accepted)
        losses[rejected, 0] = 0.5 * weights[rejected]
    else:
        raise ValueError(f"form is 'one-sided' or 'semi-bandit', not {form!r}")
    return losses


def checked_pair(violation: Pair, people: int) -> Pair:
    """A reported pair (l, r) as two integers.

    Raises:
        ValueError: unless they are two different ones in [0, people).
    """
    try:
        left, right = (int(index) for index in violation)
    except (TypeError, ValueError):
        raise ValueError(f"a violation is an ordered pair (l, r) of two people, or None, not {violation!r}") from None
    if not (0 <= left < people and 0 <= right < people and left != right):
        raise ValueError(f"a violation names two different people out of 0 to {people - 1}, not {violation!r}")
    return left, right


def rule_decisions(hypotheses: Any, X: Any) -> NDArray[np.bool_]:
    """Decisions of all rules of a finite class.

    Args:
        hypotheses: a function that takes X to (n, h), or a sequence of functions or fitted classifiers.
        X: (n, d).

    Returns:
        (n, h) booleans.

    Raises:
        ValueError: for an empty class, another shape, or a decision that is not 0 or 1.
    """
    if callable(hypotheses):
        decided = np.asarray(hypotheses(X))
    else:
        each = [np.asarray(rule.predict(X) if hasattr(rule, "predict") else rule(X)) for rule in hypotheses]
        if not each:
            raise ValueError("hypotheses is empty; give at least one rule")
        decided = np.stack(each, 1)
    if decided.ndim != 2 or len(decided) != len(X):
        raise ValueError(f"hypotheses decide {len(X)} rows as an array ({len(X)}, rules), not {decided.shape}")
    if not decided.shape[1]:
        raise ValueError("hypotheses is empty; give at least one rule")
    if decided.dtype != np.bool_:
        if not np.isin(decided, (0, 1)).all():
            raise ValueError(f"a rule decides 0 or 1, not {decided[~np.isin(decided, (0, 1))][0]!r}")
        decided = decided == 1
    return decided
