import numpy as np
import pytest
from PIL import Image

from counterproof.detection.annotations import DetectionData, Picture
from counterproof.detection.drawing import DARK, FOUND, TRUTH, draw_detections, draw_pairs

CLASSES = ("disk", "square")
GREY = np.full((48, 64, 3), 128, np.uint8)
BOX = [[10.0, 12, 30, 40]]


def is_colour(image, colour):
    return (np.asarray(image) == colour).all(axis=-1)


def test_small_pictures_are_enlarged_by_the_nearest_pixel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = draw_detections(pixels, classes=CLASSES)
    assert image.mode == "RGB"
    assert image.size == (320, 240)
    np.testing.assert_array_equal(np.asarray(image), pixels.repeat(5, axis=0).repeat(5, axis=1))
    assert draw_detections(pixels, classes=CLASSES, scale=2).size == (128, 96)
    assert draw_detections(np.zeros((700, 500, 3), np.uint8), classes=CLASSES).size == (500, 700)
    assert draw_detections(np.zeros((700, 500, 3), np.uint8), classes=CLASSES, scale=0.5).size == (250, 350)


@pytest.mark.parametrize("ground", [0, 128, 255, FOUND, TRUTH])
def test_frames_stand_on_the_boxes_edges(ground):
    """Scale 5: the box (10, 12, 30, 40) covers columns 50 to 149 and rows 60 to 199."""
    pixels = np.empty((48, 64, 3), np.uint8)
    pixels[:] = ground
    image = draw_detections(pixels, found=(BOX, [1], [0.8]), classes=CLASSES)
    drawn, dark = np.asarray(image), is_colour(image, DARK)
    for edge in (drawn[60:200, 50:52], drawn[60:200, 148:150], drawn[60:62, 50:150], drawn[198:200, 50:150]):
        assert (edge == FOUND).all()
    for beside in (dark[70:200, 49], dark[70:200, 150], dark[200, 50:150], dark[70:190, 52], dark[70:190, 147]):
        assert beside.all()  # so that the frame shows on a ground of its own colour
    inside = drawn[64:196, 54:146]
    assert (inside == np.asarray(ground)).all()
    away = np.ones((240, 320), bool)
    away[40:202, 48:152] = False
    assert (drawn[away] == np.asarray(ground)).all()


def test_truth_is_dashed_and_another_colour():
    image = draw_detections(GREY, truth=(BOX, [0]), classes=CLASSES)
    top = np.asarray(image)[60, 50:150]
    blue, dark = (top == TRUTH).all(axis=-1), (top == DARK).all(axis=-1)
    assert (blue | dark).all()
    assert blue[:8].all()
    assert dark[8:16].all()
    assert 0.4 < blue.mean() < 0.65
    assert not is_colour(image, FOUND).any()
    both = draw_detections(GREY, truth=(BOX, [0]), found=([[2, 2, 9, 9]], [1], [0.5]), classes=CLASSES)
    assert is_colour(both, TRUTH).any()
    assert is_colour(both, FOUND).any()


def contrast(first, second):
    """WCAG 2's ratio of the relative luminances."""

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_letters_are_dark_on_a_plate_of_the_frames_colour():
    assert contrast(DARK, FOUND) > 7
    assert contrast(DARK, TRUTH) > 7
    for ground in (0, 255):
        pixels = np.full((48, 64, 3), ground, np.uint8)
        image = draw_detections(pixels, found=(BOX, [1], [0.8]), classes=CLASSES)
        plate = np.asarray(image)[44:60, 50:100]  # above the box
        assert (plate == FOUND).all(axis=-1).mean() > 0.5
        assert (plate.max(axis=-1) < 60).sum() > 30
        truth = draw_detections(pixels, truth=(BOX, [1]), classes=CLASSES)
        assert (np.asarray(truth)[201:216, 50:80] == TRUTH).all(axis=-1).mean() > 0.5  # below it


@pytest.mark.parametrize(
    "box", [[0, 0, 64, 48], [60, 0, 64, 4], [0, 44, 4, 48], [60, 44, 64, 48], [-5, -5, 70, 60], [63.9, 10, 64, 10.2]]
)
@pytest.mark.parametrize("classes", [CLASSES, ("a name far too long for any picture of this size " * 3, "b")])
def test_plates_stay_inside_the_picture(box, classes):
    """A plate's whole height of colour is there, wherever the box lies."""
    for options, colour in (({"found": ([box], [0], [1.0])}, FOUND), ({"truth": ([box], [0])}, TRUTH)):
        image = draw_detections(GREY, classes=classes, **options)
        assert image.size == (320, 240)
        rows = is_colour(image, colour).sum(axis=1)
        assert (rows >= 7).sum() >= 16  # letters leave so much of it


@pytest.mark.parametrize("height", [16, 18, 22])
def test_plates_stay_inside_pictures_hardly_higher_than_themselves(height):
    pixels = np.full((height, 64, 3), 128, np.uint8)
    box = [[0, height - 8, 20, height - 4]]
    for options, colour in (({"found": (box, [0], [1.0])}, FOUND), ({"truth": (box, [0])}, TRUTH)):
        image = draw_detections(pixels, classes=CLASSES, scale=1, **options)
        assert (is_colour(image, colour).sum(axis=1) >= 7).sum() >= 16


def test_weak_detections_are_left_out_and_the_surest_is_on_top():
    few = draw_detections(GREY, found=([*BOX, [40, 5, 60, 20]], [0, 1], [0.29, 0.3]), classes=CLASSES)
    only = draw_detections(GREY, found=([[40, 5, 60, 20]], [1], [0.3]), classes=CLASSES)
    np.testing.assert_array_equal(np.asarray(few), np.asarray(only))
    none = draw_detections(GREY, found=(BOX, [0], [0.9]), classes=CLASSES, least_score=0.95)
    assert (np.asarray(none) == 128).all()
    one, other = ([BOX[0], BOX[0]], [0, 1], [0.4, 0.9]), ([BOX[0], BOX[0]], [1, 0], [0.9, 0.4])
    images = [np.asarray(draw_detections(GREY, found=found, classes=CLASSES)) for found in (one, other)]
    np.testing.assert_array_equal(*images)
    surest = np.asarray(draw_detections(GREY, found=(BOX, [1], [0.9]), classes=CLASSES))
    np.testing.assert_array_equal(images[0][44:60, 50:120], surest[44:60, 50:120])


def test_bad_input_is_refused():
    for bad in (GREY.astype(np.float32), GREY[0], GREY[..., :1], GREY[:0]):
        with pytest.raises(ValueError, match="pixels are"):
            draw_detections(bad, classes=CLASSES)
    for found in ((BOX, [0, 1], [1, 1]), (BOX, [0], [1, 1]), ([[1, 2, 3]], [0], [1])):
        with pytest.raises(ValueError, match="found has boxes"):
            draw_detections(GREY, found=found, classes=CLASSES)
    for label in (2, -1):
        with pytest.raises(ValueError, match="there are 2 classes"):
            draw_detections(GREY, truth=(BOX, [label]), classes=CLASSES)
    with pytest.raises(ValueError, match="not finite"):
        draw_detections(GREY, truth=([[1, 2, np.nan, 4]], [0]), classes=CLASSES)
    with pytest.raises(ValueError, match="scale"):
        draw_detections(GREY, classes=CLASSES, scale=0)


def scenes(sizes=((48, 64),) * 5, crowd=False):
    pictures = tuple(
        Picture(
            100 + i,
            f"{i}.png",
            width,
            height,
            None,
            np.array(BOX, np.float32),
            np.array([1]),
            np.array([crowd]),
            np.array([560], np.float32),
            np.array([i]),
        )
        for i, (height, width) in enumerate(sizes)
    )
    images = [np.full((height, width, 3), 40 + 10 * i, np.uint8) for i, (height, width) in enumerate(sizes)]
    return DetectionData(pictures, CLASSES, (3, 8), "made", images)


RESULTS = [{"image_id": 100 + i, "category_id": 8, "bbox": [20, 12, 20, 28], "score": 0.9} for i in range(5)]


def test_pairs_have_truth_at_the_left_and_detections_at_the_right():
    data = scenes()
    sheet = np.asarray(draw_pairs(data, RESULTS, [4, 0, 2], columns=2))
    left = np.asarray(draw_detections(data.pixels(4), truth=(BOX, [1]), classes=CLASSES))
    right = np.asarray(draw_detections(data.pixels(4), found=([[20, 12, 40, 40]], [1], [0.9]), classes=CLASSES))
    height, width = left.shape[:2]
    for expected, x in ((left, 8), (right, 8 + width + 4)):
        np.testing.assert_array_equal(sheet[26 : 26 + height, x : x + width], expected)
    wide = 2 * width + 4 + 8
    assert sheet.shape == (2 * (height + 18 + 8) + 8, 2 * wide + 8, 3)
    assert (sheet[26 + height // 4, 8 + wide + 10] == 40).all()  # picture 0, in the second column
    assert (sheet[-20, -20] == 255).all()  # no fourth
    assert draw_pairs(data, RESULTS, [0, 1], columns=5).size == draw_pairs(data, RESULTS, [0, 1], columns=2).size


def test_pairs_without_detections_with_crowds_and_of_several_sizes():
    sheet = draw_pairs(scenes(crowd=True), [], range(5), columns=3)
    assert not is_colour(sheet, FOUND).any()
    assert not is_colour(sheet, TRUTH).any()
    large = draw_pairs(scenes(((1000, 500), (48, 64))), RESULTS[:2], [0, 1], columns=1)
    assert large.size == (2 * 320 + 4 + 16, 2 * (320 + 18 + 8) + 8)
    with pytest.raises(ValueError, match="0 indices"):
        draw_pairs(scenes(), [], [])
    with pytest.raises(ValueError, match="category 4"):
        draw_pairs(scenes(), [{**RESULTS[0], "category_id": 4}], [0])


def test_inputs_are_not_changed():
    data = scenes()
    pixels, boxes, labels, scores = GREY.copy(), np.array(BOX), np.array([1]), np.array([0.9])
    image = draw_detections(pixels, truth=(boxes, labels), found=(boxes, labels, scores), classes=CLASSES, scale=1)
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(pixels, GREY)
    np.testing.assert_array_equal(boxes, BOX)
    results = [dict(record, bbox=list(record["bbox"])) for record in RESULTS]
    draw_pairs(data, results, range(5))
    assert results == RESULTS
    assert (data.images[0] == 40).all()
    np.testing.assert_array_equal(data.pictures[0].boxes, BOX)
