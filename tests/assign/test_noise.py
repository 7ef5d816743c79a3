"""Samples to noise: exact on the rounded distances, near the optimum on the true ones, whatever the scale."""

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from counterproof.assign import quantized_assignment
from counterproof.assign.noise import _round


def data(rng, name, n):
    noise_shape = (n, 16)
    if name == "narrow":
        return rng.normal(size=(n, 16)) * 0.5, rng.normal(size=noise_shape)
    if name == "wide":
        return rng.normal(size=(n, 16)) * 5, rng.normal(size=noise_shape)
    if name == "clusters":
        return rng.normal(size=(4, 16))[rng.integers(4, size=n)] + 0.1, rng.normal(size=noise_shape)
    if name == "heavy":
        return rng.standard_t(2, size=(n, 16)), rng.normal(size=noise_shape)
    if name == "flat":
        return np.sign(rng.normal(size=(n, 2))), rng.normal(size=(n, 2))
    assert name == "equal"
    return np.full((n, 16), 0.3), rng.normal(size=noise_shape)


NAMES = ["narrow", "wide", "clusters", "heavy", "flat", "equal"]


def as_half(distance):
    """The definition: scaled so that nothing over- or underflows, cast to float16."""
    scale = 2.0 ** np.floor(np.log2(distance.max()))
    return (distance / scale).astype(np.float16).astype(np.float64) * scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 30, 150])
def test_exact_on_rounded_and_close_on_true_distances(rng, name, n):
    x, noise = data(rng, name, n)
    distance = cdist(x, noise)
    perm = quantized_assignment(x, noise)
    assert perm.dtype == np.int64
    np.testing.assert_array_equal(np.sort(perm), np.arange(n))
    rounded = as_half(distance)
    best = rounded[linear_sum_assignment(rounded)].sum()
    # float32 distances may round the other way where the exact one lies on the edge
    assert rounded[np.arange(n), perm].sum() == pytest.approx(best, rel=1e-5)
    assert distance[np.arange(n), perm].sum() <= distance[linear_sum_assignment(distance)].sum() * (1 + 1e-3)


def test_rounding_is_that_of_a_cast():
    """Every float16 and every midpoint between two of them, where ties go to even."""
    halves = np.arange(0x0400, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)  # normal numbers
    values = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, halves[1:] - np.spacing(halves[1:]) * 99])
    rounded = values.copy()
    _round(rounded, 11)
    np.testing.assert_array_equal(rounded, values.astype(np.float16).astype(np.float32))
    _round(values, 24)
    assert len(np.unique(values)) > 2.9 * len(halves)


@pytest.mark.parametrize("norm", [1, 2])
def test_brute_force(rng, norm):
    x, noise = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 3))
    distance = np.array([[(np.abs(a - b) ** norm).sum() ** (1 / norm) for b in noise] for a in x])
    best = min(permutations(range(6)), key=lambda p: distance[range(6), p].sum())
    np.testing.assert_array_equal(quantized_assignment(x, noise, norm=norm, dtype="float32"), best)


@pytest.mark.parametrize(("dtype", "excess"), [("float32", 1e-6), ("float16", 1e-4), ("bfloat16", 1e-3)])
def test_precision(rng, dtype, excess):
    x, noise = rng.normal(size=(200, 64)) * 0.5, rng.normal(size=(200, 64))
    distance = cdist(x, noise)
    least = distance[linear_sum_assignment(distance)].sum()
    achieved = distance[np.arange(200), quantized_assignment(x, noise, dtype)].sum()
    assert least - 1e-9 <= achieved <= least * (1 + excess)
    assert achieved < 0.95 * np.trace(distance)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-6, 1.0, 1e3, 1e6, 1e30, 1e300])
def test_scale_does_not_matter(rng, scale):
    x, noise = rng.normal(size=(80, 5)), rng.normal(size=(80, 5))
    distance = cdist(x, noise)
    perm = quantized_assignment(x * scale, noise * scale)
    least = distance[linear_sum_assignment(distance)].sum()
    assert distance[np.arange(80), perm].sum() <= least * (1 + 1e-3)


def test_squares_beyond_float16_do_not_overflow(rng):
    x, noise = rng.normal(size=(70, 8)) * 1e3, rng.normal(size=(70, 8))
    distance = cdist(x, noise)
    achieved = distance[np.arange(70), quantized_assignment(x.astype(np.float16), noise.astype(np.float16))].sum()
    assert achieved <= distance[linear_sum_assignment(distance)].sum() * (1 + 1e-3)


def test_dealing_is_undone_by_shuffling(rng):
    """A batch that is its own noise, shuffled: everyone finds itself, and shuffling once more changes nothing else."""
    x = rng.normal(size=(100, 10))
    shuffle = rng.permutation(100)
    np.testing.assert_array_equal(shuffle[quantized_assignment(x, x[shuffle])], np.arange(100))
    noise = rng.normal(size=(100, 10))
    straight = noise[quantized_assignment(x, noise, "float32")]
    np.testing.assert_array_equal(noise[shuffle][quantized_assignment(x, noise[shuffle], "float32")], straight)
    np.testing.assert_array_equal(noise[quantized_assignment(x[shuffle], noise, "float32")], straight[shuffle])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64"])
@pytest.mark.parametrize("norm", [1, 2])
def test_tensors(rng, dtype, norm):
    torch = pytest.importorskip("torch")
    x = (torch.from_numpy(rng.normal(size=(70, 3, 4))) * 8).to(getattr(torch, dtype))
    noise = torch.from_numpy(rng.normal(size=(70, 3, 4))).to(x.dtype)
    if x.is_floating_point():
        x.requires_grad_()
    before = x.detach().clone(), noise.clone()
    perm = quantized_assignment(x, noise, torch.float16, norm)
    assert perm.dtype == torch.int64
    assert not perm.requires_grad
    a, b = (t.detach().double().numpy().reshape(70, -1) for t in (x, noise))
    distance = cdist(a, b, "cityblock" if norm == 1 else "euclidean")
    least = distance[linear_sum_assignment(distance)].sum()
    assert distance[np.arange(70), perm.numpy()].sum() <= least * (1 + 1e-3)
    assert torch.equal(x, before[0])
    assert torch.equal(noise, before[1])


def test_same_answer_every_time_and_dtype_spellings(rng):
    x, noise = rng.normal(size=(90, 7)), rng.normal(size=(90, 7))
    first = quantized_assignment(x, noise)
    for dtype in ("float16", np.float16, np.dtype("float16")):
        np.testing.assert_array_equal(quantized_assignment(x, noise, dtype), first)


def test_lapx(rng):
    pytest.importorskip("lap")
    for name in NAMES:
        x, noise = data(rng, name, 120)
        distance = as_half(cdist(x, noise))
        total = distance[np.arange(120), quantized_assignment(x, noise, backend="lapx")].sum()
        assert total == pytest.approx(distance[linear_sum_assignment(distance)].sum(), rel=1e-5)


def test_nothing_and_one():
    assert quantized_assignment(np.empty((0, 3)), np.empty((0, 3))).shape == (0,)
    assert quantized_assignment(np.ones((1, 3)), np.zeros((1, 3))).tolist() == [0]
    assert quantized_assignment(np.zeros((3, 2)), np.zeros((3, 2))).tolist() == [0, 1, 2]


X = np.ones((2, 3))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: quantized_assignment(X, np.ones((3, 3))), r"differ in size: \(2, 3\) and \(3, 3\)"),
        (ValueError, lambda: quantized_assignment(X, np.ones((2, 4))), "differ in size"),
        (ValueError, lambda: quantized_assignment(X, X * np.nan), "noise holds NaN or infinity"),
        (ValueError, lambda: quantized_assignment(np.array([[1.0, -np.inf, 1]] * 2), X), "x holds NaN or infinity"),
        (ValueError, lambda: quantized_assignment(X, X, "int8"), "dtype is 'int8'; expected one of float16, bfloat16"),
        (ValueError, lambda: quantized_assignment(X, X, norm=3), "norm is 3; expected 1 or 2"),
        (ValueError, lambda: quantized_assignment(X, X, backend="lap"), "backend is 'lap'"),
        (ValueError, lambda: quantized_assignment(np.array(1.0), X), "x is a single number"),
        (TypeError, lambda: quantized_assignment(X.astype(complex), X), "x has dtype complex128"),
    ],
)
def test_bad_input_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_arrays_and_tensors_do_not_mix():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="noise is a ndarray, the other a tensor"):
        quantized_assignment(torch.ones(2, 3), X)
