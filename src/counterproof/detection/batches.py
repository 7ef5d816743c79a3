"""Pictures with boxes as batches of tensors, the same for every arm of a comparison.

What step s sees follows from the seed and s alone: order, flips and sizes. So an interrupted run goes on with the very
batches it would have had, and arms that draw random numbers of their own stay paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.detection.annotations import DetectionData, Picture
from counterproof.detection.scenes import SHAPES, Scene
from counterproof.errors import UserError, extra

with extra("detection"):
    import torch
    from PIL import Image
    from torch import Tensor

__all__ = ["Batches", "Pixels", "collate", "median_side", "scene_data"]

STRIDE = 32  # of the coarsest feature map of detectors without a pixel mask


@dataclass(frozen=True)
class Pixels:
    """How pictures become tensors.

    Attributes:
        side: longest side in pixels after resizing; None leaves pictures as they are.
        stretch: pictures become squares of that side, as detectors without a pixel mask expect (RT-DETR, D-FINE);
            rounded to a multiple of 32, which they need.
        mean, std: of the three channels, on a scale of 0 to 1; ImageNet's by default.
        multiple: height and width of a batch are padded to multiples of it.
    """

    side: int | None = None
    stretch: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    multiple: int = 1


def scene_data(scenes: Sequence[Scene]) -> DetectionData:
    """Generated scenes as a data set."""
    pictures = [
        Picture(
            id=number + 1,
            name=f"scene-{number + 1}",
            width=scene.pixels.shape[1],
            height=scene.pixels.shape[0],
            file=None,
            boxes=scene.boxes,
            labels=scene.labels,
            crowd=np.zeros(len(scene.boxes), dtype=bool),
            areas=(scene.boxes[:, 2:] - scene.boxes[:, :2]).prod(-1),
            annotation_ids=np.arange(len(scene.boxes)) + 1000 * (number + 1),
        )
        for number, scene in enumerate(scenes)
    ]
    return DetectionData(
        pictures=tuple(pictures),
        classes=SHAPES,
        category_ids=tuple(range(1, len(SHAPES) + 1)),
        source="generated scenes",
        images=tuple(scene.pixels for scene in scenes),
    )


def median_side(data: DetectionData, pixels: Pixels) -> float:
    """Median of sqrt(width * height) of the objects, in pixels after resizing.

    Raises:
        UserError: data without an object.
    """
    sides = []
    for picture in data.pictures:
        width, height = fitted(picture.width, picture.height, pixels.side, pixels.stretch)
        boxes = picture.boxes[~picture.crowd] * _factors(picture.width, picture.height, width, height)
        sides.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(-1)))
    found = np.concatenate(sides) if sides else np.zeros(0)
    if len(found) == 0:
        raise UserError(f"{data.source} has no objects to train on")
    return float(np.median(found))


def collate(
    pictures: Sequence[NDArray[np.uint8]], boxes: Sequence[NDArray[Any]], labels: Sequence[NDArray[Any]], pixels: Pixels
) -> dict[str, Any]:
    """Pictures (h, w, 3) uint8 with boxes in their pixels to what a transformers DETR takes.

    Returns:
        ``pixel_values`` (B, 3, H, W) float32, normalised, 0 in the padding; ``pixel_mask`` (B, H, W) int64, 1 on the
        picture; ``labels``: for each ``class_labels`` (n,) int64 and ``boxes`` (n, 4) float32, centre and size as
        shares of the picture without its padding. That is what DETRs mean (position embeddings and reference points are
        scaled to the unmasked part) and what their post-processing undoes; transformers' own processors rescale the
        targets, but not the predictions, to the padded picture.
    """
    up = pixels.multiple
    height = -(-max(picture.shape[0] for picture in pictures) // up) * up
    width = -(-max(picture.shape[1] for picture in pictures) // up) * up
    values = torch.zeros(len(pictures), 3, height, width)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.int64)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (pixels.mean, pixels.std))
    targets = []
    for number, (picture, corners, classes) in enumerate(zip(pictures, boxes, labels)):
        high, wide = picture.shape[:2]
        values[number, :, :high, :wide] = (torch.from_numpy(picture).permute(2, 0, 1) / 255.0 - mean) / std
        mask[number, :high, :wide] = 1
        scale = np.array([wide, high, wide, high], dtype=np.float32)
        relative = torch.from_numpy(np.asarray(corners, dtype=np.float32).reshape(-1, 4) / scale)
        centre, size = (relative[:, :2] + relative[:, 2:]) / 2, relative[:, 2:] - relative[:, :2]
        targets.append(
            {
                "class_labels": torch.from_numpy(np.asarray(classes, dtype=np.int64)),
                "boxes": torch.cat([centre, size], -1),
            }
        )
    return {"pixel_values": values, "pixel_mask": mask, "labels": targets}


def fitted(width: int, height: int, side: int | None, stretch: bool) -> tuple[int, int]:
    """Width and height of a picture after resizing."""
    if side is None:
        return width, height
    if stretch:  # the models that want this also want whole cells of their coarsest map
        side = max(STRIDE, round(side / STRIDE) * STRIDE)
        return side, side
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _factors(width: int, height: int, new_width: int, new_height: int) -> NDArray[np.float32]:
    return np.array([new_width / width, new_height / height] * 2, dtype=np.float32)


def resized(
    picture: NDArray[np.uint8], side: int | None, stretch: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The picture at its new size (bilinear), and what its boxes must be multiplied by, (4,)."""
    height, width = picture.shape[:2]
    size = fitted(width, height, side, stretch)
    if size == (width, height):
        return picture, np.ones(4, dtype=np.float32)
    small = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    return small, _factors(width, height, *size)


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of a data set by step: ``batches[step]``, for any step; each pass sees every picture once.

    Args:
        data: crowds are left out; a picture without objects is trained on like any other.
        size: pictures in a batch; at most those of the data.
        pixels: how they become tensors.
        seed: of order, flips and sizes.
        flips: every other picture is mirrored, left to right.
        scales: least and greatest share of ``pixels.side`` that a batch's pictures are resized to.
    """

    def __init__(
        self,
        data: DetectionData,
        size: int,
        pixels: Pixels,
        *,
        seed: int,
        flips: bool = True,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.data = data
        self.size = min(size, len(data.pictures))
        self.pixels = pixels
        self.seed = seed
        self.flips = flips
        self.scales = scales
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def indices(self, step: int) -> list[int]:
        """Which pictures a step sees."""
        count = len(self.data.pictures)
        places = range(step * self.size, (step + 1) * self.size)
        return [int(self._pass(place // count)[place % count]) for place in places]

    def _pass(self, number: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != number:
            rng = np.random.default_rng([self.seed, 0, number])
            self._order = (number, rng.permutation(len(self.data.pictures)))
        return self._order[1]

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1, step])
        side = self.pixels.side
        if side is not None and self.scales != (1.0, 1.0):
            side = max(1, round(side * float(rng.uniform(*self.scales))))
        pictures, boxes, labels = [], [], []
        for index in self.indices(step):
            about = self.data.pictures[index]
            picture, factors = resized(self.data.pixels(index), side, self.pixels.stretch)
            corners = about.boxes[~about.crowd] * factors
            if self.flips and rng.random() < 0.5:
                picture = np.ascontiguousarray(picture[:, ::-1])
                corners = corners[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [picture.shape[1], 0, picture.shape[1], 0]
            pictures.append(picture)
            boxes.append(corners)
            labels.append(about.labels[~about.crowd])
        return collate(pictures, boxes, labels, self.pixels)


def to_device(batch: dict[str, Any], device: "torch.device | str") -> dict[str, Any]:
    """A batch on a device."""

    def moved(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    targets = [{name: moved(value) for name, value in target.items()} for target in batch["labels"]]
    return {"pixel_values": moved(batch["pixel_values"]), "pixel_mask": moved(batch["pixel_mask"]), "labels": targets}
