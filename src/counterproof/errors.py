"""What goes wrong for reasons a user can mend: one clear line, exit code 2."""

from importlib.util import find_spec


class UserError(ValueError):
    """Bad usage or bad input. The message names the culprit and the remedy; it is shown without a traceback."""


class MissingExtra(ImportError):
    """A package of an optional extra is not installed."""


def require(extra: str, *modules: str) -> None:
    """Check, without importing them, that the modules of an extra are installed.

    Args:
        extra: the extra of Counterproof that installs them, e.g. ``"generation"``.
        modules: top-level module names, e.g. ``"torch"``.

    Raises:
        MissingExtra: naming the absent modules and the command that installs them.
    """
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        raise MissingExtra(
            f"{', '.join(absent)} not installed; install the extra: pip install 'counterproof[{extra}]'",
            name=absent[0],
        )
