"""The user's own data, model and device: checked before any trial, and part of every trial's key."""

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

    Raises:
        UserError: data the task cannot use, naming file and remedy; a task that takes none.
    """
    if task.data is None:
        raise UserError(f"task {task.name} has embedded data only; it takes no --data")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    says = resolve(task.data)(path)
    return OwnData(str(path.resolve()), journal.fingerprint(path), says)


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
