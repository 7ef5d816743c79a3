"""The verbs as a newcomer meets them: own pictures in, a detector, results and scores out; bad input in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import BertConfig, BertModel

from counterproof.bench.journal import Journal
from counterproof.bench.owned import own_data
from counterproof.bench.task import Trial
from counterproof.cli import main
from counterproof.detection import runs
from counterproof.detection.batches import Pixels
from counterproof.detection.detectors import save_detector
from counterproof.detection.scenes import SHAPES, draw_scenes
from counterproof.detection.task import DETECTION, load_data
from counterproof.detection.tiny import tiny_detector

IDS = (2, 5, 9)  # with gaps


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, what was said, and what went wrong."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["counterproof", "detection", *map(str, words)])
        code = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def write_folder(folder, number=60):
    """Scenes as a COCO folder; every tenth has no objects."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for index, scene in enumerate(draw_scenes(number, np.random.default_rng(0), side=32)):
        name = f"{index:03}.png"
        Image.fromarray(scene.pixels).save(folder / "images" / name)
        images.append({"id": 1000 + index, "file_name": name, "width": 32, "height": 32})
        if index % 10 == 9:
            continue
        for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 1000 + index,
                    "category_id": IDS[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": identity, "name": name} for identity, name in zip(IDS, SHAPES)]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own") / "coco")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """An untrained one, small."""
    path = tmp_path_factory.mktemp("small") / "detector"
    model = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=6, id2label=dict(enumerate(SHAPES)))
    save_detector(model, path, Pixels(side=32))
    return path


@pytest.fixture
def bad(tmp_path):
    """A small COCO folder with one thing changed."""

    def bad(change):
        folder = write_folder(tmp_path / "bad", number=6)
        whole = json.loads((folder / "annotations.json").read_text())
        change(whole, folder)
        (folder / "annotations.json").write_text(json.dumps(whole))
        return folder

    return bad


# what a newcomer does


def test_train_predict_and_eval_on_ones_own_pictures(pictures, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("detector")
    how = ("--steps", 15, "--batch", 2, "--side", 32, "--looks", 3)
    code, said, err = run("train", "--data", pictures, "--out", out, *how)
    assert code == 0, err
    assert "AP at IoU .50" in said
    assert [line.split(":")[0] for line in err.splitlines()] == [f"step {s} of 15" for s in (5, 10, 15)]
    assert {"config.json", "model.safetensors", "curve.png", "detections.png"} <= {p.name for p in out.iterdir()}
    (again,) = [line for line in said.splitlines() if line.startswith("score it again: ")]
    scores = json.loads((out / "training.json").read_text())["scores"]
    command = again.removeprefix("score it again: counterproof detection ").split()
    code, said, _ = run(*command, "--json")
    assert code == 0
    assert json.loads(said)["ap50"] == pytest.approx(scores["ap50"], abs=1e-6)

    code, said, err = run("predict", "--model", out, "--data", pictures, "--out", "found.json", "--json")
    assert code == 0, err
    assert json.loads(said)["annotated"]
    assert not Path("found.images.json").exists()
    truth = COCO(str(pictures / "annotations.json"))
    judged = COCOeval(truth, truth.loadRes("found.json"), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    code, said, _ = run("eval", "--data", pictures, "--results", "found.json", "--out", "page.html", "--json")
    found = json.loads(said.splitlines()[-1])
    assert found["ap"] == pytest.approx(judged.stats[0], abs=1e-9)
    assert found["ar100"] == pytest.approx(judged.stats[8], abs=1e-9)
    assert Path("page.html").read_text().count("<img") == 12
    code, said, _ = run("eval", "--data", pictures, "--model", out, "--json")
    assert json.loads(said)["ap"] == pytest.approx(found["ap"], abs=1e-6)

    code, _, err = run("train", "--data", pictures, "--out", out, *how)
    assert (code, err.count("\n")) == (2, 1)
    assert "finished" in err


def test_a_yolo_folder_is_trained_on_and_its_val_scored(tmp_path, run):
    for split, scenes in zip(("train", "val"), (8, 4)):
        for kind in ("images", "labels"):
            (tmp_path / "yolo" / kind / split).mkdir(parents=True)
        for number, scene in enumerate(draw_scenes(scenes, np.random.default_rng(scenes), side=32)):
            Image.fromarray(scene.pixels).save(tmp_path / "yolo" / "images" / split / f"{number}.jpg")
            lines = [
                f"{label} {(x1 + x2) / 64} {(y1 + y2) / 64} {(x2 - x1) / 32} {(y2 - y1) / 32}"
                for label, (x1, y1, x2, y2) in zip(scene.labels.tolist(), scene.boxes.tolist())
            ]
            (tmp_path / "yolo" / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    names = ", ".join(SHAPES)
    (tmp_path / "yolo" / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{names}]\n")
    out = tmp_path / "detector"
    data = ("--data", tmp_path / "yolo")
    code, said, err = run(
        "train", *data, "--out", out, "--steps", 2, "--batch", 2, "--side", 32, "--json", "--looks", 1
    )
    assert code == 0, err
    found = json.loads(said)
    assert "note: evaluated on the data's own val pictures" in err
    assert found["scores"]["pictures"] == 4
    code, said, _ = run("eval", "--model", out, *data, "--split", "val", "--json")
    assert json.loads(said)["ar100"] == pytest.approx(found["scores"]["ar100"], abs=1e-6)
    code, said, _ = run("convert", tmp_path / "yolo", "--out", tmp_path / "clean.json", "--json")
    assert code == 0
    code, said, _ = run("inspect", json.loads(said)["read_with"], "--json")
    assert code == 0
    assert json.loads(said)["pictures"] == 12


def test_interrupted_it_says_how_to_go_on_and_does(pictures, detector, tmp_path, run, monkeypatch):
    monkeypatch.setattr(runs, "_draw_curve", lambda done, file: None)
    words = ("train", "--data", pictures, "--out", tmp_path / "out", "--model", detector)
    words = (*words, "--steps", 24, "--batch", 2, "--side", 32, "--looks", 2)
    look = runs._Diary.look

    def stop(self, step, scores):
        look(self, step, scores)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs._Diary, "look", stop)
        code, _, err = run(*words)
    assert code == 130
    assert "the same command goes on" in err.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    code, said, err = run(*words, "--json")
    assert code == 0, err
    assert [point["step"] for point in json.loads(said)["curve"]] == [12, 24]


def test_a_diverged_training_is_no_user_error(pictures, detector, tmp_path, run, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("the loss is nan at step 3, on a.png")

    monkeypatch.setattr(runs, "fit", fail)
    code, _, err = run("train", "--data", pictures, "--out", tmp_path / "out", "--model", detector)
    assert code == 1
    assert err.splitlines()[-1].startswith("counterproof: the loss is nan at step 3, on a.png; a lower --learning-rate")


def test_a_method_and_its_settings_are_named_on_the_command_line(pictures, tmp_path, run, monkeypatch):
    seen = {}

    def take(data, out, **how):
        seen.update(how)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", take)
    words = ("--set", "num-groups=5", "--set", "heads=[1, 2]", "--set", "kind=soft")
    run("train", "--data", pictures, "--out", tmp_path / "out", "--method", "mine", *words)
    assert seen["method"] == "mine"
    assert seen["options"] == {"num_groups": 5, "heads": [1, 2], "kind": "soft"}
    code, _, err = run("train", "--data", pictures, "--out", tmp_path / "out", "--set", "x")
    assert code == 2
    assert "'x' is not NAME=VALUE" in err


def test_plain_pictures_are_searched_and_drawn(pictures, detector, tmp_path, run):
    out = tmp_path / "found.json"
    words = ("predict", "--model", detector, "--data", pictures / "images", "--out", out)
    code, said, err = run(*words, "--draw", tmp_path / "drawn", "--threshold", 0.0)
    assert code == 0, err
    assert "60 pictures without annotations" in said
    about = json.loads((tmp_path / "found.images.json").read_text())
    assert about["images"][0] == {"id": 1, "file_name": "000.png", "width": 32, "height": 32}
    assert about["categories"] == [{"id": number, "name": name} for number, name in enumerate(SHAPES)]
    found = json.loads(out.read_text())
    assert {record["image_id"] for record in found} == set(range(1, 61))
    assert {record["category_id"] for record in found} <= {0, 1, 2}
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 60
    before = out.read_bytes()
    code, _, err = run(*words, "--draw", tmp_path / "drawn", "--threshold", 0.99)
    assert (code, out.read_bytes()) == (2, before)  # refused before anything was searched
    assert "exists already" in err
    code, said, _ = run(*words, "--threshold", 0.99)
    assert "0 detections in 60" in said
    assert json.loads(out.read_text()) == []


def test_clean_data_come_out_as_they_went_in(pictures, tmp_path, run):
    code, said, err = run("convert", pictures, "--out", tmp_path / "clean.json")
    assert code == 0, err
    theirs, ours = (json.loads(path.read_text()) for path in (pictures / "annotations.json", tmp_path / "clean.json"))
    assert ours == theirs
    assert f"read it with coco:{tmp_path / 'clean.json'},{pictures / 'images'}" in said


def test_what_is_dropped_or_clipped_is_listed(bad, tmp_path, run):
    def change(whole, folder):
        first, second, third = whole["annotations"][:3]
        first["bbox"] = [5, 5, 0, 4]
        second["bbox"] = [-6, 2, 20, 10]
        third["bbox"] = [50, 2, 20, 10]

    folder = bad(change)
    assert run("convert", folder, "--out", tmp_path / "clean.json")[0] == 2
    assert not (tmp_path / "clean.json").exists()
    code, said, _ = run("convert", folder, "--out", tmp_path / "clean.json", "--drop-bad-boxes")
    assert code == 0
    assert "left out annotation whose box has no area: id 1 " in said
    assert "left out annotation whose box lies outside the picture: id 3 " in said
    assert "cut at the edge: 1 of image 1000 (000.png)" in said
    kept = json.loads((tmp_path / "clean.json").read_text())["annotations"]
    assert [record["id"] for record in kept[:2]] == [2, 4]
    assert kept[0]["bbox"] == [0, 2, 14, 10]
    code, said, _ = run("inspect", f"coco:{tmp_path / 'clean.json'},{folder / 'images'}")
    assert code == 0


def test_inspect_shows_what_is_there(pictures, tmp_path, run):
    code, said, err = run("inspect", pictures, "--draw", tmp_path / "sheet.png")
    assert code == 0, err
    assert "60 pictures, 32x32" in said
    assert "6 without objects" in said
    assert all(name in said for name in SHAPES)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 320
    code, said, _ = run("inspect", pictures, "--json")
    assert json.loads(said)["sizes"]["medium"] == 0


# bad input: exit code 2, one clear line


def change_box(box):
    def change(whole, folder):
        whole["annotations"][1]["bbox"] = box

    return change


def remove_picture(whole, folder):
    (folder / "images" / "002.png").unlink()


def spoil_picture(whole, folder):
    (folder / "images" / "002.png").write_bytes(b"no picture")


def other_size(whole, folder):
    Image.new("RGB", (20, 20)).save(folder / "images" / "002.png")


def unknown_category(whole, folder):
    whole["annotations"][1]["category_id"] = 4


def unknown_image(whole, folder):
    whole["annotations"][1]["image_id"] = 4


def no_objects(whole, folder):
    whole["annotations"] = []


BAD = {
    "outside": (change_box([40, 0, 5, 5]), "lies outside the picture: id 2"),
    "no area": (change_box([4, 4, 0, 5]), "has no area: id 2"),
    "nan": (change_box([4, 4, float("nan"), 5]), "is not finite: id 2"),
    "three numbers": (change_box([4, 4, 5]), "is not four numbers: id 2"),
    "category": (unknown_category, "of a category that is not there: id 2"),
    "image": (unknown_image, "of an image that is not there: id 2"),
    "missing": (remove_picture, "missing: id 1002 (002.png)"),
    "unreadable": (spoil_picture, "002.png is not a picture"),
    "size": (other_size, "002.png is 20x20, stated 32x32"),
    "empty": (no_objects, "holds no annotations"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_are_named_in_a_line(kind, bad, tmp_path, run):
    change, says = BAD[kind]
    folder = bad(change)
    for words in (("inspect", folder), ("train", "--data", folder, "--out", tmp_path / "out")):
        code, said, err = run(*words)
        assert (code, said) == (2, "")
        assert err.startswith("counterproof: ")
        assert err.count("\n") == 1
        assert says in err
        assert str(folder) in err
    assert not (tmp_path / "out").exists()
    if kind in ("outside", "no area", "nan"):
        assert f"counterproof detection convert {folder} --out clean.json --drop-bad-boxes" in err


def test_other_files_than_coco_are_named(tmp_path, detector, run):
    for name, content, says in (
        ("results.json", '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "COCO results"),
        ("other.json", '{"a": 1}', "has no list of records 'images'"),
        ("broken.json", "{", "is not a COCO json"),
    ):
        (tmp_path / name).write_text(content)
        code, _, err = run("train", "--data", tmp_path / name, "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    code, _, err = run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "nowhere is not there" in err


@pytest.mark.parametrize("verb", ["train", "predict", "eval"])
def test_a_checkpoint_of_another_architecture_is_named(verb, pictures, tmp_path, run):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    out = () if verb == "eval" else ("--out", tmp_path / ("out.json" if verb == "predict" else "out"))
    code, _, err = run(verb, "--data", pictures, "--model", tmp_path / "bert", *out)
    assert (code, err.count("\n")) == (2, 1)
    assert "bert checkpoint, not a detector" in err
    code, _, err = run(verb, "--data", pictures, "--model", tmp_path / "nothing", *out)
    assert (code, err.count("\n")) == (2, 1)
    assert "is no model folder or hub id" in err


def test_more_objects_than_queries_are_named(pictures, tmp_path, run):
    model = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=2, id2label=dict(enumerate(SHAPES)))
    save_detector(model, tmp_path / "two", Pixels(side=32))
    code, _, err = run("train", "--data", pictures, "--model", tmp_path / "two", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "objects, the detector only 2 queries" in err
    assert ".png)" in err


def test_results_and_wishes_that_will_not_do_are_named(pictures, detector, tmp_path, run):
    (tmp_path / "r.json").write_text('[{"image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 1}]')
    truth = pictures / "annotations.json"
    before = truth.read_bytes()
    model = ("--model", detector)
    for words, says in (
        (("eval", "--data", pictures, "--results", tmp_path / "r.json"), "does not have: record 1"),
        (("eval", "--data", pictures), "say what to score"),
        (("eval", "--data", pictures, *model, "--results", tmp_path / "r.json"), "say what to score"),
        (("eval", "--data", pictures, *model, "--out", tmp_path / "x.pdf"), "should end in .html or .json or .csv"),
        (("eval", "--data", pictures, *model, "--split", "val"), "has no splits"),
        (("eval", "--data", truth, *model, "--out", truth), "is what is read"),
        (("convert", f"coco:{truth},{pictures / 'images'}", "--out", truth), "is what is read"),
        (("predict", "--data", pictures, *model, "--out", tmp_path / "x.txt"), "should end in .json"),
        (("predict", "--data", tmp_path, *model, "--out", tmp_path / "x.json"), "looks like COCO results"),
        (("train", "--data", pictures, "--out", detector), "not empty and not a training"),
        (("train", "--data", pictures, "--out", tmp_path / "o", "--method", "grup-detr"), "no method 'grup-detr'"),
        (("train", "--data", pictures, "--out", tmp_path / "o", "--device", "cuda:7"), "device 'cuda:7'"),
        (("inspect", pictures, "--draw", tmp_path / "x.jpg"), "should end in .png"),
    ):
        code, _, err = run(*words)
        assert code == 2, (words, err)
        assert says in err
        assert err.count("\n") == 1
    assert truth.read_bytes() == before


def test_help_imports_nothing_heavy():
    check = (
        "import sys; sys.argv = ['counterproof', 'detection', 'train', '--help']\n"
        "from counterproof.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# counterproof compare detection --data coco:annotations.json,images/


def test_a_comparison_reads_a_file_and_its_folder(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    given = own_data(DETECTION, Path("coco:annotations.json,images/"), Journal())
    assert given.says.startswith("60 pictures, ")
    monkeypatch.chdir("/")
    trial = Trial(seed=0, data=Path(given.path))
    train, held_out = load_data(trial, {"evaluated": 500})
    assert (len(train.pictures), len(held_out.pictures)) == (48, 12)
    assert train.pixels(0).shape == (32, 32, 3)
