"""Convergent learning: align the units of two networks one-to-one, one-to-many and many-to-many.

Paper: arXiv 1511.07543 (ICLR 2016).
Read beside: YixuanLi/convergent_learning (unit matching, mutual information, sparse prediction: prototxt files, logs).
Deviations: matching by `counterproof.assign.linear_assignment` instead of networkx (same optimum); the lasso of the
sparse map is solved exactly on second moments instead of by SGD; mutual information is in nats with the Miller-Madow
bias, where the authors take nats minus a bias in bits; the cluster tree is our reading of the abstract and of the
imports of the authors' notebook (the cells that build it were not available): see `UnitClusters`.

Everything but mutual information rests on the first two moments of the paired activations. They are gathered in one
pass (`paired_statistics`) or taken from arrays (`activations`); every estimator accepts either.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, stats
from scipy.cluster import hierarchy

from counterproof.assign import linear_assignment
from counterproof.errors import extra

with extra("representation"):
    import torch
    from sklearn.base import BaseEstimator
    from sklearn.linear_model import lasso_path
    from torch import nn

__all__ = [
    "PairedStatistics",
    "SparseMapper",
    "SparsePath",
    "UnitCluster",
    "UnitClusters",
    "UnitMatcher",
    "activations",
    "paired_statistics",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

CHUNK = 65_536  # rows turned to float64 at a time
DEAD = 1e-10  # a unit whose standard deviation is below this share of its mean is constant up to rounding


# --- activations of a network ---------------------------------------------------------------------------------------


def activations(
    net: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str],
    *,
    positions: int | None = None,
    unit_axis: int | None = None,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Activations of named layers in test-time mode, one row per sample and one column per unit.

    Name the layer *after* the nonlinearity (``"relu1"``, not ``"conv1"``): the paper compares post-ReLU values. Rows
    are in the loader's order, so two nets run over the same unshuffled loader give paired rows.

    Args:
        net: any module; parameters, buffers and train/eval flags are as before afterwards.
        loader: batches. A tensor is the input; of a tuple or list the first item; a mapping is passed as keywords.
        layers: names as in ``net.named_modules()``. A layer must run exactly once per forward pass. Of a tuple or
            mapping output (transformers) the first tensor counts.
        positions: spatial positions (or tokens) drawn without replacement from each sample's map; None takes all. Two
            nets with maps of the same size get the same positions. Every position is a row.
        unit_axis: the axis of the units. None: axis 1 of outputs with 2, 4 or 5 dimensions (channels first), the last
            of 3 (batch, tokens, units). Pass 1 for Conv1d, -1 for channels-last maps. Padding tokens count as samples.
        seed: of the positions.

    Returns:
        By layer an array (samples, units): float64 if the layer's output is, else float32.

    Raises:
        ValueError: an unknown layer, a layer that runs more or less than once per pass, an empty loader.
        TypeError: a batch or an output without a tensor.
    """
    parts: dict[str, list[NDArray[Any]]] = {layer: [] for layer in layers}
    with _recording(net, layers, positions, unit_axis, seed) as record:
        for batch in loader:
            for layer, values in record(batch).items():
                parts[layer].append(values)
    if layers and not parts[layers[0]]:
        raise ValueError("the loader gave no batch; a generator can be read only once, pass a DataLoader or a list")
    return {layer: np.concatenate(values) for layer, values in parts.items()}


def paired_statistics(
    net_a: nn.Module,
    net_b: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str | tuple[str, str]],
    *,
    positions: int | None = None,
    unit_axis: int | None = None,
    seed: int = 0,
) -> "dict[str | tuple[str, str], PairedStatistics]":
    """Moments of two nets' units in one pass over a loader: memory (units of A + units of B)^2 per layer, no samples.

    Args:
        net_a, net_b: see `activations`; both see every batch.
        layers: a name that both nets have, or a pair (name in A, name in B).
        loader, positions, unit_axis, seed: see `activations`.

    Returns:
        By entry of `layers` a `PairedStatistics`, which every estimator's ``fit`` takes in place of two arrays.

    Raises:
        ValueError, TypeError: see `activations`; also when the two layers give different numbers of samples.
    """
    pairs = {entry: (entry, entry) if isinstance(entry, str) else entry for entry in layers}
    names_a, names_b = ([*dict.fromkeys(names)] for names in zip(*pairs.values()))
    result: dict[str | tuple[str, str], PairedStatistics] = {}
    with (
        _recording(net_a, names_a, positions, unit_axis, seed) as record_a,
        _recording(net_b, names_b, positions, unit_axis, seed) as record_b,
    ):
        for batch in loader:
            a, b = record_a(batch), record_b(batch)
            for entry, (name_a, name_b) in pairs.items():
                if entry not in result:
                    result[entry] = PairedStatistics(a[name_a].shape[1], b[name_b].shape[1])
                result[entry].update(a[name_a], b[name_b])
    if not result:
        raise ValueError("the loader gave no batch; a generator can be read only once, pass a DataLoader or a list")
    return result


@contextmanager
def _recording(
    net: nn.Module, layers: Sequence[str], positions: int | None, unit_axis: int | None, seed: int
) -> Iterator[Any]:
    """A function from a batch to {layer: (samples, units)}; hooks and modes are undone on leaving."""
    modules = dict(net.named_modules())
    if unknown := [layer for layer in layers if layer not in modules]:
        raise ValueError(f"no layer {unknown[0]!r} in the net; it has {', '.join(name for name in modules if name)}")
    if positions is not None and positions < 1:
        raise ValueError(f"positions must be at least 1 or None, not {positions}")
    caught: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    seen = dict.fromkeys(layers, 0)  # samples so far: which positions a sample gets does not depend on the batching
    parameter = next(net.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def catch(layer: str) -> Any:
        # An in-place ReLU may follow: the copy is taken now.
        return lambda _module, _inputs, output: caught[layer].append(_first_tensor(output, layer).detach().clone())

    def record(batch: Any) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                net(**{key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()})
            else:
                net(_first_tensor(batch, "the loader").to(device))
        rows: dict[str, NDArray[Any]] = {}
        for layer, outputs in caught.items():
            if len(outputs) != 1:
                raise ValueError(f"layer {layer!r} ran {len(outputs)} times in one forward pass; it must run once")
            output = outputs.pop()
            rows[layer] = _rows(output, positions, unit_axis, seed, seen[layer])
            seen[layer] += len(output)
        return rows

    training = {module: module.training for module in modules.values()}
    hooks = [modules[layer].register_forward_hook(catch(layer)) for layer in layers]
    net.eval()
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode


def _first_tensor(value: Any, where: str) -> torch.Tensor:
    if torch.is_tensor(value):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    for item in items:
        if torch.is_tensor(item):
            return item
    raise TypeError(
        f"{where} gave {type(value).__name__}; expected a tensor, or a tuple, list or mapping that holds one"
    )


def _rows(output: torch.Tensor, positions: int | None, unit_axis: int | None, seed: int, first: int) -> NDArray[Any]:
    """(samples * positions, units) from a layer's output; `first` is the running number of its first sample."""
    if output.ndim < 2:
        raise ValueError(f"a layer's output needs a batch and a unit axis, not shape {tuple(output.shape)}")
    axis = unit_axis if unit_axis is not None else (2 if output.ndim == 3 else 1)
    values = output.movedim(axis, -1).flatten(1, -2) if output.ndim > 2 else output.unsqueeze(1)
    if values.dtype != torch.float64:
        values = values.float()
    array: NDArray[Any] = values.cpu().numpy()
    samples, places, units = array.shape
    if positions is not None and positions < places:
        chosen = np.stack(
            [np.random.default_rng([seed, first + i]).permutation(places)[:positions] for i in range(samples)]
        )
        array = np.take_along_axis(array, chosen[:, :, None], axis=1)
    return array.reshape(-1, units)


# --- second moments -------------------------------------------------------------------------------------------------


class PairedStatistics:
    """Means and (co)variances of the units of two nets over the same samples, accumulated batch by batch in float64.

    Batches are merged by centred sums (Chan, Golub and LeVeque), so the result does not depend on the batch size and
    units with a large mean lose no digits.

    Args:
        units_a, units_b: number of units of net A and of net B.

    Attributes:
        count: samples seen.
        mean: (units_a + units_b,), A's units first.
    """

    def __init__(self, units_a: int, units_b: int) -> None:
        self.units_a = units_a
        self.units_b = units_b
        self.count = 0
        self.mean: Floats = np.zeros(units_a + units_b)
        self._scatter: Floats = np.zeros((units_a + units_b, units_a + units_b))

    @classmethod
    def from_arrays(cls, a: ArrayLike, b: ArrayLike) -> Self:
        """The statistics of two arrays (samples, units of A) and (samples, units of B) with paired rows."""
        a, b = _paired(a, b)
        statistics = cls(a.shape[1], b.shape[1])
        for start in range(0, len(a), CHUNK):
            statistics.update(a[start : start + CHUNK], b[start : start + CHUNK])
        return statistics

    def update(self, a: ArrayLike, b: ArrayLike) -> Self:
        """Add a batch of paired rows (samples, units).

        Raises:
            ValueError: not two matrices with the same number of rows and the expected units, or a value that is not
                finite; names its net, row and unit.
        """
        a, b = _paired(a, b)
        if (a.shape[1], b.shape[1]) != (self.units_a, self.units_b):
            raise ValueError(
                f"expected {self.units_a} and {self.units_b} units, not {a.shape[1]} and {b.shape[1]} in this batch"
            )
        values = np.concatenate([a, b], axis=1, dtype=np.float64)
        if not np.isfinite(values).all():
            row, unit = np.argwhere(~np.isfinite(values))[0]
            net, index = ("A", unit) if unit < self.units_a else ("B", unit - self.units_a)
            raise ValueError(
                f"activation {values[row, unit]} in net {net}, row {self.count + row}, unit {index}; "
                "only finite activations have correlations: leave such samples out or mend the net"
            )
        if len(values):
            mean = values.mean(0)
            centred = values - mean
            total = self.count + len(values)
            shift = mean - self.mean
            self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(values) / total)
            self.mean = self.mean + shift * (len(values) / total)
            self.count = total
        return self

    @property
    def covariance(self) -> Floats:
        """(units_a + units_b, units_a + units_b), divided by the number of samples.

        Raises:
            ValueError: fewer than two samples.
        """
        self._enough()
        covariance: Floats = self._scatter / self.count
        return covariance

    @property
    def std(self) -> Floats:
        """(units_a + units_b,); exactly 0 for a dead unit, one that is constant over the samples."""
        self._enough()
        std = np.sqrt(np.diag(self._scatter) / self.count)
        return np.where(std <= DEAD * np.abs(self.mean), 0.0, std)

    @property
    def correlation(self) -> Floats:
        """Joint matrix [[within A, A with B], [B with A, within B]]; NaN in the rows and columns of dead units."""
        std = self.std
        std = np.where(std > 0, std, np.nan)
        correlation: Floats = np.clip(self.covariance / np.outer(std, std), -1.0, 1.0)
        return correlation

    @property
    def live_a(self) -> Integers:
        """Indices of A's units that are not dead."""
        return np.flatnonzero(self.std[: self.units_a] > 0)

    @property
    def live_b(self) -> Integers:
        """Indices of B's units that are not dead."""
        return np.flatnonzero(self.std[self.units_a :] > 0)

    def _enough(self) -> None:
        if self.count < 2:
            raise ValueError(f"correlations need at least 2 samples, not {self.count}")


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = np.asarray(a), np.asarray(b)
    for net, values in (("A", a), ("B", b)):
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"activations of net {net} must be (samples, units), not of shape {values.shape}")
    if len(a) != len(b):
        raise ValueError(f"the nets must see the same samples: {len(a)} rows of net A, {len(b)} of net B")
    return a, b


def _statistics(a: "ArrayLike | PairedStatistics", b: ArrayLike | None) -> PairedStatistics:
    """What ``fit(a, b)`` or ``fit(statistics)`` was given, as statistics with a live unit on either side."""
    if isinstance(a, PairedStatistics):
        if b is not None:
            raise TypeError("fit takes either one PairedStatistics or two arrays")
        statistics = a
    elif b is None:
        raise TypeError("fit takes two arrays (samples, units), or one PairedStatistics")
    else:
        statistics = PairedStatistics.from_arrays(a, b)
    for net, live, units in (
        ("A", statistics.live_a, statistics.units_a),
        ("B", statistics.live_b, statistics.units_b),
    ):
        if len(live) == 0:
            raise ValueError(f"all {units} units of net {net} are dead: constant over the {statistics.count} samples")
    return statistics


def _same_units(fitted: PairedStatistics, given: PairedStatistics) -> PairedStatistics:
    if (fitted.units_a, fitted.units_b) != (given.units_a, given.units_b):
        raise ValueError(
            f"fitted on {fitted.units_a} and {fitted.units_b} units, given {given.units_a} and {given.units_b}"
        )
    return given


def _standardised(fitted: PairedStatistics, given: PairedStatistics) -> Floats:
    """Second moments about 0 of `given` in the units in which `fitted` has mean 0 and variance 1; 0 for dead units."""
    scale = np.divide(1.0, fitted.std, where=fitted.std > 0, out=np.zeros_like(fitted.std))
    mean = (given.mean - fitted.mean) * scale
    moments: Floats = given.covariance * np.outer(scale, scale) + np.outer(mean, mean)
    return moments


# --- one-to-one -----------------------------------------------------------------------------------------------------


class UnitMatcher(BaseEstimator):  # type: ignore[misc]
    """One-to-one alignment of units, beside the greedy one in which a unit of B may be taken several times.

    Greedy ("semi-matching"): every unit of A takes its most similar unit of B. Matching: the pairing of distinct units
    with the largest total similarity (section 3.1 of the paper). Their gap is evidence of one-to-many structure. Raw
    correlation, not its absolute value: after a ReLU an anti-correlated unit is no counterpart.

    Both means are biased upward on the samples they were fitted on (a maximum over noisy values); use `score` on
    held-out samples, and untrained nets as the control, before concluding anything.

    Args:
        similarity: ``"correlation"``, or ``"mutual_info"`` in nats (arrays only): each unit's activations of at most
            1e-6 in size have a bin of their own, the rest fall into equally filled bins by rank; the plug-in estimate
            less the Miller-Madow bias (bins_a - 1)(bins_b - 1) / (2 samples) over the occupied bins.
        bins: of mutual information, the silent one included; at least 2.

    Attributes:
        similarity_: (units_a, units_b); NaN for dead units.
        greedy_, matching_: (units_a,), the index of B's unit; -1 for dead units, and in `matching_` for units of A
            that are left over when B has fewer.
        greedy_scores_, matched_scores_: (units_a,), similarity to that unit; NaN where there is none.
        score_greedy_, score_matched_: means over the units of A that have a partner, so greedy is never the smaller.
        agreement_: share of these units to which greedy and matching give equal similarity.
        dead_a_, dead_b_: indices of the constant units, which have no correlation and are left out.
        chance_: what `score_greedy_` would be for independent units and samples: the expected largest of as many
            normal values as B has live units, over sqrt(samples - 1). Neighbouring positions of a map are dependent,
            so with conv layers chance is higher than this. None for mutual information.
        activity_order_: live units of A, highest mean activation first.
        activity_correlation_: Spearman's rank correlation of mean activation with `matched_scores_`; NaN below 3 units.
        display_order_: order of rows and columns that puts matched pairs next to the diagonal (see `fit`).
        n_samples_: rows used.
    """

    def __init__(self, similarity: Literal["correlation", "mutual_info"] = "correlation", bins: int = 10) -> None:
        self.similarity = similarity
        self.bins = bins

    def fit(self, a: ArrayLike | PairedStatistics, b: ArrayLike | None = None) -> Self:
        """Match the units of two nets.

        `display_order_` follows the cycles of the matching (unit, its partner's index, that one's partner, ...), so
        that in ``similarity_[order][:, order]`` every matched pair lies beside the diagonal. For layers of different
        width it has the longer length; drop the indices that the shorter axis lacks.

        Args:
            a: (samples, units_a), or `PairedStatistics`.
            b: (samples, units_b) with the same rows; None after `PairedStatistics`.

        Raises:
            ValueError: unequal sample numbers, fewer than 2 samples, a value that is not finite, a net without a live
                unit, an unknown similarity.
        """
        statistics = _statistics(a, b)
        live_a, live_b = statistics.live_a, statistics.live_b
        if self.similarity == "correlation":
            block = statistics.correlation[np.ix_(live_a, statistics.units_a + live_b)]
            chance = float(_expected_maximum(len(live_b)) / np.sqrt(statistics.count - 1))
        elif self.similarity == "mutual_info":
            if isinstance(a, PairedStatistics) or b is None:
                raise ValueError("mutual information needs the samples: fit(a, b) with arrays, not PairedStatistics")
            if self.bins < 2:
                raise ValueError(f"bins must be at least 2, not {self.bins}")
            block = _mutual_information(np.asarray(a)[:, live_a], np.asarray(b)[:, live_b], self.bins)
            chance = None
        else:
            raise ValueError(f"similarity must be 'correlation' or 'mutual_info', not {self.similarity!r}")

        rows, columns = linear_assignment(-block)
        best = block.argmax(1)
        self.similarity_ = np.full((statistics.units_a, statistics.units_b), np.nan)
        self.similarity_[np.ix_(live_a, live_b)] = block
        self.greedy_ = np.full(statistics.units_a, -1)
        self.greedy_[live_a] = live_b[best]
        self.greedy_scores_ = np.full(statistics.units_a, np.nan)
        self.greedy_scores_[live_a] = block.max(1)
        self.matching_ = np.full(statistics.units_a, -1)
        self.matching_[live_a[rows]] = live_b[columns]
        self.matched_scores_ = np.full(statistics.units_a, np.nan)
        self.matched_scores_[live_a[rows]] = block[rows, columns]
        self.score_greedy_ = float(block[rows].max(1).mean())
        self.score_matched_ = float(block[rows, columns].mean())
        self.agreement_ = float(np.mean(block[rows, columns] == block[rows].max(1)))
        self.dead_a_ = np.setdiff1d(np.arange(statistics.units_a), live_a)
        self.dead_b_ = np.setdiff1d(np.arange(statistics.units_b), live_b)
        self.chance_ = chance
        activity = statistics.mean[live_a]
        self.activity_order_ = live_a[np.argsort(-activity, kind="stable")]
        self.activity_correlation_ = _rank_correlation(activity[rows], block[rows, columns])
        self.display_order_ = _cycles(self.matching_, max(statistics.units_a, statistics.units_b))
        self.n_samples_ = statistics.count
        self._fitted = statistics
        return self

    def score(
        self,
        a: ArrayLike | PairedStatistics,
        b: ArrayLike | None = None,
        *,
        alignment: Literal["matching", "greedy"] = "matching",
    ) -> float:
        """Mean correlation of the fitted pairs on other samples, over the units of A that were matched one-to-one.

        Pairs with a unit that is dead on these samples are left out.

        Raises:
            ValueError: other numbers of units than fitted, or no pair with live units.
        """
        given = _same_units(self._fitted, _statistics(a, b))
        rows = np.flatnonzero(self.matching_ >= 0)
        partners = {"matching": self.matching_, "greedy": self.greedy_}[alignment][rows]
        values = given.correlation[rows, given.units_a + partners]
        if np.isnan(values).all():
            raise ValueError("every fitted pair has a unit that is dead on these samples")
        return float(np.nanmean(values))

    def apply_permutation(self, net: nn.Module, layer: str) -> nn.Module:
        """A copy of net B with the units of a layer reordered so that unit i is the partner of A's unit i.

        The copy computes the same function: rows of the producing Linear or convolution, BatchNorm parameters and
        statistics in between, and the input channels of the next Linear or convolution (through a flatten as well)
        are permuted together. Units without a partner fill the remaining places in ascending order.

        Args:
            net: a net that torch.fx can trace, with the layer in a plain chain: producer, elementwise functions,
                pooling, BatchNorm, flatten, consumer, each with one successor.
            layer: as given to `activations` for net B.

        Raises:
            ValueError: what cannot be proved to leave the function unchanged: a branch (residual nets), grouped
                convolutions, shared or reparametrised weights, an operation that mixes units, the net's last layer;
                or fewer units in B than in A.
        """
        units_a, units_b = self.similarity_.shape
        if units_b < units_a:
            raise ValueError(f"net B has {units_b} units, fewer than the {units_a} of net A: they cannot be lined up")
        order = np.full(units_b, -1)
        order[:units_a] = self.matching_
        order[order < 0] = np.setdiff1d(np.arange(units_b), self.matching_)
        return _permuted(net, layer, torch.from_numpy(order))


def _expected_maximum(count: int) -> float:
    """E max of `count` independent standard normal values: int_0^inf (1 - Phi^k) - int_-inf^0 Phi^k."""
    x = np.linspace(-9.0, 9.0, 20_001)
    below = np.exp(count * stats.norm.logcdf(x))
    return float(integrate.trapezoid(np.where(x > 0, 1 - below, -below), x))


def _rank_correlation(x: Floats, y: Floats) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def _mutual_information(a: NDArray[Any], b: NDArray[Any], bins: int) -> Floats:
    """Mutual information in nats of every column of `a` with every column of `b`, bias removed; may be below 0."""
    bins_a, bins_b = _binned(a, bins), _binned(b, bins)
    samples = len(a)
    joint = np.zeros((a.shape[1] * bins, b.shape[1] * bins))
    step = max(1, CHUNK // bins)
    for start in range(0, samples, step):
        one_hot_a = np.eye(bins)[bins_a[start : start + step]].reshape(-1, joint.shape[0])
        one_hot_b = np.eye(bins)[bins_b[start : start + step]].reshape(-1, joint.shape[1])
        joint += one_hot_a.T @ one_hot_b
    joint = joint.reshape(a.shape[1], bins, b.shape[1], bins).swapaxes(1, 2) / samples
    margin_a, margin_b = joint.sum(3)[:, :1], joint.sum(2)[:1]
    independent = margin_a[..., None] * margin_b[..., None, :]
    log_ratio = np.log(joint, where=joint > 0, out=np.zeros_like(joint)) - np.log(
        independent, where=joint > 0, out=np.zeros_like(joint)
    )
    bias = ((margin_a > 0).sum(-1) - 1) * ((margin_b > 0).sum(-1) - 1) / (2 * samples)
    information: Floats = (joint * log_ratio).sum((2, 3)) - bias
    return information


def _binned(values: NDArray[Any], bins: int) -> Integers:
    """Bin 0 for silence, bins 1 .. bins - 1 equally filled by rank; equal values share a bin."""
    result = np.zeros(values.shape, dtype=np.intp)
    for unit, column in enumerate(values.T):
        sounding = np.abs(column) > 1e-6
        if count := np.count_nonzero(sounding):
            share = (stats.rankdata(column[sounding]) - 0.5) / count  # mid-ranks, so in (0, 1)
            result[sounding, unit] = 1 + np.floor(share * (bins - 1)).astype(np.intp)
    return result


def _cycles(partner: Integers, length: int) -> Integers:
    """0 .. length - 1 in the order in which the matching leads from one to the next.

    Chains that begin at an index nobody points to come first; then cycles, from the smallest index not seen yet.
    """
    following = dict(enumerate(partner.tolist()))
    starts = [*np.setdiff1d(np.arange(length), partner).tolist(), *range(length)]
    order: dict[int, None] = {}
    for index in starts:
        while index >= 0 and index not in order:
            order[index] = None
            index = following.get(index, -1)
    return np.array(list(order))


# --- reordering the units of a net ----------------------------------------------------------------------------------

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ELEMENTWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)
POOLING = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
ELEMENTWISE_CALLS = {"relu", "relu_", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "dropout"}
POOLING_CALLS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}


def _permuted(net: nn.Module, layer: str, order: torch.Tensor) -> nn.Module:
    """A copy of `net` in which new unit i of `layer` is old unit ``order[i]``, with the same function."""
    result = copy.deepcopy(net)
    producer, norms, flattened, consumer = _chain(result, layer)
    uses: dict[int, int] = {}
    for _, parameter in result.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in (producer, *norms, consumer):
        if any(uses[id(parameter)] > 1 for parameter in module.parameters()):
            raise ValueError(f"a weight next to layer {layer!r} is shared with another module: it cannot be permuted")
        if getattr(module, "groups", 1) != 1:
            raise ValueError(f"a grouped convolution next to layer {layer!r} ties its units to each other")

    units, inputs = producer.weight.shape[0], consumer.weight.shape[1]
    if units != len(order):
        raise ValueError(f"layer {layer!r} has {units} units in this net, but {len(order)} were matched")
    by_channel = isinstance(producer, CONVOLUTIONS)
    if by_channel == isinstance(consumer, CONVOLUTIONS):
        reads_units = inputs == units and not (by_channel and flattened)
    else:
        reads_units = by_channel and flattened and inputs % units == 0
    if not reads_units or any(norm.num_features != units for norm in norms):
        raise ValueError(f"what follows layer {layer!r} does not read its {units} units one by one")

    with torch.no_grad():
        for module in (producer, *norms):
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(module, name, None)
                if values is not None:
                    values.copy_(values[order.to(values.device)])
        weight = consumer.weight
        blocks = weight.reshape(weight.shape[0], units, -1)  # a flattened map keeps the places of a channel together
        weight.copy_(blocks[:, order.to(weight.device)].reshape(weight.shape))
    return result


def _chain(net: nn.Module, layer: str) -> tuple[Any, list[Any], bool, Any]:
    """The module whose outputs are the units of `layer`, BatchNorms after it, whether a flatten follows, the reader."""
    try:
        nodes = list(torch.fx.symbolic_trace(net).graph.nodes)
    except Exception as problem:  # whatever the net's own forward raises under tracing
        raise ValueError(f"the net cannot be traced, so no permutation can be proved harmless: {problem}") from problem
    modules = dict(net.named_modules())
    calls = [node.target for node in nodes if node.op == "call_module"]
    node = next((node for node in nodes if node.op == "call_module" and node.target == layer), None)
    if node is None:
        raise ValueError(f"no call of a layer {layer!r} in the traced net; it calls {', '.join(map(str, calls))}")

    def refuse(node: torch.fx.Node, why: str) -> ValueError:
        return ValueError(f"cannot permute layer {layer!r}: {node.target!s} {why}")

    def kind(node: torch.fx.Node) -> str:
        """What a node does to the units; raises for what mixes them or is unknown."""
        if node.op == "call_module":
            module = modules[str(node.target)]
            if calls.count(node.target) > 1:
                raise refuse(node, "runs more than once")
            # Exact classes: a subclass or a reparametrised module may compute something else.
            if type(module) in (nn.Linear, *CONVOLUTIONS):
                return "weights"
            if type(module) in BATCH_NORMS:
                return "norm"
            if type(module) in POOLING:
                return "pool"
            if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                return "flatten"
            if type(module) in ELEMENTWISE:
                return "elementwise"
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name == "flatten" and (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1)):
                return "flatten"
            if name in POOLING_CALLS:
                return "pool"
            if name in ELEMENTWISE_CALLS:
                return "elementwise"
        raise refuse(node, "is not known to leave units apart")

    def successor(node: torch.fx.Node) -> torch.fx.Node:
        if len(node.users) != 1:
            raise refuse(node, f"has {len(node.users)} successors: branches need one permutation shared by all")
        following = next(iter(node.users))
        if following.op == "output":
            raise refuse(node, "is the net's output, whose order is part of the function")
        if following.all_input_nodes != [node]:
            raise refuse(following, "joins several branches, as in a residual net")
        return following

    while kind(node) != "weights":
        if kind(node) == "flatten" or len(node.all_input_nodes) != 1:
            raise refuse(node, "does not carry one unit per output feature")
        node = node.all_input_nodes[0]
    producer = modules[str(node.target)]
    norms: list[Any] = []
    flattened = False
    while kind(node := successor(node)) != "weights":
        if kind(node) == "norm":
            norms.append(modules[str(node.target)])
        elif kind(node) == "flatten":
            flattened = True
        elif kind(node) == "pool" and (flattened or isinstance(producer, nn.Linear)):
            raise refuse(node, "pools over the units")
    return producer, norms, flattened, modules[str(node.target)]


# --- one-to-many ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparsePath:
    """What sparse prediction costs and needs along the path, densest point last.

    Attributes:
        alpha: (points,), descending.
        loss: (points,), half the squared error of a standardised unit, mean over the live units of B.
        predictors: (points,), units of A used per unit of B, mean.
        loss_by_unit, predictors_by_unit: (points, units_b); NaN and 0 for dead units.
        null: the loss of predicting every unit's mean; 0.5 on the samples of the fit.
    """

    alpha: Floats
    loss: Floats
    predictors: Floats
    loss_by_unit: Floats
    predictors_by_unit: Integers
    null: float

    def select(self, share: float = 0.9) -> int:
        """The sparsest point that explains at least `share` of what the best point explains (loss below `null`)."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {share}")
        explained = self.null - self.loss
        return int(np.argmax(explained >= share * explained.max()))


class SparseMapper(BaseEstimator):  # type: ignore[misc]
    """One-to-many: predict every unit of B as a sparse linear combination of the units of A (section 3.2).

    Units are standardised by mean and standard deviation of the fit. For every unit b of B, with a the units of A,

        minimise over w:   1/2 E (b - w . a)^2  +  alpha |w|_1

    which is scikit-learn's ``Lasso(alpha, fit_intercept=False)`` on the standardised samples, solved by its coordinate
    descent. The paper penalises all of W by one lambda: alpha = lambda if its data term is summed over the units of
    B, alpha = units_b * lambda if averaged. The authors' logs fit the average: their loss levels off at 0.5, not at
    0.5 * units_b, once the penalty has emptied W, and it does so from lambda * units_b of about 1.

    Args:
        alphas: ``"path"`` for 20 values from the smallest that empties W down to a thousandth of it, in equal ratios,
            and 0 (ordinary least squares, of least norm where the units of A are collinear); or the values, >= 0.
        threshold: a weight counts as a used predictor above this size (standardised units).
        tol, max_iter: of the coordinate descent.

    Attributes:
        alphas_: (points,), descending.
        coef_: (points, units_a, units_b); zero for dead units.
        path_: `SparsePath` on the samples of the fit; use `path` for held-out samples.
    """

    def __init__(
        self,
        alphas: Literal["path"] | Sequence[float] = "path",
        threshold: float = 1e-3,
        tol: float = 1e-6,
        max_iter: int = 10_000,
    ) -> None:
        self.alphas = alphas
        self.threshold = threshold
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, a: ArrayLike | PairedStatistics, b: ArrayLike | None = None) -> Self:
        """Solve the path.

        Args:
            a: (samples, units_a), or `PairedStatistics`.
            b: (samples, units_b) with the same rows; None after `PairedStatistics`.

        Raises:
            ValueError: bad samples as for `UnitMatcher.fit`; a negative, missing or non-finite alpha.
        """
        statistics = _statistics(a, b)
        live_a, live_b = statistics.live_a, statistics.live_b
        joint = np.concatenate([live_a, statistics.units_a + live_b])
        correlation = statistics.correlation[np.ix_(joint, joint)]
        within, between = correlation[: len(live_a), : len(live_a)], correlation[: len(live_a), len(live_a) :]
        self.alphas_ = self._grid(float(np.abs(between).max()))

        # The problem depends on second moments only, so any data with these moments will do: as many rows as units.
        values, vectors = np.linalg.eigh(correlation)
        data = np.asfortranarray((vectors * np.sqrt(np.clip(values, 0, None) * len(values))).T)
        predictors, targets = data[:, : len(live_a)], data[:, len(live_a) :]
        penalties = self.alphas_[self.alphas_ > 0]
        self.coef_ = np.zeros((len(self.alphas_), statistics.units_a, statistics.units_b))
        for column, unit in enumerate(live_b):
            if len(penalties):
                _, weights, _ = lasso_path(
                    predictors,
                    targets[:, column],
                    alphas=penalties,
                    precompute=within * len(values),
                    Xy=between[:, column] * len(values),
                    tol=self.tol,
                    max_iter=self.max_iter,
                    random_state=0,  # unused by cyclic descent, but None would advance NumPy's global generator
                )
                self.coef_[: len(penalties), live_a, unit] = weights.T
        if len(penalties) < len(self.alphas_):
            self.coef_[-1][np.ix_(live_a, live_b)] = _inverses(within)[0] @ between
        self._fitted = statistics
        self.path_ = self.path(statistics)
        return self

    def path(self, a: ArrayLike | PairedStatistics, b: ArrayLike | None = None) -> SparsePath:
        """Loss and predictors of the fitted maps on other samples, in the standardisation of the fit.

        Raises:
            ValueError: other numbers of units than fitted.
        """
        given = _same_units(self._fitted, _statistics(a, b))
        units_a = given.units_a
        moments = _standardised(self._fitted, given)
        within, between, target = moments[:units_a, :units_a], moments[:units_a, units_a:], np.diag(moments)[units_a:]
        live = np.isin(np.arange(given.units_b), self._fitted.live_b)
        explained = 2 * (self.coef_ * between).sum(1) - (self.coef_ * (within @ self.coef_)).sum(1)
        loss = np.where(live, 0.5 * (target - explained), np.nan)
        used = (np.abs(self.coef_) > self.threshold).sum(1)
        return SparsePath(
            alpha=self.alphas_,
            loss=loss[:, live].mean(1),
            predictors=used[:, live].mean(1),
            loss_by_unit=loss,
            predictors_by_unit=used,
            null=float(0.5 * target[live].mean()),
        )

    def _grid(self, largest: float) -> Floats:
        if isinstance(self.alphas, str):
            if self.alphas != "path":
                raise ValueError(f"alphas must be 'path' or a sequence of numbers, not {self.alphas!r}")
            return np.append(np.geomspace(largest, 1e-3 * largest, 20), 0.0)
        alphas = np.unique(np.asarray(self.alphas, dtype=np.float64))[::-1]
        if len(alphas) == 0 or not np.isfinite(alphas).all() or alphas[-1] < 0:
            raise ValueError(f"alphas must be finite numbers >= 0, at least one, not {self.alphas!r}")
        return alphas


# --- many-to-many ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitCluster:
    """A group of units of both nets, and whether they span the same space.

    Attributes:
        units_a, units_b: indices; either may be empty.
        mean_squared_correlation: over all pairs of different units of the group; NaN for a single unit.
        r2_b_from_a, r2_a_from_b: share of variance that all units of one side explain of the other's, linearly, mean
            over the explained units; NaN unless both sides have units (as all that follows).
        r2_one_to_one: the same for the best one-to-one pairing of the group's units, unpaired ones explaining nothing,
            mean over the units of the smaller side: subspaces are shared and bases are not where this is far lower.
        canonical_correlations: of the two spans, descending, as many as the smaller side has units.
    """

    units_a: Integers
    units_b: Integers
    mean_squared_correlation: float
    r2_b_from_a: float
    r2_a_from_b: float
    r2_one_to_one: float
    canonical_correlations: Floats

    @property
    def shared(self) -> bool:
        """Whether the group holds units of both nets."""
        return len(self.units_a) > 0 and len(self.units_b) > 0


class UnitClusters(BaseEstimator):  # type: ignore[misc]
    """Many-to-many: hierarchical spectral clustering of the units of both nets together (section 3.3).

    The units of both nets are nodes of one graph, weighted by their joint correlations, within the nets and between
    them. Each unit is placed by the lowest eigenvectors of L = I - D^(-1/2) W D^(-1/2), rows scaled to length 1, and
    Ward's agglomeration in that space gives the tree. A cluster with units of both nets is a candidate for a shared
    subspace; `clusters_` says how far it is one. Which weights the paper takes and where it cuts was not available:
    the defaults are ours. Untrained nets share clusters too, so use them as the control.

    Args:
        n_clusters: cut the tree into this many; None cuts every branch at the largest subtrees of at most `max_size`.
        max_size: most units in a cluster, of both nets together, when `n_clusters` is None.
        affinity: edge weights from correlations r, which must not be negative: ``"squared"`` r^2, ``"absolute"`` |r|,
            ``"positive"`` max(r, 0).

    Attributes:
        labels_a_, labels_b_: (units_a,), (units_b,), cluster of each unit; -1 for dead units.
        clusters_: a `UnitCluster` per label, measured on the samples of the fit; `evaluate` takes others.
        n_clusters_: how many.
        shared_fraction_: share of clusters that hold units of both nets.
        embedding_: (live units, eigenvectors), A's live units first. As many eigenvectors as `n_clusters`; when that
            is None, as many as precede the largest gap of eigenvalues, between the fewest clusters that `max_size`
            allows and half of the units.
        linkage_: the tree over these rows, in SciPy's format.
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        max_size: int = 8,
        affinity: Literal["squared", "absolute", "positive"] = "squared",
    ) -> None:
        self.n_clusters = n_clusters
        self.max_size = max_size
        self.affinity = affinity

    def fit(self, a: ArrayLike | PairedStatistics, b: ArrayLike | None = None) -> Self:
        """Cluster the units of two nets.

        Args:
            a: (samples, units_a), or `PairedStatistics`.
            b: (samples, units_b) with the same rows; None after `PairedStatistics`.

        Raises:
            ValueError: bad samples as for `UnitMatcher.fit`; n_clusters, max_size or affinity out of range.
        """
        statistics = _statistics(a, b)
        live = np.concatenate([statistics.live_a, statistics.units_a + statistics.live_b])
        if self.n_clusters is not None and not 1 <= self.n_clusters <= len(live):
            raise ValueError(f"n_clusters must be from 1 to the {len(live)} live units, not {self.n_clusters}")
        if self.max_size < 1:
            raise ValueError(f"max_size must be at least 1, not {self.max_size}")
        self.embedding_ = self._embedding(statistics.correlation[np.ix_(live, live)])
        self.linkage_ = hierarchy.linkage(self.embedding_, method="ward")
        if self.n_clusters is None:
            labels = _subtrees(self.linkage_, self.max_size)
        else:
            labels = hierarchy.cut_tree(self.linkage_, n_clusters=[self.n_clusters])[:, 0]
        joint = np.full(statistics.units_a + statistics.units_b, -1)
        joint[live] = labels
        self.labels_a_, self.labels_b_ = joint[: statistics.units_a], joint[statistics.units_a :]
        self.n_clusters_ = int(labels.max()) + 1
        self._fitted = statistics
        self.clusters_ = self.evaluate(statistics)
        self.shared_fraction_ = float(np.mean([cluster.shared for cluster in self.clusters_]))
        return self

    def evaluate(self, a: ArrayLike | PairedStatistics, b: ArrayLike | None = None) -> list[UnitCluster]:
        """The fitted clusters, with linear maps and canonical directions of the fit measured on other samples.

        Raises:
            ValueError: other numbers of units than fitted.
        """
        given = _same_units(self._fitted, _statistics(a, b))
        return [
            _cluster(
                self._fitted, given, np.flatnonzero(self.labels_a_ == label), np.flatnonzero(self.labels_b_ == label)
            )
            for label in range(self.n_clusters_)
        ]

    def _embedding(self, correlation: Floats) -> Floats:
        if self.affinity == "squared":
            weights = correlation**2
        elif self.affinity == "absolute":
            weights = np.abs(correlation)
        elif self.affinity == "positive":
            weights = np.clip(correlation, 0, None)
        else:
            raise ValueError(f"affinity must be 'squared', 'absolute' or 'positive', not {self.affinity!r}")
        units = len(weights)
        root = 1 / np.sqrt(weights.sum(1))  # every unit correlates with itself, so no degree is 0
        values, vectors = np.linalg.eigh(np.eye(units) - root[:, None] * weights * root)
        dimensions = self.n_clusters
        if dimensions is None:
            fewest = -(-units // self.max_size)
            gaps = np.diff(values)[fewest - 1 : max(fewest, units // 2)]
            dimensions = fewest + int(gaps.argmax()) if len(gaps) else units
        vectors = vectors[:, :dimensions]
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dimensions)])  # eigh leaves it open
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        embedding: Floats = vectors / np.where(norm > 0, norm, 1.0)
        return embedding


def _subtrees(linkage: Floats, max_size: int) -> Integers:
    """Labels of the largest subtrees with at most `max_size` leaves, numbered by their first leaf."""
    leaves = len(linkage) + 1
    members: dict[int, list[int]] = {leaf: [leaf] for leaf in range(leaves)}
    for step, (left, right, _, size) in enumerate(linkage):
        if size <= max_size:
            members[leaves + step] = members.pop(int(left)) + members.pop(int(right))
    labels = np.empty(leaves, dtype=np.intp)
    for label, group in enumerate(sorted(members.values(), key=min)):
        labels[group] = label
    return labels


def _cluster(fitted: PairedStatistics, given: PairedStatistics, units_a: Integers, units_b: Integers) -> UnitCluster:
    joint = np.concatenate([units_a, fitted.units_a + units_b])
    correlation = given.correlation[np.ix_(joint, joint)]
    squared = _mean(correlation[np.triu_indices(len(joint), 1)] ** 2)
    if not (len(units_a) and len(units_b)):
        nan = float("nan")
        return UnitCluster(units_a, units_b, squared, nan, nan, nan, np.empty(0))

    a, b = slice(0, len(units_a)), slice(len(units_a), None)
    learnt = fitted.correlation[np.ix_(joint, joint)]
    between = learnt[a, b]
    inverse_a, root_a = _inverses(learnt[a, a])
    inverse_b, root_b = _inverses(learnt[b, b])
    moments = _standardised(fitted, given)[np.ix_(joint, joint)]
    spread = (given.std / np.where(fitted.std > 0, fitted.std, 1))[joint]

    def r2(source: slice, target: slice, weights: Floats) -> Floats:
        """Per target unit on the given samples; NaN for a unit that is dead there."""
        cross = (weights * moments[source, target]).sum(0)
        power = (weights * (moments[source, source] @ weights)).sum(0)
        error = np.diag(moments)[target] - 2 * cross + power
        variance = np.where(spread[target] > 0, spread[target] ** 2, np.nan)
        values: Floats = 1 - error / variance
        return values

    rows, columns = linear_assignment(-(between**2))
    single = np.zeros_like(between)
    single[rows, columns] = between[rows, columns]

    left, _, right = np.linalg.svd(root_a @ between @ root_b, full_matrices=False)
    left, right = root_a @ left, root_b @ right.T
    covariance = np.nan_to_num(correlation) * np.outer(spread, spread)
    power = (left * (covariance[a, a] @ left)).sum(0) * (right * (covariance[b, b] @ right)).sum(0)
    shared = (left * (covariance[a, b] @ right)).sum(0)
    return UnitCluster(
        units_a=units_a,
        units_b=units_b,
        mean_squared_correlation=squared,
        r2_b_from_a=_mean(r2(a, b, inverse_a @ between)),
        r2_a_from_b=_mean(r2(b, a, inverse_b @ between.T)),
        r2_one_to_one=_mean(r2(a, b, single) if len(units_b) <= len(units_a) else r2(b, a, single.T)),
        canonical_correlations=np.sort(shared / np.sqrt(np.where(power > 0, power, np.inf)))[::-1],
    )


def _inverses(correlation: Floats) -> tuple[Floats, Floats]:
    """Pseudo-inverse and its symmetric root; directions with less than 1e-10 of the largest variance are left out."""
    values, vectors = np.linalg.eigh(correlation)
    values, vectors = values[values > 1e-10 * values[-1]], vectors[:, values > 1e-10 * values[-1]]
    return (vectors / values) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def _mean(values: Floats) -> float:
    """Mean without NaN; NaN when nothing is left."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
