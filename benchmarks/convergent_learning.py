"""Mapping units of two nets: beside the tools the paper's authors used, and the plain way of scikit-learn and NumPy.

    .venv/bin/python benchmarks/convergent_learning.py [--quick] [--json FILE]

Ratio = peer / ours, above 1 we are faster; both give the same, which is checked first. CPU milliseconds, one thread.
"""

import os
from collections.abc import Iterator

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import networkx as nx  # noqa: E402
import numpy as np  # noqa: E402
from _contest import Row, contest, run  # noqa: E402
from sklearn.linear_model import Lasso  # noqa: E402

from counterproof.representation import PairedStatistics, SparseMapper, UnitMatcher  # noqa: E402


def nets(units: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Two nets that share half of what their units respond to."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(samples, units // 2))
    a, b = (
        np.maximum(shared @ rng.normal(size=(units // 2, units)) + 5 * rng.normal(size=(samples, units)), 0)
        for _ in range(2)
    )
    return a, b


def networkx_total(similarity: np.ndarray) -> float:
    """The authors' way: a maximum-weight matching of the complete bipartite graph."""
    n = len(similarity)
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, n + j, similarity[i, j]) for i in range(n) for j in range(n))
    return sum(graph.edges[edge]["weight"] for edge in nx.max_weight_matching(graph, maxcardinality=True))


def contests(quick: bool, seconds: float) -> Iterator[Row]:
    for units in (32, 64) if quick else (32, 64, 96):
        a, b = nets(units, 2000)
        statistics = PairedStatistics.from_arrays(a, b)
        similarity = UnitMatcher().fit(statistics).similarity_
        yield contest(
            "match units by correlation",
            f"{units} units",
            lambda statistics=statistics: UnitMatcher().fit(statistics).matched_scores_.sum(),
            lambda similarity=similarity: networkx_total(similarity),
            "networkx.max_weight_matching, matching alone",
            same=lambda x, y: abs(x - y) < 1e-8,
            seconds=seconds,
        )
    for units, samples in ((64, 20_000),) if quick else ((64, 20_000), (256, 100_000)):
        a, b = nets(units, samples)
        yield contest(
            "joint correlations",
            f"{units} units, {samples} rows",
            lambda a=a, b=b: PairedStatistics.from_arrays(a, b).correlation,
            lambda a=a, b=b: np.corrcoef(a, b, rowvar=False),
            "numpy.corrcoef of all rows",
            same=lambda x, y: bool(np.allclose(x, y, atol=1e-10)),
            seconds=seconds,
        )
    a, b = nets(32, 5000)
    grid = [0.3, 0.1, 0.03, 0.01]

    def lassos() -> np.ndarray:
        x, y = ((values - values.mean(0)) / values.std(0) for values in (a, b))
        fitted = [[Lasso(alpha, fit_intercept=False, tol=1e-6).fit(x, t).coef_ for t in y.T] for alpha in grid]
        return np.array(fitted).swapaxes(1, 2)

    yield contest(
        "lasso path of every unit",
        "32 units, 4 penalties",
        lambda: SparseMapper(alphas=grid).fit(a, b).coef_,
        lassos,
        "sklearn Lasso per unit and penalty",
        same=lambda x, y: bool(np.allclose(x, y, atol=1e-3)),
        seconds=seconds,
    )


if __name__ == "__main__":
    run(__doc__ or "", contests)
