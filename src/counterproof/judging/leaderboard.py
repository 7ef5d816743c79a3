"""A leaderboard out of battles: ratings with intervals, what it is worth, as a table, a CSV file and a picture."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import UserError, extra
from counterproof.files import replacing
from counterproof.judging.battles import Battles
from counterproof.judging.bradley_terry import BradleyTerry, Unit
from counterproof.judging.reliability import agreement, brier, rank_correlations, separability

__all__ = ["Leaderboard", "rank_models"]

Floats = NDArray[np.float64]
UNITS = {"elo": "Elo", "winrate": "win rate against the anchor, %", "logit": "log-odds"}


@dataclass(frozen=True)
class Leaderboard:
    """What `rank_models` finds.

    Attributes:
        rows: see `BradleyTerry.leaderboard`.
        ratings: the fitted model.
        statistics: separability of the largest component; with a reference, over the models both know: agreement,
            brier, spearman, kendall, reference_separability, models.
        notes: what a reader has to know: components, unbounded ratings, verdicts that say nothing.
        scale, level, unit: of ratings, intervals and resampling.
        style: log-odds per standard deviation of each covariate.
    """

    rows: list[dict[str, Any]]
    ratings: BradleyTerry
    statistics: Mapping[str, float]
    notes: tuple[str, ...]
    scale: str
    level: float
    unit: str
    style: Mapping[str, float]

    def write_csv(self, path: str | Path) -> None:
        """The rows, with a header."""
        with replacing(Path(path)) as stream:
            writer = csv.DictWriter(stream, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def write_probabilities(self, path: str | Path) -> None:
        """The chance of the row's model against the column's, at equal style; empty between components."""
        chances = self.ratings.win_probability()
        order = [self.ratings.models_.index(row["model"]) for row in self.rows]
        with replacing(Path(path)) as stream:
            writer = csv.writer(stream)
            writer.writerow(["model", *(self.ratings.models_[place] for place in order)])
            for one in order:
                cells = [f"{chances[one, other]:.6f}" if np.isfinite(chances[one, other]) else "" for other in order]
                writer.writerow([self.ratings.models_[one], *cells])

    def plot(self, path: str | Path) -> None:
        """Ratings with their intervals, best on top: PNG, SVG or PDF by the name's ending.

        Raises:
            UserError: an ending that is none of these, or a place that cannot be written.
        """
        with extra("judging"):
            from matplotlib.figure import Figure

        path = Path(path)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UserError(f"{path}: a plot is a .png, .svg or .pdf file")
        rows = [row for row in self.rows if np.isfinite(row["rating"])]
        figure = Figure(figsize=(7, 1.2 + 0.26 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        height = np.arange(len(rows))[::-1]
        rating, low, high = (np.array([row[name] for row in rows]) for name in ("rating", "low", "high"))
        axes.errorbar(rating, height, xerr=[rating - low, high - rating], fmt="o", color="black", ms=4, capsize=2, lw=1)
        axes.set_yticks(height, [row["model"] + (" *" if row["flag"] else "") for row in rows])
        for place in range(1, len(rows)):
            if rows[place]["component"] != rows[place - 1]["component"]:
                axes.axhline(height[place] + 0.5, color="0.6", lw=0.8, ls="--")
        flagged = "; * held by a weak prior" if any(row["flag"] for row in rows) else ""
        axes.set_xlabel(f"{UNITS[self.scale]}, {self.level:.0%} intervals{flagged}")
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        try:
            figure.savefig(path, dpi=150)
        except OSError as problem:
            raise UserError(f"cannot write {path}: {problem.strerror or problem}; name another file") from None


def rank_models(
    battles: Battles,
    *,
    reference: Battles | None = None,
    ties: Literal["half", "drop"] = "half",
    style: bool = False,
    l2: float = 0.0,
    rounds: int = 1000,
    unit: Unit | None = None,
    level: float = 0.95,
    scale: Literal["elo", "winrate", "logit"] = "elo",
    anchor: str | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Rate models, and say how well they are told apart, and how a reference ranks them.

    Args:
        battles: from `read_battles`.
        reference: a human ranking's battles; the paper's three statistics compare with it over the models of both.
        ties, style, l2: see `BradleyTerry`.
        rounds: of the bootstrap; 0 for intervals from the sandwich covariance, and no statistics.
        unit: see `BradleyTerry.bootstrap`.
        level, scale, anchor: see `BradleyTerry.leaderboard`.
        seed: of the bootstrap; the reference's is the next.

    Raises:
        UserError: see `BradleyTerry`; fewer than two models in common with the reference.
        ValueError: an argument out of its range.
    """
    if rounds < 0 or rounds == 1:
        raise ValueError(f"rounds is {rounds}; expected at least 2, or 0 for none")
    fitted = BradleyTerry(ties=ties, style=style, l2=l2).fit(battles)
    replicates = fitted.bootstrap(rounds, unit=unit, seed=seed) if rounds else None
    rows = fitted.leaderboard(replicates, level=level, scale=scale, anchor=anchor, unit=unit)
    notes = []
    sizes = np.bincount(fitted.components_)
    if len(sizes) > 1:
        named = [", ".join(row["model"] for row in rows if row["component"] == number) for number in range(len(sizes))]
        notes.append(
            f"{len(sizes)} groups of models never met, not even through others; ranks hold within each: "
            + "; ".join(f"({number}) {names}" for number, names in enumerate(named))
        )
    flagged = [f"{row['model']} ({row['flag']})" for row in rows if row["flag"]]
    if flagged:
        notes.append(
            "no finite rating fits the battles of "
            + ", ".join(flagged)
            + "; theirs are held by a weak prior"
            + (f" (l2 {l2:g})" if l2 else "")
        )
    if battles.unread:
        notes.append(f"{battles.unread} verdicts said nothing and were left out")
    if len(battles) < 2:
        notes.append("one battle only; its intervals mean nothing")
    statistics: dict[str, float] = {}
    if replicates is not None:
        largest = np.flatnonzero(fitted.components_ == sizes.argmax())
        if len(largest) > 1:
            statistics["separability"] = separability(replicates[:, largest], level)
        if reference is not None:
            statistics |= _against(fitted, replicates, reference, ties, rounds, level, seed, notes)
    elif reference is not None:
        raise UserError("comparing with a reference takes bootstrap rounds; give some")
    return Leaderboard(
        rows=rows,
        ratings=fitted,
        statistics=statistics,
        notes=tuple(notes),
        scale=scale,
        level=level,
        unit=fitted.unit(unit),
        style=dict(zip(fitted.style_names_, map(float, fitted.style_), strict=True)),
    )


def _against(
    fitted: BradleyTerry,
    replicates: Floats,
    reference: Battles,
    ties: Literal["half", "drop"],
    rounds: int,
    level: float,
    seed: int,
    notes: list[str],
) -> dict[str, float]:
    """The paper's statistics over the models of both."""
    theirs = BradleyTerry(ties=ties).fit(reference)
    common = [name for name in fitted.models_ if name in theirs.models_]
    if len(common) < 2:
        raise UserError(
            f"the reference has {len(common)} of the models; it names, for example, {', '.join(theirs.models_[:4])}"
        )
    ours = [fitted.models_.index(name) for name in common]
    its = [theirs.models_.index(name) for name in common]
    for name, components in (("battles", fitted.components_[ours]), ("reference", theirs.components_[its])):
        if len(set(components)) > 1:
            raise UserError(
                f"the {name} have models that never met, not even through others, so there is no ranking to compare; "
                "compare a group at a time"
            )
    if len(common) < len(fitted.models_):
        notes.append(f"{len(fitted.models_) - len(common)} models are not in the reference, and not compared")
    people = theirs.bootstrap(rounds, seed=seed + 1)[:, its]
    mine = replicates[:, ours]
    return {
        "agreement": agreement(mine, people, level),
        "brier": brier(mine, people),
        **rank_correlations(mine, people),
        "reference_separability": separability(people, level),
        "models": float(len(common)),
    }
