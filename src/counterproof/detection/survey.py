"""Annotated pictures looked at before a training: counts, sizes, what will be hard, and a sheet of them drawn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.detection.annotations import (
    DetectionData,
)
from counterproof.detection.drawing import MARGIN, PAPER, draw_detections
from counterproof.detection.outputs import shown, some_of
from counterproof.errors import extra

with extra("detection"):
    from PIL import Image

__all__ = ["DataSurvey", "sheet", "survey_data"]

# Areas in square pixels, by COCO.
SMALL, LARGE = 32**2, 96**2


@dataclass(frozen=True)
class DataSurvey:
    """What is in data.

    Attributes:
        source: what was read.
        pictures, objects, crowds, without_objects, clipped: counts; pictures without objects, boxes cut at the edge.
        sizes: areas of objects by COCO: small (up to 32 x 32 pixels), medium (to 96 x 96) and large.
        classes: for each name, category id, objects, pictures, and median side in pixels (None without objects).
        picture_sizes: smallest, median and largest picture by area, (width, height).
        most: objects in the fullest picture, and its name.
        notes: what reading left out.
        warnings: what may spoil a training or its scores, in words.
    """

    source: str
    pictures: int
    objects: int
    crowds: int
    without_objects: int
    clipped: int
    sizes: Mapping[str, int]
    classes: tuple[Mapping[str, Any], ...]
    picture_sizes: tuple[tuple[int, int], ...]
    most: tuple[int, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Counts, a table of the classes, notes and warnings."""
        sides = ["x".join(map(str, size)) for size in self.picture_sizes]
        lines = [
            f"{self.source}",
            f"{self.pictures:,} pictures, {sides[0]} to {sides[2]} pixels, median {sides[1]}; "
            f"{self.without_objects:,} without objects",
            f"{self.objects:,} objects: " + ", ".join(f"{number:,} {name}" for name, number in self.sizes.items()),
            f"most in a picture: {self.most[0]} ({self.most[1]})",
        ]
        if self.crowds:
            lines.append(f"{self.crowds:,} crowds, neither trained on nor counted")
        if self.clipped:
            lines.append(f"{self.clipped:,} boxes cut at the edge of their picture")
        wide = max(len("class"), *(len(row["name"]) for row in self.classes))
        lines += ["", f"{'class':<{wide}}  {'id':>5}  {'objects':>8}  {'pictures':>8}  median side"]
        for row in self.classes:
            side = "-" if row["median_side"] is None else f"{row['median_side']:.0f}"
            lines.append(
                f"{row['name']:<{wide}}  {row['id']:>5}  {row['objects']:>8,}  {row['pictures']:>8,}  {side:>11}"
            )
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join(lines) + "\n"


def survey_data(data: DetectionData) -> DataSurvey:
    """Count what is in data, and say what may spoil a training on them."""
    keep = [~picture.crowd for picture in data.pictures]
    counts = [int(own.sum()) for own in keep]
    labels = np.concatenate([picture.labels[own] for picture, own in zip(data.pictures, keep)])
    areas = np.concatenate([picture.areas[own] for picture, own in zip(data.pictures, keep)])
    boxes = np.concatenate([picture.boxes[own] for picture, own in zip(data.pictures, keep)])
    extents = boxes[:, 2:] - boxes[:, :2]
    sides: NDArray[np.float64] = np.sqrt(extents.prod(axis=1, dtype=np.float64))
    with_class = np.zeros(len(data.classes), dtype=int)
    for picture, own in zip(data.pictures, keep):
        with_class[np.unique(picture.labels[own])] += 1
    classes = []
    for label, name in enumerate(data.classes):
        mine = labels == label
        classes.append(
            {
                "name": name,
                "id": data.category_ids[label],
                "objects": int(mine.sum()),
                "pictures": int(with_class[label]),
                "median_side": float(np.median(sides[mine])) if mine.any() else None,
            }
        )
    by_area = sorted(((picture.width, picture.height) for picture in data.pictures), key=math.prod)
    fullest = int(np.argmax(counts))
    return DataSurvey(
        source=data.source,
        pictures=len(data.pictures),
        objects=len(labels),
        crowds=sum(int(picture.crowd.sum()) for picture in data.pictures),
        without_objects=sum(not count for count in counts),
        clipped=sum(picture.clipped for picture in data.pictures),
        sizes={
            "small": int((areas < SMALL).sum()),
            "medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
            "large": int((areas >= LARGE).sum()),
        },
        classes=tuple(classes),
        picture_sizes=(by_area[0], by_area[len(by_area) // 2], by_area[-1]),
        most=(counts[fullest], data.pictures[fullest].name),
        notes=data.notes,
        warnings=tuple(_warnings(data, classes, counts, extents)),
    )


def _warnings(
    data: DetectionData, classes: Sequence[Mapping[str, Any]], counts: Sequence[int], extents: NDArray[np.float32]
) -> Iterable[str]:
    none = [row["name"] for row in classes if not row["objects"]]
    if none:
        yield f"{len(none)} classes without an object: {some_of(none)}"
    few = [f"{row['name']} ({row['objects']})" for row in classes if 0 < row["objects"] < 5]
    if few:
        yield f"{len(few)} classes with fewer than 5 objects, too few to learn or to score: {some_of(few)}"
    thin = int((extents.min(axis=1) < 3).sum()) if len(extents) else 0
    if thin:
        yield f"{thin} objects are less than 3 pixels high or wide"
    full = sum(count > 100 for count in counts)
    if full:
        yield f"{full} pictures have more than 100 objects; COCO's measures count 100 detections of a picture"
    empty = sum(not count for count in counts)
    if 2 * empty > len(counts):
        yield f"{empty} of {len(counts)} pictures have no objects; are their labels where they are looked for?"
    if len(counts) - empty < 20:
        yield f"only {len(counts) - empty} pictures have objects; scores of so few say little"


def sheet(data: DetectionData) -> Image.Image:
    """Up to twelve pictures with their objects."""
    side = 320
    cells = []
    for index in shown(data):
        picture, pixels = data.pictures[index], data.pixels(index)
        longer = max(pixels.shape[:2])
        scale = math.ceil(side / longer) if longer <= side else side / longer
        truth = (picture.boxes[~picture.crowd], picture.labels[~picture.crowd])
        cells.append(draw_detections(pixels, truth=truth, classes=data.classes, scale=scale))
    width, height = (max(cell.size[axis] for cell in cells) + MARGIN for axis in (0, 1))
    across = min(4, len(cells))
    whole = Image.new("RGB", (across * width + MARGIN, math.ceil(len(cells) / across) * height + MARGIN), PAPER)
    for place, cell in enumerate(cells):
        whole.paste(cell, (place % across * width + MARGIN, place // across * height + MARGIN))
    return whole
