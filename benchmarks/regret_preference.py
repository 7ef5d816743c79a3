"""Planning for many rewards at once: beside the sweeps until changes are small that the paper's code uses.

    .venv/bin/python benchmarks/regret_preference.py [--quick] [--json FILE]

Ratio = peer / ours, above 1 we are faster; the answers are compared first, up to what the peer's tolerance leaves
open. The peer sweeps all states at once in NumPy, one reward at a time. CPU milliseconds, one thread.
"""

import os
from collections.abc import Iterator

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from _contest import Row, contest, run  # noqa: E402

from counterproof.rewards import TabularMDP  # noqa: E402
from counterproof.rewards.task import random_grid  # noqa: E402

TOLERANCE = 1e-3  # of the paper's code


def swept_values(mdp: TabularMDP, weights: np.ndarray) -> np.ndarray:
    """Value iteration, one reward after the other."""
    found = []
    for w in weights:
        reward, V = mdp.features @ w, np.zeros(mdp.n_states)
        while True:
            new = (reward + mdp.gamma * mdp.P @ V).max(1)
            new[mdp.terminal] = 0
            if np.abs(new - V).max() < TOLERANCE:
                break
            V = new
        found.append(new)
    return np.array(found)


def swept_features(mdp: TabularMDP, policies: np.ndarray) -> np.ndarray:
    """Iterative evaluation of successor features, one policy after the other."""
    found = []
    for policy in policies:
        P, phi = np.einsum("sa,sat->st", policy, mdp.P), np.einsum("sa,sak->sk", policy, mdp.features)
        P[mdp.terminal] = 0
        psi = phi
        while True:
            new = phi + mdp.gamma * P @ psi
            if np.abs(new - psi).max() < TOLERANCE:
                break
            psi = new
        found.append(new)
    return np.array(found)


def close(x: np.ndarray, y: np.ndarray) -> bool:
    """Within what stopping at a change of the tolerance may leave: tolerance / (1 - gamma)."""
    return bool(np.abs(x - y).max() <= 1.01 * TOLERANCE / (1 - 0.999))


def contests(quick: bool, seconds: float) -> Iterator[Row]:
    for side in (6,) if quick else (6, 10):
        world, _ = random_grid(np.random.default_rng(0), [side], [side])
        mdp = TabularMDP(world.P, world.phi, world.terminal, gamma=world.gamma)
        rewards = np.random.default_rng(1).choice([50.0, -50, 1, -1, -2, -10, 10, 5], (20 if quick else 100, 6))
        yield contest(
            "optimal values",
            f"{side}x{side}, {len(rewards)} rewards",
            lambda mdp=mdp, rewards=rewards: mdp.optimal_values(rewards)[0],
            lambda mdp=mdp, rewards=rewards: swept_values(mdp, rewards),
            "value iteration per reward",
            same=close,
            seconds=seconds,
        )
        policies = mdp.greedy_policy(rewards)
        yield contest(
            "successor features",
            f"{side}x{side}, {len(policies)} policies",
            lambda mdp=mdp, policies=policies: mdp.successor_features(policies)[0],
            lambda mdp=mdp, policies=policies: swept_features(mdp, policies),
            "iterative evaluation per policy",
            same=close,
            seconds=seconds,
        )


if __name__ == "__main__":
    run(__doc__ or "", contests)
