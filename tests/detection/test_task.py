"""The task: arms are paired, metrics follow from the seed, users' data and models take the scenes' place."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from counterproof.bench.task import Arm, Trial
from counterproof.detection.annotations import write_coco
from counterproof.detection.batches import Pixels, scene_data
from counterproof.detection.detectors import save_detector
from counterproof.detection.scenes import draw_scenes
from counterproof.detection.task import BASELINE, DETECTION, DETECTION_BY_TIME, load_data, run_detection, train_detector
from counterproof.detection.tiny import tiny_detector
from counterproof.detection.training import Trainee
from counterproof.errors import UserError

SMALL = {
    **DETECTION.budgets["quick"].settings,
    "steps": 8,
    "scenes": 24,
    "levels": 1,
    "evaluated": 6,
    "channels": (8, 16),
    "width": 32,
    "batch": 4,
    "own": {
        "side": 48,
        "batch": 2,
        "scales": (1.0, 1.0),
        "evaluated": 4,
        "queries": 8,
        "channels": (8, 16),
        "levels": 1,
    },
}


def nothing(model, *, median_side, seen=None):
    """A method that changes nothing."""
    assert 7 < median_side < 21
    return Trainee(model, model, lambda: model)


def test_metrics_are_the_declared_ones_and_follow_from_the_seed():
    points = []
    found = [run_detection(BASELINE, Trial(seed=seed, settings=SMALL, listener=points.append)) for seed in (1, 1, 2)]
    assert set(found[0]) == set(DETECTION.metrics)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in found)
    same = ("ap", "ap50", "ap75", "ap_curve")
    assert [found[0][name] for name in same] == [found[1][name] for name in same]
    assert [point["step"] for point in points if "ap" in point][:4] == [2, 4, 6, 8]


def test_arms_start_from_the_same_weights_and_see_the_same_pictures():
    arm = Arm("nothing", method=f"{__name__}:nothing")
    plain = train_detector(BASELINE, Trial(seed=3, settings=SMALL))
    other = train_detector(replace(arm, method="tests_of_the_task:nothing"), Trial(seed=3, settings=SMALL))
    for (name, first), second in zip(
        plain.trainee.detector.state_dict().items(), other.trainee.detector.state_dict().values()
    ):
        assert np.array_equal(first.numpy(), second.numpy()), name
    assert plain.metrics["ap"] == other.metrics["ap"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Arms name code by module; a test file has no stable name of its own."""
    import sys

    monkeypatch.setitem(sys.modules, "tests_of_the_task", sys.modules[__name__])


def test_training_by_time_ends_by_time():
    assert DETECTION_BY_TIME.name == "detection-by-time"
    for budget in DETECTION_BY_TIME.budgets.values():
        assert budget.settings["seconds"] > 0
    settings = {**SMALL, "steps": 10**6, "seconds": 0.5}
    found = run_detection(BASELINE, Trial(seed=0, settings=settings))
    assert 0.5 <= found["train_seconds"] < 5


def test_the_scenes_of_a_seed_are_new_and_held_out_ones_differ():
    train, held_out = load_data(Trial(seed=0), SMALL)
    again, _ = load_data(Trial(seed=0), SMALL)
    other, _ = load_data(Trial(seed=1), SMALL)
    assert (len(train.pictures), len(held_out.pictures)) == (24, 6)
    assert np.array_equal(train.pixels(0), again.pixels(0))
    assert not np.array_equal(train.pixels(0), other.pixels(0))
    assert not np.array_equal(train.pixels(0), held_out.pixels(0))


@pytest.fixture
def own(tmp_path):
    data = scene_data(draw_scenes(25, np.random.default_rng(0), side=40))
    folder = tmp_path / "images"
    folder.mkdir()
    for number, picture in enumerate(data.pictures):
        Image.fromarray(data.pixels(number)).save(folder / f"{picture.name}.png")
    named = replace(data, pictures=tuple(replace(one, name=f"{one.name}.png") for one in data.pictures))
    write_coco(named, tmp_path / "annotations.json")
    return tmp_path


def test_a_users_pictures_and_model_take_the_place_of_the_scenes(own, tmp_path):
    model = tiny_detector("conditional", channels=(8, 16), width=32, num_queries=7, num_labels=5)
    save_detector(model, tmp_path / "model", Pixels(side=48, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)))
    trial = Trial(seed=0, settings=SMALL, data=own, model=str(tmp_path / "model"))
    outcome = train_detector(BASELINE, trial)
    assert len(outcome.held_out.pictures) == 4
    assert outcome.trainee.detector.config.model_type == "conditional_detr"
    assert outcome.trainee.detector.config.id2label == {0: "disk", 1: "square", 2: "triangle"}
    assert outcome.pixels == Pixels(side=48, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    assert np.isfinite(outcome.metrics["ap"])


def test_a_users_pictures_alone_train_a_tiny_detector(own):
    found = run_detection(BASELINE, Trial(seed=0, settings=SMALL, data=own))
    assert set(found) == set(DETECTION.metrics)


def test_more_objects_than_queries_are_refused_before_training(own):
    settings = {**SMALL, "own": {**SMALL["own"], "queries": 2}}
    with pytest.raises(UserError, match="queries"):
        run_detection(BASELINE, Trial(seed=0, settings=settings, data=own))
