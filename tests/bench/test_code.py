"""The key of a trial covers the code it runs: all of it, and nothing else."""

import sys

import pytest

from counterproof.bench import code
from counterproof.bench.code import closure, distribution_versions


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a package `fresh`, and read it anew after every change."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "fresh"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (folder / name).write_text("")

    def write(modules):
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        code._read.cache_clear()
        code._source.cache_clear()
        return closure(["fresh.task"]).modules

    yield write
    for name in [name for name in sys.modules if name.startswith("fresh")]:
        del sys.modules[name]


def test_imports_are_followed_at_every_depth_and_in_every_form(package):
    task = (
        "from fresh import a\nfrom . import b\nfrom .inner import c\nimport fresh.inner.d\n"
        "def run():\n    from .e import x\n    try:\n        import fresh.f\n    except ImportError:\n        pass\n"
    )
    modules = {"task": task, "b": "from .g import *", "inner/c": "from ..h import y", "e": "x = 1", "h": "y = 1"}
    found = package({**dict.fromkeys(["a", "inner/d", "f", "g", "unrelated"], ""), **modules})
    expected = {"", ".task", ".a", ".b", ".inner", ".inner.c", ".inner.d", ".e", ".f", ".g", ".h"}
    assert {name for name in found if name.startswith("fresh")} == {f"fresh{name}" for name in expected}


def test_a_cycle_ends(package):
    assert {"fresh.task", "fresh.a"} <= set(package({"task": "from fresh import a", "a": "from fresh import task"}))


def test_typing_imports_do_not_run(package):
    found = package({"task": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fresh import a\n", "a": ""})
    assert "fresh.a" not in found


def test_a_helper_that_changes_changes_only_its_own_digest(package):
    before = package({"task": "from fresh.helper import x", "helper": "x = 1", "other": ""})
    after = package({"helper": "x = 5"})
    assert before["fresh.helper"] != after["fresh.helper"]
    assert before["fresh.task"] == after["fresh.task"]


def test_comments_docstrings_and_layout_are_not_code(package):
    before = package({"task": '"""Doc."""\ndef f():\n    """Doc."""\n    return 1\n'})
    after = package({"task": '"""Other."""\n\n\n# why\ndef f():\n    """Else."""\n    return (1)\n'})
    assert before["fresh.task"] == after["fresh.task"]
    assert package({"task": "def f():\n    return 2\n"})["fresh.task"] != before["fresh.task"]


def test_names_that_a_room_exports_lazily_are_followed():
    found = closure(["lab.task"]).modules
    assert {"lab", "lab.task", "lab.scale", "counterproof.bench.task"} <= set(found)
    assert "lab.methods" not in found
    assert "counterproof.bench.statistics" not in found  # the verdict's code cannot change a trial


def test_a_lazy_name_reaches_its_module(package):
    lazy = "from counterproof.exports import lazy_exports\n__getattr__, __dir__ = lazy_exports(__name__, __file__)\n"
    package({"task": "", "inner/__init__": lazy})
    found = package({"task": "from fresh.inner import thing", "inner/where": "__all__ = ['thing']\nthing = 1\n"})
    assert "fresh.inner.where" in found


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"lab\.nowhere"):
        closure(["lab.nowhere"])


def test_versions_are_those_of_what_is_imported():
    import numpy
    import yaml

    found = distribution_versions(frozenset({("numpy", ""), ("yaml", "safe_load"), ("os", ""), ("not_there", "")}))
    assert found["numpy"] == numpy.__version__
    assert found["PyYAML"] == yaml.__version__
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(found) == 3
