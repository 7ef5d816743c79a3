"""Leaderboards out of battles: reading, rating and a bootstrap of 1,000 rounds, beside arena-rank and choix.

    .venv/bin/python benchmarks/judging.py [--quick] [--json FILE]

Ratio = peer / ours, above 1 we are faster; CPU seconds, one thread. arena-rank pins its own jax and NumPy, so it runs
in an environment of its own (.bench/arena-rank, made on first use), on the same file. Its own bootstrap forks a process
that uses threads, and may wait for ever; what is timed is what that function does in each process: a fit of resampled
counts, after the first, which compiles. A thousand are reckoned from a few of them. choix has no bootstrap; it is given
win matrices of the same draws as ours. Ratings are compared first: to 1e-6 with choix; arena-rank stops early, and the
largest difference is printed in Elo. The last rows are ours alone: growth in battles, models and rounds, and the peak
memory of a process that reads a file.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import choix  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from _contest import Row, run  # noqa: E402

from counterproof.judging.battles import Battles, read_battles  # noqa: E402
from counterproof.judging.bradley_terry import BradleyTerry  # noqa: E402

HOME = Path(__file__).parents[1] / ".bench" / "arena-rank"
PEER = """
import json, sys, time
import numpy as np, pandas as pd
began = time.process_time()
from arena_rank.models.bradley_terry import BradleyTerry, fit_single_bootstrap_sample
from arena_rank.utils.data_utils import PairDataset
imported = time.process_time()
frame = pd.read_parquet(sys.argv[1])
data = PairDataset.from_pandas(frame)
read = time.process_time()
model = BradleyTerry(n_competitors=len(data.competitors))
model.fit(data)
ratings = np.asarray(model.params["ratings"])
fitted = time.process_time()
board = model.compute_ratings_and_cis(data, ci_method="sandwich")
counts = np.asarray(data.counts)
rng = np.random.default_rng(0)
each = []
for _ in range(int(sys.argv[2]) + 1):
    drawn = rng.multinomial(int(counts.sum()), counts / counts.sum()).astype(float)
    start = time.process_time()
    fit_single_bootstrap_sample(drawn, model, data)
    each.append(time.process_time() - start)
print("RESULT", json.dumps({
    "read": read - imported, "fit": fitted - read, "replicate": min(each[1:]),
    "ratings": dict(zip(data.competitors, ratings.tolist())),
}))
"""
MEMORY = """
import sys
from counterproof.judging.battles import read_battles
size = len(read_battles(sys.argv[1])) if len(sys.argv) > 1 else 0
# Not ru_maxrss, which a process inherits from the one that starts it.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) / 1024)
"""


def made(path: Path, battles: int, models: int) -> Path:
    """A file of battles by known abilities, written in parts."""
    rng = np.random.default_rng(0)
    ability = rng.normal(size=models) * 0.7
    names = np.array([f"model-{n:03d}" for n in range(models)])
    writer = None
    for begin in range(0, battles, 1 << 20):
        size = min(1 << 20, battles - begin)
        a = rng.integers(models, size=size)
        b = (a + rng.integers(1, models, size=size)) % models
        won = rng.random(size) < 1 / (1 + np.exp(ability[b] - ability[a]))
        draw = rng.random(size) < 0.1
        winner = np.where(draw, "tie", np.where(won, "model_a", "model_b"))
        table = pa.table({"model_a": names[a], "model_b": names[b], "winner": winner})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path


def arena_rank(path: Path, replicates: int) -> dict[str, Any]:
    python = HOME / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "arena-rank==0.1.1", "pyarrow"], check=True)
    single = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    command = [python, "-c", PEER, str(path), str(replicates)]
    ran = subprocess.run(command, capture_output=True, text=True, env=single)
    if ran.returncode:
        raise SystemExit(f"arena-rank failed:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.rpartition("RESULT ")[2])
    return found


def timed(work: Callable[[], Any], turns: int = 2) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(turns):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def win_matrix(battles: Battles, count: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(battles.models),) * 2)
    np.add.at(matrix, (battles.first, battles.second), count * battles.outcome)
    np.add.at(matrix, (battles.second, battles.first), count * (1 - battles.outcome))
    return matrix


def contests(quick: bool, _seconds: float) -> Iterator[Row]:
    battles, models, rounds = (100_000, 100, 200) if quick else (1_000_000, 100, 1000)
    size = f"{battles:,} battles, {models} models"
    with tempfile.TemporaryDirectory() as folder:
        path = made(Path(folder) / "battles.parquet", battles, models)
        reading, counted = timed(lambda: read_battles(path))
        fitting, fitted = timed(lambda: BradleyTerry().fit(counted))
        boot, _ = timed(lambda: fitted.bootstrap(rounds))
        theirs = arena_rank(path, 3)
        ratings = np.array([theirs["ratings"][name] for name in fitted.models_])
        gap = 400 / np.log(10) * np.abs(ratings - ratings.mean() - fitted.ratings_).max()
        note = f"arena-rank 0.1.1 (ratings within {gap:.3f} Elo)"
        yield Row("read", size, reading, theirs["read"], note, "s", theirs["read"] / reading)
        yield Row("fit", size, fitting, theirs["fit"], note, "s", theirs["fit"] / fitting)
        peer = theirs["replicate"] * rounds
        yield Row(f"bootstrap, {rounds:,} rounds", size, boot, peer, note, "s", peer / boot)
        ours = reading + fitting + boot
        peer = theirs["read"] + theirs["fit"] + peer
        yield Row(f"all, {rounds:,} rounds", size, ours, peer, note, "s", peer / ours)

        exact = choix.ilsr_pairwise_dense(win_matrix(counted, counted.count), tol=1e-12)
        assert np.abs(exact - exact.mean() - fitted.ratings_).max() < 1e-6
        rng, chance = np.random.default_rng(0), counted.count / counted.count.sum()

        def few() -> None:
            for draw in rng.multinomial(len(counted), chance, size=8):
                choix.ilsr_pairwise_dense(win_matrix(counted, draw.astype(float)))

        peer = timed(few)[0] / 8 * rounds
        yield Row(f"bootstrap, {rounds:,} rounds", size, boot, peer, "choix 0.4 (equal to 1e-6)", "s", peer / boot)

        def alone(work: str, what: str, value: float, unit: str = "s") -> Row:
            return Row(work, what, value, float("nan"), "ours alone", unit, float("nan"))

        counts = (10_000, 100_000) if quick else (100_000, 1_000_000, 10_000_000)
        files = {count: made(Path(folder) / f"{count}.parquet", count, models) for count in counts}
        for count, file in files.items():
            yield alone("read", f"{count:,} battles", timed(lambda file=file: read_battles(file))[0])
        for other in (25, 50, 200):
            more = read_battles(made(Path(folder) / "models.parquet", battles, other))
            model = BradleyTerry().fit(more)
            yield alone(
                f"bootstrap, {rounds:,} rounds", f"{other} models", timed(lambda m=model: m.bootstrap(rounds))[0]
            )
        for fewer in (rounds // 10, rounds // 2):
            taken = timed(lambda fewer=fewer: fitted.bootstrap(fewer))[0]
            yield alone(f"bootstrap, {fewer:,} rounds", f"{models} models", taken)
        base = float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)
        for count, file in files.items():
            ran = subprocess.run([sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=True)
            yield alone("peak memory over imports", f"{count:,} battles", float(ran.stdout) - base, "MB")


if __name__ == "__main__":
    run(__doc__, contests)
