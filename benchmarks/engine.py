"""What the comparison engine costs: per trial over the work itself, per answer from the journal, and at start-up.

The trial does nothing, so all of its time is the engine's: a process of its own, limits, journal. The peer is benchopt
on a benchmark that does nothing either; it runs its cells inside one process.

    .venv/bin/python benchmarks/engine.py [--quick] [--json FILE]

Rows are {work, size, ours, peer, peer_name, unit, ratio}; ratio is peer / ours, above 1 where ours costs less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

TASK = """
from counterproof.bench.task import Arm, Budget, Claim, Metric, Task
def run(arm, trial):
    return {"score": trial.rng("x").normal()}
def method(trial):
    return 0.0
TASK = Task(name="nothing", says="", run="nothing:run", metrics={"score": Metric("higher")}, plug="",
            budgets={"quick": Budget(seeds=(4, 8), minutes=None)})
CLAIM = Claim(paper="nothing", says="", task=TASK, baseline=Arm("a"), method=Arm("b", "nothing:method"),
              metric="score", better="higher")
"""
BENCHOPT = {
    "objective.py": """
        from benchopt import BaseObjective
        class Objective(BaseObjective):
            name = "nothing"
            min_benchopt_version = "1.6"
            def set_data(self, x): self.x = x
            def evaluate_result(self, value): return dict(value=value)
            def get_one_result(self): return dict(value=0.0)
            def get_objective(self): return dict(x=self.x)
    """,
    "datasets/one.py": """
        from benchopt import BaseDataset
        class Dataset(BaseDataset):
            name = "one"
            def get_data(self): return dict(x=1.0)
    """,
    "solvers/one.py": """
        from benchopt import BaseSolver
        class Solver(BaseSolver):
            name = "one"
            sampling_strategy = "run_once"
            def set_objective(self, x): self.x = x
            def run(self, _): self.value = self.x
            def get_result(self): return dict(value=self.value)
    """,
}


def ours(folder: Path, trials: int) -> tuple[float, float, float]:
    """Seconds of wall time per new trial with one job, per cached answer, and CPU seconds per new trial."""
    sys.path.insert(0, str(folder))
    (folder / "nothing.py").write_text(TASK)
    from nothing import CLAIM  # type: ignore[import-not-found]

    from counterproof.bench import Journal, compare

    journal = Journal(folder / "journal.sqlite")
    list(compare([CLAIM], journal, jobs=1, seeds=(2, 2)))  # the first trials start the process that others fork from
    pairs = trials // 2
    began, cpu = time.perf_counter(), sum(os.times()[:4])
    list(compare([CLAIM], journal, jobs=1, seeds=(pairs + 2, pairs + 2)))
    new = (time.perf_counter() - began) / (2 * pairs)
    cpu = (sum(os.times()[:4]) - cpu) / (2 * pairs)
    began = time.perf_counter()
    (found,) = compare([CLAIM], journal, jobs=1, seeds=(pairs + 2, pairs + 2))
    assert found.cached
    return new, (time.perf_counter() - began) / (2 * pairs + 4), cpu


def benchopt(folder: Path, cells: int) -> tuple[float, float] | None:
    """The same of benchopt: seconds per new cell and per cached one, start-up taken off."""
    try:
        import benchopt  # noqa: F401
    except ImportError:
        print("benchopt is not installed (make bench-env): no peer", file=sys.stderr)
        return None
    for name, text in BENCHOPT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def run(repetitions: int) -> float:
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchopt", "run", str(folder), "-r", str(repetitions), "-n", "1"]
        subprocess.run([*command, "--no-plot", "--no-html"], check=True, capture_output=True, cwd=folder)
        return time.perf_counter() - began

    run(1)
    start = min(run(1) for _ in range(2))
    return (run(cells) - start) / (cells - 1), (min(run(cells) for _ in range(2)) - start) / cells


def start_up(words: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "counterproof", *words], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    trials, repeats = (40, 3) if options.quick else (200, 10)
    rows = []

    def row(work: str, size: str, mine: float, peer: float | None, name: str) -> None:
        ratio = None if peer is None else peer / mine
        rows.append({"work": work, "size": size, "ours": mine * 1000, "peer": peer and peer * 1000, "peer_name": name,
                     "unit": "ms", "ratio": ratio})  # fmt: skip
        against = "" if peer is None else f"   {name} {peer * 1000:8.2f} ms   ratio {ratio:.2f}"
        print(f"{work:42} {size:12} {mine * 1000:8.2f} ms{against}")

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        new, cached, cpu = ours(Path(one), trials)
        peer = benchopt(Path(other), trials)
    row("new trial, isolated in its own process", f"{trials} trials", new, peer and peer[0], "benchopt, not isolated")
    row("new trial, CPU time of the driver", f"{trials} trials", cpu, None, "")
    row("cached answer", f"{trials} trials", cached, peer and peer[1], "benchopt")
    python = min(_timed([sys.executable, "-c", "import click, yaml, numpy"]) for _ in range(repeats))
    for words in (["--help"], ["papers"], ["show", "group-detr"], ["search", "noise", "assignment"]):
        row(
            f"counterproof {' '.join(words)}",
            "start-up",
            start_up(words, repeats),
            python,
            "python + click, yaml, numpy",
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
