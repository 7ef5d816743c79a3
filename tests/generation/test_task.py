import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from counterproof.bench.task import Arm, Diverged, Trial
from counterproof.errors import UserError
from counterproof.generation import task
from counterproof.generation.task import DIGITS_DIFFUSION, describe_pictures, read_pictures

TINY = {
    **DIGITS_DIFFUSION.budgets["quick"].settings,
    "channels": (8, 8),
    "steps": 6,
    "batch": 16,
    "samples": 12,
    "evaluations": 3,
}


def trial(seed=1000, data=None, listener=None, **settings):
    return Trial(seed=seed, settings={**TINY, **settings}, data=data, listener=listener)


def paint(folder, count=70, seed=0, shape=(9, 7, 3), start=0):
    rng = np.random.default_rng(seed)
    for number in range(start, start + count):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(folder / f"{number:03}.png")
    return folder


# The user's pictures


def test_a_folder_is_described_in_one_line(tmp_path):
    paint(tmp_path)
    assert describe_pictures(tmp_path) == "70 pictures, 7x9, colour; 47 to train on, 23 held out"
    (tmp_path / "more").mkdir()
    paint(tmp_path / "more", 5, shape=(20, 30))
    (tmp_path / ".thumbs").write_text("not a picture")
    clear = np.full((4, 4, 4), 255, np.uint8)
    clear[0, 0, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    clear[0, 0, 3] = 255  # an alpha channel that hides nothing
    Image.fromarray(clear).save(tmp_path / "opaque.png")
    assert describe_pictures(tmp_path) == (
        "77 pictures, 4x4 to 30x20, colour (5 grayscale), 1 with transparency, laid on white, 1 hidden file left out; "
        "52 to train on, 25 held out"
    )


def test_pictures_come_in_order_of_name_cut_square_and_resized(tmp_path):
    paint(tmp_path, 64, shape=(8, 8))
    gray = read_pictures(tmp_path, 8)
    assert gray.shape == (64, 1, 8, 8)
    assert gray.dtype == np.uint8
    assert np.array_equal(gray[3, 0], np.asarray(Image.open(tmp_path / "003.png")))
    wide = np.zeros((6, 12, 3), np.uint8)
    wide[:, 3:9] = (10, 200, 30)  # the middle square
    wide[:, 9:] = 255
    Image.fromarray(wide).save(tmp_path / "100.png")
    pictures = read_pictures(tmp_path, 4)
    assert pictures.shape == (65, 3, 4, 4)
    assert np.array_equal(pictures[-1], np.broadcast_to(np.array([10, 200, 30])[:, None, None], (3, 4, 4)))
    assert np.array_equal(pictures[0, 0], pictures[0, 2])


def test_transparency_is_laid_on_white_and_cameras_are_turned_upright(tmp_path):
    paint(tmp_path, 64, shape=(2, 2))
    for name, mode, hidden in (("a", "RGBA", (9, 9, 9, 0)), ("b", "LA", (9, 0))):
        picture = Image.new(mode, (2, 2), hidden)
        picture.putpixel((0, 0), (*hidden[:-1], 255))
        picture.save(tmp_path / f"{name}.png")
    index = Image.new("L", (2, 2), 9)
    index.putpixel((0, 0), 8)
    index.save(tmp_path / "c.png", transparency=9)
    for picture, shown in zip(read_pictures(tmp_path, 2)[-3:], (9, 9, 8)):
        assert picture.shape == (1, 2, 2) or np.array_equal(picture[0], picture[1])
        assert picture[0].tolist() == [[shown, 255], [255, 255]]
    turned = Image.new("L", (2, 2))
    turned.putpixel((1, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "d.png", exif=exif)
    assert read_pictures(tmp_path, 2)[-1, 0].tolist() == [[0, 0], [255, 0]]


def spoil(folder, what):
    file = folder / "000.png"
    if what == "text":
        file.write_text("no picture")
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:60])
    elif what == "empty":
        file.write_bytes(b"")
    elif what == "notes":
        file = folder / "notes.txt"
        file.write_text("remember")
    elif what == "frames":
        file = folder / "moving.gif"
        frames = [Image.new("L", (4, 4), shade) for shade in (0, 255)]
        frames[0].save(file, save_all=True, append_images=frames[1:])
    elif what == "deep":
        file = folder / "deep.png"
        Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(file)
    return file


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("text", "is not a picture .*move it out"),
        ("truncated", "cannot be read: .*replace it"),
        ("empty", "is not a picture"),
        ("notes", "is not a picture"),
        ("frames", "holds 2 pictures; save each as a file of its own"),
        ("deep", "mode I;16.*8 bits a channel"),
    ],
)
def test_a_bad_file_is_named_with_the_remedy(tmp_path, what, remedy):
    file = spoil(paint(tmp_path), what)
    for read in (describe_pictures, lambda path: read_pictures(path, 8)):
        with pytest.raises(UserError, match=remedy) as caught:
            read(tmp_path)
        assert str(file) in str(caught.value)


def test_a_folder_that_is_none_is_empty_or_too_small_is_named(tmp_path):
    for path, problem in (
        (tmp_path / "absent", "is not there; name a folder"),
        (paint(tmp_path, 1) / "000.png", "is a file; name a folder"),
        (tmp_path, "holds 1 pictures; put at least 64"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            describe_pictures(path)
        assert str(path) in str(caught.value)
    (tmp_path / "000.png").unlink()
    with pytest.raises(UserError, match="holds 0 pictures"):
        describe_pictures(tmp_path)


def test_no_picture_is_both_trained_on_and_held_out_and_seeds_split_differently(tmp_path):
    splits = [task.load_pictures(trial(seed)) for seed in (1000, 1000, 1001)]
    assert [len(part) for part in splits[0]] == [1297, 500, 1297]
    assert torch.equal(splits[0].train, splits[1].train)
    assert not torch.equal(splits[0].train, splits[2].train)
    assert float(splits[0].train.min()) == -1
    assert float(splits[0].train.max()) == 1
    numbered = paint(tmp_path, 66, shape=(8, 8))
    split = task.load_pictures(trial(data=numbered))
    assert split.labels is None
    everything = torch.cat([split.train, split.held_out])
    assert len(split.held_out) == 22
    assert len(everything.unique(dim=0)) == 66
    expected = torch.tensor(read_pictures(numbered, 8) / 127.5 - 1, dtype=torch.float32)
    assert torch.equal(everything.flatten().sort().values, expected.flatten().sort().values)


# The measures


def test_energy_distance_is_the_mean_over_all_pairs_and_zero_for_a_set_with_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 1, 2, 3)), rng.normal(1, 2, size=(5, 1, 2, 3))
    flat_a, flat_b = a.reshape(7, 6), b.reshape(5, 6)
    expected = 2 * cdist(flat_a, flat_b).mean() - cdist(flat_a, flat_a).mean() - cdist(flat_b, flat_b).mean()
    assert task.energy_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    assert task.energy_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    # Two points x, y on a line, once each: 2 |x - y| - 0 - 0.
    assert task.energy_distance(torch.tensor([[1.0]]), torch.tensor([[4.0]])) == 6


def test_frechet_distance_agrees_with_the_matrix_square_root_and_the_formula_in_one_dimension():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)) + 1
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert task.frechet_distance(a, b) == pytest.approx(expected)
    assert task.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    dead = np.column_stack([a, np.zeros(50)])  # a feature that never fires
    assert task.frechet_distance(dead, np.column_stack([b, np.zeros(60)])) == pytest.approx(expected)


def test_steps_to_target_interpolates_the_first_descent_and_counts_the_budget_otherwise():
    curve = [(10, 0.5), (20, 0.3), (30, 0.4), (40, 0.1)]
    assert task.steps_to_target(curve, 0.35, 40) == pytest.approx(17.5)
    assert task.steps_to_target(curve, 0.3, 40) == pytest.approx(20)
    assert task.steps_to_target(curve, 0.2, 40) == pytest.approx(30 + 10 * 2 / 3)
    assert task.steps_to_target(curve, 0.6, 40) == 10
    assert task.steps_to_target(curve, 0.05, 40) == 40


def test_features_of_digits_tell_them_apart_and_principal_features_keep_distances():
    data = task.load_pictures(trial())
    features = task.digit_features(trial(), data)
    trained, held_out = features(data.train), features(data.held_out)
    assert trained.shape == (1297, 64)
    labels = data.labels.numpy()
    nearest = cdist(trained[300:], trained[:300]).argmin(1)
    assert np.mean(labels[:300][nearest] == labels[300:]) > 0.9
    alike = task.frechet_distance(trained, held_out)
    assert alike < 0.1 * task.frechet_distance(features(data.train.roll(2, 3)), held_out)
    principal = task.principal_features(data)(data.held_out[:20])
    assert np.allclose(cdist(principal, principal), cdist(*[data.held_out[:20].flatten(1)] * 2), atol=1e-4)


# Objectives and samplers


class Oracle(torch.nn.Module):
    """What a perfect model answers when all data are one picture."""

    def __init__(self, picture, objective):
        super().__init__()
        from diffusers import DDPMScheduler

        self.picture, self.objective = picture, objective
        self.signal = DDPMScheduler().alphas_cumprod
        self.asked = []

    def forward(self, mixed, time):
        self.asked.append(time)
        if self.objective == "flow":
            answer = (mixed - self.picture) / (time / 1000).view(-1, 1, 1, 1)
        else:
            signal = self.signal[time].view(-1, 1, 1, 1)
            answer = (mixed - signal**0.5 * self.picture) / (1 - signal) ** 0.5
        return type("Output", (), {"sample": answer})


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_training_targets_are_what_the_sampler_needs(objective):
    picture = torch.rand((1, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    oracle = Oracle(picture, objective)
    noise = torch.randn((50, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    mixed, time, target = task.mixer(objective)(picture.expand(50, -1, -1, -1), noise, torch.Generator().manual_seed(2))
    late = time > 50  # where the mix has noise enough to solve for
    assert torch.allclose(oracle(mixed, time).sample[late], target[late], atol=1e-2)
    for steps in (1, 2, 5, 20):
        oracle.asked.clear()
        samples, curvature = task.sample(oracle, noise, objective, steps)
        assert len(oracle.asked) == steps
        assert float(oracle.asked[0]) == {"flow": 1000, "epsilon": 999}[objective]  # pure noise
        assert torch.allclose(samples, picture.expand(50, -1, -1, -1), atol=1e-2)
        if objective == "flow" or steps == 1:
            assert curvature == pytest.approx(0, abs=1e-3)
        else:
            assert curvature > 0.1


def test_curvature_is_the_deviation_from_the_chord():
    """Velocity (1, 0) in the first of two steps and (0, 1) in the second: chord (1, 1) / 2, so steps twice as long are
    (1, 0) and (0, 1), each |(1/2, -1/2)|^2 = 1/2 away from the chord, whose square is 1/2."""

    class Corner(torch.nn.Module):
        def forward(self, mixed, time):
            answer = torch.zeros_like(mixed)
            answer[..., 0 if time > 600 else 1] = 1.0
            return type("Output", (), {"sample": answer})

    samples, curvature = task.sample(Corner(), torch.zeros(3, 1, 1, 2), "flow", 2)
    assert samples.flatten(1).tolist() == [[-0.5, -0.5]] * 3
    assert curvature == pytest.approx(1.0)


# The run


def unchanged(images, noise, *, generator):
    """A deal that draws for itself and changes nothing."""
    torch.randn(3, generator=generator)
    assert -1 <= float(images.min()) <= float(images.max()) <= 1
    return noise


def broken(images, noise, *, generator):
    return noise * torch.inf


def swapped(images, noise, *, generator, shift):
    return noise.roll(shift, 0)


def metrics(arm, **given):
    found = dict(task.run_digits_diffusion(arm, trial(**given)))
    assert set(found) == set(DIGITS_DIFFUSION.metrics)
    assert all(np.isfinite(value) for value in found.values())
    assert found.pop("train_seconds") > 0
    return found


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_arms_differ_by_the_deal_alone(tmp_path, objective):
    points = []
    given = {"objective": objective, "data": paint(tmp_path, 64, shape=(8, 8))}
    plain = metrics(Arm("plain"), listener=points.append, **given)
    assert metrics(Arm("same", f"{__name__}:unchanged"), **given) == plain
    assert metrics(Arm("other", f"{__name__}:swapped", {"shift": 1}), **given) != plain
    assert metrics(Arm("plain"), seed=1001, **given) != plain
    measured = [point for point in points if "energy_5" in point]
    assert [point["step"] for point in measured] == [2, 4, 6]
    assert measured[-1]["energy_5"] == plain["energy_5"]
    assert [point["progress"] for point in points] == sorted(point["progress"] for point in points)


def test_a_model_that_breaks_is_a_divergence(tmp_path):
    with pytest.raises(Diverged, match="not finite"):
        task.run_digits_diffusion(Arm("broken", f"{__name__}:broken"), trial(data=paint(tmp_path, 64)))


def test_a_users_folder_runs_in_colour_with_attention(tmp_path):
    metrics(Arm("plain"), data=paint(tmp_path, 64), size=16, attention=True)


def test_training_brings_samples_nearer_to_the_data():
    found = [metrics(Arm("plain"), steps=steps, batch=64, samples=100, channels=(8, 16)) for steps in (3, 60)]
    assert found[1]["energy_20"] < 0.3 * found[0]["energy_20"]
    assert found[1]["frechet_20"] < 0.6 * found[0]["frechet_20"]


def test_the_target_is_met_by_a_gaussian_and_missed_by_noise_and_every_budget_names_the_same_settings():
    yardstick = task.Yardstick(trial(samples=300), data := task.load_pictures(trial()))
    assert task.energy_distance(data.train[:300], data.held_out) < 0.5 * yardstick.gaussian()
    assert task.energy_distance(yardstick.start.clamp(-1, 1), data.held_out) > 10 * yardstick.gaussian()
    names = [sorted(budget.settings) for budget in DIGITS_DIFFUSION.budgets.values()]
    assert names[0] == names[1] == names[2]
