"""Claims of "Models of human preference for learning reward functions" (arXiv 2206.02231)."""

from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Claim
from counterproof.rewards.task import REWARD_IDENTIFIABILITY, REWARD_RECOVERY

if TYPE_CHECKING:
    import numpy as np

    from counterproof.rewards.task import Floats, Ints, World

HERE = "counterproof.rewards.claims.regret_preference"


def learn(
    world: "World",
    states: "Ints",
    actions: "Ints",
    labels: "Floats",
    *,
    rng: "np.random.Generator",
    withhold: "Floats",
    **settings: Any,
) -> "Floats":
    from counterproof.rewards import RewardLearner, SegmentPairs, Segments, TabularMDP

    mdp = TabularMDP(world.P, world.phi, world.terminal, gamma=world.gamma)
    pairs = SegmentPairs(Segments(states[:, 0], actions[:, 0]), Segments(states[:, 1], actions[:, 1]))
    learner = RewardLearner(**settings, withhold=withhold, random_state=rng)
    reward: Floats = learner.fit(mdp, pairs, labels).reward_
    return reward


def regret(world: "World", states: "Ints", actions: "Ints", w: "Floats") -> "Floats":
    from counterproof.rewards import Segments, TabularMDP

    mdp = TabularMDP(world.P, world.phi, world.terminal, gamma=world.gamma)
    utility: Floats = -mdp.regret(Segments(states, actions), w)
    return utility


# Of the learning arms: who labels, and who learns. The paper's own comparison lets each model do both.
REGRET = Arm("regret", f"{HERE}:learn", {"model": "regret", "labels": "regret"})
PARTIAL_RETURN = Arm("partial-return", f"{HERE}:learn", {"model": "partial_return", "labels": "partial_return"})
MISSPECIFIED = Arm("partial-return-on-regret", f"{HERE}:learn", {"model": "partial_return", "labels": "regret"})

ON_PEOPLE = "labels of people, one delivery grid: rewards learned under regret give better policies (no table found)"


def _recovery(
    name: str,
    says: str,
    metric: str = "scaled_return",
    *,
    baseline: Arm = PARTIAL_RETURN,
    reported: str = "random MDPs: regret near-optimal in a larger share, noiseless and noisy labels (plots, no table)",
    **settings: str | None,
) -> Claim:
    return Claim(
        paper="regret-preference",
        name=name,
        says=says,
        task=REWARD_RECOVERY,
        baseline=baseline,
        method=REGRET,
        metric=metric,
        better="higher",
        smallest=0.02,
        reported=reported,
        settings=settings,
    )


def _identifiability(name: str, says: str, kind: str, reported: str) -> Claim:
    return Claim(
        paper="regret-preference",
        name=name,
        says=says,
        task=REWARD_IDENTIFIABILITY,
        baseline=Arm("partial-return"),
        method=Arm("regret", f"{HERE}:regret"),
        metric="keeps_optimal",
        better="higher",
        smallest=0.05,
        reported=reported,
        settings={"kind": kind},
    )


# `smallest`: 2 % of the way from random to optimal, or of the worlds; 5 % of the rewards that the labels leave.
CLAIMS = (
    _recovery(
        "main",
        "each model labelling (with logistic noise) and learning, regret gives a higher scaled return",
        noise="logistic",
    ),
    _recovery(
        "near-optimal",
        "each model labelling (with logistic noise) and learning, regret gives a larger share of near-optimal policies",
        "near_optimal",
        noise="logistic",
    ),
    _recovery(
        "noiseless",
        "each model labelling (without noise) and learning, regret gives a higher scaled return",
        noise=None,
    ),
    _recovery(
        "misspecified",
        "labels follow regret (with logistic noise): assuming so, not partial return, gives a higher scaled return",
        baseline=MISSPECIFIED,
        reported=ON_PEOPLE,
        noise="logistic",
    ),
    _recovery(
        "misspecified-noiseless",
        "labels follow regret (without noise): assuming so, not partial return, gives a higher scaled return",
        baseline=MISSPECIFIED,
        reported=ON_PEOPLE,
        noise=None,
    ),
    _recovery(
        "stochastic",
        "in grids with gambles, each model labelling (without noise) and learning, regret gives a higher scaled return",
        reported="stochastic grids with gambles are in the paper's code; no figure found",
        noise=None,
        world="lottery",
    ),
    _identifiability(
        "identifies-gambles",
        "in a choice between a safe prize and a gamble, rewards that agree on all regret labels act alike more often",
        "lottery",
        "theorem: regret labels identify the optimal policies; noiseless partial-return labels hide the odds' worth",
    ),
    _identifiability(
        "identifies-constants",
        "in a corridor with a goal, rewards shifted by a constant that agree on all regret labels act alike more often",
        "corridor",
        "theorem: regret labels identify the optimal policies; partial return cannot see a constant per step",
    ),
    _identifiability(
        "identifies-detours",
        "where a segment is shorter than a detour, rewards that agree on all regret labels act alike more often",
        "detour",
        "theorem: regret labels identify the optimal policies; noiseless partial-return labels hide magnitudes",
    ),
)
