"""Bradley-Terry ratings from counts: ties, weights, style covariates, sandwich and bootstrap intervals.

P(i beats j) = sigmoid(b_i - b_j + z . gamma), a tie is half a win for each. The fit is Newton's method on the pairs'
counts. A bootstrap's replicates differ little from the sample, so all are solved together with the sample's Hessian
(chord iterations); one that this does not bring home is solved by Newton's method of its own.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit
from scipy.stats import norm

from counterproof.errors import UserError
from counterproof.judging.battles import Battles

__all__ = ["BradleyTerry"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Unit = Literal["prompt", "battle"]

RIDGE = (
    0.01  # of the rating's square, where a likelihood has no highest point: a twenty-fifth of a tie with the average
)
TOLERANCE = 1e-9  # of a step, in log-odds, beyond which a solution is not improved
CHORDS = 60
PORTION = 1 << 18  # numbers of a bootstrap's work at a time: what a cache holds


class BradleyTerry:
    """Ratings of models from battles.

    Args:
        ties: ``"half"``, a tie is half a win for each; ``"drop"``, ties are left out.
        style: with True, the battles' style covariates are part of the model, each scaled to unit deviation over the
            battles; ratings are those at equal style.
        l2: of the prior on ratings, l2 / 2 times the sum of their squares. With 0, the prior is put in only where the
            likelihood has no highest point (a model that won or lost all), as `RIDGE`, and said in `unbounded_`.

    Attributes, after `fit`:
        models_: (M,) names.
        ratings_: (M,) float64, natural log-odds, mean 0 in each component.
        style_: (F,) log-odds per standard deviation of a covariate.
        components_: (M,) int64; models of different components were never compared, not even through others, so their
            ratings are not comparable.
        unbounded_: per model ``""``, ``"won all"``, ``"lost all"`` or ``"one-way"``: a member of a group whose battles
            with the others of its component all went one way. Of such groups the largest has no mark.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, *, ties: Literal["half", "drop"] = "half", style: bool = False, l2: float = 0.0) -> None:
        if ties not in ("half", "drop"):
            raise ValueError(f"ties is {ties!r}; expected 'half' or 'drop'")
        if not 0 <= l2 < np.inf:
            raise ValueError(f"l2 is {l2}; expected a number from 0")
        self.ties, self.style, self.l2 = ties, style, l2

    def fit(self, battles: Battles) -> "BradleyTerry":
        """Find the ratings of highest likelihood.

        Raises:
            UserError: no battle is left, or style is asked for and the battles have no covariates, or covariates that
                do not vary, or that tell the winners by themselves.
        """
        kept = np.ones(len(battles.first), dtype=bool) if self.ties == "half" else battles.outcome != 0.5
        if not kept.any():
            raise UserError("there is no battle that is not a tie; rate ties as half a win instead")
        if self.style and battles.style is None:
            raise UserError("style control needs battles with style_... columns; read them with style=True")
        self.models_ = battles.models
        self._cells = _Cells(
            first=battles.first[kept],
            second=battles.second[kept],
            outcome=battles.outcome[kept],
            count=battles.count[kept],
            weight=battles.weight[kept],
            prompt=None if battles.prompt is None else battles.prompt[kept],
        )
        features = None
        if self.style:
            assert battles.style is not None
            features = battles.style[kept]
            spread = features.std(axis=0)
            if not np.all(spread > 0):
                raise UserError(f"{battles.style_names[int(np.argmin(spread))]} does not vary; leave it out")
            features = features / spread
        self._rows = _Rows(self._cells, len(self.models_), features)
        played, won = self._rows.totals(self._cells.count[None])
        self._played, self._won = played[:, 0], won[:, 0]
        self.components_, groups = self._rows.connections(self._played, self._won)
        self.unbounded_ = self._unbounded(groups)
        self._bounded = not any(self.unbounded_)
        start = np.zeros(len(self.models_) + self._rows.features)
        self._solution = self._rows.newton(self._played, self._won, start, self._ridge(self._bounded))
        if features is not None:
            curve = self._rows.hessian(self._played, self._solution, RIDGE)[len(self.models_) :, len(self.models_) :]
            if np.linalg.eigvalsh(curve)[0] < 1e-6 * self._played.sum():
                raise UserError(
                    "the style covariates tell the winners by themselves, so no finite weight fits them; leave out "
                    "covariates"
                )
        self.ratings_ = self._centred(self._solution[None])[0]
        self.style_ = self._solution[len(self.models_) :]
        self.style_names_ = battles.style_names if self.style else ()
        return self

    def _ridge(self, bounded: bool) -> float:
        return self.l2 if bounded or self.l2 > 0 else RIDGE

    def _unbounded(self, groups: Ints) -> tuple[str, ...]:
        """Of each model why its rating has no bound; groups are those within which everyone is beaten in the end."""
        rows, size = self._rows, len(self.models_)
        wins = np.zeros(size)
        games = np.zeros(size)
        for side, points in ((rows.first, self._won), (rows.second, self._played - self._won)):
            wins += np.bincount(side, points, size)
            games += np.bincount(side, self._played, size)
        said = np.full(size, "one-way", dtype=object)
        said[wins == games] = "won all"
        said[wins == 0] = "lost all"
        sizes = np.bincount(groups)
        for component in range(self.components_.max() + 1):
            inside = self.components_ == component
            largest = np.unique(groups[inside & (sizes[groups] == sizes[groups[inside]].max())])
            if len(largest) == 1:
                said[groups == largest[0]] = ""
        return tuple(said)

    def _centred(self, solutions: Floats) -> Floats:
        """The ratings, mean 0 within each component: (B, M)."""
        ratings = solutions[:, : len(self.models_)]
        sizes = np.bincount(self.components_)
        member: Any = csr_array((np.ones(len(self.components_)), (np.arange(len(self.components_)), self.components_)))
        means: Floats = (ratings @ member) / sizes
        centred: Floats = ratings - means[:, self.components_]
        return centred

    # uncertainty

    def unit(self, unit: Unit | None = None) -> Unit:
        """What is drawn at random: prompts where battles name them, since battles of one prompt go together."""
        if unit is None:
            return "battle" if self._cells.prompt is None else "prompt"
        if unit == "prompt" and self._cells.prompt is None:
            raise UserError(
                "the battles name no prompts (or only one), so prompts cannot be resampled; take unit='battle'"
            )
        if unit not in ("prompt", "battle"):
            raise ValueError(f"unit is {unit!r}; expected 'prompt' or 'battle'")
        return unit

    def bootstrap(self, rounds: int = 1000, *, unit: Unit | None = None, seed: int = 0) -> Floats:
        """Ratings of resampled battles.

        Args:
            rounds: B.
            unit: what is drawn with replacement: ``"prompt"``, with all battles of it, or ``"battle"``, from the cells
                of equal battles (multinomial). Default: prompts if the battles name them.
            seed: of the draws.

        Returns:
            (B, M) float64, centred as `ratings_`. Where a draw has no highest likelihood, or leaves a component in
            parts, the prior of `RIDGE` holds it.
        """
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; expected at least 1")
        rng = np.random.default_rng(seed)
        draw = self._draws(self.unit(unit), rng)
        cells = max(len(self._cells.count), len(self._rows.first))
        portion = max(1, min(rounds, PORTION // cells))
        solved = [
            self._rows.solve_all(*self._rows.totals(draw(min(portion, rounds - done))), self._solution, self._ridge)
            for done in range(0, rounds, portion)
        ]
        return self._centred(np.concatenate(solved))

    def _draws(self, unit: Unit, rng: np.random.Generator) -> Any:
        count = self._cells.count
        if unit == "battle":
            total = round(count.sum())
            chance = count / count.sum()
            return lambda rounds: rng.multinomial(total, chance, size=rounds).astype(float)
        prompt = self._cells.prompt
        assert prompt is not None
        prompts, place = np.unique(prompt, return_inverse=True)

        def by_prompt(rounds: int) -> Floats:
            drawn = [
                np.bincount(rng.integers(len(prompts), size=len(prompts)), minlength=len(prompts))
                for _ in range(rounds)
            ]
            times: Floats = np.stack(drawn)[:, place] * count
            return times

        return by_prompt

    def covariance(self, *, unit: Unit | None = None) -> Floats:
        """The sandwich estimate of the ratings' covariance, (M, M): valid without the model's being true.

        Args:
            unit: as in `bootstrap`; what is independent of what.
        """
        cells, rows = self._cells, self._rows
        size = len(self.models_)
        chance = rows.chance(self._solution)[rows.row]
        residual = cells.weight * (cells.outcome - chance)
        inverse = np.linalg.inv(rows.hessian(self._played, self._solution, self._ridge(self._bounded)))
        design = rows.design_of(cells)
        if self.unit(unit) == "battle":
            scores = csr_array(design.multiply((residual * np.sqrt(cells.count))[:, None]))
        else:
            assert cells.prompt is not None
            prompts, place = np.unique(cells.prompt, return_inverse=True)
            gather = csr_array(
                (residual * cells.count, (place, np.arange(len(place)))), shape=(len(prompts), len(place))
            )
            scores = gather @ design
        meat = (scores.T @ scores).toarray()
        whole = inverse @ meat @ inverse
        # Centred as the ratings are, so that the gauge adds nothing.
        member = np.equal.outer(self.components_, self.components_)
        centre = np.eye(size) - member / member.sum(axis=1)
        covariance: Floats = centre @ whole[:size, :size] @ centre.T
        return covariance

    # what is told

    def win_probability(self) -> Floats:
        """(M, M): of the row's model against the column's, at equal style; nan between components."""
        chance = expit(np.subtract.outer(self.ratings_, self.ratings_))
        return np.where(np.equal.outer(self.components_, self.components_), chance, np.nan)

    def leaderboard(
        self,
        replicates: Floats | None = None,
        *,
        level: float = 0.95,
        scale: Literal["elo", "winrate", "logit"] = "elo",
        anchor: str | None = None,
        unit: Unit | None = None,
    ) -> list[dict[str, Any]]:
        """A row for each model, best first, component by component (the largest first).

        Args:
            replicates: (B, M) of `bootstrap`, whose percentiles are the intervals; None: normal intervals from the
                sandwich covariance.
            level: of the intervals.
            scale: ``"elo"``, 400 / log 10 times the log-odds, around 1000; ``"winrate"``, percent against `anchor`;
                ``"logit"``, log-odds.
            anchor: the model that has 1000, 50 % or 0, without an interval, in its component; default: the component's
                mean (for ``"winrate"`` one has to be named).
            unit: of the sandwich.

        Returns:
            rank (within the component), best_rank (1 + the models whose interval lies above), model, rating, low, high,
            battles, component, flag (`unbounded_`).

        Raises:
            UserError: an anchor that is no model; a win rate without one.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a number between 0 and 1")
        if scale not in ("elo", "winrate", "logit"):
            raise ValueError(f"scale is {scale!r}; expected elo, winrate or logit")
        if anchor is not None and anchor not in self.models_:
            raise UserError(f"the anchor {anchor!r} is none of the models: {', '.join(self.models_)}")
        if scale == "winrate" and anchor is None:
            raise UserError("a win rate is against a model; name it as the anchor")
        base = np.zeros_like(self.ratings_)
        place = self.models_.index(anchor) if anchor is not None else None
        near = np.zeros(len(self.models_), dtype=bool)
        if place is not None:
            near = self.components_ == self.components_[place]
            base[near] = self.ratings_[place]
        point = self.ratings_ - base
        if replicates is not None:
            moved = replicates.copy()
            if place is not None:
                moved[:, near] -= replicates[:, [place]]
            low, high = np.quantile(moved, [(1 - level) / 2, (1 + level) / 2], axis=0)
        else:
            covariance = self.covariance(unit=unit)
            if place is not None:
                shift = np.eye(len(self.models_))
                shift[near, place] -= 1.0
                covariance = shift @ covariance @ shift.T
            half = norm.ppf((1 + level) / 2) * np.sqrt(np.clip(np.diag(covariance), 0, None))
            low, high = point - half, point + half

        def scaled(logits: Floats) -> Floats:
            if scale == "elo":
                logits = 1000 + 400 / np.log(10) * logits
            elif scale == "winrate":
                logits = np.where(near, 100 * expit(logits), np.nan)
            return logits

        battles = np.zeros(len(self.models_))
        for side in (self._cells.first, self._cells.second):
            battles += np.bincount(side, self._cells.count, len(self.models_))
        largest_first = np.argsort(-np.bincount(self.components_), kind="stable")
        name = {int(component): number for number, component in enumerate(largest_first)}
        rows = []
        for model in sorted(
            range(len(point)), key=lambda m: (name[int(self.components_[m])], -point[m], self.models_[m])
        ):
            same = self.components_ == self.components_[model]
            rows.append(
                {
                    "rank": 1 + int((point[same] > point[model]).sum()),
                    "best_rank": 1 + int((low[same] > high[model]).sum()),
                    "model": self.models_[model],
                    "rating": float(scaled(point)[model]),
                    "low": float(scaled(low)[model]),
                    "high": float(scaled(high)[model]),
                    "battles": int(battles[model]),
                    "component": name[int(self.components_[model])],
                    "flag": self.unbounded_[model],
                }
            )
        return rows


@dataclass(frozen=True)
class _Cells:
    """Battles that are equal, and how many: what is resampled."""

    first: Ints
    second: Ints
    outcome: Floats
    count: Floats
    weight: Floats
    prompt: Ints | None


class _Rows:
    """What the likelihood sums over: pairs, or, where every battle has its own style, battles."""

    def __init__(self, cells: _Cells, models: int, features: Floats | None) -> None:
        self.models = models
        self.features = 0 if features is None else features.shape[1]
        self.styles = features
        size = len(cells.first)
        self.row: Ints = np.arange(size)  # of a cell
        if features is None:
            pairs, self.row = np.unique(cells.first * models + cells.second, return_inverse=True)
            self.first, self.second = np.divmod(pairs, models)
        else:
            self.first, self.second = cells.first, cells.second
        shape = (size, len(self.first))
        self._played = csr_array((cells.weight, (np.arange(size), self.row)), shape=shape).T.tocsr()
        self._won = csr_array((cells.weight * cells.outcome, (np.arange(size), self.row)), shape=shape).T.tocsr()
        rows = len(self.first)
        sides = np.concatenate([self.first, self.second])
        signs = np.repeat([1.0, -1.0], rows)
        self._design = csr_array((signs, (np.tile(np.arange(rows), 2), sides)), shape=(rows, models))
        self._transposed = self._design.T.tocsr()

    def design_of(self, cells: _Cells) -> Any:
        """A row for each cell: its first, less its second, and its style."""
        size = len(cells.first)
        sides = np.concatenate([cells.first, cells.second])
        at, signs = np.tile(np.arange(size), 2), np.repeat([1.0, -1.0], size)
        if self.styles is not None:
            at = np.concatenate([at, np.repeat(np.arange(size), self.features)])
            sides = np.concatenate([sides, np.tile(np.arange(self.models, self.models + self.features), size)])
            signs = np.concatenate([signs, self.styles.ravel()])
        return csr_array((signs, (at, sides)), shape=(size, self.models + self.features))

    def totals(self, counts: Floats) -> tuple[Floats, Floats]:
        """Weight of the battles of each row, and what its first won of it, for (B, cells) counts: both (rows, B)."""
        columns = np.ascontiguousarray(counts.T)
        played: Any = self._played @ columns
        won: Any = self._won @ columns
        return played, won

    def logits(self, solutions: Floats) -> Floats:
        """(rows, B) of (M + F, B), or (rows,) of (M + F,)."""
        found: Any = self._design @ np.ascontiguousarray(solutions[: self.models])
        if self.styles is not None:
            found += self.styles @ solutions[self.models :]
        return found  # type: ignore[no-any-return]

    def chance(self, solution: Floats) -> Floats:
        found: Floats = expit(self.logits(solution))
        return found

    def gradients(self, half: Floats, excess: Floats, solutions: Floats, ridge: float) -> Floats:
        """Of the negative log-likelihood, (M + F, B), with half of what was played and what was won beyond it.

        sigmoid(x) = (1 + tanh(x / 2)) / 2, and NumPy's tanh is several times faster than expit.
        """
        residual = self.logits(solutions)
        residual *= 0.5
        np.tanh(residual, out=residual)
        residual *= half
        residual -= excess
        ratings: Any = self._transposed @ residual
        ratings += ridge * solutions[: self.models]
        if self.styles is None:
            return ratings  # type: ignore[no-any-return]
        return np.concatenate([ratings, self.styles.T @ residual])

    def hessian(self, played: Floats, solution: Floats, ridge: float) -> Floats:
        """(M + F, M + F), made invertible: ratings of a component can move together, which nothing else uses."""
        chance = self.chance(solution)
        curve = played * chance * (1 - chance)
        size = self.models
        found = np.zeros((size + self.features,) * 2)
        # The pairs are distinct except where battles have styles.
        np.subtract.at(found, (self.first, self.second), curve)
        np.subtract.at(found, (self.second, self.first), curve)
        found[np.arange(size), np.arange(size)] = np.bincount(self.first, curve, size) + np.bincount(
            self.second, curve, size
        )
        found[np.arange(size), np.arange(size)] += ridge
        if self.styles is not None:
            weighted = self.styles * curve[:, None]
            across = self._design.T @ weighted
            found[:size, size:], found[size:, :size] = across, across.T
            found[size:, size:] = self.styles.T @ weighted
        if ridge == 0:
            met = csr_array(((played > 0).astype(np.int8), (self.first, self.second)), (size, size))
            count, label = connected_components(met, directed=False)
            for part in range(count):
                inside = np.flatnonzero(label == part)
                found[np.ix_(inside, inside)] += max(found[inside, inside].mean(), 1e-12) / len(inside)
        return found

    def newton(self, played: Floats, won: Floats, start: Floats, ridge: float) -> Floats:
        """The solution of one set of totals, by Newton's method with halved steps.

        Where it does not settle, because the style covariates alone tell the winners, the prior of `RIDGE` holds it.

        Raises:
            UserError: ratings and style that cannot be told apart.
        """
        solution = start.copy()

        def loss(at: Floats) -> float:
            logits = self.logits(at)
            return float(
                -(won @ log_expit(logits) + (played - won) @ log_expit(-logits))
                + ridge / 2 * at[: self.models] @ at[: self.models]
            )

        value = loss(solution)
        for _ in range(100):
            gradient = self.gradients(played / 2, won - played / 2, solution, ridge)
            try:
                step = cho_solve(cho_factor(self.hessian(played, solution, ridge)), gradient)
            except LinAlgError:
                raise UserError(
                    "the ratings cannot be told apart from the style covariates; leave out covariates, or give l2"
                ) from None
            size = 1.0
            while (new := loss(solution - size * step)) > value + 1e-12 * abs(value) and size > 1e-6:
                size /= 2
            solution = solution - size * step
            value = new
            if size * np.abs(step).max() < TOLERANCE:
                return solution
        if ridge >= RIDGE:
            raise UserError("the ratings do not settle even with a prior; leave out style covariates, or raise l2")
        return self.newton(played, won, start, RIDGE)

    def solve_all(self, played: Floats, won: Floats, start: Floats, ridge: Any) -> Floats:
        """Solutions, (B, M + F), of (rows, B) totals, all at once from one near them."""
        solutions = np.repeat(start[:, None], played.shape[1], axis=1)
        bounded = np.array([self._bounded_like(*totals) for totals in zip(played.T, won.T, strict=True)])
        for index in np.flatnonzero(~bounded):
            solutions[:, index] = self.newton(played[:, index], won[:, index], 0 * start, ridge(False))
        todo = np.flatnonzero(bounded)
        if len(todo):
            factor = cho_factor(self.hessian(played[:, todo].mean(axis=1), start, ridge(True)))
        half = played[:, todo] / 2
        excess = won[:, todo] - half
        found = solutions[:, todo]
        before = np.full(len(todo), np.inf)
        for _ in range(CHORDS):
            if not len(todo):
                return np.ascontiguousarray(solutions.T)
            step = cho_solve(factor, self.gradients(half, excess, found, ridge(True)), overwrite_b=True)
            size = np.abs(step).max(axis=0)
            # Steps that grow say that this Hessian is too far off.
            stray = size > 2 * before
            found -= np.where(stray, 0.0, step)
            going = ~stray & (size >= TOLERANCE)
            before = size
            if not going.all():
                solutions[:, todo] = found
                for index in todo[stray]:
                    solutions[:, index] = self.newton(played[:, index], won[:, index], start, ridge(True))
                todo, half, excess, before = todo[going], half[:, going], excess[:, going], size[going]
                found = solutions[:, todo]
        for index in todo:
            solutions[:, index] = self.newton(played[:, index], won[:, index], start, ridge(True))
        return np.ascontiguousarray(solutions.T)

    def _bounded_like(self, played: Floats, won: Floats) -> bool:
        """Whether a highest likelihood exists: everyone can be beaten by everyone of the component, through others."""
        pattern = (won > 0, played > won)
        if all(np.array_equal(a, b) for a, b in zip(pattern, self._pattern, strict=True)):
            return self._pattern_bounded
        parts, groups = self.connections(played, won, keep=False)
        return len(np.unique(parts)) == self._parts and len(np.unique(groups)) == self._parts

    def connections(self, played: Floats, won: Floats, keep: bool = True) -> tuple[Ints, Ints]:
        """Of each model its component, and the group in which everyone beats everyone, through others."""
        beats, beaten = won > 0, played > won
        shape = (self.models, self.models)
        at = np.concatenate([self.first[beats], self.second[beaten]])
        to = np.concatenate([self.second[beats], self.first[beaten]])
        graph = csr_array((np.ones(len(at), dtype=np.int8), (at, to)), shape)
        count, parts = connected_components(graph, directed=False)
        number, groups = connected_components(graph, directed=True, connection="strong")
        if keep:
            self._pattern, self._parts, self._pattern_bounded = (beats, beaten), count, number == count
        return parts.astype(np.int64), groups.astype(np.int64)
