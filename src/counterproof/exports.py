"""Let a room offer its papers' public names without being edited when a paper is added."""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def exported_names(folder: Path) -> dict[str, str]:
    """Which module of a folder exports which name: what their ``__all__`` lists say, read without importing them."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
            ):
                names.update(dict.fromkeys(ast.literal_eval(node.value), path.stem))
    return names


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a room: every name in a module's ``__all__``, imported on first use.

    Args:
        package: the room's ``__name__``.
        file: the room's ``__file__``.

    Raises:
        AttributeError: from the returned ``__getattr__``, for a name that no module of the room exports.
    """

    folder = Path(file).parent

    def getattribute(name: str) -> Any:
        if not name.startswith("_") and name in exported_names(folder):
            return getattr(import_module(f"{package}.{exported_names(folder)[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, lambda: sorted(exported_names(folder))
