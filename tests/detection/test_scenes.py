"""Scenes: boxes are exact, overlaps bounded, and everything follows from the generator."""

import numpy as np
import pytest

from counterproof.detection.scenes import SHAPES, draw_scenes


def iou(a, b):
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    shared = sides.prod()
    return shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)


def test_boxes_lie_inside_and_overlap_no_more_than_asked():
    for scene in draw_scenes(60, np.random.default_rng(0), objects=(2, 6), overlap=0.3):
        assert scene.pixels.shape == (48, 48, 3)
        assert scene.pixels.dtype == np.uint8
        assert 1 <= len(scene.boxes) == len(scene.labels) <= 6
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, 2:] <= 48).all()
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        assert (sides >= 7).all()
        assert (sides <= 21).all()
        for number, box in enumerate(scene.boxes):
            assert all(iou(box, other) <= 0.3 for other in scene.boxes[:number])


def test_a_shape_touches_all_four_sides_of_its_box_and_leaves_the_rest_alone():
    seen = set()
    for seed in range(30):
        scene = draw_scenes(1, np.random.default_rng(seed), objects=(1, 1), size=(0.3, 0.5), noise=0)[0]
        empty = draw_scenes(1, np.random.default_rng(seed), objects=(1, 1), size=(0.3, 0.5), noise=0)[0]
        assert np.array_equal(scene.pixels, empty.pixels)
        left, top, right, bottom = scene.boxes[0].astype(int)
        inside = scene.pixels[top:bottom, left:right].astype(int)
        # Without noise a shape is of one colour, and the ground changes from pixel to pixel by 3 levels at most.
        colour = inside[len(inside) // 2 + 1, inside.shape[1] // 2]
        painted = (np.abs(scene.pixels.astype(int) - colour) <= 0).all(-1)
        rows, columns = np.where(painted)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
        seen.add(SHAPES[scene.labels[0]])
        share = painted.sum() / (right - left) / (bottom - top)
        low, high = {"disk": (0.7, 0.86), "square": (1, 1), "triangle": (0.5, 0.62)}[SHAPES[scene.labels[0]]]
        assert low <= share <= high
    assert seen == set(SHAPES)


def test_the_same_generator_gives_the_same_scenes_and_more_scenes_begin_alike():
    few, many = (draw_scenes(number, np.random.default_rng(5)) for number in (3, 7))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(few, many))
    assert not np.array_equal(many[0].pixels, many[1].pixels)


@pytest.mark.parametrize(
    "wrong", [{"number": 0}, {"side": 8}, {"objects": (3, 2)}, {"size": (0.0, 0.2)}, {"overlap": 2}]
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ValueError):
        draw_scenes(**{"number": 1, "rng": np.random.default_rng(0), **wrong})
