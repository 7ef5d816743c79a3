"""Shares of choices, and how they change with who can see: exact intervals, bounds for missing answers, permutations.

Counts are arrays (..., B, 2, 2): leading axes of independent studies, B blocks (prompt, order, case, temperature), then
whether the principal sees the explanation (0 no, 1 yes), then whether the customer does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtr, ndtri

__all__ = [
    "CONTRASTS",
    "InformationEffects",
    "LogisticFit",
    "fit_logistic",
    "information_effects",
    "permutation_test",
    "permutation_test_of_values",
    "wilson_interval",
]

Floats = NDArray[np.float64]
By = Literal["principal", "customer", "interaction"]
Method = Literal["wilson", "wald"]

CONTRASTS: Mapping[str, Floats] = MappingProxyType(
    {
        "principal": np.array([[-0.5, -0.5], [0.5, 0.5]]),
        "customer": np.array([[-0.5, 0.5], [-0.5, 0.5]]),
        "interaction": np.array([[1.0, -1.0], [-1.0, 1.0]]),
    }
)
"""Weights of a block's four shares, [principal sees, customer sees]: D_P, D_U and I of the brief."""


def wilson_interval(successes: ArrayLike, n: ArrayLike, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a share.

    Args:
        successes, n: counts of any one shape.
        level: confidence.

    Returns:
        Lower and upper limits; NaN where n is 0.
    """
    _check_level(level)
    successes, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    if np.any(successes < 0) or np.any(successes > n):
        raise ValueError("successes lie between 0 and n")
    return _wilson(successes, n, ndtri((1 + level) / 2))


def _wilson(successes: Floats, n: Floats, z: ArrayLike) -> tuple[Floats, Floats]:
    with np.errstate(invalid="ignore", divide="ignore"):
        p, squared = successes / n, np.square(z)
        middle = (p + squared / (2 * n)) / (1 + squared / n)
        half = np.asarray(z) / (1 + squared / n) * np.sqrt(p * (1 - p) / n + squared / (4 * n**2))
        low, high = middle - half, middle + half
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low, high = np.where(successes == 0, 0.0, low), np.where(successes == n, 1.0, high)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; expected a confidence between 0 and 1, such as 0.95")


@dataclass(frozen=True, eq=False)
class InformationEffects:
    """Effects of who sees the explanation on the share of a choice; arrays of the counts' leading shape.

    Attributes:
        estimate: from the valid answers alone; NaN when some cell has none.
        se: its standard error, from the cells' binomial variances.
        low, high: interval of `estimate`.
        all_zero, all_one: the estimate with every missing answer counted as 0, and as 1.
        bound_low, bound_high: the least and the greatest estimate that some reading of the missing answers gives; it
            lies further out than `all_zero` and `all_one`, since what lowers one condition may raise the other.
        safe_low, safe_high: interval that covers the effect of the full answers at the level whatever the missing ones
            would have been; the same as `low`, `high` when none is missing.
    """

    estimate: Floats
    se: Floats
    low: Floats
    high: Floats
    all_zero: Floats
    all_one: Floats
    bound_low: Floats
    bound_high: Floats
    safe_low: Floats
    safe_high: Floats


def information_effects(
    chosen: ArrayLike,
    valid: ArrayLike,
    missing: ArrayLike = 0,
    *,
    by: By = "principal",
    level: float = 0.95,
    method: Method = "wilson",
) -> InformationEffects:
    """The difference that being seen makes, averaged over blocks.

    Args:
        chosen: (..., B, 2, 2), answers that made the choice.
        valid: of the same shape, answers that made this choice or the other one.
        missing: the same or 0, answers that made neither.
        by: ``"principal"``: D_P, share when the principal sees less share when it does not, averaged over whether the
            customer sees; ``"customer"``: D_U; ``"interaction"``: [p(P, U) - p(P, not U)] - [p(not P, U) - p(not P, not
            U)].
        level: of the intervals.
        method: ``"wilson"`` combines the cells' Wilson limits by the square-and-add rule (Newcombe, Statistics in
            Medicine 17, 1998; Zou and Donner, same journal 27, 2008), which has a width even where all cells are 0 or
            1; ``"wald"`` is estimate -+ z s.e.

    The interval that is safe against missing answers widens the bounds as Imbens and Manski (Econometrica 72, 2004) do.

    Raises:
        ValueError: arrays that do not fit, more chosen than valid, negative counts, or an unknown option.
    """
    chosen, valid, missing = np.broadcast_arrays(*(np.asarray(part, float) for part in (chosen, valid, missing)))
    if valid.ndim < 3 or valid.shape[-2:] != (2, 2) or not valid.shape[-3]:
        raise ValueError(f"counts have the shape (..., blocks, 2, 2), not {valid.shape}")
    if np.any(chosen < 0) or np.any(chosen > valid) or np.any(missing < 0):
        raise ValueError("counts are not negative, and no more answers make a choice than are valid")
    if by not in CONTRASTS:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(CONTRASTS)}")
    if method not in ("wilson", "wald"):
        raise ValueError(f"method is {method!r}; expected 'wilson' or 'wald'")
    _check_level(level)
    weights = CONTRASTS[by] / valid.shape[-3]
    z = ndtri((1 + level) / 2)

    def contrast(successes: Floats, n: Floats) -> tuple[Floats, Floats]:
        with np.errstate(invalid="ignore", divide="ignore"):
            p = successes / n
            return _over(weights * p), np.sqrt(_over(weights**2 * p * (1 - p) / n))

    def margins(successes: Floats, n: Floats, se: Floats, z: ArrayLike) -> tuple[Floats, Floats]:
        """How far the interval reaches below and above."""
        if method == "wald":
            return np.asarray(z) * se, np.asarray(z) * se
        with np.errstate(invalid="ignore", divide="ignore"):
            p = successes / n
            low, high = _wilson(successes, n, np.asarray(z)[..., None, None, None])
            below = np.where(weights > 0, p - low, high - p)
            above = np.where(weights > 0, high - p, p - low)
            return np.sqrt(_over((weights * below) ** 2)), np.sqrt(_over((weights * above) ** 2))

    estimate, se = contrast(chosen, valid)
    below, above = margins(chosen, valid, se, z)
    asked = valid + missing
    least = chosen + np.where(weights > 0, 0.0, missing)
    most = chosen + np.where(weights > 0, missing, 0.0)
    bound_low, se_low = contrast(least, asked)
    bound_high, se_high = contrast(most, asked)
    widening = _imbens_manski(bound_high - bound_low, np.maximum(se_low, se_high), level)
    return InformationEffects(
        estimate=estimate,
        se=se,
        low=estimate - below,
        high=estimate + above,
        all_zero=contrast(chosen, asked)[0],
        all_one=contrast(chosen + missing, asked)[0],
        bound_low=bound_low,
        bound_high=bound_high,
        safe_low=bound_low - margins(least, asked, se_low, widening)[0],
        safe_high=bound_high + margins(most, asked, se_high, widening)[1],
    )


def _over(terms: Floats) -> Floats:
    total: Floats = terms.sum((-3, -2, -1))
    return total


def _imbens_manski(width: Floats, se: Floats, level: float) -> Floats:
    """c with ndtr(c + width / se) - ndtr(-c) = level: from two-sided, at no width, down to one-sided."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(width > 0, width / se, 0.0)
    low = np.full(np.shape(ratio), ndtri(level))
    high = np.full(np.shape(ratio), ndtri((1 + level) / 2))
    for _ in range(60):
        middle = (low + high) / 2
        enough = ndtr(middle + ratio) - ndtr(-middle) >= level
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(width > 0, high, ndtri((1 + level) / 2))


# tests


def permutation_test(
    chosen: ArrayLike,
    valid: ArrayLike,
    *,
    by: By = "principal",
    draws: int = 9999,
    rng: int | np.random.Generator | None = None,
) -> float:
    """p-value of no effect: the label is permuted among the answers of a stratum, and the absolute effect compared.

    Strata are block x whether the other party sees, for ``"principal"`` and ``"customer"``; for ``"interaction"`` all
    four labels are permuted within a block, so what is tested is that information has no effect of any kind. Given a
    stratum's margins, permuted counts are hypergeometric, so they are drawn directly.

    Args:
        chosen, valid: (B, 2, 2) counts.
        by: see `information_effects`.
        draws: permutations; the p-value is at least ``1 / (1 + draws)``.
        rng: of the permutations.

    Returns:
        NaN when some cell has no valid answer.
    """
    chosen, valid = np.asarray(chosen), np.asarray(valid)
    if valid.ndim != 3 or valid.shape[1:] != (2, 2) or chosen.shape != valid.shape or not len(valid):
        raise ValueError(f"counts have the shape (blocks, 2, 2), not {chosen.shape} and {valid.shape}")
    if by not in CONTRASTS:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(CONTRASTS)}")
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected at least 1")
    if not np.all(valid > 0):
        return float("nan")
    rng = np.random.default_rng(rng)
    chosen, valid = chosen.astype(np.int64), valid.astype(np.int64)
    if by == "interaction":
        weights = CONTRASTS[by] / len(valid)
        observed = float((weights * chosen / valid).sum())
        drawn = np.zeros(draws)
        for block, sizes in zip(chosen, valid, strict=True):
            counts = rng.multivariate_hypergeometric(sizes.ravel(), int(block.sum()), size=draws, method="marginals")
            drawn += counts @ (weights.ravel() / sizes.ravel())
    else:
        axis = 1 if by == "principal" else 2
        seen, unseen = valid.take(1, axis).ravel(), valid.take(0, axis).ravel()
        total = chosen.sum(axis).ravel()
        observed = float((chosen.take(1, axis).ravel() / seen - chosen.take(0, axis).ravel() / unseen).mean())
        counts = rng.hypergeometric(total, seen + unseen - total, seen, size=(draws, len(total)))
        drawn = (counts / seen - (total - counts) / unseen).mean(1)
    return _p_value(observed, drawn)


def permutation_test_of_values(
    values: ArrayLike,
    seen: ArrayLike,
    stratum: ArrayLike,
    *,
    draws: int = 9999,
    rng: int | np.random.Generator | None = None,
) -> float:
    """The same for answers that are numbers, such as probabilities: mean over strata of the difference of means.

    Args:
        values: (n,) numbers.
        seen: (n,) bool, the label that is permuted.
        stratum: (n,) labels of the strata.

    Returns:
        NaN when some stratum lacks one of the two labels. Few strata of few answers cannot give a small p-value.
    """
    values, seen, stratum = np.asarray(values, float), np.asarray(seen, bool), np.asarray(stratum)
    rng = np.random.default_rng(rng)
    observed, drawn = 0.0, np.zeros(draws)
    groups = np.unique(stratum)
    for group in groups:
        own, label = values[stratum == group], seen[stratum == group]
        if label.all() or not label.any():
            return float("nan")
        weights = np.where(label, 1 / label.sum(), -1 / (~label).sum()) / len(groups)
        observed += float(weights @ own)
        drawn += rng.permuted(np.broadcast_to(own, (draws, len(own))), axis=1) @ weights
    return _p_value(observed, drawn)


def _p_value(observed: float, drawn: Floats) -> float:
    as_far = np.abs(drawn) >= abs(observed) - 1e-12
    return float((1 + as_far.sum()) / (1 + len(drawn)))


# logistic regression


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A logistic regression by maximum likelihood.

    Attributes:
        coefficients: (k,), log odds.
        covariance: (k, k), of the coefficients: the inverse information, or with clusters the sandwich.
        converged: False when the likelihood has no maximum, as when a column separates the outcomes; then the
            coefficients are NaN.
    """

    coefficients: NDArray[np.floating]
    covariance: NDArray[np.floating]
    converged: bool

    @property
    def se(self) -> NDArray[np.floating]:
        """(k,): standard errors."""
        return np.sqrt(np.diag(self.covariance))


def fit_logistic(X: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None) -> LogisticFit:
    """Fit ``P(y = 1) = expit(X b)`` by Newton's method.

    Args:
        X: (n, k) columns, the intercept among them.
        y: (n,) outcomes in [0, 1].
        clusters: (n,) labels; standard errors then allow for any dependence inside a cluster (sandwich with the factor
            G / (G - 1) (n - 1) / (n - k), as is usual for linear models, for G clusters).

    Raises:
        ValueError: arrays that do not fit, columns that depend on one another, fewer than two clusters.
    """
    X, y = np.asarray(X, float), np.asarray(y, float)
    if X.ndim != 2 or y.shape != (len(X),) or not X.size:
        raise ValueError(f"X is (n, k) and y (n,), not {X.shape} and {y.shape}")
    if not (np.isfinite(X).all() and np.all((y >= 0) & (y <= 1))):
        raise ValueError("X is finite, y lies in [0, 1]")
    n, k = X.shape
    if np.linalg.matrix_rank(X) < k:
        raise ValueError("columns of X depend on one another; leave out one of them")
    b, converged = np.zeros(k), False
    for _ in range(50):
        p = expit(X @ b)
        information = X.T @ (X * (p * (1 - p))[:, None])
        try:
            step = np.linalg.solve(information, X.T @ (y - p))
        except np.linalg.LinAlgError:
            break
        # Far out the likelihood is flat; a step that leaves the region of its curvature is cut.
        b = b + step / max(1.0, np.abs(step).max() / 5)
        if np.abs(X @ b).max() > 30:
            break
        if np.abs(step).max() < 1e-10:
            converged = True
            break
    if not converged:
        return LogisticFit(np.full(k, np.nan), np.full((k, k), np.nan), False)
    p = expit(X @ b)
    covariance = np.linalg.inv(X.T @ (X * (p * (1 - p))[:, None]))
    if clusters is not None:
        labels, at = np.unique(np.asarray(clusters), return_inverse=True)
        groups = len(labels)
        if groups < 2 or at.shape != (n,):
            raise ValueError(f"clusters are (n,) labels of two clusters or more, not {groups} of shape {at.shape}")
        scores = np.zeros((groups, k))
        np.add.at(scores, at, X * (y - p)[:, None])
        covariance = covariance @ scores.T @ scores @ covariance * groups / (groups - 1) * (n - 1) / (n - k)
    return LogisticFit(b, covariance, True)
