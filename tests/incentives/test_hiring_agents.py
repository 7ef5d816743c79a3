"""Mechanisms against a programme over all misreports, enumeration and play-outs; the learner against its theory."""

import itertools
import json
import sys
import textwrap

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.optimize import linprog

from counterproof.bench.task import Arm, Trial
from counterproof.errors import UserError
from counterproof.incentives import (
    ExploreThenCommit,
    InfeasibleMechanism,
    InformationAcquisition,
    Labels,
    fit_slope,
    read_instance,
)
from counterproof.incentives.claims.hiring_agents import (
    CLAIMS,
    CORRELATED,
    FAMILIES,
    MIXED,
    OWN,
    PEER,
    PLUG_IN,
    reference_instance,
    run_mechanisms,
    run_online,
    shared_view,
)
from counterproof.incentives.commands import commands

KINDS = ("own", "peer", "correlated")


def reference(view=0.7, read=0.95, cost=0.05, max_payment=1.0):
    """The instance of the brief: two agents, a common view right with `view`, read right with `read`."""
    P = np.zeros((2,) * 5)
    for b0, b1, s0, s1, state, w in itertools.product((0, 1), repeat=6):
        chance = 0.5 * (view if w == state else 1 - view)
        for b, s in ((b0, s0), (b1, s1)):
            chance *= 0.5 if b == 0 else read if s == w else 1 - read
        P[b0, b1, s0, s1, state] += chance
    return InformationAcquisition(P, [[0, cost]] * 2, np.eye(2), max_payment)


def informative(seed, *, efforts=(2, 2), signals=(2, 2), states=2, cost=0.06, max_payment=2.0, views=None):
    """Agents read a common view, the better the higher their effort."""
    rng = np.random.default_rng(seed)
    views = views or states
    prior = rng.dirichlet(np.full(states, 5.0))
    view = rng.dirichlet(np.full(views, 0.3), size=states)
    tables = []
    for b, s in zip(efforts, signals):
        sharp, flat = rng.dirichlet(np.full(s, 0.2), size=views), rng.dirichlet(np.full(s, 5.0))
        tables.append([a * sharp + (1 - a) * flat for a in np.linspace(0, 1, b)])
    P = {}
    for profile in itertools.product(*map(range, efforts)):
        P[profile] = np.zeros((*signals, states))
        for s in itertools.product(*map(range, signals)):
            seen = np.prod([tables[i][b][:, s[i]] for i, b in enumerate(profile)], axis=0)
            P[profile][s] = prior * (view @ seen)
    costs = [np.r_[0, np.sort(rng.uniform(0.2 * cost, cost, b - 1))] for b in efforts]
    return InformationAcquisition(P, costs, np.eye(states), max_payment)


def others_then(i, own, rest):
    return (*rest[:i], own, *rest[i:])


def brute_force(problem, kind, profile=None):
    """The optimum by a dense programme by loops, with a constraint per misreporting map; None: infeasible."""
    p, M, n = problem, problem.max_payment, problem.n_agents
    profiles = list(itertools.product(*map(range, p.efforts)))
    if profile is None and kind != "correlated":
        found = [brute_force(problem, kind, b) for b in profiles]
        return max((value for value in found if value is not None), default=None)
    allowed = profiles if profile is None else [profile]
    reports = list(itertools.product(*map(range, p.signals)))
    index = {("mu", b): k for k, b in enumerate(allowed)}

    def variable(i, b, s, state):
        key = (i, b, s[i], state) if kind == "own" else (i, b, s, state)
        return index.setdefault(key, len(index))

    for i, b, s, state in itertools.product(range(n), allowed, reports, range(p.n_states)):
        variable(i, b, s, state)
    size = len(index)
    objective, rows = np.zeros(size), []
    for b in allowed:
        for s in reports:
            objective[index["mu", b]] -= max(float(p.P[b][s] @ u) for u in p.utility)
        for i, s, state in itertools.product(range(n), reports, range(p.n_states)):
            objective[variable(i, b, s, state)] += p.P[b][s][state]
    for key, column in index.items():
        if key[0] != "mu":
            row = np.zeros(size)
            row[column], row[index["mu", key[1]]] = 1, -M
            rows.append(row)
    for i in range(n):
        maps = list(itertools.product(range(p.signals[i]), repeat=p.signals[i]))
        for told in {b[i] for b in allowed}:
            obey = np.zeros(size)
            for b in allowed:
                if b[i] == told:
                    obey[index["mu", b]] -= p.costs[i][told]
                    for s, state in itertools.product(reports, range(p.n_states)):
                        obey[variable(i, b, s, state)] += p.P[b][s][state]
            away = np.zeros(size)
            for b in allowed:
                if b[i] == told:
                    away[index["mu", b]] += p.outside[i]
            rows.append(away - obey)
            for effort, phi in itertools.product(range(p.efforts[i]), maps):
                leave = np.zeros(size)
                for b in allowed:
                    if b[i] == told:
                        leave[index["mu", b]] -= p.costs[i][effort]
                        done = others_then(i, effort, b[:i] + b[i + 1 :])
                        for s, state in itertools.product(reports, range(p.n_states)):
                            sent = others_then(i, phi[s[i]], s[:i] + s[i + 1 :])
                            leave[variable(i, b, sent, state)] += p.P[done][s][state]
                rows.append(leave - obey)
    total = np.array([[float(key[0] == "mu") for key in index]])
    solved = linprog(objective, np.array(rows), np.zeros(len(rows)), total, [1.0], bounds=(0, None))
    assert solved.status in (0, 2)
    return -solved.fun if solved.status == 0 else None


def enumerated_gain(mechanism, problem):
    """The largest gain of an agent over all efforts and maps of reports, by loops."""
    p, worst = problem, -np.inf
    reports = list(itertools.product(*map(range, p.signals)))
    for i in range(p.n_agents):
        maps = list(itertools.product(range(p.signals[i]), repeat=p.signals[i]))
        for told in range(p.efforts[i]):
            made = [b for b in mechanism.support if b[i] == told]
            weight = sum(mechanism.mu[b] for b in made)
            if not made:
                continue

            def worth(effort, phi, i=i, made=made, weight=weight):
                total = 0.0
                for b in made:
                    done = others_then(i, effort, b[:i] + b[i + 1 :])
                    for s in reports:
                        sent = others_then(i, phi[s[i]], s[:i] + s[i + 1 :])
                        total += mechanism.mu[b] / weight * float(p.P[done][s] @ mechanism.gamma[i][b][sent])
                return total - p.costs[i][effort]

            honest = tuple(range(p.signals[i]))
            obey = worth(told, honest)
            worst = max(worst, p.outside[i] - obey)
            for effort, phi in itertools.product(range(p.efforts[i]), maps):
                if (effort, phi) != (told, honest):
                    worst = max(worst, worth(effort, phi) - obey)
    return worst


# -- values --


@pytest.mark.parametrize(
    ("settings", "own", "peer", "correlated"),
    [
        ({}, 0.5, 0.5, 0.56178),
        ({"max_payment": 5.0}, 0.5, 0.5, 0.57),
        ({"max_payment": 5.0, "read": 1.0}, 0.525, 0.525, 0.59899),
        ({"max_payment": 5.0, "view": 0.6, "cost": 0.03}, 0.5, 0.5, 0.52344),
        ({"cost": 0.15}, 0.5, 0.5, 0.5),
    ],
)
def test_reference_values(settings, own, peer, correlated):
    problem = reference(**settings)
    found = [problem.optimal(kind).value for kind in KINDS]
    np.testing.assert_allclose(found, [own, peer, correlated], atol=1e-5)


def test_audits_are_rare_and_rarer_when_more_can_be_paid():
    mu = reference().optimal().mu
    np.testing.assert_allclose(mu, [[0, 0.4533], [0.4533, 0.0935]], atol=1e-4)
    assert reference(max_payment=5.0).optimal().mu[1, 1] == pytest.approx(0.0174, abs=1e-4)


PROBLEMS = [
    *(lambda seed=seed: informative(seed) for seed in (0, 8, 27)),
    lambda: informative(0, efforts=(3, 2), signals=(2, 3), states=2),
    *(lambda seed=seed: informative(seed, signals=(3, 2), states=3, views=4) for seed in (4, 19, 21)),
    lambda: informative(3, efforts=(2, 2, 2), signals=(2, 2, 2), states=2),
    reference,
]


@pytest.mark.parametrize("make", PROBLEMS)
def test_value_is_that_of_a_programme_over_all_misreports(make):
    problem = make()
    for kind in KINDS:
        assert problem.optimal(kind).value == pytest.approx(brute_force(problem, kind), abs=1e-7)


def test_some_of_these_problems_tell_the_kinds_apart():
    values = np.array([[make().optimal(kind).value for kind in KINDS] for make in PROBLEMS])
    assert (values[:, 1] > values[:, 0] + 1e-4).any()
    assert (values[:, 2] > values[:, 1] + 1e-4).any()


@pytest.mark.parametrize("make", PROBLEMS)
def test_nobody_gains_by_any_deviation_and_payments_are_within_the_cap(make):
    problem = make()
    for kind in KINDS:
        found = problem.optimal(kind)
        assert found.mu.sum() == pytest.approx(1, abs=1e-12)
        assert all(((g >= 0) & (g <= problem.max_payment)).all() for g in found.gamma)
        gain = found.max_deviation_gain()
        assert gain <= 1e-8
        assert gain == pytest.approx(enumerated_gain(found, problem), abs=1e-9)


def test_deviation_gain_of_any_mechanism_is_that_of_enumeration():
    problem = informative(2, efforts=(3, 2), signals=(2, 3))
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = problem.optimal()
        mu = rng.dirichlet(np.ones(6)).reshape(3, 2)
        gamma = tuple(rng.uniform(0, 2, problem.P.shape) for _ in range(2))
        changed = type(found)(problem, "correlated", mu, gamma)
        assert changed.max_deviation_gain() == pytest.approx(enumerated_gain(changed, problem), abs=1e-12)
        best = max(changed.deviations(), key=lambda d: d.gain)
        assert best.gain == changed.max_deviation_gain()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_kind_contains_the_one_before(family):
    rng = np.random.default_rng(1)
    strict = 0
    for _ in range(12):
        problem = InformationAcquisition(**FAMILIES[family](rng))
        values = [problem.optimal(kind).value for kind in KINDS]
        assert values[0] <= values[1] + 1e-8
        assert values[1] <= values[2] + 1e-8
        assert values[2] <= problem.first_best() + 1e-8
        assert problem.decision_values().flat[0] <= values[0] + 1e-8
        strict += values[2] > values[1] + 1e-6
    assert strict


def test_a_single_agent_gets_the_optimal_scoring_rule():
    for seed in range(4):
        problem = informative(seed, efforts=(3,), signals=(3,), states=3)
        rule = [problem.optimal(kind) for kind in KINDS]
        np.testing.assert_allclose([m.value for m in rule], brute_force(problem, "own"), atol=1e-7)


def test_independent_agents_whose_signals_say_all_gain_nothing_by_correlation():
    # The state has two bits; each agent's work shows one; utility adds up over bits.
    rng = np.random.default_rng(0)
    for _ in range(4):
        a, b = rng.uniform(0.3, 0.7, 2)
        prior = np.outer([1 - a, a], [1 - b, b]).ravel()
        P = np.zeros((2, 2, 2, 2, 4))
        for b0, b1, s0, s1, state in itertools.product(*map(range, P.shape)):
            bits = divmod(state, 2)
            likely = [float(s == bit) if e else 0.5 for e, s, bit in zip((b0, b1), (s0, s1), bits)]
            P[b0, b1, s0, s1, state] = prior[state] * likely[0] * likely[1]
        guesses = list(itertools.product((0, 1), repeat=2))
        utility = [[sum(g == bit for g, bit in zip(guess, divmod(k, 2))) for k in range(4)] for guess in guesses]
        problem = InformationAcquisition(P, [[0, c] for c in rng.uniform(0.02, 0.2, 2)], utility, 2.0)
        own, correlated = problem.optimal("own"), problem.optimal()
        assert own.value == pytest.approx(correlated.value, abs=1e-8)
        assert own.value > problem.decision_values()[0, 0] + 0.01


def test_limits_and_monotonicity():
    made = informative(8)
    free = InformationAcquisition(made.P, [[0, 0]] * 2, made.utility, 2.0)
    for kind in KINDS:
        best = free.optimal(kind)
        assert best.value == pytest.approx(free.decision_values().max(), abs=1e-9)
        np.testing.assert_allclose(best.expected_payments(), 0, atol=1e-9)
    # Nothing can be paid: only what costs nothing is done.
    poor = InformationAcquisition(made.P, made.costs, made.utility, 1e-9)
    assert poor.optimal().value == pytest.approx(made.decision_values()[0, 0], abs=1e-6)
    caps = [0.05, 0.1, 0.3, 1.0, 3.0, 10.0]
    values = [InformationAcquisition(made.P, made.costs, made.utility, M).optimal().value for M in caps]
    assert (np.diff(values) >= -1e-9).all()
    assert values[-1] > values[0] + 0.01
    dear = [
        InformationAcquisition(made.P, [made.costs[0] * k, made.costs[1]], made.utility, 2.0).optimal().value
        for k in (0.1, 0.5, 1, 2, 4)
    ]
    assert (np.diff(dear) <= 1e-9).all()
    assert dear[0] > dear[-1] + 0.01


@pytest.mark.parametrize("seed", [25, 73])
def test_profiles_that_are_barely_infeasible_are_told_from_failures(seed):
    """HiGHS's presolve does not know on these."""
    problem = informative(seed, efforts=(2, 2, 2), signals=(2, 2, 2))
    for kind in KINDS:
        assert problem.optimal(kind).value == pytest.approx(brute_force(problem, kind), abs=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 7.0, 1e6])
def test_currency_does_not_matter(scale):
    problem = reference()
    scaled = InformationAcquisition(problem.P, [c * scale for c in problem.costs], problem.utility * scale, scale)
    for kind in KINDS:
        assert scaled.optimal(kind).value == pytest.approx(problem.optimal(kind).value * scale, rel=1e-9)
    assert scaled.optimal().max_deviation_gain() <= 1e-8 * scale
    assert scaled.required_payment((1, 1)) == pytest.approx(problem.required_payment((1, 1)) * scale)


def test_relabelling_permutes_the_solution():
    problem = informative(1, efforts=(2, 3), signals=(3, 2))
    value, mu = problem.optimal().value, problem.optimal().mu
    swapped = InformationAcquisition(
        problem.P.transpose(1, 0, 3, 2, 4), problem.costs[::-1], problem.utility, problem.max_payment
    )
    assert swapped.optimal().value == pytest.approx(value, abs=1e-9)
    renamed = InformationAcquisition(problem.P[:, :, ::-1], problem.costs, problem.utility, problem.max_payment)
    assert renamed.optimal().value == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(renamed.optimal().mu, mu, atol=1e-7)
    np.testing.assert_allclose(swapped.optimal().mu, mu.T, atol=1e-7)


def play(mechanism, problem, rounds, rng):
    """Obedient agents, round by round as the rules of the game say."""
    got = np.empty(rounds)
    profiles = mechanism.support
    drawn = rng.choice(len(profiles), p=[mechanism.mu[b] for b in profiles], size=rounds)
    for k, b in enumerate(profiles):
        here = np.flatnonzero(drawn == k)
        cells = rng.choice(problem.P[b].size, p=problem.P[b].ravel(), size=len(here))
        for t, cell in zip(here, cells):
            *s, state = np.unravel_index(cell, problem.P[b].shape)
            paid = mechanism.payments(b)[(slice(None), *s, state)].sum()
            got[t] = problem.utility[mechanism.decision(b, s), state] - paid
    return got


def test_the_announced_value_is_what_play_brings():
    for problem in (reference(), informative(4, efforts=(2, 2, 2), signals=(2, 2, 2))):
        found = problem.optimal()
        got = play(found, problem, 20_000, np.random.default_rng(0))
        assert abs(got.mean() - found.value) < 4 * got.std() / np.sqrt(len(got)) + 1e-12
        outcome = found.outcome()
        assert outcome.value == outcome.utility - outcome.payments
        assert found.expected_payments().sum() == pytest.approx(outcome.payments)


# -- what cannot be had --


def test_an_infeasible_profile_names_agent_deviation_and_remedy():
    labels = Labels(
        agents=("ann", "bob"), efforts=[("shirk", "work")] * 2, signals=[("bad", "good")] * 2, states=("lo", "hi")
    )
    P, costs = reference().P, [[0, 0.05], [0, 0.2]]
    problem = InformationAcquisition(P, costs, np.eye(2), 0.2, labels=labels)
    with pytest.raises(
        InfeasibleMechanism, match=r"bob, told effort work, gains at least .* by effort shirk"
    ) as caught:
        problem.optimal("peer", profile=(1, 1))
    problem_is = caught.value
    assert isinstance(problem_is, UserError)
    assert problem_is.profile == (1, 1)
    assert {d.agent for d in problem_is.deviations} == {1}
    assert f"{problem_is.needed:.6g}" in str(problem_is)
    # By hand: paid for agreeing with its colleague, a worker earns with chance .95^2 + .05^2, a shirker with a half.
    assert problem_is.needed == pytest.approx(0.2 / (0.905 - 0.5), rel=1e-6)
    assert problem_is.deviations[0].gain == pytest.approx(0.2 - 0.2 * (0.905 - 0.5), rel=1e-6)


@pytest.mark.parametrize("kind", ["own", "peer"])
@pytest.mark.parametrize("seed", [1, 8, 15])
def test_required_payment_is_where_feasibility_begins(kind, seed):
    made = informative(seed)
    for profile in itertools.product((0, 1), repeat=2):
        needed = made.required_payment(profile, kind)
        if needed == 0:
            assert profile == (0, 0)
            continue
        if np.isinf(needed):
            rich = InformationAcquisition(made.P, made.costs, made.utility, 1e4)
            assert brute_force(rich, kind, profile) is None
            with pytest.raises(InfeasibleMechanism, match="no max_payment is enough"):
                rich.optimal(kind, profile=profile)
            continue
        for factor, feasible in ((1.001, True), (0.999, False)):
            problem = InformationAcquisition(made.P, made.costs, made.utility, needed * factor)
            assert (brute_force(problem, kind, profile) is not None) == feasible
            if feasible:
                assert problem.optimal(kind, profile=profile).max_deviation_gain() <= 1e-8
            else:
                with pytest.raises(InfeasibleMechanism):
                    problem.optimal(kind, profile=profile)


def test_uninformative_work_cannot_be_bought_at_any_price():
    P = reference().P
    P = np.stack([P[0], P[0]])  # the first agent's work shows nothing
    problem = InformationAcquisition(P, [[0, 0.05]] * 2, np.eye(2), 1e3)
    assert problem.required_payment((1, 0)) == np.inf
    with pytest.raises(InfeasibleMechanism, match=r"agent 0, told effort 1.*no max_payment is enough"):
        problem.optimal(profile=(1, 0))


def test_agents_who_may_walk_away():
    made = informative(7)
    for outside in (0.0, 0.1, [0.3, 0.0]):
        problem = InformationAcquisition(made.P, made.costs, made.utility, 2.0, outside=outside)
        for kind in KINDS:
            found = problem.optimal(kind)
            assert found.value == pytest.approx(brute_force(problem, kind), abs=1e-7)
            assert found.max_deviation_gain() <= 1e-8
    dear = InformationAcquisition(made.P, [c + 0.3 for c in made.costs], made.utility, 2.0)
    assert dear.optimal().value == pytest.approx(brute_force(dear, "correlated"), abs=1e-7)
    assert (dear.optimal().expected_payments() >= 0.3 - 1e-8).all()
    for kind in KINDS:
        poor = InformationAcquisition(made.P, made.costs, made.utility, 0.5, outside=[0.0, 0.6])
        assert brute_force(poor, kind) is None
        with pytest.raises(InfeasibleMechanism, match=r"agent 1.*gains at least 0.1 by walking away") as caught:
            poor.optimal(kind)
        enough = InformationAcquisition(made.P, made.costs, made.utility, caught.value.needed, outside=[0.0, 0.6])
        assert enough.optimal(kind).value == pytest.approx(brute_force(enough, kind), abs=1e-6)


def test_bad_problems_are_refused():
    P, costs = reference().P, [[0, 0.05]] * 2
    shifted = P.copy()
    shifted[1, 1] = P[1, 1] * [0.8, 1.2]
    negative = P.copy()
    negative[0, 0, 0, 0] = [-0.1, P[0, 0, 0, 0].sum() + 0.1]
    for arguments, message in (
        ({"P": 2 * P}, r"P\[0, 0\] sums to 2"),
        ({"P": shifted}, r"P\[1, 1\] gives the states.*effort cannot change the state"),
        ({"P": negative}, "P holds a negative"),
        ({"P": P * np.nan}, "P holds a negative or non-finite"),
        ({"P": P[0]}, r"P has shape"),
        ({"P": {(0, 0): P[0, 0]}}, r"P lacks the effort profile \(0, 1\)"),
        ({"costs": [[0, -1], [0, 1]]}, r"costs\[0\]"),
        ({"costs": [[0, np.inf], [0, 1]]}, r"costs\[0\]"),
        ({"costs": []}, "costs"),
        ({"utility": np.eye(3)}, r"utility has shape \(decisions, 2 states\)"),
        ({"utility": np.eye(2) * np.nan}, "utility"),
        ({"max_payment": 0}, "max_payment"),
        ({"max_payment": np.nan}, "max_payment"),
        ({"outside": [0, 0, 0]}, "outside"),
        ({"labels": Labels(agents=("a",))}, "labels name 1 agents"),
    ):
        with pytest.raises(ValueError, match=message):
            InformationAcquisition(**{"P": P, "costs": costs, "utility": np.eye(2), "max_payment": 1, **arguments})
    with pytest.raises(ValueError, match="payments is"):
        reference().optimal("all")
    for profile in ((1,), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="a profile holds"):
            reference().optimal(profile=profile)


def test_a_solver_that_fails_is_an_error(monkeypatch):
    module = sys.modules[InformationAcquisition.__module__]
    monkeypatch.setattr(
        module, "linprog", lambda *_, **__: type("R", (), {"status": 1, "message": "Iteration limit", "x": None})
    )
    with pytest.raises(RuntimeError, match=r"HiGHS.*Iteration limit"):
        reference().optimal()


# -- learning --


@pytest.mark.parametrize("make", [reference, lambda: informative(0, max_payment=5.0)])
def test_strict_rules_make_effort_and_truth_best_by_their_gap(make):
    problem = make()
    rules, gap = problem.strict_rules()
    tightest = np.inf
    for i, rule in enumerate(rules):
        assert ((rule >= 0) & (rule <= problem.max_payment)).all()
        behind = [j for j in range(problem.n_agents) if j != i]
        for b in itertools.product((0, 1), repeat=2):
            tables = [problem.P[others_then(i, e, b[:i] + b[i + 1 :])].sum(tuple(behind)) for e in (0, 1)]
            honest = float((tables[b[i]] * rule[b[i]]).sum()) - problem.costs[i][b[i]]
            for effort, phi in itertools.product((0, 1), itertools.product((0, 1), repeat=2)):
                other = sum(float(tables[effort][s] @ rule[b[i]][phi[s]]) for s in (0, 1)) - problem.costs[i][effort]
                if effort != b[i]:
                    tightest = min(tightest, honest - other)
                else:
                    assert other <= honest + 1e-9
    assert tightest >= gap - 1e-9
    if make is reference:  # own reports are right with .68, so working earns .18 M more than .5 M, at .05
        np.testing.assert_allclose(rules[0][1], np.eye(2), atol=1e-9)
        assert gap == pytest.approx(0.05)  # of shirking, which is paid nothing


def test_no_strict_rule_names_agent_and_effort():
    with pytest.raises(ValueError, match="agent 0 strictly prefer effort 1"):
        reference(max_payment=0.1).strict_rules()


def test_committing_to_the_true_distribution_is_the_optimum():
    problem = reference()
    plan = ExploreThenCommit(problem, 1e5, alpha=0.0)
    found = plan.commit(problem.P * 1e6)
    assert found.outcome(problem, found.respond(problem)).value == pytest.approx(problem.optimal().value, abs=1e-9)
    assert plan.optimum == pytest.approx(0.56178, abs=1e-5)


def test_mixing_is_linear_in_payments():
    problem = reference()
    rules, _ = problem.strict_rules()
    found = problem.optimal()
    half = found.mixed(0.25, rules)
    b, s, state = (0, 1), (1, 0), 1
    for i in range(2):
        expected = 0.75 * found.payments(b)[(i, *s, state)] + 0.25 * rules[i][b[i], s[i], state]
        assert half.payments(b)[(i, *s, state)] == pytest.approx(expected)
    np.testing.assert_array_equal(half.mu, found.mu)
    with pytest.raises(ValueError, match="alpha"):
        found.mixed(1.5, rules)


def test_best_responses_are_an_equilibrium_that_pays_no_more_than_the_optimum():
    problem = reference()
    best = problem.optimal().value
    left = 0
    for seed in range(1000, 1012):
        run = ExploreThenCommit(problem, 1e6, alpha=0.0).simulate(seed)
        assert run.behaviour.settled
        # By the revelation principle no equilibrium of a mechanism within the cap beats the optimal obedient one.
        assert run.outcome.value <= best + 1e-9
        # The game after everybody's strategy is one in which obedience is an equilibrium: relabel, then enumerate.
        P = np.empty_like(problem.P)
        efforts, reports = run.behaviour.efforts, run.behaviour.reports
        for b in itertools.product((0, 1), repeat=2):
            done = tuple(int(efforts[i][k]) for i, k in enumerate(b))
            moved = np.zeros((2, 2, 2))
            for s in itertools.product((0, 1), repeat=2):
                sent = tuple(int(reports[i][b[i], s[i]]) for i in (0, 1))
                moved[sent] += problem.P[done][s]
            P[b] = moved
        worth = sum(
            run.mechanism.mu[b] * (P[b] * problem.utility[run.mechanism.problem.decisions()[b]]).sum()
            - run.mechanism.mu[b] * sum((P[b] * g[b]).sum() for g in run.mechanism.gamma)
            for b in run.mechanism.support
        )
        assert run.outcome.value == pytest.approx(float(worth))
        for i in (0, 1):
            for told in (0, 1):
                made = [b for b in run.mechanism.support if b[i] == told]

                def pay(effort, phi, i=i, made=made, mechanism=run.mechanism, efforts=efforts, reports=reports):
                    total = 0.0
                    for b in made:
                        done = [int(efforts[j][b[j]]) for j in (0, 1)]
                        done[i] = effort
                        for s in itertools.product((0, 1), repeat=2):
                            sent = [int(reports[j][b[j], s[j]]) for j in (0, 1)]
                            sent[i] = phi[s[i]]
                            total += mechanism.mu[b] * float(
                                problem.P[tuple(done)][s] @ mechanism.gamma[i][b][tuple(sent)]
                            )
                        total -= mechanism.mu[b] * problem.costs[i][effort]
                    return total

                now = pay(int(efforts[i][told]), reports[i][told])
                for effort, phi in itertools.product((0, 1), itertools.product((0, 1), repeat=2)):
                    assert pay(effort, phi) <= now + 1e-8
        gain = run.mechanism.max_deviation_gain(problem)
        assert run.obeyed or gain > 0
        left += not run.obeyed
    assert left >= 3


def test_obedient_agents_stay_and_a_shirker_is_found():
    problem = reference()
    found = problem.optimal()
    assert found.outcome(behaviour=found.respond()) == found.outcome()
    unpaid = found.mixed(1.0, [np.zeros((2, 2, 2))] * 2)
    behaviour = unpaid.respond()
    assert [effort.tolist() for effort in behaviour.efforts] == [[0, 0], [0, 0]]
    assert unpaid.outcome(behaviour=behaviour).disobedience == pytest.approx(1.0)
    # Work that nobody does is worth a coin's toss.
    assert unpaid.outcome(behaviour=behaviour).value == pytest.approx(0.5)


def test_regret_adds_up_and_grows_at_the_rate():
    problem = reference()
    horizons = [1e6, 1e7, 1e8, 1e9]
    means = []
    for rounds in horizons:
        runs = [ExploreThenCommit(problem, rounds).simulate(seed) for seed in range(1000, 1004)]
        for run in runs:
            assert run.obeyed
            assert not run.capped
            assert run.regret == pytest.approx(sum(r for _, _, r in run.phases))
            assert sum(count for _, count, _ in run.phases) == rounds == run.curve[-1][0]
            left = run.phases[-1][1]
            assert run.phases[-1][2] == pytest.approx(left * (problem.optimal().value - run.outcome.value))
        means.append(np.mean([run.regret for run in runs]))
    slope, low, high = fit_slope(horizons, means)
    assert low <= slope <= high
    assert slope == pytest.approx(2 / 3, abs=0.02)
    short = ExploreThenCommit(problem, 1e4)
    assert short.capped
    assert short.weight == 1
    assert ExploreThenCommit(problem, 1e6, gap=0.13).weight == pytest.approx(2 / np.sqrt(2500) / 0.13)


def test_exploring_costs_what_random_decisions_and_the_rules_cost():
    problem = reference()
    run = ExploreThenCommit(problem, 1e6).simulate(1000)
    name, count, regret = run.phases[0]
    # A random decision is right half of the time; a worker is paid where its report, right with .68, is right.
    assert (name, count, run.samples) == ("explore", 10_000, 2500)
    assert regret == pytest.approx(2500 * (4 * (problem.optimal().value - 0.5) + 4 * 0.68))


def test_costs_are_learned_from_where_agents_change_their_effort():
    made = informative(7, efforts=(3, 2), signals=(3, 2), states=3, max_payment=20.0, cost=0.2)
    run = ExploreThenCommit(made, 1e9, costs="learned").simulate(1000)
    for learned, true in zip(run.costs, made.costs):
        np.testing.assert_allclose(learned, true, atol=0.05)
    exact = ExploreThenCommit(made, 1e9, costs="learned")._learn_costs(made.P * 1e6)[0]
    for learned, true in zip(exact, made.costs):
        np.testing.assert_allclose(learned, true, atol=1e-9)
    assert [name for name, _, _ in run.phases] == ["explore", "costs", "commit"]


def test_runs_repeat_and_time_does_not_depend_on_rounds():
    plan = ExploreThenCommit(reference(), 1e12)
    first, second = plan.simulate(3), plan.simulate(np.random.default_rng(3))
    assert first.regret == second.regret
    assert first.regret != plan.simulate(4).regret


def test_estimates_from_counts():
    problem = informative(1)
    rng = np.random.default_rng(0)
    counts = np.stack([rng.multinomial(400, p) for p in problem.P.reshape(4, -1)]).reshape(problem.P.shape)
    raw = InformationAcquisition.from_counts(counts, problem.costs, problem.utility, 2.0, pool=False)
    np.testing.assert_allclose(raw.P, counts / 400)
    pooled = InformationAcquisition.from_counts(counts, problem.costs, problem.utility, 2.0)
    np.testing.assert_allclose(pooled.prior, counts.sum((0, 1, 2, 3)) / 1600)
    given = counts / counts.sum((2, 3), keepdims=True)
    np.testing.assert_allclose(pooled.P, given * pooled.prior)
    counts[1, 0] = 0
    with pytest.raises(ValueError, match=r"no observation of the effort profile \(1, 0\)"):
        InformationAcquisition.from_counts(counts, problem.costs, problem.utility, 2.0)


def test_bad_learners_are_refused():
    problem = reference()
    for settings, message in (
        ({"rounds": 3}, "rounds"),
        ({"rounds": 10.5}, "rounds"),
        ({"kappa": 0}, "kappa"),
        ({"alpha": 2}, "alpha"),
        ({"gap": 0}, "gap"),
        ({"costs": "guessed"}, "costs"),
        ({"rules": [np.zeros((2, 2, 2))] * 2}, "need their gap"),
        ({"rules": [np.zeros((2, 2))] * 2, "gap": 1}, "shapes"),
        ({"rules": [np.full((2, 2, 2), 2.0)] * 2, "gap": 1}, "between 0 and max_payment"),
    ):
        with pytest.raises(ValueError, match=message):
            ExploreThenCommit(problem, **{"rounds": 1e5, **settings})
    walk = InformationAcquisition(problem.P, problem.costs, problem.utility, 1.0, outside=0.1)
    with pytest.raises(ValueError, match="agents who stay"):
        ExploreThenCommit(walk, 1e5)
    with pytest.raises(ValueError, match="three points"):
        fit_slope([1, 1, 1], [1, 2, 3])


def test_slope_against_numpy():
    rng = np.random.default_rng(0)
    x = np.repeat([1e3, 1e4, 1e5], 3)
    y = 2 * x**0.7 * np.exp(0.1 * rng.normal(size=9))
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    found, low, high = fit_slope(x, y)
    assert found == pytest.approx(slope)
    assert (high - low) / 2 == pytest.approx(2.364624 * np.sqrt(covariance[0, 0]), rel=1e-4)  # t of 7 degrees


# -- the tasks --


def test_arms_meet_the_same_instances_and_values_are_ordered():
    for family in FAMILIES:
        points = []
        trials = [
            Trial(seed=1000, settings={"instances": 6, "family": family}, listener=points.append) for _ in range(3)
        ]
        own, peer, correlated = (run_mechanisms(arm, t) for arm, t in zip((OWN, PEER, CORRELATED), trials))
        assert set(own) == set(CLAIMS[0].task.metrics)
        assert own["value"] <= peer["value"] + 1e-9 <= correlated["value"] + 2e-9
        assert own["captured"] <= peer["captured"] + 1e-9 <= correlated["captured"] + 2e-9 <= 1
        assert points[-1]["progress"] == 1
    with pytest.raises(UserError, match="has no method"):
        run_mechanisms(Arm("empty"), Trial(seed=1000, settings={"instances": 1, "family": "common-noise"}))


def test_captured_is_the_share_of_the_first_best():
    settings = {"instances": 3, "family": "complementary"}
    got = run_mechanisms(CORRELATED, Trial(seed=1000, settings=settings))
    rng = Trial(seed=1000, settings=settings).rng("instances")
    problems = [InformationAcquisition(**FAMILIES["complementary"](rng)) for _ in range(3)]
    idle = [p.decision_values()[0, 0] for p in problems]
    gained = sum(p.optimal().value - i for p, i in zip(problems, idle))
    possible = sum(p.first_best() - i for p, i in zip(problems, idle))
    assert got["captured"] == pytest.approx(gained / possible)
    told = [p.optimal().mu for p in problems]
    assert got["workers"] == pytest.approx(np.mean([mu[0, 1] + mu[1, 0] + 2 * mu[1, 1] for mu in told]))


def test_online_task():
    np.testing.assert_allclose(reference_instance()["P"], reference().P)
    settings = {"horizons": [1e6, 1e7], "runs": 3}
    mixed, plug_in = (run_online(arm, Trial(seed=1000, settings=settings)) for arm in (MIXED, PLUG_IN))
    claim = next(c for c in CLAIMS if c.name == "learns")
    assert set(mixed) == set(claim.task.metrics)
    assert mixed["obeyed"] == 1
    assert mixed["alpha"] > plug_in["alpha"] == 0
    with pytest.raises(UserError, match="has no method"):
        run_online(Arm("empty"), Trial(seed=1000, settings=settings))


def test_a_shared_view_is_what_two_agents_see():
    rng = np.random.default_rng(0)
    prior, view = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(3), size=2)
    agents = [[rng.dirichlet(np.ones(2), size=3) for _ in range(2)] for _ in range(2)]
    P = shared_view(prior, view, agents)
    for b, c, s, t, state in itertools.product((0, 1), repeat=5):
        expected = prior[state] * sum(view[state, w] * agents[0][b][w, s] * agents[1][c][w, t] for w in range(3))
        assert P[b, c, s, t, state] == pytest.approx(expected)


# -- files and commands --

INSTANCE = """
states: [low, high]
prior: [1/2, 1/2]
decisions: [sell, buy]
utility: [[1, 0], [0, 1]]
max_payment: 1
view: [[0.7, 0.3], [0.3, 0.7]]
agents:
  ann: &worker
    signals: [bad, good]
    efforts:
      shirk: {cost: 0, signals: [[0.5, 0.5], [0.5, 0.5]]}
      work: {cost: 0.05, signals: [[0.95, 0.05], [0.05, 0.95]]}
  bob: *worker
"""


@pytest.fixture
def instance(tmp_path):
    path = tmp_path / "instance.yaml"
    path.write_text(INSTANCE)
    return path


def test_a_file_is_the_problem_it_describes(instance, tmp_path):
    problem = InformationAcquisition.from_yaml(instance)
    np.testing.assert_allclose(problem.P, reference().P, atol=1e-15)
    assert problem.labels.agents == ("ann", "bob")
    assert problem.labels.efforts == (("shirk", "work"),) * 2
    assert problem.labels.decisions == ("sell", "buy")
    assert InformationAcquisition.from_yaml(instance, max_payment=5).optimal().value == pytest.approx(0.57, abs=1e-5)
    # The same written out.
    P = problem.P
    lines = ["states: [low, high]", "decisions: [sell, buy]", "utility: [[1, 0], [0, 1]]", "max_payment: 1e0"]
    lines += ["agents:"]
    for name in ("ann", "bob"):
        lines += [f"  {name}: {{signals: [bad, good], efforts: {{shirk: 0, work: 0.05}}}}"]
    lines += ["joint:"]
    for b in itertools.product((0, 1), repeat=2):
        efforts = [("shirk", "work")[k] for k in b]
        lines += [f"- {{efforts: [{', '.join(efforts)}], table: {json.dumps(P[b].tolist())}}}"]
    (tmp_path / "joint.yaml").write_text("\n".join(lines))
    np.testing.assert_allclose(InformationAcquisition.from_yaml(tmp_path / "joint.yaml").P, P, atol=1e-15)


def test_a_lopsided_view_is_read_by_state_then_by_what_is_seen(tmp_path):
    text = INSTANCE.replace("[1/2, 1/2]", "[0.2, 0.8]").replace("[[0.7, 0.3], [0.3, 0.7]]", "[[0.9, 0.1], [0.4, 0.6]]")
    (tmp_path / "i.yaml").write_text(text.replace("[0.05, 0.95]", "[0.25, 0.75]"))
    idle, work = np.full((2, 2), 0.5), np.array([[0.95, 0.05], [0.25, 0.75]])
    expected = shared_view(np.array([0.2, 0.8]), np.array([[0.9, 0.1], [0.4, 0.6]]), [[idle, work]] * 2)
    np.testing.assert_allclose(InformationAcquisition.from_yaml(tmp_path / "i.yaml").P, expected, atol=1e-15)


def test_signals_without_a_view_depend_on_the_state(tmp_path):
    text = INSTANCE.replace("view: [[0.7, 0.3], [0.3, 0.7]]\n", "")
    (tmp_path / "i.yaml").write_text(text)
    np.testing.assert_allclose(InformationAcquisition.from_yaml(tmp_path / "i.yaml").P, reference(view=1.0).P)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prior: [1/2, 1/2]\n", "", "prior: missing"),
        ("prior: [1/2, 1/2]", "prior: [1/2, 1/3]", "prior: sums to 0.833333, not 1"),
        ("prior: [1/2, 1/2]", "prior: [1, 1/0]", r"prior\[1\]: expected a finite number.*'1/0'"),
        ("prior: [1/2, 1/2]", "prior: [1]", r"prior: expected 2 entries"),
        ("prior: [1/2, 1/2]", "prior: [1.5, -0.5]", "prior: holds -0.5"),
        ("[[1, 0], [0, 1]]", "[[1, 0], [0]]", r"utility\[1\]: expected 2 entries"),
        ("[[1, 0], [0, 1]]", "[[1, 0], [0, yes]]", r"utility\[1\]\[1\]: expected a finite number.*True"),
        ("max_payment: 1", "max_payment: 0", "max_payment: 0 is not above 0"),
        ("max_payment: 1", "max_payments: 1", "max_payments: unknown key; known here: states"),
        ("max_payment: 1", "max_payment: 1\noutside: [1]", "outside: expected 2 entries"),
        ("[[0.7, 0.3], [0.3, 0.7]]", "[[0.7, 0.3], [0.3, 0.8]]", r"view\[1\]: sums to 1.1"),
        ("[[0.7, 0.3], [0.3, 0.7]]", "7", "view: expected a row per state"),
        ("cost: 0.05", "cost: -1", "agents.ann.efforts.work.cost: -1 is below 0"),
        ("cost: 0.05, ", "", "agents.ann.efforts.work.cost: missing"),
        ("[0.95, 0.05]", "[0.95, 0.04]", r"agents.ann.efforts.work.signals\[0\]: sums to 0.99, not 1"),
        ("signals: [bad, good]", "signals: [bad, bad]", "agents.ann.signals: a name is there twice"),
        ("signals: [bad, good]", "signal: [bad, good]", "agents.ann.signal: unknown key"),
        ("states: [low, high]", "states: 2", "states: expected a list of names"),
        ("decisions: [sell, buy]", "states: [low, high]", ":4: not valid YAML: 'states' is there twice"),
        ("states: [low, high]", "states: [low, high", "not valid YAML"),
        ("agents:", "joint: []\nagents:", "prior: is told by joint already"),
    ],
)
def test_bad_files_are_named_with_key_and_remedy(tmp_path, old, new, message):
    assert old in INSTANCE
    path = tmp_path / "instance.yaml"
    path.write_text(INSTANCE.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        read_instance(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bad_joint_tables_and_files(tmp_path):
    text = textwrap.dedent(
        """
        states: [low, high]
        decisions: [sell, buy]
        utility: [[1, 0], [0, 1]]
        max_payment: 1
        agents: {ann: {signals: [bad, good], efforts: {shirk: 0, work: 0.05}}}
        joint:
        - {efforts: [shirk], table: [[0.25, 0.25], [0.25, 0.25]]}
        - {efforts: [work], table: [[0.4, 0.1], [0.1, 0.4]]}
        """
    )
    path = tmp_path / "joint.yaml"
    path.write_text(text)
    assert InformationAcquisition.from_yaml(path).optimal().value > 0.5
    for old, new, message in (
        ("[work], table", "[play], table", r"joint\[1\].efforts\[0\]: 'play' is none"),
        ("[work], table", "[shirk], table", r"joint\[1\].efforts: this combination is there twice"),
        ("- {efforts: [work], table: [[0.4, 0.1], [0.1, 0.4]]}", "", r"joint: lacks the efforts \(work\)"),
        ("0.4], ", "0.4, 1], ", "x"),
        ("[[0.4, 0.1], [0.1, 0.4]]", "[[0.4, 0.1], [0.1, 0.3]]", r"joint\[1\].table: sums to 0.9"),
        ("[[0.4, 0.1], [0.1, 0.4]]", "[[0.4, 0.1]]", r"joint\[1\].table: expected 2 entries"),
        ("[[0.4, 0.1], [0.1, 0.4]]", "[[0.5, 0.1], [0.1, 0.3]]", r"P\[1\] gives the states probabilities"),
    ):
        if message == "x":
            continue
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message) as caught:
            InformationAcquisition.from_yaml(path)
        assert str(caught.value).startswith(str(path))
    path.write_bytes(b"\xff\xfe\xfa")
    for bad, message in (
        (path, "not UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_instance(bad)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="an instance is a mapping"):
        read_instance(path)


def run(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_mechanism_command(instance, tmp_path):
    out = tmp_path / "mechanism.json"
    ran = run("mechanism", instance, "--compare", "--out", out)
    assert ran.exit_code == 0, ran.output
    assert "value 0.561776" in ran.output
    assert "recommend with probability 0.0935: ann: work, bob: work" in ran.output
    written = json.loads(out.read_text())
    printed = json.loads(run("mechanism", instance, "--compare", "--json").output)
    assert written == printed
    assert printed["values"] == pytest.approx({"own": 0.5, "peer": 0.5, "correlated": 0.561776}, abs=1e-6)
    assert sum(r["probability"] for r in printed["recommendations"]) == pytest.approx(1)
    # The file says all that is needed to recompute the value.
    value = 0.0
    for entry in printed["recommendations"]:
        for row in entry["table"]:
            right = {"low": "sell", "high": "buy"}[row["state"]] == row["decision"]
            value += entry["probability"] * row["probability"] * (right - sum(row["payments"]))
    assert value == pytest.approx(printed["value"])
    forced = json.loads(run("mechanism", instance, "--payments", "peer", "--profile", "work, work", "--json").output)
    assert [r["efforts"] for r in forced["recommendations"]] == [["work", "work"]]
    for arguments, message in (
        (["--profile", "work,work", "--max-payment", "0.1"], "ann, told effort work"),
        (["--profile", "work"], "an effort for each of ann, bob"),
        (["--profile", "work,play"], "bob has no effort 'play'; it has shirk, work"),
        (["--outside", "2"], "walking away; a max_payment of 2 is enough"),
        (["--out", tmp_path / "m.txt"], ".json"),
        (["--out", tmp_path / "no" / "m.json"], "there is no folder"),
    ):
        failed = run("mechanism", instance, *arguments)
        assert isinstance(failed.exception, UserError), failed.output
        assert message in str(failed.exception)


def test_learn_command(instance, tmp_path):
    pytest.importorskip("matplotlib")
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        out = tmp_path / f"curve{ending}"
        ran = run("learn", instance, "--rounds", "3e6", "--repeats", "2", "--out", out)
        assert ran.exit_code == 0, ran.output
        assert out.read_bytes().startswith(start)
    assert "slope of log regret 0.6" in ran.output
    assert "capped" in ran.output
    result = json.loads(run("learn", instance, "--rounds", "1e7", "--repeats", "2", "--json").output)
    assert [p["rounds"] for p in result["points"]][-1] == 10**7
    assert result["optimum"] == pytest.approx(0.561776, abs=1e-6)
    plan = ExploreThenCommit(InformationAcquisition.from_yaml(instance), 1e7)
    again = [plan.simulate(np.random.default_rng([0, 10**7, k])).regret for k in range(2)]
    assert result["points"][-1]["regret"] == pytest.approx(again)
    for arguments, message in (
        (["--rounds", "30"], "too few for 4 profiles"),
        (["--max-payment", "0.1"], "strictly prefer effort work"),
        (["--out", tmp_path / "curve.gif"], ".png, .svg, .pdf"),
    ):
        failed = run("learn", instance, *arguments)
        assert isinstance(failed.exception, UserError), failed.output
        assert message in str(failed.exception)
    assert run("learn", instance, "--rounds", "many").exit_code == 2
