"""What our SQLite files share: how one is recognised, how it is changed all or nothing, and what its errors mean."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from counterproof.errors import UserError

__all__ = ["clear_errors", "look", "make_folder", "whole"]


def make_folder(path: Path) -> None:
    """Make the folder of a file.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"cannot make the folder {path.parent} ({problem.strerror}); "
            "set COUNTERPROOF_HOME to one that can be written"
        ) from None


def look(db: sqlite3.Connection, path: Path, *, application: int, newest: int, name: str) -> tuple[int, bool]:
    """See whose file it is, in one transaction: another process may be making it at this moment.

    Args:
        db: the open file, in autocommit.
        path: it, for messages.
        application: the ``application_id`` of our files of this kind.
        newest: the version that this program writes.
        name: of the kind, such as ``journal``.

    Returns:
        its version, and whether nothing is in it yet.

    Raises:
        UserError: a file of another program, or of a newer version of ours.
    """
    db.execute("BEGIN")
    theirs = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    db.execute("COMMIT")
    if theirs not in (0, application) or (theirs == 0 and tables):
        raise UserError(
            f"{path} is an SQLite file of another program, not a {name}; nothing was changed. "
            "Move it away, or set COUNTERPROOF_HOME to another folder"
        )
    if version > newest:
        raise UserError(
            f"{path} was written by a newer Counterproof ({name} version {version}, this one reads {newest}); "
            "nothing was changed. Upgrade: pip install -U counterproof"
        )
    return version, tables == 0


@contextmanager
def whole(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction: all of it or nothing, whatever is raised inside."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def clear_errors(path: Path, *, kept: str, damaged: str) -> Iterator[None]:
    """Say what a database error means for the user.

    Args:
        path: the file.
        kept: what a full disk leaves: ``finished trials are kept``.
        damaged: what the file is not, and what to do then.

    Raises:
        UserError: in place of what sqlite3 raises.
    """
    try:
        yield
    except sqlite3.Error as problem:
        text = str(problem)
        # Write-ahead logging on a full disk fails as an I/O error, not as a full disk.
        if "full" in text or ("I/O" in text and shutil.disk_usage(path.parent).free < 1 << 20):
            meaning = f"the disk is full; free some space and repeat the command: {kept}"
        elif "readonly" in text or "unable to open" in text:
            meaning = "it cannot be written; set COUNTERPROOF_HOME to a folder that can"
        elif "not a database" in text or "malformed" in text:
            meaning = f"it is damaged or {damaged}"
        elif "locked" in text:
            meaning = "another program has been writing for 30 seconds; try again"
        else:
            meaning = "the database refused"
        raise UserError(f"{path}: {meaning} ({text})") from None
