"""Which code a trial runs, found without running it: so a change invalidates the trials it could change, and no others.

The closure of a module is every module of ours that importing and running it can import: import statements are read
from the syntax tree at every depth, those inside functions included. "Ours" is Counterproof and the package the trial's
own modules live in. A module counts by its syntax tree without comments and docstrings. Imports by computed name are
invisible here; the worker compares what a trial has really imported with its closure and refuses what is not covered.
"""

import ast
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from counterproof.exports import exported_names

__all__ = ["Code", "closure", "distribution_versions", "our_packages"]


@dataclass(frozen=True)
class Code:
    """The code of a trial.

    Attributes:
        modules: digest of every module of ours, by name.
        outside: (module, name or "") of everything imported from other packages, for versions and preloading.
    """

    modules: dict[str, str]
    outside: frozenset[tuple[str, str]]


def our_packages(roots: Sequence[str]) -> frozenset[str]:
    """Top-level packages whose modules count as ours, for trials that start at the modules `roots`."""
    return frozenset({"counterproof", *(root.partition(".")[0] for root in roots)})


def closure(roots: Sequence[str]) -> Code:
    """The code reached from the modules `roots`.

    Raises:
        ModuleNotFoundError: when a root does not exist.
        SyntaxError: when a module of ours cannot be parsed; names file and line.
    """
    ours = our_packages(roots)
    modules: dict[str, str] = {}
    outside: set[tuple[str, str]] = set()
    queue = list(roots)
    while queue:
        name = queue.pop()
        if name in modules:
            continue
        parent = name.rpartition(".")[0]
        if parent:
            queue.append(parent)
        source = _source(name)
        if source is None:
            if name in roots:
                raise ModuleNotFoundError(f"no module named {name!r}", name=name)
            continue
        modules[name], imports = _read(source)
        for target, imported in imports:
            if target.partition(".")[0] not in ours:
                outside.add((target, imported))
                continue
            queue.append(target)
            if imported:
                queue.extend(_home(target, imported))
    return Code(dict(sorted(modules.items())), frozenset(outside))


def _home(package: str, name: str) -> Iterator[str]:
    """The module that ``from package import name`` reaches, when it is not `package` itself."""
    file = _source(package)
    if file is None or file.name != "__init__.py":
        return
    if _source(f"{package}.{name}") is not None:
        yield f"{package}.{name}"
    elif name in (exported := exported_names(file.parent)):
        yield f"{package}.{exported[name]}"


@cache
def _source(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@cache
def _read(file: Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Digest and imports of a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    imports = tuple(dict.fromkeys(_imports(tree, _package_of(file))))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16], imports


def _package_of(file: Path) -> list[str]:
    """Dotted parts of the package a file belongs to, for relative imports."""
    parts: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return parts


def _imports(node: ast.AST, package: list[str]) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for branch in child.orelse:
                yield from _imports(branch, package)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            yield from ((module, "" if alias.name == "*" else alias.name) for alias in child.names)
        else:
            yield from _imports(child, package)


def distribution_versions(outside: frozenset[tuple[str, str]]) -> dict[str, str]:
    """Versions of the installed distributions behind imported modules, and of Python (major.minor).

    Modules that are not installed are left out: an optional import that is absent is part of the environment too.
    """
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    tops = {module.partition(".")[0] for module, _ in outside} - set(sys.stdlib_module_names)
    for top in sorted(tops):
        for distribution in _distributions(top):
            versions[distribution] = importlib.metadata.version(distribution)
    return versions


@cache
def _distributions(top: str) -> tuple[str, ...]:
    try:
        return (importlib.metadata.metadata(top)["Name"],)
    except importlib.metadata.PackageNotFoundError:
        return tuple(sorted(set(_by_module().get(top, ()))))


@cache
def _by_module() -> dict[str, list[str]]:
    return {module: list(names) for module, names in importlib.metadata.packages_distributions().items()}
