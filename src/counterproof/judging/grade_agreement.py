"""How closely graders agree: with an instructor, with peers, with themselves; tests and intervals by question.

All grades are points. The bootstrap draws whole clusters (questions), so that answers to one question count as
dependent; the paper's own test draws students within a question and looks at means only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from counterproof.errors import UserError

__all__ = [
    "AgreementReport",
    "Consistency",
    "compare_graders",
    "consistency",
    "grader_agreement",
    "mean_test",
    "quadratic_kappa",
]

Floats = NDArray[np.float64]
METRICS = ("bias", "mae", "rmse", "pearson", "spearman", "qwk")
BETTER = {"mae": "lower", "rmse": "lower", "pearson": "higher", "spearman": "higher", "qwk": "higher"}
BLOCK = 4_000_000  # bootstrap counts in memory at a time


def quadratic_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's kappa with quadratic weights; for numbers, Lin's concordance: the two are the same.

    1 less the mean squared difference over the one expected of independent graders with these grades. nan when both
    give everyone the same grade.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    expected = (x**2).mean() + (y**2).mean() - 2 * x.mean() * y.mean()
    return 1 - float(((x - y) ** 2).mean() / expected) if expected > 1e-12 else math.nan


def mean_test(
    grades: ArrayLike, truth: ArrayLike, *, rounds: int = 10_000, rng: int | np.random.Generator = 0
) -> float:
    """The paper's test within one question: do the means of two graders of the same students differ?

    Students are drawn with replacement; the two-sided p-value is twice the smaller share of rounds in which the mean
    difference is not above, or not below, 0 (at most 1). A large one is no sign of equality: see `AgreementReport`.

    Args:
        grades, truth: (n,) points of the same students.
        rounds: bootstrap rounds.
        rng: seed or generator.

    Raises:
        ValueError: grades of different number, or none.
    """
    x, y = np.asarray(grades, np.float64), np.asarray(truth, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"grades of shape {x.shape} and {y.shape}; expected one each of the same students")
    generator = np.random.default_rng(rng)
    d = x - y
    below = above = 0
    for size in _blocks(rounds, len(d)):
        counts = generator.multinomial(len(d), np.full(len(d), 1 / len(d)), size=size)
        means = counts @ d
        # A sum of differences that cancel is 0 but for rounding.
        slack = 1e-9 * max(1.0, float(np.abs(d).sum()))
        below += int((means <= slack).sum())
        above += int((means >= -slack).sum())
    return min(1.0, 2 * min(below, above) / rounds)


def _blocks(rounds: int, width: int) -> list[int]:
    size = max(1, BLOCK // max(1, width))
    return [min(size, rounds - at) for at in range(0, rounds, size)]


def _ranks(values: Floats, question: NDArray[np.int64]) -> Floats:
    """Ranks within each question as shares, centred: -1/2 to 1/2, ties in the middle."""
    found = np.zeros(len(values))
    for one in np.unique(question):
        own = question == one
        found[own] = (stats.rankdata(values[own]) - 0.5) / own.sum() - 0.5
    return found


def _levels(values: Floats, maximum: Floats) -> Floats:
    """Grades as categories: whole points, or tenths of the maximum where maxima differ or are no whole numbers."""
    whole = np.ptp(maximum) < 1e-9 and abs(maximum[0] - round(maximum[0])) < 1e-9
    # Half is rounded up, as a teacher would; not to even.
    found: Floats = np.floor(values + 0.5) if whole else np.floor(10 * values / maximum + 0.5)
    return found


def _moments(grades: Floats, truth: Floats, maximum: Floats, question: NDArray[np.int64]) -> Floats:
    """(n, 19): what the metrics are made of, one row an answer; they are functions of the column sums."""
    columns = [np.ones(len(grades)), grades - truth, np.abs(grades - truth), (grades - truth) ** 2]
    # Correlations over questions with different maxima are of shares of the maximum.
    pairs = [(grades / maximum, truth / maximum), (_ranks(grades, question), _ranks(truth, question))]
    pairs.append((_levels(grades, maximum), _levels(truth, maximum)))
    for x, y in pairs:
        columns += [x, y, x * x, y * y, x * y]
    return np.stack(columns, axis=1)


def _metrics(sums: Floats) -> Floats:
    """(..., 19) sums -> (..., 6): bias, MAE, RMSE, Pearson, within-question Spearman, QWK."""
    means = sums / sums[..., :1]

    def correlation(at: int) -> Floats:
        x, y, xx, yy, xy = (means[..., at + k] for k in range(5))
        vx, vy = xx - x * x, yy - y * y
        with np.errstate(all="ignore"):
            return np.where((vx > 1e-12) & (vy > 1e-12), (xy - x * y) / np.sqrt(np.abs(vx * vy)), np.nan)

    x, y, xx, yy, xy = (means[..., 14 + k] for k in range(5))
    expected = xx + yy - 2 * x * y
    with np.errstate(all="ignore"):
        kappa = np.where(expected > 1e-12, 1 - (xx + yy - 2 * xy) / expected, np.nan)
    rmse = np.sqrt(np.maximum(means[..., 3], 0))
    return np.stack([means[..., 1], means[..., 2], rmse, correlation(4), correlation(9), kappa], axis=-1)


def grader_agreement(
    grades: ArrayLike, truth: ArrayLike, *, question: Sequence[Any], max_points: ArrayLike | None = None
) -> dict[str, float]:
    """One grader against the truth, over all answers.

    ``bias`` (mean difference), ``mae`` and ``rmse`` in points; ``pearson`` of shares of the maximum; ``spearman``: the
    correlation of ranks within each question, over all answers (ranks as shares, centred, so that every question
    counts by its answers and one whose grades are all equal does no harm); ``qwk``: quadratic weighted kappa of grades
    rounded to whole points, or to tenths of the maximum where maxima differ. nan where nothing varies.

    Args:
        grades, truth: (n,) points.
        question: n keys.
        max_points: (n,), or one number; default: the largest grade there is.

    Raises:
        ValueError: shapes that do not fit, or a grade that is not finite.
    """
    x, y, maximum, group = _checked(grades, truth, question, max_points)
    values = _metrics(_moments(x, y, maximum, group).sum(axis=0))
    return dict(zip(METRICS, values.tolist(), strict=True))


def _checked(
    grades: ArrayLike, truth: ArrayLike, question: Sequence[Any], max_points: ArrayLike | None
) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    x, y = np.asarray(grades, np.float64), np.asarray(truth, np.float64)
    keys = list(question)
    if x.ndim != 1 or x.shape != y.shape or len(keys) != len(x) or not len(x):
        raise ValueError(f"grades {x.shape}, truth {y.shape} and {len(keys)} questions; expected n of each")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a grade is not finite; leave answers without a grade out")
    largest = max(float(x.max()), float(y.max()), 1e-9)
    maximum = np.broadcast_to(np.asarray(largest if max_points is None else max_points, np.float64), x.shape)
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return x, y, maximum.copy(), np.array([order[key] for key in keys])


@dataclass(frozen=True, kw_only=True)
class AgreementReport:
    """Graders against an instructor, on the answers that all of them graded.

    Attributes:
        truth: what the truth is called.
        answers, questions: how many were compared.
        left_out: answers that were not, by reason.
        graders: per grader its metrics (`grader_agreement`) and, per metric, the bootstrap interval of 95 %.
        against: per baseline, the first grader's improvement over it per metric, with its interval; above 0 is better.
        tests: per question and grader: n, the means, the paper's p-value (`mean_test`), whether it calls the grader not
            distinguishable from the instructor (p >= 0.05), and the p-value of the paired t tests for equivalence.
        margin: of equivalence, in points.
        equivalence: per grader the p-value that its mean lies further than `margin` from the instructor's, over all
            questions (bootstrap of questions). Below 0.05: equivalent. Neither test looks at single students: MAE does.
    """

    truth: str
    answers: int
    questions: int
    left_out: Mapping[str, int]
    graders: Mapping[str, Mapping[str, Any]]
    against: Mapping[str, Mapping[str, Any]]
    tests: Sequence[Mapping[str, Any]]
    margin: float
    equivalence: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; what is undefined is null."""
        return {
            "truth": self.truth,
            "answers": self.answers,
            "questions": self.questions,
            "left_out": dict(self.left_out),
            "graders": _jsonable(self.graders),
            "against": _jsonable(self.against),
            "tests": _jsonable(self.tests),
            "margin": self.margin,
            "equivalence": _jsonable(self.equivalence),
        }

    def text(self) -> str:
        """The report as plain text."""
        lines = [f"{self.answers} answers to {self.questions} questions, against {self.truth}"]
        lines += [f"  left out: {count} {why}" for why, count in self.left_out.items() if count]
        width = max(map(len, self.graders)) + 2
        lines.append(" " * width + "".join(f"{name:>10}" for name in METRICS) + f"{'TOST p':>10}{'p >= .05':>12}")
        for name, found in self.graders.items():
            own = [one for one in self.tests if one["grader"] == name]
            passed = sum(one["indistinguishable"] for one in own)
            values = "".join(f"{_shown(found[metric]):>10}" for metric in METRICS)
            lines.append(f"{name:{width}}{values}{_shown(self.equivalence[name]):>10}{f'{passed} of {len(own)}':>12}")
        for name, gains in self.against.items():
            shown = [
                f"{metric} {gain['gain']:+.3f} [{gain['interval'][0]:+.3f}, {gain['interval'][1]:+.3f}]"
                for metric, gain in gains.items()
                if math.isfinite(gain["gain"])
            ]
            lines.append(f"better than {name} by: " + ", ".join(shown))
        lines.append(
            f"p >= .05: questions whose means the paper's test cannot tell apart; TOST p < .05: means equal within "
            f"{self.margin:g} points. Neither says that single students are graded alike; see mae."
        )
        return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def compare_graders(
    graders: Mapping[str, ArrayLike],
    truth: ArrayLike,
    *,
    question: Sequence[Any],
    cluster: Sequence[Any] | None = None,
    max_points: ArrayLike | None = None,
    margin: float | None = None,
    rounds: int = 10_000,
    rng: int | np.random.Generator = 0,
    truth_name: str = "instructor_grade",
    ranks_only: Sequence[str] = (),
    left_out: Mapping[str, int] | None = None,
) -> AgreementReport:
    """The first grader and its baselines against the truth, on the same answers and the same bootstrap rounds.

    Args:
        graders: (n,) points each, the one in question first; nan where it gave none. Answers that any of them, or the
            truth, left without a grade are left out and counted.
        truth: (n,) points; nan where there is none.
        question: n keys.
        cluster: n keys of what the bootstrap draws; default: the questions. With one question, the students: the ranks
            within it are then those of all its answers in every round.
        max_points: (n,) or one number.
        margin: of equivalence, in points; default: a tenth of the mean maximum.
        rounds: bootstrap rounds.
        rng: seed or generator.
        truth_name: for the report.
        ranks_only: graders whose values are no points (such as lengths): only their correlations are reported.
        left_out: further counts for the report.

    Raises:
        UserError: fewer than 2 clusters, or no answer that all graded.
    """
    y = np.asarray(truth, np.float64)
    points = {name: np.asarray(values, np.float64) for name, values in graders.items()}
    missing = dict(left_out or {})
    held = np.isfinite(y)
    missing[f"without {truth_name}"] = missing.get(f"without {truth_name}", 0) + int((~held).sum())
    for name, values in points.items():
        if values.shape != y.shape:
            raise ValueError(f"{name} holds {values.shape} grades, the truth {y.shape}")
        lost = held & ~np.isfinite(values)
        if lost.any():
            missing[f"without a grade of {name}"] = int(lost.sum())
        held &= np.isfinite(values)
    keys = [key for key, own in zip(question, held, strict=True) if own]
    drawn_by = [key for key, own in zip(question if cluster is None else cluster, held, strict=True) if own]
    clusters = len(set(drawn_by))
    if clusters < 2:
        raise UserError(
            f"{len(keys)} answers in {clusters} clusters ({len(set(keys))} questions) have every grade that is "
            "compared; intervals need at least 2 (with one question, cluster by student; left out: "
            + "; ".join(f"{n} {w}" for w, n in missing.items())
            + ")"
        )
    full = None if max_points is None else np.broadcast_to(np.asarray(max_points, np.float64), y.shape)[held]
    y = y[held]
    points = {name: values[held] for name, values in points.items()}
    if full is None:
        largest = max([float(y.max())] + [float(v.max()) for n, v in points.items() if n not in ranks_only])
        full = np.full(y.shape, max(largest, 1e-9))
    generator = np.random.default_rng(rng)
    margin = 0.1 * float(full.mean()) if margin is None else margin
    group = _checked(y, y, keys, full)[3]
    places = _checked(y, y, drawn_by, full)[3]
    cluster_sums = {}
    for name, values in points.items():
        moments = _moments(values, y, full, group)
        sums = np.zeros((clusters, moments.shape[1]))
        np.add.at(sums, places, moments)
        cluster_sums[name] = sums
    blocks = []
    for size in _blocks(rounds, clusters):
        counts = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
        blocks.append({name: _metrics(counts @ sums) for name, sums in cluster_sums.items()})
    drawn = {name: np.concatenate([block[name] for block in blocks]) for name in cluster_sums}
    whole = {name: _metrics(sums.sum(axis=0)) for name, sums in cluster_sums.items()}
    for name in ranks_only:
        for at in (0, 1, 2, 5):
            if name in whole:
                whole[name][at] = drawn[name][:, at] = np.nan
    found = {
        name: {
            **dict(zip(METRICS, whole[name].tolist(), strict=True)),
            "intervals": {metric: _interval(drawn[name][:, at]) for at, metric in enumerate(METRICS)},
            "mean": float(points[name].mean()),
            "sd": float(points[name].std()),
        }
        for name in points
    }
    first = next(iter(points))
    against: dict[str, dict[str, Any]] = {}
    for name in points:
        if name == first:
            continue
        against[name] = {}
        for metric, better in BETTER.items():
            at, sign = METRICS.index(metric), 1 if better == "higher" else -1
            gain = sign * (whole[first][at] - whole[name][at])
            rounds_of_it = sign * (drawn[first][:, at] - drawn[name][:, at])
            against[name][metric] = {"gain": float(gain), "interval": _interval(rounds_of_it)}
    tests = []
    labels = list(dict.fromkeys(keys))
    for number, label in enumerate(labels):
        own = group == number
        for name, values in points.items():
            if name in ranks_only:
                continue
            p = mean_test(values[own], y[own], rounds=rounds, rng=generator)
            tests.append(
                {
                    "question": label,
                    "grader": name,
                    "students": int(own.sum()),
                    "mean": float(values[own].mean()),
                    "truth": float(y[own].mean()),
                    "mae": float(np.abs(values[own] - y[own]).mean()),
                    "p": p,
                    "indistinguishable": p >= 0.05,
                    "equivalence_p": _tost(values[own] - y[own], margin),
                }
            )
    equivalence = {
        name: math.nan
        if name in ranks_only
        else max(float((drawn[name][:, 0] >= margin).mean()), float((drawn[name][:, 0] <= -margin).mean()))
        for name in points
    }
    return AgreementReport(
        truth=truth_name,
        answers=len(y),
        questions=len(labels),
        left_out=missing,
        graders=found,
        against=against,
        tests=tests,
        margin=margin,
        equivalence=equivalence,
    )


def _interval(values: Floats) -> tuple[float, float]:
    """The middle 95 % of the rounds in which the metric was defined."""
    values = values[np.isfinite(values)]
    if not len(values):
        return (math.nan, math.nan)
    low, high = np.quantile(values, [0.025, 0.975])
    return (float(low), float(high))


def _tost(differences: Floats, margin: float) -> float:
    """Two one-sided paired t tests: the p-value that the mean difference lies outside the margin."""
    n = len(differences)
    if n < 2:
        return math.nan
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    if error < 1e-12:
        return 0.0 if abs(mean) < margin else 1.0
    return float(max(stats.t.sf((mean + margin) / error, n - 1), stats.t.cdf((mean - margin) / error, n - 1)))


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How alike repeated gradings of the same answers are.

    Attributes:
        answers: graded in every repeat; others are left out.
        repeats: how many gradings of each.
        exact: share of pairs of repeats with equal grades.
        sd: within answers, in points, pooled.
        icc: intraclass correlation of single gradings, one-way: the share of variance that lies between answers.
        qwk: quadratic weighted kappa, mean over pairs of repeats.
    """

    answers: int
    repeats: int
    exact: float
    sd: float
    icc: float
    qwk: float

    def as_json(self) -> dict[str, Any]:
        """As JSON values; what is undefined is null."""
        names = ("answers", "repeats", "exact", "sd", "icc", "qwk")
        return {name: _jsonable(getattr(self, name)) for name in names}


def consistency(grades: ArrayLike) -> Consistency:
    """Agreement of repeated gradings.

    Args:
        grades: (answers, repeats) points; nan where a repeat gave none.

    Raises:
        UserError: fewer than 2 repeats, or no answer that every repeat graded.
    """
    table = np.asarray(grades, np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise UserError(f"gradings of shape {table.shape}; consistency needs at least 2 repeats of each answer")
    table = table[np.isfinite(table).all(axis=1)]
    n, k = table.shape
    if not n:
        raise UserError("no answer was graded in every repeat; there is no consistency to report")
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    within = float(table.var(axis=1, ddof=1).mean())
    between = float(k * table.mean(axis=1).var(ddof=1)) if n > 1 else math.nan
    total = between + (k - 1) * within
    kappas = np.array([quadratic_kappa(table[:, i], table[:, j]) for i, j in pairs])
    return Consistency(
        answers=n,
        repeats=k,
        exact=float(np.mean([np.abs(table[:, i] - table[:, j]) < 1e-9 for i, j in pairs])),
        sd=math.sqrt(within),
        icc=(between - within) / total if total > 1e-12 else math.nan,
        qwk=float(kappas[np.isfinite(kappas)].mean()) if np.isfinite(kappas).any() else math.nan,
    )
