"""What a benchmark is worth: how well it tells models apart, and whether as people do, on bootstrap replicates.

The three statistics of "From Crowdsourced Data to High-Quality Benchmarks" (arXiv 2406.11939), and rank correlations.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

__all__ = ["agreement", "brier", "rank_correlations", "separability"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def separability(replicates: Floats, level: float = 0.95) -> float:
    """Share of the pairs of models whose intervals do not overlap.

    Args:
        replicates: (B, M) scores of M models in B bootstrap rounds, such as `BradleyTerry.bootstrap` returns.
        level: of the percentile intervals.

    Raises:
        ValueError: not (B, M) with M >= 2, or not finite.
    """
    return float(np.abs(_separated(replicates, level))[_pairs(replicates)].mean())


def agreement(replicates: Floats, reference: Floats, level: float = 0.95) -> float:
    """Agreement with confidence, -1 to 1: mean over pairs of +1 where both separate them the same way, -1 where both do
    and disagree, 0 where either does not.

    Args:
        replicates, reference: (B, M) and (B', M), the same models in the same order.
    """
    if np.shape(replicates)[1:] != np.shape(reference)[1:]:
        raise ValueError(f"{np.shape(replicates)} and {np.shape(reference)} are not of the same models")
    same = _separated(replicates, level) * _separated(reference, level)
    return float(same[_pairs(replicates)].mean())


def brier(replicates: Floats, reference: Floats) -> float:
    """Mean over pairs of the squared error of the predicted order: 0 is best, 0.25 a coin's.

    The prediction that i is above j is the share of replicates in which it is (ties half); the outcome is 1 if the
    reference's mean has i above j.
    """
    if np.shape(replicates)[1:] != np.shape(reference)[1:]:
        raise ValueError(f"{np.shape(replicates)} and {np.shape(reference)} are not of the same models")
    first, second = _pairs(replicates)
    mean = np.asarray(reference, dtype=float).mean(axis=0)
    above = np.zeros(len(first))
    for row in np.asarray(replicates, dtype=float):  # by replicates, since (B, pairs) may be large
        above += (np.sign(row[first] - row[second]) + 1) / 2
    truth = (np.sign(mean[first] - mean[second]) + 1) / 2
    return float(np.mean((above / len(replicates) - truth) ** 2))


def rank_correlations(replicates: Floats, reference: Floats) -> dict[str, float]:
    """Spearman's and Kendall's correlation of the mean scores; nan where either has no order at all."""
    a, b = np.mean(replicates, axis=0), np.mean(reference, axis=0)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"spearman": float("nan"), "kendall": float("nan")}
    return {"spearman": float(spearmanr(a, b).statistic), "kendall": float(kendalltau(a, b).statistic)}


def _separated(replicates: Floats, level: float) -> Floats:
    """(M, M): 1 where the row's interval lies above the column's, -1 below, 0 otherwise."""
    replicates = np.asarray(replicates, dtype=float)
    if replicates.ndim != 2 or replicates.shape[1] < 2 or not len(replicates):
        raise ValueError(
            f"replicates have the shape {replicates.shape}; expected (rounds, models), two models at least"
        )
    if not np.isfinite(replicates).all():
        raise ValueError("a replicate is not finite")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found: Floats = np.greater.outer(low, high).astype(float) - np.less.outer(high, low)
    return found


def _pairs(replicates: Floats) -> tuple[Ints, Ints]:
    return np.triu_indices(np.shape(replicates)[1], 1)
