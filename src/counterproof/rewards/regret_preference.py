"""Regret preference model: people prefer the segment that wastes less, not the one that collects more.

Paper: arXiv 2206.02231 (Knox, Hatgis-Kessell, Booth, Niekum, Stone, Allievi: Models of human preference for learning
reward functions; TMLR 2024).
Read beside: Stephanehk/Regret_Based_Reward_Learning (early files; emptied since) and its successor
Stephanehk/Learning-OA-From-Prefs at 2de458b: preference models, learner, policy set, random grids, defaults.
Deviations: (1) the learner starts at zero weights, not at random ones; (2) the loss is computed from logits by a
log-sigmoid instead of from probabilities clamped at 1e-35, so badly predicted pairs keep their gradient; (3) values
and successor features are solved to rounding error (policy iteration, linear systems) instead of swept until changes
fall below 1e-3, and they count the features of the step that enters a terminal state, which the successor repository
drops; (4) `withhold` removes every policy that is optimal under the withheld reward, the repository only those with
identical successor features; (5) segments are sampled independently, not drawn from an enumeration of distinct pairs.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from counterproof.errors import extra

with extra("rewards"):
    import torch
    from torch import Tensor

__all__ = [
    "DescriptivePreference",
    "PartialReturnPreference",
    "RegretPreference",
    "RewardLearner",
    "SegmentPairs",
    "Segments",
    "TabularMDP",
    "gpi_value",
    "preference_loss",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Form = Literal["auto", "deterministic", "general"]
Rng = int | np.random.Generator | None

TIE = 1e-10  # two action values closer than this share of the largest one are equal
CHUNK = 2_000_000  # entries of the largest array of a batch of linear systems: 16 MB
SWEEPS = 100_000  # of value iteration without discount before it is given up


@dataclass(frozen=True, eq=False)
class Segments:
    """Trajectory segments of one length.

    Args:
        states: (n, L + 1) state indices s_0 .. s_L.
        actions: (n, L) action indices; -1 where no step is taken because the segment has ended: the state repeats.
            Steps out of a terminal state count as absorbing padding, whatever their action.
    """

    states: Ints
    actions: Ints

    def __post_init__(self) -> None:
        states, actions = np.asarray(self.states), np.asarray(self.actions)
        if states.ndim != 2 or actions.shape != (len(states), states.shape[1] - 1) or not actions.shape[1]:
            raise ValueError(
                f"segments have states (n, L + 1) and actions (n, L), L >= 1, not {states.shape} and {actions.shape}"
            )
        if not (np.issubdtype(states.dtype, np.integer) and np.issubdtype(actions.dtype, np.integer)):
            raise ValueError(f"states and actions are integer indices, not {states.dtype} and {actions.dtype}")
        object.__setattr__(self, "states", states.astype(np.int64, copy=False))
        object.__setattr__(self, "actions", actions.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> "Segments":
        return Segments(self.states[index], self.actions[index])


@dataclass(frozen=True, eq=False)
class SegmentPairs:
    """Pairs of segments to compare; a label is the probability that ``first`` is preferred."""

    first: Segments
    second: Segments

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second):
            raise ValueError(f"pairs need as many first as second segments, not {len(self.first)}, {len(self.second)}")

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: Any) -> "SegmentPairs":
        return SegmentPairs(self.first[index], self.second[index])

    def swapped(self) -> "SegmentPairs":
        """The same pairs in the other order; their labels are one minus the labels."""
        return SegmentPairs(self.second, self.first)


class TabularMDP:
    """A finite Markov decision process whose reward is linear in features, r(s, a, s') = w . phi(s, a, s').

    Args:
        P: (S, A, S) transition probabilities P[s, a, s'].
        phi: (S, A, S, k) features of transitions.
        terminal: (S,) bool, states that end the episode; what P and phi say of leaving them is replaced by staying
            with zero features. None: no state does.
        gamma: discount in [0, 1]. The paper's theory has none, its code 0.999 so that values stay finite. With 1 every
            state must be able to reach a terminal one.
        start: (S,) distribution of start states; None: uniform over the non-terminal ones, as in the code.
        reward: (k,) weights of the environment's own reward, where it has one; only kept.

    Attributes:
        features: (S, A, k) expected features of a state and action.
        deterministic: whether each state and action has one successor.

    Raises:
        ValueError: for arrays that do not fit, are not distributions or not finite, and for gamma = 1 with a state
            that cannot reach a terminal one.
    """

    def __init__(
        self,
        P: ArrayLike,
        phi: ArrayLike,
        terminal: ArrayLike | None = None,
        *,
        gamma: float = 0.999,
        start: ArrayLike | None = None,
        reward: ArrayLike | None = None,
    ) -> None:
        P, phi = np.array(P, dtype=float), np.array(phi, dtype=float)
        if P.ndim != 3 or P.shape[0] != P.shape[2] or not P.size:
            raise ValueError(f"P has shape (states, actions, states), not {P.shape}")
        if phi.ndim != 4 or phi.shape[:3] != P.shape or not phi.shape[3]:
            raise ValueError(f"phi has shape {P.shape} plus the number of features, not {phi.shape}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma lies in [0, 1], not {gamma!r}")
        S = len(P)
        ends = np.zeros(S, bool) if terminal is None else np.array(terminal, dtype=bool)
        if ends.shape != (S,) or ends.all():
            raise ValueError(f"terminal marks some but not all of the {S} states, not {ends.shape} with {ends.sum()}")
        P[ends], phi[ends] = 0.0, 0.0
        P[ends, :, np.flatnonzero(ends)] = 1.0
        if not (np.isfinite(P).all() and (P >= 0).all()):
            raise ValueError("P holds a negative or non-finite entry; it needs probabilities")
        total = P.sum(2)
        if (wrong := np.argwhere(np.abs(total - 1) > 1e-8)).size:
            s, a = wrong[0]
            raise ValueError(
                f"P[{s}, {a}] sums to {total[s, a]:.6g}, not 1: give every state and action a distribution"
            )
        if not np.isfinite(phi[P > 0]).all():
            raise ValueError("phi holds a non-finite entry on a possible transition")
        phi[P == 0] = 0.0
        self.P, self.phi, self.terminal, self.gamma = P, phi, ends, float(gamma)
        self.n_states, self.n_actions, self.n_features = S, P.shape[1], phi.shape[3]
        self.features: Floats = np.einsum("ijt,ijtk->ijk", P, phi)
        self.deterministic = bool((P.max(2) > 1 - 1e-12).all())
        self._inner = np.flatnonzero(~ends)
        self._P_inner = np.ascontiguousarray(P[np.ix_(self._inner, np.arange(P.shape[1]), self._inner)])
        self.start: Floats = ~ends / (~ends).sum() if start is None else np.array(start, dtype=float)
        if self.start.shape != (S,) or not ((self.start >= 0).all() and abs(self.start.sum() - 1) < 1e-8):
            raise ValueError(f"start is a distribution over {S} states, not {self.start}")
        self.reward = None if reward is None else self._weights(reward)
        if gamma == 1:
            can = _reaches(P.max(1) > 0, ends)
            if not can.all():
                raise ValueError(
                    f"state {int(np.flatnonzero(~can)[0])} cannot reach a terminal state: its value is not finite "
                    f"without discount; mark terminal states or choose gamma < 1"
                )

    @classmethod
    def from_gymnasium(cls, env: Any, *, features: ArrayLike | None = None, gamma: float = 0.999) -> Self:
        """The MDP of an environment with a transition table: FrozenLake, CliffWalking, Taxi, or anything alike.

        Args:
            env: an object (or a wrapper with ``.unwrapped``) with ``P[s][a] = [(probability, next state, reward,
                terminated), ...]``, and possibly ``initial_state_distrib``. gymnasium itself is not needed.
            features: (S, A, S, k) features; None: one indicator per distinct reward of the table, so that the
                environment's own reward is ``mdp.reward``. Where one transition has several rewards they share it by
                probability.

        A state that is only ever entered with ``terminated`` is terminal. If the table ends the episode in a state
        that it also passes through, a further absorbing state is added and those endings lead there.

        Raises:
            ValueError: when there is no such table, or it does not make an MDP.
        """
        table = getattr(getattr(env, "unwrapped", env), "P", None)
        if not isinstance(table, Mapping) or not table or set(table) != set(range(len(table))):
            raise ValueError(
                f"{type(env).__name__} has no transition table P: {{state: {{action: [...]}}}}, states 0, 1, ..."
            )
        S, A = len(table), len(table[0])
        if any(set(table[s]) != set(range(A)) for s in table):
            raise ValueError(f"every state of P needs the actions 0 to {A - 1}")
        steps = [
            (s, a, float(p), int(t), float(r), bool(end))
            for s in range(S)
            for a in range(A)
            for p, t, r, end in table[s][a]
            if p > 0
        ]
        if any(not 0 <= t < S for _, _, _, t, _, _ in steps):
            raise ValueError(f"P leads to a state outside 0 to {S - 1}")
        ends = {t for *_, t, _, end in steps if end}
        # A terminal state's own row is no passing through: the tables keep such rows as if the state were ordinary.
        mixed: set[int] = set()
        while more := {t for s, _, _, t, _, end in steps if not end and s not in ends - mixed} & (ends - mixed):
            mixed |= more
        n = S + bool(mixed)
        levels = sorted({r for s, *_, r, _ in steps if s not in ends or s in mixed})
        P, phi = np.zeros((n, A, n)), np.zeros((n, A, n, len(levels)))
        for s, a, p, t, r, end in steps:
            if s in ends - mixed:
                continue
            to = S if end and t in mixed else t
            P[s, a, to] += p
            phi[s, a, to, levels.index(r)] += p
        phi /= np.where(P > 0, P, 1)[..., None]
        terminal = np.isin(np.arange(n), [*(ends - mixed), *([S] if mixed else [])])
        P[terminal, :, np.flatnonzero(terminal)] = 1
        reward: ArrayLike | None = levels
        if features is not None:
            given = np.array(features, dtype=float)
            if given.ndim != 4 or given.shape[:3] != (S, A, S):
                raise ValueError(f"features have shape {(S, A, S)} plus the number of features, not {given.shape}")
            phi = np.zeros((n, A, n, given.shape[3]))
            phi[:S, :, :S] = given
            for s, a, _, t, _, end in steps:
                if end and t in mixed:
                    phi[s, a, S] = given[s, a, t]
            reward = None
        start = getattr(getattr(env, "unwrapped", env), "initial_state_distrib", None)
        if start is not None:
            start = np.concatenate([np.asarray(start, dtype=float), np.zeros(n - S)])
        return cls(P, phi, terminal, gamma=gamma, start=start, reward=reward)

    def _weights(self, w: ArrayLike) -> Floats:
        """Reward weights as an array (k,) or (m, k). Raises ValueError when they do not fit."""
        weights = np.array(w, dtype=float)
        if weights.ndim not in (1, 2) or weights.shape[-1] != self.n_features or not np.isfinite(weights).all():
            raise ValueError(f"w holds {self.n_features} finite weights, not an array of shape {weights.shape}: {w!r}")
        return weights

    # -- values --

    def optimal_values(self, w: ArrayLike) -> tuple[Floats, Floats]:
        """V* and Q* of the reward w . phi.

        Policy iteration, exact to rounding; without discount, value iteration from zero.

        Args:
            w: (k,) weights, or (m, k) for m rewards at once.

        Returns:
            V (S,) and Q (S, A), with a leading m for a batch; zero at terminal states.

        Raises:
            ValueError: with gamma = 1, when values do not settle because a cycle collects reward.
        """
        weights = self._weights(w)
        reward = np.einsum("ijk,mk->mij", self.features[self._inner], np.atleast_2d(weights))
        Q = np.zeros((len(reward), self.n_states, self.n_actions))
        Q[:, self._inner] = self._value_iteration(reward) if self.gamma == 1 else self._policy_iteration(reward)[0]
        Q = Q if weights.ndim == 2 else Q[0]
        V: Floats = Q.max(-1)
        return V, Q

    def _backup(self, reward: Floats, V: Floats) -> Floats:
        """Q (m, N, A) of rewards (m, N, A) and next values (m, N), over non-terminal states."""
        later: Floats = (V @ self._P_inner.reshape(-1, len(self._inner)).T).reshape(reward.shape)
        return reward + self.gamma * later

    def _policy_iteration(self, reward: Floats, policy: Ints | None = None) -> tuple[Floats, Ints]:
        """Howard's policy iteration over non-terminal states, from a policy (m, N) if given: Q (m, N, A), policy."""
        m, N, _ = reward.shape
        if policy is None:
            V = np.zeros((m, N))
            for _ in range(20):  # a rough start, cheaper than the linear systems it saves
                V = self._backup(reward, V).max(2)
            policy = self._backup(reward, V).argmax(2)
        Q, policy, row = np.empty_like(reward), policy.copy(), np.arange(N)
        # A change must gain more than the error of the linear system, or rounding could make policies cycle.
        tie = max(TIE, 1e-14 / (1 - self.gamma))
        active = np.arange(m)
        while active.size:
            still = []
            for block in np.array_split(active, -(-active.size * N * N // CHUNK)):
                chosen = policy[block]
                system = np.eye(N) - self.gamma * self._P_inner[row, chosen]
                gained = np.take_along_axis(reward[block], chosen[..., None], 2)
                Q[block] = self._backup(reward[block], np.linalg.solve(system, gained)[..., 0])
                best = Q[block].argmax(2)
                gain = Q[block].max(2) - np.take_along_axis(Q[block], chosen[..., None], 2)[..., 0]
                better = gain > tie * np.abs(Q[block]).max((1, 2))[:, None]
                policy[block] = np.where(better, best, chosen)
                still.append(block[better.any(1)])
            active = np.concatenate(still)
        return Q, policy

    def _value_iteration(self, reward: Floats) -> Floats:
        V = np.zeros(reward.shape[:2])
        for _ in range(SWEEPS):
            Q = self._backup(reward, V)
            new = Q.max(2)
            if np.abs(new - V).max() <= 1e-13 * max(np.abs(new).max(), 1e-300):
                return Q
            V = new
        raise ValueError("without discount the optimal values do not settle: a cycle collects reward; choose gamma < 1")

    def greedy_policy(self, w: ArrayLike) -> Floats:
        """The optimal policy of w, (S, A) or (m, S, A): uniform over the best actions, ties included."""
        return _greedy(self.optimal_values(w)[1])

    def successor_features(self, policy: ArrayLike) -> tuple[Floats, Floats]:
        """Expected discounted sums of features under a policy.

        They solve psi = phi_pi + gamma P_pi psi, so that w . psi is the policy's value under every reward w.

        Args:
            policy: (S, A) action probabilities, or (m, S, A) for m policies.

        Returns:
            psi of states (S, k) and of states and actions (S, A, k), with a leading m for a batch.

        Raises:
            ValueError: for a policy of another shape or not made of distributions, and with gamma = 1 for one that
                may never end the episode.
        """
        pi = np.asarray(policy, dtype=float)
        if pi.ndim not in (2, 3) or pi.shape[-2:] != (self.n_states, self.n_actions):
            raise ValueError(f"a policy has shape {(self.n_states, self.n_actions)}, not {pi.shape}")
        if not ((pi >= 0).all() and np.allclose(pi.sum(-1), 1, atol=1e-8)):
            raise ValueError("a policy gives every state a distribution over actions")
        batch = pi.reshape(-1, self.n_states, self.n_actions)
        N, inner = len(self._inner), self._inner
        psi = np.zeros((len(batch), self.n_states, self.n_features))
        for block in np.array_split(np.arange(len(batch)), max(1, -(-len(batch) * N * N // CHUNK))):
            chosen = batch[block][:, inner]
            moves = np.einsum("msa,sat->mst", chosen, self._P_inner, optimize=True)
            if self.gamma == 1:
                for one in moves:
                    if not _reaches(one > 0, one.sum(1) < 1 - 1e-12).all():
                        raise ValueError("the policy may never end the episode: no finite value without discount")
            expected = np.einsum("msa,sak->msk", chosen, self.features[inner])
            psi[np.ix_(block, inner)] = np.linalg.solve(np.eye(N) - self.gamma * moves, expected)
        per_action = self.features + self.gamma * np.einsum("sat,mtk->msak", self.P, psi, optimize=True)
        per_action[:, self.terminal] = 0.0
        lead = pi.shape[:-2]
        return psi.reshape(lead + psi.shape[1:]), per_action.reshape(lead + per_action.shape[1:])

    def expected_return(self, policy: ArrayLike, w: ArrayLike) -> float:
        """Expected discounted return of a policy (S, A) under the reward w (k,), from the start distribution."""
        return float(self.start @ self.successor_features(policy)[0] @ self._weights(w))

    def scaled_return(self, policy: ArrayLike, w: ArrayLike) -> float:
        """Return of a policy (S, A) under the reward w (k,): 1 is optimal, 0 that of uniformly random actions.

        Above 0.9 the paper calls a policy near-optimal; below 0 it is worse than random.

        Raises:
            ValueError: when random actions are optimal, so that there is no scale.
        """
        weights = self._weights(w)
        random = self.expected_return(np.full((self.n_states, self.n_actions), 1 / self.n_actions), weights)
        best = float(self.start @ self.optimal_values(weights)[0])
        if best - random <= 1e-9 * max(abs(best), abs(random)):
            raise ValueError("random actions are optimal under w: scaled return is not defined")
        return (self.expected_return(policy, weights) - random) / (best - random)

    # -- segments --

    def check_segments(self, segments: Segments) -> None:
        """Raises ValueError, naming segment and step, unless the segments are possible in this MDP."""
        s, a, t = segments.states[:, :-1], segments.actions, segments.states[:, 1:]
        if len(segments) == 0:
            raise ValueError("there are no segments")
        if segments.states.min() < 0 or segments.states.max() >= self.n_states:
            raise ValueError(f"segments visit states outside 0 to {self.n_states - 1}")
        if a.min() < -1 or a.max() >= self.n_actions:
            raise ValueError(f"segments take actions outside 0 to {self.n_actions - 1} (-1: no step)")
        possible = np.where(a < 0, s == t, self.P[s, a, t] > 0)
        if (wrong := np.argwhere(~possible)).size:
            i, j = wrong[0]
            raise ValueError(
                f"segment {i}, step {j}: the MDP has no transition from state {s[i, j]} by action {a[i, j]} "
                f"to state {t[i, j]}"
            )

    def segment_features(self, segments: Segments) -> Floats:
        """(n, k) undiscounted sums of the features along segments."""
        self.check_segments(segments)
        taken = self.phi[segments.states[:, :-1], segments.actions, segments.states[:, 1:]]
        total: Floats = np.einsum("nlk,nl->nk", taken, segments.actions >= 0)
        return total

    def partial_return(self, segments: Segments, w: ArrayLike) -> Floats:
        """Rewards collected along segments, undiscounted: (n,) for w (k,), (m, n) for w (m, k)."""
        return self._weights(w) @ self.segment_features(segments).T

    def regret(self, segments: Segments, w: ArrayLike, form: Form = "auto") -> Floats:
        """How much segments fall short of optimal behaviour under w: (n,) for w (k,), (m, n) for w (m, k).

        Args:
            form: ``"deterministic"`` V*(s_0) - (partial return + V*(s_L)), which blames luck as well where transitions
                are random, and telescopes up to O(1 - gamma); ``"general"`` the sum of V*(s_t) - Q*(s_t, a_t), never
                negative; ``"auto"`` the first where the MDP is deterministic, as the paper does.
        """
        form = self._form(form)
        self.check_segments(segments)
        V, Q = self.optimal_values(w)
        s, a = segments.states[:, :-1], segments.actions
        lost: Floats
        if form == "general":
            lost = ((V[..., s] - Q[..., s, a]) * (a >= 0)).sum(-1)
        else:
            lost = V[..., s[:, 0]] - self.partial_return(segments, w) - V[..., segments.states[:, -1]]
        return lost

    def _form(self, form: str) -> Literal["deterministic", "general"]:
        """The form of regret that ``form`` means here. Raises ValueError for another word."""
        if form not in get_args(Form):
            raise ValueError(f"form is one of {get_args(Form)}, not {form!r}")
        if form == "auto":
            return "deterministic" if self.deterministic else "general"
        return form  # type: ignore[return-value]

    def sample_segments(self, n: int, length: int = 3, *, rng: Rng = None, absorbing: bool = True) -> Segments:
        """n segments of uniformly random actions from uniformly drawn non-terminal states that can be reached.

        Args:
            length: steps of a segment; the paper's have 3.
            rng: seed or generator.
            absorbing: keep segments that end early, padded with zero-reward steps in the terminal state (action -1);
                otherwise draw again until every step is a real one. This changes what partial return can tell:
                padding shows how long a segment lasted.

        Raises:
            ValueError: for n or length below 1, or when (hardly) no segment has that many real steps.
        """
        generator, ends = np.random.default_rng(rng), self.terminal
        if n < 1 or length < 1:
            raise ValueError(f"n and length are at least 1, not {n!r} and {length!r}")
        starts = np.flatnonzero(_reaches((self.P.max(1) > 0).T, self.start > 0) & ~ends)
        kept: list[Segments] = []
        missing = n
        for _ in range(1000):
            states = np.empty((missing, length + 1), np.int64)
            actions = generator.integers(self.n_actions, size=(missing, length))
            states[:, 0] = generator.choice(starts, missing)
            for t in range(length):
                odds = self.P[states[:, t], actions[:, t]].cumsum(1)
                draw = generator.random((missing, 1)) * odds[:, -1:]
                states[:, t + 1] = (draw >= odds).sum(1)
            early = ends[states[:, :-1]]
            actions[early] = -1
            keep = slice(None) if absorbing else ~early.any(1)
            kept.append(Segments(states[keep], actions[keep]))
            missing -= len(kept[-1])
            if not missing:
                return _concatenate(kept)
        raise ValueError(f"found {n - missing} of {n} segments with {length} real steps; choose a smaller length")

    def sample_segment_pairs(self, n: int, length: int = 3, *, rng: Rng = None, absorbing: bool = True) -> SegmentPairs:
        """n pairs of independent segments; arguments as in `sample_segments`."""
        both = self.sample_segments(2 * n, length, rng=rng, absorbing=absorbing)
        return SegmentPairs(both[:n], both[n:])

    def enumerate_segments(self, length: int, *, absorbing: bool = True, limit: int = 1_000_000) -> Segments:
        """All possible segments from non-terminal states; ``absorbing`` as in `sample_segments`.

        Raises:
            ValueError: when there are more than ``limit`` of them, or none.
        """
        states, actions = self._inner[:, None], np.empty((len(self._inner), 0), np.int64)
        follow = self.P > 0
        for _ in range(length):
            over = self.terminal[states[:, -1]]
            which, action, to = np.nonzero(follow[states[~over, -1]])
            which = np.flatnonzero(~over)[which]
            states, actions = (
                np.concatenate([states[which], *([states[over]] if absorbing else [])]),
                np.concatenate([actions[which], *([actions[over]] if absorbing else [])]),
            )
            padding = len(states) - len(which)
            to = np.concatenate([to, states[len(which) :, -1]])
            action = np.concatenate([action, np.full(padding, -1)])
            states, actions = np.c_[states, to], np.c_[actions, action]
            if not 0 < len(states) <= limit:
                raise ValueError(f"{len(states)} segments of length {length}: choose another length or limit ({limit})")
        return Segments(states, actions)


def _reaches(edge: NDArray[np.bool_], goal: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which nodes have a path to a goal node; edge[s, t] is an edge from s to t."""
    found = goal.copy()
    while True:
        more = found | edge[:, found].any(1)
        if (more == found).all():
            return found
        found = more


def _greedy(Q: Floats) -> Floats:
    slack = TIE * np.abs(Q).max((-2, -1), keepdims=True)
    best = (Q.max(-1, keepdims=True) - Q <= slack).astype(float)
    policy: Floats = best / best.sum(-1, keepdims=True)
    return policy


def _concatenate(parts: Sequence[Segments]) -> Segments:
    return Segments(np.concatenate([p.states for p in parts]), np.concatenate([p.actions for p in parts]))


def _check_labels(pairs: SegmentPairs, y: ArrayLike) -> Floats:
    labels = np.array(y, dtype=float)
    if len(pairs) == 0:
        raise ValueError("there are no pairs to learn from")
    if labels.shape != (len(pairs),):
        raise ValueError(f"{len(pairs)} pairs need {len(pairs)} labels, not an array of shape {labels.shape}")
    if not ((labels >= 0) & (labels <= 1)).all():
        bad = labels[~((labels >= 0) & (labels <= 1))][0]
        raise ValueError(f"a label is the probability that the first segment is preferred, in [0, 1], not {bad}")
    return labels


def _cross_entropy(logit: Floats, y: Floats) -> float:
    return float(np.mean(y * np.logaddexp(0, -logit) + (1 - y) * np.logaddexp(0, logit)))


class _Preference:
    """P(first preferred) = sigmoid(u(first) - u(second)) with a utility linear in statistics of a segment."""

    coef_: Floats

    def __init__(self, mdp: TabularMDP, w: ArrayLike, *, coef: ArrayLike, decimals: int | None = 2) -> None:
        self.mdp, self.w, self.decimals = mdp, mdp._weights(w), decimals
        if self.w.ndim != 1:
            raise ValueError(f"a preference model has one reward, w of shape ({mdp.n_features},), not {self.w.shape}")
        self.coef_ = np.atleast_1d(np.array(coef, dtype=float))

    def statistics(self, segments: Segments) -> Floats:
        """(n, m): what the utility is a weighted sum of, higher is better."""
        raise NotImplementedError

    def utility(self, segments: Segments) -> Floats:
        """(n,): what preferences compare, higher is better."""
        return self.statistics(segments) @ self.coef_

    def logit(self, pairs: SegmentPairs) -> Floats:
        """(n,) log-odds that the first segment is preferred."""
        return self.utility(pairs.first) - self.utility(pairs.second)

    def probability(self, pairs: SegmentPairs) -> Floats:
        """(n,) probabilities that the first segment is preferred."""
        return np.exp(-np.logaddexp(0, -self.logit(pairs)))

    def label(self, pairs: SegmentPairs, noise: Literal["logistic"] | None = "logistic", *, rng: Rng = None) -> Floats:
        """(n,) labels: 1 where the first segment is preferred, 0 where the second is.

        Args:
            noise: ``"logistic"`` draws from `probability`; None prefers the higher utility, ties are 0.5.
            rng: seed or generator of the draws.

        Utilities are first rounded to ``decimals`` (the code's two for regret), so that rounding error is no
        preference; with ``decimals=None`` only differences of a 1e-9 share of the largest utility are ties.
        """
        if noise not in ("logistic", None):
            raise ValueError(f"noise is 'logistic' or None, not {noise!r}")
        first, second = self.utility(pairs.first), self.utility(pairs.second)
        if self.decimals is not None:
            first, second = np.round(first, self.decimals), np.round(second, self.decimals)
        gap = first - second
        if noise == "logistic":
            odds = np.exp(-np.logaddexp(0, -gap))
            return (np.random.default_rng(rng).random(len(gap)) < odds).astype(float)
        gap[np.abs(gap) <= 1e-9 * max(np.abs(first).max(initial=0), np.abs(second).max(initial=0))] = 0
        return (np.sign(gap) + 1) / 2

    def fit(self, pairs: SegmentPairs, y: ArrayLike) -> Self:
        """Fit the weights ``coef_`` of the statistics to labels by maximum likelihood; returns self.

        A single weight, the scale of a model, stays positive. Weights are bounded at 1e4 over the largest difference
        of their statistic, which only separable labels reach.
        """
        labels = _check_labels(pairs, y)
        gap = self.statistics(pairs.first) - self.statistics(pairs.second)
        size = np.abs(gap).max(0)
        size[size == 0] = 1
        gap = gap / size
        lowest = 1e-6 if gap.shape[1] == 1 else -1e4

        def objective(coef: Floats) -> tuple[float, Floats]:
            logit = gap @ coef
            slope = (np.exp(-np.logaddexp(0, -logit)) - labels) @ gap / len(gap)
            return _cross_entropy(logit, labels), slope

        found = minimize(
            objective,
            np.ones(gap.shape[1]),
            jac=True,
            method="L-BFGS-B",
            bounds=[(lowest, 1e4)] * gap.shape[1],
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 100_000},
        )
        self.coef_ = found.x / size
        return self


class PartialReturnPreference(_Preference):
    """The usual model: P(first preferred) = sigmoid(scale (partial return of first - partial return of second)).

    Args:
        mdp: the MDP the segments come from.
        w: (k,) weights of the reward that the person has in mind.
        scale: positive factor of the difference (an inverse temperature); `fit` fits it to labels.
        decimals: rounding of utilities when labels are drawn.
    """

    def __init__(self, mdp: TabularMDP, w: ArrayLike, *, scale: float = 1.0, decimals: int | None = 2) -> None:
        super().__init__(mdp, w, coef=scale, decimals=decimals)

    def statistics(self, segments: Segments) -> Floats:
        return self.mdp.partial_return(segments, self.w)[:, None]


class RegretPreference(_Preference):
    """The paper's model: P(first preferred) = sigmoid(scale (regret of second - regret of first)).

    Args:
        mdp, w, scale, decimals: as in `PartialReturnPreference`.
        form: which regret, as in `TabularMDP.regret`.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        w: ArrayLike,
        *,
        form: Form = "auto",
        scale: float = 1.0,
        decimals: int | None = 2,
    ) -> None:
        super().__init__(mdp, w, coef=scale, decimals=decimals)
        self.form = mdp._form(form)

    def statistics(self, segments: Segments) -> Floats:
        return -self.mdp.regret(segments, self.w, self.form)[:, None]


class DescriptivePreference(_Preference):
    """The family both belong to: logit weights[0] PR + weights[1] V*(s_L) - weights[2] V*(s_0), differences of pairs.

    Args:
        mdp, w, decimals: as in `PartialReturnPreference`.
        weights: (w_r, w_T, w_0); (1, 1, 1) is deterministic regret, (1, 0, 0) partial return; `fit` fits all three.
    """

    def __init__(
        self, mdp: TabularMDP, w: ArrayLike, *, weights: ArrayLike = (1.0, 1.0, 1.0), decimals: int | None = 2
    ) -> None:
        super().__init__(mdp, w, coef=weights, decimals=decimals)
        if self.coef_.shape != (3,):
            raise ValueError(f"weights are three numbers (w_r, w_T, w_0), not {weights!r}")

    def statistics(self, segments: Segments) -> Floats:
        V = self.mdp.optimal_values(self.w)[0]
        collected = self.mdp.partial_return(segments, self.w)
        return np.stack([collected, V[segments.states[:, -1]], -V[segments.states[:, 0]]], 1)


def preference_loss(
    model: "_Preference | RewardLearner",
    dataset: tuple[SegmentPairs, ArrayLike],
    *,
    folds: int | None = None,
    rng: Rng = 0,
) -> float:
    """Mean cross-entropy of a preference model on labelled pairs; 0.693 is chance.

    Args:
        model: a preference model, or a fitted `RewardLearner`.
        dataset: pairs and their labels, (n,) in [0, 1].
        folds: refit the model's weights (its scale) without each of so many random parts, and score that part: how the
            paper compares models on people's labels, with 10. The model itself is left as it is. None: as it is.
        rng: seed or generator of the parts.

    Raises:
        ValueError: for labels outside [0, 1], no pairs, or more folds than pairs.
        TypeError: for folds with a `RewardLearner`, which has no scale to refit.
    """
    pairs, y = dataset
    labels = _check_labels(pairs, y)
    if folds is None:
        return _cross_entropy(model.logit(pairs), labels)
    if not isinstance(model, _Preference):
        raise TypeError(
            "folds refit the scale of a preference model; a RewardLearner is scored on pairs it has not seen"
        )
    if not 2 <= folds <= len(pairs):
        raise ValueError(f"folds lie between 2 and the {len(pairs)} pairs, not {folds!r}")
    logit, order = np.empty(len(pairs)), np.random.default_rng(rng).permutation(len(pairs))
    for part in np.array_split(order, folds):
        rest = np.setdiff1d(order, part)
        logit[part] = copy.copy(model).fit(pairs[rest], labels[rest]).logit(pairs[part])
    return _cross_entropy(logit, labels)


def gpi_value(psi: Tensor, w: Tensor, temperature: float = 1e-3) -> Tensor:
    """Optimal values approximated by generalised policy improvement, differentiable in w.

    sum_k softmax_k(v_k / temperature) v_k with v_k = w . psi_k; never above the best policy's value.

    Args:
        psi: (K, ..., k) successor features of K policies.
        w: (k,) reward weights.
        temperature: tau; towards 0 the best policy's value, when large the mean over policies.

    Returns:
        (...) values.
    """
    v = psi @ w
    return ((v / temperature).softmax(0) * v).sum(0)


class RewardLearner:
    """Learn a reward, linear in features, from labelled pairs of segments (the paper's Algorithm 1).

    With ``model="regret"`` the logit of a pair holds optimal values of the very reward that is learned. They are
    approximated by generalised policy improvement, V_w(s) = sum_k softmax_k(w . psi_k(s) / temperature) w . psi_k(s)
    over the successor features psi_k of policies that are optimal for random rewards, and likewise Q_w; or computed
    exactly at each step, with the gradient psi of the greedy policy (envelope theorem). Full-batch Adam on the
    cross-entropy, from zero weights. Has scikit-learn's ``get_params`` and ``set_params``; `fit` takes the MDP first.

    Args:
        model: ``"regret"`` or ``"partial_return"`` (logistic regression on differences of segment features).
        value: ``"gpi"`` as in the paper, or ``"exact"``. Ignored by partial return, like the next five.
        form: ``"deterministic"``, ``"general"`` (per step; needed where transitions are random) or ``"auto"``.
        n_policies: size of the policy set; it stays smaller where 100 draws gave nothing new.
        temperature: of the softmax over policies (tau).
        levels: what the entries of the random reward vectors are drawn from.
        withhold: (k,) weights of a reward whose optimal policies are left out of the set: the true reward in an
            experiment, so that the answer cannot be read off the set. None: nothing is left out.
        learning_rate: of Adam; the repository's default, its scripts use 2.
        epochs: full-batch steps; the repository's scripts use 1000, its default is 5000.
        swap: train on each pair in both orders, as the code does; the loss is the same without.
        random_state: seed or generator of the random rewards.

    Attributes:
        reward_: (k,) learned weights: those of the lowest training loss for regret, the last ones for partial return.
        policy_: (S, A) optimal policy of ``reward_``, uniform over ties.
        preference_: the preference model of ``reward_``, with exact values; used to predict.
        loss_: training loss of ``reward_``.
        loss_curve_: (epochs,) training loss before each step.
    """

    def __init__(
        self,
        model: Literal["regret", "partial_return"] = "regret",
        *,
        value: Literal["gpi", "exact"] = "gpi",
        form: Form = "auto",
        n_policies: int = 100,
        temperature: float = 1e-3,
        levels: Sequence[float] = (50, -50, 1, -1, -2, 0, -10, 10, 5),
        withhold: ArrayLike | None = None,
        learning_rate: float = 0.5,
        epochs: int = 1000,
        swap: bool = True,
        random_state: Rng = None,
    ) -> None:
        self.model = model
        self.value = value
        self.form = form
        self.n_policies = n_policies
        self.temperature = temperature
        self.levels = levels
        self.withhold = withhold
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.swap = swap
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, as scikit-learn wants them; ``deep`` makes no difference."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change constructor arguments. Raises ValueError for a name that is none."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"RewardLearner has no parameter {name!r}; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        default = inspect.signature(type(self)).parameters
        changed = (f"{k}={v!r}" for k, v in self.get_params().items() if v is not default[k].default)
        return f"RewardLearner({', '.join(changed)})"

    def fit(self, mdp: TabularMDP, pairs: SegmentPairs, y: ArrayLike) -> Self:
        """Learn from pairs and labels (n,), the probabilities that the first segment is preferred; returns self.

        Raises:
            ValueError: for parameters out of range, gamma = 1, segments the MDP does not allow, labels outside [0, 1],
                or no pairs.
        """
        if not (self.learning_rate > 0 and self.epochs >= 1):
            raise ValueError(f"learning_rate > 0 and epochs >= 1, not {self.learning_rate!r} and {self.epochs!r}")
        loss_of = self.objective(mdp, pairs, y)
        w = torch.zeros(mdp.n_features, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=self.learning_rate)
        curve = np.empty(self.epochs)
        best, best_w = np.inf, w.detach().clone()
        for epoch in range(self.epochs):
            loss = loss_of(w)
            curve[epoch] = loss.item()
            if self.model == "regret" and curve[epoch] < best:
                best, best_w = curve[epoch], w.detach().clone()
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        if self.model == "partial_return":
            best, best_w = loss_of(w).item(), w.detach()
        self.loss_, self.loss_curve_ = float(best), curve
        self.reward_: Floats = best_w.numpy().copy()
        self.policy_: Floats = mdp.greedy_policy(self.reward_)
        self.preference_ = (
            RegretPreference(mdp, self.reward_, form=self.form)
            if self.model == "regret"
            else PartialReturnPreference(mdp, self.reward_)
        )
        return self

    def logit(self, pairs: SegmentPairs) -> Floats:
        """(n,) log-odds that the first segment is preferred, under the learned reward."""
        return self.preference_.logit(pairs)

    def predict_proba(self, pairs: SegmentPairs) -> Floats:
        """(n, 2): probabilities of label 0 (second preferred) and label 1 (first preferred)."""
        first = self.preference_.probability(pairs)
        return np.stack([1 - first, first], 1)

    def objective(self, mdp: TabularMDP, pairs: SegmentPairs, y: ArrayLike) -> Callable[[Tensor], Tensor]:
        """What `fit` minimises: weights (k,) float64 -> mean cross-entropy, differentiable. Raises as `fit` does."""
        self._check()
        if mdp.gamma == 1:
            raise ValueError(
                "the values of arbitrary rewards are finite only with gamma < 1; the paper's code has 0.999"
            )
        labels = _check_labels(pairs, y)
        if self.swap:
            both = pairs.swapped()
            pairs = SegmentPairs(_concatenate([pairs.first, both.first]), _concatenate([pairs.second, both.second]))
            labels = np.concatenate([labels, 1 - labels])
        target = torch.from_numpy(labels)
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        collected = torch.from_numpy(mdp.segment_features(pairs.first) - mdp.segment_features(pairs.second))
        if self.model == "partial_return":
            return lambda w: bce(collected @ w, target)

        # The logit adds up signed values: of the ends, or per step of a state and action less that of the state.
        codes, signs = [], []
        for segments, sign in ((pairs.first, 1.0), (pairs.second, -1.0)):
            s, a = segments.states, segments.actions
            if mdp._form(self.form) == "general":
                codes += [mdp.n_states + s[:, :-1] * mdp.n_actions + np.maximum(a, 0), s[:, :-1]]
                signs += [sign * (a >= 0), -sign * (a >= 0)]
            else:
                codes.append(s[:, [-1, 0]])
                signs.append(np.tile([sign, -sign], (len(pairs), 1)))
        used, place = np.unique(np.concatenate(codes, 1), return_inverse=True)
        signed, at = torch.from_numpy(np.concatenate(signs, 1)), torch.from_numpy(place.ravel())
        if mdp._form(self.form) == "general":
            collected = torch.zeros_like(collected)  # Q holds the rewards already

        def rows(psi: Floats, psi_action: Floats) -> Tensor:
            table = np.concatenate([psi, psi_action.reshape(*psi.shape[:-2], -1, mdp.n_features)], -2)
            return torch.from_numpy(np.ascontiguousarray(table[..., used, :]))

        if self.value == "gpi":
            psi = rows(*mdp.successor_features(self.policy_set(mdp)))

            def value(w: Tensor) -> Tensor:
                return gpi_value(psi, w, self.temperature)

        else:
            policy: Ints | None = None

            def value(w: Tensor) -> Tensor:
                nonlocal policy
                weights = w.detach().numpy()
                reward = np.einsum("ijk,k->ij", mdp.features[mdp._inner], weights)[None]
                policy = mdp._policy_iteration(reward, policy)[1]  # from the last one: mostly it is still optimal
                chosen = np.full((mdp.n_states, mdp.n_actions), 1 / mdp.n_actions)
                chosen[mdp._inner] = np.eye(mdp.n_actions)[policy[0]]
                return rows(*mdp.successor_features(chosen)) @ w

        def loss(w: Tensor) -> Tensor:
            values = value(w).index_select(0, at).view_as(signed)
            return bce(collected @ w + (signed * values).sum(1), target)

        return loss

    def policy_set(self, mdp: TabularMDP) -> Floats:
        """(K, S, A) distinct policies, each optimal for a random reward, without those optimal under ``withhold``.

        Raises:
            ValueError: when none is left.
        """
        generator = np.random.default_rng(self.random_state)
        found: dict[bytes, Floats] = {}
        repeats = 0
        while len(found) < self.n_policies and repeats < 100:
            drawn = generator.choice(np.asarray(self.levels, dtype=float), (self.n_policies, mdp.n_features))
            for policy in mdp.greedy_policy(drawn):
                key = policy[mdp._inner].tobytes()
                repeats += key in found
                found.setdefault(key, policy)
                if len(found) == self.n_policies or repeats == 100:
                    break
        policies = np.stack(list(found.values()))
        if self.withhold is not None:
            w = mdp._weights(self.withhold)
            best = mdp.optimal_values(w)[0]
            short = best - mdp.successor_features(policies)[0] @ w
            policies = policies[(short > 1e-7 * np.abs(best).max()).any(1)]
            if not len(policies):
                raise ValueError("every policy of the set is optimal under `withhold`; use value='exact'")
        return policies

    def _check(self) -> None:
        if self.model not in ("regret", "partial_return"):
            raise ValueError(f"model is 'regret' or 'partial_return', not {self.model!r}")
        if self.value not in ("gpi", "exact"):
            raise ValueError(f"value is 'gpi' or 'exact', not {self.value!r}")
        if not (self.n_policies >= 1 and self.temperature > 0):
            raise ValueError(f"n_policies >= 1 and temperature > 0, not {self.n_policies!r} and {self.temperature!r}")
