"""Batches follow from seed and step; boxes go through flips, resizing and padding unharmed."""

import numpy as np
import pytest
import torch

from counterproof.detection.annotations import DetectionData, Picture
from counterproof.detection.batches import Batches, Pixels, collate, median_side, scene_data
from counterproof.detection.scenes import draw_scenes
from counterproof.errors import UserError


def picture(number, width, height, boxes, crowd=None):
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return Picture(
        id=number,
        name=f"{number}.png",
        width=width,
        height=height,
        file=None,
        boxes=boxes,
        labels=np.arange(len(boxes)) % 2,
        crowd=np.zeros(len(boxes), dtype=bool) if crowd is None else np.asarray(crowd),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(-1),
        annotation_ids=np.arange(len(boxes)),
    )


def marked(width, height, box):
    """A black picture with a white box."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    left, top, right, bottom = (int(value) for value in box)
    image[top:bottom, left:right] = 255
    return image


BOXES = [(8, 4, 24, 20), (40, 10, 56, 40), (2, 30, 20, 46)]
SIZES = [(64, 32), (64, 48), (32, 64)]


@pytest.fixture
def data():
    boxes = [(8, 4, 24, 20), (40, 10, 56, 40), (2, 30, 20, 46)]
    return DetectionData(
        pictures=tuple(picture(n, *SIZES[n], [boxes[n]]) for n in range(3)),
        classes=("a", "b"),
        category_ids=(1, 7),
        source="made up",
        images=tuple(marked(*SIZES[n], boxes[n]) for n in range(3)),
    )


def found_box(values, mask):
    """Where a batch's picture is white, in pixels of the unpadded picture, and the picture's size."""
    bright = (values.mean(0) > 0.5) & mask.bool()
    rows, columns = torch.where(bright)
    size = (int(mask.any(0).sum()), int(mask.any(1).sum()))
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return [int(value) for value in corners], size


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("side", [None, 96])
def test_boxes_point_at_the_same_pixels_after_flip_resize_and_padding(data, side, stretch):
    pixels = Pixels(side=side, stretch=stretch, mean=(0, 0, 0), std=(1, 1, 1), multiple=16)
    batches = Batches(data, 3, pixels, seed=1)
    flipped = 0
    for step in range(6):
        batch = batches[step]
        assert batch["pixel_values"].shape[-1] % 16 == batch["pixel_values"].shape[-2] % 16 == 0
        for values, mask, target, index in zip(
            batch["pixel_values"], batch["pixel_mask"], batch["labels"], batches.indices(step)
        ):
            corners, (width, height) = found_box(values, mask)
            cx, cy, w, h = target["boxes"][0].tolist()
            told = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            assert np.allclose(corners, told, atol=1.01), (side, stretch, corners, told)
            flipped += abs(cx - (BOXES[index][0] + BOXES[index][2]) / 2 / SIZES[index][0]) > 0.01
            assert (values[:, ~mask.bool()] == 0).all()
            if side is not None:
                assert (width, height) == (96, 96) if stretch else max(width, height) == 96
    assert 3 <= flipped <= 15


def test_a_pass_sees_every_picture_once_and_steps_follow_from_the_seed(data):
    batches = Batches(data, 2, Pixels(), seed=4)
    places = [index for step in range(6) for index in batches.indices(step)]
    assert [sorted(places[start : start + 3]) for start in range(0, 12, 3)] == [[0, 1, 2]] * 4
    again = Batches(data, 2, Pixels(), seed=4)
    assert again.indices(5) == batches.indices(5)  # asked for out of order
    assert torch.equal(again[5]["pixel_values"], batches[5]["pixel_values"])
    assert [Batches(data, 3, Pixels(), seed=seed).indices(0) for seed in range(8)] != [batches.indices(0)] * 8


def test_scales_shrink_a_whole_batch(data):
    batches = Batches(data, 1, Pixels(side=64), seed=0, scales=(0.5, 1.0))
    sides = {max(batches[step]["pixel_values"].shape[-2:]) for step in range(12)}
    assert min(sides) >= 32
    assert max(sides) <= 64
    assert len(sides) > 4


def test_crowds_are_left_out_and_pictures_without_objects_stay():
    data = DetectionData(
        pictures=(picture(1, 32, 32, [(0, 0, 8, 8), (4, 4, 30, 30)], crowd=[False, True]), picture(2, 32, 32, [])),
        classes=("a", "b"),
        category_ids=(1, 2),
        source="made up",
        images=(np.zeros((32, 32, 3), np.uint8),) * 2,
    )
    labels = Batches(data, 5, Pixels(), seed=0)[0]["labels"]
    assert sorted(len(target["class_labels"]) for target in labels) == [0, 1]
    assert all(target["boxes"].shape == (len(target["class_labels"]), 4) for target in labels)
    assert median_side(data, Pixels()) == 8
    assert median_side(data, Pixels(side=64)) == 16
    with pytest.raises(UserError, match="no objects"):
        median_side(data.subset([1]), Pixels())


def test_normalisation_is_per_channel():
    image = np.stack([np.full((4, 4), value) for value in (0, 51, 255)], -1).astype(np.uint8)
    values = collate([image], [np.zeros((0, 4))], [np.zeros(0)], Pixels(mean=(0.1, 0.2, 0.5), std=(1, 2, 0.5)))
    torch.testing.assert_close(values["pixel_values"][0, :, 0, 0], torch.tensor([-0.1, 0.0, 1.0]))


def test_scenes_become_a_data_set():
    scenes = draw_scenes(3, np.random.default_rng(0))
    data = scene_data(scenes)
    assert [len(one.boxes) for one in data.pictures] == [len(scene.boxes) for scene in scenes]
    assert np.array_equal(data.pixels(1), scenes[1].pixels)
    numbers = [number for one in data.pictures for number in one.annotation_ids.tolist()]
    assert len(set(numbers)) == len(numbers)
