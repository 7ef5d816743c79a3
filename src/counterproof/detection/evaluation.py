"""Average precision as COCO defines it, by faster-coco-eval, and the json in which detections are exchanged.

A detection is a COCO result: ``{"image_id": 7, "category_id": 3, "bbox": [x, y, width, height], "score": 0.9}``, in
pixels of the picture. Crowds are neither missed nor found: a detection inside one counts for nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.detection.annotations import DetectionData
from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    from faster_coco_eval import COCO, COCOeval_faster

__all__ = ["DetectionScores", "evaluate", "read_results", "write_results"]

Result = Mapping[str, Any]
KEYS = ("image_id", "category_id", "bbox", "score")
NUMPY_NUMBERS = (np.integer, np.floating)
LISTED = 5  # bad records that an error names
NAMES = {
    "ap": "AP",
    "ap50": "AP at IoU .50",
    "ap75": "AP at IoU .75",
    "ap_small": "AP, objects under 32x32",
    "ap_medium": "AP, 32x32 to 96x96",
    "ap_large": "AP, larger ones",
    "ar1": "AR, 1 detection a picture",
    "ar10": "AR, 10 detections a picture",
    "ar100": "AR, 100 detections a picture",
}


@dataclass(frozen=True)
class DetectionScores:
    """What COCO's evaluation of boxes finds; shares from 0 to 1, nan where there is no object to be found.

    Attributes:
        ap: average precision, the mean over IoU thresholds .50, .55, ..., .95 and classes, 100 detections a picture.
        ap50, ap75: at one threshold.
        ap_small, ap_medium, ap_large: of objects whose area is up to 32 x 32, up to 96 x 96, and above.
        ar1, ar10, ar100: average recall with so many detections a picture (of each class).
        per_class: by name: ap, ap50, and objects, the number of them.
        pictures, objects, detections: how many were compared, crowds left out.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    per_class: dict[str, dict[str, float]]
    pictures: int
    objects: int
    detections: int

    def as_json(self) -> dict[str, Any]:
        """As plain values; None for nan."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def text(self) -> str:
        """Two tables for a terminal: the summary, and the classes in their order."""
        width = max(len(name) for name in NAMES.values())
        lines = [f"{self.pictures} pictures, {self.objects} objects, {self.detections} detections", ""]
        lines += [f"{name:<{width}}  {_shown(getattr(self, key))}" for key, name in NAMES.items()]
        wide = max([len("class"), *map(len, self.per_class)])
        lines += ["", f"{'class':<{wide}}  {'AP':>6}  {'AP50':>6}  objects"]
        for name, row in self.per_class.items():
            lines.append(f"{name:<{wide}}  {_shown(row['ap'])}  {_shown(row['ap50'])}  {int(row['objects']):>7}")
        return "\n".join(lines) + "\n"


def evaluate(data: DetectionData, results: Sequence[Result]) -> DetectionScores:
    """Compare detections with the objects of the pictures, all of which count, with detections or without.

    Args:
        data: the truth.
        results: COCO results, in any order; of equal scores in a picture, the first counts as the surer one.

    Raises:
        UserError: as `read_results`.
    """
    found = _checked(results, data, "results")
    truth = data.to_coco()
    # COCO's evaluators mark a match by the annotation's id and take 0 for none, and ids may repeat between files.
    annotations = [{**record, "id": number} for number, record in enumerate(truth["annotations"], start=1)]
    silent: dict[str, Any] = {"print_function": _nothing}
    objects = COCO({**truth, "annotations": annotations}, **silent)
    judged = COCOeval_faster(objects, objects.loadRes(found), "bbox", **silent)
    judged.run()
    shares = dict(zip(NAMES, map(_share, judged.stats)))
    precision: NDArray[np.float64] = judged.eval["precision"][:, :, :, 0, -1]  # threshold, recall, class
    numbers = np.bincount(
        np.concatenate([picture.labels[~picture.crowd] for picture in data.pictures] or [np.zeros(0, np.int64)]),
        minlength=len(data.classes),
    )
    per_class = {
        name: {
            "ap": _share(precision[:, :, label].mean()),
            "ap50": _share(precision[0, :, label].mean()),
            "objects": int(numbers[label]),
        }
        for label, name in enumerate(data.classes)
    }
    return DetectionScores(
        **shares,
        per_class=per_class,
        pictures=len(data.pictures),
        objects=int(numbers.sum()),
        detections=len(found),
    )


def read_results(path: str | Path, data: DetectionData) -> list[dict[str, Any]]:
    """Read detections from a COCO results json.

    Returns:
        Records with image_id, category_id, bbox and score; whatever else they hold is left out.

    Raises:
        UserError: a file that is not there or holds something else; records of pictures or categories that the data
            does not have, whose bbox is not four finite numbers of a width and height from 0, or whose score is not
            finite. Number of the record and remedy are named.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror or problem}; name a COCO results json") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not a COCO results json: {problem}") from None
    if isinstance(content, dict) and "annotations" in content:
        raise UserError(f"{path} looks like COCO annotations, not results; results are a list of detections")
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__}; COCO results are a list of detections")
    return _checked(content, data, str(path))


def write_results(results: Sequence[Result], path: str | Path) -> None:
    """Write detections as a COCO results json, numbers of any kind as plain ones.

    Raises:
        UserError: a path that cannot be written.
        ValueError: a score or box that is not finite.
    """
    records = [
        {
            "image_id": int(record["image_id"]),
            "category_id": int(record["category_id"]),
            "bbox": [float(value) for value in record["bbox"]],
            "score": float(record["score"]),
        }
        for record in results
    ]
    with replacing(Path(path)) as stream:
        json.dump(records, stream, allow_nan=False)
        stream.write("\n")


def _checked(results: Sequence[Result], data: DetectionData, source: str) -> list[dict[str, Any]]:
    """The records in plain numbers."""
    pictures = {picture.id for picture in data.pictures}
    categories = set(data.category_ids)
    records = list(results)

    def reject(what: str, bad: Sequence[int], remedy: str) -> None:
        if bad:
            shown = "; ".join(f"record {index + 1} ({_brief(records[index])})" for index in bad[:LISTED])
            more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            noun = "detection" if len(bad) == 1 else "detections"
            raise UserError(f"{source}: {len(bad)} {noun} {what}: {shown}{more}. {remedy}")

    bad = [
        index
        for index, record in enumerate(records)
        if not isinstance(record, Mapping) or any(key not in record for key in KEYS)
    ]
    reject(f"without {', '.join(KEYS)}", bad, "Give each all of them.")
    bad = [index for index, record in enumerate(records) if not _known(record["image_id"], pictures)]
    reject("of a picture that the data does not have", bad, "Give the data that was searched.")
    bad = [index for index, record in enumerate(records) if not _known(record["category_id"], categories)]
    known = ", ".join(map(str, data.category_ids[:20])) + (", ..." if len(data.category_ids) > 20 else "")
    reject("of a category that the data does not have", bad, f"The data has {known}.")
    boxes = [_finite(record["bbox"], 4) for record in records]
    bad = [index for index, box in enumerate(boxes) if box is None or box[2] < 0 or box[3] < 0]
    reject("whose bbox is not four finite numbers", bad, "Expected [x, y, width, height], the last two from 0.")
    scores = [_finite([record["score"]], 1) for record in records]
    bad = [index for index, score in enumerate(scores) if score is None]
    reject("whose score is not finite", bad, "Expected a number, the greater the surer.")
    return [
        {
            "image_id": int(record["image_id"]),
            "category_id": int(record["category_id"]),
            "bbox": box,
            "score": score[0],
        }
        for record, box, score in zip(records, boxes, scores)
        if box is not None and score is not None
    ]


def _known(identity: object, known: set[int]) -> bool:
    return isinstance(identity, int | np.integer) and not isinstance(identity, bool) and int(identity) in known


def _finite(values: Any, count: int) -> list[float] | None:
    """So many finite numbers as floats, or None."""
    if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != count:
        return None
    for value in values:
        kind = type(value)
        if kind is not float and kind is not int and not isinstance(value, NUMPY_NUMBERS):
            return None
    try:
        numbers = [float(value) for value in values]
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _brief(record: object) -> str:
    shown = str(dict(record) if isinstance(record, Mapping) else record)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def _share(value: Any) -> float:
    """COCO's evaluators write -1 where there is nothing to be found."""
    return math.nan if value < 0 else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: float) -> str:
    return "     -" if math.isnan(value) else f"{value:6.3f}"


def _nothing(*words: object) -> None:
    """What the evaluator prints with: its progress is not of interest."""
