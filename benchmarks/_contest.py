"""Two ways of one piece of work, in turns in one process on one thread; the fastest turn of either counts."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "contest", "run"]


@dataclass(frozen=True)
class Row:
    """A line of the table; `ratio` is peer / ours, above 1 where ours is faster."""

    work: str
    size: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float


def contest(
    work: str,
    size: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    name: str,
    *,
    same: Callable[[Any, Any], bool] | None = None,
    seconds: float,
) -> Row:
    """Measure both for about so many seconds, at least twice, in CPU milliseconds; first see that they do the same.

    Raises:
        AssertionError: when the two do not give the same.
    """
    if same is not None:
        assert same(ours(), peer()), f"{work}, {size}: ours and {name} differ"
    best = [float("inf"), float("inf")]
    end, turns = time.perf_counter() + seconds, 0
    while turns < 2 or time.perf_counter() < end:
        for index, way in enumerate((ours, peer)):
            began = time.process_time()
            way()
            best[index] = min(best[index], 1000 * (time.process_time() - began))
        turns += 1
    return Row(work, size, best[0], best[1], name, "ms", best[1] / best[0])


def run(doc: str, contests: Callable[[bool, float], Iterator[Row]]) -> None:
    """The command line of a benchmark: ``[--quick] [--json FILE]``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    for row in contests(options.quick, 0.3 if options.quick else 2.0):
        rows.append(asdict(row))
        times = f"{row.ours:10.2f} {row.peer:10.2f} {row.unit} {row.ratio:7.2f}".replace("nan", "  -")
        print(f"{row.work:34} {row.size:22} {times}  {row.peer_name}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
