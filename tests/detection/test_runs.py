"""A training leaves a plain checkpoint, goes on after a kill to the same bits, and never writes over anything."""

import base64
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from counterproof.detection import runs
from counterproof.detection.annotations import DetectionData, Picture, read_data, write_coco
from counterproof.detection.batches import Batches, Pixels, scene_data
from counterproof.detection.detectors import check_queries, classes_of, load_detector, pixels_of, save_detector, side_of
from counterproof.detection.evaluation import evaluate
from counterproof.detection.outputs import folder_of
from counterproof.detection.predicting import (
    detect,
    draw_found,
    open_detector,
    open_pictures,
    score_page,
    write_scores,
)
from counterproof.detection.runs import TrainSettings, detection_methods, train
from counterproof.detection.scenes import SHAPES, draw_scenes
from counterproof.detection.survey import survey_data
from counterproof.detection.tiny import tiny_detector
from counterproof.detection.training import Recipe, Trainee, fit
from counterproof.errors import UserError
from counterproof.page.catalogue import arms_of

FAST = TrainSettings(steps=12, batch=2, side=32, looks=2)
LEFT = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "training.json",
    "held-out.json",
    "curve.png",
    "detections.png",
}


def coco(folder, number=20, seed=0, side=32, ids=(2, 5, 9)):
    """A folder in COCO layout with gaps in its category ids; every fifth picture has no objects."""
    scenes = draw_scenes(number, np.random.default_rng(seed), side=side, objects=(1, 3))
    data = scene_data(scenes)
    (folder / "images").mkdir(parents=True)
    pictures = []
    for index, (picture, scene) in enumerate(zip(data.pictures, scenes)):
        name = f"scene-{index:03}.png"
        Image.fromarray(scene.pixels).save(folder / "images" / name)
        keep = slice(0, 0) if index % 5 == 4 else slice(None)
        records = [getattr(picture, key)[keep] for key in ("boxes", "labels", "crowd", "areas", "annotation_ids")]
        pictures.append(Picture(100 + index, name, side, side, folder / "images" / name, *records))
    write_coco(DetectionData(tuple(pictures), SHAPES, ids, "made up"), folder / "annotations.json")
    return folder


def yolo(folder, shared=False):
    """A folder in YOLO layout with train and val."""
    scenes = draw_scenes(12, np.random.default_rng(1), side=32, objects=(1, 2))
    for split, part in (("train", scenes[:9]), ("val", scenes[9:])):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number, scene in enumerate(part):
            Image.fromarray(scene.pixels).save(folder / "images" / split / f"{number}.png")
            lines = [
                f"{label} {(x1 + x2) / 64} {(y1 + y2) / 64} {(x2 - x1) / 32} {(y2 - y1) / 32}"
                for label, (x1, y1, x2, y2) in zip(scene.labels.tolist(), scene.boxes.tolist())
            ]
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    val = "images/train" if shared else "images/val"
    (folder / "data.yaml").write_text(f"train: images/train\nval: {val}\nnames: [{', '.join(SHAPES)}]\n")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return coco(tmp_path_factory.mktemp("pictures") / "coco")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A detector that takes little time."""
    labels = dict(enumerate(SHAPES))
    model = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=8, id2label=labels)
    path = tmp_path_factory.mktemp("small")
    save_detector(model, path, Pixels(side=32))
    return path


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    told = []
    out = tmp_path_factory.mktemp("trained") / "detector"
    return train(pictures, out, settings=FAST, watch=lambda *words: told.append(words)), told


@pytest.fixture(autouse=True)
def quick_curve(monkeypatch):
    """A figure takes as long as these trainings; that of `trained` is a real one."""
    monkeypatch.setattr(runs, "_draw_curve", lambda done, file: file.write_bytes(b"drawn"))


def bits(folder):
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()}


# train


def test_a_training_leaves_a_checkpoint_that_loads_without_us(trained, pictures):
    done, _ = trained
    assert {path.name for path in done.out.iterdir()} == LEFT
    code = (
        "import sys, torch, transformers\n"
        f"model, info = transformers.AutoModelForObjectDetection.from_pretrained({str(done.out)!r},"
        " output_loading_info=True)\n"
        "assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "assert not any('counterproof' in name for name in sys.modules)\n"
        "print(type(model).__name__, sorted(model.config.id2label.values()))\n"
        "print(model.eval()(pixel_values=torch.ones(1, 3, 32, 32)).logits.sum().item())\n"
        f"processor = transformers.AutoImageProcessor.from_pretrained({str(done.out)!r})\n"
        "print(processor.size['longest_edge'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    name, logits, size = ran.stdout.splitlines()
    assert name == "DeformableDetrForObjectDetection ['disk', 'square', 'triangle']"
    with torch.no_grad():
        ours = done.model(pixel_values=torch.ones(1, 3, 32, 32)).logits.sum().item()
    assert float(logits) == pytest.approx(ours, rel=1e-6)
    assert size == "32"


def test_its_scores_are_those_of_the_saved_detector_on_the_pictures_it_never_saw(trained, pictures):
    done, told = trained
    whole, held_out = read_data(pictures), read_data(done.held_out_spec)
    names = {picture.name for picture in held_out.pictures}
    assert len(names) == 4
    assert names <= {picture.name for picture in whole.pictures}
    about = json.loads((done.out / "training.json").read_text())
    assert about["finished"]
    assert about["data"]["pictures"] == 16
    assert about["data"]["category_ids"] == [2, 5, 9]
    scores = evaluate(held_out, detect(open_detector(done.out), held_out))
    assert scores.as_json()["per_class"].keys() == about["scores"]["per_class"].keys()
    for name in ("ap", "ap50", "ar100"):
        assert about["scores"][name] == pytest.approx(getattr(scores, name), abs=1e-6, nan_ok=True)
    assert [point["step"] for point in about["curve"]] == [6, 12]
    assert about["curve"][-1]["ap"] == pytest.approx(about["scores"]["ap"])
    assert [step for step, _ in about["losses"]] == list(range(1, 13))
    assert [words[1] for words in told if words[0] == "training"] == list(range(1, 13))
    losses = [words[3]["loss"] for words in told if words[0] == "training"]
    assert losses == [value for _, value in about["losses"]]


def test_the_pictures_it_draws_can_be_opened(trained):
    for name in ("curve.png", "detections.png"):
        with Image.open(trained[0].out / name) as image:
            image.load()
            assert min(image.size) > 300


def test_training_lowers_the_loss_and_trains_on_pictures_without_objects(small, pictures, tmp_path):
    data = read_data(pictures)
    empty = [index for index, picture in enumerate(data.pictures) if not len(picture.boxes)]
    mostly = data.subset([*empty, 0, 1])  # batches of nothing but empty pictures among them
    settings = TrainSettings(steps=40, batch=2, side=32, looks=1, learning_rate=1e-3, backbone_rate=1.0)
    done = train(mostly, tmp_path / "out", model=small, val=data, settings=settings)
    losses = [value for _, value in done.losses]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def adapters():
    """Of the arms that one function makes, the one with the most to set."""
    arms = sorted(detection_methods().values(), key=lambda arm: len(json.dumps(dict(arm.settings))))
    return sorted({arm.method: arm.name for arm in arms if arm.method}.values())


@pytest.mark.parametrize("method", adapters())
def test_every_method_goes_on_where_it_was_stopped_and_leaves_a_plain_checkpoint(method, pictures, small, tmp_path):
    how = {"model": small, "method": method, "settings": TrainSettings(**{**vars(FAST), "looks": 1})}

    def stop(what, done, of, values):
        if what == "training" and done == 11:
            raise KeyboardInterrupt

    whole = train(pictures, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train(pictures, tmp_path / "parts", **how, watch=stop)
    told = []
    parts = train(pictures, tmp_path / "parts", **how, watch=lambda *words: told.append(words[:2]))
    assert [number for what, number in told if what == "training"] == [11, 12]  # it had been kept after 10
    assert bits(whole.out) == bits(parts.out)
    assert (whole.curve, whole.losses) == (parts.curve, parts.losses)
    assert {path.name for path in parts.out.iterdir()} == LEFT
    plain = type(parts.model)(parts.model.config)
    assert set(plain.state_dict()) == set(parts.model.state_dict())
    assert type(parts.model).__module__.startswith("transformers.")
    assert "forward" not in vars(parts.model)


def test_killed_at_any_moment_it_ends_at_the_same_bits(pictures, small, tmp_path):
    out = tmp_path / "killed"
    how = {"model": small, "settings": TrainSettings(**{**vars(FAST), "steps": 24, "looks": 3})}

    def die(at):
        def watch(what, done, of, values):
            if what == "training" and done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        train(pictures, out, **how, watch=watch)

    for step in (3, 15):  # before the first checkpoint, after it
        child = multiprocessing.get_context("fork").Process(target=die, args=(step,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert (out / "checkpoint.pt").exists() == (step > 10)
        (out / "checkpoint.pt.part").write_bytes(b"half")  # as a kill while writing leaves it
    whole = train(pictures, tmp_path / "whole", **how)
    ended = train(pictures, out, **how)
    assert bits(out) == bits(whole.out)
    assert (ended.curve, ended.losses) == (whole.curve, whole.losses)
    assert {path.name for path in out.iterdir()} == LEFT


def test_killed_while_it_saves_it_saves_again(pictures, small, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_draw_curve", fail)
        with pytest.raises(KeyboardInterrupt):
            train(pictures, out, model=small, settings=FAST)
    told = []
    done = train(pictures, out, model=small, settings=FAST, watch=lambda *words: told.append(words[0]))
    assert "training" not in told
    assert len(done.curve) == 2
    assert {path.name for path in out.iterdir()} == LEFT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": TrainSettings(steps=12, batch=2, side=32, looks=2, seed=1)}, "seed 0 then, 1 now"),
        ({"settings": TrainSettings(steps=13, batch=2, side=32, looks=2)}, "steps 12 then, 13 now"),
        ({"val": "again"}, "other held-out data"),
        ({}, "finished"),
    ],
)
def test_a_folder_of_another_training_is_refused_and_left_as_it_is(change, says, trained, pictures):
    out = trained[0].out
    before = {path: path.read_bytes() for path in out.iterdir()}
    change = {"settings": FAST, **change, **({"val": pictures} if "val" in change else {})}
    with pytest.raises(UserError, match=says) as raised:
        train(pictures, out, **change)
    assert str(out) in str(raised.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_unfinished_training_of_another_model_is_refused(trained, pictures, tmp_path):
    def stop(what, done, of, values):
        if what == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pictures, tmp_path / "out", settings=FAST, watch=stop)
    given = {"settings": TrainSettings(**{**vars(FAST), "learning_rate": 1e-3, "backbone_rate": 1.0})}
    with pytest.raises(UserError, match="another model"):
        train(pictures, tmp_path / "out", model=trained[0].out, **given)


def test_a_folder_that_holds_something_else_is_refused(pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a training"):
        train(pictures, tmp_path, settings=FAST)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        train(pictures, tmp_path / "notes.txt", settings=FAST)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training.json").write_text("[1]")
    with pytest.raises(UserError, match="is not of a training of ours"):
        train(pictures, tmp_path / "other", settings=FAST)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_detector_is_trained_on_with_the_classes_of_the_data(trained, tmp_path):
    first = trained[0]
    settings = TrainSettings(steps=2, batch=2, side=32, looks=1)
    same = train(coco(tmp_path / "same"), tmp_path / "on", model=first.out, settings=settings)
    assert not any("class head" in note for note in same.notes)
    about = json.loads((tmp_path / "on" / "training.json").read_text())["identity"]["settings"]
    assert (about["learning_rate"], about["backbone_rate"], about["side"]) == (1e-4, 0.1, 32)
    moved = torch.stack(
        [
            (a - b).abs().max()
            for a, b in zip(first.model.state_dict().values(), same.model.state_dict().values())
            if a.is_floating_point()
        ]
    )
    assert 0 < moved.max() < 1e-3
    data = read_data(coco(tmp_path / "other"))
    renamed = DetectionData(data.pictures, ("cat", "dog", "mouse"), data.category_ids, data.source)
    other = train(renamed, tmp_path / "new", model=first.out, settings=settings)
    assert "was trained for 3 other classes (disk, square, triangle): its class head starts anew" in other.notes[-1]
    assert list(other.model.config.id2label.values()) == ["cat", "dog", "mouse"]


def test_yolo_folders_are_evaluated_on_their_own_val(small, tmp_path):
    done = train(yolo(tmp_path / "yolo"), tmp_path / "out", model=small, settings=FAST)
    assert [picture.name for picture in done.held_out.pictures] == [f"images/val/{n}.png" for n in range(3)]
    assert "evaluated on the data's own val pictures" in done.notes
    again = read_data(done.held_out_spec)
    assert [picture.file for picture in again.pictures] == [picture.file for picture in done.held_out.pictures]
    assert sum(map(len, (p.boxes for p in again.pictures))) == done.held_out.objects
    share = train(
        tmp_path / "yolo", tmp_path / "share", model=small, settings=TrainSettings(**{**vars(FAST), "held_out": 0.5})
    )
    assert len(share.held_out.pictures) == 6


def test_yolo_folders_whose_val_is_their_train_are_split(small, tmp_path):
    done = train(yolo(tmp_path / "yolo", shared=True), tmp_path / "out", model=small, settings=FAST)
    assert any("share 9 pictures" in note for note in done.notes)
    assert len(done.held_out.pictures) == 2


def test_a_layout_without_yaml_has_a_split_too(tmp_path):
    folder = yolo(tmp_path / "yolo")
    assert runs.has_own_split(folder)
    (folder / "data.yaml").unlink()
    assert runs.has_own_split(folder)
    (folder / "images" / "val").rename(folder / "images" / "more")
    assert not runs.has_own_split(folder)


def test_val_is_evaluated_on_under_its_own_ids(pictures, small, tmp_path):
    other = coco(tmp_path / "other", number=6, seed=5, ids=(1, 2, 3))
    done = train(pictures, tmp_path / "out", model=small, val=other, settings=FAST)
    assert done.held_out.category_ids == (1, 2, 3)
    assert done.scores.pictures == 6
    assert json.loads((done.out / "training.json").read_text())["data"]["pictures"] == 20
    with pytest.raises(UserError, match="give one of them"):
        train(pictures, tmp_path / "both", val=other, settings=TrainSettings(held_out=0.5))
    same = train(pictures, tmp_path / "same", model=small, val=pictures, settings=FAST)
    assert any("20 pictures of --val are trained on too" in note for note in same.notes)


def test_more_objects_than_queries_names_the_picture_and_a_new_detector_has_enough(tmp_path):
    boxes = np.array([[x, y, x + 3, y + 3] for x in range(0, 30, 4) for y in range(0, 30, 4)], dtype=np.float32)[:60]
    folder = tmp_path / "crowded"
    (folder / "images").mkdir(parents=True)
    many = []
    for number in (1, 2):
        Image.new("RGB", (32, 32)).save(folder / "images" / f"{number}.png")
        own = np.zeros(60, dtype=np.int64), np.zeros(60, dtype=bool), np.full(60, 9, dtype=np.float32)
        many.append(Picture(number, f"{number}.png", 32, 32, None, boxes, *own, np.arange(60) + 60 * number))
    write_coco(DetectionData(tuple(many), ("dot",), (1,), "x"), folder / "annotations.json")
    small = tiny_detector("deformable", num_labels=1, num_queries=16, channels=(8, 16), width=32)
    save_detector(small, tmp_path / "small", Pixels(side=32))
    with pytest.raises(UserError, match=r"image \d \(\d.png\) has 60 objects, the detector only 16 queries"):
        train(folder, tmp_path / "out", model=tmp_path / "small", settings=FAST)
    assert not (tmp_path / "out").exists()
    done = train(folder, tmp_path / "new", settings=TrainSettings(steps=1, batch=1, side=32, looks=1))
    assert done.model.config.num_queries == 120


def test_data_are_checked_before_anything_is_written(pictures, tmp_path):
    data = read_data(pictures)
    with pytest.raises(UserError, match="has one picture only"):
        train(data.subset([0]), tmp_path / "out", settings=FAST)
    empty = [index for index, picture in enumerate(data.pictures) if not len(picture.boxes)]
    with pytest.raises(UserError, match="no objects in the pictures to train on"):
        train(data.subset(empty), tmp_path / "out", settings=FAST)
    with pytest.raises(UserError, match="device 'cuda:9'"):
        train(pictures, tmp_path / "out", device="cuda:9", settings=FAST)
    assert not (tmp_path / "out").exists()


def test_several_processes_do_not_train_into_one_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="works in one process"):
        train(pictures, tmp_path / "out", settings=FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_off_is_named_and_put_back_the_training_goes_on(workers, small, tmp_path):
    folder = coco(tmp_path / "coco", number=4)
    whole = {file: file.read_bytes() for file in (folder / "images").iterdir()}
    for file, content in whole.items():
        file.write_bytes(content[: len(content) // 2])  # its header is good
    how = {"model": small, "val": read_data(folder), "workers": workers, "settings": FAST}
    with pytest.raises(UserError, match=r"scene-00\d\.png cannot be read") as raised:
        train(folder, tmp_path / "out", **how)
    assert "\n" not in str(raised.value)
    for file, content in whole.items():
        file.write_bytes(content)
    assert train(folder, tmp_path / "out", **how).steps == 12


def test_epochs_are_passes_over_the_pictures(pictures, small, tmp_path):
    settings = TrainSettings(epochs=0.5, batch=3, side=32, looks=1)
    assert (
        train(pictures, tmp_path / "out", model=small, settings=settings).steps == 3
    )  # half of 16 pictures, in threes
    assert TrainSettings().filled(True) == TrainSettings(epochs=30, learning_rate=1e-4, backbone_rate=0.1, side=640)
    assert TrainSettings(side=64).filled(False).side == 64


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0.0},
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": float("nan")},
        {"side": 8},
        {"held_out": 1.0},
        {"ema": 1.0},
        {"precision": "fp16"},
        {"looks": 0},
        {"seed": -1},
        {"scales": (1.0, 0.5)},
        {"backbone_rate": -1.0},
    ],
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TrainSettings(**bad)


# methods


def test_methods_are_the_arms_of_the_task():
    from counterproof.detection.task import DETECTION

    ours = detection_methods()
    assert next(iter(ours)) == "baseline"
    for name, arm in arms_of(DETECTION).items():
        assert ours[name] == arm


def method(model, *, median_side, weight=1.0, kind="a"):
    if weight < 0:
        raise ValueError(f"weight {weight} is below 0")
    assert 4 < median_side < 14
    with torch.no_grad():
        model.bbox_embed[0].layers[0].bias += weight * torch.rand(1)  # draws, as methods do
    return Trainee(model, model, lambda: model)


def test_settings_of_a_method_are_checked(monkeypatch, pictures, small, tmp_path):
    from counterproof.detection.task import Arm

    arm = Arm("mine", f"{__name__}:method", {"weight": 2.0})
    monkeypatch.setattr(Arm, "load", lambda self: method if self.name == "mine" else None)
    monkeypatch.setattr(runs, "detection_methods", lambda: {"baseline": Arm("baseline"), "mine": arm})
    assert runs.find_method("mine", {"kind": "b"}) == (method, {"weight": 2.0, "kind": "b"})
    with pytest.raises(UserError, match="no setting 'wieght'; it has kind, weight"):
        runs.find_method("mine", {"wieght": 1})
    with pytest.raises(UserError, match="did you mean mine"):
        runs.find_method("mime", {})
    with pytest.raises(UserError, match="has no settings; leave out weight"):
        runs.find_method("baseline", {"weight": 1})
    with pytest.raises(UserError, match="method mine: weight -1 is below 0"):
        train(pictures, tmp_path / "bad", method="mine", options={"weight": -1}, settings=FAST)
    assert not (tmp_path / "bad").exists()
    state = torch.random.get_rng_state()
    one, two = (train(pictures, tmp_path / name, model=small, method="mine", settings=FAST) for name in "ab")
    assert bits(one.out) == bits(two.out)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError, match=r"weight 2.0 then, 3.0 now"):
        train(pictures, tmp_path / "a", model=small, method="mine", options={"weight": 3.0}, settings=FAST)


# predict


def test_plain_pictures_are_numbered_by_path_and_turned_as_seen(tmp_path):
    (tmp_path / "b").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "b" / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "results.json").write_text("[]")  # of an earlier search: no annotations
    data, plain = open_pictures(tmp_path, {0: "cat", 3: "dog"})
    assert plain
    assert [(p.id, p.name, p.width, p.height) for p in data.pictures] == [
        (1, "a.jpg", 20, 30),
        (2, "b/one.png", 30, 20),
    ]
    assert data.pixels(0).shape == (30, 20, 3)
    assert (data.classes, data.category_ids) == (("cat", "dog"), (0, 3))
    single, plain = open_pictures(tmp_path / "b" / "one.png", {0: "cat"})
    assert plain
    assert [picture.name for picture in single.pictures] == ["one.png"]


def test_annotated_folders_keep_their_ids(pictures, tmp_path):
    for source in (pictures, f"coco:{pictures / 'annotations.json'}", pictures / "annotations.json"):
        data, plain = open_pictures(source, {})
        assert not plain
        assert data.pictures[0].id == 100
    folder = yolo(tmp_path / "yolo")
    assert len(open_pictures(folder, {}, split="val")[0].pictures) == 3
    assert not open_pictures(folder, {})[1]
    with pytest.raises(UserError, match="no splits"):
        open_pictures(folder / "images", {}, split="val")


def test_folders_without_pictures_and_bad_pictures_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        open_pictures(tmp_path, {})
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"bad\.png"):
        open_pictures(tmp_path, {})
    with pytest.raises(UserError, match="is not there"):
        open_pictures(tmp_path / "nowhere", {})


def test_detections_carry_the_ids_of_the_data_and_keep_the_threshold(trained, pictures):
    detector = open_detector(trained[0].out)
    assert detector.pixels.side == 32
    data = read_data(pictures)
    told = []
    found = detect(detector, data, batch=7, watch=lambda *words: told.append(words))
    assert told == [(7, 20), (14, 20), (20, 20)]
    assert {record["category_id"] for record in found} == {2, 5, 9}
    assert {record["image_id"] for record in found} == set(range(100, 120))
    least = sorted(record["score"] for record in found)[len(found) // 2]
    kept = detect(detector, data, threshold=least)
    assert 0 < len(kept) < len(found)
    assert min(record["score"] for record in kept) >= least
    fewer = DetectionData(data.pictures, ("circle", "square", "Triangle"), (1, 2, 7), "x")
    assert {record["category_id"] for record in detect(detector, fewer)} == {2, 7}
    none = DetectionData(data.pictures, ("cat", "dog", "mouse"), (1, 2, 7), "x")
    with pytest.raises(UserError, match="no class in common"):
        detect(detector, none)


def test_boxes_are_drawn_on_copies_under_the_pictures_names(tmp_path):
    pixels = np.full((40, 60, 3), 200, dtype=np.uint8)
    for name in ("a.png", "a.jpg", "b/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    data, _ = open_pictures(tmp_path / "in", {0: "cat"})
    results = [
        {"image_id": 3, "category_id": 0, "bbox": [10.0, 10.0, 20.0, 20.0], "score": 0.9},
        {"image_id": 3, "category_id": 0, "bbox": [40.0, 10.0, 15.0, 20.0], "score": 0.2},
    ]
    files = draw_found(data, results, tmp_path / "out")
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == ["a.jpg.png", "a.png.png", "b/c.png"]
    drawn = np.asarray(Image.open(files[2]))
    factor = drawn.shape[0] // 40
    assert drawn.shape == (40 * factor, 60 * factor, 3)
    row = drawn[20 * factor].astype(int)
    where = np.flatnonzero(np.abs(row - 200).max(1) > 60) / factor
    assert where.min() == pytest.approx(10, abs=1)
    assert where.max() == pytest.approx(30, abs=1)  # the second one is too unsure
    assert (np.asarray(Image.open(tmp_path / "in" / "b" / "c.png")) == pixels).all()
    with pytest.raises(UserError, match=r"a\.jpg\.png exists already"):
        draw_found(data, results, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        draw_found(open_pictures(tmp_path / "in" / "a.png", {})[0], [], tmp_path / "in")


# eval


@pytest.fixture(scope="module")
def scored():
    data = scene_data(draw_scenes(3, np.random.default_rng(3), side=32))
    renamed = DetectionData(
        data.pictures, ("<b>disk</b>", "square", "triangle"), data.category_ids, "a & b", data.images
    )
    results = [
        {
            "image_id": picture.id,
            "category_id": int(label) + 1,
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": 0.9,
        }
        for picture in data.pictures
        for (x1, y1, x2, y2), label in zip(picture.boxes, picture.labels)
        if label != 1
    ]
    return renamed, results, evaluate(renamed, results)


def test_the_page_stands_alone_and_shows_pairs(scored):
    data, results, scores = scored
    page = score_page(data, results, scores, title="mine <1>")
    assert not any(word in page for word in ("<script", "<link", "url(", "@import"))
    assert all(found == "data:" for found in re.findall(r'(?:src|href)="(.{5})', page))
    assert "<b>disk" not in page
    assert "&lt;b&gt;disk&lt;/b&gt;" in page
    assert "mine &lt;1&gt;" in page
    assert "a &amp; b" in page
    drawn = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(drawn) == 3
    for picture in drawn:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.width > 2 * 320 > image.height
    assert f"<td>{scores.ap:.3f}</td>" in page
    assert "<td>-</td>" in page  # no large objects


def test_scores_are_written_by_the_files_ending(scored, tmp_path):
    data, results, scores = scored
    write_scores(tmp_path / "s.json", scores, data, results)
    assert json.loads((tmp_path / "s.json").read_text()) == scores.as_json()
    write_scores(tmp_path / "s.csv", scores, data, results)
    rows = list(csv.DictReader((tmp_path / "s.csv").open(newline="")))
    assert [row["class"] for row in rows] == ["", "<b>disk</b>", "square", "triangle"]
    assert float(rows[0]["ap"]) == scores.ap
    assert [int(row["objects"]) for row in rows[1:]] == [row["objects"] for row in scores.per_class.values()]
    assert float(rows[2]["ap"]) == 0.0
    write_scores(tmp_path / "s.html", scores, data, results, title="t")
    assert (tmp_path / "s.html").read_text() == score_page(data, results, scores, title="t")
    with pytest.raises(UserError, match=r"\.html or \.json or \.csv"):
        write_scores(tmp_path / "s.txt", scores, data, results)


# inspect


def test_a_survey_counts_what_is_there():
    def picture(number, boxes, labels, crowd=(), clipped=0, size=(400, 300)):
        boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        crowds = np.array([index in crowd for index in range(len(boxes))], dtype=bool)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return Picture(
            number, f"{number}.jpg", *size, None, boxes, np.array(labels, dtype=np.int64), crowds, areas,
            np.arange(len(boxes)), clipped,
        )  # fmt: skip

    pictures = (
        picture(1, [[0, 0, 10, 10], [0, 0, 32, 32], [0, 0, 96, 96]], [0, 0, 0]),
        picture(2, [[0, 0, 200, 2], [5, 5, 50, 50], [0, 0, 300, 300]], [0, 1, 1], crowd={2}, clipped=2),
        picture(3, [], [], size=(100, 100)),
    )
    data = DetectionData(pictures, ("cat", "dog", "emu"), (3, 4, 8), "src", notes=("left out x",))
    found = survey_data(data)
    assert (found.pictures, found.objects, found.crowds, found.without_objects, found.clipped) == (3, 5, 1, 1, 2)
    assert found.sizes == {"small": 2, "medium": 2, "large": 1}
    rows = {row["name"]: (row["id"], row["objects"], row["pictures"]) for row in found.classes}
    assert rows == {"cat": (3, 4, 2), "dog": (4, 1, 1), "emu": (8, 0, 0)}
    assert found.classes[0]["median_side"] == pytest.approx((20 + 32) / 2)
    assert found.classes[2]["median_side"] is None
    assert found.most == (3, "1.jpg")
    assert found.picture_sizes == ((100, 100), (400, 300), (400, 300))
    said = "\n".join(found.warnings)
    for words in ("1 classes without an object: emu", "cat (4), dog (1)", "1 objects are less than 3", "only 2 pict"):
        assert words in said
    assert json.loads(json.dumps(found.as_json()))["sizes"]["large"] == 1
    text = found.text()
    assert "note: left out x" in text
    assert "warning: 1 classes without" in text


def test_a_full_data_set_has_no_warnings():
    data = scene_data(draw_scenes(60, np.random.default_rng(0), side=48))
    assert survey_data(data).warnings == ()
    assert survey_data(data.subset(range(5))).warnings


# what detectors ask for


def test_the_side_is_what_the_processor_asks_for(tmp_path, monkeypatch):
    file = tmp_path / "preprocessor_config.json"
    for size, side in (
        ({"shortest_edge": 800, "longest_edge": 1333}, 1067),
        ({"shortest_edge": 64, "longest_edge": 64}, 64),
        ({"height": 640, "width": 640}, 640),
        ({"max_height": 480, "max_width": 480}, 480),
        ({"shortest_edge": 600}, 800),
    ):
        file.write_text(json.dumps({"size": size}))
        assert side_of(tmp_path) == side
    file.write_text(json.dumps({"size": {"height": 5, "width": 5}, "do_resize": False}))
    assert side_of(tmp_path) is None
    file.write_text(json.dumps({"size": {"edges": 3}}))
    with pytest.raises(UserError, match="give it with --side"):
        side_of(tmp_path)
    file.write_text(json.dumps({"size": {"height": 320, "width": 320}, "do_normalize": False}))
    model = tiny_detector("deformable", channels=(8, 16), width=32)
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda name, wanted: str(file))
    assert side_of("owner/name") == 320  # of the hub, as of a folder
    assert pixels_of("owner/name", model, 320).mean == (0.0, 0.0, 0.0)


def test_classes_are_found_by_name_the_exact_one_first():
    model = tiny_detector("deformable", channels=(8, 16), width=32)
    model.config.id2label = {0: "Cat", 1: "cat", 2: "Dog"}
    data = DetectionData((), ("cat", "Cat", "dog"), (1, 2, 3), "x")
    assert classes_of(model, data, "m") == [1, 0, 2]
    assert classes_of(model, DetectionData((), ("cat", "dog"), (1, 3), "x"), "m") == [None, 0, 1]


def test_detectors_without_a_mask_train_on_whole_cells(tmp_path):
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16] * 3, encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, num_queries=8, decoder_in_channels=[16] * 3, decoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, num_denoising=2, num_labels=3,
    )  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    model = load_detector(tmp_path, SHAPES)
    data = scene_data(draw_scenes(4, np.random.default_rng(0), side=48))
    check_queries(model, data)
    batches = Batches(data, 2, pixels_of(tmp_path, model, 90), seed=0, scales=(0.5, 1.0))
    sizes = {batches[step]["pixel_values"].shape[-2:] for step in range(8)}
    assert sizes == {(32, 32), (64, 64), (96, 96)} or sizes == {(64, 64), (96, 96)}
    fit(Trainee(model, model, lambda: model), batches, Recipe(steps=2), seed=0)


def test_folder_of_pictures(pictures):
    assert folder_of(read_data(pictures)) == Path(pictures / "images").absolute()
