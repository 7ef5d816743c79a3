"""Relaxed pairing: couplings of rows and columns that gradients flow through."""

import math
from typing import Any

from counterproof.assign.arrays import Array, detached, floating, in_dtype_of, reject


def sinkhorn(
    cost: Array,
    reg: float = 0.05,
    num_iters: int = 100,
    tol: float = 1e-6,
    marginals: tuple[Array, Array] | None = None,
    unbalanced: float | tuple[float, float] | None = None,
) -> Array:
    r"""Entropic optimal transport by Sinkhorn's iterations in the log domain; batched and differentiable.

    The plan P that minimises

    .. math:: \langle P, C \rangle + \varepsilon\, KL(P \,|\, a b^T) + \rho_1 KL(P 1 \,|\, a) + \rho_2 KL(P^T 1 \,|\, b)

    with the last two terms replaced by the constraints ``P 1 = a``, ``P^T 1 = b`` when balanced (Cuturi 2013; Chizat
    et al. 2018 for the unbalanced form). As reg goes to 0 the cost of P goes to that of the exact pairing, as it
    grows P goes to ``a b^T``.

    Args:
        cost: (..., n, m) C; ``+inf`` forbids a pair.
        reg: epsilon > 0, in the unit of the cost. Below about 1 % of the cost's spread expect thousands of iterations.
        num_iters: most iterations; one updates the rows' potentials, then the columns'.
        tol: stop when no row's mass would change by more than this fraction (looked at every 10th iteration, over
            the whole batch); 0 runs all iterations.
        marginals: masses ``(a, b)``, of shapes (..., n) and (..., m), >= 0, of equal sums when balanced; a row or
            column of mass 0 stays empty. None: uniform, 1/n and 1/m.
        unbalanced: rho > 0, how dearly the marginals may be missed, or one for rows and one for columns (``inf``
            holds one exactly). None: balanced.

    Returns:
        (..., n, m) plan in the dtype of a floating cost. Balanced, its columns hold exactly and its rows as far as
        the iterations have come. Gradients flow through all iterations, so memory grows with their number.

    Raises:
        ValueError: a cost that is NaN or ``-inf``, a row or column without any allowed pair, marginals that do not
            fit, options out of range.
        TypeError: arrays and tensors mixed, or no real numbers.
    """
    if not 0 < reg < math.inf:
        raise ValueError(f"reg is {reg}; expected a number > 0")
    if num_iters < 1 or not tol >= 0:
        raise ValueError(f"num_iters is {num_iters}, tol {tol}; expected num_iters >= 1, tol >= 0")
    slack = (math.inf, math.inf) if unbalanced is None else unbalanced
    slack = slack if isinstance(slack, tuple) else (slack, slack)
    if len(slack) != 2 or not all(rho > 0 for rho in slack):
        raise ValueError(f"unbalanced is {unbalanced}; expected one or two numbers > 0")
    # Damping of the updates: 1 holds a marginal exactly, less lets it slip.
    row_step, column_step = (1.0 if rho == math.inf else rho / (rho + reg) for rho in slack)

    xp, arrays = floating(cost=cost, **({} if marginals is None else {"rows": marginals[0], "columns": marginals[1]}))
    score = arrays[0] / -reg
    if score.ndim < 2:
        raise ValueError(f"cost has {score.ndim} dimensions; expected (..., rows, columns)")
    n, m = score.shape[-2:]
    if n == 0 or m == 0:
        return in_dtype_of(cost, score)  # type: ignore[no-any-return]
    if marginals is None:
        log_a: Any = -math.log(n)
        log_b: Any = -math.log(m)
        rows, columns = None, None
    else:
        rows, columns = arrays[1], arrays[2]
        _check_marginals(xp, rows, columns, n, m, balanced=slack == (math.inf, math.inf))
        log_a, log_b = _log(xp, rows)[..., :, None], _log(xp, columns)[..., None, :]
        # Padding: what the cost says about a row or column of mass 0 is of no consequence, be it inf or NaN.
        score = xp.where((log_a > -math.inf) & (log_b > -math.inf), score, xp.zeros_like(score))
    _check_score(xp, score, rows, columns)

    # Potentials in units of reg: P = a b exp(f + g - C / reg).
    weighted = score + log_b
    f = -row_step * _logsumexp(xp, weighted, -1)
    g = -column_step * _logsumexp(xp, score + log_a + f, -2)
    for iteration in range(2, num_iters + 1):
        previous = f
        f = -row_step * _logsumexp(xp, weighted + g, -1)
        g = -column_step * _logsumexp(xp, score + log_a + f, -2)
        if tol and iteration % 10 == 0 and bool((abs(detached(f - previous)) <= tol).all()):
            break
    return in_dtype_of(cost, xp.exp(weighted + log_a + f + g))  # type: ignore[no-any-return]


def dual_softmax(scores: Array, temperature: float = 0.1) -> Array:
    """The probability that row i and column j choose each other: softmax over columns times softmax over rows.

    The matching of LoFTR (arXiv 2104.00680), after Rocco et al. (2018). Differentiable; rows and columns sum to at
    most 1.

    Args:
        scores: (..., n, m) similarities, high is alike; ``-inf`` excludes a pair.
        temperature: what the scores are divided by, > 0.

    Returns:
        (..., n, m) in [0, 1], in the dtype of floating scores; 0 throughout a row or column that is wholly excluded.

    Raises:
        ValueError: a score that is NaN or ``+inf``, `temperature` <= 0, fewer than two dimensions.
        TypeError: no real numbers.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    xp, (values,) = floating(scores=scores)
    if values.ndim < 2:
        raise ValueError(f"scores has {values.ndim} dimensions; expected (..., rows, columns)")
    if 0 in values.shape:
        return in_dtype_of(scores, values)  # type: ignore[no-any-return]
    reject(xp, ~(values < math.inf), values, "scores")
    values = values / temperature
    return in_dtype_of(scores, _softmax(xp, values, -1) * _softmax(xp, values, -2))  # type: ignore[no-any-return]


def _softmax(xp: Any, values: Any, axis: int) -> Any:
    exponentials = xp.exp(values - _peak(xp, values, axis))
    total = exponentials.sum(axis, keepdims=True)
    return exponentials / xp.where(total > 0, total, xp.ones_like(total))


def _logsumexp(xp: Any, values: Any, axis: int) -> Any:
    if xp.__name__ == "torch":
        return xp.logsumexp(values, axis, keepdim=True)
    peak = _peak(xp, values, axis)
    return xp.log(xp.exp(values - peak).sum(axis, keepdims=True)) + peak


def _peak(xp: Any, values: Any, axis: int) -> Any:
    """The greatest value along an axis, 0 where all are -inf; a constant to gradients."""
    peak = xp.amax(detached(values), axis, keepdims=True)
    return xp.where(peak > -math.inf, peak, xp.zeros_like(peak))


def _log(xp: Any, masses: Any) -> Any:
    """log with -inf for 0, and a gradient of 0 there."""
    positive = masses > 0
    return xp.where(positive, xp.log(xp.where(positive, masses, xp.ones_like(masses))), -math.inf)


def _check_marginals(xp: Any, rows: Any, columns: Any, n: int, m: int, balanced: bool) -> None:
    for name, masses, length in (("rows", rows, n), ("columns", columns, m)):
        if masses.ndim < 1 or masses.shape[-1] != length:
            raise ValueError(f"marginals of the {name} have shape {tuple(masses.shape)}; expected (..., {length})")
        if not bool(((masses >= 0) & (masses < math.inf)).all()):
            raise ValueError(f"marginals of the {name} must be finite and >= 0")
        if not bool((masses.sum(-1) > 0).all()):
            raise ValueError(f"marginals of the {name} have no mass")
    if balanced:
        total, other = detached(rows.sum(-1)), detached(columns.sum(-1))
        if not bool((abs(total - other) <= 1e-4 * total).all()):
            raise ValueError(
                f"marginals must have the same sum when balanced; got {total.tolist()} and {other.tolist()} "
                "(normalise them, or pass unbalanced)"
            )


def _check_score(xp: Any, score: Any, rows: Any, columns: Any) -> None:
    values = detached(score)
    reject(xp, ~(values < math.inf), -values, "cost")
    allowed = values > -math.inf
    if bool(allowed.all()):
        return
    # A pair exists only where both sides have mass.
    by_row = allowed if columns is None else allowed & (columns > 0)[..., None, :]
    by_column = allowed if rows is None else allowed & (rows > 0)[..., :, None]
    for side, missing, masses in (("row", ~by_row.any(-1), rows), ("column", ~by_column.any(-2), columns)):
        missing = missing if masses is None else missing & (masses > 0)
        if bool(missing.any()):
            raise ValueError(f"cost allows no pair for {side} {tuple(xp.argwhere(missing)[0].tolist())}")
