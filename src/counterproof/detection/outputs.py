"""What the verbs of the room write, and what they ask first: files whole, devices that are there, pictures to show."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from counterproof.detection.annotations import LISTED, DetectionData
from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    import torch
    from PIL import Image

__all__ = [
    "check_device",
    "check_ending",
    "data_uri",
    "folder_of",
    "make_folder",
    "save_picture",
    "shown",
    "some_of",
    "spaced",
    "write_bytes",
    "write_json",
]

SHOWN = 12  # pictures on a sheet or a page


def check_device(device: str) -> None:
    """Raise when torch has no such device here.

    Raises:
        UserError: with torch's reason.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch asserts that it was compiled with CUDA
        raise UserError(f"device {device!r}: {str(problem).splitlines()[0]}") from None


def check_ending(path: Path, endings: Sequence[str]) -> str:
    """The ending of a file's name, one of these.

    Raises:
        UserError: it is none of them.
    """
    kind = path.suffix.lower()
    if kind not in endings:
        raise UserError(f"{path} should end in {' or '.join(endings)}")
    return kind


def folder_of(data: DetectionData) -> Path:
    """The folder that the pictures' names are relative to."""
    first = data.pictures[0]
    assert first.file is not None
    depth = len(PurePosixPath(first.name).parts)
    parents = first.file.absolute().parents
    return parents[min(depth, len(parents)) - 1]


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make the folder {path}: {problem.strerror}; name another") from None


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG.

    Raises:
        UserError: a path that cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {problem.strerror or problem}; name another file") from None


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def spaced(count: int, most: int) -> list[int]:
    """At most so many indices, evenly spaced."""
    return [index * count // min(count, most) for index in range(min(count, most))]


def shown(data: DetectionData) -> list[int]:
    """Pictures to draw: with objects if there are any, evenly spaced."""
    full = [index for index, picture in enumerate(data.pictures) if not picture.crowd.all()]
    chosen = full or list(range(len(data.pictures)))
    return [chosen[index] for index in spaced(len(chosen), SHOWN)]


def some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
