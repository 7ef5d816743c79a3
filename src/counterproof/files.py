"""Writing files so that none is ever lost or half written."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from counterproof.errors import UserError

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) that takes the place of `path` once it is whole; until then, what was there stays.

    Raises:
        UserError: a folder that does not exist or cannot be written, a full disk; names `path` and the remedy.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as problem:
        remedies = {
            errno.ENOSPC: "the disk is full; free some space or write elsewhere",
            errno.ENOENT: f"the folder {path.parent} does not exist; make it or write elsewhere",
        }
        remedy = remedies.get(problem.errno or 0, f"{problem.strerror}; write elsewhere")
        raise UserError(f"cannot write {path}: {remedy}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
