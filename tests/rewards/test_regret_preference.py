"""Regret preferences against independent implementations: loops, enumeration, linear programmes, scikit-learn."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import linprog

torch = pytest.importorskip("torch")

from counterproof.bench.task import Arm, Trial, resolve  # noqa: E402
from counterproof.rewards import (  # noqa: E402
    DescriptivePreference,
    PartialReturnPreference,
    RegretPreference,
    RewardLearner,
    SegmentPairs,
    Segments,
    TabularMDP,
    gpi_value,
    preference_loss,
)
from counterproof.rewards import task as room  # noqa: E402
from counterproof.rewards.claims.regret_preference import (  # noqa: E402
    CLAIMS,
    MISSPECIFIED,
    PARTIAL_RETURN,
    REGRET,
    learn,
)


def random_mdp(seed, *, S=6, A=3, k=4, gamma=0.9, deterministic=False):
    """A random MDP whose last state is terminal and can be reached from everywhere."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(S, 0.4), size=(S, A))
    P[:, 0] = 0.7 * P[:, 0] + 0.3 * np.eye(S)[-1]
    if deterministic:
        to = rng.integers(S, size=(S, A))
        to[:, 0] = np.minimum(np.arange(S) + 1, S - 1)
        P = np.eye(S)[to]
    return TabularMDP(P, rng.normal(size=(S, A, S, k)), np.arange(S) == S - 1, gamma=gamma)


def corridor(gamma=1.0, n=4):
    """n cells and a goal; two features, the plain step and the step into the goal."""
    P, phi = np.zeros((n + 1, 2, n + 1)), np.zeros((n + 1, 2, n + 1, 2))
    for s in range(n):
        for a, to in enumerate((max(s - 1, 0), s + 1)):
            P[s, a, to], phi[s, a, to, int(to == n)] = 1, 1
    return TabularMDP(P, phi, np.arange(n + 1) == n, gamma=gamma)


def evaluate(mdp, policy, w, sweeps=4000):
    """Iterative policy evaluation, one state and action at a time."""
    V = np.zeros(mdp.n_states)
    reward = mdp.phi @ w
    for _ in range(sweeps):
        new = np.zeros(mdp.n_states)
        for s in range(mdp.n_states):
            if not mdp.terminal[s]:
                for a in range(mdp.n_actions):
                    new[s] += policy[s, a] * sum(mdp.P[s, a] * (reward[s, a] + mdp.gamma * V))
        if np.abs(new - V).max() < 1e-13:
            break
        V = new
    return V


def enumerate_optimal(mdp, w):
    """V* as the best of all deterministic policies, each evaluated on its own; proper ones only without discount."""
    best = np.full(mdp.n_states, -np.inf)
    free = np.flatnonzero(~mdp.terminal)
    for choice in itertools.product(range(mdp.n_actions), repeat=len(free)):
        chosen = mdp.P[free, choice][:, free]
        if max(abs(np.linalg.eigvals(mdp.gamma * chosen))) > 1 - 1e-9:
            continue
        gained = (mdp.P[free, choice] * (mdp.phi @ w)[free, choice]).sum(1)
        best[free] = np.maximum(best[free], np.linalg.inv(np.eye(len(free)) - mdp.gamma * chosen) @ gained)
    best[mdp.terminal] = 0
    return best


# -- values --


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("deterministic", [False, True])
def test_optimal_values_solve_the_linear_programme(gamma, deterministic):
    mdp = random_mdp(0, gamma=gamma, deterministic=deterministic)
    w = np.random.default_rng(1).normal(size=(5, 4))
    V, Q = mdp.optimal_values(w)
    free = np.flatnonzero(~mdp.terminal)
    for i in range(len(w)):
        reward = (mdp.P * (mdp.phi @ w[i])).sum(2)
        A = np.concatenate([gamma * mdp.P[free, a][:, free] - np.eye(len(free)) for a in range(3)])
        b = -np.concatenate([reward[free, a] for a in range(3)])
        programme = linprog(np.ones(len(free)), A_ub=A, b_ub=b, bounds=(None, None))
        np.testing.assert_allclose(V[i, free], programme.x, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(Q[i], (reward + gamma * mdp.P @ V[i]) * ~mdp.terminal[:, None], atol=1e-9)
        np.testing.assert_allclose(mdp.optimal_values(w[i])[0], V[i], atol=1e-9)


def test_optimal_values_without_discount_match_the_best_of_all_policies():
    mdp = random_mdp(2, S=5, A=2, gamma=1.0)
    for seed in range(5):
        w = np.random.default_rng(seed).normal(size=4)
        w -= np.linalg.lstsq(mdp.features[:-1].reshape(-1, 4), np.full(8, 3.0), rcond=None)[0]  # mostly costs
        if ((mdp.P * (mdp.phi @ w)).sum(2)[:-1] < 0).all():
            np.testing.assert_allclose(mdp.optimal_values(w)[0], enumerate_optimal(mdp, w), atol=1e-9)
    w = np.array([-1.0, 10.0])
    np.testing.assert_allclose(corridor().optimal_values(w)[0], [7, 8, 9, 10, 0])


def test_successor_features_give_the_value_of_every_reward():
    for gamma in (0.9, 1.0):
        mdp = random_mdp(3, gamma=gamma)
        rng = np.random.default_rng(4)
        policies = rng.dirichlet(np.ones(3), size=(4, 6))
        policies[..., 0] += 0.2
        policies /= policies.sum(-1, keepdims=True)
        psi, psi_action = mdp.successor_features(policies)
        for i, policy in enumerate(policies):
            expected = (policy[..., None] * mdp.features).sum(1)
            np.testing.assert_allclose(psi[i], expected + gamma * (policy[:, None] @ mdp.P)[:, 0] @ psi[i], atol=1e-12)
            np.testing.assert_allclose(psi[i], (policy[..., None] * psi_action[i]).sum(1), atol=1e-12)
            for w in rng.normal(size=(2, 4)):
                V = evaluate(mdp, policy, w)
                np.testing.assert_allclose(psi[i] @ w, V, atol=1e-10)
                assert mdp.expected_return(policy, w) == pytest.approx(V[:-1].mean(), abs=1e-10)
            np.testing.assert_allclose(mdp.successor_features(policy)[0], psi[i], atol=1e-12)


def test_greedy_policy_shares_ties_and_scaled_return_runs_from_random_to_optimal():
    mdp = corridor(gamma=0.999)
    uniform = np.full((5, 2), 0.5)
    np.testing.assert_array_equal(mdp.greedy_policy([0.0, 0.0]), uniform)
    np.testing.assert_array_equal(mdp.greedy_policy([-1.0, 10.0])[:4], [[0, 1]] * 4)
    assert mdp.scaled_return(uniform, [-1, 10]) == pytest.approx(0, abs=1e-12)
    assert mdp.scaled_return(mdp.greedy_policy([-2, 3]), [-1, 10]) == pytest.approx(1, abs=1e-12)
    assert mdp.scaled_return(mdp.greedy_policy([2, 3]), [-1, 10]) < 0
    with pytest.raises(ValueError, match="random actions are optimal"):
        mdp.scaled_return(uniform, [0, 0])


# -- regret and partial return --


def test_deterministic_regret_is_minus_the_sum_of_advantages():
    mdp = corridor()
    w = np.array([-1.0, 3.0])
    V = enumerate_optimal(mdp, w)
    segments = mdp.enumerate_segments(3)
    by_hand = []
    for states, actions in zip(segments.states, segments.actions):
        lost = 0.0
        for s, a in zip(states, actions):
            if a >= 0:
                to = int(np.argmax(mdp.P[s, a]))
                lost += V[s] - (w[int(to == 4)] + V[to])
        by_hand.append(lost)
    np.testing.assert_allclose(mdp.regret(segments, w, "deterministic"), by_hand, atol=1e-12)
    np.testing.assert_allclose(mdp.regret(segments, w, "general"), by_hand, atol=1e-12)
    # With discount 0.999 the telescoped form is off by the discount of the segment's values, and by no more.
    discounted = corridor(gamma=0.999)
    gap = discounted.regret(segments, w, "deterministic") - discounted.regret(segments, w, "general")
    assert 0 < np.abs(gap).max() < 3 * 0.001 * np.abs(discounted.optimal_values(w)[0]).max()


def test_in_a_stochastic_mdp_the_two_forms_differ_by_luck():
    mdp = random_mdp(5, gamma=1.0)
    w = -np.linalg.lstsq(mdp.features[:-1].reshape(-1, 4), np.full(15, 1.0), rcond=None)[0]
    w *= 0.05
    mdp = TabularMDP(
        mdp.P, np.concatenate([mdp.phi, np.ones((6, 3, 6, 1))], 3), mdp.terminal, gamma=1.0
    )  # a cost per step keeps values finite
    w = np.append(w, -2.0)
    V = enumerate_optimal(mdp, w)
    segments = mdp.sample_segments(300, 4, rng=0)
    s, a, t = segments.states[:, :-1], segments.actions, segments.states[:, 1:]
    reward = mdp.phi @ w
    taken = (reward[s, a, t] + V[t] - ((mdp.P * (reward + V)).sum(2))[s, a]) * (a >= 0)
    general, deterministic = mdp.regret(segments, w, "general"), mdp.regret(segments, w, "deterministic")
    np.testing.assert_allclose(general - deterministic, taken.sum(1), atol=1e-10)
    assert np.abs(taken.sum(1)).max() > 0.1
    np.testing.assert_array_equal(mdp.regret(segments, w), general)  # "auto"
    assert (general > -1e-12).all()
    assert (deterministic < -0.1).any()


def test_regret_is_zero_exactly_for_optimal_actions():
    for mdp in (random_mdp(6), random_mdp(7, deterministic=True)):
        w = np.random.default_rng(8).normal(size=4)
        segments = mdp.sample_segments(500, 3, rng=1)
        regret = mdp.regret(segments, w, "general")
        assert (regret > -1e-12).all()
        best = np.array([[evaluate(mdp, mdp.greedy_policy(w), w)]])[0, 0]
        Q = (mdp.P * (mdp.phi @ w + mdp.gamma * best)).sum(2)
        s, a = segments.states[:, :-1], segments.actions
        optimal = ((Q[s, a] > Q[s].max(-1) - 1e-9) | mdp.terminal[s]).all(1)
        assert 0 < optimal.sum() < len(segments)
        assert np.abs(regret[optimal]).max() < 1e-9 < 1e-6 < regret[~optimal].min()


def test_regret_ignores_potential_shaping_and_partial_return_does_not():
    base = random_mdp(9, gamma=1.0, deterministic=True)
    S = base.n_states
    shift = np.broadcast_to(
        (np.eye(S)[None] - np.eye(S)[:, None])[:, None], (S, 3, S, S)
    )  # F(s') - F(s), one F per state
    cost = np.ones((S, 3, S, 1))
    mdp = TabularMDP(base.P, np.concatenate([0.1 * base.phi, cost, shift], 3), base.terminal, gamma=1.0)
    rng = np.random.default_rng(0)
    plain = np.r_[rng.normal(size=4), -3, np.zeros(S)]
    shaped = np.r_[plain[:5], rng.normal(size=S - 1), 0]  # F = 0 at the terminal state
    segments = mdp.sample_segments(200, 3, rng=2)
    for form in ("general", "deterministic"):
        np.testing.assert_allclose(mdp.regret(segments, shaped, form), mdp.regret(segments, plain, form), atol=1e-10)
    assert np.abs(mdp.partial_return(segments, shaped) - mdp.partial_return(segments, plain)).max() > 0.5


def test_a_constant_per_step_is_invisible_to_partial_return_of_equal_lengths_only():
    mdp = corridor(gamma=0.999)
    w, shifted = np.array([-1.0, -1.0]), np.array([0.5, 0.5])
    assert mdp.greedy_policy(w)[3, 1] == 1
    assert mdp.greedy_policy(shifted)[3, 0] == 1  # now the goal is avoided
    full = mdp.enumerate_segments(3, absorbing=False)
    every = mdp.enumerate_segments(3)
    assert len(full) < len(every)

    def labels(model, segments, weights):
        i, j = np.indices((len(segments),) * 2).reshape(2, -1)
        pairs = SegmentPairs(segments[i], segments[j])
        return model(mdp, weights).label(pairs, None), model(mdp, weights).probability(pairs)

    for one, other in zip(labels(PartialReturnPreference, full, w), labels(PartialReturnPreference, full, shifted)):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert (labels(PartialReturnPreference, every, w)[0] != labels(PartialReturnPreference, every, shifted)[0]).any()
    assert (labels(RegretPreference, full, w)[0] != labels(RegretPreference, full, shifted)[0]).any()


# -- preference models --


@pytest.mark.parametrize("model", [PartialReturnPreference, RegretPreference, DescriptivePreference])
def test_probabilities_of_a_pair_and_its_swap_add_to_one(model):
    mdp = random_mdp(10)
    pairs = mdp.sample_segment_pairs(50, rng=0)
    preference = model(mdp, np.random.default_rng(0).normal(size=4))
    p, q = preference.probability(pairs), preference.probability(pairs.swapped())
    np.testing.assert_allclose(p + q, 1, atol=1e-12)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-preference.logit(pairs))), atol=1e-12)
    same = SegmentPairs(pairs.first, pairs.first)
    np.testing.assert_array_equal(preference.probability(same), 0.5)
    np.testing.assert_array_equal(preference.label(same, None), 0.5)
    huge = model(mdp, 1e6 * preference.w)
    assert np.isfinite(huge.probability(pairs)).all()


def test_descriptive_weights_hold_both_models():
    mdp = random_mdp(11, deterministic=True)
    w = np.random.default_rng(1).normal(size=4)
    pairs = mdp.sample_segment_pairs(60, rng=3)
    regret = DescriptivePreference(mdp, w)
    np.testing.assert_allclose(regret.logit(pairs), RegretPreference(mdp, w).logit(pairs), atol=1e-10)
    collected = DescriptivePreference(mdp, w, weights=(1, 0, 0))
    np.testing.assert_allclose(collected.logit(pairs), PartialReturnPreference(mdp, w).logit(pairs), atol=1e-12)


def test_labels_follow_the_model():
    mdp = corridor(gamma=0.999)
    pairs = mdp.sample_segment_pairs(20, rng=0)
    model = RegretPreference(mdp, [-0.3, 0.5], scale=2.0)
    repeated = pairs[np.tile(np.arange(20), 4000)]
    frequency = model.label(repeated, rng=1).reshape(4000, 20).mean(0)
    np.testing.assert_allclose(frequency, model.probability(pairs), atol=0.04)
    np.testing.assert_array_equal(model.label(pairs, rng=5), model.label(pairs, rng=np.random.default_rng(5)))
    sign = np.sign(
        np.round(mdp.regret(pairs.second, [-0.3, 0.5]), 2) - np.round(mdp.regret(pairs.first, [-0.3, 0.5]), 2)
    )
    np.testing.assert_array_equal(model.label(pairs, None), (sign + 1) / 2)
    # Deterministic regrets of two optimal segments differ by O(1 - gamma), which two decimals hide when it is small.
    optimal = Segments(np.array([[0, 1, 2, 3], [1, 2, 3, 4]]), np.ones((2, 3), int))
    pair = SegmentPairs(optimal[:1], optimal[1:])
    assert RegretPreference(mdp, [-0.1, -0.1]).label(pair, None) == 0.5
    assert RegretPreference(mdp, [-0.1, -0.1], decimals=None).label(pair, None) != 0.5
    assert RegretPreference(mdp, [-0.1, -0.1], form="general", decimals=None).label(pair, None) == 0.5


def test_scale_and_descriptive_weights_are_maximum_likelihood():
    linear_model = pytest.importorskip("sklearn.linear_model")
    mdp = random_mdp(12, deterministic=True)
    w = np.random.default_rng(2).normal(size=4)
    pairs = mdp.sample_segment_pairs(400, rng=1)
    y = RegretPreference(mdp, w, scale=0.7, decimals=None).label(pairs, rng=2)
    for model in (RegretPreference(mdp, w), PartialReturnPreference(mdp, w), DescriptivePreference(mdp, w)):
        X = model.statistics(pairs.first) - model.statistics(pairs.second)
        fitted = linear_model.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=10_000).fit(X, y)
        if fitted.coef_.shape[1] > 1 or fitted.coef_[0, 0] > 0:
            np.testing.assert_allclose(model.fit(pairs, y).coef_, fitted.coef_[0], rtol=1e-3, atol=1e-4)
    assert RegretPreference(mdp, w).fit(pairs, 1 - y).coef_ > 0
    assert RegretPreference(mdp, w).fit(pairs, y).coef_ == pytest.approx(0.7, rel=0.4)


def test_preference_loss_is_cross_entropy_and_folds_refit_the_scale():
    sklearn = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    mdp = random_mdp(13, deterministic=True)
    w = np.random.default_rng(3).normal(size=4)
    pairs = mdp.sample_segment_pairs(100, rng=1)
    true = RegretPreference(mdp, w, scale=0.5, decimals=None)
    y = true.label(pairs, rng=2)
    assert preference_loss(true, (pairs, y)) == pytest.approx(metrics.log_loss(y, true.probability(pairs)))
    assert preference_loss(true, (pairs, np.full(100, 0.5))) >= np.log(2)
    model = RegretPreference(mdp, w)
    X = model.statistics(pairs.first) - model.statistics(pairs.second)
    losses = []
    for part in np.array_split(np.random.default_rng(0).permutation(100), 10):
        rest = np.setdiff1d(np.arange(100), part)
        fitted = sklearn.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10).fit(X[rest], y[rest])
        losses.append(metrics.log_loss(y[part], fitted.predict_proba(X[part]), labels=[0, 1]))
    assert preference_loss(model, (pairs, y), folds=10) == pytest.approx(np.mean(losses), rel=1e-3)
    assert model.coef_ == 1.0  # left as it was
    assert preference_loss(PartialReturnPreference(mdp, w), (pairs, y), folds=10) > np.mean(losses)


# -- segments --


def test_sampled_segments_follow_the_mdp():
    mdp = random_mdp(14, S=4, A=2)
    segments = mdp.sample_segments(40_000, 2, rng=0)
    mdp.check_segments(segments)
    first = segments.states[:, 0]
    np.testing.assert_allclose(np.bincount(first, minlength=4) / 40_000, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.02)
    for s in range(3):
        for a in range(2):
            here = (first == s) & (segments.actions[:, 0] == a)
            assert here.mean() == pytest.approx(1 / 6, abs=0.02)
            went = np.bincount(segments.states[here, 1], minlength=4) / here.sum()
            np.testing.assert_allclose(went, mdp.P[s, a], atol=0.03)
    ended = mdp.terminal[segments.states[:, 1]]
    assert ended.any()
    assert ((segments.actions[:, 1] == -1) == ended).all()
    assert (segments.states[ended, 2] == 3).all()
    full = mdp.sample_segments(500, 2, rng=0, absorbing=False)
    assert len(full) == 500
    assert (full.actions >= 0).all()


@pytest.mark.parametrize("absorbing", [True, False])
def test_enumeration_finds_every_possible_segment_once(absorbing):
    mdp = random_mdp(15, S=4, A=2, deterministic=True)
    segments = mdp.enumerate_segments(3, absorbing=absorbing)
    mdp.check_segments(segments)
    expected = set()
    for start in range(3):
        for actions in itertools.product(range(2), repeat=3):
            s, walk = start, [start]
            taken = []
            for a in actions:
                taken.append(-1 if mdp.terminal[s] else a)
                s = s if mdp.terminal[s] else int(mdp.P[s, a].argmax())
                walk.append(s)
            if absorbing or -1 not in taken:
                expected.add((*walk, *taken))
    found = [(*s, *a) for s, a in zip(segments.states.tolist(), segments.actions.tolist())]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_padding_adds_nothing_to_a_segment():
    mdp = corridor(gamma=0.999)
    short = Segments(np.array([[3, 4]]), np.array([[1]]))
    for action in (-1, 0, 1):
        padded = Segments(np.array([[3, 4, 4, 4]]), np.array([[1, action, action]]))
        for form in ("general", "deterministic"):
            assert mdp.regret(padded, [-1, 5], form) == pytest.approx(mdp.regret(short, [-1, 5], form))
        assert mdp.partial_return(padded, [-1, 5]) == mdp.partial_return(short, [-1, 5]) == 5


@pytest.mark.parametrize("form", ["general", "deterministic"])
def test_a_segment_that_stops_early_is_a_shorter_segment(form):
    mdp = random_mdp(24, deterministic=form == "deterministic")
    w = np.random.default_rng(0).normal(size=4)
    pairs = mdp.sample_segment_pairs(30, 2, rng=0, absorbing=False)

    def stretched(segments):
        states = np.c_[segments.states, segments.states[:, -1:], segments.states[:, -1:]]
        return Segments(states, np.c_[segments.actions, np.full((30, 2), -1)])

    longer = SegmentPairs(stretched(pairs.first), stretched(pairs.second))
    assert not mdp.terminal[longer.first.states[:, -1]].all()
    np.testing.assert_allclose(mdp.regret(longer.first, w, form), mdp.regret(pairs.first, w, form), atol=1e-12)
    np.testing.assert_allclose(mdp.partial_return(longer.first, w), mdp.partial_return(pairs.first, w), atol=1e-12)
    y = np.random.default_rng(1).random(30)
    losses = [
        RewardLearner(form=form, n_policies=10, random_state=0).objective(mdp, some, y)(torch.tensor(w)).item()
        for some in (pairs, longer)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


# -- the learner --


def test_gpi_values_bound_the_optimal_ones_and_reach_them():
    mdp = random_mdp(16, gamma=0.99)
    rng = np.random.default_rng(0)
    policies = mdp.greedy_policy(rng.normal(size=(8, 4)))
    w = rng.normal(size=4)
    V, Q = mdp.optimal_values(w)
    psi, psi_action = (torch.from_numpy(p) for p in mdp.successor_features(policies))
    weights = torch.from_numpy(w)
    for table, best in ((psi, V), (psi_action, Q)):
        assert (gpi_value(table, weights).numpy() <= best + 1e-9).all()
        np.testing.assert_allclose(gpi_value(table, weights, 1e-9), (table @ weights).max(0).values, atol=1e-6)
        np.testing.assert_allclose(gpi_value(table, weights, 1e9), (table @ weights).mean(0), atol=1e-6)
    complete = np.concatenate([policies, mdp.greedy_policy(w)[None]])
    psi, psi_action = (torch.from_numpy(p) for p in mdp.successor_features(complete))
    np.testing.assert_allclose(gpi_value(psi, weights, 1e-9), V, atol=1e-7)
    np.testing.assert_allclose(gpi_value(psi_action, weights, 1e-9), Q, atol=1e-7)


@pytest.mark.parametrize("value", ["gpi", "exact"])
@pytest.mark.parametrize("form", ["deterministic", "general"])
def test_gradient_of_the_regret_loss(value, form):
    mdp = random_mdp(17, deterministic=form == "deterministic")
    rng = np.random.default_rng(1)
    pairs = mdp.sample_segment_pairs(40, rng=2)
    learner = RewardLearner(value=value, form=form, temperature=0.1, n_policies=12, random_state=0)
    loss = learner.objective(mdp, pairs, rng.random(40))
    w = rng.normal(size=4)
    leaf = torch.tensor(w, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    step = 1e-6 * np.eye(4)
    slope = [(loss(torch.tensor(w + d)) - loss(torch.tensor(w - d))).item() / 2e-6 for d in step]
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-8)
    assert np.abs(slope).max() > 1e-3


@pytest.mark.parametrize("form", ["deterministic", "general"])
def test_the_exact_loss_is_the_cross_entropy_of_the_regret_model(form):
    mdp = random_mdp(18, deterministic=form == "deterministic")
    rng = np.random.default_rng(1)
    pairs, y = mdp.sample_segment_pairs(60, 4, rng=2), rng.random(60)
    loss = RewardLearner(value="exact", form=form).objective(mdp, pairs, y)
    for w in rng.normal(size=(5, 4)):  # in a row: the policy of one start is that of the last
        model = RegretPreference(mdp, w, form=form)
        assert loss(torch.tensor(w)).item() == pytest.approx(preference_loss(model, (pairs, y)), abs=1e-10)
    many = RewardLearner(value="gpi", form=form, n_policies=400, levels=(-2, -1, -0.5, 0.5, 1, 2), random_state=0)
    assert many.objective(mdp, pairs, y)(torch.tensor(w)).item() == pytest.approx(
        loss(torch.tensor(w)).item(), abs=0.05
    )


@pytest.mark.parametrize("options", [{"model": "partial_return"}, {}, {"value": "exact"}, {"form": "general"}])
def test_ties_alone_teach_nothing(options):
    mdp = random_mdp(19, gamma=0.99)
    learner = RewardLearner(**options, epochs=30, n_policies=5, random_state=0)
    learner.fit(mdp, mdp.sample_segment_pairs(20, rng=0), np.full(20, 0.5))
    np.testing.assert_array_equal(learner.reward_, 0)
    np.testing.assert_allclose(learner.policy_, 1 / 3)
    assert learner.loss_ == pytest.approx(np.log(2))
    assert mdp.scaled_return(learner.policy_, [1, -1, 2, 0.5]) == pytest.approx(0, abs=1e-9)


def test_partial_return_learning_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    mdp = random_mdp(20)
    pairs = mdp.sample_segment_pairs(300, rng=0)
    y = PartialReturnPreference(mdp, [0.5, -1, 0.3, 0.8]).label(pairs, rng=1)
    learner = RewardLearner("partial_return", learning_rate=0.05, epochs=1500).fit(mdp, pairs, y)
    X = mdp.segment_features(pairs.first) - mdp.segment_features(pairs.second)
    reference = linear_model.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(learner.reward_, reference.coef_[0], atol=1e-4)
    np.testing.assert_allclose(learner.predict_proba(pairs), reference.predict_proba(X), atol=1e-4)
    assert learner.loss_ == pytest.approx(preference_loss(learner, (pairs, y)), abs=1e-9)
    with pytest.raises(TypeError, match="RewardLearner"):
        preference_loss(learner, (pairs, y), folds=5)


def test_swapping_pairs_changes_nothing_and_seeds_repeat():
    mdp = random_mdp(21)
    pairs = mdp.sample_segment_pairs(50, rng=0)
    y = RegretPreference(mdp, [0.5, -1, 0.3, 0.8]).label(pairs, rng=1)
    before = y.copy(), pairs.first.states.copy(), mdp.P.copy()
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted = [
        RewardLearner(epochs=40, n_policies=10, swap=swap, random_state=3).fit(mdp, pairs, y)
        for swap in (True, True, False)
    ]
    np.testing.assert_array_equal(fitted[0].reward_, fitted[1].reward_)
    np.testing.assert_allclose(fitted[0].reward_, fitted[2].reward_, rtol=1e-6)
    np.testing.assert_allclose(fitted[0].loss_curve_, fitted[2].loss_curve_, rtol=1e-8)
    for now, then in zip((y, pairs.first.states, mdp.P), before):
        np.testing.assert_array_equal(now, then)
    assert (torch.random.get_rng_state() == state[0]).all()
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_regret_keeps_the_weights_of_the_lowest_loss_and_partial_return_the_last():
    mdp = random_mdp(22)
    pairs = mdp.sample_segment_pairs(80, rng=0)
    y = np.random.default_rng(0).integers(2, size=80).astype(float)  # noise: a large step size overshoots
    regret = RewardLearner(learning_rate=3, epochs=25, n_policies=20, random_state=0).fit(mdp, pairs, y)
    assert regret.loss_ == regret.loss_curve_.min() < regret.loss_curve_[-1]
    again = regret.objective(mdp, pairs, y)(torch.tensor(regret.reward_)).item()
    assert again == pytest.approx(regret.loss_)
    last = RewardLearner("partial_return", learning_rate=30, epochs=25).fit(mdp, pairs, y)
    assert last.loss_ > last.loss_curve_.min()


def test_no_optimal_policy_of_the_withheld_reward_stays_in_the_set():
    mdp = corridor(gamma=0.999)
    w = [-1.0, 10.0]
    learner = RewardLearner(n_policies=30, random_state=0)
    every = learner.policy_set(mdp)
    left = learner.set_params(withhold=w).policy_set(mdp)
    best = enumerate_optimal(mdp, np.array(w))
    optimal = [np.allclose(evaluate(mdp, p, np.array(w)), best) for p in every]
    assert 0 < sum(optimal) < len(every)
    np.testing.assert_array_equal(left, every[~np.array(optimal)])
    assert len({p[:4].tobytes() for p in every}) == len(every)
    with pytest.raises(ValueError, match="withhold"):
        RewardLearner(n_policies=1, levels=(1,), withhold=[1, 1]).policy_set(mdp)


@pytest.mark.parametrize("value", ["gpi", "exact"])
def test_regret_learns_what_a_gamble_is_worth_where_partial_return_cannot(value):
    # Safe 1, or even odds of 4 and -1: better on average. Order is all that noiseless partial-return labels tell.
    P, phi = np.zeros((4, 2, 4)), np.zeros((4, 2, 4, 3))
    P[0, 0, 1], P[0, 1, 2], P[0, 1, 3] = 1, 0.5, 0.5
    phi[0, 0, 1, 0], phi[0, 1, 2, 1], phi[0, 1, 3, 2] = 1, 1, 1
    mdp = TabularMDP(P, phi, [False, True, True, True])
    pairs = mdp.sample_segment_pairs(200, 1, rng=0)
    twin = [1, 2, -1]
    for w, action in (([1, 4, -1], 1), (twin, 0)):
        y = RegretPreference(mdp, w).label(pairs, None)
        learner = RewardLearner(value=value, epochs=60, random_state=0).fit(mdp, pairs, y)
        assert learner.policy_[0, action] == 1
        assert mdp.scaled_return(learner.policy_, w) == pytest.approx(1)
    same = [PartialReturnPreference(mdp, w).label(pairs, None) for w in ([1, 4, -1], twin)]
    np.testing.assert_array_equal(*same)


def test_estimator_conventions():
    base = pytest.importorskip("sklearn.base")
    learner = RewardLearner("partial_return", epochs=7, withhold=np.ones(3))
    twin = base.clone(learner)
    assert twin is not learner
    assert twin.get_params()["epochs"] == 7
    np.testing.assert_array_equal(twin.get_params()["withhold"], np.ones(3))
    assert repr(RewardLearner(epochs=7)) == "RewardLearner(epochs=7)"
    with pytest.raises(ValueError, match="no parameter 'depth'"):
        learner.set_params(depth=3)


# -- bad input --


def test_bad_mdps_are_refused():
    P, phi = np.full((2, 1, 2), 0.5), np.zeros((2, 1, 2, 1))
    loop = np.eye(3)[:, None]
    for arguments, message in (
        ({"P": P[0], "phi": phi}, "P has shape"),
        ({"P": P, "phi": phi[0]}, "phi has shape"),
        ({"P": 2 * P, "phi": phi}, r"P\[0, 0\] sums to 2"),
        ({"P": P * [3, -1], "phi": phi}, "negative"),
        ({"P": P, "phi": phi + np.nan}, "non-finite"),
        ({"P": P, "phi": phi, "gamma": 1.5}, "gamma"),
        ({"P": P, "phi": phi, "start": [1, 1]}, "start"),
        ({"P": P, "phi": phi, "terminal": [True, True]}, "terminal"),
        (
            {"P": loop, "phi": np.zeros((3, 1, 3, 1)), "terminal": [0, 0, 1], "gamma": 1},
            "cannot reach a terminal state",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TabularMDP(**arguments)
    mdp = corridor()
    with pytest.raises(ValueError, match="do not settle"):
        mdp.optimal_values([1, 0])
    with pytest.raises(ValueError, match="may never end"):
        mdp.successor_features(np.tile([1.0, 0.0], (5, 1)))
    with pytest.raises(ValueError, match="distribution over actions"):
        mdp.successor_features(np.ones((5, 2)))
    with pytest.raises(ValueError, match="2 finite weights"):
        mdp.optimal_values([1, 2, 3])
    with pytest.raises(ValueError, match="smaller length"):
        TabularMDP(np.eye(2)[[[1], [1]]], phi, [False, True]).sample_segments(3, 2, absorbing=False)
    with pytest.raises(ValueError, match="limit"):
        mdp.enumerate_segments(3, limit=10)


def test_bad_data_is_refused():
    mdp = corridor(gamma=0.999)
    pairs = mdp.sample_segment_pairs(4, rng=0)
    learner = RewardLearner(epochs=1, n_policies=2)
    impossible = Segments(np.array([[0, 3]]), np.array([[1]]))
    with pytest.raises(ValueError, match="no transition from state 0 by action 1 to state 3"):
        learner.fit(mdp, SegmentPairs(impossible, impossible), [1])
    with pytest.raises(ValueError, match="segment 0, step 0"):
        mdp.regret(Segments(np.array([[0, 1]]), np.array([[-1]])), [1, 1])
    with pytest.raises(ValueError, match="outside 0 to 4"):
        mdp.check_segments(Segments(np.array([[0, 5]]), np.array([[1]])))
    with pytest.raises(ValueError, match="actions outside"):
        mdp.check_segments(Segments(np.array([[0, 1]]), np.array([[2]])))
    for labels, message in (([1, 0, 0.5, 1.2], "not 1.2"), ([1, 0, 0, np.nan], "not nan"), ([1, 0], "4 labels")):
        with pytest.raises(ValueError, match=message):
            learner.fit(mdp, pairs, labels)
        with pytest.raises(ValueError, match=message):
            RegretPreference(mdp, [1, 1]).fit(pairs, labels)
    with pytest.raises(ValueError, match="no pairs"):
        learner.fit(mdp, pairs[:0], [])
    with pytest.raises(ValueError, match="states \\(n, L \\+ 1\\)"):
        Segments(np.zeros((2, 3), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="integer"):
        Segments(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="as many"):
        SegmentPairs(pairs.first, pairs.second[:2])
    with pytest.raises(ValueError, match="gamma < 1"):
        learner.fit(corridor(), pairs, [1, 0, 0, 1])
    for bad, message in (
        ({"model": "reward"}, "model"),
        ({"value": "td"}, "value"),
        ({"form": "luck"}, "form"),
        ({"temperature": 0}, "temperature"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardLearner(**bad).fit(mdp, pairs, [1, 0, 0, 1])
    with pytest.raises(ValueError, match="noise"):
        RegretPreference(mdp, [1, 1]).label(pairs, "normal")
    with pytest.raises(ValueError, match="folds"):
        preference_loss(RegretPreference(mdp, [1, 1]), (pairs, [1, 0, 0, 1]), folds=9)
    with pytest.raises(ValueError, match="three numbers"):
        DescriptivePreference(mdp, [1, 1], weights=(1, 1))


# -- gymnasium --


def lake(rewards=(0.0, 1.0)):
    """Three cells in a row, slippery; hole on the left, goal on the right: rows as gymnasium's FrozenLake has them."""

    def row(s, to):
        moves = []
        for target in (to, s):
            end = target in (0, 3)
            moves.append((0.5, target, rewards[target == 3], end))
        return moves

    table = {s: {a: row(s, s + (-1, 1)[a]) for a in range(2)} for s in (1, 2)}
    table |= {s: {a: [(1.0, s, 0, True)] for a in range(2)} for s in (0, 3)}
    return {s: table[s] for s in range(4)}


def test_from_gymnasium_reads_a_transition_table():
    env = SimpleNamespace(P=lake(), initial_state_distrib=np.array([0, 1.0, 0, 0]))
    mdp = TabularMDP.from_gymnasium(SimpleNamespace(unwrapped=env), gamma=0.9)
    np.testing.assert_array_equal(mdp.terminal, [True, False, False, True])
    np.testing.assert_array_equal(mdp.P[2], [[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(mdp.reward, [0, 1])
    np.testing.assert_array_equal(mdp.start, [0, 1, 0, 0])
    # Going right: v2 = .5 + .5 * .9 v2 and v1 = .45 v2 + .45 v1.
    v2 = 0.5 / 0.55
    np.testing.assert_allclose(mdp.optimal_values(mdp.reward)[0], [0, 0.45 * v2 / 0.55, v2, 0])
    features = np.random.default_rng(0).normal(size=(4, 2, 4, 3))
    own = TabularMDP.from_gymnasium(env, features=features)
    assert own.reward is None
    np.testing.assert_allclose(own.phi[1:3][mdp.P[1:3] > 0], features[1:3][mdp.P[1:3] > 0])


def test_from_gymnasium_keeps_a_state_that_ends_the_episode_only_sometimes():
    # As in Taxi: state 2 is the end when it is entered from 1, and an ordinary state when entered from 0.
    P = {
        0: {0: [(1.0, 2, -1, False)], 1: [(1.0, 1, -1, False)]},
        1: {0: [(1.0, 2, 20, True)], 1: [(1.0, 0, -1, False)]},
        2: {0: [(1.0, 1, -1, False)], 1: [(1.0, 2, -10, False)]},
    }
    mdp = TabularMDP.from_gymnasium(SimpleNamespace(P=P), gamma=1.0)
    np.testing.assert_array_equal(mdp.terminal, [False, False, False, True])
    np.testing.assert_array_equal(mdp.reward, [-10, -1, 20])
    np.testing.assert_allclose(mdp.optimal_values(mdp.reward)[0], [19, 20, 19, 0])
    np.testing.assert_allclose(mdp.start, [1 / 3, 1 / 3, 1 / 3, 0])
    # A table that would loop for ever through a state marked as the end needs no further state.
    P[0][0] = [(1.0, 0, -1, False)]
    assert TabularMDP.from_gymnasium(SimpleNamespace(P=P)).n_states == 3


def test_from_gymnasium_refuses_what_is_no_table():
    for P, message in ((None, "no transition table"), ({1: {}}, "no transition table")):
        with pytest.raises(ValueError, match=message):
            TabularMDP.from_gymnasium(SimpleNamespace(P=P))
    with pytest.raises(ValueError, match="actions 0 to 1"):
        TabularMDP.from_gymnasium(SimpleNamespace(P=lake() | {2: {0: []}}))
    with pytest.raises(ValueError, match="outside 0 to 0"):
        TabularMDP.from_gymnasium(SimpleNamespace(P={0: {0: [(1.0, 1, 0, False)]}}))
    with pytest.raises(ValueError, match="sums to"):
        TabularMDP.from_gymnasium(SimpleNamespace(P={0: {0: [(0.5, 1, 0, True)]}, 1: {0: []}}))


# -- the room's tasks --


def tabular(world):
    return TabularMDP(world.P, world.phi, world.terminal, gamma=world.gamma)


def test_the_tasks_planner_and_labels_agree_with_the_methods():
    """Two implementations: the task's, which scores, and the method's, which learns."""
    rng = np.random.default_rng(0)
    for lottery in (False, True):
        world, w = room.random_lottery_grid(rng) if lottery else room.random_grid(rng, [3, 6], [5, 6])
        mdp = tabular(world)
        weights = np.stack([w, *rng.normal(size=(3, 6))])
        np.testing.assert_allclose(room.plan(world, weights), mdp.optimal_values(weights)[1], rtol=1e-7, atol=1e-7)
        np.testing.assert_array_equal(room.optimal_actions(world, weights), mdp.greedy_policy(weights) > 0)
        for learned in weights:
            expected = mdp.scaled_return(mdp.greedy_policy(learned), w)
            assert room.scaled_return(world, learned, w) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        states, actions = room.sample_segments(world, 200, 3, rng)
        segments = Segments(states, actions)
        mdp.check_segments(segments)
        collected = room.partial_return(world, states, actions, weights)
        np.testing.assert_allclose(collected, mdp.partial_return(segments, weights), atol=1e-9)
        lost = room.negative_regret(world, states, actions, weights)
        np.testing.assert_allclose(lost, -mdp.regret(segments, weights), rtol=1e-7, atol=1e-6)
        full = room.sample_segments(world, 100, 3, rng, absorbing=False)
        assert (full[1] >= 0).all()
        mdp.check_segments(Segments(*full))
        every = mdp.enumerate_segments(2)
        found = np.c_[room.all_segments(world, 2)]
        np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(np.c_[every.states, every.actions], axis=0))
        assert len(found) == len(every)


def test_grid_follows_the_rules_of_the_delivery_domain():
    plain, goal, sheep, coin, block, brick, house = range(7)
    board = np.array([[plain, coin, house], [brick, block, goal], [brick, sheep, plain]])
    mdp = tabular(room.grid_world(board))
    w = np.array([-1.0, 50, -50, 1, -1, -2])
    index = {tuple(c): i for i, c in enumerate(np.argwhere(board != house))}
    worth = {plain: -1, goal: 50, sheep: -50, coin: 0, block: -2, brick: -2}
    moves = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}
    for (y, x), s in index.items():
        for a, (dy, dx) in moves.items():
            to = (y + dy, x + dx)
            if board[y, x] in (goal, sheep):
                to, reward = (y, x), 0
            elif to not in index:
                to, reward = (y, x), -2 if board[y, x] == brick else -1
            else:
                reward = worth[board[to]]
            assert mdp.P[s, a, index[to]] == 1
            assert mdp.phi[s, a, index[to]] @ w == reward
    gamble = tabular(room.grid_world(board, lottery=True))
    s, a = index[1, 1], 1
    assert gamble.P[s, a, index[2, 1]] == gamble.P[s, a, -1] == 0.5
    assert gamble.phi[s, a, -1] @ w == 1
    assert gamble.terminal[-1]
    assert not gamble.deterministic


def test_label_order_is_equal_where_all_pairwise_labels_are():
    rng = np.random.default_rng(0)
    utilities = rng.integers(0, 4, size=(30, 5)).astype(float)
    sign = np.sign(utilities[:, :, None] - utilities[:, None])
    ranks = room.label_order(utilities + 1e-13 * rng.normal(size=utilities.shape))
    same = (sign[:, None] == sign[None]).all((2, 3))
    np.testing.assert_array_equal((ranks[:, None] == ranks[None]).all(2), same)


@pytest.mark.parametrize("kind", ["lottery", "corridor", "detour"])
def test_rewards_that_agree_on_all_regret_labels_share_their_optimal_policies(kind):
    settings = {"kind": kind, "worlds": 6, "candidates": 200}
    claim = next(c for c in CLAIMS if c.settings.get("kind") == kind)
    results = {
        arm.name: resolve(claim.task.run)(arm, Trial(seed=1000, settings=settings))
        for arm in (claim.baseline, claim.method)
    }
    assert results["regret"]["keeps_optimal"] == 1.0
    assert results["regret"]["agreeing"] > 0
    assert results["partial-return"]["keeps_optimal"] < 0.9


def test_a_constant_per_step_never_changes_partial_return_labels_of_full_segments():
    arm, settings = Arm("partial-return"), {"kind": "corridor", "worlds": 4, "candidates": 100}
    assert resolve(room.REWARD_IDENTIFIABILITY.run)(arm, Trial(seed=1000, settings=settings))["agreeing"] == 1.0


def test_arms_meet_the_same_worlds_pairs_and_noise(monkeypatch):
    seen = []
    settings = {**CLAIMS[0].task.budgets["quick"].settings, "worlds": 2, "noise": "logistic", "fit": {"epochs": 3}}

    def spy(world, states, actions, labels, *, rng, withhold, **options):
        seen.append((world.P, states, actions, withhold, labels, rng.random()))
        return learn(world, states, actions, labels, rng=rng, withhold=withhold, **options)

    monkeypatch.setattr("counterproof.rewards.claims.regret_preference.learn", spy)
    for arm in (REGRET, MISSPECIFIED, PARTIAL_RETURN):
        for world in ("grid", "lottery"):
            points = []
            trial = Trial(seed=1000, settings={**settings, "world": world}, listener=points.append)
            metrics = resolve(CLAIMS[0].task.run)(arm, trial)
            assert set(metrics) == set(CLAIMS[0].task.metrics)
            assert -1 <= metrics["scaled_return"] <= 1 + 1e-9
            assert [p["progress"] for p in points] == [0.5, 1]
    for i in range(4):
        for j in (4, 8):
            for one, other in zip(seen[i][:4], seen[i + j][:4]):
                np.testing.assert_array_equal(one, other)
            assert seen[i][5] == seen[i + j][5]
        np.testing.assert_array_equal(seen[i][4], seen[i + 4][4])  # labels too, where the same model labels
    assert any((seen[i][4] != seen[i + 8][4]).any() for i in range(4))
    with pytest.raises(ValueError, match="has no method"):
        resolve(CLAIMS[0].task.run)(Arm("empty"), Trial(seed=1000, settings=settings))
