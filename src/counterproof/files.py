"""Writing files so that none is ever lost or half written."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from counterproof.errors import UserError

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` once it is whole; until then, or if that fails, what was there stays.

    UTF-8, lines as they are written; surrogates, which it cannot hold, become question marks. A link stays one: what it
    points to is replaced. A file that is there keeps its mode.

    Raises:
        UserError: a folder or what else is not a regular file, a folder that is not there or may not be written to, a
            full disk; one line that names `path` and the remedy.
    """
    target = Path(os.path.realpath(path))
    theirs: OSError | None = None
    try:
        if target.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if os.path.lexists(target) and not target.is_file():
            raise UserError(f"{path} is not a regular file; name another file")
        if not target.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {target.parent}; make it, or name another file")
        with ExitStack() as leaving:
            temporary = target.parent / f".counterproof-{uuid.uuid4().hex}.part"
            with open(temporary, "x", encoding="utf-8", errors="replace", newline="") as stream:
                leaving.callback(temporary.unlink, missing_ok=True)
                try:
                    yield stream
                except OSError as problem:
                    # A stream names no file; an error that does is about one that the caller opened.
                    theirs = problem if problem.filename is not None else None
                    raise
                stream.flush()
                os.fsync(stream.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
    except OSError as problem:
        if problem is theirs:
            raise
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "the disk is full, or your share of it; free some space, or name another file"
        elif problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = f"the folder {target.parent} may not be written to; make it writable, or name another file"
        else:
            remedy = f"{problem.strerror or problem}; name another file"
        raise UserError(f"cannot write {path}: {remedy}") from None
