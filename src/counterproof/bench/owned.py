"""The user's own data, model and device: checked before any trial, and part of every trial's key."""

import re
from dataclasses import dataclass
from pathlib import Path

from counterproof.bench.journal import Journal
from counterproof.bench.task import Task, resolve
from counterproof.errors import UserError

__all__ = ["OwnData", "own_data", "own_device", "own_model"]


@dataclass(frozen=True)
class OwnData:
    """Data that the task has read: where it is, the digest of its content, and what it is in one line."""

    path: str
    fingerprint: str
    says: str


def own_data(task: Task, path: Path, journal: Journal) -> OwnData:
    """Have the task read and check the user's data.

    Args:
        path: of a file or folder; or ``KIND:PATH`` or ``KIND:PATH,PATH``, such as coco:annotations.json,images, of a
            kind that the task's reader knows. What exists under that name as it is, is a plain path. The fingerprint
            covers all that is named, folders whole: pictures beside a file that is named alone are not in it.

    Raises:
        UserError: data the task cannot use, naming file and remedy; a task that takes none.
    """
    if task.data is None:
        raise UserError(f"task {task.name} has embedded data only; it takes no --data")
    kind, parts = _parts(path)
    for part in parts:
        if not part.exists():
            raise UserError(f"{part} does not exist" + (f" ({path})" if kind else ""))
    whole = kind + ",".join(str(part.resolve()) for part in parts)
    says = resolve(task.data)(Path(whole) if kind else path)
    prints = [journal.fingerprint(part) for part in parts]
    return OwnData(whole, kind + ",".join(prints), says)


def _parts(path: Path) -> tuple[str, list[Path]]:
    """``KIND:`` (empty for a plain path) and the paths that it names: at most two, the last one without a comma."""
    name = str(path)
    match = re.match(r"([a-z][a-z0-9]+:)(.+)", name)
    if match is None or path.exists():
        return "", [path]
    kind, named = match[1], Path(match[2]).expanduser()
    file, comma, folder = match[2].rpartition(",")
    if named.exists() or not comma:
        return kind, [named]
    return kind, [Path(part).expanduser() for part in (file, folder) if part]


def own_model(task: Task, model: str, journal: Journal) -> tuple[str, str]:
    """A local model folder with the digest of its content, or a hub id as it is spelt.

    Raises:
        UserError: a task that takes no model.
    """
    if not task.model:
        raise UserError(f"task {task.name} builds its own model; it takes no --model")
    path = Path(model)
    if path.exists():
        return str(path.resolve()), journal.fingerprint(path)
    return model, model


def own_device(device: str) -> str:
    """The device, once torch has said that it is there; the processor needs no torch.

    Raises:
        UserError: a device that is not one, or not on this machine.
    """
    if device == "cpu":
        return device
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(f"--device {device} needs torch; install the extra of the room that is compared") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch asserts that it was compiled with CUDA
        raise UserError(f"--device {device}: {str(problem).splitlines()[0]}") from None
    return device
