"""The training loop: its schedule, averages, resumption to the bit, and what it says when it cannot go on."""

import numpy as np
import pytest
import torch
from torch import nn

from counterproof.detection.batches import Batches, Pixels, scene_data
from counterproof.detection.scenes import draw_scenes
from counterproof.detection.tiny import tiny_detector
from counterproof.detection.training import Recipe, Trainee, fit
from counterproof.errors import UserError


@pytest.fixture(scope="module")
def batches():
    scenes = draw_scenes(12, np.random.default_rng(0), side=32)
    return Batches(scene_data(scenes), 2, Pixels(), seed=0)


def trainee(seed=0, **config):
    model = tiny_detector("deformable", seed=seed, channels=(8, 16), width=32, num_queries=6, **config)
    return Trainee(model, model, lambda: model)


def in_double(one):
    """Where a gradient is nearly 0 Adam makes much of its rounding."""

    def wide(_, args, kwargs):
        labels = [{**target, "boxes": target["boxes"].double()} for target in kwargs["labels"]]
        return args, {**kwargs, "pixel_values": kwargs["pixel_values"].double(), "labels": labels}

    one.module.double().register_forward_pre_hook(wide, with_kwargs=True)
    return one


def weights(one):
    return torch.cat([parameter.detach().flatten() for parameter in one.module.parameters()])


def test_a_step_is_adamw_on_the_clipped_gradient(batches):
    ours, theirs = in_double(trainee()), in_double(trainee())
    recipe = Recipe(steps=3, learning_rate=1e-2, warmup=2, decay=0.5, clip=0.05, weight_decay=0.1, backbone_rate=0.5)
    fit(ours, batches, recipe, seed=0)
    groups = [
        {
            "params": [
                parameter
                for name, parameter in theirs.module.named_parameters()
                if ("backbone" in name) == backbone and (parameter.dim() > 1) == wide
            ],
            "weight_decay": 0.1 if wide else 0.0,
        }
        for backbone in (True, False)
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    theirs.module.train()
    for step, rate in enumerate((0.005, 0.01, 0.01 * (1 - 2 / 3) / 0.5)):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = rate * (0.5 if number < 2 else 1.0)
        optimizer.zero_grad()
        theirs.module(**batches[step]).loss.backward()
        nn.utils.clip_grad_norm_(theirs.module.parameters(), 0.05)
        optimizer.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


def test_the_schedule_rises_stays_and_falls():
    recipe = Recipe(steps=100, warmup=10, decay=0.4)
    assert recipe.factor(0, 0.0) == pytest.approx(0.1)
    assert recipe.factor(30, 0.3) == 1
    assert recipe.factor(80, 0.8) == pytest.approx(0.5)
    assert recipe.factor(100, 1.0) == 0
    assert Recipe(decay=0).factor(99, 1.0) == 1


def test_averaged_weights_are_the_moving_average_and_are_what_is_looked_at(batches):
    plain, averaged = trainee(), trainee()
    path = [weights(plain)]
    fit(plain, batches, Recipe(steps=4), seed=0, watch=lambda step, share, loss: path.append(weights(plain)))
    seen = []
    fit(
        averaged,
        batches,
        Recipe(steps=4, ema=0.3),
        seed=0,
        looks=(0.5, 1.0),
        look=lambda step, share: seen.append((step, share, weights(averaged), averaged.module.training)),
    )
    expected, states = path[0], []
    for step in range(4):
        keep = min(0.3, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * path[step + 1]
        states.append(expected)
    assert [(step, share, mode) for step, share, _, mode in seen] == [(2, 0.5, False), (4, 1.0, False)]
    torch.testing.assert_close(seen[0][2], states[1])
    torch.testing.assert_close(weights(averaged), states[3])
    assert not averaged.module.training


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_an_interrupted_training_goes_on_to_the_same_bits(batches, tmp_path, ema):
    recipe = Recipe(steps=6, ema=ema)
    whole = trainee(dropout=0.1)
    fit(whole, batches, recipe, seed=3)

    class Killed(BaseException):
        pass

    def kill(step, share, loss):
        if step == 5:
            raise Killed

    first = trainee(dropout=0.1)
    with pytest.raises(Killed):
        fit(first, batches, recipe, seed=3, watch=kill, checkpoint=tmp_path / "state", every=2)
    second = trainee(seed=9, dropout=0.1)  # other weights: all must come from the file
    steps = []
    fit(second, batches, recipe, seed=3, checkpoint=tmp_path / "state", watch=lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    assert torch.equal(weights(second), weights(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_a_finished_training_is_not_trained_again(batches, tmp_path):
    one = trainee()
    fit(one, batches, Recipe(steps=2), seed=0, checkpoint=tmp_path / "state")
    before = weights(one)
    assert fit(one, batches, Recipe(steps=2), seed=0, checkpoint=tmp_path / "state") == 2
    assert torch.equal(weights(one), before)


def test_a_checkpoint_of_another_training_is_refused(batches, tmp_path):
    fit(trainee(), batches, Recipe(steps=2), seed=0, checkpoint=tmp_path / "state")
    with pytest.raises(UserError, match=r"learning_rate 0\.001 then, 0\.1 now"):
        fit(trainee(), batches, Recipe(steps=2, learning_rate=0.1), seed=0, checkpoint=tmp_path / "state")
    other = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=7)
    with pytest.raises(UserError, match="another model"):
        fit(Trainee(other, other, lambda: other), batches, Recipe(steps=2), seed=0, checkpoint=tmp_path / "state")


def test_processor_seconds_end_a_training_and_looking_costs_none(batches):
    now = [0.0]
    shares, seen = [], []

    def clock():
        return now[0]

    def watch(step, share, loss):
        now[0] += 1.0
        shares.append(share)

    def look(step, share):
        seen.append((step, pytest.approx(share)))
        now[0] += 100.0

    steps = fit(
        trainee(),
        batches,
        Recipe(steps=10**6, seconds=5.0),
        seed=0,
        clock=clock,
        watch=watch,
        look=look,
        looks=(0.4, 1.0),
    )
    assert steps == 5
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-5)
    assert seen == [(3, 0.4), (5, 1.0)]


def test_dropout_and_the_callers_generator(batches):
    before = torch.random.get_rng_state()
    first, second = trainee(dropout=0.5), trainee(dropout=0.5)
    fit(first, batches, Recipe(steps=2), seed=1)
    torch.rand(3)
    torch.random.set_rng_state(before)
    fit(second, batches, Recipe(steps=2), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(weights(first), weights(second))


def test_a_loss_that_is_not_finite_names_step_and_pictures(batches):
    one = trainee()
    with torch.no_grad():
        one.module.class_embed[0].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0, on scene-"):
        fit(one, batches, Recipe(steps=2), seed=0)


def test_workers_load_the_same_batches(batches):
    alone, helped = trainee(), trainee()
    fit(alone, batches, Recipe(steps=2), seed=0)
    fit(helped, batches, Recipe(steps=2, workers=1), seed=0)
    assert torch.equal(weights(alone), weights(helped))


def test_a_frozen_backbone_stays(batches):
    one = trainee()
    before = {name: value.clone() for name, value in one.module.model.backbone.state_dict().items()}
    fit(one, batches, Recipe(steps=1, backbone_rate=0), seed=0)
    assert all(torch.equal(value, one.module.model.backbone.state_dict()[name]) for name, value in before.items())


def test_half_precision_trains(batches):
    one = trainee()
    before = weights(one)
    fit(one, batches, Recipe(steps=2, precision="bf16"), seed=0)
    assert weights(one).dtype == torch.float32
    assert not torch.equal(before, weights(one))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seconds": 0.0}, {"decay": 2}, {"ema": 1.0}, {"precision": "fp8"}])
def test_recipes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Recipe(**wrong)
