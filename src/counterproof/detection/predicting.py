"""A detector as it was saved: search pictures with it, write and draw what it finds, and show its scores as a page."""

import csv
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from counterproof.detection.annotations import (
    COCO_NAMES,
    SUFFIXES,
    YOLO_NAMES,
    DetectionData,
    Picture,
    Spec,
    _opened_sizes,
    _pictures_below,
    read_data,
)
from counterproof.detection.batches import Pixels
from counterproof.detection.detectors import (
    classes_of,
    load_detector,
    pixels_of,
    predict,
    side_of,
)
from counterproof.detection.drawing import draw_detections, draw_pairs
from counterproof.detection.evaluation import NAMES, DetectionScores
from counterproof.detection.outputs import (
    check_device,
    check_ending,
    data_uri,
    make_folder,
    save_picture,
    shown,
    write_json,
)
from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Detector",
    "detect",
    "draw_found",
    "open_detector",
    "open_pictures",
    "score_page",
    "write_pictures",
    "write_scores",
]

LEAST_SCORE = 0.3  # of detections that are drawn


@dataclass(frozen=True)
class Detector:
    """A detector that searches pictures: the model in eval mode, how it wants its pictures, and where it came from."""

    model: "PreTrainedModel"
    pixels: Pixels
    name: str
    device: str

    @property
    def labels(self) -> dict[int, str]:
        """Names of its classes, by number."""
        labels: Any = self.model.config.id2label
        return {int(number): str(labels[number]) for number in sorted(labels)}


def open_detector(name: str | Path, *, side: int | None = None, device: str = "cpu") -> Detector:
    """A detector as it was saved.

    Args:
        name: a local folder or a hub id.
        side: longest side of the pictures in pixels; None: what its preprocessor_config.json says, else as they are.
        device: of torch.

    Raises:
        UserError: no such model, or one that is no detector; an unknown device.
    """
    check_device(device)
    model = load_detector(name, device=device)
    return Detector(model, pixels_of(name, model, side or side_of(name)), str(name), device)


def open_pictures(
    source: Spec, labels: Mapping[int, str] | None = None, *, split: str | None = None
) -> tuple[DetectionData, bool]:
    """Pictures to search, and whether they are plain ones, without annotations.

    Args:
        source: what `read_data` takes; or a picture, or a folder of pictures with no COCO json (annotations.json,
            instances*.json, _annotations.coco.json), data.yaml or images/ with labels/ in it. Folders in it are
            searched too.
        labels: names of classes, by number; plain pictures get them as their categories. Ids of plain pictures are 1,
            2, ... in the order of their paths.
        split: of a YOLO folder.

    Raises:
        UserError: as `read_data`; a picture that cannot be read; a folder without any.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not str(source).startswith(("coco:", "yolo:")) and not _is_annotated(path):
        root, files = path, _pictures_below(path)
        if not files and not any(path.glob("*.json")):
            raise UserError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        root, files = path.parent, [path]
    else:
        files = []
    if not files:
        return read_data(source, split=split), False
    if split is not None:
        raise UserError(f"{source} has pictures without annotations, and no splits; leave out the split")
    names = dict(sorted((labels or {}).items()))
    none = np.zeros(0)
    pictures = [
        Picture(
            id=number,
            name=file.relative_to(root).as_posix(),
            width=width,
            height=height,
            file=file,
            boxes=np.zeros((0, 4), dtype=np.float32),
            labels=none.astype(np.int64),
            crowd=none.astype(bool),
            areas=none.astype(np.float32),
            annotation_ids=none.astype(np.int64),
        )
        for number, (file, (width, height)) in enumerate(
            zip(files, _opened_sizes(source, files, [None] * len(files))), start=1
        )
    ]
    return DetectionData(tuple(pictures), tuple(names.values()), tuple(names), str(source)), True


def _is_annotated(folder: Path) -> bool:
    named = any(any(folder.glob(name)) or any(folder.glob(f"annotations/{name}")) for name in COCO_NAMES)
    yolo = any((folder / name).is_file() for name in YOLO_NAMES)
    return named or yolo or all((folder / name).is_dir() for name in ("images", "labels"))


def detect(
    detector: Detector,
    data: DetectionData,
    *,
    batch: int = 8,
    threshold: float = 0.0,
    watch: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Search every picture: COCO results (image_id, category_id, bbox as x, y, width, height in pixels, score).

    Args:
        detector: of `open_detector`. Its classes are found in the data by name; detections of others are left out.
        data: the pictures.
        batch: pictures at a time.
        threshold: least score.
        watch: ``watch(pictures done, pictures)``.

    Raises:
        UserError: detector and data have no class in common; a picture that cannot be read.
    """
    count = len(data.pictures)
    results = predict(
        detector.model,
        data,
        detector.pixels,
        model_type=detector.model.config.model_type,
        classes=classes_of(detector.model, data, detector.name),
        batch=batch,
        device=detector.device,
        watch=None if watch is None else lambda done: watch(done, count),
    )
    return [record for record in results if record["score"] >= threshold]


def write_pictures(data: DetectionData, path: Path) -> None:
    """Which picture and class an id of the results means: COCO's `images` and `categories`.

    Raises:
        UserError: a path that cannot be written.
    """
    whole = data.to_coco()
    write_json(path, {"images": whole["images"], "categories": whole["categories"]})


def draw_found(
    data: DetectionData,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    least_score: float = LEAST_SCORE,
    watch: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a copy of every picture with what was found in it, as PNG under its name; small ones are enlarged.

    Raises:
        UserError: a file of that name is there already, none being written then; a picture that cannot be read.
    """
    targets = copies(data, folder)
    found: dict[int, list[Mapping[str, Any]]] = {picture.id: [] for picture in data.pictures}
    for record in results:
        found[record["image_id"]].append(record)
    label_of = {identity: label for label, identity in enumerate(data.category_ids)}
    for index, (picture, target) in enumerate(zip(data.pictures, targets)):
        records = found[picture.id]
        corners = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = [label_of[record["category_id"]] for record in records]
        boxes = (corners, labels, [record["score"] for record in records])
        image = draw_detections(data.pixels(index), found=boxes, classes=data.classes, least_score=least_score)
        make_folder(target.parent)
        save_picture(image, target)
        if watch is not None:
            watch(index + 1, len(targets))
    return targets


def copies(data: DetectionData, folder: Path) -> list[Path]:
    """Where `draw_found` writes: NAME.png for each picture; of two that differ in their ending only, NAME.jpg.png.

    Raises:
        UserError: one is there already.
    """
    names = []
    for picture in data.pictures:
        parts = [part for part in PurePosixPath(picture.name).parts if part not in ("/", "..")]
        names.append(PurePosixPath(*parts))
    stems = [name.with_suffix("") for name in names]
    shared = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    targets = [folder / f"{name if stem in shared else stem}.png" for name, stem in zip(names, stems)]
    there = [target for target in targets if target.exists()]
    if there:
        raise UserError(f"{there[0]} exists already; draw into a new folder")
    return targets


# eval


def score_page(
    data: DetectionData, results: Sequence[Mapping[str, Any]], scores: DetectionScores, *, title: str
) -> str:
    """Scores, classes, and twelve pictures with what is there beside what was found: one self-contained page."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    found = scores.as_json()
    summary = "".join(
        f'<tr><th scope="row">{html.escape(words)}</th><td>{cell(found[name])}</td></tr>'
        for name, words in NAMES.items()
    )
    classes = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{cell(row["ap"])}</td><td>{cell(row["ap50"])}</td>'
        f"<td>{cell(int(row['objects']))}</td></tr>"
        for name, row in found["per_class"].items()
    )
    drawn = "".join(
        f'<img loading="lazy" src="{data_uri(draw_pairs(data, results, [index]))}" '
        f'alt="{html.escape(data.pictures[index].name)}: objects, and detections">'
        for index in shown(data)
    )
    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;"
        "padding:0 1rem}table{border-collapse:collapse;margin:1rem 0}th,td{padding:.2rem .8rem;text-align:right;"
        "border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}th[scope=row]{text-align:left;"
        "font-weight:normal;overflow-wrap:anywhere}img{max-width:100%;height:auto;margin:.3rem}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{scores.pictures:,} pictures of {html.escape(data.source)}, {scores.objects:,} objects, "
        f"{scores.detections:,} detections. COCO's measures: AP is the mean over IoU thresholds .50 to .95 and "
        f"classes; - where there is no object.</p><table><tbody>{summary}</tbody></table>"
        '<table><thead><tr><th scope="col">class</th><th scope="col">AP</th><th scope="col">AP50</th>'
        f'<th scope="col">objects</th></tr></thead><tbody>{classes}</tbody></table>'
        f"<h2>Objects (dashed) and detections from score {LEAST_SCORE:g}</h2>{drawn}</body></html>\n"
    )


def write_scores(
    path: Path,
    scores: DetectionScores,
    data: DetectionData,
    results: Sequence[Mapping[str, Any]],
    *,
    title: str = "Detections",
) -> None:
    """Scores as a page (.html), as JSON (.json), or as a table of a row for all classes and one for each (.csv).

    Raises:
        UserError: another ending, or a path that cannot be written.
    """
    kind = check_ending(path, (".html", ".json", ".csv"))
    if kind == ".json":
        write_json(path, scores.as_json())
        return
    if kind == ".html":
        page = score_page(data, results, scores, title=title)
        with replacing(path) as stream:
            stream.write(page)
        return
    found = scores.as_json()
    rows: list[dict[str, Any]] = [{"class": "", "objects": scores.objects, **{name: found[name] for name in NAMES}}]
    rows += [{"class": name, **row} for name, row in found["per_class"].items()]
    with replacing(path) as stream:
        table = csv.DictWriter(stream, ["class", "objects", *NAMES], restval="")
        table.writeheader()
        table.writerows(rows)
