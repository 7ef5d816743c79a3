"""Imports only point down, and every module imports with what it declares."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import counterproof
from counterproof.page.catalogue import ROOMS

SOURCE = Path(counterproof.__file__).parent
ROOM_NAMES = [room for room in ROOMS if room != "page"]
MODULES = sorted(
    ".".join(("counterproof", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
)
GROUND = {"database", "errors", "exports", "files"}
# What each floor may import of the others, lowest first.
BELOW = {
    "assign": set(),
    "bench": set(),
    "language": {"assign"},
    **{room: {"assign", "language", "bench"} for room in ROOM_NAMES},
    "page": {"assign", "bench", "language"},
    "watch": {"bench", "page"},
    "web": {"bench", "page", "watch"},
    "cli": {"bench", "page", "watch", "web"},
}


def imported(module):
    """Modules of ours that a module imports, at any depth."""
    path = SOURCE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("counterproof."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            if node.module and node.module.startswith("counterproof"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("counterproof",)])
def test_imports_point_down(module):
    floor = module.split(".")[1]
    for target in imported(module):
        other = target.split(".")[1]
        if floor in (*GROUND, "__main__"):
            assert other in (*GROUND, "cli")
        elif other not in (floor, *GROUND):
            assert other in BELOW[floor], f"{module} imports {target}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[1:2] and m.split(".")[1] in ROOM_NAMES])
def test_of_a_room_only_tasks_and_claims_know_the_bench(module):
    name = module.split(".")
    declares = name[-1] == "task" or "claims" in name
    for target in imported(module):
        if target.startswith("counterproof.bench"):
            assert declares, f"{module} is a method and must not know that it is compared"
            assert target.startswith("counterproof.bench.task."), f"{module} needs counterproof.bench.task only"


def test_the_lowest_floors_know_no_paper():
    for module in MODULES:
        if module.startswith(("counterproof.bench", "counterproof.assign")):
            assert not any(target.split(".")[1] in ROOM_NAMES for target in imported(module))


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__") and not m.endswith("_preload")])
def test_every_module_imports(module):
    importlib.import_module(module)


def test_every_name_that_a_package_offers_is_there():
    for package in ("assign", "bench", "page", *ROOM_NAMES):
        module = importlib.import_module(f"counterproof.{package}")
        for name in dir(module):
            assert getattr(module, name, None) is not None, f"counterproof.{package}.{name}"


@pytest.mark.parametrize(
    "code",
    [
        "import counterproof.cli",
        "from counterproof.page.catalogue import papers; papers()",
        "from counterproof.page.search import search; from counterproof.page.catalogue import papers\n"
        "search('reward', list(papers().values()))",
        "from counterproof.page.catalogue import tasks; tasks()",
        "import counterproof.bench.comparison, counterproof.bench.engine",
        "import counterproof.assign",
    ],
)
def test_the_page_and_the_bench_never_import_the_heavy_libraries(code):
    heavy = {"torch", "transformers", "diffusers", "sklearn", "pandas"}
    check = f"{code}\nimport sys; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
