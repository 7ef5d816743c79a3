"""The user's own data and model: read and checked before any trial, and part of every trial's key."""

from dataclasses import dataclass
from pathlib import Path

from counterproof.bench.journal import Journal
from counterproof.bench.task import Task, resolve
from counterproof.errors import UserError

__all__ = ["OwnData", "own_data", "own_model"]


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
