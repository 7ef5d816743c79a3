"""Relaxed pairing: marginals, limits, POT as the other implementation, finite differences for the gradients."""

import numpy as np
import pytest

from counterproof.assign import dual_softmax, linear_assignment, sinkhorn

KINDS = ["numpy", "torch"]


def given_as(kind, array):
    return array if kind == "numpy" else pytest.importorskip("torch").from_numpy(np.asarray(array))


def masses(rng, *shape):
    values = rng.random(shape) + 0.1
    return values / values.sum(-1, keepdims=True)


# --- Sinkhorn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uniform", [True, False])
def test_balanced_against_pot(rng, kind, uniform):
    ot = pytest.importorskip("ot")
    cost = rng.random((7, 5))
    a, b = (np.full(7, 1 / 7), np.full(5, 1 / 5)) if uniform else (masses(rng, 7), masses(rng, 5))
    theirs = ot.sinkhorn(a, b, cost, reg=0.05, method="sinkhorn_log", numItermax=20000, stopThr=1e-14)
    marginals = None if uniform else (given_as(kind, a), given_as(kind, b))
    ours = sinkhorn(given_as(kind, cost), 0.05, num_iters=20000, tol=1e-12, marginals=marginals)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.3, 5.0, (np.inf, 0.4), (0.7, np.inf), (0.2, 2.0)])
def test_unbalanced_against_pot(rng, kind, rho):
    ot = pytest.importorskip("ot")
    cost, a, b = rng.random((6, 8)), masses(rng, 6), 1.3 * masses(rng, 8)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, reg=0.1, reg_m=rho, reg_type="kl", numItermax=20000, stopThr=1e-14
    )
    ours = sinkhorn(given_as(kind, cost), 0.1, 20000, 1e-12, (given_as(kind, a), given_as(kind, b)), unbalanced=rho)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-9)


def test_marginals_hold(rng):
    cost = rng.normal(size=(3, 2, 6, 9))
    a, b = masses(rng, 3, 2, 6), masses(rng, 9)
    plan = sinkhorn(cost, reg=0.3, num_iters=2000, tol=1e-9, marginals=(a, b))
    np.testing.assert_allclose(plan.sum(-1), a, rtol=1e-8)
    np.testing.assert_allclose(plan.sum(-2), np.broadcast_to(b, (3, 2, 9)), rtol=1e-12)
    early = sinkhorn(cost, reg=0.3, num_iters=1, marginals=(a, b))  # the columns hold from the first iteration on
    np.testing.assert_allclose(early.sum(-2), np.broadcast_to(b, (3, 2, 9)), rtol=1e-12)


def test_a_batch_is_its_elements(rng):
    cost = rng.normal(size=(4, 5, 6))
    together = sinkhorn(cost, reg=0.2, num_iters=37, tol=0)
    for element in range(4):
        np.testing.assert_allclose(sinkhorn(cost[element], reg=0.2, num_iters=37, tol=0), together[element], rtol=1e-12)


def test_small_reg_tends_to_the_exact_pairing(rng):
    cost = rng.random((7, 7))
    rows, columns = linear_assignment(cost)
    exact = cost[rows, columns].sum() / 7
    gaps = [(sinkhorn(cost, reg, num_iters=50000, tol=1e-9) * cost).sum() - exact for reg in (0.3, 0.1, 0.03, 0.003)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > -1e-9
    assert gaps[3] < 1e-3
    plan = sinkhorn(cost, 0.003, num_iters=50000, tol=1e-9)
    np.testing.assert_array_equal(plan.argmax(1), columns)


def test_large_reg_tends_to_the_product_of_the_marginals(rng):
    a, b = masses(rng, 4), masses(rng, 6)
    plan = sinkhorn(rng.random((4, 6)), reg=1e7, marginals=(a, b))
    np.testing.assert_allclose(plan, a[:, None] * b, rtol=1e-6)
    np.testing.assert_allclose(sinkhorn(rng.random((4, 6)), reg=1e7), np.full((4, 6), 1 / 24), rtol=1e-6)


def test_hard_limit_of_unbalanced_is_balanced(rng):
    cost = rng.random((5, 4))
    soft = sinkhorn(cost, 0.1, 5000, 1e-12, unbalanced=1e9)
    np.testing.assert_allclose(soft, sinkhorn(cost, 0.1, 5000, 1e-12), rtol=1e-6)
    np.testing.assert_array_equal(sinkhorn(cost, 0.1, unbalanced=np.inf), sinkhorn(cost, 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_equivariance_and_constants(rng, kind):
    cost = rng.random((5, 6))
    p, q = rng.permutation(5), rng.permutation(6)
    plan = np.asarray(sinkhorn(given_as(kind, cost)))
    np.testing.assert_allclose(np.asarray(sinkhorn(given_as(kind, cost[p][:, q]))), plan[p][:, q], rtol=1e-6)
    moved = cost + rng.normal(size=(5, 1)) * 100 + rng.normal(size=6)
    np.testing.assert_allclose(
        np.asarray(sinkhorn(given_as(kind, moved), tol=1e-12, num_iters=3000)),
        np.asarray(sinkhorn(given_as(kind, cost), tol=1e-12, num_iters=3000)),
        atol=1e-9,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_forbidden_pairs(rng, kind):
    cost, a, b = rng.random((4, 5)), masses(rng, 4), masses(rng, 5)
    padded = np.full((6, 7), np.nan)
    padded[:4, :5] = cost
    plan = np.asarray(
        sinkhorn(given_as(kind, padded), marginals=(given_as(kind, np.r_[a, 0, 0]), given_as(kind, np.r_[b, 0, 0])))
    )
    np.testing.assert_allclose(
        plan[:4, :5], np.asarray(sinkhorn(given_as(kind, cost), marginals=(given_as(kind, a), given_as(kind, b))))
    )
    assert (plan[4:] == 0).all()
    assert (plan[:, 5:] == 0).all()
    cost[1, 2] = np.inf
    plan = np.asarray(sinkhorn(given_as(kind, cost), 0.2, 2000, 1e-10))
    assert plan[1, 2] == 0
    np.testing.assert_allclose(plan.sum(1), 1 / 4, rtol=1e-8)


def test_tolerance_stops_early_and_large_costs_do_not_overflow(rng):
    cost = rng.random((5, 5)) * 1e4
    plan = sinkhorn(cost.astype(np.float32), reg=1.0, num_iters=300)
    assert plan.dtype == np.float32
    np.testing.assert_allclose(plan.sum(0), 0.2, rtol=1e-3)
    easy = rng.random((5, 5))
    early, late = sinkhorn(easy, reg=1.0, tol=1e-3, num_iters=10**6), sinkhorn(easy, reg=1.0, tol=0, num_iters=500)
    np.testing.assert_allclose(early, late, rtol=1e-2)


@pytest.mark.parametrize("unbalanced", [None, 0.5, (np.inf, 1.0)])
def test_sinkhorn_gradients(rng, unbalanced):
    torch = pytest.importorskip("torch")
    cost = torch.from_numpy(rng.random((2, 3, 4))).requires_grad_()
    a, b = torch.from_numpy(masses(rng, 3)).requires_grad_(), torch.from_numpy(masses(rng, 4)).requires_grad_()

    def plan(cost, a, b):
        marginals = (a / a.sum(), b / b.sum())
        return sinkhorn(cost, reg=0.3, num_iters=15, tol=0, marginals=marginals, unbalanced=unbalanced)

    assert torch.autograd.gradcheck(plan, (cost, a, b))


def test_gradient_of_the_transport_cost_is_the_plan(rng):
    """Envelope theorem: at the optimum, d min(<P, C> + reg KL) / dC = P."""
    torch = pytest.importorskip("torch")
    cost = torch.from_numpy(rng.random((4, 5))).requires_grad_()
    plan = sinkhorn(cost, reg=0.2, num_iters=500, tol=1e-12)
    objective = (plan * cost).sum() + 0.2 * (plan * (plan * 20).log()).sum()
    objective.backward()
    torch.testing.assert_close(cost.grad, plan.detach(), atol=1e-8, rtol=0)


def test_gradients_pass_forbidden_pairs_and_padding():
    torch = pytest.importorskip("torch")
    cost = torch.tensor([[0.3, float("inf"), 0.1], [0.2, 0.5, float("nan")]], requires_grad=True)
    plan = sinkhorn(cost, marginals=(torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.6, 0.0])), reg=0.5)
    (plan[:, :2] * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert torch.isfinite(cost.grad).all()


def test_half_precision_is_computed_in_single(rng):
    torch = pytest.importorskip("torch")
    cost = torch.from_numpy(rng.random((4, 4)))
    for dtype in (torch.float16, torch.bfloat16):
        plan = sinkhorn(cost.to(dtype))
        assert plan.dtype == dtype
        torch.testing.assert_close(plan, sinkhorn(cost.to(dtype).float()).to(dtype))
        assert dual_softmax(cost.to(dtype)).dtype == dtype
    assert sinkhorn(np.array([[1, 2], [3, 4]])).dtype == np.float64


# --- dual softmax


@pytest.mark.parametrize("kind", KINDS)
def test_dual_softmax_is_the_product(rng, kind):
    scores = rng.normal(size=(2, 5, 4))
    e = np.exp(scores / 0.3)
    expected = e / e.sum(-1, keepdims=True) * e / e.sum(-2, keepdims=True)
    np.testing.assert_allclose(np.asarray(dual_softmax(given_as(kind, scores), 0.3)), expected, rtol=1e-12)


def test_dual_softmax_limits(rng):
    scores = rng.normal(size=(6, 6))
    np.testing.assert_allclose(dual_softmax(scores, 1e9), np.full((6, 6), 1 / 36), rtol=1e-6)
    mutual = (scores == scores.max(1, keepdims=True)) & (scores == scores.max(0))
    np.testing.assert_allclose(dual_softmax(scores, 1e-4), mutual, atol=1e-12)  # each other's first choice
    assert (dual_softmax(scores * 1e30) <= 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dual_softmax_of_excluded_pairs(rng, kind):
    scores = rng.normal(size=(4, 5))
    masked = scores.copy()
    masked[3], masked[:, 4] = -np.inf, -np.inf
    result = np.asarray(dual_softmax(given_as(kind, masked)))
    np.testing.assert_allclose(result[:3, :4], dual_softmax(scores[:3, :4]), rtol=1e-12)
    assert (result[3] == 0).all()
    assert (result[:, 4] == 0).all()


def test_dual_softmax_gradients(rng):
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(rng.normal(size=(2, 3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dual_softmax(s, 0.5), scores)
    masked = torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]], requires_grad=True)
    dual_softmax(masked).sum().backward()
    assert torch.isfinite(masked.grad).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0)])
def test_nothing_to_couple(shape):
    assert sinkhorn(np.empty(shape)).shape == shape
    assert dual_softmax(np.empty(shape)).shape == shape


# --- what is said about bad input

COST = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn(COST, reg=0), "reg is 0; expected a number > 0"),
        (lambda: sinkhorn(COST, num_iters=0), "num_iters is 0"),
        (lambda: sinkhorn(COST, tol=-1), "tol -1"),
        (lambda: sinkhorn(COST, unbalanced=0), "unbalanced is 0"),
        (lambda: sinkhorn(COST, unbalanced=(1, 2, 3)), "unbalanced is"),
        (lambda: sinkhorn(np.ones(3)), "cost has 1 dimensions"),
        (lambda: sinkhorn(np.array([[1, np.nan]])), r"cost is nan at \(0, 1\)"),
        (lambda: sinkhorn(np.array([[1], [-np.inf]])), r"cost is -inf at \(1, 0\)"),
        (lambda: sinkhorn(np.array([[1.0, 1], [np.inf, np.inf]])), r"cost allows no pair for row \(1,\)"),
        (lambda: sinkhorn(np.array([[[1.0, np.inf], [1, np.inf]]])), r"cost allows no pair for column \(0, 1\)"),
        (lambda: sinkhorn(COST, marginals=(np.ones(3) / 3, np.ones(3) / 3)), r"rows have shape \(3,\); expected"),
        (lambda: sinkhorn(COST, marginals=(np.ones(2), np.ones(3))), "must have the same sum when balanced"),
        (lambda: sinkhorn(COST, marginals=(np.array([1, -1]), np.ones(3))), "rows must be finite and >= 0"),
        (lambda: sinkhorn(COST, marginals=(np.ones(2), np.zeros(3))), "columns have no mass"),
        (lambda: dual_softmax(COST, 0), "temperature is 0"),
        (lambda: dual_softmax(np.ones(3)), "scores has 1 dimensions"),
        (lambda: dual_softmax(np.array([[1, np.nan]])), r"scores is nan at \(0, 1\)"),
        (lambda: dual_softmax(np.array([[1, np.inf]])), r"scores is inf at \(0, 1\)"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="rows is a ndarray among tensors"):
        sinkhorn(torch.ones(2, 2), marginals=(np.ones(2), np.ones(2)))
    with pytest.raises(TypeError, match="scores has dtype"):
        dual_softmax(np.ones((2, 2), complex))
