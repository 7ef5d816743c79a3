"""Boxes on pictures: what is there, dashed in blue, and what was found, in orange with its score.

The two colours are told apart with any common colour vision (Okabe and Ito's palette), and each line stands on a dark
one, so that it shows on any ground.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterproof.detection.annotations import DetectionData
from counterproof.errors import extra

with extra("detection"):
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_detections", "draw_pairs"]

TRUTH = (86, 180, 233)
FOUND = (230, 159, 0)
DARK = (0, 0, 0)
PAPER = (255, 255, 255)
LEAST_SIDE = 320  # to which the longer side of a small picture is enlarged, at least
TEXT = 12  # height of a label's letters in pixels
DASH = 8  # length of a dash and of the gap after it, in pixels
MARGIN = 8  # between the cells of a sheet

Colour = tuple[int, int, int]
Boxes = tuple[ArrayLike, ArrayLike]
ScoredBoxes = tuple[ArrayLike, ArrayLike, ArrayLike]


def draw_detections(
    pixels: ArrayLike,
    *,
    truth: Boxes | None = None,
    found: ScoredBoxes | None = None,
    classes: Sequence[str],
    least_score: float = 0.3,
    scale: float | None = None,
) -> Image.Image:
    """A copy of a picture with boxes, class names and scores on it.

    Args:
        pixels: (height, width, 3) uint8 RGB.
        truth: (boxes, labels) of the objects: (n, 4) corners x1, y1, x2, y2 in pixels, (n,) indices into `classes`.
            Dashed, the name below.
        found: (boxes, labels, scores) of the detections. Solid, name and score above, the surest on top.
        classes: names.
        least_score: detections of a lower score are not drawn.
        scale: factor of enlargement, the nearest pixel being repeated, or below 1 of reduction. None: the smallest
            whole number that makes the longer side 320 pixels or more.

    Returns:
        An RGB picture of `scale` times the size, rounded.

    Raises:
        ValueError: pixels, boxes, labels or scores of another shape, or a label that is no index of `classes`.
    """
    canvas = np.asarray(pixels)
    if canvas.dtype != np.uint8 or canvas.ndim != 3 or canvas.shape[2] != 3 or 0 in canvas.shape:
        raise ValueError(f"pixels are {canvas.dtype} {canvas.shape}; expected uint8 (height, width, 3)")
    height, width = canvas.shape[:2]
    factor = math.ceil(LEAST_SIDE / max(height, width)) if scale is None else scale
    if not 0 < factor < math.inf:
        raise ValueError(f"scale={scale}; expected a number above 0")
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(canvas)
    image = image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(TEXT)
    plates: list[tuple[str, tuple[int, int, int, int], Colour]] = []  # on top of every frame
    if truth is not None:
        boxes, labels, _ = _arrays("truth", classes, *truth)
        for box, label in zip(boxes * factor, labels):
            corners = _lines(box, size)
            _frame(draw, corners, TRUTH, dashed=True)
            plates.append((classes[label], corners, TRUTH))
    if found is not None:
        boxes, labels, scores = _arrays("found", classes, *found)
        for index in np.argsort(scores, kind="stable"):
            if scores[index] >= least_score:
                corners = _lines(boxes[index] * factor, size)
                _frame(draw, corners, FOUND, dashed=False)
                plates.append((f"{classes[labels[index]]} {scores[index]:.2f}", corners, FOUND))
    for text, corners, colour in plates:
        _label(draw, font, text, corners, colour, size, below=colour == TRUTH)
    return image


def draw_pairs(
    data: DetectionData,
    results: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    *,
    columns: int = 2,
    least_score: float = 0.3,
) -> Image.Image:
    """A sheet of pictures, each twice: with its objects, and beside that with what was found in it.

    Args:
        data: the pictures and their objects; crowds are not drawn.
        results: COCO results (see `counterproof.detection.evaluation`); those of other pictures are passed over.
        indices: of the pictures to draw, row by row.
        columns: pictures (pairs) in a row.
        least_score: detections of a lower score are not drawn.

    Raises:
        ValueError: no indices, fewer than one column, a category that the data does not have.
        UserError: a picture that cannot be read.
    """
    chosen = [int(index) for index in indices]
    if not chosen or columns < 1:
        raise ValueError(f"{len(chosen)} indices in {columns} columns; expected one of each or more")
    by_picture: dict[int, list[Mapping[str, Any]]] = {data.pictures[index].id: [] for index in chosen}
    for record in results:
        if record["image_id"] in by_picture:
            by_picture[record["image_id"]].append(record)
    cells = [_pair(data, index, by_picture[data.pictures[index].id], least_score) for index in chosen]
    width, height = (max(cell.size[axis] for cell in cells) + MARGIN for axis in (0, 1))
    across = min(columns, len(cells))
    sheet = Image.new("RGB", (across * width + MARGIN, math.ceil(len(cells) / across) * height + MARGIN), PAPER)
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % across * width + MARGIN, place // across * height + MARGIN))
    return sheet


def _pair(data: DetectionData, index: int, records: Sequence[Mapping[str, Any]], least_score: float) -> Image.Image:
    """A picture with its objects, the same with what was found, captions above both."""
    picture = data.pictures[index]
    label_of = {identity: label for label, identity in enumerate(data.category_ids)}
    strange = [record["category_id"] for record in records if record["category_id"] not in label_of]
    if strange:
        raise ValueError(f"category {strange[0]} of a detection is none of the data's, {data.category_ids}")
    corners = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    scores = np.array([record["score"] for record in records], dtype=np.float64)
    pixels = data.pixels(index)
    longer = max(pixels.shape[:2])
    scale = math.ceil(LEAST_SIDE / longer) if longer <= LEAST_SIDE else LEAST_SIDE / longer
    objects = (picture.boxes[~picture.crowd], picture.labels[~picture.crowd])
    detections = (corners, [label_of[record["category_id"]] for record in records], scores)
    left = draw_detections(pixels, truth=objects, classes=data.classes, scale=scale)
    right = draw_detections(pixels, found=detections, classes=data.classes, least_score=least_score, scale=scale)
    font = ImageFont.load_default(TEXT)
    head = TEXT + 6
    pair = Image.new("RGB", (2 * left.width + MARGIN // 2, left.height + head), PAPER)
    draw = ImageDraw.Draw(pair)
    shown = int((scores >= least_score).sum())
    for text, x in (
        (f"{len(objects[0])} in {picture.name}", 0),
        (f"{shown} found from score {least_score:g}", left.width + MARGIN // 2),
    ):
        draw.text((x, 2), _shortened(draw, font, text, left.width), DARK, font)
    pair.paste(left, (0, head))
    pair.paste(right, (left.width + MARGIN // 2, head))
    return pair


def _arrays(
    name: str, classes: Sequence[str], boxes: ArrayLike, labels: ArrayLike, scores: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    corners = np.asarray(boxes, dtype=np.float64)
    corners = corners.reshape(0, 4) if corners.size == 0 else corners
    numbers = np.asarray(labels)
    sure = np.zeros(len(corners)) if scores is None else np.asarray(scores, dtype=np.float64)
    if corners.ndim != 2 or corners.shape[1] != 4 or numbers.shape != (len(corners),) or sure.shape != numbers.shape:
        raise ValueError(
            f"{name} has boxes {corners.shape}, labels {numbers.shape}, scores {sure.shape}; expected (n, 4) and (n,)"
        )
    if not np.isfinite(corners).all():
        raise ValueError(f"{name} has a box that is not finite")
    numbers = numbers.astype(np.int64)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(classes)):
        raise ValueError(f"{name} has labels from {numbers.min()} to {numbers.max()}; there are {len(classes)} classes")
    return corners, numbers, sure


def _lines(box: NDArray[np.float64], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last pixel columns and rows that a box covers, inside the picture."""
    left, top = (min(max(round(float(value)), 0), limit - 1) for value, limit in zip(box[:2], size))
    right, bottom = (min(max(round(float(value)) - 1, 0), limit - 1) for value, limit in zip(box[2:], size))
    return left, top, max(left, right), max(top, bottom)


def _frame(draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], colour: Colour, *, dashed: bool) -> None:
    """Two pixels of colour inside a box's edge between single dark ones; a dashed one is dark in its gaps."""
    left, top, right, bottom = corners
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=DARK)
    if right - left >= 6 and bottom - top >= 6:
        draw.rectangle((left + 2, top + 2, right - 2, bottom - 2), outline=DARK)
    thick = 2 if min(right - left, bottom - top) >= 4 else 1
    draw.rectangle(corners, outline=DARK if dashed else colour, width=thick)
    if dashed:
        for start in range(left, right + 1, 2 * DASH):
            end = min(start + DASH - 1, right)
            draw.rectangle((start, top, end, top + thick - 1), fill=colour)
            draw.rectangle((start, bottom - thick + 1, end, bottom), fill=colour)
        for start in range(top, bottom + 1, 2 * DASH):
            end = min(start + DASH - 1, bottom)
            draw.rectangle((left, start, left + thick - 1, end), fill=colour)
            draw.rectangle((right - thick + 1, start, right, end), fill=colour)


def _label(
    draw: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    corners: tuple[int, int, int, int],
    colour: Colour,
    size: tuple[int, int],
    *,
    below: bool,
) -> None:
    """Dark letters on a plate of the box's colour, outside the box where the picture has room for it."""
    text = _shortened(draw, font, text, size[0] - 4)
    width, height = math.ceil(draw.textlength(text, font)) + 4, TEXT + 4
    left, top, _, bottom = corners
    x = min(left, max(0, size[0] - width))
    if below:
        y = bottom + 1 if bottom + 1 + height <= size[1] else bottom - height + 1
    else:
        y = top - height if top >= height else top
    y = min(max(y, 0), max(0, size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + 2, y + 1), text, DARK, font)


def _shortened(draw: ImageDraw.ImageDraw, font: Any, text: str, room: int) -> str:
    """The text in one line, or as much of it as there is room for."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "...", font) > room:
        text = text[:-1]
    return text + "..."
