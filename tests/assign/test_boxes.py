"""One-to-many rules: against slow implementations written from their definitions, and cases worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.assign import atss_assign, box_iou, max_iou_assign, simota_assign, topk_assign

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ["numpy", "torch"]


def given_as(kind, *arrays):
    if kind == "numpy":
        return arrays
    torch = pytest.importorskip("torch")
    return tuple(torch.from_numpy(np.asarray(array)) for array in arrays)


def plain(result):
    assert "int64" in str(result.dtype)
    return result.tolist()


def random_boxes(rng, number, grid=8):
    """On a coarse grid, so that equal overlaps and boxes without area occur."""
    corners = rng.integers(0, grid + 1, size=(number, 2, 2)).astype(np.float64)
    return np.sort(corners, axis=1).reshape(number, 4)


def iou_of(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def ious_of(priors, boxes):
    return np.array([[iou_of(p, b) for b in boxes] for p in priors]).reshape(len(priors), len(boxes))


def max_iou_slowly(priors, boxes, pos, neg, low_quality, min_pos):
    iou = ious_of(priors, boxes)
    result = []
    for i in range(len(priors)):
        claims = [
            j
            for j in range(len(boxes))
            if low_quality and iou[i, j] == iou[:, j].max() and iou[i, j] > 0 and iou[i, j] >= min_pos
        ]
        best = max(range(len(boxes)), key=lambda j: (iou[i, j], -j), default=None)
        if claims:
            result.append(max(claims, key=lambda j: (iou[i, j], -j)))
        elif best is not None and iou[i, best] >= pos:
            result.append(best)
        else:
            result.append(-1 if best is None or iou[i, best] < neg else -2)
    return result


def atss_slowly(priors, num_per_level, boxes, topk):
    iou = ious_of(priors, boxes)
    centres = [((p[0] + p[2]) / 2, (p[1] + p[3]) / 2) for p in priors]
    owner, held = [-1] * len(priors), [-1.0] * len(priors)
    for j, box in enumerate(boxes):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for count in num_per_level:
            level = range(start, start + count)
            near = sorted(level, key=lambda i: ((centres[i][0] - middle[0]) ** 2 + (centres[i][1] - middle[1]) ** 2, i))
            candidates += near[:topk]
            start += count
        overlaps = [iou[i, j] for i in candidates]
        deviation = np.std(overlaps, ddof=1) if len(overlaps) > 1 else 0.0
        threshold = np.mean(overlaps or [0.0]) + deviation
        for i in candidates:
            inside = box[0] < centres[i][0] < box[2] and box[1] < centres[i][1] < box[3]
            # 1e-12: the definition in exact arithmetic, where equal overlaps equal their mean
            if inside and iou[i, j] >= threshold - 1e-12 and iou[i, j] > held[i]:
                owner[i], held[i] = j, iou[i, j]
    return owner


def simota_slowly(cost, iou, topk, valid):
    """As YOLOX: all on the priors that take part, one object after another."""
    part = [i for i in range(len(cost)) if valid[i]]
    takers = {i: [] for i in part}
    for j in range(cost.shape[1]):
        if part:
            k = max(1, int(sum(sorted((iou[i, j] for i in part), reverse=True)[:topk])))
            for i in sorted(part, key=lambda i: (cost[i, j], i))[:k]:
                takers[i].append(j)
    result = [-1] * len(cost)
    for i, objects in takers.items():
        if len(objects) == 1:
            result[i] = objects[0]
        elif objects:
            result[i] = int(np.argmin(cost[i]))
    return result


# --- box_iou


@pytest.mark.parametrize("kind", KINDS)
def test_iou_against_the_definition(rng, kind):
    boxes, others = random_boxes(rng, 30), random_boxes(rng, 20)
    iou = np.asarray(box_iou(*given_as(kind, boxes, others)))
    np.testing.assert_allclose(iou, ious_of(boxes, others), atol=1e-15)
    batched = box_iou(*given_as(kind, boxes.reshape(3, 10, 4), others[None]))
    np.testing.assert_array_equal(np.asarray(batched).reshape(30, 20), iou)


def test_iou_dtypes():
    torch = pytest.importorskip("torch")
    big = [[0, 0, 1000, 1000]]  # the area overflows float16
    assert box_iou(np.array(big, np.float16), np.array(big, np.float16)) == np.ones((1, 1), np.float16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        iou = box_iou(torch.tensor(big, dtype=dtype), torch.tensor(big, dtype=dtype))
        assert iou.dtype == dtype
        assert iou.item() == 1.0
    assert box_iou(np.array([[5, 5, 9, 9]], np.uint8), np.array([[0, 0, 9, 9]], np.uint8)).tolist() == [[16 / 81]]


def test_iou_gradient(rng):
    torch = pytest.importorskip("torch")
    boxes, others = (torch.from_numpy(rng.random((n, 2, 2)).cumsum(1).reshape(n, 4)) for n in (3, 4))
    assert torch.autograd.gradcheck(box_iou, (boxes.requires_grad_(), others.requires_grad_()))
    point = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    box_iou(point, point).sum().backward()
    assert torch.isfinite(point.grad).all()


# --- max IoU


@given(SEEDS, st.integers(0, 12), st.integers(0, 5), st.booleans(), st.sampled_from([0.0, 0.2, 0.5]))
@settings(max_examples=80, deadline=None)
def test_max_iou_against_a_loop(seed, n, m, low_quality, min_pos):
    rng = np.random.default_rng(seed)
    priors, boxes = random_boxes(rng, n, 5), random_boxes(rng, m, 5)
    neg, pos = np.sort(rng.choice([0.0, 0.1, 0.25, 0.4, 0.5, 1.0], 2))
    expected = max_iou_slowly(priors, boxes, pos, neg, low_quality, min_pos)
    for kind in KINDS:
        assert plain(max_iou_assign(*given_as(kind, priors, boxes), pos, neg, low_quality, min_pos)) == expected


def test_max_iou_by_hand():
    """Object 0 is (0, 0, 10, 10). IoU of the priors with it: 1, .5, .8, .2, 0."""
    boxes = np.array([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    priors = np.array([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 8, 10], [0, 0, 2, 10], [105, 105, 120, 120]])
    assert plain(max_iou_assign(priors, boxes, low_quality=False)) == [0, -2, 0, -1, -1]
    # object 1 overlaps only the last prior, by 25 / 300
    assert plain(max_iou_assign(priors, boxes)) == [0, -2, 0, -1, 1]
    assert plain(max_iou_assign(priors, boxes, min_pos=0.3)) == [0, -2, 0, -1, -1]
    # an object that nothing overlaps claims nothing
    assert plain(max_iou_assign(priors[:4], boxes)) == [0, -2, 0, -1]


def test_a_tie_claims_every_best_prior_and_rivals_go_by_overlap():
    boxes = np.array([[0.0, 0, 4, 4], [0, 0, 4, 8]])
    priors = np.array([[0.0, 0, 4, 2], [0, 2, 4, 4], [50, 50, 51, 51]])  # IoU 1/2, 1/2 with box 0; 1/4, 1/4 with box 1
    assert plain(max_iou_assign(priors, boxes, pos=0.9, neg=0.6)) == [0, 0, -1]


# --- ATSS


@given(SEEDS, st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(0, 4), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_atss_against_a_loop(seed, num_per_level, m, topk):
    rng = np.random.default_rng(seed)
    priors, boxes = random_boxes(rng, sum(num_per_level)), random_boxes(rng, m)
    expected = atss_slowly(priors, num_per_level, boxes, topk)
    for kind in KINDS:
        assert plain(atss_assign(*given_as(kind, priors), num_per_level, *given_as(kind, boxes), topk)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_atss_on_a_pyramid(rng, kind):
    """Two levels of square anchors, 8 strides wide, over a 128 px image; float32 as in training."""
    levels = []
    for stride in (8, 16):
        y, x = np.meshgrid(*(np.arange(stride / 2, 128, stride),) * 2, indexing="ij")
        centre = np.stack([x, y], -1).reshape(-1, 2)
        levels.append(np.concatenate([centre - 4 * stride, centre + 4 * stride], 1))
    corner = rng.random((6, 2)) * 40
    boxes = np.concatenate([corner, corner + 40 + rng.random((6, 2)) * 48], 1)
    counts, priors = [256, 64], np.concatenate(levels)
    result = plain(atss_assign(*given_as(kind, priors.astype(np.float32)), counts, *given_as(kind, boxes.astype("f4"))))
    assert result == atss_slowly(priors.astype("f4").astype("f8"), counts, boxes.astype("f4").astype("f8"), 9)
    assert len(set(result)) > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_candidates_are_all_positive(kind, dtype):
    """Deviation 0, threshold = mean = every candidate's own IoU of 0.3: rounding must not lose them."""
    boxes = np.array([[0, 0, 10, 10]], dtype)
    priors = np.tile(np.array([[0, 0, 10, 3]], dtype), (7, 1))
    assert plain(atss_assign(*given_as(kind, priors), [7], *given_as(kind, boxes))) == [0] * 7


def test_atss_edge_cases():
    box = np.array([[0.0, 0, 10, 10]])
    assert plain(atss_assign(np.array([[2.0, 2, 8, 8]]), [1], box)) == [0]  # one candidate: its deviation is 0, not NaN
    assert plain(atss_assign(np.array([[-5.0, 0, 5, 10]]), [1], box)) == [-1]  # centre on the edge: not inside
    assert plain(atss_assign(np.array([[2.0, 2, 8, 8]]), [1, 0], np.empty((0, 4)))) == [-1]
    assert plain(atss_assign(np.empty((0, 4)), [], box)) == []
    # both objects want the prior; the second overlaps it more
    pair = np.array([[0.0, 0, 10, 10], [1, 1, 9, 9]])
    assert plain(atss_assign(np.array([[2.0, 2, 8, 8]]), [1], pair)) == [1]


# --- SimOTA


@given(SEEDS, st.integers(0, 14), st.integers(0, 4), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_simota_against_a_loop(seed, n, m, topk):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 12, (n, m)).astype(float)
    iou = rng.integers(0, 9, (n, m)) / 8  # sums are exact in binary
    valid = rng.random(n) < 0.7
    expected = simota_slowly(cost, iou, topk, valid)
    for kind in KINDS:
        c, o, v = given_as(kind, cost, iou, valid)
        assert plain(simota_assign(c, o, topk, v)) == expected
        wide = np.broadcast_to(valid[:, None], (n, m)).copy()
        assert plain(simota_assign(c, o, topk, *given_as(kind, wide))) == expected
    assert plain(simota_assign(cost, iou, topk)) == simota_slowly(cost, iou, topk, np.ones(n, bool))


def test_simota_by_hand():
    """IoU sums 2.9 and 0.4: object 0 takes its two cheapest priors, object 1 one."""
    iou = np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.5, 0.1]])
    cost = np.array([[1.0, 9], [2, 9], [3, 9], [4, 1]])
    assert plain(simota_assign(cost, iou)) == [0, 0, -1, 1]
    assert plain(simota_assign(cost, iou, topk=1)) == [0, -1, -1, 1]
    cost[1, 1] = 0.5  # now both take prior 1, and it is cheaper for object 1
    assert plain(simota_assign(cost, iou)) == [0, 1, -1, -1]
    cost[:, 1] = np.inf  # an object that may have no prior gets none
    assert plain(simota_assign(cost, iou)) == [0, 0, -1, -1]


# --- top k


@given(SEEDS, st.integers(1, 12), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_topk_is_a_stable_sort(seed, n, m, maximize):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 5, (2, 3, n, m)).astype(float)
    cost[rng.random(cost.shape) < 0.1] = np.inf
    k = int(rng.integers(1, n + 1))
    expected = np.argsort(-cost if maximize else cost, axis=-2, kind="stable")[..., :k, :]
    for kind in KINDS:
        (batch,) = given_as(kind, cost)
        result = topk_assign(batch, k, maximize=maximize)
        np.testing.assert_array_equal(np.asarray(result), expected)
        np.testing.assert_array_equal(np.asarray(topk_assign(batch[0, 1], k, maximize=maximize)), expected[0, 1])
        assert "int64" in str(result.dtype)


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32"])
def test_topk_dtypes(dtype):
    assert topk_assign(np.array([[3, 1], [1, 2], [2, 3]], dtype), 2).tolist() == [[1, 0], [2, 1]]


def test_results_carry_no_gradient(rng):
    torch = pytest.importorskip("torch")
    boxes = torch.from_numpy(random_boxes(rng, 6)).requires_grad_()
    cost = torch.from_numpy(rng.random((6, 6))).requires_grad_()
    for result in (
        max_iou_assign(boxes, boxes),
        atss_assign(boxes, [6], boxes),
        simota_assign(cost, box_iou(boxes, boxes)),
        topk_assign(cost, 2),
    ):
        assert not result.requires_grad


# --- what is said about bad input

BOXES = np.array([[0.0, 0, 1, 1], [5, 0, 4, 1]])
GOOD = BOXES[:1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_iou(BOXES, GOOD), r"boxes\[1\] is \[5.0, 0.0, 4.0, 1.0\]; expected finite corners"),
        (lambda: box_iou(GOOD[None], BOXES[None] * np.nan), r"others\[0, 0\] is \[nan"),
        (lambda: box_iou(GOOD, GOOD[:, :3]), r"others has shape \(1, 3\)"),
        (lambda: max_iou_assign(GOOD, BOXES), r"boxes\[1\] is"),
        (lambda: max_iou_assign(BOXES, GOOD), r"priors\[1\] is"),
        (lambda: max_iou_assign(GOOD[None], GOOD), r"priors has shape \(1, 1, 4\); expected \(number, 4\)"),
        (lambda: max_iou_assign(GOOD, GOOD, pos=0.3, neg=0.5), "0 <= neg <= pos <= 1; got neg=0.5, pos=0.3"),
        (lambda: atss_assign(GOOD, [2], GOOD), r"num_per_level \[2\] adds up to 2, but there are 1 priors"),
        (lambda: atss_assign(GOOD, [2, -1], GOOD), "adds up to 1"),
        (lambda: atss_assign(GOOD, [1], GOOD, topk=0), "topk is 0"),
        (lambda: simota_assign(np.ones((2, 2)), np.ones((2, 3))), "cost and iou must both be"),
        (lambda: simota_assign(np.ones((2, 2)), np.ones((2, 2)), topk=0), "topk is 0"),
        (lambda: simota_assign(np.array([[1.0, np.nan]]), np.ones((1, 2))), r"cost is nan at \(0, 1\)"),
        (lambda: simota_assign(np.ones((1, 2)), np.array([[1.0, 1.5]])), r"iou is 1.5 at \(0, 1\)"),
        (lambda: simota_assign(np.ones((1, 2)), np.ones((1, 2)), valid=np.ones(3, bool)), "valid must be booleans"),
        (lambda: simota_assign(np.ones((1, 2)), np.ones((1, 2)), valid=np.ones(1)), "valid must be booleans"),
        (lambda: topk_assign(np.ones((3, 2)), 4), "k is 4; a column of 3 rows allows 1 to 3"),
        (lambda: topk_assign(np.ones((3, 2)), 0), "k is 0"),
        (lambda: topk_assign(np.ones(3), 1), "cost has 1 dimensions"),
        (lambda: topk_assign(np.array([[1.0], [np.nan]]), 1), r"cost is nan at \(1, 0\)"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="others is a ndarray among tensors"):
        box_iou(torch.from_numpy(GOOD), GOOD)
    with pytest.raises(TypeError, match="cost has dtype complex128"):
        topk_assign(np.ones((2, 2), complex), 1)
    with pytest.raises(TypeError, match=r"cost has dtype torch\.complex64"):
        topk_assign(torch.ones(2, 2, dtype=torch.complex64), 1)
