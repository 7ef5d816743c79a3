"""The one-to-many rules of dense detectors: which prior (anchor, point, proposal) learns which object.

Read beside: open-mmlab/mmdetection (max_iou, atss and sim_ota assigners), Megvii-BaseDetection/YOLOX (yolo_head).
Boxes are corners ``(x1, y1, x2, y2)`` in any one unit. Every rule returns, for each prior, the index of its object
as int64, -1 for background and -2 for a prior left out of the loss; it computes on the device of its tensors, in
float32 at least, and no gradient flows through it. Ties go to the lower index.
"""

import math
from collections.abc import Sequence
from typing import Any

from counterproof.assign.arrays import Array, detached, floating, in_dtype_of, reject


def box_iou(boxes: Array, others: Array) -> Array:
    """Intersection over union of every box with every other; differentiable.

    Args:
        boxes: (..., n, 4) corners.
        others: (..., m, 4) corners.

    Returns:
        (..., n, m) in [0, 1], in the dtype of floating `boxes`; 0 where both boxes have no area. Halves are computed
        in float32.

    Raises:
        ValueError: a shape that is not (..., 4); a corner that is not finite, or ``x2 < x1`` or ``y2 < y1`` (the box
            is named).
        TypeError: arrays and tensors mixed, or no real numbers.
    """
    xp, (first, second) = floating(boxes=boxes, others=others)
    _check_boxes(xp, boxes=detached(first), others=detached(second))
    return in_dtype_of(boxes, _iou(xp, first, second))  # type: ignore[no-any-return]


def max_iou_assign(
    priors: Array,
    boxes: Array,
    pos: float = 0.7,
    neg: float = 0.3,
    low_quality: bool = True,
    min_pos: float = 0.0,
) -> Array:
    """Each prior learns the object it overlaps most, if it overlaps it enough (Faster R-CNN, RetinaNet).

    With best the highest IoU of a prior: ``best >= pos`` learns that object, ``best < neg`` is background, between them
    the prior is left out. With `low_quality` every object then claims the prior or priors (in a tie, all) that overlap
    it most, whatever the thresholds; a prior claimed by several objects goes to the one of highest IoU (in mmdetection
    to the last).

    Args:
        priors: (n, 4) corners.
        boxes: (m, 4) corners of the objects; m may be 0.
        pos, neg: thresholds, ``0 <= neg <= pos <= 1``.
        low_quality: whether objects claim their best priors.
        min_pos: least IoU of such a claim; an IoU of 0 never claims.

    Returns:
        (n,) int64: index of the object, -1 background, -2 left out.

    Raises:
        ValueError: thresholds out of order, or boxes as for `box_iou`.
        TypeError: as `box_iou`.
    """
    if not 0 <= neg <= pos <= 1:
        raise ValueError(f"thresholds must satisfy 0 <= neg <= pos <= 1; got neg={neg}, pos={pos}")
    xp, (anchors, objects) = _prepare(priors, boxes)
    n, m = len(anchors), len(objects)
    if n == 0 or m == 0:
        return _background(xp, anchors)  # type: ignore[no-any-return]
    iou = _iou(xp, anchors, objects)
    best = xp.amax(iou, axis=1)
    result = xp.where(best < neg, -1, -2)
    result = xp.where(best >= pos, xp.argmax(iou, axis=1), result)
    if low_quality:
        top = xp.amax(iou, axis=0)
        claims = (iou == top) & (top > 0) & (top >= min_pos)
        result = xp.where(claims.any(axis=1), xp.argmax(xp.where(claims, iou, -1.0), axis=1), result)
    return result  # type: ignore[no-any-return]


def atss_assign(priors: Array, num_per_level: Sequence[int], boxes: Array, topk: int = 9) -> Array:
    """Adaptive training sample selection (ATSS, arXiv 1912.02424): a threshold of its own for each object.

    For each object the `topk` priors of each level whose centres are nearest to its own are candidates. A candidate
    is positive when its IoU reaches the candidates' mean plus standard deviation (of the sample, n - 1; 0 for a
    single candidate) and its centre lies strictly inside the object. A prior positive for several objects goes to
    the one of highest IoU.

    Args:
        priors: (n, 4) corners, level after level.
        num_per_level: how many priors each level has; their sum is n. A level with fewer than `topk` gives all it has.
        boxes: (m, 4) corners of the objects; m may be 0.
        topk: candidates per level and object.

    Returns:
        (n,) int64: index of the object, -1 background.

    Raises:
        ValueError: levels that do not add up to n, `topk` < 1, or boxes as for `box_iou`.
        TypeError: as `box_iou`.
    """
    if topk < 1:
        raise ValueError(f"topk is {topk}; expected at least 1")
    xp, (anchors, objects) = _prepare(priors, boxes)
    n, m = len(anchors), len(objects)
    counts = [int(count) for count in num_per_level]
    if sum(counts) != n or min(counts, default=0) < 0:
        raise ValueError(f"num_per_level {counts} adds up to {sum(counts)}, but there are {n} priors")
    if n == 0 or m == 0:
        return _background(xp, anchors)  # type: ignore[no-any-return]
    iou = _iou(xp, anchors, objects)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    offsets = centres[:, None] - ((objects[:, :2] + objects[:, 2:]) / 2)[None]
    distance = (offsets * offsets).sum(-1)
    levels, start = [], 0
    for count in counts:
        if count:
            levels.append(_cheapest(xp, distance[start : start + count], min(topk, count)))
        start += count
    candidate = xp.concatenate(levels, axis=0)
    number = candidate.sum(axis=0)
    # Taken relative to the best candidate: candidates of equal IoU must give a deviation of exactly 0, or all would
    # miss the mean.
    top = xp.amax(xp.where(candidate, iou, 0.0), axis=0)
    below = xp.where(candidate, iou - top, 0.0)
    mean = below.sum(axis=0) / number
    spread = xp.where(candidate, below - mean, 0.0)
    variance = (spread * spread).sum(axis=0) / xp.where(number > 1, number - 1, 1)
    inside = (centres[:, None] > objects[None, :, :2]).all(-1) & (centres[:, None] < objects[None, :, 2:]).all(-1)
    positive = candidate & inside & (below >= mean + xp.sqrt(variance))
    result = xp.argmax(xp.where(positive, iou, -1.0), axis=1)
    return xp.where(positive.any(axis=1), result, -1)  # type: ignore[no-any-return]


def simota_assign(cost: Array, iou: Array, topk: int = 10, valid: Array | None = None) -> Array:
    """SimOTA (YOLOX, arXiv 2107.08430): each object takes its cheapest priors, as many as its predictions overlap it.

    Object j takes ``k_j = max(1, floor(sum of its topk highest IoUs))`` priors, the cheapest for it. A prior taken
    by several objects goes to the object for which it is cheapest (among all objects, as in YOLOX and mmdetection).

    YOLOX's cost is ``class BCE + 3 * -log(IoU) + 1e5 * (prior outside the object or its centre region)``, over the
    priors that lie in some object or centre region: those are `valid`.

    Args:
        cost: (n, m) of prior i for object j; ``+inf`` forbids the pair.
        iou: (n, m) of prior i's predicted box with object j.
        topk: IoUs that are summed.
        valid: (n,) or (n, m) booleans: priors, or pairs, that take part at all. An object without any gets none.

    Returns:
        (n,) int64: index of the object, -1 background.

    Raises:
        ValueError: shapes that differ, `topk` < 1, a cost that is NaN or ``-inf``, an IoU outside [0, 1].
        TypeError: arrays and tensors mixed, or no real numbers.
    """
    if topk < 1:
        raise ValueError(f"topk is {topk}; expected at least 1")
    xp, (price, overlap) = floating(cost=detached(cost), iou=detached(iou))
    if price.ndim != 2 or price.shape != overlap.shape:
        raise ValueError(
            f"cost and iou must both be (priors, objects); got {tuple(price.shape)}, {tuple(overlap.shape)}"
        )
    n, m = price.shape
    if n == 0 or m == 0:
        return _background(xp, price)  # type: ignore[no-any-return]
    usable = price < float("inf")
    if valid is not None:
        allowed = valid[:, None] if valid.ndim == 1 else valid
        if str(allowed.dtype).rpartition(".")[2] != "bool" or tuple(allowed.shape) not in ((n, 1), (n, m)):
            raise ValueError(f"valid must be booleans ({n},) or ({n}, {m}); got {valid.dtype} {tuple(valid.shape)}")
        usable = usable & allowed
        price = xp.where(allowed, price, float("inf"))
        overlap = xp.where(allowed, overlap, 0.0)
    reject(xp, ~(price > -float("inf")), price, "cost")
    reject(xp, ~((overlap >= 0) & (overlap <= 1.0001)), overlap, "iou")
    highest = xp.where(_cheapest(xp, -overlap, min(topk, n)), xp.where(usable, overlap, 0.0), 0.0)
    wanted = xp.floor(highest.sum(axis=0))
    wanted = xp.where(wanted < 1, xp.ones_like(wanted), wanted)
    ranked = _ranked(xp, price, min(topk, n))
    taken = xp.zeros_like(usable)
    columns = _counted(xp, ranked[0], 0)
    for rank in range(len(ranked)):  # at most topk rounds: the sum of topk IoUs is no greater
        taken[ranked[rank], columns] |= rank < wanted
    taken = taken & usable
    rivals = taken.sum(axis=1)
    result = xp.argmax(xp.where(taken, 1, 0), axis=1)
    result = xp.where(rivals > 1, xp.argmin(price, axis=1), result)
    return xp.where(rivals > 0, result, -1)  # type: ignore[no-any-return]


def topk_assign(cost: Array, k: int, *, maximize: bool = False) -> Array:
    """The k cheapest rows of every column, each column on its own: a row may be taken more than once.

    Args:
        cost: (..., n, m) array or tensor; infinities are ranked like other numbers.
        k: ``1 <= k <= n``.
        maximize: take the k dearest instead.

    Returns:
        (..., k, m) int64 row indices, cheapest first, the lower row first among equals.

    Raises:
        ValueError: `k` out of range, fewer than two dimensions, or a NaN (its place is named).
        TypeError: no real numbers.
    """
    xp, (price,) = floating(cost=detached(cost))
    if price.ndim < 2:
        raise ValueError(f"cost has {price.ndim} dimensions; expected (..., rows, columns)")
    n = price.shape[-2]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; a column of {n} rows allows 1 to {n}")
    reject(xp, price != price, price, "cost")
    if price.ndim == 2:
        return _ranked(xp, -price if maximize else price, k)  # type: ignore[no-any-return]
    *batch, _, m = price.shape
    number = math.prod(batch)
    # Columns of every element side by side: one ranking for the whole batch.
    flat = xp.moveaxis(price.reshape(number, n, m), 1, 0).reshape(n, number * m)
    ranked = _ranked(xp, -flat if maximize else flat, k)
    return xp.moveaxis(ranked.reshape(k, number, m), 0, 1).reshape(*batch, k, m)  # type: ignore[no-any-return]


def _cheapest(xp: Any, cost: Any, k: int) -> Any:
    """(n, m) booleans: the k least of every column, the lower row first among equals."""
    if xp.__name__ == "torch":
        limit = xp.topk(cost, k, dim=0, largest=False).values[-1]
    else:
        limit = xp.partition(cost, k - 1, axis=0)[k - 1]
    less = cost < limit
    equal = cost == limit
    return less | (equal & (xp.cumsum(equal, axis=0) <= k - less.sum(axis=0)))


def _ranked(xp: Any, cost: Any, k: int) -> Any:
    """(k, m) row indices of the k least of every column, in order."""
    m = cost.shape[1]
    rows = xp.where(_cheapest(xp, cost, k).T)[1].reshape(m, k)
    columns = _counted(xp, rows, 0).T
    values = cost[rows.T, columns]
    if xp.__name__ == "torch":
        order = xp.argsort(values, dim=0, stable=True)
    else:
        order = xp.argsort(values, axis=0, kind="stable")
    return rows.T[order, columns]


def _counted(xp: Any, indices: Any, axis: int) -> Any:
    """0, 1, 2, ... along an axis, on the device of the indices."""
    return xp.cumsum(xp.ones_like(indices), axis=axis) - 1


def _iou(xp: Any, boxes: Any, others: Any) -> Any:
    first, second = boxes[..., :, None, :], others[..., None, :, :]
    sides = xp.minimum(first[..., 2:], second[..., 2:]) - xp.maximum(first[..., :2], second[..., :2])
    sides = sides.clip(0)
    shared = sides[..., 0] * sides[..., 1]
    union = _area(first) + _area(second) - shared
    # The inner where keeps the gradient of the unused branch finite.
    return xp.where(union > 0, shared / xp.where(union > 0, union, xp.ones_like(union)), xp.zeros_like(union))


def _area(boxes: Any) -> Any:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _prepare(priors: Any, boxes: Any) -> tuple[Any, list[Any]]:
    xp, arrays = floating(priors=detached(priors), boxes=detached(boxes))
    _check_boxes(xp, priors=arrays[0], boxes=arrays[1])
    for name, array in zip(("priors", "boxes"), arrays):
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(array.shape)}; expected (number, 4)")
    return xp, arrays


def _check_boxes(xp: Any, **arrays: Any) -> None:
    for name, values in arrays.items():
        if values.ndim < 2 or values.shape[-1] != 4:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected (..., 4): x1, y1, x2, y2")
        sound = (values[..., 2:] >= values[..., :2]).all(-1) & xp.isfinite(values).all(-1)
        if not sound.all():
            where = xp.argwhere(~sound)[0].tolist()
            box = values[tuple(where)].tolist()
            raise ValueError(
                f"{name}[{', '.join(map(str, where))}] is {box}; expected finite corners with x1 <= x2 and y1 <= y2"
            )


def _background(xp: Any, priors: Any) -> Any:
    return xp.full_like(priors[:, 0] if priors.shape[1] else priors.sum(1), -1, dtype=xp.int64)
