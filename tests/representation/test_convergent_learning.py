"""Convergent learning: matching, sparse prediction and clusters against independent references."""

from collections import OrderedDict
from itertools import permutations

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.base import clone
from sklearn.cluster import AgglomerativeClustering
from sklearn.linear_model import Lasso
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from torch import nn
from torch.nn import functional

from counterproof.bench.task import Trial
from counterproof.representation import (
    PairedStatistics,
    SparseMapper,
    UnitClusters,
    UnitMatcher,
    activations,
    paired_statistics,
)
from counterproof.representation.claims import convergent_learning as claims
from counterproof.representation.task import UNIT_MAPPINGS, least_squares, mapping_quality, run_unit_mappings


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def related(rng, samples=400, units_a=6, units_b=6, sources=5):
    """Two sets of units that are noisy rectified mixtures of the same sources."""
    z = rng.normal(size=(samples, sources))
    a, b = (
        z @ rng.normal(size=(sources, units)) + 0.3 * rng.normal(size=(samples, units)) for units in (units_a, units_b)
    )
    return np.maximum(a, 0), np.maximum(b, 0)


def correlation(a, b):
    """Between-net block of NumPy's own correlation matrix."""
    return np.corrcoef(a, b, rowvar=False)[: a.shape[1], a.shape[1] :]


def conv_net(seed=0, channels=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, channels, 3, padding=1),
                norm1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(channels, 8, 3),
                relu2=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(8 * 9, 12),
                norm2=nn.BatchNorm1d(12),
                act=nn.GELU(),
                fc2=nn.Linear(12, 3),
            )
        )
        for _ in range(3):  # BatchNorm statistics that differ between channels
            net(3 * torch.randn(32, 1, 8, 8) + 1)
    return net.eval()


def images(count=40, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- one-to-one


def test_a_permuted_copy_is_matched_perfectly():
    """Reordering the channels of a net by hand: the matching finds the order, every correlation is 1."""
    net, other = conv_net(), conv_net()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for module, names in (
            (other.conv1, ("weight", "bias")),
            (other.norm1, ("weight", "bias", "running_mean", "running_var")),
        ):
            for name in names:
                getattr(module, name).copy_(getattr(module, name)[order])
    a, b = (activations(n, [images()], ["relu1"])["relu1"] for n in (net, other))
    matcher = UnitMatcher().fit(a, b)
    assert matcher.matching_.tolist() == order.argsort().tolist() == matcher.greedy_.tolist()
    np.testing.assert_allclose(matcher.matched_scores_, 1, atol=1e-6)
    assert matcher.agreement_ == 1
    assert matcher.score_greedy_ == pytest.approx(matcher.score_matched_)


def test_correlation_ignores_positive_scale_and_sees_sign(rng):
    a, _ = related(rng)
    scaled = UnitMatcher().fit(a, a * rng.uniform(0.1, 10, 6) + 3)
    assert scaled.matching_.tolist() == list(range(6))
    assert scaled.score_matched_ == pytest.approx(1)
    flipped = UnitMatcher().fit(a, np.concatenate([-a[:, :1], a[:, 1:]], axis=1))
    assert flipped.similarity_[0, 0] == pytest.approx(-1)
    assert flipped.greedy_[0] != 0


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_permutation(seed):
    """Brute force over all orders, networkx's blossom algorithm, and the bounds from above and below."""
    rng = np.random.default_rng(seed)
    a, b = related(rng, samples=60)
    matcher, c = UnitMatcher().fit(a, b), correlation(a, b)
    total = c[range(6), matcher.matching_].sum()
    assert sorted(matcher.matching_) == list(range(6))
    assert total == pytest.approx(max(c[range(6), order].sum() for order in permutations(range(6))))
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, 6 + j, c[i, j]) for i in range(6) for j in range(6))
    edges = nx.max_weight_matching(graph, maxcardinality=True)
    assert total == pytest.approx(sum(graph.edges[edge]["weight"] for edge in edges))
    assert total <= c.max(1).sum() + 1e-12
    assert all(total >= c[range(6), rng.permutation(6)].sum() - 1e-12 for _ in range(50))
    assert matcher.score_matched_ == pytest.approx(total / 6)
    assert matcher.score_greedy_ == pytest.approx(c.max(1).mean())
    assert matcher.agreement_ == np.mean(matcher.greedy_ == matcher.matching_)
    np.testing.assert_allclose(matcher.similarity_, c, atol=1e-12)


@pytest.mark.parametrize(("units_a", "units_b"), [(4, 7), (7, 4)])
def test_layers_of_different_width(rng, units_a, units_b):
    a, b = related(rng, units_a=units_a, units_b=units_b)
    matcher = UnitMatcher().fit(a, b)
    partners = matcher.matching_[matcher.matching_ >= 0]
    assert len(partners) == len(set(partners)) == 4
    assert np.isnan(matcher.matched_scores_).sum() == units_a - 4
    assert matcher.score_greedy_ >= matcher.score_matched_
    narrow, wide = (a, b) if units_a < units_b else (b, a)
    c = correlation(narrow, wide)
    best = max(c[range(4), order].sum() for order in permutations(range(7), 4))
    assert np.nansum(matcher.matched_scores_) == pytest.approx(best)
    assert sorted(matcher.display_order_) == list(range(7))
    units = np.flatnonzero(matcher.matching_ >= 0)
    position = np.argsort(matcher.display_order_)
    beside = np.sum(position[matcher.matching_[units]] - position[units] == 1)
    cycles = nx.simple_cycles(nx.DiGraph(list(zip(units.tolist(), matcher.matching_[units].tolist()))))
    assert beside == 4 - len(list(cycles))


def test_held_out_score(rng):
    a, b = related(rng, samples=800)
    matcher = UnitMatcher().fit(a[:400], b[:400])
    c = correlation(a[400:], b[400:])
    assert matcher.score(a[400:], b[400:]) == pytest.approx(c[range(6), matcher.matching_].mean())
    assert matcher.score(a[400:], b[400:], alignment="greedy") == pytest.approx(c[range(6), matcher.greedy_].mean())


def test_display_order_follows_cycles(rng):
    """In display order every pair lies beside the diagonal but one per cycle, which closes it."""
    a = rng.normal(size=(50, 12))
    order = rng.permutation(12)
    matcher = UnitMatcher().fit(a, a[:, order])
    cycles = nx.number_strongly_connected_components(nx.DiGraph(list(enumerate(matcher.matching_.tolist()))))
    position = np.argsort(matcher.display_order_)
    steps = position[matcher.matching_] - position
    assert sorted(matcher.display_order_) == list(range(12))
    assert np.sum(steps == 1) + np.sum(steps <= 0) == 12
    assert np.sum(steps <= 0) == cycles


def test_most_and_least_active_units(rng):
    a, b = related(rng)
    a = a * np.array([1, 5, 2, 9, 0.1, 3])
    matcher = UnitMatcher().fit(a, b)
    assert matcher.activity_order_.tolist() == np.argsort(-a.mean(0)).tolist()
    assert matcher.activity_correlation_ == pytest.approx(stats.spearmanr(a.mean(0), matcher.matched_scores_).statistic)


def test_mutual_information_against_scikit_learn(rng):
    """450 silent samples, and nine bins of 50 made by sorting; scikit-learn's plug-in estimate; Miller-Madow bias."""
    z = rng.normal(size=(900, 12))
    z[:, 6:] += z[:, :6]
    a, b = np.split(np.maximum(z - np.median(z, axis=0), 0), 2, axis=1)

    def bins(values):
        labels = np.zeros(len(values), dtype=int)
        labels[np.argsort(values)[450:]] = 1 + np.arange(450) // 50
        return labels

    matcher = UnitMatcher(similarity="mutual_info").fit(a, b)
    for i in range(6):
        for j in range(6):
            x, y = bins(a[:, i]), bins(b[:, j])
            bias = (len(set(x)) - 1) * (len(set(y)) - 1) / (2 * 900)
            assert matcher.similarity_[i, j] == pytest.approx(mutual_info_score(x, y) - bias, abs=1e-10)
    assert matcher.chance_ is None
    shuffled = UnitMatcher(similarity="mutual_info").fit(a, rng.permutation(b))
    assert abs(shuffled.similarity_.mean()) < 0.01  # without the correction about 81 / 1800 = 0.045


def test_mutual_information_sees_what_correlation_misses(rng):
    x = rng.normal(size=(3000, 3))
    a, b = x, np.abs(x[:, [2, 0, 1]])  # uncorrelated with its source by symmetry
    assert UnitMatcher(similarity="mutual_info").fit(a, b).matching_.tolist() == [1, 2, 0]
    assert UnitMatcher().fit(a, b).score_greedy_ < 0.1


def test_shuffled_samples_give_the_expected_maximum(rng):
    """Independent normal units: the mean greedy correlation is E max of 30 normals / sqrt(n - 1), by simulation."""
    samples, units = 500, 30
    simulated = rng.normal(size=(20_000, units)).max(1).mean() / np.sqrt(samples - 1)
    a = rng.normal(size=(samples, units))
    found = [UnitMatcher().fit(a, rng.normal(size=(samples, units))) for _ in range(20)]
    assert found[0].chance_ == pytest.approx(simulated, rel=0.01)
    assert np.mean([matcher.score_greedy_ for matcher in found]) == pytest.approx(found[0].chance_, rel=0.03)
    assert np.mean([matcher.score_matched_ for matcher in found]) < found[0].chance_


# --- statistics and samples


@pytest.mark.parametrize("batch", [1, 7, 100, 400])
def test_streamed_statistics_equal_two_passes(rng, batch):
    """Also with means a million times the spread, where sums of squares would lose every digit."""
    a, b = related(rng, units_a=4, units_b=5)
    a = a * np.array([1, 1, 1e-3, 1]) + np.array([0, 1e3, 1e3, -5])
    statistics = PairedStatistics(4, 5)
    for start in range(0, 400, batch):
        statistics.update(a[start : start + batch], b[start : start + batch])
    joint = np.concatenate([a, b], axis=1)
    np.testing.assert_allclose(statistics.correlation, np.corrcoef(joint, rowvar=False), atol=1e-10)
    np.testing.assert_allclose(statistics.mean, joint.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(joint, rowvar=False, ddof=0), atol=1e-10)


def test_dead_units_are_left_out_and_counted(rng):
    a, b = related(rng)
    a[:, 2] = 0
    b[:, [0, 5]] = 0.1  # not exact in binary: the variance of the rounded mean must not count
    matcher = UnitMatcher().fit(a, b)
    assert (matcher.dead_a_.tolist(), matcher.dead_b_.tolist()) == ([2], [0, 5])
    assert matcher.greedy_[2] == matcher.matching_[2] == -1
    assert not set(matcher.matching_) & {0, 5}
    assert np.isnan(matcher.similarity_[2]).all()
    assert np.isfinite([matcher.score_greedy_, matcher.score_matched_]).all()
    mapper = SparseMapper().fit(a, b)
    assert not mapper.coef_[:, 2].any()
    assert not mapper.coef_[:, :, [0, 5]].any()
    assert np.isfinite(mapper.path_.loss).all()
    clusters = UnitClusters().fit(a, b)
    assert clusters.labels_a_[2] == clusters.labels_b_[0] == -1
    assert sum(len(c.units_a) + len(c.units_b) for c in clusters.clusters_) == 9


@pytest.mark.parametrize("estimator", [UnitMatcher(), SparseMapper(), UnitClusters()])
def test_bad_samples_are_refused(rng, estimator):
    a, b = related(rng)
    spoilt = a.copy()
    spoilt[7, 3] = np.nan
    for bad, message in (
        ((spoilt, b), "net A, row 7, unit 3"),
        ((a, b[:-1]), "400 rows of net A, 399 of net B"),
        ((a[:1], b[:1]), "at least 2 samples"),
        ((a[:, 0], b), r"\(samples, units\)"),
        ((a, np.ones_like(b)), "all 6 units of net B are dead"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(*bad)
    with pytest.raises(TypeError, match="two arrays"):
        estimator.fit(a)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (UnitMatcher(similarity="cosine"), "'cosine'"),
        (UnitMatcher(similarity="mutual_info", bins=1), "not 1"),
        (SparseMapper(alphas=[-1.0]), "-1"),
        (SparseMapper(alphas="grid"), "'grid'"),
        (UnitClusters(n_clusters=13), "not 13"),
        (UnitClusters(max_size=0), "not 0"),
        (UnitClusters(affinity="signed"), "'signed'"),
    ],
)
def test_bad_settings_are_refused(rng, estimator, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(*related(rng))


@pytest.mark.parametrize("estimator", [UnitMatcher(), SparseMapper(), UnitClusters(), UnitMatcher("mutual_info")])
def test_estimators_leave_inputs_alone_and_can_be_cloned(rng, estimator):
    a, b = related(rng)
    before = a.copy(), b.copy()
    first = clone(estimator).fit(a, b)
    again = clone(first).fit(torch.tensor(a), torch.tensor(b))
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(again, name))


# --- activations of nets


def test_activations_are_those_of_a_forward_pass():
    net, x = conv_net().train(), images()
    net.fc1.eval()
    state, modes = torch.get_rng_state(), [module.training for module in net.modules()]
    values = activations(net, [x[:15], (x[15:], "labels")], ["conv1", "norm1", "relu1", "act"])
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in net.modules()]
    assert not any(module._forward_hooks for module in net.modules())
    net.eval()
    with torch.no_grad():
        norm1 = net.norm1(net.conv1(x))
        by_hand = {"conv1": net.conv1(x), "norm1": norm1, "relu1": torch.relu(norm1)}
        np.testing.assert_allclose(values["act"], net[:-1](x).numpy(), atol=1e-6)
    for layer, maps in by_hand.items():  # norm1: although the ReLU after it works in place
        np.testing.assert_allclose(values[layer], maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), atol=1e-6)
    assert values["act"].dtype == np.float32
    assert activations(net.double(), [x.double()], ["act"])["act"].dtype == np.float64


def test_positions_are_paired_and_do_not_depend_on_batches():
    x = images()
    index = torch.arange(64.0).view(1, 1, 8, 8).expand(40, 1, 8, 8)
    net = nn.Sequential(nn.Identity())
    whole = activations(net, [index], ["0"], positions=16)["0"]
    parts = activations(net, index.split(7), ["0"], positions=16)["0"]
    other = activations(net, [index.repeat(1, 3, 1, 1)], ["0"], positions=16)["0"]
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(other, np.repeat(whole, 3, axis=1))
    assert all(len(set(sample)) == 16 for sample in whole.reshape(40, 16))
    assert len(set(whole.ravel())) == 64  # drawn anew for every sample
    assert not np.array_equal(whole, activations(net, [index], ["0"], positions=16, seed=1)["0"])
    np.testing.assert_array_equal(*(activations(net, [x], ["0"], positions=n)["0"] for n in (None, 64)))


class Tokens(nn.Module):
    """Outputs as transformers make them: a tuple, and a mapping; called by keyword."""

    class Block(nn.Module):
        def __init__(self, mapping):
            super().__init__()
            self.linear, self.mapping = nn.Linear(5, 7), mapping

        def forward(self, x):
            y = self.linear(x)
            return OrderedDict(hidden=y, extra=None) if self.mapping else (y, "attention")

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Block(False), self.Block(True)

    def forward(self, input_values):
        return self.first(input_values), self.second(input_values)


def test_token_outputs_in_tuples_and_mappings():
    """(batch, tokens, units): the units are last, every token is a sample."""
    net, x = Tokens(), torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    values = activations(net, [{"input_values": x}], ["first", "second", "first.linear"])
    np.testing.assert_allclose(values["first"], net.first.linear(x).detach().reshape(12, 7).numpy(), atol=1e-6)
    np.testing.assert_array_equal(values["first"], values["first.linear"])
    np.testing.assert_allclose(values["second"], net.second.linear(x).detach().reshape(12, 7).numpy(), atol=1e-6)
    channels_first = activations(nn.Sequential(nn.Identity()), [x], ["0"], unit_axis=1)["0"]
    np.testing.assert_array_equal(channels_first, x.transpose(1, 2).reshape(20, 3).numpy())


def test_layers_that_cannot_be_read_are_refused():
    net = conv_net()
    with pytest.raises(ValueError, match=r"no layer 'relu9'.*relu1"):
        activations(net, [images()], ["relu9"])
    twice = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.ReLU()))
    twice.add_module("again", twice.a)
    with pytest.raises(ValueError, match="ran 2 times"):
        activations(twice, [torch.ones(1, 2)], ["a"])
    with pytest.raises(ValueError, match="no batch"):
        activations(net, [], ["relu1"])
    with pytest.raises(TypeError, match="the loader gave str"):
        activations(net, ["x"], ["relu1"])
    assert not any(module._forward_hooks for module in net.modules())


def test_two_nets_in_one_pass_equal_two_arrays():
    nets, x = (conv_net(0), conv_net(1, channels=9)), images()
    layers = ["relu1", ("relu2", "conv2")]
    streamed = paired_statistics(*nets, x.split(9), layers, positions=5)
    a = activations(nets[0], [x], ["relu1", "relu2"], positions=5)
    b = activations(nets[1], [x], ["relu1", "conv2"], positions=5)
    for entry, pair in zip(layers, ((a["relu1"], b["relu1"]), (a["relu2"], b["conv2"]))):
        arrays = PairedStatistics.from_arrays(*pair)
        assert streamed[entry].count == arrays.count == 200
        np.testing.assert_allclose(streamed[entry].covariance, arrays.covariance, atol=1e-10)
    for estimator in (UnitMatcher(), SparseMapper(), UnitClusters()):
        one, two = clone(estimator).fit(streamed["relu1"]), clone(estimator).fit(a["relu1"], b["relu1"])
        for name, value in vars(two).items():
            if isinstance(value, np.ndarray) and value.dtype != float:
                np.testing.assert_array_equal(getattr(one, name), value)
    with pytest.raises(ValueError, match="needs the samples"):
        UnitMatcher("mutual_info").fit(streamed["relu1"])


# --- permuting a net


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.fc1, self.fc2 = nn.Conv2d(6, 8, 3), nn.Linear(32, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.norm(self.conv1(x))), 2)
        x = torch.flatten(functional.adaptive_avg_pool2d(self.conv2(x).relu(), 2), 1)
        return self.fc2(functional.dropout(torch.tanh(self.fc1(x)), 0.5, self.training))


def matched(order):
    """A matcher in the state that pairs unit i of A with unit order[i] of B."""
    order = np.asarray(order)
    a = np.random.default_rng(0).normal(size=(50, len(order)))
    b = np.empty_like(a)
    b[:, order] = a
    matcher = UnitMatcher().fit(a, b)
    assert matcher.matching_.tolist() == order.tolist()
    return matcher


@pytest.mark.parametrize(
    ("build", "layer", "units"),
    [(conv_net, name, 6) for name in ("conv1", "norm1", "relu1")]
    + [(conv_net, name, 8) for name in ("conv2", "relu2", "pool")]
    + [(conv_net, name, 12) for name in ("fc1", "norm2", "act")]
    + [(Functional, name, units) for name, units in (("conv1", 6), ("norm", 6), ("conv2", 8), ("fc1", 12))],
)
def test_a_permuted_net_computes_the_same_function(rng, build, layer, units):
    """Equal logits, and its unit i is the given net's unit order[i]; the given net is untouched."""
    net, x = build().eval(), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    order = rng.permutation(units)
    permuted = matched(order).apply_permutation(net, layer)
    with torch.no_grad():
        torch.testing.assert_close(permuted(x), net(x), atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(
        activations(permuted, [x], [layer])[layer], activations(net, [x], [layer])[layer][:, order], atol=1e-5
    )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_units_without_a_partner_fill_the_remaining_places(rng):
    net = conv_net()
    b = activations(net, [images()], ["relu1"])["relu1"]
    permuted = UnitMatcher().fit(b[:, [4, 1]], b).apply_permutation(net, "relu1")
    np.testing.assert_allclose(
        activations(permuted, [images()], ["relu1"])["relu1"], b[:, [4, 1, 0, 2, 3, 5]], atol=1e-6
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.relu(self.second(x)))


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def repeated():
    twice = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), twice, nn.ReLU(), twice, nn.Linear(6, 2))


def shared_weights():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("net", "layer", "message"),
    [
        (Residual(), "first", "2 successors"),
        (Residual(), "second", "joins several branches"),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "1", "output"),
        (nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1, groups=3)), "0", "grouped"),
        (nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1)), "0", "grouped"),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "0", "not known"),
        (nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 2)), "0", "not known"),
        (nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.Linear(3, 2)), "0", "pools over the units"),
        (nn.Sequential(nn.Conv2d(1, 6, 1), nn.Linear(6, 2)), "0", "one by one"),
        (nn.Sequential(nn.Conv2d(1, 6, 1), nn.Flatten(2), nn.Linear(6, 2)), "0", "not known"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2)), "0", "not known"),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), "0", "has 5 units"),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), "2", "no call of a layer '2'"),
        (Untraceable(nn.Linear(4, 6), nn.Linear(6, 2)), "0", "cannot be traced"),
        (repeated(), "0", "runs more than once"),
        (shared_weights(), "1", "shared"),
    ],
)
def test_nets_that_cannot_be_proved_equal_are_refused(net, layer, message):
    with pytest.raises(ValueError, match=message):
        matched([1, 0, 3, 2, 5, 4]).apply_permutation(net, layer)


# --- one-to-many


def standard(values, reference=None):
    reference = values if reference is None else reference
    return (values - reference.mean(0)) / reference.std(0)


def test_the_lasso_path_against_scikit_learn_and_its_optimality_conditions(rng):
    a, b = related(rng, units_a=8, units_b=5)
    mapper = SparseMapper(tol=1e-10).fit(a, b)
    x, y = standard(a), standard(b)
    assert len(mapper.alphas_) == 21
    assert (np.diff(mapper.alphas_) < 0).all()
    for alpha, weights, loss, used in zip(mapper.alphas_, mapper.coef_, mapper.path_.loss, mapper.path_.predictors):
        if alpha > 0:
            reference = Lasso(alpha, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y).coef_.T
            np.testing.assert_allclose(weights, reference, atol=1e-6)
            gradient = x.T @ (y - x @ weights) / len(x)  # alpha * sign where used, within +-alpha elsewhere
            np.testing.assert_allclose(gradient[weights != 0], alpha * np.sign(weights[weights != 0]), atol=1e-7)
            assert (np.abs(gradient) <= alpha + 1e-7).all()
        assert loss == pytest.approx(0.5 * ((y - x @ weights) ** 2).mean())
        assert used == np.mean((np.abs(weights) > 1e-3).sum(0))
    assert (np.diff(mapper.path_.loss) <= 1e-9).all()


def test_the_ends_of_the_path(rng):
    """A large penalty empties the map at a loss of 1/2; none at all is ordinary least squares."""
    a, b = related(rng, units_a=8, units_b=5)
    mapper = SparseMapper(alphas=[0, 2.0]).fit(a, b)
    assert mapper.alphas_.tolist() == [2, 0]
    assert not mapper.coef_[0].any()
    assert mapper.path_.loss[0] == pytest.approx(0.5) == mapper.path_.null
    np.testing.assert_allclose(mapper.coef_[1], np.linalg.lstsq(standard(a), standard(b))[0], atol=1e-8)
    assert not SparseMapper().fit(a, b).coef_[0].any()
    doubled = SparseMapper(alphas=[0]).fit(np.concatenate([a, a], axis=1), b)  # collinear: the least norm
    np.testing.assert_allclose(doubled.coef_[0], np.concatenate([mapper.coef_[1]] * 2) / 2, atol=1e-8)


def test_held_out_path_uses_the_standardisation_of_the_fit(rng):
    a, b = related(rng, samples=600, units_a=8, units_b=5)
    b[300:] = 1.5 * b[300:] + 0.2
    mapper = SparseMapper().fit(a[:300], b[:300])
    path = mapper.path(a[300:], b[300:])
    x, y = standard(a[300:], a[:300]), standard(b[300:], b[:300])
    for weights, loss in zip(mapper.coef_, path.loss_by_unit):
        np.testing.assert_allclose(loss, 0.5 * ((y - x @ weights) ** 2).mean(0), rtol=1e-8)
    assert path.null == pytest.approx(0.5 * (y**2).mean())
    explained = path.null - path.loss
    chosen = path.select(0.9)
    assert explained[chosen] >= 0.9 * explained.max() > explained[:chosen].max()


def test_planted_predictors_are_found(rng):
    a = np.maximum(rng.normal(size=(4000, 20)), 0)
    b = standard(a)[:, :6].reshape(-1, 3, 2) @ np.array([0.8, 0.6])
    mapper = SparseMapper().fit(a, b)
    chosen = mapper.path_.select(0.9)
    support = np.abs(mapper.coef_[chosen]) > mapper.threshold
    assert support.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert support.nonzero()[1].tolist() == [0, 0, 1, 1, 2, 2]


# --- many-to-many


def planted(rng, groups=5, noise=0.0, samples=4000):
    """Three-dimensional subspaces, spanned by other (rotated) axes in the other net."""
    z = rng.normal(size=(samples, groups, 3))
    turn = np.eye(3) - 2 / 3  # a reflection that mixes all three axes
    a, b = z, z @ turn
    a, b = (values + noise * rng.normal(size=values.shape) for values in (a, b))
    return a.reshape(samples, -1), b.reshape(samples, -1), np.tile(np.repeat(np.arange(groups), 3), 2)


@pytest.mark.parametrize("settings", [{"n_clusters": 5}, {"max_size": 8}, {"max_size": 6, "affinity": "absolute"}])
def test_rotated_subspaces_are_recovered(rng, settings):
    """Units of the two nets correlate little one to one, but their groups explain each other completely."""
    a, b, groups = planted(rng)
    clusters = UnitClusters(**settings).fit(a, b)
    assert adjusted_rand_score(groups, np.concatenate([clusters.labels_a_, clusters.labels_b_])) == 1
    assert clusters.shared_fraction_ == 1
    for cluster in clusters.clusters_:
        assert cluster.r2_b_from_a == pytest.approx(1)
        assert cluster.r2_a_from_b == pytest.approx(1)
        assert cluster.r2_one_to_one < 0.5
        np.testing.assert_allclose(cluster.canonical_correlations, 1)
    assert UnitMatcher().fit(a, b).score_matched_ < 0.7
    assert SparseMapper(alphas=[0]).fit(a, b).path_.loss[0] == pytest.approx(0, abs=1e-12)


def test_the_embedding_is_that_of_the_normalised_laplacian(rng):
    """The generalised problem (D - W) u = lambda D u has v = D^(1/2) u; scikit-learn's Ward tree gives the labels."""
    a, b = related(rng, units_a=9, units_b=8)
    clusters = UnitClusters(n_clusters=4).fit(a, b)
    weights = np.corrcoef(np.concatenate([a, b], axis=1), rowvar=False) ** 2
    degree = np.diag(weights.sum(1))
    _, vectors = linalg.eigh(degree - weights, degree, subset_by_index=[0, 3])
    rows = np.sqrt(degree) @ vectors
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(clusters.embedding_ @ clusters.embedding_.T, rows @ rows.T, atol=1e-8)
    reference = AgglomerativeClustering(n_clusters=4, linkage="ward").fit_predict(rows)
    assert adjusted_rand_score(reference, np.concatenate([clusters.labels_a_, clusters.labels_b_])) == 1


def test_branches_are_cut_at_the_largest_subtrees(rng):
    a, b = related(rng, units_a=20, units_b=20)
    clusters = UnitClusters(max_size=5).fit(a, b)
    sizes = [len(cluster.units_a) + len(cluster.units_b) for cluster in clusters.clusters_]
    assert max(sizes) <= 5
    assert sum(sizes) == 40
    labels = np.concatenate([clusters.labels_a_, clusters.labels_b_])
    members = {leaf: {leaf} for leaf in range(40)}
    for step, (left, right, _, _) in enumerate(clusters.linkage_):
        union = members[40 + step] = members[int(left)] | members[int(right)]
        # A subtree is one cluster or part of one exactly if it is small enough.
        assert (len({labels[leaf] for leaf in union}) == 1) == (len(union) <= 5)


def test_cluster_measures_on_held_out_samples(rng):
    """R^2 by least squares fitted to the first half; canonical correlations as cosines of subspace angles."""
    a, b, _ = planted(rng, groups=2, noise=0.5, samples=600)
    clusters = UnitClusters(n_clusters=2).fit(a[:300], b[:300])
    x, y = standard(a, a[:300]), standard(b, b[:300])
    for cluster, fitted in zip(clusters.evaluate(a[300:], b[300:]), clusters.clusters_):
        xs, ys = x[:, cluster.units_a], y[:, cluster.units_b]
        weights = np.linalg.lstsq(xs[:300], ys[:300])[0]
        r2 = 1 - ((ys[300:] - xs[300:] @ weights) ** 2).mean(0) / ys[300:].var(0)
        assert cluster.r2_b_from_a == pytest.approx(r2.mean())
        cosines = np.cos(linalg.subspace_angles(xs[:300], ys[:300]))
        np.testing.assert_allclose(fitted.canonical_correlations, np.sort(cosines)[::-1], atol=1e-8)
        c = correlation(xs[:300], ys[:300]) ** 2
        best = max(c[list(order), range(3)].mean() for order in permutations(range(3)))
        assert fitted.r2_one_to_one == pytest.approx(best)
        pairs = np.corrcoef(np.concatenate([xs[:300], ys[:300]], axis=1), rowvar=False)[np.triu_indices(6, 1)]
        assert fitted.mean_squared_correlation == pytest.approx((pairs**2).mean())
        assert (cluster.canonical_correlations <= fitted.canonical_correlations + 0.1).all()


# --- the claim's arms


def test_mappings_of_the_claim_on_planted_units(rng):
    """B is a permuted copy of A, then a rotated one: which mappings reach it, and with how many predictors."""
    a, b, _ = planted(rng)
    copy = a[:, rng.permutation(15)]
    for mapping in (claims.one_to_one, claims.greedy, least_squares):
        assert mapping_quality(mapping(a, copy), a, copy, a, copy)["r2"] == pytest.approx(1)
    quality = {
        name: mapping_quality(weights, a, b, a, b)
        for name, weights in {
            "one": claims.one_to_one(a, b),
            "all": least_squares(a, b),
            "sparse": claims.sparse(a, b, share=0.9),
            "clusters": claims.clusters(a, b),
        }.items()
    }
    assert quality["one"]["correlation"] == pytest.approx(UnitMatcher().fit(a, b).score_matched_)
    assert quality["one"]["r2"] < 0.5
    assert quality["all"]["r2"] == pytest.approx(1)
    assert 2 < quality["sparse"]["predictors"] <= 3
    assert quality["sparse"]["r2"] > 0.9
    assert quality["one"]["predictors"] == quality["one"]["mapped"] == 1


def test_the_task_returns_its_metrics():
    trial = Trial(seed=1000, settings={"nets": 2, "epochs": 1, "width": 1})
    result = run_unit_mappings(claims.ONE_TO_ONE_UNTRAINED, trial)
    assert result.keys() == UNIT_MAPPINGS.metrics.keys()
    assert np.isfinite(list(result.values())).all()
    assert result["mapped"] == result["predictors"] == 1
    assert result["accuracy"] < 0.3  # the arm's epochs, not the budget's
