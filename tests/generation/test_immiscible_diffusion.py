import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from counterproof.generation import ImmiscibleNoise, immiscible_noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, shape=(1, 4, 4), seed=1):
    """Clustered values in [-1, 1], so that some noise is nearer than other."""
    draws = generator(seed)
    centres = torch.rand((5, *shape), generator=draws) * 2 - 1
    picked = centres[torch.randint(5, (count,), generator=draws)]
    return (picked + 0.1 * torch.randn((count, *shape), generator=draws)).clamp(-1, 1)


def normal(like, seed=2):
    return torch.randn(like.shape, generator=generator(seed), dtype=like.dtype)


def costs(images, noise, norm=2):
    return cdist(images.flatten(1).double(), noise.flatten(1).double(), {1: "cityblock", 2: "euclidean"}[norm])


def total(images, noise, norm=2):
    return float(torch.linalg.vector_norm((images - noise).flatten(1).double(), norm, dim=1).sum())


# The assignment


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_small_batches_get_the_least_total_distance_of_all_permutations(count, norm):
    for seed in range(5):
        images = pictures(count, seed=seed)
        noise = normal(images, seed)
        cost = costs(images, noise, norm)
        best = min(cost[range(count), order].sum() for order in itertools.permutations(range(count)))
        dealt = immiscible_noise(images, noise, norm=norm, dtype="float32")
        assert total(images, dealt, norm) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("norm", [1, 2])
def test_a_large_batch_gets_scipys_optimum_and_the_same_noise_in_another_order(norm):
    images = pictures(200)
    noise = normal(images)
    dealt, indices = immiscible_noise(images, noise, norm=norm, dtype="float32", return_indices=True)
    cost = costs(images, noise, norm)
    rows, columns = linear_sum_assignment(cost)
    assert total(images, dealt, norm) == pytest.approx(cost[rows, columns].sum(), rel=1e-6)
    assert total(images, dealt, norm) < 0.97 * total(images, noise, norm)
    assert sorted(indices.tolist()) == list(range(200))
    assert indices.dtype == torch.int64
    assert torch.equal(dealt, noise[indices])


@pytest.mark.parametrize("norm", [1, 2])
def test_on_a_line_the_optimum_pairs_sorted_with_sorted(norm):
    images, noise = torch.linspace(-1, 1, 50)[torch.randperm(50, generator=generator())], normal(torch.empty(50))
    dealt = immiscible_noise(images, noise, norm=norm, dtype="float32")
    monotone = (images.sort().values - noise.sort().values).abs().sum()
    assert float((images - dealt).abs().sum()) == pytest.approx(float(monotone), rel=1e-5)


@pytest.mark.parametrize("norm", [1, 2])
def test_the_pairs_do_not_depend_on_the_order_of_images_or_noise(norm):
    images = pictures(40)
    noise = normal(images)
    dealt = immiscible_noise(images, noise, norm=norm, dtype="float32")
    order = torch.randperm(40, generator=generator())
    assert torch.equal(immiscible_noise(images[order], noise, norm=norm, dtype="float32"), dealt[order])
    assert torch.equal(immiscible_noise(images, noise[order], norm=norm, dtype="float32"), dealt)


def test_shifting_all_images_changes_the_pairs_and_far_away_leaves_the_squared_distance_across_the_shift():
    """|x + c - n| = |c| + u.(x - n) + |x - n across u|^2 / (2 |c|) + ..., u = c / |c|; the middle term has the same
    sum for every permutation. Distances that were squared would give the same pairs for every shift."""
    images = pictures(7, (3,), seed=4)
    noise = normal(images, 5)
    towards = torch.tensor([1.0, 2.0, 2.0]) / 3
    across = [values - (values @ towards)[:, None] * towards for values in (images, noise)]
    squared = costs(*across) ** 2
    best = min(squared[range(7), order].sum() for order in itertools.permutations(range(7)))
    _, near = immiscible_noise(images, noise, dtype="float32", return_indices=True)
    _, far = immiscible_noise(images + 100 * towards, noise, dtype="float32", return_indices=True)
    assert squared[range(7), far.numpy()].sum() == pytest.approx(best, rel=0.01)
    assert squared[range(7), near.numpy()].sum() > 1.01 * best
    assert total(images, noise[near]) < total(images, noise[far])


def test_equal_images_and_duplicates_are_fine():
    images = torch.full((16, 1, 4, 4), 0.3)
    noise = normal(images)
    dealt, indices = immiscible_noise(images, noise, return_indices=True)
    assert sorted(indices.tolist()) == list(range(16))
    assert total(images, dealt) == pytest.approx(total(images, noise), rel=1e-6)
    twins = pictures(8).repeat(2, 1, 1, 1)
    _, indices = immiscible_noise(twins, normal(twins), return_indices=True)
    assert sorted(indices.tolist()) == list(range(16))


def test_a_single_image_keeps_its_noise_and_the_reader_is_told_once():
    image = pictures(1)
    noise = normal(image)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            assert torch.equal(immiscible_noise(image, noise), noise)
    assert [warning.filename for warning in caught] == [__file__]
    assert "knn" in str(caught[0].message)
    assert immiscible_noise(image[:0], noise[:0]).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("dtype", ["float16", torch.float16, "bfloat16"])
def test_rounding_the_distances_costs_next_to_nothing_and_nothing_overflows(dtype, scale):
    images = scale * pictures(128, (4, 16, 16))
    noise = scale * normal(images)
    exact = total(images, immiscible_noise(images, noise, dtype="float32"))
    rounded = total(images, immiscible_noise(images, noise, dtype=dtype))
    assert exact <= rounded * (1 + 1e-6)
    assert rounded < exact * (1 + (1e-3 if "16" in str(dtype) and "b" not in str(dtype) else 1e-2))
    assert rounded < total(images, noise)


# The noise that comes out


def digits():
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]


def rejected(noise, level=0.01):
    """Pixels whose values a Kolmogorov-Smirnov test tells from N(0, 1), at a level for all pixels together."""
    pixels = noise.flatten(1).numpy().T
    return sum(stats.kstest(pixel, "norm").pvalue < level / len(pixels) for pixel in pixels)


def test_linear_keeps_the_noise_normal_and_ties_it_to_the_image_and_the_nearest_of_k_does_not_keep_it_normal():
    data, draws = digits(), generator()
    batches = [data[torch.randperm(len(data), generator=draws)[:64]] for _ in range(200)]
    raw = [torch.randn(batch.shape, generator=draws) for batch in batches]
    linear = torch.cat([immiscible_noise(*pair) for pair in zip(batches, raw)])
    nearest = torch.cat([immiscible_noise(*pair, method="knn", k=4, generator=draws) for pair in zip(batches, raw)])
    images, raw = torch.cat(batches), torch.cat(raw)
    count = len(images)
    assert rejected(linear) == 0
    assert rejected(nearest) > 32
    # For all 64 pixels at once: the squared norm of the mean and the pooled variance of N(0, 1) noise.
    for noise, is_normal in ((linear, True), (nearest, False)):
        mean_is_zero = stats.chi2.sf(count * float(noise.mean(0).square().sum()), 64) > 0.001
        variance_is_one = abs(float(noise.var(0).mean()) - 1) < 4 * (2 / (64 * count)) ** 0.5
        assert (mean_is_zero, variance_is_one) == (is_normal, is_normal)
    assert float(nearest.std(0).mean()) == pytest.approx(0.943, abs=0.01)

    def covariance(noise):
        return float(((images - images.mean(0)) * noise).sum((1, 2, 3)).mean())

    spread = float((images - images.mean(0)).flatten(1).norm(dim=1).square().mean() / count) ** 0.5
    assert abs(covariance(raw)) < 4 * spread
    assert covariance(linear) > 30 * spread
    assert covariance(nearest) > 30 * spread


def test_one_candidate_is_plain_noise_bit_for_bit():
    images = pictures(10)
    expected = torch.randn(images.shape, generator=generator(3))
    assert torch.equal(immiscible_noise(images, method="knn", k=1, generator=generator(3)), expected)
    assert torch.equal(immiscible_noise(images, expected, method="knn", k=1), expected)
    linear, indices = immiscible_noise(images, generator=generator(3), return_indices=True)
    assert torch.equal(linear, expected[indices])


@pytest.mark.parametrize("norm", [1, 2])
def test_knn_takes_the_nearest_of_all_candidates(norm):
    images, k = pictures(30), 6
    first = normal(images)
    draws = generator(3)
    candidates = torch.stack([first, *(torch.randn(images.shape, generator=draws) for _ in range(k - 1))])
    distances = np.stack([np.diag(costs(images, candidate, norm)) for candidate in candidates])
    dealt, indices = immiscible_noise(
        images, first, method="knn", k=k, norm=norm, generator=generator(3), return_indices=True
    )
    assert indices.tolist() == distances.argmin(0).tolist()
    assert torch.equal(dealt, candidates[indices, torch.arange(30)])


@pytest.mark.parametrize("method", ["linear", "knn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_stay_dtype_stays_no_gradient_flows_and_the_same_generator_repeats(method, dtype):
    images = pictures(12).to(dtype).requires_grad_()
    noise = normal(pictures(12)).to(dtype).requires_grad_()
    before = images.detach().clone(), noise.detach().clone()
    state = torch.get_rng_state()
    dealt = immiscible_noise(images, noise, method=method, generator=generator())
    assert dealt.dtype == dtype
    assert dealt.shape == images.shape
    assert not dealt.requires_grad
    assert torch.equal(images, before[0])
    assert torch.equal(noise, before[1])
    assert torch.equal(immiscible_noise(images, noise, method=method, generator=generator()), dealt)
    assert immiscible_noise(images, method=method, generator=generator()).dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)
    dealt[0] = 7
    assert torch.equal(noise, before[1])


# What it does to diffusion, in two dimensions


@pytest.fixture(scope="module")
def corners():
    """Points around four corners, and for each its noise: as drawn, and dealt in batches of 64."""
    draws = generator()
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])

    def data(count):
        picked = centres[torch.randint(4, (count,), generator=draws)]
        return picked + 0.3 * torch.randn((count, 2), generator=draws)

    images = data(300 * 64)
    noise = torch.randn(images.shape, generator=draws)
    dealt = torch.cat([immiscible_noise(*pair, dtype="float32") for pair in zip(images.split(64), noise.split(64))])
    return images.numpy(), noise.numpy(), dealt.numpy(), data(2000).numpy()


def crossings(images, noise):
    """Share of pairs of straight segments, image to noise, that cross."""

    def side(a, b, c):
        return np.sign(np.cross(np.pad(b - a, ((0, 0), (0, 1))), np.pad(c - a, ((0, 0), (0, 1))))[:, 2])

    i, j = np.triu_indices(len(images), 1)
    a, b, c, d = images[i], noise[i], images[j], noise[j]
    return np.mean((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0))


def test_segments_of_least_total_length_never_cross(corners):
    """By the triangle inequality, uncrossing two segments makes them shorter."""
    images, noise, dealt, _ = (part[:256] for part in corners)
    assert crossings(images, noise) > 0.1
    for start in range(0, 256, 64):
        assert crossings(images[start : start + 64], dealt[start : start + 64]) == 0
    assert crossings(images, dealt) < 0.3 * crossings(images, noise)


def energy(a, b):
    return (
        2 * cdist(a, b).mean()
        - cdist(a, a).sum() / (len(a) * (len(a) - 1))
        - cdist(b, b).sum() / (len(b) * (len(b) - 1))
    )


def neighbours(images, noise, level, points, count):
    """Pairs whose mix at a level (0 image, 1 noise) lies nearest to each point: draws from (image, noise | mix)."""
    _, found = cKDTree((1 - level) * images + level * noise).query(points, count)
    return found


def flow(images, noise, start, steps):
    """Euler's method on the exact velocity E[noise - image | mix], by nearest neighbours among all pairs."""
    points = start.copy()
    for step in range(steps):
        found = neighbours(images, noise, 1 - step / steps, points, 48)
        points -= (noise - images)[found].mean(1) / steps
    return points


def test_the_flow_of_dealt_noise_still_ends_in_the_data_and_needs_fewer_steps(corners):
    images, noise, dealt, held_out = corners
    start = np.random.default_rng(0).standard_normal((2000, 2))
    floor = 0.02
    assert abs(energy(images[:2000], held_out)) < floor / 2
    assert energy(start, held_out) > 20 * floor
    assert energy(flow(images, dealt, start, 25), held_out) < floor
    few = {name: energy(flow(images, pairs, start, 3), held_out) for name, pairs in (("raw", noise), ("dealt", dealt))}
    assert few["dealt"] < 0.3 * few["raw"]


def test_a_sampler_that_adds_noise_is_exact_for_random_noise_only(corners):
    """Draw an image given the mix, mix it with fresh noise at the next level, and so on: exact while noise says nothing
    about the image."""
    images, noise, dealt, held_out = corners
    ends = {}
    for name, pairs in (("raw", noise), ("dealt", dealt)):
        rng = np.random.default_rng(0)
        points = rng.standard_normal((2000, 2))
        for level in (1.0, 0.8, 0.6, 0.4, 0.2):
            drawn = neighbours(images, pairs, level, points, 48)[np.arange(2000), rng.integers(48, size=2000)]
            points = (1.2 - level) * images[drawn] + (level - 0.2) * rng.standard_normal((2000, 2))
        ends[name] = energy(points, held_out)
    assert ends["raw"] < 0.02
    assert ends["dealt"] > 3 * max(ends["raw"], 0.01)


# The sampler for loops


def test_without_options_the_sampler_is_the_function():
    images = pictures(20)
    sampler = ImmiscibleNoise(generator=generator())
    assert sampler.stats is None
    assert torch.equal(sampler(images), immiscible_noise(images, generator=generator()))
    noise = normal(images)
    dealt = sampler(images, noise)
    assert torch.equal(dealt, immiscible_noise(images, noise))
    assert sampler.stats.distance_before == pytest.approx(total(images, noise) / 20, rel=1e-5)
    assert sampler.stats.distance_after == pytest.approx(total(images, dealt) / 20, rel=1e-5)
    assert sampler.stats.milliseconds > 0
    nearest = ImmiscibleNoise(method="knn", k=8, norm=1, generator=generator())
    assert torch.equal(nearest(images), immiscible_noise(images, method="knn", k=8, norm=1, generator=generator()))
    assert nearest.stats.distance_after < nearest.stats.distance_before


@pytest.mark.parametrize("norm", [1, 2])
def test_a_buffer_deals_every_noise_of_a_cycle_once_each_batch_taking_the_best_of_what_is_left(norm):
    images = pictures(24)
    sampler = ImmiscibleNoise(buffer=4, dtype="float32", norm=norm, generator=generator())
    pool = torch.randn(images.shape, generator=generator())
    left, before = list(range(24)), 0.0
    for batch in images.split(6):
        dealt = sampler(batch)
        cost = costs(batch, pool[left], norm)
        rows, columns = linear_sum_assignment(cost)
        assert torch.equal(dealt, pool[[left[column] for column in columns]])
        left = [number for place, number in enumerate(left) if place not in columns]
        before += sampler.stats.distance_before / 4
        assert sampler.stats.distance_after == pytest.approx(cost[rows, columns].mean(), rel=1e-5)
    assert not left
    assert before == pytest.approx(total(images, pool, norm) / 24, rel=1e-5)
    again = sampler(images[:6])
    assert not (again.flatten(1)[:, None] == pool.flatten(1)).all(2).any()


def test_a_buffer_helps_single_images_and_keeps_their_noise_normal():
    data, draws = digits()[:640], generator()
    sampler = ImmiscibleNoise(buffer=64, generator=generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = torch.cat([sampler(image[None]) for image in data])
    drawn = torch.cat([torch.randn((64, 1, 8, 8), generator=draws) for _ in range(10)])
    assert torch.equal(noise.flatten().sort().values, drawn.flatten().sort().values)
    assert total(data, noise) < 0.96 * total(data, drawn)


def test_batches_of_a_buffer_may_shrink_and_grow():
    sampler = ImmiscibleNoise(buffer=2, generator=generator())
    dealt = torch.cat([sampler(pictures(count)) for count in (4, 3, 5, 2, 2)])
    draws = generator()
    expected = [torch.randn((count, 1, 4, 4), generator=draws) for count in (8, 4, 4)]  # 4 are missing at the third
    assert torch.equal(dealt.flatten().sort().values, torch.cat(expected).flatten().sort().values)
    with pytest.raises(ValueError, match="one ImmiscibleNoise for each shape"):
        sampler(pictures(4, (1, 8, 8)))
    with pytest.raises(ValueError, match="draws its own noise"):
        sampler(pictures(4), normal(pictures(4)))


# Several processes


RANK = """
import os, sys
import torch
from torch import distributed
from counterproof.generation import ImmiscibleNoise

rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
images, noise = torch.load(f"{folder}/given.pt")[rank]
world = ImmiscibleNoise(gather=distributed.group.WORLD)
result = {"world": world(images, noise), "after": world.stats.distance_after}
result["lone"] = world(images[: 4 * rank], noise[: 4 * rank])
pooled = ImmiscibleNoise(gather=distributed.group.WORLD, buffer=3, generator=torch.Generator().manual_seed(rank))
result["pooled"] = torch.cat([pooled(batch) for batch in (images, images[:4], images)])
try:
    world(images / (1 - rank), noise)
except ValueError as problem:
    result["error"] = str(problem)
try:
    from accelerate import Accelerator
except ImportError:
    result["accelerate"] = result["world"]
else:
    result["accelerate"] = ImmiscibleNoise(gather=Accelerator(cpu=True))(images, noise)
torch.save(result, f"{folder}/{rank}.pt")
distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort an interpreter that winds up
"""


def test_two_processes_with_unequal_batches_deal_as_one_process_with_both(tmp_path):
    sizes = [5, 9]
    images = pictures(14)
    noise = normal(images)
    torch.save(list(zip(images.split(sizes), noise.split(sizes))), tmp_path / "given.pt")
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = immiscible_noise(images, noise)
    for name in ("world", "accelerate"):
        assert torch.equal(torch.cat([result[name] for result in results]), expected)
    for part, dealt, result in zip(images.split(sizes), expected.split(sizes), results):
        assert result["after"] == pytest.approx(total(part, dealt) / len(part), rel=1e-5)
    assert results[0]["lone"].shape == (0, 1, 4, 4)
    assert torch.equal(results[1]["lone"], immiscible_noise(images[5:9], noise[5:9]))
    assert [result["error"] for result in results] == ["images holds NaN or infinity; such values have no distance"] * 2
    # The processes' pools are one pool: any of them may use any of it, and nothing of it is used twice.
    pools = [torch.randn((3 * size, 1, 4, 4), generator=generator(rank)) for rank, size in enumerate(sizes)]
    used = torch.cat([result["pooled"] for result in results])
    matches = (used.flatten(1)[:, None] == torch.cat(pools).flatten(1)).all(2)
    assert matches.sum(1).eq(1).all()
    assert matches.sum(0).le(1).all()


def test_a_single_process_needs_no_process_group():
    class Alone:
        num_processes = 1

    images = pictures(6)
    noise = normal(images)
    assert torch.equal(ImmiscibleNoise(gather=Alone())(images, noise), immiscible_noise(images, noise))
    Alone.num_processes = 2
    with pytest.raises(RuntimeError, match="torchrun"):
        ImmiscibleNoise(gather=Alone())(images)


# Errors


IMAGES = torch.zeros(4, 1, 2, 2)


@pytest.mark.parametrize(
    ("images", "noise", "settings", "problem"),
    [
        (IMAGES, torch.zeros(3, 1, 2, 2), {}, r"images are \(4, 1, 2, 2\), noise is \(3, 1, 2, 2\)"),
        (IMAGES, torch.zeros(4, 4), {}, "same shape"),
        (IMAGES / 0, IMAGES, {}, "images holds NaN or infinity"),
        (IMAGES, IMAGES - torch.inf, {}, "noise holds NaN or infinity"),
        (IMAGES / 0, IMAGES, {"method": "knn"}, "images holds NaN or infinity"),
        (IMAGES, IMAGES, {"method": "knn", "k": 0}, "k is 0"),
        (IMAGES, IMAGES, {"method": "knn", "k": 2.5}, "k is 2.5"),
        (IMAGES, IMAGES, {"method": "sinkhorn"}, "'sinkhorn'; expected 'linear' or 'knn'"),
        (IMAGES, IMAGES, {"norm": 3}, "norm is 3; expected 1 or 2"),
        (IMAGES, IMAGES, {"dtype": "int8"}, "int8"),
        (torch.zeros(8193, 1), torch.zeros(8193, 1), {}, r"8193 images.*O\(B\^3\).*knn"),
        (IMAGES, IMAGES.to("meta"), {}, "images are on cpu, noise is on meta"),
        (torch.tensor(1.0), None, {}, "single number"),
    ],
)
def test_bad_values_are_named_with_the_remedy(images, noise, settings, problem):
    with pytest.raises(ValueError, match=problem):
        immiscible_noise(images, noise, **settings)


def test_pictures_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match=r"images has dtype torch\.uint8"):
        immiscible_noise(IMAGES.byte(), IMAGES)
    with pytest.raises(TypeError, match=r"noise has dtype torch\.int64"):
        immiscible_noise(IMAGES, IMAGES.long())
    with pytest.raises(TypeError, match="images is a ndarray"):
        immiscible_noise(IMAGES.numpy(), IMAGES)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"buffer": 0}, "buffer is 0"),
        ({"method": "knn", "buffer": 2}, "leave out gather and buffer"),
        ({"method": "nearest"}, "'nearest'"),
        ({"norm": 0}, "norm is 0"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_bad_options_of_the_sampler_are_named(settings, problem):
    with pytest.raises(ValueError, match=problem):
        ImmiscibleNoise(**settings)
    with pytest.raises(TypeError, match="Accelerator"):
        ImmiscibleNoise(gather="all")
