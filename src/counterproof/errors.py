"""What goes wrong for reasons a user can mend: one clear line, exit code 2."""

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtra", "UserError", "extra", "require"]


class UserError(ValueError):
    """Bad usage or bad input. The message names the culprit and the remedy; it is shown without a traceback."""


class MissingExtra(ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, absent: str, extra: str) -> None:
        super().__init__(f"{absent} is not installed; it comes with: pip install 'counterproof[{extra}]'", name=absent)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of what an extra installs.

    Raises:
        MissingExtra: in place of the bare error, when one of them is not there.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        raise MissingExtra(problem.name or str(problem), name) from None


def require(name: str) -> None:
    """Check, without importing anything, that all that an extra installs is there.

    Raises:
        MissingExtra: naming the first distribution that is not.
    """
    for requirement in importlib.metadata.requires("counterproof") or ():
        what, _, marker = requirement.partition(";")
        if re.search(rf"extra == ['\"]{re.escape(name)}['\"]", marker):
            distribution = re.split(r"[^A-Za-z0-9._-]", what.strip(), maxsplit=1)[0]
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                raise MissingExtra(distribution, name) from None
