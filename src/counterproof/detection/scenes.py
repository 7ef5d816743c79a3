"""Scenes of shapes with exact boxes: what a tiny detector can learn in a minute on one core.

Disks, squares and triangles in random colours on a shaded, noisy ground, hidden by one another in part. Every box is
exact, whatever hides behind; a scene follows from its generator alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHAPES", "Scene", "draw_scenes"]

SHAPES = ("disk", "square", "triangle")
CONTRAST = 60.0  # least distance of a shape's colour from the ground's, in levels of 255 over the three channels
TRIES = 20  # places tried for a shape before it is given up


class Scene(NamedTuple):
    """A picture (side, side, 3) uint8; its boxes (n, 4) float32, x1, y1, x2, y2 in pixels; labels (n,) into SHAPES."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_scenes(
    number: int,
    rng: np.random.Generator,
    *,
    side: int = 48,
    objects: tuple[int, int] = (1, 4),
    size: tuple[float, float] = (0.16, 0.42),
    overlap: float = 0.2,
    noise: float = 10.0,
) -> list[Scene]:
    """Draw scenes.

    Args:
        number: how many.
        rng: every draw comes from it.
        side: pixels of height and width.
        objects: fewest and most shapes that are placed; one that finds no room is left out, the first never.
        size: least and greatest side of a shape's box, as a share of the picture's.
        overlap: greatest intersection over union of two boxes of a scene.
        noise: standard deviation of the pixels' noise, in levels of 255.

    Raises:
        ValueError: fewer than one scene or object, a side under 16, sizes outside (0, 1], an overlap outside [0, 1].
    """
    if number < 1 or not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"number={number}, objects={objects}; expected a scene and an object at least")
    if side < 16 or not 0 < size[0] <= size[1] <= 1 or not 0 <= overlap <= 1 or noise < 0:
        raise ValueError(f"side={side}, size={size}, overlap={overlap}, noise={noise}; see the docstring for ranges")
    return [_scene(rng, side, objects, size, overlap, noise) for _ in range(number)]


def _scene(
    rng: np.random.Generator,
    side: int,
    objects: tuple[int, int],
    size: tuple[float, float],
    overlap: float,
    noise: float,
) -> Scene:
    across = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ground = rng.uniform(40, 215, 3).astype(np.float32)
    slope = rng.uniform(-50, 50, (2, 3)).astype(np.float32)
    canvas = ground + across[:, None, None] * slope[0] + across[None, :, None] * slope[1]
    boxes: list[NDArray[np.float32]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        box = _place(rng, side, size, boxes, overlap)
        label = int(rng.integers(len(SHAPES)))
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        while np.linalg.norm(colour - ground) < CONTRAST:
            colour = rng.uniform(0, 255, 3).astype(np.float32)
        if box is None:
            continue
        _paint(canvas, box, label, colour)
        boxes.append(box)
        labels.append(label)
    canvas += rng.normal(0, noise, canvas.shape).astype(np.float32)
    return Scene(
        np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        np.stack(boxes).astype(np.float32),
        np.asarray(labels, dtype=np.int64),
    )


def _place(
    rng: np.random.Generator,
    side: int,
    size: tuple[float, float],
    boxes: Sequence[NDArray[np.float32]],
    overlap: float,
) -> NDArray[np.float32] | None:
    """A square box on whole pixels that overlaps none of the others by more; None when no place was found."""
    for _ in range(TRIES):
        length = max(4, round(float(rng.uniform(*size)) * side))
        left, top = rng.integers(0, side - length + 1, 2)
        box = np.array([left, top, left + length, top + length], dtype=np.float32)
        if all(_iou(box, other) <= overlap for other in boxes):
            return box
    return None


def _iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    sides = np.clip(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0, None)
    shared = float(sides[0] * sides[1])
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (first, second)]
    return shared / (sum(areas) - shared)


def _paint(canvas: NDArray[np.float32], box: NDArray[np.float32], label: int, colour: NDArray[np.float32]) -> None:
    """Fill a shape that touches all four sides of its box."""
    left, top, right, bottom = box.astype(int)
    length = right - left
    middle = (np.arange(length) + 0.5) / length * 2 - 1  # pixel centres, -1 to 1
    y, x = np.meshgrid(middle, middle, indexing="ij")
    if SHAPES[label] == "disk":
        inside = x**2 + y**2 <= 1
    elif SHAPES[label] == "triangle":
        inside = np.abs(x) <= (y + 1) / 2 + 1 / length  # apex at the top, at least a pixel wide
    else:
        inside = np.ones((length, length), dtype=bool)
    canvas[top:bottom, left:right][inside] = colour
