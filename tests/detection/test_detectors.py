"""Detectors load, predict and save in transformers' own terms; what cannot be loaded is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DetrConfig, DetrForObjectDetection, ResNetConfig

from counterproof.detection.annotations import DetectionData, Picture
from counterproof.detection.batches import Pixels, scene_data
from counterproof.detection.detectors import (
    best,
    check_queries,
    classes_of,
    load_detector,
    pixels_of,
    predict,
    save_detector,
)
from counterproof.detection.scenes import draw_scenes
from counterproof.detection.tiny import tiny_detector
from counterproof.errors import UserError


@pytest.fixture(scope="module")
def data():
    return scene_data(draw_scenes(5, np.random.default_rng(0), side=40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector")
    model = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=6)
    model.config.id2label = {0: "disk", 1: "square", 2: "triangle"}
    save_detector(model, path, Pixels(side=40, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0)))
    return path


def test_a_saved_detector_loads_without_us(folder):
    code = (
        "import sys, torch\nfrom transformers import AutoModelForObjectDetection\n"
        f"model = AutoModelForObjectDetection.from_pretrained({str(folder)!r}).eval()\n"
        "print(type(model).__name__, model(pixel_values=torch.zeros(1, 3, 40, 40)).logits.shape[1])\n"
        "assert not any('counterproof' in name for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DeformableDetrForObjectDetection", "6"]
    about = json.loads((folder / "preprocessor_config.json").read_text())
    assert about["image_mean"] == [0.1, 0.2, 0.3]
    assert about["size"] == {"shortest_edge": 40, "longest_edge": 40}


def test_it_comes_back_with_its_weights_and_pixels(folder):
    model = load_detector(folder, ("disk", "square", "triangle"))
    assert pixels_of(folder, model, 64) == Pixels(side=64, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert model.config.auxiliary_loss
    assert not model.training
    again = load_detector(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_other_classes_get_a_new_head_drawn_from_the_seed(folder):
    before = torch.random.get_rng_state()
    one, two, other = (load_detector(folder, ("cat", "dog"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.config.id2label == {0: "cat", 1: "dog"}
    heads = [model.class_embed[0].weight.detach() for model in (one, two, other)]
    assert heads[0].shape == (2, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    old = load_detector(folder)
    assert torch.equal(one.bbox_embed[0].layers[0].weight, old.bbox_embed[0].layers[0].weight)


def test_a_loaded_backbone_is_trainable(tmp_path):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    config = DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=2,
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    assert all(value.requires_grad for value in load_detector(tmp_path).parameters())


@pytest.mark.parametrize("kind", ["missing", "bert", "pickle", "empty"])
def test_what_is_no_detector_is_named(kind, tmp_path, folder):
    says = {"missing": "no model folder", "bert": "bert checkpoint, not a detector", "pickle": "cannot be loaded"}
    path = tmp_path / kind
    if kind == "bert":
        BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        ).save_pretrained(path)
    elif kind == "pickle":
        model = load_detector(folder)
        path.mkdir()
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(UserError, match=says.get(kind, "no model folder")) as raised:
        load_detector(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_predictions_are_boxes_in_the_pictures_own_pixels(data):
    class Told(torch.nn.Module):
        """Says where the first object is, whatever the picture."""

        def forward(self, pixel_values, pixel_mask):
            assert pixel_values.shape[-2:] == pixel_mask.shape[-2:]
            logits = torch.full((len(pixel_values), 3, 3), -9.0)
            logits[:, 1, 2] = 2.0
            logits[:, 0, 1] = 1.0
            boxes = torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1]])
            return type("Out", (), {"logits": logits, "pred_boxes": boxes.expand(len(pixel_values), 3, 4)})

    for side in (None, 80):
        found = predict(Told(), data, Pixels(side=side), batch=2)
        assert len(found) == 5 * 9
        first = [one for one in found if one["image_id"] == data.pictures[3].id][:2]
        assert [one["category_id"] for one in first] == [3, 2]
        assert first[0]["bbox"] == pytest.approx([0, 0, 20, 40])
        assert first[1]["bbox"] == pytest.approx([15, 10, 10, 20])
        assert first[0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    renamed = predict(Told(), data, Pixels(), classes=[None, 0, None])
    assert {one["category_id"] for one in renamed} == {1}


def test_predictions_of_pictures_of_unequal_size_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((40, 64), (64, 48), (64, 64))]
    none = np.zeros((0, 4), np.float32)
    data = DetectionData(
        tuple(
            Picture(
                n, str(n), image.shape[1], image.shape[0], None, none, np.zeros(0, np.int64), np.zeros(0, bool),
                np.zeros(0, np.float32), np.zeros(0, np.int64),
            )
            for n, image in enumerate(images)
        ),
        ("a", "b", "c"), (1, 2, 3), "made up", tuple(images),
    )  # fmt: skip
    model = tiny_detector("deformable", channels=(8, 16), width=32, num_queries=6).eval()
    with torch.no_grad():
        model.bbox_embed[0].layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    together, alone = (predict(model, data, Pixels(multiple=16), batch=size) for size in (3, 1))
    for first, second in zip(together[-18:], alone[-18:]):
        assert first["image_id"] == second["image_id"] == 2
        assert first["bbox"] == pytest.approx(second["bbox"], abs=1e-2)


def test_the_best_are_ranked_over_queries_and_classes():
    logits = torch.tensor([[[3.0, -1.0], [2.0, 2.5]]])
    boxes = torch.tensor([[[0.1] * 4, [0.2] * 4]])
    scores, labels, places = best(logits, boxes, softmax=False, most=3)
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 2.5, 2.0]).sigmoid())
    assert labels[0].tolist() == [0, 1, 0]
    assert places[0, :, 0].tolist() == pytest.approx([0.1, 0.2, 0.2])
    # the last class is "no object": a query that prefers it still says its best class, with that class's probability
    logits = torch.tensor([[[1.0, 0.0, 5.0], [0.0, 2.0, 0.0]]])
    scores, labels, places = best(logits, boxes, softmax=True)
    assert labels[0].tolist() == [1, 0]
    assert places[0, :, 0].tolist() == pytest.approx([0.2, 0.1])
    assert scores[0, 1] == pytest.approx(float(logits[0, 0].softmax(-1)[0]))


def test_classes_are_matched_by_name(data, folder):
    model = load_detector(folder)
    model.config.id2label = {0: "cat", 1: "Square", 2: "disk"}
    assert classes_of(model, data, folder) == [None, 1, 0]
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    with pytest.raises(UserError, match=r"detects cat, dog, cow, .* has disk, square, triangle: no class in common"):
        classes_of(model, data, folder)


def test_more_objects_than_queries_names_the_picture(data, folder):
    model = load_detector(folder)
    check_queries(model, data)
    most = max(range(5), key=lambda number: len(data.pictures[number].boxes))
    model.config.num_queries = len(data.pictures[most].boxes) - 1
    with pytest.raises(UserError, match=r"image \d+ \(scene-\d+\) has \d objects, the detector only \d queries"):
        check_queries(model, data)


def test_a_damaged_preprocessor_file_is_named(folder, tmp_path):
    model = load_detector(folder)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [1]}')
    with pytest.raises(UserError, match=r"preprocessor_config.json"):
        pixels_of(tmp_path, model, None)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert pixels_of(tmp_path, model, None).std == (1.0, 1.0, 1.0)
