"""How fast `counterproof.assign` is beside the libraries one would call instead.

    python benchmarks/assign.py [--quick] [--json FILE]

Every contest runs in this process on one thread: the contestants take turns, round after round, and each one's fastest
round counts, in CPU time, so that other work on the machine disturbs all alike and little. Before it is timed, every
contestant's answer is checked: the same optimal cost, or, for noise, a mean distance within 0.1 % of the optimum.
A library that is not installed is reported as absent on stderr, and has no row.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from scipy.sparse import block_diag  # noqa: E402

from counterproof.assign import (  # noqa: E402
    group_assignment,
    linear_assignment,
    linear_assignment_batch,
    quantized_assignment,
)
from counterproof.assign import noise as assign_noise  # noqa: E402

HAVE = {name: importlib.util.find_spec(name) is not None for name in ("lap", "torch", "torch_linear_assignment")}
if HAVE["torch"]:
    import torch

    torch.set_num_threads(1)
if HAVE["lap"]:
    from lap import lapjvs
if HAVE["torch_linear_assignment"]:
    from torch_linear_assignment import batch_linear_assignment


@dataclass
class Contest:
    """One kind of work at one size: ours, its peers, and what makes an answer right."""

    work: str
    size: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any] | None]
    """None for a peer that is not installed."""
    score: Callable[[Any], float]
    """Of an answer; all contestants' scores must agree to within `slack` of the best."""
    slack: float = 1e-5
    unit: str = "ms"
    times: dict[str, float] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        runners = {"ours": self.ours} | {name: call for name, call in self.peers.items() if call is not None}
        scores, loops = {}, {}
        for name, call in runners.items():
            began = time.process_time()
            answer = call()
            self.times[name] = time.process_time() - began
            scores[name] = self.score(answer)
            loops[name] = max(1, int(0.01 / max(self.times[name], 1e-6)))
        best = min(scores.values())
        for name, score in scores.items():
            if not abs(score - best) <= self.slack * max(abs(best), 1e-9):
                raise AssertionError(f"{self.work}, {self.size}: {name} reaches {score:.9g}, the best {best:.9g}")
        began, rounds = time.perf_counter(), 0
        while rounds < 50 and time.perf_counter() - began < (5 * seconds if rounds < 3 else seconds):
            for name, call in runners.items():
                self.times[name] = min(self.times[name], cpu(call, loops[name]))
            rounds += 1

    def rows(self) -> Iterator[dict[str, Any]]:
        scale = {"ms": 1e3, "us": 1e6}[self.unit]
        for name in self.peers:
            if name in self.times:
                ours, peer = self.times["ours"] * scale, self.times[name] * scale
                yield {
                    "work": self.work,
                    "size": self.size,
                    "ours": round(ours, 4),
                    "peer": round(peer, 4),
                    "peer_name": name,
                    "unit": self.unit,
                    "ratio": round(peer / ours, 3),
                }


def cpu(call: Callable[[], Any], loops: int) -> float:
    began = time.process_time()
    for _ in range(loops):
        call()
    return (time.process_time() - began) / loops


def detection_cost(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """5 * L1 of normalised boxes - 2 * probability, as DETR matches; (..., queries, objects)."""
    *batch, n, m = shape
    boxes, objects = rng.random((*batch, n, 1, 4)), rng.random((*batch, 1, m, 4))
    return (5 * np.abs(boxes - objects).sum(-1) - 2 * rng.random(shape)).astype(np.float32)


def solve_lapx(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return lapjvs(cost, return_cost=False)


def detection(quick: bool) -> Iterator[Contest]:
    """Plain matching: arrays beside SciPy and lapx, tensors beside transformers' loop and torch-linear-assignment."""
    rng = np.random.default_rng(0)
    shapes = [(100, 20, False), (300, 20, False), (300, 40, True)] + ([] if quick else [(900, 30, False)])
    for n, m, ragged in shapes:
        for batch in (1, 16, 64):
            costs = detection_cost(rng, batch, n, m)
            sizes = rng.integers(0, m + 1, batch).tolist() if ragged else [m] * batch
            views = [cost[:, :size] for cost, size in zip(costs, sizes)]
            size = f"{batch} x {n}x{'0-' if ragged else ''}{m}"

            def score(pairs: Any, views: list[np.ndarray] = views) -> float:
                return float(
                    sum(view[np.asarray(i), np.asarray(j)].sum(dtype=float) for view, (i, j) in zip(views, pairs))
                )

            if batch == 1 and not ragged:
                ours: Callable[[], Any] = lambda cost=costs[0]: [linear_assignment(cost)]  # noqa: E731
            elif ragged:
                ours = lambda costs=costs, sizes=sizes: linear_assignment_batch(costs, sizes)  # noqa: E731
            else:
                ours = lambda costs=costs: linear_assignment_batch(costs)  # noqa: E731
            peers: dict[str, Any] = {
                "scipy in a loop": lambda costs=costs, sizes=sizes: [
                    linear_sum_assignment(cost[:, :size]) for cost, size in zip(costs, sizes)
                ]
            }
            if batch == 1 and n <= 300:
                peers["lapx"] = (lambda views=views: [solve_lapx(view) for view in views]) if HAVE["lap"] else None
            yield Contest("detection", size, ours, peers, score, unit="us")
            if HAVE["torch"]:
                tensors = torch.from_numpy(costs)
                if batch == 1 and not ragged:
                    ours = lambda cost=tensors[0]: [linear_assignment(cost)]  # noqa: E731
                elif ragged:
                    ours = lambda costs=tensors, sizes=sizes: linear_assignment_batch(costs, sizes)  # noqa: E731
                else:
                    ours = lambda costs=tensors: linear_assignment_batch(costs)  # noqa: E731
                peers = {
                    "scipy in a loop, as transformers": lambda costs=tensors, sizes=sizes: [
                        tuple(
                            torch.as_tensor(index, dtype=torch.int64) for index in linear_sum_assignment(cost[:, :size])
                        )
                        for cost, size in zip(costs, sizes)
                    ],
                    "scipy in a loop, bare": lambda costs=tensors, sizes=sizes: [
                        tuple(map(torch.from_numpy, linear_sum_assignment(cost[:, :size])))
                        for cost, size in zip(costs.numpy(), sizes)
                    ],
                }
                if not ragged:  # it has no sizes

                    def joined(costs: Any = tensors) -> Any:
                        columns = batch_linear_assignment(costs)
                        return [(torch.where(c >= 0)[0], c[c >= 0]) for c in columns]

                    peers["torch-linear-assignment"] = joined if HAVE["torch_linear_assignment"] else None
                yield Contest("detection, tensors", size, ours, peers, score, unit="us")


def groups(quick: bool) -> Iterator[Contest]:
    """Group DETR: eleven groups of 300 queries, 20 objects."""
    rng = np.random.default_rng(1)
    for batch in (1,) if quick else (1, 16):
        costs = detection_cost(rng, batch, 3300, 20)

        def score(pairs: Any, costs: np.ndarray = costs) -> float:
            return float(sum(cost[i, j].sum(dtype=float) for cost, (i, j) in zip(costs, pairs)))

        def loop(costs: np.ndarray = costs) -> Any:
            pairs = []
            for cost in costs:
                blocks = [linear_sum_assignment(block) for block in np.split(cost, 11)]
                rows = np.concatenate([block[0] + 300 * g for g, block in enumerate(blocks)])
                pairs.append((rows, np.concatenate([block[1] for block in blocks])))
            return pairs

        def joint(costs: np.ndarray = costs) -> Any:
            pairs = []
            for cost in costs:
                blocks = cost.reshape(11, 300, 20)
                allowed = block_diag([np.ones((300, 20))] * 11).toarray() > 0
                forbidden = np.full((3300, 220), np.inf)
                forbidden[allowed] = blocks.reshape(-1)
                rows, columns = linear_sum_assignment(forbidden)
                pairs.append((rows, columns % 20))
            return pairs

        peers = {"scipy, block by block": loop} | ({"scipy, one joint problem": joint} if batch == 1 else {})
        yield Contest("groups", f"{batch} x 11x300x20", lambda costs=costs: group_assignment(costs, 11), peers, score)


def squares(quick: bool) -> Iterator[Contest]:
    """Random squares, float32."""
    rng = np.random.default_rng(2)
    for n in (128, 512) if quick else (128, 512, 1024, 2048):
        cost = rng.random((n, n), dtype=np.float32)
        peers: dict[str, Any] = {
            "scipy": lambda cost=cost: linear_sum_assignment(cost),
            "lapx": (lambda cost=cost: solve_lapx(cost)) if HAVE["lap"] else None,
        }

        def score(pair: Any, cost: np.ndarray = cost) -> float:
            return float(cost[pair].sum(dtype=float))

        yield Contest("square", f"{n}x{n}", lambda cost=cost: linear_assignment(cost), peers, score)
        if HAVE["lap"]:
            lapx: Callable[[], Any] = lambda cost=cost: linear_assignment(cost, backend="lapx")  # noqa: E731
            yield Contest("square, backend='lapx'", f"{n}x{n}", lapx, peers, score)


def distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Euclidean, float32, by one matrix product: the fastest way here, given to the peers too."""
    cost = rows @ columns.T
    cost *= -2
    cost += (rows * rows).sum(1)[:, None]
    cost += (columns * columns).sum(1)[None]
    return np.sqrt(np.maximum(cost, 0, out=cost), out=cost)


def noise(quick: bool) -> Iterator[Contest]:
    """Samples of half the noise's spread; the peers solve the float32 cost, in both orientations."""
    rng = np.random.default_rng(3)
    for d in (64, 3072):
        for n in (128, 512) if quick else (128, 512, 1024, 2048):
            x, z = (rng.standard_normal((n, d), dtype=np.float32) * scale for scale in (0.5, 1.0))
            true = distances(x, z)
            size = f"n={n} d={d}"

            def score(perm: Any, true: np.ndarray = true) -> float:
                return float(true[np.arange(len(true)), perm].mean(dtype=float))

            def undo(pair: Any) -> np.ndarray:
                perm = np.empty(len(pair[0]), np.int64)
                perm[pair[1]] = pair[0]
                return perm

            peers: dict[str, Any] = {
                "scipy, float32, samples in rows": lambda x=x, z=z: linear_sum_assignment(distances(x, z))[1],
                "scipy, float32, noise in rows": lambda x=x, z=z: undo(linear_sum_assignment(distances(z, x))),
                "lapx, float32, noise in rows": (
                    (lambda x=x, z=z: undo(solve_lapx(distances(z, x)))) if HAVE["lap"] else None
                ),
            }
            call: Callable[[], Any] = lambda x=x, z=z: quantized_assignment(x, z)  # noqa: E731
            yield Contest("noise, whole call", size, call, peers, score, slack=1e-3)
            cost = np.ascontiguousarray(true.T)

            def solve(backend: str, cost: np.ndarray = cost) -> np.ndarray:
                # What quantized_assignment does once it has the distances; the copy is held against us.
                rounded = cost.copy()
                assign_noise._round(rounded, 11)
                return undo((np.arange(len(cost)), assign_noise._solve(rounded, 11, backend)))  # type: ignore[arg-type]

            peers = {
                "scipy, float32, samples in rows": lambda true=true: linear_sum_assignment(true)[1],
                "scipy, float32, noise in rows": lambda cost=cost: undo(linear_sum_assignment(cost)),
                "scipy, float16, noise in rows": lambda cost=cost: undo(linear_sum_assignment(cost.astype(np.float16))),
                "lapx, float32, noise in rows": (lambda cost=cost: undo(solve_lapx(cost))) if HAVE["lap"] else None,
            }
            scipy_backend: Callable[[], Any] = lambda solve=solve: solve("scipy")  # noqa: E731
            yield Contest("noise, solve", size, scipy_backend, peers, score, slack=1e-3)
            if HAVE["lap"]:
                peers = {
                    "lapx, float32, noise in rows": lambda cost=cost: undo(solve_lapx(cost)),
                    "lapx, float16, noise in rows": lambda cost=cost: undo(
                        solve_lapx(cost.astype(np.float16).astype(np.float32))
                    ),
                }
                lapx_backend: Callable[[], Any] = lambda solve=solve: solve("lapx")  # noqa: E731
                yield Contest("noise, solve, backend='lapx'", size, lapx_backend, peers, score, slack=1e-3)


WORK = {"detection": detection, "groups": groups, "square": squares, "noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="ratio = peer / ours: above 1 we are faster.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes and fewer rounds: about a quarter of a minute"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rows: work, size, ours, peer, peer_name, unit, ratio"
    )
    parser.add_argument("--only", choices=WORK, action="append", help="this work only; may be repeated")
    options = parser.parse_args()
    for module, package in (
        ("lap", "lapx"),
        ("torch", "torch"),
        ("torch_linear_assignment", "torch-linear-assignment"),
    ):
        if not HAVE[module]:
            print(f"absent: {package} is not installed, its rows are left out", file=sys.stderr)
    rows = []
    print(f"{'work':30} {'size':16} {'ours':>10} {'peer':>10}    {'ratio':>6}  peer (ratio = peer / ours)")
    for name in options.only or WORK:
        for contest in WORK[name](options.quick):
            contest.run(0.2 if options.quick else 1.0)
            for row in contest.rows():
                rows.append(row)
                print(
                    f"{row['work']:30} {row['size']:16} {row['ours']:10.2f} {row['peer']:10.2f} {row['unit']} "
                    f"{row['ratio']:6.2f}  {row['peer_name']}",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
