"""Exact pairing: against brute force, SciPy, networkx and transformers' matcher; and what is said about bad input."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from counterproof.assign import (
    capacity_assignment,
    group_assignment,
    linear_assignment,
    linear_assignment_batch,
)

SHAPES = st.tuples(st.integers(0, 6), st.integers(0, 6))
WHOLE = hnp.arrays(np.int64, SHAPES, elements=st.integers(-5, 5))  # ties abound
REAL = hnp.arrays(np.float64, SHAPES, elements=st.floats(-1e6, 1e6))
COSTS = WHOLE | REAL


def pairings(n, m):
    """Every complete one-to-one pairing of n rows and m columns, as lists of pairs."""
    if n <= m:
        return [list(zip(range(n), columns)) for columns in permutations(range(m), n)]
    return [sorted(zip(rows, range(m))) for rows in permutations(range(n), m)]


def total(cost, pair):
    return np.asarray(cost, dtype=np.float64)[pair[0], pair[1]].sum()


@given(COSTS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_pairing_is_better(cost, maximize):
    rows, columns = linear_assignment(cost, maximize=maximize)
    totals = [sum(float(cost[i, j]) for i, j in pairs) for pairs in pairings(*cost.shape)]
    best = max(totals) if maximize else min(totals)
    assert total(cost, (rows, columns)) == pytest.approx(best, rel=1e-9, abs=1e-6)
    assert len(rows) == len(columns) == min(cost.shape)
    assert rows.dtype == columns.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert len(set(columns.tolist())) == len(columns)


def test_seven_by_seven_brute_force(rng):
    cost = rng.random((7, 7))
    best = min(sum(cost[i, j] for i, j in enumerate(p)) for p in permutations(range(7)))
    assert total(cost, linear_assignment(cost)) == pytest.approx(best, abs=1e-12)


DTYPES = ["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64", "longdouble"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_dtypes_against_scipy(rng, dtype):
    cost = (rng.random((9, 5)) * 7).astype(dtype)
    for ours, theirs in zip(linear_assignment(cost), linear_sum_assignment(cost.astype(np.float64))):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "dtype", ["bool", "int16", "int64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]
)
def test_torch_dtypes_against_scipy(rng, dtype):
    torch = pytest.importorskip("torch")
    cost = torch.from_numpy(rng.random((9, 5)) * 7).to(getattr(torch, dtype))
    for ours, theirs in zip(linear_assignment(cost), linear_sum_assignment(cost.double().numpy())):
        assert isinstance(ours, torch.Tensor)
        assert ours.dtype == torch.int64
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_torch_needs_no_detaching_and_views_are_fine(rng):
    torch = pytest.importorskip("torch")
    cost = torch.from_numpy(rng.random((12, 8))).requires_grad_()
    view = cost[::2].T
    rows, columns = linear_assignment(view)
    assert not rows.requires_grad
    np.testing.assert_array_equal(columns.numpy(), linear_sum_assignment(view.detach().numpy())[1])
    # the pairing is a constant; the costs it picks still carry gradients
    view[rows, columns].sum().backward()
    assert cost.grad is not None
    assert cost.grad.sum() == len(rows)


def test_inputs_are_left_alone(rng):
    cost = rng.random((2, 6, 4))
    cost[1, 2, 3] = np.nan
    before = cost.copy()
    linear_assignment_batch(cost, on_invalid="last", maximize=True)
    group_assignment(cost[:1], 2, maximize=True)
    capacity_assignment(cost[0], 2, maximize=True)
    np.testing.assert_array_equal(cost, before)


def test_networkx_agrees(rng):
    nx = pytest.importorskip("networkx")
    cost = rng.random((8, 8))
    graph = nx.Graph()
    graph.add_weighted_edges_from(((0, i), (1, j), cost[i, j]) for i in range(8) for j in range(8))
    matching = nx.min_weight_matching(graph)
    theirs = sum(graph.edges[edge]["weight"] for edge in matching)
    assert total(cost, linear_assignment(cost)) == pytest.approx(theirs, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_permuting_the_problem_permutes_the_pairing(seed, n, m):
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m))  # almost surely one optimum
    p, q = rng.permutation(n), rng.permutation(m)
    straight = set(zip(*(a.tolist() for a in linear_assignment(cost))))
    rows, columns = linear_assignment(cost[p][:, q])
    assert {(int(p[i]), int(q[j])) for i, j in zip(rows, columns)} == straight


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_constants_on_rows_and_columns_of_a_square_change_nothing(seed, n):
    rng = np.random.default_rng(seed)
    cost = rng.random((n, n))
    moved = cost + rng.normal(size=(n, 1)) * 10 + rng.normal(size=n) * 10
    np.testing.assert_array_equal(linear_assignment(cost)[1], linear_assignment(moved)[1])


def test_ties_are_resolved_alike_every_time():
    cost = np.zeros((5, 5))
    np.testing.assert_array_equal(linear_assignment(cost)[1], np.arange(5))
    repeated = [linear_assignment(np.ones((6, 3)))[0].tolist() for _ in range(3)]
    assert repeated[0] == repeated[1] == repeated[2]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)])
def test_nothing_to_pair(shape):
    rows, columns = linear_assignment(np.empty(shape))
    assert rows.shape == columns.shape == (0,)
    assert rows.dtype == np.int64
    assert linear_assignment(np.empty(shape), np.ones(shape, bool))[0].shape == (0,)


# --- forbidden and broken pairs


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.floats(0.2, 1.0))
@settings(max_examples=100, deadline=None)
def test_masks_against_brute_force(seed, n, m, density):
    rng = np.random.default_rng(seed)
    cost, valid = rng.normal(size=(n, m)), rng.random((n, m)) < density
    noisy = np.where(valid, cost, np.nan)  # what stands under a mask is never read
    allowed = [pairs for pairs in pairings(n, m) if all(valid[i, j] for i, j in pairs)]
    infinite = np.where(valid, cost, np.inf)
    if not allowed:
        with pytest.raises(ValueError, match="no complete pairing"):
            linear_assignment(noisy, valid)
        with pytest.raises(ValueError, match="no complete pairing"):
            linear_assignment(infinite)
        return
    best = min(sum(cost[i, j] for i, j in pairs) for pairs in allowed)
    for pair in (linear_assignment(noisy, valid), linear_assignment(infinite)):
        assert valid[pair].all()
        assert total(cost, pair) == pytest.approx(best, abs=1e-9)
    most = max(sum(cost[i, j] for i, j in pairs) for pairs in allowed)
    assert total(cost, linear_assignment(noisy, valid, maximize=True)) == pytest.approx(most, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_last_pairs_broken_entries_only_when_it_must(seed, n, m, maximize, masked):
    """Fewest broken pairs first, least cost among those second; pairs that a mask forbids never."""
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(n, m))
    broken = rng.random((n, m)) < 0.5
    valid = rng.random((n, m)) < (0.8 if masked else 2)
    shown = np.where(broken, rng.choice([np.nan, np.inf, -np.inf], size=(n, m)), cost)
    allowed = [pairs for pairs in pairings(n, m) if all(valid[i, j] for i, j in pairs)]
    mask = valid if masked else None
    if not allowed:
        with pytest.raises(ValueError, match="no complete pairing"):
            linear_assignment(shown, mask, "last", maximize=maximize)
        return
    sign = -1 if maximize else 1
    best = min(
        (
            sum(bool(broken[i, j]) for i, j in pairs),
            sum(sign * cost[i, j] for i, j in pairs if not broken[i, j]),
        )
        for pairs in allowed
    )
    rows, columns = linear_assignment(shown, mask, "last", maximize=maximize)
    sound = ~broken[rows, columns]
    assert (~sound).sum() == best[0]
    assert sign * cost[rows[sound], columns[sound]].sum() == pytest.approx(best[1], abs=1e-9)
    assert valid[rows, columns].all()


def test_last_agrees_with_the_replacement_of_transformers(rng):
    cost = rng.random((9, 4)).astype(np.float32)
    cost[:3, 1] = np.nan
    replaced = np.nan_to_num(cost, nan=np.finfo(np.float32).max).astype(np.float64)
    for ours, theirs in zip(linear_assignment(cost, on_invalid="last"), linear_sum_assignment(replaced)):
        np.testing.assert_array_equal(ours, theirs)


def test_largest_floats():
    big = np.finfo(np.float64).max
    cost = np.array([[big, big, 1.0], [2.0, big, big], [big, big, big]])  # as masked_fill leaves it
    assert total(np.where(cost == big, 0, cost), linear_assignment(cost)) == 3.0
    np.testing.assert_array_equal(linear_assignment(np.array([[-big, big], [2.0, np.inf]]))[1], [1, 0])
    cost = np.array([[big, np.nan, -big], [-big, np.nan, big], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(linear_assignment(cost, on_invalid="last"), ([0, 1, 2], [2, 0, 1]))


def test_everything_broken_still_pairs():
    assert len(linear_assignment(np.full((4, 2), np.nan), on_invalid="last")[0]) == 2


# --- batches


def problems(rng, shapes):
    return [rng.normal(size=shape) for shape in shapes]


RAGGED = [(5, 3), (5, 0), (2, 7), (0, 4), (6, 6), (1, 1)]


@pytest.mark.parametrize("maximize", [False, True])
def test_batch_is_one_problem_after_another(rng, maximize):
    costs = problems(rng, RAGGED)
    padded = np.full((len(costs), 6, 7), np.nan)
    for element, cost in enumerate(costs):
        padded[element, : cost.shape[0], : cost.shape[1]] = cost
    expected = [linear_sum_assignment(cost, maximize) for cost in costs]
    for pairs in (
        linear_assignment_batch(costs, maximize=maximize),
        linear_assignment_batch(padded, sizes=RAGGED, maximize=maximize),
        linear_assignment_batch(padded, sizes=np.array(RAGGED), maximize=maximize),
    ):
        assert len(pairs) == len(costs)
        for ours, theirs in zip(pairs, expected):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [[3, 0, 7], (3, 0, 7), np.array([3, 0, 7]), [np.int64(3), np.int32(0), 7]])
def test_padded_columns_are_never_read(rng, sizes):
    costs = rng.normal(size=(3, 9, 7))
    expected = [linear_sum_assignment(cost[:, :size]) for cost, size in zip(costs, [3, 0, 7])]
    for element, size in enumerate([3, 0, 7]):
        costs[element, :, size:] = np.nan
    for ours, theirs in zip(linear_assignment_batch(costs, sizes), expected):
        np.testing.assert_array_equal(ours, theirs)


def test_batch_masks(rng):
    costs, valid = rng.normal(size=(4, 6, 3)), rng.random((4, 6, 3)) < 0.7
    valid[:, :3] |= np.eye(3, dtype=bool)
    expected = [linear_sum_assignment(np.where(v, c, np.inf)) for c, v in zip(costs, valid)]
    for pairs in (linear_assignment_batch(costs, valid=valid), linear_assignment_batch(list(costs), valid=list(valid))):
        for ours, theirs in zip(pairs, expected):
            np.testing.assert_array_equal(ours, theirs)
    cut = linear_assignment_batch(costs, [2, 3, 0, 1], valid)
    for ours, c, v, size in zip(cut, costs, valid, [2, 3, 0, 1]):
        np.testing.assert_array_equal(ours, linear_sum_assignment(np.where(v, c, np.inf)[:, :size]))


def test_batch_of_tensors(rng):
    torch = pytest.importorskip("torch")
    costs = torch.from_numpy(rng.normal(size=(3, 9, 7))).bfloat16().requires_grad_()
    expected = [linear_sum_assignment(c[:, :s]) for c, s in zip(costs.detach().double().numpy(), [3, 0, 7])]
    for pairs in (
        linear_assignment_batch(costs, torch.tensor([3, 0, 7])),
        linear_assignment_batch([costs[0, :, :3], costs[1, :, :0], costs[2]]),
    ):
        for ours, theirs in zip(pairs, expected):
            assert all(isinstance(index, torch.Tensor) and index.dtype == torch.int64 for index in ours)
            np.testing.assert_array_equal([index.numpy() for index in ours], theirs)
    valid = torch.ones(3, 9, 7, dtype=torch.bool)
    assert len(linear_assignment_batch(costs, [1, 1, 1], valid)[0][0]) == 1


def test_batch_of_none():
    assert linear_assignment_batch([]) == []
    assert linear_assignment_batch(np.empty((0, 5, 3))) == []
    assert linear_assignment_batch(np.empty((0, 5, 3)), sizes=[]) == []


# --- groups


@pytest.mark.parametrize(("groups", "n", "m"), [(1, 5, 3), (4, 5, 3), (3, 2, 6), (2, 4, 0), (5, 0, 3)])
@pytest.mark.parametrize("maximize", [False, True])
def test_groups_are_the_union_of_their_blocks(rng, groups, n, m, maximize):
    cost = rng.normal(size=(groups * n, m))
    rows, columns = group_assignment(cost, groups, maximize=maximize)
    blocks = [linear_sum_assignment(cost[g * n : (g + 1) * n], maximize) for g in range(groups)]
    np.testing.assert_array_equal(rows, np.concatenate([block[0] + g * n for g, block in enumerate(blocks)]))
    np.testing.assert_array_equal(columns, np.concatenate([block[1] for block in blocks]))
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    if m <= n:
        np.testing.assert_array_equal(np.bincount(columns, minlength=m), groups)


def test_one_group_is_the_plain_pairing(rng):
    cost = rng.normal(size=(8, 3))
    np.testing.assert_array_equal(group_assignment(cost, 1), linear_assignment(cost))


def test_groups_agree_with_transformers(rng):
    torch = pytest.importorskip("torch")
    matching = pytest.importorskip("transformers.loss.loss_lw_detr")
    groups, n, sizes = 3, 7, [4, 0, 2, 9]
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "logits": torch.randn(4, groups * n, 5, generator=generator),
        "pred_boxes": torch.rand(4, groups * n, 4, generator=generator),
    }
    targets = [
        {
            "class_labels": torch.randint(5, (size,), generator=generator),
            "boxes": torch.rand(size, 4, generator=generator),
        }
        for size in sizes
    ]
    theirs = matching.LwDetrHungarianMatcher(class_cost=0, bbox_cost=1, giou_cost=0)(outputs, targets, groups)
    cost = torch.zeros(4, groups * n, max(sizes))
    for element, target in enumerate(targets):
        cost[element, :, : sizes[element]] = torch.cdist(outputs["pred_boxes"][element], target["boxes"], p=1)
    ours = group_assignment(cost, groups, sizes)
    assert len(ours) == len(theirs)
    for (rows, columns), (their_rows, their_columns) in zip(ours, theirs):
        assert torch.equal(rows, their_rows)
        assert torch.equal(columns, their_columns)


# --- capacities


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.lists(st.integers(0, 3), max_size=3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_capacities_against_brute_force(seed, n, capacity, maximize):
    cost = np.random.default_rng(seed).normal(size=(n, len(capacity)))
    match = capacity_assignment(cost, np.array(capacity, dtype=np.int64), maximize=maximize)
    placed = match >= 0
    assert placed.sum() == min(n, sum(capacity))
    assert (np.bincount(match[placed], minlength=len(capacity)) <= capacity).all()
    totals = [
        sum(cost[i, j] for i, j in zip(rows, columns))
        for rows in combinations(range(n), int(placed.sum()))
        for columns in product(range(len(capacity)), repeat=int(placed.sum()))
        if all(columns.count(j) <= c for j, c in enumerate(capacity))
    ]
    best = max(totals) if maximize else min(totals)
    assert cost[placed, match[placed]].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 5)])
def test_capacity_one_is_the_plain_pairing(rng, shape):
    cost = rng.normal(size=shape)
    match = capacity_assignment(cost, 1)
    rows, columns = linear_assignment(cost)
    expected = np.full(shape[0], -1)
    expected[rows] = columns
    np.testing.assert_array_equal(match, expected)


def test_ample_capacity_gives_every_row_its_own_best(rng):
    cost = rng.normal(size=(50, 3))
    np.testing.assert_array_equal(capacity_assignment(cost, 10**9), cost.argmin(1))
    np.testing.assert_array_equal(capacity_assignment(cost, [50, 50, 50], maximize=True), cost.argmax(1))
    cost[:, 0] -= 10  # all want column 0, which takes one
    match = capacity_assignment(cost, np.array([1, 10**12, 10**12]))
    assert (match == 0).sum() == 1
    others = np.flatnonzero(match)
    np.testing.assert_array_equal(match[others], cost[others, 1:].argmin(1) + 1)


def test_capacity_with_tensors_forbidden_and_broken_pairs(rng):
    torch = pytest.importorskip("torch")
    cost = torch.tensor([[0.0, 5.0], [1.0, float("inf")], [2.0, 9.0]])
    assert capacity_assignment(cost, torch.tensor([2, 1])).tolist() == [1, 0, 0]
    assert capacity_assignment(cost, [1, 0]).tolist() == [0, -1, -1]
    cost[0, 0] = float("nan")
    assert capacity_assignment(cost, [1, 2], on_invalid="last").tolist() == [1, 0, 1]


# --- lapx


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_lapx_finds_the_same_total(rng, dtype):
    pytest.importorskip("lap")
    cost = (rng.random((40, 40)) * 1000).astype(dtype)
    for maximize in (False, True):
        pair = linear_assignment(cost, maximize=maximize, backend="lapx")
        assert pair[0].dtype == pair[1].dtype == np.int64
        np.testing.assert_array_equal(pair[0], np.arange(40))
        best = total(cost, linear_sum_assignment(cost.astype(np.float64), maximize))
        assert total(cost, pair) == pytest.approx(best, rel=1e-6)
    pairs = linear_assignment_batch(np.stack([cost, cost]), [(30, 30), (0, 0)], backend="lapx")
    assert [len(pair[0]) for pair in pairs] == [30, 0]


def test_lapx_keeps_the_precision_of_float64(rng):
    pytest.importorskip("lap")
    cost = 1e6 + rng.random((20, 20)) * 1e-3  # float32 sees only ties
    np.testing.assert_array_equal(linear_assignment(cost, backend="lapx")[1], linear_sum_assignment(cost)[1])


def test_lapx_limits():
    pytest.importorskip("lap")
    with pytest.raises(ValueError, match=r"square problems, cost is \(3, 2\)"):
        linear_assignment(np.ones((3, 2)), backend="lapx")
    with pytest.raises(ValueError, match=r"forbids row 0 with column 1"):
        linear_assignment(np.array([[1.0, np.inf], [1.0, 1.0]]), backend="lapx")
    with pytest.raises(ValueError, match=r"costs\[1\] is nan at row 0, column 0"):
        linear_assignment_batch([np.ones((2, 2)), np.full((2, 2), np.nan)], backend="lapx")
    cost = np.array([[np.nan, 1.0], [1.0, 5.0]])
    np.testing.assert_array_equal(linear_assignment(cost, on_invalid="last", backend="lapx")[1], [1, 0])


def test_lapx_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lap", None)
    with pytest.raises(ImportError, match=r"pip install 'counterproof\[lapx\]'"):
        linear_assignment(np.ones((2, 2)), backend="lapx")


# --- what is said about bad input

NAN = np.array([[1.0, 2.0], [3.0, np.nan], [-np.inf, 1.0]])
ALONE = np.array([[1.0, np.inf], [1.0, np.inf], [1.0, np.inf]])
# columns 0 and 1 both need row 2, column 2 is free
HALL = np.array([[np.inf, np.inf, 0.0], [np.inf, np.inf, 0.0], [1.0, 1.0, 1.0], [np.inf, np.inf, 0.0]])
BAD = [
    (lambda: linear_assignment(NAN), r"nan at row 1, column 1 \(invalid entries in all: 2\); .*on_invalid='last'"),
    (lambda: linear_assignment(-NAN, maximize=True), "cost is nan at row 1, column 1"),
    (lambda: linear_assignment(np.array([[np.inf, 1.0]]), maximize=True), "cost is inf at row 0, column 0"),
    (lambda: linear_assignment(ALONE), "cost has no complete pairing: column 1 may be paired with no row"),
    (lambda: linear_assignment(ALONE.T), "row 1 may be paired with no column"),
    (lambda: linear_assignment(HALL), r"columns 0, 1 have only row 2 between them"),
    (lambda: linear_assignment(HALL.T), r"rows 0, 1 have only column 2 between them"),
    (lambda: linear_assignment(np.ones((2, 2)), np.zeros((2, 2), bool)), "row 0 may be paired with no column"),
    (lambda: linear_assignment(np.ones((2, 2)), np.ones((2, 3), bool)), r"valid must be booleans \(2, 2\), as cost"),
    (lambda: linear_assignment(np.ones((2, 2)), np.ones((2, 2))), r"valid must be booleans .* got float64"),
    (lambda: linear_assignment(np.ones(3)), "cost has 1 dimensions"),
    (lambda: linear_assignment(np.ones((2, 2)), on_invalid="skip"), "on_invalid is 'skip'; expected 'raise' or 'last'"),
    (lambda: linear_assignment(np.ones((2, 2)), backend="ortools"), "backend is 'ortools'"),
    (lambda: linear_assignment_batch([np.ones((2, 2)), NAN]), r"costs\[1\] is nan at row 1, column 1"),
    (lambda: linear_assignment_batch(np.stack([ALONE, ALONE])), r"costs\[0\] has no complete pairing: column 1"),
    (lambda: linear_assignment_batch(np.ones((2, 2))), "costs has 2 dimensions"),
    (lambda: linear_assignment_batch([np.ones(2)]), r"costs\[0\] has 1 dimensions"),
    (lambda: linear_assignment_batch(np.ones((2, 3, 4)), [1]), "sizes has 1 entries for a batch of 2"),
    (lambda: linear_assignment_batch(np.ones((2, 3, 4)), [1, 5]), r"sizes\[1\] is 5, but .* are 3 x 4"),
    (lambda: linear_assignment_batch(np.ones((2, 3, 4)), [-1, 2]), r"sizes\[0\] is -1"),
    (lambda: linear_assignment_batch(np.ones((2, 3, 4)), [(1, 1), (4, 1)]), r"sizes\[1\] is \(4, 1\)"),
    (lambda: linear_assignment_batch([np.ones((2, 2))], [1]), "sizes belong to a padded array"),
    (lambda: linear_assignment_batch(np.ones((2, 3, 4)), valid=np.ones((2, 3), bool)), "valid has shape"),
    (lambda: linear_assignment_batch([np.ones((2, 2))], valid=[]), "1 costs but 0 masks"),
    (lambda: group_assignment(np.ones((7, 2)), 3), "7 rows cannot be cut into num_groups=3 equal groups"),
    (lambda: group_assignment(np.ones((6, 2)), 0), "num_groups is 0; expected a whole number >= 1"),
    (lambda: group_assignment(np.ones(6), 2), "cost has 1 dimensions"),
    (lambda: group_assignment(np.ones((6, 2)), 2, [1]), "sizes belong to a batch"),
    (
        lambda: group_assignment(np.stack([np.ones((4, 2)), NAN[[0, 0, 1, 1]]]), 2),
        r"cost\[1\] \(rows of group 1\) is nan",
    ),
    (lambda: group_assignment(np.vstack([np.ones((3, 2)), ALONE]), 2), r"cost \(rows of group 1\) has no complete"),
    (lambda: capacity_assignment(np.ones((6, 2)), 0), "capacity is 0; expected a whole number >= 1"),
    (lambda: capacity_assignment(np.ones((6, 2)), True), "capacity is True"),
    (lambda: capacity_assignment(np.ones((6, 2)), [1, 2, 3]), "capacity must be 2 whole numbers >= 0"),
    (lambda: capacity_assignment(np.ones((6, 2)), [1, -2]), "capacity must be 2 whole numbers >= 0"),
    (lambda: capacity_assignment(np.ones((6, 2)), [1.5, 2]), "capacity must be 2 whole numbers >= 0"),
    (lambda: capacity_assignment(np.ones(6), 2), "cost has 1 dimensions"),
    (lambda: capacity_assignment(NAN, 2), "cost is nan at row 1, column 1"),
    (lambda: capacity_assignment(ALONE, [1, 2]), "column 1 may be paired with no row"),
    (lambda: capacity_assignment(ALONE, [2, 5]), "rows 0, 1, 2 have only column 0 between them at the given capacity"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_assignment(np.ones((2, 2), complex)), "cost has dtype complex128; expected real numbers"),
        (lambda: linear_assignment(np.array([["a"]])), "expected real numbers"),
        (lambda: group_assignment(np.ones((4, 2)), 2.0), "num_groups is 2.0; expected a whole number"),
        (lambda: capacity_assignment(np.ones((4, 2)), 2.0), "capacity is 2.0"),
        (lambda: linear_assignment_batch(np.ones((1, 3, 4)), [2.5]), r"sizes\[0\] is 2.5; expected a whole number"),
        (lambda: linear_assignment_batch(np.ones((1, 3, 4)), np.array(2)), "sizes is array"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_long_lists_are_cut_short():
    cost = np.full((30, 20), np.inf)
    cost[:11, :12] = 0.0  # 12 columns, 11 rows
    cost[11:, 12:] = 0.0
    listed = r"columns 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... \(12 in all\) have only rows 0, .* \(11 in all\) between them"
    with pytest.raises(ValueError, match=listed):
        linear_assignment(cost)
