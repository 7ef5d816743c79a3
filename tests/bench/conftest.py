import os
import subprocess
import sys
from pathlib import Path

import pytest

from counterproof.bench.comparison import compare
from counterproof.bench.journal import Journal
from counterproof.bench.trials import specs
from lab.claims import make_claim

TESTS = Path(__file__).parents[1]


@pytest.fixture
def journal(own_home):
    return Journal()


@pytest.fixture
def settle(journal):
    """Settle the claim of one method of the laboratory."""

    def settle(method="gain", options=None, **settings):
        (found,) = compare([make_claim(method, **settings)], journal, **{"jobs": 2, **(options or {})})
        return found

    return settle


@pytest.fixture
def spec():
    def spec(method="gain", seed=0, **settings):
        claim = make_claim(method, **settings)
        return specs(claim, claim.method, range(seed + 1), budget="quick")[seed]

    return spec


@pytest.fixture
def driver():
    """A driver in a process of its own: Python code that has `make_claim`, `Journal` and `compare` at hand."""
    started = []

    def driver(code, path=(), **environment):
        script = (
            f"import sys; sys.path[:0] = {[*map(str, path), str(TESTS)]!r}\n"
            "from lab.claims import make_claim\n"
            "from counterproof.bench.comparison import compare\n"
            "from counterproof.bench.journal import Journal\n" + code
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield driver
    for process in started:
        process.kill()
        process.wait()
