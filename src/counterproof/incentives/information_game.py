"""Paying agents for information: the principal's problem, what she announces, and how agents take it.

Nothing here searches for a good mechanism; it says what one brings, who gains by leaving it, and where agents settle
that only look after themselves.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterproof.errors import UserError

__all__ = ["Behaviour", "Deviation", "InformationGame", "Labels", "Mechanism", "Outcome"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Payments = Literal["own", "peer", "correlated"]
Profile = tuple[int, ...]

SUM = 1e-8  # by how much probabilities may miss one, and the states' distribution may differ between profiles
TIE = 1e-9  # a gain below this share of the problem's scale does not move an agent
SWEEPS = 100  # of best responses before agents are said not to settle


@dataclass(frozen=True)
class Labels:
    """Names for messages and tables; what is left empty goes by numbers.

    Args:
        agents: one name per agent.
        efforts, signals: per agent, a name per effort and per signal.
        states, decisions: one name each.
    """

    agents: Sequence[str] = ()
    efforts: Sequence[Sequence[str]] = ()
    signals: Sequence[Sequence[str]] = ()
    states: Sequence[str] = ()
    decisions: Sequence[str] = ()

    def complete(self, efforts: Sequence[int], signals: Sequence[int], states: int, decisions: int) -> "Labels":
        """Every name filled in. Raises ValueError when names are given but not as many as there are things."""

        def names(given: Sequence[str], count: int, kind: str) -> tuple[str, ...]:
            if given and len(given) != count:
                raise ValueError(f"labels name {len(given)} {kind}, but there are {count}: {list(given)}")
            return tuple(map(str, given)) or tuple(map(str, range(count)))

        agents = names(self.agents, len(efforts), "agents")
        if not self.agents:
            agents = tuple(f"agent {name}" for name in agents)
        every = range(len(efforts))
        nested = [list(given) or [()] * len(efforts) for given in (self.efforts, self.signals)]
        if any(len(given) != len(efforts) for given in nested):
            raise ValueError(f"labels.efforts and labels.signals hold a list for each of {len(efforts)} agents")
        return Labels(
            agents,
            tuple(names(nested[0][i], efforts[i], f"efforts of {agents[i]}") for i in every),
            tuple(names(nested[1][i], signals[i], f"signals of {agents[i]}") for i in every),
            names(self.states, states, "states"),
            names(self.decisions, decisions, "decisions"),
        )


@dataclass(frozen=True)
class Deviation:
    """What an agent may do in place of what it was told.

    Attributes:
        agent: its index.
        recommended, effort: indices of the effort it was told and of the one it chooses; -1: it walks away.
        reports: what it reports for each signal it may see; honest where ``reports[s] == s``.
        gain: expected utility over obedience, given the recommendation and that all others obey.
    """

    agent: int
    recommended: int
    effort: int
    reports: tuple[int, ...]
    gain: float

    def says(self, labels: Labels) -> str:
        """The deviation in words, such as "effort shirk, reporting low for high"."""
        if self.effort < 0:
            return "walking away"
        names = labels.signals[self.agent]
        lies = [f"{names[r]} for {names[s]}" for s, r in enumerate(self.reports) if s != r]
        effort = labels.efforts[self.agent][self.effort]
        return f"effort {effort}, reporting {' and '.join(lies) if lies else 'truthfully'}"


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A strategy of each agent: what it does when told something.

    Args:
        efforts: per agent (|B_i|,), the effort chosen for each recommended one.
        reports: per agent (|B_i|, |S_i|), the report for each recommendation and signal.
        settled: whether no agent gains by changing its own.
    """

    efforts: tuple[Ints, ...]
    reports: tuple[Ints, ...]
    settled: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a mechanism brings the principal, per round.

    Attributes:
        value: utility of the decision minus payments.
        utility, payments: the two parts.
        disobedience: probability that some agent does not choose the recommended effort.
    """

    value: float
    utility: float
    payments: float
    disobedience: float


class InformationGame:
    """A decision under uncertainty, and agents who can be paid to learn about it.

    An agent's effort is hidden, its signal private. The principal recommends efforts, hears reports, decides, learns
    the state, and pays each agent between 0 and `max_payment`.

    Args:
        P: (*efforts, *signals, states): probability of all agents' signals and the state given all agents' efforts,
            for two agents ``P[b0, b1, s0, s1, state]``; or a mapping from effort profiles ``(b0, b1)`` to such tables.
            Every profile counts, also those never recommended. The state does not depend on efforts.
        costs: per agent, the cost of each of its efforts, >= 0.
        utility: (decisions, states).
        max_payment: cap on one agent's payment, M > 0, in the unit of `utility` and `costs`.
        outside: what an agent has when it walks away after its recommendation; one number or one per agent. 0 by
            default: it matters only if the cheapest effort costs something.
        labels: names of agents, efforts, signals, states, decisions.

    Attributes:
        n_agents, efforts, signals, n_states, n_decisions: sizes; efforts and signals hold one per agent.
        prior: (states,).

    Raises:
        ValueError: naming the argument, for shapes that do not fit, entries that are not finite or negative,
            probabilities that do not sum to 1, a state that depends on efforts, costs below 0 or a cap not above 0.
    """

    def __init__(
        self,
        P: ArrayLike | Mapping[Profile, ArrayLike],
        costs: Sequence[ArrayLike],
        utility: ArrayLike,
        max_payment: float,
        *,
        outside: ArrayLike = 0.0,
        labels: Labels | None = None,
    ) -> None:
        self.costs = tuple(np.array(c, dtype=float) for c in costs)
        if not self.costs or any(c.ndim != 1 or not c.size for c in self.costs):
            raise ValueError(f"costs holds a list of effort costs per agent, not {costs!r}")
        for i, c in enumerate(self.costs):
            if not (np.isfinite(c).all() and (c >= 0).all()):
                raise ValueError(f"costs[{i}] = {c.tolist()}: a cost is a finite number >= 0")
        self.n_agents = n = len(self.costs)
        self.efforts = tuple(len(c) for c in self.costs)
        table: Floats = self._tables(P) if isinstance(P, Mapping) else np.array(P, dtype=float)
        if table.ndim != 2 * n + 1 or table.shape[:n] != self.efforts or not table.size:
            raise ValueError(
                f"P has shape (*efforts, *signals, states) with efforts {self.efforts} as in costs and {n} signal "
                f"axes, not {table.shape}"
            )
        if not (np.isfinite(table).all() and (table >= 0).all()):
            raise ValueError("P holds a negative or non-finite entry; it needs probabilities")
        self.signals, self.n_states = table.shape[n:-1], table.shape[-1]
        inner = tuple(range(n, 2 * n))
        total = table.sum((*inner, 2 * n))
        if (wrong := np.argwhere(np.abs(total - 1) > SUM)).size:
            b = tuple(wrong[0].tolist())
            raise ValueError(f"P{list(b)} sums to {total[b]:.6g}, not 1: give every effort profile a distribution")
        table /= total.reshape(*self.efforts, *[1] * (n + 1))
        states = table.sum(inner).reshape(-1, self.n_states)
        if (differs := np.flatnonzero(np.abs(states - states[0]).max(1) > SUM)).size:
            b = tuple(int(k) for k in np.unravel_index(differs[0], self.efforts))
            raise ValueError(
                f"P{list(b)} gives the states probabilities {states[differs[0]].round(6).tolist()}, the first profile "
                f"{states[0].round(6).tolist()}: effort cannot change the state (for counts, use from_counts)"
            )
        self.P = table
        self.prior: Floats = states[0]
        self.utility: Floats = np.array(utility, dtype=float)
        if self.utility.ndim != 2 or self.utility.shape[1] != self.n_states or not self.utility.size:
            raise ValueError(f"utility has shape (decisions, {self.n_states} states), not {self.utility.shape}")
        if not np.isfinite(self.utility).all():
            raise ValueError("utility holds a non-finite entry")
        self.n_decisions = len(self.utility)
        self.max_payment = float(max_payment)
        if not (self.max_payment > 0 and math.isfinite(self.max_payment)):
            raise ValueError(f"max_payment is a finite number > 0, not {max_payment!r}")
        reserve = np.array(outside, dtype=float)
        if reserve.shape not in ((), (n,)) or not np.isfinite(reserve).all():
            raise ValueError(f"outside is one finite number, or one for each of {n} agents, not {outside!r}")
        self.outside: Floats = np.broadcast_to(reserve, (n,)).copy()
        self.labels = (labels or Labels()).complete(self.efforts, self.signals, self.n_states, self.n_decisions)
        self._flat = table.reshape(math.prod(self.efforts), math.prod(self.signals), self.n_states)
        # All amounts are divided by this one before they reach the solver, so that its tolerances fit any currency.
        self._scale = float(max(np.abs(self.utility).max(), *(c.max() for c in self.costs), 1e-300))

    def _tables(self, P: Mapping[Profile, ArrayLike]) -> Floats:
        found = {}
        for b in itertools.product(*map(range, self.efforts)):
            if b not in P:
                raise ValueError(f"P lacks the effort profile {b}; every combination of efforts needs its table")
            found[b] = np.asarray(P[b], dtype=float)
        shapes = {table.shape for table in found.values()}
        if len(shapes) > 1 or len(P) > len(found):
            raise ValueError(f"P holds tables of one shape for the {len(found)} effort profiles, not {sorted(shapes)}")
        return np.stack(list(found.values())).reshape(*self.efforts, *shapes.pop())

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        costs: Sequence[ArrayLike],
        utility: ArrayLike,
        max_payment: float,
        *,
        pool: bool = True,
        outside: ArrayLike = 0.0,
        labels: Labels | None = None,
    ) -> Self:
        """The problem with P estimated from logged rounds.

        Args:
            counts: (*efforts, *signals, states) how often each was seen, at least once for each profile.
            pool: whether the state's distribution is that of all rounds together, since efforts cannot change it; a
                state that a profile never met then gets that profile's signals. False: frequencies as they are, as in
                the paper.
            costs, utility, max_payment, outside, labels: as for the class.

        Raises:
            ValueError: naming a profile without observations, and as for the class.
        """
        seen = np.array(counts, dtype=float)
        n = len(costs)
        if seen.ndim != 2 * n + 1 or not (np.isfinite(seen).all() and (seen >= 0).all()):
            raise ValueError(f"counts is a non-negative array (*efforts, *signals, states), not of shape {seen.shape}")
        flat = seen.reshape(math.prod(seen.shape[:n]), -1, seen.shape[-1])
        total = flat.sum((1, 2))
        if not total.all():
            b = tuple(int(k) for k in np.unravel_index(int(total.argmin()), seen.shape[:n]))
            raise ValueError(f"counts has no observation of the effort profile {b}: explore it")
        prior = flat.sum((0, 1)) / total.sum()
        state = flat.sum(1, keepdims=True)
        signal = flat.sum(2, keepdims=True) / total[:, None, None]
        given = np.where(state > 0, flat / np.where(state > 0, state, 1), signal)
        P = (given * prior).reshape(seen.shape)
        problem = cls(P, costs, utility, max_payment, outside=outside, labels=labels)
        if not pool:
            problem._flat = flat / total[:, None, None]
            problem.P = problem._flat.reshape(seen.shape)
        return problem

    @classmethod
    def from_yaml(cls, path: Path | str, **changes: Any) -> Self:
        """The problem in a file; `counterproof.incentives.read_instance` describes the format.

        Args:
            changes: arguments of the class in place of the file's, such as ``max_payment=2``.

        Raises:
            UserError: naming file, key and remedy.
        """
        from counterproof.incentives.instances import read_instance

        try:
            return cls(**{**read_instance(Path(path)), **changes})
        except UserError:
            raise
        except ValueError as problem:
            raise UserError(f"{path}: {problem}") from None

    # -- values --

    def decision_values(self) -> Floats:
        """(*efforts) expected utility of the best decision on all signals, U(b)."""
        best: Floats = (self._flat @ self.utility.T).max(-1).sum(-1).reshape(self.efforts)
        return best

    def decisions(self) -> Ints:
        """(*efforts, *signals) the best decision; on signals that cannot occur, the best one under the prior."""
        worth = self._flat @ self.utility.T
        best = np.where(self._flat.sum(-1) > 0, worth.argmax(-1), (self.utility @ self.prior).argmax())
        return best.reshape(*self.efforts, *self.signals)

    def first_best(self) -> float:
        """Value if efforts were seen and signals public: the best U(b) minus what the efforts cost the agents."""
        value = self.decision_values()
        for i, c in enumerate(self.costs):
            paid = np.maximum(c + self.outside[i], 0)
            value = value - paid.reshape([-1 if j == i else 1 for j in range(self.n_agents)])
        return float(value.max())

    def _profile(self, profile: Sequence[int]) -> Profile:
        chosen = tuple(int(b) for b in profile)
        if len(chosen) != self.n_agents or any(not 0 <= b < k for b, k in zip(chosen, self.efforts)):
            raise ValueError(f"a profile holds an effort index for each agent, below {self.efforts}, not {profile!r}")
        return chosen

    def _coordinates(self) -> tuple[Ints, ...]:
        return tuple(np.unravel_index(np.arange(math.prod(self.efforts)), self.efforts))

    def _others(self, i: int) -> Floats:
        """P as (profiles of the others, B_i, signals of the others, S_i, states)."""
        n = self.n_agents
        rest = [j for j in range(n) if j != i]
        moved = self.P.transpose(*rest, i, *(n + j for j in rest), n + i, 2 * n)
        behind = math.prod(self.signals) // self.signals[i]
        return moved.reshape(-1, self.efforts[i], behind, self.signals[i], self.n_states)


@dataclass(frozen=True, eq=False)
class Mechanism:
    """Recommendations, payments and decisions that the principal announces.

    Attributes:
        problem: what it was made for.
        kind: ``"own"``, ``"peer"`` or ``"correlated"``.
        mu: (*efforts) probability of recommending each profile.
        gamma: per agent (*efforts, *signals, states) its payment; 0 for profiles never recommended.
    """

    problem: InformationGame
    kind: Payments
    mu: Floats
    gamma: tuple[Floats, ...]
    _decisions: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_decisions", self.problem.decisions())

    @property
    def value(self) -> float:
        """The principal's expected utility minus payments when all obey."""
        return self.outcome().value

    @property
    def support(self) -> tuple[Profile, ...]:
        """Profiles that are recommended, the likeliest first."""
        found = [tuple(b) for b in np.argwhere(self.mu > 0).tolist()]
        return tuple(sorted(found, key=lambda b: -self.mu[b]))

    def payments(self, profile: Sequence[int]) -> Floats:
        """(agents, *signals, states) what each is paid when `profile` was recommended."""
        chosen = self.problem._profile(profile)
        return np.stack([g[chosen] for g in self.gamma])

    def decision(self, profile: Sequence[int], reports: Sequence[int]) -> int:
        """Index of the decision taken."""
        return int(self._decisions[(*self.problem._profile(profile), *map(int, reports))])

    def expected_payments(self) -> Floats:
        """(agents,) expected payment of each when all obey."""
        shape = (*self.mu.shape, *[1] * (self.problem.P.ndim - self.mu.ndim))
        weight = self.mu.reshape(shape) * self.problem.P
        return np.array([float((weight * g).sum()) for g in self.gamma])

    def mixed(self, alpha: float, rules: Sequence[ArrayLike]) -> "Mechanism":
        """Payments (1 - alpha) of this mechanism's plus alpha of the rules': per agent (|B_i|, |S_i|, states)."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha lies in [0, 1], not {alpha!r}")
        n = self.problem.n_agents
        gamma = []
        for i, rule in enumerate(rules):
            shape = [1] * (2 * n) + [self.problem.n_states]
            shape[i], shape[n + i] = self.problem.efforts[i], self.problem.signals[i]
            gamma.append((1 - alpha) * self.gamma[i] + alpha * np.asarray(rule, dtype=float).reshape(shape))
        return replace(self, gamma=tuple(gamma))

    # -- how agents take it --

    def _reward(self, truth: InformationGame, i: int, behaviour: Behaviour | None = None) -> Floats:
        """(B_i told, B_i chosen, S_i seen, S_i reported) agent i's expected pay, weighted by its probability."""
        Bi, Si, n = truth.efforts[i], truth.signals[i], truth.n_agents
        reward = np.zeros((Bi, Bi, Si, Si))
        for b in self.support:
            pay = np.moveaxis(self.gamma[i][b], i, 0).reshape(Si, -1)
            for effort in range(Bi):
                acted = [b[j] if behaviour is None else int(behaviour.efforts[j][b[j]]) for j in range(n)]
                acted[i] = effort
                seen = truth.P[tuple(acted)]
                if behaviour is not None:
                    seen = _reported(seen, b, behaviour, skip=i)
                reward[b[i], effort] += self.mu[b] * (np.moveaxis(seen, i, 0).reshape(Si, -1) @ pay.T)
        return reward

    def _told(self, i: int) -> Floats:
        """(B_i,) probability of each recommendation to agent i."""
        told: Floats = self.mu.sum(tuple(j for j in range(self.mu.ndim) if j != i))
        return told

    def deviations(self, truth: InformationGame | None = None) -> tuple[Deviation, ...]:
        """The most profitable deviation after each recommendation that is made, others obeying; gains may be below 0.

        Args:
            truth: the problem as it is; None: the one the mechanism was made for.
        """
        truth = truth or self.problem
        found = []
        for i in range(truth.n_agents):
            reward, told = self._reward(truth, i), self._told(i)
            honest = np.arange(truth.signals[i])
            for b in np.flatnonzero(told > 0):
                obey = np.trace(reward[b, b]) / told[b] - truth.costs[i][b]
                options = []
                for effort in range(truth.efforts[i]):
                    table = reward[b, effort]
                    reports = table.argmax(1)
                    worth = table.max(1).sum() / told[b] - truth.costs[i][effort]
                    if effort == b and (reports == honest).all():
                        # Obedience itself: the best lie is the one that costs least.
                        loss = np.diag(table)[:, None] - table + np.where(np.eye(len(table)) > 0, np.inf, 0)
                        if len(table) == 1:
                            continue
                        s, r = np.unravel_index(int(loss.argmin()), loss.shape)
                        reports, worth = honest.copy(), worth - loss.min() / told[b]
                        reports[s] = r
                    options.append(Deviation(i, int(b), effort, tuple(reports.tolist()), float(worth - obey)))
                options.append(Deviation(i, int(b), -1, tuple(honest.tolist()), float(truth.outside[i] - obey)))
                found.append(max(options, key=lambda option: option.gain))
        return tuple(found)

    def max_deviation_gain(self, truth: InformationGame | None = None) -> float:
        """The most any agent gains, given its recommendation, by another effort, other reports, both, or leaving.

        0 or less, to rounding: nobody does.

        Args:
            truth: the problem as it is; None: the one the mechanism was made for.
        """
        return max(deviation.gain for deviation in self.deviations(truth))

    def respond(self, truth: InformationGame | None = None) -> Behaviour:
        """How agents play that only look after themselves: an equilibrium reached by best responses from obedience.

        An agent stays with what it does unless another strategy gains more than rounding. Effort and reports only;
        nobody walks away.

        Args:
            truth: the problem as it is; None: the one the mechanism was made for.
        """
        truth = truth or self.problem
        behaviour = _obedience(truth)
        for _ in range(SWEEPS):
            moved = False
            for i in range(truth.n_agents):
                reward, told = self._reward(truth, i, behaviour), self._told(i)
                tie = TIE * truth._scale
                for b in np.flatnonzero(told > 0):
                    effort, reports = int(behaviour.efforts[i][b]), behaviour.reports[i][b]
                    now = reward[b, effort][np.arange(len(reports)), reports].sum() - told[b] * truth.costs[i][effort]
                    worth = reward[b].max(-1).sum(-1) - told[b] * truth.costs[i]
                    if worth.max() <= now + tie * told[b]:
                        continue
                    chosen = effort if worth[effort] > worth.max() - tie * told[b] else int(worth.argmax())
                    table = reward[b, chosen]
                    honest = np.diag(table) >= table.max(1) - tie * told[b]
                    behaviour.efforts[i][b] = chosen
                    behaviour.reports[i][b] = np.where(honest, np.arange(len(table)), table.argmax(1))
                    moved = True
            if not moved:
                return behaviour
        return replace(behaviour, settled=False)

    def outcome(self, truth: InformationGame | None = None, behaviour: Behaviour | None = None) -> Outcome:
        """What the principal gets.

        Args:
            truth: the problem as it is; None: the one the mechanism was made for.
            behaviour: of the agents; None: they obey.
        """
        truth = truth or self.problem
        utility = payments = disobedience = 0.0
        for b in self.support:
            acted = b if behaviour is None else tuple(int(behaviour.efforts[i][k]) for i, k in enumerate(b))
            heard = truth.P[acted]
            if behaviour is not None:
                heard = _reported(heard, b, behaviour)
            utility += self.mu[b] * float((heard * truth.utility[self._decisions[b]]).sum())
            payments += self.mu[b] * sum(float((heard * g[b]).sum()) for g in self.gamma)
            disobedience += float(self.mu[b]) * (acted != b)
        return Outcome(float(utility - payments), float(utility), float(payments), disobedience)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values: names, probabilities, and a row per recommendation, reports and state."""
        problem, names = self.problem, self.problem.labels
        recommended = []
        for b in self.support:
            rows = []
            for s in itertools.product(*map(range, problem.signals)):
                for state in range(problem.n_states):
                    rows.append(
                        {
                            "reports": [names.signals[i][k] for i, k in enumerate(s)],
                            "state": names.states[state],
                            "probability": float(problem.P[(*b, *s, state)]),
                            "payments": [float(g[(*b, *s, state)]) for g in self.gamma],
                            "decision": names.decisions[self.decision(b, s)],
                        }
                    )
            efforts = [names.efforts[i][k] for i, k in enumerate(b)]
            recommended.append({"efforts": efforts, "probability": float(self.mu[b]), "table": rows})
        outcome = self.outcome()
        return {
            "kind": self.kind,
            "value": outcome.value,
            "utility": outcome.utility,
            "first_best": problem.first_best(),
            "max_payment": problem.max_payment,
            "max_deviation_gain": self.max_deviation_gain(),
            "agents": list(names.agents),
            "expected_payments": self.expected_payments().tolist(),
            "recommendations": recommended,
        }


def _obedience(problem: InformationGame) -> Behaviour:
    efforts = tuple(np.arange(k) for k in problem.efforts)
    reports = tuple(np.tile(np.arange(s), (k, 1)) for k, s in zip(problem.efforts, problem.signals))
    return Behaviour(efforts, reports)


def _reported(seen: Floats, b: Profile, behaviour: Behaviour, skip: int | None = None) -> Floats:
    """The distribution of reports (and of agent `skip`'s own signal) from that of signals, after recommendation b."""
    for i, told in enumerate(b):
        reports = behaviour.reports[i][told]
        if i == skip or (reports == np.arange(len(reports))).all():
            continue
        send = np.zeros((len(reports), len(reports)))
        send[np.arange(len(reports)), reports] = 1
        seen = np.moveaxis(np.tensordot(seen, send, (i, 0)), -1, i)
    return seen
