"""One-sided feedback and panels against sums over all rules, brute force over pairs and auditors, full programmes."""

import csv
import itertools
import json
import math
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.optimize import linprog

pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from counterproof.bench.task import Arm, Trial, resolve
from counterproof.errors import UserError
from counterproof.incentives import (
    Auditor,
    ColumnDistance,
    FairOneSidedClassifier,
    HalfSpaces,
    Panel,
    best_fair_policy,
    breast_cancer_table,
    chosen_coordinates,
    estimate_losses,
    fairness_frontier,
    frontier_figure,
    lagrangian_loss,
    read_decision_table,
    replay_decisions,
    run_one_sided,
    semi_bandit_losses,
    separating_points,
    shifted_loss,
)
from counterproof.incentives.claims import fair_one_sided as claims


def patterns(s):
    """All 2^s labelings of s points, as a class on X with one column that holds the point's number."""
    table = np.array(list(itertools.product([False, True], repeat=s)))
    return lambda X: table[:, np.asarray(X)[:, 0].astype(int)].T


def people(seed, T=60, k=4, d=2):
    rng = np.random.default_rng(seed)
    X = rng.random((T, k, d))
    return X, (rng.random((T, k)) < 0.2 + 0.6 * X[..., 0]).astype(int)


def some_rules(seed=0, count=12):
    rng = np.random.default_rng(seed)
    return HalfSpaces.sample(count, rng.random((50, 2)), rng) + HalfSpaces.constants(2)


def some_panel(gamma=0.6, alpha=0.1):
    return Panel([Auditor(ColumnDistance(L, [0])) for L in (0.8, 1.0, 1.2, 1.5, 2.5)], gamma=gamma, alpha=alpha)


# -- the reduction --


def test_the_shifted_loss_halves_differences_in_0_1_loss():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=50)
    a, b = rng.integers(2, size=(2, 50))
    errors = (a != y).astype(int) - (b != y)
    np.testing.assert_allclose(shifted_loss(a, y) - shifted_loss(b, y), errors / 2)
    hidden = np.where(a == 1, y, np.nan)
    np.testing.assert_array_equal(shifted_loss(a, hidden), shifted_loss(a, y))


@pytest.mark.parametrize("violation", [None, (0, 2), (3, 1)])
def test_the_semi_bandit_s_losses_are_half_the_lagrangian_up_to_what_no_rule_changes(violation):
    rng = np.random.default_rng(1)
    y = rng.integers(2, size=4)
    rules = rng.integers(2, size=(4, 9))
    vector = semi_bandit_losses(y, violation, 3.0)
    actions = chosen_coordinates(rules, violation)
    assert vector.shape == (6, 2)
    assert (actions.sum((1, 2)) == 6).all()
    linear = (actions * vector).sum((1, 2))
    exact = []
    for h in range(9):
        errors = sum(int(rules[i, h] != y[i]) for i in range(4))
        exact.append(errors + (3.0 * (rules[violation[0], h] - rules[violation[1], h]) if violation else 0))
        assert lagrangian_loss(rules[:, h], y, violation, 3.0) == pytest.approx(exact[-1])
        np.testing.assert_array_equal(chosen_coordinates(rules[:, h], violation), actions[h])
    np.testing.assert_allclose(linear - linear[0], (np.array(exact) - exact[0]) / 2)


def test_the_lagrangian_is_linear_in_the_policy():
    rng = np.random.default_rng(2)
    y, rules = rng.integers(2, size=3), rng.integers(2, size=(3, 8))
    pi = rng.dirichlet(np.ones(8))
    mixed = sum(pi[h] * lagrangian_loss(rules[:, h], y, (2, 0), 1.7) for h in range(8))
    assert lagrangian_loss(rules @ pi, y, (2, 0), 1.7) == pytest.approx(mixed)


@pytest.mark.parametrize("violation", [None, (1, 0)])
def test_estimates_are_unbiased_summed_over_the_draw(violation):
    rng = np.random.default_rng(3)
    y = np.array([0.0, 1.0, 1.0])
    rules = np.array(list(itertools.product([0, 1], repeat=3))).T
    pi = rng.dirichlet(np.ones(8))
    q = rules @ pi
    mean = {"one-sided": 0.0, "semi-bandit": 0.0}
    for h, form in itertools.product(range(8), mean):
        decided = rules[:, h]
        shown = np.where(decided == 1, y, np.nan)
        weights = 1 / np.where(decided == 1, q, 1 - q)
        mean[form] = mean[form] + pi[h] * estimate_losses(decided, shown, weights, violation, 2.0, form=form)
    truth = semi_bandit_losses(y, violation, 2.0)
    np.testing.assert_allclose(mean["semi-bandit"], truth)
    np.testing.assert_allclose(np.diff(mean["one-sided"], axis=1), np.diff(truth, axis=1))
    assert (mean["one-sided"][:3, 0] == 0).all()


# -- auditors and panels --


def test_the_panel_is_the_count_of_its_auditors():
    rng = np.random.default_rng(4)
    for m, gamma in itertools.product([1, 2, 3, 5], [0.2, 0.5, 0.6, 1.0]):
        tables = rng.random((m, 6, 6)) * 0.4
        X = np.arange(6.0)[:, None]
        panel = Panel([Auditor(lambda a, b, d=d: d[int(a[0]), int(b[0])]) for d in tables], gamma=gamma, alpha=0.05)
        pi = rng.random(6)
        expected = np.zeros((6, 6), bool)
        for i, j in itertools.permutations(range(6), 2):
            objecting = sum(pi[i] - pi[j] > d[i, j] + 0.05 for d in tables)
            expected[i, j] = objecting >= gamma * m - 1e-12
        np.testing.assert_array_equal(panel.violations(pi, X), expected)
        pair = panel(pi, X)
        assert expected[pair] if expected.any() else pair is None


def test_worked_pair_is_ordered():
    """pi = (.9, .2), d = .3, alpha = .1: the gap .7 exceeds .4; with d = .65 it does not exceed .75."""
    X = np.zeros((2, 1))
    assert Panel([Auditor(lambda a, b: 0.3)], alpha=0.1)([0.9, 0.2], X) == (0, 1)
    assert Panel([Auditor(lambda a, b: 0.3)], alpha=0.1)([0.2, 0.9], X) == (1, 0)
    assert Panel([Auditor(lambda a, b: 0.65)], alpha=0.1)([0.9, 0.2], X) is None


def test_panels_grow_with_smaller_gamma_and_do_not_change_with_copies():
    rng = np.random.default_rng(5)
    X, pi = rng.random((6, 2)), rng.random(6)
    auditors = [Auditor(ColumnDistance(L, [0])) for L in (0.2, 0.6, 1.1, 2.0)]
    before = np.zeros((6, 6), bool)
    sizes = set()
    for gamma in (1.0, 0.75, 0.5, 0.25):
        now = Panel(auditors, gamma=gamma).violations(pi, X)
        assert (now >= before).all()
        np.testing.assert_array_equal(Panel(auditors * 3, gamma=gamma).violations(pi, X), now)
        before = now
        sizes.add(int(now.sum()))
    assert len(sizes) > 1
    one = Panel(auditors[:1]).violations(pi, X)
    np.testing.assert_array_equal(one, pi[:, None] - pi > ColumnDistance(0.2, [0]).pairwise(X))


def test_extreme_auditors():
    rng = np.random.default_rng(6)
    X, pi = rng.random((5, 2)), rng.random(5)
    assert Panel([Auditor(lambda a, b: 1.0)])(pi, X) is None
    alike = Panel([Auditor(lambda a, b: 0.0)])
    assert alike(pi, X) == (int(pi.argmax()), int(pi.argmin()))
    assert alike(np.full(5, 0.3), X) is None
    assert alike([0.7], X[:1]) is None  # nobody to compare with
    same = some_panel(alpha=0.0)
    rules = some_rules()
    policy = rng.dirichlet(np.ones(len(rules)))
    assert same(rules(X[[2, 2, 2]]) @ policy, X[[2, 2, 2]]) is None


def test_column_distance_by_hand():
    X = np.array([[0.0, 1.0, 5.0], [0.5, 3.0, 5.0]])
    assert ColumnDistance(0.2, [0, 1])(X[0], X[1]) == pytest.approx(0.2 * (0.5 + 2) / 2)
    assert ColumnDistance(0.2, [0, 1], [1.0, 0.1])(X[0], X[1]) == pytest.approx(0.2 * (0.5 + 0.2))
    assert ColumnDistance(9.0)(X[0], X[1]) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Panel([]), "at least one"),
        (lambda: Panel([Auditor(lambda a, b: 0)], gamma=0), "gamma"),
        (lambda: Panel([Auditor(lambda a, b: 0)], gamma=1.2), "gamma"),
        (lambda: Panel([Auditor(lambda a, b: 0)], alpha=-0.1), "alpha"),
        (lambda: Panel([Auditor(lambda a, b: 1.5)])([0.1, 0.2], np.zeros((2, 1))), "1.5 apart"),
        (lambda: Panel([Auditor(lambda a, b: math.nan)])([0.1, 0.2], np.zeros((2, 1))), "nan apart"),
        (lambda: Panel([Auditor(lambda a, b: 0)])([0.1, 1.2], np.zeros((2, 1))), "1.2"),
        (lambda: Panel([Auditor(lambda a, b: 0)])([0.1], np.zeros((2, 1))), "2 people"),
        (lambda: ColumnDistance(1.0, [4]).pairwise(np.zeros((2, 2))), "no column 4"),
        (lambda: ColumnDistance(-1.0), "scale"),
    ],
)
def test_bad_panels_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# -- Exp2 --


def play(learner, X, y, panel=None, hide=lambda y, decided: np.where(decided == 1, y, np.nan)):
    for batch, labels in zip(X, y):
        decided = learner.predict(batch)
        pair = None if panel is None else panel(learner.predict_proba(batch)[:, 1], batch)
        learner.partial_fit(batch, hide(labels.astype(float), decided), violation=pair)
    return learner


def test_labels_of_rejected_people_never_matter():
    X, y = people(7)
    rules, panel = some_rules().distinct(X.reshape(-1, 2)), some_panel()
    for settings in (
        {"algorithm": "exp2"},
        {"algorithm": "exp2", "estimate": "semi-bandit"},
        {"algorithm": "ftpl", "separator": X.reshape(-1, 2)},
    ):
        found = []
        for hide in (
            lambda y, decided: np.where(decided == 1, y, np.nan),
            lambda y, decided: np.where(decided == 1, y, 1 - y),
            lambda y, decided: np.where(decided == 1, y, 77.0),
        ):
            learner = FairOneSidedClassifier(rules, C=3.0, horizon=60, random_state=1, **settings)
            play(learner, X, y, panel, hide)
            found.append((learner._log_weights.tobytes(), learner._leader_losses.tobytes()))
        assert found[0] == found[1] == found[2]
        assert np.any(learner._log_weights if settings["algorithm"] == "exp2" else learner._leader_losses)


@pytest.mark.parametrize("estimate", ["one-sided", "semi-bandit"])
def test_exp2_follows_the_written_update(estimate):
    """Weights by hand, rule by rule, from the draws that the learner made."""
    X, y = people(8)
    rules, panel, C, eta = some_rules(), some_panel(alpha=0.0), 4.0, 0.05
    learner = FairOneSidedClassifier(rules, C=C, eta=eta, horizon=60, estimate=estimate, random_state=3)
    log_w = np.zeros(len(rules))
    objections = 0
    for batch, labels in zip(X, y):
        H = rules(batch).astype(float)
        pi = np.exp(log_w) / np.exp(log_w).sum()
        q = [sum(pi[h] * H[i, h] for h in range(len(rules))) for i in range(4)]
        decided = learner.predict(batch)
        np.testing.assert_allclose(learner.predict_proba(batch), np.stack([1 - np.array(q), q], 1), atol=1e-12)
        np.testing.assert_allclose(learner.policy(), pi, atol=1e-12)
        assert any((H[:, h] == decided).all() for h in range(len(rules)))
        pair = panel(q, batch)
        learner.partial_fit(batch, np.where(decided == 1, labels, np.nan), violation=pair)
        for h in range(len(rules)):
            loss = 0.0
            for i in range(4):
                if estimate == "one-sided":
                    loss += H[i, h] * (0.5 - labels[i]) / q[i] if decided[i] else 0.0
                elif decided[i]:
                    loss += H[i, h] * (1 - labels[i]) / q[i]
                else:
                    loss += (1 - H[i, h]) * 0.5 / (1 - q[i])
            if pair is not None:
                loss += C / 2 * (H[pair[0], h] - H[pair[1], h])
            log_w[h] -= eta * loss
        objections += pair is not None
    assert 5 < objections < 60
    assert learner.rounds_ == 60


def test_draws_follow_the_policy():
    rules = patterns(2)
    X = np.array([[0.0], [1.0]])
    learner = FairOneSidedClassifier(rules, C=0.0, eta=1.0, horizon=1, random_state=0)
    learner.predict(X)
    learner._log_weights[:] = np.log([0.1, 0.2, 0.3, 0.4])
    drawn = np.array([learner.predict(X) for _ in range(4000)])
    share = [((drawn == pattern).all(1)).mean() for pattern in itertools.product([0, 1], repeat=2)]
    np.testing.assert_allclose(share, [0.1, 0.2, 0.3, 0.4], atol=0.025)
    np.testing.assert_allclose(learner.predict_proba(X)[:, 1], [0.7, 0.6])


def test_without_objections_the_weight_of_fairness_is_not_felt():
    X, y = people(9)
    found = [
        play(FairOneSidedClassifier(some_rules(), C=C, eta=0.1, horizon=60, random_state=0), X, y, panel).policy()
        for C, panel in ((0.0, some_panel()), (5.0, None), (5.0, Panel([Auditor(lambda a, b: 1.0)])), (0.0, None))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_with_all_labels_it_is_hedge():
    X, y = people(10)
    rules = some_rules()
    learner = FairOneSidedClassifier(rules, C=0.0, eta=0.1, horizon=60, full_information=True, random_state=0)
    play(learner, X, y, hide=lambda y, decided: y)
    losses = (rules(X.reshape(-1, 2)) != y.reshape(-1, 1)).sum(0)
    hedge = np.exp(-0.1 * (losses - losses.min()) / 2)
    np.testing.assert_allclose(learner.policy(), hedge / hedge.sum(), rtol=1e-9)
    assert learner.labels_seen_ == y.size


def test_default_step_size_and_weight_of_fairness():
    X, y = people(11, T=1)
    rules = some_rules()
    learner = FairOneSidedClassifier(rules, horizon=256, full_information=True, random_state=0)
    play(learner, X, y, hide=lambda y, decided: y)
    assert pytest.approx(4.0) == learner.C_
    eta = 2 * math.sqrt(math.log(14) / 256) / (4 + 4)
    relative = rules(X[0]).astype(float).T @ (0.5 - y[0])
    np.testing.assert_allclose(np.diff(learner._log_weights), -eta * np.diff(relative), atol=1e-12)


def test_an_unknown_horizon_doubles():
    X, y = people(12, T=200)
    learner = FairOneSidedClassifier(some_rules(), C="auto", random_state=0)
    seen = []
    for batch, labels in zip(X, y):
        decided = learner.predict(batch)
        seen.append(learner.C_)
        if len(seen) in (65, 193):
            np.testing.assert_array_equal(learner.policy(), np.full(14, 1 / 14))
        learner.partial_fit(batch, np.where(decided == 1, labels, np.nan))
    np.testing.assert_allclose(seen, [64**0.25] * 64 + [128**0.25] * 128 + [256**0.25] * 8)


# -- FTPL --


def test_without_noise_the_leader_is_followed():
    X, y = people(13)
    rules = some_rules().distinct(X.reshape(-1, 2))
    learner = FairOneSidedClassifier(
        rules, algorithm="ftpl", C=0.0, epsilon=math.inf, separator=X.reshape(-1, 2), horizon=60,
        full_information=True, random_state=0,
    )  # fmt: skip
    losses = np.zeros(len(rules))
    for batch, labels in zip(X, y):
        leader = int(losses.argmin())
        decided = learner.predict(batch)
        np.testing.assert_array_equal(decided, rules(batch)[:, leader])
        np.testing.assert_array_equal(learner.predict_proba(batch)[:, 1], decided)
        learner.partial_fit(batch, labels)
        losses += ((rules(batch) != labels[:, None]).sum(0) - labels.sum()) / 2
    assert len(set(losses)) > 3


def test_large_noise_draws_all_sign_patterns_alike():
    X = np.arange(3.0)[:, None]
    learner = FairOneSidedClassifier(
        patterns(3), algorithm="ftpl", C=0.0, epsilon=1e-9, separator=X, horizon=9, random_state=0
    )
    learner.predict(X)
    learner._leader_losses += np.linspace(0, 50, 8)
    drawn = learner._draws(X, 16000, np.random.default_rng(0)) @ [4, 2, 1]
    share = np.bincount(drawn, minlength=8) / 16000
    np.testing.assert_allclose(share, 1 / 8, atol=4 * math.sqrt(1 / 8 * 7 / 8 / 16000))


def test_noise_is_laplace_on_the_separator():
    """One point, two rules: reject unless noise < -(loss of accepting); P(Laplace(b) < -c) = exp(-c / b) / 2."""
    X = np.zeros((1, 1))
    learner = FairOneSidedClassifier(
        patterns(1), algorithm="ftpl", C=0.0, epsilon=0.5, separator=X, horizon=9, random_state=0
    )
    learner.predict(X)
    learner._leader_losses[1] += 1.5
    share = learner._draws(X, 20000, np.random.default_rng(0)).mean()
    assert share == pytest.approx(math.exp(-1.5 * 0.5) / 2, abs=0.012)


@pytest.mark.parametrize("cap", [10_000, 3])
def test_geometric_resampling_estimates_one_over_the_probability(cap):
    X = np.arange(2.0)[:, None]
    learner = FairOneSidedClassifier(
        patterns(2), algorithm="ftpl", C=0.0, epsilon=1.0, separator=X, horizon=9, cap=cap, random_state=0
    )
    learner.predict(X)
    learner._leader_losses += patterns(2)(X)[0] * 1.2  # accepting the first person has cost 1.2
    q = [math.exp(-1.2) / 2, 0.5]
    one, both = np.array([True, True]), np.array([True, True])
    J = np.array([learner._resampled(X, one, both) for _ in range(6000)])
    expected = [(1 - (1 - p) ** cap) / p for p in q]
    error = J.std(0) / math.sqrt(len(J))
    assert (np.abs(J.mean(0) - expected) < 4 * error).all()
    assert J.max() <= cap
    assert (learner.capped_ > 0) == (cap == 3)


def test_ftpl_learns_by_the_written_update():
    X, y = people(14)
    rules, panel = some_rules().distinct(X.reshape(-1, 2)), some_panel(alpha=0.0)
    learner = FairOneSidedClassifier(
        rules, algorithm="ftpl", C=3.0, horizon=60, separator=X.reshape(-1, 2), cap=1, random_state=0
    )  # with a cap of 1 every weight is 1
    total = np.zeros(len(rules))
    for batch, labels in zip(X, y):
        decided = learner.predict(batch)
        pair = panel(learner.predict_proba(batch)[:, 1], batch)
        learner.partial_fit(batch, np.where(decided == 1, labels, np.nan), violation=pair)
        H = rules(batch)
        total += sum(H[i] * (0.5 - labels[i]) for i in range(4) if decided[i])
        if pair is not None:
            total += 1.5 * (H[pair[0]].astype(float) - H[pair[1]])
    np.testing.assert_allclose(learner._leader_losses, total, atol=1e-12)


def test_an_estimator_as_the_oracle_minimises_weighted_errors():
    """A tree without limits fits every weighted sign: the empirical risk minimiser over all labelings."""
    rng = np.random.default_rng(15)
    X = np.arange(6.0)[:, None]
    learner = FairOneSidedClassifier(
        estimator=DecisionTreeClassifier(), algorithm="ftpl", C=0.0, epsilon=2.0, separator=X, horizon=50,
        policy_samples=4, cap=5, random_state=0,
    )  # fmt: skip
    costs = rng.normal(size=6)
    learner.predict(X)
    np.testing.assert_array_equal(learner._oracle(X, costs)(X), costs < 0)
    np.testing.assert_array_equal(learner._oracle(X, np.abs(costs))(X), np.zeros(6))
    np.testing.assert_array_equal(learner._oracle(X, -np.abs(costs))(X), np.ones(6))
    state = np.random.get_state()[1].tobytes()  # noqa: NPY002
    batch = X[[0, 0, 3]]
    total = np.zeros(6)
    for _ in range(5):
        decided = learner.predict(batch)
        learner.partial_fit(batch, np.where(decided == 1, 1.0, np.nan), violation=(0, 2))
        assert np.random.get_state()[1].tobytes() == state  # noqa: NPY002
    for row, cost in learner._past.values():
        total[int(row[0])] = cost
    assert total[1:3].tolist() == [0, 0]
    assert total[0] <= 0
    oracle = FairOneSidedClassifier(
        estimator=LogisticRegression(), algorithm="ftpl", C=1.0, separator=X, horizon=50, policy_samples=5, cap=5,
        random_state=0,
    )  # fmt: skip
    run = run_one_sided(oracle, [(batch, np.array([1, 1, 0]))] * 5, some_panel())
    assert np.isfinite(run.error)
    assert oracle.policy_error(3) == pytest.approx(2 * math.sqrt(math.log(6 / 0.05) / 10))


def test_a_separator_must_separate():
    X = np.arange(3.0)[:, None]
    learner = FairOneSidedClassifier(patterns(3), algorithm="ftpl", separator=X[:2], random_state=0)
    with pytest.raises(ValueError, match="rules 0 and 1 agree on every point"):
        learner.predict(X)
    table = np.random.default_rng(16).random((200, 5)) < 0.5
    table = np.concatenate([table, table[:, :2]], 1)  # two rules twice
    taken = separating_points(table)
    assert len(np.unique(table[taken], axis=1).T) == len(np.unique(table, axis=1).T) == 5
    assert 3 <= len(taken) <= 5
    assert separating_points(np.ones((4, 3))).size == 0


# -- regret --


def test_best_fair_policy_is_the_programme_with_all_constraints():
    rng = np.random.default_rng(17)
    for _ in range(5):
        y = rng.integers(2, size=40)
        decided = (y[:, None] == 1) ^ (rng.random((40, 10)) < 0.25)  # right three times in four
        decided[:, 0], decided[:, 1] = False, True
        left, right = np.nonzero(~np.eye(40, dtype=bool))
        limits = 0.15 + 0.5 * rng.random(len(left))
        policy, errors = best_fair_policy(decided, y, left, right, limits)
        D = decided.astype(float)
        whole = linprog((y[:, None] != D).sum(0), D[left] - D[right], limits, np.ones((1, 10)), [1.0])
        assert errors == pytest.approx(whole.fun, abs=1e-6)
        assert ((D[left] - D[right]) @ policy <= limits + 1e-8).all()
        free = (y[:, None] != D).sum(0).min()
        assert errors > free
        np.testing.assert_allclose(best_fair_policy(decided, y, [], [], [])[1], free)
    with pytest.raises(ValueError, match="no mixture"):
        best_fair_policy([[1], [0]], [1, 0], [0], [1], [0.5])


@pytest.mark.parametrize("C", [0.0, 0.5, 6.0])
def test_both_inequalities_hold_exactly_on_a_run(C):
    X, y = people(18, T=150)
    rules = some_rules()
    panel = some_panel(alpha=0.1)
    run = run_one_sided(FairOneSidedClassifier(rules, C=C, horizon=150, random_state=0), zip(X, y), panel)
    found = run.regret(rules, slack=0.05)
    assert found.violations == run.objected.sum() > 10
    assert found.accuracy <= found.lagrangian + 1e-9
    assert found.violations <= found.violation_bound
    # The step behind both, round by round: an objection costs at least C eps more than the benchmark pays.
    own = errors = best = benchmark = 0.0
    for t in range(150):
        q, p = run.probabilities[t], rules(X[t]) @ found.policy
        assert not (p[:, None] - p > panel.limits(X[t], slack=0.05) + 1e-8).any()
        a = lagrangian_loss(q, y[t], run.pairs[t], C) - lagrangian_loss(p, y[t], run.pairs[t], C)
        b = lagrangian_loss(q, y[t], None, C) - lagrangian_loss(p, y[t], None, C)
        assert a >= b + (C * 0.05 if run.pairs[t] else 0) - 1e-7
        own, errors = own + a, errors + b
        best += np.abs(p - y[t]).sum()
    assert found.lagrangian == pytest.approx(own)
    assert found.accuracy == pytest.approx(errors)
    assert found.benchmark_error == pytest.approx(best / 600)
    assert run.error == pytest.approx(np.abs(np.concatenate(run.probabilities) - y.ravel()).mean())
    each = [
        sum(lagrangian_loss(rules(X[t])[:, h], y[t], run.pairs[t], C) for t in range(150)) for h in range(len(rules))
    ]
    benchmark = sum(lagrangian_loss(run.probabilities[t], y[t], run.pairs[t], C) for t in range(150))
    assert found.reduction == pytest.approx(benchmark - min(each))
    assert found.reduction >= found.lagrangian - 1e-6


def test_regret_of_exp2_stays_below_its_bound_and_shrinks_with_the_horizon():
    """Stationary labels: expected regret is at most 2 (k + C) sqrt(T log|H|) in 0-1 loss."""
    per_round = []
    for T in (200, 3200):
        X, y = people(19, T=T)
        rules = some_rules()
        run = run_one_sided(FairOneSidedClassifier(rules, C=2.0, horizon=T, random_state=0), zip(X, y), some_panel())
        regret = run.regret(rules).reduction
        assert 0 < regret < 2 * (4 + 2) * math.sqrt(T * math.log(len(rules)))
        per_round.append(regret / T)
    assert per_round[1] < 0.6 * per_round[0]


def test_the_frontier_falls_and_panels_may_change():
    X, y = people(20, T=800)
    rules = some_rules()
    learner = FairOneSidedClassifier(rules, horizon=800, eta=0.05, random_state=0)
    runs = fairness_frontier(learner, zip(X, y), some_panel(), C=[0.0, 3.0, 12.0])
    objections = [run.objections for run in runs]
    assert objections[0] > objections[1] + 0.1 > objections[2] + 0.2
    assert not hasattr(learner, "rounds_")
    assert [run.C[0] for run in runs] == [0.0, 3.0, 12.0]
    assert runs[0].labels_seen == sum(d.sum() for d in runs[0].decisions)
    never = Panel([Auditor(lambda a, b: 1.0)], alpha=0.1)
    mixed = run_one_sided(
        FairOneSidedClassifier(rules, C=1.0, horizon=800, random_state=0),
        [(a, b, never) if t % 2 else (a, b) for t, (a, b) in enumerate(zip(X[:40], y))],
        some_panel(),
    )
    assert not mixed.objected[1::2].any()
    assert mixed.objected[::2].any()
    with pytest.raises(ValueError, match="stream is empty"):
        run_one_sided(learner, [], some_panel())
    with pytest.raises(ValueError, match="slack"):
        mixed.regret(rules, slack=0.2)


# -- misuse --


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hypotheses": []}, "empty"),
        ({"hypotheses": lambda X: np.zeros((len(X), 0), bool)}, "empty"),
        ({"hypotheses": lambda X: np.full((len(X), 2), 0.5)}, "0 or 1"),
        ({"hypotheses": lambda X: np.zeros(len(X))}, "shape|array"),
        ({"hypotheses": None}, "either"),
        ({"C": -1.0}, "C is"),
        ({"C": math.nan}, "C is"),
        ({"eta": 0.0}, "eta"),
        ({"horizon": 0}, "horizon"),
        ({"cap": 0}, "cap"),
        ({"algorithm": "exp3"}, "exp3"),
        ({"estimate": "two-sided"}, "two-sided"),
        ({"algorithm": "ftpl"}, "separator"),
        ({"hypotheses": None, "estimator": LogisticRegression()}, "exp2"),
    ],
)
def test_bad_settings_are_named(settings, says):
    learner = FairOneSidedClassifier(**{"hypotheses": some_rules(), **settings})
    with pytest.raises(ValueError, match=says):
        learner.predict(np.zeros((2, 2)))


def test_bad_rounds_are_named():
    X = np.random.default_rng(0).random((3, 2))
    learner = FairOneSidedClassifier(HalfSpaces(np.zeros((1, 2)), [-1.0]), C=1.0, horizon=5, random_state=0)
    with pytest.raises(ValueError, match="call predict"):
        learner.partial_fit(X, [1, 1, 1])
    learner.predict(X)
    for labels, violation, says in (
        ([1, np.nan, 0], None, "person 1 was accepted"),
        ([1, 2, 0], None, "not 2"),
        ([1, 1], None, "3 people"),
        ([1, 1, 0], (0, 3), "0 to 2"),
        ([1, 1, 0], (-1, 1), "0 to 2"),
        ([1, 1, 0], (1, 1), "two different"),
        ([1, 1, 0], 5, "ordered pair"),
    ):
        with pytest.raises(ValueError, match=says):
            learner.partial_fit(X, labels, violation)
    with pytest.raises(ValueError, match="another batch"):
        learner.partial_fit(X[::-1], [1, 1, 0])
    learner.partial_fit(X, [1, 1, 0], (0, 1))
    assert learner.rounds_ == 1


def test_sequences_of_rules_and_dtypes():
    X = np.random.default_rng(0).random((3, 2)).astype(np.float32)
    fitted = LogisticRegression().fit([[0, 0], [1, 1]], [0, 1])
    learner = FairOneSidedClassifier([fitted, lambda X: X[:, 0] > 0.5], horizon=5, random_state=0)
    assert learner.predict(X).dtype == np.int64
    assert learner.predict_proba(X).dtype == np.float32
    np.testing.assert_allclose(learner.predict_proba(X)[:, 1], (fitted.predict(X) + (X[:, 0] > 0.5)) / 2, rtol=1e-6)
    assert FairOneSidedClassifier([fitted], C=3.0).get_params()["C"] == 3.0


# -- tables --


def write(path, rows, header=("income", "group", "repaid")):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def loans(n=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        income, group = rng.normal(40, 10), rng.choice(["north", "south", "west"])
        rows.append([f"{income:.3f}", group, "yes" if rng.normal(income, 5) > 40 else "no"])
    return rows


def test_a_table_is_standardised(tmp_path):
    rows = loans()
    table = read_decision_table(write(tmp_path / "t.csv", rows), "repaid")
    income = np.array([float(row[0]) for row in rows])
    np.testing.assert_allclose(table.X[:, 0], (income - income.mean()) / income.std())
    assert table.names == ("income", "group=north", "group=south", "group=west")
    np.testing.assert_array_equal(table.X[:, 1], [row[1] == "north" for row in rows])
    np.testing.assert_array_equal(table.y, [row[2] == "yes" for row in rows])
    flipped = read_decision_table(tmp_path / "t.csv", "repaid", positive="no")
    np.testing.assert_array_equal(flipped.y, 1 - table.y)
    reach = np.diff(np.quantile(income, [0.05, 0.95]))[0]
    i, j = next((i, j) for i in range(60) for j in range(60) if rows[i][1] != rows[j][1])
    apart = abs(income[i] - income[j]) / reach
    only, mean = table.panel(["income"], allow=[0.3]), table.panel(allow=[0.3])
    assert only.auditors[0].distances(table.X)[i, j] == pytest.approx(min(1, 0.3 * apart))
    assert mean.auditors[0].distances(table.X)[i, j] == pytest.approx(min(1, 0.3 * (apart + 1) / 2))
    protected = table.panel(protected=["group"], allow=[0.3])
    np.testing.assert_allclose(protected.limits(table.X), only.limits(table.X))
    two = read_decision_table(write(tmp_path / "two.csv", [[a, "m" if b == "west" else "f", c] for a, b, c in rows]),
                              "repaid")  # fmt: skip
    assert two.names == ("income", "group=m")
    assert two.panel(["group"], allow=[0.3]).auditors[0].distances(two.X).max() == pytest.approx(0.3)


def test_rules_of_a_table_say_what_they_accept(tmp_path):
    rows = loans()
    table = read_decision_table(write(tmp_path / "t.csv", rows), "repaid")
    rules = table.rules(cuts=3)
    decided = rules(table.X)
    assert len(np.unique(decided, axis=1).T) == len(rules)
    for h, name in enumerate(rules.names):
        said = {"nobody": [False] * 60, "everybody": [True] * 60}.get(name)
        if said is None and " " in name:
            _, sign, cut = name.split()
            said = [float(row[0]) >= float(cut) if sign == ">=" else float(row[0]) <= float(cut) for row in rows]
            assert np.mean(np.array(said) == decided[:, h]) > 0.95  # the name's number is rounded
        else:
            said = said or [(row[1] == name.split("=")[1]) != ("!=" in name) for row in rows]
            np.testing.assert_array_equal(decided[:, h], said)
    batches = table.rounds(20, 4, np.random.default_rng(0))
    assert np.bincount(np.concatenate(batches[:15]), minlength=60).tolist() == [1] * 60


def broken(change):
    rows = loans()
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (broken(lambda r: r[4].__setitem__(0, "")), r"line 6, column 'income': the cell is empty.*--drop"),
        (broken(lambda r: r[4].__setitem__(0, "n/a")), r"line 6, column 'income': 'n/a' is no number.*mend"),
        (broken(lambda r: r[4].__setitem__(0, "nan")), r"line 6, column 'income': 'nan' is no finite.*delete"),
        (broken(lambda r: r[4].append("x")), r"line 6: 4 cells under 3.*quote"),
        (broken(lambda r: r[4].__setitem__(2, "")), r"line 6, column 'repaid': no outcome.*fill it in"),
        (broken(lambda r: r[4].__setitem__(2, "maybe")), r"line 6, column 'repaid': 'maybe' is a third.*keep two"),
        ([[a, b, "good" if c == "yes" else "bad"] for a, b, c in loans()], r"column 'repaid': which of.*--positive"),
        ([[a, b, "yes"] for a, b, c in loans()], r"every outcome is 'yes'"),
        ([[a, f"name {i}", c] for i, (a, b, c) in enumerate(loans())], r"column 'group': 60 different texts.*--drop"),
        (loans(5), r"has 5 rows.*20 or more"),
        ([["1", "a", c] for a, b, c in loans()], r"no column has two different values"),
    ],
)
def test_bad_tables_are_named_by_line_and_column(tmp_path, rows, says):
    path = write(tmp_path / "bad.csv", rows)
    with pytest.raises(UserError, match=says) as problem:
        read_decision_table(path, "repaid")
    assert "bad.csv" in str(problem.value)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    for content, says in (
        (b"", "is empty"),
        (b"income,income,repaid\n1,2,3\n", "line 1: two columns are called 'income'"),
        (b"income,,repaid\n1,2,3\n", "line 1: column 2 has no name"),
        (b"income,group,repaid\n1,\xff,3\n", "not UTF-8"),
        (b'income,group,repaid\n1,"a,yes\n', "mend the quotes"),
        (b"income,group,outcome\n1,a,3\n", "there is no column 'repaid'; columns: income, group, outcome"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_decision_table(path, "repaid")
    with pytest.raises(UserError, match="is a folder"):
        read_decision_table(tmp_path, "repaid")
    with pytest.raises(UserError, match="cannot be read"):
        read_decision_table(tmp_path / "none.csv", "repaid")
    rows = loans()
    rows[3][1] = "a line\nbreak"  # the record after it begins a line later
    rows[7][0] = ""
    with pytest.raises(UserError, match="line 10, column 'income'"):
        read_decision_table(write(path, rows), "repaid")
    rows[3][0] = ""
    with pytest.raises(UserError, match="line 5, column 'income'"):  # where the record begins
        read_decision_table(write(path, rows), "repaid")
    table = read_decision_table(write(path, loans()), "repaid")
    for wrong, says in (({"similar_by": ["age"]}, "no column 'age'"), ({"protected": ["income", "group"]}, "every")):
        with pytest.raises(UserError, match=says):
            table.panel(**wrong)


def test_the_bundled_table():
    table = breast_cancer_table()
    assert table.X.shape == (569, 30)
    assert table.y.sum() == 357
    np.testing.assert_allclose(table.X.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(table.X.std(0), 1)


# -- the verb, the task, the claims --


def test_the_verb_prints_writes_and_repeats(tmp_path):
    from counterproof.incentives.commands import commands

    path = write(tmp_path / "t.csv", loans(120))
    arguments = ["fair", str(path), "--label", "repaid", "--protected", "group", "--rounds", "150", "--c", "0,8"]
    ran = [CliRunner().invoke(commands, [*arguments, "--json"]) for _ in range(2)]
    assert ran[0].exit_code == 0, ran[0].output
    assert ran[0].stdout == ran[1].stdout
    found = json.loads(ran[0].stdout)
    assert [row["C"] for row in found["frontier"]] == [0, 8]
    assert found["rounds"] == 150
    for row in found["frontier"]:
        assert 0 < row["people_seen"] <= min(row["labels_seen"], 120)
        assert row["accepted"] == row["labels_seen"] / 600
        assert row["accuracy_regret"] <= row["lagrangian_regret"] + 1e-9 <= row["reduction_regret"] + 2e-6
    out = [tmp_path / name for name in ("f.png", "f.svg", "f.csv")]
    ran = CliRunner().invoke(commands, [*arguments, *(part for file in out for part in ("--out", str(file)))])
    assert ran.exit_code == 0, ran.output
    assert "objections" in ran.stdout
    assert out[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in out[1].read_text()
    rows = list(csv.DictReader(out[2].open()))
    assert [float(row["error"]) for row in rows] == [row["error"] for row in found["frontier"]]
    table = read_decision_table(path, "repaid")
    replay = replay_decisions(table, table.panel(protected=["group"]), C=(0, 8), rounds=150, rng=0)
    assert replay.summary()["frontier"] == found["frontier"]
    assert len(frontier_figure(found).axes[0].texts) == 2
    for extra, says in (
        (["--out", str(tmp_path / "f.doc")], "must end in"),
        (["--c", "0,x"], "list of numbers"),
        (["--batch", "500"], "more than the 120 people"),
        (["--similar-by", "age"], "no column 'age'"),
        (["--drop", "repaid"], "outcomes"),
    ):
        ran = CliRunner().invoke(commands, [*arguments, *extra])
        assert ran.exit_code != 0
        assert says in ran.output + str(ran.exception)


def test_the_task_runs_on_the_user_s_table_and_every_arm(tmp_path):
    rows = loans(80)
    rows = [[a, b, "1" if c == "yes" else "0"] for a, b, c in rows]
    path = write(tmp_path / "t.csv", rows, ("income", "protected_group", "label"))
    says = claims.describe_decisions(path)
    assert "may make no difference: protected_group" in says
    for arm in claims.ARMS["one-sided-decisions"]:
        trial = Trial(seed=1000, settings={"data": "synthetic", "rounds": 50, "rules": 8}, data=path)
        found = claims.run_decisions(arm, trial)
        assert set(found) == set(claims.DECISIONS.metrics)
        assert all(map(math.isfinite, found.values()))
    with pytest.raises(UserError, match="no column 'label'"):
        claims.describe_decisions(write(path, loans()))


def test_the_task_measures_what_the_library_measures():
    settings = {"data": "synthetic", "rounds": 120, "rules": 10}
    arm = Arm("exp2", claims.LEARNER, {"C": 3.0})
    found = claims.run_decisions(arm, Trial(seed=1000, settings=settings))
    trial = Trial(seed=1000, settings=settings)
    X, y, rules, panel = claims._people(trial, 120)
    learner = FairOneSidedClassifier(rules, C=3.0, horizon=120, random_state=trial.rng("draws"))
    run = run_one_sided(learner, zip(X, y), panel)
    regret = run.regret(rules)
    assert found["error"] == pytest.approx(run.error)
    assert found["objections"] == run.objections
    assert found["labels"] == run.labels_seen / 480
    assert found["regret"] == pytest.approx(regret.accuracy / 480, abs=1e-7)
    assert found["reduction_regret"] == pytest.approx(regret.reduction / 120)


def test_outcomes_stay_hidden_from_whoever_never_looks():
    settings = {"rounds": 600}
    erm, exp2 = (claims.run_hidden(arm, Trial(seed=1000, settings=settings)) for arm in (claims.ERM, claims.UNHEARD))
    assert erm["second_chance"] == 0
    assert exp2["second_chance"] > 0.9
    assert erm["regret"] > 0.8 > 0.6 > exp2["regret"]


def test_the_baseline_learns_from_accepted_people_only():
    rules = patterns(2)
    erm = claims.AcceptedERM(rules, warmup=1)
    X = np.array([[0.0], [1.0]])
    assert erm.predict(X).tolist() == [1, 1]
    erm.partial_fit(X, np.array([1.0, 0.0]))
    assert erm.predict(X).tolist() == [1, 0]
    erm.partial_fit(X, np.array([1.0, np.nan]))
    assert erm.errors.tolist() == [2, 3, 0, 1]


def test_claims_name_what_exists_and_share_trials():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for claim in claims.CLAIMS:
            assert claim.baseline.name != claim.method.name
            if claim.baseline.method is not None:
                assert resolve(claim.baseline.method) is FairOneSidedClassifier
    keys = {(c.task.name, a.name, str(dict(c.settings))) for c in claims.CLAIMS for a in (c.baseline, c.method)}
    assert len(keys) == 14
