"""Exact one-to-one pairing, and what reduces to it: batches, groups of rows, columns with a capacity.

The solver is SciPy's `linear_sum_assignment` (shortest augmenting paths), the fastest on every rectangle of
detection that was measured (benchmarks/assign.py). What is added here: torch tensors, batches, masks, forbidden and
broken costs, and errors that say where.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from counterproof.assign.arrays import Array, like, pairs_like, to_host, torch_of
from counterproof.errors import extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnInvalid = Literal["raise", "last"]
Backend = Literal["scipy", "lapx"]
_Pair = tuple["NDArray[np.int64]", "NDArray[np.int64]"]
# Where a problem stands in what the caller passed: ("costs", image) or ("cost", None, group), ...; put into words
# only for errors.
_Where = tuple[Any, ...]


def linear_assignment(
    cost: Array,
    valid: Array | None = None,
    on_invalid: OnInvalid = "raise",
    *,
    maximize: bool = False,
    backend: Backend = "scipy",
) -> tuple[Array, Array]:
    """The one-to-one pairing of rows and columns with the least total cost.

    ``min(n, m)`` pairs are made, so every member of the smaller side has a partner. Among equally good pairings the
    result is some fixed one. No gradient flows through it. A square problem may take many times longer than its
    transpose: when the columns differ more in their mean cost than the rows do, pass the transpose.

    Args:
        cost: (n, m) array or tensor of real numbers, any dtype; solved in float64, whose sums hold magnitudes up to
            1e300. ``+inf`` (``-inf`` with `maximize`) forbids a pair.
        valid: (n, m) booleans; False forbids a pair, whatever its cost, NaN included.
        on_invalid: what to do about NaN and infinities of the wrong sign. ``"raise"``, or ``"last"``: such pairs, and
            infinite ones, are made only as far as no complete pairing avoids them (as transformers' DETR matchers do
            with the largest float, but without its overflow). Pairs that `valid` forbids are never made.
        maximize: look for the greatest total instead.
        backend: ``"scipy"``, or ``"lapx"`` for square problems without forbidden pairs: 2 to 5 times faster on random
            costs from n = 128, not on all; float32 costs are solved in float32. Needs the extra ``lapx``.

    Returns:
        ``(rows, columns)``, int64, each of length ``min(n, m)``, rows ascending; tensors on the device of a tensor.

    Raises:
        ValueError: a cost is NaN (row and column are named), forbidden pairs leave no complete pairing (the rows and
            columns that block it are named), or a shape or option is wrong.
        TypeError: costs that are not real numbers.
        MissingExtra: ``backend="lapx"`` without lapx.

    Example:
        >>> linear_assignment(np.array([[4.0, 1.0], [2.0, 8.0], [9.0, 9.0]]))
        (array([0, 1]), array([1, 0]))
    """
    _check_options(on_invalid, backend)
    if type(cost) is np.ndarray:  # a call of a few microseconds: nothing is asked twice
        return _solve(cost, valid, on_invalid, maximize, backend)
    mask = None if valid is None else to_host(valid)
    return pairs_like([_solve(to_host(cost), mask, on_invalid, maximize, backend)], cost)[0]


def linear_assignment_batch(
    costs: Array | Sequence[Array],
    sizes: Any = None,
    valid: Array | Sequence[Array] | None = None,
    on_invalid: OnInvalid = "raise",
    *,
    maximize: bool = False,
    backend: Backend = "scipy",
) -> list[tuple[Array, Array]]:
    """`linear_assignment` of every problem of a batch.

    A tensor on another device is brought over once for the whole batch. The problems are solved one after another on
    views, which was faster than every batch solver measured.

    Args:
        costs: (B, n, m) array or tensor, or a list of B matrices of any shapes.
        sizes: for a padded array, B numbers of columns in use, or B pairs (rows, columns); the padding behind them
            is never read, and may be NaN. None: no padding.
        valid: (B, n, m) booleans, or a list of matrices as `costs`; False forbids a pair. A mask is no padding: a
            column in use whose every row is forbidden is an error.
        on_invalid, maximize, backend: as for `linear_assignment`.

    Returns:
        B pairs ``(rows, columns)`` as `linear_assignment` gives them; empty for a batch of none.

    Raises:
        ValueError, TypeError, MissingExtra: as `linear_assignment`, with the element of the batch named; also for
            `sizes` that do not fit.
    """
    _check_options(on_invalid, backend)
    hosts, masks = _batch(costs, sizes, valid)
    pairs = [
        _solve(host, mask, on_invalid, maximize, backend, ("costs", element))
        for element, (host, mask) in enumerate(zip(hosts, masks))
    ]
    return pairs_like(pairs, costs[0] if isinstance(costs, list | tuple) and costs else costs)


def group_assignment(
    cost: Array,
    num_groups: int,
    sizes: Any = None,
    on_invalid: OnInvalid = "raise",
    *,
    maximize: bool = False,
) -> tuple[Array, Array] | list[tuple[Array, Array]]:
    """One-to-many by groups: the rows are cut into equal blocks, and each block is paired with all columns on its own.

    The training-time matching of Group DETR (arXiv 2207.13085) and LW-DETR: with at least m rows in a block every
    column gets exactly `num_groups` rows, one of each block.

    Args:
        cost: (K*n, m), or (B, K*n, m) for a batch; group g owns rows ``g*n`` to ``(g+1)*n - 1``.
        num_groups: K; must divide the number of rows.
        sizes: for a batch, its B numbers of columns in use, as for `linear_assignment_batch`.
        on_invalid, maximize: as for `linear_assignment`.

    Returns:
        ``(rows, columns)`` of all groups, int64, rows ascending, counted over all groups; a list of B such pairs for
        a batch.

    Raises:
        ValueError, TypeError: as `linear_assignment`, with element and group named; also when the rows cannot be cut
            into `num_groups` equal blocks.
    """
    _check_options(on_invalid, "scipy")
    groups = _whole(num_groups, "num_groups", 1)
    values: Any = np.asarray(cost) if torch_of(cost) is None else cost
    if values.ndim not in (2, 3):
        raise ValueError(f"cost has {values.ndim} dimensions; expected (rows, columns) or (batch, rows, columns)")
    single = values.ndim == 2
    if single and sizes is not None:
        raise ValueError("sizes belong to a batch; cut the columns of a single cost: cost[:, :size]")
    step, rest = divmod(values.shape[-2], groups)
    if rest:
        raise ValueError(f"{values.shape[-2]} rows cannot be cut into num_groups={groups} equal groups")
    hosts, _ = _batch(values[None] if single else values, sizes, None)
    pairs = []
    for element, host in enumerate(hosts):
        blocks = []
        for group in range(groups):
            where = ("cost", None if single else element, group)
            block = host[group * step : (group + 1) * step]
            blocks.append(_solve(block, None, on_invalid, maximize, "scipy", where))
        rows = np.concatenate([block[0] for block in blocks])
        # Every block makes the same number of pairs, so the offsets are added in one go.
        rows.reshape(groups, -1)[:] += np.arange(groups)[:, None] * step
        pairs.append((rows, np.concatenate([block[1] for block in blocks])))
    results = pairs_like(pairs, cost)
    return results[0] if single else results


def capacity_assignment(
    cost: Array,
    capacity: Any,
    on_invalid: OnInvalid = "raise",
    *,
    maximize: bool = False,
) -> Array:
    """One-to-many with a capacity: every row has at most one column, column j at most ``capacity[j]`` rows.

    As many rows as possible are placed, ``min(n, sum of capacities)``, at the least total cost. Solved exactly, as a
    one-to-one problem in which a column stands once for each row it may take.

    Args:
        cost: (n, m) array or tensor; infinities as for `linear_assignment`.
        capacity: one whole number >= 1 for all columns, or m whole numbers >= 0.
        on_invalid, maximize: as for `linear_assignment`.

    Returns:
        (n,) int64, the column of each row, -1 for a row without one.

    Raises:
        ValueError, TypeError: as `linear_assignment`; also for a capacity that is negative or no whole number.
    """
    _check_options(on_invalid, "scipy")
    host = _matrix(to_host(cost), ("cost",))
    n, m = host.shape
    if np.ndim(capacity) == 0 and torch_of(capacity) is None:
        places = np.full(m, min(_whole(capacity, "capacity", 1), n))
    else:
        places = to_host(capacity)
        if places.shape != (m,) or places.dtype.kind not in "iu" or (places < 0).any():
            raise ValueError(f"capacity must be {m} whole numbers >= 0, one for each column of cost; got {capacity}")
        places = np.minimum(places, n)
    match = np.full(n, -1, dtype=np.int64)
    if n and m and places.sum() >= n:
        # Where every row can have its own best column, nothing needs solving. NaN counts as a best value, and is not
        # finite.
        best = host.argmax(1) if maximize else host.argmin(1)
        if (np.bincount(best, minlength=m) <= places).all() and np.isfinite(host[np.arange(n), best]).all():
            return like(best.astype(np.int64), cost)  # type: ignore[no-any-return]
    owner = np.repeat(np.arange(m), places)
    rows, columns = _solve(host[:, owner], None, on_invalid, maximize, "scipy", owner=owner)
    match[rows] = owner[columns]
    return like(match, cost)  # type: ignore[no-any-return]


def _solve(
    cost: Any,
    valid: Any,
    on_invalid: OnInvalid,
    maximize: bool,
    backend: Backend,
    where: _Where = ("cost",),
    owner: "NDArray[np.int64] | None" = None,
) -> _Pair:
    """One problem on the host. SciPy checks as it solves, so a sound problem is not looked at twice."""
    if valid is None and backend == "scipy":
        try:
            return linear_sum_assignment(cost, maximize)
        except (ValueError, TypeError):
            pass  # what is wrong, and whether it can be put right, is found out below
    elif (
        valid is None
        and isinstance(cost, np.ndarray)
        and cost.ndim == 2
        and cost.dtype in (np.float32, np.float64)
        and np.isfinite(cost.sum())  # neither NaN nor infinity; a sum that overflows is looked into below
    ):
        return solve_square_lapx(-cost if maximize else cost, where)
    values = _matrix(np.asarray(cost), where).astype(np.float64)
    if maximize:
        np.negative(values, out=values)
    forbidden = np.zeros(values.shape, dtype=bool)
    if valid is not None:
        allowed = np.asarray(valid)
        if allowed.shape != values.shape or allowed.dtype != bool:
            raise ValueError(
                f"valid must be booleans {values.shape}, as {_name(where)}; got {allowed.dtype} {allowed.shape}"
            )
        forbidden = ~allowed
    broken = ~(forbidden | (values > -np.inf))
    if on_invalid == "last":
        broken |= ~forbidden & (values == np.inf)
    if broken.any():
        if on_invalid == "raise":
            row, column = np.argwhere(broken)[0]
            original = np.asarray(cost)[row, column]
            raise ValueError(
                f"{_name(where)} is {original} at row {row}, column {column if owner is None else owner[column]} "
                f"(invalid entries in all: {broken.sum()}); pass on_invalid='last' to use such pairs only when nothing "
                "else is left"
            )
        values = _last(values, broken, forbidden)
    forbidden |= values == np.inf
    if backend == "lapx":
        if forbidden.any():
            row, column = np.argwhere(forbidden)[0]
            raise ValueError(
                f"{_name(where)} forbids row {row} with column {column}: backend='lapx' cannot do that, 'scipy' can"
            )
        return solve_square_lapx(values, where)
    values[forbidden] = np.inf
    try:
        return linear_sum_assignment(values)
    except ValueError:
        blocking = _blocking(~forbidden)
        if blocking is None:
            # A complete pairing exists, but sums overflow: a power of two leaves the optimum where it is.
            return linear_sum_assignment(np.ldexp(values, -100))
        raise ValueError(f"{_name(where)} {_blockade(*blocking, owner)}") from None


def solve_square_lapx(cost: "NDArray[Any]", where: _Where = ("cost",)) -> _Pair:
    """A square problem of finite float32 or float64 costs, in that precision, by lapx's `lapjvs`."""
    with extra("lapx"):
        from lap import lapjvs
    if cost.shape[0] != cost.shape[1]:
        raise ValueError(
            f"backend='lapx' takes square problems, {_name(where)} is {cost.shape}; 'scipy' is faster on rectangles"
        )
    if not cost.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    rows, columns = lapjvs(np.ascontiguousarray(cost), return_cost=False, prefer_float32=cost.dtype == np.float32)
    return np.asarray(rows, np.int64), np.asarray(columns, np.int64)


def _last(values: "NDArray[np.float64]", broken: Any, forbidden: Any) -> "NDArray[np.float64]":
    """Costs scaled to [0, 1] with the broken ones dearer than all others together: no sum can overflow."""
    sound = values[~(broken | forbidden)]
    low, high = (sound.min(), sound.max()) if sound.size else (0.0, 0.0)
    span = high / 2 - low / 2  # halves, as high - low may exceed the largest float
    scaled = np.zeros_like(values)
    if span > 0:
        usable = ~(broken | forbidden)
        scaled[usable] = (values[usable] / 2 - low / 2) / span
    scaled[broken] = min(values.shape) + 1.0
    return scaled


def _blocking(allowed: "NDArray[np.bool_]") -> tuple[str, list[int], list[int]] | None:
    """Members of the smaller side that have fewer partners between them than they are (Hall's condition), if any.

    Returns:
        ``(side, members, partners)`` with side "row" or "column", or None when a complete pairing exists.
    """
    sides = [("row", allowed), ("column", allowed.T)]
    if allowed.shape[0] > allowed.shape[1]:
        sides = sides[1:]
    elif allowed.shape[0] < allowed.shape[1]:
        sides = sides[:1]
    for side, graph in sides:
        alone = np.flatnonzero(~graph.any(1))
        if alone.size:
            return side, [int(alone[0])], []
    side, graph = sides[-1]
    partner = maximum_bipartite_matching(csr_array(graph), perm_type="column")
    single = np.flatnonzero(partner < 0)
    if not single.size:
        return None
    # Everyone reachable from a single member by alternating paths shares too few partners.
    holder = np.full(graph.shape[1], -1)
    holder[partner[partner >= 0]] = np.flatnonzero(partner >= 0)
    members, partners, frontier = {int(single[0])}, set[int](), [int(single[0])]
    while frontier:
        for other in np.flatnonzero(graph[frontier.pop()]):
            if int(other) not in partners:
                partners.add(int(other))
                members.add(int(holder[other]))
                frontier.append(int(holder[other]))
    return side, sorted(members), sorted(partners)


def _blockade(side: str, members: list[int], partners: list[int], owner: "NDArray[np.int64] | None") -> str:
    other = "column" if side == "row" else "row"
    if owner is not None:
        if side == "column":
            members = sorted({int(owner[member]) for member in members})
        else:
            partners = sorted({int(owner[partner]) for partner in partners})
    if not partners:
        return f"has no complete pairing: {side} {members[0]} may be paired with no {other}"
    return f"has no complete pairing: {_listing(side, members)} have only {_listing(other, partners)} between them" + (
        " at the given capacity" if owner is not None else ""
    )


def _listing(side: str, indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:10]))
    more = f", ... ({len(indices)} in all)" if len(indices) > 10 else ""
    return f"{side}{'s' if len(indices) > 1 else ''} {shown}{more}"


def _name(where: _Where) -> str:
    name, element, group = (*where, None, None)[:3]
    return f"{name}{'' if element is None else f'[{element}]'}{'' if group is None else f' (rows of group {group})'}"


def _matrix(values: "NDArray[Any]", where: _Where) -> "NDArray[Any]":
    if values.ndim != 2:
        raise ValueError(f"{_name(where)} has {values.ndim} dimensions; expected (rows, columns)")
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{_name(where)} has dtype {values.dtype}; expected real numbers")
    return values


def _batch(costs: Any, sizes: Any, valid: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    """The problems of a batch as views on the host, and their masks (or None)."""
    if isinstance(costs, list | tuple):
        if sizes is not None:
            raise ValueError("sizes belong to a padded array; the matrices of a list have their own shapes")
        if valid is not None and len(valid) != len(costs):
            raise ValueError(f"{len(costs)} costs but {len(valid)} masks in valid")
        return _to_host_list(costs), repeat(None) if valid is None else _to_host_list(valid)
    host = to_host(costs)
    if host.ndim != 3:
        raise ValueError(f"costs has {host.ndim} dimensions; expected (batch, rows, columns) or a list of matrices")
    masks: Any = repeat(None)
    if valid is not None:
        masks = to_host(valid)
        if masks.shape != host.shape:
            raise ValueError(f"valid has shape {masks.shape}, costs {host.shape}")
    if sizes is None:
        return host, masks
    cuts = _cuts(sizes, host.shape)
    return [matrix[cut] for matrix, cut in zip(host, cuts)], (
        masks if valid is None else [mask[cut] for mask, cut in zip(masks, cuts)]
    )


def _cuts(sizes: Any, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """The part of each padded problem that is in use."""
    batch, n, m = shape
    counts = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    if not isinstance(counts, list | tuple):
        raise TypeError(f"sizes is {sizes!r}; expected one entry for each of the {batch} problems")
    if len(counts) != batch:
        raise ValueError(f"sizes has {len(counts)} entries for a batch of {batch}")
    cuts: list[tuple[slice, slice]] = []
    everyone = slice(n)
    for size in counts:
        if type(size) is int and 0 <= size <= m:
            cuts.append((everyone, slice(size)))
            continue
        try:
            rows, columns = size if isinstance(size, list | tuple) else (n, size)
            rows, columns = index(rows), index(columns)
        except TypeError:
            raise TypeError(f"sizes[{len(cuts)}] is {size!r}; expected a whole number or a pair of them") from None
        if not (0 <= columns <= m and 0 <= rows <= n):
            raise ValueError(f"sizes[{len(cuts)}] is {size}, but the padded problems are {n} x {m}")
        cuts.append((slice(rows), slice(columns)))
    return cuts


def _to_host_list(matrices: Sequence[Any]) -> list["NDArray[Any]"]:
    """Matrices of a list on the host; those on one other device come over together."""
    torch = torch_of(*matrices)
    if torch is None or all(matrix.is_cpu for matrix in matrices if isinstance(matrix, torch.Tensor)):
        return [to_host(matrix) for matrix in matrices]
    flat = to_host(torch.cat([matrix.reshape(-1) for matrix in matrices]))
    ends = np.cumsum([matrix.numel() for matrix in matrices])[:-1]
    return [part.reshape(matrix.shape) for part, matrix in zip(np.split(flat, ends), matrices)]


def _check_options(on_invalid: str, backend: str) -> None:
    if on_invalid not in ("raise", "last"):
        raise ValueError(f"on_invalid is {on_invalid!r}; expected 'raise' or 'last'")
    if backend not in ("scipy", "lapx"):
        raise ValueError(f"backend is {backend!r}; expected 'scipy' or 'lapx'")


def _whole(value: Any, name: str, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected a whole number") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number >= {least}")
    return number
