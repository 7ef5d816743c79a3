"""Checks that every runnable paper passes without being asked."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import counterproof
from counterproof.bench.code import closure
from counterproof.bench.task import resolve
from counterproof.page.catalogue import papers

SOURCE = Path(counterproof.__file__).parent
TESTS = Path(__file__).parent
RUNNING = [paper for paper in papers().values() if paper.status == "runs"]
each = pytest.mark.parametrize("paper", RUNNING, ids=lambda paper: paper.slug)
RANDOMNESS = {"generator", "rng", "seed", "random_state"}
FRESH_GENERATORS = {"default_rng", "Generator", "SeedSequence", "PCG64", "RandomState", "BitGenerator"}


def test_fifty_papers_are_on_the_page():
    assert len([paper for paper in papers().values() if paper.package.startswith("counterproof.")]) == 50


@each
def test_it_has_its_files(paper):
    module = paper.slug.replace("-", "_")
    folder = paper.path.parent
    assert (folder / f"{module}.py").exists()
    assert (folder / "claims" / f"{module}.py").exists()
    assert (TESTS / paper.room / f"test_{module}.py").exists()


@each
def test_its_header_names_paper_reference_and_deviations(paper):
    docstring = ast.get_docstring(ast.parse((paper.path.with_suffix(".py")).read_text()))
    for word in ("Paper:", "Read beside:", "Deviations:"):
        assert word in docstring, f"{paper.module}: the docstring lacks {word!r}"
    if paper.arxiv:
        assert paper.arxiv in docstring


@each
def test_its_card_tells_how_to_check_it(paper):
    assert f"counterproof check {paper.slug}" in paper.sections["How it is used here"]


def snippet(paper):
    (code,) = re.findall(r"```python\n(.*?)```", paper.sections["How it is used here"], re.DOTALL)
    return code


@each
def test_its_public_names_are_documented_and_offered_by_the_room(paper):
    module = importlib.import_module(paper.module)
    room = importlib.import_module(paper.package)
    assert module.__all__
    for name in module.__all__:
        thing = getattr(module, name)
        assert getattr(room, name) is thing
        assert inspect.getdoc(thing), f"{paper.module}.{name} has no docstring"
        members = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
        for member, function in members:
            if not member.startswith("_") and function.__module__ == paper.module:
                assert inspect.getdoc(function), f"{paper.module}.{name}.{member} has no docstring"


@each
def test_it_takes_randomness_by_one_argument(paper):
    module = importlib.import_module(paper.module)
    for name in module.__all__:
        thing = getattr(module, name)
        functions = [thing]
        if inspect.isclass(thing):
            functions = [f for _, f in inspect.getmembers(thing, inspect.isfunction) if f.__module__ == paper.module]
        for function in functions:
            sources = RANDOMNESS & set(inspect.signature(function).parameters)
            assert len(sources) <= 1, f"{name}: {sources}"


@each
def test_it_draws_from_no_global_generator(paper):
    for node in ast.walk(ast.parse(paper.path.with_suffix(".py").read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert not re.match(r"random\.\w+$", text), f"{paper.module}:{node.lineno}: {text}"
            if match := re.match(r"(?:np|numpy)\.random\.(\w+)", text):
                assert match[1] in FRESH_GENERATORS, f"{paper.module}:{node.lineno}: {text}"
            assert text not in ("torch.manual_seed", "torch.seed", "torch.random.manual_seed"), f"{node.lineno}: {text}"


@each
def test_its_defaults_are_the_papers(paper):
    """The card's `defaults` hold the paper's values; the code's must be those."""
    module = importlib.import_module(paper.module)
    assert paper.defaults, f"{paper.slug}: the card names no defaults"
    for name, expected in paper.defaults.items():
        *path, parameter = name.split(".")
        thing = module
        for part in path:
            thing = getattr(thing, part)
        default = inspect.signature(thing).parameters[parameter].default
        text = str(default).removeprefix("torch.")
        assert default == expected or text == str(expected), f"{name} is {default!r}, the paper's is {expected!r}"


INSTRUMENT = """
import copy, functools, importlib, inspect, json, random, sys
import numpy as np
try:
    import torch
except ImportError:
    torch = None
if torch is not None:
    torch.set_num_threads(1)
    if {double}:
        torch.set_default_dtype(torch.float64)
module = importlib.import_module({module!r})
calls = []

def arrays(value, depth=0):
    if isinstance(value, np.ndarray) or (torch is not None and type(value) is torch.Tensor):
        yield value
    elif isinstance(value, dict) and depth < 3:
        for inner in value.values():
            yield from arrays(inner, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 3:
        for inner in value:
            yield from arrays(inner, depth + 1)

def snapshot(value):
    return [np.array(a, copy=True) if isinstance(a, np.ndarray) else a.detach().clone() for a in arrays(value)]

def same(a, b):
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f") if isinstance(a, np.ndarray) else torch.equal(a, b)

def state():
    parts = [repr(random.getstate()), repr(np.random.get_state())]
    return parts + ([torch.get_rng_state().tolist()] if torch is not None else [])

def floating(a):
    return a.dtype.kind == "f" if isinstance(a, np.ndarray) else a.dtype.is_floating_point

def kind(a):
    return (type(a).__name__, str(a.dtype), str(getattr(a, "device", "cpu")))

def watched(function, name):
    @functools.wraps(function)
    def call(*args, **kwargs):
        given = args[1:] if inspect.isfunction(function) and "." in name else args
        before, drawn = snapshot((given, kwargs)), state()
        result = function(*args, **kwargs)
        after = snapshot((given, kwargs))
        assert all(map(same, before, after)), name + " changed its input"
        assert state() == drawn, name + " drew from a global generator"
        inputs = {{kind(a) for a in arrays((given, kwargs)) if floating(a)}}
        containers = {{given[0] for given in inputs}}
        outputs = {{kind(a) for a in arrays(result) if floating(a) and type(a).__name__ in containers}}
        if len(inputs) == 1 and not inspect.isclass(function):
            assert outputs <= inputs, f"{{name}} took {{inputs}} and gave {{outputs}}"
        calls.append(name)
        return result
    return call

for name in module.__all__:
    thing = getattr(module, name)
    if inspect.isclass(thing):
        for member, function in inspect.getmembers(thing, inspect.isfunction):
            if function.__module__ == module.__name__ and (not member.startswith("_") or member == "__call__"):
                setattr(thing, member, watched(function, f"{{name}}.{{member}}"))
    elif inspect.isfunction(thing):
        setattr(module, name, watched(thing, name))
exec(compile(sys.stdin.read(), "the card's snippet", "exec"), {{"__name__": "snippet"}})
print("CALLS", json.dumps(calls))
"""


def run_snippet(paper, double=False):
    script = INSTRUMENT.format(module=paper.module, double=double)
    ran = subprocess.run([sys.executable, "-c", script], input=snippet(paper), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    output, _, calls = ran.stdout.rpartition("CALLS ")
    return output, json.loads(calls)


@each
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_its_snippet_runs_keeps_inputs_dtypes_and_generators_and_repeats(paper, double):
    output, calls = run_snippet(paper, double)
    assert calls, "the card's snippet calls nothing that the paper offers"
    assert run_snippet(paper, double) == (output, calls)


def distributions(extra=None):
    """Names of distributions that Counterproof, with an extra, brings along."""
    found, queue = set(), [("counterproof", extra)]
    while queue:
        name, wanted = queue.pop()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in requirements:
            what, _, marker = requirement.partition(";")
            asked = re.search(r"extra == ['\"]([^'\"]+)", marker)
            if asked and asked[1] != wanted:
                continue
            bare = re.split(r"[^A-Za-z0-9._-]", what.strip(), maxsplit=1)[0].lower().replace("_", "-")
            if bare not in found:
                found.add(bare)
                queue.append((bare, None))
    return found


def modules_of(names):
    by_module = importlib.metadata.packages_distributions()
    return {m for m, owners in by_module.items() if {o.lower().replace("_", "-") for o in owners} & names}


def import_without(module, blocked):
    script = textwrap.dedent(f"""
        import sys
        class Without:  # as if they were not installed: also importlib.util.find_spec finds nothing
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
            def __getattr__(self, name):
                return getattr(self.finder, name)
        sys.meta_path[:] = map(Without, sys.meta_path)
        import {module}
    """)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@each
def test_it_imports_with_only_its_own_extra(paper):
    every = set(importlib.metadata.metadata("counterproof").get_all("Provides-Extra"))
    others = set().union(*(distributions(extra) for extra in every)) - distributions(paper.room)
    ran = import_without(paper.module, modules_of(others) - modules_of(distributions(paper.room)))
    assert ran.returncode == 0, ran.stderr


@each
def test_without_its_extra_the_error_names_it(paper):
    own = distributions(paper.room) - distributions()
    imports = {module.partition(".")[0] for module, _ in closure([paper.module]).outside}
    blocked = modules_of(own) & imports
    if not blocked:
        pytest.skip("it needs nothing but the core")
    ran = import_without(paper.module, blocked)
    assert ran.returncode != 0
    assert f"counterproof[{paper.room}]" in ran.stderr.strip().splitlines()[-1]


@each
def test_its_claims_are_declared_without_the_heavy_libraries_and_refer_to_what_exists(paper):
    check = f"import {paper.package}.claims.{paper.path.stem}, sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
    names = [claim.name for claim in paper.claims]
    assert names
    assert len(set(names)) == len(names)
    for claim in paper.claims:
        assert claim.paper == paper.slug
        assert claim.says
        assert claim.reported
        for reference in (claim.task.run, claim.task.data, claim.baseline.method, claim.method.method):
            if reference is not None:
                assert callable(resolve(reference))
        assert {"quick", "standard", "full"} <= set(claim.task.budgets)


@each
def test_a_change_of_the_method_leaves_a_baseline_without_it_valid(paper):
    for claim in paper.claims:
        if claim.baseline.method is None:
            assert paper.module not in closure([claim.task.run.partition(":")[0]]).modules


@each
def test_deleting_its_files_would_break_nothing(paper):
    """No module but its own claims names it."""
    stem = paper.path.stem
    for path in SOURCE.rglob("*.py"):
        if path.stem != stem:
            assert not re.search(rf"\b{stem}\b", path.read_text()), f"{path} knows {paper.slug}"
