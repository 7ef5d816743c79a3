"""Hiring several information gatherers: optimal mechanisms with correlated recommendations, and learning them.

Paper: arXiv 2307.06210 (Cacciamani, Castiglioni, Gatti: Online Information Acquisition: Hiring Multiple Agents; ICLR
2024).
Read beside: no code was found. The paper's abstract, opening and public reviews, and those of arXiv 2303.08613, the
single-agent predecessor; programme, baselines and constants are derived here.
Deviations: (1) the uncorrelated baseline (one fixed profile, pay by own report and state) is inferred, not read;
(2) when it commits, the learner keeps the incentive constraints exact instead of relaxing them by the estimation
error: the optimum mixed with the strict rules satisfies them, so this costs no more than the order of the bound;
(3) the confidence radius is a constant over the square root of the samples, without the logarithm; (4) while costs are
learned, efforts are observed.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from counterproof.errors import UserError
from counterproof.incentives.information_game import (
    TIE,
    Behaviour,
    Deviation,
    Floats,
    InformationGame,
    Ints,
    Mechanism,
    Outcome,
    Payments,
    Profile,
)

__all__ = ["ExploreThenCommit", "InfeasibleMechanism", "InformationAcquisition", "Learning", "fit_slope"]

LEAST = 1e-9  # a recommendation less likely than this is not made
HALVINGS = 50  # of an interval of mixing weights


class InfeasibleMechanism(UserError):
    """No payments within the cap make the agents follow.

    Attributes:
        profile: the profile asked for, or None when every one was open.
        deviations: those of one agent that cannot be made worthless all at once, with what is gained at least.
        needed: the smallest `max_payment` that implements `profile`, infinite if none does; one that is enough for some
            profile, when every one was open.
    """

    def __init__(self, message: str, profile: Profile | None, deviations: tuple[Deviation, ...], needed: float) -> None:
        super().__init__(message)
        self.profile, self.deviations, self.needed = profile, deviations, needed


class InformationAcquisition(InformationGame):
    """A decision under uncertainty, agents who can be paid to learn about it, and the best ways to pay them.

    ``InformationAcquisition(P, costs, utility, max_payment, *, outside=0.0, labels=None)``: arguments, attributes and
    errors are those of `InformationGame`, P of shape (*efforts, *signals, states).
    """

    def optimal(self, payments: Payments = "correlated", *, profile: Sequence[int] | None = None) -> "Mechanism":
        """The mechanism with the highest value among those that no agent gains by leaving.

        Args:
            payments: ``"own"``: one profile of efforts, pay by own report and state (uncorrelated). ``"peer"``: one
                profile, pay by all reports and state. ``"correlated"``: a distribution over profiles, of which each
                agent is told its own part, pay by all recommendations, all reports and state.
            profile: the efforts to be implemented, one index per agent; None: the best. With it, ``"correlated"`` is
                ``"peer"``.

        Raises:
            InfeasibleMechanism: naming agent and deviation, when the profile asked for, or participation, cannot be
                had within `max_payment`.
            RuntimeError: with the solver's message, when it fails.
        """
        if payments not in get_args(Payments):
            raise ValueError(f"payments is 'own', 'peer' or 'correlated', not {payments!r}")
        own = payments == "own"
        if profile is not None:
            candidates = [[int(np.ravel_multi_index(self._profile(profile), self.efforts))]]
        elif payments == "correlated":
            candidates = [list(range(len(self._flat)))]
        else:
            candidates = [[b] for b in range(len(self._flat))]
        # A profile is worth no more than its decisions minus its costs: most are never solved.
        bounds = self.decision_values().ravel().copy()
        for i, c in enumerate(self.costs):
            bounds -= np.maximum(c + self.outside[i], 0)[self._coordinates()[i]]
        candidates.sort(key=lambda group: -bounds[group].max())
        best: Mechanism | None = None
        for group in candidates:
            if best is not None and best.value >= bounds[group].max():
                break
            found = self._solve(group, own)
            if found is not None:
                mechanism = Mechanism(self, payments, *found)
                if best is None or mechanism.value > best.value:
                    best = mechanism
        if best is None:
            raise self._infeasible(candidates, own)
        return best

    def required_payment(self, profile: Sequence[int], payments: Payments = "peer") -> float:
        """The smallest `max_payment` with which a profile can be recommended for certain; infinite if none is enough.

        Args:
            profile: an effort index per agent.
            payments: ``"own"`` or ``"peer"`` (with which ``"correlated"`` coincides, for one profile).
        """
        group = [int(np.ravel_multi_index(self._profile(profile), self.efforts))]
        programme = self._programme(group, payments == "own")
        cap = programme.columns(1)
        programme.objective[:] = [0.0] * cap[0] + [1.0]
        paid = programme.paid()
        programme.upper = [*programme.upper[: cap[0]], math.inf]
        for column in paid:
            programme.upper[column] = math.inf
        rows = programme.rows(len(paid))
        programme.entries(rows, paid, 1.0)
        programme.entries(rows, np.full(len(paid), cap[0]), -1.0)
        solved = programme.solve()
        return math.inf if solved is None else float(solved.x[cap[0]]) * self._scale

    def _programme(self, group: Sequence[int], own: bool) -> "_Programme":
        """Constraints and objective over the profiles `group`: probabilities, payments weighted by them, bounds y.

        A payment that a recommended profile never meets would only tempt: it is 0 and left out.
        """
        n, S, K, L = self.n_agents, math.prod(self.signals), self.n_states, len(group)
        M = self.max_payment / self._scale
        table = self._flat[group]
        programme = _Programme()
        mu = programme.columns(L, objective=-self.decision_values().ravel()[group] / self._scale)
        programme.mu = mu
        coordinates = [k[group] for k in self._coordinates()]
        for i in range(n):
            Bi, Si = self.efforts[i], self.signals[i]
            mine = np.unravel_index(np.arange(S), self.signals)[i]
            met = table
            if own:  # one profile; equal columns for equal own reports
                met = np.zeros((1, Si, K))
                np.add.at(met[0], mine, table[0])
            number = np.full(met.shape, -1)
            upper = M if L == 1 else math.inf
            number[met > 0] = programme.columns(int((met > 0).sum()), objective=met[met > 0], upper=upper)
            x = number[:, mine] if own else number
            programme.x.append(x)
            if L > 1:
                columns = x[x >= 0]
                rows = programme.rows(len(columns))
                programme.entries(rows, columns, 1.0)
                programme.entries(rows, np.broadcast_to(mu[:, None, None], x.shape)[x >= 0], -M)
            told, which = np.unique(coordinates[i], return_inverse=True)
            R = len(told)
            y = programme.columns(R * Bi * Si, lower=-math.inf).reshape(R, Bi, Si)
            # y(told, effort, signal) is at least what each report earns.
            lie = programme.rows(R * Bi * Si * Si).reshape(R, Bi, Si, Si)
            programme.entries(lie, np.broadcast_to(y[..., None], lie.shape), -1.0)
            P = self._others(i)
            beside = [coordinates[j] for j in range(n) if j != i]
            rest = [self.efforts[j] for j in range(n) if j != i]
            others = np.ravel_multi_index(beside, rest) if rest else np.zeros(L, int)
            signals = x.reshape(L, *self.signals, K)
            reported = np.moveaxis(signals, 1 + i, 1).reshape(L, Si, S // Si, K)  # L, report, others' reports, state
            seen = P[others].transpose(0, 1, 3, 2, 4)  # L, effort, signal, others' signals, state
            shape = (L, Bi, Si, Si, S // Si, K)
            programme.entries(
                np.broadcast_to(lie[which][..., None, None], shape),
                np.broadcast_to(reported[:, None, None], shape),
                np.broadcast_to(seen[:, :, :, None], shape),
            )
            # Obedience earns no less than any effort with the best report for each signal.
            obey = programme.rows(R * Bi).reshape(R, Bi)
            programme.entries(np.broadcast_to(obey[..., None], y.shape), y, 1.0)
            wide = (L, Bi, S, K)
            programme.entries(
                np.broadcast_to(obey[which][..., None, None], wide),
                np.broadcast_to(x[:, None], wide),
                np.broadcast_to(-table[:, None], wide),
            )
            c = self.costs[i] / self._scale
            programme.entries(obey[which], np.broadcast_to(mu[:, None], (L, Bi)), c[coordinates[i]][:, None] - c[None])
            programme.obey.append((told, obey))
            leave = np.zeros(0, int)
            reserve = self.outside[i] / self._scale
            if c.min() + reserve > 0:  # else the cheapest effort is as good as walking away
                leave = programme.rows(R)
                spread = np.broadcast_to(leave[which][:, None, None], x.shape)
                programme.entries(spread, x, -table)
                programme.entries(leave[which], mu, c[coordinates[i]] + reserve)
            programme.leave.append(leave)
        return programme

    def _solve(self, group: Sequence[int], own: bool) -> tuple[Floats, tuple[Floats, ...]] | None:
        """Probabilities (*efforts) and payments per agent (*efforts, *signals, states), or None if infeasible."""
        programme = self._programme(group, own)
        solved = programme.solve()
        return None if solved is None else self._recover(programme, group, solved.x)

    def _recover(self, programme: "_Programme", group: Sequence[int], x: Floats) -> tuple[Floats, tuple[Floats, ...]]:
        chance = np.where(x[programme.mu] > LEAST, x[programme.mu], 0)
        mu = np.zeros(len(self._flat))
        mu[group] = chance / chance.sum()
        payments = []
        for columns in programme.x:
            weighted = np.where(columns >= 0, x[columns], 0.0)
            # Profiles without probability never occur; theirs stay 0.
            gamma = np.zeros_like(self._flat)
            made = chance > 0
            gamma[np.asarray(group)[made]] = weighted[made] / chance[made, None, None]
            # + 0.0 turns a negative zero into zero.
            payments.append(np.clip(gamma * self._scale, 0, self.max_payment).reshape(self.P.shape) + 0.0)
        return mu.reshape(self.efforts), tuple(payments)

    # -- what stands in the way --

    def _infeasible(self, candidates: Sequence[Sequence[int]], own: bool) -> InfeasibleMechanism:
        """Why no group of profiles can be had: who still gains under payments that leave the least to gain."""
        nearest: tuple[Any, Sequence[int], _Programme, list[Ints]] | None = None
        for group in candidates:
            programme = self._programme(group, own)
            programme.objective[:] = [0.0] * len(programme.objective)
            slack = []
            for (told, obey), leave in zip(programme.obey, programme.leave):
                slack.append(programme.columns(len(told), objective=np.ones(len(told))))
                programme.entries(obey, np.broadcast_to(slack[-1][:, None], obey.shape), -1.0)
                programme.entries(leave, slack[-1][: len(leave)], -1.0)
            solved = programme.solve()
            if solved is None:
                raise RuntimeError("HiGHS finds the programme infeasible although every constraint may be broken")
            if nearest is None or solved.fun < nearest[0].fun:
                nearest = (solved, group, programme, slack)
        assert nearest is not None
        solved, group, programme, slack = nearest
        mechanism = Mechanism(self, "own" if own else "peer", *self._recover(programme, group, solved.x))
        short = [solved.x[columns] * self._scale for columns in slack]
        agent = max(range(self.n_agents), key=lambda i: short[i].sum())
        told, obey = programme.obey[agent]
        leave = programme.leave[agent]
        likely = mechanism._told(agent)
        reward = mechanism._reward(self, agent)
        prices = np.abs(solved.ineqlin.marginals)
        blocking = []
        # The recommendation after which it gains most; what has a price there stands in the way together.
        r = int(short[agent].argmax())
        recommended = int(told[r])
        gain = float(short[agent][r] / max(likely[recommended], LEAST))
        for effort in range(self.efforts[agent]):
            if prices[obey[r, effort]] > TIE:
                reports = tuple(reward[recommended, effort].argmax(-1).tolist())
                blocking.append(Deviation(agent, recommended, effort, reports, gain))
        if leave.size and prices[leave[r]] > TIE:
            blocking.append(Deviation(agent, recommended, -1, tuple(range(self.signals[agent])), gain))
        names = self.labels
        kind: Payments = "own" if own else "peer"
        profile = self._unravel(group[0]) if len(candidates) == len(group) == 1 else None
        tried = [self._unravel(b) for group in candidates for b in group]
        needed = min(self.required_payment(b, kind) for b in tried)
        if profile is not None:
            goal = f"recommend ({', '.join(names.efforts[i][b] for i, b in enumerate(profile))})"
        else:
            goal = "keep every agent from walking away"
        ways = "; or ".join(dict.fromkeys(deviation.says(names) for deviation in blocking))
        message = (
            f"no payments between 0 and {self.max_payment:g} on {'own' if own else 'all'} reports and the state can "
            f"{goal}: {names.agents[agent]}, told effort {names.efforts[agent][recommended]}, gains at least "
            f"{gain:.4g} by {ways}; "
        )
        if profile is None:
            message += f"a max_payment of {needed:.6g} is enough"
        elif math.isinf(needed):
            message += "no max_payment is enough, since its reports say too little; ask for other efforts"
        else:
            message += f"it takes a max_payment of {needed:.6g}, or other efforts"
        return InfeasibleMechanism(message, profile, tuple(blocking), needed)

    def _unravel(self, number: int) -> Profile:
        return tuple(int(k) for k in np.unravel_index(number, self.efforts))

    # -- rules that are known to work --

    def strict_rules(self) -> tuple[tuple[Floats, ...], float]:
        """Scoring rules, one per agent and effort, that make this effort and the truth strictly best.

        Each is the one with the largest gap, whatever the others do: by linear programmes on own report and state. Lies
        between signals that say the same of the state cannot be made worse than the truth; they may tie.

        Returns:
            rules: per agent (|B_i|, |S_i|, states), payments in [0, max_payment].
            gap: by how much they beat everything else at least.

        Raises:
            ValueError: naming agent and effort, when no rule within `max_payment` makes it strictly best.
        """
        rules, gap = [], math.inf
        for i in range(self.n_agents):
            mine = []
            for b in range(self.efforts[i]):
                rule, found = self._strict_rule(i, b)
                if found <= TIE * self._scale:
                    name, effort = self.labels.agents[i], self.labels.efforts[i][b]
                    raise ValueError(
                        f"no rule within max_payment = {self.max_payment:g} makes {name} strictly prefer effort "
                        f"{effort}: its own reports say too little; raise max_payment or lower the cost"
                    )
                mine.append(rule)
                gap = min(gap, found)
            rules.append(np.stack(mine))
        return tuple(rules), gap

    def _strict_rule(self, i: int, b: int) -> tuple[Floats, float]:
        Bi, Si, K = self.efforts[i], self.signals[i], self.n_states
        tables = np.unique(self._others(i).sum(2).round(14), axis=0)  # (cases, B_i, S_i, K): others change it or not
        programme = _Programme()
        g = programme.columns(Si * K, upper=self.max_payment / self._scale).reshape(Si, K)
        gap = programme.columns(1, objective=np.array([-1.0]), upper=self.max_payment / self._scale)[0]
        c = self.costs[i] / self._scale
        for table in tables:
            y = programme.columns(Bi * Si, lower=-math.inf).reshape(Bi, Si)
            lie = programme.rows(Bi * Si * Si).reshape(Bi, Si, Si)
            programme.entries(lie, np.broadcast_to(y[..., None], lie.shape), -1.0)
            shape = (Bi, Si, Si, K)
            programme.entries(
                np.broadcast_to(lie[..., None], shape),
                np.broadcast_to(g, shape),
                np.broadcast_to(table[:, :, None], shape),
            )
            obey = programme.rows(Bi, bound=c - c[b])
            programme.entries(np.broadcast_to(obey[:, None], y.shape), y, 1.0)
            programme.entries(
                np.broadcast_to(obey[:, None, None], (Bi, Si, K)),
                np.broadcast_to(g, (Bi, Si, K)),
                np.broadcast_to(-table[b], (Bi, Si, K)),
            )
            programme.entries(np.delete(obey, b), np.full(Bi - 1, gap), 1.0)
            for t, r in itertools.permutations(range(Si), 2):
                row = programme.rows(1)
                programme.entries(np.repeat(row, K), g[r], table[b, t])
                programme.entries(np.repeat(row, K), g[t], -table[b, t])
                if _differ(table[b, t], table[b, r]):
                    programme.entries(row, np.array([gap]), 1.0)
        solved = programme.solve()
        if solved is None:
            return np.zeros((Si, K)), 0.0
        rule = np.clip(solved.x[g] * self._scale, 0, self.max_payment) + 0.0
        return rule, float(solved.x[gap]) * self._scale


def _differ(p: Floats, q: Floats) -> bool:
    """Whether two signals say different things of the state: their joint probabilities are not proportional."""
    return bool(np.abs(p * q.sum() - q * p.sum()).max() > 1e-9)


class _Programme:
    """A linear programme under construction: minimise objective . x, A x <= bound, probabilities sum to 1."""

    def __init__(self) -> None:
        self.objective: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.bound: list[float] = []
        self.mu = np.zeros(0, int)
        self.x: list[Ints] = []
        self.obey: list[tuple[Ints, Ints]] = []
        self.leave: list[Ints] = []
        self._entries: list[tuple[Ints, Ints, Floats]] = []

    def columns(
        self, count: int, *, objective: Floats | None = None, lower: float = 0.0, upper: float = math.inf
    ) -> Ints:
        first = len(self.objective)
        self.objective.extend(np.zeros(count) if objective is None else objective)
        self.lower.extend([lower] * count)
        self.upper.extend([upper] * count)
        return np.arange(first, first + count)

    def rows(self, count: int, *, bound: Floats | None = None) -> Ints:
        first = len(self.bound)
        self.bound.extend(np.zeros(count) if bound is None else bound)
        return np.arange(first, first + count)

    def entries(self, rows: Ints, columns: Ints, values: Floats | float) -> None:
        """Add to A; entries at the same place sum; columns below 0 stand for variables that are 0."""
        values = np.broadcast_to(values, rows.shape)
        kept = (columns >= 0) & (values != 0)
        self._entries.append((rows[kept], columns[kept], values[kept]))

    def paid(self) -> Ints:
        """Columns of payments."""
        columns = np.unique(np.concatenate([x.ravel() for x in self.x]))
        return columns[columns >= 0]

    def solve(self) -> Any:
        """HiGHS's answer, or None when infeasible.

        Raises:
            RuntimeError: when the solver fails.
        """
        size = (len(self.bound), len(self.objective))
        row, column, value = (np.concatenate(parts) for parts in zip(*self._entries))
        given: dict[str, Any] = {"A_ub": coo_array((value, (row, column)), shape=size).tocsr(), "b_ub": self.bound}
        if self.mu.size:
            ones = (np.ones(len(self.mu)), (np.zeros_like(self.mu), self.mu))
            given |= {"A_eq": coo_array(ones, shape=(1, size[1])).tocsr(), "b_eq": [1.0]}
        bounds: Any = np.column_stack([self.lower, self.upper])
        # Presolve at times loses a programme that is barely infeasible; then the solver is asked again without.
        for presolve in (True, False):
            exact: Any = {
                "primal_feasibility_tolerance": 1e-10,
                "dual_feasibility_tolerance": 1e-10,
                "presolve": presolve,
            }
            solved = linprog(self.objective, **given, bounds=bounds, method="highs", options=exact)
            if solved.status in (0, 2):
                break
        if solved.status == 2:
            return None
        if solved.status != 0:
            raise RuntimeError(f"HiGHS failed on {size[0]} rows and {size[1]} columns: {solved.message}")
        return solved


@dataclass(frozen=True, eq=False)
class Learning:
    """One run of the online algorithm.

    Attributes:
        regret: T times the optimal value minus what the principal got, in expectation over rounds given the samples.
        curve: rounds and regret so far at the ends of the phases, starting at (0, 0); linear in between.
        phases: (name, rounds, regret) of each.
        samples: exploration rounds per profile.
        alpha: weight of the known rules when committing.
        capped: whether alpha or exploration was cut to what is possible: the bound says nothing then.
        costs: per agent, the costs it committed with.
        mechanism: what it committed to.
        behaviour, outcome: how agents answer it, and what that brings per round.
    """

    rounds: int
    regret: float
    curve: tuple[tuple[float, float], ...]
    phases: tuple[tuple[str, int, float], ...]
    samples: int
    alpha: float
    capped: bool
    costs: tuple[Floats, ...]
    mechanism: Mechanism
    behaviour: Behaviour
    outcome: Outcome

    @property
    def obeyed(self) -> bool:
        """Whether all agents chose the recommended efforts after the principal had committed."""
        return self.outcome.disobedience == 0


class ExploreThenCommit:
    """Learns the signals' distributions by paying known strict rules, then commits to the mechanism optimal for them.

    Explores each effort profile for ceil(kappa T^(2/3)) rounds with payments by rules that are known to work, solves
    the programme with the observed frequencies, and plays its payments mixed with the rules, so that what is only
    nearly incentive compatible becomes strictly so. Regret is of order T^(2/3) (the paper's rate).

    Args:
        problem: the truth. The algorithm sees its costs, utility and cap, and samples of P.
        rounds: T.
        rules: per agent (|B_i|, |S_i|, states) payments in [0, max_payment] under which each effort and the truth are
            best; None: `InformationAcquisition.strict_rules`, as if given.
        gap: by how much they are best, the paper's ell; None: as computed. A number is believed.
        kappa: exploration rounds per profile over T^(2/3).
        radius: estimation error times the square root of the samples.
        alpha: weight of the rules when committing; None: max_payment * radius / sqrt(samples) / gap, at most 1.
        costs: ``"known"``, or ``"learned"`` from the mixtures of two rules at which an agent changes its effort.
        payments: the kind of mechanism to commit to, see `InformationAcquisition.optimal`.

    Raises:
        ValueError: for settings out of range, fewer rounds than profiles, rules that do not fit, or none that work.
    """

    def __init__(
        self,
        problem: InformationAcquisition,
        rounds: float,
        *,
        rules: Sequence[ArrayLike] | None = None,
        gap: float | None = None,
        kappa: float = 0.25,
        radius: float = 2.0,
        alpha: float | None = None,
        costs: Literal["known", "learned"] = "known",
        payments: Payments = "correlated",
    ) -> None:
        self.problem, self.rounds = problem, int(rounds)
        if any(c.min() + reserve > 0 for c, reserve in zip(problem.costs, problem.outside)):
            raise ValueError(
                "the online algorithm takes agents who stay: let each one's cheapest effort cost 0, and outside be 0"
            )
        profiles = math.prod(problem.efforts)
        if self.rounds != rounds or self.rounds < profiles:
            raise ValueError(f"rounds is a whole number, at least one for each of {profiles} profiles, not {rounds!r}")
        if not kappa > 0 or not radius >= 0:
            raise ValueError(f"kappa is > 0 and radius >= 0, not {kappa!r} and {radius!r}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha lies in [0, 1], not {alpha!r}")
        if costs not in ("known", "learned"):
            raise ValueError(f"costs is 'known' or 'learned', not {costs!r}")
        if rules is None:
            self.rules, computed = problem.strict_rules()
            gap = computed if gap is None else gap
        else:
            self.rules = tuple(np.array(rule, dtype=float) for rule in rules)
            shapes = [(b, s, problem.n_states) for b, s in zip(problem.efforts, problem.signals)]
            if [rule.shape for rule in self.rules] != shapes:
                raise ValueError(f"rules have shapes {shapes}, not {[rule.shape for rule in self.rules]}")
            if any(not ((rule >= 0) & (rule <= problem.max_payment)).all() for rule in self.rules):
                raise ValueError(f"rules pay between 0 and max_payment = {problem.max_payment:g}")
            if gap is None:
                raise ValueError("rules of your own need their gap: by how much each effort and the truth are best")
        if not gap > 0:
            raise ValueError(f"gap is > 0, not {gap!r}")
        self.gap, self.kappa, self.radius, self.alpha = float(gap), float(kappa), float(radius), alpha
        self.costs, self.payments = costs, payments
        wanted = math.ceil(self.kappa * self.rounds ** (2 / 3))
        self.samples = min(wanted, self.rounds // profiles)
        error = problem.max_payment * self.radius / math.sqrt(self.samples)
        self.weight = min(1.0, error / self.gap) if alpha is None else float(alpha)
        self.capped = self.samples < wanted or (alpha is None and error >= self.gap)
        self.optimum = problem.optimal().value

    def commit(self, counts: ArrayLike, costs: Sequence[ArrayLike] | None = None) -> Mechanism:
        """The mechanism for the observed frequencies, mixed with the rules.

        Args:
            counts: (*efforts, *signals, states) as in `InformationAcquisition.from_counts`.
            costs: per agent; None: the true ones.
        """
        truth = self.problem
        estimate = InformationAcquisition.from_counts(
            counts,
            truth.costs if costs is None else costs,
            truth.utility,
            truth.max_payment,
            pool=False,
            outside=truth.outside,
            labels=truth.labels,
        )
        return estimate.optimal(self.payments).mixed(self.weight, self.rules)

    def simulate(self, seed: int | np.random.Generator | None = None) -> Learning:
        """Play T rounds. Time does not depend on T: rounds of a phase are alike.

        While exploring, agents obey (the rules see to it) and decisions are uniformly random. After committing, agents
        play an equilibrium of the true problem, obedience where it is one.
        """
        rng = np.random.default_rng(seed)
        truth = self.problem
        flat = truth.P.reshape(math.prod(truth.efforts), -1)
        counts = np.stack([rng.multinomial(self.samples, p) for p in flat]).reshape(truth.P.shape)
        profiles = list(np.ndindex(truth.efforts))
        idle = float((truth.utility @ truth.prior).mean())
        phases: list[tuple[str, int, float]] = []
        paid = np.array([sum(self._rule_pay(b, i) for i in range(truth.n_agents)) for b in profiles])
        explored = self.samples * len(profiles)
        phases.append(("explore", explored, float(self.samples * (self.optimum - idle + paid).sum())))
        left = self.rounds - explored
        costs = truth.costs
        if self.costs == "learned":
            costs, asked = self._learn_costs(counts)
            asked = min(asked, left)
            # Payments in these rounds are not followed up: they count as the cap.
            lost = self.optimum - idle + truth.n_agents * truth.max_payment
            phases.append(("costs", asked, asked * lost))
            left -= asked
        mechanism = self.commit(counts, costs)
        behaviour = mechanism.respond(truth)
        outcome = mechanism.outcome(truth, behaviour)
        phases.append(("commit", left, left * (self.optimum - outcome.value)))
        curve = list(itertools.accumulate(phases, lambda at, p: (at[0] + p[1], at[1] + p[2]), initial=(0.0, 0.0)))
        return Learning(
            rounds=self.rounds,
            regret=curve[-1][1],
            curve=tuple(curve),
            phases=tuple(phases),
            samples=self.samples,
            alpha=self.weight,
            capped=self.capped,
            costs=tuple(costs),
            mechanism=mechanism,
            behaviour=behaviour,
            outcome=outcome,
        )

    def _rule_pay(self, b: Profile, i: int) -> float:
        """Expected payment to an obedient agent i by its rule."""
        signals = tuple(j for j in range(self.problem.n_agents) if j != i)
        return float((self.problem.P[b].sum(signals) * self.rules[i][b[i]]).sum())

    def _learn_costs(self, counts: NDArray[Any]) -> tuple[tuple[Floats, ...], int]:
        """Costs up to estimation error, the cheapest set to 0, and rounds used.

        Between the rules of two efforts an agent passes from one to the other, perhaps by others on the way. Where it
        changes, two efforts are worth the same: the difference of their costs is that of their estimated payments.
        """
        truth = self.problem
        estimate = InformationAcquisition.from_counts(counts, truth.costs, truth.utility, truth.max_payment, pool=False)
        rounds = 0
        learned = []
        for i, hidden in enumerate(truth.costs):
            seen, guess = (q._others(i)[0].sum(1) for q in (truth, estimate))  # the others at their first effort
            cost = np.zeros(len(hidden))
            for b in range(1, len(hidden)):
                low, at = 0.0, 0
                while at != b:
                    high, after = 1.0, b
                    for _ in range(HALVINGS):
                        middle = (low + high) / 2
                        chosen = int((self._pay(seen, i, b, middle) - hidden).argmax())
                        rounds += 1
                        if chosen == at:
                            low = middle
                        else:
                            high, after = middle, chosen
                    pay = self._pay(guess, i, b, high)
                    cost[b] += pay[after] - pay[at]
                    low, at = high, after
            learned.append(cost - cost.min())
        return tuple(learned), rounds

    def _pay(self, table: Floats, i: int, b: int, weight: float) -> Floats:
        """(B_i,) best expected payment by effort under the rules of efforts 0 and b mixed."""
        rule = (1 - weight) * self.rules[i][0] + weight * self.rules[i][b]
        best: Floats = np.einsum("esk,rk->esr", table, rule).max(-1).sum(-1)
        return best


def fit_slope(rounds: Iterable[float], regret: Iterable[float]) -> tuple[float, float, float]:
    """Slope of log regret on log rounds by least squares, and its 95 % interval.

    Raises:
        ValueError: with fewer than three points or fewer than two different numbers of rounds.
    """
    from scipy.stats import t as student

    x, y = np.log(np.fromiter(rounds, float)), np.log(np.fromiter(regret, float))
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError("a slope needs at least three points at two or more horizons")
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    half = float(student.ppf(0.975, len(x) - 2) * math.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))
    return slope, slope - half, slope + half
