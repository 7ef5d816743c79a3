"""Pictures with boxes: COCO's json format and YOLO folders, read, checked and written.

Boxes are corners in pixels, the left upper corner of the picture being (0, 0). Nothing is repaired or left out
silently: a bad record is an error that names it, unless the caller asks for bad boxes to be left out, and then each is
listed in the notes.

A picture whose file asks to be turned (EXIF) is taken as its boxes mean it: as stored or turned, whichever has the
stated width and height. Where both have them, and in YOLO's format, which states none, it is turned, as detectron2 and
OpenCV do.
"""

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["DetectionData", "Picture", "describe_data", "read_data", "split_data", "write_coco"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of pictures, by Pillow's names
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
COCO_NAMES = ("annotations.json", "instances*.json", "_annotations.coco.json")  # the last is Roboflow's
YOLO_NAMES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
SPLITS = ("train", "val", "test")
HELD_OUT = 0.2  # share of the pictures that a comparison never trains on
FEWEST = 20  # pictures with objects
LISTED = 5  # bad records that an error names
CLASSES = "classes.txt"
RESIZED = "State the size it has, or put back the picture that was annotated."
ORIENTATION = 0x0112  # EXIF's tag
TURNED = (5, 6, 7, 8)  # its values that exchange width and height

Spec = str | Path


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture and its n objects.

    Attributes:
        id: of the picture, as in the file.
        name: COCO's file_name.
        width, height: pixels.
        file: where it is; None when the data set holds its pixels.
        boxes: (n, 4) float32, corners x1, y1, x2, y2 in pixels, inside the picture, never empty.
        labels: (n,) int64, indices into the data set's classes.
        crowd: (n,) bool: groups of objects, which are neither trained on nor counted as missed or wrong.
        areas: (n,) float32, square pixels: COCO's `area` (of the object's outline) where it is given, else the box's.
        annotation_ids: (n,) int64.
        clipped: how many boxes reached more than a pixel beyond the picture before they were cut at its edge.
    """

    id: int
    name: str
    width: int
    height: int
    file: Path | None
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    annotation_ids: NDArray[np.int64]
    clipped: int = 0


@dataclass(frozen=True, eq=False)
class DetectionData:
    """Pictures with the boxes of their objects.

    Attributes:
        pictures: pictures without objects among them.
        classes: names, in the order of the category ids.
        category_ids: ids in the file, ascending; they may have gaps. In YOLO's format the class numbers.
        source: what was read.
        images: the pixels, (height, width, 3) uint8 each, when they are held in memory; None when they are in files.
        notes: what a reader has to know: boxes that were left out, label files without a picture.
    """

    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str
    images: Sequence[NDArray[np.uint8]] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images is not None and len(self.images) != len(self.pictures):
            raise ValueError(f"{len(self.images)} images for {len(self.pictures)} pictures")
        if len(self.classes) != len(self.category_ids):
            raise ValueError(f"{len(self.category_ids)} category ids for {len(self.classes)} classes")
        if list(self.category_ids) != sorted(set(self.category_ids)):
            raise ValueError(f"category ids {self.category_ids} are not ascending")

    @property
    def objects(self) -> int:
        """Objects in all pictures, crowds left out."""
        return sum(int((~picture.crowd).sum()) for picture in self.pictures)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """A picture as (height, width, 3) uint8 RGB, a copy; see the module on pictures that are to be turned.

        Raises:
            UserError: a file that is not there, is no picture, is damaged, has more than 8 bits a channel, or another
                size than its annotations state.
        """
        picture = self.pictures[index]
        if self.images is not None:
            return np.array(self.images[index], dtype=np.uint8)
        assert picture.file is not None
        with _picture(picture.file) as image:
            stated = (picture.width, picture.height)
            misfit = _misfit(image, stated)
            if misfit is not None:
                raise UserError(f"{picture.file} (image {picture.id}) {misfit}. {RESIZED}")
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise UserError(f"{picture.file} has pixels of mode {image.mode}; save it with 8 bits a channel")
            turned, size = _turned(image)
            return np.array((ImageOps.exif_transpose(image) if turned and size == stated else image).convert("RGB"))

    def subset(self, indices: Iterable[int]) -> "DetectionData":
        """The pictures of these indices, in their order, with all classes and notes."""
        chosen = [int(index) for index in indices]
        return DetectionData(
            tuple(self.pictures[index] for index in chosen),
            self.classes,
            self.category_ids,
            self.source,
            None if self.images is None else [self.images[index] for index in chosen],
            self.notes,
        )

    def to_coco(self) -> dict[str, Any]:
        """Pictures, boxes and classes in COCO's json format, with their ids.

        Numbers are the shortest decimals that mean the float32 held here, so that 38.65 is written as it was read.
        """
        images, annotations = [], []
        for picture in self.pictures:
            images.append(
                {"id": picture.id, "file_name": picture.name, "width": picture.width, "height": picture.height}
            )
            corners = _decimals(picture.boxes)
            boxes = np.concatenate([corners[:, :2], (corners[:, 2:] - corners[:, :2]).round(9)], axis=1).tolist()
            for identity, label, box, area, crowd in zip(
                picture.annotation_ids.tolist(),
                picture.labels.tolist(),
                boxes,
                _decimals(picture.areas).tolist(),
                picture.crowd.tolist(),
            ):
                annotations.append(
                    {
                        "id": identity,
                        "image_id": picture.id,
                        "category_id": self.category_ids[label],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        categories = [{"id": identity, "name": name} for identity, name in zip(self.category_ids, self.classes)]
        return {"images": images, "annotations": annotations, "categories": categories}


def read_data(
    spec: Spec, *, split: str | None = None, drop_bad_boxes: bool = False, check_pictures: bool = False
) -> DetectionData:
    """Read and check pictures with boxes.

    Args:
        spec: ``coco:annotations.json,images/``; a COCO json, its pictures beside it, in images/, or where COCO itself
            has them; a folder with one such json (annotations.json, instances*.json, _annotations.coco.json, or the
            only json there); a YOLO folder: data.yaml or dataset.yaml, or images/ and labels/ with classes.txt
            (``yolo:folder`` where a folder has both), or the yaml file.
        split: of a YOLO folder: "train", "val" or "test"; None reads train and val together (`split_data` divides them
            anew), never test.
        drop_bad_boxes: leave out boxes that lie outside their picture, have no area or are not finite, each named in
            the notes, instead of refusing the file.
        check_pictures: also open every picture's header and compare its size with what is stated. Without this,
            pictures are only looked for; for YOLO headers are always opened, boxes being shares of the size.

    A YOLO line of a class and an even number of further values, six or more, is an outline; its bounding box is taken.
    A picture without a label file has no objects. Boxes that reach beyond the picture are cut at its edge; the rounding
    of a pixel apart, they are counted in `Picture.clipped`.

    Raises:
        UserError: data that is not there, is in another format or holds bad records; file, annotation id (YOLO: line)
            and remedy are named.
    """
    found = _locate(spec)
    if split is not None and split not in SPLITS:
        raise UserError(f"split {split!r} is none of {', '.join(SPLITS)}")
    convert = f"counterproof detection convert {shlex.quote(os.fspath(spec))} --out clean.json --drop-bad-boxes"
    if found.yolo:
        return _read_yolo(found.path, split, _Boxes(drop_bad_boxes, convert, "label"))
    if split is not None:
        raise UserError(f"{spec} is in COCO's format, which has no splits; name the json of the {split} pictures")
    return _read_coco(found.path, found.images, _Boxes(drop_bad_boxes, convert, "annotation"), check_pictures)


def describe_data(path: Spec) -> str:
    """Read data for a comparison, headers of the pictures too, and say in a line what it holds.

    Raises:
        UserError: as `read_data`; fewer than 20 pictures with objects.
    """
    data = read_data(path, check_pictures=True)
    with_objects = sum(not picture.crowd.all() for picture in data.pictures if len(picture.crowd))
    if with_objects < FEWEST:
        raise UserError(
            f"{path} has objects in {with_objects} of its {len(data.pictures)} pictures; give at least {FEWEST}, a "
            "fifth of the pictures is held out"
        )
    names = ", ".join(data.classes[:LISTED])
    if len(data.classes) > LISTED:
        names += f" and {len(data.classes) - LISTED} more"
    smallest, largest = (
        f(((picture.width, picture.height) for picture in data.pictures), key=math.prod) for f in (min, max)
    )
    facts = [
        f"{len(data.pictures)} pictures",
        f"{data.objects} objects of {_count(len(data.classes), 'class', 'classes')} ({names})",
        "x".join(map(str, smallest)) + ("" if smallest == largest else " to " + "x".join(map(str, largest))),
    ]
    crowds = sum(int(picture.crowd.sum()) for picture in data.pictures)
    clipped = sum(picture.clipped for picture in data.pictures)
    if crowds:
        facts.append(_count(crowds, "crowd"))
    if clipped:
        facts.append(f"{_count(clipped, 'box', 'boxes')} clipped at the edge")
    if with_objects < len(data.pictures):
        facts.append(f"{len(data.pictures) - with_objects} without objects")
    held_out = _held_out(len(data.pictures), HELD_OUT)
    return f"{', '.join(facts)}; a fifth of the pictures ({held_out}) is held out"


def split_data(data: DetectionData, share: float, rng: np.random.Generator) -> tuple[DetectionData, DetectionData]:
    """Divide pictures at random into (train, held out), each in the order of the data.

    Args:
        data: two pictures or more.
        share: of the pictures to hold out, rounded, at least one and not all.
        rng: one permutation is drawn from it.

    Raises:
        ValueError: a share outside (0, 1), fewer than two pictures.
    """
    count = len(data.pictures)
    if not 0 < share < 1 or count < 2:
        raise ValueError(f"share={share} of {count} pictures; expected a share between 0 and 1 of two or more")
    order = rng.permutation(count)
    cut = _held_out(count, share)
    return data.subset(np.sort(order[cut:])), data.subset(np.sort(order[:cut]))


def write_coco(data: DetectionData, path: Spec) -> None:
    """Write a COCO json; the pictures stay where they are (read it with ``coco:PATH,FOLDER``).

    It holds what `DetectionData` holds: outlines, licences and super-categories of the file that was read are not in
    it.

    Raises:
        UserError: a path that cannot be written.
    """
    with replacing(Path(path)) as stream:
        json.dump(data.to_coco(), stream, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def _held_out(count: int, share: float) -> int:
    return min(max(round(share * count), 1), count - 1)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _decimals(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return values.astype("U32").astype(np.float64)


# Where the data is


class _Found(NamedTuple):
    """A COCO json with the folder of its pictures where that is named, or a YOLO folder or yaml."""

    yolo: bool
    path: Path
    images: Path | None


def _locate(spec: Spec) -> _Found:
    words = os.fspath(spec)
    if words.startswith("coco:"):
        named = words.removeprefix("coco:")
        file, comma, folder = named.rpartition(",")
        if not comma or Path(named).expanduser().exists():
            file, folder = named, ""
        path = Path(file).expanduser()
        if path.is_dir():
            return _Found(False, _coco_of_folder(path) or _nothing(path), Path(folder).expanduser() if folder else None)
        if folder and not Path(folder).expanduser().is_dir():
            raise UserError(f"{folder}, the folder of pictures in {words}, is not there")
        return _Found(False, _existing(path), Path(folder).expanduser() if folder else None)
    if words.startswith("yolo:"):
        return _Found(True, _existing(Path(words.removeprefix("yolo:")).expanduser()), None)
    path = _existing(Path(words).expanduser())
    if path.is_dir():
        is_yolo = _yaml_of_folder(path) is not None or _has_labels(path)
        json_file = _coco_of_folder(path, any_name=not is_yolo)
        if json_file is not None and is_yolo:
            raise UserError(f"{path} holds {json_file.name} and YOLO labels; say coco:{json_file} or yolo:{path}")
        if is_yolo:
            return _Found(True, path, None)
        return _Found(False, json_file or _nothing(path), None)
    return _Found(path.suffix.lower() in (".yaml", ".yml"), path, None)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} is not there; give a COCO json, coco:FILE,FOLDER, or a folder in COCO or YOLO layout")
    return path


def _coco_of_folder(folder: Path, *, any_name: bool = True) -> Path | None:
    candidates = [file for name in COCO_NAMES for file in sorted(folder.glob(name))]
    candidates = candidates or [file for name in COCO_NAMES for file in sorted(folder.glob(f"annotations/{name}"))]
    if any_name:
        candidates = candidates or sorted(folder.glob("*.json"))
    if len(candidates) > 1:
        raise UserError(
            f"{folder} holds {len(candidates)} json files ({_listed(map(str, candidates))}); name one: "
            f"coco:{candidates[0]},FOLDER"
        )
    return candidates[0] if candidates else None


def _yaml_of_folder(folder: Path) -> Path | None:
    return next((folder / name for name in YOLO_NAMES if (folder / name).is_file()), None)


def _has_labels(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _nothing(folder: Path) -> Path:
    if any(folder.rglob("*.xml")):
        raise UserError(f"{folder} holds xml files, which looks like Pascal VOC; convert it to COCO json or YOLO first")
    below = [file for name in COCO_NAMES for file in sorted(folder.glob(f"*/{name}"))]
    below += [file.parent for name in YOLO_NAMES for file in sorted(folder.glob(f"*/{name}"))]
    if below:
        raise UserError(f"{folder} holds no data itself; name one of {_listed(map(str, below))}")
    raise UserError(
        f"{folder} holds neither a COCO json ({', '.join(COCO_NAMES)}) nor a YOLO data.yaml, nor images/ with labels/"
    )


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:LISTED]) + (f" and {len(shown) - LISTED} more" if len(shown) > LISTED else "")


# Bad records


def _bad(source: object, what: str, records: Sequence[str], remedy: str) -> UserError:
    """An error about records of one kind: how many, the first five, what to do."""
    shown = "; ".join(records[:LISTED]) + (f"; and {len(records) - LISTED} more" if len(records) > LISTED else "")
    return UserError(f"{source}: {_count(len(records), *_forms(what))}: {shown}. {remedy}")


def _forms(what: str) -> tuple[str, str]:
    noun, rest = what.split(" ", 1)
    return f"{noun} {rest}", f"{noun}s {rest}"


class _Boxes(NamedTuple):
    """How boxes are checked: whether bad ones are left out, the command that does so, what a record is called."""

    drop: bool
    convert: str
    noun: str

    def checked(
        self,
        source: object,
        corners: NDArray[np.float64],
        sizes: NDArray[np.float64],
        name: Callable[[int], str],
        hint: str = "",
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], tuple[str, ...]]:
        """Boxes inside their pictures, which of them to keep, which were clipped, and a note on each that goes.

        Args:
            corners: (n, 4) x1, y1, x2, y2 in pixels.
            sizes: (n, 2) width and height of each box's picture.
            name: of a record, for messages.
            hint: what else may be wrong where boxes lie outside.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is not finite here
            boxes = corners.astype(np.float32)
            limits = np.concatenate([sizes, sizes], axis=1).astype(np.float32)
            inside = np.clip(boxes, 0, limits)
            infinite: NDArray[np.bool_] = np.logical_not(np.isfinite(boxes).all(axis=1))
            thin: NDArray[np.bool_] = ~infinite & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
            outside: NDArray[np.bool_] = ~infinite & ~thin & (inside[:, 2:] <= inside[:, :2]).any(axis=1)
            clipped: NDArray[np.bool_] = (np.abs(boxes - inside) > 1).any(axis=1)
        notes: list[str] = []
        for what, bad, more in (
            ("whose box is not finite", infinite, ""),
            ("whose box has no area", thin, ""),
            ("whose box lies outside the picture", outside, hint),
        ):
            if not bad.any():
                continue
            records = [name(int(index)) for index in np.flatnonzero(bad)]
            if not self.drop:
                remedy = f"Mend them, or leave them out: {self.convert}"
                raise _bad(source, f"{self.noun} {what}", records, more + remedy)
            notes += [f"left out {self.noun} {what}: {record}" for record in records]
        keep = ~(infinite | thin | outside)
        return inside, keep, clipped & keep, tuple(notes)


# COCO


def _read_coco(file: Path, folder: Path | None, boxes: _Boxes, check_pictures: bool) -> DetectionData:
    images, annotations, categories = _sections(file)
    category_ids, classes, notes = _categories(file, categories, annotations)
    _check_images(file, images)
    files = _find_pictures(file, folder, images)
    stated = [(image["width"], image["height"]) if {"width", "height"} <= image.keys() else None for image in images]
    sizes = [size or (0, 0) for size in stated]
    to_open = [index for index, size in enumerate(stated) if check_pictures or size is None]
    opened = _opened_sizes(file, [files[index] for index in to_open], [stated[index] for index in to_open])
    for index, size in zip(to_open, opened):
        sizes[index] = size
    place = {image["id"]: index for index, image in enumerate(images)}
    _check_annotations(file, annotations, place, set(category_ids))

    owners = np.array([place[record["image_id"]] for record in annotations], dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    owners, records = owners[order], [annotations[index] for index in order.tolist()]
    corners = np.array([record["bbox"] for record in records], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        corners[:, 2:] += corners[:, :2]
    kept, keep, clipped, left_out = boxes.checked(
        file, corners, np.array(sizes, dtype=np.float64)[owners], lambda index: _named(records[index])
    )
    label_of = {identity: label for label, identity in enumerate(category_ids)}
    labels = np.array([label_of[record["category_id"]] for record in records], dtype=np.int64)
    crowd = np.array([bool(record.get("iscrowd", 0)) for record in records], dtype=bool)
    identities = np.array([record["id"] for record in records], dtype=np.int64)
    given = [record.get("area") for record in records]
    areas = np.array([math.nan if area is None else area for area in given], dtype=np.float64)
    own = (kept[:, 2:].astype(np.float64) - kept[:, :2]).prod(axis=1)
    areas = np.where(np.isnan(areas), own, areas).astype(np.float32)
    if (crowd | ~keep).all():
        raise UserError(f"{file} holds no objects{', only crowds' if crowd.any() else ''}; nothing can be learned")
    pictures = _assembled(
        [(image["id"], image["file_name"]) for image in images],
        sizes,
        files,
        owners,
        keep,
        clipped,
        (kept, labels, crowd, areas, identities),
    )
    return DetectionData(pictures, classes, category_ids, str(file), notes=notes + left_out)


def _assembled(
    identities: Sequence[tuple[int, str]],
    sizes: Sequence[tuple[int, int]],
    files: Sequence[Path],
    owners: NDArray[np.int64],
    keep: NDArray[np.bool_],
    clipped: NDArray[np.bool_],
    columns: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]],
) -> tuple[Picture, ...]:
    """Pictures out of columns of records, which come in the order of their pictures."""
    owners, clipped = owners[keep], clipped[keep]
    boxes, labels, crowd, areas, annotation_ids = (column[keep] for column in columns)
    ends = np.searchsorted(owners, np.arange(len(files) + 1))
    cuts = np.bincount(owners[clipped], minlength=len(files)).tolist()
    pictures = []
    for index, ((identity, name), (width, height), file) in enumerate(zip(identities, sizes, files)):
        own = slice(ends[index], ends[index + 1])
        records = (boxes[own], labels[own], crowd[own], areas[own], annotation_ids[own])
        pictures.append(Picture(identity, name, width, height, file, *records, cuts[index]))
    return tuple(pictures)


def _sections(file: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """The images, annotations and categories of a COCO json."""
    content = _parsed(file)
    remedy = 'expected COCO annotations: {"images": [...], "annotations": [...], "categories": [...]}'
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if {"image_id", "score"} <= first.keys():
            raise UserError(f"{file} is not COCO annotations; this looks like COCO results; name the annotations json")
        what = (
            f"of records with {_listed(map(str, first))}" if first else f"of {_count(len(content), 'entry', 'entries')}"
        )
        raise UserError(f"{file} is a list {what}; {remedy}")
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; {remedy}")
    keys = content.keys()
    if "_via_img_metadata" in keys:
        raise UserError(f"{file} looks like a VIA project; export it as COCO")
    if {"shapes", "imagePath"} <= keys:
        raise UserError(f"{file} looks like a labelme file of one picture; convert the folder to COCO")
    sections: dict[str, list[Any]] = {}
    for name in ("images", "annotations", "categories"):
        section = content.get(name)
        if isinstance(section, list) and all(isinstance(record, dict) for record in section):
            sections[name] = section
            continue
        if name == "categories" and any("caption" in record for record in sections["annotations"][:1]):
            raise UserError(f"{file} holds COCO captions, which have no boxes; name the instances json")
        there = f"only {_listed(map(repr, content))}" if content else "it is empty"
        raise UserError(f"{file} has no list of records {name!r}, {there}; {remedy}")
    for name, section in sections.items():
        if not section:
            raise UserError(f"{file} holds no {name}; {remedy}, with a record in each at least")
    return sections["images"], sections["annotations"], sections["categories"]


def _parsed(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        what = "this looks like a picture" if file.suffix.lower() in SUFFIXES else "it is not UTF-8"
        raise UserError(f"{file} is not a COCO json: {what}") from None
    except OSError as problem:
        raise UserError(f"{file} cannot be read: {problem.strerror or problem}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        start = text.lstrip()[:1000]
        if start.startswith("<"):
            kind = "Pascal VOC" if "<annotation" in start else "XML"
            raise UserError(f"{file} is not a COCO json; this looks like {kind}; convert it to COCO first") from None
        if re.match(r"\d+( +[\d.eE+-]+){4,}\s", start + "\n"):
            raise UserError(f"{file} looks like the YOLO labels of one picture; name the folder of data.yaml") from None
        if start.startswith("{") and "\n{" in text:
            raise UserError(f"{file} looks like JSON lines; a COCO json is one object") from None
        raise UserError(f"{file} is not a COCO json: {problem}") from None


def _whole(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) is float or _whole(value) for value in values)
    )


def _named(annotation: dict[str, Any]) -> str:
    return f"id {annotation.get('id')!r} (image {annotation.get('image_id')!r}, bbox {annotation.get('bbox')})"


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _categories(
    file: Path, categories: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
    """Ids and names, by id, and notes."""
    for number, category in enumerate(categories, start=1):
        if not _whole(category.get("id")) or not isinstance(category.get("name"), str) or not category["name"].strip():
            raise UserError(
                f"{file}: category number {number} is {category}; expected a whole number as id, and a name"
            )
    if repeated := _repeated(category["id"] for category in categories):
        raise UserError(f"{file}: several categories have the id {repeated[0]}; give each its own")
    notes = []
    names = {category["id"]: category["name"] for category in categories}
    used = {record.get("category_id") for record in annotations if _whole(record.get("category_id"))}
    for name in _repeated(names.values()):
        same = sorted(identity for identity in names if names[identity] == name)
        filled = [identity for identity in same if identity in used]
        if len(filled) > 1:
            raise UserError(f"{file}: categories {_listed(map(str, same))} are all called {name!r}; rename them")
        # Roboflow writes the name of the project as a category of its own.
        for identity in sorted(set(same) - set(filled or same[:1])):
            del names[identity]
            notes.append(f"left out category {identity}: it has no objects and is called {name!r} as another is")
    ids = tuple(sorted(names))
    return ids, tuple(names[identity] for identity in ids), tuple(notes)


def _check_images(file: Path, images: list[dict[str, Any]]) -> None:
    bad = [
        f"number {number} (id {image.get('id')!r}, file_name {image.get('file_name')!r})"
        for number, image in enumerate(images, start=1)
        if not _whole(image.get("id")) or not isinstance(image.get("file_name"), str) or not image["file_name"]
    ]
    if bad:
        raise _bad(file, "image without a whole number as id and a file_name", bad, "Give each both.")
    bad = [
        f"id {image['id']} ({image.get('width')!r} x {image.get('height')!r})"
        for image in images
        if any(side in image and not (_whole(image[side]) and image[side] > 0) for side in ("width", "height"))
    ]
    if bad:
        raise _bad(file, "image whose width or height is no number of pixels", bad, "State the picture's own.")
    if repeated := _repeated(image["id"] for image in images):
        raise _bad(file, "image id used more than once", list(map(str, repeated)), "Give each image its own.")


def _check_annotations(
    file: Path, annotations: list[dict[str, Any]], pictures: dict[int, int], categories: set[int]
) -> None:
    def check(what: str, good: Callable[[dict[str, Any]], bool], remedy: str) -> None:
        bad = [_named(record) for record in annotations if not good(record)]
        if bad:
            raise _bad(file, what, bad, remedy)

    check("annotation without a whole number as id", lambda record: _whole(record.get("id")), "Number them.")
    repeated = _repeated(record["id"] for record in annotations)
    if repeated:
        raise _bad(file, "annotation id used more than once", list(map(str, repeated)), "Give each its own.")
    check(
        "annotation of an image that is not there",
        lambda record: _whole(record.get("image_id")) and record["image_id"] in pictures,
        "Add the image, or take them out.",
    )
    check(
        "annotation of a category that is not there",
        lambda record: _whole(record.get("category_id")) and record["category_id"] in categories,
        f"The categories have the ids {_listed(map(str, sorted(categories)))}; add the category, or take them out.",
    )
    check(
        "annotation whose bbox is not four numbers",
        lambda record: _numbers(record.get("bbox"), 4),
        "Expected [x, y, width, height] in pixels.",
    )
    check(
        "annotation whose area is no number from 0",
        lambda record: record.get("area") is None or (_numbers([record["area"]], 1) and 0 <= record["area"] < 1e30),
        "Mend it, or leave `area` out: the box's own is taken then.",
    )
    check(
        "annotation whose iscrowd is not 0 or 1",
        lambda record: record.get("iscrowd", 0) in (0, 1),
        "1 marks a group of objects as one box.",
    )


# Pictures


def _find_pictures(file: Path, folder: Path | None, images: list[dict[str, Any]]) -> list[Path]:
    """The file of every image, in the folder named or else in the one of the usual places that has most of them."""
    above = file.parent
    places = [folder] if folder is not None else [above, above / "images"]
    if folder is None and above.name == "annotations":  # as COCO itself: annotations/instances_val2017.json, val2017/
        subset = file.stem.removeprefix("instances_")
        places += [above.parent / subset, above.parent / "images" / subset, above.parent / "images", above.parent]
    there = _Presence()
    sample = [image["file_name"] for image in images[:100]]
    best = max(places, key=lambda place: sum(there(place / name) for name in sample))
    files = [best / image["file_name"] for image in images]
    absent = [f"id {image['id']} ({image['file_name']})" for image, path in zip(images, files) if not there(path)]
    if absent:
        where = _listed(str(place) for place in places)
        if len(absent) == len(images):
            raise UserError(
                f"{file}: none of its {len(images)} pictures, the first {images[0]['file_name']}, is in {where}; "
                f"name their folder: coco:{file},FOLDER"
            )
        raise _bad(file, "picture that is missing", absent, f"Looked in {where}; put them there, or take them out.")
    return files


class _Presence:
    """Whether files are there, each folder being listed once."""

    def __init__(self) -> None:
        self.folders: dict[str, set[str]] = {}

    def __call__(self, file: Path) -> bool:
        folder, name = os.path.split(file)
        if folder not in self.folders:
            try:
                with os.scandir(folder) as entries:
                    self.folders[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # no such folder, or one that may be entered but not listed
                self.folders[folder] = set()
        # A file system may hold a name by another spelling than the json's (case, accents).
        return name in self.folders[folder] or os.path.isfile(file)


@contextmanager
def _picture(file: Path) -> Iterator[Image.Image]:
    """A picture whose header is read; what goes wrong, then or later, is a UserError that names it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file} is not there; put it back, or take its annotations out") from None
    except UnidentifiedImageError:
        raise UserError(f"{file} is not a picture ({', '.join(FORMATS)}); replace it") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as problem:
        raise UserError(f"{file} cannot be read: {problem}; replace it") from None


def _turned(image: Image.Image) -> tuple[bool, tuple[int, int]]:
    """Whether a picture's EXIF asks for another orientation than the stored one, and its size in that.

    Pillow turns TIFF itself; other formats have EXIF in the header, if at all.
    """
    orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info and image.format != "TIFF" else 1
    return orientation in range(2, 9), image.size[::-1] if orientation in TURNED else image.size


def _misfit(image: Image.Image, stated: tuple[int, int]) -> str | None:
    """What the size is, where it is not the stated one, be it stored or turned."""
    if stated in (image.size, _turned(image)[1]):
        return None
    return f"is {image.width}x{image.height}, stated {stated[0]}x{stated[1]}"


def _opened_sizes(
    source: object, files: Sequence[Path], stated: Sequence[tuple[int, int] | None]
) -> list[tuple[int, int]]:
    """Width and height of every picture, from its header; checked where they are stated."""
    sizes: list[tuple[int, int]] = []
    unreadable, misfits = [], []
    for file, size in zip(files, stated):
        try:
            with _picture(file) as image:
                misfit = None if size is None else _misfit(image, size)
                sizes.append(size or _turned(image)[1])
        except UserError as problem:
            unreadable.append(str(problem))
            continue
        if misfit is not None:
            misfits.append(f"{file} {misfit}")
    if unreadable:
        raise _bad(source, "picture that cannot be read", unreadable, "Replace them.")
    if misfits:
        raise _bad(source, "picture of another size than stated", misfits, RESIZED)
    return sizes


# YOLO


def _read_yolo(path: Path, split: str | None, boxes: _Boxes) -> DetectionData:
    root, names, files = _yolo_layout(path, split)
    sizes = _opened_sizes(path, files, [None] * len(files))
    labels = [_label_file(file) for file in files]
    owners: list[int] = []
    numbers: list[int] = []
    shares: list[tuple[float, float, float, float]] = []
    lines: list[str] = []
    malformed, unknown = [], []
    for index, label in enumerate(labels):
        for number, line in enumerate(_lines(label), start=1):
            words = line.split()
            if not words:
                continue
            where = f"{label}, line {number} ({line.strip()[:80]!r})"
            corners = _corners(words)
            if corners is None:
                malformed.append(where)
            elif (kind := _class_number(words[0])) not in names:
                unknown.append(where)
            else:
                owners.append(index)
                numbers.append(kind)
                shares.append(corners)
                lines.append(where)
    if malformed:
        what = "label line that is not `class x y width height` or an outline"
        raise _bad(path, what, malformed, "Mend them; a sixth number, a detector's confidence, does not belong there.")
    if unknown:
        remedy = f"The classes are {_listed(f'{number} {name}' for number, name in names.items())}."
        raise _bad(path, "label line of a class that is not there", unknown, remedy)
    places = np.array(owners, dtype=np.int64)
    extents = np.array(sizes, dtype=np.float64)[places]
    kept, keep, clipped, notes = boxes.checked(
        path,
        np.array(shares, dtype=np.float64).reshape(-1, 4) * np.concatenate([extents, extents], axis=1),
        extents,
        lambda index: lines[index],
        "YOLO's numbers are shares of the picture's width and height, not pixels. ",
    )
    if not keep.any():
        beside = ", ".join(sorted({str(label.parent) for label in labels})[:LISTED])
        raise UserError(f"{path} holds no objects; labels of its {len(files)} pictures were looked for in {beside}")
    category_ids = tuple(names)
    pictures = _assembled(
        [(number, _relative(file, root)) for number, file in enumerate(files, start=1)],
        sizes,
        files,
        places,
        keep,
        clipped,
        (
            kept,
            np.searchsorted(category_ids, numbers).astype(np.int64),
            np.zeros(len(places), dtype=bool),
            (kept[:, 2:].astype(np.float64) - kept[:, :2]).prod(axis=1).astype(np.float32),
            np.arange(1, len(places) + 1),
        ),
    )
    alone = {label for folder in {label.parent for label in labels} for label in folder.glob("*.txt")} - set(labels)
    alone = {label for label in alone if label.name not in (CLASSES, "labels.txt")}
    if alone:
        said = _listed(sorted(map(str, alone)))
        notes = (*notes, f"{_count(len(alone), 'label file')} without a picture: {said}")
    return DetectionData(pictures, tuple(names.values()), category_ids, str(path), notes=notes)


def _corners(words: list[str]) -> tuple[float, float, float, float] | None:
    """The corners, in shares of the picture, of a label line's box or of its outline's bounding box."""
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        return None
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        return None
    if not all(map(math.isfinite, values)):  # min and max would pass over nan
        return math.nan, math.nan, math.nan, math.nan
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _class_number(word: str) -> int:
    """-1 for what is no class."""
    try:
        value = float(word)
    except ValueError:
        return -1
    return int(value) if value.is_integer() else -1


def _relative(file: Path, root: Path) -> str:
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _label_file(picture: Path) -> Path:
    """Where a picture's labels are: in labels/ for the last images/ of its path, or beside it."""
    parts = list(picture.parts)
    beside = picture.with_suffix(".txt")
    if "images" not in parts[:-1]:
        return beside
    last = len(parts) - 2 - parts[-2::-1].index("images")
    parts[last] = "labels"
    label = Path(*parts).with_suffix(".txt")
    return beside if beside.is_file() and not label.is_file() else label


def _lines(label: Path) -> list[str]:
    """None, of a file that is not there."""
    try:
        return label.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise UserError(f"{label} is not text in UTF-8; expected lines of `class x y width height`") from None
    except OSError as problem:
        raise UserError(f"{label} cannot be read: {problem.strerror or problem}") from None


def _yolo_layout(path: Path, split: str | None) -> tuple[Path, dict[int, str], list[Path]]:
    """The folder that names are relative to, the classes by number, the pictures in order."""
    described = path if path.is_file() else _yaml_of_folder(path)
    if described is not None:
        root, names, places = _yolo_yaml(described, split)
    elif _has_labels(path):
        root, names, places = path, _class_names(path), [path / "images"]
        if split is not None:
            places = [path / "images" / split]
            if not places[0].is_dir():
                raise UserError(f"{path} has no folder images/{split}; leave the split out, or make one")
    else:
        raise UserError(f"{path} is not in YOLO layout: no {' or '.join(YOLO_NAMES[:2])}, nor images/ with labels/")
    files: dict[Path, None] = {}
    for place in places:
        found = _listed_pictures(place) if place.is_file() else _pictures_below(place)
        if described is None and split is None:
            found = [file for file in found if file.relative_to(place).parts[0] != "test"]
        if not found:
            raise UserError(f"{place} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        files.update(dict.fromkeys(found))
    return root, names, list(files)


def _pictures_below(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in files if not file.name.startswith("."))


def _listed_pictures(file: Path) -> list[Path]:
    return [file.parent / line.strip() for line in _lines(file) if line.strip()]


def _yolo_yaml(file: Path, split: str | None) -> tuple[Path, dict[int, str], list[Path]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(f"{file} has no `names`; expected YOLO's yaml with names, train and val")
    names = content["names"]
    named = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(named, dict) or not named or not all(_whole(key) and key >= 0 for key in named):
        raise UserError(f"{file}: names is {names!r}; expected a list of classes, or their names by number from 0")
    named = {key: str(named[key]) for key in sorted(named)}
    if isinstance(content.get("nc"), int) and content["nc"] != len(named):
        raise UserError(f"{file}: nc is {content['nc']}, but there are {len(named)} names; correct one of them")
    _distinct(file, named)
    root = file.parent / str(content.get("path") or "")
    root = root if root.is_dir() else file.parent  # a path of another machine
    wanted = [split] if split is not None else [name for name in ("train", "val") if content.get(name)]
    if not wanted or not all(content.get(name) for name in wanted):
        there = [name for name in SPLITS if content.get(name)]
        missing = split or "train or val"
        raise UserError(
            f"{file} names no {missing} pictures, only {', '.join(there) or 'classes'}; add `{split or 'train'}`"
        )
    places = []
    for name in wanted:
        for entry in content[name] if isinstance(content[name], list) else [content[name]]:
            # Roboflow writes ../train/images for what is beside the file.
            tried = [root / str(entry), file.parent / str(entry), file.parent / str(entry).removeprefix("../")]
            place = next((place for place in tried if place.exists()), None)
            if place is None:
                raise UserError(
                    f"{file}: {name} is {entry}, which is not there (looked for {_listed(map(str, tried))})"
                )
            places.append(place)
    return root, named, places


def _class_names(folder: Path) -> dict[int, str]:
    file = next((path for path in (folder / CLASSES, folder / "labels" / CLASSES) if path.is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} has images/ and labels/ but no classes; write {folder / CLASSES}, a name in each line"
        )
    names = [line.strip() for line in _lines(file)]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"{file} has an empty line or no names; expected a class name in each line")
    _distinct(file, dict(enumerate(names)))
    return dict(enumerate(names))


def _distinct(file: Path, names: dict[int, str]) -> None:
    if repeated := _repeated(names.values()):
        raise UserError(f"{file}: several classes are called {repeated[0]!r}; rename them")
