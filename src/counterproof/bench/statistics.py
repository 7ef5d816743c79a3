"""Evidence from paired effects, valid under peeking after every seed.

The e-process is the scale-invariant Gaussian mixture for the t-test: the likelihood ratio of the effects after both
the standardised effect, drawn from N(0, 1/k), and the unknown scale, under the right Haar prior, are integrated out
(Lai 1976; Pérez-Ortiz, Lardy, de Heide & Grünwald 2024, arXiv 2208.07610; Wang & Ramdas 2024, arXiv 2310.03722).
With n effects of sum S and sum of squares V,

    E_n = sqrt(k / (n + k)) * (V / (V - S^2 / (n + k)))^(n / 2),

a test martingale for Gaussian effects of mean zero: P(sup_n E_n >= 1 / alpha) <= alpha. The values of the mean that it
never rejects form the confidence sequence.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterproof.bench.task import Better

__all__ = [
    "Assessment",
    "Effects",
    "VerdictName",
    "assess",
    "confidence_sequence",
    "e_bh",
    "e_value",
    "paired_effects",
    "seeds_needed",
    "t_interval",
]

PRECISION = 0.3  # k: the standardised effect is drawn from N(0, 1 / 0.3)
LEVEL = 0.95
VerdictName = Literal["holds", "absent", "reversed", "open"]
Effects = Sequence[float]


def e_value(effects: Effects, null: float = 0.0, precision: float = PRECISION) -> float:
    """Evidence against "the mean effect is `null`", valid whenever one looks.

    Args:
        effects: independent paired effects, in order; none or one carry no evidence (1.0).
        null: the mean under the hypothesis.
        precision: k, the inverse variance of the standardised effect under the alternative.

    Returns:
        The e-value, >= 0; its inverse bounds the chance of ever seeing so much evidence when the hypothesis is true.
        At most the largest float, which equal effects may reach.
    """
    x = np.asarray(effects, dtype=np.float64) - null
    n = len(x)
    if n < 2 or not np.any(x):
        return 1.0
    x, _ = _in_units(x)  # the statistic is scale-free
    total, squares = math.fsum(x), math.fsum(x * x)
    log_e = 0.5 * math.log(precision / (n + precision)) - 0.5 * n * math.log1p(
        -(total**2) / ((n + precision) * squares)
    )
    return math.exp(log_e) if log_e < 709 else sys.float_info.max


def confidence_sequence(effects: Effects, level: float = LEVEL, precision: float = PRECISION) -> tuple[float, float]:
    """The means that `e_value` does not reject at 1 / (1 - level); covers the true mean at all n at once.

    Returns:
        (low, high); infinite while the effects are too few to bound the mean (fewer than 4 at 95 %).
    """
    x, unit = _in_units(effects)
    n = len(x)
    if n < 2:
        return -math.inf, math.inf
    mean = math.fsum(x) / n
    spread = math.fsum((x - mean) ** 2)
    shrink = precision / (n + precision)
    log_bound = (2 / n) * (-math.log(1 - level) - 0.5 * math.log(shrink))
    if log_bound + math.log(shrink) >= 0:
        return -math.inf, math.inf
    bound = math.exp(log_bound)
    half = math.sqrt((bound - 1) * spread / (n * (1 - bound * shrink)))
    return unit * (mean - half), unit * (mean + half)


def _in_units(effects: ArrayLike) -> tuple[NDArray[np.float64], float]:
    """The effects in units of the largest, and that unit: squares stay in range whatever the metric's scale."""
    x = np.asarray(effects, dtype=np.float64)
    unit = float(np.abs(x).max(initial=0.0)) or 1.0
    return x / unit, unit


def t_interval(effects: Effects, level: float = LEVEL) -> tuple[float, float]:
    """The usual paired t interval of the mean: right for a number of seeds fixed beforehand, not under peeking."""
    x, unit = _in_units(effects)
    n = len(x)
    if n < 2:
        return -math.inf, math.inf
    from scipy.special import stdtrit  # a tenth of a second that listing papers need not wait for

    half = float(stdtrit(n - 1, 0.5 + level / 2)) * float(x.std(ddof=1)) / math.sqrt(n)
    return unit * (float(x.mean()) - half), unit * (float(x.mean()) + half)


def seeds_needed(effects: Effects, null: float = 0.0, level: float = LEVEL, most: int = 10_000) -> int | None:
    """How many seeds would settle the side of `null` if mean and spread stayed as they are; None if over `most`."""
    x, unit = _in_units(effects)
    if len(x) < 2:
        return None
    mean, variance = float(x.mean()) - null / unit, float(x.var(ddof=1))
    if mean == 0:
        return None
    n = np.arange(len(x) + 1, most + 1)
    squares = (n - 1) * (variance / mean**2) + n  # in units of the mean
    log_e = 0.5 * np.log(PRECISION / (n + PRECISION)) - 0.5 * n * np.log1p(-(n**2) / ((n + PRECISION) * squares))
    settled = np.flatnonzero(log_e >= -math.log(1 - level))
    return int(n[settled[0]]) if len(settled) else None


def e_bh(e_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of many e-values are discoveries at false discovery rate `alpha`, whatever their dependence.

    The e-BH procedure (Wang & Ramdas 2022, arXiv 2009.02824): with K values, the k largest for the greatest k such
    that the k-th largest is at least K / (alpha k).
    """
    count = len(e_values)
    order = sorted(range(count), key=lambda i: -e_values[i])
    kept = max((rank for rank, i in enumerate(order, 1) if e_values[i] * alpha * rank >= count), default=0)
    found = set(order[:kept])
    return [i in found for i in range(count)]


def paired_effects(
    pairs: Sequence[tuple[float | None, float | None]], better: Better, effect: Literal["difference", "ratio"]
) -> list[float]:
    """Improvements of the method over the baseline, seed by seed: positive is better, logarithms for a ratio.

    A trial that failed (None) counts against its arm: its pair takes the largest absolute effect seen among the
    finished pairs, in favour of the other arm; two failures on one seed are a tie.

    Raises:
        ValueError: a ratio of values that are not both positive.
    """
    sign = 1.0 if better == "higher" else -1.0
    finished: dict[int, float] = {}
    for index, (baseline, method) in enumerate(pairs):
        if baseline is None or method is None:
            continue
        if effect == "ratio":
            if baseline <= 0 or method <= 0:
                raise ValueError(f"a ratio needs positive values, not {method} over {baseline} (pair {index})")
            finished[index] = sign * (math.log(method) - math.log(baseline))
        else:
            finished[index] = sign * (method - baseline)
    if not finished:
        return []
    worst = max(abs(value) for value in finished.values())
    return [
        finished.get(index, worst * ((method is not None) - (baseline is not None)))
        for index, (baseline, method) in enumerate(pairs)
    ]


@dataclass(frozen=True)
class Assessment:
    """What the pairs of a comparison say.

    Effects and intervals are in the reader's terms: method minus baseline, or method over baseline (geometric mean).

    Attributes:
        verdict: ``holds``, ``absent``, ``reversed`` or ``open``.
        effect: mean paired effect; None before the first finished pair.
        interval: the confidence sequence at `level`.
        e_value: evidence for the verdict: against the smallest effect that matters, or against none when reversed.
        seeds: pairs assessed, failed ones included.
        usual_interval: the t interval.
        wins: seeds on which the method was better.
        correlation: between the arms over finished pairs; None below three pairs or without spread.
        leave_one_out: range of the mean effect when each pair in turn is left out; None below two pairs.
        failed: failed trials of (baseline, method).
        finished_only: effect over the pairs in which both finished, when a trial failed.
        needed: seeds it would take at the observed mean and spread, when open.
    """

    verdict: VerdictName
    effect: float | None
    interval: tuple[float, float]
    level: float
    e_value: float
    seeds: int
    usual_interval: tuple[float, float]
    wins: int
    correlation: float | None
    leave_one_out: tuple[float, float] | None
    failed: tuple[int, int]
    finished_only: float | None
    needed: int | None


def assess(
    pairs: Sequence[tuple[float | None, float | None]],
    *,
    better: Better,
    effect: Literal["difference", "ratio"],
    smallest: float | None = None,
    level: float = LEVEL,
) -> Assessment:
    """The verdict on (baseline, method) values of the seeds so far; None stands for a failed trial.

    ``holds``: the confidence sequence lies above the smallest effect that matters (above no effect when none is set).
    ``reversed``: it lies below no effect. ``absent``: it lies below the smallest effect that matters. ``open``: else.

    Args:
        pairs: per seed, in order.
        better: the metric's direction.
        effect: ``"difference"`` or ``"ratio"``.
        smallest: as in `Claim`.
        level: of the confidence sequence; verdicts need an e-value of at least 1 / (1 - level).

    Raises:
        ValueError: a ratio of values that are not positive.
    """
    effects = paired_effects(pairs, better, effect)
    failed = (sum(b is None for b, _ in pairs), sum(m is None for _, m in pairs))
    if not effects:
        unbounded = (-math.inf, math.inf) if effect == "difference" else (0.0, math.inf)
        return Assessment("open", None, unbounded, level, 1.0, len(pairs), unbounded, 0, None, None, failed, None, None)
    matters = 0.0
    if smallest is not None:
        matters = smallest if effect == "difference" else abs(math.log(smallest))
    low, high = confidence_sequence(effects, level)
    verdict: VerdictName
    if low > matters:
        verdict = "holds"
    elif high < 0:
        verdict = "reversed"
    elif high < matters:
        verdict = "absent"
    else:
        verdict = "open"
    needed = None
    if verdict == "open":
        boundaries = [matters] if matters == 0 or np.mean(effects) > 0 else [0.0, matters]
        candidates = [n for null in boundaries if (n := seeds_needed(effects, null, level)) is not None]
        needed = min(candidates, default=None)

    higher = better == "higher"

    def shown(value: float) -> float:
        oriented = value if higher else -value
        if effect == "difference":
            return oriented
        with np.errstate(over="ignore"):  # an interval may be wider than a float
            return float(np.exp(oriented))

    def shown_interval(bounds: tuple[float, float]) -> tuple[float, float]:
        ends = [shown(bounds[0]), shown(bounds[1])]
        return (ends[0], ends[1]) if higher else (ends[1], ends[0])

    finished = [(b, m) for b, m in pairs if b is not None and m is not None]
    count, total = len(effects), math.fsum(effects)
    correlation = None
    if len(finished) >= 3:
        columns = np.array(finished).T
        columns /= np.maximum(np.abs(columns).max(axis=1, keepdims=True), np.finfo(float).tiny)
        if all(np.ptp(column) > 0 for column in columns):
            correlation = float(np.corrcoef(columns)[0, 1])
    left_out = [(total - value) / (count - 1) for value in effects] if count > 1 else None
    return Assessment(
        verdict=verdict,
        effect=shown(total / count),
        interval=shown_interval((low, high)),
        level=level,
        e_value=e_value(effects, 0.0 if verdict == "reversed" else matters),
        seeds=len(pairs),
        usual_interval=shown_interval(t_interval(effects, level)),
        wins=sum(value > 0 for value in effects),
        correlation=correlation,
        leave_one_out=shown_interval((min(left_out), max(left_out))) if left_out else None,
        failed=failed,
        finished_only=shown(float(np.mean(paired_effects(finished, better, effect)))) if any(failed) else None,
        needed=needed,
    )
