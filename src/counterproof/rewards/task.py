"""What the papers of this room are compared on: tabular worlds whose true reward is known. A seed is a block of worlds.

Grid worlds after the delivery domain of arXiv 2206.02231 and its random variants (Stephanehk/Learning-OA-From-Prefs),
and three families of small worlds in which preferences may leave the optimal policy open. Labels and scores come from
the planner below, not from the methods that are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from counterproof.bench.task import Arm, Budget, Metric, Task, Trial

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PLAIN, GOAL, SHEEP, COIN, ROADBLOCK, BRICK, HOUSE = range(7)  # what stands on a cell of a board
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
NEAR_OPTIMAL = 0.9  # scaled return

# What all budgets share; the sizes are those of the paper's code, which draws among them.
_GRIDS = {
    "world": "grid",
    "heights": [3, 6, 10, 15],
    "widths": [5, 6, 10],
    "length": 3,
    "noise": None,
    "absorbing": True,
}

REWARD_RECOVERY = Task(
    name="reward-recovery",
    says="random grid worlds of known reward: learn it from labelled pairs of 3-step segments, then score the policy",
    run="counterproof.rewards.task:recover_rewards",
    metrics={
        "scaled_return": Metric("higher", says="1 optimal, 0 random actions; each world's clipped at -1"),
        "near_optimal": Metric("higher", says="share of worlds with a scaled return above 0.9"),
    },
    budgets={
        "quick": Budget(
            settings={
                **_GRIDS,
                "worlds": 16,
                "heights": [3, 6],
                "widths": [5, 6],
                "pairs": 100,
                "fit": {"epochs": 1000, "n_policies": 100},
            },
            seeds=(6, 16),
        ),
        "standard": Budget(
            settings={**_GRIDS, "worlds": 32, "pairs": 300, "fit": {"epochs": 1000, "n_policies": 100}},
            seeds=(8, 24),
            minutes=30,
        ),
        "full": Budget(
            settings={**_GRIDS, "worlds": 64, "pairs": 3000, "fit": {"epochs": 5000, "n_policies": 100}},
            seeds=(8, 32),
            minutes=None,
            trial_minutes=120,
        ),
    },
    plug=(
        "method(world, states, actions, labels, rng=, withhold=, **fit, **settings) -> reward weights (k,): a `World`, "
        "pairs as states (n, 2, L + 1) and actions (n, 2, L), -1 for no step; labels (n,), 1 prefers the first; the "
        "true weights, to be withheld. The setting `labels` is the task's: whose they are, 'regret' or 'partial_return'"
    ),
    sample="instance",
)

REWARD_IDENTIFIABILITY = Task(
    name="reward-identifiability",
    says="small random worlds, noiseless labels on all pairs of segments: which rewards agree, and do they act alike?",
    run="counterproof.rewards.task:identify_rewards",
    metrics={
        "keeps_optimal": Metric(
            "higher", says="share of the rewards with the true reward's labels that have its optimal policies too"
        ),
        "agreeing": Metric("lower", says="share of the candidate rewards that have the true reward's labels"),
    },
    budgets={
        "quick": Budget(settings={"kind": "lottery", "worlds": 32, "candidates": 1000}, seeds=(4, 8)),
        "standard": Budget(settings={"kind": "lottery", "worlds": 128, "candidates": 4000}, seeds=(4, 12), minutes=30),
        "full": Budget(settings={"kind": "lottery", "worlds": 512, "candidates": 16_000}, seeds=(4, 12), minutes=None),
    },
    plug=(
        "method(world, states, actions, w, **settings) -> utilities (m, n): what preferences compare, of n segments as "
        "states (n, L + 1) and actions (n, L), under each of m rewards w (m, k). None: partial return"
    ),
    sample="instance",
)


@dataclass(frozen=True)
class World:
    """A tabular Markov decision process; its reward is w . phi for weights w (k,).

    Attributes:
        P: (S, A, S) transition probabilities.
        phi: (S, A, S, k) features of transitions.
        terminal: (S,) states that end the episode; their rows of P and phi are not used.
        gamma: discount.
    """

    P: Floats
    phi: Floats
    terminal: NDArray[np.bool_]
    gamma: float = 0.999


# -- planning, segments, labels --


def plan(world: World, w: Floats) -> Floats:
    """Q* (m, S, A) of the rewards w (m, k), by policy iteration; 0 at terminal states."""
    reward = np.einsum("sat,satk,mk->msa", world.P, world.phi, w, optimize=True)
    reward[:, world.terminal] = 0
    P = world.P * ~world.terminal[:, None, None]
    policy, states = reward.argmax(2), np.arange(len(P))
    while True:
        gained = np.take_along_axis(reward, policy[..., None], 2)
        V = np.linalg.solve(np.eye(len(P)) - world.gamma * P[states, policy], gained)[..., 0]
        Q: Floats = reward + world.gamma * np.einsum("sat,mt->msa", P, V, optimize=True)
        gain = Q.max(2) - np.take_along_axis(Q, policy[..., None], 2)[..., 0]
        better = gain > _slack(Q)[..., 0]
        if not better.any():
            return Q
        policy = np.where(better, Q.argmax(2), policy)


def optimal_actions(world: World, w: Floats) -> NDArray[np.bool_]:
    """(m, S, A): which actions are optimal under the rewards w (m, k); ties are."""
    Q = plan(world, w)
    best: NDArray[np.bool_] = Q.max(2, keepdims=True) - Q <= _slack(Q)
    return best


def _slack(Q: Floats) -> Floats:
    """Differences of action values that are rounding error."""
    slack: Floats = 1e-10 * np.abs(Q).max((1, 2), keepdims=True)
    return slack


def mean_value(world: World, policy: Floats, w: Floats) -> float:
    """Expected return of a policy (S, A) under w (k,), from a uniformly drawn non-terminal state."""
    go = ~world.terminal
    P = np.einsum("sa,sat->st", policy, world.P)[np.ix_(go, go)]
    reward = np.einsum("sa,sat,satk,k->s", policy, world.P, world.phi, w, optimize=True)[go]
    return float(np.linalg.solve(np.eye(len(P)) - world.gamma * P, reward).mean())


def scaled_return(world: World, learned: Floats, w: Floats) -> float:
    """Where acting optimally for learned weights (k,) lies, judged by w: at 0 with random actions, at 1 if optimal.

    Ties between actions are broken evenly. Not a number where random actions are optimal.
    """

    def greedy(weights: Floats) -> Floats:
        best = optimal_actions(world, weights[None])[0].astype(float)
        policy: Floats = best / best.sum(1, keepdims=True)
        return policy

    random = mean_value(world, np.full(world.P.shape[:2], 1 / world.P.shape[1]), w)
    span = mean_value(world, greedy(w), w) - random
    return float("nan") if span <= 1e-9 * abs(random) else (mean_value(world, greedy(learned), w) - random) / span


def sample_segments(
    world: World, n: int, length: int, rng: np.random.Generator, *, absorbing: bool = True
) -> tuple[Ints, Ints]:
    """Random actions from uniformly drawn non-terminal states: states (n, length + 1), actions (n, length).

    Args:
        absorbing: keep segments that end early, padded with steps in the terminal state (action -1); otherwise they
            are drawn again.
    """
    states = np.empty((n, length + 1), np.int64)
    actions = np.empty((n, length), np.int64)
    todo = np.arange(n)
    while todo.size:
        states[todo, 0] = rng.choice(np.flatnonzero(~world.terminal), todo.size)
        actions[todo] = rng.integers(world.P.shape[1], size=(todo.size, length))
        for t in range(length):
            here = states[todo, t]
            odds = world.P[here, actions[todo, t]].cumsum(1)
            to = (rng.random((todo.size, 1)) * odds[:, -1:] >= odds).sum(1)
            states[todo, t + 1] = np.where(world.terminal[here], here, to)
        early = world.terminal[states[:, :-1]]
        todo = np.flatnonzero(early.any(1)) if not absorbing else todo[:0]
    actions[world.terminal[states[:, :-1]]] = -1
    return states, actions


def all_segments(world: World, length: int, *, absorbing: bool = True) -> tuple[Ints, Ints]:
    """Every possible segment; ``absorbing`` as in `sample_segments`."""
    walks: list[tuple[list[int], list[int]]] = [([int(s)], []) for s in np.flatnonzero(~world.terminal)]
    for _ in range(length):
        longer = []
        for states, actions in walks:
            s = states[-1]
            if not world.terminal[s]:
                steps = np.argwhere(world.P[s] > 0).tolist()
                longer += [([*states, to], [*actions, a]) for a, to in steps]
            elif absorbing:
                longer.append(([*states, s], [*actions, -1]))
        walks = longer
    return np.array([states for states, _ in walks]), np.array([actions for _, actions in walks])


def partial_return(world: World, states: Ints, actions: Ints, w: Floats) -> Floats:
    """Utilities (m, n) of n segments under rewards w (m, k): the rewards collected."""
    taken = world.phi[states[:, :-1], actions, states[:, 1:]] * (actions >= 0)[..., None]
    collected: Floats = w @ taken.sum(1).T
    return collected


def negative_regret(world: World, states: Ints, actions: Ints, w: Floats) -> Floats:
    """Utilities (m, n) of n segments under rewards w (m, k): minus the regret, as the paper's code has it.

    Where transitions are certain, by the ends: collected + V*(s_L) - V*(s_0); otherwise, summed over the steps,
    Q*(s_t, a_t) - V*(s_t).
    """
    Q = plan(world, w)
    V = Q.max(2)
    utility: Floats
    if (world.P[~world.terminal].max(2) == 1).all():
        utility = partial_return(world, states, actions, w) + V[:, states[:, -1]] - V[:, states[:, 0]]
    else:
        s = states[:, :-1]
        utility = np.where(actions >= 0, Q[:, s, actions] - V[:, s], 0.0).sum(2)
    return utility


def draw_labels(gap: Floats, noise: str | None, rng: np.random.Generator) -> Floats:
    """Labels (n,) for differences of utility: their sign as 0, 0.5 or 1, or with noise ``"logistic"`` draws."""
    if noise is None:
        return (np.sign(gap) + 1) / 2
    if noise != "logistic":
        raise ValueError(f"noise is None or 'logistic', not {noise!r}")
    return (rng.random(len(gap)) < np.exp(-np.logaddexp(0, -gap))).astype(float)


def label_order(utilities: Floats) -> Ints:
    """Dense ranks (m, n) of utilities (m, n): equal rows are equal noiseless labels on all pairs, ties included."""
    order = utilities.argsort(1, kind="stable")
    ordered = np.take_along_axis(utilities, order, 1)
    rises = np.diff(ordered, axis=1) > 1e-9 * np.abs(ordered).max(1, keepdims=True)
    ranks = np.zeros(utilities.shape, np.int64)
    np.put_along_axis(ranks, order[:, 1:], rises.cumsum(1), 1)
    return ranks


# -- grid worlds --


def grid_world(board: Ints, *, lottery: bool = False) -> World:
    """The delivery domain on a board.

    Four moves; a blocked move stays. The cell that is entered gives the features (plain surface, goal, sheep, coin,
    road block, brick surface), a blocked move only the surface it stays on. Goal and sheep end the episode.

    Args:
        board: (height, width) of PLAIN, GOAL, SHEEP, COIN, ROADBLOCK, BRICK, HOUSE; houses cannot be entered.
        lottery: entering a sheep is a gamble: with even odds it counts as a sheep, or as a coin, and the episode ends.
    """
    cells = np.argwhere(board != HOUSE)
    index = np.full(board.shape, -1)
    index[tuple(cells.T)] = np.arange(len(cells))
    n = len(cells) + lottery
    surface = np.eye(6)[[0, 5]]
    entered = np.zeros((7, 6))
    entered[[PLAIN, COIN, ROADBLOCK], 0] = 1
    entered[[GOAL, SHEEP, COIN, ROADBLOCK, BRICK], [1, 2, 3, 4, 5]] = 1
    P, phi = np.zeros((n, 4, n)), np.zeros((n, 4, n, 6))
    for s, (y, x) in enumerate(cells):
        for a, (dy, dx) in enumerate(MOVES):
            to = y + dy, x + dx
            if not (0 <= to[0] < board.shape[0] and 0 <= to[1] < board.shape[1]) or board[to] == HOUSE:
                P[s, a, s], phi[s, a, s] = 1, surface[int(board[y, x] == BRICK)]
                continue
            P[s, a, index[to]], phi[s, a, index[to]] = 1, entered[board[to]]
            if lottery and board[to] == SHEEP:
                P[s, a, [index[to], -1]] = 0.5
                phi[s, a, -1, 3] = 1
    ends = np.ones(n, bool)
    ends[: len(cells)] = np.isin(board[tuple(cells.T)], (GOAL, SHEEP))
    return World(P, phi, ends)


def random_grid(rng: np.random.Generator, heights: list[int], widths: list[int]) -> tuple[World, Floats]:
    """A world and weights as the paper's code draws them: shares of sheep, road blocks and coins, one goal.

    Worlds in which random actions are optimal are drawn again: they have no scaled return.
    """
    while True:
        size = int(rng.choice(heights)), int(rng.choice(widths))
        cells = size[0] * size[1]
        sheep = rng.choice([0, 0.1, 0.3])
        bad = rng.choice([b for b in (0, 0.1, 0.5, 0.8) if b + sheep < 1])
        good = rng.choice([g for g in (0, 0.1, 0.2) if g + bad + sheep < 1])
        kinds = [SHEEP] * int(sheep * cells) + [ROADBLOCK] * int(bad * cells) + [COIN] * int(good * cells)
        board = rng.permutation(kinds + [PLAIN] * (cells - len(kinds)))
        board[rng.integers(cells)] = GOAL
        weights = -1, rng.choice([0, 1, 5, 10, 50]), rng.choice([-5, -10, -50, -100]), 1, rng.choice([-2, -5, -10])
        w = np.array([*weights, rng.choice([-1, -2, -3])], dtype=float)
        world = grid_world(board.reshape(size))
        if not np.isnan(scaled_return(world, w, w)):
            return world, w


def random_lottery_grid(rng: np.random.Generator) -> tuple[World, Floats]:
    """The paper's stochastic grid: 5 x 5, every sheep a gamble that wins 100 or loses 1, 50 or 10,000."""
    while True:
        sheep = int(rng.choice([0.05, 0.1, 0.3]) * 25)
        board = rng.permutation([SHEEP] * sheep + [PLAIN] * (25 - sheep))
        board[rng.integers(25)] = GOAL
        w = np.array([-1, 50, rng.choice([-1, -50, -10_000]), 100, 0, 0], dtype=float)
        world = grid_world(board.reshape(5, 5), lottery=True)
        if (board == SHEEP).any() and not np.isnan(scaled_return(world, w, w)):
            return world, w


# -- worlds that test what labels can tell: a world, segments, and rewards (1 + n, k), the true one first --


def lottery(rng: np.random.Generator, n: int) -> tuple[World, tuple[Ints, Ints], Floats]:
    """A safe prize, or a gamble between a better and a worse one at random odds. Candidates: any three prizes."""
    P = np.zeros((4, 2, 4))
    P[0, 0, 1], P[0, 1, 2] = 1, rng.uniform(0.2, 0.8)
    P[0, 1, 3] = 1 - P[0, 1, 2]
    phi = np.zeros((4, 2, 4, 3))
    phi[..., [1, 2, 3], [0, 1, 2]] = 1
    world = World(P, phi, np.arange(4) > 0)
    lose, safe, win = np.sort(rng.normal(size=3))
    return world, all_segments(world, 1), np.concatenate([[[safe, win, lose]], rng.normal(size=(n, 3))])


def corridor(rng: np.random.Generator, n: int) -> tuple[World, tuple[Ints, Ints], Floats]:
    """A corridor with a goal at its end; every step costs by the kind of cell it enters. Candidates: the true reward
    plus a constant per step. Segments of three real steps."""
    cells = int(rng.integers(4, 9))
    kind = rng.integers(3, size=cells + 1)
    P, phi = np.zeros((cells + 1, 2, cells + 1)), np.zeros((cells + 1, 2, cells + 1, 3))
    for s in range(cells):
        for a, to in enumerate((max(s - 1, 0), s + 1)):
            P[s, a, to], phi[s, a, to, kind[to]] = 1, 1
    world = World(P, phi, np.arange(cells + 1) == cells)
    costs, constants = rng.uniform(0.5, 2, size=3), np.concatenate([[0], rng.uniform(-3, 3, size=n)])
    return world, all_segments(world, 3, absorbing=False), constants[:, None] - costs


def detour(rng: np.random.Generator, n: int) -> tuple[World, tuple[Ints, Ints], Floats]:
    """To the goal through one bad cell, or around it through 3 to 7 plain ones. Candidates: any costs of the two.

    Segments have three steps, so no two of them weigh the bad cell against the whole detour.
    """
    m = int(rng.integers(3, 8))
    bad, goal = m + 1, m + 2  # state 0 is the start, 1 .. m the detour
    P, phi = np.zeros((m + 3, 2, m + 3)), np.zeros((m + 3, 2, m + 3, 2))
    for s in range(goal):
        for a in range(2):
            to = (bad if a else 1) if s == 0 else goal if s in (m, bad) else s + 1
            P[s, a, to], phi[s, a, to, int(to == bad)] = 1, 1
    plain, ratio = rng.uniform(0.5, 1.5, size=n + 1), rng.uniform(0, 10, size=n + 1)
    ratio[0] = rng.uniform(2.5, 10)  # the true bad cell is worse than any plain stretch that a segment holds
    world = World(P, phi, np.arange(m + 3) == goal)
    return world, all_segments(world, 3), -np.stack([plain, ratio * plain], 1)


# -- runs --


def recover_rewards(arm: Arm, trial: Trial) -> Mapping[str, float]:
    settings, options = trial.settings, dict(arm.settings)
    utility = {"regret": negative_regret, "partial_return": partial_return}[options.pop("labels", "regret")]
    learn = arm.load()
    if learn is None:
        raise ValueError(f"arm {arm.name!r} has no method: the task needs one that learns a reward")
    returns = []
    for i in range(settings["worlds"]):
        with trial.off_clock():
            rng = trial.rng(f"world {i}")
            if settings["world"] == "lottery":
                world, w = random_lottery_grid(rng)
            else:
                world, w = random_grid(rng, settings["heights"], settings["widths"])
            n, length = settings["pairs"], settings["length"]
            drawn = sample_segments(world, 2 * n, length, trial.rng(f"pairs {i}"), absorbing=settings["absorbing"])
            worth = np.round(utility(world, *drawn, w[None])[0], 2)  # two decimals, as in the paper's code
            states, actions = (part.reshape(n, 2, -1) for part in drawn)
            gap = worth.reshape(n, 2) @ [1, -1]
            labels = draw_labels(gap, settings["noise"], trial.rng(f"labels {i}"))
        rng = trial.rng(f"learner {i}")
        learned = learn(world, states, actions, labels, rng=rng, withhold=w, **{**settings["fit"], **options})
        with trial.off_clock():
            returns.append(max(-1.0, scaled_return(world, learned, w)))
        trial.log((i + 1) / settings["worlds"], step=i + 1, scaled_return=float(np.mean(returns)))
    near = np.array(returns) > NEAR_OPTIMAL
    return {"scaled_return": float(np.mean(returns)), "near_optimal": float(near.mean())}


def identify_rewards(arm: Arm, trial: Trial) -> Mapping[str, float]:
    family = {"lottery": lottery, "corridor": corridor, "detour": detour}[trial.settings["kind"]]
    utility = arm.load() or partial_return
    kept, agreeing = [], []
    for i in range(trial.settings["worlds"]):
        world, segments, rewards = family(trial.rng(f"world {i}"), trial.settings["candidates"])
        order = label_order(utility(world, *segments, rewards, **arm.settings))
        agree = (order == order[0]).all(1)  # the true reward among them: the share below is always defined
        best = optimal_actions(world, rewards)
        alike = (best == best[0]).all((1, 2))
        kept.append(alike[agree].mean())
        agreeing.append(agree[1:].mean())
        trial.log((i + 1) / trial.settings["worlds"], step=i + 1, keeps_optimal=float(np.mean(kept)))
    return {"keeps_optimal": float(np.mean(kept)), "agreeing": float(np.mean(agreeing))}
